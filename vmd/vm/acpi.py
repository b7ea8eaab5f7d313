"""The ACPI tables of a guest (ACPI 5.0), for direct boot and for SeaBIOS from one description.

They describe what a guest cannot probe: the processors, the wiring of interrupts, the power button, how to switch off
and how to reset.  There is no SMI, 8042, VGA or general-purpose event, and the only sleep state is S5.

    RSDP -+- RSDT -+- FADT -+- FACS
          +- XSDT -+        +- DSDT
                   +- MADT

All tables except the RSDP are in one blob.  A pointer is first written as an offset into the blob.  Then the address of
the blob is added to it: by `build_tables`, or by SeaBIOS, which places the blob and follows `etc/table-loader`.
"""

import struct

from vmd.record import Record
from vmd.vm import aml, layout
from vmd.vm.chips.mc146818 import CENTURY

S5_SLEEP_TYPE = 5  # the SLP_TYP that a guest writes to PM1 control to switch off

OEM_ID = b"VMD   "
OEM_TABLE_ID = b"VMDKVM  "
OEM_REVISION = 1
CREATOR_ID = b"VMD "

MAX_VCPUS = 255  # APIC ids of 8 bits, FFh is broadcast

# System description table header (5.2.6): signature, length, revision, checksum, OEM id, OEM table id,
# OEM revision, creator id, creator revision
HEADER = struct.Struct("<4sIBB6s8sI4sI")
CHECKSUM_OFFSET = 9
# Root system description pointer (5.2.5.3): signature, checksum, OEM id, revision, RSDT address, length,
# XSDT address, extended checksum
RSDP = struct.Struct("<8sB6sBIIQB3x")
RSDP_BYTES_V1 = 20
RSDP_CHECKSUM_OFFSET = 8
RSDP_RSDT_OFFSET = 16
RSDP_XSDT_OFFSET = 24
RSDP_EXTENDED_CHECKSUM_OFFSET = 32
# Firmware ACPI control structure (5.2.10): signature, length, hardware signature, waking vector, global lock,
# flags, X waking vector, version
FACS = struct.Struct("<4sIIIIIQB31x")
FACS_ALIGN = 64
# Generic address structure (5.2.3.1): space, bit width, bit offset, access size, address
GAS = struct.Struct("<BBBBQ")
GAS_IO = 1
GAS_BYTE, GAS_WORD, GAS_DWORD = 1, 2, 3

# Fixed ACPI description table (5.2.9), without its header
FADT = struct.Struct(
    "<II"  # FIRMWARE_CTRL, DSDT
    "BBHIBBBB"  # reserved, PM profile, SCI_INT, SMI_CMD, ACPI_ENABLE, ACPI_DISABLE, S4BIOS_REQ, PSTATE_CNT
    "IIIIIIII"  # PM1a_EVT, PM1b_EVT, PM1a_CNT, PM1b_CNT, PM2_CNT, PM_TMR, GPE0, GPE1
    "BBBBBBBB"  # PM1_EVT_LEN, PM1_CNT_LEN, PM2_CNT_LEN, PM_TMR_LEN, GPE0_LEN, GPE1_LEN, GPE1_BASE, CST_CNT
    "HHHH"  # P_LVL2_LAT, P_LVL3_LAT, FLUSH_SIZE, FLUSH_STRIDE
    "BBBBB"  # DUTY_OFFSET, DUTY_WIDTH, DAY_ALRM, MON_ALRM, CENTURY
    "HBI12sB3x"  # IAPC_BOOT_ARCH, reserved, flags, RESET_REG, RESET_VALUE
    "QQ12s12s12s12s12s12s12s12s"  # X_FIRMWARE_CTRL, X_DSDT, the eight blocks (PM1a_EVT to GPE1) as GAS
)
FADT_REVISION = 4  # later revisions only add fields for hardware-reduced machines
FADT_FIRMWARE_CTRL_OFFSET = 36
FADT_DSDT_OFFSET = 40
FADT_X_DSDT_OFFSET = 140
IAPC_VGA_NOT_PRESENT = 1 << 2
FADT_WBINVD = 1 << 0
FADT_PROC_C1 = 1 << 2
FADT_SLP_BUTTON = 1 << 5  # set: there is no fixed sleep button
FADT_FIX_RTC = 1 << 6  # set: the alarm cannot wake a sleeping machine
FADT_TMR_VAL_EXT = 1 << 8
FADT_RESET_REG_SUP = 1 << 10
NO_C2_US = 0x0FFF  # a latency above 100 µs (C2) or 1000 µs (C3) means that the state does not exist
RESET_VALUE = 0x06
RTC_PORT_COUNT = 2
FWCFG_PORT_COUNT = 12

