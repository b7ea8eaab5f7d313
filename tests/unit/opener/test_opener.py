"""The one job of an opener: the user that it becomes, the files that it hands over, and its answer for each failure."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmd.config.model import DiskConfig, SeedConfig
from vmd.errors import HostError
from vmd.fileid import file_id
from vmd.images.locks import lock
from vmd.ipc import courier
from vmd.ipc import process as process_module
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.opener import FilesOpened, NotOpened, OpenerAt, OpenFiles
from vmd.memfile import is_constant, memory_file
from vmd.opener import main as main_module
from vmd.opener.main import SAY_S, Opener
from vmd.record import Record

JOB = OpenFiles(name="web", uid=5, gid=6, groups=(7, 8), copy_max=1 << 20)
SECTOR = 512


class Rig:
    """An opener with one job, whose user the tests do not become."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        monkeypatch.setattr(process_module, "CHANNEL_FD", theirs.detach())
        self.opener = Opener()
        self.opener.parent.close()
        ours.close()
        self.steps: list[tuple[object, ...]] = []
        self.said: list[Record] = []
        self.ends: list[socket.socket] = []
        monkeypatch.setattr(self.opener, "parent", self)
        monkeypatch.setattr(main_module, "set_title", lambda title: self.steps.append(("title", title)))
        monkeypatch.setattr(main_module, "limit_copies", lambda most: self.steps.append(("copies", most)))
        monkeypatch.setattr(main_module, "become", lambda job: self.steps.append(("become", job.uid)))
        monkeypatch.setattr(self.opener.loop, "stop", lambda: self.steps.append(("last job",)))

    def send(self, message: Record) -> None:
        """Take a message to the parent."""
        self.said.append(message)

    def flush_blocking(self, _timeout_s: float) -> None:
        """Take note that all messages were sent."""
        self.steps.append(("flushed", len(self.said)))

    def does(self, job: OpenFiles = JOB, **fds: int) -> tuple[Record, dict[str, bytes]]:
        """Do a job; return the answer, and the first bytes of the files that came over the courier."""
        asks, gives = courier.pair()
        self.ends.append(asks)
        courier.ask(asks)
        envelope = Envelope(job, 0, 0, {"courier": [gives.detach()], **{name: [fd] for name, fd in fds.items()}})

        self.opener.on_open(job, envelope, None)  # type: ignore[arg-type]

        found = {}
        try:
            files = courier.take(asks)
        except OSError:
            files = {}
        for name, fds_of_it in files.items():
            for number, fd in enumerate(fds_of_it):
                found[f"{name}{number}"] = os.pread(fd, 100, 0)
                os.close(fd)
        for fd in envelope.untaken():
            os.close(fd)
        return self.said[-1], found

    def at(self) -> list[str]:
        """Return what the parent has heard that is opened."""
        return [message.what for message in self.said if isinstance(message, OpenerAt)]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """An opener with one job."""
    made = Rig(monkeypatch)
    yield made
    for end in made.ends:
        end.close()


def raw_disk(path: Path, content: bytes = b"disk") -> DiskConfig:
    """Return a raw disk of one sector."""
    path.write_bytes(content.ljust(SECTOR, b"\0"))
    return DiskConfig(path=str(path), format="raw")


def client(rig: Rig, *files: tuple[str, int]) -> int:
    """Return the descriptor of a courier over which a client's files come."""
    asks, gives = courier.pair()
    rig.ends.append(gives)
    names: dict[str, list[int]] = {}
    for name, fd in files:
        names.setdefault(name, []).append(fd)
    courier.send(gives, names)
    return asks.detach()


def test_the_files_of_a_vm_are_handed_over(rig: Rig, tmp_path: Path) -> None:
    """They are opened as the user, whose rights count from the first path on."""
    (tmp_path / "kernel").write_bytes(b"kernel")
    (tmp_path / "initrd").write_bytes(b"initrd")
    disks = raw_disk(tmp_path / "a", b"a"), raw_disk(tmp_path / "b", b"b")
    job = JOB.replace(boots=True, kernel=f"{tmp_path}/kernel", initrd=f"{tmp_path}/initrd", disks=disks)

    answer, files = rig.does(job)

    assert isinstance(answer, FilesOpened)
    assert answer.boot_name == f"{tmp_path}/kernel"
    assert [file.file for file in answer.files] == [file_id((tmp_path / name).stat()) for name in "ab"]
    assert {name: data.rstrip(b"\0") for name, data in files.items()} == {
        "boot0": b"kernel", "initrd0": b"initrd", "disks0": b"a", "disks1": b"b",
    }  # fmt: skip
    assert rig.steps == [
        ("title", "opener/web"), ("last job",), ("copies", 1 << 20), ("become", 5), ("flushed", len(rig.said)),
    ]  # fmt: skip
    assert rig.at() == [f"kernel {tmp_path}/kernel", f"disk {tmp_path}/a", f"disk {tmp_path}/b"]


