"""Control between clients and the parent: what it passes on, under which number, and which clients it turns away."""

import errno
import os
import select
import socket
from collections.abc import Iterator

import pytest

from tests.support.inprocess import End, InProcess
from vmd.control import main as module
from vmd.control.clients import MAX_UNANSWERED
from vmd.control.main import LAST_WORDS_S, Control
from vmd.ipc import courier
from vmd.ipc.channel import socketpair
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.imsg import HEADER, MAX_MESSAGE, Form, encode
from vmd.ipc.messages.children import SetVerbosity
from vmd.ipc.messages.clients import (
    PROTOCOL,
    Caller,
    Failed,
    Hello,
    ListRequest,
    LoadRequest,
    Ok,
    ReloadRequest,
    StartRequest,
    StopRequest,
    VmInfo,
    VmStarted,
    WaitRequest,
)
from vmd.ipc.messages.clients import End as ListEnd
from vmd.ipc.messages.control import ClientGone, NewClient, PassFiles, ServeUser
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.record import Record
from vmd.version import VERSION

USER, ROOT = 1000, 0
ROW = VmInfo(
    vmid=1, name="a", pid=0, vcpus=1, memory_bytes=1, resident_bytes=0, tty="", uid=0, gid=None, owner="root",
    state="stopped",
)  # fmt: skip
STARTED = VmStarted(vmid=1, name="a", pid=1, tty="/dev/pts/1")


class Rig(InProcess[Control]):
    """A control with clients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch, Control, Proc.CONTROL)

    def client(self, number: int, uid: int = USER, *, failed: Failed | None = None) -> End:
        """Connect a client.  With `failed`, control turns it away at once with that message."""
        ours, theirs = socketpair()
        code, text = (failed.code, failed.text) if failed else (0, "")
        new = NewClient(uid=uid, code=code, text=text)
        self.parent.send(new, peerid=number, fds={"client": [theirs.detach()]})
        return self.peer(ours, Proc.CLIENT, Proc.CONTROL)

    def asked(self) -> list[tuple[int, Record]]:
        """Return the messages to the parent since the last call, each with its client's number."""
        self.settle()
        numbers = [envelope.peerid for envelope in self.parent.got if type(envelope.message).__name__ != "Pong"]
        return list(zip(numbers, self.parent.take(), strict=True))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Yield a control."""
    rig = Rig(monkeypatch)
    yield rig
    rig.close()


class Pipe:
    """A file that a client passes.  The test can see whether all its copies are closed."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def is_closed(self) -> bool:
        """Return whether all copies are closed."""
        poll = select.poll()
        poll.register(self.reading, select.POLLIN)
        return bool(poll.poll(0))


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """Yield a file."""
    pipe = Pipe()
    yield pipe
    os.close(pipe.reading)


def test_an_answer_goes_to_the_client_that_asked(rig: Rig) -> None:
    """The parent distinguishes clients by their numbers."""
    one, other = rig.client(7), rig.client(9)
    one.send(StopRequest(name="a"))
    other.send(WaitRequest(name="b"))
    asked = rig.asked()
    assert sorted(asked, key=lambda each: each[0]) == [(7, StopRequest(name="a")), (9, WaitRequest(name="b"))]

    rig.parent.send(Ok(notes=("nine",)), peerid=9)
    rig.parent.send(Ok(), peerid=8)  # that client has left
    rig.settle()
    assert (one.take(), other.take()) == ([], [Ok(notes=("nine",))])
    rig.parent.send(Ok(), peerid=7)
    rig.settle()
    assert (one.take(), other.take()) == ([Ok()], [])


def test_a_client_cannot_set_its_caller_or_its_files(rig: Rig, pipe: Pipe) -> None:
    """Control overwrites the fields that say who it is, and which files it has passed."""
    client = rig.client(7)
    client.send(StopRequest(name="a", caller=Caller(uid=0, gid=0, pid=1)))
    client.send(StartRequest(name="a", files=("kernel", "seed"), kernel="/boot/k"))
    client.send(StartRequest(name="b", files=("seed",)), fds={"kernel": [pipe.writing]})

    assert rig.asked() == [
        (7, StopRequest(name="a")),
        (7, StartRequest(name="a", kernel="/boot/k")),
        (7, StartRequest(name="b", files=("kernel",))),
    ]


