"""Sizes with units, parsed and formatted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.scaled import INT64_MAX, fmt_scaled, scan_scaled


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("1k", 1 << 10),
        ("2M", 2 << 20),
        ("1.5G", 3 << 29),
        (".5G", 1 << 29),
        ("1.G", 1 << 30),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        ("+3K", 3072),
        ("-1K", -1024),
        (" 1K", 1024),
        ("0.0001K", 0),
        ("0" * 5000 + "1K", 1024),
        ("1." + "9" * 5000 + "K", 2047),
    ],
)
def test_scan(text: str, size: int) -> None:
    """Each unit is 1024 times the one before, and fractions of a byte are dropped."""
    assert scan_scaled(text) == size


@pytest.mark.parametrize("text", ["", "G", ".", ".G", "-", "1GB", "1X", "1 G", "1.2.3", "--1", "1_0", "\u0661", "1\0"])
def test_scan_refuses_what_is_no_size(text: str) -> None:
    """The message has the text."""
    with pytest.raises(ValueError, match="invalid size: "):
        scan_scaled(text)


@pytest.mark.parametrize("text", ["8E", "9223372036854775808", "9" * 20, "1" + "0" * 5000, "-8E", "99999999P"])
def test_scan_refuses_what_does_not_fit(text: str) -> None:
    """More than 63 bits are an error, and not a smaller number."""
    with pytest.raises(ValueError, match="size out of range: "):
        scan_scaled(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1.0K"),
        (1536, "1.5K"),
        (1280, "1.3K"),
        (1280 << 10, "1.3M"),
        (1945, "1.9K"),
        (1996, "1.9K"),
        (1997, "2.0K"),
        (100 * 1024 + 460, "100K"),
        (100 * 1024 + 461, "101K"),
        (-1536, "-1.5K"),
        (32 << 30, "32.0G"),
        (1 << 40, "1.0T"),
        (99 << 20, "99.0M"),
        ((100 << 20) - 1, "100M"),
        (512 << 20, "512M"),
        ((1 << 30) - 1, "1024M"),
        (INT64_MAX, "8.0E"),
    ],
)
def test_fmt(size: int, text: str) -> None:
    """There is one decimal below 100 of a unit, and none above."""
    assert fmt_scaled(size) == text


@pytest.mark.parametrize("size", [1 << 63, -(1 << 63)])
def test_fmt_refuses_what_does_not_fit(size: int) -> None:
    """fmt_scaled(3) refuses it, too: the smallest number has no absolute value."""
    with pytest.raises(ValueError, match="size out of range"):
        fmt_scaled(size)


@given(st.integers(0, INT64_MAX >> 1))
def test_fmt_is_close(size: int) -> None:
    """Parsing the formatted size gives the size, except for the rounding of the last digit."""
    assert abs(scan_scaled(fmt_scaled(size)) - size) <= max(size * 6 // 100, 1)


@given(st.text(max_size=12))
def test_scan_returns_or_refuses(text: str) -> None:
    """Every text gives a size in range, or ValueError."""
    try:
        size = scan_scaled(text)
    except ValueError:
        return
    assert abs(size) <= INT64_MAX
