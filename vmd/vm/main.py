"""vm/<name>: runs one virtual machine.

Runs as  an id of its own, in vmm's cell; confined to KVM requests and its open descriptors before it reads a boot image
         or a stream, and to the requests of a running VM before the guest runs
Peers    vmm; its device processes, which it starts
Holds    /dev/kvm until it gets a VM; KVM's VM and vCPU fds, guest memory, both sides of the console's pty;
         disks and the disc only until their processes have them
Threads  event: the main thread; vcpu<n>: one for each vCPU; send, receive and hashers while it is sent or received;
         closer: closes the VM that was made to ask KVM whether a stream's machine can run here

vmm starts this process in reserve, before there is a VM for it.  The process imports what a VM needs, creates an empty
VM with KVM, and waits.
"""

import gc
import sys

from vmd.backlog import BacklogWriter
from vmd.closing import close
from vmd.errors import PeerError, VmdError, number, sentence
from vmd.ipc.channel import Channel
from vmd.ipc.devmsg import FIGURES_BYTES
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.children import Quit, SetVerbosity
from vmd.ipc.messages.shared import brief
from vmd.ipc.messages.vm import (
    AskDevices,
    AskResolvers,
    CancelTransfer,
    ChangeDisc,
    ConsoleSnapshot,
    ConsoleSnapshotEnd,
    DeviceEvent,
    DevicesReported,
    DisksBack,
    DisksLent,
    DisksLetGo,
    EndSend,
    LendDisks,
    LetDisksGo,
    LimitVm,
    Outcome,
    PauseDone,
    PauseVm,
    ReceiveMemory,
    ReceiveVm,
    ResizeDisk,
    Resolvers,
    ResumeReceived,
    SendBreak,
    SendDone,
    SendOn,
    SendUndone,
    SendVm,
    StartVm,
    StopMode,
    StopVm,
    TakeDisksBack,
    TakenBack,
    VmEnding,
    VmFailed,
    VmHalted,
    VmRunning,
)
from vmd.ipc.process import Process, handles
from vmd.ipc.routes import Proc
from vmd.kvmapi import abi
from vmd.kvmapi.vcpu import install_kick_handler
from vmd.log import RateLimit, log
from vmd.memfile import fill_file, sealed_file
from vmd.privsep.confine import (
    VM,
    VM_BUILDING,
    confine,
    filter_of,
    filter_of_requests,
    limit_memory,
    limit_open_files,
    narrow_requests,
)
from vmd.privsep.landlock import keep_signals_inside
from vmd.privsep.title import EVENT, name_thread, set_title
from vmd.vm import changes, vmmci
from vmd.vm.arrival import Arrival
from vmd.vm.build import FromImages, build
from vmd.vm.clockwatch import ClockWatch
from vmd.vm.console import Console
from vmd.vm.departure import Departure
from vmd.vm.devproc import DeviceProcesses
from vmd.vm.fetch import fetch_files, fetch_stream
from vmd.vm.kinds import Given, spares
from vmd.vm.lending import Lending
from vmd.vm.life import Life, State
from vmd.vm.lockwatch import Locks
from vmd.vm.machine import EmptyVm, Outside
from vmd.vm.shutdown import ask_to_shut_down
from vmd.vm.slots import plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmd.config.model import VmConfig
    from vmd.ipc.loop import Timer
    from vmd.ipc.process import Handlers
    from vmd.vm.build import Source
    from vmd.vm.kinds import Kind
    from vmd.vm.pause import Pause
    from vmd.vm.slots import Slot
    from vmd.vm.state import MachineState


