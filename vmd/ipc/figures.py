"""What a VM and its devices have done and use: the parts of `VmFigures`.

Counters begin at 0 with the processes that count, which is with each life of the guest: a reset of the guest begins a
new one.  What ends in `_ns` is nanoseconds.  None is what this host cannot tell.

A device whose figures are not `counted` has a process that does not count (that of an earlier version), or none: then
its other figures say nothing.  The figures of each kind that its process counts are those of `devmsg.FIGURES`.
"""

from vmd.record import Record


class VcpuFigures(Record):
    """A virtual processor."""

    index: int
    cpu_ns: int = 0  # for which its thread had a processor of the host: the guest's time, and ours for it


class DeviceFigures(Record):
    """What all devices have."""

    index: int  # among those of its kind
    counted: bool = False


class DiskFigures(DeviceFigures):
    """A disk.

    Requests are those that were carried out.  Their time is from when their process takes them to when the guest can
    have the answer; those that are served together count it each.
    """

    path: str = ""  # of its image, for those who may control the VM
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
    errors: int = 0  # requests that failed: bad ones, and those for which storage failed
    refused: int = 0  # requests of a type that is not served
    busy_ns: int = 0  # while at least one was being served
    in_flight: int = 0  # now
    size_bytes: int = 0  # that the guest sees
    throttled: int = 0  # how often requests had to wait for a limit
    throttled_ns: int = 0  # ... and for how long some did
    iops_limit: int = 0  # requests a second; 0: there is no limit
    rate_limit: int = 0  # bytes a second; 0: there is no limit


class CdromFigures(DeviceFigures):
    """The CD-ROM drive."""

    commands: int = 0
    read_requests: int = 0
    read_bytes: int = 0
    errors: int = 0  # commands that failed, such as any without a disc
    busy_ns: int = 0
    size_bytes: int = 0  # of the disc; 0: there is none


class EntropyFigures(DeviceFigures):
    """The entropy device."""

    requests: int = 0
    bytes: int = 0
    delayed: int = 0  # rounds that were put off because the guest had asked for too much


class NicFigures(DeviceFigures):
    """A network interface; its counters are those of `devmsg.FIGURES`, which says what each is."""

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
    """What the control group of a VM is limited to; 0: there is no limit."""

    memory_bytes: int = 0
    cpu_percent: int = 0  # of one processor
    weight: int = 0


class GroupFigures(Record):
    """The control group of a VM (cgroups(7)): all its processes."""

    cpu_ns: int | None = None
    throttled: int | None = None  # periods in which its limit was reached
    throttled_ns: int | None = None
    memory_bytes: int | None = None  # also of the page cache that it has filled
    memory_peak_bytes: int | None = None
    oom_kills: int | None = None
    tasks: int | None = None  # processes and threads
