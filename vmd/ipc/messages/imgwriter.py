"""Between the parent and an imgwriter."""

from vmd.ipc.messages.shared import DiskImages, SnapshotAction
from vmd.ipc.routes import Proc, message
from vmd.record import Record


@message(
    0xAB,
    (Proc.PARENT, Proc.IMGWRITER),
    fds=("couriers*", "stream?", "state?"),
    answered_by=("SnapshotWord", "SnapshotInfo", "SnapshotsReady", "SnapshotsChanged", "SnapshotsFailed"),
)
class ChangeSnapshots(Record):
    """List snapshots, which is answered by SnapshotsChanged, or prepare a change, by SnapshotsReady.

    fds: the disks come over `couriers`, one disk after the other; of `stream` is read what the machine is.  To go back
    with the machine, its state leaves as a stream by the courier `state`, after SnapshotsChanged: by then the disks are
    locked no more.
    """

    name: str  # of the VM
    action: SnapshotAction
    tag: str
    disks: tuple[DiskImages, ...]
    date_ns: int = 0  # since 1970
    clock_ns: int = 0  # for how long the machine has run


@message(0xAC, (Proc.IMGWRITER, Proc.PARENT), partial=True)
class SnapshotWord(Record):
    """This goes on."""


@message(0xAD, (Proc.IMGWRITER, Proc.PARENT))
class SnapshotsReady(Record):
    """All disks are prepared, and as they were."""


@message(0xAE, (Proc.PARENT, Proc.IMGWRITER), answered_by=("SnapshotsChanged", "SnapshotsFailed"))
class FinishSnapshots(Record):
    """Make the change, or leave everything as it was; `first_last`: the first disk is changed last."""

    commit: bool
    first_last: bool = False


@message(0xAF, (Proc.IMGWRITER, Proc.PARENT))
class SnapshotsChanged(Record):
    """Done."""


@message(0xB8, (Proc.IMGWRITER, Proc.PARENT))
class SnapshotsFailed(Record):
    """Not done: an errno, and the sentence that says why."""

    code: int
    text: str
