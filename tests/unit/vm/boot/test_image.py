"""The kind of a boot image is recognised, and compressed images are unpacked within limits."""

import errno
import gzip
import os
import struct
import subprocess
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest

from tests.support.descriptors import open_descriptors
from tests.unit.vm.boot.samples import MIB, FakeMemory, bzimage, load, memfd, openbsd, pvh, seabios
from vmd.errors import HostError, ImageError
from vmd.vm.boot import loader
from vmd.vm.boot.image import Image, unpack
from vmd.vm.boot.kind import Kind, kind_of


@pytest.fixture(autouse=True)
def opened() -> Iterator[None]:
    """Close the images that a test has left open."""
    before = open_descriptors()
    yield
    for number in set(open_descriptors()) - set(before):
        os.close(int(number))


def open_image(data: bytes) -> Image:
    """Return an image with these bytes, which is open until the test ends."""
    return Image(memfd(data), "/bsd")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (gzip.compress(b"x", mtime=0), Kind.GZIP),
        (pvh(), Kind.ELF),
        (openbsd(is64=False), Kind.ELF),
        (bzimage(), Kind.LINUX),
        (seabios(), Kind.FIRMWARE),
        (seabios(64 * 1024), Kind.FIRMWARE),
    ],
)
def test_kind_is_recognised_from_the_bytes(data: bytes, kind: Kind) -> None:
    """The name of a file does not matter."""
    assert kind_of(open_image(data)) is kind


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"#!/bin/sh\n" * 1000,
        seabios()[:-1],
        seabios() + b"x",
        bytes(256 * 1024),
        b"\xff" * (256 * 1024),
        seabios() * 65,
    ],
    ids=["one byte", "script", "short", "long", "zeros", "erased flash", "more than 16 MiB"],
)
def test_other_files_are_refused_with_the_supported_kinds(data: bytes) -> None:
    """hostile 54: the error for a file of another kind names the supported kinds."""
    with pytest.raises(ImageError, match=r"^/bsd: is neither a kernel .* nor a firmware image .*64 KiB"):
        kind_of(open_image(data))


def test_directory_pipe_and_device_are_refused() -> None:
    """hostile 54: only regular files are accepted, even if the parent passes something else."""
    reader, writer = os.pipe()
    directory = os.open("/", os.O_RDONLY)
    device = os.open("/dev/zero", os.O_RDONLY)
    try:
        for fd in (reader, directory, device):
            with pytest.raises(ImageError, match="/bsd: is not a regular file"):
                Image(fd, "/bsd")
    finally:
        for fd in (reader, writer, directory, device):
            os.close(fd)


def test_empty_file_is_refused() -> None:
    """hostile 54: the file has no bytes."""
    with pytest.raises(ImageError, match="/bsd: is empty"):
        open_image(b"")


def test_closed_descriptor_is_the_hosts_fault() -> None:
    """An error of a system call has its errno and the operation."""
    fd = memfd(b"x")
    os.close(fd)

    with pytest.raises(HostError, match="examine /bsd: Bad file descriptor"):
        Image(fd, "/bsd")


def test_read_error_is_the_hosts_fault() -> None:
    """A descriptor that cannot be read is no error of the image."""
    fd = os.open("/proc/self/fd", os.O_RDONLY)
    image = open_image(b"x" * 100)
    os.dup2(fd, image.fd)
    os.close(fd)

    with pytest.raises(HostError, match="read /bsd: Is a directory"):
        image.read(0, 10, "its beginning")


def test_file_that_shrinks_while_it_is_read_is_noticed() -> None:
    """The file may have become shorter after fstat(2)."""
    image = open_image(b"x" * 100)
    os.ftruncate(image.fd, 50)

    with pytest.raises(ImageError, match="became shorter while it was read: the code ends at byte 50"):
        image.read(10, 80, "the code")


def test_unpacked_bytes_are_the_original() -> None:
    """Content that is larger than the pieces of unpacking does not change."""
    data = os.urandom(700_000) + bytes(5 * MIB)
    fd = unpack(open_image(gzip.compress(data)), 8 * MIB)
    try:
        assert os.pread(fd, 8 * MIB, 0) == data
    finally:
        os.close(fd)


def test_gzip_bomb_stops_at_the_bound() -> None:
    """hostile 54: of 32 MiB of zeroes in 32 KB, at most 1 MiB is unpacked."""
    stream = zlib.compressobj(9, wbits=31)
    bomb = b"".join(stream.compress(bytes(MIB)) for _ in range(32)) + stream.flush()

    with pytest.raises(ImageError, match="unpacks to more than 1048576 bytes"):
        unpack(open_image(bomb), MIB)


@pytest.mark.parametrize("members", [1, 3])
def test_as_much_is_unpacked_as_the_limit_allows(members: int) -> None:
    """One byte more is refused."""
    last = MIB - 1000 * (members - 1)
    data = gzip.compress(bytes(1000)) * (members - 1)

    assert unpacked(data + gzip.compress(bytes(last))) == bytes(MIB)
    with pytest.raises(ImageError, match=f"unpacks to more than {MIB} bytes"):
        unpacked(data + gzip.compress(bytes(last + 1)))


