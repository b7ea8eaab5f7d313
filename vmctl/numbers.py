"""Numbers on a command line."""

from vmctl.errors import ArgumentError
from vmd.config.model import COUNT_MAX


def count(text: str, what: str) -> int:
    """Return a number from 1.  Raises ArgumentError in the words of strtonum(3)."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        raise ArgumentError(f"{what} is invalid: {text}")
    if text.startswith("-") or not digits.strip("0"):
        raise ArgumentError(f"{what} is too small: {text}")
    if len(digits.lstrip("0")) > len(str(COUNT_MAX)) or int(digits) > COUNT_MAX:
        raise ArgumentError(f"{what} is too large: {text}")
    return int(digits)
