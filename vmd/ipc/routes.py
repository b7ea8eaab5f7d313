"""Which process sends which message to which: declared once for each message, and all else follows (*cat. 1.8*).

A message is a frozen record, and all that concerns its way is declared with it (`message`): who sends it, who passes it
on and who it is for, what it is answered by, and of whom it is served.  What processes relay, wait for and refuse
follows from that, and a test compares it with what they serve (their HANDLERS).

Messages are declared border by border, in `vmd/ipc/messages/`.  A process imports its own borders: it knows no message
that it neither sends, passes on nor is sent.

The code number is explicit and never reused.  Fields travel in order of declaration, or by name where the two may be of
different versions (`Hello`, `NAMED`).  The descriptors that ride along are named in the decorator: `"tty"` must be
there, `"kernel?"` may be, `"disks*"` is any number.
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
    """The kinds of process; the first argument of a process on its command line is its lower-case name."""

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

# Between whom fields travel by name: a vmm and its VMs may be of another version than parent.  What vmm relays keeps
# its form, and with it its length.
NAMED = (frozenset((Proc.PARENT, Proc.VMM)), frozenset((Proc.VMM, Proc.VM)))

# Who has started a process, and is trusted by it more than the other way round.
TRUSTED = {
    Proc.CONTROL: Proc.PARENT, Proc.VMM: Proc.PARENT, Proc.PRIV: Proc.PARENT, Proc.VM: Proc.VMM,
    Proc.CLIENT: Proc.CONTROL, Proc.LOG: Proc.PARENT, Proc.OPENER: Proc.PARENT,
    Proc.IMGWRITER: Proc.PARENT, Proc.AGENTX: Proc.PARENT, Proc.CONSOLELOG: Proc.PARENT,
    Proc.METRICS: Proc.PARENT,
}  # fmt: skip


class Who(Enum):
    """Of whom a request is served."""

    EVERYBODY = 0  # who may open the socket
    OWNER = 1  # of the VM that it names, or root
    ROOT = 2


class MessageInfo:
    """What was declared of one message class."""

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
        self.partial = partial  # an answer after which more of the same request follow
        self.who = who  # None: it is no request

    @property
    def answers(self) -> "tuple[type[Any], ...]":
        """Those of `answered_by`."""
        return tuple(BY_NAME[name] for name in self.answered_by)

    @property
    def is_answer(self) -> bool:
        """Whether there is a message that is answered by this one."""
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
    """Declare a record as a message that travels on `paths`: who sends it, who passes it on, who it is for.

    It is answered by one of the messages of these names, after any number of `partial` ones; by none, if there are
    none.  All that processes do with messages besides serving them follows from this.
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
    """Declare what a client may ask; each request may be answered by Failed, too."""
    return message(code, ASK, fds=fds, answered_by=(*answered_by, "Failed"), who=who)


def relays(proc: Proc, sender: Proc) -> "tuple[type[Any], ...]":
    """Return the messages of a sender that a process passes on."""
    return tuple(
        cls
        for cls, info in BY_CLASS.items()
        if any((sender, proc) in itertools.pairwise(path[:-1]) for path in info.paths)
    )


def accepted(proc: Proc) -> "set[tuple[Proc, type[Any]]]":
    """Return all that a process is sent, whether for itself or to pass on."""
    return {(sender, cls) for cls, info in BY_CLASS.items() for sender, receiver in info.routes if receiver is proc}
