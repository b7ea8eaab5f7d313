"""Firmware: a BIOS image that a real-mode CPU finds below 4 GiB and below 1 MiB."""

from vmd.vm import layout
from vmd.vm.boot.start import Mode, Start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.vm.boot.image import Image
    from vmd.vm.boot.start import Memory

# Only this much of its end shows below 1 MiB, as with QEMU's i440FX.  SeaBIOS copies the rest down itself
# when it has unlocked its shadow RAM, and option ROMs are looked for where that rest would lie before.
SHADOW_BYTES = 128 * layout.KIB
CHUNK = 1 * layout.MIB


def load(memory: "Memory", image: "Image") -> Start:
    """Copy the image to both its places; the vCPU stays as its reset left it.

    Memory of the image's size below 4 GiB has been made before, read-only for the guest.

    Raises:
        ImageError: the file became shorter.
        HostError: it cannot be read.
    """
    for offset in range(0, image.size, CHUNK):
        piece = image.read(offset, min(CHUNK, image.size - offset), "the firmware")
        memory.load(layout.FOUR_GIB - image.size + offset, piece)
    shadow = min(image.size, SHADOW_BYTES)
    memory.write(layout.RESERVED_END - shadow, image.read(image.size - shadow, shadow, "the firmware"))
    return Start(text=f"firmware of {image.size // layout.KIB} KiB", mode=Mode.REAL_RESET)
