"""<linux/kvm.h> for x86-64: request numbers, structures, constants, and the call that uses them.

All names are those of C.  Request numbers are computed from the structures.  A test compares numbers, sizes and offsets
with the kernel's header.  `api.rst N` is a section of the kernel's KVM API document.
"""

import errno
import fcntl
import os

from vmd import native

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import _CData as CData
    from typing import TypeVar

    S = TypeVar("S", bound=native.Structure)

u8, u16, u32, u64 = native.c_uint8, native.c_uint16, native.c_uint32, native.c_uint64
s32, s64 = native.c_int32, native.c_int64

KVM_API_VERSION = 12
KVM_PIO_PAGE_OFFSET = 1  # page of the vCPU mapping that has the data of port I/O; page 0 has kvm_run


# ------------------------------------------------------------------ vCPU registers


class kvm_regs(native.Structure):
    """General purpose registers (api.rst 4.11)."""

    _fields_ = [(name, u64) for name in (
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
        "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags")]  # fmt: skip


class kvm_segment(native.Structure):
    """A segment register with its hidden part.  `limit` is in bytes for both values of `g`."""

    _fields_ = [("base", u64), ("limit", u32), ("selector", u16), ("type", u8), ("present", u8), ("dpl", u8),
                ("db", u8), ("s", u8), ("l", u8), ("g", u8), ("avl", u8), ("unusable", u8),
                ("padding", u8)]  # fmt: skip


class kvm_dtable(native.Structure):
    """GDTR or IDTR."""

    _fields_ = [("base", u64), ("limit", u16), ("padding", u16 * 3)]


