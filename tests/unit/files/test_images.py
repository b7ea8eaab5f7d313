"""What imgprobe answers about disks and discs: which are refused, and which have a warning."""

import errno
import fcntl
import io
import os
import stat
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from vmd.config.model import DiskConfig
from vmd.errors import VMD_DISK_MISSING, HostError, InUse, OperatorError
from vmd.files import images
from vmd.files.images import (
    KERNEL_FILE_SYSTEMS,
    Use,
    discard_granularity,
    examine_disc,
    open_cdrom,
    open_disk,
    open_image,
)
from vmd.images.locks import lock
from vmd.ipc.probemsg import BELOW, CORRUPT, DIRTY, GOING_BACK, NO_CODE, Probe

SECTOR, BLOCK = 512, 2048
DAMAGED = "is marked as corrupt; repair it with qemu-img check -r all {0}"
UNFINISHED = (
    "going back to a snapshot with other disks was interrupted, and the disks may not match:"
    " repeat it with vmctl snapshot -r"
)
EMPTY = "has no bytes: a disk needs at least one sector"
LEFT_DIRTY = (
    "was not closed by its last writer (dirty), and clusters in use now are never freed;"
    " qemu-img check -r all {0} repairs it"
)
ODD = "its 513 bytes are no multiple of 512; its last sector is padded with zeroes"


class Answers:
    """An imgprobe that gives these answers, the first for the first image."""

    def __init__(self, *answers: Probe) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, bool]] = []

    def probe(self, _fd: int, name: str, format_hint: str, *, boots: bool = False) -> Probe:
        """Return the next answer."""
        self.asked.append((name, format_hint, boots))
        return self.answers.pop(0)


class Fails:
    """An imgprobe that cannot read an image."""

    def __init__(self, number: int) -> None:
        self.number = number

    def probe(self, _fd: int, name: str, _format_hint: str, *, boots: bool = False) -> Probe:
        """Raise its error."""
        raise OperatorError(errno.EINVAL, f"{name}: cannot be read: {os.strerror(self.number)}")


def image(path: Path, size: int = SECTOR) -> str:
    """Make a file of zeroes, and return its path."""
    path.write_bytes(bytes(size))
    return str(path)


def qcow2(*notes: str, backing: str = "", backing_format: str = "", size: int = SECTOR) -> Probe:
    """Return the answer about a qcow2 image."""
    return Probe(format="qcow2", size=size, backing=backing, backing_format=backing_format, notes=notes)


# --- disks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probe", "size", "mends", "words"),
    [
        (qcow2(CORRUPT), 1, False, DAMAGED), (qcow2(CORRUPT), 1, True, DAMAGED),
        (qcow2(GOING_BACK), 1, False, UNFINISHED), (qcow2(GOING_BACK), 1, True, ""),
        (qcow2(GOING_BACK, CORRUPT), 1, True, DAMAGED),
        (qcow2(), 1, False, ""), (qcow2(), 1, True, ""), (qcow2(size=0), 0, False, ""),
        (Probe(format="raw", size=SECTOR), 0, False, EMPTY), (Probe(format="raw", size=0), SECTOR, False, ""),
        (Probe(format="raw", size=0), 1, False, ""),
    ],
)  # fmt: skip
def test_which_image_is_no_disk(tmp_path: Path, probe: Probe, size: int, mends: bool, words: str) -> None:
    """Only the repetition of an interrupted return gets its disks.  The size of a raw disk is the kernel's answer."""
    path = image(tmp_path / "disk", size)
    before = open_descriptors()

    if words:
        with pytest.raises(OperatorError) as refused:
            open_disk(DiskConfig(path=path), Answers(probe), Use(mends=mends))
        said = f"disk {path}: {words.format(path)}"
        assert (refused.value.number, str(refused.value)) == (errno.EINVAL, said)
        assert open_descriptors() == before
    else:
        open_disk(DiskConfig(path=path), Answers(probe), Use(mends=mends)).close()
        assert open_descriptors() == before


