"""vm/<name>: one virtual machine, from its first instruction to its last.

Runs as  _vmd, in vmm's cell; narrowed to KVM requests and its open descriptors before the guest runs
Peers    vmm; its device processes, which it starts
Holds    /dev/kvm until the VM is made; KVM's VM and vCPU fds, guest memory, both sides of the console's pty;
         disks and the disc only until their processes have them
Threads  event: the main thread; vcpu<n>: one for each vCPU; send, receive and hasher while it is sent or received

It is started before there is a VM for it, imports what a VM needs, and waits (vmm keeps one in reserve).
"""

import errno
import gc
import os
import sys

from vmd.backlog import BacklogWriter
from vmd.errors import OperatorError, PeerError, VmdError, sentence
from vmd.guestmem import GuestMemory
from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages import (
    AskDevices,
    AskResolvers,
    CancelTransfer,
    ConsoleSnapshot,
    ConsoleSnapshotEnd,
    DevicesReported,
    NicCounters,
    Outcome,
    PauseDone,
    PauseVm,
    Proc,
    Quit,
    ReceivedHeader,
    ReceivedMachine,
    ReceiveMemory,
    ReceiveVm,
    Resolvers,
    ResumeReceived,
    SendBreak,
    SendDone,
    SendVm,
    SetVerbosity,
    StartVm,
    StopMode,
    StopVm,
    TransferProgress,
    VmEnding,
    VmFailed,
    VmRunning,
    brief,
)
from vmd.ipc.process import Process
from vmd.kvmapi import abi
from vmd.kvmapi.vcpu import install_kick_handler
from vmd.log import log
from vmd.privsep.confine import VM, confine
from vmd.privsep.title import EVENT, name_thread, set_title
from vmd.vm import vmmci
from vmd.vm.boot import loader
from vmd.vm.clockwatch import ClockWatch
from vmd.vm.console import Console
from vmd.vm.devproc import DeviceProcesses
from vmd.vm.kinds import Given
from vmd.vm.machine import BootImages, Machine, check_host, memory_regions
from vmd.vm.pause import Pause
from vmd.vm.slots import plan
from vmd.vm.state import Header, MachineState, as_sent, cpuid_of
from vmd.vm.transfer import Receiver, Sender

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmd.ipc.loop import Timer
    from vmd.ipc.process import Handlers
    from vmd.vm.slots import Slot


CONFINEMENT = VM.replace(
    ioctls=(
        abi.KVM_RUN,
        abi.KVM_IRQ_LINE,  # chips raise and lower their lines
        abi.KVM_IOEVENTFD, abi.KVM_IRQFD,  # notifications and interrupts of devices, where the guest wants them now
        abi.KVM_SET_GSI_ROUTING,  # messages of MSI-X
        abi.KVM_GET_MSRS, abi.KVM_SET_MSRS, abi.KVM_GET_CLOCK, abi.KVM_SET_CLOCK,  # clocks stop while it is paused
        abi.KVM_GET_PIT2, abi.KVM_SET_PIT2, abi.KVM_GET_LAPIC, abi.KVM_SET_LAPIC, abi.KVM_GET_TSC_KHZ,
        abi.KVM_HAS_DEVICE_ATTR, abi.KVM_GET_DEVICE_ATTR, abi.KVM_SET_DEVICE_ATTR,
        # what is sent:
        abi.KVM_GET_IRQCHIP, abi.KVM_GET_MP_STATE, abi.KVM_GET_XSAVE,
        abi.KVM_GET_XSAVE2, abi.KVM_GET_XCRS, abi.KVM_GET_DEBUGREGS, abi.KVM_GET_VCPU_EVENTS,
        abi.KVM_GET_REGS, abi.KVM_GET_SREGS, abi.KVM_TRANSLATE,  # what a vCPU that KVM gave up on looked like
        *VM.ioctls,
    )
)  # fmt: skip

