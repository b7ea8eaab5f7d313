"""VM-MIB (RFC 7666): its variables and their values.

    236.1.1   hypervisor     .1 software   .2 version   .3 object id   .4 uptime
    236.1.2   vmNumber       236.1.3   vmTableLastChange
    236.1.4   vmTable        by vmIndex, which is the id of the VM
    236.1.5   vmCpuTable     by vmIndex, vmCpuIndex       vCPUs, from 1 on
    236.1.7   vmStorageTable by vmIndex, vmStorageIndex   disks, from 1 on, and the CD-ROM drive
    236.1.8   vmNetworkTable by vmIndex, vmNetworkIndex   interfaces, from 1 on
    236.1.9   vmPerVMNotificationsEnabled                 236.1.10  vmBulkNotificationsEnabled

vmCpuAffinityTable is absent, because vmd binds no vCPU to a processor.
"""

import time
from bisect import bisect_left, bisect_right

from vmd.agentx.pdu import (
    COUNTER64,
    END_OF_MIB_VIEW,
    INTEGER,
    NO_SUCH_INSTANCE,
    NO_SUCH_OBJECT,
    OBJECT_IDENTIFIER,
    OCTET_STRING,
    TIME_TICKS,
    SearchRange,
    VarBind,
)
from vmd.units import NS
from vmd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any

    from vmd.agentx.pdu import Oid, Value
    from vmd.ipc.figures import DiskFigures
    from vmd.ipc.messages.agentx import AgentxVm, AgentxVms

    Column = tuple[int, int, Callable[[Any], Value]]  # number, kind of the values, value in a row
    Row = tuple[Oid, Any]  # index, argument of the columns

VM_MIB: "Oid" = (1, 3, 6, 1, 2, 1, 236)
NOTIFICATIONS: "Oid" = (*VM_MIB, 0)
OBJECTS: "Oid" = (*VM_MIB, 1)
HYPERVISOR: "Oid" = (*OBJECTS, 1)
VM_ENTRY, CPU_ENTRY, STORAGE_ENTRY, NETWORK_ENTRY = ((*OBJECTS, table, 1) for table in (4, 5, 7, 8))
PER_VM: "Oid" = (*OBJECTS, 9, 0)  # the two variables that may be set
BULK: "Oid" = (*OBJECTS, 10, 0)
AFFECTED: "Oid" = (*OBJECTS, 11, 0)  # in notifications only
NAME, UUID, OPER_STATE, PERSISTENT = (*VM_ENTRY, 2), (*VM_ENTRY, 3), (*VM_ENTRY, 6), (*VM_ENTRY, 8)

SOFTWARE = "vmd on Linux KVM"
TEXT_MAX = 255  # bytes, of SnmpAdminString
INT_MAX = 0x7FFFFFFF
UNIT_BYTES = 1 << 20  # unit of sizes of memory and disks
TICK_NS = 10_000_000
TICKS_MAX = 0xFFFFFFFF
DRIVE_INDEX = 101  # of the CD-ROM drive: it stays the same when a disk is added
TRUE, FALSE = 1, 2

# VirtualMachineOperState
UNKNOWN, PREPARING, RUNNING, SUSPENDING, RESUMING, PAUSED, MIGRATING = 1, 3, 4, 5, 7, 8, 9
SHUTTING_DOWN, SHUTDOWN, CRASHED = 10, 11, 12
OPER_STATES = {
    "stopped": SHUTDOWN, "waiting": PREPARING, "starting": PREPARING, "running": RUNNING, "paused": PAUSED,
    "sending": SUSPENDING, "migrating": MIGRATING, "saving": PAUSED, "receiving": RESUMING,
    "stopping": SHUTTING_DOWN, "in doubt": UNKNOWN, "crashed": CRASHED,
}  # fmt: skip
# VirtualMachineAdminState: the state that the operator wants.
ADMIN_RUNNING, ADMIN_SUSPENDED, ADMIN_PAUSED, ADMIN_SHUTDOWN = 1, 2, 3, 4
ADMIN_STATES = {
    PREPARING: ADMIN_RUNNING, RUNNING: ADMIN_RUNNING, RESUMING: ADMIN_RUNNING, MIGRATING: ADMIN_RUNNING,
    SUSPENDING: ADMIN_SUSPENDED, PAUSED: ADMIN_PAUSED, UNKNOWN: ADMIN_PAUSED,
}  # fmt: skip

# VirtualMachineStorageSourceType, VirtualMachineStorageAccess, IANAStorageMediaType
SOURCE_UNKNOWN, SOURCE_BLOCK, SOURCE_RAW, SOURCE_SPARSE = 1, 3, 4, 5
READ_WRITE, READ_ONLY = 2, 3
HARD_DISK, OPTICAL_DISK = 3, 4


def text(value: str) -> bytes:
    """Return a text as a SnmpAdminString."""
    return value.encode("utf-8", "replace")[:TEXT_MAX].decode("utf-8", "ignore").encode()


