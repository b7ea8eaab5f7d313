"""Each AML term has the encoding of the specification."""

import pytest

from vmd.vm import aml


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x10000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_integer_takes_its_shortest_form(value: int, encoded: str) -> None:
    """Zero and one have their own opcodes.  Other integers have a prefix for their width."""
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integer_outside_64_bits_is_refused(value: int) -> None:
    """AML has no encoding for such an integer."""
    with pytest.raises(ValueError, match=f"{value} is not an aml integer"):
        aml.integer(value)


def test_eisa_id_is_the_compressed_form() -> None:
    """PNP0A03 is 41 D0 0A 03 in memory, as in every DSDT with a PCI bus."""
    assert aml.eisa_id("PNP0A03").hex() == "0c41d00a03"


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("_HID", b"_HID"),
        ("_SB", b"_SB_"),
        ("\\_S5", b"\\_S5_"),
        ("PCI0.COM1", b"\x2ePCI0COM1"),
        ("\\_SB.PCI0.COM1", b"\\\x2f\x03_SB_PCI0COM1"),
    ],
)
def test_path_has_padded_segments_and_a_prefix(text: str, encoded: bytes) -> None:
    """The prefix tells one segment, two segments, and more."""
    assert aml.path(text) == encoded


def test_path_with_a_long_segment_is_refused() -> None:
    """A segment has at most four characters."""
    with pytest.raises(ValueError, match="FWCFG"):
        aml.path("_SB.FWCFG")


@pytest.mark.parametrize(
    ("content_bytes", "prefix"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "4104"),  # with a length of one byte it would be 64, which needs more than six bits
        (0xFFD, "4fff"),
        (0xFFE, "810001"),
        (0xFFFFC, "8fffff"),
        (0xFFFFD, "c1000001"),
    ],
)
def test_package_length_counts_itself(content_bytes: int, prefix: str) -> None:
    """Each width of the length is used up to its largest value."""
    encoded = aml.with_length(bytes(content_bytes))
    assert encoded[: -content_bytes or None].hex() == prefix
    assert len(encoded) == content_bytes + len(prefix) // 2


def test_package_length_has_a_limit() -> None:
    """A package length has at most 28 bits."""
    with pytest.raises(ValueError, match="too many"):
        aml.with_length(bytes(1 << 28))
