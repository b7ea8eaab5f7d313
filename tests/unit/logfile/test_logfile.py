"""The files of a console log: how they are opened, rotated and refused."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors, open_files
from vmd.config.model import MAX_LOGS_KEPT
from vmd.errors import OperatorError
from vmd.ipc import courier
from vmd.ipc.logfile import LogFile, pack, unpack
from vmd.logfile import main
from vmd.logfile.main import open_log
from vmd.privsep import landlock
from vmd.privsep.confine import LOGFILE, Confinement

SIZE = 65536


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """Yield the descriptor of a directory."""
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def wanted(path: Path, keep: int = 3, *, shared: bool = False) -> LogFile:
    """Return a log of 64 KiB."""
    return LogFile(path=str(path), size_bytes=SIZE, keep=keep, uid=0, gid=0, groups=(), shared=shared)


def names(path: Path) -> dict[str, bytes]:
    """Return the first byte of each file, by name."""
    return {each.name: each.read_bytes()[:1] for each in sorted(path.iterdir())}


def test_the_arguments_survive_the_command_line() -> None:
    """Any path and any groups are possible."""
    asked = LogFile(path="/v/\udcff a\n.log", size_bytes=1, keep=2, uid=3, gid=4, groups=(5, 6), shared=True)

    assert unpack(pack(asked)) == asked


@pytest.mark.parametrize(("shared", "mode"), [(False, 0o600), (True, 0o640)])
def test_a_new_log_is_for_its_owner(directory: int, tmp_path: Path, *, shared: bool, mode: int) -> None:
    """Its group may read it if vm.conf names one.  Output is appended."""
    old_mask = os.umask(0)
    try:
        fd = open_log(directory, wanted(tmp_path / "a.log", shared=shared))
    finally:
        os.umask(old_mask)

    assert (tmp_path / "a.log").stat().st_mode & 0o777 == mode
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_APPEND | os.O_ACCMODE) == os.O_APPEND | os.O_WRONLY
    os.close(fd)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (0, {"a.log": b""}),
        (1, {"a.log": b"", "a.log.1": b"c"}),
        (3, {"a.log": b"", "a.log.1": b"c", "a.log.2": b"1", "a.log.3": b"2"}),
        (9, {"a.log": b"", "a.log.1": b"c", "a.log.2": b"1", "a.log.3": b"2", "a.log.4": b"3", "a.log.6": b"5"}),
    ],
)
def test_a_full_log_is_rotated(directory: int, tmp_path: Path, keep: int, left: dict[str, bytes]) -> None:
    """Each file gets the next name.  Files beyond `keep` are removed, also after `keep` was reduced."""
    (tmp_path / "a.log").write_bytes(b"c" * SIZE)
    for number in (1, 2, 3, 5):
        (tmp_path / f"a.log.{number}").write_bytes(b"%d" % number)

    os.close(open_log(directory, wanted(tmp_path / "a.log", keep)))

    assert names(tmp_path) == left


@pytest.mark.parametrize("keep", [0, 1, MAX_LOGS_KEPT - 1, MAX_LOGS_KEPT])
def test_as_many_logs_are_kept_as_there_can_be(directory: int, tmp_path: Path, keep: int) -> None:
    """All further ones are removed, up to the last name that a log can have."""
    (tmp_path / "a.log").write_bytes(b"0" * SIZE)
    for number in range(1, MAX_LOGS_KEPT + 1):
        (tmp_path / f"a.log.{number}").write_bytes(str(number).encode())
    os.close(open_log(directory, wanted(tmp_path / "a.log", keep)))

    left = {each.name: each.read_bytes()[:9].rstrip(b"0") or b"0" for each in tmp_path.iterdir()}
    kept = {f"a.log.{number + 1}": str(number).encode().rstrip(b"0") or b"0" for number in range(keep)}
    assert left == {"a.log": b"0", **kept}
    assert (tmp_path / "a.log").stat().st_size == 0


def test_a_log_that_is_not_full_is_used_again(directory: int, tmp_path: Path) -> None:
    """Nothing is rotated."""
    (tmp_path / "a.log").write_bytes(b"c" * (SIZE - 1))

    os.close(open_log(directory, wanted(tmp_path / "a.log")))

    assert names(tmp_path) == {"a.log": b"c"}


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("symlink", "is a symbolic link"),
        ("hardlink", r"has other names \(hard links\)"),
        ("fifo", "is not a regular file"),
        ("directory", "is not a regular file"),
    ],
)
def test_a_file_that_is_not_a_log_is_refused(directory: int, tmp_path: Path, kind: str, sentence: str) -> None:
    """Otherwise a user who can write to the directory could have another file of the owner overwritten."""
    path, other = tmp_path / "a.log", tmp_path / "other"
    other.write_bytes(b"precious")
    match kind:
        case "symlink":
            path.symlink_to(other)
        case "hardlink":
            path.hardlink_to(other)
        case "fifo":
            os.mkfifo(path)
        case _:
            path.mkdir()

    with pytest.raises(OperatorError, match=sentence):
        open_log(directory, wanted(path))

    assert other.read_bytes() == b"precious"


def test_a_log_has_one_writer(directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If two VMs have the same path, the second one gets an error.  It gets the log when the first has ended."""
    monkeypatch.setattr(main, "LOCK_S", 0.0)
    fd = open_log(directory, wanted(tmp_path / "a.log"))

    with pytest.raises(OperatorError, match="is in use by another VM or program") as refused:
        open_log(directory, wanted(tmp_path / "a.log"))
    os.close(fd)
    os.close(open_log(directory, wanted(tmp_path / "a.log")))

    assert refused.value.number == errno.EBUSY


