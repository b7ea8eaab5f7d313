"""Events of a daemon and its VMs, as listeners receive them: vmctl events, and the client library."""

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.test_daemon import demo
from tests.support import schema
from tests.support.daemon import DEADLINE_S
from tests.support.keeper import KeptDaemon
from vmd.client import Client

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(400)]


class Listener:
    """`vmctl events -a --json`, which begins with past events, so that none is missed."""

    def __init__(self, vmd: KeptDaemon) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmctl", "-s", vmd.socket, "events", "-a", "--json"],
            cwd=vmd.code, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.fd = self.process.stdout.fileno()
        self.heard = b""

    def hear(self) -> dict[str, Any]:
        """Return the next event."""
        deadline_s = time.monotonic() + DEADLINE_S
        while b"\n" not in self.heard:
            assert select.select([self.fd], [], [], deadline_s - time.monotonic())[0], "there is no event"
            piece = os.read(self.fd, 65536)
            assert piece, self.process.communicate()[1].decode()
            self.heard += piece
        line, _, self.heard = self.heard.partition(b"\n")
        return schema.check(line.decode(), "events")

    def until(self, what: str) -> list[dict[str, Any]]:
        """Return all events up to the first one with this name."""
        events = [self.hear()]
        while events[-1]["event"] != what:
            events.append(self.hear())
        return events


@contextlib.contextmanager
def listening(vmd: KeptDaemon) -> Iterator[Listener]:
    """Listen while the context lasts; ^C ends the listener."""
    listener = Listener(vmd)
    try:
        yield listener
        listener.process.send_signal(signal.SIGINT)
        assert listener.process.communicate(timeout=DEADLINE_S) == (b"", b"")
        assert listener.process.returncode == 0
    finally:
        listener.process.kill()
        listener.process.communicate()


def words(events: list[dict[str, Any]]) -> list[str]:
    """Return the names of events."""
    return [event["event"] for event in events]


def test_events_from_start_to_crash_and_across_daemons(tmp_path: Path) -> None:
    """Each change of a VM is one event, in order, with name and reason, whether it was requested or not."""
    conf = demo("a", f'disk "{tmp_path}/a.qcow2" format qcow2') + demo("b", f'disk "{tmp_path}/none.img" format raw')
    with KeptDaemon(tmp_path, conf) as vmd, Client(str(vmd.socket), timeout_s=DEADLINE_S) as client:
        with listening(vmd) as listener:
            theirs = client.events("b")  # events of the other VM
            assert words([listener.hear()]) == ["daemon"]

            vmd.must("create", "-s", "1M", tmp_path / "a.qcow2")
            vmd.must("start", "a")
            vmd.must("pause", "a")
            vmd.must("unpause", "a")
            vmd.must("snapshot", "a", "monday")
            vmd.must("resize", "a", "disk0", "2M")
            with vmd.console("a") as console:
                console.expect("vmd-demo> ", DEADLINE_S)
                console.answer("reset", "vmd-demo> ")
            vmd.must("reload")
            assert vmd.vmctl("start", "b").returncode == 1
            heard = [listener.hear() for _ in range(13)]
            assert words(heard) == [
                "start", "ready", "pause", "unpause", "saving", "resume", "snapshot", "resize", "reboot", "ready",
                "reload", "start", "failed",
            ]  # fmt: skip
            assert {event["name"] for event in heard[:-3]} == {"a"}
            assert [event["state"] for event in heard[:5]] == ["starting", "running", "paused", "running", "saving"]
            assert (heard[6]["value"], heard[7]["device"], heard[7]["value"]) == ("monday", "disk0", str(2 << 20))
            assert "none.img" in heard[-1]["text"]
            assert [event.what for event in itertools.islice(theirs, 2)] == ["start", "failed"]

            (pid,) = (row["pid"] for row in vmd.rows() if row["name"] == "a")
            vmd.kill()
            vmd.start()
            adopted = listener.hear()
            assert (adopted["event"], adopted["number"]) == ("daemon", 1)
            assert "adopted 1 VM " in adopted["text"]

            os.kill(pid, signal.SIGKILL)
            (crash,) = listener.until("crash")
            assert (crash["name"], crash["how"], crash["state"]) == ("a", "failed", "stopped")
            assert crash["text"]
            vmd.must("start", "a")
            vmd.must("stop", "-fw", "a")
            stop = listener.until("stop")
            assert words(stop) == ["start", "ready", "stopping", "stop"]
            assert stop[-1]["how"] == "killed"

        past = vmd.must("events", "-l", "--json", "a").splitlines()
        assert words([json.loads(line) for line in past]) == ["crash", "start", "ready", "stopping", "stop"]
        assert "  a  stop: killed" in vmd.must("events", "-l")
