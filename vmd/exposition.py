"""Figures of VMs as text for Prometheus, and in the format of OpenMetrics 1.0.

Both have the same names and values.  They differ in the declaration of counters, and in a last line.  The tables below
have the name for each figure: a new field of `vmd.ipc.figures` needs a row here.

A value that this host does not know has no line.  A device whose process does not count has no lines.
"""

from vmd.units import NS
from vmd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmd.ipc.messages.figures import VmFigures
    from vmd.record import Record

    Row = tuple[str, str, str]  # field of the record, family, more labels

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
COUNTER, GAUGE = "counter", "gauge"

# name (without the _total of counters): kind, and explanation.  Nanoseconds of fields in _ns become seconds.
FAMILIES = {
    "vmd_build_info": (GAUGE, "The release of vmd; always 1."),
    "vmd_vm_info": (GAUGE, "A VM that the daemon knows: its number, and the uid of its owner; always 1."),
    "vmd_vm_state": (GAUGE, "1 for the current state of a VM; there are no lines for other states."),
    "vmd_vm_running": (GAUGE, "1 for a VM that has a process, in any state; otherwise 0."),
    "vmd_vm_state_since_timestamp_seconds": (GAUGE, "When the VM entered its state."),
    "vmd_vm_start_timestamp_seconds": (GAUGE, "When the VM was started; a reset of its guest does not count."),
    "vmd_vm_last_end_timestamp_seconds": (GAUGE, "When the VM last ended, and how."),
    "vmd_vm_starts": (COUNTER, "How often the VM was started since the daemon knows it."),
    "vmd_vm_guest_resets": (COUNTER, "How often the guest has reset itself since the VM was started."),
    "vmd_vm_memory_size_bytes": (GAUGE, "Memory of the guest."),
    "vmd_vm_memory_guest_bytes": (GAUGE, "Memory that the guest has touched."),
    "vmd_vm_memory_processes_bytes": (GAUGE, "Private memory of the VM's processes, without the guest's memory."),
    "vmd_vm_cpu_seconds": (COUNTER, "Processor time of all processes of the VM."),
    "vmd_vm_vcpu_seconds": (COUNTER, "Processor time of the thread of a virtual processor."),
    "vmd_vm_group_cpu_seconds": (COUNTER, "Processor time of the VM's control group."),
    "vmd_vm_group_throttled_periods": (COUNTER, "Periods in which the control group had used up its processor time."),
    "vmd_vm_group_throttled_seconds": (COUNTER, "How long the control group has waited because of its limit."),
    "vmd_vm_group_memory_bytes": (GAUGE, "Memory of the VM's control group, including the page cache that it filled."),
    "vmd_vm_group_memory_peak_bytes": (GAUGE, "The highest value of vmd_vm_group_memory_bytes so far."),
    "vmd_vm_group_oom_kills": (COUNTER, "Processes of the control group that were killed because memory ran out."),
    "vmd_vm_group_tasks": (GAUGE, "Processes and threads of the VM's control group."),
    "vmd_vm_limit_memory_bytes": (GAUGE, "Limit of the control group's memory; 0: there is no limit."),
    "vmd_vm_limit_cpu_percent": (GAUGE, "Limit of processor time, in percent of one processor; 0: there is no limit."),
    "vmd_vm_limit_weight": (GAUGE, "Weight of the VM when processors are busy; 0: the default."),
    "vmd_disk_requests": (COUNTER, "Requests of the guest that were carried out."),
    "vmd_disk_bytes": (COUNTER, "Bytes of these requests."),
    "vmd_disk_time_seconds": (COUNTER, "Time of the requests; requests that are served together each count the time."),
    "vmd_disk_errors": (COUNTER, "Requests that have failed."),
    "vmd_disk_refused_requests": (COUNTER, "Requests of a type that is not supported."),
    "vmd_disk_busy_seconds": (COUNTER, "Time with at least one request in progress."),
    "vmd_disk_requests_in_flight": (GAUGE, "Requests in progress."),
    "vmd_disk_size_bytes": (GAUGE, "The size of the disk, as the guest sees it."),
    "vmd_disk_throttled": (COUNTER, "How often requests had to wait for a limit."),
    "vmd_disk_throttled_seconds": (COUNTER, "Time during which requests waited for a limit."),
    "vmd_disk_limit_requests_per_second": (GAUGE, "Limit of requests; 0: there is no limit."),
    "vmd_disk_limit_bytes_per_second": (GAUGE, "Limit of bytes read and written; 0: there is no limit."),
    "vmd_cdrom_commands": (COUNTER, "Commands of the guest to its CD-ROM drive."),
    "vmd_cdrom_read_requests": (COUNTER, "Commands that read from the disc."),
    "vmd_cdrom_read_bytes": (COUNTER, "Bytes that were read from the disc."),
    "vmd_cdrom_errors": (COUNTER, "Commands that were answered with an error."),
    "vmd_cdrom_busy_seconds": (COUNTER, "Time spent on commands."),
    "vmd_cdrom_size_bytes": (GAUGE, "The size of the disc; 0 without a disc."),
    "vmd_entropy_requests": (COUNTER, "Requests of the guest to its entropy device."),
    "vmd_entropy_bytes": (COUNTER, "Random bytes that the guest was given."),
    "vmd_entropy_delayed": (COUNTER, "How often the guest had to wait because it had asked for too much."),
    "vmd_interface_info": (GAUGE, "An interface of a running VM: its tap, switch and Ethernet address; always 1."),
    "vmd_interface_packets": (COUNTER, "Packets that the guest has received, and packets that it has sent."),
    "vmd_interface_bytes": (COUNTER, "Bytes of these packets, with their Ethernet headers."),
    "vmd_interface_dropped_packets": (COUNTER, "Packets that were dropped, and why."),
    "vmd_interface_answered_packets": (COUNTER, "Packets of the guest that vmd has answered itself."),
    "vmd_interface_dhcp_answers": (COUNTER, "DHCP and BOOTP answers to the guest."),
    "vmd_interface_dhcp_ignored": (COUNTER, "DHCP and BOOTP requests of the guest that were not answered, and why."),
    "vmd_interface_router_advertisements": (COUNTER, "Router advertisements that were sent to the guest."),
    "vmd_interface_throttled": (COUNTER, "How often packets had to wait for a limit."),
    "vmd_interface_throttled_seconds": (COUNTER, "Time during which packets waited for a limit."),
    "vmd_interface_vhost": (GAUGE, "1 while the kernel moves the frames (vhost-net); 0 while a process does."),
    "vmd_interface_limit_bytes_per_second": (GAUGE, "Limit of bytes in each direction; 0: there is no limit."),
    "vmd_interface_lease_timestamp_seconds": (GAUGE, "When the guest was given the lease of its address."),
}  # fmt: skip

