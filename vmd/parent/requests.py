"""Checks of what clients, or the configuration, ask a VM to be."""

import errno
import os

from vmd.config import rules
from vmd.config.model import ROOT, BootDevice, NicConfig, Owner, Rights, VmConfig, VmFlag
from vmd.errors import OperatorError
from vmd.ipc.messages.clients import StartRequest
from vmd.seed import rules as seed_rules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.parent.vmtable import Vm


def described(message: StartRequest, *, given_boot: bool, given_initrd: bool, given_seed: bool) -> VmConfig:
    """Return what a client says of a new VM, and only what it has to say: of what is there, not of what it claims.

    `given` is what it really gives, whose files they are is not asked, and the paths of boot files are those of
    descriptors that came along.  Raises OperatorError naming the first thing that is wrong.
    """
    name = message.name
    check_name(name)
    wanted = message.config or VmConfig(name=name)
    if message.cmdline is not None:
        raise OperatorError(errno.EINVAL, f"vm {name}: two command lines")
    if message.kernel or message.initrd:
        raise OperatorError(errno.EINVAL, f"vm {name}: two boot images")
    try:
        kernel, initrd = rules.files_on_disks(wanted)
    except ValueError as error:
        raise OperatorError(errno.EINVAL, f"vm {name}: {error}") from None
    boots = given_boot or kernel is not None
    if not boots == (VmFlag.KERNEL in wanted.given) == bool(wanted.kernel) or (given_boot and kernel is not None):
        raise OperatorError(errno.EINVAL, f"vm {name}: a boot image that nobody opened, or asked for")
    if not boots and (wanted.cmdline or wanted.initrd or given_initrd):
        what = "a command line" if wanted.cmdline else "an initrd"
        raise OperatorError(errno.EINVAL, f"vm {name}: {what} needs a boot image of its own (-b)")
    if given_initrd != (bool(wanted.initrd) and initrd is None):
        raise OperatorError(errno.EINVAL, f"vm {name}: an initrd that nobody opened, or asked for")
    if given_seed != (wanted.seed is not None):
        raise OperatorError(errno.EINVAL, f"vm {name}: a seed that nobody gave, or asked for")
    check_paths(wanted)
    given = wanted.given & ~(VmFlag.INSTANCE | VmFlag.SEED)
    for there, flag in (
        (wanted.disks, VmFlag.DISK),
        (wanted.nics, VmFlag.NETWORK),
        (wanted.cdrom, VmFlag.CDROM),
        (wanted.seed, VmFlag.SEED),
    ):
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
        fault="",
        console_log=None,
        nics=tuple(map(without_leave, wanted.nics)),
        seed=wanted.seed and wanted.seed.public(),
    )


def without_leave(nic: NicConfig) -> NicConfig:
    """Return an interface without what only vm.conf gives: ports of the host, addresses of its network, its kernel."""
    return nic.replace(address=None, forwards=(), dns=(), host_name="", vhost=False)


def with_leave(vm: "Vm", config: VmConfig) -> VmConfig:
    """Return a VM from elsewhere; the kernel moves the frames of its interfaces only if root or vm.conf has said so."""
    if vm.from_config or vm.uid == ROOT:
        return config
    return config.replace(nics=tuple(nic.replace(vhost=False) for nic in config.nics))


def require_leave(vm: "Vm", config: VmConfig) -> None:
    """Raise OperatorError unless whoever a VM belongs to may have what of a stream only vm.conf gives.

    Root may, and whoever has a VM of that name in vm.conf which has the same.
    """
    known = [(nic.address, nic.forwards) for nic in vm.config.nics] if vm.from_config else []
    for index, nic in enumerate(config.nics):
        if (nic.address, nic.forwards) in ((None, ()), *known) or vm.uid == ROOT:
            continue
        what = "a fixed address" if nic.address is not None else f"forward {nic.forwards[0]}"
        why = f"interface {index}: {what}: only vm.conf, or root, gives it"
        raise OperatorError(errno.EPERM, f"vm {config.name}: {why}")


def check_paths(config: VmConfig) -> None:
    """Raise OperatorError unless a client names files as vmctl does, by absolute paths.

    A relative one would be looked for where the daemon is, which is not where the client is.
    """
    paths = [("disk", disk.path) for disk in config.disks]
    paths += [("cdrom", config.cdrom)]
    if rules.disk_file(config.kernel) is None:
        paths += [("boot image", config.kernel)]
    if rules.disk_initrd(config.initrd) is None:
        paths += [("initrd", config.initrd)]
    for what, path in paths:
        raw = os.fsencode(path)
        if (what == "disk" or raw) and (not raw.startswith(b"/") or b"\0" in raw):
            raise OperatorError(errno.EINVAL, f"vm {config.name}: {what}: not an absolute path: {path}")


def check_name(name: str) -> None:
    """Raise OperatorError if no VM can be called so."""
    try:
        rules.vm_name(name)
    except ValueError as error:
        raise OperatorError(errno.EINVAL, str(error)) from None


def checked_request(config: VmConfig, *, bootable: bool) -> VmConfig:
    """Return a client's description of a VM after checking what vm.conf's grammar would have.

    `bootable`: it has something to run that is not in the description.

    Raises OperatorError naming the first thing that is wrong.
    """
    check_name(config.name)
    try:
        rules.check_vm(config)
        if config.seed is not None:
            seed_rules.check(config.seed)
    except ValueError as error:
        raise OperatorError(errno.EINVAL, f"vm {config.name}: {error}") from None
    require_startable(config, bootable=bootable)
    return config.replace(parent="", origin="")


def one_shot_config(config: VmConfig, message: StartRequest) -> VmConfig:
    """Return the configuration of one start: a known VM's, with what the client wants otherwise this time."""
    try:
        if message.cmdline is not None:
            config = config.replace(cmdline=rules.cmdline(message.cmdline))
        if message.kernel or message.initrd:
            config = on_its_disks(config, message)
    except ValueError as error:
        raise OperatorError(errno.EINVAL, f"vm {config.name}: {error}") from None
    if message.boot_device is not BootDevice.AUTO:
        config = config.replace(boot_device=message.boot_device)
    return config


def on_its_disks(config: VmConfig, message: StartRequest) -> VmConfig:
    """Return a VM that boots, this time, what a client has named on its disks.  Raises ValueError."""
    kernel, initrd = rules.files_on_disks(config.replace(kernel=message.kernel, initrd=message.initrd))
    if bool(message.kernel) != (kernel is not None) or bool(message.initrd) != (initrd is not None):
        raise ValueError("a boot image that nobody opened")
    if "kernel" in message.files or (initrd is not None and "initrd" in message.files):
        raise ValueError("kernel and initrd are both on disks of the vm, or both are files of the host")
    return config.replace(kernel=message.kernel or config.kernel, initrd=message.initrd)


def require_startable(config: VmConfig, *, bootable: bool) -> None:
    """Raise OperatorError if a VM can be started on no host; `bootable`: it has a boot image for this start."""
    for code, what in rules.obstacles(config, bootable=bootable):
        raise OperatorError(code, f"vm {config.name}: {what}")
