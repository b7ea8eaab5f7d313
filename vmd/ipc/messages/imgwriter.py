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
    """List snapshots, or prepare a change.  SnapshotsChanged ends a list, SnapshotsReady a preparation.

    fds: the disks come over `couriers`, one disk after the other.  The machine's state is read from `stream`.  To go
    back to a snapshot with a machine's state, that state is sent as a stream over the courier `state`.  This happens
    after SnapshotsChanged, when the disks are not locked any more.
    """

    name: str  # of the VM
    action: SnapshotAction
    tag: str
    disks: tuple[DiskImages, ...]
    date_ns: int = 0  # since 1970
    clock_ns: int = 0  # how long the machine has run


@message(0xAC, (Proc.IMGWRITER, Proc.PARENT), partial=True)
class SnapshotWord(Record):
    """Work is in progress: a sign of life."""


@message(0xAD, (Proc.IMGWRITER, Proc.PARENT))
class SnapshotsReady(Record):
    """All disks are prepared.  Their contents are unchanged so far."""


@message(0xAE, (Proc.PARENT, Proc.IMGWRITER), answered_by=("SnapshotsChanged", "SnapshotsFailed"))
class FinishSnapshots(Record):
    """With `commit` make the change, otherwise discard it.  `first_last`: change the first disk last."""

    commit: bool
    first_last: bool = False


@message(0xAF, (Proc.IMGWRITER, Proc.PARENT))
class SnapshotsChanged(Record):
    """Done."""


@message(0xB8, (Proc.IMGWRITER, Proc.PARENT))
class SnapshotsFailed(Record):
    """Not done: an errno, and a sentence with the reason."""

    code: int
    text: str
