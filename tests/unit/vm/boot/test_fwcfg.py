"""fw_cfg, read as by SeaBIOS and as by a hostile guest (hostile 49)."""

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.errors import GuestError
from vmd.vm import layout
from vmd.vm.boot.fwcfg import (
    DATA,
    DMA_ERROR,
    DMA_HIGH,
    DMA_LOW,
    DMA_READ,
    DMA_SELECT,
    DMA_SKIP,
    DMA_WRITE,
    FILE_DIR,
    SELECTOR,
    FwCfg,
    boot_path,
    bootorder,
    for_seabios,
    scsi_boot_path,
)
from vmd.vm.bus import Bus

RAM_BYTES = 1 << 20
DESCRIPTOR = 0x8000
BUFFER = 0x10000


class Ram:
    """1 MiB of guest memory.  The addresses in `rom` are read-only."""

    def __init__(self, rom: range = range(0)) -> None:
        self.data = bytearray(b"\xcc" * RAM_BYTES)
        self.rom = rom
        self.largest = 0

    def read(self, gpa: int, size: int) -> bytes:
        """Return a copy of bytes."""
        if gpa + size > RAM_BYTES:
            raise GuestError(f"no memory at {gpa:#x}")
        return bytes(self.data[gpa : gpa + size])

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        """Store bytes."""
        self.largest = max(self.largest, len(data))
        if gpa + len(data) > RAM_BYTES or gpa in self.rom:
            raise GuestError(f"no writable memory at {gpa:#x}")
        self.data[gpa : gpa + len(data)] = data


class Firmware:
    """A guest that reads fw_cfg."""

    def __init__(self, rom: range = range(0)) -> None:
        self.ram = Ram(rom)
        self.fwcfg = FwCfg(self.ram)

    def select(self, key: int) -> None:
        """Write the selector, port 510h."""
        self.fwcfg.pio_write(SELECTOR, 2, key)

    def read(self, size: int) -> bytes:
        """Read the data port, 511h, byte by byte."""
        return bytes(self.fwcfg.pio_read(DATA, 1) for _ in range(size))

    def start(self, gpa: int) -> None:
        """Write the DMA address, ports 514h and 518h, big-endian."""
        raw = struct.pack(">Q", gpa)
        self.fwcfg.pio_write(DMA_HIGH, 4, int.from_bytes(raw[:4], "little"))
        self.fwcfg.pio_write(DMA_LOW, 4, int.from_bytes(raw[4:], "little"))

    def dma(self, control: int, length: int = 0, address: int = BUFFER) -> int:
        """Run a DMA descriptor.  Return its control word afterwards."""
        self.ram.data[DESCRIPTOR : DESCRIPTOR + 16] = struct.pack(">IIQ", control, length, address)
        self.start(DESCRIPTOR)
        return int.from_bytes(self.ram.read(DESCRIPTOR, 4), "big")

    def item(self, key: int, size: int) -> bytes:
        """Read an item by DMA."""
        assert self.dma(key << 16 | DMA_SELECT | DMA_READ, size) == 0
        return self.ram.read(BUFFER, size)

    def files(self) -> dict[str, bytes]:
        """Read the directory and all its files."""
        count = int.from_bytes(self.item(FILE_DIR, 4), "big")
        directory = self.item(FILE_DIR, 4 + 64 * count)[4:]
        found = {}
        for at in range(0, len(directory), 64):
            size, key, reserved, name = struct.unpack(">IHH56s", directory[at : at + 64])
            assert reserved == 0
            found[name.rstrip(b"\0").decode()] = self.item(key, size)
        return found


@pytest.fixture
def firmware() -> Firmware:
    """Return a guest with an empty fw_cfg."""
    return Firmware()


def test_seabios_detects_the_device_and_its_dma(firmware: Firmware) -> None:
    """SeaBIOS reads the signature, the features, and the signature in the DMA register."""
    firmware.select(0)
    assert firmware.read(4) == b"QEMU"
    assert firmware.item(1, 4) == b"\x03\0\0\0"
    high = firmware.fwcfg.pio_read(DMA_HIGH, 4).to_bytes(4, "little")
    low = firmware.fwcfg.pio_read(DMA_LOW, 4).to_bytes(4, "little")
    assert high + low == b"QEMU CFG"
    assert firmware.fwcfg.pio_read(DMA_HIGH + 1, 1) == ord("E")


def test_item_ends_in_zeros(firmware: Firmware) -> None:
    """After its end, an item reads as zeroes for ever, in accesses of every size."""
    firmware.fwcfg.add_item(0x0F, b"\x01\x02\x03")
    firmware.select(0x0F)
    assert firmware.fwcfg.pio_read(DATA, 2) == 0x0201
    assert firmware.fwcfg.pio_read(DATA, 4) == 0x00000003
    assert firmware.read(3) == b"\0\0\0"


