"""Kernels that are on disks of the VM itself: `boot "disk0:/vmlinuz"`, `vmctl start -b disk0:/vmlinuz`."""

from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.guests import guest
from tests.support.images import qemu
from tests.support.systemdisk import ext4_disk, ffs_disk, replace

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(600)]

DEADLINE_S = 150.0
PROMPT = "vmd-demo> "


def test_a_kernel_on_the_disk(tmp_path: Path) -> None:
    """It is read anew at each start and at each reboot of the guest; what cannot be had is a sentence."""
    demo, bsd = guest("demo").read_bytes(), guest("openbsd-amd64").read_bytes()
    disk = ext4_disk(tmp_path / "web.img", {"boot/demo": demo, "vmlinuz": "/boot/demo"})
    other = ffs_disk(tmp_path / "bsd.img", {"obsd": bsd, "etc/boot.conf": b"set image /obsd\n"})
    top = tmp_path / "top.qcow2"
    conf = f"""
        vm "web" {{
            disable
            memory 64M
            disk "{disk}" format raw
            boot "disk0:/vmlinuz"
        }}
        vm "bsd" {{
            disable
            memory 64M
            disk "{other}" format raw
            boot "disk0:"
        }}
    """
    with Daemon(tmp_path, conf) as vmd:
        refused = vmd.vmctl("start", "-b", "disk0:/bsd", "web")
        assert refused.returncode == 1
        assert f"disk0:/bsd: disk {disk}: the whole disk (ext4): /bsd: there is no /bsd" in refused.stderr
        refused = vmd.vmctl("start", "-b", "disk1:/vmlinuz", "web")
        assert "vm web: boot disk1:/vmlinuz: there is no disk1: it has disk0 only" in refused.stderr

        vmd.must("start", "web")
        assert vmd.status("web")["boot_image"] == "disk0:/vmlinuz"
        with vmd.console("web") as console:
            console.expect(PROMPT, DEADLINE_S)
            replace(disk, "/boot/demo", bsd)
            console.type("reset\r")
            console.expect("memmap", DEADLINE_S)  # by the kernel that was installed meanwhile
        vmd.wait_state("web", "stopped")
        assert "memmap" in vmd.run_to_end("bsd")
        replace(disk, "/boot/demo", demo)

        qemu("qemu-img", "create", "-qf", "qcow2", "-F", "raw", "-b", disk, top)
        vmd.must("start", "-m", "64M", "-b", "disk0:/boot/demo", "-k", "quiet", "-d", f"qcow2:{top}", "adhoc")
        with vmd.console("adhoc") as console:
            assert "small monitor" not in console.expect(PROMPT, DEADLINE_S)
            console.answer("reset", PROMPT)
        vmd.must("stop", "-fw", "adhoc")
