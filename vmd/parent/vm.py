"""One VM that the daemon knows, and its state (*cat. 4.1, 4.2*)."""

import errno
import time
from collections.abc import Iterator

from vmd.backlog import Backlog, Output
from vmd.closing import close, close_all
from vmd.config.model import NicConfig, VmConfig
from vmd.enums import Enum
from vmd.errors import VMD_VM_STOP_INVALID, HostError, OperatorError
from vmd.ipc.messages.clients import Caller, VmSent
from vmd.ipc.messages.figures import LifeEnd
from vmd.memfile import is_constant, is_fixed, memory_file
from vmd.parent import endings
from vmd.parent.access import may_control, not_allowed
from vmd.parent.freeing import let_go
from vmd.parent.limits import RestartLimit
from vmd.parent.resources import Pty, copy_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmd.ipc.loop import Timer
    from vmd.ipc.messages.shared import DiskImages

    Files = dict[str, tuple[int, int]]  # name of a disk, backing file or disc, as shown to users -> `FileId.key`


class State(Enum):
    """Where a VM is in its life; the value is what `vmctl status` shows."""

    STOPPED = "stopped"
    WAITING = "waiting"  # for its turn in a staggered start
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SENDING = "sending"
    SAVING = "saving"  # it is paused for a snapshot
    RECEIVING = "receiving"
    STOPPING = "stopping"
    IN_DOUBT = "in doubt"  # it is paused here, and may run on another host


SEE = "`vmctl unpause -f`"
AUTOMATIC = ("", "tap")  # names of taps that let priv choose any free name
CONFIGS = ("config", "running_config", "next_config")  # attributes of a Vm
LOCKS_LINGER_S = 1.0
SHOWN_BYTES_MAX = 1 << 48  # a VM process may write any count; the next life starts counting from a smaller one
ALIVE = tuple(state for state in State if state not in (State.STOPPED, State.WAITING))  # states with a VM process


class At(Enum):
    """The step that a migration has reached, in order (`vmd.parent.migrations`).  A step is of both ends or of one."""

    BEGINNING = 0
    ASKED = 1  # both: the header is written, or read and checked; the client says when to continue
    MEMORY = 2  # both: the memory is being written, or read
    COMPLETE = 3  # both: everything is written, or read
    COMMITTING = 4  # source: the disks are being released; target: they are being opened
    COMMITTED = 5  # source: the client knows that the disks are released
    UNDOING = 6  # source: the disks are being taken back


class Sending:
    """The state of a VM that is sent, saved for a snapshot, or migrated away."""

    def __init__(self, *, keep: bool, state: State, carried: bool = False) -> None:
        self.keep = keep
        self.state = state  # the VM returns to it if it stays here
        self.carried = carried  # it migrates
        self.at = At.BEGINNING
        self.locks_travel = False  # a lock that is held here is seen on the target
        self.abandoned = ""  # why the migration ends without success, once its current step is over
        self.sent_bytes = self.rounds = 0
        self.stopped_ns = 0  # when its guest was paused for the migration, by CLOCK_MONOTONIC
        self.retry: Timer | None = None  # for the next attempt to take the disks back
        self.tries = 0  # attempts to take the disks back
        self.refused = ""  # why the last attempt failed


class Receiving:
    """The state of a VM that is received."""

    def __init__(
        self, *, paused: bool, carried: bool = False, trusted: bool = False, config: VmConfig | None = None
    ) -> None:
        self.paused = paused
        self.config = config  # of a VM that goes back to its snapshot: this counts instead of the stream's
        self.carried = carried  # it migrates, and runs only after the client's COMMIT
        self.trusted = trusted  # the operator vouches that its disks are the sender's, although no lock shows that
        self.at = At.BEGINNING
        self.resumed = False  # its process was told to run the guest
        self.unbuilt = False  # its process has answered that it could not build the machine
        self.complete = False  # everything is read; only the disks are missing
        self.deadline_s = 0.0  # for the locks of its disks, by CLOCK_MONOTONIC
        self.failure = ""  # why receiving was given up


class DeviceChange:
    """A change of a VM that is under way: a disk is resized, or the disc in its drive is changed."""

    def __init__(self, what: str) -> None:
        self.what = what  # such as disk0