@pytest.mark.parametrize("notes", [(CORRUPT,), (GOING_BACK,), (DIRTY,)])
@pytest.mark.parametrize("size", [SECTOR, 513])
def test_a_base_is_served_as_it_is(tmp_path: Path, notes: tuple[str, ...], size: int) -> None:
    """Nothing is written to a base: what concerns writers has no warning there, and refuses no disk."""
    path = image(tmp_path / "disk")
    image(tmp_path / "base", size)
    top = qcow2(backing="base", backing_format="qcow2")

    with closing(open_disk(DiskConfig(path=path, format="qcow2"), Answers(top, qcow2(*notes, size=size)))) as disk:
        assert [link.path for link in disk.links] == [path, f"{tmp_path}/base"]
        assert disk.notes == []


@pytest.mark.parametrize(
    ("probe", "size", "notes"),
    [
        (qcow2(), 1, []), (qcow2(DIRTY), 1, [LEFT_DIRTY]), (qcow2(DIRTY, size=513), 1, [ODD, LEFT_DIRTY]),
        (qcow2(size=513), SECTOR, [ODD]), (Probe(format="raw", size=0), 513, [ODD]),
        (Probe(format="raw", size=513), 2 * SECTOR, []),
    ],
)  # fmt: skip
def test_warnings_of_a_disk(tmp_path: Path, probe: Probe, size: int, notes: list[str]) -> None:
    """The size of a qcow2 image is that of its header, whatever the length of the file."""
    path = image(tmp_path / "disk", size)

    with closing(open_disk(DiskConfig(path=path), Answers(probe))) as disk:
        assert disk.notes == [f"disk {path}: {note.format(path)}" for note in notes]


def test_a_base_that_looks_like_another_format(tmp_path: Path) -> None:
    """The advice is to record its format in the image above it."""
    path = image(tmp_path / "disk")
    image(tmp_path / "base")
    base = Probe(format="raw", size=0, looks="tar")

    with closing(open_disk(DiskConfig(path=path, format="qcow2"), Answers(qcow2(backing="base"), base))) as disk:
        assert disk.notes == [
            f"disk {path}: backing file {tmp_path}/base: seems to be a tar archive, and is used as raw;"
            f" use `qemu-img rebase -u -f qcow2 -F raw -b base {path}` to confirm this"
        ]


@pytest.mark.parametrize(
    ("in_conf", "advice"), [(True, "configure it with `format qcow2`"), (False, "give it as qcow2:{0}")]
)
def test_advice_is_for_vm_conf_or_for_a_command_line(tmp_path: Path, in_conf: bool, advice: str) -> None:
    """A guess opens no further file."""
    path = image(tmp_path / "disk")

    with pytest.raises(OperatorError) as refused:
        open_disk(DiskConfig(path=path), Answers(qcow2(backing="base")), Use(in_conf=in_conf))

    assert str(refused.value).endswith(f"only its first bytes say that it is qcow2; {advice.format(path)}")


@pytest.mark.parametrize(
    ("name", "stated", "advised"), [("a.qcow2", "", True), ("a.qcow2", "qcow2", False), ("a", "qcow2", False)]
)
def test_a_name_may_state_the_wrong_format(tmp_path: Path, name: str, stated: str, advised: bool) -> None:
    """Only an operator who has stated no format is told how to."""
    path = image(tmp_path / name)

    with pytest.raises(OperatorError) as refused:
        open_disk(DiskConfig(path=path, format=stated), Answers(Probe(format="raw", size=0)))

    advice = ", as its name says; if it is raw, say `format raw`" if advised else ""
    assert str(refused.value) == f"disk {path}: not a qcow2 image{advice}"


def test_other_errors_of_such_a_disk_have_no_such_advice(tmp_path: Path) -> None:
    """It is a qcow2 image."""
    path = image(tmp_path / "a.qcow2")

    with pytest.raises(OperatorError) as refused:
        open_disk(DiskConfig(path=path), Answers(qcow2(CORRUPT)))

    assert str(refused.value) == f"disk {path}: {DAMAGED.format(path)}"