KVM_FD = 4  # where vmm leaves /dev/kvm
SWITCH_INTERVAL_S = 0.0005  # a busy event thread must not keep a vCPU waiting for the interpreter
ACK_TIMEOUT_S = 3.0  # for the guest to notice the power button (*cat. 4.4*)
SHUTDOWN_TIMEOUT_S = 120.0  # for it to be done
LAST_WORDS_TIMEOUT_S = 1.0
RESOLVERS_TIMEOUT_S = 1.0  # a guest that waits for its DHCP server asks again after some seconds
PROGRESS_S = 0.5


class VmProcess(Process):
    """The event thread's state."""

    def __init__(self) -> None:
        super().__init__(Proc.VM)
        self.vmm = self.attach_parent(Proc.VMM)
        self.vmid = 0
        self.machine: Machine | None = None
        self.asking: Timer | None = None  # for name servers
        self.pause: Pause | None = None
        self.devices = DeviceProcesses()
        self.console: Console | None = None
        self.send_wanted = False  # from SendVm to its answer, unless somebody cancels it
        self.sender: Sender | None = None
        self.on_sender_gone: Callable[[], None] = lambda: None
        self.receiver: Receiver | None = None
        self.received: Received | None = None
        self.arrived = False  # from another place, and the network has not been told
        self.ending = False
        self.stopping = False

    def on_start_vm(self, message: StartVm, envelope: Envelope, channel: Channel) -> None:
        """Build the VM, give up what only building needs, and let the guest execute."""
        self.vmid = message.vmid
        log.setup(f"vm/{message.config.name}", log.form, message.verbosity)
        set_title(log.title)
        boot, initrd = envelope.take_fd("boot"), envelope.take_fd("initrd")
        assert boot is not None
        images = BootImages(boot, message.boot_name, initrd, message.config.initrd or "initrd")
        slots = slots_of(message, envelope)
        try:
            self.console = self.open_console(envelope)
            firmware_bytes = loader.firmware_bytes(boot, message.boot_name)
            self.machine = Machine(
                message.config,
                KVM_FD,
                firmware_bytes,
                slots,
                self.devices,
                self.console,
                self.loop,
                self.end_from_thread,
                self.ask_resolvers,
            )
            self.machine.boot(images)
            images.close()
            close_resources(slots)
            confine(CONFINEMENT)  # what this kernel lacks was said by vmm, at the start of the daemon
            self.pause = Pause(self.machine, self.loop)
            self.watch_clock(self.machine)
            self.machine.start()
        except (VmdError, OSError) as error:
            self.fail(error)
            return
        self.report_running(self.machine)

    def report_running(self, machine: Machine, *, paused: bool = False) -> None:
        """Say that the guest executes, or waits to be unpaused."""
        name_thread(EVENT)
        memory = os.dup(machine.memory.fd)
        self.vmm.send(VmRunning(vmid=self.vmid, pid=os.getpid(), paused=paused), fds={"memory": [memory]})

    def watch_clock(self, machine: Machine) -> None:
        """Tell the guest when its clock needs a look at the real-time clock."""
        ClockWatch(self.loop, lambda: machine.vmmci.ask(vmmci.SYNCRTC))

    def fail(self, error: Exception) -> None:
        """Report that there will be no VM, and end."""
        code = getattr(error, "errno", None) or getattr(error, "code", None) or 0
        self.vmm.send(VmFailed(vmid=self.vmid, code=code, text=brief(sentence(error))))
        self.end(Outcome.FAILED, sentence(error))

    def on_stop_vm(self, message: StopVm, envelope: Envelope, channel: Channel) -> None:
        """Ask by vmmci, or press the power button; a guest with a driver for neither is ended at once (*cat. 4.4*)."""
        if message.mode is StopMode.KILL:
            self.end(Outcome.ENDED, "stopped by force")
        if self.stopping or self.ending:
            return
        if self.machine is None or self.pause is None:
            self.end(Outcome.ENDED, "stopped while it was being received")
            return
        if self.sender is not None:
            self.sender.cancel()
            self.on_sender_gone = lambda: self.on_stop_vm(message, envelope, channel)
            return
        if self.pause.under_way:
            self.pause.pause(lambda _text: self.on_stop_vm(message, envelope, channel))
            return
        self.stopping = True
        self.go_on()  # only a guest that runs can shut down
        self.ask_to_shut_down(self.machine)

    def ask_to_shut_down(self, machine: Machine) -> None:
        """Have the guest end itself; one that does not in time is ended."""
        ask: Callable[[], object]
        if machine.vmmci.driver_is_up:
            # Not `shutdown`: a guest that cannot switch itself off would wait for a key to be pressed.
            wanted, ask = "vmmci", lambda: machine.vmmci.ask(vmmci.REBOOT)
        elif machine.pm.power_button_enabled:
            wanted, ask = "the power button", machine.pm.power_button
        else:
            self.end(Outcome.ENDED, "stopped; the guest has no driver for the power button")
            return
        deadline = self.loop.call_later(
            ACK_TIMEOUT_S,
            lambda: self.end(Outcome.ENDED, f"did not notice {wanted} in {ACK_TIMEOUT_S:.0f} s"),
        )

        def acknowledged_on_vcpu(command: int = vmmci.REBOOT) -> None:
            if command == vmmci.REBOOT:  # of whatever it was asked before we do not speak
                # Once: a guest may say it as often as it likes.
                machine.on_acknowledged, machine.pm.on_button_acknowledged = ignore, ignore
                self.loop.call_from_thread(acknowledged)

        def acknowledged() -> None:
            deadline.cancel()
            self.loop.call_later(
                SHUTDOWN_TIMEOUT_S,
                lambda: self.end(Outcome.ENDED, f"did not shut down in {SHUTDOWN_TIMEOUT_S:.0f} s"),
            )

        machine.on_acknowledged = machine.pm.on_button_acknowledged = acknowledged_on_vcpu
        ask()
        if machine.vmmci.driver_is_up and not machine.vmmci.acknowledges:
            acknowledged()  # it never will

    def on_pause_vm(self, message: PauseVm, _envelope: Envelope, channel: Channel) -> None:
        """Stand still, or go on; stopping takes until the slowest device has finished what is in flight.

        Whoever wants it to go on while it is about to stand still has his turn then: answers come in order.
        """
        pause = self.pause
        if pause is None or self.ending:
            return  # how the VM ends is the answer

        def answer(text: str) -> None:
            channel.send(PauseDone(vmid=self.vmid, paused=pause.paused, text=brief(text)))

        if message.paused:
            pause.pause(answer)
        elif pause.under_way:
            pause.pause(lambda text: answer(self.go_on() or text))
        else:
            answer(self.go_on())

    def go_on(self) -> str:
        """Let a paused machine go on; one that cannot is at its end.  Returns why not, or nothing."""
        assert self.pause is not None
        try:
            self.pause.unpause()
        except (VmdError, OSError) as error:
            self.end(Outcome.FAILED, sentence(error))
            return sentence(error)
        if self.arrived:
            assert self.machine is not None
            self.machine.announce()
            self.arrived = False
        return ""

    # --- sending and receiving ---------------------------------------------------------------------------------

    def on_send_vm(self, message: SendVm, envelope: Envelope, _channel: Channel) -> None:
        """Stand still, and have a thread write what we are."""
        pause, stream = self.pause, envelope.take_fd("stream")
        assert stream is not None
        if pause is None or self.ending or self.send_wanted or self.sender is not None:
            os.close(stream)
            return  # how the VM ends is the answer; two at once the parent does not ask for
        self.send_wanted = True
        stays_paused = pause.paused or pause.under_way
        pause.pause(lambda text: self.begin_send(message, stream, text, stays_paused=stays_paused))

    def begin_send(self, message: SendVm, stream: int, text: str, *, stays_paused: bool) -> None:
        """The machine stands still, or a text says why not."""
        assert self.pause is not None
        if not text and not self.send_wanted:
            text = "sending was interrupted"
        if not text:
            assert self.machine is not None
            assert self.pause.clocks is not None
            try:
                self.sender = Sender(
                    self.machine,
                    self.pause.clocks,
                    stream,
                    self.loop,
                    lambda text: self.on_sent(message, text, stays_paused=stays_paused),
                    one_shot=message.one_shot,
                )
            except PeerError as error:
                os.close(stream)
                self.send_wanted = False
                self.end(Outcome.FAILED, str(error))  # a device is gone: how the VM ends is the answer
                return
            except (VmdError, OSError) as error:
                text = sentence(error)
        if self.sender is None:
            os.close(stream)
            self.send_wanted = False
            self.report_sent(0, text)
            if not stays_paused and not self.ending:
                self.go_on()
            return
        self.sender.start()
        self.show_progress(self.sender)

    def on_sent(self, message: SendVm, text: str, *, stays_paused: bool) -> None:
        """The stream is complete, or has failed: then, as with `keep`, everything is as before."""
        sender, self.sender = self.sender, None
        assert sender is not None
        self.send_wanted = False
        on_gone, self.on_sender_gone = self.on_sender_gone, lambda: None
        self.report_sent(sender.pipe.moved_bytes, text)
        if not text and not message.keep:
            self.end(Outcome.POWER_OFF, "sent")
            return
        if not stays_paused:
            self.go_on()
        on_gone()

    def report_sent(self, sent_bytes: int, text: str) -> None:
        """Answer SendVm."""
        self.vmm.send(SendDone(vmid=self.vmid, sent_bytes=sent_bytes, text=brief(text)))

    def show_progress(self, transfer: "Sender | Receiver") -> None:
        """Tell every now and then how far a transfer is, until it is over."""
        if transfer in (self.sender, self.receiver) and not self.ending:
            done, total = transfer.pipe.moved_bytes, transfer.total_bytes
            self.vmm.send(TransferProgress(done_bytes=done, total_bytes=total))
            self.loop.call_later(PROGRESS_S, lambda: self.show_progress(transfer))

    def on_cancel_transfer(self, _message: CancelTransfer, _envelope: Envelope, _channel: Channel) -> None:
        """Give up sending, or not even begin."""
        self.send_wanted = False
        if self.sender is not None:
            self.sender.cancel()

    def on_receive_vm(self, message: ReceiveVm, envelope: Envelope, _channel: Channel) -> None:
        """Read the header of a stream."""
        self.vmid = message.vmid
        log.setup(f"vm/{message.name}", log.form, message.verbosity)
        set_title(log.title)
        stream = envelope.take_fd("stream")
        assert stream is not None
        self.console = self.open_console(envelope)
        self.receiver = Receiver(
            stream,
            self.loop,
            on_header=self.on_stream_header,
            on_machine=self.on_stream_machine,
            on_failed=lambda text: self.fail(OperatorError(errno.EINVAL, text)),
        )
        self.receiver.start()
        self.show_progress(self.receiver)

    def on_stream_header(self, header: Header) -> None:
        """Ask whether such a VM may be, once it is clear that it could."""
        try:
            check_host(header, KVM_FD)
        except (ValueError, OSError) as error:
            self.refuse_stream(error)
            return
        self.received = Received(header)
        try:
            self.vmm.send(ReceivedHeader(vmid=self.vmid, config=header.config, one_shot=header.one_shot))
        except ValueError:
            self.refuse_stream(ValueError("its configuration is longer than any here can be"))

    def refuse_stream(self, error: ValueError | OSError) -> None:
        """End, because a stream is whole and still has no machine for this host in it."""
        self.fail(OperatorError(errno.EINVAL, f"the stream is not usable: {sentence(error)}"))

    def on_receive_memory(self, _message: ReceiveMemory, _envelope: Envelope, channel: Channel) -> None:
        """Read the rest of the stream."""
        if self.received is None or self.receiver is None or self.received.memory is not None:
            raise PeerError(channel.label, "unexpected ReceiveMemory")
        header = self.received.header
        try:
            regions = memory_regions(header.config.memory_bytes, header.firmware_bytes)
            self.received.memory = GuestMemory.create(regions)
        except (VmdError, ValueError) as error:
            self.fail(error)
            return
        self.receiver.go_on(self.received.memory)

    def on_stream_machine(self, machine: MachineState) -> None:
        """The stream is complete: ask for the disks, which the sender lets go now."""
        assert self.received is not None
        self.receiver = None
        self.received.machine = machine
        self.vmm.send(ReceivedMachine(vmid=self.vmid))

    def on_resume_received(self, message: ResumeReceived, envelope: Envelope, channel: Channel) -> None:
        """Build the machine, make it what the other one was, and let it go on."""
        received = self.received
        if received is None or received.machine is None or received.memory is None or self.machine is not None:
            raise PeerError(channel.label, "unexpected ResumeReceived")
        assert self.console is not None
        slots = slots_of(message, envelope)
        try:
            slots = as_sent(slots, received.header.devices)
            self.machine = Machine(
                message.config,
                KVM_FD,
                received.header.firmware_bytes,
                slots,
                self.devices,
                self.console,
                self.loop,
                self.end_from_thread,
                self.ask_resolvers,
                memory=received.memory,
                cpuid=cpuid_of(received.header),
            )
            clocks = self.machine.become(received.machine, received.header.devices)
            self.received, self.arrived = None, True
            close_resources(slots)
            confine(CONFINEMENT)
            self.pause = Pause(self.machine, self.loop)
            self.pause.begin_paused(clocks)
            self.watch_clock(self.machine)
            self.machine.start(parked=True)
        except ValueError as error:
            self.refuse_stream(error)
            return
        except (VmdError, OSError) as error:
            self.fail(error)
            return
        if message.paused or not self.go_on():
            self.report_running(self.machine, paused=message.paused)

    # --- the console, and the rest -----------------------------------------------------------------------------

    def open_console(self, envelope: Envelope) -> Console:
        """Return the console whose descriptors came with a message."""
        master, slave, shown = (envelope.take_fd(name) for name in ("tty", "tty_slave", "shown"))
        assert master is not None
        assert slave is not None
        assert shown is not None
        return Console(master, slave, BacklogWriter(shown), self.loop)

    def on_console_snapshot(self, _message: ConsoleSnapshot, envelope: Envelope, channel: Channel) -> None:
        """Let a new viewer begin with the backlog, and perhaps on another pty."""
        if self.console is None:
            return  # how the VM ends is the answer
        master, slave = envelope.take_fd("tty"), envelope.take_fd("tty_slave")
        if master is not None and slave is not None:
            self.console.move(master, slave)
        channel.send(ConsoleSnapshotEnd(end=self.console.snapshot()), peerid=envelope.peerid)

    def on_send_break(self, _message: SendBreak, _envelope: Envelope, _channel: Channel) -> None:
        """Let the guest see a BREAK."""
        if self.machine is not None:
            self.machine.uart.send_break()

    def on_ask_devices(self, _message: AskDevices, _envelope: Envelope, channel: Channel) -> None:
        """Say what the network interfaces have done, and what is wrong with any device."""
        try:
            counters = self.machine.nic_counters() if self.machine is not None else []
            troubles = self.machine.troubles() if self.machine is not None else []
        except PeerError as error:
            self.end(Outcome.FAILED, str(error))
            return
        nics = tuple(NicCounters(values=values) for values in counters)
        channel.send(DevicesReported(vmid=self.vmid, nics=nics, troubles=tuple(troubles)))

    def ask_resolvers(self) -> None:
        """Ask which name servers there are, for a guest; the devices go on in any case."""
        if self.asking is None:
            self.asking = self.loop.call_later(RESOLVERS_TIMEOUT_S, lambda: self.tell_resolvers(None))
            self.vmm.send(AskResolvers(vmid=self.vmid))

    def on_resolvers(self, message: Resolvers, _envelope: Envelope, _channel: Channel) -> None:
        """These are the name servers."""
        self.tell_resolvers((message.dns4, message.dns6))

    def tell_resolvers(self, servers: tuple[tuple[bytes, ...], tuple[bytes, ...]] | None) -> None:
        """Tell the network interfaces; None: nobody has answered in time."""
        if self.asking is not None:
            self.asking.cancel()
            self.asking = None
        if self.machine is not None:
            self.machine.tell_resolvers(servers)

    def on_set_verbosity(self, message: SetVerbosity, _envelope: Envelope, _channel: Channel) -> None:
        """Log more or less."""
        log.verbosity = message.verbosity
        self.devices.set_verbosity(message.verbosity)

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """End without a word."""
        self.end(Outcome.POWER_OFF, "")

    def end_from_thread(self, outcome: Outcome, text: str) -> None:
        """End; a vCPU thread or a chip has found a reason."""
        self.loop.call_from_thread(lambda: self.end(outcome, text))

    def end(self, outcome: Outcome, text: str) -> None:
        """Stop the guest and leave the loop; the first reason wins."""
        if self.ending:
            return
        self.ending = True
        self.exit_status = outcome
        if self.machine is not None and not self.machine.stop():
            log.error("a vcpu does not come back from the kernel; ending without it")
        self.devices.end()
        self.vmm.send(VmEnding(text=brief(text)))
        self.vmm.flush_blocking(LAST_WORDS_TIMEOUT_S)
        self.loop.stop()

    HANDLERS: "Handlers" = {
        (Proc.VMM, StartVm): on_start_vm,
        (Proc.VMM, StopVm): on_stop_vm,
        (Proc.VMM, PauseVm): on_pause_vm,
        (Proc.VMM, SendVm): on_send_vm,
        (Proc.VMM, CancelTransfer): on_cancel_transfer,
        (Proc.VMM, ReceiveVm): on_receive_vm,
        (Proc.VMM, ReceiveMemory): on_receive_memory,
        (Proc.VMM, ResumeReceived): on_resume_received,
        (Proc.VMM, ConsoleSnapshot): on_console_snapshot,
        (Proc.VMM, SendBreak): on_send_break,
        (Proc.VMM, AskDevices): on_ask_devices,
        (Proc.VMM, Resolvers): on_resolvers,
        (Proc.VMM, SetVerbosity): on_set_verbosity,
        (Proc.VMM, Quit): on_quit,
    }


