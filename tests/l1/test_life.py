"""Debian's stock kernel works while its machine is paused, and is sent from one name to another and back."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import ext4
from tests.support.daemon import Daemon
from tests.support.linux import LinuxGuest
from tests.support.shell import Shell
from tests.support.transfers import move

pytestmark = [pytest.mark.l1, pytest.mark.deep, pytest.mark.timeout(400)]

BOOT_S = 150
MIB = 1 << 20
PAUSES = 5
COMPLAINTS = "stall|lockup|unstable|i/o error|lost|hung|call trace|oops"
# Data is written to the disk and read back.  Differences are noted.
WORK = (
    "(i=0; while [ ! -e /stop ]; do i=$((i+1)); dd if=/dev/urandom of=/d/file bs=64k count=8; a=$(md5sum </d/file);"
    ' sync; echo 3 >/proc/sys/vm/drop_caches; [ "$a" = "$(md5sum </d/file)" ] || echo $i >>/bad;'
    " echo $i >/now; mv /now /done; done) >/dev/null 2>&1 &"
)


def done(shell: Shell) -> int:
    """Return the number of completed and correct rounds of work."""
    shell.run("[ ! -e /bad ]")
    return int(shell.run("cat /done"))


def goes_on(shell: Shell) -> None:
    """Wait until the guest has completed more rounds."""
    before = done(shell)
    shell.wait_for(f"[ $(cat /done) -ge {before + 2} ]")
    done(shell)


def test_pauses_and_moves(linux: LinuxGuest, tmp_path: Path) -> None:
    """With two processors, a busy disk and kvmclock, nothing is lost, and the kernel logs no warnings."""
    disk = tmp_path / "disk.raw"
    disk.touch()
    os.truncate(disk, 64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True, env={"PATH": ext4.PATH})
    append = "console=ttyS0 quiet panic=-1 nowatchdog vmdtest=shell"
    conf = f"""
vm "a" {{
    disable
    vcpus 2
    memory 256M
    boot "{linux.kernel}" initrd "{linux.initrd}" cmdline "{append}"
    disk "{disk}" format raw
}}
"""
    with Daemon(tmp_path, conf) as vmd:
        vmd.must("start", "a")
        with vmd.console("a") as console:
            shell = Shell(console, BOOT_S)
            shell.run("dmesg -c >/dev/null")  # drop messages about the emulated machine
            shell.run("mkdir /d && mount -t ext4 /dev/vda /d && echo 0 >/done")
            shell.run(WORK)
            goes_on(shell)
            for _ in range(PAUSES):
                vmd.must("pause", "a")
                vmd.must("unpause", "a")
                goes_on(shell)
            print(f"{done(shell)} rounds, {PAUSES} pauses")
        for here, there in (("a", "b"), ("b", "a")):
            print(*(line.strip() for line in move(vmd, here, there)))
            with vmd.console(there) as console:
                shell.console = console
                goes_on(shell)
        with vmd.console("a") as console:
            shell.console = console
            print(f"{done(shell)} rounds, 2 moves")
            shell.run("touch /stop; wait; umount /d")
            complaints = shell.run(f"dmesg | grep -Ei '{COMPLAINTS}' || true")
            print(shell.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource").strip())
            assert complaints == ""
            assert shell.run("nproc").strip() == "2"
            vmd.must("stop", "-w", "a", timeout_s=BOOT_S)
        assert vmd.status("a")["text"] == "powered off by the guest"
    assert ext4.problems(disk) == ""
