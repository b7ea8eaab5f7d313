"""The stock Linux that real-guest tests boot: Debian's cloud kernel with an initramfs of ours."""

from pathlib import Path
from typing import NamedTuple

from tools import initramfs
from tools.debian_kernel import cache_dir, fetch


class LinuxGuest(NamedTuple):
    """Kernel and initramfs for a `boot` line.  `vmdtest=` on the command line selects steps of `tools/guest-init`.

    Put `quiet` there too: every character on the serial port is a VM exit.  In the emulated machine, the messages of a
    booting kernel take three times as long as the rest of its start.
    """

    kernel: Path
    initrd: Path


def linux_guest() -> LinuxGuest:
    """Return the guest, which is fetched or built if necessary.  Raises KernelError."""
    kernel = fetch("cloud-amd64", cache_dir())
    return LinuxGuest(kernel.image, initramfs.guest(kernel))
