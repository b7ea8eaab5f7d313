"""Sizes as people write them: `1.5G`, `512M` (scan_scaled(3) and fmt_scaled(3) of OpenBSD).

Units are B K M G T P E, each 1024 times the one before it.  Both directions use whole-number arithmetic
and refuse what does not fit 64 signed bits.
"""

UNITS = "BKMGTPE"
INT64_MAX = (1 << 63) - 1
DIGITS_MAX = 19  # of the whole part, and of the fraction; more digits of a fraction make no difference


def scan_scaled(text: str) -> int:
    """Return a size in bytes.  A fraction of a byte is dropped.

    Unlike scan_scaled(3), this refuses a text without a digit.

    Raises:
        ValueError: `text` is malformed, or out of range.
    """
    rest = text.lstrip(" \t\n\v\f\r")
    sign = -1 if rest[:1] == "-" else 1
    rest = rest[1:] if rest[:1] in ("+", "-") else rest
    number = rest[:-1] if rest[-1:].upper() in tuple(UNITS) else rest
    factor = 1024 ** UNITS.index(rest[-1].upper()) if number != rest else 1
    whole, _, fraction = number.partition(".")
    digits = whole + fraction
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"invalid size: {text}")
    whole = whole.lstrip("0")
    if len(whole) > DIGITS_MAX:
        raise ValueError(f"size out of range: {text}")
    fraction = fraction[:DIGITS_MAX]
    size = int(whole or "0") * factor
    if fraction:
        size += int(fraction) * factor // 10 ** len(fraction)
    if size > INT64_MAX:
        raise ValueError(f"size out of range: {text}")
    return sign * size


def fmt_scaled(number: int) -> str:
    """Return a size with its unit: with one decimal below 100 of the unit, with none from 100 on (`1.5G`, `512M`).

    Raises:
        ValueError: `number` does not fit 64 signed bits.
    """
    size = abs(number)
    if size > INT64_MAX:
        raise ValueError(f"size out of range: {number}")
    if size < 1024:
        return f"{number}B"
    exponent = max(e for e in range(1, len(UNITS)) if size >= 1024**e)
    whole, rest = divmod(size, 1024**exponent)
    tenths = (rest // 1024 ** (exponent - 1) * 10 + 512) // 1024
    if tenths == 10:
        whole, tenths = whole + 1, 0
    sign = "-" if number < 0 else ""
    if whole >= 100:
        return f"{sign}{whole + (tenths >= 5)}{UNITS[exponent]}"
    return f"{sign}{whole}.{tenths}{UNITS[exponent]}"
