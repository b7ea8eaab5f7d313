"""Which bytes of an image are locked, and who may use it beside us: QEMU looks at the same bytes (hostile 53)."""

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmd.errors import InUse, OperatorError
from vmd.images.locks import flock, lock, refresh, unlock

# QEMU, block/file-posix.c: a program that uses permission n holds byte 100 + n; one that shares it with nobody
# holds byte 200 + n.  Permissions: 0 consistent read, 1 write, 2 write unchanged, 3 resize.  Byte 150 is ours.
READ, WRITE = fcntl.F_RDLCK, fcntl.F_WRLCK
READER = {100: READ, 201: READ, 203: READ}
WRITER = {100: READ, 101: READ, 103: READ, 150: WRITE, 201: READ, 203: READ}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image."""
    (tmp_path / "disk").touch()
    return tmp_path / "disk"


@pytest.fixture
def ours(path: Path) -> Iterator[int]:
    """Our descriptor of it."""
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def other(path: Path) -> Iterator[int]:
    """The descriptor of another program."""
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def seen(fd: int) -> dict[int, int]:
    """Return the locked bytes and the kinds of their locks, as the owner of `fd` sees those of others."""
    found = {}
    for byte in range(400):
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, flock.pack(WRITE, os.SEEK_SET, byte, 1, 0))
        kind, _, start, length, _ = flock.unpack(answer)
        if kind != fcntl.F_UNLCK:
            assert start <= byte < start + length
            found[byte] = kind
    return found


def hold(fd: int, kind: int, *held: int) -> None:
    """Lock bytes as another program does."""
    for byte in held:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock.pack(kind, os.SEEK_SET, byte, 1, 0))


@pytest.mark.parametrize(("writable", "held"), [(False, READER), (True, WRITER)])
def test_bytes_are_those_of_qemu(ours: int, other: int, path: Path, writable: bool, held: dict[int, int]) -> None:
    """They are free after the end of the use, also a use that has begun twice."""
    for _ in range(2):
        lock(ours, str(path), writable=writable)
        assert seen(other) == held
    unlock(ours)
    assert seen(other) == {}


@pytest.mark.parametrize(
    ("writable", "held", "writes"),
    [
        (False, (101,), True), (False, (103,), False), (False, (200,), False),
        (True, (101,), True), (True, (103,), False), (True, (200,), False), (True, (201,), False),
        (True, (203,), False), (True, (101, 203), True),
    ],
)  # fmt: skip
def test_conflicting_use(
    ours: int, other: int, path: Path, writable: bool, held: tuple[int, ...], writes: bool
) -> None:
    """It is refused, and leaves no lock of ours; the sentence says whether the other one writes."""
    hold(other, READ, *held)

    with pytest.raises(InUse) as refused:
        lock(ours, str(path), writable=writable)

    assert seen(other) == {}
    assert refused.value.marks == tuple(sorted(held, key=lambda byte: (byte < 200, byte)))
    assert ("which writes to it" in str(refused.value)) == writes
    assert seen(ours) == dict.fromkeys(held, READ)


@pytest.mark.parametrize(("writable", "held"), [(False, (100, 102, 201, 202, 203)), (True, (100, 102, 202))])
def test_use_that_conflicts_with_nobody(
    ours: int, other: int, path: Path, writable: bool, held: tuple[int, ...]
) -> None:
    """Readers share an image; nobody minds writes that change nothing."""
    hold(other, READ, *held)
    lock(ours, str(path), writable=writable)
    assert seen(other) == (WRITER if writable else READER)


def test_writer_is_alone_with_its_own_byte(ours: int, other: int, path: Path) -> None:
    """A lock of another process, even for reading, keeps a writer out."""
    hold(other, READ, 150)
    lock(ours, str(path), writable=False)
    unlock(ours)
    with pytest.raises(InUse):
        lock(ours, str(path), writable=True)
    assert seen(other) == {}


def test_lost_locks_are_taken_again(ours: int, other: int, path: Path) -> None:
    """All of them, unless another writer has come."""
    lock(ours, str(path), writable=True)
    refresh(ours)
    assert seen(other) == WRITER
    unlock(ours)
    refresh(ours)
    assert seen(other) == WRITER
    unlock(ours)
    lock(other, str(path), writable=True)
    with pytest.raises(BlockingIOError):
        refresh(ours)
    assert seen(other) == {}


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EAGAIN])
def test_lock_that_fails_in_the_middle_leaves_none(
    ours: int, other: int, path: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program could not use the image."""
    real = fcntl.fcntl
    for failing in range(1, 8):
        calls: list[int] = []

        def fail(
            fd: int, command: int, argument: bytes, calls: list[int] = calls, failing: int = failing
        ) -> "int | bytes":
            if flock.unpack(argument)[0] != fcntl.F_UNLCK:
                calls.append(fd)
                if len(calls) == failing:
                    raise OSError(error, os.strerror(error))
            return real(fd, command, argument)

        with monkeypatch.context() as broken:
            broken.setattr(fcntl, "fcntl", fail)
            try:
                lock(ours, str(path), writable=True)
            except OperatorError:
                assert len(calls) >= failing
            else:
                assert len(calls) < failing
                unlock(ours)
        assert seen(other) == {}


@pytest.mark.parametrize(
    ("error", "number", "words"),
    [
        (OSError(errno.ENOLCK, "No locks available"), errno.ENOLCK, "cannot be locked: No locks available"),
        (OSError("odd"), errno.EIO, "cannot be locked: None"),
    ],
)
def test_file_system_without_locks(
    ours: int, path: Path, error: OSError, number: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is not a use by another program.  To unlock such a file is no error."""

    def fail(_fd: int, _command: int, _argument: bytes) -> bytes:
        raise error

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OperatorError, match=words) as refused:
        lock(ours, str(path), writable=True)
    assert not isinstance(refused.value, InUse)
    assert refused.value.number == number
    unlock(ours)
