"""How a parent takes the place of one that has ended, while the VMs run on.

It is given that one's state (`truth`), the control socket, and the channels to every vmm, which the service manager has
kept.  Each vmm is asked which VMs it has, and hands over what belongs to them.  Then

    a VM that runs, or is paused           goes on
    one that has ended meanwhile           starts again if its guest has reset itself; else its end is told now
    one that was about to start            starts anew if vm.conf has it
    one that was being sent                is not sent: whoever wanted that has gone
    one that stood still for a snapshot    goes on without it
    one that was being received            waits for `vmctl unpause` if all of it has come, and ends otherwise

Whatever fails for one VM, or for one vmm, is said, and leaves it running.
"""

import contextlib
import errno
import os
import select
import socket

from vmd.backlog import Backlog
from vmd.closing import close, close_all
from vmd.errors import HostError, PeerError, VmdError, sentence
from vmd.ipc.logpair import logpair
from vmd.ipc.messages.vm import CancelTransfer, ConsoleSnapshot, Outcome, TakeDisksBack
from vmd.ipc.messages.vmm import AskVms, VmExited, VmHeld, VmsHeld, VmSlotOver
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent.generations import Generation
from vmd.parent.resources import Pty
from vmd.parent.truth import Transfer, taps_of
from vmd.parent.usage import host_pid
from vmd.parent.vmtable import At, Receiving, Sending, State, Vm
from vmd.privsep.spawn import Child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.channel import Channel
    from vmd.ipc.imsg import Envelope
    from vmd.parent.core import Core
    from vmd.parent.generations import Generations
    from vmd.parent.life import Life
    from vmd.parent.logs import Logs
    from vmd.parent.network import Network
    from vmd.parent.transfers import Transfers
    from vmd.parent.truth import VmKnown
    from vmd.record import Record

ANSWER_S = 30.0  # for a vmm to say which VMs it has; a VM that it tells of later is adopted then
INTERRUPTED = "its start was interrupted by the end of the daemon"
UNSEEN = "ended while there was no daemon"


class Adopted(Child):
    """A process that somebody else has started; how it ends nobody tells us."""

    def __init__(self, title: str, pidfd: int) -> None:  # not of a pid: that may be another process's by now
        self.title = title
        self.pid = host_pid(pidfd)
        self.status = None
        self.pidfd = pidfd
        self.killed = False

    def reap(self, timeout_s: float = 0) -> int | None:
        """Return 0 when it has ended; None if it still runs at the timeout."""
        if self.pidfd < 0:
            return self.status
        readable = select.poll()
        readable.register(self.pidfd, select.POLLIN)
        if not readable.poll(timeout_s * 1000):
            return None
        with contextlib.suppress(OSError):  # unless it is ours: we may have become another program
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        close(self.pidfd)
        self.pidfd = -1
        self.status = 0
        return self.status


def step_of(message: VmHeld) -> At:
    """Return how far a VM is that is being sent."""
    if message.undoing:
        return At.UNDOING
    if message.let_go:
        return At.COMMITTED
    if message.letting_go:
        return At.COMMITTING
    return At.COMPLETE if message.written else At.MEMORY