@pytest.mark.parametrize("key", [0x06, 0x1234, 0x3FFF, 0xBFFF])
def test_unknown_item_is_empty(firmware: Firmware, key: int) -> None:
    """A guest may select any number."""
    firmware.select(key)
    assert firmware.read(8) == bytes(8)
    assert firmware.item(key, 8) == bytes(8)


def test_write_flag_of_the_selector_is_not_part_of_the_number(firmware: Firmware) -> None:
    """Bit 14 of the selector is the flag.  The data port ignores writes even then."""
    firmware.select(0x4000)
    firmware.fwcfg.pio_write(DATA, 1, 0x55)
    assert firmware.read(4) == b"QEMU"
    firmware.select(0)
    assert firmware.read(4) == b"QEMU"


def test_rep_insb_reads_through_the_bus(firmware: Firmware) -> None:
    """A driver without DMA reads an item in this way."""
    bus = Bus()
    bus.add_pio(layout.PORT_FWCFG_SELECT, FwCfg.PORTS, firmware.fwcfg)
    bus.pio_write(layout.PORT_FWCFG_SELECT, 2, 0)
    assert bus.pio_read_string(layout.PORT_FWCFG_DATA, 1, 6) == b"QEMU\0\0"
    assert bus.pio_read(layout.PORT_FWCFG_DMA, 4) == int.from_bytes(b"QEMU", "little")


def test_directory_is_sorted_and_lists_the_files(firmware: Firmware) -> None:
    """The order in which files were added does not matter."""
    contents = {"etc/zebra": b"z" * 100, "bootorder": b"HALT\0", "etc/acpi/rsdp": b"", "a" * 55: b"long"}
    for name, data in contents.items():
        firmware.fwcfg.add_file(name, data)
    assert list(firmware.files()) == sorted(contents)
    assert firmware.files() == contents


@pytest.mark.parametrize("name", ["", "a" * 56, "a\0b", "é" * 28])
def test_name_that_does_not_fit_is_refused(firmware: Firmware, name: str) -> None:
    """A name has at most 55 bytes, because a zero follows."""
    with pytest.raises(ValueError, match="is not 1 to 55 bytes"):
        firmware.fwcfg.add_file(name, b"")


def test_name_that_exists_is_refused(firmware: Firmware) -> None:
    """Firmware would find only one of the two files."""
    firmware.fwcfg.add_file("x", b"1")
    with pytest.raises(ValueError, match="'x' exists twice"):
        firmware.fwcfg.add_file("x", b"2")


def test_dma_reads_skips_and_fills_with_zeros(firmware: Firmware) -> None:
    """DMA and the data port have the same offset."""
    firmware.fwcfg.add_item(0x50, bytes(range(100)))
    firmware.select(0x50)
    assert firmware.read(2) == b"\x00\x01"
    assert firmware.dma(DMA_READ, 3) == 0
    assert firmware.ram.read(BUFFER, 4) == b"\x02\x03\x04\xcc"
    assert firmware.dma(DMA_SKIP, 90) == 0
    assert firmware.read(1) == b"\x5f"
    assert firmware.dma(DMA_READ, 8) == 0
    assert firmware.ram.read(BUFFER, 9) == b"\x60\x61\x62\x63\0\0\0\0\xcc"
    assert firmware.dma(DMA_SKIP, 0xFFFFFFFF) == 0
    assert firmware.read(1) == b"\0"


def test_descriptors_without_a_transfer_succeed(firmware: Firmware) -> None:
    """One descriptor only selects an item, and one is empty."""
    assert firmware.dma(0x0001 << 16 | DMA_SELECT) == 0
    assert firmware.dma(0) == 0
    assert firmware.read(1) == b"\x03"


def test_read_takes_precedence(firmware: Firmware) -> None:
    """A descriptor with read, write and skip reads."""
    assert firmware.dma(DMA_SELECT | DMA_READ | DMA_WRITE | DMA_SKIP, 4) == 0
    assert firmware.ram.read(BUFFER, 4) == b"QEMU"


def test_writing_an_item_is_an_error(firmware: Firmware) -> None:
    """The item does not change (CVE-2016-1714)."""
    assert firmware.dma(DMA_SELECT | DMA_WRITE, 4) == DMA_ERROR
    firmware.select(0)
    assert firmware.read(4) == b"QEMU"


@pytest.mark.parametrize("address", [RAM_BYTES, RAM_BYTES - 2, 1 << 32, (1 << 64) - 2, (1 << 64) - 1])
def test_buffer_outside_memory_is_an_error(firmware: Firmware, address: int) -> None:
    """The control word has the error, and there is no exception."""
    assert firmware.dma(DMA_SELECT | DMA_READ, 4, address) == DMA_ERROR
    assert firmware.dma(0x99 << 16 | DMA_SELECT | DMA_READ, 4, address) == DMA_ERROR


