"""bootprobe: says whether a file can be booted, for `vmd -n`, which must not read it.

Runs as  an id of its own, in the cell, confined to its descriptors before it reads the first byte; for a moment
Peers    vmd -n (starts it, reads one line of `ipc/probemsg.py`, kills it if that takes too long)
Holds    a boot image and perhaps an initrd, for reading, and a pipe's writing end

    bootprobe MEMORY_BYTES CMDLINE [initrd]     the image is fd 4, the initrd fd 5; CMDLINE is in hexadecimal

The loaders of VM processes do the work, so that the sentences are those of a start; what they load is thrown away.
"""

import mmap
import os
import sys

from vmd.errors import HostError, ImageError
from vmd.ipc.probemsg import FD_ANSWER, FD_IMAGE, FD_INITRD, Probe, pack_error, pack_image
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


def answer(memory_bytes: int, cmdline: bytes, *, has_initrd: bool) -> bytes:
    """Return the line about an open boot image."""
    try:
        loader.load(
            NoMemory(),
            FD_IMAGE,
            IMAGE,
            memory_bytes=memory_bytes,
            initrd_fd=FD_INITRD if has_initrd else None,
            initrd_name=INITRD,
            cmdline=cmdline,
        )
    except ImageError as error:
        return pack_error(f"{INITRD} {error.what}" if error.path == INITRD else error.what)
    except HostError as error:
        return pack_error(str(error))
    return pack_image(Probe(format="raw", size=os.fstat(FD_IMAGE).st_size))


def main() -> int:
    """Answer and be gone."""
    memory_bytes, cmdline = int(sys.argv[1]), bytes.fromhex(sys.argv[2])
    confine(BOOTPROBE)
    line = memoryview(answer(memory_bytes, cmdline, has_initrd=len(sys.argv) > 3))
    while line:
        line = line[os.write(FD_ANSWER, line) :]
    return 0