VM: "tuple[Row, ...]" = (
    ("since_s", "vmd_vm_state_since_timestamp_seconds", ""),
    ("started_s", "vmd_vm_start_timestamp_seconds", ""),
    ("starts", "vmd_vm_starts", ""),
    ("restarts", "vmd_vm_guest_resets", ""),
    ("memory_bytes", "vmd_vm_memory_size_bytes", ""),
)
LIMIT: "tuple[Row, ...]" = (
    ("memory_bytes", "vmd_vm_limit_memory_bytes", ""),
    ("cpu_percent", "vmd_vm_limit_cpu_percent", ""),
    ("weight", "vmd_vm_limit_weight", ""),
)
VM_RUNNING: "tuple[Row, ...]" = (
    ("guest_bytes", "vmd_vm_memory_guest_bytes", ""),
    ("process_bytes", "vmd_vm_memory_processes_bytes", ""),
    ("cpu_ns", "vmd_vm_cpu_seconds", ""),
)
VCPU: "tuple[Row, ...]" = (("cpu_ns", "vmd_vm_vcpu_seconds", ""),)
GROUP: "tuple[Row, ...]" = (
    ("cpu_ns", "vmd_vm_group_cpu_seconds", ""),
    ("throttled", "vmd_vm_group_throttled_periods", ""),
    ("throttled_ns", "vmd_vm_group_throttled_seconds", ""),
    ("memory_bytes", "vmd_vm_group_memory_bytes", ""),
    ("memory_peak_bytes", "vmd_vm_group_memory_peak_bytes", ""),
    ("oom_kills", "vmd_vm_group_oom_kills", ""),
    ("tasks", "vmd_vm_group_tasks", ""),
)


