"""fw_cfg: describes the machine to the firmware (QEMU docs/specs/fw_cfg.rst).

An item has a number.  The guest selects it at port 510h, and reads it byte by byte from 511h, or by DMA through
514h-51Bh.  Item 19h lists the items that have names.  `for_seabios` makes the items that SeaBIOS reads in its
src/fw/paravirt.c.  The bootorder names devices as its src/boot.c does.

All items are read-only.  They are made when the guest selects an item for the first time.  A kernel that is booted
directly may never do that, so its start need not wait for them.
"""

import struct

from vmd import threads
from vmd.errors import GuestError
from vmd.vm import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Protocol

    class Memory(Protocol):
        """The methods of `GuestMemory` that DMA needs.  Both raise GuestError if there is no memory at an address."""

        def read(self, gpa: int, size: int, /) -> bytes:
            """Return a copy of memory."""

        def write(self, gpa: int, data: bytes | memoryview, /) -> None:
            """Store into memory."""


SELECTOR, DATA, DMA_HIGH, DMA_LOW = 0, 1, 4, 8  # offsets

# Item keys
SIGNATURE = 0x00
ID = 0x01
UUID = 0x02
RAM_SIZE = 0x03
NO_GRAPHIC = 0x04
CPUS = 0x05
NUMA = 0x0D
BOOT_MENU = 0x0E
MAX_CPUS = 0x0F
FILE_DIR = 0x19
FILE_FIRST = 0x20
IRQ0_OVERRIDE = 0x8002

KEY_WRITE = 0x4000  # "for writing": ignored, as it is not part of the item's number and no item can be written
ID_TRADITIONAL = 1 << 0
ID_DMA = 1 << 1
DMA_SIGNATURE = b"QEMU CFG"

DMA_ERROR = 0x01
DMA_READ = 0x02
DMA_SKIP = 0x04
DMA_SELECT = 0x08
DMA_WRITE = 0x10

FWCfgDmaAccess = struct.Struct(">IIQ")  # control, length, address
FWCfgFile = struct.Struct(">IHH56s")  # size, select, reserved, name
E820_ENTRY = struct.Struct("<QQI")

FILE_NAME_MAX = 55  # bytes; a zero ends the name
ZEROS = bytes(64 * 1024)  # a read past the end of an item returns zeros; DMA writes them in pieces of this size


class FwCfg:
    """The fw_cfg device of one VM, at ports 510h to 51Bh."""

    PORTS = 12

    def __init__(self, memory: "Memory", fill: "Callable[[FwCfg], None] | None" = None) -> None:
        """`fill(self)` is called on a vCPU thread before the guest selects the first item.  It adds items."""
        self._memory = memory
        self._fill: Callable[[FwCfg], None] | None = None
        self._items: dict[int, memoryview] = {}
        self._files: dict[str, bytes] = {}
        self._lock = threads.Lock()  # all vCPUs share the selected item and the position in it
        self._key = SIGNATURE
        self._item = memoryview(b"")
        self._offset = 0
        self._dma_high = 0
        self.add_item(SIGNATURE, b"QEMU")
        self.add_item(ID, struct.pack("<I", ID_TRADITIONAL | ID_DMA))
        self._list_files()
        self._select(SIGNATURE)
        self._fill = fill

    # ---- contents

    def add_item(self, key: int, data: bytes) -> None:
        """Set the data of a numbered item."""
        self._items[key] = memoryview(bytes(data))

    def add_file(self, name: str, data: bytes) -> None:
        """Add an item with a name.

        Raises:
            ValueError: the name is too long for the directory, or is taken.
        """
        raw = name.encode()
        if not raw or len(raw) > FILE_NAME_MAX or b"\0" in raw:
            raise ValueError(f"fw_cfg file name {name!r} is not 1 to {FILE_NAME_MAX} bytes")
        if name in self._files:
            raise ValueError(f"fw_cfg file {name!r} exists twice")
        self._files[name] = bytes(data)
        self._list_files()

    def _list_files(self) -> None:
        # Sorted by name, so that the numbers do not depend on the order in which items are added.
        directory = [struct.pack(">I", len(self._files))]
        for key, name in enumerate(sorted(self._files), FILE_FIRST):
            data = self._files[name]
            self.add_item(key, data)
            directory.append(FWCfgFile.pack(len(data), key, 0, name.encode()))
        self.add_item(FILE_DIR, b"".join(directory))

    # ---- ports

    def pio_read(self, offset: int, size: int) -> int:
        """Read the next bytes of the selected item, or the signature that shows that there is DMA.

        The selector cannot be read.
        """
        if offset == DATA:
            with self._lock:
                return int.from_bytes(self._take(size), "little")
        if offset >= DMA_HIGH:
            at = offset - DMA_HIGH
            return int.from_bytes(DMA_SIGNATURE[at : at + size], "little")
        return (1 << 8 * size) - 1

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Select an item, or write one half of the address of a DMA descriptor.  The lower half starts the DMA."""
        if offset == SELECTOR and size == 2:
            with self._lock:
                self._select(value)
        elif offset == DMA_HIGH and size == 4:
            self._dma_high = _swap32(value)
        elif offset == DMA_LOW and size == 4:
            with self._lock:
                gpa, self._dma_high = self._dma_high << 32 | _swap32(value), 0
                self._dma(gpa)

    def state(self) -> dict[str, int]:
        """Return the state, for `restore`.  It does not include the items, which follow from the configuration."""
        with self._lock:
            return {"key": self._key, "offset": self._offset, "dma_high": self._dma_high}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from a saved state.

        Raises:
            KeyError, TypeError: this is not the state of fw_cfg.
        """
        with self._lock:
            self._select(state["key"] & 0xFFFF)
            self._offset = max(0, min(state["offset"], len(self._item)))
            self._dma_high = state["dma_high"] & 0xFFFFFFFF

    # ---- inside

    def _select(self, key: int) -> None:
        if self._fill is not None:
            fill, self._fill = self._fill, None
            fill(self)
        self._key = key
        self._item = self._items.get(key & ~KEY_WRITE, NOTHING)
        self._offset = 0

    def _take(self, size: int) -> bytes:
        """Return the next `size` bytes, with zeros after the end of the item."""
        data = bytes(self._item[self._offset : self._offset + size])
        self._offset += len(data)
        return data.ljust(size, b"\0")

    def _dma(self, gpa: int) -> None:
        """Execute the descriptor at `gpa`, and write the result to its control word.  The vCPU waits meanwhile."""
        try:
            control, length, address = FWCfgDmaAccess.unpack(self._memory.read(gpa, FWCfgDmaAccess.size))
        except GuestError:
            return  # without the descriptor, there is no place to report the error
        if control & DMA_SELECT:
            self._select(control >> 16)
        result = 0
        if control & DMA_READ:
            try:
                self._copy(address, length)
            except GuestError:
                result = DMA_ERROR
        elif control & DMA_WRITE:
            result = DMA_ERROR  # every item is read-only
        elif control & DMA_SKIP:
            self._offset = min(self._offset + length, len(self._item))
        try:
            self._memory.write(gpa, struct.pack(">I", result))
        except GuestError:
            return  # the descriptor is in read-only memory: the guest's mistake, which cannot be reported

    def _copy(self, gpa: int, length: int) -> None:
        """Write the next `length` bytes to guest memory, with zeros after the end of the item."""
        data = self._item[self._offset : self._offset + length]
        if data:
            self._memory.write(gpa, data)
            self._offset += len(data)
        end = gpa + length
        gpa += len(data)
        while gpa < end:
            piece = min(end - gpa, len(ZEROS))
            self._memory.write(gpa, ZEROS if piece == len(ZEROS) else ZEROS[:piece])
            gpa += piece


