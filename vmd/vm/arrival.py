"""Receives a VM: the steps of the event thread, and the thread that reads the stream."""

import errno
import os
import select
import time

from vmd import threads
from vmd.closing import close
from vmd.enums import Enum
from vmd.errors import GuestError, HostError, OperatorError, PeerError, VmdError, sentence
from vmd.guestmem import GuestMemory
from vmd.ipc.messages.vm import KVM_FD, ReceivedHeader, ReceivedMachine
from vmd.kvmapi.system import System
from vmd.log import log
from vmd.privsep.spawn import spawn
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread
from vmd.vm import state, streamprobe
from vmd.vm.cpuid import for_vcpu
from vmd.vm.departure import show_progress
from vmd.vm.header import read_header
from vmd.vm.kinds import kinds
from vmd.vm.machine import EmptyVm, Machine, Outside, memory_regions
from vmd.vm.pause import Pause
from vmd.vm.stream import IDLE_TIMEOUT_S, STILL, Pipe, StreamError, StreamReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmd.config.model import VmConfig
    from vmd.ipc.channel import Channel
    from vmd.ipc.loop import Loop
    from vmd.kvmapi.vm import Vm
    from vmd.vm.header import Header
    from vmd.vm.kinds import Kind
    from vmd.vm.slots import Slot
    from vmd.vm.state import MachineState

STREAMPROBE_ENTRY = "vmd.vm.streamprobe:main"
PROBE_LOOK_S = 30.0  # between two looks whether streamprobe reads
PROBE_BEHIND_MAX = 2  # streamprobe is killed if it has left bytes unread at so many looks in a row
PROBE_END_TIMEOUT_S = 1.0  # between the answer of streamprobe and its end


def unusable(error: ValueError | OSError) -> OperatorError:
    """Return the error for a stream that is undamaged, but whose machine cannot go on here."""
    return OperatorError(errno.EINVAL, f"the stream is not usable: {sentence(error)}")


def check_host(header: "Header") -> None:
    """Raise ValueError if a machine with this header cannot go on here; OSError if KVM cannot be asked."""
    config = header.config
    state.check_header(header)
    system = System(KVM_FD)
    state.check_processor(header, system.supported_cpuid())
    kvm = system.create_vm()
    try:
        kvm.create_irqchip()
        with kvm.create_vcpu(config.vcpus - 1) as vcpu:  # KVM must be able to have the highest number
            state.check_tsc(header.tsc_khz, vcpu.get_tsc_khz())
            if header.xsave_bytes != vcpu.xsave_bytes:
                raise ValueError(f"its extended state has {header.xsave_bytes} bytes, not {vcpu.xsave_bytes}")
            try:
                vcpu.set_cpuid2(for_vcpu(state.cpuid_of(header), config.vcpus - 1, config.vcpus, tsc_deadline=True))
            except OSError as error:
                raise ValueError(f"KVM does not take its processor: {sentence(error)}") from error
    finally:
        close_in_background(kvm)


def close_in_background(kvm: "Vm") -> None:
    """Close a VM on a thread of its own: that takes the kernel a while, and the sender waits for our answer."""
    try:
        start_thread("closer", threads.Thread(target=kvm.close, name="closer", daemon=True).start)
    except HostError:
        kvm.close()


class FromStream:
    """A source to build a machine from: the header, the memory and the state that a stream had."""

    def __init__(self, header: "Header", memory: GuestMemory, saved: "MachineState") -> None:
        self.header = header
        self.memory = memory
        self.saved = saved

    def machine(self, empty_vm: EmptyVm, config: "VmConfig", slots: "Sequence[Slot]", outside: Outside) -> Machine:
        """Return a machine with the processor and the devices that the guest had at the sender."""
        try:
            slots = state.as_sent(slots, self.header.devices)
        except ValueError as error:
            raise unusable(error) from error
        cpuid = state.cpuid_of(self.header)
        machine = Machine(empty_vm, config, self.memory, self.header.firmware_bytes, slots, outside, cpuid=cpuid)
        machine.clock.stop()  # `Clocks.restore` lets it go on with the other clocks
        return machine

    def fill(self, machine: Machine) -> None:
        """Do nothing: the stream has filled the memory."""

    def finish(self, machine: Machine) -> Pause:
        """Restore the state into the machine, and return its `Pause`: it is paused."""
        try:
            clocks = state.restore(machine, self.saved, self.header.devices)
            for function, each in zip(machine.virtio, self.saved.virtio, strict=True):
                function.restore_rings(each)
        except OSError as error:
            raise unusable(ValueError(f"KVM does not take it: {sentence(error)}")) from error
        except ValueError as error:
            raise unusable(error) from error
        return Pause(machine, machine.outside.loop, clocks)


