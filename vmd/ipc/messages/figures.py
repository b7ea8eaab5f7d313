"""Figures of VMs: their counters and resource use, from the parent to clients and metrics."""

from vmd.ipc.figures import (
    CdromFigures,
    DiskFigures,
    EntropyFigures,
    GroupFigures,
    LimitFigures,
    NicFigures,
    VcpuFigures,
)
from vmd.ipc.routes import ANSWER, Proc, message
from vmd.record import Record


class LifeEnd(Record):
    """The last end of a VM.  `how` is one of the words of `vmd.parent.endings`."""

    at_s: int  # seconds since 1970
    how: str
    text: str = ""


@message(0xF1, ANSWER, (Proc.PARENT, Proc.METRICS), partial=True)
class VmFigures(Record):
    """The figures of a VM (see `vmd.ipc.figures`).  Times of day are seconds since 1970."""

    vmid: int
    name: str
    uid: int
    state: str
    since_s: int = 0  # when the state began
    started_s: int = 0  # when this life began; 0: it does not run
    starts: int = 0  # number of starts since the daemon knows the VM; resets of the guest do not count
    restarts: int = 0  # how often the guest has reset itself in this life
    ended: LifeEnd | None = None  # the end of its last life; None: it has not ended since the daemon knows it
    pid: int = 0  # 0: it does not run, and all fields below describe its configuration
    memory_bytes: int = 0  # of the guest
    guest_bytes: int = 0  # guest memory that was touched
    process_bytes: int = 0  # private memory of its processes, without guest memory
    cpu_ns: int = 0  # processor time of its processes, in steps of 10 ms
    vcpus: tuple[VcpuFigures, ...] = ()
    disks: tuple[DiskFigures, ...] = ()
    cdrom: CdromFigures | None = None
    entropy: EntropyFigures | None = None
    nics: tuple[NicFigures, ...] = ()
    group: GroupFigures | None = None  # None: it has no control group of its own
    limit: LimitFigures = LimitFigures()
