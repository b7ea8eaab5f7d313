"""Questions to leaves about open files: what they are given, and what becomes of each answer and each failure."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from vmd.config.model import MAX_SEED_BYTES, DiskFile
from vmd.errors import OperatorError, VmdError
from vmd.files import asking, prober
from vmd.files.diskboot import FromDisks, NothingToStart, look
from vmd.files.images import OpenDisk, OpenImage
from vmd.files.prober import ProbeSocket
from vmd.files.resizer import resize
from vmd.files.seeder import make_seed
from vmd.ipc import bootmsg, imsg, probemsg, seedmsg
from vmd.ipc.probing import FILES_MAX, QUESTION_MAX
from vmd.ipc.rights import receive
from vmd.memfile import CONSTANT, is_constant, memory_file, seal
from vmd.seed.parts import PARTS_MAX, SeedFile, SeedParts


class Leaf:
    """The leaf's end of a socket.  Its answer is there before it is asked."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def answers(self, line: bytes) -> None:
        """Answer the next question."""
        self.theirs.send(line)

    def asked(self) -> tuple[list[str], list[tuple[bytes, int]]]:
        """Return the words of a question, and the content and the access mode of each of its files."""
        question, files, _ = receive(self.theirs, QUESTION_MAX, FILES_MAX)
        found = []
        for fd in files:
            flags = int(Path(f"/proc/self/fdinfo/{fd}").read_text().split()[3], 8)
            found.append((os.pread(fd, 100, 0), flags & os.O_ACCMODE))
            os.close(fd)
        return question.decode().split("\0")[:-1], found


@pytest.fixture
def leaf() -> Iterator[Leaf]:
    """A leaf that is there to answer."""
    leaf = Leaf()
    yield leaf
    leaf.ours.close()
    leaf.theirs.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[OpenDisk]:
    """A disk of two images, the first one open for writing."""
    disk = OpenDisk()
    for name, flags, guessed in (("top", os.O_RDWR, False), ("base", os.O_RDONLY, True)):
        (tmp_path / name).write_bytes(name.encode())
        fd = os.open(tmp_path / name, flags | os.O_CLOEXEC)
        disk.links.append(OpenImage(fd=fd, path=f"/d/{name}", format="qcow2", guessed=guessed))
    yield disk
    disk.close()


def never() -> None:
    """Not called, because each answer is there."""
    raise AssertionError("waits")


KERNEL = DiskFile(disk=1, partition="p2", path="/vmlinuz")
LINKS = ["/d/top", "qcow2", "0", "/d/base", "qcow2", "1"]


# --- imgprobe -----------------------------------------------------------------------------------------------------


def probe_of(leaf: Leaf, tmp_path: Path, *, boots: bool = False) -> probemsg.Probe:
    """Have a file examined that is open for writing."""
    path = tmp_path / "image"
    path.write_bytes(b"bytes")
    with path.open("r+b") as file:
        return ProbeSocket(leaf.ours, "leaf", 0.0).probe(file.fileno(), "disk d", "raw", boots=boots)


@pytest.mark.parametrize("boots", [False, True])
def test_an_image_is_examined_for_reading(leaf: Leaf, tmp_path: Path, boots: bool) -> None:
    """The leaf gets another open file: it cannot write, and has no lock.  It is closed here."""
    found = probemsg.Probe(format="raw", size=5)
    leaf.answers(probemsg.pack_image(found))
    before = open_descriptors()

    assert probe_of(leaf, tmp_path, boots=boots) == found
    assert leaf.asked() == (["raw", "boots"] if boots else ["raw"], [(b"bytes", os.O_RDONLY)])
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("line", "number", "words"),
    [
        (probemsg.pack_error("is odd"), errno.EINVAL, "disk d: is odd"),
        (b"x\n", errno.EIO, "disk d: cannot be examined: leaf answered nonsense: 0 fields of kind b'x'"),
        (None, errno.ETIMEDOUT, "disk d: cannot be examined within 0 seconds"),
    ],
)
def test_an_image_that_cannot_be_examined(
    leaf: Leaf, tmp_path: Path, line: bytes | None, number: int, words: str
) -> None:
    """Each failure has a sentence of its own."""
    if line is not None:
        leaf.answers(line)

    with pytest.raises(OperatorError) as error:
        probe_of(leaf, tmp_path)

    assert (error.value.number, str(error.value)) == (number, words)


