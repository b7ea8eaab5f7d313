"""seeder: makes the seed of a VM from its user's texts, for an opener, which must not parse them.

Runs as  an id of its own, in the cell, confined to its descriptors before it reads the first byte; for one VM
Peers    an opener, which asks it (`ipc/probing.py`); the parent starts it, and kills it with the opener
Holds    its socket, and two memory files: the parts of a seed, and the disk image that it writes
"""

import os

from vmd.errors import sentence
from vmd.ipc.imsg import unpack
from vmd.ipc.probing import serve
from vmd.ipc.seedmsg import pack_error, pack_made
from vmd.memfile import CONSTANT, seal
from vmd.privsep.confine import SEEDER, confine, limit_memory
from vmd.seed.documents import notes, seed_image
from vmd.seed.parts import PARTS_MAX, SeedError, SeedParts

MEMORY_BYTES = 256 << 20


def answer(files: list[int]) -> bytes:
    """Write a seed to the second file and seal it.  Return the line that describes it."""
    source, target = files
    try:
        raw = os.pread(source, PARTS_MAX + 1, 0)
        if len(raw) > PARTS_MAX:
            return pack_error(f"its files have together more than {PARTS_MAX >> 20} MiB")
        parts = unpack(SeedParts, raw)
        write(target, seed_image(parts))
        seal(target, CONSTANT)
    except SeedError as error:
        return pack_error(str(error))
    except (OSError, ValueError) as error:
        return pack_error(f"cannot be made: {sentence(error)}")
    return pack_made(notes(parts))


def write(fd: int, data: bytes) -> None:
    """Write all of it.  Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def main() -> int:
    """Answer requests until the opener closes the socket."""
    limit_memory(MEMORY_BYTES)  # the confinement forbids it later
    confine(SEEDER)  # the parent has logged what this kernel lacks
    return serve(lambda _arguments, files: answer(files))
