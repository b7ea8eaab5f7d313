"""The thread of a vCPU: who serves an exit, when the VM ends, and what the log says of it."""

import sys
from typing import Any, cast

import pytest

from vmd.guestmem import GuestMemory, RegionSpec
from vmd.ipc.messages.vm import Outcome
from vmd.kvmapi import abi
from vmd.kvmapi.exits import (
    RETRY,
    Exit,
    FailEntry,
    Hlt,
    InternalError,
    IoapicEoi,
    MmioRead,
    MmioWrite,
    PioIn,
    PioOut,
    Shutdown,
    SystemEvent,
)
from vmd.units import PAGE
from vmd.vm.boot.start import Mode, Segment, Start
from vmd.vm.vcpu import VcpuThread, apply_start, set_boot_msrs


class FakeVcpu:
    """A vCPU with these exits, the last one for ever."""

    def __init__(self, *exits: Exit | Exception) -> None:
        self.left = list(exits)
        self.log: list[Any] = []
        self.exits = 0
        self.regs, self.sregs = abi.kvm_regs(), abi.kvm_sregs()
        self.mapped: dict[int, int] = {}
        self.refused: list[int] = []

    def run_pio(self, *_: object) -> Exit:
        """Run until the next exit."""
        found = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        if isinstance(found, Exception):
            raise found
        return found

    def answer(self, data: bytes) -> None:
        """Take an answer."""
        self.log.append(data)

    def bind_thread(self) -> None:
        """Note it."""
        self.log.append("bind")

    def unbind_thread(self) -> None:
        """Note it."""
        self.log.append("unbind")

    def kick(self) -> None:
        """Do nothing."""

    clear_kick = kick

    def get_regs(self) -> abi.kvm_regs:
        """Return registers."""
        return self.regs

    def get_sregs(self) -> abi.kvm_sregs:
        """Return registers."""
        return self.sregs

    def set_regs(self, regs: abi.kvm_regs) -> None:
        """Set registers."""
        self.regs = regs
        self.log.append("regs")

    def set_sregs(self, sregs: abi.kvm_sregs) -> None:
        """Set registers."""
        self.sregs = sregs
        self.log.append("sregs")

    def set_msrs(self, values: dict[int, int]) -> list[int]:
        """Set MSRs."""
        self.log.append(values)
        return self.refused

    def translate(self, linear: int) -> int | None:
        """Return a physical address."""
        return self.mapped.get(linear)


class Bus:
    """Notes accesses, and answers reads."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.pio_read = self.pio_write = None

    def mmio_read(self, gpa: int, size: int) -> int:
        """Read."""
        self.log.append(("mmio read", gpa, size))
        return 0x1234

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """Write."""
        self.log.append(("mmio write", gpa, size, value))

    def pio_read_string(self, port: int, size: int, count: int) -> bytes:
        """Read."""
        self.log.append(("pio read", port, size, count))
        return bytes(size * count)

    def pio_write_string(self, port: int, size: int, data: bytes) -> None:
        """Write."""
        self.log.append(("pio write", port, size, data))


Run = tuple[FakeVcpu, Bus, list[tuple[Outcome, str]]]


def run(*exits: Exit | Exception, vcpu: FakeVcpu | None = None) -> Run:
    """Run a vCPU to its end."""
    vcpu, bus = vcpu or FakeVcpu(*exits), Bus()
    ends: list[tuple[Outcome, str]] = []
    with GuestMemory.create((RegionSpec(gpa=0, size=PAGE, name="ram"),)) as memory:
        memory.write(0x100, bytes(range(16)))
        thread = VcpuThread(2, cast("Any", vcpu), cast("Any", bus), memory, lambda *end: ends.append(end))
        thread.start()
        assert thread.join()
    return vcpu, bus, ends


def test_accesses_reach_the_bus() -> None:
    """A read is answered with as many bytes as it asks for."""
    vcpu, bus, ends = run(
        MmioRead(0xFEB00000, 4), MmioWrite(0xFEB00004, 2, b"\x34\x12"), PioIn(0x1F0, 2, 3), PioOut(0x3F8, 1, 2, b"ab"),
        RETRY, Hlt(), Shutdown(),
    )  # fmt: skip
    assert bus.log == [
        ("mmio read", 0xFEB00000, 4), ("mmio write", 0xFEB00004, 2, 0x1234), ("pio read", 0x1F0, 2, 3),
        ("pio write", 0x3F8, 1, b"ab"),
    ]  # fmt: skip
    assert vcpu.log == ["bind", b"\x34\x12\0\0", bytes(6), "unbind"]
    assert ends == [(Outcome.REBOOT, "triple fault")]


@pytest.mark.parametrize("exit_", [Shutdown(), SystemEvent(1, ())])
def test_a_triple_fault_is_a_reset(exit_: Exit) -> None:
    """As on a PC.  Some kernels report it by a system event."""
    assert run(exit_)[2] == [(Outcome.REBOOT, "triple fault")]


@pytest.mark.parametrize(("exit_", "text"), [
    (InternalError(3, (1, 0xFF)), "vcpu 2: KVM internal error 3 (0x1 0xff)"),
    (FailEntry(0x80000021, 1), "vcpu 2: entry to the guest failed, hardware reason 0x80000021 on cpu 1"),
    (IoapicEoi(3), "vcpu 2: unexpected exit IoapicEoi(vector=3)"),
    (OSError(14, "KVM_RUN: Bad address"), "vcpu 2: [Errno 14] KVM_RUN: Bad address"),
])  # fmt: skip
def test_a_vcpu_that_cannot_run_any_more_ends_the_vm(exit_: Exit | Exception, text: str) -> None:
    """The sentence names what KVM has reported."""
    vcpu, _, ends = run(exit_)
    assert ends == [(Outcome.FAILED, text)]
    assert vcpu.log[-1] == "unbind"


def test_a_mistake_of_ours_ends_the_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else would notice that the thread has died."""
    shown: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    vcpu, _, ends = run(RuntimeError("a mistake"))
    assert ends == [(Outcome.FAILED, "vcpu 2: internal error: RuntimeError: a mistake")]
    assert vcpu.log[-1] == "unbind"


