"""The messages of device processes: no message of one kind has the number of a message for all kinds."""

import pytest

from vmd.devices.process import Process
from vmd.devices.vioblk.disk import VioblkProcess
from vmd.devices.vionet.main import NetProcess


@pytest.mark.parametrize("kind", [VioblkProcess, NetProcess])
def test_messages_for_all_kinds_keep_their_handlers(kind: type[Process]) -> None:
    """Otherwise a process would handle a message as another one."""
    assert Process.QUESTIONS.items() <= kind.QUESTIONS.items()
    assert Process.INFORMS.items() <= kind.INFORMS.items()
    assert not kind.QUESTIONS.keys() & kind.INFORMS.keys()