class Receiver:
    """Reads the part of a stream that follows the header, on a thread of its own, and closes the pipe.

    It calls `on_machine(state)` when it has read all, or `on_failed(sentence)`.  Both run on the event thread.
    """

    round = 0  # only a sender counts rounds

    def __init__(
        self,
        pipe: Pipe,
        version: int,
        header: "Header",
        memory: GuestMemory,
        loop: "Loop",
        *,
        on_machine: "Callable[[state.MachineState], None]",
        on_failed: "Callable[[str], None]",
    ) -> None:
        """`version` is the version of the stream.  `memory` is untouched, and is filled here."""
        self._loop = loop
        self._on_machine, self._on_failed = on_machine, on_failed
        self.pipe = pipe
        self.over = False
        self.total_bytes = header.touched_bytes
        self._state_max = state.bytes_max(header)
        self._version = version
        self._memory = memory
        self._next_offset = 0
        self._machine: state.MachineState | None = None
        self._thread = threads.Thread(target=self._run, name="receive", daemon=True)

    def start(self) -> None:
        """Start the thread.  Raises HostError."""
        start_thread("receive", self._thread.start)

    def _run(self) -> None:
        name_thread("receive")
        try:
            try:
                machine = self._read(StreamReader(self.pipe))
            finally:
                self.over = True
                self.pipe.close()
        except StreamError as error:
            text = f"the stream {error}"
            self._loop.call_from_thread(lambda: self._on_failed(text))
        except HostError as error:
            text = str(error)
            self._loop.call_from_thread(lambda: self._on_failed(text))
        except BaseException:
            self._loop.call_from_thread(lambda: self._on_failed("internal error while the stream was read"))
            raise
        else:
            self._loop.call_from_thread(lambda: self._on_machine(machine))

    def _read(self, reader: StreamReader) -> state.MachineState:
        reader.version = self._version
        reader.sections_until_end(self._take_memory, self._take_state, state_max=self._state_max)
        if self._machine is None:
            raise StreamError("has no state of the machine")
        return self._machine

    def _take_memory(self, gpa: int, data: memoryview) -> None:
        """Take a run of memory.  Up to version STILL runs come in ascending order, so no address comes twice."""
        memory = self._memory
        try:
            offset = memory.offset(gpa, len(data))
        except GuestError as error:
            raise ValueError(str(error)) from None
        if offset < self._next_offset and self._version <= STILL:
            raise ValueError(f"memory at {gpa:#x} comes twice or out of order")
        self._next_offset = offset + len(data)
        memory.fill(offset, data)

    def _take_state(self, body: bytes) -> None:
        if self._machine is not None:
            raise ValueError("the state of the machine comes twice")
        self._machine = state.read_machine(self._version, body)


class Step(Enum):
    """The steps of receiving a VM."""

    HEADER = 1  # streamprobe reads the header
    ASKED = 2  # the parent was asked whether it accepts the VM
    MEMORY = 3  # memory and state are read
    COMPLETE = 4  # all is read; the sender now lets go of the disks


