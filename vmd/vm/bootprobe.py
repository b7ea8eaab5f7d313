"""bootprobe: says whether a file can be booted, for `vmd -n`, which must not read it.

Runs as  an id of its own, in the cell, confined to its descriptors before it reads the first byte; for a moment
Peers    vmd -n, which starts it, asks it (`ipc/probing.py`), and kills it
Holds    its socket, a boot image and perhaps an initrd, for reading

It is asked with MEMORY_BYTES and CMDLINE, the latter in hexadecimal.

The loaders of VM processes do the work, so that the sentences are those of a start; what they load is thrown away.
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
    """What the loaders take for the memory of a guest."""

    def write(self, gpa: int, data: bytes) -> None:
        """Store nothing."""

    def load(self, gpa: int, data: bytes) -> None:
        """Store nothing."""

    def view(self, _gpa: int, size: int) -> memoryview:
        """Return room of the right size."""
        return memoryview(mmap.mmap(-1, size))


def answer(memory_bytes: int, cmdline: bytes, files: list[int]) -> bytes:
    """Return the line about an open boot image and, if there is another file, its initrd."""
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
    """Answer until nobody asks."""
    confine(BOOTPROBE)
    return serve(lambda arguments, files: answer(int(arguments[0]), bytes.fromhex(arguments[1]), files))
