"""vmctl status, vmctl show: one line per VM (*cat. 3.3*).  -v, which is ours, adds figures and devices."""

import errno

from vmctl.errors import NoSuchVm
from vmctl.options import Given
from vmctl.output import clean, put_json, put_lines, warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.client import ClientError, Refused
from vmd.ipc.messages.clients import NicInfo, TroubleInfo, VmInfo
from vmd.ipc.messages.figures import VmFigures
from vmd.scaled import fmt_scaled

OWNER_MAX = 15  # longer names are cut; the column has 12, so names above that shift the rest of their row
ROW = "{:>5} {:>5} {:>5} {:>7} {:>7} {:>7} {:>12} {:>8} {}".format
HEADER = ROW("ID", "PID", "VCPUS", "MAXMEM", "CURMEM", "TTY", "OWNER", "STATE", "NAME")


def run(session: Session, given: Given) -> int:
    """Show all VMs, the running ones, or one VM."""
    wanted = parse_vmref(given.operand) if given.operand else None
    vms = session.client.list_vms()
    found = vms if wanted is None else [vm for vm in [wanted.find(vms)] if vm is not None]
    if wanted is not None and not found and session.json:
        raise NoSuchVm(f"vm {wanted} not found")
    shown = [vm for vm in found if vm.pid != 0 or not given.has("-r")]
    detailed = given.has("-v")
    rows, lines = [as_json(vm) if session.json else {} for vm in shown], [HEADER, *(row(vm) for vm in shown)]
    if detailed:
        from vmctl import activity, figures, interfaces, troubles  # most runs do not need them

        devices = [devices_of(session, vm) for vm in shown]
        counted = figures_of(session, shown)
        for vm, document, (nics, wrong) in zip(shown, rows, devices, strict=True):
            found_figures = counted.get(vm.vmid)
            document["figures"] = figures.as_json(found_figures) if found_figures is not None else None
            lines += activity.describe(found_figures) if found_figures is not None else []
            document["interfaces"] = [interfaces.as_json(nic) for nic in nics]
            document["troubles"] = [troubles.as_json(trouble) for trouble in wrong]
            lines += [line for nic in nics for line in interfaces.describe(vm.name, nic)]
            lines += [troubles.describe(vm.name, trouble) for trouble in wrong]
    if session.json:
        put_json({"vms": rows})
        return 0
    put_lines(lines)
    if wanted is not None and not found:
        raise NoSuchVm(f"vm {wanted} not found")
    if session.verbose or detailed:
        for vm in shown:
            if vm.text:
                warn(f"vm {vm.name}: {vm.text}")
    return 0


def devices_of(session: Session, vm: VmInfo) -> tuple[list[NicInfo], list[TroubleInfo]]:
    """Return the interfaces of a VM and the problems of its devices; none for a VM that is gone by now."""
    try:
        return session.client.list_devices(vm.vmid)
    except Refused as error:
        if error.number == errno.ENOENT:
            return [], []
        raise


def figures_of(session: Session, vms: list[VmInfo]) -> dict[int, VmFigures]:
    """Return the figures of VMs, by id.  This is the last request: a daemon of an earlier version hangs up after it."""
    try:
        rows = session.client.figures(vms[0].vmid) if len(vms) == 1 else session.client.figures() if vms else []
    except ClientError as error:
        if error.number in (errno.ENOENT, errno.ENOSYS):
            return {}
        raise
    return {figures.vmid: figures for figures in rows}


def row(vm: VmInfo) -> str:
    """Return a line of the table.  A VM that does not run has no process, no memory in use and no console."""
    running = vm.pid != 0
    return ROW(
        vm.vmid,
        vm.pid if running else "-",
        vm.vcpus,
        fmt_scaled(vm.memory_bytes),
        fmt_scaled(vm.resident_bytes) if running else "-",
        clean(vm.tty.removeprefix("/dev/")) if running and vm.tty else "-",
        clean(vm.owner[:OWNER_MAX]),
        clean(vm.state),
        clean(vm.name),
    )


def as_json(vm: VmInfo) -> dict[str, object]:
    """Return a VM for --json; a value that does not apply is null."""
    from vmctl import interfaces  # most runs do not need it

    running, files, end = vm.pid != 0, vm.files, vm.ended
    return {
        "id": vm.vmid,
        "name": clean(vm.name),
        "state": clean(vm.state),
        "pid": vm.pid if running else None,
        "vcpus": vm.vcpus,
        "memory_bytes": vm.memory_bytes,
        "resident_bytes": vm.resident_bytes if running else None,
        "tty": clean(vm.tty) or None,
        "owner": clean(vm.owner),
        "uid": vm.uid,
        "gid": vm.gid,
        "text": clean(vm.text),
        "since": vm.since_s or None,
        "started": vm.started_s or None,
        "restarts": vm.restarts,
        "autostart": vm.autostart,
        "boot_image": clean(files.boot_image) or None if files else None,
        "initrd": clean(files.initrd) or None if files else None,
        "disks": [{"path": clean(disk.path), "format": disk.format or None} for disk in files.disks] if files else None,
        "cdrom": clean(files.cdrom) or None if files else None,
        "console_log": clean(files.console_log) or None if files else None,
        "interfaces": [interfaces.as_json(nic) for nic in vm.nics],
        "ended": {"at": end.at_s, "how": clean(end.how), "text": clean(end.text)} if end else None,
    }
