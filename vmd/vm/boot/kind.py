"""Recognises the kind of a boot image by its bytes."""


from vmd.enums import IntEnum
from vmd.units import KIB, MIB
from vmd.vm.boot import unbootable
from vmd.vm.boot.image import GZIP_MAGIC, Image

ELF_MAGIC = b"\x7fELF"
LINUX_MAGIC = b"HdrS"
LINUX_MAGIC_AT = 0x202

FIRMWARE_UNIT = 64 * KIB
FIRMWARE_MAX = 16 * MIB  # a larger image would overlap KVM's own pages, see vmd.vm.layout
RESET_VECTOR_BYTES = 16  # a processor starts in the last 16 bytes below 4 GiB
# These 16 bytes have room for a jump, and for a few instructions without operands before it.
BEFORE_JUMP = (b"\x90", b"\xfa", b"\xfc", b"\x66", b"\x0f\x08", b"\x0f\x09")  # nop cli cld data32 invd wbinvd
JUMPS = (b"\xe9", b"\xea", b"\xeb")

WRONG_KIND = (
    "is neither a kernel (ELF or Linux bzImage, either may be gzip-compressed) nor a firmware image "
    "(a multiple of 64 KiB up to 16 MiB that ends in a reset vector, a jump)"
)


class Kind(IntEnum):
    """The kinds of boot images."""

    GZIP = 0
    ELF = 1
    LINUX = 2
    FIRMWARE = 3


def kind_of(image: Image) -> Kind:
    """Return the kind of a file.

    Raises:
        ImageError: a VM cannot boot this file.
    """
    start = image.read(0, min(image.size, LINUX_MAGIC_AT + len(LINUX_MAGIC)), "its beginning")
    if start.startswith(GZIP_MAGIC):
        return Kind.GZIP
    if start.startswith(ELF_MAGIC):
        return Kind.ELF
    if start[LINUX_MAGIC_AT:] == LINUX_MAGIC:
        return Kind.LINUX
    # Magic numbers are looked at before the reset vector, which other files may have by chance.
    if what := unbootable.by_magic(image):
        raise image.error(what)
    if _is_firmware(image):
        return Kind.FIRMWARE
    raise image.error(unbootable.by_weak_magic(image) or WRONG_KIND)


def _is_firmware(image: Image) -> bool:
    """Return whether the file has the size of a firmware, and a jump at the reset vector."""
    if image.size % FIRMWARE_UNIT or image.size > FIRMWARE_MAX:
        return False
    vector = image.read(image.size - RESET_VECTOR_BYTES, RESET_VECTOR_BYTES, "its reset vector")
    while vector.startswith(BEFORE_JUMP):
        vector = vector[2 if vector.startswith(b"\x0f") else 1 :]
    return vector.startswith(JUMPS)
