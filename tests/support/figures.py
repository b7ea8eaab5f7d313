"""Figures (counters) of a device without a file behind them."""

from vmd.ipc import devmsg


def unseen(kind: str) -> memoryview:
    """Return figures that no other process reads."""
    return memoryview(bytearray(8 * len(devmsg.FIGURES[kind]))).cast("Q")
