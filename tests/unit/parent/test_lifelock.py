"""The lock by which a daemon waits for the guests of a killed one."""

import fcntl
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from vmd.errors import OperatorError
from vmd.parent import service
from vmd.parent.lifelock import EXTEND_US, SAY_AGAIN_S, LifeLock

WAITS = f"EXTEND_TIMEOUT_USEC={EXTEND_US}\nSTATUS=Waiting for the guests of an earlier vmd to shut down"


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LifeLock]:
    """Yield the lock of a daemon without a socket.  No descriptor of it stays open."""
    monkeypatch.setattr(service, "RUN_DIRECTORY", str(tmp_path))
    before = open_descriptors()
    yield LifeLock(str(tmp_path / "vmd.sock"))
    assert open_descriptors() == before


class Clock:
    """Replaces `time`.  The vmm of an earlier daemon ends after some seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lock: LifeLock, seconds: float, at_s: float = 1000.0) -> None:
        self.now_s = at_s
        self.end_s = at_s + seconds
        self.vmm = lock.share()
        self.told: list[tuple[float, str]] = []  # messages to the service manager, and after how many seconds
        self.begun_s = at_s
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        """Replaces `time.sleep`."""
        self.now_s += seconds
        if self.vmm >= 0 and self.now_s >= self.end_s:
            self.end()

    def end(self) -> None:
        """End the vmm."""
        os.close(self.vmm)
        self.vmm = -1

    def notify(self, state: str) -> None:
        """Replaces `service.notify`."""
        self.told.append((self.now_s - self.begun_s, state))


def no_wait(_seconds: float) -> None:
    """Replaces `time.sleep` where nothing may wait."""
    raise AssertionError("the daemon waits")


@pytest.mark.parametrize("uptime_s", [0.5, 1000.0])
def test_a_daemon_waits_for_the_vmm_of_an_earlier_one(
    lock: LifeLock, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], uptime_s: float
) -> None:
    """The log and the service manager get a message when the wait begins, and when it ends.

    This also holds just after a boot.
    """
    clock = Clock(monkeypatch, lock, 0.5, uptime_s)
    lock.wait(notify=clock.notify)

    assert clock.vmm == -1
    assert [state for _, state in clock.told] == [WAITS, "STATUS="]
    said = capfd.readouterr().err
    assert said.count("guests of an earlier vmd are still shutting down: waiting for their end") == 1
    assert said.count("the guests of an earlier vmd have ended") == 1


def test_a_long_wait_is_reported_repeatedly(lock: LifeLock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the reports the service manager would give up the start."""
    clock = Clock(monkeypatch, lock, 60.0)
    lock.wait(notify=clock.notify)

    assert clock.told[-1][1] == "STATUS="
    at_s = [seconds for seconds, state in clock.told if state == WAITS]
    assert at_s[0] == 0
    assert len(at_s) >= 10
    assert all(SAY_AGAIN_S <= later - sooner < EXTEND_US / 1e6 for sooner, later in itertools.pairwise(at_s))


def test_nothing_is_reported_without_a_vmm(
    lock: LifeLock, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Afterwards the lock is free for the next vmm."""
    monkeypatch.setattr(time, "sleep", no_wait)
    told: list[str] = []
    lock.wait(notify=told.append)

    assert (told, capfd.readouterr().err) == ([], "")
    for fd in (lock.share(), lock.share()):  # two generations
        assert fd >= 0
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_a_daemon_that_still_runs_is_not_waited_for(lock: LifeLock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vmm also has the lock, and does not end by itself."""
    clock = Clock(monkeypatch, lock, 60.0)
    monkeypatch.setattr(time, "sleep", no_wait)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        daemon.bind(lock.socket_path)
        daemon.listen()
        with pytest.raises(OperatorError, match="another vmd is already serving"):
            lock.wait(notify=clock.notify)

    assert clock.told == []
    clock.end()


def test_the_file_is_removed_after_the_last_vmm(lock: LifeLock, tmp_path: Path) -> None:
    """While a vmm has the lock, the next daemon must find the file."""
    vmm = lock.share()
    lock.remove()
    assert [*tmp_path.iterdir()] == [Path(lock.path)]
    assert Path(lock.path).stat().st_mode & 0o777 == 0o600
    os.close(vmm)
    lock.remove()
    assert [*tmp_path.iterdir()] == []


def test_the_lock_is_on_the_file_that_the_next_daemon_finds(lock: LifeLock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another daemon may remove the file after it was opened, and before it is locked."""
    flock: Callable[[int, int], None] = fcntl.flock
    removed: list[int] = []

    def late(fd: int, how: int) -> None:
        if not removed:
            removed.append(fd)
            os.unlink(lock.path)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    vmm = lock.share()

    assert os.path.samestat(os.fstat(vmm), os.stat(lock.path))
    os.close(vmm)


def test_each_control_socket_has_its_own_lock(lock: LifeLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path and an absolute one lead to the same lock."""
    monkeypatch.chdir(tmp_path)

    assert LifeLock("vmd.sock").path == lock.path
    assert LifeLock(str(tmp_path / "vmd2.sock")).path != lock.path
    assert Path(lock.path).parent == tmp_path


@pytest.mark.parametrize("trouble", ["no directory", "a link", "no locks"])
def test_a_host_without_the_lock(
    lock: LifeLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], trouble: str
) -> None:
    """The daemon starts, and the log says what follows from that.  A link is not followed."""
    if trouble == "no directory":
        lock.path = str(tmp_path / "none" / "guests")
    elif trouble == "a link":
        os.symlink(tmp_path / "victim", lock.path)
    else:
        monkeypatch.setattr(fcntl, "flock", lambda *_: os.chdir(tmp_path / "none"))  # fails with an OSError
    monkeypatch.setattr(time, "sleep", no_wait)
    told: list[str] = []
    lock.wait(notify=told.append)
    said = capfd.readouterr().err

    assert lock.share() == -1
    lock.remove()
    assert not (tmp_path / "victim").exists()
    assert told == []
    assert f"{lock.path}: " in said
    assert said.count("if this vmd is killed, the next one will not wait for its guests") == 1
