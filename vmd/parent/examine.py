"""What `vmd -n` says of the images that a configuration names: what a start would say, in the same sentences.

Nothing is locked or opened for writing, so that the images of VMs that run can be looked at.
"""

import os
import time

from vmd.errors import HostError, OperatorError, VmdError
from vmd.parent import instances, service
from vmd.parent.disks import ImageProber, Use, follow, open_cdrom
from vmd.privsep.cell import Cell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.config.model import Config, DiskConfig, Owner, VmConfig
    from vmd.parent.disks import Prober

TIME_S = 60.0  # for all of them: storage may hang, and a configuration has hundreds of images


def check_images(config: "Config", warn: "Callable[[str], None]") -> None:
    """Warn of every image that a VM could not be started with, and of what is odd about the others.

    An image that is not there is only warned of, too: it may be mounted later.
    """
    vms, problems = instances.resolve(config.vms, lambda _name: None)
    for problem in problems:
        warn(problem)
    if not any(vm.disks or vm.cdrom for vm in vms):
        return
    try:
        cell = Cell.build(*service.lookup_user()) if os.geteuid() == 0 else None
    except (OperatorError, HostError, VmdError) as error:
        warn(f"warning: images are not examined: {error}")
        return
    try:
        examine(vms, ImageProber(cell), warn, time.monotonic() + TIME_S)
    finally:
        if cell is not None:
            cell.close()


def examine(vms: "list[VmConfig]", prober: "Prober", warn: "Callable[[str], None]", deadline_s: float) -> None:
    """Say of each VM what is to be said of its disks and its disc; what several VMs share is looked at once."""
    said: dict[tuple[DiskConfig | str, Owner | None], list[str]] = {}
    left = 0
    for vm in vms:
        keys: list[tuple[DiskConfig | str, Owner | None]] = [(disk, vm.rights.disks) for disk in vm.disks]
        for key in [*keys, (vm.cdrom, vm.rights.cdrom)] if vm.cdrom else keys:
            if key not in said:
                if time.monotonic() > deadline_s:
                    left += 1
                    continue
                image, user = key
                said[key] = of_disc(image, user, prober) if isinstance(image, str) else of_disk(image, user, prober)
            for sentence in said[key]:
                warn(f'{vm.origin}: vm "{vm.name}": {sentence}')
    if left:
        warn(f"warning: {left} images are not examined: the others took more than {TIME_S:g} seconds")


def of_disk(config: "DiskConfig", user: "Owner | None", prober: "Prober") -> list[str]:
    """Return what a start would say of a disk."""
    try:
        disk = follow(config, Use(user=user, locked=False), prober)
    except OperatorError as error:
        return [str(error)]
    disk.close()
    return disk.notes


def of_disc(path: str, user: "Owner | None", prober: "Prober") -> list[str]:
    """Return what a start would say of a disc."""
    try:
        fd, notes = open_cdrom(path, user, prober, locked=False)
    except OperatorError as error:
        return [str(error)]
    os.close(fd)
    return notes
