"""kvmapi with the real /dev/kvm.  Each guest consists of a few bytes of real-mode code."""

import errno
import os
import selectors
import signal
from collections.abc import Iterator

import pytest

from tests.support.realmode import (
    DEADLINE_S,
    ENTRY,
    HALT_FOR_EVER,
    HLT,
    PIC_SETUP,
    Guest,
    Runner,
    out,
    wait_until,
)
from vmd.guestmem import GuestMemory, RegionSpec
from vmd.kvmapi import abi
from vmd.kvmapi.exits import (
    Hlt,
    InternalError,
    Interrupted,
    MmioRead,
    MmioWrite,
    PioIn,
    PioOut,
    Retry,
    Shutdown,
)
from vmd.kvmapi.system import System
from vmd.kvmapi.vcpu import KICK_SIGNAL, install_kick_handler
from vmd.kvmapi.vm import chip_route, msi_route

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.path.exists("/dev/kvm"), reason="there is no /dev/kvm on this host"),
]

COUNTER = 0x2000
SPIN = b"\xeb\xfe"  # jmp $
COUNT_FOR_EVER = b"\xff\x06\x00\x20\xeb\xfa"  # inc word [2000h]; jmp back
UNBACKED_DS = b"\xb8\x00\x20\x8e\xd8"  # mov ax, 2000h; mov ds, ax


def wait_readable(fd: int) -> None:
    """Wait until an eventfd is not zero."""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        assert selector.select(DEADLINE_S)


@pytest.fixture(autouse=True)
def kick_handler() -> Iterator[None]:
    """Install the signal handler that every process with vCPUs needs."""
    before = signal.getsignal(KICK_SIGNAL)
    install_kick_handler()
    yield
    signal.signal(KICK_SIGNAL, before)


@pytest.fixture
def system() -> Iterator[System]:
    """An open /dev/kvm."""
    with System(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)) as opened:
        yield opened


@pytest.fixture
def guest(system: System) -> Iterator[Guest]:
    """A VM without interrupt controllers, where HLT exits."""
    made = Guest(system, irqchip=False)
    yield made
    made.close()


@pytest.fixture
def guest_with_chips(system: System) -> Iterator[Guest]:
    """A VM with KVM's interrupt controllers and PIT."""
    made = Guest(system, irqchip=True)
    yield made
    made.close()


@pytest.fixture
def eventfd() -> Iterator[int]:
    """A non-blocking eventfd."""
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


# ------------------------------------------------------------------ the system


def test_the_system_reports_its_capabilities(system: System) -> None:
    """It reports the capabilities, CPUID leaves and MSRs that every KVM on x86 has."""
    assert system.check_extension(abi.KVM_CAP_IRQCHIP) == 1
    assert system.check_extension(abi.KVM_CAP_IMMEDIATE_EXIT) == 1
    assert system.check_extension(0x7FFFFFFF) == 0
    assert system.vcpu_mmap_bytes >= 3 * 4096
    leaves = {(leaf.function, leaf.index): leaf for leaf in system.supported_cpuid()}
    assert leaves[0, 0].eax >= 1
    assert leaves[0x40000000, 0].ebx == int.from_bytes(b"KVMK", "little")
    assert 0x10 in system.msr_indices()  # the TSC


def test_another_device_is_refused() -> None:
    """The descriptor of a refused device stays open."""
    fd = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(OSError, match="KVM_GET_API_VERSION"):
        System(fd)
    os.close(fd)


def test_descriptors_are_closed_once(system: System) -> None:
    """VM and vCPU are context managers.  An exec closes their descriptors."""
    with system.create_vm() as vm:
        with vm.create_vcpu(0) as vcpu:
            assert not os.get_inheritable(vm.fd)
            assert not os.get_inheritable(vcpu.fd)
        vcpu.close()
        assert vcpu.fd == -1
    vm.close()
    assert vm.fd == -1


# ------------------------------------------------------------------ port I/O


@pytest.mark.parametrize(("size", "value"), [(1, 0xA5), (2, 0xBEEF), (4, 0xDEADBEEF)])
def test_a_port_write_of_every_size_exits_with_its_value(guest: Guest, size: int, value: int) -> None:
    """`run` returns the bytes.  Then the guest runs on behind the instruction."""
    guest.load(out(0x510, value, size) + HLT)

    assert guest.vcpu.run() == PioOut(0x510, size, 1, value.to_bytes(size, "little"))
    assert guest.vcpu.run() == Hlt()


