"""ACPI tables: their links, checksums and content.  Intel's compiler accepts them without messages."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from vmd.units import MIB
from vmd.vm import acpi, layout

MEMORY = [128 * MIB, 3584 * MIB, 5120 * MIB]
MEMORY_IDS = ["128M", "3.5G", "5G"]

needs_iasl = pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (package acpica-tools) is not installed")


class Memory:
    """Guest memory with ACPI tables, which an operating system finds by following addresses."""

    def __init__(self, pieces: dict[int, bytes]) -> None:
        self.pieces = pieces

    def read(self, address: int, size: int) -> bytes:
        """Return `size` bytes, all of which must be in one piece."""
        for base, content in self.pieces.items():
            if base <= address and address + size <= base + len(content):
                return content[address - base : address - base + size]
        raise AssertionError(f"{size} bytes at {address:#x} are outside the loaded pieces")

    def integer(self, address: int, size: int) -> int:
        """Return a little-endian integer."""
        return int.from_bytes(self.read(address, size), "little")

    def table(self, address: int) -> bytes:
        """Return the table at an address.  Its length field gives its size."""
        return self.read(address, self.integer(address + 4, 4))

    def walk(self, rsdp: int) -> dict[str, bytes]:
        """Follow every pointer from the RSDP, and return the tables by signature.  RSDT and XSDT must agree."""
        assert self.read(rsdp, 8) == b"RSD PTR "
        rsdt = self.table(self.integer(rsdp + 16, 4))
        xsdt = self.table(self.integer(rsdp + 24, 8))
        entries = [int.from_bytes(rsdt[at : at + 4], "little") for at in range(36, len(rsdt), 4)]
        assert entries == [int.from_bytes(xsdt[at : at + 8], "little") for at in range(36, len(xsdt), 8)]
        fadt = next(entry for entry in entries if self.read(entry, 4) == b"FACP")
        facs, dsdt = self.integer(fadt + 36, 4), self.integer(fadt + 40, 4)
        assert all(address % 16 == 0 for address in (*entries, dsdt))
        assert self.integer(fadt + 132, 8) == 0
        assert self.integer(fadt + 140, 8) == dsdt
        assert facs % 64 == 0
        found = [rsdt, xsdt, *(self.table(entry) for entry in (*entries, facs, dsdt))]
        return {"RSDP": self.read(rsdp, 36)} | {table[:4].decode(): table for table in found}


def direct(memory_bytes: int = 128 * MIB, vcpus: int = 1) -> dict[str, bytes]:
    """Return the tables of a direct boot by signature."""
    content = acpi.build_tables(memory_bytes, vcpus)
    return Memory({layout.ACPI_TABLES: content}).walk(layout.ACPI_TABLES)


def run_loader(files: dict[str, bytes], places: dict[str, int]) -> dict[int, bytes]:
    """Run `etc/table-loader` as SeaBIOS does, but put each file at its address in `places`."""
    loaded: dict[str, bytearray] = {}
    script = files["etc/table-loader"]
    assert len(script) % 128 == 0
    for at in range(0, len(script), 128):
        entry = script[at : at + 128]
        command = int.from_bytes(entry[:4], "little")
        first = entry[4:60].split(b"\0")[0].decode()
        if command == 1:
            align, zone = struct.unpack_from("<IB", entry, 60)
            assert first not in loaded
            assert zone == (2 if first == "etc/acpi/rsdp" else 1)
            assert align & (align - 1) == 0
            assert places[first] % align == 0
            loaded[first] = bytearray(files[first])
        elif command == 2:
            second = entry[60:116].split(b"\0")[0].decode()
            offset, size = struct.unpack_from("<IB", entry, 116)
            field = slice(offset, offset + size)
            assert second in loaded
            assert offset + size <= len(loaded[first])
            value = int.from_bytes(loaded[first][field], "little") + places[second]
            loaded[first][field] = value.to_bytes(size, "little")
        else:
            assert command == 3
            offset, start, length = struct.unpack_from("<III", entry, 60)
            assert start + length <= len(loaded[first])
            covered = sum(loaded[first][start : start + length])
            loaded[first][offset] = (loaded[first][offset] - covered) & 0xFF
    return {places[name]: bytes(content) for name, content in loaded.items()}


def iasl(directory: Path, *arguments: str) -> str:
    """Run iasl, which must succeed, and return its output."""
    run = subprocess.run(["iasl", *arguments], cwd=directory, capture_output=True, text=True, check=False)
    printed = run.stdout + run.stderr
    assert run.returncode == 0, printed
    return printed


@pytest.mark.parametrize("memory_bytes", MEMORY, ids=MEMORY_IDS)
@pytest.mark.parametrize("vcpus", range(1, 17))
def test_every_checksum_is_zero(memory_bytes: int, vcpus: int) -> None:
    """Each table sums up to zero, and so do the first 20 bytes of the RSDP.  Only FACS has no checksum."""
    tables = direct(memory_bytes, vcpus)

    assert set(tables) == {"RSDP", "RSDT", "XSDT", "FACP", "APIC", "FACS", "DSDT"}
    assert sum(tables["RSDP"][:20]) % 256 == 0
    assert [name for name, table in tables.items() if sum(table) % 256] == ["FACS"]


@pytest.mark.parametrize("vcpus", [1, 16, 255])
def test_tables_fit_into_their_area(vcpus: int) -> None:
    """The tables fit even with every APIC id in use."""
    assert len(acpi.build_tables(128 * MIB, vcpus)) <= layout.ACPI_TABLES_END - layout.ACPI_TABLES


@pytest.mark.parametrize("vcpus", [0, 256])
def test_impossible_number_of_processors_is_refused(vcpus: int) -> None:
    """The error names the number."""
    with pytest.raises(ValueError, match=f"{vcpus} processors"):
        acpi.build_tables(128 * MIB, vcpus)


@pytest.mark.parametrize("memory_bytes", MEMORY, ids=MEMORY_IDS)
@pytest.mark.parametrize("vcpus", [1, 3, 16])
def test_loader_script_gives_the_tables_of_a_direct_boot(memory_bytes: int, vcpus: int) -> None:
    """If the files are at the addresses of a direct boot, SeaBIOS's loader makes exactly the same bytes."""
    files = acpi.firmware_files(memory_bytes, vcpus)
    expected = acpi.build_tables(memory_bytes, vcpus)
    blob_at = layout.ACPI_TABLES + len(expected) - len(files["etc/acpi/tables"])

    linked = run_loader(files, {"etc/acpi/rsdp": layout.ACPI_TABLES, "etc/acpi/tables": blob_at})

    assert linked[layout.ACPI_TABLES] == expected[:36]
    assert linked[blob_at] == expected[blob_at - layout.ACPI_TABLES :]


