"""Builds an initramfs from busybox, an init script and kernel modules.

    python -m tools.initramfs      makes one with tools/guest-init; prints the paths of a kernel and of the initramfs

This module writes the cpio archive itself, so it needs neither root for device nodes nor a staging folder.
"""

import gzip
import io
import lzma
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.debian_kernel import Kernel, KernelError, cache_dir, fetch, installed

GUEST_INIT = Path(__file__).parent / "guest-init"
# Drivers for the devices of our machines.  Modules that are missing or built in are skipped.
GUEST_MODULES = (
    "button", "evdev",
    "virtio_pci", "virtio_blk", "virtio_net", "virtio_scsi", "virtio_rng",
    "sd_mod", "sr_mod", "isofs", "vfat", "nls_cp437", "nls_ascii", "ext4", "crc32c_generic",
)  # fmt: skip
DIRECTORIES = ("bin", "dev", "etc", "mnt", "modules", "proc", "root", "run", "sys", "tmp")


class Cpio:
    """An archive in the kernel's `newc` form (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.inode = 0

    def add(self, name: str, mode: int, data: bytes = b"", rdev: tuple[int, int] = (0, 0)) -> None:
        """Append one file.  `mode` includes the file type."""
        self.inode += 1
        raw_name = name.encode() + b"\0"
        header = (self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(raw_name), 0)
        self.buffer.write(b"070701" + b"".join(b"%08X" % field for field in header) + raw_name)
        self._pad()
        self.buffer.write(data)
        self._pad()

    def finish(self) -> bytes:
        """Return the complete archive."""
        self.add("TRAILER!!!", 0)
        return self.buffer.getvalue()

    def _pad(self) -> None:
        self.buffer.write(bytes(-self.buffer.tell() % 4))


def build(init: Path, kernel: Kernel, modules: Sequence[str], extra: Sequence[Path] = ()) -> bytes:
    """Return a compressed initramfs: busybox, `/init`, `/modules` with its `order`, and `extra` in `/`.

    Raises KernelError if busybox or a program that finds the modules is missing.
    """
    busybox = shutil.which("busybox", path="/bin:/usr/bin")
    if busybox is None:
        raise KernelError("no busybox: install the package busybox-static")
    archive = Cpio()
    for name in DIRECTORIES:
        archive.add(name, stat.S_IFDIR | 0o755)
    # The kernel opens the console before init can mount a /dev.
    archive.add("dev/console", stat.S_IFCHR | 0o600, rdev=(5, 1))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, init.read_bytes())
    for path in extra:
        archive.add(path.name, stat.S_IFREG | 0o644, path.read_bytes())
    order = _load_order(kernel, modules)
    for path in order:
        archive.add(f"modules/{_plain_name(path)}", stat.S_IFREG | 0o644, _plain_module(path))
    listing = "".join(f"{_plain_name(path)}\n" for path in order)
    archive.add("modules/order", stat.S_IFREG | 0o644, listing.encode())
    return gzip.compress(archive.finish(), compresslevel=1, mtime=0)


def cached(name: str, init: Path, modules: Sequence[str], kernel: Kernel) -> Path:
    """Return an initramfs in the cache.  Rebuild it if one of its sources is newer.  Raises KernelError."""
    path = cache_dir() / f"{name}-{kernel.version}.initrd"
    sources = (init, Path(__file__), kernel.image)
    made = path.stat().st_mtime if path.exists() else 0
    if any(source.stat().st_mtime > made for source in sources):
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(build(init, kernel, modules))
        fresh.rename(path)  # atomic, because another run may be reading the old one
    return path


def guest(kernel: Kernel) -> Path:
    """Return the initramfs with guest-init, which takes its steps from the kernel's command line."""
    return cached("guest", GUEST_INIT, GUEST_MODULES, kernel)


def _load_order(kernel: Kernel, modules: Sequence[str]) -> list[Path]:
    """Return the files of the modules.  Each follows the modules that it needs."""
    command = ["/sbin/modprobe", "-d", str(kernel.root), "-S", kernel.version, "--show-depends", "--all"]
    try:
        # modprobe fails if this kernel lacks one module, but prints all others.
        done = subprocess.run([*command, *modules], capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelError("no modprobe: install the package kmod") from error
    lines = [line.split() for line in done.stdout.splitlines()]
    return list(dict.fromkeys(Path(words[1]) for words in lines if words and words[0] == "insmod"))


def _plain_name(path: Path) -> str:
    return path.name.partition(".")[0] + ".ko"


def _plain_module(path: Path) -> bytes:
    """Return a module uncompressed, because busybox's insmod cannot decompress it."""
    raw = path.read_bytes()
    match path.suffix:
        case ".gz":
            return gzip.decompress(raw)
        case ".xz":
            return lzma.decompress(raw)
        case ".zst":
            return subprocess.run(["zstd", "-dcq"], input=raw, capture_output=True, check=True).stdout
        case _:
            return raw


def main(arguments: list[str]) -> int:
    """Make the guest's initramfs for an installed kernel or, if there is none, for Debian's cloud kernel."""
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        kernel = installed() or fetch("cloud-amd64", cache_dir())
        print(kernel.image, guest(kernel))
    except (KernelError, OSError, subprocess.CalledProcessError) as error:
        print(f"initramfs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
