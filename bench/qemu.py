"""QEMU, as the other side of a comparison."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

COMMAND = (
    "qemu-system-x86_64", "-M", "microvm", "-accel", "kvm",
    "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
)  # fmt: skip


@contextlib.contextmanager
def qemu(kernel: Path, cmdline: str = "", *, memory_mib: int = 64) -> Iterator[subprocess.Popen[bytes]]:
    """Run a guest with its serial line on our pipe."""
    process = subprocess.Popen(
        [*COMMAND, "-m", str(memory_mib), "-serial", "stdio", "-kernel", kernel, "-append", cmdline],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