def test_a_probe_that_has_ended(leaf: Leaf, tmp_path: Path) -> None:
    """The socket is closed at its end."""
    leaf.theirs.close()

    with pytest.raises(OperatorError, match="disk d: cannot be examined: leaf has ended") as error:
        probe_of(leaf, tmp_path)

    assert error.value.number == errno.EIO


def test_a_file_that_cannot_be_opened_again(leaf: Leaf) -> None:
    """The error is the kernel's."""
    with pytest.raises(OperatorError, match="disk d: cannot be examined: No such file") as error:
        ProbeSocket(leaf.ours).probe(999, "disk d", "")

    assert error.value.number == errno.ENOENT


def test_a_probe_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket stays open."""
    monkeypatch.setattr("vmd.privsep.spawn.INTERPRETER", "/no/such/program")
    before = open_descriptors()

    with pytest.raises(OperatorError, match=r"disk d: cannot be examined: .*start imgprobe") as error:
        prober.ImageProber(None).probe(0, "disk d", "")

    assert error.value.number == errno.ENOENT
    assert open_descriptors() == before


class Process:
    """A probe.  It stays for so many calls of `reap`."""

    def __init__(self, stays: int) -> None:
        self.stays = stays
        self.done: list[str] = []

    def kill(self) -> None:
        """Record it."""
        self.done.append("killed")

    def reap(self, timeout_s: float = 0) -> int | None:
        """Return the status if it has ended."""
        self.done.append(f"reaped after {timeout_s:g} s")
        self.stays -= 1
        return 0 if self.stays < 0 else None


@pytest.mark.parametrize("boots", [False, True])
def test_each_image_has_a_probe_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boots: bool) -> None:
    """It is ended after its answer.  One that waits for storage is reaped later."""
    processes = [Process(2), Process(0), Process(0)]
    waiting = list(processes)
    started: list[tuple[str, object]] = []
    asked: list[bytes] = []
    found = probemsg.Probe(format="raw", size=5)

    def spawn(title: str, *, channel: socket.socket, **given: object) -> Process:
        started.append((title, given))
        channel.send(probemsg.pack_image(found))
        kept.append(socket.socket(fileno=os.dup(channel.fileno())))
        return waiting.pop(0)

    kept: list[socket.socket] = []
    monkeypatch.setattr(prober, "spawn", spawn)
    (tmp_path / "image").touch()
    before = open_descriptors()
    several = prober.ImageProber(None, entry="an:entry", title="a probe")
    ending: list[list[object]] = []
    with (tmp_path / "image").open("rb") as file:
        for _ in range(3):
            assert several.probe(file.fileno(), "disk d", "raw", boots=boots) == found
            ending.append([*several.ending])
    for each in kept:
        question, files, _ = receive(each, QUESTION_MAX, FILES_MAX)
        asked.append(question)
        for fd in (*files, each.detach()):
            os.close(fd)

    assert asked == [b"raw\0boots\0" if boots else b"raw\0"] * 3
    assert started == [("a probe", {"log_fd": 2, "place": None, "entry": "an:entry"})] * 3
    assert ending == [processes[:1], processes[:1], []]
    assert processes[0].done == ["killed", "reaped after 1 s", "reaped after 0 s", "reaped after 0 s"]
    assert processes[1].done == ["killed", "reaped after 1 s"]
    assert open_descriptors() == before


def test_a_probe_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error without a number of the kernel is one of input and output."""

    def spawn(*_: object, **__: object) -> Process:
        raise VmdError("is odd")

    monkeypatch.setattr(prober, "spawn", spawn)
    before = open_descriptors()

    with pytest.raises(OperatorError, match="disk d: cannot be examined: is odd") as error:
        prober.ImageProber(None).probe(0, "disk d", "")

    assert error.value.number == errno.EIO
    assert open_descriptors() == before