@pytest.mark.parametrize(
    ("notes", "base_notes", "boots"),
    [
        ((), (), True), ((NO_CODE,), (), False), ((BELOW,), (), True), ((BELOW,), (NO_CODE,), False),
        ((BELOW,), (BELOW,), False),
    ],
)  # fmt: skip
def test_the_first_image_that_knows_tells_whether_there_is_boot_code(
    tmp_path: Path, notes: tuple[str, ...], base_notes: tuple[str, ...], boots: bool
) -> None:
    """The images below it are not asked."""
    path = image(tmp_path / "disk")
    image(tmp_path / "base")
    prober = Answers(qcow2(*notes, backing="base", backing_format="qcow2"), qcow2(*base_notes))

    with closing(open_disk(DiskConfig(path=path, format="qcow2"), prober, Use(boots=True))) as disk:
        assert disk.boots is boots
    assert [asked for _, _, asked in prober.asked] == [True, BELOW in notes]


def test_boot_code_is_looked_for_on_request_only(tmp_path: Path) -> None:
    """A kernel needs none."""
    prober = Answers(qcow2())

    with closing(open_disk(DiskConfig(path=image(tmp_path / "disk"), format="qcow2"), prober)) as disk:
        assert disk.boots is None
    assert [asked for _, _, asked in prober.asked] == [False]


def test_reading_only_takes_no_locks_and_cannot_write(tmp_path: Path) -> None:
    """`vmd -n` examines the disks of VMs that run."""
    path = image(tmp_path / "disk")
    with (tmp_path / "disk").open("r+b") as other:
        lock(other.fileno(), path, writable=True)

        with closing(open_disk(DiskConfig(path=path, format="raw"), Answers(), Use(locked=False))) as disk:
            (link,) = disk.links
            assert fcntl.fcntl(link.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_the_caller_hears_the_name_of_each_file_before_it_is_opened(tmp_path: Path) -> None:
    """Storage may hang."""
    path = image(tmp_path / "disk")
    said: list[str] = []

    with pytest.raises(OperatorError, match="No such file"):
        open_disk(DiskConfig(path=path, format="qcow2"), Answers(qcow2(backing="gone")), at=said.append)

    assert said == [f"disk {path}", f"disk {path}: backing file {tmp_path}/gone"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "Permission denied: the user of its VM may not use it: it is on a FUSE file system"),
        (errno.EPERM, "Operation not permitted: the user of its VM may not use it: it is on a FUSE file system"),
        (errno.EIO, "Input/output error\n"),
    ],
)
def test_an_imgprobe_without_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str) -> None:
    """Only a denial is explained."""
    monkeypatch.setattr("vmd.files.denied.file_system", lambda _path: 0x65735546)
    path = image(tmp_path / "disk")

    with pytest.raises(OperatorError) as refused:
        open_disk(DiskConfig(path=path), Fails(number))

    assert refused.value.number == errno.EINVAL
    assert f"{refused.value}\n".startswith(f"disk {path}: cannot be read: {said}")


