"""Shared by several borders: records within messages, messages with several routes, and the limit of a sentence."""


from vmd.enums import IntEnum
from vmd.ipc.routes import ANSWER, FROM_VM, Proc, message
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

TEXT_BYTES_MAX = 4000  # of a sentence; together with the other fields of a message it fits a packet


def brief(text: str, bytes_max: int = TEXT_BYTES_MAX) -> str:
    """Return a sentence cut to the room of a message, because names and reasons from outside may have any length."""
    raw = text.encode("utf-8", "surrogateescape")
    return text if len(raw) <= bytes_max else raw[:bytes_max].decode("utf-8", "ignore") + " ..."


def fitting(lines: "Sequence[str]", lines_max: int, bytes_max: int) -> list[str]:
    """Return the first lines that fit, each cut, at least one; then a line with the number of the others."""
    shown: list[str] = []
    for line in map(brief, lines[:lines_max]):
        bytes_max -= len(line.encode("utf-8", "surrogateescape")) + 1
        if bytes_max < 0 and shown:
            break
        shown.append(line)
    left = len(lines) - len(shown)
    return [*shown, f"and {left} more; see the log"] if left else shown


class Live(Record):
    """When a VM that is sent while it runs is stopped for the rest."""

    still_ms: int = 300  # when sending the rest is expected to take no longer, at the rate so far
    rounds: int = 30  # the VM is stopped after this number of rounds in any case


class SnapshotAction(IntEnum):
    """The actions on snapshots."""

    LIST = 0
    CREATE = 1
    DELETE = 2
    GO_BACK = 3


SNAPSHOT_DONE = {
    SnapshotAction.CREATE: "made snapshot",
    SnapshotAction.DELETE: "deleted snapshot",
    SnapshotAction.GO_BACK: "went back to snapshot",
}


@message(0x3A, ANSWER, FROM_VM, partial=True)
class TransferProgress(Record):
    """How much of a VM has been sent or received; `total_bytes` is an estimate, 0 if there is none yet.

    `round`, of a VM that runs while it is sent: 1 is the first pass over its memory; each further round sends the pages
    that have changed since the round before.
    """

    done_bytes: int
    total_bytes: int
    round: int = 0


@message(0xA9, ANSWER, (Proc.IMGWRITER, Proc.PARENT), partial=True)
class SnapshotInfo(Record):
    """A snapshot of a VM's disks.  `disks` of the VM's `of_disks` disks have it."""

    tag: str
    date_s: int  # seconds since 1970
    clock_ns: int  # how long the machine had run
    state_bytes: int  # size of the machine's state; 0: the machine did not run
    disks: int
    of_disks: int


class ImageLink(Record):
    """One image file of a disk.  `guessed`: the format was guessed from its first bytes."""

    path: str  # for messages
    format: str
    guessed: bool = False
    discard_granularity: int = 0  # bytes; of a block device, if the kernel knows it


class DiskImages(Record):
    """A disk: its own image first, then the images that it is based on."""

    images: tuple[ImageLink, ...]
    read_only: bool = False


class Trouble(Record):
    """Something that is wrong with a device of a VM now."""

    device: str  # for example disk0
    text: str
    since_s: int  # seconds since 1970
