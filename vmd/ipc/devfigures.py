"""A device's slot in the file of figures (`ipc/devmsg.py`).  Only the device stores to it."""

import mmap

from vmd.errors import PeerError
from vmd.ipc import devmsg

WORDS = devmsg.FIGURES_SLOT_BYTES // 8
TYPE_CHECKING = False
if TYPE_CHECKING:
    Figures = memoryview  # of u64, in the order of devmsg.FIGURES


def take_slot(fd: int, slot: int, kind: str, index: int) -> "Figures":
    """Write the head of a device's slot; return the rest of the slot: the figures, all 0, and the words behind them.

    `fd` is a file of figures.  The caller still owns it.

    Raises:
        PeerError: there is no slot of this number.
        OSError, ValueError: `fd` is not a file of figures.
    """
    if slot >= devmsg.FIGURES_SLOTS:
        raise PeerError("vm process", f"slot {slot} of {devmsg.FIGURES_SLOTS} for figures")
    words = memoryview(mmap.mmap(fd, devmsg.FIGURES_BYTES)).cast("Q")[slot * WORDS : (slot + 1) * WORDS]
    count = len(devmsg.FIGURES[kind])
    words[1], words[2] = index, count
    words[0] = 1 + devmsg.FIGURES_KINDS.index(kind)  # last: from now on readers see the slot
    return words[devmsg.FIGURES_HEAD :]
