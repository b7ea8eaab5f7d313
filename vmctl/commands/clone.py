"""vmctl clone: copy the disks of a VM, as they are or as they were at a snapshot, for a new VM.

vmctl makes the copies itself, with the rights of its user.
"""

import contextlib
import errno
import os

from vmctl.bar import Bar
from vmctl.commands.create import interrupt
from vmctl.errors import ArgumentError, CommandError, NoSuchVm
from vmctl.options import Given
from vmctl.output import clean, put_json, put_lines, warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd import signals as signal
from vmd.config import rules
from vmd.errors import HostError, ImageError, VmdError
from vmd.images.chain import Link, open_chain
from vmd.images.create import convert, new_file
from vmd.images.filecopy import copy_file
from vmd.images.files import OpenedChain
from vmd.images.identify import probe
from vmd.images.qcow2 import Qcow2Image
from vmd.images.snapshots import find, read_snapshots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.images.snapshots import Snapshot
    from vmd.ipc.messages.clients import DiskInfo, NicInfo, VmInfo
    from vmd.ipc.messages.figures import VmFigures

UNITS = ((40, "T"), (30, "G"), (20, "M"), (10, "K"))


def run(session: Session, given: Given) -> int:
    """Copy all disks, and print the block of the new VM for vm.conf.  If one copy fails, all are removed."""
    word, new = given.operands
    vms = session.client.list_vms()
    old, tag = which(vms, word)
    try:
        rules.vm_name(new)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    if any(vm.name == new for vm in vms):
        raise CommandError(f"vm {new} already exists", errno.EEXIST)
    if old.files is None:
        raise CommandError(f"vm {old.name}: only its owner may see its disks", errno.EPERM)
    if not old.files.disks:
        raise CommandError(f"vm {old.name} has no disks", errno.EINVAL)
    if not tag and old.state not in ("stopped", "waiting"):
        raise CommandError(
            f"vm {old.name} is {old.state}: stop it, or make a snapshot and clone {old.name}@TAG", errno.EBUSY
        )
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) ignores it
            signal.signal(number, interrupt)
    limits = Limits(session.client.figures(old))
    made: list[tuple[str, str]] = []  # path, format
    try:
        for index, disk in enumerate(old.files.disks):
            target = os.path.join(os.path.dirname(disk.path), f"{new}-disk{index}")
            image_format = clone_snapshot(disk, tag, target) if tag else clone_file(disk, target)
            made.append((target, image_format))
    except BaseException:
        for path, _ in made:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise
    warn(f"cloned vm {word} as {new}: add this to vm.conf, and run vmctl reload")
    lines = block(old, new, made, limits)
    if session.json:
        put_json({
            "name": clean(new),
            "disks": [{"path": clean(path), "format": image_format} for path, image_format in made],
            "conf": "\n".join(lines) + "\n",
        })  # fmt: skip
    else:
        put_lines(lines)
    return 0


def which(vms: "list[VmInfo]", word: str) -> "tuple[VmInfo, str]":
    """Return the VM and the tag of `vm` or `vm@tag`.  Raises NoSuchVm, ArgumentError."""
    name, at, tag = word.partition("@")
    if at and not tag:
        raise ArgumentError(f"no tag after the @: {word}")
    found = parse_vmref(name).find(vms)
    if found is None:
        raise NoSuchVm(f"vm {name} not found")
    return found, tag


def clone_file(disk: "DiskInfo", target: str) -> str:
    """Copy the file of a disk; return its format.  Raises CommandError."""
    try:
        chain = OpenedChain(disk.path, disk.format)
    except VmdError as error:
        raise CommandError(f"disk {error}") from None
    try:
        link = chain.links[0]
        bar = Bar(os.path.basename(target))
        with new_file(target) as fd:
            try:
                copy_file(link.fd, fd, bar.show)
            finally:
                bar.end()
        return link.format
    except VmdError as error:
        raise CommandError(str(error)) from None
    finally:
        chain.close()


def clone_snapshot(disk: "DiskInfo", tag: str, target: str) -> str:
    """Write a disk as it was at a snapshot to an image of its own; return its format.  Raises CommandError.

    The VM may run: the clusters of a snapshot do not change while the snapshot exists.
    """
    try:
        fd = open_disk(disk.path)
        found = probe(fd, disk.path, disk.format)
        if found.format != "qcow2":
            raise ImageError(disk.path, f"is {found.format or 'no image'}: only qcow2 images have snapshots")
        links: list[Link] = []
        if found.backing:
            if not disk.format and not disk.path.endswith(".qcow2"):
                raise ImageError(disk.path, f"has backing file {found.backing}, but only its first bytes say so")
            below = OpenedChain(os.path.join(os.path.dirname(disk.path), found.backing), found.backing_format)
            links, below.links = below.links, []
        backing = open_chain(links, writable=False) if links else None
        plain = Qcow2Image(os.dup(fd), disk.path, writable=False, backing=backing)
        one = snapshot_of(plain, tag)
        image = Qcow2Image(fd, disk.path, writable=False, backing=backing, snapshot=one.replace(state_bytes=0))
        bar = Bar(os.path.basename(target))
        try:
            convert(image, target, "qcow2", image.size, bar.show)
        finally:
            bar.end()
        again = Qcow2Image(os.dup(fd), disk.path, writable=False, backing=backing)
        if find(read_snapshots(again.fd, again.header, disk.path), tag) != one:
            os.unlink(target)
            raise ImageError(disk.path, f"snapshot {tag} was deleted while it was read")
    except OSError as error:
        raise CommandError(f"disk {disk.path}: {error.strerror}", error.errno) from None
    except VmdError as error:
        raise CommandError(str(error) if isinstance(error, HostError) else f"disk {error}") from None
    return "qcow2"


