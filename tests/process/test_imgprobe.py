"""The real imgprobe process: it runs in the cell as another user, and ends soon."""

import os
import pwd
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors, open_files
from tests.support.images import MIB, problems, qemu, same
from vmd.config.model import DiskConfig
from vmd.errors import OperatorError
from vmd.files.images import open_disk
from vmd.files.prober import ImageProber, ProbeSocket, start_probe
from vmd.files.resizer import resize
from vmd.images.create import create
from vmd.images.locks import lock
from vmd.ipc.probemsg import Probe
from vmd.parent.opening import IMGRESIZE_ENTRY
from vmd.privsep.cell import Cell
from vmd.privsep.spawn import Child

pytestmark = pytest.mark.root

USER = pwd.getpwnam("nobody")  # any user will do, because `_vmd` may not exist here
DEADLINE_S = 60.0
ROUNDS = 10


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    """Give a cell."""
    built = Cell.build(USER.pw_uid, USER.pw_gid)
    yield built
    built.close()


@pytest.fixture
def prober(cell: Cell) -> ImageProber:
    """Give a prober, as the parent has one."""
    return ImageProber(cell)


def probed(prober: ImageProber | ProbeSocket, path: Path, format_hint: str = "") -> Probe:
    """Probe a file that is open for writing and locked, as a disk is."""
    fd = os.open(path, os.O_RDWR)
    try:
        lock(fd, str(path), writable=True)
        return prober.probe(fd, f"disk {path}", format_hint)
    finally:
        os.close(fd)


def refusal(prober: ImageProber | ProbeSocket, path: Path, format_hint: str = "") -> str:
    """Return the message with which a file is refused as an image."""
    with pytest.raises(OperatorError) as refused:
        probed(prober, path, format_hint)
    return str(refused.value)


def test_the_format_of_an_image_is_found(prober: ImageProber, tmp_path: Path) -> None:
    """imgprobe gets an open descriptor, so it can also examine a file that only root may read."""
    path, base = tmp_path / "image", tmp_path / "base"
    base.write_bytes(bytes(2 * MIB))
    create(str(path), "qcow2", MIB)
    top = tmp_path / "top"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "compat=0.10", "-F", "raw", "-b", "base", top)

    assert probed(prober, base) == Probe(format="raw", size=2 * MIB, guessed=True)
    assert probed(prober, path) == Probe(format="qcow2", size=MIB, guessed=True)
    assert probed(prober, path, "qcow2") == Probe(format="qcow2", size=MIB)
    expected = Probe(format="qcow2", size=2 * MIB, backing="base", backing_format="raw")
    assert probed(prober, top, "qcow2") == expected


def test_a_refusal_names_the_image(prober: ImageProber, tmp_path: Path) -> None:
    """The message is imgprobe's, and vmd adds the name."""
    path = tmp_path / "image"
    path.write_bytes(b"QFI\xfb" + bytes(MIB))

    assert refusal(prober, path) == f"disk {path}: unsupported qcow2 version 0"
    path.write_bytes(bytes(MIB))
    assert refusal(prober, path, "qcow2") == f"disk {path}: not a qcow2 image"


def test_chain_is_opened_with_real_processes(prober: ImageProber, tmp_path: Path) -> None:
    """Each image with an unknown format or backing file is probed."""
    (tmp_path / "0").write_bytes(bytes(MIB))
    for level in range(1, 4):
        create(str(tmp_path / f"{level}"), "qcow2", MIB, f"{level - 1}", "qcow2" if level > 1 else "raw")
    before = open_descriptors()

    disk = open_disk(DiskConfig(path=f"{tmp_path}/3", format="qcow2"), prober)

    assert [Path(link.path).name for link in disk.links] == ["3", "2", "1", "0"]
    disk.close()
    assert open_descriptors() == before


def blocked(child: Child) -> dict[str, str]:
    """Wait until a process has confined itself and sleeps; return its status."""
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        text = Path(f"/proc/{child.pid}/status").read_text()
        status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        if status["Seccomp"] == "2" and status["State"].startswith("S"):
            return status
        assert child.reap(0.01) is None, "the process has ended"
    raise AssertionError("the process does not confine itself")


