"""The word for how a VM ended."""

import pytest

from vmd.ipc.messages.vm import Outcome
from vmd.parent.endings import FAILED, KILLED, POWERED_OFF, REBOOTED, SENT, STOPPED, how_it_ended


@pytest.mark.parametrize(
    ("outcome", "unasked", "asked"),
    [
        (Outcome.POWER_OFF, POWERED_OFF, STOPPED),
        (Outcome.REBOOT, REBOOTED, STOPPED),
        (Outcome.ENDED, KILLED, KILLED),
        (Outcome.KILLED, FAILED, KILLED),
        (Outcome.FAILED, FAILED, FAILED),
    ],
)
def test_the_word_for_an_end(outcome: Outcome, unasked: str, asked: str) -> None:
    """It depends on whether the VM was asked to stop.  A VM that was sent has its own word."""
    assert how_it_ended(outcome, asked=False, sent=False) == unasked
    assert how_it_ended(outcome, asked=True, sent=False) == asked
    assert how_it_ended(outcome, asked=True, sent=True) == SENT
