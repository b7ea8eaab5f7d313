"""msgpack, without what it loads for time stamps, which no message has."""

import sys

# It wants `datetime`.  The C half of that is enough, and all that is left of it in the end; the other half costs each
# command and each process more than a millisecond.
sys.modules.setdefault("datetime", __import__("_datetime"))

from msgpack import packb, unpackb  # noqa: E402  after that

__all__ = ["packb", "unpackb"]
