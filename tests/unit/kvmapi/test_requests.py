"""What the kernel is asked for a vCPU and a VM, and what its answers mean.  The kernel is a stand-in."""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vmd.kvmapi import abi
from vmd.kvmapi.exits import INTERRUPTED, RETRY, Hlt, MmioRead, PioIn, PioOut
from vmd.kvmapi.vcpu import KICK_SIGNAL, Vcpu, install_kick_handler
from vmd.kvmapi.vm import Vm, chip_route, msi_route

Answer = Callable[[Any], int]


class Kernel:
    """Answers requests by their number, and notes them.  A vCPU's page is a file that it shares."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("vcpu", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, 3 * mmap.PAGESIZE)
        self.page = mmap.mmap(self.fd, 3 * mmap.PAGESIZE)
        self.answers: dict[int, Answer] = {}
        self.asked: list[tuple[int, Any]] = []
        self.exits: list[Callable[[], None]] = []  # what each KVM_RUN does
        self.found: list[tuple[int, bytes]] = []  # at each KVM_RUN: `immediate_exit`, and four bytes of answer

    def ioctl(self, _fd: int, request: int, arg: Any = 0) -> int:  # noqa: ANN401
        """Replaces `fcntl.ioctl`."""
        self.asked.append((request, arg))
        if request == abi.KVM_RUN:
            at = abi.kvm_run.immediate_exit.offset
            self.found.append((self.page[at], self.page[mmap.PAGESIZE : mmap.PAGESIZE + 4]))
            self.exits.pop(0)()
            return 0
        return self.answers.get(request, lambda _arg: 0)(arg)

    def leaves(self, run: abi.kvm_run, data: bytes = b"") -> None:
        """Let the guest leave with this page, and this data of port I/O."""

        def leave() -> None:
            kept = self.page[abi.kvm_run.immediate_exit.offset]
            self.page[: ctypes.sizeof(run)] = bytes(run)
            self.page[abi.kvm_run.immediate_exit.offset] = kept
            if data:
                self.page[mmap.PAGESIZE : mmap.PAGESIZE + len(data)] = data

        self.exits.append(leave)

    def fails(self, number: int) -> None:
        """Let KVM_RUN fail."""

        def fail() -> None:
            raise OSError(number, os.strerror(number))

        self.exits.append(fail)

    def port(self, direction: int, size: int, port: int, count: int = 1, data: bytes = b"") -> None:
        """Let the guest access a port."""
        run = abi.kvm_run(exit_reason=abi.KVM_EXIT_IO)
        run.io = abi.kvm_run_io(direction, size, port, count, mmap.PAGESIZE)
        self.leaves(run, data)

    def halts(self) -> None:
        """Let the guest halt."""
        self.leaves(abi.kvm_run(exit_reason=abi.KVM_EXIT_HLT))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """A kernel."""
    made = Kernel()
    monkeypatch.setattr(fcntl, "ioctl", made.ioctl)
    yield made
    made.page.close()
    os.close(made.fd)


@pytest.fixture
def vcpu(kernel: Kernel) -> Iterator[Vcpu]:
    """A vCPU."""
    with Vcpu(os.dup(kernel.fd), 3 * mmap.PAGESIZE) as made:
        yield made


@pytest.fixture
def vm(kernel: Kernel) -> Iterator[Vm]:
    """A VM."""
    with Vm(os.dup(kernel.fd), 3 * mmap.PAGESIZE) as made:
        yield made


def nothing(*_: int) -> int:
    """Be a device that is not asked."""
    raise AssertionError


# --- running ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [lambda vcpu: vcpu.run(), lambda vcpu: vcpu.run_pio(nothing, nothing)])
def test_runs_that_end_without_an_exit(kernel: Kernel, vcpu: Vcpu, run: Callable[[Vcpu], object]) -> None:
    """A signal, and a vCPU that nobody has started, are no errors.  Everything else is."""
    for number in (errno.EINTR, errno.EAGAIN, errno.EFAULT):
        kernel.fails(number)
    assert run(vcpu) is INTERRUPTED
    assert run(vcpu) is RETRY
    with pytest.raises(OSError, match="KVM_RUN") as caught:
        run(vcpu)
    assert (caught.value.errno, vcpu.exits) == (errno.EFAULT, 0)


def test_ports_are_served_until_another_exit(kernel: Kernel, vcpu: Vcpu) -> None:
    """A device gets port, size and value.  The guest gets what a device answers."""
    kernel.port(abi.KVM_EXIT_IO_OUT, 1, 0x3F8, data=b"\x41\xff\xff\xff")
    kernel.port(abi.KVM_EXIT_IO_OUT, 2, 0x1F0, data=b"\x34\x12\xff\xff")
    kernel.port(abi.KVM_EXIT_IO_OUT, 4, 0xCF8, data=b"\x78\x56\x34\x12")
    kernel.port(abi.KVM_EXIT_IO_IN, 4, 0xCFC)
    kernel.halts()
    written: list[tuple[int, int, int]] = []

    def read(port: int, size: int) -> int:
        assert (port, size) == (0xCFC, 4)
        return 0x1_89ABCDEF  # more than fits

    assert vcpu.run_pio(read, lambda *access: written.append(access)) == Hlt()
    assert written == [(0x3F8, 1, 0x41), (0x1F0, 2, 0x1234), (0xCF8, 4, 0x12345678)]
    assert kernel.found[-1] == (0, b"\xef\xcd\xab\x89")
    assert vcpu.exits == 5


def test_string_accesses_come_as_a_whole(kernel: Kernel, vcpu: Vcpu) -> None:
    """The answer to a read has all items."""
    kernel.port(abi.KVM_EXIT_IO_OUT, 1, 0x3F8, count=3, data=b"abc")
    assert vcpu.run_pio(nothing, nothing) == PioOut(0x3F8, 1, 3, b"abc")
    kernel.port(abi.KVM_EXIT_IO_IN, 2, 0x1F0, count=2)
    assert vcpu.run_pio(nothing, nothing) == PioIn(0x1F0, 2, 2)
    vcpu.answer(b"abcd")
    assert kernel.page[mmap.PAGESIZE : mmap.PAGESIZE + 4] == b"abcd"


def test_a_failure_of_a_device_is_not_one_of_kvm(kernel: Kernel, vcpu: Vcpu) -> None:
    """Even if a signal has interrupted it."""

    def fail(*_: int) -> int:
        raise InterruptedError(errno.EINTR, "a device")

    kernel.port(abi.KVM_EXIT_IO_IN, 1, 0x3F8)
    with pytest.raises(InterruptedError, match="a device"):
        vcpu.run_pio(fail, nothing)


def test_an_exit_is_answered_once_and_with_as_much_as_it_asks_for(kernel: Kernel, vcpu: Vcpu) -> None:
    """Anything else would be written over other fields of the page."""
    run = abi.kvm_run(exit_reason=abi.KVM_EXIT_MMIO)
    run.mmio = abi.kvm_run_mmio(0xFEB00000, (abi.u8 * 8)(), 4, 0)
    kernel.leaves(run)
    with pytest.raises(ValueError, match="answer of 1 bytes to an exit that asks for 0"):
        vcpu.answer(b"x")
    assert vcpu.run() == MmioRead(0xFEB00000, 4)
    for data in (b"", b"abc", b"abcde"):
        with pytest.raises(ValueError, match=f"answer of {len(data)} bytes to an exit that asks for 4"):
            vcpu.answer(data)
    vcpu.answer(b"abcd")
    assert bytes(abi.kvm_run.from_buffer_copy(kernel.page).mmio.data)[:4] == b"abcd"
    with pytest.raises(ValueError, match="asks for 0"):
        vcpu.answer(b"abcd")
    for again in (vcpu.run, lambda: vcpu.run_pio(nothing, nothing)):
        kernel.leaves(run)
        kernel.halts()
        vcpu.run()
        again()
        for data in (b"x", b"abcd"):
            with pytest.raises(ValueError, match="asks for 0"):
                vcpu.answer(data)


def test_io_is_completed_without_running_the_guest(kernel: Kernel, vcpu: Vcpu) -> None:
    """KVM is told to return at once.  The guest runs again after `clear_kick`."""
    kernel.fails(errno.EINTR)
    assert vcpu.complete() is INTERRUPTED
    vcpu.clear_kick()
    kernel.halts()
    vcpu.run()
    assert [kick for kick, _ in kernel.found] == [1, 0]


def test_a_kick_reaches_the_thread_of_the_vcpu(kernel: Kernel, vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only while it has one: its number may belong to another thread later."""
    kicked: list[tuple[int, int]] = []
    monkeypatch.setattr("vmd.signals.pthread_kill", lambda thread, number: kicked.append((thread, number)))
    vcpu.kick()
    assert (kicked, kernel.page[abi.kvm_run.immediate_exit.offset]) == ([], 1)
    vcpu.bind_thread()
    vcpu.kick()
    vcpu.unbind_thread()
    vcpu.kick()
    assert kicked == [(threading.get_ident(), KICK_SIGNAL)]


