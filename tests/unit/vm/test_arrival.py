"""Closing a VM that was received in vain does not delay the answer to the sender."""

import errno
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from vmd.errors import HostError
from vmd.vm import arrival
from vmd.vm.arrival import close_in_background

DEADLINE_S = 60.0


def test_a_vm_is_closed_on_its_own_thread() -> None:
    """The caller does not wait for the kernel to close the VM."""
    go, closed = threading.Event(), threading.Event()

    def close() -> None:
        assert go.wait(DEADLINE_S)
        closed.set()

    vm: Any = SimpleNamespace(close=close)

    close_in_background(vm)

    assert not closed.is_set()
    go.set()
    assert closed.wait(DEADLINE_S)


def test_a_vm_is_closed_if_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller closes the VM itself."""

    def refuse(name: str, _start: object) -> None:
        raise HostError(f"start thread {name}", errno.EAGAIN)

    closed: list[bool] = []
    vm: Any = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(arrival, "start_thread", refuse)

    close_in_background(vm)

    assert closed == [True]
