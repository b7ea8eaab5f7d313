"""Loads Linux bzImage kernels.  A kernel that has a 64-bit entry is started there, else at its 32-bit entry.

The boot protocols are described in Linux, Documentation/arch/x86/boot.rst.
"""

from struct import Struct

from vmd.record import Record
from vmd.units import SECTOR
from vmd.vm import layout
from vmd.vm.boot import placement
from vmd.vm.boot.placement import Placement, round_up
from vmd.vm.boot.start import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    RFLAGS_CLEAR,
    Boot,
    Mode,
    Start,
    code32,
    code64,
    data32,
    descriptor_table,
    flat_segments,
    identity_map,
    task,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.vm.boot.image import Image
    from vmd.vm.boot.start import Memory

SETUP_SECTS_IF_ZERO = 4  # the meaning of a zero, for compatibility with kernels that had no header

# struct setup_header, up to and with handover_offset of protocol 2.11
HEADER_AT = 0x1F1
SETUP_HEADER = Struct("<BHIHHHHH4sHIHHBBHIIIIHBBIIIBBHIIQIIQQII")
HEADER_END = HEADER_AT + SETUP_HEADER.size
JUMP_AT = 0x200  # a short jump over the header; its offset tells the length of the header
JUMP_SHORT = 0xEB
HEADER_END_2_10 = 0x264  # protocol 2.11 added the last field
HEADER_END_MAX = 0x290  # offset of the next field of boot_params after the header

PROTOCOL_MIN = 0x20A  # the first version whose header tells how much memory the kernel needs
PROTOCOL_2_11 = 0x20B
PROTOCOL_64 = 0x20C  # the first version whose header tells whether there is a 64-bit entry
SYSSIZE_UNIT = 16
LOAD_HIGH = layout.HIGH_RAM_START  # every kernel with LOADED_HIGH may be loaded here
LOADED_HIGH = 1 << 0
CAN_USE_HEAP = 1 << 7
XLF_KERNEL_64 = 1 << 0
ENTRY64_OFFSET = 0x200  # offset of the 64-bit entry in the protected-mode part
LOADER_UNDEFINED = 0xFF
VERSION_TEXT_MAX = 96

# struct boot_params; see Documentation/arch/x86/zero-page.rst
BOOT_PARAMS_SIZE = 0x1000
ACPI_RSDP_ADDR = (0x070, Struct("<Q"))
EXT_RAMDISK_IMAGE = (0x0C0, Struct("<I"))
EXT_RAMDISK_SIZE = (0x0C4, Struct("<I"))
E820_ENTRIES = (0x1E8, Struct("<B"))
VID_MODE = (0x1FA, Struct("<H"))
TYPE_OF_LOADER = (0x210, Struct("<B"))
LOADFLAGS = (0x211, Struct("<B"))
CODE32_START = (0x214, Struct("<I"))
RAMDISK_IMAGE = (0x218, Struct("<I"))
RAMDISK_SIZE = (0x21C, Struct("<I"))
CMD_LINE_PTR = (0x228, Struct("<I"))
SETUP_DATA = (0x250, Struct("<Q"))
E820_TABLE = 0x2D0
BOOT_E820_ENTRY = Struct("<QQI")
VID_MODE_NORMAL = 0xFFFF

BOOT_CS = 0x10
BOOT_DS = 0x18
BOOT_TSS = 0x20
LOW_4_BYTES = 0xFFFFFFFF


class SetupHeader(Record):
    """The checked setup header of a kernel.  `raw` has all its bytes, which are copied into boot_params."""

    raw: bytes
    payload_at: int  # offset of the protected-mode part in the file
    payload_bytes: int
    version: int
    entry64: bool
    loadflags: int
    initrd_addr_max: int
    kernel_alignment: int  # 0 unless the kernel is relocatable
    cmdline_size: int
    pref_address: int
    init_size: int
    text: str


