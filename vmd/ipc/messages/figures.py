"""What VMs have done and use, between the parent and all who are told of it."""

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
    """How a VM ended last; `how` is one of the words of `vmd.parent.endings`."""

    at_s: int  # seconds since 1970
    how: str
    text: str = ""


@message(0xF1, ANSWER, (Proc.PARENT, Proc.METRICS), partial=True)
class VmFigures(Record):
    """What a VM has done, and what it uses.  Times of day are seconds since 1970; see `vmd.ipc.figures`."""

    vmid: int
    name: str
    uid: int
    state: str
    since_s: int = 0  # when it came into this state
    started_s: int = 0  # when this life began; 0: it does not run
    starts: int = 0  # how often it was started since the daemon knows it; resets of its guest are not among them
    restarts: int = 0  # how often its guest has reset itself in this life
    ended: LifeEnd | None = None  # its last life; None: not as long as the daemon knows it
    pid: int = 0  # 0: it does not run, and all that follows is what it is to have
    memory_bytes: int = 0  # of the guest
    guest_bytes: int = 0  # ... that it has touched
    process_bytes: int = 0  # memory of its processes beside that, which they share with nobody
    cpu_ns: int = 0  # of its processes, in steps of 10 ms
    vcpus: tuple[VcpuFigures, ...] = ()
    disks: tuple[DiskFigures, ...] = ()
    cdrom: CdromFigures | None = None
    entropy: EntropyFigures | None = None
    nics: tuple[NicFigures, ...] = ()
    group: GroupFigures | None = None  # None: it has no control group of its own
    limit: LimitFigures = LimitFigures()
