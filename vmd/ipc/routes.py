"""The routes of messages: which process sends which message to which.  Declared once for each message (*cat. 1.8*).

A message is a frozen record.  The decorator `message` declares its route (the sender, the processes that relay it, the
final receiver), its answers, and which users may ask.  The messages that a process relays, waits for and refuses follow
from the declarations, and a test compares them with HANDLERS of each process.

Messages are declared in `vmd/ipc/messages/`, in a file for each border between processes.  A process imports only the
files of its own borders.  So it knows only messages that it sends, relays or receives.

The code number is explicit and never reused.  Fields travel in order of declaration; they travel by name if the two
processes may be of different versions (`Hello`, `NAMED`).  The decorator names the descriptors of a message: `"tty"` is
required, `"kernel?"` is optional, `"disks*"` is any number of descriptors.
"""

import itertools

from vmd.enums import Enum, IntEnum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from vmd.record import RecordType

    M = TypeVar("M", bound=RecordType)
    Path = tuple["Proc", ...]


class Proc(IntEnum):
    """The kinds of process.  The first argument on a process's command line is its kind in lower case."""

    PARENT = 0
    CONTROL = 1
    AGENTX = 2
    VMM = 3
    PRIV = 4
    VM = 5
    CLIENT = 6  # vmctl
    LOG = 7
    OPENER = 8
    IMGWRITER = 9
    METRICS = 11
    CONSOLELOG = 13


ASK = (Proc.CLIENT, Proc.CONTROL, Proc.PARENT)
ANSWER = (Proc.PARENT, Proc.CONTROL, Proc.CLIENT)
TO_VM = (Proc.PARENT, Proc.VMM, Proc.VM)
FROM_VM = (Proc.VM, Proc.VMM, Proc.PARENT)

# Pairs of processes between which fields travel by name.  A vmm and its VMs may be of another version than the parent.
# Both pairs are named because a message that vmm relays must keep its form, and so its length.
NAMED = (frozenset((Proc.PARENT, Proc.VMM)), frozenset((Proc.VMM, Proc.VM)))

# For each process the peer that has started it.  The process trusts that peer more than the peer trusts the process.
TRUSTED = {
    Proc.CONTROL: Proc.PARENT, Proc.VMM: Proc.PARENT, Proc.PRIV: Proc.PARENT, Proc.VM: Proc.VMM,
    Proc.CLIENT: Proc.CONTROL, Proc.LOG: Proc.PARENT, Proc.OPENER: Proc.PARENT,
    Proc.IMGWRITER: Proc.PARENT, Proc.AGENTX: Proc.PARENT, Proc.CONSOLELOG: Proc.PARENT,
    Proc.METRICS: Proc.PARENT,
}  # fmt: skip


class Who(Enum):
    """The users whose request is served."""

    EVERYBODY = 0  # all who may open the socket
    OWNER = 1  # the owner of the VM that the request names, and root
    ROOT = 2


class MessageInfo:
    """The declaration of one message class."""

    def __init__(
        self,
        code: int,
        cls: "RecordType",
        paths: "tuple[Path, ...]",
        fds: tuple[str, ...],
        answered_by: tuple[str, ...],
        who: Who | None,
        *,
        partial: bool,
    ) -> None:
        self.code = code
        self.cls = cls
        self.paths = paths
        self.routes = tuple(hop for path in paths for hop in itertools.pairwise(path))  # (sender, receiver)
        self.fds = fds
        self.answered_by = answered_by
        self.partial = partial  # an answer that other answers to the same request follow
        self.who = who  # None: it is not a request of a client

    @property
    def answers(self) -> "tuple[type[Any], ...]":
        """The classes that `answered_by` names."""
        return tuple(BY_NAME[name] for name in self.answered_by)

    @property
    def is_answer(self) -> bool:
        """Whether this message answers another one."""
        return self.cls.__name__ in ANSWERING


BY_CODE: dict[int, MessageInfo] = {}
BY_CLASS: "dict[type[Any], MessageInfo]" = {}
BY_NAME: "dict[str, type[Any]]" = {}
ANSWERING: set[str] = set()  # the names of all answers


def message(
    code: int,
    *paths: "Path",
    fds: tuple[str, ...] = (),
    answered_by: tuple[str, ...] = (),
    who: Who | None = None,
    partial: bool = False,
) -> "Callable[[M], M]":
    """Declare a record as a message that travels on `paths`.  A path is the sender, the relays and the receiver.

    `answered_by` has the names of its possible answers.  One of them ends the request; `partial` ones may precede it.
    Without names it is not answered.  Relays, waiting and access follow from this declaration.
    """

    def register(cls: "M") -> "M":
        if code in BY_CODE:
            raise AssertionError(f"message code {code:#x} is taken by {BY_CODE[code].cls.__name__}")
        if cls.__name__ in BY_NAME:
            raise AssertionError(f"two messages are called {cls.__name__}")
        BY_CODE[code] = BY_CLASS[cls] = MessageInfo(code, cls, paths, fds, answered_by, who, partial=partial)
        BY_NAME[cls.__name__] = cls
        ANSWERING.update(answered_by)
        return cls

    return register


def request(code: int, who: Who, *answered_by: str, fds: tuple[str, ...] = ()) -> "Callable[[M], M]":
    """Declare a request of a client.  Each request may also be answered by Failed."""
    return message(code, ASK, fds=fds, answered_by=(*answered_by, "Failed"), who=who)


def relays(proc: Proc, sender: Proc) -> "tuple[type[Any], ...]":
    """Return the messages from `sender` that `proc` relays."""
    return tuple(
        cls
        for cls, info in BY_CLASS.items()
        if any((sender, proc) in itertools.pairwise(path[:-1]) for path in info.paths)
    )
