"""What a boot image is, told from its own bytes."""


from vmd.enums import IntEnum
from vmd.vm.boot import unbootable
from vmd.vm.boot.image import GZIP_MAGIC, KIB, MIB, Image

ELF_MAGIC = b"\x7fELF"
LINUX_MAGIC = b"HdrS"
LINUX_MAGIC_AT = 0x202

FIRMWARE_UNIT = 64 * KIB
FIRMWARE_MAX = 16 * MIB  # more would reach down to KVM's own pages, see vmd.vm.layout
RESET_VECTOR_BYTES = 16  # a CPU starts in the last paragraph below 4 GiB
# There is no room but for a jump; a few instructions without operands may stand before it.
BEFORE_JUMP = (b"\x90", b"\xfa", b"\xfc", b"\x66", b"\x0f\x08", b"\x0f\x09")  # nop cli cld data32 invd wbinvd
JUMPS = (b"\xe9", b"\xea", b"\xeb")

WRONG_KIND = (
    "is neither a kernel (ELF or Linux bzImage, either may be gzip-compressed) nor a firmware image "
    "(a multiple of 64 KiB up to 16 MiB that ends in a reset vector, a jump)"
)


class Kind(IntEnum):
    """What a boot image is."""

    GZIP = 0
    ELF = 1
    LINUX = 2
    FIRMWARE = 3


def kind_of(image: Image) -> Kind:
    """Tell what a file is.

    Raises:
        ImageError: it is nothing that a VM can boot.
    """
    start = image.read(0, min(image.size, LINUX_MAGIC_AT + len(LINUX_MAGIC)), "its beginning")
    if start.startswith(GZIP_MAGIC):
        return Kind.GZIP
    if start.startswith(ELF_MAGIC):
        return Kind.ELF
    if start[LINUX_MAGIC_AT:] == LINUX_MAGIC:
        return Kind.LINUX
    # The magic numbers come before the reset vector, which is the weaker sign.
    if what := unbootable.by_magic(image):
        raise image.error(what)
    if _is_firmware(image):
        return Kind.FIRMWARE
    raise image.error(unbootable.by_weak_magic(image) or WRONG_KIND)


def _is_firmware(image: Image) -> bool:
    """Return whether the file has the size of a firmware, and a jump where the CPU starts."""
    if image.size % FIRMWARE_UNIT or image.size > FIRMWARE_MAX:
        return False
    vector = image.read(image.size - RESET_VECTOR_BYTES, RESET_VECTOR_BYTES, "its reset vector")
    while vector.startswith(BEFORE_JUMP):
        vector = vector[2 if vector.startswith(b"\x0f") else 1 :]
    return vector.startswith(JUMPS)
