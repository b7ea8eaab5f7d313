"""vmctl create: texts and refusals of *cat. 3.6*, and no files left after failures."""

import os
import pty
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.images import MIB, opened, read, write
from vmctl.bar import Bar
from vmctl.commands.create import run
from vmctl.errors import CommandError, UsageError
from vmctl.options import find_command, parse
from vmctl.session import Session
from vmd.errors import VmdError
from vmd.images.create import create
from vmd.images.identify import probe
from vmd.images.locks import lock
from vmd.ipc.probemsg import Probe

CREATE = find_command("create")

Create = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the command runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vmctl_create(folder: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Create]:
    """A function that runs the command and returns its messages.  No file is open after the test."""
    before = open_descriptors()
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)]

    def create_it(*arguments: str) -> str:
        assert run(Session(), parse(CREATE, list(arguments))) == 0
        output, errors = capfd.readouterr()
        assert output == ""
        return errors

    yield create_it
    for number, handler in handlers:
        signal.signal(number, handler)
    assert open_descriptors() == before


def probed(path: Path) -> Probe:
    """Return the result of a probe of an image."""
    with path.open("rb") as file:
        first = file.read(3)
        return probe(file.fileno(), str(path), "qcow2" if first == b"QFI" else "raw")


@pytest.mark.parametrize(
    ("word", "image_format"),
    [
        ("a", "raw"), ("a.raw", "raw"), ("a.qcow2", "qcow2"), ("a.img", "raw"), ("A.QCOW2", "qcow2"), ("a.iso", "raw"),
        ("qcow2:a", "qcow2"), ("qcow2:a.img", "qcow2"), ("raw:a.raw", "raw"), ("qcow2:a.qcow2", "qcow2"),
    ],
)  # fmt: skip
def test_format_comes_from_prefix_or_extension(
    folder: Path, vmctl_create: Create, word: str, image_format: str
) -> None:
    """Without either, the format is raw."""
    assert vmctl_create("-s", "3M", word) == f"vmctl: {image_format} imagefile created\n"

    path = folder / word.removeprefix("raw:").removeprefix("qcow2:")
    assert (probed(path).format, probed(path).size) == (image_format, 3 * MIB)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("word", ["raw:a.qcow2", "raw:a.vmdk", "qcow2:a.raw", "qcow2:a.vhdx", "raw:a.gz"])
def test_prefix_that_contradicts_the_name(folder: Path, vmctl_create: Create, word: str) -> None:
    """The image has the requested format.  A warning says how to give it to a VM."""
    image_format, path = word.split(":")

    assert vmctl_create("-s", "1M", word) == (
        f"vmctl: warning: {path} is {image_format}, but its name says otherwise:"
        f" give it as {word}, or with `format {image_format}` in vm.conf\n"
        f"vmctl: {image_format} imagefile created\n"
    )

    assert probed(folder / path).format == image_format


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("a.vmdk", "a VMDK image"), ("a.VDI", "a VDI image"), ("a.vhd", "a VHD image"), ("a.vhdx", "a VHDX image"),
        ("a.qed", "a QED image"), ("a.ova", "an OVA archive"), ("a.qcow2.gz", "gzip-compressed"),
        ("a b.luks", "an encrypted LUKS container"),
    ],
)  # fmt: skip
def test_name_of_another_format_is_refused(folder: Path, vmctl_create: Create, path: str, what: str) -> None:
    """A raw image with such a name is probably a mistake."""
    with pytest.raises(CommandError) as refused:
        vmctl_create("-s", "1M", path)

    shown = f"'{path}'" if " " in path else path
    assert str(refused.value) == (
        f"{path} would not be {what}: only raw and qcow2 images can be made;"
        f" give raw:{shown} or qcow2:{shown} to make one with this name"
    )
    assert os.listdir(folder) == []


