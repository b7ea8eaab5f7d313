"""Between the parent and all or most processes that it starts."""

from vmd.ipc.routes import Proc, message
from vmd.record import Record

EVERYWHERE = tuple((Proc.PARENT, child) for child in (Proc.CONTROL, Proc.VMM, Proc.PRIV))
LEAVES = (Proc.LOG, Proc.AGENTX, Proc.CONSOLELOG, Proc.METRICS)
PINGED = (Proc.CONTROL, Proc.VMM, Proc.LOG, Proc.CONSOLELOG)


@message(0x50, *EVERYWHERE, (Proc.VMM, Proc.VM))
class SetVerbosity(Record):
    """Set how much is logged."""

    verbosity: int


@message(0x51, *EVERYWHERE, (Proc.VMM, Proc.VM), *((Proc.PARENT, leaf) for leaf in LEAVES))
class Quit(Record):
    """End cleanly.  A process that loses its parent ends without this message."""


@message(0x53, (Proc.CONTROL, Proc.PARENT), (Proc.VMM, Proc.PARENT), (Proc.PRIV, Proc.PARENT))
class Ready(Record):
    """This process is confined and handles messages; `warnings` name missing kernel features."""

    warnings: tuple[str, ...] = ()


@message(0xB2, *((Proc.PARENT, child) for child in PINGED), answered_by=("Pong",))
class Ping(Record):
    """Check that the process still answers."""


@message(0xB3, *((child, Proc.PARENT) for child in PINGED))
class Pong(Record):
    """The answer to Ping."""
