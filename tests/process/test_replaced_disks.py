"""A disk that is another file after a reset of the guest is named, because the guest wrote to the old file."""

import shutil
from pathlib import Path

import pytest

from tests.process.test_daemon import PROMPT, demo
from tests.support.daemon import DEADLINE_S, Attached, Daemon

pytestmark = [pytest.mark.root, pytest.mark.kvm]

WARNING = "is not the file that its guest had before it was reset"


def warnings_of_a_reset(vmd: Daemon, console: Attached) -> list[str]:
    """Let the guest reset itself.  Return the warnings that this causes."""
    before = len(vmd.log)
    console.answer("reset", PROMPT)
    return [line.partition("vm demo: ")[2] for line in vmd.log[before:].splitlines() if WARNING in line]


def test_replaced_files_are_named_at_a_reset(tmp_path: Path) -> None:
    """Disk, backing file and disc are each named.  A file that was only written to is still the same."""
    names = ("disk.raw", "base.qcow2", "top.qcow2", "disc.iso")
    disk, base, top, disc = (tmp_path / name for name in names)
    disk.write_bytes(bytes(1 << 20))
    disc.write_bytes(bytes(1 << 16))
    lines = f'disk "{disk}" format raw', f'disk "{top}" format qcow2', f'cdrom "{disc}"'
    with Daemon(tmp_path, demo("demo", *lines)) as vmd:
        vmd.must("create", "-s", "1M", base)
        vmd.must("create", "-b", base, top)
        vmd.must("start", "demo")
        with vmd.console("demo") as console:
            console.expect(PROMPT, DEADLINE_S)
            disk.write_bytes(b"other" * 100)
            disk.write_bytes(bytes(1 << 20))
            assert warnings_of_a_reset(vmd, console) == []

            for path in (disk, base, disc):
                shutil.copy(path, tmp_path / "copy")
                (tmp_path / "copy").rename(path)
            assert warnings_of_a_reset(vmd, console) == [
                f"disk {disk} {WARNING}",
                f"disk {top}: backing file {base} {WARNING}",
                f"cdrom {disc} {WARNING}",
            ]