# --- waiting ------------------------------------------------------------------------------------------------------


def ask(leaf: Leaf, unpack: Callable[[bytes], object], longest_s: float = 60.0) -> object:
    """Ask a leaf something."""
    return asking.ask_patiently(
        leaf.ours, ["one", "two"], [0], unpack, never,
        longest_s=longest_s, leaf="leaf", failed="disk d: cannot be read", late="disk d: too late",
    )  # fmt: skip


def failing(error: Exception) -> Callable[[bytes], object]:
    """Return a function that refuses an answer."""

    def unpack(_line: bytes) -> object:
        raise error

    return unpack


def test_a_leaf_answers(leaf: Leaf) -> None:
    """The answer is parsed."""
    leaf.answers(b"fine\n")

    assert ask(leaf, lambda line: line.decode()) == "fine\n"
    words, files = leaf.asked()
    assert (words, len(files)) == (["one", "two"], 1)


@pytest.mark.parametrize(
    ("error", "number", "words"),
    [
        (ValueError("odd"), errno.EIO, "disk d: cannot be read: leaf answered nonsense: odd"),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC, "disk d: cannot be read: full"),
        (OSError("no number"), errno.EIO, "disk d: cannot be read: None"),
    ],
)
def test_an_answer_that_cannot_be_used(leaf: Leaf, error: Exception, number: int, words: str) -> None:
    """The leaf is not trusted."""
    leaf.answers(b"x\n")

    with pytest.raises(OperatorError) as refused:
        ask(leaf, failing(error))

    assert (refused.value.number, str(refused.value)) == (number, words)


def test_a_leaf_that_has_ended(leaf: Leaf) -> None:
    """It may end before it gets the question, or afterwards."""
    leaf.theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(OperatorError, match="disk d: cannot be read: leaf has ended") as refused:
        ask(leaf, failing(ValueError("empty")))
    assert refused.value.number == errno.EIO

    leaf.theirs.close()
    for _ in range(2):  # with a question that was not read, and without
        with pytest.raises(OperatorError, match="disk d: cannot be read: leaf has ended") as refused:
            ask(leaf, failing(ValueError("empty")))
        assert refused.value.number == errno.EIO


def test_a_leaf_that_does_not_answer(leaf: Leaf) -> None:
    """The sentence for that is the caller's."""
    with pytest.raises(OperatorError) as refused:
        ask(leaf, failing(ValueError("empty")), longest_s=0.0)

    assert (refused.value.number, str(refused.value)) == (errno.ETIMEDOUT, "disk d: too late")


# --- imgresize ----------------------------------------------------------------------------------------------------


def test_a_disk_is_resized(leaf: Leaf, disk: OpenDisk) -> None:
    """imgresize gets the images as they are open: the first one for writing."""
    leaf.answers(probemsg.pack_image(probemsg.Probe(format="qcow2", size=1 << 30)))

    resize(leaf.ours, disk, 1 << 30, never)

    assert leaf.asked() == ([str(1 << 30), *LINKS], [(b"top", os.O_RDWR), (b"base", os.O_RDONLY)])


def test_a_disk_that_cannot_be_resized(leaf: Leaf, disk: OpenDisk) -> None:
    """The sentence names the disk."""
    leaf.answers(probemsg.pack_error("is full"))

    with pytest.raises(OperatorError) as refused:
        resize(leaf.ours, disk, 1 << 30, never)

    assert (refused.value.number, str(refused.value)) == (errno.EINVAL, "disk /d/top: is full")


# --- imgboot ------------------------------------------------------------------------------------------------------


def read_boot_file(leaf: Leaf, disk: OpenDisk, name: str, content: bytes, answer: bytes) -> FromDisks:
    """Have a file read from a disk.  The leaf writes it before it is asked."""
    memory = memory_file(name)
    os.write(memory, content)
    leaf.answers(answer)
    found = FromDisks()
    try:
        found.read(leaf.ours, name, KERNEL, disk, memory, never)
    except BaseException:
        found.close()
        raise
    return found


