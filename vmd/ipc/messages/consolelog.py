"""Between the parent and consolelog."""

from vmd.ipc.routes import Proc, message
from vmd.record import Record

SILENT = "its storage does not answer"  # why a log is not written


@message(0x98, (Proc.PARENT, Proc.CONSOLELOG), fds=("shown",))
class KeepConsole(Record):
    """Write the console output of a VM to a log file, as soon as ConsoleFile brings one.

    fds: `shown` is the VM's backlog (vmd.backlog), which begins with byte `start` of the output.
    """

    number: int  # of the log
    name: str  # of the VM
    start: int = 0


@message(0x99, (Proc.PARENT, Proc.CONSOLELOG), fds=("courier?",))
class ConsoleFile(Record):
    """Write to the file that comes over `courier`, until it has `size_bytes`.  Without a courier use the last file."""

    number: int
    size_bytes: int


@message(0x9A, (Proc.PARENT, Proc.CONSOLELOG))
class DropConsole(Record):
    """The VM has ended: write the rest of its output, then close the log."""

    number: int


@message(0x9B, (Proc.CONSOLELOG, Proc.PARENT))
class ConsoleKept(Record):
    """The state of a log."""

    number: int
    text: str = ""  # why it is not written; "": it is written
    lost: int = 0  # bytes of output that are missing in it
    files: int = 0  # number of files that have come
    wants_file: bool = False  # the file is full, or was removed
    ended: bool = False  # closed after DropConsole
