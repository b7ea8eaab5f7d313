"""Third-party kernels as `boot` images of several kinds.  They are fetched or made once, and kept in a cache."""

import gzip
import os
import struct
import subprocess
from pathlib import Path

from tests.support.linux import linux_guest
from tools.debian_kernel import KernelError, cache_dir, fetch_package

SECTOR = 512
SETUP_SECTS_AT, PAYLOAD_AT = 0x1F1, 0x248  # in the setup header of a bzImage
PAYLOAD = struct.Struct("<II")  # offset and length of the compressed kernel in its code
SIZE_BYTES = 4  # the size of the unpacked kernel follows the payload
UNPACKERS = {b"\x02\x21\x4c\x18": "lz4", b"\xfd7zXZ": "xz", b"\x1f\x8b\x08": "gzip"}


def memtest86(bits: str) -> Path:
    """Return Debian's memtest86+, unchanged: `x64` or `ia32`.  Raises KernelError."""
    home = cache_dir() / "memtest86+"
    if not home.exists():
        fetch_package("memtest86+", home)
    return home / "boot" / f"memtest86+{bits}.bin"


def packed_linux() -> Path:
    """Return Debian's kernel, a bzImage, as a gzip file of two members with padding.  Raises KernelError."""
    kernel = linux_guest().kernel
    path = kernel.with_name(f"{kernel.name}.gz")
    if not path.exists():
        data = kernel.read_bytes()
        half = len(data) // 2
        members = (gzip.compress(part, compresslevel=1, mtime=0) for part in (data[:half], data[half:]))
        _write(path, b"".join(members) + bytes(SECTOR))
    return path


def vmlinux() -> Path:
    """Return the ELF file inside Debian's bzImage.  Raises KernelError."""
    kernel = linux_guest().kernel
    path = kernel.with_name(kernel.name.replace("vmlinuz", "vmlinux"))
    if not path.exists():
        image = kernel.read_bytes()
        offset, size = PAYLOAD.unpack_from(image, PAYLOAD_AT)
        start = (image[SETUP_SECTS_AT] + 1) * SECTOR + offset
        packed = image[start : start + size - SIZE_BYTES]
        program = next((name for magic, name in UNPACKERS.items() if packed.startswith(magic)), None)
        if program is None:
            raise KernelError(f"{kernel}: compressed by something that begins with {packed[:6].hex()}")
        done = subprocess.run([program, "-dc"], input=packed, capture_output=True, check=False)
        if done.returncode != 0:
            raise KernelError(f"{program} -dc: {done.stderr.decode(errors='replace').strip()}")
        _write(path, done.stdout)
    return path


def _write(path: Path, data: bytes) -> None:
    """Write a file that appears only when it is complete."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_bytes(data)
    fresh.rename(path)
