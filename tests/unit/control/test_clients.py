"""Process control between clients and the parent: what it passes on, under which number, and whom it turns away."""

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
        """Have a client come, which `failed` is for if it is to be turned away at once."""
        ours, theirs = socketpair()
        code, text = (failed.code, failed.text) if failed else (0, "")
        new = NewClient(uid=uid, code=code, text=text)
        self.parent.send(new, peerid=number, fds={"client": [theirs.detach()]})
        return self.peer(ours, Proc.CLIENT, Proc.CONTROL)

    def asked(self) -> list[tuple[int, Record]]:
        """Return what the parent was told since the last call, and under which numbers."""
        self.settle()
        numbers = [envelope.peerid for envelope in self.parent.got if type(envelope.message).__name__ != "Pong"]
        return list(zip(numbers, self.parent.take(), strict=True))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Give a control."""
    rig = Rig(monkeypatch)
    yield rig
    rig.close()


class Pipe:
    """A file that a client passes: when all have closed it, that can be read."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def is_closed(self) -> bool:
        """Return whether nobody has it any more."""
        poll = select.poll()
        poll.register(self.reading, select.POLLIN)
        return bool(poll.poll(0))


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """Give a file."""
    pipe = Pipe()
    yield pipe
    os.close(pipe.reading)


def test_answers_come_back_to_who_has_asked(rig: Rig) -> None:
    """The parent tells clients apart by their numbers, and the answer of one is no other's."""
    one, other = rig.client(7), rig.client(9)
    one.send(StopRequest(name="a"))
    other.send(WaitRequest(name="b"))
    asked = rig.asked()
    assert sorted(asked, key=lambda each: each[0]) == [(7, StopRequest(name="a")), (9, WaitRequest(name="b"))]

    rig.parent.send(Ok(notes=("nine",)), peerid=9)
    rig.parent.send(Ok(), peerid=8)  # who has left
    rig.settle()
    assert (one.take(), other.take()) == ([], [Ok(notes=("nine",))])
    rig.parent.send(Ok(), peerid=7)
    rig.settle()
    assert (one.take(), other.take()) == ([Ok()], [])


def test_what_a_client_says_of_itself_counts_for_nothing(rig: Rig, pipe: Pipe) -> None:
    """Neither who it is, nor which files it has passed."""
    client = rig.client(7)
    client.send(StopRequest(name="a", caller=Caller(uid=0, gid=0, pid=1)))
    client.send(StartRequest(name="a", files=("kernel", "seed"), kernel="/boot/k"))
    client.send(StartRequest(name="b", files=("seed",)), fds={"kernel": [pipe.writing]})

    assert rig.asked() == [
        (7, StopRequest(name="a")),
        (7, StartRequest(name="a", kernel="/boot/k")),
        (7, StartRequest(name="b", files=("kernel",))),
    ]


def test_hello_makes_records_travel_by_name(rig: Rig) -> None:
    """Before it, only what the first release knew of a record is sent."""
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
def test_what_only_root_may_ask_does_not_reach_the_parent_for_others(
    rig: Rig, request_: Record, capfd: pytest.CaptureFixture[str]
) -> None:
    """The connection ends with the sentence; root's goes on."""
    client = rig.client(7)
    client.send(request_)
    assert rig.asked() == [(7, ClientGone())]
    assert (client.take(), client.lost) == ([Failed(code=errno.EPERM, text="only root may do that")], True)
    assert f"denied request {type(request_).__name__} from uid 1000" in capfd.readouterr().err

    root = rig.client(8, ROOT)
    root.send(request_)
    assert rig.asked() == [(8, request_)]
    assert not root.lost


def test_a_client_that_is_one_too_many_is_told_so(rig: Rig) -> None:
    """The parent has counted it; nothing that it asks is passed on."""
    busy = Failed(code=errno.EBUSY, text="too many connections")
    client = rig.client(7, failed=busy)
    client.send(StopRequest(name="a"))

    assert rig.asked() == [(7, ClientGone())]
    assert (client.take(), client.lost) == ([busy], True)


def test_last_words_are_not_waited_for_without_end(rig: Rig) -> None:
    """A client that does not read is gone all the same."""
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


def test_so_much_is_asked_at_once_and_no_more(rig: Rig) -> None:
    """The next request is read when an answer has come; others are not kept waiting by that."""
    client, other = rig.client(7), rig.client(8)
    for number in range(MAX_UNANSWERED + 3):
        client.send(WaitRequest(vmid=number + 1))
    other.send(StopRequest(name="a"))
    assert sorted(number for number, _ in rig.asked()) == [7] * MAX_UNANSWERED + [8]

    rig.parent.send(ROW, peerid=7)  # a part of an answer is none
    assert rig.asked() == []
    rig.parent.send(Ok(), peerid=7)
    assert rig.asked() == [(7, WaitRequest(vmid=MAX_UNANSWERED + 1))]


@pytest.mark.parametrize("last", [ListEnd(), Failed(code=1, text="x")])
def test_while_a_list_is_under_way_nothing_else_is_asked(rig: Rig, last: Record) -> None:
    """It may be long; a client that asks for it again and again must not fill the parent's queue."""
    client = rig.client(7)
    client.send(ListRequest())
    client.send(ListRequest())
    assert rig.asked() == [(7, ListRequest())]
    rig.parent.send(ROW, peerid=7)
    assert rig.asked() == []
    rig.parent.send(last, peerid=7)
    assert rig.asked() == [(7, ListRequest())]


