"""Debian's stock cloud kernel under vmd, as an administrator runs it: vm.conf, vmctl, console."""

import re
import time
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.linux import LinuxGuest
from tests.support.shell import Shell

pytestmark = [pytest.mark.l1, pytest.mark.deep, pytest.mark.timeout(400)]

BOOT_S = 150
MIB = 1024


def conf(linux: LinuxGuest, name: str, steps: str, *, vcpus: int = 1, memory: str = "256M") -> str:
    """Return a vm block that boots the stock kernel.  The guest's init runs these steps."""
    return f"""
vm "{name}" {{
    disable
    vcpus {vcpus}
    memory {memory}
    boot "{linux.kernel}" initrd "{linux.initrd}" cmdline "console=ttyS0 quiet panic=-1 vmdtest={steps}"
}}
"""


def test_two_processors_and_the_power_button(linux: LinuxGuest, tmp_path: Path) -> None:
    """With `vcpus 2` and 5 GiB /proc shows both.  `vmctl stop -w` presses the power button, and the guest obeys."""
    with Daemon(tmp_path, conf(linux, "big", "info,wait", vcpus=2, memory="5G")) as vmd:
        began = time.monotonic()
        vmd.must("start", "big")
        with vmd.console("big") as console:
            console.expect("userspace is up", BOOT_S)
            print(f"userspace after {time.monotonic() - began:.1f} s")
            facts = console.expect("READY", BOOT_S)
            print(facts.strip())
            stopped = vmd.must("stop", "-w", "big", timeout_s=BOOT_S)
            console.drain(10)
            farewell = console.text()
        print(stopped.strip())
        print(vmd.log)

        assert "processors: 2" in facts
        memory = re.search(r"memory: (\d+) KiB", facts)
        assert memory is not None
        assert (5 * MIB - 256) * 1024 < int(memory[1]) < 5 * MIB * 1024
        assert "BUTTON" in farewell
        assert vmd.status("big")["text"] == "powered off by the guest"


def test_one_processor_reboots_and_powers_off(linux: LinuxGuest, tmp_path: Path) -> None:
    """With `vcpus 1` and 128 MiB the guest reboots itself on the same console, then powers itself off."""
    with Daemon(tmp_path, conf(linux, "small", "info,shell", memory="128M")) as vmd:
        vmd.must("start", "small")
        before = vmd.status("small")
        with vmd.attached("small") as console:
            console.expect("userspace is up", BOOT_S)
            facts = console.expect(" KiB", BOOT_S)
            print(facts.strip())
            Shell(console, BOOT_S).console.type("reboot -f\r")
            console.expect("userspace is up", BOOT_S)
            after = vmd.status("small")
            Shell(console, BOOT_S).console.type("poweroff -f\r")
            console.drain(BOOT_S)
        print(vmd.log)

        assert "processors: 1" in facts
        memory = re.search(r"memory: (\d+) KiB", facts)
        assert memory is not None
        assert 64 * 1024 < int(memory[1]) < 128 * 1024
        assert (after["id"], after["tty"]) == (before["id"], before["tty"])
        assert after["pid"] != before["pid"]
        assert "rebooting" in vmd.log
        assert vmd.status("small")["text"] == "powered off by the guest"
