"""The client library: each request is a method, and each failure is an exception with a number."""

import errno
import os
import re
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import vmd.client
from tests.support.daemon import ROOT
from tests.unit.vmctl.fake import FakeDaemon, vm_info
from vmd.client import Client, ClientError, HungUp, Live, NoDaemon, Refused, Step, TimedOut, VmConfig
from vmd.errors import PeerError
from vmd.ipc.messages.clients import (
    REQUESTS,
    ConsoleAttached,
    ConsoleOutput,
    ConsoleReady,
    ConsoleRequest,
    End,
    Event,
    EventsRequest,
    EventsSeen,
    Failed,
    ListRequest,
    MigrationStep,
    Ok,
    PauseRequest,
    ReceiveRequest,
    SendRequest,
    SnapshotRequest,
    SnapshotsDone,
    StartRequest,
    StopRequest,
    VmPaused,
    VmReceived,
    VmSent,
    VmStarted,
    VmTerminated,
)
from vmd.ipc.messages.shared import SnapshotInfo, TransferProgress
from vmd.ipc.routes import BY_CLASS
from vmd.record import Record

CALLS: dict[str, Callable[[Client, int], object]] = {
    "list_vms": lambda vmd, _: vmd.list_vms(),
    "figures": lambda vmd, _: vmd.figures(),
    "events": lambda vmd, _: vmd.events(),
    "past_events": lambda vmd, _: vmd.past_events("web"),
    "list_switches": lambda vmd, _: vmd.list_switches(),
    "list_generations": lambda vmd, _: vmd.list_generations(),
    "list_devices": lambda vmd, _: vmd.list_devices(1),
    "start": lambda vmd, fd: vmd.start("web", kernel=fd, initrd=fd, cmdline="quiet"),
    "stop": lambda vmd, _: vmd.stop("web"),
    "stop_and_wait": lambda vmd, _: vmd.stop_and_wait("web", force=True),
    "wait": lambda vmd, _: vmd.wait("web"),
    "pause": lambda vmd, _: vmd.pause("web"),
    "unpause": lambda vmd, _: vmd.unpause("web", force=True),
    "reload": lambda vmd, _: vmd.reload(),
    "load": lambda vmd, _: vmd.load("/etc/vmd/more.conf"),
    "reset": lambda vmd, _: vmd.reset(vms=True, switches=False),
    "set_verbosity": lambda vmd, _: vmd.set_verbosity(2),
    "rehearse_upgrade": lambda vmd, _: vmd.rehearse_upgrade(),
    "upgrade": lambda vmd, _: vmd.upgrade(),
    "attach_console": lambda vmd, _: vmd.attach_console("web"),
    "send_break": lambda vmd, _: vmd.send_break("web"),
    "watch_console": lambda vmd, _: vmd.watch_console("web"),
    "find_console_log": lambda vmd, _: vmd.find_console_log("web"),
    "resize": lambda vmd, _: vmd.resize("web", "disk0", 1 << 30),
    "insert_disc": lambda vmd, _: vmd.insert_disc("web", ""),
    "list_snapshots": lambda vmd, _: vmd.list_snapshots("web"),
    "make_snapshot": lambda vmd, _: vmd.make_snapshot("web", "monday"),
    "delete_snapshot": lambda vmd, _: vmd.delete_snapshot("web", "monday"),
    "go_back": lambda vmd, _: vmd.go_back("web", "monday"),
    "send_vm": lambda vmd, fd: vmd.send_vm("web", fd, live=Live()),
    "receive_vm": lambda vmd, fd: vmd.receive_vm("web", fd),
    "migrate": lambda vmd, fd: vmd.migrate("web", fd),
    "migrate_in": lambda vmd, fd: vmd.migrate_in("web", fd),
    "migration_step": lambda vmd, _: vmd.migration_step("web", Step.GO_ON),
}
# Methods that send no request of their own.
NO_REQUESTS = {"answer", "ask", "carry_out", "close", "connect_again", "fileno", "receive", "send"}


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    """A connection to the daemon."""
    with Client(str(daemon.path)) as opened:
        yield opened


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    """A daemon that gives no answers until it has a script."""
    fake = FakeDaemon(tmp_path / "vmd.sock")
    yield fake
    fake.close()


def test_every_method_is_called_here() -> None:
    """The next test calls all methods of CALLS."""
    methods = {name for name, value in vars(Client).items() if not name.startswith("_") and callable(value)}

    assert set(CALLS) == methods - NO_REQUESTS


def test_every_request_is_a_method(client: Client, daemon: FakeDaemon) -> None:
    """A new request of the control socket needs a method.  Each method raises the daemon's refusal."""
    daemon.answers(Failed(code=errno.EBUSY, text="vm web is busy"))
    with open(os.devnull, "rb") as stream:
        for name, call in CALLS.items():
            with pytest.raises(Refused, match=r"^vm web is busy$") as refused:
                call(client, stream.fileno())
            assert refused.value.number == errno.EBUSY, name

    assert {type(request) for request in daemon.requests} == set(REQUESTS)


