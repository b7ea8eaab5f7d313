"""Starts QEMU, the other side of the comparisons."""

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

COMMAND = (
    "qemu-system-x86_64", "-accel", "kvm", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
)  # fmt: skip
MICROVM = ("-M", "microvm")
# A machine with PCI, and the firmware that starts a kernel fastest.
PC = ("-M", "pc", "-bios", "/usr/share/qemu/qboot.rom")


@contextlib.contextmanager
def qemu(
    kernel: Path,
    cmdline: str = "",
    *,
    memory_mib: int = 64,
    machine: Sequence[str] = MICROVM,
    devices: Sequence[str] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a guest whose serial line is connected to pipes of this process."""
    boot = ("-kernel", kernel, "-append", cmdline)
    process = subprocess.Popen(
        [*COMMAND, *machine, "-m", str(memory_mib), "-serial", "stdio", *devices, *boot],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
