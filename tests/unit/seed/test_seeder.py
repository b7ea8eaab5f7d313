"""What seeder answers, and what it leaves in its memory files."""

import os

import pytest

from vmd.ipc.imsg import pack
from vmd.ipc.seedmsg import unpack
from vmd.memfile import is_constant, memory_file
from vmd.seed.documents import notes, seed_image
from vmd.seed.parts import PARTS_MAX, SeedFile, SeedParts
from vmd.seed.seeder import answer

PARTS = SeedParts(vm="web", hostname="web", user_data=SeedFile(name="/u", data=b"#cloud-config\n"))


def answered(raw: bytes) -> tuple[list[str] | str, bytes, bool]:
    """Return the answer about these parts, the disk, and whether it is sealed."""
    source, target = memory_file("parts"), memory_file("seed")
    try:
        os.write(source, raw)
        line = answer([source, target])
        return unpack(line), os.pread(target, 1 << 22, 0), is_constant(target)
    finally:
        os.close(source)
        os.close(target)


def test_a_disk_is_made() -> None:
    """Nobody can change it.  The notes are for the user."""
    assert answered(pack(PARTS)) == (notes(PARTS), seed_image(PARTS), True)


def test_a_user_s_mistake_is_named() -> None:
    """No disk is made then."""
    parts = PARTS.replace(keys=(SeedFile(name="/k", data=b""),))

    assert answered(pack(parts)) == ("ssh-key /k: no key in it", b"", False)


@pytest.mark.parametrize("raw", [b"", b"\xc1", bytes(PARTS_MAX)])
def test_what_are_no_parts(raw: bytes) -> None:
    """The opener is not trusted to have checked them."""
    said, disk, sealed = answered(raw)

    assert isinstance(said, str)
    assert said.startswith("cannot be made: ")
    assert (disk, sealed) == (b"", False)


def test_parts_that_are_too_large() -> None:
    """They are not unpacked."""
    assert answered(bytes(PARTS_MAX + 1)) == ("its files have together more than 4 MiB", b"", False)