def test_a_raw_disk_on_fuse_is_shown_to_imgprobe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FUSE server may refuse the user of the VM at each call."""
    config = DiskConfig(path=image(tmp_path / "disk"), format="raw")
    for fuse in (False, True):
        prober = Answers(Probe(format="raw", size=0))
        monkeypatch.setattr(images, "on_fuse", lambda _fd, fuse=fuse: fuse)

        open_disk(config, prober).close()

        assert bool(prober.asked) is fuse


# --- discs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("looks", "size", "notes"),
    [
        ("", BLOCK, []), ("", BLOCK - SECTOR, ["its 1536 bytes are no multiple of 2048; its last block is padded"]),
        ("tar", 3 * BLOCK, ["seems to be a tar archive, and is used unchanged"]),
        ("kernel", BLOCK + 1, ["seems to be a kernel, which belongs to `boot`, and is used", "its 2049 bytes are no"]),
    ],
)  # fmt: skip
def test_warnings_of_a_disc(tmp_path: Path, looks: str, size: int, notes: list[str]) -> None:
    """Some bytes may be on a disc without a file system."""
    path = image(tmp_path / "disc")
    prober = Answers(Probe(format="raw", size=size, looks=looks))

    fd, said = open_cdrom(path, prober)

    os.close(fd)
    assert prober.asked == [(f"cdrom {path}", "disc", False)]
    assert [line[: len(f"cdrom {path}: {note}")] for line, note in zip(said, notes, strict=True)] == [
        f"cdrom {path}: {note}" for note in notes
    ]


@pytest.mark.parametrize("looks", ["gzip", "qcow2", "CD sectors"])
def test_a_disc_in_a_foreign_format_is_refused(tmp_path: Path, looks: str) -> None:
    """The command in the sentence makes an ISO image of it.  The file is closed again."""
    path = image(tmp_path / "disc")
    before = open_descriptors()

    with pytest.raises(OperatorError, match=f"cdrom {path}: is .*; convert it: .*{path}.(iso|img)") as refused:
        open_cdrom(path, Answers(Probe(format="", size=BLOCK, looks=looks)))

    assert refused.value.number == errno.EINVAL
    assert open_descriptors() == before


def test_a_disc_is_locked_for_reading_unless_it_is_only_examined(tmp_path: Path) -> None:
    """A writer would change it below the VM."""
    path = image(tmp_path / "disc")
    answer = Probe(format="raw", size=BLOCK)
    with (tmp_path / "disc").open("r+b") as other:
        fd, _ = open_cdrom(path, Answers(answer), locked=False)
        lock(other.fileno(), path, writable=True)
        os.close(fd)

        with pytest.raises(OperatorError, match="in use"):
            open_cdrom(path, Answers(answer))
        os.close(open_cdrom(path, Answers(answer), locked=False)[0])


# --- devices ------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let every open file look like partition 259:3, and return a descriptor."""
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        fields = list(real(fd))
        return os.stat_result((stat.S_IFBLK | 0o600, *fields[1:]), {"st_rdev": os.makedev(259, 3)})

    monkeypatch.setattr(os, "fstat", fstat)
    return 0


@pytest.mark.parametrize("claim", [False, True])
@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFBLK])
def test_how_an_image_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int, writable: bool, claim: bool
) -> None:
    """Only a device that is written is claimed: it may be mounted.  No open waits, and no file becomes our terminal."""
    path = image(tmp_path / "disk")
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((kind | 0o600, *real(fd)[1:])))
    opened: list[int] = []

    def opens(_path: str, flags: int) -> int:
        opened.append(flags)
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(os, "open", opens)

    with pytest.raises(InUse) as refused:
        open_image(path, "disk d", writable=writable, claim=claim)

    always = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    access = os.O_RDWR if writable else os.O_RDONLY
    claims = os.O_EXCL if kind == stat.S_IFBLK and writable and claim else 0
    assert opened == [always | access | claims]
    assert str(refused.value) == "disk d: is in use by another process, or mounted"


def test_a_drive_is_not_examined(device: int) -> None:
    """It may be empty, or slow."""
    assert examine_disc(device, "/dev/sr0", "cdrom /dev/sr0", Answers()) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"queue": b"4096\n"}, 4096), ({"queue": b"0\n", "../queue": b"512\n"}, 0), ({"../queue": b"512\n"}, 512),
        ({"queue": b"", "../queue": b"65536\n"}, 65536), ({"queue": b"?\n"}, 0), ({}, 0),
    ],
)  # fmt: skip
def test_granularity_of_a_device(
    device: int, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], expected: int
) -> None:
    """A partition has none of its own in sysfs: that of its disk counts."""
    found = {f"/sys/dev/block/259:3/{queue}/discard_granularity": data for queue, data in files.items()}

    def opens(path: str, _mode: str) -> io.BytesIO:
        try:
            return io.BytesIO(found[path])
        except KeyError:
            raise FileNotFoundError from None

    monkeypatch.setattr(images, "open", opens, raising=False)

    assert discard_granularity(device) == expected