# Multiple APIC description table (5.2.12)
MADT_REVISION = 3
MADT_PCAT_COMPAT = 1 << 0  # there are two 8259s, which a system that uses the I/O APIC has to mask
LOCAL_APIC = struct.Struct("<BBBBI")  # type 0: processor uid, APIC id, flags
IO_APIC = struct.Struct("<BBBBII")  # type 1: I/O APIC id, reserved, address, first GSI
SOURCE_OVERRIDE = struct.Struct("<BBBBIH")  # type 2: bus, ISA IRQ, GSI, flags
LOCAL_NMI = struct.Struct("<BBBHB")  # type 4: processor uid, flags, LINT
LAPIC_ENABLED = 1 << 0
CONFORMING = 0  # as on the ISA bus: edge triggered, active high
LEVEL_HIGH = 0x0D
ALL_PROCESSORS = 0xFF

# Commands of SeaBIOS's table loader, 128 bytes each; file names are 56 bytes with their NUL
LOADER_ALLOCATE, LOADER_ADD_POINTER, LOADER_ADD_CHECKSUM = 1, 2, 3
LOADER_ENTRY_BYTES = 128
ALLOCATE = struct.Struct("<I56sIB")  # file, alignment, zone
ADD_POINTER = struct.Struct("<I56s56sIB")  # file with the pointer, file pointed into, offset, size
ADD_CHECKSUM = struct.Struct("<I56sIII")  # file, offset of the checksum, start, length
ZONE_HIGH, ZONE_FSEG = 1, 2
RSDP_ALIGN = 16

RSDP_FILE = "etc/acpi/rsdp"
TABLES_FILE = "etc/acpi/tables"
LOADER_FILE = "etc/table-loader"


class Pointer(Record):
    """A little-endian address of `size` bytes at `offset` in `file`.  Before linking it is an offset into the blob."""

    file: str
    offset: int
    size: int


class Checksum(Record):
    """The byte at `offset`, which makes the sum of `length` bytes from `start` zero.  Before linking it is 0."""

    file: str
    offset: int
    start: int
    length: int


class _Tables:
    """Both files before linking, with the pointers and checksums to link."""

    def __init__(self, memory_bytes: int, vcpus: int) -> None:
        if not 1 <= vcpus <= MAX_VCPUS:
            raise ValueError(f"{vcpus} processors are not between 1 and {MAX_VCPUS}")
        self.files = {RSDP_FILE: bytearray(), TABLES_FILE: bytearray()}
        self.pointers: list[Pointer] = []
        self.checksums: list[Checksum] = []
        self.blob = self.files[TABLES_FILE]

        facs = self._append(FACS.pack(b"FACS", FACS.size, 0, 0, 0, 0, 0, 2), align=FACS_ALIGN)
        dsdt = self._table(b"DSDT", 2, dsdt_terms(memory_bytes, vcpus))
        fadt = self._table(b"FACP", FADT_REVISION, _fadt(facs, dsdt))
        self._pointer(fadt + FADT_FIRMWARE_CTRL_OFFSET, 4)
        self._pointer(fadt + FADT_DSDT_OFFSET, 4)
        self._pointer(fadt + FADT_X_DSDT_OFFSET, 8)
        madt = self._table(b"APIC", MADT_REVISION, _madt(vcpus))
        # SeaBIOS reads only the RSDT, for example to find the PM timer.  Present systems read the XSDT.
        rsdt = self._root(b"RSDT", 4, fadt, madt)
        xsdt = self._root(b"XSDT", 8, fadt, madt)

        self.files[RSDP_FILE] += RSDP.pack(b"RSD PTR ", 0, OEM_ID, 2, rsdt, RSDP.size, xsdt, 0)
        self.pointers += [
            Pointer(file=RSDP_FILE, offset=RSDP_RSDT_OFFSET, size=4),
            Pointer(file=RSDP_FILE, offset=RSDP_XSDT_OFFSET, size=8),
        ]
        # In this order: the second checksum covers the first one.
        self.checksums += [
            Checksum(file=RSDP_FILE, offset=RSDP_CHECKSUM_OFFSET, start=0, length=RSDP_BYTES_V1),
            Checksum(file=RSDP_FILE, offset=RSDP_EXTENDED_CHECKSUM_OFFSET, start=0, length=RSDP.size),
        ]

    def _append(self, content: bytes, align: int) -> int:
        """Add a table to the blob and return its offset."""
        self.blob += bytes(-len(self.blob) % align)
        offset = len(self.blob)
        self.blob += content
        return offset

    def _table(self, signature: bytes, revision: int, body: bytes) -> int:
        length = HEADER.size + len(body)
        header = HEADER.pack(
            signature, length, revision, 0, OEM_ID, OEM_TABLE_ID, OEM_REVISION, CREATOR_ID, OEM_REVISION
        )
        offset = self._append(header + body, align=16)
        self.checksums.append(Checksum(file=TABLES_FILE, offset=offset + CHECKSUM_OFFSET, start=offset, length=length))
        return offset

    def _root(self, signature: bytes, entry_bytes: int, *tables: int) -> int:
        body = b"".join(table.to_bytes(entry_bytes, "little") for table in tables)
        offset = self._table(signature, 1, body)
        for index in range(len(tables)):
            self._pointer(offset + HEADER.size + index * entry_bytes, entry_bytes)
        return offset

    def _pointer(self, offset: int, size: int) -> None:
        self.pointers.append(Pointer(file=TABLES_FILE, offset=offset, size=size))