def test_a_missing_file_is_named(rig: Rig, tmp_path: Path) -> None:
    """No file is handed over, and none stays locked."""
    disk = raw_disk(tmp_path / "a")
    job = JOB.replace(disks=(disk, DiskConfig(path=f"{tmp_path}/gone", format="raw")))

    answer, files = rig.does(job)

    assert isinstance(answer, NotOpened)
    assert answer.text == f"disk {tmp_path}/gone: No such file or directory"
    assert (files, answer.file, answer.no_code) == ({}, None, False)
    with open(disk.path, "r+b") as file:
        lock(file.fileno(), disk.path, writable=True)


def test_a_file_in_use_is_named_with_its_lock(rig: Rig, tmp_path: Path) -> None:
    """So that the parent finds out who has it."""
    disk = raw_disk(tmp_path / "a")
    fd = os.open(disk.path, os.O_RDWR)
    lock(fd, disk.path, writable=True)

    answer, _ = rig.does(JOB.replace(disks=(disk,)))

    assert isinstance(answer, NotOpened)
    assert (answer.code, answer.what, answer.by) == (errno.EBUSY, f"disk {disk.path}", "another process")
    assert answer.text == f"disk {disk.path}: is in use by another process, which writes to it"
    assert answer.doing == ", which writes to it"
    assert answer.file == file_id(os.fstat(fd))
    assert answer.marks
    os.close(fd)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (HostError("become user 5", errno.EPERM), errno.EPERM, "become user 5: Operation not permitted"),
        (OSError(errno.EIO, "Input/output error"), errno.EIO, "Input/output error"),
        (ValueError("embedded null byte"), errno.EINVAL, "embedded null byte"),
    ],
)
def test_each_failure_is_answered(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, text: str
) -> None:
    """Otherwise the parent would only see that the opener has ended."""

    def fail(_job: OpenFiles) -> None:
        raise error

    monkeypatch.setattr(main_module, "become", fail)

    answer, files = rig.does()

    assert isinstance(answer, NotOpened)
    assert (answer.code, answer.text, files) == (code, text, {})
    assert rig.steps[-1] == ("flushed", 1)


def test_a_vm_process_that_is_gone(rig: Rig, tmp_path: Path) -> None:
    """The parent gets its answer, and the files are closed with the opener."""
    asks, gives = courier.pair()
    asks.close()
    job = JOB.replace(disks=(raw_disk(tmp_path / "a"),))

    rig.opener.on_open(job, Envelope(job, 0, 0, {"courier": [gives.detach()]}), None)  # type: ignore[arg-type]

    assert isinstance(rig.said[-1], FilesOpened)


def test_an_image_cannot_be_examined_by_nobody(rig: Rig, tmp_path: Path) -> None:
    """A job without an imgprobe has only raw disks."""
    disk = raw_disk(tmp_path / "a").replace(format="")

    answer, _ = rig.does(JOB.replace(disks=(disk,)))

    assert isinstance(answer, NotOpened)
    assert answer.text == f"disk {disk.path}: cannot be examined: nobody was asked to"


def test_whether_disks_are_writable(rig: Rig, tmp_path: Path) -> None:
    """They are neither locked nor handed over: another process may have them."""
    disk = raw_disk(tmp_path / "a")
    fd = os.open(disk.path, os.O_RDWR)
    lock(fd, disk.path, writable=True)

    answer, files = rig.does(JOB.replace(disks=(disk,), only_writable=True))

    assert isinstance(answer, FilesOpened)
    assert [(file.what, file.file) for file in answer.files] == [(f"disk {disk.path}", file_id(os.fstat(fd)))]
    assert files == {}
    os.close(fd)


# --- what a client has opened -------------------------------------------------------------------------------------


