"""Checks of what clients, or the configuration, ask a VM to be."""

import errno
import os

from vmd.config import values
from vmd.config.model import (
    CMDLINE_MAX,
    MAX_DISKS,
    MAX_INET6_PREFIX,
    MAX_MEMORY_BYTES,
    MAX_NICS,
    MAX_RDOMAIN,
    MAX_VCPUS,
    MIN_MEMORY_BYTES,
    NAME_MAX,
    PATH_MAX,
    BootDevice,
    Owner,
    Prefix,
    Rights,
    VmConfig,
    VmFlag,
    valid_serial,
    valid_vm_name,
)
from vmd.errors import OperatorError
from vmd.ipc.messages import StartRequest

VMID_MAX = (1 << 31) - 1

def described(message: StartRequest, *, given_boot: bool, given_initrd: bool) -> VmConfig:
    """Return what a client says of a new VM, and only what it has to say: of what is there, not of what it claims.

    `given` is what it really gives, whose files they are is not asked, and the paths of boot files are those of
    descriptors that came along.  Raises OperatorError naming the first thing that is wrong.
    """
    name = message.name
    if not valid_vm_name(name):
        raise OperatorError(errno.EINVAL, f"invalid VM name: {name}")
    wanted = message.config or VmConfig(name=name)
    if message.cmdline is not None:
        raise OperatorError(errno.EINVAL, f"vm {name}: two command lines")
    if not given_boot == (VmFlag.KERNEL in wanted.given) == bool(wanted.kernel):
        raise OperatorError(errno.EINVAL, f"vm {name}: a boot image that nobody opened, or asked for")
    if not given_boot and (wanted.cmdline or wanted.initrd or given_initrd):
        what = "a command line" if wanted.cmdline else "an initrd"
        raise OperatorError(errno.EINVAL, f"vm {name}: {what} needs a boot image of its own (-b)")
    if given_initrd != bool(wanted.initrd):
        raise OperatorError(errno.EINVAL, f"vm {name}: an initrd that nobody opened, or asked for")
    check_paths(wanted)
    given = wanted.given & ~VmFlag.INSTANCE
    for there, flag in ((wanted.disks, VmFlag.DISK), (wanted.nics, VmFlag.NETWORK), (wanted.cdrom, VmFlag.CDROM)):
        given |= flag if there else VmFlag(0)
    return wanted.replace(
        name=name,
        parent="",
        given=given,
        owner=Owner(),
        origin="",
        plan_id=0,
        plan_prefix4=None,
        plan_prefix6=None,
        rights=Rights(),
    )


def check_paths(config: VmConfig) -> None:
    """Raise OperatorError unless a client names files as vmctl does, by absolute paths.

    A relative one would be looked for where the daemon is, which is not where the client is.
    """
    paths = [("disk", disk.path) for disk in config.disks]
    paths += [("cdrom", config.cdrom), ("boot image", config.kernel), ("initrd", config.initrd)]
    for what, path in paths:
        raw = os.fsencode(path)
        if what == "disk" or raw:
            if not raw.startswith(b"/") or b"\0" in raw:
                raise OperatorError(errno.EINVAL, f"vm {config.name}: {what}: not an absolute path: {path}")
            if len(raw) > PATH_MAX:
                raise OperatorError(errno.ENAMETOOLONG, f"vm {config.name}: {what} path too long")


def check_formats(config: VmConfig) -> None:
    """Raise OperatorError if a disk is of a kind that does not exist."""
    for disk in config.disks:
        if disk.format not in ("", *values.DISK_FORMATS):
            raise OperatorError(errno.EINVAL, f"vm {config.name}: unrecognized disk format {disk.format}")


def check_serials(config: VmConfig) -> None:
    """Raise OperatorError if a disk could not be told from another one, or not at all, by its serial number."""
    serials = [disk.serial for disk in config.disks if disk.serial]
    for serial in serials:
        if not valid_serial(serial):
            raise OperatorError(errno.EINVAL, f"vm {config.name}: invalid serial number of a disk: {serial!r}")
        if serials.count(serial) > 1:
            raise OperatorError(errno.EINVAL, f"vm {config.name}: two disks have the serial number {serial}")


def check_cmdline(config: VmConfig) -> None:
    """Raise OperatorError if no kernel takes such a command line."""
    raw = os.fsencode(config.cmdline)
    if len(raw) > CMDLINE_MAX:
        raise OperatorError(errno.EINVAL, f"vm {config.name}: cmdline too long (limit is {CMDLINE_MAX})")
    if b"\0" in raw:
        raise OperatorError(errno.EINVAL, f"vm {config.name}: cmdline contains a NUL byte")


