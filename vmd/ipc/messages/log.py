"""Between the parent and the log."""

from vmd.ipc.routes import Proc, message
from vmd.record import Record


@message(0x90, (Proc.PARENT, Proc.LOG), fds=("source",))
class LogSource(Record):
    """Take the lines that come from `source`, a socket of `vmd.ipc.logpair`.

    `name` is the title of the process, or of the process of the VM, which its devices write to, too.
    """

    name: str
    vmid: int = 0  # 0: of no VM
    owner_uid: int = 0
