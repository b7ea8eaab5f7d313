"""Between the parent and consolelog."""

from vmd.ipc.routes import Proc, message
from vmd.record import Record


@message(0x98, (Proc.PARENT, Proc.CONSOLELOG), fds=("shown",))
class KeepConsole(Record):
    """Write what a VM prints to a file, as soon as there is one.

    fds: `shown` is its backlog (vmd.backlog), which begins with byte `start` of the output.
    """

    number: int  # of the log
    name: str  # of the VM
    start: int = 0


@message(0x99, (Proc.PARENT, Proc.CONSOLELOG), fds=("courier?",))
class ConsoleFile(Record):
    """Write to the file that comes over `courier`, or to the same as before, until it has so many bytes."""

    number: int
    size_bytes: int


@message(0x9A, (Proc.PARENT, Proc.CONSOLELOG))
class DropConsole(Record):
    """The VM has ended: write what is left, and let it go."""

    number: int


@message(0x9B, (Proc.CONSOLELOG, Proc.PARENT))
class ConsoleKept(Record):
    """How a log fares."""

    number: int
    text: str = ""  # why it is not written
    lost: int = 0  # bytes of output that are not in it
    files: int = 0  # that have come
    wants_file: bool = False  # it is full, or was removed
    ended: bool = False  # as it was told to
