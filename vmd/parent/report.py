"""Descriptions of VMs (*cat. 3.3*) and of configurations for clients, cut so that they fit into a message."""

from vmd.config.check import ConfigErrors
from vmd.ipc.messages.clients import Caller, DiskInfo, NicInfo, VmFiles, VmInfo
from vmd.ipc.messages.shared import brief, fitting
from vmd.log import log
from vmd.parent.access import may_control, owner_text
from vmd.parent.usage import used_bytes
from vmd.parent.vm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.config.model import VmConfig

# Longer text is cut.  A description that does not fit into a message would make the whole list fail.
PATH_BYTES_MAX = 1023
REASON_BYTES_MAX = 1500
NOTES_MAX = 30
NOTES_BYTES_MAX = 12288  # of all notes together
ERRORS_BYTES_MAX = 8000  # of all errors of a configuration; half of what fits into a message


def describe(vm: Vm, nics: tuple[NicInfo, ...], caller: Caller) -> VmInfo:
    """Return the status row of a VM.

    The paths of its files and its login are shown to users who may control it.  The rest is shown to all users who may
    open the socket.
    """
    config = vm.running_config or vm.config
    gid, end = vm.config.owner.gid, vm.last_end
    return VmInfo(
        vmid=vm.vmid,
        name=vm.name,
        pid=vm.pid,
        vcpus=config.vcpus,
        memory_bytes=config.memory_bytes,
        resident_bytes=used_bytes(vm.memory, vm.pid) if vm.pid else 0,
        tty=vm.pty.path if vm.pty else "",
        uid=vm.uid,
        gid=gid,
        owner=owner_text(vm.uid, gid),
        state=vm.state.value,
        text=brief(vm.text, REASON_BYTES_MAX),
        since_s=int(vm.since_s),
        started_s=int(vm.started_s) if vm.alive else 0,
        restarts=vm.guest_resets,
        autostart=vm.from_config and vm.config.enabled,
        files=files_of(config).replace(console_log=log_of(vm.config)) if may_control(caller, vm.uid, gid) else None,
        nics=nics,
        login=config.seed.user if config.seed is not None and may_control(caller, vm.uid, gid) else "",
        ended=end.replace(text=brief(end.text, REASON_BYTES_MAX)) if end is not None else None,
    )


def files_of(config: "VmConfig") -> VmFiles:
    """Return the paths of the files that a VM uses."""

    def shown(path: str) -> str:
        return brief(path, PATH_BYTES_MAX)

    return VmFiles(
        boot_image=shown(config.kernel),
        initrd=shown(config.initrd),
        disks=tuple(DiskInfo(path=shown(disk.path), format=disk.format) for disk in config.disks),
        cdrom=shown(config.cdrom),
        seed=config.seed is not None,
    )


def log_of(config: "VmConfig") -> str:
    """Return the path of a VM's console log.  It is that of this host's configuration, also for a VM from elsewhere."""
    return brief(config.console_log.path_of(config.name), PATH_BYTES_MAX) if config.console_log is not None else ""


def brief_notes(notes: list[str]) -> tuple[str, ...]:
    """Return as many notes as fit into a message."""
    return tuple(fitting(notes, NOTES_MAX, NOTES_BYTES_MAX))


def log_errors(errors: ConfigErrors) -> None:
    """Log the errors of a configuration, a line for each."""
    for line in (*str(errors).splitlines(), errors.summary):
        log.error(line)


def brief_errors(errors: ConfigErrors) -> str:
    """Return as many errors as fit into a message, a line for each, and their summary."""
    lines = str(errors).splitlines()
    return "\n".join((*fitting(lines, len(lines), ERRORS_BYTES_MAX), errors.summary))