def by(label: str, family: str, **values: str) -> "tuple[Row, ...]":
    """Return the rows of a family whose lines differ in one label.  `values` are field=value of the label."""
    return tuple((field, family, f'{label}="{value}"') for field, value in values.items())


DISK: "tuple[Row, ...]" = (
    *by(
        "operation", "vmd_disk_requests",
        read_requests="read", write_requests="write", flush_requests="flush",
        discard_requests="discard", zero_requests="zero",
    ),
    *by(
        "operation", "vmd_disk_bytes",
        read_bytes="read", write_bytes="write", discard_bytes="discard", zero_bytes="zero",
    ),
    *by(
        "operation", "vmd_disk_time_seconds",
        read_ns="read", write_ns="write", flush_ns="flush", discard_ns="discard", zero_ns="zero",
    ),
    ("errors", "vmd_disk_errors", ""),
    ("refused", "vmd_disk_refused_requests", ""),
    ("busy_ns", "vmd_disk_busy_seconds", ""),
    ("in_flight", "vmd_disk_requests_in_flight", ""),
    ("size_bytes", "vmd_disk_size_bytes", ""),
    ("throttled", "vmd_disk_throttled", ""),
    ("throttled_ns", "vmd_disk_throttled_seconds", ""),
    ("iops_limit", "vmd_disk_limit_requests_per_second", ""),
    ("rate_limit", "vmd_disk_limit_bytes_per_second", ""),
)  # fmt: skip
CDROM: "tuple[Row, ...]" = (
    ("commands", "vmd_cdrom_commands", ""),
    ("read_requests", "vmd_cdrom_read_requests", ""),
    ("read_bytes", "vmd_cdrom_read_bytes", ""),
    ("errors", "vmd_cdrom_errors", ""),
    ("busy_ns", "vmd_cdrom_busy_seconds", ""),
    ("size_bytes", "vmd_cdrom_size_bytes", ""),
)
ENTROPY: "tuple[Row, ...]" = (
    ("requests", "vmd_entropy_requests", ""),
    ("bytes", "vmd_entropy_bytes", ""),
    ("delayed", "vmd_entropy_delayed", ""),
)
NIC: "tuple[Row, ...]" = (
    *by("direction", "vmd_interface_packets", rx_packets="receive", tx_packets="transmit"),
    *by("direction", "vmd_interface_bytes", rx_bytes="receive", tx_bytes="transmit"),
    *by(
        'direction="receive",reason', "vmd_interface_dropped_packets",
        rx_no_room="no room", rx_filtered="filtered", rx_malformed="malformed", rx_injected_lost="answer not taken",
    ),
    *by(
        'direction="transmit",reason', "vmd_interface_dropped_packets",
        tx_short="too short", tx_long="too long", tx_spoofed="spoofed", tx_refused="refused", tx_link_down="link down",
        tx_busy="host busy",
    ),
    ("tx_answered", "vmd_interface_answered_packets", ""),
    *by(
        "type", "vmd_interface_dhcp_answers",
        dhcp_offers="offer", dhcp_acks="ack", dhcp_naks="nak", dhcp_bootp="bootp",
    ),
    *by(
        "reason", "vmd_interface_dhcp_ignored",
        dhcp_other_server="other server", dhcp_other_address="other address", dhcp_other_client="other client",
        dhcp_declines="decline", dhcp_releases="release", dhcp_no_address="no address",
        dhcp_unknown_type="unknown type", dhcp_malformed="malformed", dhcp_relayed="relayed",
        dhcp_wants_file="boot file", dhcp_too_long="too long",
    ),
    *by("direction", "vmd_interface_throttled", rx_throttled="receive", tx_throttled="transmit"),
    *by(
        "direction", "vmd_interface_throttled_seconds",
        rx_throttled_ns="receive", tx_throttled_ns="transmit",
    ),
    ("rate_limit", "vmd_interface_limit_bytes_per_second", ""),
    ("vhost", "vmd_interface_vhost", ""),
    ("ra_sent", "vmd_interface_router_advertisements", ""),
    ("lease_s", "vmd_interface_lease_timestamp_seconds", ""),
)  # fmt: skip


