"""Between the parent and control, besides what it passes on for clients (`vmd.ipc.messages.clients`)."""

from vmd.ipc.routes import Proc, message
from vmd.record import Record

NO_CLIENT = 0xFFFFFFFF  # peerid of what the parent started by itself


@message(0x52, (Proc.CONTROL, Proc.PARENT))
class ClientGone(Record):
    """The client of this peerid has disconnected."""


@message(0xB0, (Proc.PARENT, Proc.CONTROL))
class ServeUser(Record):
    """The connections that follow are of one user.  `title` is the process's name from now on."""

    title: str


@message(0xB1, (Proc.PARENT, Proc.CONTROL), fds=("client",))
class NewClient(Record):
    """A connection to the control socket: its number is the peerid, its user `uid`.

    With a `text` it is to be turned away, as with Failed.  fds: `client` is the connection.
    """

    uid: int
    code: int = 0
    text: str = ""


@message(0xB4, (Proc.PARENT, Proc.CONTROL), fds=("courier",))
class PassFiles(Record):
    """Give the files of the last request of this client to who asks at the other end of `courier` (vmd.ipc.courier)."""