def test_a_kick_ends_no_process() -> None:
    """It may come outside of the guest."""
    before = signal.getsignal(KICK_SIGNAL)
    install_kick_handler()
    signal.raise_signal(KICK_SIGNAL)
    signal.signal(KICK_SIGNAL, before)


def test_a_vcpu_is_closed_once(kernel: Kernel) -> None:
    """Its number may belong to another file then."""
    with Vcpu(os.dup(kernel.fd), 3 * mmap.PAGESIZE) as vcpu:
        number = vcpu.fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    other = os.dup(kernel.fd)
    vcpu.close()
    os.fstat(other)
    os.close(other)
    assert vcpu.fd == -1


# --- registers -------------------------------------------------------------------------------------------------


class Msrs:
    """The model-specific registers of a processor, which KVM takes in order, up to the first that there is not."""

    def __init__(self, kernel: Kernel, values: dict[int, int]) -> None:
        self.values = values
        self.most = 0
        kernel.answers[abi.KVM_GET_MSRS] = lambda buffer: self.each(buffer, self.get)
        kernel.answers[abi.KVM_SET_MSRS] = lambda buffer: self.each(buffer, self.set)

    def each(self, buffer: bytearray, take: Callable[[abi.kvm_msr_entry], None]) -> int:
        """Take entries."""
        count = int.from_bytes(buffer[:4], "little")
        self.most = max(self.most, count)
        for number in range(count):
            entry = abi.kvm_msr_entry.from_buffer(buffer, 8 + 16 * number)
            if entry.index not in self.values:
                return number
            take(entry)
        return count

    def get(self, entry: abi.kvm_msr_entry) -> None:
        """Read."""
        entry.data = self.values[entry.index]

    def set(self, entry: abi.kvm_msr_entry) -> None:
        """Write."""
        self.values[entry.index] = entry.data