class kvm_sregs(native.Structure):
    """Segment, table and control registers (api.rst 4.13)."""

    _fields_ = [
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", kvm_dtable), ("idt", kvm_dtable),
        *((name, u64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", u64 * 4)]  # fmt: skip


class kvm_xsave(native.Structure):
    """The XSAVE area of fixed size (api.rst 4.42).  For the longer one see Vcpu.get_xsave."""

    _fields_ = [("region", u32 * 1024)]


class kvm_xcr(native.Structure):
    """One extended control register."""

    _fields_ = [("xcr", u32), ("reserved", u32), ("value", u64)]


class kvm_xcrs(native.Structure):
    """All extended control registers.  Only XCR0 exists (api.rst 4.44)."""

    _fields_ = [("nr_xcrs", u32), ("flags", u32), ("xcrs", kvm_xcr * 16), ("padding", u64 * 16)]


class kvm_msr_entry(native.Structure):
    """One model-specific register."""

    _fields_ = [("index", u32), ("reserved", u32), ("data", u64)]


class kvm_msrs(native.Structure):
    """Header of an array of kvm_msr_entry (api.rst 4.18)."""

    _fields_ = [("nmsrs", u32), ("pad", u32)]


class kvm_msr_list(native.Structure):
    """Header of an array of u32 indices (api.rst 4.3)."""

    _fields_ = [("nmsrs", u32)]


class kvm_msr_index(native.Structure):
    """One element of the array behind kvm_msr_list.  In C it is a plain u32."""

    _fields_ = [("index", u32)]


class kvm_cpuid_entry2(native.Structure):
    """One CPUID leaf, or one sub-leaf with KVM_CPUID_FLAG_SIGNIFCANT_INDEX."""

    _fields_ = [("function", u32), ("index", u32), ("flags", u32), ("eax", u32), ("ebx", u32), ("ecx", u32),
                ("edx", u32), ("padding", u32 * 3)]  # fmt: skip


class kvm_cpuid2(native.Structure):
    """Header of an array of kvm_cpuid_entry2 (api.rst 4.46)."""

    _fields_ = [("nent", u32), ("padding", u32)]


class kvm_lapic_state(native.Structure):
    """The first quarter of the local APIC's register page, which has all registers (api.rst 4.57)."""

    _fields_ = [("regs", u8 * 0x400)]


class kvm_mp_state(native.Structure):
    """Whether a vCPU runs, halts or waits to be started (api.rst 4.38)."""

    _fields_ = [("mp_state", u32)]


class kvm_vcpu_events_exception(native.Structure):
    """kvm_vcpu_events.exception."""

    _fields_ = [("injected", u8), ("nr", u8), ("has_error_code", u8), ("pending", u8), ("error_code", u32)]


class kvm_vcpu_events_interrupt(native.Structure):
    """kvm_vcpu_events.interrupt."""

    _fields_ = [("injected", u8), ("nr", u8), ("soft", u8), ("shadow", u8)]


class kvm_vcpu_events_nmi(native.Structure):
    """kvm_vcpu_events.nmi."""

    _fields_ = [("injected", u8), ("pending", u8), ("masked", u8), ("pad", u8)]


class kvm_vcpu_events_smi(native.Structure):
    """kvm_vcpu_events.smi."""

    _fields_ = [("smm", u8), ("pending", u8), ("smm_inside_nmi", u8), ("latched_init", u8)]


class kvm_vcpu_events_triple_fault(native.Structure):
    """kvm_vcpu_events.triple_fault."""

    _fields_ = [("pending", u8)]


class kvm_vcpu_events(native.Structure):
    """Exceptions, interrupts and NMIs that are under way (api.rst 4.31)."""

    _fields_ = [("exception", kvm_vcpu_events_exception), ("interrupt", kvm_vcpu_events_interrupt),
                ("nmi", kvm_vcpu_events_nmi), ("sipi_vector", u32), ("flags", u32),
                ("smi", kvm_vcpu_events_smi), ("triple_fault", kvm_vcpu_events_triple_fault),
                ("reserved", u8 * 26), ("exception_has_payload", u8), ("exception_payload", u64)]  # fmt: skip


class kvm_debugregs(native.Structure):
    """Debug registers (api.rst 4.33)."""

    _fields_ = [("db", u64 * 4), ("dr6", u64), ("dr7", u64), ("flags", u64), ("reserved", u64 * 9)]


class kvm_translation(native.Structure):
    """A linear address, and its physical address by the vCPU's page tables (api.rst 4.15)."""

    _fields_ = [("linear_address", u64), ("physical_address", u64), ("valid", u8), ("writeable", u8),
                ("usermode", u8), ("pad", u8 * 5)]  # fmt: skip


# ------------------------------------------------------------------ the machine


class kvm_userspace_memory_region(native.Structure):
    """A memory slot (api.rst 4.35)."""

    _fields_ = [("slot", u32), ("flags", u32), ("guest_phys_addr", u64), ("memory_size", u64),
                ("userspace_addr", u64)]  # fmt: skip


class kvm_dirty_log(native.Structure):
    """A request for a slot's dirty bitmap (api.rst 4.8).  C has a union of a pointer and a u64 for its address."""

    _fields_ = [("slot", u32), ("padding1", u32), ("dirty_bitmap", u64)]


class kvm_pic_state(native.Structure):
    """One 8259A."""

    _fields_ = [(name, u8) for name in (
        "last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll",
        "special_mask", "init_state", "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested_mode",
        "init4", "elcr", "elcr_mask")]  # fmt: skip


class kvm_ioapic_state(native.Structure):
    """The I/O APIC.  A redirection entry is a plain u64 here."""

    _fields_ = [("base_address", u64), ("ioregsel", u32), ("id", u32), ("irr", u32), ("pad", u32),
                ("redirtbl", u64 * 24)]  # fmt: skip


class kvm_irqchip_chip(native.Union):
    """kvm_irqchip.chip."""

    _fields_ = [("dummy", u8 * 512), ("pic", kvm_pic_state), ("ioapic", kvm_ioapic_state)]


class kvm_irqchip(native.Structure):
    """The interrupt controller with this chip_id (api.rst 4.26)."""

    _fields_ = [("chip_id", u32), ("pad", u32), ("chip", kvm_irqchip_chip)]


class kvm_irq_level(native.Structure):
    """A line and its level (api.rst 4.25)."""

    _fields_ = [("irq", u32), ("level", u32)]


class kvm_irq_routing_irqchip(native.Structure):
    """A pin of a chip."""

    _fields_ = [("irqchip", u32), ("pin", u32)]


class kvm_irq_routing_msi(native.Structure):
    """An MSI message.  devid is not used on x86."""

    _fields_ = [("address_lo", u32), ("address_hi", u32), ("data", u32), ("devid", u32)]


class kvm_irq_routing_u(native.Union):
    """kvm_irq_routing_entry.u."""

    _fields_ = [("irqchip", kvm_irq_routing_irqchip), ("msi", kvm_irq_routing_msi), ("pad", u32 * 8)]


class kvm_irq_routing_entry(native.Structure):
    """A route of a GSI.  A GSI may have one entry for each chip, or one MSI entry (api.rst 4.52)."""

    _fields_ = [("gsi", u32), ("type", u32), ("flags", u32), ("pad", u32), ("u", kvm_irq_routing_u)]


class kvm_irq_routing(native.Structure):
    """Header of an array of kvm_irq_routing_entry."""

    _fields_ = [("nr", u32), ("flags", u32)]


class kvm_irqfd(native.Structure):
    """An eventfd that raises a GSI (api.rst 4.75)."""

    _fields_ = [("fd", u32), ("gsi", u32), ("flags", u32), ("resamplefd", u32), ("pad", u8 * 16)]


class kvm_ioeventfd(native.Structure):
    """An eventfd that a guest's write signals (api.rst 4.59)."""

    _fields_ = [("datamatch", u64), ("addr", u64), ("len", u32), ("fd", s32), ("flags", u32),
                ("pad", u8 * 36)]  # fmt: skip


class kvm_pit_config(native.Structure):
    """The options of a PIT to create (api.rst 4.71)."""

    _fields_ = [("flags", u32), ("pad", u32 * 15)]


class kvm_pit_channel_state(native.Structure):
    """One counter of the 8254."""

    _fields_ = [("count", u32), ("latched_count", u16), ("count_latched", u8), ("status_latched", u8),
                ("status", u8), ("read_state", u8), ("write_state", u8), ("write_latch", u8),
                ("rw_mode", u8), ("mode", u8), ("bcd", u8), ("gate", u8), ("count_load_time", s64)]  # fmt: skip


class kvm_pit_state2(native.Structure):
    """The 8254 (api.rst 4.72)."""

    _fields_ = [("channels", kvm_pit_channel_state * 3), ("flags", u32), ("reserved", u32 * 9)]


class kvm_device_attr(native.Structure):
    """An attribute of a device or a vCPU.  `addr` is the address of its value (api.rst 4.80)."""

    _fields_ = [("flags", u32), ("group", u32), ("attr", u64), ("addr", u64)]


class kvm_clock_data(native.Structure):
    """The time of kvmclock, in ns (api.rst 4.29)."""

    _fields_ = [("clock", u64), ("flags", u32), ("pad0", u32), ("realtime", u64), ("host_tsc", u64),
                ("pad", u32 * 4)]  # fmt: skip


# ------------------------------------------------------------------ kvm_run


class kvm_run_io(native.Structure):
    """kvm_run.io."""

    _fields_ = [("direction", u8), ("size", u8), ("port", u16), ("count", u32), ("data_offset", u64)]


class kvm_run_mmio(native.Structure):
    """kvm_run.mmio."""

    _fields_ = [("phys_addr", u64), ("data", u8 * 8), ("len", u32), ("is_write", u8)]


class kvm_run_hw(native.Structure):
    """kvm_run.hw."""

    _fields_ = [("hardware_exit_reason", u64)]


class kvm_run_fail_entry(native.Structure):
    """kvm_run.fail_entry."""

    _fields_ = [("hardware_entry_failure_reason", u64), ("cpu", u32)]


class kvm_run_internal(native.Structure):
    """kvm_run.internal."""

    _fields_ = [("suberror", u32), ("ndata", u32), ("data", u64 * 16)]


class kvm_run_system_event(native.Structure):
    """kvm_run.system_event."""

    _fields_ = [("type", u32), ("ndata", u32), ("data", u64 * 16)]


class kvm_run_eoi(native.Structure):
    """kvm_run.eoi."""

    _fields_ = [("vector", u8)]


class kvm_run_exit(native.Union):
    """The unnamed union of kvm_run, with the members that are read here."""

    _fields_ = [("hw", kvm_run_hw), ("fail_entry", kvm_run_fail_entry), ("io", kvm_run_io),
                ("mmio", kvm_run_mmio), ("internal", kvm_run_internal),
                ("system_event", kvm_run_system_event), ("eoi", kvm_run_eoi),
                ("padding", u8 * 256)]  # fmt: skip


class kvm_run(native.Structure):
    """The page that a vCPU shares with its user, up to the union of exits (api.rst 5).  In C, sync regs follow."""

    _anonymous_ = ("exit",)
    _fields_ = [("request_interrupt_window", u8), ("immediate_exit", u8), ("padding1", u8 * 6),
                ("exit_reason", u32), ("ready_for_interrupt_injection", u8), ("if_flag", u8), ("flags", u16),
                ("cr8", u64), ("apic_base", u64), ("exit", kvm_run_exit)]  # fmt: skip


# ------------------------------------------------------------------ request numbers


class Request(int):
    """The number of an ioctl.  REQUESTS has its name."""


def _ioc(direction: int, nr: int, size: int) -> Request:
    """Return the number of a request, as <asm-generic/ioctl.h> builds it.  0xAE is KVMIO."""
    return Request(direction << 30 | size << 16 | 0xAE << 8 | nr)


def _io(nr: int) -> Request:
    return _ioc(0, nr, 0)


def _iow(nr: int, struct: "type[CData]") -> Request:
    return _ioc(1, nr, native.sizeof(struct))


def _ior(nr: int, struct: "type[CData]") -> Request:
    return _ioc(2, nr, native.sizeof(struct))


def _iowr(nr: int, struct: "type[CData]") -> Request:
    return _ioc(3, nr, native.sizeof(struct))


# on /dev/kvm
KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_GET_MSR_INDEX_LIST = _iowr(0x02, kvm_msr_list)
KVM_CHECK_EXTENSION = _io(0x03)  # and on a VM
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, kvm_cpuid2)

# on a VM
KVM_CREATE_VCPU = _io(0x41)
KVM_GET_DIRTY_LOG = _iow(0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = _iow(0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, u64)
KVM_CREATE_IRQCHIP = _io(0x60)
KVM_IRQ_LINE = _iow(0x61, kvm_irq_level)
KVM_GET_IRQCHIP = _iowr(0x62, kvm_irqchip)
KVM_SET_IRQCHIP = _ior(0x63, kvm_irqchip)  # "ior" is a mistake in the kernel, which is now part of its API
KVM_SET_GSI_ROUTING = _iow(0x6A, kvm_irq_routing)
KVM_IRQFD = _iow(0x76, kvm_irqfd)
KVM_CREATE_PIT2 = _iow(0x77, kvm_pit_config)
KVM_IOEVENTFD = _iow(0x79, kvm_ioeventfd)
KVM_SET_CLOCK = _iow(0x7B, kvm_clock_data)
KVM_GET_CLOCK = _ior(0x7C, kvm_clock_data)
KVM_GET_PIT2 = _ior(0x9F, kvm_pit_state2)
KVM_SET_PIT2 = _iow(0xA0, kvm_pit_state2)

# on a vCPU
KVM_RUN = _io(0x80)
KVM_GET_REGS = _ior(0x81, kvm_regs)
KVM_SET_REGS = _iow(0x82, kvm_regs)
KVM_GET_SREGS = _ior(0x83, kvm_sregs)
KVM_SET_SREGS = _iow(0x84, kvm_sregs)
KVM_TRANSLATE = _iowr(0x85, kvm_translation)
KVM_GET_MSRS = _iowr(0x88, kvm_msrs)
KVM_SET_MSRS = _iow(0x89, kvm_msrs)
KVM_GET_LAPIC = _ior(0x8E, kvm_lapic_state)
KVM_SET_LAPIC = _iow(0x8F, kvm_lapic_state)
KVM_SET_CPUID2 = _iow(0x90, kvm_cpuid2)
KVM_GET_MP_STATE = _ior(0x98, kvm_mp_state)
KVM_SET_MP_STATE = _iow(0x99, kvm_mp_state)
KVM_GET_VCPU_EVENTS = _ior(0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = _iow(0xA0, kvm_vcpu_events)
KVM_GET_DEBUGREGS = _ior(0xA1, kvm_debugregs)
KVM_SET_DEBUGREGS = _iow(0xA2, kvm_debugregs)
KVM_GET_TSC_KHZ = _io(0xA3)
KVM_GET_XSAVE = _ior(0xA4, kvm_xsave)
KVM_SET_XSAVE = _iow(0xA5, kvm_xsave)
KVM_GET_XCRS = _ior(0xA6, kvm_xcrs)
KVM_SET_XCRS = _iow(0xA7, kvm_xcrs)
KVM_GET_XSAVE2 = _ior(0xCF, kvm_xsave)
KVM_SET_DEVICE_ATTR = _iow(0xE1, kvm_device_attr)
KVM_GET_DEVICE_ATTR = _iow(0xE2, kvm_device_attr)
KVM_HAS_DEVICE_ATTR = _iow(0xE3, kvm_device_attr)

# The name of each request, for error messages and for a system call filter that lists them.
REQUESTS: dict[int, str] = {
    number: name for name, number in list(globals().items()) if isinstance(number, Request)
}

# ------------------------------------------------------------------ constants

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_IO = 2
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_IOAPIC_EOI = 26

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1

KVM_SYSTEM_EVENT_RESET = 2

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1

KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_IOAPIC_NUM_PINS = 24
KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2

KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1
KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2

KVM_PIT_SPEAKER_DUMMY = 1

KVM_VCPU_TSC_CTRL = 0
KVM_VCPU_TSC_OFFSET = 0

KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0  # the spelling of the kernel

KVM_CAP_IRQCHIP = 0
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_XSAVE2 = 208

# ------------------------------------------------------------------ the call


def refused(request: Request, error: int) -> OSError:
    """Return the OSError for a request that failed.  Its class depends on the errno."""
    return OSError(error, f"{REQUESTS[request]}: {os.strerror(error)}")


def ioctl(fd: int, request: Request, arg: "int | bytearray | CData" = 0) -> int:
    """Execute one request and return its result.  The kernel may write into a mutable argument.

    A request that a signal has interrupted (EINTR) is repeated.  So this is not for KVM_RUN.

    Raises:
        OSError: the kernel refused.  The message names the request.
    """
    while True:
        try:
            return fcntl.ioctl(fd, request, arg)
        except InterruptedError:
            continue
        except OSError as error:
            raise refused(request, error.errno or errno.EIO) from None


_libc = native.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [native.c_int, native.c_ulong, native.c_ulong]


def ioctl_ulong(fd: int, request: Request, arg: int) -> int:
    """Execute a request whose argument is a number of any size: fcntl.ioctl takes no number from 2 GiB on."""
    while True:
        result: int = _libc.ioctl(fd, request, arg)
        if result >= 0:
            return result
        if (error := native.get_errno()) != errno.EINTR:
            raise refused(request, error)


def read_struct(fd: int, request: Request, struct: "type[S]") -> "S":
    """Execute a KVM_GET_* request and return its structure."""
    state = struct()
    ioctl(fd, request, state)
    return state


def write_struct(fd: int, request: Request, struct: "type[S]", state: "S | bytes") -> None:
    """Execute a KVM_SET_* request with a structure, or with the bytes of a structure that was read elsewhere.

    Raises:
        ValueError: the number of bytes is not the size of the structure.
    """
    if isinstance(state, bytes):
        if len(state) != native.sizeof(struct):
            raise ValueError(f"{struct.__name__} of {len(state)} bytes, not {native.sizeof(struct)}")
        state = struct.from_buffer_copy(state)
    ioctl(fd, request, state)


def read_list(fd: int, request: Request, header: type[native.Structure], entry: "type[S]") -> "list[S]":
    """Execute a request that fills an array, and return the array.  Its header begins with the number of entries.

    If the array is too short, the kernel only returns E2BIG, so it is tried with a larger one.
    """
    start, step = native.sizeof(header), native.sizeof(entry)
    capacity = 128
    while True:
        buffer = bytearray(start + capacity * step)
        buffer[0:4] = capacity.to_bytes(4, "little")
        try:
            ioctl(fd, request, buffer)
        except OSError as error:
            if error.errno != errno.E2BIG or capacity >= 1 << 16:
                raise
            capacity *= 2
            continue
        count = int.from_bytes(buffer[0:4], "little")
        return [entry.from_buffer_copy(buffer, start + index * step) for index in range(count)]


def counted(header: type[native.Structure], entries: "list[S]") -> bytearray:
    """Return an array with its header, which begins with the number of entries."""
    head = len(entries).to_bytes(4, "little").ljust(native.sizeof(header), b"\0")
    return bytearray(head + b"".join(map(bytes, entries)))


