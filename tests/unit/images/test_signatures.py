"""Formats that are recognised have a name, and whatever is looked at is what a guard looks at."""

from fuzz.seeds import seeds
from vmd.images.signatures import DISC_SIGNATURES, HEAD_BYTES, SIGNATURES, TAIL_BYTES, recognise, recognise_disc
from vmd.ipc.foreign import FOREIGN

ELSEWHERE = {"QCOW", "OVA", "OVF", "DMG"}  # not told by a single signature


def test_every_format_has_a_name_and_is_recognised() -> None:
    """The two tables belong together: forgetting one of them is noticed here."""
    named = {name for name, _, _ in (*SIGNATURES, *DISC_SIGNATURES)}

    assert named | ELSEWHERE == set(FOREIGN)


def test_every_signature_is_recognised_where_the_guard_looks() -> None:
    """None stands behind the bytes that it watches, and none hides another."""
    for name, at, signature in SIGNATURES:
        head = (bytes(at) + signature).ljust(HEAD_BYTES, b"\0")
        assert len(head) == HEAD_BYTES
        assert recognise(head, bytes(TAIL_BYTES)) == name


def test_every_seed_of_the_fuzzer_is_something() -> None:
    """A seed that is nothing leads nowhere."""
    found = [
        recognise_disc(seed[:HEAD_BYTES], seed[-TAIL_BYTES:], seed[0x8000 : 0x8000 + 2048])
        for seed in seeds("identify")
    ]

    assert found.count("") == 1  # the one that is a disc
    assert set(found) == {"", *FOREIGN} - {"QCOW"}


def test_zeroes_complete_no_signature() -> None:
    """Guests write zeroes in whole sectors without a guard."""
    for _, at, signature in SIGNATURES:
        first, last = at // 512, (at + len(signature) - 1) // 512
        assert first == last
        assert any(signature)