IOCTLS = (  # requests while the guest runs
    abi.KVM_RUN,
    abi.KVM_IRQ_LINE,  # chips raise and lower their lines
    abi.KVM_IOEVENTFD, abi.KVM_IRQFD,  # notifications and interrupts of devices: the guest moves BARs and vectors
    abi.KVM_SET_GSI_ROUTING,  # messages of MSI-X
    abi.KVM_GET_MSRS, abi.KVM_SET_MSRS, abi.KVM_GET_CLOCK, abi.KVM_SET_CLOCK,  # clocks stop during a pause
    abi.KVM_GET_PIT2, abi.KVM_SET_PIT2, abi.KVM_GET_LAPIC, abi.KVM_SET_LAPIC, abi.KVM_GET_TSC_KHZ,
    abi.KVM_HAS_DEVICE_ATTR, abi.KVM_GET_DEVICE_ATTR, abi.KVM_SET_DEVICE_ATTR,
    # the state that is sent:
    abi.KVM_GET_IRQCHIP, abi.KVM_GET_MP_STATE, abi.KVM_GET_XSAVE,
    abi.KVM_GET_XSAVE2, abi.KVM_GET_XCRS, abi.KVM_GET_DEBUGREGS, abi.KVM_GET_VCPU_EVENTS,
    abi.KVM_SET_USER_MEMORY_REGION, abi.KVM_GET_DIRTY_LOG,  # ... while it runs
    abi.KVM_GET_REGS, abi.KVM_GET_SREGS, abi.KVM_TRANSLATE,  # also for the log, when KVM cannot run a vCPU any more
    *VM.ioctls,
)  # fmt: skip
BUILDING_IOCTLS = (  # further requests while the VM is built; /dev/kvm itself is closed before
    abi.KVM_GET_API_VERSION, abi.KVM_CHECK_EXTENSION, abi.KVM_GET_VCPU_MMAP_SIZE, abi.KVM_GET_SUPPORTED_CPUID,
    abi.KVM_GET_MSR_INDEX_LIST, abi.KVM_CREATE_VM,
    abi.KVM_SET_TSS_ADDR, abi.KVM_SET_IDENTITY_MAP_ADDR, abi.KVM_CREATE_IRQCHIP, abi.KVM_CREATE_PIT2,
    abi.KVM_SET_IRQCHIP,
    abi.KVM_CREATE_VCPU, abi.KVM_SET_CPUID2, abi.KVM_SET_REGS, abi.KVM_SET_SREGS,
    abi.KVM_SET_XCRS, abi.KVM_SET_XSAVE, abi.KVM_SET_DEBUGREGS, abi.KVM_SET_VCPU_EVENTS, abi.KVM_SET_MP_STATE,
)  # fmt: skip

SWITCH_INTERVAL_S = 0.0005  # a busy event thread must not keep a vCPU waiting for the interpreter
LAST_WORDS_TIMEOUT_S = 1.0
SPARES_END_S = 0.1
MEMORY_BESIDES_BYTES, STACK_BYTES = 1 << 30, 16 << 20  # limits of address space: besides guest memory; for each vCPU
RESOLVERS_TIMEOUT_S = 1.0  # a guest that waits for its DHCP server asks again after some seconds


BUILDING = VM_BUILDING.replace(ioctls=IOCTLS + BUILDING_IOCTLS)