MISSING = {0, 1, 127, 128, 129, 256, 299}  # at the beginning and the end, and where a request is full


@pytest.mark.parametrize("missing", [MISSING, set()])
def test_all_model_specific_registers_are_read(kernel: Kernel, vcpu: Vcpu, missing: set[int]) -> None:
    """However many there are.  Those that the processor lacks are left out."""
    there = {index: index << 32 | 7 for index in range(300) if index not in missing}
    msrs = Msrs(kernel, dict(there))
    assert vcpu.get_msrs(range(300)) == there
    assert msrs.most < 256  # more are refused
    assert vcpu.get_msrs(()) == {}


@pytest.mark.parametrize("missing", [MISSING, set()])
def test_all_model_specific_registers_are_written(kernel: Kernel, vcpu: Vcpu, missing: set[int]) -> None:
    """One that the processor lacks keeps no other from being written, and is reported."""
    there = {index: 0 for index in range(300) if index not in missing}
    msrs = Msrs(kernel, dict(there))
    assert vcpu.set_msrs({index: index << 32 | 7 for index in range(300)}) == sorted(missing)
    assert msrs.values == {index: index << 32 | 7 for index in there}
    assert msrs.most < 256


def test_the_processor_of_a_vcpu(kernel: Kernel, vcpu: Vcpu) -> None:
    """The kernel gets all leaves, and their number."""
    leaves = [abi.kvm_cpuid_entry2(function=number, eax=7) for number in range(3)]
    vcpu.set_cpuid2(leaves)
    ((request, table),) = kernel.asked
    assert request == abi.KVM_SET_CPUID2
    assert bytes(table) == bytes((3, 0, 0, 0, 0, 0, 0, 0)) + b"".join(map(bytes, leaves))


