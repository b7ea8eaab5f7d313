"""The reasons for which KVM_RUN returns: a frozen class for each, and how they are decoded from the run page.

For a type checker the classes are frozen dataclasses.  They are implemented as tuples, which are the fastest frozen
objects to build.  So a VM process need not import `dataclasses`, which compiles source text at every start.
"""

from operator import itemgetter
from struct import Struct

from vmd.kvmapi.abi import (
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_HLT,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR,
    KVM_EXIT_IO,
    KVM_EXIT_IO_OUT,
    KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_IRQ_WINDOW_OPEN,
    KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_UNKNOWN,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    kvm_run,
    kvm_run_mmio,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from typing import dataclass_transform

    @dataclass_transform(frozen_default=True)
    class _Frozen:
        """Stands in for the class below: annotations are fields, and values are given by position."""

else:

    class _FrozenType(type):
        def __new__(mcls, name, bases, namespace):  # noqa: ANN001, ANN204
            fields = tuple(namespace.get("__annotations__", ()))
            getters = {field: property(itemgetter(index)) for index, field in enumerate(fields)}
            slots = {"__slots__": (), "__match_args__": fields}
            return super().__new__(mcls, name, bases, {**namespace, **getters, **slots})

    class _Frozen(tuple, metaclass=_FrozenType):
        def __new__(cls, *values):  # noqa: ANN002, ANN204
            if len(values) != len(cls.__match_args__):
                raise TypeError(f"{cls.__name__} takes {len(cls.__match_args__)} values, not {len(values)}")
            return tuple.__new__(cls, values)

        def __eq__(self, other):  # noqa: ANN001, ANN204
            return type(self) is type(other) and tuple.__eq__(self, other)

        def __ne__(self, other):  # noqa: ANN001, ANN204
            return not self == other

        def __hash__(self):  # noqa: ANN204
            return hash((type(self), *self))

        def __bool__(self):  # noqa: ANN204
            return True  # also for an exit without fields, which is an empty tuple

        def __repr__(self):  # noqa: ANN204
            values = (f"{field}={value!r}" for field, value in zip(self.__match_args__, self, strict=True))
            return f"{type(self).__name__}({', '.join(values)})"


class PioIn(_Frozen):
    """The guest reads `count` items of `size` (1, 2 or 4) bytes from one port.  Reply with Vcpu.answer.

    `count` is more than 1 for string instructions only.
    """

    port: int
    size: int
    count: int


class PioOut(_Frozen):
    """The guest writes `data`, which is `count` items of `size` bytes, to one port."""

    port: int
    size: int
    count: int
    data: bytes


class MmioRead(_Frozen):
    """The guest reads 1 to 8 bytes at an address without a memory slot.  Reply with Vcpu.answer."""

    gpa: int
    size: int


class MmioWrite(_Frozen):
    """The guest writes to an address without a memory slot, or with a read-only one."""

    gpa: int
    size: int
    data: bytes


class Hlt(_Frozen):
    """The guest halts.  With an in-kernel local APIC KVM waits itself, and there is no such exit."""


class Shutdown(_Frozen):
    """A triple fault."""


class IrqWindowOpen(_Frozen):
    """The guest can take an interrupt again, which request_interrupt_window has asked for."""


class IoapicEoi(_Frozen):
    """A level-triggered interrupt has ended.  This exit occurs only without an in-kernel I/O APIC."""

    vector: int


class SystemEvent(_Frozen):
    """A KVM_SYSTEM_EVENT_*.  `data` depends on the type."""

    type: int
    data: tuple[int, ...]


class InternalError(_Frozen):
    """KVM cannot go on: KVM_INTERNAL_ERROR_*.  `data` is for a log only, except for what `instruction` reads."""

    suberror: int
    data: tuple[int, ...]

    @property
    def instruction(self) -> bytes:
        """The bytes at RIP that could not be emulated; empty if KVM does not give them."""
        if self.suberror != KVM_INTERNAL_ERROR_EMULATION or len(self.data) < 3:
            return b""
        if not self.data[0] & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            return b""
        raw = self.data[1].to_bytes(8, "little") + self.data[2].to_bytes(8, "little")
        return raw[1 : 1 + min(raw[0], 15)]


class FailEntry(_Frozen):
    """The processor refused the guest's state.  `reason` is the number that the hardware gives."""

    reason: int
    cpu: int


class Interrupted(_Frozen):
    """A kick or another signal.  Any I/O of the guest that was under way is complete."""


class Retry(_Frozen):
    """Nothing happened: run again.  KVM reports this for an application processor that was just started."""


class Unknown(_Frozen):
    """An unexpected reason: KVM_EXIT_* and, for KVM_EXIT_UNKNOWN, the number that the hardware gives."""

    reason: int
    hardware: int


Exit = (
    PioIn
    | PioOut
    | MmioRead
    | MmioWrite
    | Hlt
    | Shutdown
    | IrqWindowOpen
    | IoapicEoi
    | SystemEvent
    | InternalError
    | FailEntry
    | Interrupted
    | Retry
    | Unknown
)

INTERRUPTED = Interrupted()
RETRY = Retry()

UNION = kvm_run.exit.offset
MMIO_DATA = UNION + kvm_run_mmio.data.offset

# Reason and kvm_run.io in one Struct: reason, direction, size, port, count, data offset.
_REASON_TO_UNION = UNION - kvm_run.exit_reason.offset - 4
REASON_IO = Struct(f"<{kvm_run.exit_reason.offset}xI{_REASON_TO_UNION}xBBHIQ")
_REASON = Struct(f"<{kvm_run.exit_reason.offset}xI")
_MMIO = Struct("<Q8sIB")
_U64 = Struct("<Q")
_U64_U32 = Struct("<QI")
_U32_U32 = Struct("<II")


def _counted(page: "bytes | mmap.mmap") -> tuple[int, tuple[int, ...]]:
    """Read a u32, a count of at most 16, and so many u64: the layout of kvm_run.internal and .system_event."""
    first, count = _U32_U32.unpack_from(page, UNION)
    return first, Struct(f"<{min(count, 16)}Q").unpack_from(page, UNION + _U32_U32.size)


def _mmio(page: "bytes | mmap.mmap") -> MmioRead | MmioWrite:
    gpa, data, size, is_write = _MMIO.unpack_from(page, UNION)
    return MmioWrite(gpa, size, data[:size]) if is_write else MmioRead(gpa, size)


def _io(page: "bytes | mmap.mmap") -> PioIn | PioOut:
    _, direction, size, port, count, start = REASON_IO.unpack_from(page)
    if direction == KVM_EXIT_IO_OUT:
        return PioOut(port, size, count, page[start : start + size * count])
    return PioIn(port, size, count)


_DECODERS: "dict[int, Callable[[bytes | mmap.mmap], Exit]]" = {
    KVM_EXIT_IO: _io,
    KVM_EXIT_MMIO: _mmio,
    KVM_EXIT_HLT: lambda page: Hlt(),
    KVM_EXIT_SHUTDOWN: lambda page: Shutdown(),
    KVM_EXIT_IRQ_WINDOW_OPEN: lambda page: IrqWindowOpen(),
    KVM_EXIT_INTR: lambda page: INTERRUPTED,
    KVM_EXIT_INTERNAL_ERROR: lambda page: InternalError(*_counted(page)),
    KVM_EXIT_SYSTEM_EVENT: lambda page: SystemEvent(*_counted(page)),
    KVM_EXIT_FAIL_ENTRY: lambda page: FailEntry(*_U64_U32.unpack_from(page, UNION)),
    KVM_EXIT_IOAPIC_EOI: lambda page: IoapicEoi(page[UNION]),
    KVM_EXIT_UNKNOWN: lambda page: Unknown(KVM_EXIT_UNKNOWN, *_U64.unpack_from(page, UNION)),
}


def decode(page: "bytes | mmap.mmap") -> Exit:
    """Return the exit that KVM_RUN has described in the run page."""
    (reason,) = _REASON.unpack_from(page)
    decoder = _DECODERS.get(reason)
    return decoder(page) if decoder is not None else Unknown(reason, 0)
