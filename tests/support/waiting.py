"""How tests wait for what nobody tells them."""

import select

PAUSE_S = 0.02


def pause() -> None:
    """Leave the processor to what is waited for, before it is looked at again."""
    select.select([], [], [], PAUSE_S)