@pytest.mark.parametrize(("xsave_bytes", "request_", "length"), [
    (0, abi.KVM_GET_XSAVE, 4096), (2696, abi.KVM_GET_XSAVE2, 4096), (11008, abi.KVM_GET_XSAVE2, 11008),
])  # fmt: skip
def test_the_whole_extended_state_is_read(kernel: Kernel, xsave_bytes: int, request_: int, length: int) -> None:
    """Its length is the host's."""
    kernel.answers[request_] = lambda area: area.__setitem__(-1, 7) or 0
    with Vcpu(os.dup(kernel.fd), 3 * mmap.PAGESIZE, xsave_bytes) as vcpu:
        area = vcpu.get_xsave()
        assert (len(area), area[-1]) == (length, 7)
        vcpu.set_xsave(area)
        assert kernel.asked[-1] == (abi.KVM_SET_XSAVE, area)
        for wrong in (length - 1, length + 1):
            with pytest.raises(ValueError, match=f"xsave area of {wrong} bytes, not {length}"):
                vcpu.set_xsave(bytes(wrong))


def test_the_offset_of_a_tsc(kernel: Kernel, vcpu: Vcpu) -> None:
    """It is a number of 64 bits behind a pointer."""
    kept = ctypes.c_uint64(0)

    def move(attr: abi.kvm_device_attr, *, to_kernel: bool) -> int:
        assert (attr.group, attr.attr) == (abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET)
        value = ctypes.c_uint64.from_address(attr.addr)
        if to_kernel:
            kept.value = value.value
        else:
            value.value = kept.value
        return 0

    kernel.answers[abi.KVM_SET_DEVICE_ATTR] = lambda attr: move(attr, to_kernel=True)
    kernel.answers[abi.KVM_GET_DEVICE_ATTR] = lambda attr: move(attr, to_kernel=False)
    vcpu.set_tsc_offset((1 << 64) - 5)
    assert vcpu.get_tsc_offset() == (1 << 64) - 5
    assert vcpu.has_tsc_offset

    def refuse(_attr: object) -> int:
        raise OSError(errno.ENXIO, "no such attribute")

    kernel.answers[abi.KVM_HAS_DEVICE_ATTR] = refuse
    assert not vcpu.has_tsc_offset


@pytest.mark.parametrize(("valid", "found"), [(0, None), (1, 0x1234)])
def test_a_linear_address(kernel: Kernel, vcpu: Vcpu, valid: int, found: int | None) -> None:
    """It may be mapped to no physical one."""

    def translate(each: abi.kvm_translation) -> int:
        assert each.linear_address == 0xFFFFFFFF81000000
        each.physical_address, each.valid = 0x1234, valid
        return 0

    kernel.answers[abi.KVM_TRANSLATE] = translate
    assert vcpu.translate(0xFFFFFFFF81000000) == found


# --- the machine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pages", "words"), [(1, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_the_log_of_changed_pages_has_a_bit_for_each(kernel: Kernel, vm: Vm, pages: int, words: int) -> None:
    """The kernel writes whole words, which must all belong to the log."""

    def fill(log: abi.kvm_dirty_log) -> int:
        assert log.slot == 3
        ctypes.memset(log.dirty_bitmap, 0xA5, 8 * words)
        return 0

    kernel.answers[abi.KVM_GET_DIRTY_LOG] = fill
    assert vm.get_dirty_log(3, pages * 4096) == b"\xa5" * 8 * words


def test_the_log_of_a_large_slot(kernel: Kernel, vm: Vm) -> None:
    """A page that is not full, and the last one of 64 GiB, have their bits."""
    for size, words in ((1, 1), (64 * 4096 + 1, 2), (64 << 30, 1 << 18), ((64 << 30) + 4096, (1 << 18) + 1)):
        assert len(vm.get_dirty_log(0, size)) == 8 * words


def test_a_memory_region(kernel: Kernel, vm: Vm) -> None:
    """Each number is in its field."""
    vm.set_memory_region(1, 2 << 12, 3 << 12, 4 << 12, abi.KVM_MEM_READONLY)
    vm.set_memory_region(1, 2 << 12, 0, 0)
    assert [request for request, _ in kernel.asked] == [abi.KVM_SET_USER_MEMORY_REGION] * 2
    assert [
        (region.slot, region.guest_phys_addr, region.memory_size, region.userspace_addr, region.flags)
        for _, region in kernel.asked
    ] == [(1, 2 << 12, 3 << 12, 4 << 12, abi.KVM_MEM_READONLY), (1, 2 << 12, 0, 0, 0)]