def test_after_hello_records_are_sent_by_name(rig: Rig) -> None:
    """Before it, only the fields of the first release are sent."""
    client = rig.client(7)
    client.send(StopRequest(name="a"))
    rig.parent.send(ROW.replace(login="me"), peerid=7)
    rig.settle()
    assert client.take() == [ROW]

    client.send(Hello(version=PROTOCOL))
    rig.settle()
    assert client.take() == [Hello(version=PROTOCOL, program=VERSION)]
    rig.parent.send(ROW.replace(login="me"), peerid=7)
    rig.settle()
    assert client.take() == [ROW.replace(login="me")]


@pytest.mark.parametrize("request_", [LoadRequest(path="/x"), ReloadRequest()])
def test_requests_for_root_of_other_users_do_not_reach_the_parent(
    rig: Rig, request_: Record, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client gets the error, and its connection ends.  A connection of root continues."""
    client = rig.client(7)
    client.send(request_)
    assert rig.asked() == [(7, ClientGone())]
    assert (client.take(), client.lost) == ([Failed(code=errno.EPERM, text="only root may do that")], True)
    assert f"denied request {type(request_).__name__} from uid 1000" in capfd.readouterr().err

    root = rig.client(8, ROOT)
    root.send(request_)
    assert rig.asked() == [(8, request_)]
    assert not root.lost


def test_a_client_above_the_limit_gets_an_error(rig: Rig) -> None:
    """The parent has counted the clients.  No request of this one is passed on."""
    busy = Failed(code=errno.EBUSY, text="too many connections")
    client = rig.client(7, failed=busy)
    client.send(StopRequest(name="a"))

    assert rig.asked() == [(7, ClientGone())]
    assert (client.take(), client.lost) == ([busy], True)


def test_a_client_that_is_turned_away_has_limited_time_to_read(rig: Rig) -> None:
    """If it does not read its last message, it is disconnected after that time."""
    client = rig.client(7)
    rig.settle()
    channel = rig.process.clients[7].channel
    assert channel is not None
    client.channel.hold(held=True)
    while not channel.waiting:
        rig.parent.send(ROW, peerid=7)
        rig.settle()
    rig.process.turn_away(rig.process.clients[7], Failed(code=1, text="x"))
    assert (7, ClientGone()) in rig.asked()
    assert not channel.closed

    rig.pass_time(LAST_WORDS_S)
    assert channel.closed


def test_the_unanswered_requests_of_a_client_are_limited(rig: Rig) -> None:
    """The next request is read after an answer.  Other clients are not delayed."""
    client, other = rig.client(7), rig.client(8)
    for number in range(MAX_UNANSWERED + 3):
        client.send(WaitRequest(vmid=number + 1))
    other.send(StopRequest(name="a"))
    assert sorted(number for number, _ in rig.asked()) == [7] * MAX_UNANSWERED + [8]

    rig.parent.send(ROW, peerid=7)  # a part of an answer does not count
    assert rig.asked() == []
    rig.parent.send(Ok(), peerid=7)
    assert rig.asked() == [(7, WaitRequest(vmid=MAX_UNANSWERED + 1))]


def test_an_answer_without_a_request_gives_no_credit(rig: Rig) -> None:
    """Such as that a console was taken over."""
    client = rig.client(7)
    rig.settle()
    for _ in range(2):
        rig.parent.send(Failed(code=1, text="taken over"), peerid=7)
    rig.settle()
    for number in range(MAX_UNANSWERED + 3):
        client.send(WaitRequest(vmid=number + 1))

    assert len(rig.asked()) == MAX_UNANSWERED


@pytest.mark.parametrize("last", [ListEnd(), Failed(code=1, text="x")])
def test_no_request_is_passed_on_during_a_list(rig: Rig, last: Record) -> None:
    """A list may be long, and a client that requests it repeatedly must not fill the parent's queue."""
    client = rig.client(7)
    client.send(ListRequest())
    client.send(ListRequest())
    assert rig.asked() == [(7, ListRequest())]
    rig.parent.send(ROW, peerid=7)
    assert rig.asked() == []
    rig.parent.send(last, peerid=7)
    assert rig.asked() == [(7, ListRequest())]


def test_while_the_parent_does_not_read_no_client_is_read(rig: Rig) -> None:
    """The requests wait with the clients.  When the parent reads again, they come in the order of each client."""
    clients = {number: rig.client(number) for number in (7, 8)}
    rig.settle()
    rig.parent.channel.hold(held=True)
    rig.process.parent._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE)
    for vmid in range(1, MAX_UNANSWERED):
        for client in clients.values():
            client.send(WaitRequest(vmid=vmid, name="x" * (MAX_MESSAGE - 100)))
    rig.turn()
    new = rig.client(9)  # a new client waits, too, although the parent does not read
    new.send(StopRequest(name="new"))
    rig.turn()
    assert rig.process.clients[9].unanswered == 0
    waiting, unanswered = rig.process.parent.waiting, rig.process.clients[8].unanswered
    assert (waiting, unanswered < MAX_UNANSWERED - 1) == (1, True)
    clients[8].send(StopRequest(name="later"))
    rig.turn()
    assert (rig.process.parent.waiting, rig.process.clients[8].unanswered) == (waiting, unanswered)

    rig.parent.channel.hold(held=False)
    rig.until(lambda: len(rig.parent.got) - rig.pongs() >= 2 * MAX_UNANSWERED)
    asked = rig.asked()
    for number, client in clients.items():
        vmids = [message.vmid for asks, message in asked if asks == number and isinstance(message, WaitRequest)]
        assert vmids == [*range(1, MAX_UNANSWERED)]
        assert not client.lost
    assert {(8, StopRequest(name="later")), (9, StopRequest(name="new"))} <= {*asked}


