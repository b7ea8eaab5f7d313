"""Loads the boot image of a VM.  The kind of image is recognised by its bytes (arch. 4).

This runs after the VM process has started its devices and has given up starting processes.
"""


from vmd.closing import close
from vmd.errors import ImageError
from vmd.vm.boot import elf, firmware, linux, openbsd, pvh, unbootable
from vmd.vm.boot.image import UNPACKED_MAX, Image, unpack
from vmd.vm.boot.kind import Kind, kind_of
from vmd.vm.boot.start import Boot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.vm.boot.start import Memory, Start


def firmware_bytes(fd: int, name: str) -> int:
    """Return the size of the memory that `load` needs below 4 GiB: 0 unless `fd` is a firmware image.

    Raises:
        ImageError: a VM cannot boot this file.
        HostError: the file cannot be read.
    """
    image = Image(fd, name)
    return image.size if kind_of(image) is Kind.FIRMWARE else 0


def load(
    memory: "Memory",
    kernel_fd: int,
    name: str,
    *,
    memory_bytes: int,
    initrd_fd: int | None = None,
    initrd_name: str = "initrd",
    cmdline: bytes = b"",
    rsdp_gpa: int = 0,
    bootmac: bytes = b"",
    options: str = "",
) -> "Start":
    """Load a kernel with its parameters, or firmware, into guest memory.  Return how vCPU 0 starts.

    The caller still owns the descriptors; their file positions are not used.  If `rsdp_gpa` is 0, there are no ACPI
    tables.  `bootmac` is the link-layer address of the first NIC if the boot device is the network, else empty.
    `options` are those of boot(8), without the hyphen.

    Raises:
        ImageError: a file is not bootable, damaged or too large for this guest.  Memory may be partly written then.
        HostError: a file cannot be read, or the host has no memory to unpack it.
    """
    image = Image(kernel_fd, name)
    initrd = Image(initrd_fd, initrd_name) if initrd_fd is not None else None
    boot = Boot(
        memory_bytes=memory_bytes,
        cmdline=cmdline,
        initrd=initrd,
        rsdp_gpa=rsdp_gpa,
        bootmac=bootmac,
        options=options,
    )
    kind = kind_of(image)
    if kind is not Kind.GZIP:
        return _load_plain(memory, image, kind, boot)
    # A kernel that is larger than the guest's memory cannot be loaded, so more need not be unpacked.
    fd = unpack(image, min(UNPACKED_MAX, memory_bytes))
    try:
        inner, inner_kind = _unpacked_kernel(fd, image)
        return _load_plain(memory, inner, inner_kind, boot)
    finally:
        close(fd)


def _unpacked_kernel(fd: int, image: Image) -> tuple[Image, Kind]:
    """Return the unpacked image and its kind.  `image` is the compressed file.

    Raises ImageError if the content is not a kernel.
    """
    no_kernel = "is gzip-compressed, but does not contain a kernel: its content"
    try:
        inner = Image(fd, image.name)
        kind = kind_of(inner)
    except ImageError as error:
        raise image.error(f"{no_kernel} {error.what}") from None
    if kind is Kind.FIRMWARE:
        raise image.error(f"{no_kernel} is firmware, which has to be given uncompressed")
    if kind is Kind.GZIP:
        raise image.error(f"{no_kernel} is gzip-compressed again")
    return inner, kind


def _load_plain(memory: "Memory", image: Image, kind: Kind, boot: Boot) -> "Start":
    """Load an image that is not compressed."""
    if kind is Kind.LINUX:
        return linux.load(memory, image, boot)
    if kind is Kind.FIRMWARE:
        if boot.initrd is not None or boot.cmdline:
            raise image.error("is firmware, which takes no initrd and no command line")
        return firmware.load(memory, image)
    file = elf.parse(image)
    notes = elf.notes(file)
    entry = pvh.find_entry(notes)
    if entry is not None:
        return pvh.load(memory, file, entry, boot)
    if openbsd.is_kernel(file, notes):
        return openbsd.load(memory, file, boot)
    raise image.error(unbootable.elf_file(file, notes, pvh.damage(notes)))