def parse_header(image: "Image") -> SetupHeader:
    """Read and check the setup header.

    Raises:
        ImageError: the header is damaged, or its protocol is too old.
    """
    start = image.read(0, HEADER_END_MAX, "the setup header")
    (
        setup_sects, _root_flags, syssize, _ram_size, _vid_mode, _root_dev, boot_flag, jump, magic, version,
        _realmode_swtch, _start_sys_seg, kernel_version, _type_of_loader, loadflags, _setup_move_size,
        _code32_start, _ramdisk_image, _ramdisk_size, _bootsect_kludge, _heap_end_ptr, _ext_loader_ver,
        _ext_loader_type, _cmd_line_ptr, initrd_addr_max, kernel_alignment, relocatable, _min_alignment,
        xloadflags, cmdline_size, _hardware_subarch, _hardware_subarch_data, _payload_offset,
        _payload_length, _setup_data, pref_address, init_size, _handover_offset,
    ) = SETUP_HEADER.unpack_from(start, HEADER_AT)  # fmt: skip
    if magic != b"HdrS" or boot_flag != 0xAA55:
        raise image.error(f"has no Linux setup header: magic {magic!r}, boot flag {boot_flag:#x}")
    if version < PROTOCOL_MIN:
        raise image.error(
            f"is a kernel of Linux boot protocol {_dotted(version)}, at least {_dotted(PROTOCOL_MIN)} is needed: "
            "start it by a boot loader from a disk or CD"
        )
    if not loadflags & LOADED_HIGH:
        raise image.error("is a Linux zImage that loads below 1 MiB: start it by a boot loader from a disk or CD")
    header_end = JUMP_AT + 2 + (jump >> 8)
    header_end_min = HEADER_END if version >= PROTOCOL_2_11 else HEADER_END_2_10
    if jump & 0xFF != JUMP_SHORT or not header_end_min <= header_end <= HEADER_END_MAX:
        raise image.error(f"has a damaged Linux setup header: it ends at {header_end:#x}")
    if relocatable and (kernel_alignment == 0 or kernel_alignment & (kernel_alignment - 1)):
        raise image.error(f"has a kernel alignment of {kernel_alignment:#x}, which is no power of two")
    payload_at = ((setup_sects or SETUP_SECTS_IF_ZERO) + 1) * SECTOR
    payload_bytes = syssize * SYSSIZE_UNIT
    # The size is rounded up, but the file may end earlier.  If the size is 0, the code is the rest of the file, as most
    # boot loaders assume.
    if not payload_bytes or 0 < payload_at + payload_bytes - image.size < SYSSIZE_UNIT:
        payload_bytes = max(0, image.size - payload_at)
    entry64 = version >= PROTOCOL_64 and bool(xloadflags & XLF_KERNEL_64)
    if payload_bytes <= (ENTRY64_OFFSET if entry64 else 0):
        raise image.error(f"has {payload_bytes} bytes of code, too few to hold its entry")
    image.check_range(payload_at, payload_bytes, "the kernel's code")
    return SetupHeader(
        raw=start[HEADER_AT:header_end],
        payload_at=payload_at,
        payload_bytes=payload_bytes,
        version=version,
        entry64=entry64,
        loadflags=loadflags,
        initrd_addr_max=initrd_addr_max,
        kernel_alignment=kernel_alignment if relocatable else 0,
        cmdline_size=cmdline_size,
        pref_address=pref_address,
        init_size=init_size,
        text=_version_text(image, kernel_version, payload_at),
    )


def load(memory: "Memory", image: "Image", boot: Boot) -> Start:
    """Load kernel, initrd, command line and boot_params.

    Raises:
        ImageError: the kernel is damaged or unsuitable, or the guest has too little memory.
        HostError: a file cannot be read.
    """
    header = parse_header(image)
    space = Placement(image.name, boot.memory_bytes)

    load_at, runs_at = _addresses(header)
    start = min(load_at, runs_at)
    end = max(load_at + header.payload_bytes, runs_at + header.init_size)
    space.claim(start, end - start, "the kernel")
    if end > layout.FOUR_GIB:
        raise image.error(f"is to run at {runs_at:#x}, but only the first 4 GiB are mapped for it")

    placement.store_cmdline(memory, image.name, boot.cmdline, header.cmdline_size)
    image.read_into(memory.view(load_at, header.payload_bytes), header.payload_at, "the kernel's code")
    ramdisk_at = 0
    if boot.initrd is not None:
        ramdisk_at = placement.load_initrd(memory, space, boot.initrd, header.initrd_addr_max + 1)

    memory.write(layout.LINUX_BOOT_PARAMS, _boot_params(header, boot, load_at, ramdisk_at))
    registers = {"rsp": layout.LINUX_STACK, "rsi": layout.LINUX_BOOT_PARAMS, "rflags": RFLAGS_CLEAR}
    code, data, tss = code64(BOOT_CS) if header.entry64 else code32(BOOT_CS), data32(BOOT_DS), task(BOOT_TSS)
    # In long mode a TSS descriptor has 16 bytes.  The 8 bytes here are its upper half.
    gdt = descriptor_table(code, data, tss) + bytes(8)
    memory.write(layout.BOOT_GDT, gdt)
    if not header.entry64:
        return Start(
            text=f"{header.text}, entered in 32-bit mode",
            mode=Mode.PROTECTED32,
            registers={"rip": load_at, **registers},
            cr0=CR0_ET | CR0_PE,
            gdt_base=layout.BOOT_GDT,
            gdt_limit=len(gdt) - 1,
            idt_base=layout.BOOT_IDT,
            segments=flat_segments(code, data, tss),
        )
    memory.write(layout.LINUX_PAGE_TABLES, identity_map(layout.LINUX_PAGE_TABLES, 4))
    return Start(
        text=header.text,
        mode=Mode.LONG64,
        registers={"rip": load_at + ENTRY64_OFFSET, **registers},
        cr0=CR0_PG | CR0_ET | CR0_PE,
        cr3=layout.LINUX_PAGE_TABLES,
        cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA,
        gdt_base=layout.BOOT_GDT,
        gdt_limit=len(gdt) - 1,
        idt_base=layout.BOOT_IDT,
        segments=flat_segments(code, data, tss),
    )


