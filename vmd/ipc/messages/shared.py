"""What more than one border has: records in messages, messages on two ways, and how long a sentence may be."""


from vmd.enums import IntEnum
from vmd.ipc.routes import ANSWER, FROM_VM, Proc, message
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

TEXT_BYTES_MAX = 4000  # of a sentence; with all else a message has it fits a packet


def brief(text: str, bytes_max: int = TEXT_BYTES_MAX) -> str:
    """Return a sentence cut to what a message has room for: names and reasons may come from anybody."""
    raw = text.encode("utf-8", "surrogateescape")
    return text if len(raw) <= bytes_max else raw[:bytes_max].decode("utf-8", "ignore") + " ..."


def fitting(lines: "Sequence[str]", lines_max: int, bytes_max: int) -> list[str]:
    """Return the first lines, each cut and at least one, and how many there are besides."""
    shown: list[str] = []
    for line in map(brief, lines[:lines_max]):
        bytes_max -= len(line.encode("utf-8", "surrogateescape")) + 1
        if bytes_max < 0 and shown:
            break
        shown.append(line)
    left = len(lines) - len(shown)
    return [*shown, f"and {left} more; see the log"] if left else shown


class Live(Record):
    """When a VM that is sent while it runs comes to stand still."""

    still_ms: int = 300  # when what is left takes no longer, at the pace at which it was written until then
    rounds: int = 30  # after so many in any case


class SnapshotAction(IntEnum):
    """What can be done with snapshots."""

    LIST = 0
    CREATE = 1
    DELETE = 2
    GO_BACK = 3


@message(0x3A, ANSWER, FROM_VM, partial=True)
class TransferProgress(Record):
    """How much of a VM has been sent or received; `total_bytes` is an estimate, 0 if there is none yet.

    `round`, of a VM that runs while it is sent: its memory is being sent for the first time (1), or what has changed
    since the round before.
    """

    done_bytes: int
    total_bytes: int
    round: int = 0


@message(0xA9, ANSWER, (Proc.IMGWRITER, Proc.PARENT), partial=True)
class SnapshotInfo(Record):
    """A snapshot of a VM's disks: `disks` of `of_disks` have it."""

    tag: str
    date_s: int  # seconds since 1970
    clock_ns: int  # for how long the machine had run
    state_bytes: int  # of the machine; 0: it did not run
    disks: int
    of_disks: int


class ImageLink(Record):
    """One image file of a disk; `guessed`: nobody but its first bytes said that the format is this one."""

    path: str  # for messages
    format: str
    guessed: bool = False
    discard_granularity: int = 0  # bytes, of a block device that says it


class DiskImages(Record):
    """A disk: its image first, then what that is based on."""

    images: tuple[ImageLink, ...]
    read_only: bool = False


class Trouble(Record):
    """Something that is wrong with a device of a VM, for as long as it is."""

    device: str  # such as disk0
    text: str
    since_s: int  # seconds since 1970