def test_a_client_s_kernel_is_copied(rig: Rig, tmp_path: Path) -> None:
    """The client could change the file later.  The original is not handed over."""
    (tmp_path / "kernel").write_bytes(b"kernel")
    fd = os.open(tmp_path / "kernel", os.O_RDONLY)
    copy = memory_file("copy")

    job = JOB.replace(given=("kernel",))
    answer, files = rig.does(job, client=client(rig, ("kernel", fd)), kernel_copy=os.dup(copy))

    assert isinstance(answer, FilesOpened), answer
    assert os.pread(copy, 100, 0) == b"kernel"
    assert is_constant(copy)
    assert files == {}
    for each in (fd, copy):
        os.close(each)


def test_a_client_s_kernel_is_handed_over(rig: Rig, tmp_path: Path) -> None:
    """If nobody has asked for a copy."""
    (tmp_path / "kernel").write_bytes(b"kernel")
    fd = os.open(tmp_path / "kernel", os.O_RDONLY)

    job = JOB.replace(given=("kernel",), kernel="/home/me/kernel")
    answer, files = rig.does(job, client=client(rig, ("kernel", fd)))

    assert isinstance(answer, FilesOpened), answer
    assert files == {"boot0": b"kernel"}
    assert rig.at() == ["what the client has opened", "/home/me/kernel"]
    os.close(fd)


@pytest.mark.parametrize("given", [(), ("kernel", "initrd"), ("seed",), ("kernel", "kernel")])
def test_a_client_gives_what_it_has_announced(rig: Rig, tmp_path: Path, given: tuple[str, ...]) -> None:
    """Neither more nor less."""
    fd = os.open(tmp_path, os.O_RDONLY)
    answer, _ = rig.does(JOB.replace(given=given), client=client(rig, ("kernel", fd)))
    os.close(fd)

    assert isinstance(answer, NotOpened)
    assert (answer.code, answer.text) == (errno.EPIPE, "vm web: what the client has opened did not come")


def test_a_client_may_be_gone(rig: Rig) -> None:
    """Its files do not come."""
    asks, gives = courier.pair()
    gives.close()

    answer, _ = rig.does(JOB.replace(given=("kernel",)), client=asks.detach())

    assert isinstance(answer, NotOpened)
    assert answer.code == errno.EPIPE


@pytest.mark.parametrize(("name", "shown"), [("kernel", "boot image"), ("initrd", "initrd"), ("seed", "seed")])
def test_a_client_s_file_is_a_regular_one(rig: Rig, tmp_path: Path, name: str, shown: str) -> None:
    """The sentence says which one is not."""
    fd = os.open(tmp_path, os.O_RDONLY)

    answer, _ = rig.does(JOB.replace(given=(name,)), client=client(rig, (name, fd)))

    assert isinstance(answer, NotOpened)
    assert answer.text == f"{shown}: not a regular file"
    os.close(fd)


# --- what the parent hears meanwhile ------------------------------------------------------------------------------


def test_the_parent_hears_of_each_file_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it is tried again.  While a copy goes on, the parent hears that now and then."""
    now = [1000.0]
    monkeypatch.setattr("vmd.opener.main.time.monotonic", lambda: now[0])

    rig.opener.at("disk a")
    rig.opener.at("disk b")
    rig.opener.at("disk a")
    assert rig.at() == ["disk a", "disk b"]
    for passed_s, count in ((SAY_S - 1, 2), (1.0, 3), (1.0, 3), (SAY_S, 4)):
        now[0] += passed_s
        rig.opener.go_on()
        assert len(rig.said) == count

    assert rig.at()[2:] == ["disk b", "disk b"]


def test_a_seed_without_a_seeder_is_not_made(rig: Rig) -> None:
    """The parent sends all that is needed, or nothing."""
    answer, files = rig.does(JOB.replace(seed=SeedConfig()))

    assert isinstance(answer, FilesOpened)
    assert (answer.notes, files) == ((), {})


@pytest.mark.parametrize("fails", [False, True])
def test_an_opener_becomes_the_user_of_its_job(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """With the user's groups instead of root's, and for good: the saved ids change, too."""
    steps: list[tuple[object, ...]] = []
    for name in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, name, lambda *given, name=name: steps.append((name, *given)))
    if fails:

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EPERM, "no")

        monkeypatch.setattr(os, "setresuid", refuse)
        with pytest.raises(HostError, match="become user 5"):
            main_module.become(JOB)
        return

    main_module.become(JOB)

    assert steps == [("setgroups", (7, 8)), ("setresgid", 6, 6, 6), ("setresuid", 5, 5, 5)]
