"""`vmctl console -l`: the files of a console log, read while vmd rotates them."""

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.console import Console
from tests.support.descriptors import open_descriptors
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import DEADLINE_S, FakeDaemon, spawn
from vmctl.errors import CommandError
from vmctl.keptlog import KeptLog
from vmd.ipc.messages.clients import ConsoleLogAt, ConsoleLogRequest, Failed


class Reader(KeptLog):
    """Collects the output, and follows the log one round at a time."""

    def __init__(self, path: Path, keep: int = 3) -> None:
        self.path = path
        self.shown = bytearray()
        super().__init__(str(path), keep, self.shown.extend)

    def look(self) -> bytes:
        """Follow for one round.  Return the new output."""
        self.shown.clear()
        self.follow_once()
        return bytes(self.shown)

    def put_aside(self, *, empty: bool = True) -> None:
        """Rotate the log as vmd does."""
        for number in range(len(self.paths) - 1, 0, -1):
            if os.path.exists(self.paths[number - 1]):
                os.rename(self.paths[number - 1], self.paths[number])
        self.path.write_bytes(b"" if empty else b"new\n")

    def add(self, data: bytes, number: int = 0) -> None:
        """Write to a file of the log."""
        with open(self.paths[number], "ab") as file:
            file.write(data)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """The reader of a log with three files.  It leaves none of them open."""
    before = open_descriptors()
    for name, data in (("a.log.2", b"1"), ("a.log.1", b"2"), ("a.log", b"3")):
        (tmp_path / name).write_bytes(data)
    reader = Reader(tmp_path / "a.log")
    yield reader
    reader.close()
    reader.close()
    assert open_descriptors() == before


def test_all_files_are_shown_the_oldest_first(reader: Reader) -> None:
    """Files that are not kept any more are skipped."""
    for number, data in ((3, b"0"), (4, b"old")):
        reader.path.with_name(f"a.log.{number}").write_bytes(data)
    reader.show_all()

    assert bytes(reader.shown) == b"0123"


def test_following_a_log_that_is_rotated(reader: Reader) -> None:
    """The writer may still append to the old file, and several rotations may happen between two rounds."""
    reader.show_all()
    reader.add(b"4")
    assert reader.look() == b"4"
    reader.put_aside()
    reader.add(b"5", 1)
    assert reader.look() == b"5"
    reader.add(b"6", 1)
    reader.add(b"7")
    assert reader.look() == b"67"
    reader.add(b"8")
    reader.put_aside(empty=False)
    reader.add(b"9")
    reader.put_aside()
    assert reader.look() == b"8new\n9"
    assert reader.look() == b""
    reader.add(b"0")
    assert reader.look() == b"0"


def test_following_a_log_that_is_cut_or_removed(reader: Reader) -> None:
    """It continues from the beginning of the file."""
    reader.show_all()
    reader.path.write_bytes(b"")
    assert reader.look() == b""
    reader.add(b"after")
    assert reader.look() == b"after"
    reader.path.unlink()
    assert reader.look() == b""
    reader.add(b"anew")
    assert reader.look() == b"anew"


def test_following_a_log_of_a_silent_guest(reader: Reader) -> None:
    """Empty files are skipped, and not kept open."""
    reader.show_all()
    reader.put_aside()
    assert [reader.look() for _ in range(3)] == [b"", b"", b""]
    reader.put_aside()
    reader.add(b"4")
    assert reader.look() == b"4"


def test_rounds_have_pauses(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Following a silent guest costs little."""
    pauses: list[float] = []

    def pause(_read: object, _write: object, _error: object, seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("vmctl.keptlog.select", SimpleNamespace(select=pause))
    with pytest.raises(KeyboardInterrupt):
        reader.follow()
    assert all(seconds > 0.0 for seconds in pauses)


def test_following_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    """Its VM was never started."""
    reader = Reader(tmp_path / "a.log")
    reader.show_all(wait=True)
    assert reader.look() == b""
    reader.add(b"first")
    assert reader.look() == b"first"


def test_a_log_that_cannot_be_read(tmp_path: Path) -> None:
    """The message names the file."""
    with pytest.raises(CommandError, match=r"console log /.*/a\.log: No such file or directory"):
        Reader(tmp_path / "a.log").show_all()
    (tmp_path / "a.log").mkdir()
    with pytest.raises(CommandError, match=r"console log /.*/a\.log: Is a directory"):
        Reader(tmp_path / "a.log").show_all()


def test_show(vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path) -> None:
    """The daemon gives the path.  Output into a pipe is unchanged."""
    (tmp_path / "log").write_bytes(b"one\x1b[2Jtwo\n")
    daemon.answers(ConsoleLogAt(vmid=3, name="web", path=str(tmp_path / "log"), keep=2))

    assert vmctl("console", "-l", "web") == (0, "one\x1b[2Jtwo\n", "")
    assert daemon.requests == [ConsoleLogRequest(name="web")]
    assert '"keep": 2' in vmctl("console", "-l", "--json", "web")[1]


def test_an_unknown_vm(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Its status is that of all commands."""
    daemon.answers(Failed(code=errno.ENOENT, text="vm web not found"))

    assert vmctl("console", "-l", "web") == (4, "", "vmctl: console log not found: vm web not found\n")


def test_where_the_log_is(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The document has no content, so there is nothing to follow."""
    daemon.answers(ConsoleLogAt(vmid=3, name="web", path="/v/web", keep=2))

    assert vmctl("console", "-l", "--json", "web")[0] == 0
    status, _, errors = vmctl("console", "-lF", "--json", "web")
    assert status == 2
    assert errors.startswith("vmctl: --json only tells where the console log is, and cannot be used with -F\n")


def test_a_vm_without_a_log(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The daemon's answer has the reason."""
    daemon.answers(Failed(code=61, text="vm web has no console log: see `console log` in vm.conf(5)"))

    assert vmctl("console", "-l", "web") == (
        1, "", "vmctl: command failed: vm web has no console log: see `console log` in vm.conf(5)\n",
    )  # fmt: skip


def test_follow_until_interrupted(daemon: FakeDaemon, tmp_path: Path) -> None:
    """^C ends it successfully."""
    path = tmp_path / "log"
    path.write_bytes(b"one ")
    daemon.answers(ConsoleLogAt(vmid=3, name="web", path=str(path)))
    process: subprocess.Popen[str] = spawn(daemon, "console", "-lF", "web")
    assert process.stdout is not None
    screen = Console(process.stdout.fileno())
    screen.expect("one ", DEADLINE_S)
    with path.open("ab") as file:
        file.write(b"two ")
    screen.expect("two ", DEADLINE_S)
    process.send_signal(signal.SIGINT)

    assert (process.wait(DEADLINE_S), process.communicate()[1]) == (0, "")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("-F", "-F needs -l"),
        ("-rl", "conflicting -r and -l arguments"),
        ("-fl", "conflicting -f and -l arguments"),
    ],
)
def test_options_that_do_not_go_together(vmctl: Vmctl, options: str, sentence: str) -> None:
    """The message names them, and the usage follows."""
    status, _, errors = vmctl("console", options, "web")

    assert (status, errors.splitlines()[0]) == (2, f"vmctl: {sentence}")
