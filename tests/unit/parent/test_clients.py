"""Which clients wait for what, and which are answered."""

import errno
import os
from typing import Any, cast

import pytest

from vmd.ipc.messages.clients import Failed, Ok
from vmd.ipc.messages.control import NO_CLIENT, PassFiles
from vmd.ipc.routes import Proc
from vmd.parent.clients import IN_ORDER, Clients, For
from vmd.parent.peers import Peers
from vmd.record import Record


class Control:
    """The channel to control."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Record]] = []

    def send(self, message: Record, *, peerid: int, fds: dict[str, list[int]]) -> None:
        """Record an answer."""
        assert not fds
        self.answers.append((peerid, message))


@pytest.fixture
def control() -> Control:
    """Return the channel that the answers go to."""
    return Control()


@pytest.fixture
def clients(control: Control) -> Clients:
    """Return the clients of a parent that has a control."""
    peers = Peers()
    peers.channels[Proc.CONTROL] = cast("Any", control)
    return Clients(peers)


def test_each_is_answered_once(clients: Clients, control: Control) -> None:
    """All clients that wait for one result of a VM are answered, in the order of their requests."""
    for client, what, vmid in ((1, For.END, 7), (2, For.END, 8), (3, For.START, 7), (4, For.END, 7)):
        clients.wait(client, what, vmid)

    clients.answer_all(For.END, 7, Ok())
    clients.fail_all(For.END, 7, errno.EIO, "nobody hears this")

    assert control.answers == [(1, Ok()), (4, Ok())]
    clients.fail_all(For.END, 8, errno.EIO, "gone")
    assert control.answers[2:] == [(2, Failed(code=errno.EIO, text="gone"))]
    assert clients.waits(3, For.START, 7)


@pytest.mark.parametrize("what", For)
def test_a_client_that_has_left_is_not_answered(clients: Clients, control: Control, what: For) -> None:
    """Its place stays in queues where each answer is for the next client."""
    for client in (1, 2):
        clients.wait(client, what, 7)

    assert [(wait.what, wait.vmid) for wait in clients.gone(1)] == [(what, 7)]

    assert [wait.client for wait in clients.waiting(what, 7)] == ([NO_CLIENT, 2] if what in IN_ORDER else [2])
    clients.answer_all(what, 7, Ok())
    assert control.answers == [(2, Ok())]
    assert clients.gone(1) == clients.waiting_anywhere(what) == []


def test_a_wait_is_over_once(clients: Clients) -> None:
    """A second end of a wait, as by its timeout, has no effect.  Two waits of one client are distinct."""
    first, second = clients.wait(1, For.DEVICES, 7), clients.wait(1, For.DEVICES, 7)

    assert [clients.done(second), clients.done(second)] == [True, False]
    assert [clients.take_first(For.DEVICES, 7), clients.take_first(For.DEVICES, 7)] == [1, NO_CLIENT]
    assert not clients.done(first)


def test_without_control_no_client_is_answered() -> None:
    """Control was killed, and the VMs are stopped.  The waits end as usual."""
    clients = Clients(Peers())
    clients.wait(1, For.END, 7)
    clients.answer_all(For.END, 7, Ok())
    assert not clients.waits(1, For.END, 7)


def test_clients_that_wait_in_vain(clients: Clients, control: Control) -> None:
    """All that wait for one of several results are told, or only those that wait for some VMs."""
    for client, what, vmid in (
        (1, For.START, 7), (2, For.END, 7), (3, For.END, 8), (4, For.RESET, 0), (5, For.PAUSE, 7), (6, For.PAUSE, 7),
    ):  # fmt: skip
        clients.wait(client, what, vmid)
    lost = clients.fail_waiting((For.END, For.PAUSE), errno.EIO, "silent", [7])
    assert [(wait.what, wait.vmid) for wait in lost] == [(For.END, 7), (For.PAUSE, 7), (For.PAUSE, 7)]
    silent = Failed(code=errno.EIO, text="silent")
    assert control.answers == [(client, silent) for client in (2, 5, 6)]
    assert [wait.client for wait in clients.waiting(For.PAUSE, 7)] == [NO_CLIENT, NO_CLIENT]  # their answers come later
    clients.fail_waiting((For.END, For.RESET), errno.EIO, "silent")
    assert control.answers[3:] == [(3, silent), (4, silent)]
    assert not clients.waiting(For.RESET)
    assert not clients.take(For.RESET)
    assert clients.waits(1, For.START, 7)
    assert not clients.waits(2, For.START, 7)


def test_the_files_of_a_client_come_over_a_courier(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control has one end of it, and the caller the other."""
    given: list[tuple[Record, int, int]] = []

    def send(message: Record, *, peerid: int, fds: dict[str, list[int]]) -> None:
        (fd,) = fds["courier"]
        given.append((message, peerid, fd))

    monkeypatch.setattr(control, "send", send)
    peers = Peers()
    peers.channels[Proc.CONTROL] = cast("Any", control)
    ours = Clients(peers).courier(5)
    ((message, client, theirs),) = given
    assert (message, client) == (PassFiles(), 5)
    os.write(theirs, b"x")
    assert os.read(ours, 9) == b"x"
    for fd in (ours, theirs):
        os.close(fd)