def courier_of(rig: Rig, number: int) -> socket.socket:
    """Have the parent ask for the files of a client.  Return the courier's end of their user."""
    asks, gives = courier.pair()
    rig.parent.send(PassFiles(), peerid=number, fds={"courier": [gives.detach()]})
    rig.settle()
    return asks


def test_files_go_to_the_process_at_the_courier(rig: Rig, pipe: Pipe) -> None:
    """They are passed once, and control has no copy afterwards.  The parent never has them."""
    client = rig.client(7)
    client.send(StartRequest(name="a"), fds={"kernel": [pipe.writing]})
    rig.settle()
    assert [envelope.fds for envelope in rig.parent.got if isinstance(envelope.message, StartRequest)] == [
        {"kernel": [], "initrd": [], "seed": []}
    ]
    with courier_of(rig, 7) as asks:
        courier.ask(asks)
        rig.settle()
        files = courier.take(asks)
    assert {name: len(fds) for name, fds in files.items()} == {"kernel": 1}
    assert not pipe.is_closed()
    os.close(files["kernel"][0])
    assert pipe.is_closed()

    with courier_of(rig, 7) as again:
        courier.ask(again)
        rig.settle()
        assert courier.take(again) == {}


def test_there_are_no_files_of_a_client_that_has_left(rig: Rig) -> None:
    """There is no error, because the parent also learns that the client has left."""
    with courier_of(rig, 7) as asks:
        courier.ask(asks)
        rig.settle()
        assert courier.take(asks) == {}


def test_files_are_closed_if_the_process_at_the_courier_has_ended(rig: Rig, pipe: Pipe) -> None:
    """This also holds if it sends an invalid message."""
    client = rig.client(7)
    client.send(StartRequest(name="a"), fds={"kernel": [pipe.writing]})
    rig.settle()
    courier_of(rig, 7).close()
    rig.settle()
    assert pipe.is_closed()
    assert not client.lost


@pytest.mark.parametrize("end", ["answered", "gone", "turned away"])
def test_files_that_no_process_has_taken_are_closed(rig: Rig, pipe: Pipe, end: str) -> None:
    """They are closed with the last answer, or when the client leaves."""
    client = rig.client(7)
    client.send(StartRequest(name="a"), fds={"kernel": [pipe.writing]})
    client.send(StopRequest(name="b"))
    rig.settle()
    rig.parent.send(Ok(), peerid=7)  # the answer to one of the two
    rig.settle()
    assert not pipe.is_closed()
    if end == "answered":
        rig.parent.send(STARTED, peerid=7)
    elif end == "gone":
        client.channel.close()
    else:
        client.send(ReloadRequest())
    rig.settle()
    assert pipe.is_closed()


def test_a_client_that_passes_too_many_files_is_cut_off(
    rig: Rig, pipe: Pipe, capfd: pytest.CaptureFixture[str]
) -> None:
    """The files of its first request are closed, too."""
    client = rig.client(7)
    client.send(StartRequest(name="a"), fds={"kernel": [os.dup(pipe.writing)]})
    client.send(StartRequest(name="b"), fds={"kernel": [pipe.writing]})

    assert rig.asked() == [(7, StartRequest(name="a", files=("kernel",))), (7, ClientGone())]
    assert (client.lost, pipe.is_closed()) == (True, True)
    assert "passes more files before those of its last request were used" in capfd.readouterr().err


