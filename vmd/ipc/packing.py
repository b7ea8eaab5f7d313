"""msgpack, without the modules that it loads for extension types and time stamps.  No message has these."""

import sys

# msgpack imports `datetime`.  Its C module is enough; loading the Python module costs each command and each process
# more than a millisecond.
sys.modules.setdefault("datetime", __import__("_datetime"))


class NoExtension:
    """Replaces msgpack's two classes of extensions.  Making one raises ValueError."""

    def __init__(self, *_: object) -> None:
        raise ValueError("an extension type")

    from_bytes = __init__


# Only in processes of vmd and vmctl: another program that imports vmd.client may use `msgpack.ext` itself.
if "vmd.privsep.start" in sys.modules:
    # `msgpack.ext` imports `collections`: 0.4 MiB, and two milliseconds.
    ext = sys.modules.setdefault("msgpack.ext", type(sys)("msgpack.ext"))
    ext.__dict__.setdefault("ExtType", NoExtension)
    ext.__dict__.setdefault("Timestamp", NoExtension)

from msgpack import packb, unpackb  # noqa: E402  only after the replacements above

__all__ = ["packb", "unpackb"]
