"""Where a device leaves what it counts (`ipc/devmsg.py`): the words of its slot, which only it stores to."""

import mmap

from vmd.errors import PeerError
from vmd.ipc import devmsg

WORDS = devmsg.FIGURES_SLOT_BYTES // 8
TYPE_CHECKING = False
if TYPE_CHECKING:
    Figures = memoryview  # of u64, in the order of devmsg.FIGURES


def take_slot(fd: int, slot: int, kind: str, index: int) -> "Figures":
    """Return the slot of a device, but for its head: its figures, all 0, and what is behind them.

    `fd`, a file of figures, stays the caller's.

    Raises PeerError for a slot that there is not, OSError or ValueError for what is no such file.
    """
    if slot >= devmsg.FIGURES_SLOTS:
        raise PeerError("vm process", f"slot {slot} of {devmsg.FIGURES_SLOTS} for figures")
    words = memoryview(mmap.mmap(fd, devmsg.FIGURES_BYTES)).cast("Q")[slot * WORDS : (slot + 1) * WORDS]
    count = len(devmsg.FIGURES[kind])
    words[1], words[2] = index, count
    words[0] = 1 + devmsg.FIGURES_KINDS.index(kind)  # last: from now on somebody has it
    return words[devmsg.FIGURES_HEAD :]


def unseen(kind: str) -> "Figures":
    """Return figures that nobody reads."""
    return memoryview(bytearray(8 * len(devmsg.FIGURES[kind]))).cast("Q")
