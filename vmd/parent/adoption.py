"""How a parent takes the place of an earlier parent that has ended, while the VMs run on.

The service manager has kept the earlier parent's state (`truth`), the control socket, and a channel to every vmm.  The
new parent asks each vmm which VMs it has.  The vmm answers with the descriptors of each VM.  Then

    a VM that runs, or is paused      continues
    a VM that has ended meanwhile     starts again if its guest has reset itself; otherwise its end is reported now
    a VM whose start had begun        starts anew if vm.conf has it, and ends otherwise
    a VM that was being sent          is not sent, because the client's connection is lost
    a VM paused for a snapshot        continues without the snapshot
    a VM that was being received      waits for `vmctl unpause` if its stream was complete, and ends otherwise

A failure that concerns one VM or one vmm is logged.  The VM, or all VMs of the vmm, run on.
"""

import contextlib
import errno
import os
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
from vmd.parent.vm import At, Receiving, Sending, State, Vm
from vmd.privsep.spawn import Child
from vmd.readable import readable

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

ANSWER_S = 30.0  # for a vmm to say which VMs it has; a VM that it reports later is adopted then
INTERRUPTED = "its start was interrupted by the end of the daemon"
UNSEEN = "ended while there was no daemon"


class Adopted(Child):
    """A process that this parent has not started, and whose exit status it does not get."""

    def __init__(self, title: str, pidfd: int) -> None:  # no pid: another process may have that by now
        self.title = title
        self.pid = host_pid(pidfd)
        self.status = None
        self.pidfd = pidfd
        self.killed = False

    def reap(self, timeout_s: float = 0) -> int | None:
        """Return 0 when it has ended; None if it still runs at the timeout."""
        if self.pidfd < 0:
            return self.status
        if not readable(self.pidfd, timeout_s):
            return None
        # It fails unless the process is our child.  It is our child if this parent was executed in place (upgrade).
        with contextlib.suppress(OSError):
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        close(self.pidfd)
        self.pidfd = -1
        self.status = 0
        return self.status


def step_of(message: VmHeld) -> At:
    """Return the step of a VM that is being sent."""
    if message.undoing:
        return At.UNDOING
    if message.let_go:
        return At.COMMITTED
    if message.letting_go:
        return At.COMMITTING
    return At.COMPLETE if message.written else At.MEMORY


