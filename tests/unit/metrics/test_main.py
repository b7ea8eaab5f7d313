"""How clients are served: all with one answer of the parent, and none can keep the others waiting."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from vmd.ipc import process as process_module
from vmd.ipc.imsg import Envelope
from vmd.ipc.loop import READ, WRITE
from vmd.ipc.messages.metrics import AllFigures, AskFigures, MetricsAt
from vmd.metrics import main as main_module
from vmd.metrics.main import CLIENTS_MAX, FIGURES_S, FRESH_S, HANG_UP_S, REQUEST_S, TAKE_S, Metrics
from vmd.record import Record

REQUEST = b"GET /metrics HTTP/1.0\r\n\r\n"
HANG_UP = 1 << 10  # another event, such as EPOLLHUP


class Timer:
    """A timer of a stand-in for the loop."""

    def __init__(self, delay_s: float, call: Callable[[], None]) -> None:
        self.delay_s = delay_s
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        """Cancel the call."""
        self.cancelled = True


class Rig:
    """The process, whose loop the tests run by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        monkeypatch.setattr(process_module, "CHANNEL_FD", theirs.detach())
        self.metrics = Metrics()
        self.metrics.parent.close()
        ours.close()
        self.path = str(path)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(self.path)
        self.listener.listen(2 * CLIENTS_MAX)
        self.calls: dict[int, Callable[[int], None]] = {}
        self.events: dict[int, int] = {}
        self.timers: list[Timer] = []
        self.asked: list[Record] = []
        self.now_s = 1000.0
        self.clients: list[socket.socket] = []
        loop = self.metrics.loop
        monkeypatch.setattr(loop, "add", self.add)
        monkeypatch.setattr(loop, "remove", self.remove)
        monkeypatch.setattr(loop, "modify", self.events.__setitem__)
        monkeypatch.setattr(loop, "call_later", self.call_later)
        monkeypatch.setattr(self.metrics, "parent", self)
        monkeypatch.setattr("vmd.metrics.main.time.monotonic", lambda: self.now_s)
        monkeypatch.setattr(main_module, "expose", lambda vms, openmetrics: f"{len(vms)} {openmetrics}\n")
        self.use(self.listener)

    def add(self, fd: int, call: Callable[[int], None], events: int = READ) -> None:
        """Wait for events."""
        assert fd not in self.calls
        self.calls[fd], self.events[fd] = call, events

    def remove(self, fd: int) -> None:
        """Wait no longer."""
        del self.calls[fd], self.events[fd]

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Make a timer."""
        self.timers.append(Timer(delay_s, call))
        return self.timers[-1]

    def send(self, message: Record) -> None:
        """Take a message to the parent."""
        self.asked.append(message)

    def use(self, *listeners: socket.socket) -> None:
        """Listen there."""
        message = MetricsAt()
        fds = [listener.detach() for listener in listeners]
        self.metrics.on_at(message, Envelope(message, 0, 0, {"sockets": fds}), None)  # type: ignore[arg-type]

    def connect(self, said: bytes = b"") -> socket.socket:
        """Connect a client, which sends this."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.setblocking(False)
        self.clients.append(client)
        client.connect(self.path)
        if said:
            client.send(said)
        for _ in range(2):  # the connection, then the request
            self.serve()
        return client

    def serve(self, ready: int = READ) -> None:
        """Report events of everything that waits for them."""
        for fd, call in list(self.calls.items()):
            if self.events.get(fd, 0) & ready:
                call(self.events[fd] & ready)

    def answer(self) -> None:
        """Let the parent answer."""
        self.metrics.on_end(AllFigures(), None, None)  # type: ignore[arg-type]

    def due(self) -> list[float]:
        """Return the delays of the timers that are not cancelled."""
        return [timer.delay_s for timer in self.timers if not timer.cancelled]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Rig]:
    """The process, whose loop the tests run by hand."""
    made = Rig(monkeypatch, tmp_path / "metrics")
    yield made
    for client in made.clients:
        client.close()
    made.use()
    for each in list(made.metrics.clients):
        each.sock.close()
    made.metrics.loop.close()


def body(client: socket.socket) -> str:
    """Return the first line of an answer, and its body."""
    head, _, text = client.recv(1 << 16).decode().partition("\r\n\r\n")
    return f"{head.splitlines()[0]}|{text}"


OPENMETRICS = b"\r\nAccept: application/openmetrics-text\r\n\r\n"
OK = "HTTP/1.1 200 OK|0 False\n"
LATE = "HTTP/1.1 503 Service Unavailable|Service Unavailable\n"


def test_waiting_clients_share_an_answer(rig: Rig) -> None:
    """The parent is asked once; its answer serves others as long as it is fresh."""
    clients = [rig.connect(REQUEST) for _ in range(3)]
    assert rig.asked == [AskFigures()]
    rig.answer()
    assert [body(client) for client in clients] == [OK] * 3

    rig.now_s += FRESH_S / 2
    assert body(rig.connect(REQUEST)) == OK
    assert len(rig.asked) == 1
    rig.now_s += FRESH_S / 2
    rig.connect(REQUEST)
    assert len(rig.asked) == 2


def test_a_client_has_its_time_for_each_step(rig: Rig) -> None:
    """To ask, to wait, to take the answer, and to close."""
    client = rig.connect(REQUEST[:5])
    assert rig.due() == [REQUEST_S]
    client.send(REQUEST[5:])
    rig.serve()
    assert rig.due() == [FIGURES_S]
    rig.answer()
    assert rig.due() == [HANG_UP_S]
    assert [timer.delay_s for timer in rig.timers] == [REQUEST_S, FIGURES_S, TAKE_S, HANG_UP_S]
    client.close()
    rig.serve()

    assert (rig.due(), len(rig.metrics.clients)) == ([], 0)


