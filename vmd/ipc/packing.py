"""msgpack, without what it loads for extension types and time stamps, which no message has."""

import sys

# It wants `datetime`.  The C half of that is enough, and all that is left of it in the end; the other half costs each
# command and each process more than a millisecond.
sys.modules.setdefault("datetime", __import__("_datetime"))


class NoExtension:
    """Stands for msgpack's two classes of extensions.  Raises ValueError for whoever wants one made."""

    def __init__(self, *_: object) -> None:
        raise ValueError("an extension type")

    from_bytes = __init__


if "vmd.privsep.start" in sys.modules:  # this process is one of ours, and has nobody else's code in it
    # `msgpack.ext` brings `collections` along: 0.4 MiB, and two milliseconds.
    ext = sys.modules.setdefault("msgpack.ext", type(sys)("msgpack.ext"))
    ext.__dict__.setdefault("ExtType", NoExtension)
    ext.__dict__.setdefault("Timestamp", NoExtension)

from msgpack import packb, unpackb  # noqa: E402  after that

__all__ = ["packb", "unpackb"]
