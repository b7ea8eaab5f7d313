"""Waiting for conditions without an event to wait for."""

import select

PAUSE_S = 0.02


def pause() -> None:
    """Sleep a little before the next check, to leave the processor to other processes."""
    select.select([], [], [], PAUSE_S)
