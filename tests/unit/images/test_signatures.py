"""Each recognised format has a name, and the guard checks the same bytes as the recognition."""

import bz2
import gzip
import lzma

import pytest

from fuzz.seeds import seeds
from vmd.images.signatures import (
    DISC_NAMES,
    DISC_SIGNATURES,
    HEAD_BYTES,
    SIGNATURES,
    TAIL_BYTES,
    recognise,
    recognise_disc,
)
from vmd.ipc.foreign import FOREIGN

ELSEWHERE = {"QCOW", "OVA", "OVF", "DMG"}  # not recognised by a single signature


def test_every_format_has_a_name_and_is_recognised() -> None:
    """A format needs an entry in both tables."""
    named = {name for name, _, _ in (*SIGNATURES, *DISC_SIGNATURES)}

    assert named | ELSEWHERE == set(FOREIGN)


def test_every_signature_is_recognised_where_the_guard_looks() -> None:
    """All signatures are within the guarded bytes, and none hides another."""
    for name, at, signature in SIGNATURES:
        head = (bytes(at) + signature).ljust(HEAD_BYTES, b"\0")
        assert len(head) == HEAD_BYTES
        assert recognise(head, bytes(TAIL_BYTES)) == name


def test_signatures_are_at_their_places() -> None:
    """All but a few are at the start."""
    assert {(name, at) for name, at, _ in SIGNATURES if at} == {("VDI", 0x40), ("tar", 257), ("kernel", 0x202)}
    assert {at for _, at, _ in DISC_SIGNATURES} == {0}


def test_every_seed_of_the_fuzzer_is_recognised() -> None:
    """A seed without a format would be useless."""
    found = [
        recognise_disc(seed[:HEAD_BYTES], seed[-TAIL_BYTES:], seed[0x8000 : 0x8000 + 2048])
        for seed in seeds("identify")
    ]

    assert found.count("") == 1  # the disc
    assert set(found) == {"", *FOREIGN} - {"QCOW"}


def test_zeroes_complete_no_signature() -> None:
    """Guests may write whole sectors of zeros without a check."""
    for _, at, signature in SIGNATURES:
        first, last = at // 512, (at + len(signature) - 1) // 512
        assert first == last
        assert any(signature)


def test_compressed_data_is_recognised() -> None:
    """At each level, and also if it is empty."""
    for data in (b"", b"data" * 1000):
        for level in range(1, 10):
            assert recognise(bz2.compress(data, level)[:HEAD_BYTES], b"") == "bzip2"
            assert recognise(gzip.compress(data, level)[:HEAD_BYTES], b"") == "gzip"
        assert recognise(lzma.compress(data)[:HEAD_BYTES], b"") == "xz"


@pytest.mark.parametrize("at", [1, 9])
@pytest.mark.parametrize("name", DISC_NAMES)
def test_disc_may_begin_with_any_bytes(name: bytes, at: int) -> None:
    """Its first descriptor says that it is one."""
    head = b"PK\3\4".ljust(HEAD_BYTES, b"\0")
    descriptor = (bytes(at) + name).ljust(2048, b"\0")
    assert recognise_disc(head, bytes(TAIL_BYTES), descriptor) == ""
    assert recognise_disc(head, bytes(TAIL_BYTES), b"\0" + descriptor[:-1]) == "zip"


@pytest.mark.parametrize(
    ("cookie", "kind", "found"),
    [(b"conectix", 2, "VHD"), (b"conectix", 3, ""), (b"conectiy", 2, ""), (b"\0" * 8, 2, "")],
)
def test_footer_of_a_fixed_vhd(cookie: bytes, kind: int, found: str) -> None:
    """Others have a copy of it at their beginning.  It is a sector."""
    tail = (cookie.ljust(60, b"\0") + kind.to_bytes(4, "big")).ljust(TAIL_BYTES, b"\0")
    assert recognise(bytes(HEAD_BYTES), tail) == found
    assert recognise(bytes(HEAD_BYTES), tail[:-1]) == ""
