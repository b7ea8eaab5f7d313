"""vmm: one vm process per virtual machine, and the relay between them and parent.

Runs as  an id of its own; sees only the interpreter and our own code, read-only; no network
Peers    parent (VM configs and fds in, exits out); one vm/<name> per running VM
Holds    /dev/kvm; console, log, guest memory, taps and boot files of each VM, for the next parent; other descriptors
         only while it passes them on; a lock that shows that it lives (`parent/lifelock.py`)

vmm does not end with the parent.  The next parent gets the channel to vmm from the service manager, and asks it for all
VMs (`on_ask_vms`).  If there is no next parent, the end of the channel tells vmm to ask its guests to shut down.  vmm
then ends with the last of them, or after ORPHANS_S.

Starting an interpreter and importing our modules takes 50 ms.  So one VM process waits in reserve, with device
processes of the kinds that the last VM had.
"""

import errno
import os
import resource

from vmd.closing import close, close_all
from vmd.config.model import MAX_NICS
from vmd.errors import HostError, PeerError
from vmd.ipc import sockets as socket
from vmd.ipc.channel import Channel, socketpair
from vmd.ipc.devmsg import FIGURES_BYTES
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.imsg import Envelope
from vmd.ipc.logpair import logpair
from vmd.ipc.messages.children import Ping, Pong, Quit, Ready, SetVerbosity
from vmd.ipc.messages.shared import brief
from vmd.ipc.messages.vm import (
    KVM_FD,
    Outcome,
    ReceiveVm,
    ResumeReceived,
    StartVm,
    StopMode,
    StopVm,
    VmEnding,
    VmFailed,
    VmRunning,
)
from vmd.ipc.messages.vmm import AskVms, EndTaken, KvmFd, Retire, VmExited, VmHeld, VmLog, VmsHeld, VmSlot, VmSlotOver
from vmd.ipc.process import Process, handles, handles_each
from vmd.ipc.rights import refuse_files
from vmd.ipc.routes import Proc, relays
from vmd.log import log
from vmd.memfile import sealed_file
from vmd.privsep.confine import VMM, confine
from vmd.privsep.spawn import spawn
from vmd.record import Record
from vmd.version import VERSION
from vmd.vmm.children import KEPT, USUAL_DEVICES, Reaper, Slot, VmChild, device_words, end_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.fence import Source
    from vmd.ipc.process import Handlers

NOT_PASSED_ON = "cannot be given its files"
GROUP_FD = 5  # the descriptor by which a VM process finds its control group
SLOTS_MAX = 8  # unused slots that are kept; starts that failed have left them
FILES_OF_A_VM = 2 + len(KEPT) - 1 + MAX_NICS  # its channel, its pidfd, and copies for the next parent
REPORT_AGAIN_S = 0.1
FILES_SPARE = 64
VM_QUEUE_LIMIT = 256  # messages; a VM process that does not read is stuck, and is killed
FORCE_GRACE_S = 10.0  # from `stop -f` to SIGKILL (*cat. 4.4*)
EXIT_GRACE_S = 10.0  # from the end of a VM's channel to SIGKILL
START_S = 120.0  # a VM must run within this time after it has got everything it needs
GONE_S = 10.0  # from SIGKILL until a process is given up; it then waits for storage, perhaps for ever
END_S = 5.0  # ... when vmm itself ends
RESERVE_DELAY_S = 0.03  # from the beginning of a guest, which needs the processor first, to the next reserve
RESERVE_LATEST_S = 2.0  # from a start to the next reserve, if the guest does not begin
ORPHANS_S = 135.0  # how long guests may take to shut down without a parent; each has two minutes after it was asked


