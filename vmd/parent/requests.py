"""Checks of what clients, or the configuration, ask a VM to be."""

import errno

from vmd.config.model import MAX_MEMORY_BYTES, MAX_VCPUS, MIN_MEMORY_BYTES, BootDevice, VmConfig, valid_vm_name
from vmd.errors import OperatorError
from vmd.ipc.messages import StartRequest

# Booting from these is for installing: a guest that resets itself is done, and must not begin anew (*cat. 4.4*).
# Unlike vmd, where `boot device disk` stops as well.
ONE_SHOT_DEVICES = (BootDevice.CDROM, BootDevice.NET)


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
    # Descriptors name the boot files of a client; paths it sends along are for messages only.
    return config.replace(parent="", origin="")


def one_shot_config(config: VmConfig, message: StartRequest) -> VmConfig:
    """Return the configuration of one start: a known VM's, with what the client wants otherwise this time."""
    if message.cmdline is not None:
        config = config.replace(cmdline=message.cmdline)
    if message.boot_device is not BootDevice.AUTO:
        config = config.replace(boot_device=message.boot_device)
    return config


def refuse_unsupported(config: VmConfig) -> None:
    """Raise OperatorError(ENOTSUP) if a VM needs what this version cannot do; nothing is ignored silently."""
    needs = (
        (config.nics, "network interfaces"),
        (config.parent, f"being an instance of {config.parent}"),
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