class VmProcess(Process):
    """The event thread's state."""

    def __init__(self) -> None:
        super().__init__(Proc.VM)
        self.vmm = self.attach_parent(Proc.VMM)
        self.vmid = 0
        self.life = Life()
        self.pause: Pause | None = None  # set once there is a machine
        self.limits: VmConfig | None = None  # the configuration of the last LimitVm
        self.arrival: Arrival | None = None
        self.departure: Departure | None = None
        self.lending: Lending | None = None
        self.asking: Timer | None = None  # deadline while the parent is asked for name servers
        self.events = RateLimit(burst=8, interval_s=1.0)
        self.devices = DeviceProcesses()
        self.locks = Locks(self.devices)
        self.console: Console | None = None
        self.figures: int | None = None  # the file for the devices' counters, until the devices have it
        self.seed: int | None = None  # while a VM arrives: an empty file for its seed
        self.empty_vm: EmptyVm | None = None
        self.filters = filter_of(BUILDING), filter_of_requests(IOCTLS)

    def prepare(self, words: "Sequence[str]") -> None:
        """Make what every VM needs, and start processes for the devices in `words` (`kinds.spares`)."""
        self.devices.fill_reserve(spares(words))
        try:
            self.empty_vm = EmptyVm()
        except OSError as error:
            log.debug(sentence(error))  # `begin` tries again, and reports the failure

    def on_start_vm(self, message: StartVm, envelope: Envelope, channel: Channel) -> None:
        """Become a new VM."""
        if not self.life.is_in(State.SPARE):
            raise PeerError(channel.label, "unexpected StartVm")
        self.set_name(message.vmid, message.config.name, message.verbosity)
        self.open_console(envelope)
        self.figures = envelope.take_fd("figures")
        try:
            fetch_files(envelope)
            boot, initrd, memory = (envelope.take_fd(name) for name in ("boot", "initrd", "memory"))
            if boot is None:
                raise PeerError("vmm", "no boot image came")
            assert memory is not None
            name, options = message.config.initrd or "initrd", message.boot_options
            images = FromImages(boot, message.boot_name, initrd, name, memory, options)
            slots = slots_of(message, envelope)
            self.narrow([(slot.kind, slot.module) for slot in slots])
        except (VmdError, OSError) as error:
            self.fail(error)
            return
        self.begin(images, message.config, slots)

    def set_name(self, vmid: int, name: str, verbosity: int) -> None:
        """Take the id and the name of a VM: for messages, the log and the process title."""
        self.vmid = vmid
        log.setup(f"vm/{name}", log.form, verbosity)
        set_title(log.title)

    def narrow(self, devices: "list[tuple[Kind, str]]") -> None:
        """Start the processes of the devices, and give up exec, fork and signals.  Raises HostError or OSError.

        This comes before anything from outside is read: a boot image, or the header of a stream.
        """
        self.devices.spawn(devices)
        # No warning for what this kernel lacks: vmm has logged it at the start of the daemon.
        confine(BUILDING, self.filters[0])

    def begin(self, source: "Source", config: "VmConfig", slots: "Sequence[Slot]", *, paused: bool = False) -> None:
        """Build the VM, give up the requests that only building needs, and start the guest."""
        assert self.console is not None
        figures_fd, self.figures = self.figures, None
        try:
            if figures_fd is None:  # nobody reads the counters, but the devices need a file for them
                figures_fd = sealed_file("figures", FIGURES_BYTES)
            outside = Outside(
                devices=self.devices,
                figures_fd=figures_fd,
                console=self.console,
                loop=self.loop,
                end=self.end_from_thread,
                ask_resolvers=self.ask_resolvers,
                lock_lost=self.on_lock_lost,
                report=self.report_event,
            )
            pause = build(self.empty_vm or EmptyVm(), source, config, slots, outside)
            changes.limit(pause.machine, self.limits or config)
            narrow_requests(IOCTLS, self.filters[1])
            self.pause = pause
            # After a jump of the host's clock, the guest has to set its own clock from the real-time clock.
            ClockWatch(self.loop, lambda: pause.machine.vmmci.ask(vmmci.SYNCRTC))
            pause.machine.start(parked=pause.paused)
        except (VmdError, OSError) as error:
            self.fail(error)
            return
        self.life.become(State.LIVE)
        if paused or not self.go_on():
            self.report_running(paused=paused)
            limit_open_files(VM.open_files)  # the devices have their files, so this process needs few descriptors
            memory = pause.machine.memory
            mapped_bytes = memory.mapped_bytes + len(memory.marks)
            limit_memory(mapped_bytes + MEMORY_BESIDES_BYTES + STACK_BYTES * config.vcpus)

    def report_running(self, *, paused: bool) -> None:
        """Report that the guest runs, or that it is paused."""
        name_thread(EVENT)
        self.drop_spares()
        self.vmm.send(VmRunning(vmid=self.vmid, paused=paused))

    def drop_spares(self) -> None:
        """End the reserved device processes that were not needed, after a delay: now the guest needs the processor."""
        if self.devices.reserve and not self.life.is_in(State.ENDED):
            self.loop.call_later(SPARES_END_S, self.end_spares)

    def end_spares(self) -> None:
        """End them, and try again later until all have ended."""
        self.devices.drop_reserve()
        self.drop_spares()

    def fail(self, error: Exception) -> None:
        """Report that the VM could not be started, and end."""
        self.vmm.send(VmFailed(vmid=self.vmid, code=number(error), text=brief(sentence(error))))
        self.end(Outcome.FAILED, sentence(error))

    def on_stop_vm(self, message: StopVm, envelope: Envelope, channel: Channel) -> None:
        """Shut the guest down.  A transfer or a loan of the disks is cancelled first; a pause is completed first."""
        if message.mode is StopMode.KILL:
            self.end(Outcome.ENDED, "stopped by force")
        if self.life.is_in(State.STOPPING, State.ENDED):
            return
        pause, departure, lending = self.pause, self.departure, self.lending
        if pause is None:
            self.end(Outcome.ENDED, "stopped while it was being received")
        elif departure is not None and departure.disks_gone:
            self.end(Outcome.ENDED, "stopped; it may run elsewhere")
        elif departure is not None and departure.written:
            self.stay(departure)
            self.on_stop_vm(message, envelope, channel)
        elif departure is not None:
            departure.cancel()
            departure.then = lambda: self.on_stop_vm(message, envelope, channel)
        elif lending is not None:
            lending.cancel()
            lending.then = lambda: self.on_stop_vm(message, envelope, channel)
        elif pause.under_way:
            pause.pause(lambda _text: self.on_stop_vm(message, envelope, channel))
        else:
            self.life.become(State.STOPPING)
            why = self.go_on()  # only a guest that runs can shut down
            if why:
                self.end(Outcome.ENDED, f"stopped by force: {why}")
            else:
                ask_to_shut_down(pause.machine, self.loop, self.end)

    def on_pause_vm(self, message: PauseVm, _envelope: Envelope, channel: Channel) -> None:
        """Pause or resume the machine.  Pausing takes until the slowest device has finished what is in flight.

        A request to resume that comes while the machine is being paused waits until then: answers come in order.
        """
        pause = self.pause
        if pause is None or self.life.is_in(State.ENDED):
            return  # the message that the VM has ended is the answer

        def answer(text: str) -> None:
            notes = self.locks.notes() if not pause.paused else ()
            channel.send(PauseDone(vmid=self.vmid, paused=pause.paused, text=brief(text), notes=notes))

        if message.paused:
            pause.pause(answer)
        elif pause.under_way:
            pause.pause(lambda text: answer(self.go_on(force=message.force) or text))
        else:
            answer(self.go_on(force=message.force))

    def go_on(self, *, force: bool = False) -> str:
        """Resume a paused machine.  Return "", or a sentence that says why it does not go on.

        The machine stays paused if somebody else may have its disks.  Without `force` it also stays paused if somebody
        else has written to its disks.  If resuming fails, the VM ends.
        """
        assert self.pause is not None
        try:
            why = self.locks.take_back(force=force) if self.pause.paused else ""
            if why:
                return why
            self.pause.unpause()
        except (VmdError, OSError) as error:
            self.end(Outcome.FAILED, sentence(error))
            return sentence(error)
        return ""

    def on_lock_lost(self, why: str) -> None:
        """Stop the guest from writing: somebody else may have one of its disks.

        This is called again as long as the lock is lost.
        """
        pause = self.pause
        if pause is None or pause.paused or pause.under_way:
            return
        if self.life.is_in(State.STOPPING):
            self.end(Outcome.ENDED, f"stopped by force: {why}")
        elif self.departure is not None:
            self.departure.cancel()
        elif self.life.is_in(State.LIVE):
            pause.pause(lambda text: log.error(text) if text else self.report_halt(why))

    def report_halt(self, why: str) -> None:
        """Report that the machine was paused without a request."""
        self.vmm.send(VmHalted(vmid=self.vmid, text=brief(why)))

    # --- sending and receiving ---------------------------------------------------------------------------------

    def on_send_vm(self, message: SendVm, envelope: Envelope, _channel: Channel) -> None:
        """Send the machine."""
        if self.pause is None or not self.life.is_in(State.LIVE):
            return  # the VM ends, which is the answer; the parent never asks for two transfers at once
        courier = envelope.take_fd("courier")
        assert courier is not None
        self.life.become(State.LEAVING)
        self.departure = Departure(message, courier, self.pause, self.vmm, self.on_sent)
        self.departure.begin()

    def on_sent(self, departure: Departure, text: str) -> None:
        """Report that the stream is complete or has failed.  A machine that was not sent, or is kept, stays here."""
        if self.life.is_in(State.ENDED):
            return
        self.vmm.send(
            SendDone(
                vmid=self.vmid,
                sent_bytes=departure.sent_bytes,
                text=brief(text),
                stopped_ns=departure.stopped_ns,
                rounds=departure.round,
                still_ms=round(departure.still_s * 1000),
            )
        )
        if departure.written:
            return  # EndSend will say whether the machine runs elsewhere
        if not text and not departure.keep:
            self.end(Outcome.POWER_OFF, "sent")
            return
        self.stay(departure)

    def stay(self, departure: Departure) -> None:
        """Go on with a machine that was not sent, or of which a copy was sent."""
        self.departure = None
        departure.end_log()
        self.life.become(State.LIVE)
        if not departure.stays_paused and (why := self.go_on()) and not self.life.is_in(State.ENDED):
            self.report_halt(why)
        departure.then()

    def on_send_on(self, _message: SendOn, _envelope: Envelope, _channel: Channel) -> None:
        """Write the rest of the stream: the receiver has accepted the header."""
        if self.departure is not None:
            self.departure.go_on()

    def written(self, channel: Channel, asked: str) -> Departure | None:
        """Return the departure, if its stream is complete; else raise PeerError.

        Return None if the VM has ended: the parent learns that instead of an answer.
        """
        if self.life.is_in(State.ENDED):
            return None
        if self.departure is None or not self.departure.written:
            raise PeerError(channel.label, f"unexpected {asked}")
        return self.departure

    def on_let_disks_go(self, _message: LetDisksGo, _envelope: Envelope, channel: Channel) -> None:
        """Release the locks of the disks, so that the receiver can take them."""
        departure = self.written(channel, "LetDisksGo")
        if departure is None:
            return
        try:
            text = departure.let_disks_go()
        except PeerError as error:
            self.end(Outcome.FAILED, str(error))
            return
        channel.send(DisksLetGo(vmid=self.vmid, text=text))

    def on_end_send(self, message: EndSend, _envelope: Envelope, channel: Channel) -> None:
        """End, because the machine runs elsewhere; or take the disks back and stay."""
        departure = self.written(channel, "EndSend")
        if departure is None:
            return
        if message.sent:
            self.end(Outcome.POWER_OFF, "sent")
            return
        try:
            outcome, text = departure.take_disks_back()
        except PeerError as error:
            self.end(Outcome.FAILED, str(error))
            return
        channel.send(SendUndone(vmid=self.vmid, outcome=outcome, text=text))
        if outcome is TakenBack.DONE:
            self.stay(departure)

    def on_cancel_transfer(self, _message: CancelTransfer, _envelope: Envelope, _channel: Channel) -> None:
        """Give up sending, or lending the disks."""
        leaving = self.departure or self.lending
        if leaving is not None:
            leaving.cancel()

    def on_lend_disks(self, message: LendDisks, envelope: Envelope, _channel: Channel) -> None:
        """Pause the machine, and lend its disks."""
        if self.pause is None or not self.life.is_in(State.LIVE):
            return  # the VM ends, which is the answer; the parent never asks during a transfer
        courier, stream = envelope.take_fd("courier"), envelope.take_fd("stream")
        assert courier is not None
        lending = Lending(message, courier, stream, self.pause, self.vmm, self.on_lent)
        if not message.look:
            self.life.become(State.LEAVING)
            self.lending = lending
        lending.begin()

    def on_lent(self, lending: Lending, text: str) -> None:
        """Report that the disks are lent, or why not.  In both cases the parent sends TakeDisksBack later."""
        if not self.life.is_in(State.ENDED):
            self.vmm.send(DisksLent(vmid=self.vmid, sent_bytes=lending.sent_bytes, text=brief(text)))

    def on_take_disks_back(self, _message: TakeDisksBack, _envelope: Envelope, channel: Channel) -> None:
        """Go on: the disks are back."""
        lending, self.lending = self.lending, None
        if lending is None or self.life.is_in(State.ENDED):
            return
        try:
            text = lending.take_back()
        except VmdError as error:
            self.end(Outcome.FAILED, str(error))
            return
        self.life.become(State.LIVE)
        if not lending.stays_paused:
            text = self.go_on() or text
        channel.send(DisksBack(vmid=self.vmid, text=brief(text)))
        lending.then()

    def on_receive_vm(self, message: ReceiveVm, envelope: Envelope, channel: Channel) -> None:
        """Receive a VM.  The first step is to read the header of its stream."""
        if not self.life.is_in(State.SPARE):
            raise PeerError(channel.label, "unexpected ReceiveVm")
        self.set_name(message.vmid, message.name, message.verbosity)
        self.life.become(State.ARRIVING)
        courier, memory = envelope.take_fd("courier"), envelope.take_fd("memory")
        assert courier is not None
        assert memory is not None
        self.seed = envelope.take_fd("seed")
        self.open_console(envelope)
        self.figures = envelope.take_fd("figures")
        fetch_stream(self.loop, courier, lambda stream: self.arrive(stream, memory))

    def arrive(self, stream: int | None, memory: int) -> None:
        """Begin to read the stream, or fail if it did not come."""
        if self.life.is_in(State.ENDED):
            return
        if stream is None:
            self.fail(VmdError("the stream did not come"))
            return
        try:
            self.arrival = Arrival(
                self.vmid,
                stream,
                memory,
                self.loop,
                self.vmm,
                narrow=lambda kinds: self.narrow([(kind, kind.widest) for kind in kinds]),
                fail=self.fail,
            )
        except (VmdError, OSError) as error:
            self.fail(error)

    def on_receive_memory(self, _message: ReceiveMemory, _envelope: Envelope, channel: Channel) -> None:
        """Read the rest of the stream."""
        if self.arrival is None:
            raise PeerError(channel.label, "unexpected ReceiveMemory")
        self.arrival.read_on()

    def on_resume_received(self, message: ResumeReceived, envelope: Envelope, channel: Channel) -> None:
        """Build the machine that was received, and let it run."""
        if self.arrival is None:
            raise PeerError(channel.label, "unexpected ResumeReceived")
        source, self.arrival = self.arrival.source(), None
        try:
            fetch_files(envelope)
            envelope.fds["seed"] = self.take_seed(source.saved)
            slots = slots_of(message, envelope)
        except (PeerError, OSError) as error:
            self.fail(error)
            return
        self.begin(source, message.config, slots, paused=message.paused)

    def take_seed(self, saved: "MachineState") -> list[int]:
        """Write the seed of the stream into the parent's file for it.  Return the file's descriptor, as a list.

        Return an empty list if there is no seed or no file.  Raises OSError.
        """
        fd, self.seed = self.seed, None
        if fd is None:
            return []
        if not saved.seed:
            close(fd)
            return []
        fill_file(fd, saved.seed)
        return [fd]

    # --- devices that change -----------------------------------------------------------------------------------

    def on_resize_disk(self, message: ResizeDisk, _envelope: Envelope, channel: Channel) -> None:
        """Make a disk larger."""
        if self.pause is not None and not self.life.is_in(State.ENDED):  # else the VM ends, which is the answer
            changes.resize(self.pause.machine, message, channel)

    def on_change_disc(self, message: ChangeDisc, envelope: Envelope, channel: Channel) -> None:
        """Change the disc."""
        if self.pause is not None and not self.life.is_in(State.ENDED):
            changes.change_disc(self.pause.machine, message, envelope.take_fd("courier"), channel)

    def on_limit_vm(self, message: LimitVm, _envelope: Envelope, _channel: Channel) -> None:
        """Set the limits of the devices.  If there is no machine yet, they are set when it is built."""
        self.limits = message.config
        if self.pause is not None and not self.life.is_in(State.ENDED):
            changes.limit(self.pause.machine, message.config)

    # --- the console, and the rest -----------------------------------------------------------------------------

    def open_console(self, envelope: Envelope) -> None:
        """Open the console with the descriptors of a message."""
        master, slave, shown = (envelope.take_fd(name) for name in ("tty", "tty_slave", "shown"))
        assert master is not None
        assert slave is not None
        assert shown is not None
        self.console = Console(master, slave, BacklogWriter(shown), self.loop)

    def on_console_snapshot(self, _message: ConsoleSnapshot, envelope: Envelope, channel: Channel) -> None:
        """Drop the output that waits in the pty: a new viewer has it from the backlog.

        If descriptors of another pty came along, the console moves to that pty.
        """
        if self.console is None:
            return  # the VM ends, which is the answer
        master, slave = envelope.take_fd("tty"), envelope.take_fd("tty_slave")
        if master is not None and slave is not None:
            self.console.move(master, slave)
        channel.send(ConsoleSnapshotEnd(end=self.console.snapshot()), peerid=envelope.peerid)

    def on_send_break(self, _message: SendBreak, _envelope: Envelope, _channel: Channel) -> None:
        """Send a BREAK to the guest over the serial line."""
        if self.pause is not None:
            self.pause.machine.uart.send_break()

    def on_ask_devices(self, _message: AskDevices, _envelope: Envelope, channel: Channel) -> None:
        """Report the troubles of all devices."""
        troubles = self.pause.machine.troubles() if self.pause is not None else []
        channel.send(DevicesReported(vmid=self.vmid, troubles=tuple(troubles)))

    def ask_resolvers(self) -> None:
        """Ask the parent for the name servers of the host, which a guest asks for.  The devices do not wait."""
        if self.asking is None:
            self.asking = self.loop.call_later(RESOLVERS_TIMEOUT_S, lambda: self.tell_resolvers(None))
            self.vmm.send(AskResolvers(vmid=self.vmid))

    def report_event(self, what: str, device: str, text: str) -> None:
        """Report an event of a device.  The rate is limited, because a guest can cause such events."""
        if self.events.allow():
            self.vmm.send(DeviceEvent(vmid=self.vmid, what=what, device=device, text=text))

    def on_resolvers(self, message: Resolvers, _envelope: Envelope, _channel: Channel) -> None:
        """Pass the name servers of the host on."""
        self.tell_resolvers((message.dns4, message.dns6))

    def tell_resolvers(self, servers: tuple[tuple[bytes, ...], tuple[bytes, ...]] | None) -> None:
        """Tell the network interfaces which name servers the host has; None if there was no answer in time."""
        if self.asking is not None:
            self.asking.cancel()
            self.asking = None
        if self.pause is not None:
            self.pause.machine.tell_resolvers(servers)

    def on_set_verbosity(self, message: SetVerbosity, _envelope: Envelope, _channel: Channel) -> None:
        """Set the verbosity of this process and its devices."""
        log.verbosity = message.verbosity
        self.devices.set_verbosity(message.verbosity)

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """End, and give no reason."""
        self.end(Outcome.POWER_OFF, "")

    def end_from_thread(self, outcome: Outcome, text: str) -> None:
        """End the VM.  May be called from any thread."""
        self.loop.call_from_thread(lambda: self.end(outcome, text))

    def end(self, outcome: Outcome, text: str) -> None:
        """Stop the guest and leave the loop.  Only the first call has an effect."""
        if self.life.is_in(State.ENDED):
            return
        self.life.become(State.ENDED)
        self.exit_status = outcome
        if self.pause is not None and not self.pause.machine.stop():
            log.error("a vcpu thread does not return from the kernel; the VM ends anyway")
        self.devices.end()
        self.vmm.send(VmEnding(text=brief(text)))
        self.vmm.flush_blocking(LAST_WORDS_TIMEOUT_S)
        self.loop.stop()

    HANDLERS: "Handlers" = {
        **handles(Proc.VMM, StartVm, on_start_vm),
        **handles(Proc.VMM, StopVm, on_stop_vm),
        **handles(Proc.VMM, PauseVm, on_pause_vm),
        **handles(Proc.VMM, SendVm, on_send_vm),
        **handles(Proc.VMM, SendOn, on_send_on),
        **handles(Proc.VMM, LetDisksGo, on_let_disks_go),
        **handles(Proc.VMM, EndSend, on_end_send),
        **handles(Proc.VMM, CancelTransfer, on_cancel_transfer),
        **handles(Proc.VMM, LendDisks, on_lend_disks),
        **handles(Proc.VMM, TakeDisksBack, on_take_disks_back),
        **handles(Proc.VMM, ReceiveVm, on_receive_vm),
        **handles(Proc.VMM, ReceiveMemory, on_receive_memory),
        **handles(Proc.VMM, ResumeReceived, on_resume_received),
        **handles(Proc.VMM, ResizeDisk, on_resize_disk),
        **handles(Proc.VMM, ChangeDisc, on_change_disc),
        **handles(Proc.VMM, LimitVm, on_limit_vm),
        **handles(Proc.VMM, ConsoleSnapshot, on_console_snapshot),
        **handles(Proc.VMM, SendBreak, on_send_break),
        **handles(Proc.VMM, AskDevices, on_ask_devices),
        **handles(Proc.VMM, Resolvers, on_resolvers),
        **handles(Proc.VMM, SetVerbosity, on_set_verbosity),
        **handles(Proc.VMM, Quit, on_quit),
    }