@pytest.mark.parametrize("gpa", [RAM_BYTES, RAM_BYTES - 8, (1 << 64) - 4, 0xFFFFFFFF])
def test_descriptor_outside_memory_is_ignored(firmware: Firmware, gpa: int) -> None:
    """Its control word cannot be written either."""
    before = bytes(firmware.ram.data)
    firmware.start(gpa)
    assert firmware.ram.data == before


def test_descriptor_in_rom_is_ignored() -> None:
    """The transfer is done, but the control word cannot be written."""
    firmware = Firmware(rom=range(DESCRIPTOR, DESCRIPTOR + 16))
    assert firmware.dma(DMA_SELECT | DMA_READ, 4) == DMA_SELECT | DMA_READ
    assert firmware.ram.read(BUFFER, 4) == b"QEMU"


def test_address_register_is_cleared_by_an_operation(firmware: Firmware) -> None:
    """The upper half counts for one operation only.  Writes of other widths are ignored."""
    firmware.start(1 << 32 | DESCRIPTOR)
    firmware.ram.data[DESCRIPTOR : DESCRIPTOR + 16] = struct.pack(">IIQ", DMA_SELECT | DMA_READ, 4, BUFFER)
    firmware.fwcfg.pio_write(DMA_LOW, 2, 0x0080)
    firmware.fwcfg.pio_write(DMA_LOW, 1, 0x80)
    assert firmware.ram.read(BUFFER, 4) == b"\xcc" * 4
    firmware.fwcfg.pio_write(DMA_LOW, 4, int.from_bytes(struct.pack(">I", DESCRIPTOR), "little"))
    assert firmware.ram.read(BUFFER, 4) == b"QEMU"


def test_huge_length_is_written_in_pieces(firmware: Firmware) -> None:
    """A transfer of 4 GiB of zeroes fails at the end of guest memory, and takes little memory of ours."""
    tracemalloc.start()
    assert firmware.dma(DMA_SELECT | DMA_READ, 0xFFFFFFFF) == DMA_ERROR
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert firmware.ram.largest <= 64 * 1024
    assert firmware.ram.read(BUFFER + 4, 1 << 16) == bytes(1 << 16)


def test_selecting_for_ever_allocates_nothing(firmware: Firmware) -> None:
    """The guest selects known and unknown items."""
    firmware.fwcfg.add_item(0x50, bytes(100000))
    for key in range(256):
        firmware.select(key)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(50):
        for key in (0x50, 0x77, 0x19, 0xFFFF):
            firmware.select(key)
            firmware.fwcfg.pio_read(DATA, 1)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 1000


def test_saved_state_continues(firmware: Firmware) -> None:
    """The state is in the middle of an item.  An offset beyond an item is set to its end."""
    firmware.select(0)
    firmware.read(2)
    other = Firmware()
    other.fwcfg.restore(firmware.fwcfg.state())
    assert other.read(3) == b"MU\0"
    other.fwcfg.restore({"key": 0, "offset": 1 << 70, "dma_high": 0})
    assert other.read(2) == b"\0\0"


def test_each_register_of_a_state_is_restored(firmware: Firmware) -> None:
    """Each bit of the item's number and of the upper half of the address, and any offset in the item."""
    state = firmware.fwcfg.state()
    for name, bits in (("key", 16), ("dma_high", 32)):
        for bit in range(bits + 1):
            firmware.fwcfg.restore(state | {name: 1 << bit})
            assert firmware.fwcfg.state() == state | {name: 1 << bit & (1 << bits) - 1}
    firmware.fwcfg.add_item(0x50, bytes(range(100)))
    for offset, kept in ((-1, 0), (0, 0), (1, 1), (99, 99), (100, 100), (101, 100)):
        firmware.fwcfg.restore({"key": 0x50, "offset": offset, "dma_high": 0})
        assert firmware.fwcfg.state()["offset"] == kept
        assert firmware.read(1) == bytes((kept % 100,))


def test_boot_paths_are_those_that_seabios_matches() -> None:
    """SeaBIOS's patterns match these lines.  Slots are hexadecimal, and targets are decimal."""
    assert boot_path(10) == "/pci@i0cf8/*@a"
    assert scsi_boot_path(4) == "/pci@i0cf8/*@4/*@0/*@0,0"
    assert bootorder([boot_path(3)]) == b"/pci@i0cf8/*@3\nHALT\0"
    assert bootorder([scsi_boot_path(3)], [boot_path(2)]) == b"/pci@i0cf8/*@3/*@0/*@0,0\nHALT\n/pci@i0cf8/*@2\0"
    assert bootorder([]) == b"HALT\0"


