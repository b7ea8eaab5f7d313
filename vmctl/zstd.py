"""Decompression of zstd, if this Python has it: its own module from 3.14 on, backports.zstd or zstandard.

Only `vmctl create -i` reads such images.  The processes that read the images of VMs have only the standard library.
"""

import contextlib
import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

    from vmd.images.qcow2 import Unpack

OF_PYTHON = ("compression.zstd", "backports.zstd")  # the second is the same module for earlier versions
OTHER = "zstandard"
PACKAGES = "python3-zstandard, or backports.zstd by pip"


def find() -> "Unpack | None":
    """Return a function that decompresses zstd, or None if there is no module for it."""
    for name in OF_PYTHON:
        with contextlib.suppress(ImportError):
            return by_python(importlib.import_module(name))
    with contextlib.suppress(ImportError):
        return by_zstandard(importlib.import_module(OTHER))
    return None


def by_python(module: "ModuleType") -> "Unpack":
    """Return a function that uses Python's own module."""

    def unpack(packed: bytes, most: int) -> bytes:
        made = b""
        while packed and len(made) < most:  # there may be several frames
            one = module.ZstdDecompressor()
            try:
                made += one.decompress(packed, most - len(made))
            except module.ZstdError as error:
                raise ValueError(str(error)) from None
            packed = one.unused_data if one.eof else b""
        return made

    return unpack


def by_zstandard(module: "ModuleType") -> "Unpack":
    """Return a function that uses zstandard."""

    def unpack(packed: bytes, most: int) -> bytes:
        reader = module.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
        try:
            made: bytes = reader.read(most)
        except module.ZstdError as error:
            raise ValueError(str(error)) from None
        return made

    return unpack