def test_every_public_name_exists_and_is_documented() -> None:
    """docs/client.md names every method, and results of methods can be imported from vmd.client."""
    text = (ROOT / "docs/client.md").read_text()
    for name in (*CALLS, *vmd.client.__all__):
        assert re.search(rf"\b{name}\b", text), name
    for name in vmd.client.__all__:
        assert hasattr(vmd.client, name)
    answers = {answer for request in REQUESTS for answer in BY_CLASS[request].answers}
    shown = {getattr(vmd.client, name) for name in vmd.client.__all__}
    assert answers - shown == {ConsoleOutput, ConsoleReady, End, EventsSeen, Failed}


@pytest.mark.parametrize(
    ("vm", "vmid", "name"), [(7, 7, ""), ("web", 0, "web"), ("7", 0, "7"), (vm_info("web", vmid=7), 7, "web")]
)
def test_a_vm_is_an_id_a_name_or_a_row(client: Client, daemon: FakeDaemon, vm: object, vmid: int, name: str) -> None:
    """A name of digits is a name here, because it was not typed by a user."""
    daemon.answers(VmPaused(vmid=7, name="web", paused=True))

    assert client.pause(vm).paused  # type: ignore[arg-type]
    assert daemon.requests == [PauseRequest(vmid=vmid, name=name, paused=True)]


def test_a_start_has_its_options_and_files(client: Client, daemon: FakeDaemon, tmp_path: Path) -> None:
    """The request has the options, and its files can be read."""
    daemon.answers(VmStarted(vmid=1, name="web", pid=2, tty="/dev/pts/1"))
    config = VmConfig(name="web", kernel="/bsd")
    (tmp_path / "bsd").write_bytes(b"kernel")
    with open(tmp_path / "bsd", "rb") as kernel:
        started = client.start("web", config=config, template="base", kernel=kernel.fileno())

    assert started.tty == "/dev/pts/1"
    assert daemon.requests == [StartRequest(name="web", config=config, template="base")]
    assert daemon.files == [{"kernel": b"kernel", "initrd": b""}] or daemon.files == [{"kernel": b"kernel"}]


def test_partial_answers(client: Client, daemon: FakeDaemon) -> None:
    """Output is joined, and progress is reported, before the last answer."""
    attached = ConsoleAttached(vmid=1, name="web", tty="/dev/pts/1")
    sent = VmSent(vmid=1, name="web", sent_bytes=9)
    received = VmReceived(vmid=2, name="web2", tty="/dev/pts/2", pid=9, paused=False)
    half, whole = TransferProgress(done_bytes=4, total_bytes=8), TransferProgress(done_bytes=8, total_bytes=8)
    monday = SnapshotInfo(tag="monday", date_s=1, clock_ns=2, state_bytes=0, disks=1, of_disks=1)
    answers: dict[type[Record], tuple[Record, ...]] = {
        ConsoleRequest: (ConsoleOutput(data=b"log"), ConsoleOutput(data=b"in: "), attached),
        SendRequest: (half, whole, sent),
        ReceiveRequest: (half, received),
        MigrationStep: (whole, sent),
        SnapshotRequest: (monday, SnapshotsDone(vmid=1, name="web")),
    }
    daemon.script = lambda request: answers[type(request)]
    daemon.reads_files = False
    told: list[TransferProgress] = []

    assert client.attach_console("web") == (b"login: ", attached)
    with open(os.devnull, "wb") as stream:
        assert client.send_vm("web", stream.fileno(), progress=told.append) == sent
        assert client.receive_vm("web2", stream.fileno(), progress=told.append) == received
    assert client.migration_step("web", Step.DONE, progress=told.append) == sent
    assert told == [half, whole, half, whole]
    assert client.list_snapshots("web") == [monday]


def test_events_are_requested_repeatedly(client: Client, daemon: FakeDaemon) -> None:
    """They begin at the call of `events`.  Each request has the number of the last event that was seen."""
    first, second = (Event(number=number, at_ms=1, what="start", vmid=7, name="web") for number in (5, 6))
    answers = {
        (None, True): (EventsSeen(vmid=7, number=4, newest=4),),
        (None, False): (EventsSeen(vmid=7, number=4, newest=4),),
        (4, True): (first, EventsSeen(vmid=7, number=5, newest=6)),
        (5, True): (second, EventsSeen(vmid=7, number=9, newest=9)),
        (9, True): (Failed(code=errno.EIO, text="enough"),),
    }
    daemon.script = lambda request: answers[request.since, request.wait]  # type: ignore[attr-defined]
    events = client.events("web")
    assert daemon.requested() == EventsRequest(name="web", wait=False)

    assert [next(events), next(events)] == [first, second]
    with pytest.raises(Refused, match=r"^enough$"):
        next(events)
    assert daemon.requests[1:] == [EventsRequest(vmid=7, since=since) for since in (4, 5, 9)]