def test_routes() -> None:
    """Of a pin, and of a message, whose address has 64 bits."""
    pin, message = chip_route(5, abi.KVM_IRQCHIP_IOAPIC, 9), msi_route(24, 0x1_FEE01000, 0x4041)
    assert (pin.gsi, pin.type, pin.u.irqchip.irqchip, pin.u.irqchip.pin) == (5, 1, abi.KVM_IRQCHIP_IOAPIC, 9)
    assert (message.gsi, message.type) == (24, 2)
    assert (message.u.msi.address_lo, message.u.msi.address_hi, message.u.msi.data) == (0xFEE01000, 1, 0x4041)


def test_interrupts_from_an_eventfd(kernel: Kernel, vm: Vm) -> None:
    """With and without a second one for the end of the interrupt; and undone."""
    vm.assign_irqfd(7, 24)
    vm.assign_irqfd(7, 24, 8)
    vm.deassign_irqfd(7, 24)
    found = [(each.fd, each.gsi, each.flags, each.resamplefd) for _, each in kernel.asked]
    assert found == [
        (7, 24, 0, 0), (7, 24, abi.KVM_IRQFD_FLAG_RESAMPLE, 8), (7, 24, abi.KVM_IRQFD_FLAG_DEASSIGN, 0),
    ]  # fmt: skip


def test_writes_that_signal_an_eventfd(kernel: Kernel, vm: Vm) -> None:
    """By address or port, of any value or one, 0 included; and undone."""
    port, match, off = (
        abi.KVM_IOEVENTFD_FLAG_PIO, abi.KVM_IOEVENTFD_FLAG_DATAMATCH, abi.KVM_IOEVENTFD_FLAG_DEASSIGN,
    )  # fmt: skip
    vm.assign_ioeventfd(7, 0xFEB00000, 0)
    vm.assign_ioeventfd(7, 0xC010, 2, 0, pio=True)
    vm.deassign_ioeventfd(7, 0xC010, 2, 5, pio=True)
    found = [(each.fd, each.addr, each.len, each.datamatch, each.flags) for _, each in kernel.asked]
    assert found == [
        (7, 0xFEB00000, 0, 0, 0), (7, 0xC010, 2, 0, port | match), (7, 0xC010, 2, 5, port | match | off),
    ]  # fmt: skip


def test_a_line_has_its_number_and_its_level(kernel: Kernel, vm: Vm) -> None:
    """Raised, and lowered."""
    for level in (1, 0):
        vm.irq_line(11, level)
    assert [(each.irq, each.level) for _, each in kernel.asked] == [(11, 1), (11, 0)]