def test_unpacking_takes_little_memory() -> None:
    """hostile 54: a small file that unpacks to much is unpacked piece by piece."""
    packed = gzip.compress(bytes(32 * MIB))
    tracemalloc.start()
    os.close(unpack(open_image(packed), 32 * MIB))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MIB


def test_a_host_without_memory_is_named_and_nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unpacked kernel takes memory of the host."""
    image = open_image(gzip.compress(bytes(1000)))
    before = open_descriptors()

    def fail(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("os.write", fail)
        with pytest.raises(HostError, match="unpack /bsd: No space left on device"):
            unpack(image, MIB)

    assert open_descriptors() == before


def test_gzip_bomb_is_bounded_by_guest_memory() -> None:
    """hostile 54: a compressed kernel takes no more memory of the host than the guest has."""
    with pytest.raises(ImageError, match=f"unpacks to more than {16 * MIB} bytes"):
        load(FakeMemory(), gzip.compress(bytes(17 * MIB)))


def test_gzip_data_without_content_is_bounded() -> None:
    """hostile 54: a long series of empty deflate blocks gives no output."""
    empty_blocks = b"\x00\x00\x00\xff\xff" * 300_000

    with pytest.raises(ImageError, match="bytes of gzip data, at most 1048576"):
        unpack(open_image(gzip.compress(b"")[:10] + empty_blocks), MIB)


def test_every_prefix_of_gzip_data_is_refused() -> None:
    """hostile 54: the data is truncated anywhere, also in its checksum."""
    packed = gzip.compress(bzimage())
    for length in range(3, len(packed)):
        with pytest.raises(ImageError, match="is truncated"):
            unpack(open_image(packed[:length]), MIB)


def unpacked(data: bytes, limit_bytes: int = MIB) -> bytes:
    """Return the content of a gzip file."""
    fd = unpack(open_image(data), limit_bytes)
    try:
        return os.pread(fd, limit_bytes, 0)
    finally:
        os.close(fd)


def member(flags: int, *fields: bytes, crc: bool = False) -> bytes:
    """Return gzip data of "kernel" whose header has these optional fields (RFC 1952, 2.3)."""
    plain = gzip.compress(b"kernel", mtime=0)
    header = plain[:3] + bytes([flags]) + plain[4:10] + b"".join(fields)
    if crc:
        header += struct.pack("<H", zlib.crc32(header) & 0xFFFF)
    return header + plain[10:]


GZIP = {
    "two members": (gzip.compress(b"ker") + gzip.compress(b"nel"), ""),
    "an empty member between two": (gzip.compress(b"ker") + gzip.compress(b"") + gzip.compress(b"nel"), ""),
    "zeros behind the end": (gzip.compress(b"kernel") + bytes(1000), ""),
    "much padding": (gzip.compress(b"kernel") + bytes(700_000), ""),
    "one zero": (gzip.compress(b"kernel") + b"\0", ""),
    "garbage": (gzip.compress(b"kernel") + b"garbage", "/bsd: 7 bytes after the end of the gzip data are ignored"),
    "zeros and garbage": (gzip.compress(b"kernel") + bytes(300_000) + b"x", "300001 bytes after the end"),
    "a name": (member(8, b"vmlinux\0"), ""),
    "a comment": (member(16, b"built today\0"), ""),
    "an extra field": (member(4, b"\x03\0abc"), ""),
    "a checksum of the header": (member(2, crc=True), ""),
    "all of these": (member(30, b"\x03\0abc", b"vmlinux\0", b"built today\0", crc=True), ""),
    "declared to be text": (member(1), ""),
}


@pytest.mark.parametrize("case", GZIP)
def test_everything_that_gzip_accepts_is_unpacked(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Members, optional fields and padding are accepted.  Garbage at the end gives a warning, as in gzip(1)."""
    data, warning = GZIP[case]

    assert unpacked(data) == b"kernel"

    said = capfd.readouterr().err
    assert warning in said
    assert bool(said) == bool(warning)


@pytest.mark.parametrize("case", GZIP)
def test_gzip_itself_accepts_the_samples(case: str) -> None:
    """gzip(1) unpacks the samples to the same content."""
    done = subprocess.run(["gzip", "-dc"], input=GZIP[case][0], capture_output=True, check=False)

    assert done.stdout == b"kernel"
    assert done.returncode in (0, 2)  # 2 is a warning


@pytest.mark.parametrize("cut", [3, 12, 25])
def test_second_member_that_is_truncated_is_refused(cut: int) -> None:
    """hostile 54: data that begins like a member must be a member."""
    second = gzip.compress(b"nel" * 100)

    with pytest.raises(ImageError, match="is truncated"):
        unpacked(gzip.compress(b"ker") + second[:cut])


