"""Between the parent and agentx: what an SNMP agent is told."""

from vmd.ipc.figures import CdromFigures, DiskFigures, NicFigures, VcpuFigures
from vmd.ipc.routes import Proc, message
from vmd.record import Record


@message(0x100, (Proc.PARENT, Proc.AGENTX), fds=("master",))
class AgentxMaster(Record):
    """Talk to the SNMP agent at the other end of `master`, and no more to the one before.

    `path` is where it was found, for people.
    """

    number: int  # of the connection
    path: str
    context: str


@message(0x101, (Proc.AGENTX, Proc.PARENT))
class AgentxUp(Record):
    """The agent has taken us in."""

    number: int


@message(0x102, (Proc.AGENTX, Proc.PARENT))
class AgentxLost(Record):
    """The connection is no more, or the agent has not taken us in; the log has said why."""

    number: int


@message(0x103, (Proc.AGENTX, Proc.PARENT), answered_by=("AgentxVm", "AgentxVms"))
class AskAgentxVms(Record):
    """Say what there is."""


class AgentxLink(Record):
    """Numbers of interfaces of the host; 0: there is none."""

    tap: int
    parent: int  # its switch's


@message(0x104, (Proc.PARENT, Proc.AGENTX), partial=True)
class AgentxVm(Record):
    """A VM, as far as the agent is told of it; its figures are those of `VmFigures`."""

    vmid: int
    name: str
    state: str  # as in `vmctl status`, or "crashed" or "migrating"
    enabled: bool  # it is started with the daemon
    persistent: bool  # vm.conf has it
    started_s: int
    memory_bytes: int
    guest_bytes: int
    cpu_ns: int
    vcpus: tuple[VcpuFigures, ...]
    disks: tuple[DiskFigures, ...]
    cdrom: CdromFigures | None
    nics: tuple[NicFigures, ...]
    formats: tuple[str, ...]  # of its disks; "": it is told from the file
    disc: str
    links: tuple[AgentxLink, ...]  # of its interfaces


@message(0x105, (Proc.PARENT, Proc.AGENTX))
class AgentxVms(Record):
    """These were all; times are those of CLOCK_MONOTONIC."""

    began_ns: int  # the daemon
    changed_ns: int  # when a VM came to be known, or to be forgotten, last


@message(0x106, (Proc.PARENT, Proc.AGENTX))
class AgentxChanged(Record):
    """A VM is in another state, or is known no more."""

    vmid: int
    name: str
    state: str  # as in AgentxVm
    persistent: bool
    deleted: bool
