"""Exits are decoded from a run page, which the tests fill in with the C structure."""

import ctypes

import pytest

from vmd.kvmapi import abi
from vmd.kvmapi.exits import (
    FailEntry,
    Hlt,
    InternalError,
    Interrupted,
    IoapicEoi,
    IrqWindowOpen,
    MmioRead,
    MmioWrite,
    PioIn,
    PioOut,
    Shutdown,
    SystemEvent,
    Unknown,
    decode,
)


def page_of(run: abi.kvm_run, pio_data: bytes = b"") -> bytes:
    """Return the first two pages of a vCPU's mapping."""
    return bytes(run).ljust(4096, b"\xee") + pio_data.ljust(4096, b"\xee")


def test_a_port_write_carries_its_data() -> None:
    """The data of a string access has all its elements."""
    run = abi.kvm_run(exit_reason=abi.KVM_EXIT_IO)
    run.io = abi.kvm_run_io(abi.KVM_EXIT_IO_OUT, 2, 0x3F8, 3, 4096)

    assert decode(page_of(run, b"abcdefgh")) == PioOut(0x3F8, 2, 3, b"abcdef")


def test_a_port_read_has_port_size_and_count() -> None:
    """The exit has the three values of the structure."""
    run = abi.kvm_run(exit_reason=abi.KVM_EXIT_IO)
    run.io = abi.kvm_run_io(abi.KVM_EXIT_IO_IN, 4, 0xCFC, 7, 4096)

    assert decode(page_of(run)) == PioIn(0xCFC, 4, 7)


def test_memory_accesses_carry_address_and_data() -> None:
    """A write has as many bytes as its length."""
    run = abi.kvm_run(exit_reason=abi.KVM_EXIT_MMIO)
    run.mmio = abi.kvm_run_mmio(0xFEB00010, (abi.u8 * 8)(*b"12345678"), 4, 1)
    assert decode(page_of(run)) == MmioWrite(0xFEB00010, 4, b"1234")

    run.mmio.is_write = 0
    assert decode(page_of(run)) == MmioRead(0xFEB00010, 4)


def test_an_emulation_failure_shows_the_instruction() -> None:
    """Flag, length and bytes are in the array of numbers."""
    run = abi.kvm_run(exit_reason=abi.KVM_EXIT_INTERNAL_ERROR)
    run.internal.suberror = abi.KVM_INTERNAL_ERROR_EMULATION
    run.internal.ndata = 3
    run.internal.data[0] = abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    run.internal.data[1] = int.from_bytes(b"\x03\x0f\x01\xca\0\0\0\0", "little")

    error = decode(page_of(run))

    assert isinstance(error, InternalError)
    assert error.suberror == 1
    assert error.instruction == b"\x0f\x01\xca"


@pytest.mark.parametrize(("length", "shown"), [(0, 0), (7, 7), (8, 8), (15, 15), (16, 15), (255, 15)])
def test_all_bytes_of_an_instruction_are_shown(length: int, shown: int) -> None:
    """An instruction has at most 15 bytes, which two numbers hold together with their length."""
    raw = bytes((length, *range(0x41, 0x50)))
    data = (1, int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little"))
    assert InternalError(abi.KVM_INTERNAL_ERROR_EMULATION, data).instruction == raw[1 : 1 + shown]


@pytest.mark.parametrize("data", [(), (1,), (0, 3, 0)])
def test_an_internal_error_without_instruction_bytes_shows_none(data: tuple[int, ...]) -> None:
    """Older kernels give no bytes.  With other suberrors the numbers have other meanings."""
    assert InternalError(abi.KVM_INTERNAL_ERROR_EMULATION, data).instruction == b""
    assert InternalError(abi.KVM_INTERNAL_ERROR_DELIVERY_EV, (1, 3, 0)).instruction == b""


def test_a_count_beyond_the_structure_is_cut() -> None:
    """If the kernel claims more data than its array has, we do not read beyond the array."""
    run = abi.kvm_run(exit_reason=abi.KVM_EXIT_INTERNAL_ERROR)
    run.internal.ndata = 1000

    error = decode(page_of(run))

    assert isinstance(error, InternalError)
    assert len(error.data) == 16


def test_the_other_exits_carry_their_fields() -> None:
    """One exit of each kind is decoded."""
    run = abi.kvm_run(exit_reason=abi.KVM_EXIT_SYSTEM_EVENT)
    run.system_event = abi.kvm_run_system_event(abi.KVM_SYSTEM_EVENT_RESET, 1, (abi.u64 * 16)(5))
    assert decode(page_of(run)) == SystemEvent(abi.KVM_SYSTEM_EVENT_RESET, (5,))

    run = abi.kvm_run(exit_reason=abi.KVM_EXIT_FAIL_ENTRY)
    run.fail_entry = abi.kvm_run_fail_entry(0x80000021, 3)
    assert decode(page_of(run)) == FailEntry(0x80000021, 3)

    run = abi.kvm_run(exit_reason=abi.KVM_EXIT_IOAPIC_EOI)
    run.eoi.vector = 0x31
    assert decode(page_of(run)) == IoapicEoi(0x31)

    run = abi.kvm_run(exit_reason=abi.KVM_EXIT_UNKNOWN)
    run.hw.hardware_exit_reason = 77
    assert decode(page_of(run)) == Unknown(abi.KVM_EXIT_UNKNOWN, 77)
    assert decode(page_of(abi.kvm_run(exit_reason=4711))) == Unknown(4711, 0)

    for reason, expected in (
        (abi.KVM_EXIT_HLT, Hlt()),
        (abi.KVM_EXIT_SHUTDOWN, Shutdown()),
        (abi.KVM_EXIT_IRQ_WINDOW_OPEN, IrqWindowOpen()),
        (abi.KVM_EXIT_INTR, Interrupted()),
    ):
        assert decode(page_of(abi.kvm_run(exit_reason=reason))) == expected


def test_exits_are_frozen_and_differ_by_class() -> None:
    """Exits of two classes with the same values are not equal."""
    exit_ = PioIn(0x60, 1, 1)

    with pytest.raises(AttributeError):
        exit_.port = 1  # type: ignore[misc]
    alike: list[object] = [InternalError(5, (1,)), SystemEvent(5, (1,)), MmioRead(6, 1), FailEntry(6, 1)]
    empty: list[object] = [Hlt(), Shutdown(), IrqWindowOpen(), Interrupted()]
    assert len({*alike, *empty}) == 8
    assert alike[0] != alike[1]
    assert all(empty)
    assert hash(PioIn(1, 1, 1)) == hash(PioIn(1, 1, 1))
    assert repr(exit_) == "PioIn(port=96, size=1, count=1)"
    assert exit_.count == 1
    with pytest.raises(TypeError, match="PioIn takes 3 values, not 1"):
        PioIn(1)  # type: ignore[call-arg]


def test_the_run_page_fits_before_the_data_page() -> None:
    """Our structure must not overlap the page of port data."""
    assert ctypes.sizeof(abi.kvm_run) < 4096
