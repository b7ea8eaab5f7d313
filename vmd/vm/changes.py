"""Changes a machine while its guest runs: the size of a disk, the disc in the drive, limits of devices.

The device's process makes the change and tells the guest.  The machine may be paused meanwhile.
"""

import errno

from vmd.closing import close
from vmd.config.model import with_forwards, with_limits
from vmd.ipc.messages.shared import brief
from vmd.ipc.messages.vm import DiscChanged, DiskResized
from vmd.vm.fetch import fetch_one
from vmd.vm.kinds import CDROM, DISK, INTERFACE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.config.model import VmConfig
    from vmd.ipc.channel import Channel
    from vmd.ipc.messages.vm import ChangeDisc, ResizeDisk
    from vmd.vm.devproc import DeviceProcess
    from vmd.vm.kinds import Kind
    from vmd.vm.machine import Machine


def resize(machine: "Machine", message: "ResizeDisk", vmm: "Channel") -> None:
    """Make a disk larger, and answer with DiskResized."""

    def answer(code: int, text: str) -> None:
        vmm.send(DiskResized(vmid=message.vmid, code=code, text=brief(text)))

    disk = find(machine, DISK, message.index)
    if disk is None:
        answer(errno.ENODEV, f"has no disk{message.index}")
    else:
        disk.resize(message.size_bytes, answer)


def change_disc(machine: "Machine", message: "ChangeDisc", courier: int | None, vmm: "Channel") -> None:
    """Change the disc, and answer with DiscChanged.  The courier is closed here."""

    def answer(code: int, text: str) -> None:
        if not code:  # the machine has this disc, too, when it is sent to another host
            machine.config = machine.config.replace(cdrom=message.path, drive=True)
        vmm.send(DiscChanged(vmid=message.vmid, code=code, text=brief(text)))

    def change(disc: int | None) -> None:
        drive = find(machine, CDROM, 0)
        if drive is None:
            answer(errno.ENODEV, "has no cdrom drive")
        elif message.path and disc is None:
            answer(errno.EPIPE, f"cdrom {message.path}: the file did not come")
        else:
            drive.change_disc(disc, message.path, answer, force=message.force)
        if disc is not None:
            close(disc)

    if courier is None:
        change(None)
    else:
        fetch_one(machine.outside.loop, courier, "cdrom", change)


def limit(machine: "Machine", wanted: "VmConfig") -> None:
    """Give a machine the limits of another configuration.

    Its forwards are copied, too: this process does not use them, but sends them with the machine.
    """
    machine.config = with_forwards(with_limits(machine.config, wanted), wanted)
    limit_devices(machine)


def limit_devices(machine: "Machine") -> None:
    """Tell the devices of a machine their limits."""
    for index, disk in enumerate(machine.config.disks):
        device = find(machine, DISK, index)
        if device is not None:
            device.limit(disk.iops_limit, disk.rate_limit)
    for index, nic in enumerate(machine.config.nics):
        device = find(machine, INTERFACE, index)
        if device is not None:
            device.limit(0, nic.rate_limit)


def find(machine: "Machine", kind: "Kind", index: int) -> "DeviceProcess | None":
    """Return the device of this kind with this index, or None."""
    devices = [device for device in machine.outside.devices.running if device.kind is kind]
    return devices[index] if 0 <= index < len(devices) else None