@pytest.mark.parametrize("name", ["kernel", "initrd"])
def test_a_file_is_read_from_a_disk(leaf: Leaf, disk: OpenDisk, name: str) -> None:
    """Its copy cannot be changed.  Only the name and the options of a kernel are of use."""
    line = bootmsg.pack_file(bootmsg.BootFile(size=5, name="disk1p2:/vmlinuz", options="s"))

    found = read_boot_file(leaf, disk, name, b"code!", line)

    words, files = leaf.asked()
    assert words == ["1", "p2", "/vmlinuz", *LINKS]
    assert files == [(b"top", os.O_RDONLY), (b"base", os.O_RDONLY), (b"code!", os.O_RDWR)]
    is_kernel = name == "kernel"
    assert (found.kernel_name, found.options) == (("disk1p2:/vmlinuz", "s") if is_kernel else ("", ""))
    (copy,) = found.kernel if is_kernel else found.initrd
    assert (len(found.kernel), len(found.initrd)) == ((1, 0) if is_kernel else (0, 1))
    assert is_constant(copy)
    before = open_descriptors()
    found.close()
    assert len(open_descriptors()) == len(before) - 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (bootmsg.pack_error("has no such file"), "has no such file"),
        (bootmsg.pack_file(bootmsg.BootFile(size=4, name="x")), "imgboot answered nonsense: 4 bytes of 5"),
        (bootmsg.pack_file(bootmsg.BootFile(size=6, name="x")), "imgboot answered nonsense: 6 bytes of 5"),
    ],
)
def test_a_file_that_cannot_be_read_from_a_disk(leaf: Leaf, disk: OpenDisk, answer: bytes, words: str) -> None:
    """The size must be that of the copy.  The sentence names the file and the disk."""
    with pytest.raises(OperatorError) as refused:
        read_boot_file(leaf, disk, "kernel", b"code!", answer)

    assert (refused.value.number, str(refused.value)) == (errno.EINVAL, f"disk1p2:/vmlinuz: disk /d/top: {words}")


def test_a_disk_without_boot_code_is_described(leaf: Leaf, disk: OpenDisk) -> None:
    """Either what it has, or why that is not known."""
    leaf.answers(bootmsg.pack_file(bootmsg.BootFile(size=0, name="an ext4 file system")))
    assert look(leaf.ours, 3, disk, never) == "disk /d/top: an ext4 file system"
    assert leaf.asked()[0] == ["3", "", "", *LINKS]

    leaf.answers(bootmsg.pack_error("no file system"))
    assert look(leaf.ours, 0, disk, never) == "disk /d/top: no file system"


def test_images_are_closed_after_the_answer(leaf: Leaf, disk: OpenDisk) -> None:
    """imgboot gets other open files, for reading only."""
    for answer in (bootmsg.pack_file(bootmsg.BootFile(size=0, name="x")), bootmsg.pack_error("no"), b"nonsense\n"):
        leaf.answers(answer)
        before = open_descriptors()
        with contextlib.suppress(OperatorError):
            look(leaf.ours, 3, disk, never)
        assert open_descriptors() == before
        leaf.asked()


def test_an_image_that_cannot_be_opened_for_imgboot(leaf: Leaf, disk: OpenDisk) -> None:
    """Those that were opened before it are closed."""
    disk.links.append(OpenImage(fd=999, path="/d/gone", format="raw", guessed=False))
    before = open_descriptors()

    with pytest.raises(OperatorError, match="disk /d/top: cannot be read: No such file") as error:
        look(leaf.ours, 3, disk, never)

    disk.links.pop()
    assert error.value.number == errno.ENOENT
    assert open_descriptors() == before


