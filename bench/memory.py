"""The memory overhead of a VM with a disk, an interface and entropy, while many VMs run.

The overhead is the proportional set size (PSS) of the private and file-backed pages of all processes of the VM.  Each
sharer of a page counts an equal part of it.  The guest sleeps on both sides.  Guest memory is a shared file on both
sides, and does not count.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from bench.qemu import MICROVM, qemu
from bench.table import Row
from tests.support.console import Console
from tests.support.hostnet import NetDaemon
from tests.support.network import Network
from tests.support.pss import pss_kib

VMS = 200
MEMORY_MIB = 16
DISK_BYTES = 16 << 20
DEADLINE_S = 120.0
EACH_MIB = 15.0  # goal for each VM
OF_VMS = "vmd: vm/"


def measure(directory: Path, guest: Callable[[str], Path]) -> list[Row]:
    """Run VMS VMs under vmd, then under QEMU."""
    kernel = guest("tick")
    images = make_images(directory)
    with Network() as network:
        ours, core = under_vmd(directory, network, kernel, images)
        theirs = under_qemu(network, kernel, images)
    what = f"of {VMS} VMs (pss)"
    return [
        Row(f"memory of each {what}", "MiB", ours, theirs, limit=EACH_MIB),
        Row(f"memory of the daemon {what}", "MiB", [core]),
    ]


def make_images(directory: Path, count: int = VMS) -> list[Path]:
    """Create an empty disk for each VM."""
    images = [directory / f"image{number}" for number in range(count)]
    for image in images:
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
    return images


def configuration(kernel: Path, images: list[Path], more: str = "") -> str:
    """Return a vm.conf with a VM for each image.  `more` are further options of each VM."""
    return "".join(
        f'vm "n{number}" {{\n{more} memory {MEMORY_MIB}M\n boot "{kernel}" cmdline "idle"\n'
        f' disk "{image}"\n interface\n}}\n'
        for number, image in enumerate(images)
    )


def under_vmd(directory: Path, network: Network, kernel: Path, images: list[Path]) -> tuple[list[float], float]:
    """Return the overhead of each VM, and the memory of all other processes together."""
    conf = configuration(kernel, images, " disable\n")
    each: defaultdict[str, float] = defaultdict(float)
    with NetDaemon(directory, network, conf) as vmd:
        for number in range(VMS):
            vmd.must("start", f"n{number}")
        settle()
        core = pss_kib(vmd.pid) / 1024
        for title, pid in vmd.processes().items():
            mib = pss_kib(pid) / 1024
            if title.startswith(OF_VMS):
                each[title.removeprefix(OF_VMS).partition("/")[0]] += mib
            else:
                core += mib
        vmd.must("stop", "-afw", timeout_s=DEADLINE_S)
    assert len(each) == VMS
    return list(each.values()), core


def under_qemu(network: Network, kernel: Path, images: list[Path]) -> list[float]:
    """Return the overhead of each VM."""
    with contextlib.ExitStack() as stack, network.inside():
        processes = [
            stack.enter_context(
                qemu(
                    kernel,
                    "idle",
                    memory_mib=MEMORY_MIB,
                    machine=(*MICROVM, "-machine", "memory-backend=ram"),
                    devices=(
                        "-object", f"memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on",
                        "-drive", f"id=disk,file={image},format=raw,if=none",
                        "-device", "virtio-blk-device,drive=disk",
                        "-netdev", f"tap,id=net,ifname=qemu{number},script=no,downscript=no,vhost=off",
                        "-device", "virtio-net-device,netdev=net",
                        "-device", "virtio-rng-device",
                    ),
                )
            )
            for number, image in enumerate(images)
        ]  # fmt: skip
        for process in processes:
            assert process.stdout is not None
            Console(process.stdout.fileno()).expect("READY", DEADLINE_S)
        settle()
        return [pss_kib(process.pid) / 1024 for process in processes]


def settle() -> None:
    """Wait until the processes that have just started are idle."""
    time.sleep(2.0)