# --- the kernel's files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magic", KERNEL_FILE_SYSTEMS)
def test_a_file_of_the_kernel_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magic: int) -> None:
    """Reading one can reveal a secret, and writing one can change the host."""
    monkeypatch.setattr(images, "file_system_of", lambda _fd: magic)
    path = image(tmp_path / "disk")

    with pytest.raises(OperatorError) as refused:
        open_disk(DiskConfig(path=path, format="raw"), Answers())

    words = f"disk {path}: a file of {KERNEL_FILE_SYSTEMS[magic]} is not an image"
    assert (refused.value.number, str(refused.value)) == (errno.EINVAL, words)


def test_the_numbers_of_file_systems_are_the_kernels() -> None:
    """A compiler compares them with those of <linux/magic.h>, which lacks that of configfs."""
    names = {
        "proc": "PROC_SUPER", "sysfs": "SYSFS", "debugfs": "DEBUGFS", "tracefs": "TRACEFS", "securityfs": "SECURITYFS",
        "cgroup2": "CGROUP2_SUPER", "cgroup": "CGROUP_SUPER", "bpf": "BPF_FS", "efivarfs": "EFIVARFS",
    }  # fmt: skip
    numbers = {name: magic for magic, name in KERNEL_FILE_SYSTEMS.items()}
    assert numbers.pop("configfs") == int.from_bytes(b"beep")
    checks = [f'_Static_assert({names[name]}_MAGIC == {magic}, "{name}");' for name, magic in numbers.items()]
    source = "\n".join(("#include <linux/magic.h>", *checks))

    assert len(checks) == len(names)
    subprocess.run(["gcc", "-fsyntax-only", "-x", "c", "-"], input=source, text=True, check=True)


def test_a_file_system_that_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose file system is not known is not opened."""

    def fail(_fd: int) -> int:
        raise HostError("ask", errno.EIO)

    monkeypatch.setattr(images, "file_system_of", fail)
    path = image(tmp_path / "disk")

    with pytest.raises(OperatorError) as refused:
        open_disk(DiskConfig(path=path, format="raw"), Answers())

    assert (refused.value.number, str(refused.value)) == (errno.EINVAL, f"disk {path}: Input/output error")


@pytest.mark.parametrize("path", ["", "\0", "/tmp/a\0b"])
def test_what_is_no_path_is_not_opened(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """The current directory, for one, is never opened."""
    monkeypatch.setattr("vmd.files.images.linux.open_place", lambda _raw: pytest.fail("opened"))

    with pytest.raises(OperatorError, match="not a path"):
        open_disk(DiskConfig(path=path, format="raw"), Answers())


@pytest.mark.parametrize(
    ("error", "user", "number", "words"),
    [
        (HostError("find", errno.EACCES), 7, errno.EACCES, "uid 7 has no permission"),
        (OSError(errno.EPERM, ""), 7, errno.EPERM, "uid 7 has no permission"),
        (OSError(errno.ENOENT, ""), 7, VMD_DISK_MISSING, "No such file or directory"),
        (HostError("find", errno.ENOSYS), 0, VMD_DISK_MISSING, "Function not implemented"),
        (OSError("odd"), 0, VMD_DISK_MISSING, "Input/output error"),
    ],
)
def test_a_file_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, user: int, number: int, words: str
) -> None:
    """A denial has its own number, so that a client is not told that the file is missing."""
    path = image(tmp_path / "disk")

    def fail(_raw: bytes) -> int:
        raise error

    monkeypatch.setattr("vmd.files.images.linux.open_place", fail)
    monkeypatch.setattr(os, "geteuid", lambda: user)

    with pytest.raises(OperatorError) as refused:
        open_disk(DiskConfig(path=path, format="raw"), Answers())

    assert (refused.value.number, str(refused.value)) == (number, f"disk {path}: {words}")


def test_a_device_that_does_not_tell_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the kernel's."""
    path = image(tmp_path / "disk")
    for error, number in ((OSError(errno.ENXIO, "gone"), errno.ENXIO), (OSError("odd"), errno.EIO)):

        def fail(*_: int, error: OSError = error) -> int:
            raise error

        monkeypatch.setattr(os, "lseek", fail)
        with pytest.raises(OperatorError) as refused:
            open_disk(DiskConfig(path=path, format="raw"), Answers())
        assert refused.value.number == number