def test_members_share_the_limit() -> None:
    """hostile 54: the limit counts the content of all members together."""
    with pytest.raises(ImageError, match=f"unpacks to more than {MIB} bytes"):
        unpacked(gzip.compress(bytes(MIB // 2)) * 3)


def test_empty_members_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """hostile 54: each empty member takes time, so their number has a limit."""
    monkeypatch.setattr("vmd.vm.boot.image.MEMBERS_MAX", 100)

    assert unpacked(gzip.compress(b"") * 99 + gzip.compress(b"kernel")) == b"kernel"
    with pytest.raises(ImageError, match="has more than 100 members of gzip data"):
        unpacked(gzip.compress(b"") * 101)


def test_padding_of_enormous_length_costs_nothing() -> None:
    """hostile 54: a sparse file of 4 EiB is not read to its end."""
    image = open_image(gzip.compress(b"kernel"))
    os.ftruncate(image.fd, 1 << 62)

    fd = unpack(Image(image.fd, "/bsd"), MIB)

    assert os.pread(fd, 100, 0) == b"kernel"
    os.close(fd)


def test_gzip_data_with_a_wrong_checksum_is_refused() -> None:
    """hostile 54: the checksum finds a wrong bit."""
    packed = bytearray(gzip.compress(b"kernel" * 100))
    packed[-8] ^= 1

    with pytest.raises(ImageError, match="has damaged gzip data"):
        unpack(open_image(bytes(packed)), MIB)


INSIDE = {
    "firmware": (seabios(), "is firmware, which has to be given uncompressed"),
    "gzip": (gzip.compress(bzimage()), "is gzip-compressed again"),
    "initramfs": (b"070701" + b"0" * 200, "is an initramfs .cpio archive.: give it as initrd"),
    "disk": (b"QFI\xfb" + bytes(600), "is a disk image .qcow2.: give it as disk"),
    "text": (b"just a text\n" * 100, "is neither a kernel"),
    "nothing": (b"", "is empty"),
}


@pytest.mark.parametrize("case", INSIDE)
def test_only_kernels_may_be_compressed(case: str) -> None:
    """Firmware must be uncompressed (*cat. 5.2*), and a file is unpacked only once; the message names its content."""
    inner, sentence = INSIDE[case]

    with pytest.raises(ImageError, match=f"is gzip-compressed, but does not contain a kernel: its content {sentence}"):
        load(FakeMemory(), gzip.compress(inner))


FIRMWARE_ENDS = {
    "far jump": b"\xea\x5b\xe0\x00\xf0",
    "near jump": b"\xe9\x00\xf0",
    "short jump": b"\xeb\xee",
    "edk2's": b"\x90\x90\xe9\x51\xf3",
    "caches off first": b"\x0f\x09\xe9\x00\xf0",
    "interrupts off first": b"\xfa\xfc\x66\xea\0\0\xff\xff\x08\0",
}


@pytest.mark.parametrize("case", FIRMWARE_ENDS)
def test_firmware_ends_in_a_jump(case: str) -> None:
    """A reset vector has room for a jump and little more."""
    firmware = bytes(65536 - 16) + FIRMWARE_ENDS[case].ljust(16, b"\0")

    assert kind_of(open_image(firmware)) is Kind.FIRMWARE


@pytest.mark.parametrize("end", [b"text for humans\n", b"\x0f" * 16, bytes(15) + b"\xea", b"\x90" * 16])
def test_file_with_the_size_of_firmware_needs_a_jump_too(end: bytes) -> None:
    """The size is not enough, because many files have a multiple of 64 KiB."""
    with pytest.raises(ImageError, match=r"^/bsd: is neither a kernel"):
        kind_of(open_image(bytes(65536 - 16) + end))


def test_memfd_of_a_refused_kernel_is_closed() -> None:
    """A VM that fails to start leaves no descriptor behind."""
    before = open_descriptors()

    with pytest.raises(ImageError):
        load(FakeMemory(), gzip.compress(bzimage()[:0x700]))
    with pytest.raises(ImageError):
        load(FakeMemory(), gzip.compress(bzimage())[:-4])

    assert open_descriptors() == before


def test_firmware_bytes_returns_the_size_of_firmware() -> None:
    """Firmware takes so much memory below 4 GiB.  A kernel takes none."""
    assert loader.firmware_bytes(memfd(seabios(128 * 1024)), "bios") == 128 * 1024
    assert loader.firmware_bytes(memfd(bzimage()), "vmlinuz") == 0


def test_sparse_file_of_enormous_size_costs_nothing() -> None:
    """hostile 54: an ELF header before a hole of 4 EiB is refused for its fields, without reading the hole."""
    fd = memfd(struct.pack("<4sBBB9xHH", b"\x7fELF", 2, 1, 1, 2, 62))
    os.ftruncate(fd, 1 << 62)

    with pytest.raises(ImageError, match="has program headers of 0 bytes"):
        loader.load(FakeMemory(), fd, "/bsd", memory_bytes=16 * MIB)
    os.close(fd)
