"""Between the parent and metrics."""

from vmd.ipc.routes import Proc, message
from vmd.record import Record


@message(0xF2, (Proc.PARENT, Proc.METRICS), fds=("sockets*",))
class MetricsAt(Record):
    """Serve HTTP at these sockets, and at no others.

    fds: `sockets` listen already.
    """


@message(0xF3, (Proc.METRICS, Proc.PARENT), answered_by=("VmFigures", "AllFigures"))
class AskFigures(Record):
    """Say what all VMs have done and use, as far as everybody may know it."""


@message(0xF4, (Proc.PARENT, Proc.METRICS))
class AllFigures(Record):
    """That was all."""
