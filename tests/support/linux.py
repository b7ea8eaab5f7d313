"""The stock Linux that real-guest tests boot: Debian's cloud kernel with an initramfs of ours."""

from pathlib import Path
from typing import NamedTuple

from tools import initramfs
from tools.debian_kernel import cache_dir, fetch


class LinuxGuest(NamedTuple):
    """What a `boot` line takes; the steps of `tools/guest-init` go on the command line as `vmdtest=`.

    Say `quiet` there as well: a character on the serial port is an exit, and inside the emulated machine the
    messages of a booting kernel take three times as long as the rest of its start.
    """

    kernel: Path
    initrd: Path


def linux_guest() -> LinuxGuest:
    """Return the guest, fetched or built when needed; raises KernelError."""
    kernel = fetch("cloud-amd64", cache_dir())
    return LinuxGuest(kernel.image, initramfs.guest(kernel))
