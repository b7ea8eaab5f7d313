"""Finds places in guest RAM for a direct boot.  Each range is checked before a byte is stored in it."""

from vmd.errors import ImageError
from vmd.units import MIB, PAGE
from vmd.vm import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.vm.boot.image import Image
    from vmd.vm.boot.start import Memory


# End of a range for the vectors of real mode, the structures of vmd.vm.layout and the command line, for all protocols.
BOOT_DATA_END = 0x30000
CMDLINE_MAX = BOOT_DATA_END - layout.BOOT_CMDLINE - 1  # without its NUL

ZEROS = bytes(1 * MIB)


def round_up(value: int, unit: int) -> int:
    """Return the next multiple of `unit`, a power of two."""
    return (value + unit - 1) & -unit


class Placement:
    """The free RAM of one guest.  Error messages name the image `name`."""

    def __init__(self, name: str, memory_bytes: int) -> None:
        self.name = name
        self.memory_bytes = memory_bytes
        self.ram = [
            (start, start + size) for start, size, kind in layout.e820_map(memory_bytes) if kind == layout.E820_RAM
        ]
        self.taken: list[tuple[int, int, str]] = [(0, BOOT_DATA_END, "the boot data")]

    def claim(self, start: int, size: int, what: str) -> None:
        """Take a range for `what`.

        Raises:
            ImageError: the range is partly in use or outside RAM, or the guest has too little memory.
        """
        end = start + size
        place = f"{what} at {start:#x}-{end:#x}"
        if not any(first <= start and end <= last for first, last in self.ram):
            if start >= layout.HIGH_RAM_START and layout.low_ram_bytes(self.memory_bytes) < end:
                self._check_memory(end, place)
            raise ImageError(self.name, f"{place} does not lie in guest memory")
        for first, last, owner in self.taken:
            if start < last and first < end:
                raise ImageError(self.name, f"{place} overlaps {owner} at {first:#x}-{last:#x}")
        self.taken.append((start, end, what))

    def claim_highest(self, size: int, below: int, what: str) -> int:
        """Take the highest free page-aligned range that ends at or before `below`, and return its start.

        Raises:
            ImageError: there is no such range in RAM below 4 GiB.
        """
        limit = below
        below = min(limit, layout.low_ram_bytes(self.memory_bytes))
        start = (below - size) & -PAGE
        # From the highest taken range down: if `start` is inside a range, go below it.
        for first, last, _ in sorted(self.taken, reverse=True):
            if start < last and first < start + size:
                start = (first - size) & -PAGE
        if start < layout.HIGH_RAM_START:
            needed = max(last for _, last, _ in self.taken if last <= layout.LOW_RAM_MAX)
            needed = round_up(max(needed, layout.HIGH_RAM_START), PAGE) + round_up(size, PAGE)
            place = f"{what} of {size} bytes"
            if needed <= limit:
                self._check_memory(needed, place)
            raise ImageError(self.name, f"{place} does not fit below {below:#x}")
        self.claim(start, size, what)
        return start

    def _check_memory(self, needed_bytes: int, what: str) -> None:
        """Raise ImageError if the guest needs more memory."""
        if self.memory_bytes < needed_bytes <= layout.LOW_RAM_MAX:
            have, need = self.memory_bytes // MIB, round_up(needed_bytes, MIB) // MIB
            raise ImageError(self.name, f"{what} needs a guest of {need} MiB, this one has {have} MiB")


def clear(memory: "Memory", gpa: int, size: int) -> None:
    """Zero a range, in pieces, so that the loader itself needs little memory."""
    for offset in range(0, size, len(ZEROS)):
        memory.write(gpa + offset, ZEROS[: size - offset])


def store_cmdline(memory: "Memory", name: str, cmdline: bytes, limit: int) -> None:
    """Store the command line with a NUL at `layout.BOOT_CMDLINE`.  `limit` does not count the NUL."""
    limit = min(limit, CMDLINE_MAX)
    if b"\0" in cmdline:
        raise ImageError(name, "the command line contains a NUL")
    if len(cmdline) > limit:
        raise ImageError(name, f"the command line has {len(cmdline)} bytes, this kernel takes {limit}")
    memory.write(layout.BOOT_CMDLINE, cmdline + b"\0")


def load_initrd(memory: "Memory", placement: Placement, initrd: "Image", below: int) -> int:
    """Read the initrd into the highest free range that ends at or before `below`, and return its address."""
    gpa = placement.claim_highest(initrd.size, below, f"initrd {initrd.name}")
    initrd.read_into(memory.view(gpa, initrd.size), 0, "the initrd")
    return gpa