class Arrival:
    """Receives a VM.  Each failure is reported by one call of `fail`, and ends the arrival.

    `narrow(kinds)` starts the processes of the devices and confines this process.  It is called before this process
    looks at any byte of the stream.
    """

    def __init__(
        self,
        vmid: int,
        stream: int,
        memory_fd: int,
        loop: "Loop",
        vmm: "Channel",
        *,
        narrow: "Callable[[list[Kind]], None]",
        fail: "Callable[[Exception], None]",
    ) -> None:
        """Start streamprobe.  `stream`, and `memory_fd`, an empty file for the guest's memory, belong to this object.

        Raises HostError or OSError.
        """
        self.step = Step.HEADER
        self._vmid, self._stream, self._loop, self._vmm = vmid, stream, loop, vmm
        self._memory_fd = memory_fd
        self._narrow, self._fail = narrow, fail
        self._answer = b""
        self._version = 0
        self._header: Header | None = None
        self._memory: GuestMemory | None = None
        self._machine: MachineState | None = None
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            self._probe = spawn(
                f"{log.title}/streamprobe",
                fds={streamprobe.FD_ANSWER: writing, streamprobe.FD_STREAM: stream},
                entry=STREAMPROBE_ENTRY,
            )
        finally:
            close(writing)
        loop.add(reading, lambda _events: self._on_probe(reading))
        self._behind = 0
        self._probe_end_s = time.monotonic() + IDLE_TIMEOUT_S + PROBE_LOOK_S
        self._look = loop.call_later(PROBE_LOOK_S, lambda: self._look_at_probe(reading))

    def _take(self, step: Step, message: str) -> None:
        """Take the next step, which `message` asks for.  Raises PeerError if it is not the next one."""
        if self.step.value != step.value - 1:
            raise PeerError(self._vmm.label, f"unexpected {message}")
        self.step = step

    def _on_probe(self, fd: int) -> None:
        """Read a piece of the answer.  At its end go on with the next step."""
        piece = os.read(fd, streamprobe.ANSWER_MAX)
        self._answer += piece
        if piece and len(self._answer) <= streamprobe.ANSWER_MAX:
            return
        self._end_probe(fd)
        status = self._probe.reap(PROBE_END_TIMEOUT_S)
        try:
            beginning = streamprobe.unpack(self._answer)
        except ValueError as error:
            self._fail(PeerError(self._probe.title, f"{error}, status {status}"))
            return
        if isinstance(beginning, str):
            self._fail(OperatorError(errno.EINVAL, beginning))
            return
        try:
            self._narrow(beginning.kinds)
        except (VmdError, OSError) as error:
            self._fail(error)
            return
        self._begin(beginning)

    def _end_probe(self, fd: int) -> None:
        """Stop listening to streamprobe."""
        self._look.cancel()
        self._loop.remove(fd)
        close(fd)

    def _look_at_probe(self, fd: int) -> None:
        """Kill streamprobe if it does not read bytes that are there, or if it has no answer after its own timeout."""
        stream = select.poll()
        stream.register(self._stream, select.POLLIN)
        self._behind = self._behind + 1 if stream.poll(0) else 0
        if self._behind < PROBE_BEHIND_MAX and time.monotonic() < self._probe_end_s:
            self._look = self._loop.call_later(PROBE_LOOK_S, lambda: self._look_at_probe(fd))
            return
        self._end_probe(fd)
        self._probe.kill()
        self._probe.reap(PROBE_END_TIMEOUT_S)
        self._fail(HostError(f"{self._probe.title} does not read the stream", errno.ETIMEDOUT))

    def _begin(self, beginning: streamprobe.Beginning) -> None:
        """Check that the VM can go on at this host, and ask the parent whether it may."""
        self.step = Step.ASKED
        self._version = beginning.version
        self._pipe = Pipe(self._stream, select.POLLIN, moved_bytes=beginning.read_bytes)
        try:
            self._header = header = read_header(beginning.version, beginning.header)
            if kinds(header.config) != beginning.kinds:
                raise ValueError("its devices are not those that streamprobe has found")
            check_host(header)
        except (ValueError, OSError) as error:
            self._fail(unusable(error))
            return
        try:
            self._vmm.send(ReceivedHeader(vmid=self._vmid, config=header.config, one_shot=header.one_shot))
        except ValueError:
            self._fail(unusable(ValueError("its configuration is longer than this vmd accepts")))

    def read_on(self) -> None:
        """Read the rest of the stream, because of ReceiveMemory.  Raises PeerError."""
        self._take(Step.MEMORY, "ReceiveMemory")
        header = self._header
        assert header is not None
        try:
            regions = memory_regions(header.config.memory_bytes, header.firmware_bytes)
            self._memory = GuestMemory.create(regions, fd=self._memory_fd)
        except (VmdError, ValueError) as error:
            self._fail(error)
            return
        receiver = Receiver(
            self._pipe,
            self._version,
            header,
            self._memory,
            self._loop,
            on_machine=self._on_machine,
            on_failed=lambda text: self._fail(OperatorError(errno.EINVAL, text)),
        )
        try:
            receiver.start()
        except HostError as error:
            self._fail(error)
            return
        show_progress(receiver, self._loop, self._vmm)

    def _on_machine(self, machine: "MachineState") -> None:
        """Report that the stream is complete."""
        self._machine = machine
        self.step = Step.COMPLETE
        self._vmm.send(ReceivedMachine(vmid=self._vmid))

    def source(self) -> FromStream:
        """Return the source to build the machine from.  Raises PeerError if the stream is not complete."""
        if self.step is not Step.COMPLETE:
            raise PeerError(self._vmm.label, "unexpected ResumeReceived")
        assert self._header is not None
        assert self._memory is not None
        assert self._machine is not None
        return FromStream(self._header, self._memory, self._machine)