def ignore(*_: object) -> None:
    """Do nothing."""


class Received:
    """What has come of a stream."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.memory: GuestMemory | None = None
        self.machine: MachineState | None = None


def slots_of(message: StartVm | ResumeReceived, envelope: Envelope) -> "list[Slot]":
    """Return the devices that a message describes; their descriptors are ours from now on."""
    disks, cdrom, taps = envelope.take_fds("disks"), envelope.take_fd("cdrom"), envelope.take_fds("taps")
    if len(taps) != len(message.nics) or len(disks) != sum(len(disk.images) for disk in message.disks):
        raise PeerError("vmm", f"{len(disks)} images and {len(taps)} taps that nobody describes")
    given = Given(
        config=message.config,
        disks=message.disks,
        disk_fds=tuple(disks),
        cdrom_fd=cdrom,
        nics=message.nics,
        tap_fds=tuple(taps),
    )
    return plan(given)


def close_resources(slots: "Sequence[Slot]") -> None:
    """Close what device processes have now."""
    for slot in slots:
        for fd in slot.fds:
            os.close(fd)


def main() -> int:
    """Run process vm."""
    process = VmProcess()
    process.ignore_terminal_signals()
    install_kick_handler()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    process.devices.fill_reserve()
    gc.collect()
    gc.freeze()
    process.loop.run()
    process.devices.end()
    return process.exit_status