def test_size_is_whole_megabytes(folder: Path, vmctl_create: Create) -> None:
    """The size is rounded down, with a message."""
    assert vmctl_create("-s", "1.75M", "a") == "vmctl: disk size rounded to 1.0M\nvmctl: raw imagefile created\n"

    assert (folder / "a").stat().st_size == MIB


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a.qcow2",), "could not create a.qcow2: missing size argument"),
        (("-b", "b", "-i", "c", "a"), "conflicting -b and -i arguments"),
        (("-s", "1G"), "missing argument: disk"),
        (("-s", "1G", "a", "b"), "unexpected argument: b"),
        (("-s", "1G", ""), "empty argument: disk"),
        (("-s", "1G", "qcow2:"), "disk without a name"),
        (("-x", "a"), "unknown option -- x"),
    ],
)
def test_wrong_arguments(vmctl_create: Create, arguments: tuple[str, ...], words: str) -> None:
    """These are usage errors."""
    with pytest.raises(UsageError) as refused:
        vmctl_create(*arguments)

    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-s", "huge", "a"), "invalid disk size: huge"),
        (("-s", "1000K", "a"), "disk size must be at least 1MB"),
        (("-s", "1M", "-s", "2M", "a"), "option -s specified multiple times"),
        (("-s", "1M", "there"), "could not create there: File exists"),
        (("-s", "1M", "no/a"), "could not create no/a: no: No such file or directory"),
        (("-s", "1000T", "a.qcow2"), "a.qcow2: 1099511627776000 bytes are too large for a qcow2 image"),
        (("-b", "base.qcow2", "a.raw"), "base images require qcow2 disk format; give the disk as qcow2:a.raw"),
        (("-b", "there", "a.qcow2"), "base image is not a qcow2 file: there; vmctl create -i converts it"),
        (("-b", "raw:base.qcow2", "a.qcow2"), "base image is not a qcow2 file: base.qcow2; vmctl create -i"),
        (("-b", "gone", "a.qcow2"),
         "failed to open base image file: gone: cannot be opened: No such file or directory"),
        (("-b", "base.qcow2", "dir/a.qcow2"),
         "base image base.qcow2 must be given by its path from dir: ../base.qcow2"),
        (("-b", "base.qcow2", "no/a.qcow2"), "could not create no/a.qcow2: no directory no"),
        (("-b", "nbd:base", "a.qcow2"), "base image nbd:base must be given as ./nbd:base"),
        (("-b", "unsaid.qcow2", "a.qcow2"),
         "failed to open base image file: 1.qcow2: has backing file 0.qcow2, but unsaid.qcow2 does not record that"
         " its format is qcow2; if you trust it, record that:"
         " qemu-img rebase -u -f qcow2 -F qcow2 -b 1.qcow2 unsaid.qcow2"),
        (("-b", "base.qcow2", "-s", "3M", "a.qcow2"),
         "base size does not match requested size: the base has 2097152 bytes, not 3145728"),
        (("-b", "lost.qcow2", "a.qcow2"),
         "failed to open base image file: backing file gone: cannot be opened: No such file or directory"),
        (("-b", "3.qcow2", "a.qcow2"), "a.qcow2: backing chain would be longer than 4 images"),
        (("-i", "gone", "a"), "failed to open source image file: gone: cannot be opened: No such file or directory"),
        (("-i", "dir", "a"), "failed to open source image file: dir: neither a regular file nor a block device"),
        (("-i", "derived", "a"),
         "failed to open source image file: derived: has backing file 0.qcow2, but only its first bytes say that it is"
         " qcow2; if you trust it, give it as qcow2:derived"),
        (("-i", "there.qcow2", "a"),
         "failed to open source image file: there.qcow2: not a qcow2 image, as its name says; if it is raw, give it as"
         " raw:there.qcow2"),
        (("-i", "base.qcow2", "-s", "1M", "a"),
         "size cannot be smaller than input disk size: 1048576 bytes are less than 2097152"),
        (("-i", "base.qcow2", "there"), "failed to create destination image file there: File exists"),
    ],
)  # fmt: skip
def test_failures_leave_no_file(
    folder: Path, vmctl_create: Create, arguments: tuple[str, ...], words: str
) -> None:
    """Each has one message."""
    (folder / "dir").mkdir()
    for name in ("there", "there.qcow2"):
        (folder / name).write_bytes(bytes(512))
    create("derived", "qcow2", 2 * MIB, "0.qcow2", "qcow2")
    create("base.qcow2", "qcow2", 2 * MIB)
    create("lost.qcow2", "qcow2", 2 * MIB, "gone", "raw")
    create("0.qcow2", "qcow2", 2 * MIB)
    for level in range(1, 4):
        create(f"{level}.qcow2", "qcow2", 2 * MIB, f"{level - 1}.qcow2", "qcow2")
    create("unsaid.qcow2", "qcow2", 2 * MIB, "1.qcow2", "")
    create("nbd:base", "qcow2", 2 * MIB)
    before = sorted(os.walk(folder))

    with pytest.raises(VmdError) as refused:
        vmctl_create(*arguments)

    assert str(refused.value).startswith(words)
    assert sorted(os.walk(folder)) == before


