"""Counters and resource use of a VM and its devices: the parts of `VmFigures`.

Counters begin at 0 when the VM's processes start.  That is at each start of the VM, and at each reset of the guest.
Names in `_ns` are nanoseconds.  None means that this host does not know the value.

A device with `counted` False has no process, or one of an earlier version that does not count.  Then its other figures
mean nothing.  `devmsg.FIGURES` lists the figures that the process of each kind of device counts.
"""

from vmd.record import Record


class VcpuFigures(Record):
    """A virtual processor."""

    index: int
    cpu_ns: int = 0  # processor time of its thread: in the guest, and in KVM and vmd for the guest


class DeviceFigures(Record):
    """The fields that all devices have."""

    index: int  # among the devices of its kind
    counted: bool = False


class DiskFigures(DeviceFigures):
    """A disk.

    Only requests that were carried out are counted.  The time of a request is from when the process takes it to when
    the guest can have the answer.  Requests that are served together each count this time.
    """

    path: str = ""  # of its image; "" for callers who may not control the VM
    read_requests: int = 0
    read_bytes: int = 0
    read_ns: int = 0
    write_requests: int = 0
    write_bytes: int = 0
    write_ns: int = 0
    flush_requests: int = 0
    flush_ns: int = 0
    discard_requests: int = 0
    discard_bytes: int = 0
    discard_ns: int = 0
    zero_requests: int = 0
    zero_bytes: int = 0
    zero_ns: int = 0
    errors: int = 0  # requests that failed: invalid ones, and those for which storage failed
    refused: int = 0  # requests of a type that is not supported
    busy_ns: int = 0  # time with at least one request in progress
    in_flight: int = 0  # requests in progress now
    size_bytes: int = 0  # as the guest sees it
    throttled: int = 0  # how often requests had to wait for a limit
    throttled_ns: int = 0  # time during which requests waited for a limit
    iops_limit: int = 0  # requests a second; 0: there is no limit
    rate_limit: int = 0  # bytes a second; 0: there is no limit


class CdromFigures(DeviceFigures):
    """The CD-ROM drive."""

    commands: int = 0
    read_requests: int = 0
    read_bytes: int = 0
    errors: int = 0  # commands that failed, for example because there was no disc
    busy_ns: int = 0
    size_bytes: int = 0  # of the disc; 0: there is no disc


class EntropyFigures(DeviceFigures):
    """The entropy device."""

    requests: int = 0
    bytes: int = 0
    delayed: int = 0  # rounds that were delayed because the guest had asked for too much


class NicFigures(DeviceFigures):
    """A network interface.  `devmsg.COUNTER_NAMES` explains the counters."""

    tap: str = ""  # "": the VM does not run
    switch: str = ""
    lladdr: bytes = b""
    rx_packets: int = 0
    rx_bytes: int = 0
    rx_no_room: int = 0
    rx_filtered: int = 0
    rx_malformed: int = 0
    rx_injected_lost: int = 0
    tx_packets: int = 0
    tx_bytes: int = 0
    tx_short: int = 0
    tx_long: int = 0
    tx_spoofed: int = 0
    tx_refused: int = 0
    tx_link_down: int = 0
    tx_busy: int = 0
    tx_answered: int = 0
    dhcp_offers: int = 0
    dhcp_acks: int = 0
    dhcp_naks: int = 0
    dhcp_bootp: int = 0
    ra_sent: int = 0
    lease_s: int = 0
    lease_requested: int = 0
    dhcp_other_server: int = 0
    dhcp_other_address: int = 0
    dhcp_other_client: int = 0
    dhcp_declines: int = 0
    dhcp_releases: int = 0
    dhcp_no_address: int = 0
    dhcp_unknown_type: int = 0
    dhcp_malformed: int = 0
    dhcp_relayed: int = 0
    dhcp_wants_file: int = 0
    dhcp_too_long: int = 0
    rx_throttled: int = 0
    rx_throttled_ns: int = 0
    tx_throttled: int = 0
    tx_throttled_ns: int = 0
    vhost: int = 0
    rate_limit: int = 0  # bytes a second in each direction; 0: there is no limit


class LimitFigures(Record):
    """The limits of a VM's control group; 0: there is no limit."""

    memory_bytes: int = 0
    cpu_percent: int = 0  # of one processor
    weight: int = 0


class GroupFigures(Record):
    """The control group of a VM (cgroups(7)): all its processes."""

    cpu_ns: int | None = None
    throttled: int | None = None  # periods in which its limit was reached
    throttled_ns: int | None = None
    memory_bytes: int | None = None  # includes page cache that the group has filled
    memory_peak_bytes: int | None = None
    oom_kills: int | None = None
    tasks: int | None = None  # processes and threads