class Adoption:
    """The room of VMs that this parent adopts."""

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
        self.known: dict[int, VmKnown] = {}  # by vmid: VMs of the state that no vmm has reported yet
        self.on_process: Callable[[Generation, Child], None] = lambda generation, child: None
        self.on_taken: Callable[[Vm], None] = lambda vm: None  # called when a VM was adopted
        self.on_settled: Callable[[], None] = lambda: None  # called when no answer is waited for any more
        self.waiting: set[Generation] = set()  # whose vmm has not reported all its VMs yet
        self.later: list[Callable[[], None]] = []  # called once clients are served and VMs can be started
        self.adopted = 0  # VMs

    # --- asking ------------------------------------------------------------------------------------------

    def expect(self, vms: "list[VmKnown]", generations: "list[Generation]") -> None:
        """Ask the vmm of each generation which VMs it has; `vms` are the VMs of the earlier parent's state."""
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
        """Wait no longer for the answer of a vmm."""
        if generation in self.waiting:
            log.error(f"{generation.name} does not report its VMs: they run on, and are adopted when it does")
            self.done(generation)

    def lost(self, generation: Generation) -> None:
        """A vmm has ended.  Its VMs have ended with it."""
        self.done(generation)

    def done(self, generation: Generation) -> None:
        """The vmm of this generation has reported all its VMs, or is not waited for any longer."""
        if generation in self.waiting:
            self.waiting.discard(generation)
            if not self.waiting:
                self.settle()

    def settle(self) -> None:
        """Decide about the VMs that no vmm has reported: they had no process, or their vmm has ended."""
        for known in list(self.known.values()):
            generation = self.generations.of.get(known.vmid)
            if generation is not None and not generation.told:
                continue  # its vmm may report it later
            del self.known[known.vmid]
            self.generations.of.pop(known.vmid, None)
            vm = self.core.vms.find(known.vmid, "")
            if known.taps is not None:
                self.network.left[known.vmid] = known.taps.known
            self.core.changed(known.vmid)
            if vm is not None and vm.alive:
                self.later.append(lambda vm=vm: self.end_unseen(vm))  # type: ignore[misc]
        log.info(f"{self.adopted} VMs of an earlier vmd are adopted")
        self.on_settled()

    def when_serving(self) -> None:
        """Do what had to wait until clients are served and VMs can be started."""
        later, self.later = self.later, []
        for call in later:
            call()

    def end_unseen(self, vm: Vm) -> None:
        """A VM of the earlier parent has no process: it has ended for an unknown reason, or had none yet."""
        if vm.state is State.STARTING and vm.from_config and not vm.once_because:
            self.life.vm_ended(vm, INTERRUPTED)
            if self.core.vms.find(vm.vmid, "") is vm and not vm.alive:
                vm.enqueue()
                self.life.start_batch_in_time()
        elif vm.state in (State.STARTING, State.RECEIVING):
            self.life.vm_ended(vm, INTERRUPTED)
        else:
            self.life.vm_ended(vm, UNSEEN)

    def is_stale(self, message: "Record", channel: "Channel") -> bool:
        """Return whether a message of a vmm was for the earlier parent.  VmHeld tells this parent the same."""
        if isinstance(message, VmHeld | VmsHeld | VmSlotOver):
            return False
        generation = self.generations.find(channel)
        return generation is not None and generation.asked and getattr(message, "vmid", 0) in self.known

    # --- answers -----------------------------------------------------------------------------------------

    def on_held(self, message: VmHeld, envelope: "Envelope", channel: "Channel") -> None:
        """A vmm reports a VM: adopt it."""
        generation = self.generations.find(channel)
        if generation is None or not generation.asked:
            raise PeerError(channel.label, "reports VMs without a request")
        known = self.known.pop(message.vmid, None)
        vm = self.core.vms.find(message.vmid, "")
        if known is None or vm is None:
            log.error(f"vm {message.vmid} of {generation.name} is unknown: it runs on, and is not adopted")
            return
        self.generations.of[vm.vmid] = generation
        try:
            self.take(vm, known, message, envelope)
        except (VmdError, OSError) as error:
            log.error(f"vm {vm.name} is only partly adopted, and runs on: {sentence(error)}")
        self.adopted += 1
        self.core.changed(vm.vmid)
        self.on_taken(vm)
        if generation.awaited is not None:
            generation.awaited.discard(vm.vmid)
            self.all_told(generation)

    def take(self, vm: Vm, known: "VmKnown", message: VmHeld, envelope: "Envelope") -> None:
        """Take over the state and the descriptors of a VM.  Raises HostError or OSError."""
        process = envelope.take_fds("process")
        vm.pid = host_pid(process[0]) if process else 0
        close_all(process)
        if self.life.scores is not None and message.running:
            self.life.scores.give_usual(vm.pid)
        self.take_state(vm, known, message)
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
        """Take over the console; if its pty cannot be used, the VM gets another one.  Raises HostError or OSError."""
        master, slave, shown = (envelope.take_fd(name) for name in ("tty", "tty_slave", "shown"))
        if shown is None:
            close_all(fd for fd in (master, slave) if fd is not None)
            raise HostError("take over the output of its console", errno.ENOENT)
        vm.backlog = Backlog(shown, known.shown_before)
        vm.console_user = ""
        if master is not None and slave is not None:
            with contextlib.suppress(HostError):
                vm.pty = Pty((master, slave))
                return
        else:
            close_all(fd for fd in (master, slave) if fd is not None)
        vm.pty = Pty()
        vm.pty.give_to(vm.uid, vm.config.owner.gid)
        log.warn(f"vm {vm.name}: its console is now {vm.pty.path}")
        self.core.peers.send(Proc.VMM, ConsoleSnapshot(vmid=vm.vmid), peerid=vm.vmid, fds=vm.pty.fds())

    def take_state(self, vm: Vm, known: "VmKnown", message: VmHeld) -> None:
        """Give a VM the state that its vmm reports, and end or continue what was under way."""
        runs = State.PAUSED if message.paused else State.RUNNING
        if message.outcome is not None:
            self.restore_state(vm, State.STOPPING if message.stopping else State.RUNNING)
            ended = VmExited(vmid=vm.vmid, pid=0, outcome=Outcome(message.outcome), text=message.text)
            self.later.append(lambda: self.life.process_ended(ended))
        elif message.stopping:
            self.restore_state(vm, State.STOPPING)
        elif message.arriving:
            self.restore_state(vm, State.RECEIVING)
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
            self.restore_state(vm, State.SAVING)
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
            self.restore_state(vm, State.IN_DOUBT if vm.state is State.IN_DOUBT else State.SENDING)
            vm.sending = Sending(keep=message.keep, state=runs, carried=message.two_way)
            vm.sending.locks_travel = known.transfer is not None and known.transfer.locks_travel
            self.transfers.migrations.abandon(vm, step_of(message))
        else:
            self.restore_state(vm, runs if message.running else State.STARTING)

    def restore_state(self, vm: Vm, state: State) -> None:
        """Set the state of a VM; it is in it since now, if the earlier parent has written another state."""
        vm.restore_state(state, None if vm.state is state else self.core.now_s())

    def on_all_held(self, message: VmsHeld, envelope: "Envelope", channel: "Channel") -> None:
        """A vmm lists its VMs, which it reports before this or after it."""
        generation = self.generations.find(channel)
        if generation is None or not generation.asked or generation.awaited is not None:
            raise PeerError(channel.label, "reports VMs without a request")
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
        """Settle a generation if its vmm has reported all its VMs."""
        if generation.awaited or generation.told:
            return
        generation.told = True
        if generation in self.waiting:
            self.done(generation)
        else:
            self.settle()
        self.generations.retire(generation)