class Vm:
    """One VM; owned by the table.

    Each assignment to an attribute increments `changes` and calls `on_change`: the next parent must learn it.
    `on_event` is called for each change of its state: with the event, its reason, and how the VM ended if it has ended.
    """

    config: VmConfig
    running_config: VmConfig | None = None  # of a VM that is or was received, once its stream was accepted
    next_config: VmConfig | None = None  # takes effect when the current life ends
    claims: tuple[NicConfig, ...]  # interfaces with names or addresses that no other VM may have
    changes = 0
    on_change: "Callable[[Vm], None]" = staticmethod(lambda _vm: None)
    on_event: "Callable[[Vm, str, str, str], None]" = staticmethod(lambda _vm, _what, _text, _how: None)

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if name in CONFIGS:
            claims = tuple(nic for nic in self.nics() if nic.address is not None or nic.tap not in AUTOMATIC)
            object.__setattr__(self, "claims", claims)
        if name not in ("changes", "on_change", "on_event"):
            self.changed()

    def __init__(self, vmid: int, config: VmConfig, *, from_config: bool) -> None:
        self.vmid = vmid
        self.key = config.name, config.owner.uid  # of its identity, which has its id and addresses
        self.config = config
        self.from_config = from_config  # stays in the table after its end; other VMs are forgotten then
        self._state = State.STOPPED
        self.since_s = time.time()  # when it came into this state
        self.started_s = 0.0  # when the current life began
        self.starts = 0  # lives so far, the current one included
        self.guest_resets = 0  # in the current life
        self.last_end: LifeEnd | None = None
        self.memory: int | None = None  # file of the guest's memory; the parent reads only how much is in use
        self.figures: int | None = None  # file of the counters of its devices (`vmd.parent.figures`)
        self.uid = config.owner.uid  # while it runs: the user who started it
        self.pid = 0
        self.pty: Pty | None = None
        self.backlog: Backlog | None = None  # the last output of the console; exists as long as the pty
        self.shown_before = 0  # bytes of console output in earlier lives
        self.restarts = RestartLimit()
        self.notes: tuple[str, ...] = ()  # what the operator should know about its start
        self.text = ""  # why it stopped
        self.code = errno.EIO  # why it stopped, as an errno
        self.memory_lack = ""  # which memory was missing when its last process ended (`groups.memory_lack`)
        self.ended_s = -LOCKS_LINGER_S  # by CLOCK_MONOTONIC
        self.next_config = None
        self.resetting = False  # `vmctl reset` has killed it; it is forgotten when it has ended
        self.successor: VmConfig | None = None  # the VM of the same name that follows one that is resetting
        self.files: Files = {}  # its images and its disc
        self.disks: tuple[DiskImages, ...] = ()  # while it runs: the images of each disk
        self.running_config = None
        self.sending: Sending | None = None
        self.going_back = False  # its disks may already be in the state of a snapshot
        self.revive: Callable[[], None] | None = None  # called at the end of its process, instead of the usual steps
        self.sent: VmSent | None = None  # the answer to the client that had it sent, once it has ended
        self.receiving: Receiving | None = None
        self.changing: DeviceChange | None = None
        self.console_user = ""  # the user of the console, if there is one
        self.disk_work = ""  # why it cannot be started while an imgwriter uses its disks
        self.once_because = ""  # why a reset of the guest ends the VM instead of starting it again
        self.kept: dict[str, int] = {}  # sealed copies of a client's kernel and initrd, and the seed

    @property
    def name(self) -> str:
        """The name, unique in the table."""
        return self.config.name

    @property
    def state(self) -> State:
        """The current state."""
        return self._state

    def _enter(self, state: State, what: str, text: str = "") -> None:
        """Change the state and report the event `what` (`vmd.parent.events`).  With "" the caller reports it."""
        if state is not self._state:
            self._state, self.since_s = state, time.time()
            if what:
                self.on_event(self, what, text, "")

    def changed(self) -> None:
        """Count a change that no assignment shows, such as one inside a record of this VM."""
        self.changes += 1
        self.on_change(self)

    def restore_state(self, state: State, since_s: float | None = None) -> None:
        """Set the state that an earlier parent has written, or that vmm reports; no event is reported."""
        self._state = state
        if since_s is not None:
            self.since_s = since_s

    @property
    def alive(self) -> bool:
        """Whether there is a VM process."""
        return self.state in ALIVE

    def require_startable(self) -> None:
        """Raise OperatorError, with the reason, if the VM cannot be started now: it runs, or its disks are in use."""
        if self.alive:
            state = "already running" if self.state is State.RUNNING else self.state.value
            raise OperatorError(errno.EALREADY, f"vm {self.name} is {state}")
        if self.disk_work:
            raise OperatorError(errno.EBUSY, f"vm {self.name}: {self.disk_work}")
        self.require_unchanging()

    def begin_disk_work(self, what: str) -> None:
        """Keep the VM from being started.  Raises OperatorError if it runs, or if its disks are in use already."""
        self.require_startable()
        self.disk_work = what

    def end_disk_work(self) -> None:
        """Let the VM be started again."""
        self.disk_work = ""

    def require_control(self, caller: Caller, what: str) -> None:
        """Raise OperatorError(EPERM) unless the caller may do `what`; the user who has started the VM may."""
        if not may_control(caller, self.uid, self.config.owner.gid):
            raise not_allowed(caller, f"{what} vm {self.name}", self.uid, self.config.owner.gid)

    def require_unchanging(self) -> None:
        """Raise OperatorError if a change of it is under way."""
        if self.changing is not None:
            raise OperatorError(errno.EBUSY, f"vm {self.name}: {self.changing.what} is being changed")

    def begin_change(self, change: DeviceChange) -> None:
        """Begin a change.  The VM must be stopped, running or paused, and must have no other change under way.

        Raises OperatorError.
        """
        self.require_unchanging()
        if self._state not in (State.STOPPED, State.RUNNING, State.PAUSED):
            raise OperatorError(errno.EBUSY, f"vm {self.name} is {self._state.value}")
        if self.receiving is not None:
            raise OperatorError(errno.EBUSY, f"vm {self.name} still waits for its disks: {self.text}")
        if self.disk_work:
            raise OperatorError(errno.EBUSY, f"vm {self.name}: {self.disk_work}")
        self.changing = change

    def enqueue(self) -> None:
        """STOPPED -> WAITING."""
        self.require_startable()
        self._enter(State.WAITING, "waiting")

    def leave_queue(self, why: str = "") -> None:
        """WAITING -> STOPPED: it will not be started.  `why` is given if an attempt to start it has failed."""
        if self._state is State.WAITING:
            self._enter(State.STOPPED, "failed" if why else "stop", why or "was waiting for its start")
        self.text = why

    def begin_start(self, uid: int, *, again: bool = False) -> None:
        """STOPPED or WAITING -> STARTING for a user.  `again`: its guest has reset itself, and the life continues."""
        self._begin(State.STARTING, "reboot" if again else "start", again=again)
        self.uid = uid

    def begin_receive(self, receiving: Receiving, *, again: bool = False) -> None:
        """STOPPED or WAITING -> RECEIVING.  `again`: it goes back to a snapshot, and the life continues."""
        self._begin(State.RECEIVING, "receive", again=again)
        self.receiving = receiving

    def _begin(self, state: State, what: str, *, again: bool = False) -> None:
        self.require_startable()
        self.going_back = False
        self._enter(state, what)
        if not again:
            self.started_s, self.guest_resets = time.time(), 0
            self.starts += 1
        self.text, self.code = "", errno.EIO

    def begin_run(self, pid: int) -> None:
        """STARTING -> RUNNING.  A VM that was told to stop meanwhile stays STOPPING."""
        self.pid = pid
        if self._state is State.STARTING:
            self._enter(State.RUNNING, "ready")

    def begin_reboot(self) -> None:
        """Any state with a process -> STOPPED: its process has ended, and the caller starts another one at once."""
        assert self.alive
        self._enter(State.STOPPED, "")
        self.pid = 0
        self.take_figures(None)
        self.changing = None

    def require_pausable(self) -> None:
        """Raise OperatorError unless the guest executes, or is paused."""
        if self._state is State.IN_DOUBT:
            raise OperatorError(errno.EBUSY, f"vm {self.name} is in doubt: {self.text}; see {SEE}")
        if self._state not in (State.RUNNING, State.PAUSED):
            state = "is not running" if not self.alive else f"is {self._state.value}"
            raise OperatorError(errno.EINVAL, f"vm {self.name} {state}")

    def require_sendable(self) -> None:
        """Raise OperatorError unless the machine can be written, to another host or to a snapshot."""
        self.require_pausable()
        if self.receiving is not None:
            raise OperatorError(errno.EBUSY, f"vm {self.name} still waits for its disks: {self.text}")
        self.require_unchanging()

    def pause_changed(self, *, paused: bool) -> None:
        """RUNNING <-> PAUSED.  A VM that is being stopped stays STOPPING.

        A VM that is being sent stays SENDING, and gets the new state if it stays here.
        """
        state = State.PAUSED if paused else State.RUNNING
        if self._state in (State.RUNNING, State.PAUSED):
            self._enter(state, "pause" if paused else "unpause")
            if not paused:
                self.text = ""
        elif self.sending is not None:
            self.sending.state = state

    def halted(self, why: str) -> bool:
        """RUNNING -> PAUSED without a request; return whether the VM was RUNNING."""
        ran = self._state is State.RUNNING
        self.pause_changed(paused=True)
        if ran:
            self.text = why
        return ran

    def begin_send(self, *, keep: bool, carried: bool = False, state: State = State.SENDING) -> None:
        """RUNNING or PAUSED -> SENDING or SAVING.  Raises OperatorError."""
        self.require_sendable()
        self.sending = Sending(keep=keep, state=self._state, carried=carried)
        self._enter(state, "saving" if state is State.SAVING else "migrate" if carried else "send")

    def stay(self) -> None:
        """SENDING, SAVING or IN_DOUBT -> the state before: the VM was not sent, or only a copy of it was."""
        if self.sending is not None and self._state in (State.SENDING, State.SAVING, State.IN_DOUBT):
            self._enter(self.sending.state, "resume")
            self.text = ""
        self._end_sending()

    def _end_sending(self) -> None:
        if self.sending is not None and self.sending.retry is not None:
            self.sending.retry.cancel()
        self.sending = None

    def doubt(self, why: str) -> None:
        """SENDING -> IN_DOUBT: nobody knows whether the VM runs on another host.  A VM in doubt gets another reason."""
        if self._state is State.SENDING:
            self._enter(State.IN_DOUBT, "in doubt", why)
        if self._state is State.IN_DOUBT:
            self.text = why

    def leave(self, sent: VmSent) -> None:
        """SENDING -> STOPPING: the VM was sent.  That also holds for a VM that is being stopped meanwhile."""
        self.sent = sent
        self._end_sending()
        self._enter(State.STOPPING, "sent")

    def wait_for_disks(self, why: str) -> bool:
        """RECEIVING -> PAUSED: everything is read, but its disks or interfaces are missing.

        Returns False if the VM is not being received any more.
        """
        if self.receiving is None or self._state is State.STOPPING:
            return False
        self._enter(State.PAUSED, "pause", why)
        self.text = why
        return True

    def try_again(self, receiving: Receiving) -> None:
        """PAUSED without its disks -> RECEIVING, for another attempt to run it.  Raises OperatorError."""
        self.require_pausable()
        receiving.paused = False
        self._enter(State.RECEIVING, "receive")

    def end_receive(self, pid: int, *, paused: bool) -> None:
        """RECEIVING -> RUNNING or PAUSED.  A VM that was told to stop meanwhile stays STOPPING."""
        self.receiving = None
        self.pid, self.text = pid, ""
        if self._state is State.RECEIVING:
            self._enter(State.PAUSED if paused else State.RUNNING, "received")

    def drop_transfer(self) -> VmSent | None:
        """The process has ended, so nothing is sent or received any more.

        Returns the answer for the client that had the VM sent, if it was sent.
        """
        sent, self.sent = self.sent, None
        self._end_sending()
        self.receiving = None
        return sent

    def begin_stop(self, *, force: bool) -> None:
        """Any state with a process -> STOPPING.  A forced stop may follow a graceful one.  Raises OperatorError."""
        if not self.alive:
            raise OperatorError(VMD_VM_STOP_INVALID, f"vm {self.name} is not running")
        if self._state is State.STOPPING and not force:
            raise OperatorError(errno.EALREADY, f"vm {self.name} is already stopping")
        if self._state in (State.SENDING, State.SAVING) and not force:
            doing = "being sent" if self._state is State.SENDING else "paused for a snapshot"
            raise OperatorError(errno.EBUSY, f"vm {self.name} is {doing}; interrupt that, or stop it by force")
        if self._state is State.IN_DOUBT and not force:
            raise OperatorError(errno.EBUSY, f"vm {self.name} is in doubt: {self.text}; stop it by force, or see {SEE}")
        self._enter(State.STOPPING, "stopping")

    def ended(self, text: str, how: str = endings.FAILED) -> None:
        """Any state -> STOPPED: the process has ended, or was never started."""
        if self.next_config is not None:
            self.config, self.next_config = self.next_config, None
        what = "stop" if how != endings.FAILED else "crash" if self.pid else "failed"
        self._enter(State.STOPPED, "")
        self.pid = 0
        self.text = text
        self.last_end = LifeEnd(at_s=int(self.since_s), how=how, text=text)
        self.take_memory(None)
        self.take_figures(None)
        self.ended_s = time.monotonic()
        self.uid = self.config.owner.uid
        self.once_because = ""
        self.running_config = None
        self.changing = None
        self.on_event(self, what, text, how)

    def nics(self) -> "Iterator[NicConfig]":
        """Return every interface that the VM has now, or will have in its next life."""
        for config in (self.config, self.running_config, self.next_config):
            yield from config.nics if config is not None else ()

    def patience_s(self) -> float:
        """Return for how long the locks of this VM's last life may remain: a killed process does not end at once."""
        return max(0.0, self.ended_s + LOCKS_LINGER_S - time.monotonic())

    def keep_files(self, names: "Sequence[str]") -> None:
        """Make empty memory files for copies of a kernel and an initrd that a client has opened.  Raises HostError.

        A VM that vm.conf does not describe reboots from these copies.
        """
        try:
            for name in names:
                self.kept[name] = memory_file(name)
        except OSError as error:
            raise HostError("keep the boot image of a client", error) from error

    def new_seed(self) -> None:
        """Make an empty memory file for the seed of this life; close the previous seed.  Raises HostError."""
        self.drop_seed()
        try:
            self.kept["seed"] = memory_file("seed")
        except OSError as error:
            raise HostError("keep a seed", error) from error
        self.changed()

    def drop_seed(self) -> None:
        """Close the seed, if there is one."""
        fd = self.kept.pop("seed", None)
        if fd is not None:
            close(fd)
            self.changed()

    def drop_files(self) -> None:
        """Close the kept files."""
        close_all(self.kept.values())
        self.kept.clear()

    def take_memory(self, fd: int | None) -> None:
        """Replace the file of the guest's memory.  Owns the descriptor."""
        if self.memory is not None:
            let_go(self.memory)
        self.memory = fd

    def take_figures(self, fd: int | None) -> None:
        """Replace the file of the devices' counters.  Owns the descriptor.

        The descriptor comes from vmm, which could send any file.  A file that can be resized is not read.
        """
        if self.figures is not None:
            close(self.figures)
        self.figures = fd
        if fd is not None and not is_fixed(fd):
            close(fd)
            self.figures = None

    def open_console(self) -> bool:
        """Make a pty and a backlog if the VM has none; return whether they are new.  Raises HostError."""
        if self.pty is not None:
            return False
        pty = Pty()
        try:
            self.backlog = Backlog.create(self.shown_before)
        except OSError as error:
            pty.close()
            raise HostError("keep the output of the console", error) from error
        self.pty = pty
        return True

    def process_fds(self, *, arrives: bool = False) -> dict[str, list[int]]:
        """Return copies of the descriptors that a new VM process gets; the caller owns them.  Raises HostError.

        They are the console, an empty file for the guest's memory, the seed, and the kept boot files, if there are any.
        For a VM that `arrives` the file of the seed is empty: the stream fills it.
        """
        assert self.pty is not None
        assert self.backlog is not None
        try:
            for name, fd in self.kept.items():
                if not is_constant(fd) and not (arrives and name == "seed"):
                    raise HostError(f"keep the {name} of vm {self.name}", errno.EBADF)
            self.take_memory(memory_file("guest-memory"))
        except OSError as error:
            raise HostError("make a file for the guest's memory", error) from error
        assert self.memory is not None
        names = {"kernel": "boot", "initrd": "initrd", "seed": "seed"}
        ours = {
            "tty": self.pty.master,
            "tty_slave": self.pty.slave,
            "shown": self.backlog.fd,
            "memory": self.memory,
            **{names[name]: fd for name, fd in self.kept.items()},
        }
        copies = copy_all(list(ours.values()), f"hand over {self.pty.path} and the other files of vm {self.name}")
        return {name: [fd] for name, fd in zip(ours, copies, strict=True)}

    def take_console(self) -> tuple[Pty, Output] | None:
        """Detach the console at the end of the VM; the caller owns the pty."""
        pty, backlog, self.pty, self.backlog = self.pty, self.backlog, None, None
        if pty is None or backlog is None:
            return None
        output = backlog.read()
        backlog.close()
        self.shown_before = output.end % SHOWN_BYTES_MAX
        return pty, output

    def drop_pty(self) -> None:
        """Detach the console and close it at once."""
        console = self.take_console()
        if console is not None:
            console[0].close()
