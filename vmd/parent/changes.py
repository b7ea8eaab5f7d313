"""Changes of a VM, whether it runs or not: the size of a disk, the disc in its drive.

A VM has one change at a time, and none while it starts, stops or is sent.  The caller needs control of the VM.  Files
are opened with the caller's rights, even if another user has named them: vmd does not give a user more of the host's
storage than they have without it.

If the VM runs, its process makes the change (`vmd/vm/changes.py`).  If it does not run, an imgresize changes the disk.
A new disc becomes part of the VM's configuration until vm.conf is read again, so it survives a reset of the guest.
"""

import errno

from vmd.config import rules
from vmd.errors import OperatorError, VmdError, number, sentence
from vmd.ipc.messages.clients import Caller, DiscInserted, DiscRequest, Resized, ResizeRequest
from vmd.ipc.messages.opener import OpenFiles
from vmd.ipc.messages.shared import brief
from vmd.ipc.messages.vm import ChangeDisc, DiscChanged, DiskResized, ResizeDisk
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent.access import rights_of
from vmd.parent.clients import For
from vmd.parent.opening import identity
from vmd.parent.report import brief_notes
from vmd.parent.requests import require_absolute
from vmd.parent.vm import DeviceChange, Vm
from vmd.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.config.model import Owner, VmConfig
    from vmd.ipc.imsg import Envelope
    from vmd.parent.core import Core
    from vmd.parent.opening import Opened, Openings
    from vmd.parent.vm import Files

DISK = "disk"
SIZE_MAX = (1 << 63) - 1


class Resize(DeviceChange):
    """A disk is made larger."""

    def __init__(self, index: int, size_bytes: int, config: "VmConfig") -> None:
        super().__init__(f"{DISK}{index}")
        self.index = index
        self.size_bytes = size_bytes
        self.disk = config.disks[index]


class Disc(DeviceChange):
    """A disc is inserted into the drive.  With an empty path the disc is removed."""

    def __init__(self, path: str, rights: "Owner | None", *, force: bool) -> None:
        super().__init__("the disc in its drive")
        self.path = path
        self.rights = rights
        self.force = force
        self.files: Files = {}
        self.notes: tuple[str, ...] = ()