def build_tables(memory_bytes: int, vcpus: int) -> bytes:
    """Return the linked tables for direct boot, which puts them at `layout.ACPI_TABLES`.  The RSDP comes first."""
    tables = _Tables(memory_bytes, vcpus)
    rsdp, blob = tables.files[RSDP_FILE], tables.files[TABLES_FILE]
    blob_offset = FACS_ALIGN
    assert len(rsdp) <= blob_offset
    for pointer in tables.pointers:
        file, at = tables.files[pointer.file], slice(pointer.offset, pointer.offset + pointer.size)
        address = int.from_bytes(file[at], "little") + layout.ACPI_TABLES + blob_offset
        file[at] = address.to_bytes(pointer.size, "little")
    for checksum in tables.checksums:
        file = tables.files[checksum.file]
        covered = file[checksum.start : checksum.start + checksum.length]
        file[checksum.offset] = (file[checksum.offset] - sum(covered)) & 0xFF
    linked = bytes(rsdp).ljust(blob_offset, b"\0") + bytes(blob)
    assert len(linked) <= layout.ACPI_TABLES_END - layout.ACPI_TABLES
    return linked


def firmware_files(memory_bytes: int, vcpus: int) -> dict[str, bytes]:
    """Return the fw_cfg files from which SeaBIOS itself places and links the tables."""
    tables = _Tables(memory_bytes, vcpus)
    script = [
        # The RSDP goes to the area that guests scan for it, and the blob to any free high memory.
        ALLOCATE.pack(LOADER_ALLOCATE, RSDP_FILE.encode(), RSDP_ALIGN, ZONE_FSEG),
        ALLOCATE.pack(LOADER_ALLOCATE, TABLES_FILE.encode(), FACS_ALIGN, ZONE_HIGH),
    ]
    script += [
        ADD_POINTER.pack(LOADER_ADD_POINTER, pointer.file.encode(), TABLES_FILE.encode(), pointer.offset, pointer.size)
        for pointer in tables.pointers
    ]
    script += [
        ADD_CHECKSUM.pack(LOADER_ADD_CHECKSUM, c.file.encode(), c.offset, c.start, c.length) for c in tables.checksums
    ]
    loader = b"".join(entry.ljust(LOADER_ENTRY_BYTES, b"\0") for entry in script)
    return {name: bytes(content) for name, content in tables.files.items()} | {LOADER_FILE: loader}