def test_a_copy_that_cannot_be_sealed(leaf: Leaf, disk: OpenDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be changed, so it is not booted."""

    def fail(*_: object) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr("vmd.files.diskboot.seal", fail)
    with pytest.raises(OperatorError) as error:
        read_boot_file(leaf, disk, "kernel", b"code!", bootmsg.pack_file(bootmsg.BootFile(size=5, name="x")))

    words = "disk1p2:/vmlinuz: disk /d/top: cannot be kept: busy"
    assert (error.value.number, str(error.value)) == (errno.EBUSY, words)


def test_nothing_to_start() -> None:
    """The sentence has all disks."""
    error = NothingToStart(["disk a: empty", "disk b: odd"])

    assert (error.number, str(error)) == (
        errno.ENOEXEC, "nothing to boot from: no boot sector on disk a: empty; disk b: odd",
    )  # fmt: skip


# --- seeder -------------------------------------------------------------------------------------------------------

PARTS = SeedParts(vm="web", hostname="web")


def made(leaf: Leaf, answer: bytes, size: int, *, sealed: bool = True, parts: SeedParts = PARTS) -> list[str]:
    """Have a seed made; the leaf has written so many bytes before it is asked."""
    packed, image = memory_file("parts"), memory_file("seed")
    os.ftruncate(image, size)
    if sealed:
        seal(image, CONSTANT)
    leaf.answers(answer)
    try:
        notes = make_seed(leaf.ours, parts, packed, image, never)
        assert is_constant(packed)
        return notes
    finally:
        os.close(packed)
        os.close(image)


@pytest.mark.parametrize("size", [1, MAX_SEED_BYTES])
def test_a_seed_is_made(leaf: Leaf, size: int) -> None:
    """Its notes are for the user.  The parts are sent as a whole."""
    assert made(leaf, seedmsg.pack_made(["no key", "no user"]), size) == ["seed: no key", "seed: no user"]

    words, files = leaf.asked()
    assert words == [""]
    assert files[0][0] == imsg.pack(PARTS)[:100]
    assert len(files) == 2


@pytest.mark.parametrize(("size", "sealed"), [(0, True), (MAX_SEED_BYTES + 1, True), (512, False)])
def test_a_seeder_is_not_trusted(leaf: Leaf, size: int, sealed: bool) -> None:
    """A disk that it could change later, or that is too large, is none."""
    with pytest.raises(OperatorError, match="seed: cannot be made: seeder answered nonsense: there is no disk image"):
        made(leaf, seedmsg.pack_made([]), size, sealed=sealed)


def test_a_seed_that_cannot_be_made(leaf: Leaf) -> None:
    """The reason is the seeder's.  Parts that are too large are not sent."""
    with pytest.raises(OperatorError) as refused:
        made(leaf, seedmsg.pack_error("user-data u: is no text"), 0)
    assert (refused.value.number, str(refused.value)) == (errno.EINVAL, "seed: user-data u: is no text")
    leaf.asked()

    large = PARTS.replace(user_data=SeedFile(name="u", data=bytes(PARTS_MAX)))
    with pytest.raises(OperatorError, match="have together more than 4 MiB") as refused:
        made(leaf, b"", 0, parts=large)
    assert refused.value.number == errno.EFBIG


@pytest.mark.parametrize("more", [0, 1])
def test_how_large_the_parts_of_a_seed_may_be(leaf: Leaf, more: int) -> None:
    """The limit itself is allowed."""
    overhead = len(imsg.pack(PARTS.replace(user_data=SeedFile(name="u", data=bytes(1 << 20))))) - (1 << 20)
    parts = PARTS.replace(user_data=SeedFile(name="u", data=bytes(PARTS_MAX - overhead + more)))
    assert len(imsg.pack(parts)) == PARTS_MAX + more

    if more:
        with pytest.raises(OperatorError, match="have together more than 4 MiB"):
            made(leaf, seedmsg.pack_made([]), 512, parts=parts)
    else:
        assert made(leaf, seedmsg.pack_made([]), 512, parts=parts) == []


def test_parts_that_cannot_be_kept(leaf: Leaf) -> None:
    """The error is the kernel's."""
    with pytest.raises(OperatorError, match="seed: cannot be made: Bad file descriptor") as refused:
        make_seed(leaf.ours, PARTS, 999, 998, never)
    assert refused.value.number == errno.EBADF
