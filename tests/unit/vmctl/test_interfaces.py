"""Words about the interfaces of a VM."""

import pytest

from vmctl.interfaces import forward_words, source_text
from vmd.config.model import Forward, Prefix


@pytest.mark.parametrize(
    ("source", "text", "words"),
    [
        (None, "", ""),
        (Prefix(address=bytes((192, 0, 2, 0)), length=24), "192.0.2.0/24", " from 192.0.2.0/24"),
    ],
)
def test_a_forward(source: Prefix | None, text: str, words: str) -> None:
    """It is shown as vm.conf has it.  Without a source, all may use it."""
    forward = Forward(port=8022, to=22, source=source)
    assert source_text(forward) == text
    assert forward_words(forward) == f"tcp port 8022 to port 22{words}"