def test_seabios_finds_all_it_needs(firmware: Firmware) -> None:
    """It finds the standard items and files, and the files of ACPI."""
    memory_bytes = 8 << 30
    for_seabios(
        firmware.fwcfg,
        memory_bytes=memory_bytes,
        vcpus=3,
        uuid=bytes(range(16)),
        boot_paths=[boot_path(2)],
        files={"etc/acpi/rsdp": b"RSD PTR ", "etc/table-loader": bytes(128)},
    )

    assert firmware.item(0x02, 16) == bytes(range(16))
    assert firmware.item(0x03, 8) == struct.pack("<Q", memory_bytes)
    assert firmware.item(0x04, 2) == b"\1\0"  # there is no screen
    assert firmware.item(0x05, 2) == firmware.item(0x0F, 2) == b"\x03\0"
    assert firmware.item(0x0D, 32) == bytes(32)
    assert firmware.item(0x0E, 2) == b"\0\0"
    assert firmware.item(0x8002, 1) == b"\1"
    files = firmware.files()
    assert files["etc/sercon-port"] == b"\xf8\x03"
    assert files["etc/screen-and-debug"] == bytes(4)
    assert files["etc/boot-fail-wait"] == b"\xff\xff\xff\xff"
    assert files["bootorder"] == b"/pci@i0cf8/*@2\nHALT\0"
    assert files["etc/acpi/rsdp"] == b"RSD PTR "
    assert files["etc/table-loader"] == bytes(128)
    e820 = list(struct.iter_unpack("<QQI", files["etc/e820"]))
    assert e820 == layout.e820_map(memory_bytes)
    assert sum(size for _, size, kind in e820 if kind == layout.E820_RAM) == memory_bytes - 0x60000


def test_without_boot_paths_there_is_no_bootorder(firmware: Firmware) -> None:
    """With an empty bootorder, SeaBIOS would halt."""
    for_seabios(firmware.fwcfg, memory_bytes=1 << 29, vcpus=1)
    assert "bootorder" not in firmware.files()


ACCESS = st.tuples(st.booleans(), st.integers(0, 11), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF))


@given(st.lists(ACCESS, max_size=30))
def test_no_port_access_breaks_anything(steps: list[tuple[bool, int, int, int]]) -> None:
    """After accesses to all offsets in all sizes, values fit, and there is no exception."""
    firmware = Firmware()
    for write, offset, size, value in steps:
        if write:
            firmware.fwcfg.pio_write(offset, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= firmware.fwcfg.pio_read(offset, size) < 1 << 8 * size


DESCRIPTORS = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.builds(
        lambda key, control, length, address: struct.pack(">IIQ", key << 16 | control, length, address),
        st.sampled_from([0, 1, FILE_DIR, 0x20, 0x4020, 0xFFFF]),
        st.integers(0, 0x1F),
        st.one_of(st.integers(0, 100), st.integers(0, 0xFFFFFFFF)),
        st.one_of(st.integers(0, RAM_BYTES), st.integers(0, (1 << 64) - 1)),
    ),
)


@given(st.lists(DESCRIPTORS, max_size=4), st.integers(0, RAM_BYTES + 32))
def test_no_descriptor_breaks_anything(descriptors: list[bytes], gpa: int) -> None:
    """A descriptor has any 16 bytes at any address.  If it is in memory, its control word ends as done or failed."""
    firmware = Firmware()
    firmware.fwcfg.add_file("file", bytes(range(60)))
    inside = gpa + 16 <= RAM_BYTES
    for raw in descriptors:
        if inside:
            firmware.ram.data[gpa : gpa + 16] = raw
        firmware.start(gpa)
        assert not inside or int.from_bytes(firmware.ram.read(gpa, 4), "big") in (0, DMA_ERROR)
    assert firmware.files() == {"file": bytes(range(60))}


def test_items_are_made_when_the_first_one_is_selected() -> None:
    """They are made once, for any item.  The signature can be read before."""
    made: list[FwCfg] = []

    def fill(fwcfg: FwCfg) -> None:
        made.append(fwcfg)
        fwcfg.add_file("etc/late", b"late")

    fwcfg = FwCfg(Ram(), fill)

    assert bytes(fwcfg.pio_read(DATA, 1) for _ in range(4)) == b"QEMU"
    assert made == []
    for _ in range(2):
        fwcfg.pio_write(SELECTOR, 2, FILE_DIR)
        directory = bytes(fwcfg.pio_read(DATA, 1) for _ in range(4 + 64))
        assert directory[:8] == struct.pack(">II", 1, 4)
    assert made == [fwcfg]
