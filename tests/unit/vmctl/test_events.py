"""vmctl events: their output, and how it continues with another daemon."""

import errno
import json
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support import schema
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import DEADLINE_S, Answers, FakeDaemon, spawn
from vmd.ipc.messages.clients import Event, EventsRequest, EventsSeen, Failed
from vmd.record import Record

AT_MS = 1_700_000_000_123
READY = Event(number=1, at_ms=AT_MS, what="ready", vmid=7, name="web", state="running")
CRASH = Event(
    number=2, at_ms=AT_MS, what="crash", vmid=7, name="web", state="stopped", how="failed", text="vioblk0 has\x1b ended"
)
GROWN = Event(number=3, at_ms=AT_MS, what="resize", vmid=7, name="web", state="stopped", device="disk0", value="4096")
OURS = Event(number=4, at_ms=AT_MS, what="daemon", text="startup", value="1.0")
ALL = (READY, CRASH, GROWN, OURS, EventsSeen(vmid=0, number=4, newest=4))


@pytest.fixture(autouse=True)
def _in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def test_a_line_for_each(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """A line has the fields of its event, and control characters are escaped."""
    daemon.answers(*ALL)

    assert vmctl("events", "-l") == (0, (
        "2023-11-14 22:13:20  web  ready\n"
        "2023-11-14 22:13:20  web  crash: failed: vioblk0 has\\x1b ended\n"
        "2023-11-14 22:13:20  web  resize: disk0: 4096\n"
        "2023-11-14 22:13:20  -  daemon: startup: 1.0\n"
    ), "")  # fmt: skip
    assert daemon.requests == [EventsRequest(since=0, wait=False)]


def test_a_document_on_each_line(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It conforms to the schema."""
    daemon.answers(*ALL)

    status, output, errors = vmctl("events", "-l", "--json")

    assert (status, errors) == (0, "")
    documents = [schema.check(line, "events") for line in output.splitlines()]
    assert [each["event"] for each in documents] == ["ready", "crash", "resize", "daemon"]
    assert documents[1] == {
        "schema": 1, "number": 2, "at_ms": AT_MS, "event": "crash", "id": 7, "name": "web", "state": "stopped",
        "how": "failed", "device": None, "value": None, "text": "vioblk0 has\\x1b ended", "lost": 0,
    }  # fmt: skip


@pytest.mark.parametrize("json_", [True, False])
def test_no_such_vm(vmctl: Vmctl, daemon: FakeDaemon, json_: bool) -> None:
    """The exit status is 4."""
    daemon.answers(Failed(code=errno.ENOENT, text="vm nobody not found"))

    status, output, errors = vmctl("events", "nobody", *["--json"] * json_)

    assert status == 4
    assert errors.startswith("vmctl: events: vm nobody not found")
    if json_:
        assert schema.check(output, "error")["code"] == errno.ENOENT


def test_it_continues_with_the_next_daemon(daemon: FakeDaemon) -> None:
    """It shows that daemon's events from the first one on.  Only ^C ends it."""
    seen: list[EventsRequest] = []

    def answer(request: Record) -> Answers:
        assert isinstance(request, EventsRequest)
        seen.append(request)
        if not request.wait:
            return (EventsSeen(vmid=0, number=6, newest=6),)
        if request.since == 6:
            return None  # the daemon ends
        return (OURS, EventsSeen(vmid=0, number=4, newest=4)) if request.since == 0 else ()

    daemon.script = answer
    process = spawn(daemon, "events", "--json")
    assert process.stdout is not None
    line = process.stdout.readline()
    while daemon.requested() != EventsRequest(since=4):
        pass
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=DEADLINE_S)

    assert json.loads(line)["event"] == "daemon"
    assert (process.returncode, output, errors) == (0, "", "")
    assert [request.since for request in seen] == [None, 6, None, 0, 4]


def test_a_daemon_that_has_ended(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The exit status is 3.  A daemon that closes the connection repeatedly is not asked for ever."""
    daemon.script = lambda _request: None

    status, _, errors = vmctl("events")

    assert (status, errors) == (3, "vmctl: pipe closed\n")


@pytest.mark.parametrize(("soon_s", "status", "asked"), [(1e9, 3, 4), (-1.0, 1, 9)])
def test_daemons_that_hang_up(
    vmctl: Vmctl, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, soon_s: float, status: int, asked: int
) -> None:
    """A daemon that hangs up at once is asked four times.  Daemons that served for a while do not count."""
    monkeypatch.setattr("vmctl.commands.events.SOON_S", soon_s)
    script: Iterator[Answers] = iter((*(None,) * 8, (Failed(code=errno.EIO, text="enough"),)))
    daemon.script = lambda _request: next(script)

    assert vmctl("events")[0] == status
    assert len(daemon.requests) == asked
