"""The emulated host: Debian on its own disk, booted by its own systemd, with an emulated KVM.

Unlike a `Box` it has its own kernel.  So udev loads KVM, control groups have their controllers, and a power-off really
ends the host.  The host itself runs the `steps` at each boot.
"""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.l1.machine import Emulated, L1Error
from tests.support.guests import guest
from tests.support.linux import linux_guest
from tests.systemd import steps
from tools import initramfs
from tools.debian_kernel import cache_dir, fetch

HERE = Path(__file__).parent
INIT = HERE / "initrd-init"
MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic", "9pnet_virtio", "9p")
DISK_SIZE = "3G"
MACHINE_ID = "0123456789abcdef0123456789abcdef\n"  # without one, systemd would enable every unit
BOOT_LIMIT_S = 900  # a watchdog, for busy hosts
MEMORY_MIB = 1024  # the emulator scans less memory faster
CONF = """switch "lan" { interface br0 }
vm "full" {
    memory 32M
    boot "/srv/demo.elf"
    disk "/srv/disk.img" format raw
    cdrom "/srv/cd.iso"
    interface switch "lan"
    local interface
}
vm "linux" {
    disable
    memory 128M
    boot "/srv/vmlinuz" initrd "/srv/initrd" cmdline "console=ttyS0 quiet panic=-1 nowatchdog vmdtest=dhcp,shell"
    local interface
}
"""
UNIT = """[Unit]
After=multi-user.target
[Service]
Type=exec
ExecStart=/usr/bin/python3 /host/steps.py
StandardOutput=file:/host/steps.log
StandardError=inherit
[Install]
WantedBy=multi-user.target
"""
PATIENCE = "[Manager]\nDefaultTimeoutStartSec=900\n"  # the machine is about thirty times slower than real ones
# Units that the host does not need, and that would take time.
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "fstrim.timer", "systemd-tmpfiles-clean.timer",
    "getty.target", "systemd-logind.service", "systemd-user-sessions.service",
    "systemd-ask-password-console.path", "systemd-ask-password-wall.path", "systemd-initctl.socket",
    "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "systemd-random-seed.service",
    "systemd-pstore.service", "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount",
    "modprobe@.service", "dev-hugepages.mount", "dev-mqueue.mount", "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
)  # fmt: skip


# Copies files over a system, installs a package, and makes a disk of the result.  The lists of packages are removed,
# because apt would read them for half a minute, and fetch nothing.
MAKE_DISK = """
mount -t tmpfs none "$5" && mkdir "$5/upper" "$5/work" "$5/root"
mount -t overlay -o "lowerdir=$2,upperdir=$5/upper,workdir=$5/work" overlay "$5/root"
cp -R "$1/." "$5/root/" && cp "$3" "$5/root/root/vmd.deb"
chroot "$5/root" dpkg --install /root/vmd.deb
chroot "$5/root" systemctl disable vmd
rm -rf "$5"/root/var/lib/apt/lists/*
mke2fs -q -t ext4 -E root_owner=0:0 -d "$5/root" "$4" "$6"
"""


def make_disk(root: Path, package: Path, scratch: Path) -> Path:
    """Return a disk with a system, the package, and the files that the steps need."""
    files = scratch / "files"
    units = files / "etc/systemd/system"
    wants = units / "multi-user.target.wants"
    patience = files / "etc/systemd/system.conf.d"
    for folder in (wants, patience, files / "srv", files / "host", files / "var/log/journal"):
        folder.mkdir(parents=True)
    (patience / "slow.conf").write_text(PATIENCE)
    (units / "steps.service").write_text(UNIT)
    (wants / "steps.service").symlink_to("../steps.service")
    for name in MASKED:
        (units / name).symlink_to("/dev/null")
    (files / "etc/vm.conf").write_text(CONF)
    for name in ("etc/.updated", "var/.updated"):  # otherwise systemd would rebuild the databases of packages
        (files / name).touch()
    (files / "etc/hostname").write_text("host\n")
    (files / "etc/machine-id").write_text(MACHINE_ID)
    shutil.copy(guest("demo"), files / "srv/demo.elf")
    linux = linux_guest()
    shutil.copy(linux.kernel, files / "srv/vmlinuz")
    shutil.copy(linux.initrd, files / "srv/initrd")
    for name in ("disk.img", "cd.iso"):
        (files / "srv" / name).write_bytes(bytes(1 << 20))
    disk = scratch / "disk"
    layer = scratch / "layer"
    layer.mkdir()
    made = subprocess.run(
        [
            "unshare", "--mount", "--propagation", "private", "sh", "-e", "-c", MAKE_DISK, "make-disk",
            files, root, package, disk, layer, DISK_SIZE,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout
    return disk


def boot(out: Path, disk: Path) -> None:
    """Run the machine until it powers itself off.  Raises L1Error if it does not."""
    kernel = fetch("amd64", cache_dir())
    initrd = initramfs.cached("host", INIT, MODULES, kernel)
    drive = ("-drive", f"file={disk},format=raw,if=virtio,cache=unsafe")
    machine = Emulated(out, kernel, initrd, drive, BOOT_LIMIT_S, memory_mib=MEMORY_MIB)
    try:
        while not machine.ended(1.0):
            if machine.stuck():
                raise L1Error(f"the emulated host is stuck\n{machine.tail()}")
        if machine.qemu.returncode:
            raise L1Error(f"the emulated host was not done after {BOOT_LIMIT_S} s\n{machine.tail()}")
    finally:
        machine.stop()


def run(root: Path, package: Path, later: Mapping[str, Path], scratch: Path) -> dict[str, dict[str, Any]]:
    """Boot a host once for each group of steps.  Return the results of the steps by their names.

    `package` is installed before the first boot.  The packages of `later` are in /host/NAME.deb.  Raises L1Error.
    """
    out = scratch / "host"
    out.mkdir()
    shutil.copy(HERE / "steps.py", out)
    for name, deb in later.items():
        shutil.copy(deb, out / f"{name}.deb")
    disk = make_disk(root, package, scratch)
    written = out / "results"
    written.touch()
    results: dict[str, dict[str, Any]] = {}
    for boot_steps in steps.BOOTS:
        boot(out, disk)
        results = {line["step"]: line for line in map(json.loads, written.read_text().splitlines())}
        missing = [step.__name__ for step in boot_steps if step.__name__ not in results]
        if missing:  # the emulator sometimes breaks the machine: see tests/l1/machine.py
            raise L1Error(f"the emulated host ended before the steps {missing}")
    disk.unlink()
    return results