def checked_request(config: VmConfig, *, bootable: bool) -> VmConfig:
    """Return a client's description of a VM after checking what vm.conf's grammar would have.

    `bootable`: it has something to run that is not in the description.

    Raises OperatorError naming the first thing that is wrong.
    """
    if not valid_vm_name(config.name):
        raise OperatorError(errno.EINVAL, f"invalid VM name: {config.name}")
    if not MIN_MEMORY_BYTES <= config.memory_bytes <= MAX_MEMORY_BYTES:
        raise OperatorError(errno.EINVAL, f"vm {config.name}: memory size out of range: {config.memory_bytes} bytes")
    if not 1 <= config.vcpus <= MAX_VCPUS:
        raise OperatorError(errno.EINVAL, f"vm {config.name}: vcpus must be 1 to {MAX_VCPUS}, not {config.vcpus}")
    if not bootable and not config.disks and not config.cdrom:
        raise OperatorError(errno.EINVAL, f"vm {config.name}: no kernel, disk or cdrom to boot from")
    if len(config.disks) > MAX_DISKS:
        raise OperatorError(errno.EINVAL, f"vm {config.name}: too many disks: {len(config.disks)}")
    check_formats(config)
    check_serials(config)
    check_cmdline(config)
    check_nics(config)
    check_rights(config)
    return config.replace(parent="", origin="")


def check_rights(config: VmConfig) -> None:
    """Raise OperatorError if nobody can have such a number: cut to 32 bits it might be root's."""
    for user in (config.rights.boot, config.rights.disks, config.rights.cdrom):
        if user is not None and not (0 <= user.uid <= values.UID_MAX and 0 <= (user.gid or 0) <= values.UID_MAX):
            raise OperatorError(errno.EINVAL, f"vm {config.name}: invalid user: {user.uid}")


def check_nics(config: VmConfig) -> None:
    """Raise OperatorError if a VM's interfaces, or the origin of their addresses, are not what vm.conf could say."""
    if len(config.nics) > MAX_NICS:
        raise OperatorError(errno.EINVAL, f"vm {config.name}: too many interfaces: {len(config.nics)}")
    for nic in config.nics:
        try:
            values.tap_name(nic.tap)
            values.group_name(nic.group)
        except ValueError as error:
            raise OperatorError(errno.EINVAL, f"vm {config.name}: {error}") from None
        if len(nic.lladdr) not in (0, 6) or (nic.lladdr and (nic.lladdr[0] & 1 or not any(nic.lladdr))):
            raise OperatorError(errno.EINVAL, f"vm {config.name}: invalid address: {nic.lladdr[:6].hex(':')}")
        if len(nic.switch) > NAME_MAX:
            raise OperatorError(errno.EINVAL, f"vm {config.name}: switch name too long")
        if nic.rdomain is not None and not 0 <= nic.rdomain <= MAX_RDOMAIN:
            raise OperatorError(errno.EINVAL, f"vm {config.name}: invalid rdomain: {nic.rdomain}")
    prefix4, prefix6 = config.plan_prefix4, config.plan_prefix6
    if not 0 <= config.plan_id <= VMID_MAX or not (
        (prefix4 is None or is_prefix(prefix4, 4, values.LOCAL_PREFIX_BITS))
        and (prefix6 is None or is_prefix(prefix6, 16, MAX_INET6_PREFIX))
    ):
        raise OperatorError(errno.EINVAL, f"vm {config.name}: invalid addresses of local interfaces")


def is_prefix(prefix: Prefix, size: int, most: int) -> bool:
    """Return whether a range is one of addresses of `size` bytes, with `most` bits given at most."""
    if len(prefix.address) != size or not 0 <= prefix.length <= most:
        return False
    return not int.from_bytes(prefix.address, "big") & ((1 << (8 * size - prefix.length)) - 1)


def one_shot_config(config: VmConfig, message: StartRequest) -> VmConfig:
    """Return the configuration of one start: a known VM's, with what the client wants otherwise this time."""
    if message.cmdline is not None:
        config = config.replace(cmdline=message.cmdline)
        check_cmdline(config)
    if message.boot_device is not BootDevice.AUTO:
        config = config.replace(boot_device=message.boot_device)
    return config


def refuse_unsupported(config: VmConfig) -> None:
    """Raise OperatorError(ENOTSUP) if a VM needs what this version cannot do; nothing is ignored silently."""
    needs = (
        (config.sev or config.sev_es, "encrypted memory (sev)"),
    )
    for wanted, what in needs:
        if wanted:
            raise OperatorError(errno.ENOTSUP, f"vm {config.name}: {what}: not supported by this version of vmd")


def require_boot_device(config: VmConfig) -> None:
    """Raise OperatorError if a VM is to boot from what it has not."""
    for device, there in ((BootDevice.CDROM, config.cdrom), (BootDevice.DISK, config.disks)):
        if config.boot_device is device and not there:
            name = device.name.lower()
            raise OperatorError(errno.ENODEV, f"vm {config.name}: boot device {name}: it has no {name}")