def escaped(text: str) -> str:
    """Return the value of a label, escaped for use between quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Exposition:
    """The lines of each family.  The formats want the lines of a family together."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {name: [] for name in FAMILIES}
        self._names = {name: f"{name}_total" if kind == COUNTER else name for name, (kind, _) in FAMILIES.items()}

    def put(self, family: str, labels: str, value: "int | str") -> None:
        """Add a line."""
        self._lines[family].append(f"{self._names[family]}{{{labels}}} {value}\n")

    def put_all(self, rows: "tuple[Row, ...]", record: "Record", labels: str) -> None:
        """Add the lines of a record.  A value that is not known gets no line."""
        for field, family, more in rows:
            value = getattr(record, field)
            if value is None or (not value and family.endswith("_timestamp_seconds")):
                continue  # not known; or the time of an event that has never happened
            if field.endswith("_ns"):
                value = f"{value // NS}.{value % NS:09d}"
            self.put(family, f"{labels},{more}" if more else labels, value)

    def put_vm(self, vm: "VmFigures") -> None:
        """Add all lines of a VM."""
        labels = f'vm="{escaped(vm.name)}"'
        self.put("vmd_vm_info", f'{labels},id="{vm.vmid}",uid="{vm.uid}"', 1)
        self.put("vmd_vm_state", f'{labels},state="{escaped(vm.state)}"', 1)
        self.put("vmd_vm_running", labels, int(vm.pid != 0))
        self.put_all(VM, vm, labels)
        if vm.ended is not None:
            how = f'how="{escaped(vm.ended.how)}"'
            self.put("vmd_vm_last_end_timestamp_seconds", f"{labels},{how}", vm.ended.at_s)
        if not vm.pid:
            return
        self.put_all(LIMIT, vm.limit, labels)
        self.put_all(VM_RUNNING, vm, labels)
        for vcpu in vm.vcpus:
            self.put_all(VCPU, vcpu, f'{labels},vcpu="{vcpu.index}"')
        if vm.group is not None:
            self.put_all(GROUP, vm.group, labels)
        for disk in vm.disks:
            if disk.counted:
                self.put_all(DISK, disk, f'{labels},disk="{disk.index}"')
        if vm.cdrom is not None and vm.cdrom.counted:
            self.put_all(CDROM, vm.cdrom, labels)
        if vm.entropy is not None and vm.entropy.counted:
            self.put_all(ENTROPY, vm.entropy, labels)
        for nic in vm.nics:
            where = f'{labels},interface="{nic.index}"'
            more = f'tap="{escaped(nic.tap)}",switch="{escaped(nic.switch)}",lladdr="{nic.lladdr.hex(":")}"'
            self.put("vmd_interface_info", f"{where},{more}", 1)
            if nic.counted:
                self.put_all(NIC, nic, where)

    def text(self, *, openmetrics: bool) -> str:
        """Return all lines.  Families without lines are left out."""
        parts = []
        for name, (kind, what) in FAMILIES.items():
            if not self._lines[name]:
                continue
            shown = name if openmetrics else self._names[name]
            parts += [f"# HELP {shown} {what}\n", f"# TYPE {shown} {kind}\n"]
            unit = name.rpartition("_")[2]
            if openmetrics and unit in ("bytes", "seconds"):
                parts.append(f"# UNIT {shown} {unit}\n")
            parts += self._lines[name]
        if openmetrics:
            parts.append("# EOF\n")
        return "".join(parts)


def expose(vms: "Iterable[VmFigures]", release: str = VERSION, *, openmetrics: bool = False) -> str:
    """Return the text for these VMs.  `release` is the daemon's version."""
    exposition = Exposition()
    exposition.put("vmd_build_info", f'version="{escaped(release)}"', 1)
    for vm in vms:
        exposition.put_vm(vm)
    return exposition.text(openmetrics=openmetrics)
