"""vmctl create, the real program: on a terminal, interrupted, killed, and on a full disk."""

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.images import MIB, problems, qemu, small_file_system

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "vmctl", "create"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
DEADLINE_S = 60.0
SETTLED_MS = 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give the working directory of the program, with an image to copy."""
    (tmp_path / "source.raw").write_bytes(os.urandom(4 * MIB) + bytes(4 * MIB))
    return tmp_path


def create(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run the program without a terminal.  Return its exit status and its standard error."""
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S,
        check=False,
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr


class Terminal:
    """A terminal with a program on it.  A `full` one blocks the program's first write."""

    def __init__(self, folder: Path, arguments: list[str], columns: int, *, full: bool = False) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        if full:
            os.set_blocking(slave, False)
            room = select.poll()
            room.register(slave, select.POLLOUT)
            while room.poll(SETTLED_MS):  # the kernel moves written bytes on, and then has room again
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(slave, b"#")
            os.set_blocking(slave, True)  # the next write blocks until the other side is read
        self.program = subprocess.Popen(
            [*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)

    def text(self) -> str:
        """Return all output until the program has ended."""
        shown = b""
        poll = select.poll()
        poll.register(self.master, select.POLLIN)
        try:
            while poll.poll(DEADLINE_S * 1000):
                shown += os.read(self.master, 4096)
        except OSError:  # the answer of a pty whose other side is closed
            return shown.decode()
        finally:
            os.close(self.master)
        raise AssertionError(f"the program does not end: {shown!r}")

    def wait_until_it_writes(self) -> None:
        """Wait until the program blocks because nobody reads its output."""
        deadline_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline_s:
            call = Path(f"/proc/{self.program.pid}/syscall").read_text().split()
            if call[:2] == ["1", "0x2"]:  # write(2, ...)
                return
            assert self.program.poll() is None, "the program has ended"
        raise AssertionError("the program writes nothing")


@pytest.mark.parametrize(("columns", "bar"), [(120, 40), (100, 40), (80, 36), (55, 11), (40, 0)])
def test_progress_on_a_terminal(folder: Path, columns: int, bar: int) -> None:
    """A bar that fits into its line is redrawn in place.  The result comes last, on its own line."""
    terminal = Terminal(folder, ["-i", "source.raw", "copy.qcow2"], columns)
    text = terminal.text()

    assert terminal.program.wait() == 0
    progress, result = text.rstrip("\r\n").rsplit("\r\n", 1)
    drawn = progress.split("\r")
    assert drawn[0] == ""
    assert all(len(line) < columns for line in drawn)
    name, _, rest = drawn[-1].partition(" 100% ")
    assert rest.startswith(f"|{'*' * bar}|   8.0M")
    assert rest.partition("8.0M")[2].partition("/s ")[1], "neither rate nor remaining time"
    assert "copy.qcow2".startswith(name)
    assert result == "vmctl: qcow2 imagefile created"


def test_no_progress_without_a_terminal(folder: Path) -> None:
    """There are no control characters for terminals either."""
    assert create(folder, "-i", "source.raw", "copy.raw") == (0, "vmctl: raw imagefile created\n")
    assert (folder / "copy.raw").read_bytes() == (folder / "source.raw").read_bytes()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("name", ["copy.raw", "copy.qcow2"])
def test_interrupted_copy_leaves_nothing(folder: Path, name: str, signum: signal.Signals) -> None:
    """The new file has no name before the copy is complete."""
    terminal = Terminal(folder, ["-i", "source.raw", name], 80, full=True)
    terminal.wait_until_it_writes()
    assert os.listdir(folder) == ["source.raw"]

    terminal.program.send_signal(signum)
    text = terminal.text()

    assert terminal.program.wait() == 1
    assert text.endswith("\r\nvmctl: create: interrupted\r\n")
    assert os.listdir(folder) == ["source.raw"]


@pytest.mark.parametrize("name", ["copy.raw", "copy.qcow2"])
def test_killed_copy_leaves_nothing(folder: Path, name: str) -> None:
    """After SIGKILL nothing can clean up, so nothing may have to be cleaned up."""
    terminal = Terminal(folder, ["-i", "source.raw", name], 80, full=True)
    terminal.wait_until_it_writes()

    terminal.program.kill()
    terminal.text()

    assert terminal.program.wait() == -signal.SIGKILL
    assert os.listdir(folder) == ["source.raw"]
    assert create(folder, "-i", "source.raw", name)[0] == 0


def test_an_ignored_hangup_does_not_end_it(folder: Path) -> None:
    """nohup(1) starts programs like this."""
    held = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        terminal = Terminal(folder, ["-i", "source.raw", "copy.raw"], 80, full=True)
    finally:
        signal.signal(signal.SIGHUP, held)
    terminal.wait_until_it_writes()
    terminal.program.send_signal(signal.SIGHUP)

    assert terminal.text().endswith("vmctl: raw imagefile created\r\n")
    assert terminal.program.wait() == 0


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 2 MiB."""
    with small_file_system(tmp_path / "small") as path:
        yield path


@pytest.mark.root
@pytest.mark.parametrize("name", ["copy.raw", "copy.qcow2"])
def test_full_disk_leaves_nothing(folder: Path, small: Path, name: str) -> None:
    """The sentence names the file without room, and how much room it needs."""
    status, text = create(folder, "-i", "source.raw", f"small/{name}")

    needs = "needs up to 8.0M where 2.0M were free"
    words = f"failed to write to destination small/{name}, which {needs}: No space left on device"
    assert (status, text) == (1, f"vmctl: {words}\n")
    assert os.listdir(small) == []


@pytest.mark.root
def test_a_full_disk_has_no_room_for_an_empty_image(folder: Path, small: Path) -> None:
    """The tables of the image are written at once, and need room."""
    (small / "filler").write_bytes(bytes(2 * MIB))

    status, text = create(folder, "-s", "1G", "small/disk.qcow2")

    assert (status, text) == (1, "vmctl: could not write small/disk.qcow2: No space left on device\n")
    assert os.listdir(small) == ["filler"]


def test_existing_files_are_not_overwritten(folder: Path) -> None:
    """The name may be that of a file, a directory, a device, or any symbolic link."""
    before = (folder / "source.raw").read_bytes()
    (folder / "dangling").symlink_to("elsewhere")
    (folder / "link").symlink_to("source.raw")

    for name in ("source.raw", "link", "dangling", ".", "..", "/dev/null"):
        assert create(folder, "-s", "1M", name) == (1, f"vmctl: could not create {name}: File exists\n")

    assert (folder / "source.raw").read_bytes() == before
    assert not (folder / "elsewhere").exists()


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
def test_image_takes_no_room_before_it_is_used(folder: Path, name: str) -> None:
    """An empty image takes no room, and zeroes in a copy take none."""
    assert create(folder, "-s", "100G", name)[0] == 0
    assert create(folder, "-i", "source.raw", f"copy-{name}")[0] == 0

    assert (folder / name).stat().st_blocks * 512 <= MIB
    assert (folder / f"copy-{name}").stat().st_blocks * 512 < 5 * MIB
    info = json.loads(qemu("qemu-img", "info", "--output=json", folder / name))
    assert (info["format"], info["virtual-size"]) == (name.rpartition(".")[2], 100 << 30)


def test_qemu_reads_our_chains(folder: Path) -> None:
    """A base, an overlay and an overlay of that, in two directories."""
    (folder / "vms").mkdir()
    assert create(folder, "-i", "source.raw", "base.qcow2")[0] == 0
    assert create(folder, "-b", "../base.qcow2", "vms/one.qcow2")[0] == 0
    assert create(folder, "-b", "one.qcow2", "qcow2:vms/two")[0] == 0

    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", folder / "source.raw", folder / "vms/two")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 1M", folder / "vms/two")
    assert create(folder, "-i", "qcow2:vms/two", "flat.raw")[0] == 0

    expected = bytearray((folder / "source.raw").read_bytes())
    expected[MIB : 2 * MIB] = b"\7" * MIB
    assert (folder / "flat.raw").read_bytes() == expected
    for name in ("base.qcow2", "vms/one.qcow2", "vms/two"):
        assert problems(folder / name) == {}


def test_running_disk_is_not_copied(folder: Path) -> None:
    """The copy would mix old and new data."""
    holder = subprocess.Popen(
        ["stdbuf", "-oL", "qemu-io", "-f", "raw", folder / "source.raw"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write("length\n")
    holder.stdin.flush()
    assert "MiB" in holder.stdout.readline()

    status, text = create(folder, "-i", "source.raw", "copy.raw")
    holder.kill()
    holder.communicate()

    words = "failed to open source image file: source.raw: is in use by another process, which writes to it"
    assert (status, text) == (1, f"vmctl: {words}\n")
    assert os.listdir(folder) == ["source.raw"]