def test_a_vcpu_that_cannot_be_mapped_leaves_nothing_open(
    kernel: Kernel, vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor is closed."""
    fd = os.memfd_create("vcpu")  # empty, so that it cannot be mapped
    kernel.answers[abi.KVM_CREATE_VCPU] = lambda _number: fd
    with pytest.raises((OSError, ValueError)):
        vm.create_vcpu(0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_vcpu_knows_the_size_of_its_extended_state(kernel: Kernel, vm: Vm) -> None:
    """The kernel is asked before the vCPU exists."""
    kernel.answers[abi.KVM_CHECK_EXTENSION] = lambda cap: 11008 if cap == abi.KVM_CAP_XSAVE2 else 0
    kernel.answers[abi.KVM_CREATE_VCPU] = lambda number: os.dup(kernel.fd) if number == 3 else -1
    with vm.create_vcpu(3) as vcpu:
        assert vcpu.xsave_bytes == 11008
    assert [request for request, _ in kernel.asked] == [abi.KVM_CHECK_EXTENSION, abi.KVM_CREATE_VCPU]


def test_a_vm_is_closed_once(kernel: Kernel) -> None:
    """Its number may belong to another file then."""
    with Vm(os.dup(kernel.fd), 3 * mmap.PAGESIZE) as vm:
        number = vm.fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    assert vm.fd == -1
    vm.close()


# --- each request ------------------------------------------------------------------------------------------------

# Of a vCPU, then of a VM: the name of a structure in methods, its class, and its requests.
STRUCTURES = [
    ("regs", abi.kvm_regs, abi.KVM_GET_REGS, abi.KVM_SET_REGS),
    ("sregs", abi.kvm_sregs, abi.KVM_GET_SREGS, abi.KVM_SET_SREGS),
    ("xcrs", abi.kvm_xcrs, abi.KVM_GET_XCRS, abi.KVM_SET_XCRS),
    ("lapic", abi.kvm_lapic_state, abi.KVM_GET_LAPIC, abi.KVM_SET_LAPIC),
    ("vcpu_events", abi.kvm_vcpu_events, abi.KVM_GET_VCPU_EVENTS, abi.KVM_SET_VCPU_EVENTS),
    ("debugregs", abi.kvm_debugregs, abi.KVM_GET_DEBUGREGS, abi.KVM_SET_DEBUGREGS),
    ("pit2", abi.kvm_pit_state2, abi.KVM_GET_PIT2, abi.KVM_SET_PIT2),
]


@pytest.mark.parametrize(("name", "struct", "get", "set_"), STRUCTURES, ids=[row[0] for row in STRUCTURES])
def test_a_structure_is_read_and_written_unchanged(
    kernel: Kernel, vcpu: Vcpu, vm: Vm, name: str, struct: type[ctypes.Structure], get: int, set_: int
) -> None:
    """The kernel gets the bytes that it has given.  Another number of bytes is refused."""
    there = bytes(number % 251 for number in range(ctypes.sizeof(struct)))
    kernel.answers[get] = lambda into: ctypes.memmove(ctypes.addressof(into), there, len(there)) and 0
    owner: Any = vm if name == "pit2" else vcpu

    found = bytes(getattr(owner, f"get_{name}")())
    getattr(owner, f"set_{name}")(found)

    assert found == there
    assert [(request, bytes(value)) for request, value in kernel.asked] == [(get, there), (set_, there)]
    for wrong in (there[:-1], there + b"x"):
        with pytest.raises(ValueError, match=f"of {len(wrong)} bytes, not {len(there)}"):
            getattr(owner, f"set_{name}")(wrong)


@pytest.mark.parametrize("chip", [abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC])
def test_interrupt_controllers_are_told_apart(kernel: Kernel, vm: Vm, chip: int) -> None:
    """The kernel is asked for the one that is wanted, and gets it back."""
    state = vm.get_irqchip(chip)
    vm.set_irqchip(bytes(state))
    assert [(request, value.chip_id) for request, value in kernel.asked] == [
        (abi.KVM_GET_IRQCHIP, chip), (abi.KVM_SET_IRQCHIP, chip),
    ]  # fmt: skip


# A call, its request, and the argument as bytes or as a number.
REQUESTS: list[tuple[Callable[[Vm, Vcpu], object], int, bytes | int]] = [
    (lambda vm, _: vm.check_extension(136), abi.KVM_CHECK_EXTENSION, 136),
    (lambda vm, _: vm.set_identity_map_addr(0xFEFFC000), abi.KVM_SET_IDENTITY_MAP_ADDR, b"\0\xc0\xff\xfe\0\0\0\0"),
    (lambda vm, _: vm.create_irqchip(), abi.KVM_CREATE_IRQCHIP, 0),
    (lambda vm, _: vm.create_pit2(), abi.KVM_CREATE_PIT2, b"\1".ljust(64, b"\0")),
    (lambda vm, _: vm.create_pit2(0), abi.KVM_CREATE_PIT2, bytes(64)),
    (lambda vm, _: vm.set_gsi_routing([]), abi.KVM_SET_GSI_ROUTING, bytes(8)),
    (
        lambda vm, _: vm.set_gsi_routing([msi_route(24, 5, 6)]),
        abi.KVM_SET_GSI_ROUTING,
        b"\1".ljust(8, b"\0") + bytes(msi_route(24, 5, 6)),
    ),
    (lambda vm, _: vm.set_clock(0x1234), abi.KVM_SET_CLOCK, b"\x34\x12".ljust(48, b"\0")),
    (lambda _, vcpu: vcpu.set_mp_state(1), abi.KVM_SET_MP_STATE, b"\1\0\0\0"),
    (lambda _, vcpu: vcpu.get_tsc_khz(), abi.KVM_GET_TSC_KHZ, 0),
]


@pytest.mark.parametrize(("call", "request_", "argument"), REQUESTS)
def test_what_the_kernel_is_asked(
    kernel: Kernel, vcpu: Vcpu, vm: Vm, call: Callable[[Vm, Vcpu], object], request_: int, argument: bytes | int
) -> None:
    """One request, with the argument that it takes."""
    call(vm, vcpu)
    ((asked, given),) = kernel.asked
    assert asked == request_
    assert (given if isinstance(argument, int) else bytes(given)) == argument


def test_what_the_kernel_answers(kernel: Kernel, vcpu: Vcpu, vm: Vm) -> None:
    """Numbers come as the result of a request, or in its structure."""
    kernel.answers[abi.KVM_CHECK_EXTENSION] = lambda cap: cap + 1
    kernel.answers[abi.KVM_GET_TSC_KHZ] = lambda _: 2_500_000
    kernel.answers[abi.KVM_GET_MP_STATE] = lambda state: ctypes.memset(ctypes.addressof(state), 3, 1) and 0
    kernel.answers[abi.KVM_GET_CLOCK] = lambda clock: ctypes.memset(ctypes.addressof(clock), 77, 1) and 0
    assert (vm.check_extension(9), vcpu.get_tsc_khz(), vcpu.get_mp_state(), vm.get_clock().clock) == (
        10, 2_500_000, 3, 77,
    )  # fmt: skip


def test_the_page_of_a_tss_is_above_2_gib(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fcntl.ioctl` takes no such number.  A request that a signal has interrupted is repeated."""
    asked: list[tuple[int, int, int]] = []
    results = [-1, 0]

    def ioctl(fd: int, request: int, arg: int) -> int:
        asked.append((fd, request, arg))
        return results.pop(0)

    monkeypatch.setattr(abi, "_libc", SimpleNamespace(ioctl=ioctl))
    monkeypatch.setattr("vmd.native.get_errno", lambda: errno.EINTR)
    vm.set_tss_addr(0xFEFFD000)
    assert asked == [(vm.fd, abi.KVM_SET_TSS_ADDR, 0xFEFFD000)] * 2


def test_an_interrupted_request_is_repeated(kernel: Kernel, vm: Vm) -> None:
    """All other errors are passed on."""
    errors = [errno.EINTR, errno.EINTR, errno.EBUSY]

    def fail(_: object) -> int:
        number = errors.pop(0)
        raise OSError(number, os.strerror(number))

    kernel.answers[abi.KVM_SET_CLOCK] = fail
    with pytest.raises(OSError, match="KVM_SET_CLOCK: Device or resource busy"):
        vm.set_clock(1)
    assert errors == []


@pytest.mark.parametrize("count", [0, 1, 128, 129, 1000])
def test_a_list_has_all_its_entries(kernel: Kernel, count: int) -> None:
    """Its length is not known before: the kernel refuses a list that is too short."""

    def fill(buffer: bytearray) -> int:
        if int.from_bytes(buffer[:4], "little") < count:
            raise OSError(errno.E2BIG, "too short")
        buffer[:4] = count.to_bytes(4, "little")
        for number in range(count):
            buffer[4 + 4 * number : 8 + 4 * number] = number.to_bytes(4, "little")
        return 0

    kernel.answers[abi.KVM_GET_MSR_INDEX_LIST] = fill
    found = abi.read_list(kernel.fd, abi.KVM_GET_MSR_INDEX_LIST, abi.kvm_msr_list, abi.kvm_msr_index)
    assert [each.index for each in found] == [*range(count)]


@pytest.mark.parametrize(("number", "asked"), [(errno.E2BIG, 10), (errno.EFAULT, 1)])
def test_a_list_that_no_length_fits_is_an_error(kernel: Kernel, number: int, asked: int) -> None:
    """The kernel is asked a few times, and for other errors once."""

    def refuse(_: object) -> int:
        raise OSError(number, os.strerror(number))

    kernel.answers[abi.KVM_GET_MSR_INDEX_LIST] = refuse
    with pytest.raises(OSError, match="KVM_GET_MSR_INDEX_LIST"):
        abi.read_list(kernel.fd, abi.KVM_GET_MSR_INDEX_LIST, abi.kvm_msr_list, abi.kvm_msr_index)
    assert len(kernel.asked) == asked
