"""What the parent asks of the process "logfile", as its arguments; and the descriptors that this has."""

from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

FD_ANSWER, FD_COURIER = 4, 5


class LogFile(Record):
    """A console log: what it is called, whose it is, and how much is kept."""

    path: str
    size_bytes: int
    keep: int
    uid: int
    gid: int
    groups: tuple[int, ...]
    shared: bool  # the group may read it


def pack(wanted: LogFile) -> list[str]:
    """Return it as arguments."""
    numbers = (wanted.size_bytes, wanted.keep, wanted.uid, wanted.gid, int(wanted.shared), *wanted.groups)
    return [wanted.path, *map(str, numbers)]


def unpack(arguments: "Sequence[str]") -> LogFile:
    """Return what `pack` has packed."""
    size_bytes, keep, uid, gid, shared, *groups = map(int, arguments[1:])
    return LogFile(
        path=arguments[0],
        size_bytes=size_bytes,
        keep=keep,
        uid=uid,
        gid=gid,
        groups=tuple(groups),
        shared=bool(shared),
    )