def test_loader_script_links_anywhere() -> None:
    """Tables high in memory and an RSDP in the F segment have correct links and checksums."""
    places = {"etc/acpi/rsdp": 0xF5A10, "etc/acpi/tables": 0xBFFDF000}

    tables = Memory(run_loader(acpi.firmware_files(128 * MIB, 2), places)).walk(0xF5A10)

    assert [name for name, table in tables.items() if sum(table) % 256] == ["FACS"]


def test_fadt_names_the_pm_registers() -> None:
    """Ports and lengths are those of the chip, and the extended fields agree with the old ones."""
    fadt = direct()["FACP"]

    assert struct.unpack_from("<H", fadt, 46) == (9,)  # SCI_INT
    assert fadt[48:56] == bytes(8)  # no SMI_CMD, ACPI_ENABLE ...: ACPI mode is the only one
    assert struct.unpack_from("<8I", fadt, 56) == (0x600, 0, 0x604, 0, 0, 0x608, 0, 0)
    assert tuple(fadt[88:96]) == (4, 2, 0, 4, 0, 0, 0, 0)
    assert fadt[148:160] == struct.pack("<BBBBQ", 1, 32, 0, 2, 0x600)
    assert fadt[172:184] == struct.pack("<BBBBQ", 1, 16, 0, 2, 0x604)
    assert fadt[208:220] == struct.pack("<BBBBQ", 1, 32, 0, 3, 0x608)
    assert fadt[160:172] + fadt[184:208] + fadt[220:244] == bytes(60)


