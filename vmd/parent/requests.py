"""Checks of configurations of VMs that come from clients or streams."""

import errno
import os

from vmd.config import rules
from vmd.config.model import ROOT, BootDevice, NicConfig, Owner, Rights, VmConfig, VmFlag
from vmd.errors import OperatorError
from vmd.ipc.messages.clients import StartRequest
from vmd.seed import rules as seed_rules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.parent.vm import Vm


def described(message: StartRequest, *, given_boot: bool, given_initrd: bool, given_seed: bool) -> VmConfig:
    """Return the configuration of a new VM that a client describes, with only the fields that a client may set.

    `given_boot`, `given_initrd` and `given_seed`: the client has sent a descriptor for that.  The field `given` is made
    from the values that are present, not taken from the client.  The owner and the rights are empty.
    Raises OperatorError with the first error.
    """
    name = message.name
    check_name(name)
    wanted = message.config or VmConfig(name=name)
    if message.cmdline is not None:
        raise OperatorError(errno.EINVAL, f"vm {name}: the command line is given twice")
    if message.kernel or message.initrd:
        raise OperatorError(errno.EINVAL, f"vm {name}: the boot image is given twice")
    try:
        kernel, initrd = rules.files_on_disks(wanted)
    except ValueError as error:
        raise OperatorError(errno.EINVAL, f"vm {name}: {error}") from None
    boots = given_boot or kernel is not None
    if not boots == (VmFlag.KERNEL in wanted.given) == bool(wanted.kernel) or (given_boot and kernel is not None):
        raise OperatorError(errno.EINVAL, f"vm {name}: the boot images that are configured and sent do not match")
    if not boots and (wanted.cmdline or wanted.initrd or given_initrd):
        what = "a command line" if wanted.cmdline else "an initrd"
        raise OperatorError(errno.EINVAL, f"vm {name}: {what} needs a boot image of its own (-b)")
    if given_initrd != (bool(wanted.initrd) and initrd is None):
        raise OperatorError(errno.EINVAL, f"vm {name}: the initrds that are configured and sent do not match")
    if given_seed != (wanted.seed is not None):
        raise OperatorError(errno.EINVAL, f"vm {name}: the seeds that are configured and sent do not match")
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
        nics=tuple(map(without_host_settings, wanted.nics)),
        seed=wanted.seed and wanted.seed.public(),
    )


def without_host_settings(nic: NicConfig) -> NicConfig:
    """Return an interface without the settings that only vm.conf may give, such as forwards and vhost."""
    return nic.replace(address=None, forwards=(), dns=(), host_name="", vhost=False)


def with_permitted_vhost(vm: "Vm", config: VmConfig) -> VmConfig:
    """Return the configuration of a received VM.  Its interfaces keep vhost only if the VM is root's or of vm.conf."""
    if vm.from_config or vm.uid == ROOT:
        return config
    return config.replace(nics=tuple(nic.replace(vhost=False) for nic in config.nics))


def require_permitted_settings(vm: "Vm", config: VmConfig) -> None:
    """Raise OperatorError if a stream has fixed addresses or forwards, which only vm.conf may give.

    They are allowed for root, and if vm.conf gives the same to the VM of that name.
    """
    known = [(nic.address, nic.forwards) for nic in vm.config.nics] if vm.from_config else []
    for index, nic in enumerate(config.nics):
        if (nic.address, nic.forwards) in ((None, ()), *known) or vm.uid == ROOT:
            continue
        what = "a fixed address" if nic.address is not None else f"forward {nic.forwards[0]}"
        why = f"interface {index}: {what}: only vm.conf, or root, gives it"
        raise OperatorError(errno.EPERM, f"vm {config.name}: {why}")


def check_paths(config: VmConfig) -> None:
    """Raise OperatorError unless all paths are absolute, as vmctl sends them.

    A relative path would be looked for in the daemon's working directory, which is not the client's.
    """
    paths = [("disk", disk.path) for disk in config.disks]
    paths += [("cdrom", config.cdrom)]
    if rules.disk_file(config.kernel) is None:
        paths += [("boot image", config.kernel)]
    if rules.disk_initrd(config.initrd) is None:
        paths += [("initrd", config.initrd)]
    for what, path in paths:
        if what == "disk" or path:
            require_absolute(config.name, what, path)


def require_absolute(name: str, what: str, path: str) -> None:
    """Raise OperatorError unless a path of a VM is absolute, and one that a kernel can be asked for."""
    raw = os.fsencode(path)
    if not raw.startswith(b"/") or b"\0" in raw:
        raise OperatorError(errno.EINVAL, f"vm {name}: {what}: not an absolute path: {path}")


def check_name(name: str) -> None:
    """Raise OperatorError if this is no valid name of a VM."""
    try:
        rules.vm_name(name)
    except ValueError as error:
        raise OperatorError(errno.EINVAL, str(error)) from None


def checked_request(config: VmConfig, *, bootable: bool) -> VmConfig:
    """Return a client's description of a VM after the checks that the grammar of vm.conf makes for a file.

    `bootable`: it has something to boot that is not in the description.

    Raises OperatorError with the first error.
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
    """Return the configuration for one start: that of a known VM, with the changes that the client wants for it."""
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
    """Return the configuration for one start from files on the VM's disks, which a client has named.

    Raises ValueError.
    """
    kernel, initrd = rules.files_on_disks(config.replace(kernel=message.kernel, initrd=message.initrd))
    if bool(message.kernel) != (kernel is not None) or bool(message.initrd) != (initrd is not None):
        raise ValueError("a boot image is neither on a disk of the vm nor sent as an open file")
    if "kernel" in message.files or (initrd is not None and "initrd" in message.files):
        raise ValueError("kernel and initrd must both be on disks of the vm, or both be files of the host")
    return config.replace(kernel=message.kernel or config.kernel, initrd=message.initrd)


def require_startable(config: VmConfig, *, bootable: bool) -> None:
    """Raise OperatorError if no host can start such a VM; `bootable`: it has a boot image for this start."""
    for code, what in rules.obstacles(config, bootable=bootable):
        raise OperatorError(code, f"vm {config.name}: {what}")