def test_a_log_that_is_rotated_meanwhile_is_opened_again(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous writer does so before it gives up its lock."""
    path, taken = tmp_path / "a.log", []

    def lock(fd: int) -> bool:
        taken.append(fd)
        if len(taken) == 1:
            path.rename(tmp_path / "a.log.1")
        elif len(taken) == 2:
            path.rename(tmp_path / "a.log.2")
            path.touch()
        return True

    monkeypatch.setattr(main, "lock", lock)
    fd = open_log(directory, wanted(path))

    assert os.path.samestat(os.fstat(fd), path.stat())
    assert len(taken) == 3
    os.close(fd)


def test_a_log_waits_for_its_previous_writer(directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That one may still be ending."""
    fd = open_log(directory, wanted(tmp_path / "a.log"))
    rounds: list[float] = []

    def sleep(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) == 3:
            os.close(fd)

    monkeypatch.setattr(main, "LOCK_S", 3600.0)
    monkeypatch.setattr("vmd.logfile.main.time.sleep", sleep)

    os.close(open_log(directory, wanted(tmp_path / "a.log")))

    assert rounds == [main.LOCK_ROUND_S] * 3


@pytest.mark.parametrize(("number", "is_error"), [(errno.ENOLCK, False), (errno.EOPNOTSUPP, False), (errno.EIO, True)])
def test_a_file_system_without_locks(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_error: bool
) -> None:
    """A log there has no lock.  Other errors are those of the storage."""

    def fail(_fd: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    before = open_descriptors()

    if is_error:
        with pytest.raises(OSError, match=os.strerror(number)):
            open_log(directory, wanted(tmp_path / "a.log"))
    else:
        os.close(open_log(directory, wanted(tmp_path / "a.log")))

    assert open_descriptors() == before


@pytest.mark.parametrize("kind", ["fifo", "full"])
def test_no_descriptor_stays_open(directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Neither of a file that is refused, nor of those that were put aside."""
    if kind == "fifo":
        os.mkfifo(tmp_path / "a.log")
        os.close(os.open(tmp_path / "a.log", os.O_RDONLY | os.O_NONBLOCK))
    else:
        (tmp_path / "a.log").write_bytes(bytes(SIZE))
    before = open_descriptors()

    if kind == "fifo":
        with pytest.raises(OperatorError):
            open_log(directory, wanted(tmp_path / "a.log"))
    else:
        os.close(open_log(directory, wanted(tmp_path / "a.log")))

    assert open_descriptors() == before


# --- the process --------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps by which the process gives up rights, which have no effect."""
    found: list[str] = []
    monkeypatch.setattr(main, "become", lambda asked: found.append(f"become {asked.uid}"))
    monkeypatch.setattr(main, "stay_in", lambda fd: found.append(f"stay in {os.readlink(f'/proc/self/fd/{fd}')}"))
    return found


def run(monkeypatch: pytest.MonkeyPatch, asked: LogFile) -> tuple[str, list[int]]:
    """Run the process; return its answer and the files that it gives away."""
    reading, writing = os.pipe()
    asks, gives = courier.pair()
    courier.ask(asks)
    monkeypatch.setattr(main, "FD_ANSWER", writing)
    courier_fd = gives.detach()
    monkeypatch.setattr(main, "FD_COURIER", courier_fd)
    monkeypatch.setattr(sys, "argv", ["vmd", *pack(asked)])
    old_mask = os.umask(0o077)
    before = open_files(os.getpid())
    try:
        assert main.main() == 0
    finally:
        os.umask(old_mask)
    after = open_files(os.getpid())
    os.close(writing)
    # The process keeps its descriptors to its end.
    for fd in [fd for fd in after if fd not in before or fd == courier_fd]:
        os.close(fd)
    with asks, os.fdopen(reading) as answer:
        said = answer.read()
        try:
            return said, courier.take(asks)["log"]
        except OSError:
            return said, []


def test_a_log_is_given_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: list[str]) -> None:
    """First the process becomes the owner and gives up all but the directory; the mode does not depend on its umask."""
    said, (fd,) = run(monkeypatch, wanted(tmp_path / "a.log", shared=True))

    assert said == "\n"
    assert steps == ["become 0", f"stay in {tmp_path}"]
    assert os.path.samestat(os.fstat(fd), (tmp_path / "a.log").stat())
    assert (tmp_path / "a.log").stat().st_mode & 0o777 == 0o640
    os.close(fd)


def test_a_log_that_cannot_be_opened_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: list[str]
) -> None:
    """Nothing is given away then."""
    assert run(monkeypatch, wanted(tmp_path / "gone" / "a.log")) == ("No such file or directory\n", [])
    assert steps == ["become 0"]

    (tmp_path / "a.log").mkdir()
    assert run(monkeypatch, wanted(tmp_path / "a.log")) == ("is not a regular file\n", [])


def test_the_process_becomes_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the owner's groups instead of root's, and for good: the saved ids change, too."""
    steps: list[tuple[object, ...]] = []
    for name in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, name, lambda *given, name=name: steps.append((name, *given)))
    main.become(LogFile(path="/a", size_bytes=1, keep=0, uid=5, gid=6, groups=(7, 8), shared=False))

    assert steps == [("setgroups", (7, 8)), ("setresgid", 6, 6, 6), ("setresuid", 5, 5, 5)]


def test_the_process_keeps_the_right_to_one_directory(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To write, make, and remove files there, and nothing else."""
    confined: list[Confinement] = []
    monkeypatch.setattr(main, "confine", confined.append)
    main.stay_in(directory)

    (confinement,) = confined
    rights = landlock.WRITE_FILE | landlock.MAKE_REG | landlock.REMOVE_FILE
    assert confinement.files == ((f"/proc/self/fd/{directory}", rights),)
    assert confinement == LOGFILE.replace(files=confinement.files)


def test_a_parent_that_does_not_wait_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is one short line; nobody reading it is no error."""
    reading, writing = os.pipe()
    monkeypatch.setattr(main, "FD_ANSWER", writing)
    main.answer("x" * 9000)
    assert os.read(reading, 9000) == b"x" * 4096
    os.close(reading)
    main.answer("late")
    os.close(writing)
