"""Makes a small Debian cloud image from packages: with cloud-init and an ssh server, and without a password.

    python -m tools.debian_image        makes the image if it is not in the cache; prints its path

The image is for guests of the tests and of `make run`, so it has a kernel for virtual machines and virtio's modules.
It is made as root, by debootstrap from the network, and kept in the cache.  It contains nothing of this host.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools.debian_kernel import cache_dir

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
BASE = ("systemd-sysv", "udev")  # debootstrap cannot resolve virtual packages, so apt installs the others
PACKAGES = (
    "cloud-init", "cloud-guest-utils", "fdisk", "e2fsprogs", "openssh-server", "sudo", "iproute2", "dbus",
    "systemd-resolved", "initramfs-tools", "linux-image-cloud-amd64",
)  # fmt: skip
# This file is read when the kernel is installed.  With all modules the initramfs would be five times as large.
INITRAMFS = {
    "etc/initramfs-tools/conf.d/vmd": "MODULES=list\nCOMPRESS=gzip\n",
    "usr/share/initramfs-tools/modules.d/vmd": "virtio_pci\nvirtio_blk\next4\n",
}
# cloud-init looks for no other kind of seed, and skips packages that are not installed (locales, GRUB).  It makes only
# one host key: on emulated processors the primes of an RSA key would take longer than everything else.  It prints
# nothing on the console, because each character is an exit to the host.
CLOUD = """\
datasource_list: [NoCloud, None]
locale: false
grub_dpkg: {enabled: false}
ssh_genkeytypes: [ed25519]
ssh: {emit_keys_to_console: false}
no_ssh_fingerprints: true
output: {all: ">> /var/log/cloud-init-output.log"}
"""
FILES = {
    "etc/fstab": "LABEL=root / ext4 errors=remount-ro 0 0\n",  # no fsck at startup
    "etc/hostname": "debian\n",
    "etc/machine-id": "",  # empty: each guest makes its own
    "etc/cloud/cloud.cfg.d/90_vmd.cfg": CLOUD,
    "etc/network/interfaces": "",
}
# Units that a guest of minutes does not need.  Each takes 1 to 30 s where processors are emulated.
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "dev-hugepages.mount", "dev-mqueue.mount", "modprobe@.service", "kmod-static-nodes.service",
    "systemd-modules-load.service", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-kernel-config.mount",
    "sys-fs-fuse-connections.mount", "proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service",
    "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service",
)  # fmt: skip
LINKS = {
    "etc/resolv.conf": "../run/systemd/resolve/stub-resolv.conf",
    **{f"etc/systemd/system/{unit}": "/dev/null" for unit in MASKED},
}
# Folders that a short-lived guest does not need.  They are half of the installed files.
USELESS = (
    "etc/ssh/ssh_host_*", "var/lib/dbus/machine-id", "debootstrap", "usr/share/doc/*", "usr/share/man/*",
    "usr/share/info/*", "usr/share/locale/*", "usr/share/i18n/*", "var/cache/apt/*.bin", "var/cache/apt/archives/*.deb",
    "var/lib/apt/lists/*_*", "var/log/*.log", "var/log/apt/*",
)  # fmt: skip
DISK_MIB = 1024
FIRST_MIB = 1  # start of the root partition, as partitioning programs place it
LAST_MIB = 1  # room for the backup of the partition table
TABLE = "label: gpt\nstart=2048, type=4f68bce3-e8cd-4db1-96e7-fbcaf984b709, name=root\n"
MIB = 1 << 20
LIMIT_S = 3600  # watchdog; downloads may take minutes
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
# The boot lines in vm.conf for a guest with this image.  Both files are links to those of the newest kernel.
BOOT = 'boot "disk0:/vmlinuz" initrd "disk0:/initrd.img"'
CMDLINE = "root=LABEL=root ro console=ttyS0"


class ImageError(Exception):
    """The image could not be made.  The text says which step failed."""


def cached() -> Path:
    """Return the image, a raw, sparse disk with one partition.  Make it if necessary.  Raises ImageError."""
    recipe = repr((SUITE, BASE, PACKAGES, INITRAMFS, FILES, LINKS, USELESS, DISK_MIB, TABLE))
    home = cache_dir() / f"debian-image-{SUITE}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with made_once(home) as fresh:
        if fresh is not None:
            if os.geteuid() != 0:
                raise ImageError("only root can make a Debian image")
            print("making a Debian image from packages; this takes minutes, only once", file=sys.stderr, flush=True)
            make(fresh)
    return home / "disk.raw"


@contextlib.contextmanager
def made_once(path: Path) -> Iterator[Path | None]:
    """Yield a new directory that becomes `path` at the end, or None if `path` exists.  One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="new-", ignore_cleanup_errors=True) as folder:
            fresh = Path(folder, "made")
            fresh.mkdir()
            yield fresh
            fresh.rename(path)


def make(folder: Path) -> None:
    """Make the image in a folder.  Raises ImageError."""
    root = folder / "root"
    run("debootstrap", "--variant=minbase", f"--include={','.join(BASE)}", SUITE, root, MIRROR)
    write(root, INITRAMFS)
    inside(root, "apt-get", "-q", "-y", "--no-install-recommends", "install", *PACKAGES)
    inside(root, "systemctl", "enable", "systemd-networkd", "systemd-resolved")
    for pattern in USELESS:
        for path in root.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    write(root, FILES)
    for name, target in LINKS.items():
        Path(root, name).unlink(missing_ok=True)
        Path(root, name).symlink_to(target)
    make_disk(folder / "disk.raw", root, DISK_MIB)
    shutil.rmtree(root)


def make_disk(disk: Path, root: Path, size_mib: int) -> None:
    """Make a sparse disk with one partition that contains this root and can be grown.  Raises ImageError."""
    disk.touch()
    os.truncate(disk, size_mib * MIB)
    run("sfdisk", "--quiet", disk, given=TABLE)
    blocks = (size_mib - FIRST_MIB - LAST_MIB) * 1024
    run("mke2fs", "-q", "-t", "ext4", "-L", "root", "-E", f"offset={FIRST_MIB * MIB}", "-d", root, disk, f"{blocks}k")


def write(root: Path, files: dict[str, str]) -> None:
    """Write text files below a root.  They replace symbolic links."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)


def inside(root: Path, *command: str) -> None:
    """Run a program in a root, with a temporary /proc.  Raises ImageError."""
    script = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
    run("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, root, *command)


def run(*command: str | Path, given: str = "") -> None:
    """Run a program and wait for its end.  Raises ImageError if it fails."""
    try:
        done = subprocess.run(
            ["timeout", "--kill-after=5", str(LIMIT_S), *command], env=ENVIRONMENT,
            input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip
    except OSError as error:
        raise ImageError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-20:])
        raise ImageError(f"{' '.join(map(str, command))}: status {done.returncode}\n{said}")


def main(arguments: list[str]) -> int:
    """Make the image, and print its path."""
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(cached())
    except (ImageError, OSError) as error:
        print(f"debian_image: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
