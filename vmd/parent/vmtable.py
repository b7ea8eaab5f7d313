"""Every VM the daemon knows, and the state it is in (*cat. 4.1, 4.2*)."""

import contextlib
import errno
import time
from collections.abc import Iterator

from vmd.backlog import Backlog, Output
from vmd.closing import close, close_all
from vmd.config.model import NicConfig, Prefix, VmConfig
from vmd.enums import Enum
from vmd.errors import VMD_VM_STOP_INVALID, HostError, InUse, OperatorError, PeerError
from vmd.ipc.messages.clients import Caller, VmSent
from vmd.ipc.messages.figures import LifeEnd
from vmd.memfile import is_constant, is_fixed, memory_file
from vmd.parent import endings
from vmd.parent.access import may_control, not_allowed
from vmd.parent.addresses import random_lladdr
from vmd.parent.freeing import let_go
from vmd.parent.identity import Identities
from vmd.parent.limits import RestartLimit
from vmd.parent.resources import Pty, copy_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmd.ipc.loop import Timer
    from vmd.ipc.messages.shared import DiskImages

    Files = dict[str, tuple[int, int]]  # disk, backing file or disc, in words -> `FileId.key`


class State(Enum):
    """Where a VM is in its life; the value is what `vmctl status` shows."""

    STOPPED = "stopped"
    WAITING = "waiting"  # for its turn in a staggered start
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SENDING = "sending"
    SAVING = "saving"  # it stands still for a snapshot
    RECEIVING = "receiving"
    STOPPING = "stopping"
    IN_DOUBT = "in doubt"  # it may run elsewhere, and stands still here


SEE = "`vmctl unpause -f`"
AUTOMATIC = ("", "tap")  # names of interfaces: any will do
CONFIGS = ("config", "running_config", "next_config")  # of a Vm
LOCKS_LINGER_S = 1.0
SHOWN_MAX = 1 << 48  # a number that a VM process has made up must not be too large for its next life
ALIVE = tuple(state for state in State if state not in (State.STOPPED, State.WAITING))  # states with a VM process


class At(Enum):
    """How far a migration is; each is followed by the next one (`vmd.parent.migrations`)."""

    BEGINNING = 0
    ASKED = 1  # the header is written, or read and judged: whoever carries it says when to go on
    MEMORY = 2  # is written, or read
    COMPLETE = 3  # all is
    COMMITTING = 4  # here the disks are let go, there they are taken
    COMMITTED = 5  # here: whoever carries it knows that they are
    UNDOING = 6  # here: the disks are taken back


class Sending:
    """A VM on its way out."""

    def __init__(self, *, keep: bool, state: State, carried: bool = False) -> None:
        self.keep = keep
        self.state = state  # to which it returns
        self.carried = carried  # it migrates
        self.at = At.BEGINNING
        self.locks_travel = False  # who has the disks here cannot have them there
        self.abandoned = ""  # why it is not to go on, though it is at a step that cannot be cancelled
        self.sent_bytes = self.rounds = 0
        self.stopped_ns = 0  # since when it stands still for this, by CLOCK_MONOTONIC
        self.retry: Timer | None = None  # of taking the disks back
        self.tries = 0  # of that
        self.refused = ""  # why the last one failed


class Receiving:
    """A VM on its way in."""

    def __init__(
        self, *, paused: bool, carried: bool = False, trusted: bool = False, config: VmConfig | None = None
    ) -> None:
        self.paused = paused
        self.config = config  # what it is, whatever the stream says: it goes back to a snapshot of its own
        self.carried = carried  # it migrates: it goes on only when it is told to
        self.trusted = trusted  # its disks are the sender's, though nobody has them here
        self.at = At.BEGINNING
        self.resumed = False  # its process was told to go on
        self.unbuilt = False  # ... and has said that it could not
        self.complete = False  # all but its disks
        self.deadline_s = 0.0
        self.failure = ""  # why it was given up


class Change:
    """Something of a VM that is changed: its disk, or what its drive has."""

    def __init__(self, what: str) -> None:
        self.what = what  # such as disk0


