"""Between the parent and the log."""

from vmd.ipc.routes import Proc, message
from vmd.record import Record


@message(0x90, (Proc.PARENT, Proc.LOG), fds=("source",))
class LogSource(Record):
    """Write the lines that come from `source`, a socket of `vmd.ipc.logpair`.

    `name` is the title of the process that writes them.  For a VM it is the title of the VM's process; its devices
    write to the same socket.
    """

    name: str
    vmid: int = 0  # 0: the process belongs to no VM
    owner_uid: int = 0
