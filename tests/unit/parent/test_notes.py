"""Notes for clients: as many as fit into a message."""

import pytest

from vmd.ipc.imsg import Form, encode
from vmd.ipc.messages.clients import Ok, VmStarted
from vmd.parent.report import NOTES_MAX, brief_notes


@pytest.mark.parametrize("length", [10, 500, 1100, 3999, 4001, 100_000])
@pytest.mark.parametrize("count", [1, 2, NOTES_MAX, NOTES_MAX + 1, 1000])
def test_notes_always_fit(length: int, count: int) -> None:
    """Otherwise the start would fail, or the daemon.  The last note says how many are left out."""
    notes = brief_notes(["\udcff\N{SNOWMAN}".ljust(length, "x")] * count)

    encode(Ok(notes=notes), form=Form.NAMED)
    encode(VmStarted(vmid=1, name="n" * 63, pid=1, tty="/dev/pts/1", notes=notes))
    shown = len(notes) - notes[-1].startswith("and ")
    assert 0 < shown <= NOTES_MAX
    assert shown == count or notes[-1] == f"and {count - shown} more; see the log"