def open_disk(path: str) -> int:
    """Open an image for reading, without a lock.  Raises ImageError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise ImageError(path, f"cannot be opened: {error.strerror}") from None


def snapshot_of(image: Qcow2Image, tag: str) -> "Snapshot":
    """Return a snapshot of an image.  Raises ImageError, OSError."""
    one = find(read_snapshots(image.fd, image.header, image.path), tag)
    if one is None:
        raise ImageError(image.path, f"has no snapshot {tag}")
    return one


class Limits:
    """The limits of a VM in the form of vm.conf: of each disk, of each interface, and of the VM."""

    def __init__(self, figures: "list[VmFigures]") -> None:
        """`figures` are those of the VM; none if it is gone by now."""
        self.disks, self.nics, self.vm = dict[int, str](), dict[int, str](), ""
        for vm in figures:
            for disk in vm.disks:
                iops = f"iops {disk.iops_limit}", disk.iops_limit
                self.disks[disk.index] = limit(iops, (rate(disk.rate_limit), disk.rate_limit))
            self.nics = {nic.index: limit((rate(nic.rate_limit), nic.rate_limit)) for nic in vm.nics}
            whole = (
                (f"memory {size(vm.limit.memory_bytes)}", vm.limit.memory_bytes),
                (f"cpu {vm.limit.cpu_percent}%", vm.limit.cpu_percent),
                (f"weight {vm.limit.weight}", vm.limit.weight),
            )
            given = ", ".join(words for words, value in whole if value)
            self.vm = f"limit {{ {given} }}" if given else ""


def limit(*given: tuple[str, int]) -> str:
    """Return the limits of a device, or "".  A value of 0 means no limit."""
    words = " ".join(words for words, value in given if value)
    return f"limit {words}" if words else ""


def rate(value: int) -> str:
    """Return a limit of bytes a second."""
    return f"rate {size(value)}"


def size(value: int) -> str:
    """Return a number of bytes in the largest unit that divides it."""
    shift, unit = next((pair for pair in UNITS if value % (1 << pair[0]) == 0), (0, ""))
    return f"{value >> shift}{unit}"


def block(old: "VmInfo", new: str, disks: list[tuple[str, str]], limits: Limits) -> list[str]:
    """Return the block of the new VM for vm.conf.  It has no addresses, so the new VM gets its own."""
    assert old.files is not None
    lines = [f'vm "{new}" {{', f"    memory {old.memory_bytes >> 20}M"]
    if old.vcpus > 1:
        lines.append(f"    vcpus {old.vcpus}")
    if old.files.boot_image:
        lines.append(f"    boot {quoted(old.files.boot_image)}")
        lines.append(f"    # its command line, if it has one, is in the block of {old.name}")
    if old.files.initrd:
        lines.append(f"    initrd {quoted(old.files.initrd)}")
    for index, (path, image_format) in enumerate(disks):
        lines.append(f"    disk {quoted(path)} format {image_format} {limits.disks.get(index, '')}".rstrip())
    if old.files.cdrom:
        lines.append(f"    cdrom {quoted(old.files.cdrom)}")
    lines += [f"    {interface(nic, limits.nics.get(index, ''))}" for index, nic in enumerate(old.nics)]
    if any(nic.forwards for nic in old.nics):
        lines.append(f"    # forwards of {old.name} are in its block; the new VM needs other ports of the host")
    if old.files.seed:
        lines.append(f"    # add a seed here, as in the block of {old.name}: it makes the guest another instance")
    if limits.vm:
        lines.append(f"    {limits.vm}")
    return [*lines, "}"]


def interface(nic: "NicInfo", limited: str) -> str:
    """Return the line of an interface with the same options."""
    words = f"{'local ' if nic.local else ''}interface"
    options = [f'switch "{nic.switch}"'] if nic.switch else []
    if nic.locked:
        options.append("locked lladdr")
    if nic.vhost:
        options.append("vhost")
    if limited:
        options.append(limited)
    return f"{words} {{ {', '.join(options)} }}" if options else words


def quoted(path: str) -> str:
    """Return a path in quotes for vm.conf."""
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