def test_overlay_records_the_path_as_typed(folder: Path, vmctl_create: Create) -> None:
    """Without -s, it has the size of its base."""
    (folder / "dir").mkdir()
    create("base", "qcow2", 2 * MIB)

    assert vmctl_create("-b", "../base", "dir/a.qcow2") == "vmctl: qcow2 imagefile created\n"
    vmctl_create("-b", "base", "-s", "2M", "b.qcow2")

    made = probed(folder / "dir/a.qcow2")
    assert (made.size, made.backing, made.backing_format) == (2 * MIB, "../base", "qcow2")


def test_base_that_is_written_to_is_refused(folder: Path, vmctl_create: Create) -> None:
    """Its overlay would become inconsistent."""
    create("base", "qcow2", 2 * MIB)
    with (folder / "base").open("r+b") as file:
        lock(file.fileno(), "base", writable=True)

        with pytest.raises(VmdError, match="base: is in use by another process, which writes to it"):
            vmctl_create("-b", "base", "a.qcow2")


@pytest.mark.parametrize(("size", "made"), [(3 * MIB + 512, 4 * MIB), (2 * MIB, 2 * MIB), (0, MIB)])
def test_copy_is_rounded_up(folder: Path, vmctl_create: Create, size: int, made: int) -> None:
    """The size is rounded up to whole megabytes, and the rest is zeros."""
    content = os.urandom(size)
    (folder / "a").write_bytes(content)

    vmctl_create("-i", "a", "b.qcow2")
    vmctl_create("-i", "b.qcow2", "c.raw")

    assert (folder / "c.raw").read_bytes() == content + bytes(made - size)


def test_size_of_a_copy_is_in_bytes(folder: Path, vmctl_create: Create) -> None:
    """Upstream multiplies it by a megabyte, which is a bug."""
    (folder / "a").write_bytes(b"x" * MIB)

    vmctl_create("-i", "a", "-s", "3M", "b")

    assert (folder / "b").read_bytes() == b"x" * MIB + bytes(2 * MIB)


def test_chain_is_copied_when_its_format_is_given(folder: Path, vmctl_create: Create) -> None:
    """With the format, the user allows the image to name a backing file."""
    create("base", "qcow2", 2 * MIB)
    base = opened(folder / "base", writable=True)
    write(base, MIB, b"b" * 512)
    base.close()
    create("top", "qcow2", 2 * MIB, "base", "qcow2")

    vmctl_create("-i", "qcow2:top", "copy.qcow2")

    copy = opened(folder / "copy.qcow2")
    assert read(copy, MIB, 1024) == b"b" * 512 + bytes(512)
    copy.close()


def test_terminated_copy_leaves_nothing(
    folder: Path, vmctl_create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM and SIGHUP end it as ^C does."""
    (folder / "a").write_bytes(b"x" * 4 * MIB)
    monkeypatch.setattr(Bar, "show", lambda bar, done, whole: os.kill(os.getpid(), signal.SIGTERM))

    with pytest.raises(KeyboardInterrupt):
        vmctl_create("-i", "a", "b")

    assert os.listdir(folder) == ["a"]


def test_bar_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is redrawn in place, and the line is ended after the last one."""
    master, slave = pty.openpty()
    monkeypatch.setattr("vmctl.output.STDERR", slave)
    bar = Bar("disk.raw")
    bar.shown = True

    bar.show(0, 4 * MIB)
    bar.show(MIB, 4 * MIB)  # too soon after the last one to be drawn
    bar.show(4 * MIB, 4 * MIB)
    bar.end()
    drawn = ""
    while "\n" not in drawn:  # one write may arrive in several reads
        drawn += os.read(master, 4096).decode()
    os.close(slave)
    os.close(master)

    assert drawn.split("\r")[1:] == [
        f"disk.raw   0% |{' ' * 40}|     0B",
        f"disk.raw 100% |{'*' * 40}|   4.0M",
        "\n",
    ]
