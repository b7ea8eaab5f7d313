"""Whose lock keeps a VM from a file, found in a /proc that the tests make."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from vmd.images.locks import DENIES, RESIZE, USES, WRITE
from vmd.ipc.holdermsg import Holder, unpack
from vmd.lockholder.main import OURS, find

DEVICE, INODE = os.makedev(0xFD, 0x12), 4711
FILE = "fd:12:4711"
HEAD = "pos:\t0\nflags:\t0100002\nmnt_id:\t29\nino:\t4711\n"

Adds = Callable[..., None]


def ofd(first: int, last: int | str | None = None, file: str = FILE, number: int = 1) -> str:
    """Return the line of an open file description's lock."""
    return f"lock:\t{number}: OFDLCK ADVISORY  READ -1 {file} {first} {first if last is None else last}\n"


FLOCK = f"lock:\t1: FLOCK  ADVISORY  WRITE 77 {FILE} 0 EOF\n"


@pytest.fixture
def proc(tmp_path: Path) -> Iterator[int]:
    """The descriptor of a /proc with files that are no processes."""
    (tmp_path / "self").mkdir()
    (tmp_path / "uptime").write_text("1 2\n")
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def add(tmp_path: Path) -> Adds:
    """A function that adds a process; each of `files` is the end of the fdinfo of one of its descriptors."""

    def add_process(pid: int, *files: str, comm: str = "qemu", uid: int = 1000) -> None:
        folder = tmp_path / str(pid)
        (folder / "fdinfo").mkdir(parents=True)
        for number, lines in enumerate(files):
            (folder / "fdinfo" / str(number)).write_text(HEAD + lines)
        (folder / "comm").write_text(f"{comm}\n")
        (folder / "status").write_text(f"Name:\t{comm}\nUid:\t5\t{uid}\t6\t7\nGid:\t1\t2\t3\t4\n")

    return add_process


def holder(proc: int, *marks: int) -> Holder | None:
    """Return who has a lock on one of these bytes."""
    answer = find(proc, DEVICE, INODE, marks or OURS)
    return unpack(answer) if answer else None


def test_the_process_with_the_lock_is_named(proc: int, add: Adds) -> None:
    """With its effective user, who may differ from the user who has started it."""
    add(20, "", ofd(USES + WRITE))
    before = open_descriptors()

    assert holder(proc) == Holder(pid=20, uid=1000, program="qemu")
    assert open_descriptors() == before


def test_the_first_process_is_named(proc: int, add: Adds) -> None:
    """Pids are numbers: 9 comes before 10."""
    for pid in (100, 10, 9):
        add(pid, ofd(USES))

    found = holder(proc)

    assert found is not None
    assert found.pid == 9


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (ofd(USES), True),
        (ofd(DENIES + RESIZE), True),
        (ofd(USES - 1), False),
        (ofd(DENIES + RESIZE + 1), False),
        (ofd(USES - 1, USES), True),
        (ofd(0, USES - 1), False),
        (ofd(0, "EOF"), True),
        (ofd(DENIES + RESIZE, "EOF"), True),
        (ofd(DENIES + RESIZE + 1, "EOF"), False),
        (ofd(USES, file="fd:12:47110"), False),
        (ofd(USES, file="fd:13:4711"), False),
        (ofd(USES, file="0fd:12:4711"), False),
        ("lock:\t1: OFDLCK\n", False),
        (ofd(USES).replace("lock:", "lease:"), False),
        (f"lock:\t1: POSIX  ADVISORY  READ 77 {FILE} {USES} {USES}\n", True),
    ],
)
def test_a_lock_must_be_on_a_byte_of_ours(proc: int, add: Adds, line: str, found: bool) -> None:
    """It must be on this file, too."""
    add(20, line)

    assert (holder(proc) is not None) is found


def test_only_conflicting_bytes_count(proc: int, add: Adds) -> None:
    """The parent knows on which ones the lock has failed."""
    add(20, ofd(USES))
    add(21, ofd(DENIES))

    found = holder(proc, DENIES, DENIES + 1)

    assert found is not None
    assert found.pid == 21
    assert holder(proc, DENIES + 1) is None


def test_a_lock_by_flock_counts_last(proc: int, add: Adds) -> None:
    """It conflicts with ours only on network file systems."""
    add(20, FLOCK)
    found = holder(proc)
    assert found is not None
    assert found.pid == 20

    add(30, FLOCK)
    add(40, FLOCK, ofd(USES))
    found = holder(proc)
    assert found is not None
    assert found.pid == 40


def test_processes_may_end_meanwhile(proc: int, add: Adds, tmp_path: Path) -> None:
    """They are passed over, wherever they are gone."""
    (tmp_path / "10").mkdir()
    add(11, ofd(USES))
    (tmp_path / "11" / "comm").unlink()
    add(12, ofd(USES))
    (tmp_path / "12" / "status").unlink()
    add(13, ofd(USES))
    (tmp_path / "13" / "status").write_text("Name:\tx\n")
    add(14, "", ofd(USES))
    (tmp_path / "14" / "fdinfo" / "0").unlink()
    (tmp_path / "14" / "fdinfo" / "0").symlink_to("gone")

    found = holder(proc)

    assert found is not None
    assert found.pid == 14


def test_nobody_may_have_it(proc: int, add: Adds) -> None:
    """The process may have ended."""
    add(20, "")

    assert holder(proc) is None


def test_a_proc_that_cannot_be_read_is_an_error() -> None:
    """The parent then says nothing about a process."""
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        find(999, DEVICE, INODE, OURS)