def _addresses(header: SetupHeader) -> tuple[int, int]:
    """Return the address at which to load a kernel, and the address at which it runs, from which init_size counts."""
    if not header.kernel_alignment:
        # The kernel is not relocatable: it moves itself to the only address at which it can run.
        return LOAD_HIGH, header.pref_address
    # boot.rst allows a relocatable kernel to be loaded below pref_address.  That has no advantage: Linux moves itself
    # up before it unpacks.  An address in the first MiB, mostly 0, means that there is no preference.
    load_at = header.pref_address
    if load_at < LOAD_HIGH:
        load_at = round_up(LOAD_HIGH, header.kernel_alignment)
    return load_at, round_up(load_at, header.kernel_alignment)


def _boot_params(header: SetupHeader, boot: Boot, load_at: int, ramdisk_at: int) -> bytes:
    """Return the zero page."""
    page = bytearray(BOOT_PARAMS_SIZE)
    page[HEADER_AT : HEADER_AT + len(header.raw)] = header.raw
    ramdisk_bytes = boot.initrd.size if boot.initrd is not None else 0
    e820 = layout.e820_map(boot.memory_bytes)
    for (offset, field), value in (
        (ACPI_RSDP_ADDR, boot.rsdp_gpa),
        (EXT_RAMDISK_IMAGE, ramdisk_at >> 32),
        (EXT_RAMDISK_SIZE, ramdisk_bytes >> 32),
        (E820_ENTRIES, len(e820)),
        (VID_MODE, VID_MODE_NORMAL),
        (TYPE_OF_LOADER, LOADER_UNDEFINED),
        # The heap is for the 16-bit part of the kernel, which does not run.
        (LOADFLAGS, header.loadflags & ~CAN_USE_HEAP),
        (CODE32_START, load_at),
        (RAMDISK_IMAGE, ramdisk_at & LOW_4_BYTES),
        (RAMDISK_SIZE, ramdisk_bytes & LOW_4_BYTES),
        (CMD_LINE_PTR, layout.BOOT_CMDLINE),
        # The image may have a pointer here, which the kernel would follow.
        (SETUP_DATA, 0),
    ):
        field.pack_into(page, offset, value)
    for index, entry in enumerate(e820):
        BOOT_E820_ENTRY.pack_into(page, E820_TABLE + index * BOOT_E820_ENTRY.size, *entry)
    return bytes(page)


def _version_text(image: "Image", kernel_version: int, setup_bytes: int) -> str:
    """Return the name of the kernel for the log: "Linux" and its version up to the first space, if it has one."""
    offset = kernel_version + SECTOR
    if kernel_version == 0 or offset >= setup_bytes:
        return "Linux"
    raw = image.read(offset, min(VERSION_TEXT_MAX, setup_bytes - offset), "the version string")
    word = raw.split(b"\0")[0].split(b" ")[0].decode("ascii", "replace")
    return f"Linux {word}" if word.isascii() and word.isprintable() and word else "Linux"


def _dotted(version: int) -> str:
    """Return a protocol version as boot.rst writes it, such as 2.10."""
    return f"{version >> 8}.{version & 0xFF:02}"
