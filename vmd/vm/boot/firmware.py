"""Firmware: loads a BIOS image below 4 GiB and below 1 MiB, where a processor in real mode finds it."""

from vmd.units import KIB, MIB
from vmd.vm import layout
from vmd.vm.boot.start import Mode, Start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.vm.boot.image import Image
    from vmd.vm.boot.start import Memory

# Only this much of the end of the image is below 1 MiB, as with QEMU's i440FX.  SeaBIOS itself copies the rest down
# when it has unlocked shadow RAM.  Before that, it looks for option ROMs in the place of that rest.
SHADOW_BYTES = 128 * KIB
CHUNK = 1 * MIB


def load(memory: "Memory", image: "Image") -> Start:
    """Copy the image to both places.  The vCPU stays in its reset state.

    The machine already has memory of the image's size below 4 GiB, which is read-only for the guest.

    Raises:
        ImageError: the file became shorter.
        HostError: the file cannot be read.
    """
    for offset in range(0, image.size, CHUNK):
        piece = image.read(offset, min(CHUNK, image.size - offset), "the firmware")
        memory.load(layout.FOUR_GIB - image.size + offset, piece)
    shadow = min(image.size, SHADOW_BYTES)
    memory.write(layout.RESERVED_END - shadow, image.read(image.size - shadow, shadow, "the firmware"))
    return Start(text=f"firmware of {image.size // KIB} KiB", mode=Mode.REAL_RESET)