def test_fadt_flags_describe_the_machine() -> None:
    """The FADT has a fixed power button, no sleep button, a 32-bit timer and a reset register; no 8042 and no VGA."""
    fadt = direct()["FACP"]
    (flags,) = struct.unpack_from("<I", fadt, 112)
    (boot_arch,) = struct.unpack_from("<H", fadt, 109)

    assert len(fadt) == 244
    # WBINVD, PROC_C1, SLP_BUTTON (there is no button in the PM1 registers), FIX_RTC (it cannot wake the machine),
    # TMR_VAL_EXT and RESET_REG_SUP.  PWR_BUTTON is clear: the button is in the PM1 registers.
    assert flags == 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10
    assert fadt[116:129] == struct.pack("<BBBBQB", 1, 8, 0, 1, 0xCF9, 0x06)
    assert boot_arch == 1 << 2
    assert fadt[44:46] == bytes(2)  # no power profile
    assert struct.unpack_from("<HH", fadt, 96) == (0x0FFF, 0x0FFF)  # latencies of states C2 and C3, which do not exist
    assert fadt[100:108] == bytes(8)
    assert (fadt[108], fadt[111], fadt[129:132]) == (0x32, 0, bytes(3))


def test_headers_of_the_tables() -> None:
    """Their revisions tell which fields exist.  From revision 2 on, integers of the DSDT have 64 bits."""
    tables = direct()
    rsdp = struct.unpack("<8sB6sBIIQB3s", tables["RSDP"])

    assert (rsdp[2], rsdp[3], rsdp[5], rsdp[8]) == (b"VMD   ", 2, 36, bytes(3))
    assert tables["FACS"] == b"FACS" + (64).to_bytes(4, "little") + bytes(24) + b"\2" + bytes(31)
    headers = {name: struct.unpack_from("<4sIBB6s8sI4sI", table) for name, table in tables.items()}
    assert {name: headers[name][2] for name in ("RSDT", "XSDT", "FACP", "APIC", "DSDT")} == {
        "RSDT": 1, "XSDT": 1, "FACP": 4, "APIC": 3, "DSDT": 2,
    }  # fmt: skip
    for name in ("RSDT", "XSDT", "FACP", "APIC", "DSDT"):
        assert headers[name][1] == len(tables[name])
        assert headers[name][4:] == (b"VMD   ", b"VMDKVM  ", 1, b"VMD ", 1)


def crs(resources: str) -> str:
    """Return `Name (_CRS, ResourceTemplate () { resources })` as hexadecimal digits."""
    size = len(bytes.fromhex(resources)) + 2
    return f"08 5f435253 11 {size + 3:02x} 0a {size:02x} {resources} 7900"


# `_HID`, `_UID` and other names of a device, and its resources.
DEVICES = {
    "COM1": "08 5f484944 0c 41d00501 08 5f554944 01" + crs("47 01 f803 f803 01 08 22 1000"),
    "RTC_": "08 5f484944 0c 41d00b00" + crs("47 01 7000 7000 01 02 22 0001"),
    "PMIO": "08 5f484944 0c 41d00c02 08 5f554944 01" + crs("47 01 0006 0006 01 0c"),
    "FWCF": "08 5f484944 0d 51454d553030303200 08 5f535441 0a 0b" + crs("47 01 1005 1005 01 0c"),
    "C000": "08 5f484944 0d 4143504930303037 00 08 5f554944 00",
    "C001": "08 5f484944 0d 4143504930303037 00 08 5f554944 01",
}


@pytest.mark.parametrize("name", DEVICES)
def test_dsdt_describes_the_device(name: str) -> None:
    """Device (name) has the id by which drivers find it, its ports and its interrupt."""
    content = name.encode() + bytes.fromhex(DEVICES[name])
    assert len(content) < 63
    assert b"\x5b\x82" + bytes((len(content) + 1,)) + content in direct(vcpus=2)["DSDT"]


def test_dsdt_describes_the_host_bridge() -> None:
    """It is PNP0A03, bus 0, and passes on all ports except those of configuration mechanism 1."""
    bridge = "504349 30 08 5f484944 0c 41d00a03 08 5f42424e 00 08 5f554944 00 08 5f435253"
    bus = "88 0d00 02 0c 00 0000 0000 0000 0000 0100"
    ports = "47 01 f80c f80c 01 08 88 0d00 01 0c 03 0000 0000 f70c 0000 f80c 88 0d00 01 0c 03 0000 000d ffff 0000 00f3"
    dsdt = direct()["DSDT"]
    assert bytes.fromhex(bridge) in dsdt
    assert bytes.fromhex(bus + ports) in dsdt