class Adoption:
    """The room of VMs that an earlier parent had."""

    def __init__(
        self,
        core: "Core",
        generations: "Generations",
        life: "Life",
        transfers: "Transfers",
        network: "Network",
        logs: "Logs",
    ) -> None:
        self.core = core
        self.generations = generations
        self.life = life
        self.transfers = transfers
        self.network = network
        self.logs = logs
        self.known: dict[int, VmKnown] = {}  # by vmid, of VMs that nobody has told of yet
        self.on_process: Callable[[Generation, Child], None] = lambda generation, child: None
        self.on_taken: Callable[[Vm], None] = lambda vm: None  # a VM goes on
        self.on_settled: Callable[[], None] = lambda: None  # nothing is waited for any more
        self.waiting: set[Generation] = set()  # that have not told of all their VMs
        self.later: list[Callable[[], None]] = []  # when clients are served, and VMs start
        self.adopted = 0

    # --- asking ------------------------------------------------------------------------------------------

    def expect(self, vms: "list[VmKnown]", generations: "list[Generation]") -> None:
        """Ask these which VMs they have; `vms` are those that the parent before us knew."""
        self.known = {known.vmid: known for known in vms}
        for known in vms:
            generation = next((each for each in generations if each.number == known.generation), None)
            if generation is not None:
                self.generations.of[known.vmid] = generation
        self.waiting = set(generations)
        for generation in generations:
            try:
                self.ask(generation)
            except OSError as error:
                log.error(f"the VMs of {generation.name} are not adopted, and run on: {sentence(error)}")
                self.waiting.discard(generation)
        if not self.waiting:
            self.settle()

    def ask(self, generation: Generation) -> None:
        """Ask a vmm which VMs it has.  Raises OSError."""
        reader, writer = logpair()
        self.logs.read_from(reader, "vmm")
        generation.asked = True
        generation.line.send(AskVms(), fds={"log": [writer.detach()]})
        self.core.loop.call_later(ANSWER_S, lambda: self.give_up(generation))

    def give_up(self, generation: Generation) -> None:
        """Go on without the answer of a vmm."""
        if generation in self.waiting:
            log.error(f"{generation.name} does not tell of its VMs: they run on, and are adopted when it does")
            self.done(generation)

    def lost(self, generation: Generation) -> None:
        """A vmm has ended, and with it its VMs."""
        self.done(generation)

    def done(self, generation: Generation) -> None:
        """This one is waited for no more."""
        if generation in self.waiting:
            self.waiting.discard(generation)
            if not self.waiting:
                self.settle()

    def settle(self) -> None:
        """Judge what no vmm has told of: VMs that had no process, or whose vmm is gone."""
        for known in list(self.known.values()):
            generation = self.generations.of.get(known.vmid)
            if generation is not None and not generation.told:
                continue  # it may tell later
            del self.known[known.vmid]
            self.generations.of.pop(known.vmid, None)
            vm = self.core.vms.find(known.vmid, "")
            if known.taps is not None:
                self.network.left[known.vmid] = known.taps.known
            self.core.changed(known.vmid)
            if vm is not None and vm.alive:
                self.later.append(lambda vm=vm: self.end_unseen(vm))  # type: ignore[misc]
        log.info(f"goes on with {self.adopted} VMs that an earlier vmd has started")
        self.on_settled()

    def when_serving(self) -> None:
        """Do what has waited until VMs can be started and clients be told."""
        later, self.later = self.later, []
        for call in later:
            call()

    def end_unseen(self, vm: Vm) -> None:
        """A VM was alive and is not, and nobody knows how it has ended; or it had no process yet."""
        if vm.state is State.STARTING and vm.from_config and not vm.once_because:
            self.life.is_gone(vm, INTERRUPTED)
            if self.core.vms.find(vm.vmid, "") is vm and not vm.alive:
                vm.enqueue()
                self.life.start_batch_in_time()
        elif vm.state in (State.STARTING, State.RECEIVING):
            self.life.is_gone(vm, INTERRUPTED)
        else:
            self.life.is_gone(vm, UNSEEN)

    def is_stale(self, message: "Record", channel: "Channel") -> bool:
        """Return whether a vmm has said this to the parent before us: what it still means comes with VmHeld."""
        if isinstance(message, VmHeld | VmsHeld | VmSlotOver):
            return False
        generation = self.generations.find(channel)
        return generation is not None and generation.asked and getattr(message, "vmid", 0) in self.known

    # --- answers -----------------------------------------------------------------------------------------

    def on_held(self, message: VmHeld, envelope: "Envelope", channel: "Channel") -> None:
        """Go on with a VM."""
        generation = self.generations.find(channel)
        if generation is None or not generation.asked:
            raise PeerError(channel.label, "tells of VMs unasked")
        known = self.known.pop(message.vmid, None)
        vm = self.core.vms.find(message.vmid, "")
        if known is None or vm is None:
            log.error(f"vm {message.vmid} of {generation.name} is not known here: it runs on, and is not adopted")
            return
        self.generations.of[vm.vmid] = generation
        try:
            self.take(vm, known, message, envelope)
        except (VmdError, OSError) as error:
            log.error(f"vm {vm.name} is not wholly adopted, and runs on: {sentence(error)}")
        self.adopted += 1
        self.core.changed(vm.vmid)
        self.on_taken(vm)
        if generation.awaited is not None:
            generation.awaited.discard(vm.vmid)
            self.all_told(generation)

    def take(self, vm: Vm, known: "VmKnown", message: VmHeld, envelope: "Envelope") -> None:
        """Take over what belongs to a VM, and what it is at.  Raises HostError or OSError."""
        process = envelope.take_fds("process")
        vm.pid = host_pid(process[0]) if process else 0
        close_all(process)
        if self.life.scores is not None and message.running:
            self.life.scores.give_usual(vm.pid)
        self.be_at(vm, known, message)
        taps = envelope.take_fds("taps")
        if known.taps is not None:
            self.network.taps[vm.vmid] = taps_of(known.taps, taps)
        else:
            close_all(taps)
        vm.take_memory(envelope.take_fd("memory"))
        vm.take_figures(envelope.take_fd("figures"))
        for name, copy in (("boot", "kernel"), ("initrd", "initrd"), ("seed", "seed")):
            fd = envelope.take_fd(name)
            if fd is not None and copy in known.kept:
                vm.kept[copy] = fd
            elif fd is not None:
                close(fd)
        reader = envelope.take_fd("log")
        if reader is not None:
            self.logs.read_vm(socket.socket(fileno=reader), vm)
        self.take_console(vm, known, envelope)

    def take_console(self, vm: Vm, known: "VmKnown", envelope: "Envelope") -> None:
        """Take over the console; one that cannot be had is moved to another pty.  Raises HostError or OSError."""
        master, slave, shown = (envelope.take_fd(name) for name in ("tty", "tty_slave", "shown"))
        if shown is None:
            close_all(fd for fd in (master, slave) if fd is not None)
            raise HostError("take over what its console shows", errno.ENOENT)
        vm.backlog = Backlog(shown, known.shown_before)
        vm.console_user = ""
        if master is not None and slave is not None:
            with contextlib.suppress(HostError):
                vm.pty = Pty((master, slave))
                return
        vm.pty = Pty()
        vm.pty.give_to(vm.uid, vm.config.owner.gid)
        log.warn(f"vm {vm.name}: its console is now {vm.pty.path}")
        self.core.peers.send(Proc.VMM, ConsoleSnapshot(vmid=vm.vmid), peerid=vm.vmid, fds=vm.pty.fds())

    def be_at(self, vm: Vm, known: "VmKnown", message: VmHeld) -> None:
        """Have a VM be in the state that vmm says it is in."""
        runs = State.PAUSED if message.paused else State.RUNNING
        if message.outcome is not None:
            self.be_in(vm, State.STOPPING if message.stopping else State.RUNNING)
            ended = VmExited(vmid=vm.vmid, pid=0, outcome=Outcome(message.outcome), text=message.text)
            self.later.append(lambda: self.life.go_on_after(ended))
        elif message.stopping:
            self.be_in(vm, State.STOPPING)
        elif message.arriving:
            self.be_in(vm, State.RECEIVING)
            transfer = known.transfer or Transfer()
            vm.receiving = Receiving(paused=transfer.paused, carried=transfer.carried)
            vm.receiving.resumed = message.resumed
            vm.receiving.complete = message.complete and vm.running_config is not None
            if not vm.receiving.complete:
                self.later.append(lambda: self.transfers.give_up(vm, errno.ECANCELED, "receiving was interrupted"))
            elif not message.resumed:
                why = "the daemon was restarted before its disks were opened"
                self.later.append(lambda: self.transfers.stay_paused(vm, errno.EINTR, why))
        elif message.lending:
            self.be_in(vm, State.SAVING)
            vm.sending = Sending(keep=True, state=runs)
            if known.going_back:
                why = "going back to a snapshot was interrupted: its disks may be those of the snapshot"
                log.error(f"vm {vm.name}: {why}")
                self.later.append(lambda: self.life.kill(vm))
            elif not message.lent:
                self.core.peers.send(Proc.VMM, CancelTransfer(vmid=vm.vmid))
            elif not message.returning:
                self.core.peers.send(Proc.VMM, TakeDisksBack(vmid=vm.vmid))
        elif message.sending:
            self.be_in(vm, State.IN_DOUBT if vm.state is State.IN_DOUBT else State.SENDING)
            vm.sending = Sending(keep=message.keep, state=runs, carried=message.two_way)
            vm.sending.locks_travel = known.transfer is not None and known.transfer.locks_travel
            self.transfers.migrations.abandon(vm, step_of(message))
        else:
            self.be_in(vm, runs if message.running else State.STARTING)

    def be_in(self, vm: Vm, state: State) -> None:
        """Have a VM be in a state, since then if it was not so before."""
        vm.be_in(state, None if vm.state is state else self.core.now_s())

    def on_all_held(self, message: VmsHeld, envelope: "Envelope", channel: "Channel") -> None:
        """A vmm has told of its VMs, or is about to."""
        generation = self.generations.find(channel)
        if generation is None or not generation.asked or generation.awaited is not None:
            raise PeerError(channel.label, "tells of VMs unasked")
        (process,) = envelope.take_fds("process")
        child = Adopted("vmm", process)
        generation.child = child
        self.on_process(generation, child)
        if message.version != generation.version:
            log.warn(f"{generation.name} is of version {message.version}, not {generation.version}")
            generation.version = message.version
        if generation.groups is not None:
            generation.groups.keep_only(message.groups)
        if generation is self.generations.newest and not message.spare:
            self.core.slots.give()
        generation.awaited = {vmid for vmid in message.vms if vmid in self.known}
        self.all_told(generation)

    def all_told(self, generation: Generation) -> None:
        """Go on if a vmm has told of all its VMs."""
        if generation.awaited or generation.told:
            return
        generation.told = True
        if generation in self.waiting:
            self.done(generation)
        else:
            self.settle()
        self.generations.retire(generation)
