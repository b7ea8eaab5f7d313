"""Disks, CD-ROM and entropy in real guests: SeaBIOS, GRUB and Debian's stock kernel."""

import hashlib
import time
from pathlib import Path

import pytest

from tests.support import ext4
from tests.support.bootable import LAYERS, PARTITION_OFFSET, Bootable, bootable, noise, text_of
from tests.support.daemon import Attached, Daemon
from tests.support.images import MIB, opened, problems, qemu, read
from tests.support.linux import LinuxGuest
from tests.support.shell import Shell, interrupts, version_1
from vmd.images.create import create
from vmd.virtio import spec

pytestmark = [pytest.mark.l1, pytest.mark.timeout(400)]

BOOT_S = 150
BLOCK = 2048  # bytes of a disc's block
PROMPT = "grub> "


@pytest.fixture(scope="module")
def media() -> Bootable:
    """The bootable disk and CD."""
    return bootable()


def block(name: str, *lines: str) -> str:
    """Return a vm block."""
    options = "\n".join(f"    {line}" for line in ("disable", *lines))
    return f'vm "{name}" {{\n{options}\n}}\n'


def linux_block(name: str, linux: LinuxGuest, append: str, *lines: str) -> str:
    """Return a vm block that boots the stock kernel directly to a shell."""
    append = f"console=ttyS0 quiet panic=-1 nowatchdog vmdtest=shell {append}"
    return block(name, f'boot "{linux.kernel}" initrd "{linux.initrd}" cmdline "{append}"', "memory 256M", *lines)


def full_block(name: str, *media: Path) -> str:
    """Return a vm block with all devices, in legacy mode.  The last of the media is the disc of the CD drive."""
    *disks, cd = media
    lines = [f'disk "{disk}" format {disk.suffix.removeprefix(".")}' for disk in disks]
    return block(name, "memory 256M", "virtio legacy", *lines, f'cdrom "{cd}"')


def disk_bytes(path: Path) -> int:
    """Return the number of bytes that a file occupies on disk."""
    return path.stat().st_blocks * 512


def grub(console: Attached, command: str) -> str:
    """Type a command at GRUB's prompt.  Return its output."""
    return console.answer(command, PROMPT).replace("\r", "")


