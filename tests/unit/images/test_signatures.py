"""Each recognised format has a name, and the guard checks the same bytes as the recognition."""

from fuzz.seeds import seeds
from vmd.images.signatures import DISC_SIGNATURES, HEAD_BYTES, SIGNATURES, TAIL_BYTES, recognise, recognise_disc
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