def ticks(since_ns: int, now_ns: int) -> int:
    """Return the time since `since_ns` in hundredths of a second, which wrap around after 497 days."""
    return max(0, now_ns - since_ns) // TICK_NS & TICKS_MAX


def units(size_bytes: int) -> int:
    """Return a size in units of UNIT_BYTES."""
    return min(size_bytes // UNIT_BYTES, INT_MAX)


def micros(value_ns: int) -> int:
    """Return a time in microseconds."""
    return value_ns // 1000


def oper_state(state: str) -> int:
    """Return the VirtualMachineOperState of a state; a state that only a later version has is `unknown`."""
    return OPER_STATES.get(state, UNKNOWN)


def persistent(known: bool) -> int:
    """Return the VirtualMachinePersistent of a VM: whether vm.conf has it."""
    return 2 if known else 3


def up_ticks(vm: "AgentxVm") -> int:
    """Return how long a VM has been running, in hundredths of a second."""
    started_s = vm.started_s
    return ticks(started_s * NS, time.time_ns()) if started_s else 0


VM_COLUMNS: "Sequence[Column]" = (
    (2, OCTET_STRING, lambda vm: text(vm.name)),
    (3, OCTET_STRING, lambda _vm: b""),  # VMs have no UUID
    (4, OCTET_STRING, lambda _vm: b""),  # the guest's system is not known
    (5, INTEGER, lambda vm: ADMIN_STATES.get(oper_state(vm.state), ADMIN_SHUTDOWN)),
    (6, INTEGER, lambda vm: oper_state(vm.state)),
    (7, INTEGER, lambda vm: 2 if vm.enabled else 3),
    (8, INTEGER, lambda vm: persistent(vm.persistent)),
    (9, INTEGER, lambda vm: len(vm.vcpus)),
    (10, INTEGER, lambda vm: len(vm.vcpus)),
    (11, INTEGER, lambda vm: len(vm.vcpus)),
    (12, INTEGER, lambda _vm: UNIT_BYTES),
    (13, INTEGER, lambda vm: units(vm.guest_bytes)),
    (14, INTEGER, lambda _vm: -1),
    (15, INTEGER, lambda vm: units(vm.memory_bytes)),
    (16, TIME_TICKS, up_ticks),
    (17, COUNTER64, lambda vm: micros(vm.cpu_ns)),
)
CPU_COLUMNS: "Sequence[Column]" = ((2, COUNTER64, lambda vcpu: micros(vcpu.cpu_ns)),)
STORAGE_COLUMNS: "Sequence[Column]" = (
    (3, INTEGER, lambda _each: 0),  # hrStorageTable has no row for it
    (4, INTEGER, lambda each: each.source),
    (5, OCTET_STRING, lambda each: text(each.format)),
    (6, OCTET_STRING, lambda each: text(each.path)),
    (7, INTEGER, lambda each: each.access),
    (8, INTEGER, lambda each: each.media),
    (9, OCTET_STRING, lambda each: text("disk" if each.media == HARD_DISK else "cdrom")),
    (10, INTEGER, lambda _each: UNIT_BYTES),
    (11, INTEGER, lambda each: units(each.size_bytes) if each.size_bytes else -1),
    (12, INTEGER, lambda _each: -1),
    (13, COUNTER64, lambda each: each.read_requests),
    (14, COUNTER64, lambda each: each.write_requests),
    (15, COUNTER64, lambda each: each.read_bytes),
    (16, COUNTER64, lambda each: each.write_bytes),
    (17, COUNTER64, lambda each: micros(each.read_ns)),
    (18, COUNTER64, lambda each: micros(each.write_ns)),
)
NETWORK_COLUMNS: "Sequence[Column]" = (
    (2, INTEGER, lambda pair: pair[1].tap),
    (3, INTEGER, lambda pair: pair[1].parent),
    (4, OCTET_STRING, lambda _pair: b"virtio-net"),
    (5, OCTET_STRING, lambda pair: pair[0].lladdr),
)


class Storage:
    """A row of vmStorageTable."""

    def __init__(self, source: int, media: int, access: int, form: str, path: str) -> None:
        self.source, self.media, self.access, self.format, self.path = source, media, access, form, path
        self.size_bytes = self.read_requests = self.write_requests = self.read_bytes = self.write_bytes = 0
        self.read_ns = self.write_ns = 0


def of_disk(disk: "DiskFigures", form: str) -> Storage:
    """Return the row of a disk."""
    block = disk.path.startswith("/dev/")
    source = SOURCE_BLOCK if block else {"raw": SOURCE_RAW, "qcow2": SOURCE_SPARSE}.get(form, SOURCE_UNKNOWN)
    storage = Storage(source, HARD_DISK, READ_WRITE, form, disk.path)
    storage.size_bytes = disk.size_bytes
    storage.read_requests, storage.read_bytes, storage.read_ns = disk.read_requests, disk.read_bytes, disk.read_ns
    storage.write_requests, storage.write_bytes = disk.write_requests, disk.write_bytes
    storage.write_ns = disk.write_ns
    return storage


def of_drive(vm: "AgentxVm") -> Storage:
    """Return the row of a CD-ROM drive."""
    cdrom = vm.cdrom
    assert cdrom is not None
    storage = Storage(SOURCE_RAW, OPTICAL_DISK, READ_ONLY, "raw", vm.disc)
    storage.size_bytes = cdrom.size_bytes
    storage.read_requests, storage.read_bytes, storage.read_ns = cdrom.read_requests, cdrom.read_bytes, cdrom.busy_ns
    return storage


def storage_rows(vms: "Iterable[AgentxVm]") -> "Iterator[Row]":
    """Yield the rows of vmStorageTable."""
    for vm in vms:
        for disk in vm.disks:
            form = vm.formats[disk.index] if disk.index < len(vm.formats) else ""
            yield (vm.vmid, disk.index + 1), of_disk(disk, form)
        if vm.cdrom is not None:
            yield (vm.vmid, DRIVE_INDEX), of_drive(vm)


class View:
    """All variables at one moment, sorted by object identifier."""

    def __init__(self, vms: "Iterable[AgentxVm]", about: "AgentxVms", *, per_vm: bool, bulk: bool) -> None:
        """`per_vm` and `bulk` say whether these notifications are sent."""
        self.names: list[Oid] = []
        self.values: list[tuple[int, Value]] = []
        self.objects: set[Oid] = set()  # scalars and columns
        vms = sorted(vms, key=lambda vm: vm.vmid)
        now_ns = time.monotonic_ns()
        self._scalar((*HYPERVISOR, 1), OCTET_STRING, text(SOFTWARE))
        self._scalar((*HYPERVISOR, 2), OCTET_STRING, text(VERSION))
        self._scalar((*HYPERVISOR, 3), OBJECT_IDENTIFIER, (0, 0))
        self._scalar((*HYPERVISOR, 4), TIME_TICKS, ticks(about.began_ns, now_ns))
        self._scalar((*OBJECTS, 2), INTEGER, len(vms))
        self._scalar((*OBJECTS, 3), TIME_TICKS, ticks(about.began_ns, about.changed_ns))
        self._table(VM_ENTRY, VM_COLUMNS, [((vm.vmid,), vm) for vm in vms])
        vcpus = [((vm.vmid, vcpu.index + 1), vcpu) for vm in vms for vcpu in vm.vcpus]
        self._table(CPU_ENTRY, CPU_COLUMNS, vcpus)
        self._table(STORAGE_ENTRY, STORAGE_COLUMNS, list(storage_rows(vms)))
        nics = [
            ((vm.vmid, nic.index + 1), (nic, link)) for vm in vms for nic, link in zip(vm.nics, vm.links, strict=False)
        ]
        self._table(NETWORK_ENTRY, NETWORK_COLUMNS, nics)
        self._scalar(PER_VM[:-1], INTEGER, TRUE if per_vm else FALSE)
        self._scalar(BULK[:-1], INTEGER, TRUE if bulk else FALSE)

    def _scalar(self, name: "Oid", kind: int, value: "Value") -> None:
        self.objects.add(name)
        self.names.append((*name, 0))
        self.values.append((kind, value))

    def _table(self, entry: "Oid", columns: "Sequence[Column]", rows: "Sequence[Row]") -> None:
        for number, kind, value in columns:
            column = (*entry, number)
            self.objects.add(column)
            for index, row in rows:
                self.names.append(column + index)
                self.values.append((kind, value(row)))

    def get(self, name: "Oid") -> VarBind:
        """Return a variable.  If there is none, its value says whether the object or the instance is missing."""
        at = bisect_left(self.names, name)
        if at < len(self.names) and self.names[at] == name:
            kind, value = self.values[at]
            return VarBind(name=name, kind=kind, value=value)
        known = any(name[:length] in self.objects for length in range(len(OBJECTS), len(name)))
        return VarBind(name=name, kind=NO_SUCH_INSTANCE if known else NO_SUCH_OBJECT)

    def following(self, wanted: SearchRange) -> VarBind:
        """Return the first variable of a range, or an endOfMibView."""
        at = (bisect_left if wanted.include else bisect_right)(self.names, wanted.start)
        if at == len(self.names) or (wanted.end and self.names[at] >= wanted.end):
            return VarBind(name=wanted.start, kind=END_OF_MIB_VIEW)
        kind, value = self.values[at]
        return VarBind(name=self.names[at], kind=kind, value=value)

    def bulk(self, ranges: "Sequence[SearchRange]", non_repeaters: int, repetitions: int, most: int) -> list[VarBind]:
        """Return the answer to a GetBulk (RFC 2741, 7.2.3.3): one round, then at most `most` variables in all."""
        found = [self.following(wanted) for wanted in ranges[:non_repeaters]]
        rest = list(ranges[non_repeaters:])
        for round_ in range(repetitions if rest else 0):
            if round_ and len(found) + len(rest) > most:
                break
            binds = [self.following(wanted) for wanted in rest]
            found += binds
            if all(each.kind == END_OF_MIB_VIEW for each in binds):
                break
            rest = [SearchRange(start=each.name, end=old.end) for each, old in zip(binds, rest, strict=True)]
        return found
