"""What a device's process is asked and told: no message of its own has the number of one that all have."""

import pytest

from vmd.devices.process import Process
from vmd.devices.vioblk.disk import VioblkProcess
from vmd.devices.vionet.main import NetProcess


@pytest.mark.parametrize("kind", [VioblkProcess, NetProcess])
def test_what_all_are_asked_each_answers(kind: type[Process]) -> None:
    """Else its own answer would be given to another question."""
    assert Process.QUESTIONS.items() <= kind.QUESTIONS.items()
    assert Process.INFORMS.items() <= kind.INFORMS.items()
    assert not kind.QUESTIONS.keys() & kind.INFORMS.keys()