@pytest.mark.parametrize(("efer", "base", "linear"), [(0, 0xF0000, 0xF0100), (0x500, 0xF0000, 0x100)])
def test_the_log_shows_where_a_vcpu_has_stopped(
    capfd: pytest.CaptureFixture[str], efer: int, base: int, linear: int
) -> None:
    """Its registers, and the code at its instruction pointer.  In long mode the base of CS does not count."""
    vcpu = FakeVcpu(InternalError(1, ()))
    vcpu.regs.rip, vcpu.regs.r15 = 0x100, 0xABCDEF
    vcpu.sregs.cs.base, vcpu.sregs.cs.selector, vcpu.sregs.efer = base, 0x10, efer
    vcpu.sregs.gdt.base, vcpu.sregs.gdt.limit, vcpu.sregs.cr2 = 0x5000, 0x27, 0xDEAD
    vcpu.mapped = {linear: 0x100}
    run(vcpu=vcpu)

    shown = capfd.readouterr().err
    for part in (
        "rip=0000000000000100", "r15=0000000000abcdef", "cs=0010 base=00000000000f0000", "cr2=dead",
        "gdt=0000000000005000/0027", "code at rip: 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f\n",
    ):  # fmt: skip
        assert part in shown, part
    names = [field[0] for field in abi.kvm_regs._fields_]
    assert all(f"{name}=" in shown for name in names)
    counts = [sum(f"{name}=0" in line for name in names) for line in shown.splitlines()]
    assert [count for count in counts if count > 1] == [4, 4, 4, 4, 2]  # registers on each line


@pytest.mark.parametrize(("mapped", "text"), [({}, "not mapped"), ({0: 1 << 40}, "not readable")])
def test_code_that_cannot_be_read(capfd: pytest.CaptureFixture[str], mapped: dict[int, int], text: str) -> None:
    """The log says so, and the VM ends with its reason."""
    vcpu = FakeVcpu(InternalError(1, ()))
    vcpu.mapped = mapped
    assert run(vcpu=vcpu)[2][0][1].startswith("vcpu 2: KVM internal error 1")
    assert f"code at rip: {text}" in capfd.readouterr().err


@pytest.mark.parametrize(("direct_boot", "wanted"), [(False, {0x1A0: 1}), (True, {0x1A0: 1, 0x2FF: 0x806})])
def test_memory_is_cached_and_strings_are_fast(direct_boot: bool, wanted: dict[int, int]) -> None:
    """On each vCPU, by IA32_MISC_ENABLE and IA32_MTRR_DEF_TYPE.  Firmware sets the latter itself."""
    vcpus = [FakeVcpu(), FakeVcpu()]
    vcpus[0].refused = [0x2FF]  # a host may lack it
    set_boot_msrs(cast("Any", vcpus), direct_boot=direct_boot)
    assert [vcpu.log for vcpu in vcpus] == [[wanted], [wanted]]


def test_firmware_starts_as_after_a_reset() -> None:
    """No register is set."""
    vcpu = FakeVcpu()
    apply_start(cast("Any", vcpu), Start(mode=Mode.REAL_RESET, text=""))
    assert vcpu.log == []


def test_a_kernel_starts_in_the_state_that_it_expects() -> None:
    """Registers, segments and tables are the loader's.  Other registers are zero."""
    vcpu = FakeVcpu()
    vcpu.regs.rbx = 77
    start = Start(
        mode=Mode.LONG64, text="", cr0=1, cr3=2, cr4=3, efer=4, gdt_base=5, gdt_limit=6, idt_base=7, idt_limit=8,
        segments={"cs": Segment(selector=0x10, type=11, l=1), "ss": Segment(selector=0x18, type=3, limit=9)},
        registers={"rip": 0x1000, "rsi": 0x7000},
    )  # fmt: skip
    apply_start(cast("Any", vcpu), start)

    sregs, regs = vcpu.sregs, vcpu.regs
    assert (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == (1, 2, 3, 4)
    assert (sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit) == (5, 6, 7, 8)
    assert (sregs.cs.selector, sregs.cs.type, sregs.cs.l, sregs.cs.limit) == (0x10, 11, 1, 0xFFFFFFFF)
    assert (sregs.ss.selector, sregs.ss.type, sregs.ss.limit) == (0x18, 3, 9)
    assert (regs.rip, regs.rsi, regs.rbx) == (0x1000, 0x7000, 0)
    assert vcpu.log == ["sregs", "regs"]
