"""fw_cfg: how firmware learns what machine it runs on (QEMU docs/specs/fw_cfg.rst).

A numbered item is selected at port 510h and read byte by byte from 511h or, by DMA, through 514h-51Bh;
item 19h lists the items that have names.  `for_seabios` makes the set that SeaBIOS reads in its
src/fw/paravirt.c; a bootorder names devices as its src/boot.c does.

Everything is read-only, and made when the guest selects an item for the first time: a kernel that is booted directly
may never do that, and its start does not wait for it.
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
        """What of `GuestMemory` DMA needs; both raise GuestError where there is no memory."""

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

KEY_WRITE = 0x4000  # "for writing", which no item of ours is; not part of the item's number
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
ZEROS = bytes(64 * 1024)  # what follows the end of an item, at most this much at a time


class FwCfg:
    """The fw_cfg device of one VM, at ports 510h to 51Bh."""

    PORTS = 12

    def __init__(self, memory: "Memory", fill: "Callable[[FwCfg], None] | None" = None) -> None:
        """`fill(self)` is called before the first item is selected, on a vCPU's thread."""
        self._memory = memory
        self._fill: Callable[[FwCfg], None] | None = None
        self._items: dict[int, memoryview] = {}
        self._files: dict[str, bytes] = {}
        self._lock = threads.Lock()  # selecting and reading are one state for all vCPUs
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
        """Add an item by name.

        Raises:
            ValueError: the name does not fit the directory or is taken.
        """
        raw = name.encode()
        if not raw or len(raw) > FILE_NAME_MAX or b"\0" in raw:
            raise ValueError(f"fw_cfg file name {name!r} is not 1 to {FILE_NAME_MAX} bytes")
        if name in self._files:
            raise ValueError(f"fw_cfg file {name!r} exists twice")
        self._files[name] = bytes(data)
        self._list_files()

    def _list_files(self) -> None:
        # In order of names, so that numbers do not depend on who added what first.
        directory = [struct.pack(">I", len(self._files))]
        for key, name in enumerate(sorted(self._files), FILE_FIRST):
            data = self._files[name]
            self.add_item(key, data)
            directory.append(FWCfgFile.pack(len(data), key, 0, name.encode()))
        self.add_item(FILE_DIR, b"".join(directory))

    # ---- ports

    def pio_read(self, offset: int, size: int) -> int:
        """Read on in the selected item, or the signature that tells of DMA; the selector cannot be read."""
        if offset == DATA:
            with self._lock:
                return int.from_bytes(self._take(size), "little")
        if offset >= DMA_HIGH:
            at = offset - DMA_HIGH
            return int.from_bytes(DMA_SIGNATURE[at : at + size], "little")
        return (1 << 8 * size) - 1

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Select an item, or give one half of a DMA descriptor's address; the lower half starts it."""
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
        """Return what `restore` takes: the place reached, not the items, which the configuration gives."""
        with self._lock:
            return {"key": self._key, "offset": self._offset, "dma_high": self._dma_high}

    def restore(self, state: dict[str, int]) -> None:
        """Continue where another one stopped.

        Raises:
            KeyError, TypeError: this is no state of fw_cfg.
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
        """Return the next bytes, zeros after the end."""
        data = bytes(self._item[self._offset : self._offset + size])
        self._offset += len(data)
        return data.ljust(size, b"\0")

    def _dma(self, gpa: int) -> None:
        """Execute the descriptor at `gpa`; the guest stands still until its control word says how it went."""
        try:
            control, length, address = FWCfgDmaAccess.unpack(self._memory.read(gpa, FWCfgDmaAccess.size))
        except GuestError:
            return  # nowhere to report it
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
            return  # the descriptor is in read-only memory: the guest waits for an answer it made impossible

    def _copy(self, gpa: int, length: int) -> None:
        """Write the next `length` bytes to guest memory, zeros after the end."""
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


# ---- what SeaBIOS wants to know


def boot_path(slot: int) -> str:
    """Return the bootorder line of a virtio disk."""
    return f"/pci@i0cf8/*@{slot:x}"


def scsi_boot_path(slot: int, target: int = 0, lun: int = 0) -> str:
    """Return the bootorder line of a disc behind a virtio SCSI controller."""
    return f"{boot_path(slot)}/*@0/*@{target},{lun}"


def bootorder(paths: "Iterable[str]", others: "Iterable[str]" = ()) -> bytes:
    """Return the `bootorder` file that tries some devices and no other.

    Once there is a HALT in it, SeaBIOS shows a boot loader only drives that have a line.  So `others` have theirs
    behind it: never tried, but there, as for the menu of an installation disc that offers to start from disk.
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
    """Fill in what SeaBIOS reads; `files` are ACPI's, or whatever else the caller has.

    Without `boot_paths` SeaBIOS goes by CMOS: first disk, then CD.  `other_paths` are drives not to start from.
    """
    fwcfg.add_item(UUID, uuid)
    fwcfg.add_item(RAM_SIZE, struct.pack("<Q", memory_bytes))
    fwcfg.add_item(NO_GRAPHIC, struct.pack("<H", 1))
    # Both must be what CMOS 5Fh says: SeaBIOS waits for that many CPUs to report, for ever.
    fwcfg.add_item(CPUS, struct.pack("<H", vcpus))
    fwcfg.add_item(MAX_CPUS, struct.pack("<H", vcpus))
    fwcfg.add_item(NUMA, bytes(8 + 8 * vcpus))  # no nodes; then each CPU's
    fwcfg.add_item(BOOT_MENU, struct.pack("<H", 0))  # nor two and a half seconds of waiting for F12
    fwcfg.add_item(IRQ0_OVERRIDE, b"\1")  # as the MADT says: the PIT is at I/O APIC pin 2

    e820 = layout.e820_map(memory_bytes, firmware_bytes)
    fwcfg.add_file("etc/e820", b"".join(E820_ENTRY.pack(*entry) for entry in e820))
    fwcfg.add_file("etc/sercon-port", struct.pack("<H", layout.PORT_COM1))  # its screen is our console
    fwcfg.add_file("etc/screen-and-debug", bytes(4))  # or every line shows twice
    # -1: with nothing to boot, say so and halt; the default reboots every minute, for ever.
    fwcfg.add_file("etc/boot-fail-wait", struct.pack("<i", -1))
    paths = tuple(boot_paths)
    if paths:
        fwcfg.add_file("bootorder", bootorder(paths, other_paths))
    for name, data in (files or {}).items():
        fwcfg.add_file(name, data)