def _io_register(port: int, bits: int, access: int) -> bytes:
    return GAS.pack(GAS_IO, bits, 0, access, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    pm1_event, pm1_control, pm_timer = (layout.PORT_ACPI_PM + offset for offset in (0, 4, 8))
    absent = bytes(GAS.size)
    # X_FIRMWARE_CTRL stays zero, because only one of the two FACS addresses may be set (5.2.9).  Both addresses of the
    # DSDT are set, because readers of revision 1 know only the short one.
    return FADT.pack(
        *(facs, dsdt),
        *(0, 0, layout.IRQ_SCI, 0, 0, 0, 0, 0),
        *(pm1_event, 0, pm1_control, 0, 0, pm_timer, 0, 0),
        *(4, 2, 0, 4, 0, 0, 0, 0),
        *(NO_C2_US, NO_C2_US, 0, 0),
        *(0, 0, 0, 0, CENTURY),
        IAPC_VGA_NOT_PRESENT,
        0,
        # No PWR_BUTTON bit: the power button is the fixed one, in the PM1 registers.
        FADT_WBINVD | FADT_PROC_C1 | FADT_SLP_BUTTON | FADT_FIX_RTC | FADT_TMR_VAL_EXT | FADT_RESET_REG_SUP,
        _io_register(layout.PORT_RESET, 8, GAS_BYTE),
        RESET_VALUE,
        *(0, dsdt),
        *(_io_register(pm1_event, 32, GAS_WORD), absent),
        *(_io_register(pm1_control, 16, GAS_WORD), absent, absent),
        _io_register(pm_timer, 32, GAS_DWORD),
        *(absent, absent),
    )


def _madt(vcpus: int) -> bytes:
    overrides = [(layout.IRQ_PIT, layout.GSI_PIT, CONFORMING), (layout.IRQ_SCI, layout.IRQ_SCI, LEVEL_HIGH)]
    overrides += [(irq, irq, LEVEL_HIGH) for irq in layout.PCI_IRQS]
    return b"".join(
        (
            struct.pack("<II", layout.LAPIC_BASE, MADT_PCAT_COMPAT),
            *(LOCAL_APIC.pack(0, LOCAL_APIC.size, vcpu, vcpu, LAPIC_ENABLED) for vcpu in range(vcpus)),
            IO_APIC.pack(1, IO_APIC.size, layout.IOAPIC_ID, 0, layout.IOAPIC_BASE, 0),
            *(SOURCE_OVERRIDE.pack(2, SOURCE_OVERRIDE.size, 0, irq, gsi, flags) for irq, gsi, flags in overrides),
            LOCAL_NMI.pack(4, LOCAL_NMI.size, ALL_PROCESSORS, CONFORMING, 1),
        )
    )


def dsdt_terms(memory_bytes: int, vcpus: int) -> bytes:
    """Return the AML of the DSDT: the devices below `_SB`, and `_S5`, which switches off."""
    isa_devices = (
        aml.device(
            "COM1",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(1)),
            aml.name("_CRS", aml.resources(aml.io(layout.PORT_COM1, 8), aml.irq(layout.IRQ_COM1))),
        ),
        aml.device(
            "RTC_",
            aml.name("_HID", aml.eisa_id("PNP0B00")),
            aml.name("_CRS", aml.resources(aml.io(layout.PORT_RTC_INDEX, RTC_PORT_COUNT), aml.irq(layout.IRQ_RTC))),
        ),
    )
    # Guests may not change the windows of this bus: firmware or `PciBus` assigns addresses in them.
    pci = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_UID", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.word_bus(0, 0),
                aml.io(layout.PORT_PCI_ADDRESS, 8),
                aml.word_io(0, layout.PORT_PCI_ADDRESS - 1),
                aml.word_io(layout.PORT_PCI_ADDRESS + 8, layout.PCI_IO_END - 1),
                aml.dword_memory(layout.pci_window_start(memory_bytes), layout.PCI_WINDOW_END - 1),
            ),
        ),
        aml.name("_PRT", INTERRUPT_ROUTING),
        *isa_devices,
    )
    # The PM registers have no driver.  This reserves their ports, so that a guest puts no other device there.
    board = aml.device(
        "PMIO",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.io(layout.PORT_ACPI_PM, 12))),
    )
    fwcfg = aml.device(
        "FWCF",
        aml.name("_HID", aml.string("QEMU0002")),
        aml.name("_STA", aml.integer(0x0B)),  # present, decoding, working; not shown to users
        aml.name("_CRS", aml.resources(aml.io(layout.PORT_FWCFG_SELECT, FWCFG_PORT_COUNT))),
    )
    processors = (
        aml.device(
            f"C{vcpu:03X}",
            aml.name("_HID", aml.string("ACPI0007")),
            aml.name("_UID", aml.integer(vcpu)),
        )
        for vcpu in range(vcpus)
    )
    sleep_type = aml.integer(S5_SLEEP_TYPE)
    return b"".join(
        (
            aml.scope("_SB", *processors, board, fwcfg, pci),
            aml.name("_S5", aml.package(sleep_type, sleep_type, aml.integer(0), aml.integer(0))),
        )
    )


def _interrupt_routing() -> bytes:
    """Return _PRT: each pin of each slot with its GSI.  Pins are counted from 0 here, and from 1 in PCI."""
    return aml.package(
        *(
            aml.package(
                aml.integer(slot << 16 | 0xFFFF),
                aml.integer(pin - 1),
                aml.integer(0),
                aml.integer(layout.pci_irq(slot, pin)),
            )
            for slot in range(1, 32)
            for pin in (1, 2, 3, 4)
        )
    )


INTERRUPT_ROUTING = _interrupt_routing()  # made once, as it is the same in every machine and takes half of the time
