"""The one job of an opener: the user that it becomes, the files that it hands over, and its answer for each failure."""

import errno
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.descriptors import open_files
from vmd.config.model import DiskConfig, DiskFile, SeedConfig
from vmd.errors import HostError, OperatorError
from vmd.fileid import file_id
from vmd.files.diskboot import FromDisks
from vmd.images.locks import lock
from vmd.ipc import courier
from vmd.ipc import process as process_module
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.opener import FilesOpened, NotOpened, OpenerAt, OpenFiles
from vmd.ipc.probemsg import NO_CODE, Probe
from vmd.memfile import is_constant, memory_file
from vmd.opener import main as main_module
from vmd.opener.main import SAY_S, Opener
from vmd.record import Record
from vmd.seed.parts import Interface, SeedParts

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
        self.left: list[int] = []  # the descriptors that the opener keeps to its end
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

        self.open(envelope)

        found = {}
        try:
            files = courier.take(asks)
        except OSError:
            files = {}
        for name, fds_of_it in files.items():
            for number, fd in enumerate(fds_of_it):
                found[f"{name}{number}"] = os.pread(fd, 100, 0)
                os.close(fd)
        return self.said[-1], found

    def open(self, envelope: Envelope) -> None:
        """Do a job."""
        before = open_files(os.getpid()).keys() - envelope.untaken()
        self.opener.on_open(envelope.message, envelope, None)  # type: ignore[arg-type]
        self.left += open_files(os.getpid()).keys() - before

    def close(self) -> None:
        """End the opener, whose files are closed with it."""
        for end in self.ends:
            end.close()
        for fd in self.left:
            os.close(fd)
        self.opener.loop.close()

    def at(self) -> list[str]:
        """Return what the parent has heard that is opened."""
        return [message.what for message in self.said if isinstance(message, OpenerAt)]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """An opener with one job."""
    made = Rig(monkeypatch)
    yield made
    made.close()


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

    rig.open(Envelope(job, 0, 0, {"courier": [gives.detach()]}))

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


# --- the helpers of an opener -------------------------------------------------------------------------------------


def end_of(rig: Rig) -> int:
    """Return the descriptor of a socket to a helper, which an opener is given."""
    ours, theirs = socket.socketpair()
    rig.ends.append(ours)
    return theirs.detach()