def test_imgprobe_holds_its_socket_and_nothing_else(cell: Cell) -> None:
    """Checked while it waits for a request."""
    child, sock = start_probe(cell)
    try:
        status = blocked(child)
        held = open_files(child.pid)
        title = Path(f"/proc/{child.pid}/comm").read_text()
    finally:
        child.kill()
        child.reap(DEADLINE_S)
        sock.close()

    assert (status["Uid"], status["Gid"]) == ("\t".join([str(USER.pw_uid)] * 4), "\t".join([str(USER.pw_gid)] * 4))
    assert (status["CapEff"], status["CapBnd"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert sorted(held) == [0, 1, 2, 3]
    assert held[0] == held[1] == "/dev/null"
    assert held[3].startswith("socket:")
    assert title == "imgprobe\n"


def test_imgresize_holds_one_disk_and_nothing_else(cell: Cell, tmp_path: Path) -> None:
    """It has the images only during a request, and ends when its socket is closed."""
    (tmp_path / "base").write_bytes(b"b" * MIB)
    top = tmp_path / "top"
    qemu("qemu-img", "create", "-qf", "qcow2", "-F", "raw", "-b", tmp_path / "base", top)
    child, sock = start_probe(cell, entry=IMGRESIZE_ENTRY, title="imgresize")
    with sock:
        disk = open_disk(DiskConfig(path=str(top), format="qcow2"), ImageProber(cell))
        try:
            resize(sock, disk, 8 * MIB, lambda: None)
            status = blocked(child)
            held = sorted(map(int, os.listdir(f"/proc/{child.pid}/fd")))
            with pytest.raises(OperatorError) as refused:
                resize(sock, disk, 4 * MIB, lambda: None)
        finally:
            disk.close()
        title = Path(f"/proc/{child.pid}/comm").read_text()

    assert child.reap(DEADLINE_S) == 0
    assert str(refused.value) == f"disk {top}: has {8 * MIB} bytes, and a disk is never made smaller"
    assert (status["CapEff"], status["CapBnd"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert (held, title) == ([0, 1, 2, 3], "imgresize\n")
    assert problems(top) == {}
    same(top, b"b" * MIB + bytes(7 * MIB), tmp_path)


def test_an_imgprobe_serves_many_requests(cell: Cell, tmp_path: Path) -> None:
    """The opener of one VM sends them.  imgprobe keeps none of the images, and ends when its socket is closed."""
    create(str(tmp_path / "image"), "qcow2", MIB)
    (tmp_path / "base").write_bytes(bytes(MIB))
    child, sock = start_probe(cell)
    with sock:
        prober = ProbeSocket(sock)
        for _ in range(3):
            assert probed(prober, tmp_path / "image", "qcow2").format == "qcow2"
            assert refusal(prober, tmp_path / "base", "qcow2").endswith("not a qcow2 image")
        blocked(child)  # the last image is closed now
        assert sorted(map(int, os.listdir(f"/proc/{child.pid}/fd"))) == [0, 1, 2, 3]

    assert child.reap(DEADLINE_S) == 0


def test_an_imgprobe_whose_opener_has_ended(cell: Cell, tmp_path: Path) -> None:
    """An imgprobe whose opener was given up ends without a message."""
    reader, writer = os.pipe()
    child, sock = start_probe(cell, log_fd=writer)
    os.close(writer)
    blocked(child)
    os.kill(child.pid, signal.SIGSTOP)
    (tmp_path / "image").touch()
    with sock, (tmp_path / "image").open() as image:
        socket.send_fds(sock, [b"\0"], [image.fileno()])
    os.kill(child.pid, signal.SIGCONT)

    assert child.reap(DEADLINE_S) == 0
    with open(reader, "rb") as log:
        assert log.read() == b""


def bad(function: str, timeout_s: float = DEADLINE_S) -> ImageProber:
    """Return a prober that starts a faulty process instead of imgprobe."""
    return ImageProber(None, timeout_s, f"tests.support.imgprobes:{function}")


def children() -> set[str]:
    """Return the children of this process, including zombies."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nonsense", "cannot be examined: imgprobe answered nonsense: "),
        ("flood", "cannot be examined: imgprobe answered nonsense: line of 8193 bytes"),
        ("trickle", "cannot be examined: imgprobe answered nonsense: "),
        ("die", "cannot be examined: imgprobe has ended"),
        ("be_killed", "cannot be examined: imgprobe has ended"),
        ("no_such_function", "cannot be examined: imgprobe has ended"),
    ],
)
def test_imgprobe_that_fails_57(tmp_path: Path, function: str, words: str) -> None:
    """Hostile input 57: after any failure the disk is refused, and no process is left."""
    (tmp_path / "image").write_bytes(bytes(MIB))
    prober = bad(function)
    before, others = open_descriptors(), children()

    assert refusal(prober, tmp_path / "image").startswith(f"disk {tmp_path}/image: {words}")

    assert open_descriptors() == before
    assert children() <= others


def test_imgprobe_that_does_not_answer_57(tmp_path: Path) -> None:
    """Hostile input 57: the wait for it has a limit."""
    (tmp_path / "image").write_bytes(bytes(MIB))
    prober, others = bad("hang", timeout_s=0.5), children()

    words = f"disk {tmp_path}/image: cannot be examined within 0.5 seconds"
    assert refusal(prober, tmp_path / "image") == words

    assert prober.ending == []
    assert children() <= others


def test_imgprobe_that_does_not_end(tmp_path: Path) -> None:
    """Its answer counts, and the process is killed."""
    (tmp_path / "image").write_bytes(bytes(MIB))
    prober, others = bad("stay"), children()

    assert probed(prober, tmp_path / "image") == Probe(format="raw", size=1)

    assert prober.ending == []
    assert children() <= others


def test_imgprobe_cannot_write_the_image(tmp_path: Path) -> None:
    """Our descriptor is writable; the one that it gets is not."""
    (tmp_path / "image").write_bytes(bytes(MIB))

    assert probed(bad("write_image"), tmp_path / "image").size == 0

    assert (tmp_path / "image").read_bytes() == bytes(MIB)


def test_no_descriptors_left_is_a_sentence(prober: ImageProber, tmp_path: Path) -> None:
    """Hostile input 60: the refusal has a reason."""
    (tmp_path / "image").write_bytes(bytes(MIB))
    fd = os.open(tmp_path / "image", os.O_RDWR)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, limits[1]))
    try:
        with pytest.raises(OperatorError, match=r"disk x: cannot be examined: .*Too many open files"):
            prober.probe(fd, "disk x", "")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(fd)


def test_cost_of_a_probe(prober: ImageProber, tmp_path: Path) -> None:
    """The figure is printed, not checked."""
    create(str(tmp_path / "image"), "qcow2", MIB)
    times_ms = []
    for _ in range(ROUNDS):
        start_s = time.monotonic()
        probed(prober, tmp_path / "image", "qcow2")
        times_ms.append((time.monotonic() - start_s) * 1000)

    print(f"imgprobe: median {sorted(times_ms)[ROUNDS // 2]:.0f} ms, longest {max(times_ms):.0f} ms")
    assert len(times_ms) == ROUNDS
