"""Unchanged kernels of other projects: each kind of `boot` image runs up to its own screen or console."""

import re
import time
from pathlib import Path

import pytest

from tests.support.daemon import Attached, Daemon
from tests.support.kernels import memtest86, packed_linux, vmlinux
from tests.support.linux import LinuxGuest

pytestmark = [pytest.mark.l1, pytest.mark.deep, pytest.mark.timeout(400)]

BOOT_S = 150
PROGRESS_S = 60


def block(boot: Path, cmdline: str, *lines: str) -> str:
    """Return the block of a VM that boots this image."""
    options = "\n".join(f"    {line}" for line in ("disable", f'boot "{boot}" cmdline "{cmdline}"', *lines))
    return f'vm "other" {{\n{options}\n}}\n'


def screen(text: str, rows: int = 25, columns: int = 80) -> list[str]:
    """Return the screen of a terminal after these bytes.  memtest86+ uses only cursor positions."""
    cells = [[" "] * columns for _ in range(rows)]
    row = column = 0
    for position, character in re.findall(r"\x1b\[(\d+;\d+H|[?\d]*[A-Za-z])|([^\x1b])", text):
        if position.endswith("H"):
            row, column = (int(number) - 1 for number in position[:-1].split(";"))
        elif character and character.isprintable() and row < rows and column < columns:
            cells[row][column] = character
            column += 1
    return ["".join(line).rstrip() for line in cells]


def field(shown: list[str], pattern: str) -> str:
    """Return the first group of a pattern that matches one row of the screen, or "" if no row matches."""
    found = re.search(pattern, "\n".join(shown))
    return found[1].strip() if found else ""


def watch_memtest(console: Attached) -> None:
    """Wait for the screen of memtest86+, and for progress of its test."""
    console.expect("Memtest86+ v", BOOT_S)
    console.expect("Errors: ", BOOT_S)
    began = time.monotonic()
    seen = set()
    while True:
        console.expect("Errors: ", PROGRESS_S)  # the last row of a refreshed screen
        shown = screen(console.text()[: console.text().rindex("Errors: ")])
        progress = field(shown, r"Test #(\d+)"), field(shown, r"Pattern: *(\S+)")
        if all(progress):  # at first the fields are still empty
            seen.add(progress)
        if len(seen) > 1 and field(shown, r"Time: *(\d+:\d+:\d+)") > "0:00:00":
            break
        assert time.monotonic() - began < PROGRESS_S, "\n".join(shown)
    print("\n".join(shown))
    assert "Memtest86+ v" in shown[0]
    assert int(field(shown, r"Memory *: *(\d+)MB")) in range(62, 65)
    assert field(shown, r"CPU: (\d+) Cores") == "1"
    assert field(shown, r"Status: (\w+)") == "Testing"
    assert field(shown, r"Errors: (\d+)") == "0"


def run_memtest(tmp_path: Path, bits: str, cmdline: str) -> None:
    """Run memtest86+ for a while.  It runs for ever, so it ends with the daemon."""
    with Daemon(tmp_path, block(memtest86(bits), cmdline, "memory 64M")) as vmd:
        vmd.must("start", "other")
        with vmd.console("other") as console:
            watch_memtest(console)


def test_memtest86(tmp_path: Path) -> None:
    """Debian's memtest86+x64.bin starts at its 64-bit entry.  The file is 8 bytes shorter than its header says."""
    run_memtest(tmp_path, "x64", "console=ttyS0 nopause")


def test_memtest86_of_32_bits(tmp_path: Path) -> None:
    """Debian's memtest86+ia32.bin, which has only the 32-bit entry, starts."""
    run_memtest(tmp_path, "ia32", "console=ttyS0")


@pytest.mark.parametrize("kind", ["bzImage.gz", "vmlinux"])
def test_stock_kernel_in_other_wrappings(tmp_path: Path, linux: LinuxGuest, kind: str) -> None:
    """Debian's kernel boots with two gzip members, and as its ELF file by PVH.  Both find their initrd."""
    boot = {"bzImage.gz": packed_linux, "vmlinux": vmlinux}[kind]()
    cmdline = "console=ttyS0 quiet panic=-1 vmdtest=info"
    with Daemon(tmp_path, block(boot, cmdline, "memory 256M", f'initrd "{linux.initrd}"')) as vmd:
        vmd.must("start", "other")
        with vmd.console("other") as console:
            console.expect("userspace is up", BOOT_S)
            facts = console.expect(" KiB", BOOT_S)
        print(facts.strip())
        assert "processors: 1" in facts
        vmd.wait_state("other", "stopped")
        assert vmd.status("other")["text"] == "powered off by the guest"
