"""The arguments and descriptors of the process "logfile", which the parent starts."""

from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

FD_ANSWER, FD_COURIER = 4, 5


class LogFile(Record):
    """A console log: its path, its owner, and how much of it is kept."""

    path: str
    size_bytes: int
    keep: int
    uid: int
    gid: int
    groups: tuple[int, ...]
    shared: bool  # the group may read it


def pack(wanted: LogFile) -> list[str]:
    """Return a LogFile as arguments."""
    numbers = (wanted.size_bytes, wanted.keep, wanted.uid, wanted.gid, int(wanted.shared), *wanted.groups)
    return [wanted.path, *map(str, numbers)]


def unpack(arguments: "Sequence[str]") -> LogFile:
    """Return the LogFile that `pack` has turned into arguments."""
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
