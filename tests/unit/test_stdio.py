"""Standard input, output and error."""

import os

import pytest

from vmd import stdio
from vmd.errors import HostError


def test_say_and_show(capfd: pytest.CaptureFixture[str]) -> None:
    """Messages go to standard error, results to standard output."""
    stdio.say("said\udcff\n")
    stdio.show("shown\n")

    assert capfd.readouterr() == ("shown\n", "said\\udcff\n")


def test_outputs_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost message stops nobody.  A lost result is a failure."""

    def fail(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    stdio.say("said")
    with pytest.raises(HostError, match=r"^standard output: No space left on device$"):
        stdio.show("shown")