@pytest.mark.parametrize(
    ("size", "instruction"), [(1, b"\xec"), (2, b"\xed"), (4, b"\x66\xed")], ids=["al", "ax", "eax"]
)
def test_a_port_read_of_every_size_gets_the_answer(guest: Guest, size: int, instruction: bytes) -> None:
    """The answer changes only the bytes of the operand in the register."""
    guest.load(instruction + HLT, rdx=0x71, rax=0x11111111)

    assert guest.vcpu.run() == PioIn(0x71, size, 1)
    guest.vcpu.answer(b"\xfe\xca\xad\xde"[:size])
    assert guest.vcpu.run() == Hlt()

    expected = b"\xfe\xca\xad\xde"[:size] + b"\x11\x11\x11\x11"[size:]
    assert guest.vcpu.get_regs().rax == int.from_bytes(expected, "little")


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0\0"])
def test_an_answer_of_the_wrong_length_is_refused(guest: Guest, data: bytes) -> None:
    """An answer must have exactly the bytes of the read.  An exit is answered once."""
    guest.load(b"\xed" + HLT, rdx=0x71)
    guest.vcpu.run()

    with pytest.raises(ValueError, match=f"answer of {len(data)} bytes to an exit that asks for 2"):
        guest.vcpu.answer(data)
    guest.vcpu.answer(b"\0\0")
    with pytest.raises(ValueError, match="asks for 0"):
        guest.vcpu.answer(b"\0\0")