@pytest.mark.parametrize("fails", [False, True])
def test_a_disk_is_made_larger(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """It is unlocked before the client has its answer: the client may start the VM at once."""
    disk = raw_disk(tmp_path / "a")
    sizes: list[tuple[str, int]] = []

    def resize(_sock: socket.socket, media: Any, size: int, _go_on: object) -> None:  # noqa: ANN401 - a disk
        sizes.append((media.links[0].path, size))
        if fails:
            raise OperatorError(errno.ENOSPC, "no room")

    def may_be_locked() -> None:
        with open(disk.path, "r+b") as file:
            lock(file.fileno(), disk.path, writable=True)

    monkeypatch.setattr(main_module, "resize", resize)
    send = rig.send

    def answer_comes(message: Record) -> None:
        if not isinstance(message, OpenerAt):
            may_be_locked()
        send(message)

    monkeypatch.setattr(rig, "send", answer_comes)
    answer, files = rig.does(JOB.replace(disks=(disk,), resize_bytes=4096), resizer=end_of(rig))

    assert (sizes, files) == ([(disk.path, 4096)], {})
    if fails:
        assert isinstance(answer, NotOpened)
        assert (answer.code, answer.text) == (errno.ENOSPC, "no room")
    else:
        assert isinstance(answer, FilesOpened)
        assert [file.file for file in answer.files] == [file_id(os.stat(disk.path))]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("lacks", ["", "seed", "seeder", "seed_parts", "seed_made"])
def test_a_seed_is_made(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str, given: bool) -> None:
    """From the files that vm.conf names, or from what a client has read.  The parent sends all that it needs."""
    made: list[tuple[str, tuple[Interface, ...]]] = []

    def make_seed(_sock: object, parts: SeedParts, *_rest: object) -> list[str]:
        made.append((parts.hostname, parts.interfaces))
        return ["a note"]

    monkeypatch.setattr(main_module, "make_seed", make_seed)
    monkeypatch.setattr(main_module, "parts_of", lambda name, *_: SeedParts(vm=name, hostname="of vm.conf"))
    monkeypatch.setattr(main_module, "given_parts", lambda _fd, name, _seed: SeedParts(vm=name, hostname="of a client"))
    fds = {"seeder": end_of(rig), "seed_parts": memory_file("parts"), "seed_made": memory_file("made")}
    if lacks in fds:
        os.close(fds.pop(lacks))
    job = JOB.replace(seed=None if lacks == "seed" else SeedConfig(), lladdrs=(b"\2\0\0\0\0\1",))
    if given:
        (tmp_path / "parts").write_bytes(b"x")
        fd = os.open(tmp_path / "parts", os.O_RDONLY)
        fds["client"] = client(rig, ("seed", fd))
        job = job.replace(given=("seed",))
        answer, files = rig.does(job, **fds)
        os.close(fd)
    else:
        answer, files = rig.does(job, **fds)

    assert isinstance(answer, FilesOpened), answer
    name = "of a client" if given else "of vm.conf"
    assert made == ([] if lacks else [(name, (Interface(lladdr=b"\2\0\0\0\0\1"),))])
    assert (answer.notes, files) == (() if lacks else ("a note",), {})
    assert ("what its seed is made from" in rig.at()) == (not lacks)


@pytest.mark.parametrize(("needs_code", "code"), [(True, b""), (True, b"code"), (False, b"")])
@pytest.mark.parametrize(("reader", "looks"), [(False, True), (True, False), (True, True)])
def test_disks_without_boot_code(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: bool, looks: bool, needs_code: bool, code: bytes
) -> None:
    """The error names the disks, and what is on them if that is asked for.  One disk with boot code is enough."""
    disks = raw_disk(tmp_path / "a"), raw_disk(tmp_path / "b", code)

    def probe(_self: object, fd: int, _name: str, _hint: str, *, boots: bool) -> Probe:
        notes = () if os.pread(fd, 4, 0) == b"code" else (NO_CODE,)
        return Probe(format="raw", size=SECTOR, notes=notes if boots else ())

    monkeypatch.setattr(main_module.NoProbe, "probe", probe)
    monkeypatch.setattr(main_module, "look", lambda _sock, index, _disk, _go_on: f"disk {index} with Linux")
    job = JOB.replace(needs_code=needs_code, looks=looks, disks=disks)
    answer, _ = rig.does(job, **({"reader": end_of(rig)} if reader else {}))

    if code or not needs_code:
        assert isinstance(answer, FilesOpened), answer
        return
    assert isinstance(answer, NotOpened)
    assert (answer.code, answer.no_code) == (errno.ENOEXEC, True)
    found = [f"disk {number} with Linux" if reader and looks else f"disk {disks[number].path}" for number in (0, 1)]
    assert answer.text == f"nothing to boot from: no boot sector on {'; '.join(found)}"


@pytest.mark.parametrize("lacks", ["", "reader", "memory", "file"])
def test_a_kernel_on_a_disk_is_read(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    """The initrd, too.  The VM gets the copies, and the client learns what was found."""

    def read(
        found: FromDisks,
        _sock: object,
        name: str,
        file: DiskFile,
        disk: Any,  # noqa: ANN401 - a disk
        memory: int,
        _go_on: object,
    ) -> None:
        os.write(memory, f"{name} of {disk.links[0].path}".encode())
        getattr(found, name).append(memory)
        found.kernel_name, found.options = str(file), "-s"

    monkeypatch.setattr(FromDisks, "read", read)
    disks = raw_disk(tmp_path / "a"), raw_disk(tmp_path / "b")
    files_at = {"kernel_at": DiskFile(disk=1, path="/bsd"), "initrd_at": DiskFile(disk=0, path="/initrd")}
    fds = {"reader": end_of(rig), "kernel_memory": memory_file("k"), "initrd_memory": memory_file("i")}
    if lacks == "reader":
        os.close(fds.pop("reader"))
    elif lacks == "memory":
        os.close(fds.pop("kernel_memory"))
    elif lacks == "file":
        del files_at["kernel_at"]
    answer, files = rig.does(JOB.replace(disks=disks, **files_at), **fds)

    assert isinstance(answer, FilesOpened), answer
    expected = {"initrd0": f"initrd of {disks[0].path}".encode(), "boot0": f"kernel of {disks[1].path}".encode()}
    if lacks:
        del expected["boot0"]
    if lacks == "reader":
        expected.clear()
    assert {name: data for name, data in files.items() if not name.startswith("disks")} == expected
    at = [f"{files_at[name]} on disk {path}" for name, path in
          (("kernel_at", disks[1].path), ("initrd_at", disks[0].path)) if name in files_at]  # fmt: skip
    shown = [] if lacks == "reader" else at[1:] if lacks == "memory" else at
    assert rig.at()[2:] == shown
    assert answer.boot_options == ("-s" if expected else "")


def test_a_file_that_its_user_may_not_read(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may pass a descriptor that another user has opened.  It is checked if the parent says so."""
    (tmp_path / "kernel").write_bytes(b"kernel")
    os.chmod(tmp_path / "kernel", 0o040)
    groups: list[tuple[int, ...]] = []
    monkeypatch.setattr(main_module, "require_readable", lambda _fd, _name, given: groups.append(given))
    for check in (False, True):
        fd = os.open(tmp_path / "kernel", os.O_RDONLY)
        answer, _ = rig.does(JOB.replace(given=("kernel",), check_given=check), client=client(rig, ("kernel", fd)))
        os.close(fd)
        assert isinstance(answer, FilesOpened), answer
        assert groups == [(6, 7, 8)] * check


def test_the_size_of_copies_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, also for an opener that was taken over."""
    limits: list[tuple[int, ...]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append((which, *pair)))
    main_module.limit_copies(4096)
    assert limits == [(resource.RLIMIT_FSIZE, 4096, 4096)]

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(HostError, match="limit the size of files"):
        main_module.limit_copies(4096)
