"""Whose files are opened when, by how many openers, and when nobody opens them any more."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from vmd.config.model import Config, DiskConfig, Owner, Rights, VmConfig
from vmd.errors import OperatorError, VmdError
from vmd.ipc.messages import FilesOpened, OpenFiles, Proc
from vmd.parent.core import Core
from vmd.parent.opening import AGAIN_S, AT_A_TIME, STUCK_MAX, STUCK_MAX_OF_ROOT, Opened, Openings
from vmd.parent.vmtable import Vm
from vmd.record import Record

ROOT = 0


class Child:
    """A process that ends when a test says so."""

    def __init__(self) -> None:
        self.pidfd = 7
        self.killed = False

    def kill(self) -> None:
        """Note it."""
        self.killed = True


class Channel:
    """What leads to an opener."""

    def __init__(self, on_lost: Callable[..., None]) -> None:
        self.on_lost = on_lost
        self.label = "opener"
        self.told: list[OpenFiles] = []
        self.closed = False

    def send(self, message: Record, *, fds: dict[str, list[int]]) -> None:
        """Take a job."""
        assert isinstance(message, OpenFiles)
        self.told.append(message)
        for each in fds.values():
            for fd in each:
                os.close(fd)

    def close(self) -> None:
        """Note it."""
        self.closed = True


class Host:
    """Stands in for the loop, the children, and the parent; timers run when a test says so."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []
        self.channels: list[Channel] = []
        self.children: list[Child] = []
        self.core = Core(cast("Any", self), Config())
        self.openings = Openings(self.core, cast("Any", self.attach))
        self.ended: list[tuple[str, VmdError | None]] = []
        self.openings.children = cast("Any", self)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> "Host":
        """Keep what is to be done at once."""
        if delay_s == 0:
            self.soon.append(callback)
        return self

    def cancel(self) -> None:
        """No timer runs."""

    def bury(self) -> None:
        """Nobody has ended."""

    def start(self, proc: Proc, _open_log: object) -> tuple[Child, None]:
        """Start an opener."""
        assert proc is Proc.OPENER
        self.children.append(Child())
        return self.children[-1], None

    def start_probe(self, _open_log: object) -> tuple[Child, socket.socket]:
        """Start an imgprobe."""
        ours, theirs = socket.socketpair()
        theirs.close()
        return Child(), ours

    def attach(self, _sock: object, _proc: Proc, _label: str, *, on_lost: Callable[..., None]) -> Channel:
        """Serve it."""
        self.channels.append(Channel(on_lost))
        return self.channels[-1]

    def run(self) -> None:
        """Do what is to be done at once."""
        while self.soon:
            self.soon.pop(0)()

    def open(self, name: str, user: int, rights: Rights = Rights()) -> Vm:  # noqa: B008 - it is frozen
        """Have the files of a VM opened."""
        config = VmConfig(name=name, disks=(DiskConfig(path=f"/{name}"),), rights=rights)
        vm = Vm(1, config, from_config=True)

        def opened(what: Opened) -> None:
            what.close()
            self.ended.append((name, None))

        self.openings.open(vm, config, user, opened, lambda error: self.ended.append((name, error)), boots=True)
        self.run()
        return vm

    def at_work(self) -> list[str]:
        """Return the VMs whose files are being opened, each as often as by openers."""
        return [channel.told[0].name for channel in self.channels if channel.told and not channel.closed]

    def answer(self, name: str) -> None:
        """Have the files of a VM be open, and fetched."""
        for channel in self.channels:
            if channel.told and channel.told[0].name == name and not channel.closed:
                self.openings.on_opened(FilesOpened(disks=(), files=(), notes=(), boot_name=""), cast("Any", channel))
                channel.on_lost(channel, None)
        self.run()


@pytest.fixture
def host() -> Iterator[Host]:
    """Give a parent that opens files."""
    host = Host()
    host.openings.open_log = cast("Any", None)
    yield host
    host.openings.close()


def test_openings_of_a_user_take_turns(host: Host) -> None:
    """In the order in which they came; one that is given up keeps nobody."""
    host.open("a", 1000)
    second = host.open("b", 1000)
    host.open("c", 1000)
    assert host.at_work() == ["a"]
    assert host.openings.give_up(second)
    host.answer("a")
    assert host.at_work() == ["c"]
    host.answer("c")
    assert host.ended == [("a", None), ("c", None)]


def test_so_many_users_at_a_time_and_root_besides(host: Host) -> None:
    """Root's begin at once, however many there are, and take nobody's place."""
    for number in range(AT_A_TIME + 1):
        host.open(f"u{number}", 1000 + number)
    for number in range(5):
        host.open(f"r{number}", ROOT)
    users = [f"u{number}" for number in range(AT_A_TIME)]
    assert host.at_work() == [*users, *(f"r{number}" for number in range(5))]
    host.answer("r0")
    assert f"u{AT_A_TIME}" not in host.at_work()
    host.answer("u0")
    assert f"u{AT_A_TIME}" in host.at_work()


def test_what_two_users_have_named_is_opened_by_two_openers(host: Host) -> None:
    """Each is told whose rights to take; the VM goes on after the last."""
    rights = Rights(disks=Owner(uid=2000, gid=2000))
    host.open("two", ROOT, rights)
    jobs = [channel.told[0] for channel in host.channels if channel.told]
    assert [(job.uid, job.boots, len(job.disks)) for job in jobs] == [(0, True, 0), (2000, False, 1)]
    first = next(channel for channel in host.channels if channel.told)
    host.openings.on_opened(FilesOpened(disks=(), files=(), notes=(), boot_name=""), cast("Any", first))
    assert host.ended == []
    second = [channel for channel in host.channels if channel.told][1]
    host.openings.on_opened(FilesOpened(disks=(), files=(), notes=(), boot_name=""), cast("Any", second))
    assert host.ended == [("two", None)]


@pytest.mark.parametrize(("user", "most"), [(1000, STUCK_MAX), (ROOT, STUCK_MAX_OF_ROOT)])
def test_openers_that_do_not_end(host: Host, monkeypatch: pytest.MonkeyPatch, user: int, most: int) -> None:
    """A user with so many of them is told so at once; when one has ended, and for others, files are opened."""
    for number in range(most):
        assert host.openings.give_up(host.open(f"stuck{number}", user))
    assert all(child.killed for child in host.children)
    later_s = time.monotonic() + AGAIN_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    host.open("more", user)
    host.open("other", 3000)
    ((name, error),) = host.ended
    assert name == "more"
    assert isinstance(error, OperatorError)
    assert str(error) == (
        f"{most} processes that were to open files for uid {user} do not end: their storage does not answer"
    )
    host.children[0].pidfd = -1
    host.open("again", user)
    assert host.at_work() == ["other", "again"]