@pytest.mark.parametrize(("size", "instruction"), [(1, b"\xf3\x6e"), (2, b"\xf3\x6f"), (4, b"\xf3\x66\x6f")])
def test_a_string_write_returns_all_items(guest: Guest, size: int, instruction: bytes) -> None:
    """KVM may divide `rep outs` into any number of exits.  Together they have all items."""
    text = bytes(range(64))
    guest.memory.write(0x3000, text)
    guest.load(instruction + HLT, rdx=0x3F8, rcx=len(text) // size, rsi=0x3000)

    received = b""
    while isinstance(exit_ := guest.vcpu.run(), PioOut):
        assert (exit_.port, exit_.size, len(exit_.data)) == (0x3F8, size, size * exit_.count)
        received += exit_.data

    assert exit_ == Hlt()
    assert received == text


def test_a_string_read_stores_all_items(guest: Guest) -> None:
    """`rep insb` reads more bytes than fit into one exit."""
    total = 3000
    guest.load(b"\xf3\x6c" + HLT, rdx=0x511, rcx=total, rdi=0x3000)
    sent = b""

    while isinstance(exit_ := guest.vcpu.run(), PioIn):
        part = bytes((len(sent) + index) % 251 for index in range(exit_.size * exit_.count))
        sent += part
        guest.vcpu.answer(part)

    assert exit_ == Hlt()
    assert len(sent) == total
    assert guest.memory.read(0x3000, total) == sent


def test_run_pio_answers_single_accesses_itself(guest: Guest) -> None:
    """It passes reads and writes of all sizes to the two functions, and returns at HLT."""
    writes: list[tuple[int, int, int]] = []
    reads: list[tuple[int, int]] = []

    def pio_read(port: int, size: int) -> int:
        reads.append((port, size))
        return -1  # all bits are set, for each size

    def pio_write(port: int, size: int, value: int) -> None:
        writes.append((port, size, value))

    code = out(0x10, 0xA5) + out(0x20, 0xBEEF, 2) + out(0x30, 0xDEADBEEF, 4)
    code += b"\x66\x31\xc0" + b"\xec" + b"\x66\x89\xc3"  # xor eax, eax; in al, dx; mov ebx, eax
    code += b"\x66\x31\xc0" + b"\xed" + b"\x66\x89\xc1"  # ... ax, into ecx
    code += b"\x66\xed"
    guest.load(code + HLT)

    assert guest.vcpu.run_pio(pio_read, pio_write) == Hlt()

    regs = guest.vcpu.get_regs()
    assert writes == [(0x10, 1, 0xA5), (0x20, 2, 0xBEEF), (0x30, 4, 0xDEADBEEF)]
    assert reads == [(0x30, 1), (0x30, 2), (0x30, 4)]
    assert (regs.rbx, regs.rcx, regs.rax) == (0xFF, 0xFFFF, 0xFFFFFFFF)
    assert guest.vcpu.exits == 7  # three writes, three reads, HLT


def test_run_pio_returns_string_accesses_and_memory_accesses(guest: Guest) -> None:
    """The caller answers them as after `run`."""
    code = out(0x80, 1) + b"\xf3\x6c" + UNBACKED_DS + b"\xa0\x00\x00"  # rep insb; mov al, [0]
    guest.load(code + HLT, rcx=2, rdi=0x4000)
    single: list[int] = []

    def pio_read(port: int, size: int) -> int:
        raise AssertionError(f"port {port} was read singly")

    def pio_write(port: int, size: int, value: int) -> None:
        single.append(value)

    assert guest.vcpu.run_pio(pio_read, pio_write) == PioIn(0x80, 1, 2)
    guest.vcpu.answer(b"ok")
    assert guest.vcpu.run_pio(pio_read, pio_write) == MmioRead(0x20000, 1)
    guest.vcpu.answer(b"\x77")
    assert guest.vcpu.run_pio(pio_read, pio_write) == Hlt()

    assert single == [1]
    assert guest.vcpu.exits == 4
    assert guest.memory.read(0x4000, 2) == b"ok"
    assert guest.vcpu.get_regs().rax & 0xFF == 0x77


def test_run_pio_passes_on_all_items_of_a_string_write(guest: Guest) -> None:
    """KVM may exit for each item of `rep outsb`, or for several at once."""
    guest.memory.write(0x3000, b"hello")
    guest.load(b"\xf3\x6e" + HLT, rdx=0x3F8, rcx=5, rsi=0x3000)
    text = bytearray()

    def pio_write(port: int, size: int, value: int) -> None:
        text.append(value)

    while isinstance(exit_ := guest.vcpu.run_pio(lambda port, size: 0, pio_write), PioOut):
        text += exit_.data

    assert exit_ == Hlt()
    assert text == b"hello"


def test_run_pio_raises_the_exceptions_of_a_device(guest: Guest) -> None:
    """Even EINTR, which KVM_RUN returns after a kick, is the device's exception.  Then the guest can run on."""
    guest.load(out(0x80, 1) + out(0x81, 2) + HLT)

    def pio_write(port: int, size: int, value: int) -> None:
        if port == 0x80:
            raise InterruptedError(errno.EINTR, "the device")

    with pytest.raises(InterruptedError, match="the device"):
        guest.vcpu.run_pio(lambda port, size: 0, pio_write)
    assert guest.vcpu.run_pio(lambda port, size: 0, pio_write) == Hlt()


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(("size", "instruction"), [(1, b"\xa2"), (2, b"\xa3"), (4, b"\x66\xa3")])
def test_a_write_without_memory_exits_with_its_data(guest: Guest, size: int, instruction: bytes) -> None:
    """The instruction is `mov [10h], al/ax/eax`, with a segment base of 20000h."""
    guest.load(UNBACKED_DS + b"\x66\xb8\x78\x56\x34\x12" + instruction + b"\x10\x00" + HLT)

    assert guest.vcpu.run() == MmioWrite(0x20010, size, b"\x78\x56\x34\x12"[:size])
    assert guest.vcpu.run() == Hlt()


@pytest.mark.parametrize(("size", "instruction"), [(1, b"\xa0"), (2, b"\xa1"), (4, b"\x66\xa1")])
def test_a_read_without_memory_gets_the_answer(guest: Guest, size: int, instruction: bytes) -> None:
    """The instruction is `mov al/ax/eax, [10h]`, with a segment base of 20000h."""
    guest.load(UNBACKED_DS + b"\x66\x31\xc0" + instruction + b"\x10\x00" + HLT)

    assert guest.vcpu.run() == MmioRead(0x20010, size)
    guest.vcpu.answer(b"\x78\x56\x34\x12"[:size])
    assert guest.vcpu.run() == Hlt()
    assert guest.vcpu.get_regs().rax == int.from_bytes(b"\x78\x56\x34\x12"[:size], "little")


def test_read_only_memory_is_read_but_writes_exit(guest: Guest) -> None:
    """A write to firmware does not change it, and exits.  The exit may be ignored."""
    layout = [RegionSpec(gpa=0x20000, size=0x1000, name="rom", read_only=True)]
    with GuestMemory.create(layout) as rom:
        rom.load(0x20010, b"\x42")
        for _, gpa, size, hva, flags in rom.kvm_slots():
            guest.vm.set_memory_region(7, gpa, size, hva, flags)
        guest.load(UNBACKED_DS + b"\xa0\x10\x00\xfe\xc0\xa2\x10\x00" + HLT)  # mov al,[10h]; inc al; mov [10h],al

        assert guest.vcpu.run() == MmioWrite(0x20010, 1, b"\x43")
        assert guest.vcpu.run() == Hlt()
        assert rom.read(0x20010, 1) == b"\x42"
        guest.vm.set_memory_region(7, 0x20000, 0, 0)


def test_a_removed_slot_is_no_memory(guest: Guest) -> None:
    """A region of size 0 removes its slot."""
    with GuestMemory.create([RegionSpec(gpa=0x20000, size=0x1000, name="more")]) as more:
        guest.vm.set_memory_region(7, 0x20000, 0x1000, more.hva(0x20000))
        guest.load(UNBACKED_DS + b"\xa2\x00\x00\xa2\x01\x00" + HLT)
        guest.vm.set_memory_region(7, 0x20000, 0, 0)

    assert guest.vcpu.run() == MmioWrite(0x20000, 1, b"\x00")


def test_running_from_no_memory_is_an_exit_and_no_exception(guest: Guest) -> None:
    """A jump to 2000h:0 causes an exit with an internal error, or a triple fault."""
    guest.load(b"\xea\x00\x00\x00\x20")

    assert isinstance(guest.vcpu.run(), InternalError | Shutdown)


def test_an_error_of_kvm_run_is_named(guest: Guest) -> None:
    """A VM belongs to the process that made it.  In a child KVM_RUN fails with EIO."""
    guest.load(HLT)
    child = os.fork()
    if child == 0:
        try:
            guest.vcpu.run()
        except OSError as error:
            named = "KVM_RUN: Input/output error" in str(error)
            os._exit(errno.EIO if named else 254)
        finally:
            os._exit(255)

    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == errno.EIO


def test_the_dirty_log_names_the_pages_written(guest: Guest) -> None:
    """The guest writes to pages 2 and 5.  Reading the log clears it."""
    slot, gpa, size, hva, _ = next(iter(guest.memory.kvm_slots()))
    guest.vm.set_memory_region(slot, gpa, size, hva, abi.KVM_MEM_LOG_DIRTY_PAGES)
    guest.load(b"\xa2\x00\x20\xa2\x00\x50" + HLT)
    guest.vm.get_dirty_log(slot, size)

    assert guest.vcpu.run() == Hlt()

    dirty = int.from_bytes(guest.vm.get_dirty_log(slot, size), "little")
    assert dirty & (1 << 2 | 1 << 5 | 1 << 9) == 1 << 2 | 1 << 5
    assert guest.vm.get_dirty_log(slot, size) == bytes(8)


# ------------------------------------------------------------------ the end of a guest


def test_a_triple_fault_is_a_shutdown(guest: Guest) -> None:
    """The guest executes an undefined instruction in protected mode, with an empty interrupt table."""
    guest.load(b"\x0f\x0b")
    sregs = guest.vcpu.get_sregs()
    code = abi.kvm_segment(0, 0xFFFFFFFF, 8, 11, present=1, db=1, s=1, g=1)
    data = abi.kvm_segment(0, 0xFFFFFFFF, 16, 3, present=1, db=1, s=1, g=1)
    sregs.cs = code
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.cr0 |= 1
    sregs.idt.limit = 0
    guest.vcpu.set_sregs(sregs)

    assert guest.vcpu.run() == Shutdown()


# ------------------------------------------------------------------ kicks


def counter(guest: Guest) -> int:
    """Return the word that COUNT_FOR_EVER increments."""
    return int.from_bytes(guest.memory.read(COUNTER, 2), "little")


def test_a_kick_interrupts_a_guest_that_never_exits(guest: Guest) -> None:
    """After `clear_kick` the guest runs on at the same place."""
    guest.load(COUNT_FOR_EVER)
    for _ in range(20):
        before = counter(guest)
        runner = Runner(guest.vcpu)
        wait_until(lambda: counter(guest) != before)  # noqa: B023 - called before the next round
        guest.vcpu.kick()
        assert runner.join() == [Interrupted()]
        guest.vcpu.clear_kick()

    assert ENTRY <= guest.vcpu.get_regs().rip < ENTRY + len(COUNT_FOR_EVER)


def test_a_kick_before_the_run_is_not_lost(guest: Guest) -> None:
    """Each run returns before the first instruction, until the kick is cleared."""
    guest.load(COUNT_FOR_EVER)
    guest.vcpu.kick()

    assert [guest.vcpu.run(), guest.vcpu.run()] == [Interrupted(), Interrupted()]
    assert guest.vcpu.run_pio(lambda port, size: 0, lambda port, size, value: None) == Interrupted()
    assert counter(guest) == 0


def test_no_kick_is_lost_while_a_guest_exits(guest: Guest) -> None:
    """A guest exits all the time, so kicks come at any moment.  Each kick stops the loop once."""
    guest.load(out(0x80, 1) + b"\xeb\xfd")  # out dx, al; jmp back to it
    for _ in range(200):
        runner = Runner(guest.vcpu, lambda exit_: isinstance(exit_, PioOut))
        guest.vcpu.kick()
        assert runner.join()[-1] == Interrupted()
        guest.vcpu.clear_kick()


def test_a_kick_wakes_a_halted_guest(guest_with_chips: Guest) -> None:
    """With KVM's local APIC, HLT waits inside KVM_RUN."""
    guest_with_chips.load(b"\xff\x06\x00\x20\xf4")  # inc word [2000h]; hlt
    runner = Runner(guest_with_chips.vcpu)
    wait_until(lambda: counter(guest_with_chips) == 1)
    guest_with_chips.vcpu.kick()

    assert runner.join() == [Interrupted()]


def test_a_kick_after_the_thread_has_ended_sends_no_signal(guest: Guest) -> None:
    """Another thread may have the id of the ended one by then."""
    guest.load(HLT)
    assert Runner(guest.vcpu).join() == [Hlt()]

    guest.vcpu.kick()

    assert guest.vcpu.run() == Interrupted()


def test_complete_finishes_a_read_and_runs_no_instruction(guest: Guest) -> None:
    """The registers have the answer and the address of the next instruction, which was not executed."""
    guest.load(b"\xec" + COUNT_FOR_EVER, rdx=0x71)
    assert guest.vcpu.run() == PioIn(0x71, 1, 1)
    guest.vcpu.answer(b"\x99")

    assert guest.vcpu.complete() == Interrupted()

    regs = guest.vcpu.get_regs()
    assert (regs.rax, regs.rip) == (0x99, ENTRY + 1)
    assert counter(guest) == 0


def test_complete_leaves_a_string_read_between_two_items(guest: Guest) -> None:
    """The answered items are in memory, and rcx has the number of the others.  The guest reads them when it runs on."""
    total = 3000
    guest.load(b"\xf3\x6c" + HLT, rdx=0x511, rcx=total, rdi=0x3000)
    answered = 0
    exit_ = guest.vcpu.run()
    while isinstance(exit_, PioIn):
        guest.vcpu.answer(b"A" * exit_.count)
        answered += exit_.count
        exit_ = guest.vcpu.complete()
    assert exit_ == Interrupted()
    regs = guest.vcpu.get_regs()
    assert (regs.rcx, regs.rdi) == (total - answered, 0x3000 + answered)

    guest.vcpu.clear_kick()
    while isinstance(exit_ := guest.vcpu.run(), PioIn):
        guest.vcpu.answer(b"B" * exit_.count)

    assert exit_ == Hlt()
    assert guest.memory.read(0x3000, total) == b"A" * answered + b"B" * (total - answered)


def test_an_interrupted_run_finishes_the_read(guest: Guest) -> None:
    """After a kick between the exit and the next run the register still gets the answer."""
    guest.load(UNBACKED_DS + b"\xa1\x00\x00" + HLT)
    assert guest.vcpu.run() == MmioRead(0x20000, 2)
    guest.vcpu.answer(b"\x34\x12")
    guest.vcpu.kick()

    assert guest.vcpu.run() == Interrupted()

    regs = guest.vcpu.get_regs()
    assert (regs.rax, regs.rip) == (0x1234, ENTRY + len(UNBACKED_DS) + 3)


# ------------------------------------------------------------------ interrupts


def test_a_line_interrupts_a_halted_guest(guest_with_chips: Guest) -> None:
    """IRQ 5 reaches the handler through the 8259.  The handler writes to a port."""
    guest_with_chips.handle_irq5()
    guest_with_chips.load(PIC_SETUP + out(0x501, 1) + HALT_FOR_EVER)
    assert guest_with_chips.vcpu.run() == PioOut(0x501, 1, 1, b"\x01")

    guest_with_chips.vm.irq_line(5, 1)
    guest_with_chips.vm.irq_line(5, 0)

    assert guest_with_chips.vcpu.run() == PioOut(0x500, 1, 1, b"\x55")


def test_a_notification_and_its_interrupt_stay_in_the_kernel(guest_with_chips: Guest, eventfd: int) -> None:
    """`out` signals the ioeventfd, and the irqfd starts the handler, in a single KVM_RUN."""
    irq = os.eventfd(0, os.EFD_CLOEXEC)
    guest_with_chips.vm.assign_irqfd(irq, 5)
    guest_with_chips.vm.assign_ioeventfd(eventfd, 0x600, 2, datamatch=1, pio=True)
    guest_with_chips.handle_irq5()
    guest_with_chips.load(PIC_SETUP + out(0x600, 1, 2) + HALT_FOR_EVER)
    runner = Runner(guest_with_chips.vcpu)

    wait_readable(eventfd)
    os.eventfd_write(irq, 1)

    assert runner.join() == [PioOut(0x500, 1, 1, b"\x55")]
    assert os.eventfd_read(eventfd) == 1
    os.close(irq)


def test_a_write_that_does_not_match_exits(guest: Guest, eventfd: int) -> None:
    """A write of another value or width exits.  Once the ioeventfd is deassigned, every write exits."""
    vm = guest.vm
    vm.assign_ioeventfd(eventfd, 0x600, 2, datamatch=1, pio=True)
    guest.load(out(0x600, 2, 2) + out(0x600, 1, 1) + out(0x600, 1, 2) + HLT + out(0x600, 1, 2))

    assert guest.vcpu.run() == PioOut(0x600, 2, 1, b"\x02\x00")
    assert guest.vcpu.run() == PioOut(0x600, 1, 1, b"\x01")
    assert guest.vcpu.run() == Hlt()
    assert os.eventfd_read(eventfd) == 1

    vm.deassign_ioeventfd(eventfd, 0x600, 2, datamatch=1, pio=True)
    assert guest.vcpu.run() == PioOut(0x600, 2, 1, b"\x01\x00")
    with pytest.raises(FileNotFoundError, match="KVM_IOEVENTFD"):
        vm.deassign_ioeventfd(eventfd, 0x600, 2, datamatch=1, pio=True)


def test_a_memory_write_can_be_a_notification(guest: Guest, eventfd: int) -> None:
    """An ioeventfd of size 0 counts writes of any width.  A write to another address exits."""
    guest.vm.assign_ioeventfd(eventfd, 0x20000, 0)
    guest.load(UNBACKED_DS + b"\xa2\x00\x00\xa3\x00\x00\xa2\x04\x00" + HLT)

    assert guest.vcpu.run() == MmioWrite(0x20004, 1, b"\x00")
    assert os.eventfd_read(eventfd) == 2


def test_a_second_ioeventfd_at_an_address_is_refused(guest: Guest, eventfd: int) -> None:
    """The error is EEXIST, with the name of the request."""
    guest.vm.assign_ioeventfd(eventfd, 0x600, 2, datamatch=1, pio=True)

    with pytest.raises(FileExistsError, match="KVM_IOEVENTFD"):
        guest.vm.assign_ioeventfd(eventfd, 0x600, 2, datamatch=1, pio=True)


def test_a_deassigned_irqfd_counts_and_delivers_on_assignment(guest_with_chips: Guest) -> None:
    """So the eventfd is the pending bit of a masked vector."""
    irq = os.eventfd(0, os.EFD_CLOEXEC)
    guest_with_chips.vm.assign_irqfd(irq, 5)
    guest_with_chips.vm.deassign_irqfd(irq, 5)
    os.eventfd_write(irq, 1)
    guest_with_chips.handle_irq5()
    guest_with_chips.load(PIC_SETUP + out(0x501, 1) + b"\x90" * 64 + out(0x502, 2) + HALT_FOR_EVER)
    assert guest_with_chips.vcpu.run() == PioOut(0x501, 1, 1, b"\x01")
    assert guest_with_chips.vcpu.run() == PioOut(0x502, 1, 1, b"\x02")  # no interrupt yet

    guest_with_chips.vm.assign_irqfd(irq, 5)

    assert guest_with_chips.vcpu.run() == PioOut(0x500, 1, 1, b"\x55")
    os.close(irq)


def test_a_level_interrupt_signals_its_end(guest_with_chips: Guest, eventfd: int) -> None:
    """The resample eventfd counts EOIs.  After each EOI the interrupt can be raised again."""
    irq = os.eventfd(0, os.EFD_CLOEXEC)
    chip = guest_with_chips.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER)
    chip.chip.pic.elcr = 1 << 5
    guest_with_chips.vm.set_irqchip(chip)
    guest_with_chips.vm.assign_irqfd(irq, 5, resample_fd=eventfd)
    guest_with_chips.handle_irq5()
    guest_with_chips.load(PIC_SETUP + HALT_FOR_EVER)
    for _ in range(3):
        os.eventfd_write(irq, 1)
        assert guest_with_chips.vcpu.run() == PioOut(0x500, 1, 1, b"\x55")
        runner = Runner(guest_with_chips.vcpu)
        wait_readable(eventfd)
        assert os.eventfd_read(eventfd) == 1
        guest_with_chips.vcpu.kick()
        assert runner.join() == [Interrupted()]
        guest_with_chips.vcpu.clear_kick()
    os.close(irq)