def test_a_client_that_takes_too_long_is_closed(rig: Rig) -> None:
    """One that waits for the parent hears that first."""
    silent, waiting = rig.connect(), rig.connect(REQUEST)
    for timer in [timer for timer in rig.timers if not timer.cancelled]:
        timer.call()

    assert silent.recv(100) == b""
    assert body(waiting) == LATE
    assert len(rig.metrics.clients) == 1
    rig.answer()
    assert waiting.recv(100) == b""


def test_a_client_that_does_not_read_waits_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is sent when it takes it, and the last byte arrives."""
    page = "x" * (1 << 22)
    monkeypatch.setattr(main_module, "expose", lambda _vms, openmetrics: page)
    client = rig.connect(REQUEST)
    rig.answer()
    assert rig.due() == [TAKE_S]
    got = b""
    while not got.endswith(b"x" * 100) or len(got) < len(page):
        try:
            piece = client.recv(1 << 20)
        except BlockingIOError:
            rig.serve(WRITE)
            continue
        assert piece
        got += piece

    assert got.endswith(b"\r\n\r\n" + page.encode())
    rig.serve(WRITE)
    assert rig.due() == [HANG_UP_S]


def test_a_client_that_is_gone_is_forgotten(rig: Rig) -> None:
    """At any step."""
    before = open_descriptors()
    idle, waiting = rig.connect(), rig.connect(REQUEST)
    for client in (idle, waiting):
        client.close()
    rig.serve()
    (fd,) = [fd for fd, events in rig.events.items() if events == 0]
    rig.calls[fd](HANG_UP)

    assert len(rig.metrics.clients) == 0
    assert rig.due() == []
    rig.answer()
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("said", "status"), [(b"GET / HTTP/1.0\r\n\r\n", 404), (b"x" * 9000, 431), (b"PUT /metrics HTTP/1.0\r\n\r\n", 405)]
)
def test_a_bad_request_is_refused_at_once(rig: Rig, said: bytes, status: int) -> None:
    """The parent is not asked."""
    client = rig.connect(said)
    rig.serve()

    assert body(client).startswith(f"HTTP/1.1 {status} ")
    assert rig.asked == []
    client.send(b"more")
    rig.serve()
    assert rig.asked == []


def test_idle_clients_make_room(rig: Rig) -> None:
    """The one that has waited longest goes first; a client that is served stays."""
    served = rig.connect(REQUEST)
    idle = [rig.connect() for _ in range(CLIENTS_MAX - 1)]
    rig.connect()

    assert len(rig.metrics.clients) == CLIENTS_MAX
    assert idle[0].recv(100) == b""
    with pytest.raises(BlockingIOError):
        idle[1].recv(100)
    rig.answer()
    assert body(served) == OK


def test_clients_wait_while_all_others_are_served(rig: Rig) -> None:
    """No connection is accepted until one of them has gone."""
    served = [rig.connect(REQUEST) for _ in range(CLIENTS_MAX)]
    late = rig.connect(REQUEST)
    assert len(rig.metrics.clients) == CLIENTS_MAX
    with pytest.raises(BlockingIOError):
        late.recv(100)
    rig.answer()
    served[0].close()
    for _ in range(3):  # its end, the connection, and the request
        rig.serve()

    assert body(late) == OK


def test_other_addresses_replace_the_present_ones(rig: Rig, tmp_path: Path) -> None:
    """Clients that are connected stay."""
    client = rig.connect(REQUEST)
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    other.bind(str(tmp_path / "other"))
    other.listen()
    rig.use(other)
    with pytest.raises(ConnectionRefusedError):
        rig.connect()
    rig.path = str(tmp_path / "other")
    again = rig.connect(REQUEST)
    rig.answer()

    assert [body(each) for each in (client, again)] == [OK] * 2


def test_each_answer_replaces_the_one_before(rig: Rig) -> None:
    """Its rows are counted from its beginning, in each format."""
    for count in (2, 1):
        client, other = rig.connect(REQUEST), rig.connect(REQUEST.replace(b"\r\n\r\n", OPENMETRICS))
        for _ in range(count):
            rig.metrics.on_figures(cast("Any", object()), None, None)  # type: ignore[arg-type]
        rig.answer()
        assert (body(client)[-8:], body(other)[-7:]) == (f"{count} False\n", f"{count} True\n")
        rig.now_s += FRESH_S


def test_all_addresses_are_served(rig: Rig, tmp_path: Path) -> None:
    """Each has its own socket."""
    others = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
    paths = [str(tmp_path / f"other{number}") for number in range(3)]
    for other, path in zip(others, paths, strict=True):
        other.bind(path)
        other.listen()
    rig.use(*others)
    clients = []
    for path in paths:
        rig.path = path
        clients.append(rig.connect(REQUEST))
    rig.answer()

    assert [body(client) for client in clients] == [OK] * 3


def test_sockets_that_are_none(rig: Rig) -> None:
    """The message breaks the protocol, and the rest of its descriptors is closed."""
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]
    message = MetricsAt()
    with pytest.raises(OSError, match=os.strerror(errno.ENOTSOCK)):
        rig.metrics.on_at(message, Envelope(message, 0, 0, {"sockets": fds}), None)  # type: ignore[arg-type]
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