@pytest.mark.parametrize("vcpus", range(1, 17))
def test_madt_lists_processors_and_overrides(vcpus: int) -> None:
    """The MADT has a local APIC per vCPU, one I/O APIC, the overrides of the ISA interrupts, and NMI on LINT1."""
    madt = direct(vcpus=vcpus)["APIC"]
    entries = []
    at = 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]

    assert struct.unpack_from("<II", madt, 36) == (layout.LAPIC_BASE, 1)
    assert entries == [
        *(struct.pack("<BBBBI", 0, 8, index, index, 1) for index in range(vcpus)),
        struct.pack("<BBBBII", 1, 12, layout.IOAPIC_ID, 0, layout.IOAPIC_BASE, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0),
        *(struct.pack("<BBBBIH", 2, 10, 0, irq, irq, 0x0D) for irq in (9, 10, 11)),
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
    ]


def test_dsdt_routes_every_pin_as_the_layout_does() -> None:
    """_PRT lists 31 slots of 4 pins in order, each pin with its GSI."""
    dsdt = direct()["DSDT"]
    expected = b"".join(
        bytes((0x12, 11 + (pin > 1), 4, 0x0C))
        + (slot << 16 | 0xFFFF).to_bytes(4, "little")
        + (bytes((0, 1))[pin : pin + 1] if pin < 2 else bytes((0x0A, pin)))
        + bytes((0, 0x0A, layout.pci_irq(slot, pin + 1)))
        for slot in range(1, 32)
        for pin in range(4)
    )
    assert expected in dsdt


@pytest.mark.parametrize(
    ("memory_bytes", "window"),
    [(128 * MIB, 0x80000000), (3584 * MIB, 0xE0000000), (5120 * MIB, 0xE0000000), (2560 * MIB, 0xC0000000)],
    ids=[*MEMORY_IDS, "2.5G"],
)
def test_dsdt_memory_window_starts_where_firmware_places_bars(memory_bytes: int, window: int) -> None:
    """The DWordMemory descriptor covers the addresses from there to the I/O APIC."""
    descriptor = bytes((0x87, 23, 0, 0, 0x0C, 1)) + struct.pack("<5I", 0, window, 0xFEBFFFFF, 0, 0xFEC00000 - window)
    assert descriptor in direct(memory_bytes)["DSDT"]


def test_dsdt_s5_has_the_sleep_type_of_the_pm_chip() -> None:
    """The DSDT ends with `Name (_S5, Package { 5, 5, 0, 0 })`."""
    assert acpi.S5_SLEEP_TYPE == 5
    assert direct()["DSDT"].endswith(b"\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00")


@needs_iasl
@pytest.mark.parametrize("name", ["FACP", "APIC", "FACS", "RSDT", "XSDT", "DSDT"])
def test_iasl_disassembles_without_complaint(name: str, tmp_path: Path) -> None:
    """iasl prints no error and no warning, and decodes everything."""
    (tmp_path / "table.dat").write_bytes(direct(5120 * MIB, 16)[name])

    printed = iasl(tmp_path, "-d", "table.dat")
    source = (tmp_path / "table.dsl").read_text()

    for complaint in ("error", "warning", "invalid", "unknown", "incorrect"):
        assert complaint not in printed.lower()
    assert "/****" not in source  # iasl's mark for bytes that it cannot decode


@needs_iasl
@pytest.mark.parametrize("memory_bytes", MEMORY, ids=MEMORY_IDS)
@pytest.mark.parametrize("vcpus", [1, 16])
def test_iasl_compiles_the_dsdt_back_to_the_same_bytes(memory_bytes: int, vcpus: int, tmp_path: Path) -> None:
    """iasl has no errors, warnings, remarks or optimizations.  Only the checksum and the compiler id may differ."""
    dsdt = direct(memory_bytes, vcpus)["DSDT"]
    (tmp_path / "dsdt.dat").write_bytes(dsdt)
    iasl(tmp_path, "-d", "dsdt.dat")

    printed = iasl(tmp_path, "-p", "again", "dsdt.dsl")
    again = (tmp_path / "again.aml").read_bytes()

    assert "0 Errors, 0 Warnings, 0 Remarks, 0 Optimizations" in printed
    assert again[:9] + again[10:28] + again[36:] == dsdt[:9] + dsdt[10:28] + dsdt[36:]