def enable_lapic(guest: Guest) -> None:
    """Set the software enable bit of the spurious vector register."""
    lapic = bytearray(guest.vcpu.get_lapic())
    lapic[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
    guest.vcpu.set_lapic(bytes(lapic))


def test_a_route_leads_an_irqfd_to_a_message(guest_with_chips: Guest) -> None:
    """GSI 24, which belongs to no chip, is routed to vector 25h.  The table replaces all other routes."""
    irq = os.eventfd(0, os.EFD_CLOEXEC)
    routes = [chip_route(gsi, abi.KVM_IRQCHIP_IOAPIC, gsi) for gsi in range(abi.KVM_IOAPIC_NUM_PINS)]
    guest_with_chips.vm.set_gsi_routing([*routes, msi_route(24, 0xFEE00000, 0x25)])
    guest_with_chips.vm.assign_irqfd(irq, 24)
    enable_lapic(guest_with_chips)
    guest_with_chips.handle_irq5()
    guest_with_chips.load(b"\xfb" + out(0x501, 1) + HALT_FOR_EVER)
    assert guest_with_chips.vcpu.run() == PioOut(0x501, 1, 1, b"\x01")

    os.eventfd_write(irq, 1)

    assert guest_with_chips.vcpu.run() == PioOut(0x500, 1, 1, b"\x55")
    os.close(irq)


def test_an_application_processor_starts_after_a_retry(system: System, guest_with_chips: Guest) -> None:
    """It waits for INIT and SIPI inside KVM_RUN.  Then KVM_RUN returns, and must be called again."""
    second = guest_with_chips.add_vcpu(system, 1)
    assert second.get_mp_state() == abi.KVM_MP_STATE_UNINITIALIZED
    guest_with_chips.memory.write(0x3000, out(0x700, 0x77))  # SIPI vector 3
    guest_with_chips.load(
        b"\x66\xc7\x06\x00\x03\x00\x45\x0c\x00"  # mov dword [300h], C4500h: INIT to all but self
        b"\x66\xc7\x06\x00\x03\x03\x46\x0c\x00" + HALT_FOR_EVER  # ... C4603h: SIPI
    )
    sregs = guest_with_chips.vcpu.get_sregs()
    sregs.ds.base = 0xFEE00000
    guest_with_chips.vcpu.set_sregs(sregs)

    first = Runner(guest_with_chips.vcpu)
    exits = Runner(second, lambda exit_: exit_ == Retry()).join()
    guest_with_chips.vcpu.kick()

    assert exits[-1] == PioOut(0x700, 1, 1, b"\x77")
    assert exits[:-1] == [Retry()] * (len(exits) - 1)
    assert len(exits) > 1
    assert first.join() == [Interrupted()]
    assert second.get_mp_state() == abi.KVM_MP_STATE_RUNNABLE
    second.close()


def test_a_waiting_application_processor_can_be_kicked(system: System, guest_with_chips: Guest) -> None:
    """Pause and stop must reach a vCPU that was never started."""
    second = guest_with_chips.add_vcpu(system, 1)
    runner = Runner(second, lambda exit_: exit_ == Retry())
    second.kick()

    assert runner.join()[-1] == Interrupted()
    second.close()


# ------------------------------------------------------------------ state


def test_general_purpose_registers_can_be_set(guest: Guest) -> None:
    """They can be set as a structure, or as its bytes."""
    regs = abi.kvm_regs(*range(1, 17), ENTRY, 2)
    guest.vcpu.set_regs(regs)
    assert bytes(guest.vcpu.get_regs()) == bytes(regs)

    regs.r15 = 0xFFFFFFFFFFFFFFFF
    guest.vcpu.set_regs(bytes(regs))
    assert guest.vcpu.get_regs().r15 == 0xFFFFFFFFFFFFFFFF


def test_special_registers_and_debug_registers_can_be_set(guest: Guest) -> None:
    """A changed field of each structure is read back."""
    sregs = guest.vcpu.get_sregs()
    sregs.gs.base, sregs.gs.selector = 0x12340, 0x1234
    guest.vcpu.set_sregs(sregs)
    assert guest.vcpu.get_sregs().gs.base == 0x12340

    debug = guest.vcpu.get_debugregs()
    debug.db[1] = 0x4242
    guest.vcpu.set_debugregs(debug)
    assert guest.vcpu.get_debugregs().db[1] == 0x4242


def test_the_state_of_a_vcpu_can_be_copied_to_another(system: System, guest_with_chips: Guest) -> None:
    """The state that `send` reads can be set in another vCPU, which then returns the same."""
    guest_with_chips.load(b"\xb8\x34\x12" + out(0x80, 7) + HLT)
    guest_with_chips.vcpu.run()
    guest_with_chips.vcpu.complete()
    source = guest_with_chips.vcpu
    other = Guest(system, irqchip=True)
    target = other.vcpu
    msrs = source.get_msrs(system.msr_indices())

    target.set_cpuid2(system.supported_cpuid())
    target.set_sregs(bytes(source.get_sregs()))
    target.set_regs(bytes(source.get_regs()))
    target.set_xcrs(bytes(source.get_xcrs()))
    target.set_xsave(source.get_xsave())
    refused = target.set_msrs(msrs)
    target.set_lapic(source.get_lapic())
    target.set_mp_state(source.get_mp_state())
    target.set_vcpu_events(bytes(source.get_vcpu_events()))
    target.set_debugregs(bytes(source.get_debugregs()))

    assert refused == []
    assert len(msrs) > 20
    assert set(msrs) <= set(system.msr_indices())
    for state in ("regs", "sregs", "xcrs", "vcpu_events", "debugregs"):
        assert bytes(getattr(target, f"get_{state}")()) == bytes(getattr(source, f"get_{state}")()), state
    assert target.get_xsave() == source.get_xsave()
    assert len(target.get_xsave()) >= 4096
    assert target.get_lapic()[:0x390] == source.get_lapic()[:0x390]  # then comes the timer's count, which changes
    assert target.get_mp_state() == source.get_mp_state()
    assert target.get_tsc_khz() == source.get_tsc_khz() > 0
    other.close()


def test_an_unknown_msr_is_skipped(guest: Guest) -> None:
    """All other MSRs are read and set, before and after the unknown one in the list."""
    sysenter_cs, unknown, sysenter_esp = 0x174, 0x12345678, 0x175

    assert guest.vcpu.set_msrs({sysenter_cs: 8, unknown: 1, sysenter_esp: 0x7000}) == [unknown]
    assert guest.vcpu.get_msrs([sysenter_cs, unknown, sysenter_esp]) == {sysenter_cs: 8, sysenter_esp: 0x7000}
    many = [unknown, *[sysenter_cs] * 300, unknown, sysenter_esp, unknown]
    assert guest.vcpu.get_msrs(many) == {sysenter_cs: 8, sysenter_esp: 0x7000}


def test_an_xsave_area_of_another_host_is_refused(guest: Guest) -> None:
    """The length of the area depends on the features of the processor."""
    with pytest.raises(ValueError, match="xsave area of 100 bytes, not"):
        guest.vcpu.set_xsave(bytes(100))


def test_interrupt_controllers_pit_and_clock_can_be_set(guest_with_chips: Guest) -> None:
    """The state that is set is read back."""
    vm = guest_with_chips.vm
    for chip_id in (abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC):
        chip = vm.get_irqchip(chip_id)
        vm.set_irqchip(bytes(chip))
        assert bytes(vm.get_irqchip(chip_id)) == bytes(chip)
    chip = vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    assert chip.chip.ioapic.base_address == 0xFEC00000
    chip.chip.ioapic.redirtbl[11] = 0x1A035
    vm.set_irqchip(chip)
    assert vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[11] == 0x1A035

    pit = vm.get_pit2()
    pit.channels[2].mode, pit.channels[2].count = 3, 1193
    vm.set_pit2(bytes(pit))
    assert (vm.get_pit2().channels[2].mode, vm.get_pit2().channels[2].count) == (3, 1193)

    vm.set_clock(5_000_000_000)
    assert 5_000_000_000 <= vm.get_clock().clock < 5_000_000_000 + DEADLINE_S * 1e9


def test_translate_in_real_mode(guest: Guest) -> None:
    """Without paging a linear address is a physical one."""
    assert guest.vcpu.translate(0x1234) == 0x1234