def test_past_events_are_fetched_completely(client: Client, daemon: FakeDaemon) -> None:
    """There may be several answers."""
    first, second = (Event(number=number, at_ms=1, what="start") for number in (1, 2))
    answers = {
        0: (first, EventsSeen(vmid=0, number=1, newest=2)),
        1: (second, EventsSeen(vmid=0, number=2, newest=2)),
    }
    daemon.script = lambda request: answers[request.since]  # type: ignore[attr-defined]

    assert client.past_events() == [first, second]
    assert daemon.requests == [EventsRequest(since=since, wait=False) for since in (0, 1)]


def test_an_end_is_waited_for(client: Client, daemon: FakeDaemon) -> None:
    """The result has the reason of the end."""
    ended = VmTerminated(vmid=1, name="web", text="stopped as asked", how="stopped")
    daemon.answers(ended)

    assert client.stop_and_wait("web") == ended
    assert daemon.requests == [StopRequest(name="web", wait=True)]


def test_no_daemon(tmp_path: Path) -> None:
    """The number is that of connect(2)."""
    with pytest.raises(NoDaemon, match="is vmd running") as failed:
        Client(str(tmp_path / "vmd.sock"))

    assert failed.value.number == errno.ENOENT


def test_the_daemon_ends(client: Client, daemon: FakeDaemon) -> None:
    """This is not a refusal, and the client can connect to the next daemon."""
    daemon.script = lambda request: None if isinstance(request, PauseRequest) else (End(),)

    with pytest.raises(HungUp):
        client.pause("web")
    client.connect_again()
    assert client.list_vms() == []


def test_the_daemon_is_too_slow(client: Client, daemon: FakeDaemon) -> None:
    """The connection is closed, because a late answer would be taken for that of another request."""
    client.timeout_s = 0.0

    with pytest.raises(TimedOut, match=r"^vmd has not answered within 0 s") as failed:
        client.reload()

    assert failed.value.number == errno.ETIMEDOUT
    assert client.fileno() == -1
    daemon.wait_left()


def test_a_daemon_that_does_not_know_a_request(client: Client, daemon: FakeDaemon) -> None:
    """The daemon reports it, and the library passes this on."""
    daemon.answers(Failed(code=errno.ENOSYS, text="vmd 0.1 knows no request 0x13; a later one may"))

    with pytest.raises(ClientError) as failed:
        client.list_vms()

    assert failed.value.number == errno.ENOSYS


def test_wrong_answers_are_refused(client: Client, daemon: FakeDaemon) -> None:
    """An answer of another type is an error."""
    daemon.script = lambda request: (Ok(),) if isinstance(request, ListRequest) else (vm_info(),)

    with pytest.raises(PeerError, match="sent Ok instead of VmInfo or End or Failed"):
        client.list_vms()


class Clock:
    """A clock that only polls move.  The first `quiet` polls find nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, quiet: int) -> None:
        self.now_s = 100.0
        self.quiet = quiet
        self.waits: list[float] = []
        monkeypatch.setattr("vmd.client.time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr("vmd.client.select", SimpleNamespace(poll=lambda: self, POLLIN=select.POLLIN))

    def register(self, sock: object, events: int) -> None:
        """Take what to poll."""
        assert events == select.POLLIN
        self.sock = sock

    def poll(self, wait_ms: float) -> list[tuple[int, int]]:
        """Poll in no time, but let the clock go."""
        if len(self.waits) < self.quiet:
            self.waits.append(wait_ms)
            self.now_s += wait_ms / 1000
            return []
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)  # type: ignore[arg-type]
        return poll.poll()


@pytest.mark.parametrize(
    ("timeout_s", "waits", "answered"),
    [
        (None, [500] * 5, True),
        (60.0, [500] * 5, True),
        (1.25, [500, 500, 250], False),
        (0.5, [500], False),
        (0.25, [250], False),
        (0.0, [0], False),
    ],
)
def test_how_long_an_answer_is_waited_for(
    client: Client, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch,
    timeout_s: float | None, waits: list[float], answered: bool,
) -> None:  # fmt: skip
    """In short polls, so that a signal is handled, and exactly until the timeout."""
    clock = Clock(monkeypatch, 5)
    client.timeout_s = timeout_s
    if answered:
        daemon.answers(Ok())
        assert client.reload() == Ok()
    else:
        with pytest.raises(TimedOut, match=f"^vmd has not answered within {timeout_s:g} s$"):
            client.reload()
    assert clock.waits == waits


@pytest.mark.parametrize(("past", "since"), [(True, 0), (False, 4)])
def test_events_from_the_past(client: Client, daemon: FakeDaemon, past: bool, since: int) -> None:
    """They begin with the first one that the daemon remembers, or with the next one."""
    answers = {
        (None, False): (EventsSeen(vmid=0, number=4, newest=4),),
        (since, True): (Event(number=9, at_ms=1, what="start"), EventsSeen(vmid=0, number=9, newest=9)),
    }
    daemon.script = lambda request: answers[request.since, request.wait]  # type: ignore[attr-defined]

    assert next(client.events(past=past)).number == 9
    assert daemon.requests == [EventsRequest(wait=False), EventsRequest(since=since)]
