"""The activity of VMs: the difference of two readings of their figures."""

from vmctl.output import clean
from vmd.ipc.messages.figures import VmFigures
from vmd.record import Record
from vmd.scaled import fmt_scaled
from vmd.units import DAY_S, NS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

NUMBERS_MAX = 1 << 63  # figures come from VMs, and may be anything
HOUR_S, MINUTE_S = 3600, 60


class Reading(Record):
    """The figures of all VMs, with their time by the monotonic clock."""

    at_ns: int
    vms: tuple[VmFigures, ...]


class Row(Record):
    """One VM.  Rates are None until there are two readings of one run of its guest."""

    vmid: int
    name: str
    state: str
    vcpus: int
    memory_bytes: int  # that the VM takes from the host
    up_s: int
    cpu_percent: float | None = None  # of one processor of the host
    read_bytes: float | None = None
    write_bytes: float | None = None
    requests: float | None = None  # of disks, of any kind
    receive_bytes: float | None = None
    send_bytes: float | None = None

    @property
    def disk_bytes(self) -> float:
        """Bytes per second that its disks read and write."""
        return (self.read_bytes or 0) + (self.write_bytes or 0)

    @property
    def net_bytes(self) -> float:
        """Bytes per second that it sends and receives."""
        return (self.receive_bytes or 0) + (self.send_bytes or 0)


# The orders of rows, by key: the name of the order, and the sort key of a row.
ORDERS: "dict[str, tuple[str, Callable[[Row], Any]]]" = {
    "c": ("cpu", lambda row: -(row.cpu_percent or 0)),
    "m": ("memory", lambda row: -row.memory_bytes),
    "d": ("disk", lambda row: -row.disk_bytes),
    "n": ("network", lambda row: -row.net_bytes),
    "i": ("id", lambda row: row.vmid),
    "a": ("name", lambda row: row.name),
}
FIRST_ORDER = "c"


def counters(vm: VmFigures) -> dict[str, int]:
    """Return the figures that only grow while a guest runs, without those that are not counted."""
    found = {"cpu_percent": vm.cpu_ns * 100}  # percent are hundredths of a second per second
    if all(disk.counted for disk in vm.disks):
        found["read_bytes"] = sum(disk.read_bytes for disk in vm.disks)
        found["write_bytes"] = sum(disk.write_bytes for disk in vm.disks)
        found["requests"] = sum(
            disk.read_requests + disk.write_requests + disk.flush_requests + disk.discard_requests + disk.zero_requests
            for disk in vm.disks
        )
    if all(nic.counted for nic in vm.nics):
        found["receive_bytes"] = sum(nic.rx_bytes for nic in vm.nics)
        found["send_bytes"] = sum(nic.tx_bytes for nic in vm.nics)
    return found


def rows(before: Reading | None, now: Reading, now_s: float) -> list[Row]:
    """Return a row for each VM that has a process; `now_s` is the time of day."""
    past = {vm.vmid: vm for vm in before.vms if vm.pid} if before is not None else {}
    elapsed_ns = now.at_ns - before.at_ns if before is not None else 0
    return [row(past.get(vm.vmid), vm, elapsed_ns, now_s) for vm in now.vms if vm.pid]


def row(before: VmFigures | None, now: VmFigures, elapsed_ns: int, now_s: float) -> Row:
    """Return the row of one VM.  After a reset of the guest there are no rates until the next reading."""
    rates: dict[str, float] = {}
    if before is not None and before.pid == now.pid and elapsed_ns > 0:
        past = counters(before)
        for name, value in counters(now).items():
            difference = value - past.get(name, value + 1)
            if 0 <= difference < NUMBERS_MAX:
                scale = 1 if name == "cpu_percent" else NS
                rates[name] = difference * scale / elapsed_ns
    return Row(
        vmid=now.vmid,
        name=now.name,
        state=now.state,
        vcpus=len(now.vcpus),
        memory_bytes=now.guest_bytes + now.process_bytes,
        up_s=max(0, int(now_s) - now.started_s) if now.started_s else 0,
        **rates,
    )


def ordered(found: "Iterable[Row]", order: str, *, reverse: bool = False) -> list[Row]:
    """Return rows in an order; equal rows are in the order of their ids."""
    by_id = sorted(found, key=lambda each: each.vmid)
    return sorted(by_id, key=ORDERS[order][1], reverse=reverse)


# --- for people ------------------------------------------------------------------------------------------

LINE = "{:>4} {:>6} {:>6} {:>6} {:>6} {:>6} {:>6} {:>6} {:>7} {}".format  # for a screen of 80 columns or more
HEADER = LINE("ID", "CPU%", "MEM", "READ/s", "WRIT/s", "IO/s", "RECV/s", "SEND/s", "UP", "NAME")
RUNNING = "running"


def line(one: Row) -> str:
    """Return a line of the table."""
    return LINE(
        one.vmid,
        "-" if one.cpu_percent is None else f"{one.cpu_percent:.1f}",
        size(one.memory_bytes),
        size(one.read_bytes),
        size(one.write_bytes),
        "-" if one.requests is None else f"{one.requests:.0f}",
        size(one.receive_bytes),
        size(one.send_bytes),
        up(one.up_s),
        clean(one.name if one.state == RUNNING else f"{one.name} ({one.state})"),
    )


def size(number: float | None) -> str:
    """Return bytes with their unit."""
    return "-" if number is None else fmt_scaled(min(round(number), NUMBERS_MAX - 1))


def up(seconds: int) -> str:
    """Return how long a VM has run, in the two largest units."""
    if seconds >= DAY_S:
        return f"{seconds // DAY_S}d {seconds % DAY_S // HOUR_S}h"
    if seconds >= HOUR_S:
        return f"{seconds // HOUR_S}h {seconds % HOUR_S // MINUTE_S}m"
    return f"{seconds // MINUTE_S}m {seconds % MINUTE_S}s"


def summary(found: list[Row], known: int) -> str:
    """Return the line above the table."""
    cpu = sum(each.cpu_percent or 0 for each in found)
    memory = sum(each.memory_bytes for each in found)
    return f"{len(found)} of {known} VMs run; CPU {cpu:.0f}%, memory {size(memory)}"


# --- for programs ----------------------------------------------------------------------------------------


def as_json(one: Row) -> dict[str, object]:
    """Return a row for --json; an unknown value is null."""
    return {
        "id": one.vmid,
        "name": clean(one.name),
        "state": clean(one.state),
        "vcpus": one.vcpus,
        "memory_bytes": one.memory_bytes,
        "up_s": one.up_s,
        "cpu_percent": rounded(one.cpu_percent, 1),
        "disk_read_bytes_per_s": rounded(one.read_bytes),
        "disk_write_bytes_per_s": rounded(one.write_bytes),
        "disk_requests_per_s": rounded(one.requests, 1),
        "receive_bytes_per_s": rounded(one.receive_bytes),
        "send_bytes_per_s": rounded(one.send_bytes),
    }


def rounded(number: float | None, digits: int | None = None) -> float | None:
    """Return a rounded number, or None."""
    return None if number is None else round(number, digits)
