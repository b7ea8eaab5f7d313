"""bootprobe: tells whether a file can be booted, for `vmd -n`, which must not read the file itself.

Runs as  an id of its own, in the cell, confined to its descriptors before it reads the first byte
Peers    vmd -n, which starts it, asks it (`ipc/probing.py`), and kills it
Holds    its socket, a boot image and perhaps an initrd, for reading

A question has MEMORY_BYTES and CMDLINE, the latter in hexadecimal.

It uses the loaders of the VM process, so the error messages are the same as at a start.  The loaded bytes are dropped.
"""

import mmap
import os

from vmd.errors import HostError, ImageError
from vmd.ipc.probemsg import Probe, pack_error, pack_image
from vmd.ipc.probing import serve
from vmd.privsep.confine import BOOTPROBE, confine
from vmd.vm.boot import loader

IMAGE, INITRD = "image", "initrd"


class NoMemory:
    """Stands in for the memory of a guest: it stores nothing."""

    def write(self, gpa: int, data: bytes) -> None:
        """Store nothing."""

    def load(self, gpa: int, data: bytes) -> None:
        """Store nothing."""

    def view(self, _gpa: int, size: int) -> memoryview:
        """Return a buffer of the right size."""
        return memoryview(mmap.mmap(-1, size))


def answer(memory_bytes: int, cmdline: bytes, files: list[int]) -> bytes:
    """Return the answer for an open boot image and, if there is a second file, its initrd."""
    try:
        loader.load(
            NoMemory(),
            files[0],
            IMAGE,
            memory_bytes=memory_bytes,
            initrd_fd=files[1] if len(files) > 1 else None,
            initrd_name=INITRD,
            cmdline=cmdline,
        )
    except ImageError as error:
        return pack_error(f"{INITRD} {error.what}" if error.path == INITRD else error.what)
    except HostError as error:
        return pack_error(str(error))
    return pack_image(Probe(format="raw", size=os.fstat(files[0]).st_size))


def main() -> int:
    """Run process bootprobe: answer questions until the socket is closed."""
    confine(BOOTPROBE)
    return serve(lambda arguments, files: answer(int(arguments[0]), bytes.fromhex(arguments[1]), files))