class Vmm(Process):
    """Starts, relays to and reaps VM processes."""

    def __init__(self) -> None:
        super().__init__(Proc.VMM)
        self.kvm_fd = -1
        self.slots: list[Slot] = []  # for the next VM processes, one each
        self.reserve: VmChild | None = None
        self.devices = USUAL_DEVICES  # device processes of the VM that was started last
        self.running: dict[int, VmChild] = {}  # by vmid
        self.by_channel: dict[Channel, VmChild] = {}  # all VM processes
        self.reaper = Reaper(self.loop, self.on_vm_gone)
        self.stuck: set[VmChild] = set()  # killed and given up, but not ended
        self.over: dict[int, VmChild] = {}  # by vmid: ended, and the parent has not confirmed that yet
        self.orphaned = False  # the parent is gone
        self.retired = False  # no other VM will start here
        self.to_report: list[VmChild] | None = None  # VMs that the next parent has still to be told of
        self.parent = self.attach_parent(Proc.PARENT)

    def on_kvm_fd(self, _message: KvmFd, envelope: Envelope, _channel: Channel) -> None:
        """Keep /dev/kvm.  VM processes can be started from now on."""
        fd = envelope.take_fd("kvm")
        assert fd is not None
        self.kvm_fd = fd
        self.fill_reserve()

    def on_slot(self, message: VmSlot, envelope: Envelope, _channel: Channel) -> None:
        """Keep a slot for another VM process."""
        fd = envelope.take_fd("group")
        self.slots.append(Slot(message.uid, message.group, -1 if fd is None else fd))
        while len(self.slots) > SLOTS_MAX:
            self.slot_over(self.slots.pop(0))

    def slot_over(self, slot: Slot, vmid: int = 0) -> None:
        """Give a slot back to the parent.  `vmid` is the VM of its last process; 0: there was none."""
        slot.close()
        if slot.group:
            self.parent.send(VmSlotOver(group=slot.group, vmid=vmid))

    def fill_reserve(self) -> None:
        """Start the VM process in reserve, if there is none."""
        if self.reserve is None and self.slots and not (self.orphaned or self.retired):
            try:
                self.reserve = self.spawn_vm()
            except HostError as error:
                log.warn(str(error))  # the next start tries again, and reports an error

    def spawn_vm(self) -> VmChild:
        """Start a VM process that waits for its StartVm.  Raises HostError."""
        if not self.slots:
            raise HostError("have a slot for another vm", errno.EAGAIN)
        slot = self.slots[0]
        try:
            ours, theirs = socketpair()
        except OSError as error:
            raise HostError("make a channel for a vm", error) from error
        refuse_files(ours)
        with theirs:
            try:
                lines, writer = logpair()
            except OSError as error:
                ours.close()
                raise HostError("make a log for a vm", error) from error
            with writer:
                arguments = ["vm", log.form, str(log.verbosity), *self.devices]
                fds, group = {KVM_FD: self.kvm_fd}, -1
                if slot.group_fd >= 0:
                    fds[GROUP_FD], group = slot.group_fd, GROUP_FD
                try:
                    started = spawn(
                        "vm", arguments, channel=theirs, fds=fds, log_fd=writer.fileno(), uid=slot.uid, group=group
                    )
                except HostError:
                    ours.close()
                    lines.close()
                    raise
        del self.slots[0]
        child = VmChild(started.pid, started.pidfd, self.attach_vm(ours), lines, slot)
        self.by_channel[child.channel] = child
        self.reaper.watch(child)
        return child

    def attach_vm(self, sock: socket.socket) -> Channel:
        """Serve the channel of a VM process."""
        return self.attach(sock, Proc.VM, "vm", on_lost=self.on_vm_lost, queue_limit=VM_QUEUE_LIMIT)

    def on_start_vm(self, message: StartVm, envelope: Envelope, _channel: Channel) -> None:
        """Pass a VM to the process in reserve, or to a new one."""
        self.begin(message, message.config.name, envelope)

    def on_receive_vm(self, message: ReceiveVm, envelope: Envelope, _channel: Channel) -> None:
        """Pass a stream to the process in reserve, or to a new one."""
        self.begin(message, message.name, envelope)

    def begin(self, message: StartVm | ReceiveVm, name: str, envelope: Envelope) -> None:
        """Give a VM process its VM."""
        if isinstance(message, StartVm):
            self.devices = device_words(message)
        try:
            self.require_files()
            child, self.reserve = self.reserve or self.spawn_vm(), None
        except HostError as error:
            self.not_started(message.vmid, error.number, str(error))
            return
        child.slot.close()  # the process has joined the group already
        self.forget(message.vmid)
        child.vmid = message.vmid
        child.held = VmHeld(vmid=message.vmid, group=child.slot.group)
        child.channel.label = f"vm/{name}"
        self.pass_log(child)
        child.expect(message)
        child.become(message)
        self.running[message.vmid] = child
        self.pass_on(message, envelope, child)
        self.loop.call_later(RESERVE_LATEST_S, self.fill_reserve)

    def pass_log(self, child: VmChild) -> None:
        """Send the reading end of a VM process's log to the parent, which has it read under the VM's name."""
        if child.log is not None:
            why = f"{child.channel.label}: its log is not read: {os.strerror(errno.ETOOMANYREFS)}"
            fds = {"log": [child.log.detach()]}
            if child.vmid:
                child.keep(fds)
            self.parent.send(VmLog(vmid=child.vmid), fds=fds, refused=lambda: log.warn(why))

    def require_files(self) -> None:
        """Raise HostError(EMFILE) if another VM would leave too few free descriptors for those of messages."""
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if FILES_OF_A_VM * len(self.running) + FILES_SPARE > most:
            raise HostError(f"have another vm among the {most} files that vmm may have open", errno.EMFILE)

    def on_stop_vm(self, message: StopVm, _envelope: Envelope, _channel: Channel) -> None:
        """Pass a request to stop on to a VM.  If it is by force, kill the VM later."""
        child = self.running.get(message.vmid)
        if child is None:
            return  # the VM has just ended; VmExited is on its way
        child.become(message)
        child.channel.send(message)
        if message.mode is StopMode.KILL:
            # The VM's process lets its devices finish, so that no disk is half written.  It is killed if it is stuck.
            self.loop.call_later(FORCE_GRACE_S, lambda: self.kill(child, "stopped by force; it had to be killed"))

    def require_report(self, child: VmChild) -> None:
        """Kill a VM that has not reported how its start went."""
        if not child.reported:
            self.kill(child, f"did not start within {START_S:.0f} s")

    def kill(self, child: VmChild, words: str = "") -> None:
        """Kill a VM process that did not end when it was told to, or broke the protocol; `words` say why."""
        if not child.gone:
            child.last_words = words or child.last_words
            child.kill()
            self.loop.call_later(GONE_S, lambda: self.give_up_on(child))

    def give_up_on(self, child: VmChild) -> None:
        """A killed VM process does not end, because it is in a system call.  Report its VM as ended."""
        if child.gone or child in self.stuck:
            return
        child.channel.drain()
        self.stuck.add(child)
        if self.reserve is child:
            self.reserve = None
            self.pass_log(child)
        if self.running.get(child.vmid) is child:
            words = f"{child.last_words or 'killed'}; its process waits for storage, and has not ended yet"
            self.exited(child, Outcome.KILLED, brief(words))

    def on_to_vm(self, message: Record, envelope: Envelope, _channel: Channel) -> None:
        """Relay a message to the VM that it names."""
        child = self.running.get(message.as_dict()["vmid"])
        if child is not None:
            child.expect(message)
            child.become(message)
            self.pass_on(message, envelope, child)

    def pass_on(self, message: Record, envelope: Envelope, child: VmChild) -> None:
        """Send a message to a VM.  After the message that starts it, kill the VM if it does not run in time."""
        if isinstance(message, StartVm | ResumeReceived):
            self.loop.call_later(START_S, lambda: self.require_report(child))
        fds = {name: envelope.take_fds(name) for name in tuple(envelope.fds)}
        if isinstance(message, StartVm | ReceiveVm):
            try:
                fds["figures"] = [sealed_file("figures", FIGURES_BYTES)]
            except OSError as error:
                log.warn(f"{child.channel.label}: what its devices do is not counted: {error.strerror}")
        child.keep(fds)
        child.channel.send(
            message,
            peerid=envelope.peerid,
            fds=fds,
            refused=lambda: self.kill(child, f"{NOT_PASSED_ON}: {os.strerror(errno.ETOOMANYREFS)}"),
        )

    def on_from_vm(self, message: Record, envelope: Envelope, channel: Channel) -> None:
        """Relay a message to the parent, with the true id of the VM instead of the claimed one."""
        child = self.child_of(channel)
        worth_passing_on = child.account(message)
        child.become(message)
        if not worth_passing_on:
            return
        claimed = message.as_dict()
        known = {"vmid": child.vmid, "text": brief(claimed.get("text", ""))}
        message = message.replace(**{field: value for field, value in known.items() if field in claimed})
        if isinstance(message, VmRunning):
            self.loop.call_later(RESERVE_DELAY_S, self.fill_reserve)
            close_all(envelope.take_fds("process"))
            close_all(envelope.take_fds("figures"))
            envelope.fds["process"] = [os.dup(child.pidfd)]
            envelope.fds["figures"] = [os.dup(fd) for fd in child.kept.get("figures", ())]
        fds = {name: envelope.take_fds(name) for name in tuple(envelope.fds)}
        try:
            self.parent.send(message, peerid=child.vmid, fds=fds, refused=lambda: self.parent.send(message))
        except ValueError as error:  # with the right id it does not fit into a packet any more
            raise PeerError(channel.label, str(error)) from None

    def on_vm_ending(self, message: VmEnding, _envelope: Envelope, channel: Channel) -> None:
        """Keep the reason of a VM's end until the process has ended."""
        child = self.child_of(channel)
        if child.account(message):
            child.last_words = brief(message.text)

    def child_of(self, channel: Channel) -> VmChild:
        """Return the running VM of a channel.  Raises PeerError for another process, such as that in reserve."""
        child = self.running_on(channel)
        if child is None:
            raise PeerError(channel.label, "speaks before it was given a VM")
        return child

    def running_on(self, channel: Channel) -> VmChild | None:
        """Return the running VM of a channel, if there is one."""
        child = self.by_channel.get(channel)
        return child if child is not None and self.running.get(child.vmid) is child else None

    def on_vm_lost(self, channel: Channel, error: PeerError | None) -> None:
        """A VM process has closed its channel or broke the protocol: kill it if it does not end."""
        child = self.by_channel.get(channel)
        if child is None:
            return
        if error is not None:
            log.error(str(error))
            self.kill(child, f"broke the protocol: {error.what}")
        else:  # the process is probably exiting, and its exit status is needed
            self.loop.call_later(EXIT_GRACE_S, lambda: self.kill(child))

    def on_vm_gone(self, child: VmChild, outcome: Outcome, text: str) -> None:
        """A VM process was reaped: tell the parent how it ended."""
        child.channel.drain()  # its last messages may not have been read yet
        self.by_channel.pop(child.channel, None)
        self.stuck.discard(child)
        if child is self.reserve:
            self.reserve = None
            if self.retired:
                self.slot_over(child.slot)
                if child.log is not None:
                    child.log.close()
                return
            self.slots.append(child.slot)  # the process had no VM, so the slot can be used again
            log.warn(f"reserve: {text or 'exited'}")
            self.pass_log(child)
            return
        known = self.running.get(child.vmid) is child
        self.slot_over(child.slot, child.vmid if known else 0)
        if known:
            self.exited(child, outcome, child.last_words or text)

    def exited(self, child: VmChild, outcome: Outcome, text: str) -> None:
        """Tell the parent that a VM has ended.  `over` keeps the VM for the next parent, if this one is gone."""
        del self.running[child.vmid]
        child.drop("memory", "figures")
        child.held = child.held.replace(outcome=outcome, text=text)
        self.over[child.vmid] = child
        self.parent.send(VmExited(vmid=child.vmid, pid=child.pid, outcome=outcome, text=text))
        self.end_if_over()

    def forget(self, vmid: int) -> None:
        """Forget a VM that has ended, and close the descriptors that were kept for it."""
        child = self.over.pop(vmid, None)
        if child is not None:
            child.drop()

    def on_end_taken(self, message: EndTaken, _envelope: Envelope, _channel: Channel) -> None:
        """The parent confirms that a VM has ended."""
        self.forget(message.vmid)

    # --- another parent ---------------------------------------------------------------------------------------

    def on_ask_vms(self, _message: AskVms, envelope: Envelope, _channel: Channel) -> None:
        """The next parent asks for all VMs: report them with their descriptors, and log to its socket."""
        writer = envelope.take_fd("log")
        assert writer is not None
        os.dup2(writer, log.fd, inheritable=False)
        close(writer)
        for child in self.running.values():
            child.forget_questions()
        self.to_report = [*self.running.values(), *self.over.values()]
        self.parent.on_sent = self.report
        self.report()

    def report(self) -> None:
        """Report VMs one by one, each when the message before was sent, so that few descriptors are copied at once."""
        while self.to_report and not self.parent.waiting:
            self.report_vm(self.to_report.pop(0))
        if self.to_report is not None and not self.to_report and not self.parent.waiting:
            self.to_report, self.parent.on_sent = None, None
            spare = [*self.slots, *([self.reserve.slot] if self.reserve else ())]
            groups = {each.slot.group for each in self.children()} | {slot.group for slot in spare}
            vms = (*self.running, *self.over)
            held = VmsHeld(version=VERSION, spare=len(spare), groups=tuple(sorted(groups - {0})), vms=vms)
            self.parent.send(held, fds={"process": [os.pidfd_open(os.getpid())]})

    def report_vm(self, child: VmChild) -> None:
        """Report a VM.  Try again later if its descriptors cannot be copied or sent."""
        fds: dict[str, list[int]] = {}

        def again() -> None:
            self.loop.call_later(REPORT_AGAIN_S, lambda: self.report_vm(child))

        try:
            for name, kept in child.kept.items():
                fds[name] = []
                fds[name] += (os.dup(fd) for fd in kept)
            if not child.gone:
                fds["process"] = [os.dup(child.pidfd)]
        except OSError:
            for copies in fds.values():
                close_all(copies)
            again()
            return
        self.parent.send(child.held, fds=fds, refused=again)

    def on_retire(self, _message: Retire, _envelope: Envelope, _channel: Channel) -> None:
        """No other VM starts here: end the process in reserve, and give all slots back."""
        self.retired = True
        if self.reserve is not None:
            self.reserve.kill()
        while self.slots:
            self.slot_over(self.slots.pop())

    # --- without the parent -----------------------------------------------------------------------------------

    def on_parent_lost(self, _channel: Channel, error: PeerError | None) -> None:
        """No parent is left: ask all guests to shut down, and end with the last one."""
        if error is not None:
            log.crit(str(error))
            self.exit_status = 1
        self.orphaned = True
        if self.running:
            log.warn(f"the daemon is gone: {len(self.running)} guests are to shut down, {ORPHANS_S:.0f} s at most")
            self.loop.call_later(ORPHANS_S, self.loop.stop)
        for child in self.running.values():
            child.channel.send(StopVm(vmid=child.vmid, mode=StopMode.GRACEFUL))
        self.end_if_over()

    def end_if_over(self) -> None:
        """End if no VM is left and the parent is gone."""
        if self.orphaned and not self.running:
            self.loop.stop()

    # --- unexpected exceptions ------------------------------------------------------------------------------

    def source_of(self, envelope: Envelope, channel: Channel) -> "Source | None":
        """Return the VM that a message is about; None for the process in reserve."""
        if channel.peer is not Proc.VM:
            return super().source_of(envelope, channel)
        child = self.running_on(channel)
        return (Proc.VM, child.vmid) if child is not None else None

    def give_up(self, envelope: Envelope, channel: Channel) -> None:
        """End the VM of a message whose handler has failed.  Else a client could wait for its answer for ever."""
        message = envelope.message
        if isinstance(message, StartVm | ReceiveVm) and message.vmid not in self.running:
            self.not_started(message.vmid, errno.EIO, OUR_FAULT)
        elif channel.peer is Proc.VM:
            self.on_vm_lost(channel, PeerError(channel.label, OUR_FAULT))
        elif (source := self.source_of(envelope, channel)) is not None:
            self.cut_off(source)

    def cut_off(self, source: "Source") -> None:
        """Kill a VM."""
        child = self.running.get(source[1])
        if child is not None:
            self.kill(child, OUR_FAULT)

    def not_started(self, vmid: int, code: int, text: str) -> None:
        """Tell the parent that there is no process for a VM."""
        self.parent.send(VmFailed(vmid=vmid, code=code, text=text))
        self.parent.send(VmExited(vmid=vmid, pid=0, outcome=Outcome.FAILED, text=text))

    def on_set_verbosity(self, message: SetVerbosity, _envelope: Envelope, _channel: Channel) -> None:
        """Set the verbosity of vmm and all VMs.  Later VMs get it with StartVm."""
        log.verbosity = message.verbosity
        for child in self.running.values():
            child.channel.send(message)

    def on_ping(self, _message: Ping, _envelope: Envelope, _channel: Channel) -> None:
        """Answer, which shows that all messages before this one were served."""
        self.parent.send(Pong())

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """End.  VM processes that still live are killed."""
        self.loop.stop()

    HANDLERS: "Handlers" = {
        **handles(Proc.PARENT, KvmFd, on_kvm_fd),
        **handles_each(Proc.PARENT, relays(Proc.VMM, Proc.PARENT), on_to_vm),
        **handles(Proc.PARENT, VmSlot, on_slot),
        **handles(Proc.PARENT, StartVm, on_start_vm),
        **handles(Proc.PARENT, StopVm, on_stop_vm),
        **handles(Proc.PARENT, ReceiveVm, on_receive_vm),
        **handles(Proc.PARENT, AskVms, on_ask_vms),
        **handles(Proc.PARENT, EndTaken, on_end_taken),
        **handles(Proc.PARENT, Retire, on_retire),
        **handles(Proc.PARENT, SetVerbosity, on_set_verbosity),
        **handles(Proc.PARENT, Ping, on_ping),
        **handles(Proc.PARENT, Quit, on_quit),
        **handles(Proc.VM, VmEnding, on_vm_ending),
        **handles_each(Proc.VM, relays(Proc.VMM, Proc.VM), on_from_vm),
    }

    def children(self) -> "list[VmChild]":
        """Return all VM processes, including the one in reserve and those that do not end."""
        return [*self.running.values(), *((self.reserve,) if self.reserve else ()), *self.stuck]


def main() -> int:
    """Run process vmm."""
    process = Vmm()
    process.ignore_terminal_signals()
    process.parent.send(Ready(warnings=tuple(confine(VMM))))
    process.loop.run()
    end_all(process.children(), END_S)
    return process.exit_status