def garbage(code: int) -> bytes:
    """Return a packet of an unknown type."""
    return HEADER.pack(code, HEADER.size, 0, 0, 0)


def test_a_request_of_a_later_version_is_refused_by_its_number(rig: Rig) -> None:
    """The message lets a later vmctl explain that the daemon is older."""
    client = rig.client(7)
    client.channel._sock.send(garbage(0x7FFF))

    assert rig.asked() == [(7, ClientGone())]
    words = f"vmd {VERSION} knows no request 0x7fff; a later one may"
    assert (client.take(), client.lost) == ([Failed(code=errno.ENOSYS, text=words)], True)


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        garbage(0x7FFF) + b"more",
        encode(Ok())[0],
        encode(ClientGone())[0],
        encode(NewClient(uid=0), fds={"client": [0]})[0],
    ],
    ids=["short", "length", "answer", "of-control", "of-the-parent"],
)  # fmt: skip
def test_a_client_that_breaks_the_protocol_is_cut_off(
    rig: Rig, packet: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """Other clients are not affected, and the log is not flooded."""
    other = rig.client(8)
    for number in range(10, 40):
        client = rig.client(number)
        client.channel._sock.send(packet)
        assert rig.asked() == [(number, ClientGone())]
        assert (client.take(), client.lost) == ([], True)
    assert len(capfd.readouterr().err.splitlines()) < 20

    other.send(StopRequest(name="a"))
    assert rig.asked() == [(8, StopRequest(name="a"))]


def test_a_request_that_is_too_long_to_be_passed_on(rig: Rig) -> None:
    """It came without the fields of later versions, and with them it is too long for a packet."""
    client = rig.client(7)
    packet, _ = encode(StartRequest(name=""), form=Form.FIRST)
    longest = "x" * (MAX_MESSAGE - len(packet) - 2)  # the length of a longer string takes two more bytes
    packet, _ = encode(StartRequest(name=longest), form=Form.FIRST)
    assert len(packet) == MAX_MESSAGE
    client.channel._sock.send(packet)

    assert rig.asked() == [(7, ClientGone())]
    (failed,) = client.take()
    assert isinstance(failed, Failed)
    assert (failed.code, client.lost) == (errno.EMSGSIZE, True)


@pytest.mark.parametrize("way", ["request", "answer"])
def test_the_client_of_an_unexpected_error_is_told(rig: Rig, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours ends the connection of one client.  Otherwise the client would wait for ever."""

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    client, other = rig.client(7), rig.client(8)
    rig.settle()
    monkeypatch.setattr(rig.process.clients[7], "asks" if way == "request" else "is_answered", fail)
    if way == "request":
        client.send(StopRequest(name="a"))
    else:
        rig.parent.send(Ok(), peerid=7)

    assert rig.asked() == [(7, ClientGone())]
    assert (client.take(), client.lost) == ([Failed(code=errno.EIO, text=OUR_FAULT)], True)
    source = "StopRequest of client 7 (uid 1000)" if way == "request" else "Ok of parent"
    assert [rig.unexpected.pop()] == [f"{source}: RuntimeError('a bug')"]
    other.send(StopRequest(name="a"))
    assert rig.asked() == [(8, StopRequest(name="a"))]


def test_the_parent_sets_log_level_and_title(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The title is in the lines of the log, and `ps` shows it, too."""
    titles: list[str] = []
    monkeypatch.setattr(module, "set_title", titles.append)
    monkeypatch.setattr(log, "title", "control")
    monkeypatch.setattr(log, "verbosity", 0)
    rig.parent.send(SetVerbosity(verbosity=2))
    rig.parent.send(ServeUser(title="control/1000"))
    rig.settle()

    assert (log.verbosity, log.title, titles) == (2, "control/1000", ["control/1000"])


@pytest.mark.parametrize(("how", "status"), [("quit", 0), ("gone", 0), ("garbage", 1)])
def test_control_ends_with_its_parent(rig: Rig, how: str, status: int) -> None:
    """It ends when it is told to, when the parent has ended, and when the parent sends garbage."""
    assert rig.end_by_parent(how) == status
