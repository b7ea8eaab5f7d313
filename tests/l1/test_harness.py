"""Tests the basis of the real-guest tests with QEMU as the VMM: KVM, kernel, initramfs, console."""

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.linux import LinuxGuest

pytestmark = [pytest.mark.l1, pytest.mark.timeout(300)]

BOOT_S = 120
MEMORY_MIB = 512


class Monitor:
    """QEMU's monitor, for the power button only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def press_power_button(self) -> None:
        """Press the power button."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(10)
            monitor.connect(str(self.path))
            monitor.sendall(b"system_powerdown\n")
            monitor.shutdown(socket.SHUT_WR)
            while monitor.recv(4096):  # QEMU closes the connection after the command
                pass


@pytest.fixture
def qemu(linux: LinuxGuest, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Monitor]]:
    """QEMU with this KVM boots the guest, with two processors and a network.  The guest waits for the power button."""
    path = tmp_path / "monitor"
    process = subprocess.Popen(
        [
            "qemu-system-x86_64", "-M", "pc", "-accel", "kvm", "-cpu", "host", "-smp", "2", "-m", str(MEMORY_MIB),
            "-display", "none", "-vga", "none", "-nodefaults", "-no-reboot",
            "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
            "-serial", "stdio", "-monitor", f"unix:{path},server=on,wait=off",
            "-kernel", str(linux.kernel), "-initrd", str(linux.initrd),
            "-append", "console=ttyS0 quiet panic=-1 vmdtest=info,dhcp,wait",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with process:
        yield process, Monitor(path)
        process.kill()


def test_kvm_is_the_real_thing() -> None:
    """The KVM module for the processor is loaded, and its device can be opened."""
    loaded = [name for name in ("kvm_amd", "kvm_intel") if Path("/sys/module", name).exists()]
    print(f"{loaded[0]} on {Path('/proc/sys/kernel/osrelease').read_text().strip()}")
    assert Path("/dev/kvm").is_char_device()


def test_stock_kernel_boots_and_obeys_the_power_button(
    qemu: tuple[subprocess.Popen[bytes], Monitor],
) -> None:
    """Debian's cloud kernel starts our init, detects its machine, gets a lease, and obeys the power button."""
    process, monitor = qemu
    assert process.stdout is not None
    console = Console(process.stdout.fileno())

    began = time.monotonic()
    console.expect("userspace is up", BOOT_S)
    print(f"userspace after {time.monotonic() - began:.1f} s")
    facts = console.expect("READY", BOOT_S)
    monitor.press_power_button()
    farewell = console.expect("BUTTON", BOOT_S)
    console.drain(BOOT_S)

    print(f"{facts.strip()}\noff after {time.monotonic() - began:.1f} s")
    assert "processors: 2" in facts
    memory = re.search(r"memory: (\d+) KiB", facts)
    assert memory is not None
    assert (MEMORY_MIB - 128) * 1024 < int(memory[1]) < MEMORY_MIB * 1024
    assert re.search(r"virtio: virtio0 0x0001 0x0000000f", facts)  # a network card with its driver
    assert "dhcp: eth0 10.0.2.15/" in facts
    assert farewell.strip() == "BUTTON"
    assert process.wait(10) == 0