def md5(data: bytes) -> str:
    """Return the MD5 of data as md5sum prints it."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def check_entropy(shell: Shell) -> None:
    """Check that the kernel uses our entropy device, and that its bytes look random."""
    assert shell.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
    take = "dd if=/dev/hwrng bs=256 count=1 iflag=fullblock 2>/dev/null | hexdump -ve '1/1 \"%02x\"'"
    first, second = (bytes.fromhex(shell.run(take)) for _ in range(2))
    assert len(first) == len(second) == 256
    # 512 random bytes have about 221 different values of 256.  Fewer than 180 are practically impossible.
    assert len({*first, *second}) > 180


def check_cd(shell: Shell) -> None:
    """Check that the disc can be mounted and read."""
    shell.wait_for("[ -b /dev/sr0 ]")  # the kernel scans the SCSI bus in the background
    shell.run("mkdir -p /cd && mount -t iso9660 -o ro /dev/sr0 /cd")
    assert shell.run("cat /cd/cd.txt").strip() == text_of("cd")
    assert shell.run("md5sum </cd/noise").split()[0] == md5(noise("cd"))


def check_changes(vmd: Daemon, name: str, shell: Shell, disc: Path, other: Path) -> None:
    """While the kernel runs, grow its first disk, and eject, exchange and insert the disc of its CD drive.

    The disc is mounted at /cd.  A kernel that polls the drive notices changes although nobody opens it.
    """
    size = 512 * int(shell.run("cat /sys/block/vda/size")) + 64 * MIB
    vmd.must("resize", name, "disk0", str(size))
    shell.wait_for(f"[ $(cat /sys/block/vda/size) = {size // 512} ]")
    pattern = noise("cd")[:BLOCK]
    last = size // BLOCK - 1
    shell.run(f"dd if=/cd/noise of=/dev/vda bs={BLOCK} count=1 seek={last} conv=fsync 2>/dev/null")
    for block, content in ((last, pattern), (last - 1, bytes(BLOCK))):
        take = f"dd if=/dev/vda bs={BLOCK} count=1 skip={block} 2>/dev/null"
        assert shell.run(f"{take} | md5sum").split()[0] == md5(content)

    other.write_bytes(noise("other")[: 300 * BLOCK])
    locked = vmd.vmctl("cdrom", name, other)
    assert (locked.returncode, locked.stderr) == (
        1,
        f"vmctl: cdrom vm command failed: vm {name}: the guest has locked the drive, as it does while it uses a disc\n",
    )
    assert shell.run("cat /cd/cd.txt").strip() == text_of("cd")
    shell.run("umount /cd")
    shell.run("cat /dev/sr0 | head -c 1 >/dev/null; echo 200 >/sys/block/sr0/events_poll_msecs")
    heard = int(shell.run("cat /sys/kernel/uevent_seqnum"))
    vmd.must("cdrom", "-e", name)
    shell.wait_for(f"[ $(cat /sys/kernel/uevent_seqnum) -gt {heard} ]")
    assert "No medium found" in shell.tried("cat /dev/sr0")[0]

    heard = int(shell.run("cat /sys/kernel/uevent_seqnum"))
    vmd.must("cdrom", name, other)
    shell.wait_for(f"[ $(cat /sys/kernel/uevent_seqnum) -gt {heard} ]")
    assert shell.run("md5sum </dev/sr0").split()[0] == md5(other.read_bytes())
    shell.run("echo 0 >/sys/block/sr0/events_poll_msecs")
    vmd.must("cdrom", name, disc)
    check_cd(shell)


def check_ports(shell: Shell, *, devices: int) -> None:
    """Check that the kernel uses the virtio 1.x registers in ports for `devices` devices, and in memory for none."""
    assert shell.run("grep -c virtio-pci-modern /proc/ioports").strip() == str(devices)
    assert shell.run("grep -c virtio-pci-modern /proc/iomem || true").strip() == "0"


def rebind(shell: Shell, driver: str) -> None:
    """Unbind a driver from its device during reads, and bind it again.  That resets the device and its rings."""
    device = shell.run(f"basename /sys/bus/virtio/drivers/{driver}/virtio*").strip()
    shell.run("dd if=/dev/vda of=/dev/null bs=64k >/dev/null 2>&1 &")
    shell.run(f"echo {device} >/sys/bus/virtio/drivers/{driver}/unbind")
    # The device is reset, and only the virtio bus has acknowledged it.
    assert shell.run(f"cat /sys/bus/virtio/devices/{device}/status").strip() == "0x00000001"
    shell.run(f"echo {device} >/sys/bus/virtio/drivers/{driver}/bind")
    status = int(shell.run(f"cat /sys/bus/virtio/devices/{device}/status"), 16)
    assert status & ~spec.FEATURES_OK == spec.ACKNOWLEDGE | spec.DRIVER | spec.DRIVER_OK


def move_interrupts(shell: Shell, work: str) -> None:
    """Run some work, and meanwhile move the interrupts of all virtio devices to the other processor and back.

    The kernel moves an interrupt by masking it, changing its message or its route, and unmasking it.
    """
    shell.run(f"({work}; {work}) >/tmp/sums 2>&1 &")
    numbers = shell.run("grep virtio /proc/interrupts | cut -d: -f1").split()
    for _ in range(6):
        for mask in (1, 2):
            shell.run(f"for number in {' '.join(numbers)}; do echo {mask} >/proc/irq/$number/smp_affinity; done")
    shell.wait_for("[ $(wc -l </tmp/sums) -ge 2 ]")
    first, second = shell.run("cat /tmp/sums").splitlines()
    assert first == second


def write_and_sync(shell: Shell, folder: str) -> str:
    """Write and sync 8 MiB below a folder.  Return their MD5 as read back from the device."""
    shell.run(f"dd if=/dev/urandom of={folder}/kept bs=64k count=128 2>/dev/null && sync")
    return shell.run(f"echo 3 >/proc/sys/vm/drop_caches; md5sum <{folder}/kept").split()[0]


def kill_while_writing(vmd: Daemon, name: str, shell: Shell, folder: str) -> None:
    """Kill the VM during writes, with data, journal and metadata in different states."""
    shell.run(
        f"cd {folder}; (i=0; while i=$((i+1)); do mkdir d$i; dd if=/dev/zero of=d$i/f bs=64k count=7 conv=fsync; done)"
        " >/dev/null 2>&1 &"
    )
    shell.wait_for(f"[ -e {folder}/d4 ]")
    vmd.must("stop", "-fw", name)


def test_grub_on_a_raw_disk(media: Bootable, tmp_path: Path) -> None:
    """SeaBIOS starts GRUB from an MBR.  GRUB lists and prints files of a FAT16 partition, reboots and powers off.

    There is a bootable disc, too, but disks have priority.
    """
    disk = media.copy(media.fat, tmp_path)
    conf = block("raw", "memory 128M", f'disk "{disk}" format raw', f'cdrom "{media.cd}"')
    with Daemon(tmp_path, conf) as vmd:
        began = time.monotonic()
        vmd.must("start", "raw")
        with vmd.attached("raw") as console:
            assert "GRUB from the fat" in console.expect(PROMPT, BOOT_S)
            print(f"prompt after {time.monotonic() - began:.1f} s")
            assert {"(hd0)", "(hd0,msdos1)"} <= set(grub(console, "ls").split())
            listing = grub(console, "ls (hd0,msdos1)/")
            printed = grub(console, "cat (hd0,msdos1)/fat.txt")
            assert "GRUB from the fat" in console.answer("reboot", PROMPT, BOOT_S)
            console.type("halt\r")  # GRUB finds the ACPI tables that SeaBIOS has installed
            console.drain(BOOT_S)
        print(f"{listing}{printed}\nrebooted, and off after {time.monotonic() - began:.1f} s")

        assert {"boot/", "fat.txt"} <= set(listing.split())
        assert text_of("fat") in printed
        assert "rebooting" in vmd.log
        assert vmd.wait_state("raw", "stopped")["text"] == "powered off by the guest"


@pytest.mark.deep
@pytest.mark.parametrize("mode", ["transitional", "memory"])
def test_grub_on_a_cd(mode: str, media: Bootable, tmp_path: Path) -> None:
    """`boot device cdrom` prefers the disc to the disk.  A reboot ends the VM.

    GRUB reads by SeaBIOS's virtio-scsi and El Torito, with registers in ports or, if there are none, in memory.
    """
    disk = media.copy(media.fat, tmp_path)
    lines = (f"virtio {mode}", f'disk "{disk}" format raw', f'cdrom "{media.cd}"', "boot device cdrom")
    with Daemon(tmp_path, block("cd", "memory 128M", *lines)) as vmd:
        began = time.monotonic()
        vmd.must("start", "cd")
        with vmd.attached("cd") as console:
            assert "GRUB from the cd" in console.expect(PROMPT, BOOT_S)
            print(f"prompt after {time.monotonic() - began:.1f} s")
            assert {"(cd)", "(hd0)"} <= set(grub(console, "ls").split())
            listing = grub(console, "ls (cd)/")
            printed = grub(console, "cat (cd)/cd.txt")
            console.type("reboot\r")
            console.drain(BOOT_S)
        print(f"{listing}{printed}")

        assert {"boot/", "cd.txt", "noise"} <= set(listing.split())
        assert text_of("cd") in printed
        assert vmd.wait_state("cd", "stopped")["text"] == (
            "rebooted; not started again because it was booted from the CD"
        )


@pytest.mark.deep
def test_linux_modern_with_msix(media: Bootable, linux: LinuxGuest, tmp_path: Path) -> None:
    """With modern registers and MSI-X a raw disk with ext4 survives a kill, and CD and entropy device can be read.

    The kernel uses the cheaper registers, and sees the serial number, by which the disk can be mounted.
    """
    disk = media.copy(media.data, tmp_path)
    lines = ("virtio modern", f'disk "{disk}" format raw serial "data 1"', f'cdrom "{media.cd}"')
    conf = linux_block("modern", linux, "", *lines)
    with Daemon(tmp_path, conf) as vmd:
        began = time.monotonic()
        vmd.must("start", "modern")
        with vmd.attached("modern") as console:
            shell = Shell(console, BOOT_S)
            print(f"shell after {time.monotonic() - began:.1f} s")
            assert shell.run("cat /sys/block/vda/serial").strip() == "data 1"
            check_ports(shell, devices=3)
            check_entropy(shell)
            check_cd(shell)
            check_changes(vmd, "modern", shell, media.cd, tmp_path / "other.iso")
            rebind(shell, "virtio_blk")
            shell.run("mount -t ext4 /dev/vda /mnt")
            digest = write_and_sync(shell, "/mnt")
            features, kinds = version_1(shell), interrupts(shell)
            kill_while_writing(vmd, "modern", shell, "/mnt")
        print(f"all done after {time.monotonic() - began:.1f} s")
        print(kinds)

    assert features == {"1"}
    assert set(kinds.values()) == {"PCI-MSI"}
    assert any("req" in name for name in kinds)
    ext4.recovered(disk)
    assert not ext4.problems(disk)
    assert md5(ext4.read(disk, "/kept")) == digest


@pytest.mark.deep
def test_grub_and_linux_on_a_qcow2_chain_with_all_slots_full(media: Bootable, tmp_path: Path) -> None:
    """With legacy registers, INTx and all other devices GRUB and its kernel read files from three qcow2 layers.

    Then the guest writes to the file system and trims it, and the VM is killed.  An independent reader checks the rest.
    """
    *_, top = layers = [media.copy(layer, tmp_path) for layer in media.layers]
    fat, data = media.copy(media.fat, tmp_path), media.copy(media.data, tmp_path)
    empty = tmp_path / "empty.qcow2"
    create(str(empty), "qcow2", 64 * MIB)
    with Daemon(tmp_path, full_block("full", top, fat, data, empty, media.cd)) as vmd:
        began = time.monotonic()
        vmd.must("start", "full")
        print(f"started after {time.monotonic() - began:.1f} s")
        with vmd.attached("full") as console:
            assert "GRUB from the base" in console.expect(PROMPT, BOOT_S)
            print(f"prompt after {time.monotonic() - began:.1f} s")
            assert {f"{name}.txt" for name in LAYERS} <= set(grub(console, "ls (hd0,msdos1)/").split())
            for name in LAYERS:
                assert text_of(name) in grub(console, f"cat (hd0,msdos1)/{name}.txt")
            assert {"(hd1)", "(hd2)", "(hd3)"} <= set(grub(console, "ls").split())
            grub(console, "linux /boot/vmlinuz console=ttyS0 quiet panic=-1 pci=nomsi vmdtest=shell")
            grub(console, "initrd /boot/initrd")
            print(f"kernel loaded after {time.monotonic() - began:.1f} s")
            console.type("boot\r")
            shell = Shell(console, BOOT_S)
            print(f"shell after {time.monotonic() - began:.1f} s")
            check_entropy(shell)
            check_cd(shell)
            shell.run("mkdir /fat && mount -t vfat /dev/vdb1 /fat && mount -t ext4 /dev/vda1 /mnt")
            assert shell.run("cat /fat/fat.txt").strip() == text_of("fat")
            pattern = noise("cd")[: 40 * 512]
            shell.run("dd if=/cd/noise of=/dev/vdd bs=512 count=40 seek=77 conv=fsync 2>/dev/null")
            digest = write_and_sync(shell, "/mnt")
            shell.run("dd if=/dev/urandom of=/mnt/gone bs=64k count=160 2>/dev/null && sync")
            before = disk_bytes(top)
            # A flush follows the trim.  Only then are the clusters free.
            shell.run("rm /mnt/gone && sync && fstrim /mnt && sync")
            after = disk_bytes(top)
            features, kinds = version_1(shell), interrupts(shell)
            kill_while_writing(vmd, "full", shell, "/mnt")
        print(f"all done after {time.monotonic() - began:.1f} s; {before - after} bytes trimmed")
        print(kinds)

    assert features == {"0"}
    assert set(kinds.values()) == {"IO-APIC"}
    assert before - after > 8 * MIB
    for layer in (*layers, empty):
        assert set(problems(layer)) <= {"leaks"}, layer
    raw = tmp_path / "all.raw"
    qemu("qemu-img", "convert", "-O", "raw", top, raw)
    ext4.recovered(raw, PARTITION_OFFSET)
    assert not ext4.problems(raw, PARTITION_OFFSET)
    assert md5(ext4.read(raw, "/kept", PARTITION_OFFSET)) == digest
    assert ext4.read(raw, "/middle.txt", PARTITION_OFFSET).decode().strip() == text_of("middle")
    assert read(opened(empty), 77 * 512, len(pattern)) == pattern


@pytest.mark.deep
@pytest.mark.parametrize(
    ("mode", "interrupt", "image_format"),
    [
        ("legacy", "msix", "raw"),
        ("legacy", "intx", "qcow2"),
        ("memory", "msix", "qcow2"),
        ("modern", "intx", "raw"),
        ("transitional", "msix", "raw"),
        ("transitional", "intx", "qcow2"),
    ],
)
def test_all_combinations(
    mode: str, interrupt: str, image_format: str, media: Bootable, linux: LinuxGuest, tmp_path: Path
) -> None:
    """Two processors, every kind of registers and interrupts: resets under load, a kill, and a file system check."""
    disk = tmp_path / f"data.{image_format}"
    if image_format == "raw":
        media.copy(media.data, disk)
    else:
        qemu("qemu-img", "convert", "-O", "qcow2", media.data, disk)
    append = "pci=nomsi" if interrupt == "intx" else ""
    lines = (f"virtio {mode}", "vcpus 2", f'disk "{disk}" format {image_format}', f'cdrom "{media.cd}"')
    with Daemon(tmp_path, linux_block("guest", linux, append, *lines)) as vmd:
        began = time.monotonic()
        vmd.must("start", "guest")
        with vmd.attached("guest") as console:
            shell = Shell(console, BOOT_S)
            print(f"shell after {time.monotonic() - began:.1f} s")
            check_entropy(shell)
            check_cd(shell)
            check_changes(vmd, "guest", shell, media.cd, tmp_path / "other.iso")
            shell.run("umount /cd")
            for driver in ("virtio_blk", "virtio_scsi", "virtio_rng"):
                rebind(shell, driver)
            print(f"drivers bound again after {time.monotonic() - began:.1f} s")
            move_interrupts(shell, "cat /dev/sr0 /dev/vda | head -c 40000000 | md5sum")
            print(f"interrupts moved after {time.monotonic() - began:.1f} s")
            shell.run("mount -t ext4 /dev/vda /mnt")
            digest = write_and_sync(shell, "/mnt")
            shell.run("dd if=/dev/urandom of=/mnt/gone bs=64k count=160 2>/dev/null && sync")
            before = disk_bytes(disk)
            shell.run("rm /mnt/gone && sync && fstrim /mnt && sync")
            trimmed = before - disk_bytes(disk)
            check_entropy(shell)
            check_cd(shell)
            features, kinds = version_1(shell), interrupts(shell)
            kill_while_writing(vmd, "guest", shell, "/mnt")
        print(f"all done after {time.monotonic() - began:.1f} s")

    assert features == {"0" if mode == "legacy" else "1"}
    assert set(kinds.values()) == {"IO-APIC" if interrupt == "intx" else "PCI-MSI"}
    assert trimmed > 8 * MIB
    raw = disk
    if image_format == "qcow2":
        assert set(problems(disk)) <= {"leaks"}
        raw = tmp_path / "all.raw"
        qemu("qemu-img", "convert", "-O", "raw", disk, raw)
    ext4.recovered(raw)
    assert not ext4.problems(raw)
    assert md5(ext4.read(raw, "/kept")) == digest