class Vm:
    """One VM; owned by the table.

    Whatever of it changes is counted, and `on_change` called: another parent is to know it.
    `on_event` is called with each change of its state: what has happened, why, and how it ended if it has.
    """

    config: VmConfig
    running_config: VmConfig | None = None  # of a VM that is or was received, once it has been judged
    next_config: VmConfig | None = None  # takes effect when this life is over
    claims: tuple[NicConfig, ...]  # interfaces with names or addresses that no other VM can have
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
        self.key = config.name, config.owner.uid  # to which the table has given the id
        self.config = config
        self.from_config = from_config  # survives a stop; the others are forgotten
        self._state = State.STOPPED
        self.since_s = time.time()  # when it came into this state
        self.started_s = 0.0  # when this life began
        self.starts = 0  # lives that have begun
        self.guest_resets = 0  # in this life
        self.last_end: LifeEnd | None = None
        self.memory: int | None = None  # the guest's, for its size
        self.figures: int | None = None  # what its devices count (`vmd.parent.figures`)
        self.uid = config.owner.uid  # running: who started it
        self.pid = 0
        self.pty: Pty | None = None
        self.backlog: Backlog | None = None  # what the console showed last; there as long as the pty
        self.shown_before = 0  # bytes that its console has shown in earlier lives
        self.restarts = RestartLimit()
        self.notes: tuple[str, ...] = ()  # what its operator should know of how it started
        self.text = ""  # why it stopped
        self.code = errno.EIO  # ... as an errno
        self.memory_lack = ""  # which memory its process has lacked that has just ended (`groups.memory_lack`)
        self.ended_s = -LOCKS_LINGER_S
        self.next_config = None
        self.resetting = False  # `vmctl reset` has killed it: as good as forgotten
        self.successor: VmConfig | None = None  # ... and what has its name when it is gone
        self.files: Files = {}  # its images and its disc
        self.disks: tuple[DiskImages, ...] = ()  # of what images they are made; running
        self.running_config = None
        self.sending: Sending | None = None
        self.going_back = False  # its disks may be those of a snapshot already
        self.revive: Callable[[], None] | None = None  # what is done instead when its process has ended
        self.sent: VmSent | None = None  # what is told when the VM is gone
        self.receiving: Receiving | None = None
        self.changing: Change | None = None
        self.console_user = ""  # who has the console, if somebody has
        self.disk_work = ""  # why it cannot be started, as long as somebody else has its disks
        self.once_because = ""  # why it ends where others reboot
        self.kept: dict[str, int] = {}  # copies of the kernel and initrd of a client, which nobody changes any more

    @property
    def name(self) -> str:
        """The name, unique in the table."""
        return self.config.name

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    def _enter(self, state: State, what: str, text: str = "") -> None:
        """Come into another state, with the word for that (`vmd.parent.events`); "": somebody else will tell."""
        if state is not self._state:
            self._state, self.since_s = state, time.time()
            if what:
                self.on_event(self, what, text, "")

    def changed(self) -> None:
        """Something has changed that another object has for this VM."""
        self.changes += 1
        self.on_change(self)

    def be_in(self, state: State, since_s: float | None = None) -> None:
        """Be in a state that an earlier parent, or vmm, says it is in."""
        self._state = state
        if since_s is not None:
            self.since_s = since_s

    @property
    def alive(self) -> bool:
        """Whether there is a VM process."""
        return self.state in ALIVE

    def require_startable(self) -> None:
        """Raise OperatorError if there is a VM process, saying what it is at."""
        if self.alive:
            state = "already running" if self.state is State.RUNNING else self.state.value
            raise OperatorError(errno.EALREADY, f"vm {self.name} is {state}")
        if self.disk_work:
            raise OperatorError(errno.EBUSY, f"vm {self.name}: {self.disk_work}")
        self.require_unchanging()

    def begin_disk_work(self, what: str) -> None:
        """Keep the VM from being started.  Raises OperatorError if it runs, or its disks are worked on already."""
        self.require_startable()
        self.disk_work = what

    def end_disk_work(self) -> None:
        """Let the VM be started again."""
        self.disk_work = ""

    def require_control(self, caller: Caller, what: str) -> None:
        """Raise OperatorError(EPERM) unless the caller may do this to the VM as it runs."""
        if not may_control(caller, self.uid, self.config.owner.gid):
            raise not_allowed(caller, f"{what} vm {self.name}", self.uid, self.config.owner.gid)

    def require_unchanging(self) -> None:
        """Raise OperatorError if a change of it is under way."""
        if self.changing is not None:
            raise OperatorError(errno.EBUSY, f"vm {self.name}: {self.changing.what} is being changed")

    def begin_change(self, change: Change) -> None:
        """Begin to change something of a VM that is stopped, runs or is paused, and of which nothing else is changed.

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
        """WAITING -> STOPPED: it will not be started, or its start has failed already."""
        if self._state is State.WAITING:
            self._enter(State.STOPPED, "failed" if why else "stop", why or "was waiting for its start")
        self.text = why

    def begin_start(self, uid: int, *, again: bool = False) -> None:
        """STOPPED or WAITING -> STARTING for a user, `again` after a reset by its guest."""
        self._begin(State.STARTING, "reboot" if again else "start", again=again)
        self.uid = uid

    def begin_receive(self, receiving: Receiving, *, again: bool = False) -> None:
        """STOPPED or WAITING -> RECEIVING, `again` in the life that it has."""
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
        """STARTING -> RUNNING; a VM that was told to stop meanwhile stays STOPPING."""
        self.pid = pid
        if self._state is State.STARTING:
            self._enter(State.RUNNING, "ready")

    def begin_reboot(self) -> None:
        """Any state with a process -> STOPPED: its guest has reset itself, and it is started again at once."""
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

    def pause_changed(self, *, paused: bool) -> None:
        """RUNNING <-> PAUSED; a VM that is being stopped stays so, and one that is being sent until that is over."""
        state = State.PAUSED if paused else State.RUNNING
        if self._state in (State.RUNNING, State.PAUSED):
            self._enter(state, "pause" if paused else "unpause")
            if not paused:
                self.text = ""
        elif self.sending is not None:
            self.sending.state = state

    def halted(self, why: str) -> bool:
        """RUNNING -> PAUSED, though nobody has asked for it; return whether it was so."""
        ran = self._state is State.RUNNING
        self.pause_changed(paused=True)
        if ran:
            self.text = why
        return ran

    def begin_send(self, *, keep: bool, carried: bool = False, state: State = State.SENDING) -> None:
        """RUNNING or PAUSED -> SENDING, or SAVING."""
        self.require_pausable()
        if self.receiving is not None:
            raise OperatorError(errno.EBUSY, f"vm {self.name} still waits for its disks: {self.text}")
        self.require_unchanging()
        self.sending = Sending(keep=keep, state=self._state, carried=carried)
        self._enter(state, "saving" if state is State.SAVING else "migrate" if carried else "send")

    def stay(self) -> None:
        """SENDING, SAVING or IN_DOUBT -> as before: it was not sent, or only a copy of it was."""
        if self.sending is not None and self._state in (State.SENDING, State.SAVING, State.IN_DOUBT):
            self._enter(self.sending.state, "resume")
            self.text = ""
        self._end_sending()

    def _end_sending(self) -> None:
        if self.sending is not None and self.sending.retry is not None:
            self.sending.retry.cancel()
        self.sending = None

    def doubt(self, why: str) -> None:
        """SENDING -> IN_DOUBT: nobody knows whether it runs elsewhere."""
        if self._state is State.SENDING:
            self._enter(State.IN_DOUBT, "in doubt", why)
        if self._state is State.IN_DOUBT:
            self.text = why

    def leave(self, sent: VmSent) -> None:
        """SENDING -> STOPPING: it goes on elsewhere.  A VM that is being stopped meanwhile has been sent, too."""
        self.sent = sent
        self._end_sending()
        self._enter(State.STOPPING, "sent")

    def wait_for_disks(self, why: str) -> bool:
        """RECEIVING -> PAUSED: it has all but what it needs of this host.  False if it is not received any more."""
        if self.receiving is None or self._state is State.STOPPING:
            return False
        self._enter(State.PAUSED, "pause", why)
        self.text = why
        return True

    def try_again(self, receiving: Receiving) -> None:
        """PAUSED, without its disks -> RECEIVING, and then RUNNING."""
        self.require_pausable()
        receiving.paused = False
        self._enter(State.RECEIVING, "receive")

    def end_receive(self, pid: int, *, paused: bool) -> None:
        """RECEIVING -> RUNNING or PAUSED, unless it is already to stop."""
        self.receiving = None
        self.pid, self.text = pid, ""
        if self._state is State.RECEIVING:
            self._enter(State.PAUSED if paused else State.RUNNING, "received")

    def drop_transfer(self) -> VmSent | None:
        """Its process has ended, and with that its being sent or received; return what is to be told if it was sent."""
        sent, self.sent = self.sent, None
        self._end_sending()
        self.receiving = None
        return sent

    def begin_stop(self, *, force: bool) -> None:
        """Any state with a process -> STOPPING; force may overtake a graceful stop."""
        if not self.alive:
            raise OperatorError(VMD_VM_STOP_INVALID, f"vm {self.name} is not running")
        if self._state is State.STOPPING and not force:
            raise OperatorError(errno.EALREADY, f"vm {self.name} is already stopping")
        if self._state in (State.SENDING, State.SAVING) and not force:
            doing = "being sent" if self._state is State.SENDING else "standing still for a snapshot"
            raise OperatorError(errno.EBUSY, f"vm {self.name} is {doing}; interrupt that, or stop it by force")
        if self._state is State.IN_DOUBT and not force:
            raise OperatorError(errno.EBUSY, f"vm {self.name} is in doubt: {self.text}; stop it by force, or see {SEE}")
        self._enter(State.STOPPING, "stopping")

    def ended(self, text: str, how: str = endings.FAILED) -> None:
        """Any state -> STOPPED: there is no process, or none any more."""
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
        """Return every interface that it has, or is to have."""
        for config in (self.config, self.running_config, self.next_config):
            yield from config.nics if config is not None else ()

    def patience_s(self) -> float:
        """Return how long the locks of this VM's last life may still linger: a killed process is not gone at once."""
        return max(0.0, self.ended_s + LOCKS_LINGER_S - time.monotonic())

    def keep_files(self, names: "Sequence[str]") -> None:
        """Have empty memory files for copies of a kernel and an initrd that a client has opened.  Raises HostError.

        A VM without a configuration reboots from them.
        """
        try:
            for name in names:
                self.kept[name] = memory_file(name)
        except OSError as error:
            raise HostError("keep the boot image of a client", error) from error

    def new_seed(self) -> None:
        """Have an empty memory file for the seed of this life, instead of that of the one before.  Raises HostError."""
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
        """Take the guest's memory instead of what there was; the descriptor is ours."""
        if self.memory is not None:
            let_go(self.memory)
        self.memory = fd

    def take_figures(self, fd: int | None) -> None:
        """Take what its devices count instead of what there was; the descriptor is ours.

        It has been in vmm, which could have another file instead; of such a one nothing is read.
        """
        if self.figures is not None:
            close(self.figures)
        self.figures = fd
        if fd is not None and not is_fixed(fd):
            close(fd)
            self.figures = None

    def open_console(self) -> bool:
        """Have a pty and a backlog; return whether they are new.  Raises HostError."""
        if self.pty is not None:
            return False
        pty = Pty()
        try:
            self.backlog = Backlog.create(self.shown_before)
        except OSError as error:
            pty.close()
            raise HostError("keep what the console shows", error) from error
        self.pty = pty
        return True

    def process_fds(self, *, arrives: bool = False) -> dict[str, list[int]]:
        """Return what a new VM process is given of this, as the caller's.  Raises HostError.

        That is its console, an empty file for the guest's memory, its seed, and copies of what it boots from, if there
        are some.  The seed of a VM that `arrives` comes with it: the file is empty.
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
        copies = copy_all(list(ours.values()), f"hand over {self.pty.path}, and what else vm {self.name} begins with")
        return {name: [fd] for name, fd in zip(ours, copies, strict=True)}

    def take_console(self) -> tuple[Pty, Output] | None:
        """Give up the console, at the end of the VM: the pty is the caller's to close."""
        pty, backlog, self.pty, self.backlog = self.pty, self.backlog, None, None
        if pty is None or backlog is None:
            return None
        output = backlog.read()
        backlog.close()
        self.shown_before = output.end % SHOWN_MAX
        return pty, output

    def drop_pty(self) -> None:
        """Give up the console and close it at once."""
        console = self.take_console()
        if console is not None:
            console[0].close()


