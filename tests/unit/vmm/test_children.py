"""What vmm lets a VM process say."""

import time
from typing import Any, cast

import pytest

from vmd.ipc.messages import AskResolvers
from vmd.vmm.children import ASKS_MAX, ASKS_PER_S, VmChild


def test_name_servers_are_not_asked_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest may ask as fast as it likes: the parent hears of some at once, and then of a few in a second."""
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    child = VmChild(1, -1, cast("Any", None))

    assert sum(child.account(AskResolvers(vmid=1)) for _ in range(1000)) == ASKS_MAX
    now_s += 1
    assert sum(child.account(AskResolvers(vmid=1)) for _ in range(1000)) == ASKS_PER_S
    now_s += 1000
    assert sum(child.account(AskResolvers(vmid=1)) for _ in range(1000)) == ASKS_MAX
