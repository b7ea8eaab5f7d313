"""Between the parent and metrics."""

from vmd.ipc.routes import Proc, message
from vmd.record import Record


@message(0xF2, (Proc.PARENT, Proc.METRICS), fds=("sockets*",))
class MetricsAt(Record):
    """Serve HTTP at these sockets only.

    fds: `sockets` are listening already.
    """


@message(0xF3, (Proc.METRICS, Proc.PARENT), answered_by=("VmFigures", "AllFigures"))
class AskFigures(Record):
    """Ask for the figures of all VMs, without the fields that only users with rights over a VM may see."""


@message(0xF4, (Proc.PARENT, Proc.METRICS))
class AllFigures(Record):
    """The end of the figures."""
