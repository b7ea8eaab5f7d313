"""vm/<name>: one virtual machine, from its first instruction to its last.

Runs as  an id of its own, in vmm's cell; narrowed to KVM requests and its open descriptors before it reads what the
         guest begins with, and to the requests of a running VM before the guest runs
Peers    vmm; its device processes, which it starts
Holds    /dev/kvm until it is told what it is; KVM's VM and vCPU fds, guest memory, both sides of the console's pty;
         disks and the disc only until their processes have them
Threads  event: the main thread; vcpu<n>: one for each vCPU; send, receive and hashers while it is sent or received;
         for a moment one that closes the VM with which it has asked KVM whether it can be received

It is started before there is a VM for it, imports what a VM needs, has KVM make an empty one, and waits (vmm keeps one
in reserve).
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
from vmd.vm.machine import Host, Outside
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


IOCTLS = (  # of a VM that runs
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
    abi.KVM_SET_USER_MEMORY_REGION, abi.KVM_GET_DIRTY_LOG,  # ... while it runs
    abi.KVM_GET_REGS, abi.KVM_GET_SREGS, abi.KVM_TRANSLATE,  # what a vCPU that KVM gave up on looked like
    *VM.ioctls,
)  # fmt: skip
BUILDING_IOCTLS = (  # besides, before that; /dev/kvm itself is closed before anything is built
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
MEMORY_BESIDES_BYTES, STACK_BYTES = 1 << 30, 16 << 20  # that a VM process may have mapped beside its guest's
RESOLVERS_TIMEOUT_S = 1.0  # a guest that waits for its DHCP server asks again after some seconds


BUILDING = VM_BUILDING.replace(ioctls=IOCTLS + BUILDING_IOCTLS)


class VmProcess(Process):
    """The event thread's state."""

    def __init__(self) -> None:
        super().__init__(Proc.VM)
        self.vmm = self.attach_parent(Proc.VMM)
        self.vmid = 0
        self.life = Life()
        self.pause: Pause | None = None  # of the machine, once there is one
        self.limits: VmConfig | None = None  # which has them, if others than those of the start count
        self.arrival: Arrival | None = None
        self.departure: Departure | None = None
        self.lending: Lending | None = None
        self.asking: Timer | None = None  # for name servers
        self.events = RateLimit(burst=8, interval_s=1.0)
        self.devices = DeviceProcesses()
        self.locks = Locks(self.devices)
        self.console: Console | None = None
        self.figures: int | None = None  # the file for what devices count, until they have it
        self.seed: int | None = None  # of a VM that arrives: an empty file for it
        self.host: Host | None = None
        self.filters = filter_of(BUILDING), filter_of_requests(IOCTLS)

    def prepare(self, words: "Sequence[str]") -> None:
        """Have what every VM has, before there is one, and processes for the devices in `words` (`kinds.spares`)."""
        self.devices.fill_reserve(spares(words))
        try:
            self.host = Host()
        except OSError as error:
            log.debug(sentence(error))  # the VM tries again, and fails if it has to

    def on_start_vm(self, message: StartVm, envelope: Envelope, channel: Channel) -> None:
        """Be a new VM."""
        if not self.life.is_in(State.SPARE):
            raise PeerError(channel.label, "unexpected StartVm")
        self.be_called(message.vmid, message.config.name, message.verbosity)
        self.open_console(envelope)
        self.figures = envelope.take_fd("figures")
        try:
            fetch_files(envelope)
            boot, initrd, memory = (envelope.take_fd(name) for name in ("boot", "initrd", "memory"))
            if boot is None:
                raise PeerError("vmm", "nothing came to boot from")
            assert memory is not None
            name, options = message.config.initrd or "initrd", message.boot_options
            images = FromImages(boot, message.boot_name, initrd, name, memory, options)
            slots = slots_of(message, envelope)
            self.narrow([(slot.kind, slot.module) for slot in slots])
        except (VmdError, OSError) as error:
            self.fail(error)
            return
        self.begin(images, message.config, slots)

    def be_called(self, vmid: int, name: str, verbosity: int) -> None:
        """Be told apart from other VMs."""
        self.vmid = vmid
        log.setup(f"vm/{name}", log.form, verbosity)
        set_title(log.title)

    def narrow(self, devices: "list[tuple[Kind, str]]") -> None:
        """Start the processes of the devices, and give up exec, fork and signals.  Raises HostError or OSError.

        Only then is anything read that comes from outside: a boot image, or the header of a stream.
        """
        self.devices.spawn(devices)
        # What this kernel lacks was said by vmm, at the start of the daemon.
        confine(BUILDING, self.filters[0])

    def begin(self, source: "Source", config: "VmConfig", slots: "Sequence[Slot]", *, paused: bool = False) -> None:
        """Build the VM, give up what only building needs, and let the guest execute."""
        assert self.console is not None
        figures_fd, self.figures = self.figures, None
        try:
            if figures_fd is None:  # nobody reads them
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
            pause = build(self.host or Host(), source, config, slots, outside)
            changes.limit(pause.machine, self.limits or config)
            narrow_requests(IOCTLS, self.filters[1])
            self.pause = pause
            # The guest's clock then needs a look at the real-time clock.
            ClockWatch(self.loop, lambda: pause.machine.vmmci.ask(vmmci.SYNCRTC))
            pause.machine.start(parked=pause.paused)
        except (VmdError, OSError) as error:
            self.fail(error)
            return
        self.life.become(State.LIVE)
        if paused or not self.go_on():
            self.report_running(paused=paused)
            limit_open_files(VM.open_files)  # from now on it has next to nothing to pass on
            memory = pause.machine.memory
            mapped_bytes = memory.mapped_bytes + len(memory.marks)
            limit_memory(mapped_bytes + MEMORY_BESIDES_BYTES + STACK_BYTES * config.vcpus)

    def report_running(self, *, paused: bool) -> None:
        """Say that the guest executes, or waits to be unpaused."""
        name_thread(EVENT)
        self.drop_spares()
        self.vmm.send(VmRunning(vmid=self.vmid, paused=paused))

    def drop_spares(self) -> None:
        """End the processes that no device has needed, a little later: now the guest needs the processor."""
        if self.devices.reserve and not self.life.is_in(State.ENDED):
            self.loop.call_later(SPARES_END_S, self.end_spares)

    def end_spares(self) -> None:
        """Do so, and look again until they are gone."""
        self.devices.drop_reserve()
        self.drop_spares()

    def fail(self, error: Exception) -> None:
        """Report that there will be no VM, and end."""
        self.vmm.send(VmFailed(vmid=self.vmid, code=number(error), text=brief(sentence(error))))
        self.end(Outcome.FAILED, sentence(error))

    def on_stop_vm(self, message: StopVm, envelope: Envelope, channel: Channel) -> None:
        """Have the guest shut down, once it is neither sent nor about to stand still."""
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
        """Stand still, or go on; stopping takes until the slowest device has finished what is in flight.

        Whoever wants it to go on while it is about to stand still has his turn then: answers come in order.
        """
        pause = self.pause
        if pause is None or self.life.is_in(State.ENDED):
            return  # how the VM ends is the answer

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
        """Let a paused machine go on; one that cannot is at its end.  Returns why not, or nothing.

        One whose disks somebody else may have stays paused, and so does, without `force`, one whose disks somebody else
        has written to.
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
        """A disk may be somebody else's: the guest must not write to it.  Called again as long as that is so."""
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
        """Say that the machine stands still though nobody has asked for it."""
        self.vmm.send(VmHalted(vmid=self.vmid, text=brief(why)))

    # --- sending and receiving ---------------------------------------------------------------------------------

    def on_send_vm(self, message: SendVm, envelope: Envelope, _channel: Channel) -> None:
        """Have a thread write what we are, standing still, at once or in the end."""
        if self.pause is None or not self.life.is_in(State.LIVE):
            return  # how the VM ends is the answer; two at once the parent does not ask for
        courier = envelope.take_fd("courier")
        assert courier is not None
        self.life.become(State.LEAVING)
        self.departure = Departure(message, courier, self.pause, self.vmm, self.on_sent)
        self.departure.begin()

    def on_sent(self, departure: Departure, text: str) -> None:
        """The stream is complete, or has failed: then, as with `keep`, everything is as before."""
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
            return  # until it is known to run elsewhere, or not to
        if not text and not departure.keep:
            self.end(Outcome.POWER_OFF, "sent")
            return
        self.stay(departure)

    def stay(self, departure: Departure) -> None:
        """It was not sent, or only a copy: everything is as before."""
        self.departure = None
        departure.let_be()
        self.life.become(State.LIVE)
        if not departure.stays_paused and (why := self.go_on()) and not self.life.is_in(State.ENDED):
            self.report_halt(why)
        departure.then()

    def on_send_on(self, _message: SendOn, _envelope: Envelope, _channel: Channel) -> None:
        """The receiver takes the machine."""
        if self.departure is not None:
            self.departure.go_on()

    def written(self, channel: Channel, asked: str) -> Departure | None:
        """Return the departure that has come to its last step.  Raises PeerError if it has not.

        None: the VM has ended, and how it did is the answer.
        """
        if self.life.is_in(State.ENDED):
            return None
        if self.departure is None or not self.departure.written:
            raise PeerError(channel.label, f"unexpected {asked}")
        return self.departure

    def on_let_disks_go(self, _message: LetDisksGo, _envelope: Envelope, channel: Channel) -> None:
        """Let the receiver have the disks."""
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
        """Be gone, for the machine runs elsewhere; or be as before."""
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
        """Give up sending, or not even begin."""
        leaving = self.departure or self.lending
        if leaving is not None:
            leaving.cancel()

    def on_lend_disks(self, message: LendDisks, envelope: Envelope, _channel: Channel) -> None:
        """Stand still, and let somebody else have the disks for a moment."""
        if self.pause is None or not self.life.is_in(State.LIVE):
            return  # as for SendVm
        courier, stream = envelope.take_fd("courier"), envelope.take_fd("stream")
        assert courier is not None
        lending = Lending(message, courier, stream, self.pause, self.vmm, self.on_lent)
        if not message.look:
            self.life.become(State.LEAVING)
            self.lending = lending
        lending.begin()

    def on_lent(self, lending: Lending, text: str) -> None:
        """The disks are away, or a text says why not; the parent says when they are back, in any case."""
        if not self.life.is_in(State.ENDED):
            self.vmm.send(DisksLent(vmid=self.vmid, sent_bytes=lending.sent_bytes, text=brief(text)))

    def on_take_disks_back(self, _message: TakeDisksBack, _envelope: Envelope, channel: Channel) -> None:
        """Nobody else has the disks any more."""
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
        """Be a VM that was sent; it begins with the header of its stream."""
        if not self.life.is_in(State.SPARE):
            raise PeerError(channel.label, "unexpected ReceiveVm")
        self.be_called(message.vmid, message.name, message.verbosity)
        self.life.become(State.ARRIVING)
        courier, memory = envelope.take_fd("courier"), envelope.take_fd("memory")
        assert courier is not None
        assert memory is not None
        self.seed = envelope.take_fd("seed")
        self.open_console(envelope)
        self.figures = envelope.take_fd("figures")
        fetch_stream(self.loop, courier, lambda stream: self.arrive(stream, memory))

    def arrive(self, stream: int | None, memory: int) -> None:
        """The stream is there, or does not come."""
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
        """Be what the other machine was."""
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
        """Return the seed that came with a stream, if one did, in the parent's file for it.  Raises OSError."""
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
        if self.pause is not None and not self.life.is_in(State.ENDED):  # else how the VM ends is the answer
            changes.resize(self.pause.machine, message, channel)

    def on_change_disc(self, message: ChangeDisc, envelope: Envelope, channel: Channel) -> None:
        """Change the disc."""
        if self.pause is not None and not self.life.is_in(State.ENDED):
            changes.change_disc(self.pause.machine, message, envelope.take_fd("courier"), channel)

    def on_limit_vm(self, message: LimitVm, _envelope: Envelope, _channel: Channel) -> None:
        """Let the devices do more, or less; of a machine that is not there yet, as soon as it is."""
        self.limits = message.config
        if self.pause is not None and not self.life.is_in(State.ENDED):
            changes.limit(self.pause.machine, message.config)

    # --- the console, and the rest -----------------------------------------------------------------------------

    def open_console(self, envelope: Envelope) -> None:
        """Take the console whose descriptors came with a message."""
        master, slave, shown = (envelope.take_fd(name) for name in ("tty", "tty_slave", "shown"))
        assert master is not None
        assert slave is not None
        assert shown is not None
        self.console = Console(master, slave, BacklogWriter(shown), self.loop)

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
        if self.pause is not None:
            self.pause.machine.uart.send_break()

    def on_ask_devices(self, _message: AskDevices, _envelope: Envelope, channel: Channel) -> None:
        """Say what is wrong with any device."""
        troubles = self.pause.machine.troubles() if self.pause is not None else []
        channel.send(DevicesReported(vmid=self.vmid, troubles=tuple(troubles)))

    def ask_resolvers(self) -> None:
        """Ask which name servers there are, for a guest; the devices go on in any case."""
        if self.asking is None:
            self.asking = self.loop.call_later(RESOLVERS_TIMEOUT_S, lambda: self.tell_resolvers(None))
            self.vmm.send(AskResolvers(vmid=self.vmid))

    def report_event(self, what: str, device: str, text: str) -> None:
        """Tell what has happened to a device; a guest may make it happen again and again."""
        if self.events.allow():
            self.vmm.send(DeviceEvent(vmid=self.vmid, what=what, device=device, text=text))

    def on_resolvers(self, message: Resolvers, _envelope: Envelope, _channel: Channel) -> None:
        """These are the name servers."""
        self.tell_resolvers((message.dns4, message.dns6))

    def tell_resolvers(self, servers: tuple[tuple[bytes, ...], tuple[bytes, ...]] | None) -> None:
        """Tell the network interfaces; None: nobody has answered in time."""
        if self.asking is not None:
            self.asking.cancel()
            self.asking = None
        if self.pause is not None:
            self.pause.machine.tell_resolvers(servers)

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
        if self.life.is_in(State.ENDED):
            return
        self.life.become(State.ENDED)
        self.exit_status = outcome
        if self.pause is not None and not self.pause.machine.stop():
            log.error("a vcpu does not come back from the kernel; ending without it")
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
    """Return the devices that a message describes; their descriptors are ours from now on.

    Raises PeerError, with which the VM fails: dropped, the message would have no answer.
    """
    disks, cdrom, taps = envelope.take_fds("disks"), envelope.take_fd("cdrom"), envelope.take_fds("taps")
    seed, vhosts = envelope.take_fd("seed"), envelope.take_fds("vhosts")
    if len(taps) != len(message.nics) or len(disks) != sum(len(disk.images) for disk in message.disks):
        raise PeerError("vmm", f"{len(disks)} images and {len(taps)} taps that nobody describes")
    if len(vhosts) != 2 * sum(nic.vhost for nic in message.nics):
        raise PeerError("vmm", f"{len(vhosts)} descriptors for the kernel to move frames, which nobody describes")
    if (seed is None) != (message.config.seed is None):
        raise PeerError("vmm", "a seed that nobody describes, or none")
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
    keep_signals_inside()  # and only then start processes, which die with this one
    process.prepare(sys.argv[4:])
    gc.collect()
    gc.freeze()
    process.loop.run()
    process.devices.end()
    return process.exit_status