def slots_of(message: StartVm | ResumeReceived, envelope: Envelope) -> "list[Slot]":
    """Return the slots for the devices that a message describes.  The caller owns their descriptors.

    Raises PeerError if descriptors and message do not match.  The caller then lets the VM fail, which is the answer.
    """
    disks, cdrom, taps = envelope.take_fds("disks"), envelope.take_fd("cdrom"), envelope.take_fds("taps")
    seed, vhosts = envelope.take_fd("seed"), envelope.take_fds("vhosts")
    if len(taps) != len(message.nics) or len(disks) != sum(len(disk.images) for disk in message.disks):
        raise PeerError("vmm", f"{len(disks)} images and {len(taps)} taps do not match the message")
    if len(vhosts) != 2 * sum(nic.vhost for nic in message.nics):
        raise PeerError("vmm", f"{len(vhosts)} descriptors for vhost-net do not match the message")
    if (seed is None) != (message.config.seed is None):
        raise PeerError("vmm", "the seed does not match the message")
    given = Given(
        config=message.config,
        disks=message.disks,
        disk_fds=tuple(disks),
        cdrom_fd=cdrom,
        nics=message.nics,
        tap_fds=tuple(taps),
        vhost_fds=tuple(vhosts),
        seed_fd=seed,
    )
    return plan(given)


def main() -> int:
    """Run process vm."""
    process = VmProcess()
    process.ignore_terminal_signals()
    install_kick_handler()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    keep_signals_inside()  # before `prepare`: processes that are started afterwards can still be signalled
    process.prepare(sys.argv[4:])
    gc.collect()
    gc.freeze()
    process.loop.run()
    process.devices.end()
    return process.exit_status
