"""The real lockholder process, which names the process whose lock prevents a VM from using a file."""

import contextlib
import fcntl
import os
import pwd
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmd.fileid import FileId, file_id
from vmd.images.locks import DENIES, USES, WRITE
from vmd.images.locks import flock as lock_struct
from vmd.ipc.holdermsg import HOLDER, Holder, pack, unpack
from vmd.ipc.loop import Loop
from vmd.parent import holders
from vmd.parent.holders import AT_A_TIME, LOCKHOLDER_ENTRY, Holders
from vmd.privsep.cell import Cell, LockholderCell

pytestmark = pytest.mark.root

USER = pwd.getpwnam("nobody")
TOO_LONG_S = 60.0


@pytest.fixture(scope="module")
def cell() -> Iterator[LockholderCell]:
    """Give a cell."""
    built = Cell.build(USER.pw_uid, USER.pw_gid)
    yield LockholderCell(built)
    built.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give a file that everybody may read."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    path.chmod(0o644)
    return path


def ofd(byte: int, length: int = 1) -> Callable[[int], object]:
    """Return a function that takes a read lock of the open file description."""
    return lambda fd: fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock_struct.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, length, 0))


def posix(byte: int) -> Callable[[int], object]:
    """Return a function that takes a read lock of the process."""
    return lambda fd: fcntl.fcntl(fd, fcntl.F_SETLK, lock_struct.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def flock(fd: int) -> None:
    """Take a lock by flock(2), which is not the kind for disks."""
    fcntl.flock(fd, fcntl.LOCK_SH)


@contextlib.contextmanager
def locked(path: Path, *locks: Callable[[int], object]) -> Iterator[int]:
    """Let a user's process with its own name take locks; yield its pid."""
    fd = os.open(path, os.O_RDONLY)
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for lock in locks:
                lock(fd)
            Path("/proc/self/comm").write_bytes(b'a "thief"\n')
            os.setresgid(USER.pw_gid, USER.pw_gid, USER.pw_gid)
            os.setresuid(USER.pw_uid, USER.pw_uid, USER.pw_uid)
            os.write(done, b"!")
            signal.pause()
        finally:
            os._exit(1)
    try:
        os.close(fd)
        os.close(done)
        assert os.read(ready, 1) == b"!"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)


def lines_of(_title: str) -> socket.socket:
    """Return a descriptor for log lines that nobody reads."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def holder(
    place: LockholderCell | None, path: Path, entry: str = LOCKHOLDER_ENTRY, marks: tuple[int, ...] = ()
) -> Holder | None:
    """Ask for the holder of a lock.  Return None if it is unknown."""
    with contextlib.closing(Loop()) as loop:
        asked = Holders(loop, place, lines_of, entry=entry)
        answers: list[Holder | None] = []

        def done(found: Holder | None) -> None:
            answers.append(found)
            loop.stop()

        asked.ask(file_id(path.stat()), marks, done)
        assert answers == []
        loop.call_later(TOO_LONG_S, loop.stop)
        loop.run()
        assert len(answers) == 1
        assert not asked.at_work
        for child in asked.ending:
            assert child.reap(TOO_LONG_S) is not None
    return answers[0]


@pytest.mark.parametrize(
    "locks",
    [
        [ofd(DENIES + WRITE)], [ofd(USES + WRITE)], [ofd(0, 0)], [ofd(0, USES + 1)], [posix(DENIES)],
        [ofd(DENIES), flock], [flock],
    ],
    ids=["denies", "uses", "whole", "up-to", "process", "both", "flock"],
)  # fmt: skip
def test_the_holder_of_a_lock_is_named(cell: LockholderCell, image: Path, locks: list[Callable[[int], object]]) -> None:
    """The answer has pid, user and program.  The kernel's lock queries do not name owners of open file descriptions."""
    with locked(image, *locks) as pid:
        assert holder(cell, image) == Holder(pid=pid, uid=USER.pw_uid, program="a ?thief?")


def test_holders_of_other_locks_are_not_named(cell: LockholderCell, image: Path, tmp_path: Path) -> None:
    """Locks on other bytes or another file do not count.  A lock by flock(2) counts only without another one."""
    other = tmp_path / "other"
    other.write_bytes(bytes(4096))
    with locked(image, ofd(0, USES), ofd(DENIES + WRITE + 10), flock), locked(other, ofd(DENIES)):
        found = holder(cell, image)
        assert found is not None  # the holder of the lock by flock(2)
        with locked(image, ofd(DENIES)) as culprit:
            assert holder(cell, image) == found.replace(pid=culprit)
    assert holder(cell, image) is None


def test_only_a_holder_of_a_conflicting_lock_is_named(cell: LockholderCell, image: Path) -> None:
    """The answer is one of the holders with a lock on the bytes in `marks`, not one that only reads the file."""
    reader = (ofd(USES), ofd(DENIES + WRITE))
    with locked(image, *reader), locked(image, ofd(USES + WRITE), flock) as culprit, locked(image, *reader):
        found = holder(cell, image, marks=(DENIES, USES + WRITE))
        assert found is not None
        assert found.pid == culprit


def test_a_lockholder_that_does_not_answer(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lockholder that does not answer is killed at its deadline."""
    monkeypatch.setattr(holders, "ANSWER_S", 0.2)
    with locked(image, ofd(DENIES)):
        assert holder(None, image, "tests.support.imgprobes:hang") is None


@pytest.mark.parametrize("entry", ["nonsense", "die", "be_killed"])
def test_a_lockholder_without_an_answer(image: Path, entry: str) -> None:
    """The lockholder gives another answer, or ends without one."""
    assert holder(None, image, f"tests.support.imgprobes:{entry}") is None


def test_the_number_of_lockholders_is_limited() -> None:
    """The number at a time is limited; others get an unknown holder at once."""
    with contextlib.closing(Loop()) as loop:
        asked = Holders(loop, None, lines_of, entry="tests.support.imgprobes:hang")
        answers: list[Holder | None] = []

        def done(found: Holder | None) -> None:
            answers.append(found)
            loop.stop()

        for _ in range(AT_A_TIME + 1):
            asked.ask(FileId(device=1, inode=2), (), done)
        loop.call_later(TOO_LONG_S, loop.stop)
        loop.run()
        assert answers == [None]
        assert len(asked.at_work) == AT_A_TIME
        for child in asked.at_work:
            child.kill()
            assert child.reap(TOO_LONG_S) is not None


def test_answers_of_a_lockholder_are_made_printable() -> None:
    """A process can choose any name.  An answer of another size does not count."""
    assert unpack(pack(1, 2, b"\x1b[2J\xff\xc3\xa4'\"\\")) == Holder(pid=1, uid=2, program="?[2J???'??")
    assert unpack(pack(2**32 - 1, 2**32 - 1, b"x" * 15)) == Holder(pid=2**32 - 1, uid=2**32 - 1, program="x" * 15)
    for size in (*range(HOLDER.size), HOLDER.size + 1):
        assert unpack(bytes(size)) is None