def with_lladdrs(config: VmConfig, before: dict[int, bytes], now: dict[int, bytes]) -> VmConfig:
    """Return a VM whose interfaces have other link-layer addresses where they had been found for them."""
    nics = (
        nic.replace(lladdr=now[index]) if index in before and nic.lladdr == before[index] else nic
        for index, nic in enumerate(config.nics)
    )
    return config.replace(nics=tuple(nics))


class VmTable:
    """VMs by name and id; ids and link-layer addresses are those of their identities."""

    def __init__(self, identities: Identities | None = None) -> None:
        self.identities = identities or Identities()
        self.on_change: Callable[[int], None] = lambda _vmid: None
        self.on_event: Callable[[Vm, str, str, str], None] = lambda _vm, _what, _text, _how: None
        self._by_name: dict[str, Vm] = {}
        self._by_id: dict[int, Vm] = {}
        self._sorted: tuple[Vm, ...] | None = None  # None: VMs have come or gone
        self._lladdrs: set[bytes] | None = None  # that somebody has, or has had; None: nobody has collected them yet

    def __iter__(self) -> Iterator[Vm]:
        """All VMs, by id."""
        if self._sorted is None:
            self._sorted = tuple(sorted(self._by_name.values(), key=lambda vm: vm.vmid))
        return iter(self._sorted)

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, config: VmConfig, *, from_config: bool) -> Vm:
        """Register a VM; OperatorError(EEXIST) if the name is taken."""
        if config.name in self._by_name:
            raise OperatorError(errno.EEXIST, f"vm {config.name} already exists")
        identity = self.identities.of((config.name, config.owner.uid))
        if from_config and not identity.configured:
            identity.configured = True
            self.identities.changed((config.name, config.owner.uid))
        config = self.named(config)
        vm = Vm(identity.vmid, config, from_config=from_config)
        self.take(vm)
        return vm

    def take(self, vm: Vm) -> None:
        """Have a VM that somebody else has described."""
        self._by_name[vm.name] = vm
        self._sorted = None
        self._by_id.setdefault(vm.vmid, vm)
        if self._lladdrs is not None:
            self._lladdrs.update(nic.lladdr for nic in vm.config.nics)
        vm.on_change = self.changed
        vm.on_event = self.on_event
        self.changed(vm)

    def changed(self, vm: Vm) -> None:
        """Something of a VM has changed."""
        self.on_change(vm.vmid)

    def named(self, config: VmConfig) -> VmConfig:
        """Return a VM whose interfaces all have link-layer addresses, each time the same and no other VM's."""
        if all(nic.lladdr for nic in config.nics):
            return config
        key = config.name, config.owner.uid
        ours = self.identities.of(key).lladdrs
        nics = []
        for index, nic in enumerate(config.nics):
            if not nic.lladdr:
                if index not in ours:
                    ours[index] = self._free_lladdr(index)
                    self.identities.changed(key)
                nic = nic.replace(lladdr=ours[index])
            nics.append(nic)
        return config.replace(nics=tuple(nics))

    def _free_lladdr(self, index: int) -> bytes:
        """Return an address that nobody has, for the interface of this number.  Raises OperatorError."""
        if self._lladdrs is not None:
            with contextlib.suppress(OperatorError):  # some of these may not be anybody's any more
                lladdr = random_lladdr(index, self._lladdrs)
                self._lladdrs.add(lladdr)
                return lladdr
        # Once for all VMs of a configuration that is read for the first time.
        self._lladdrs = {nic.lladdr for vm in self._by_name.values() for nic in vm.config.nics}
        self._lladdrs.update(self.identities.lladdrs())
        lladdr = random_lladdr(index, self._lladdrs)
        self._lladdrs.add(lladdr)
        return lladdr

    def adopt(self, vm: Vm, config: VmConfig, prefix4: Prefix) -> None:
        """A VM that came from elsewhere goes on: what its guest knows is its own from now on, if nobody else has it.

        `config` is what it is now, and `prefix4` the range of this host's local interfaces.
        """
        identity = self.identities.of(vm.key)
        others = [other for other in self._by_name.values() if other is not vm]
        taken = {nic.lladdr for other in others for nic in other.nics()}
        taken |= {lladdr for other in self.identities.others(vm.key) for lladdr in other.lladdrs.values()}
        before = dict(identity.lladdrs)
        given = {index for index, nic in enumerate(vm.config.nics) if nic.lladdr != before.get(index)}  # by vm.conf
        for index, nic in enumerate(config.nics):
            if index not in given and nic.lladdr not in taken:
                identity.lladdrs[index] = nic.lladdr
        if self._lladdrs is not None:
            self._lladdrs.update(identity.lladdrs.values())
        vm.config = with_lladdrs(vm.config, before, identity.lladdrs)
        vm.next_config = vm.next_config and with_lladdrs(vm.next_config, before, identity.lladdrs)
        numbers = {other.number for other in self.identities.others(vm.key)}
        if config.plan_id and config.plan_prefix4 == prefix4 and config.plan_id not in numbers:
            identity.number = config.plan_id
        self.identities.changed(vm.key)

    def remove(self, vm: Vm) -> None:
        """Forget a VM, but not whose its id and its addresses are."""
        vm.drop_pty()
        vm.drop_files()
        self._by_name.pop(vm.name, None)
        self._sorted = None
        if self._by_id.get(vm.vmid) is vm:
            del self._by_id[vm.vmid]
        self.changed(vm)
        self.identities.leave(vm.key, self.present)

    def present(self) -> "set[tuple[str, int]]":
        """Return whose identities are in use."""
        configs = ((vm.config, vm.next_config, vm.running_config) for vm in self._by_name.values())
        used = {(config.name, config.owner.uid) for each in configs for config in each if config is not None}
        return used | {vm.key for vm in self._by_name.values()}

    def find(self, vmid: int, name: str) -> Vm | None:
        """Return the VM with this id or, with id 0, this name.

        A name of digits that comes with the id that it could be is what somebody has typed: a VM of that name is meant.
        """
        named = self._by_name.get(name)
        if not vmid or (named is not None and name.isdigit()):
            return named
        return self._by_id.get(vmid)

    def get(self, vmid: int, name: str = "") -> Vm:
        """Return the VM, or raise OperatorError(ENOENT) naming what was asked for."""
        vm = self.find(vmid, name)
        if vm is None:
            raise OperatorError(errno.ENOENT, f"vm {vmid or name} not found")
        return vm

    def template(self, name: str) -> VmConfig | None:
        """Return the description of a VM that is known."""
        vm = self.find(0, name)
        return vm.config if vm and not vm.resetting else None

    def holder(self, error: InUse, vm: Vm | None) -> InUse:
        """Return why a VM cannot have a file: with the VM other than `vm` that has it, if it is one of ours."""
        for other in self:
            if other is not vm and other.alive and error.file.key in other.files.values():
                return error.held_by(f"vm {other.name}")
        return error

    def living(self, vmid: int) -> Vm:
        """Return the living VM that vmm speaks of; PeerError if there is none."""
        vm = self.find(vmid, "")
        if vm is None or not vm.alive:
            raise PeerError("vmm", f"speaks of vm {vmid}, which does not run")
        return vm

    def forget_ids(self) -> None:
        """Start numbering from 1 again, for `reset vms`; only an empty table may."""
        if not self._by_name:
            self.identities.forget_ids()
