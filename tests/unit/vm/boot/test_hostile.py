"""Damaged and random images give a Start with possible values, or an ImageError (hostile 54)."""

import gzip
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.vm.boot.samples import (
    FakeMemory,
    Named,
    Part,
    bzimage,
    elf_file,
    load,
    note,
    openbsd,
    put,
    pvh,
    seabios,
)
from vmd.errors import ImageError
from vmd.vm.boot.start import Mode, Start

KERNELS = {
    "bzImage": bzimage(),
    "bzImage32": put(bzimage(), "<H", 0x236, 0x7E),
    "bzImage at 1 MiB": put(bzimage(), "<IB", 0x230, 0, 0),
    "pvh": pvh(),
    "pvh32": pvh(is64=False),
    "openbsd": openbsd(),
    "openbsd32": openbsd(is64=False),
    "note section": elf_file(
        [Part(1, 0x100000, b"\xf4" * 64)],
        entry=0,
        sections=[Named(b".note.Xen", 7, note(b"Xen", 18, b"\x10\0\x10\0"))],
    ),
}
LINUX = {name for name in KERNELS if name.startswith("bzImage")}
HEADERS = {name: min(len(image), 0x300 if name in LINUX else 0x120) for name, image in KERNELS.items()}


def check_load(data: bytes) -> Start | None:
    """Load an image.  Raise AssertionError unless the error or the start is correct."""
    memory = FakeMemory()
    try:
        start = load(memory, data)
    except ImageError as error:
        sentence = str(error)
        assert sentence.startswith("/bsd: ")
        assert len(sentence) < 300
        assert sentence.isprintable()
        return None
    if start.mode is not Mode.REAL_RESET:
        assert 0x30000 <= start.registers["rip"] < memory.memory_bytes
        assert start.text.isprintable()
    return start


@pytest.mark.parametrize("name", KERNELS)
def test_every_bit_of_the_headers_flipped(name: str) -> None:
    """hostile 54: every third bit of the headers is flipped, one at a time."""
    image = bytearray(KERNELS[name])
    first = 0x1F0 if name in LINUX else 0
    for bit in range(first * 8, HEADERS[name] * 8, 3):
        image[bit // 8] ^= 1 << bit % 8
        check_load(bytes(image))
        image[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("name", KERNELS)
def test_random_values_in_the_headers(name: str) -> None:
    """hostile 54: a few bytes of the headers are replaced, with a fixed seed."""
    rng = random.Random(name)
    for _ in range(300):
        image = bytearray(KERNELS[name])
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(HEADERS[name])
            image[at : at + 8] = rng.choice((rng.randbytes(8), b"\xff" * 8, bytes(8)))[: len(image) - at]
        check_load(bytes(image))


def test_random_bytes_after_each_magic() -> None:
    """hostile 54: only the magic is correct, with a fixed seed."""
    rng = random.Random(54)
    for _ in range(400):
        noise = rng.randbytes(rng.randrange(1, 4000))
        ident = bytes([2, 1, 1]) + bytes(9) + b"\x02\x00\x3e\x00"
        for data in (noise, b"\x7fELF" + noise, b"\x7fELF" + ident + noise, b"\x1f\x8b\x08" + noise):
            assert check_load(data) is None
        linux = bytearray(bzimage())
        linux[0x206 : 0x206 + len(noise)] = noise
        check_load(bytes(linux))


def test_flipped_bits_in_gzip_data() -> None:
    """hostile 54: the format or the checksum shows the damage, unless it is in a field without meaning."""
    rng = random.Random(1952)
    packed = gzip.compress(pvh(), mtime=0)
    for _ in range(400):
        damaged = bytearray(packed)
        damaged[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
        check_load(bytes(damaged))


def test_flipped_bits_in_several_members_of_gzip_data() -> None:
    """hostile 54: the damage is in either member or in the padding after them."""
    rng = random.Random(1953)
    half = len(pvh()) // 2
    packed = gzip.compress(pvh()[:half], mtime=0) + gzip.compress(pvh()[half:], mtime=0) + bytes(20)
    for _ in range(400):
        damaged = bytearray(packed)
        damaged[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
        check_load(bytes(damaged))


def test_firmware_of_random_bytes_is_accepted() -> None:
    """The content of a firmware image is not checked, except for its end."""
    memory = FakeMemory(firmware_bytes=65536)

    assert load(memory, random.Random(1).randbytes(65520) + seabios()[-16:]).mode is Mode.REAL_RESET


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(KERNELS)),
    length=st.integers(0, 0x1000),
    patches=st.lists(
        st.tuples(st.integers(0, 0x300), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)), max_size=6
    ),
    packed=st.booleans(),
)
def test_patched_kernel_is_checked(name: str, length: int, patches: list[tuple[int, int, int]], packed: bool) -> None:
    """hostile 54: some fields are changed, and the image may be cut and compressed."""
    image = bytearray(KERNELS[name])
    for offset, size, value in patches:
        image[offset : offset + size] = value.to_bytes(8, "little")[:size]
    data = bytes(image[length:] if length % 7 == 0 else image[: len(image) - length]) or b"\0"
    check_load(zlib.compress(data, wbits=31) if packed else data)
