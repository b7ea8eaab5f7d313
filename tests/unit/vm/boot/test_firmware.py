"""Firmware images and their places in guest memory."""

import pytest

from tests.unit.vm.boot.samples import FakeMemory, load, seabios
from vmd.errors import ImageError
from vmd.vm import layout
from vmd.vm.boot.start import Mode

KIB = 1024


@pytest.mark.parametrize("size", [64 * KIB, 128 * KIB, 256 * KIB, 16 * KIB * KIB])
def test_image_ends_at_4_gib_and_its_last_128_kib_at_1_mib(size: int) -> None:
    """The reset vector is at both places."""
    memory = FakeMemory(firmware_bytes=size)
    image = seabios(size)

    start = load(memory, image)

    assert memory.read(layout.FOUR_GIB - size, size) == image
    shadow = min(size, 128 * KIB)
    assert memory.read(0x100000 - shadow, shadow) == image[-shadow:]
    assert memory.read(0xC0000, 128 * KIB) == bytes(128 * KIB)
    assert start.mode is Mode.REAL_RESET
    assert start.text == f"firmware of {size // KIB} KiB"


def test_firmware_takes_no_command_line() -> None:
    """A command line is refused, because firmware would not read it."""
    with pytest.raises(ImageError, match="is firmware, which takes no initrd and no command line"):
        load(FakeMemory(firmware_bytes=256 * KIB), seabios(), cmdline=b"quiet")