NOTHING = memoryview(b"")


def _swap32(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "little"), "big")


# ---- items for SeaBIOS


def boot_path(slot: int) -> str:
    """Return the bootorder line of a virtio disk."""
    return f"/pci@i0cf8/*@{slot:x}"


def scsi_boot_path(slot: int, target: int = 0, lun: int = 0) -> str:
    """Return the bootorder line of a disc behind a virtio SCSI controller."""
    return f"{boot_path(slot)}/*@0/*@{target},{lun}"


def bootorder(paths: "Iterable[str]", others: "Iterable[str]" = ()) -> bytes:
    """Return the `bootorder` file with which SeaBIOS boots only from `paths`.

    If there is a HALT in it, SeaBIOS shows a boot loader only the drives that have a line.  So `others` have lines
    after HALT.  SeaBIOS does not boot from them, but a boot loader can use them: for example, the menu of an
    installation disc may offer to boot from the disk.
    """
    return "\n".join([*paths, "HALT", *others]).encode() + b"\0"


def for_seabios(
    fwcfg: FwCfg,
    *,
    memory_bytes: int,
    vcpus: int,
    firmware_bytes: int = layout.FIRMWARE_BYTES,
    uuid: bytes = bytes(16),
    boot_paths: "Iterable[str]" = (),
    other_paths: "Iterable[str]" = (),
    files: "Mapping[str, bytes] | None" = None,
) -> None:
    """Add the items that SeaBIOS reads, and `files`, such as the ACPI tables.

    Without `boot_paths`, SeaBIOS uses the order in CMOS: disk, then CD.  `other_paths` are drives that it does not boot
    from.
    """
    fwcfg.add_item(UUID, uuid)
    fwcfg.add_item(RAM_SIZE, struct.pack("<Q", memory_bytes))
    fwcfg.add_item(NO_GRAPHIC, struct.pack("<H", 1))
    # Both must agree with CMOS 5Fh: SeaBIOS waits for so many processors, without a timeout.
    fwcfg.add_item(CPUS, struct.pack("<H", vcpus))
    fwcfg.add_item(MAX_CPUS, struct.pack("<H", vcpus))
    fwcfg.add_item(NUMA, bytes(8 + 8 * vcpus))  # the number of nodes, which is 0, and the node of each processor
    fwcfg.add_item(BOOT_MENU, struct.pack("<H", 0))  # no menu: SeaBIOS would wait 2.5 seconds for F12
    fwcfg.add_item(IRQ0_OVERRIDE, b"\1")  # as in the MADT: the PIT is at pin 2 of the I/O APIC

    e820 = layout.e820_map(memory_bytes, firmware_bytes)
    fwcfg.add_file("etc/e820", b"".join(E820_ENTRY.pack(*entry) for entry in e820))
    fwcfg.add_file("etc/sercon-port", struct.pack("<H", layout.PORT_COM1))  # SeaBIOS writes its screen to our console
    fwcfg.add_file("etc/screen-and-debug", bytes(4))  # 0: otherwise every line is written twice
    # -1: if there is nothing to boot from, SeaBIOS says so and halts.  By default it would reboot every minute.
    fwcfg.add_file("etc/boot-fail-wait", struct.pack("<i", -1))
    paths = tuple(boot_paths)
    if paths:
        fwcfg.add_file("bootorder", bootorder(paths, other_paths))
    for name, data in (files or {}).items():
        fwcfg.add_file(name, data)
