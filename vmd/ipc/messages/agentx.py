"""Between the parent and agentx, which reports VMs to an SNMP agent."""

from vmd.ipc.figures import CdromFigures, DiskFigures, NicFigures, VcpuFigures
from vmd.ipc.routes import Proc, message
from vmd.record import Record


@message(0x100, (Proc.PARENT, Proc.AGENTX), fds=("master",))
class AgentxMaster(Record):
    """Use the SNMP agent at the other end of `master`, in place of the previous one.

    `path` is the agent's socket, for log lines.
    """

    number: int  # of the connection
    path: str
    context: str


@message(0x101, (Proc.AGENTX, Proc.PARENT))
class AgentxUp(Record):
    """The agent has accepted our registration."""

    number: int


@message(0x102, (Proc.AGENTX, Proc.PARENT))
class AgentxLost(Record):
    """The connection is lost, or the agent has refused our registration.  agentx has logged the reason."""

    number: int


@message(0x103, (Proc.AGENTX, Proc.PARENT), answered_by=("AgentxVm", "AgentxVms"))
class AskAgentxVms(Record):
    """Ask for all VMs."""


class AgentxLink(Record):
    """Indices of interfaces of the host; 0: there is none."""

    tap: int
    parent: int  # the switch that the tap belongs to


@message(0x104, (Proc.PARENT, Proc.AGENTX), partial=True)
class AgentxVm(Record):
    """A VM, with the fields that the agent is told.  Figures are as in `VmFigures`."""

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
    formats: tuple[str, ...]  # one for each disk; "": it is guessed from the file
    disc: str
    links: tuple[AgentxLink, ...]  # one for each interface


@message(0x105, (Proc.PARENT, Proc.AGENTX))
class AgentxVms(Record):
    """The end of the list of VMs.  Times are those of CLOCK_MONOTONIC."""

    began_ns: int  # when the daemon started
    changed_ns: int  # when the list of known VMs last changed


@message(0x106, (Proc.PARENT, Proc.AGENTX))
class AgentxChanged(Record):
    """A VM has changed its state, or is not known any more."""

    vmid: int
    name: str
    state: str  # as in AgentxVm
    persistent: bool
    deleted: bool
