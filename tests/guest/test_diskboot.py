"""Kernels on the VM's own disks: `boot "disk0:/vmlinuz"`, `vmctl start -b disk0:/vmlinuz`."""

import re
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
    """The kernel is read again at each start and each reboot of the guest.  A missing kernel gives a message."""
    demo, bsd = guest("demo").read_bytes(), guest("openbsd-amd64").read_bytes()
    disk = ext4_disk(tmp_path / "web.img", {"boot/demo": demo, "vmlinuz": "/boot/demo"})
    other = ffs_disk(tmp_path / "bsd.img", {"obsd": bsd, "etc/boot.conf": b"set image /obsd\nboot -s\n"})
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
        assert "vm web: boot disk1:/vmlinuz: there is no disk1: the vm has disk0 only" in refused.stderr

        vmd.must("start", "web")
        assert vmd.status("web")["boot_image"] == "disk0:/vmlinuz"
        with vmd.console("web") as console:
            console.expect(PROMPT, DEADLINE_S)
            replace(disk, "/boot/demo", bsd)
            console.type("reset\r")
            console.expect("memmap", DEADLINE_S)  # from the kernel that was installed meanwhile
        vmd.wait_state("web", "stopped")
        assert re.search(r"howto=2\b.*memmap", vmd.run_to_end("bsd"), re.DOTALL)
        replace(disk, "/boot/demo", demo)

        qemu("qemu-img", "create", "-qf", "qcow2", "-F", "raw", "-b", disk, top)
        vmd.must("start", "-m", "64M", "-b", "disk0:/boot/demo", "-k", "quiet", "-d", f"qcow2:{top}", "adhoc")
        with vmd.console("adhoc") as console:
            assert "small monitor" not in console.expect(PROMPT, DEADLINE_S)
            console.answer("reset", PROMPT)
        vmd.must("stop", "-fw", "adhoc")


@pytest.mark.deep
def test_a_disk_without_a_boot_sector(tmp_path: Path) -> None:
    """The start fails and describes the disk, because firmware would find nothing.  With a disc it succeeds."""
    disk = ext4_disk(tmp_path / "web.img", {"boot/vmlinuz": b"k", "boot/initrd.img": b"i"}, divided=True)
    qemu("qemu-img", "create", "-qf", "qcow2", tmp_path / "new.qcow2", "1G")
    other = tmp_path / "other.img"
    other.write_bytes(bytes(1 << 20))
    disc = tmp_path / "disc.iso"
    disc.write_bytes(bytes(4096))
    conf = f"""
        vm "web" {{
            disable
            disk "{disk}" format raw
        }}
        vm "new" {{
            disable
            disk "{tmp_path}/new.qcow2"
            disk "{other}" format raw
        }}
        vm "install" {{
            disable
            memory 64M
            disk "{tmp_path}/new.qcow2"
            cdrom "{disc}"
        }}
    """
    with Daemon(tmp_path, conf) as vmd:
        refused = vmd.vmctl("start", "web")
        assert refused.returncode == 1
        assert (
            f"nothing to boot from: no boot sector on disk {disk}: MBR; partition p1: has no known file system"
            '; partition p2: ext4; boot "disk0p2:/boot/vmlinuz" initrd "disk0p2:/boot/initrd.img" may help'
        ) in refused.stderr
        refused = vmd.vmctl("start", "new")
        empty = "it is empty: start its VM once from a CD (-r) or a kernel (-b) that installs a system"
        assert (
            f"no boot sector on disk {tmp_path}/new.qcow2: {empty}; disk {other}: {empty}" in refused.stderr
        )
        vmd.must("start", "install")
        vmd.must("stop", "-fw", "install")
        with other.open("r+b") as file:
            file.write(b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa")
        vmd.must("start", "new")
        vmd.must("stop", "-fw", "new")