class Changes:
    """The room of changes."""

    def __init__(self, core: "Core", openings: "Openings") -> None:
        self.core = core
        self.vms = core.vms
        self.clients = core.clients
        self.openings = openings

    # --- disks -------------------------------------------------------------------------------------------

    def serve_resize(self, message: ResizeRequest, caller: Caller, envelope: "Envelope") -> None:
        """Make a disk larger, if the caller may write to its image."""
        vm = self.vms.get(message.vmid, message.name)
        vm.require_control(caller, "resize a disk of")
        config = vm.running_config or vm.config
        change = Resize(disk_index(config, message.disk), message.size_bytes, config)
        require_size(vm, message.size_bytes)
        self.begin(vm, change, caller, envelope)
        job = OpenFiles(**identity(rights_of(caller)), name=vm.name, disks=(change.disk,), only_writable=True)
        self.open(vm, change, caller, job, lambda opened: self._may_write(vm, change, caller, opened))

    def _may_write(self, vm: Vm, change: Resize, caller: Caller, opened: "Opened") -> None:
        """The caller may write to the image: make the disk larger."""
        opened.close()
        if vm.alive:
            for what, file in opened.files.items():
                if vm.files.get(what, file) != file:
                    text = f"{what} is not the file that its guest uses: it was replaced meanwhile"
                    self.failed(vm, change, OperatorError(errno.ESTALE, text))
                    return
            message = ResizeDisk(vmid=vm.vmid, index=change.index, size_bytes=change.size_bytes)
            self.core.peers.send(Proc.VMM, message)
            return
        job = OpenFiles(
            **identity(vm.config.rights.disks),
            name=vm.name,
            disks=(change.disk,),
            in_conf=bool(vm.config.origin),
            patience_s=vm.patience_s(),
            resize_bytes=change.size_bytes,
        )
        self.open(vm, change, caller, job, lambda opened: self._resized(vm, change, opened))

    def _resized(self, vm: Vm, change: Resize, opened: "Opened | None" = None) -> None:
        """A disk is larger: answer the client."""
        if opened is not None:
            opened.close()
        vm.changing = None
        log.info(f"{vm.name}: {change.what} has {change.size_bytes} bytes now")
        self.core.events.add("resize", vm, device=change.what, value=str(change.size_bytes))
        resized = Resized(
            vmid=vm.vmid,
            name=vm.name,
            disk=change.what,
            path=change.disk.path,
            size_bytes=change.size_bytes,
            running=vm.alive,
        )
        self.clients.answer_all(For.CHANGE, vm.vmid, resized)

    def on_disk_resized(self, message: DiskResized, _envelope: "Envelope") -> None:
        """The process of a VM has made a disk larger, or has failed to."""
        vm = self.vms.living(message.vmid)
        change = vm.changing
        if not isinstance(change, Resize):
            return
        if message.code:
            self.failed(vm, change, OperatorError(message.code, message.text))
        else:
            self._resized(vm, change)

    # --- discs -------------------------------------------------------------------------------------------

    def serve_disc(self, message: DiscRequest, caller: Caller, envelope: "Envelope") -> None:
        """Change the disc in the drive, if the caller may read the new disc."""
        vm = self.vms.get(message.vmid, message.name)
        vm.require_control(caller, "change the disc of")
        check_path(vm, message.path)
        config = vm.running_config or vm.config
        if vm.alive and not (config.cdrom or config.drive):
            why = "it gets one at its next start, if a disc is inserted while it does not run"
            raise OperatorError(errno.ENODEV, f"vm {vm.name} has no cdrom drive: {why}")
        change = Disc(message.path, rights_of(caller), force=message.force)
        self.begin(vm, change, caller, envelope)
        if not change.path:
            self._put_in(vm, change, None)
            return
        job = OpenFiles(**identity(change.rights), name=vm.name, cdrom=change.path, in_conf=False)
        self.open(vm, change, caller, job, lambda opened: self._put_in(vm, change, opened))

    def _put_in(self, vm: Vm, change: Disc, opened: "Opened | None") -> None:
        """The disc is open: give it to the VM's process, if the VM runs."""
        couriers = opened.take_couriers() if vm.alive and opened is not None else []
        if opened is not None:
            change.files, change.notes = opened.files, tuple(brief_notes(list(opened.notes)))
            opened.close()
        if vm.alive:
            message = ChangeDisc(vmid=vm.vmid, path=change.path, force=change.force)
            self.core.peers.send(Proc.VMM, message, fds={"courier": couriers} if couriers else {})
        else:
            self._inserted(vm, change)

    def _inserted(self, vm: Vm, change: Disc) -> None:
        """The drive has the new disc: put it into the VM's configuration, and answer the client."""
        vm.changing = None

        def changed(config: "VmConfig") -> "VmConfig":
            return config.replace(
                cdrom=change.path, drive=True, rights=config.rights.replace(cdrom=change.rights)
            )

        vm.config = changed(vm.config)
        vm.running_config = vm.running_config and changed(vm.running_config)
        vm.next_config = vm.next_config and changed(vm.next_config)
        if vm.alive:
            vm.files = {what: file for what, file in vm.files.items() if not what.startswith("cdrom ")} | change.files
        for note in change.notes:
            log.warn(f"vm {vm.name}: {note}")
        log.info(f"{vm.name}: its drive has {f'disc {change.path}' if change.path else 'no disc'} now")
        self.core.events.add("cdrom", vm, text="has another disc" if change.path else "has no disc", device="cdrom0")
        inserted = DiscInserted(
            vmid=vm.vmid, name=vm.name, path=change.path, running=vm.alive, notes=change.notes
        )
        self.clients.answer_all(For.CHANGE, vm.vmid, inserted)

    def on_disc_changed(self, message: DiscChanged, _envelope: "Envelope") -> None:
        """The process of a VM has changed the disc, or has failed to."""
        vm = self.vms.living(message.vmid)
        change = vm.changing
        if not isinstance(change, Disc):
            return
        if message.code:
            self.failed(vm, change, OperatorError(message.code, message.text))
        else:
            self._inserted(vm, change)

    # --- any ---------------------------------------------------------------------------------------------

    def begin(self, vm: Vm, change: DeviceChange, caller: Caller, envelope: "Envelope") -> None:
        """Begin a change that a client waits for.  Raises OperatorError."""
        if self.core.ending:
            raise OperatorError(errno.ESHUTDOWN, "vmd is stopping")
        self.openings.require_answers(caller.uid)
        vm.begin_change(change)
        self.clients.wait(envelope.peerid, For.CHANGE, vm.vmid)

    def open(
        self, vm: Vm, change: DeviceChange, caller: Caller, job: OpenFiles, then: "Callable[[Opened], None]"
    ) -> None:
        """Let an opener do a job for a change, then call `then`, unless the change has been given up meanwhile."""

        def opened(files: "Opened") -> None:
            if vm.changing is change:
                then(files)
            else:  # the client has been answered
                files.close()

        self.openings.open_for(change, vm, caller.uid, job, opened, lambda error: self.failed(vm, change, error))

    def failed(self, vm: Vm, change: DeviceChange, error: VmdError) -> None:
        """A change could not be made; nothing is changed."""
        if vm.changing is not change:
            return
        vm.changing = None
        text = brief(sentence(error).removeprefix(f"vm {vm.name}: "))
        log.error(f"vm {vm.name}: {change.what} was not changed: {text}")
        self.clients.fail_all(For.CHANGE, vm.vmid, number(error), f"vm {vm.name}: {text}")


def disk_index(config: "VmConfig", word: str) -> int:
    """Return the number of the disk that a word names: number, `disk` and number, or path.  Raises OperatorError."""
    digits = word.removeprefix(DISK)
    if digits.isascii() and digits.isdigit() and len(digits) < len(str(SIZE_MAX)) and int(digits) < len(config.disks):
        return int(digits)
    for index, disk in enumerate(config.disks):
        if disk.path == word:
            return index
    have = ", ".join(f"{DISK}{index} ({disk.path})" for index, disk in enumerate(config.disks))
    raise OperatorError(errno.ENODEV, f"vm {config.name} has no disk {word}: it has {have or 'none'}")


def require_size(vm: Vm, size_bytes: int) -> None:
    """Raise OperatorError unless this is a valid size of a disk."""
    if not 0 < size_bytes <= SIZE_MAX or size_bytes % SECTOR:
        what = f"{size_bytes} bytes: the size of a disk is a multiple of its sectors of {SECTOR} bytes"
        raise OperatorError(errno.EINVAL, f"vm {vm.name}: {what}")


def check_path(vm: Vm, path: str) -> None:
    """Raise OperatorError unless the path of a disc is absolute, as vmctl sends it, or empty."""
    if path:
        require_absolute(vm.name, "cdrom", path)
    try:
        rules.path("cdrom name", path)
    except ValueError as error:
        raise OperatorError(errno.EINVAL, f"vm {vm.name}: {error}") from None