def test_while_the_parent_does_not_read_no_client_is_read(rig: Rig) -> None:
    """What clients ask waits with them; when the parent reads on, all of it comes, each client's in its order."""
    clients = {number: rig.client(number) for number in (7, 8)}
    rig.settle()
    rig.parent.channel.hold(held=True)
    rig.process.parent._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE)
    for vmid in range(1, MAX_UNANSWERED):
        for client in clients.values():
            client.send(WaitRequest(vmid=vmid, name="x" * (MAX_MESSAGE - 100)))
    rig.turn()
    new = rig.client(9)  # who comes now waits, too; its connection comes from the parent, which reads nothing
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
    """Have the parent ask for the files of a client; returns the end of who uses them."""
    asks, gives = courier.pair()
    rig.parent.send(PassFiles(), peerid=number, fds={"courier": [gives.detach()]})
    rig.settle()
    return asks


def test_files_go_to_who_asks_at_the_courier(rig: Rig, pipe: Pipe) -> None:
    """Once: control has them no longer, whoever asks again; the parent has never had them."""
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


def test_who_asks_for_files_of_a_client_that_has_left_gets_none(rig: Rig) -> None:
    """Not even an error: the parent learns by itself that the client is gone."""
    with courier_of(rig, 7) as asks:
        courier.ask(asks)
        rig.settle()
        assert courier.take(asks) == {}


def test_files_are_closed_when_who_would_ask_is_gone(rig: Rig, pipe: Pipe) -> None:
    """An opener that has died, or that says something else than that it wants them."""
    client = rig.client(7)
    client.send(StartRequest(name="a"), fds={"kernel": [pipe.writing]})
    rig.settle()
    courier_of(rig, 7).close()
    rig.settle()
    assert pipe.is_closed()
    assert not client.lost


@pytest.mark.parametrize("end", ["answered", "gone", "turned away"])
def test_files_that_nobody_has_asked_for_are_closed(rig: Rig, pipe: Pipe, end: str) -> None:
    """With the last answer, or with the client."""
    client = rig.client(7)
    client.send(StartRequest(name="a"), fds={"kernel": [pipe.writing]})
    client.send(StopRequest(name="b"))
    rig.settle()
    rig.parent.send(Ok(), peerid=7)  # of one of the two
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


def test_a_client_that_heaps_up_files_is_cut_off(rig: Rig, pipe: Pipe, capfd: pytest.CaptureFixture[str]) -> None:
    """Those of its first request are closed too."""
    client = rig.client(7)
    client.send(StartRequest(name="a"), fds={"kernel": [os.dup(pipe.writing)]})
    client.send(StartRequest(name="b"), fds={"kernel": [pipe.writing]})

    assert rig.asked() == [(7, StartRequest(name="a", files=("kernel",))), (7, ClientGone())]
    assert (client.lost, pipe.is_closed()) == (True, True)
    assert "passes more files before those of its last request were used" in capfd.readouterr().err


def garbage(code: int) -> bytes:
    """Return a packet of a type that nobody knows."""
    return HEADER.pack(code, HEADER.size, 0, 0, 0)


def test_a_request_of_a_later_version_is_refused_by_its_number(rig: Rig) -> None:
    """A vmctl that is newer than the daemon can say so."""
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
def test_a_client_that_says_what_no_client_says_is_cut_off(
    rig: Rig, packet: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """It costs no other client anything, and not the log either."""
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
    """It came without the fields that later versions have added; with them it fits no packet."""
    client = rig.client(7)
    packet, _ = encode(StartRequest(name=""), form=Form.FIRST)
    longest = "x" * (MAX_MESSAGE - len(packet) - 2)  # a longer string has two bytes more of length
    packet, _ = encode(StartRequest(name=longest), form=Form.FIRST)
    assert len(packet) == MAX_MESSAGE
    client.channel._sock.send(packet)

    assert rig.asked() == [(7, ClientGone())]
    (failed,) = client.take()
    assert isinstance(failed, Failed)
    assert (failed.code, client.lost) == (errno.EMSGSIZE, True)


@pytest.mark.parametrize("way", ["request", "answer"])
def test_who_an_unexpected_error_belongs_to_is_told(rig: Rig, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours costs one client its connection; it does not wait for an answer that will not come."""

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


def test_the_parent_sets_the_log(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its verbosity, and under which name lines appear; `ps` shows that name too."""
    titles: list[str] = []
    monkeypatch.setattr(module, "set_title", titles.append)
    monkeypatch.setattr(log, "title", "control")
    monkeypatch.setattr(log, "verbosity", 0)
    rig.parent.send(SetVerbosity(verbosity=2))
    rig.parent.send(ServeUser(title="control/1000"))
    rig.settle()

    assert (log.verbosity, log.title, titles) == (2, "control/1000", ["control/1000"])


@pytest.mark.parametrize(("how", "status"), [("quit", 0), ("gone", 0), ("garbage", 1)])
def test_it_ends_with_its_parent(rig: Rig, how: str, status: int) -> None:
    """Told to, or left alone; a parent that sends no message is not to be trusted either."""
    assert rig.end_by_parent(how) == status
