"""Between the parent and control, besides the messages that control relays (`vmd.ipc.messages.clients`)."""

from vmd.ipc.routes import Proc, message
from vmd.record import Record

NO_CLIENT = 0xFFFFFFFF  # the peerid for actions that no client has asked for


@message(0x52, (Proc.CONTROL, Proc.PARENT))
class ClientGone(Record):
    """The client of this peerid has disconnected."""


@message(0xB0, (Proc.PARENT, Proc.CONTROL))
class ServeUser(Record):
    """All connections that follow are from one user.  `title` is the process's name from now on."""

    title: str


@message(0xB1, (Proc.PARENT, Proc.CONTROL), fds=("client",))
class NewClient(Record):
    """A new connection to the control socket.  The peerid is its number, `uid` is its user.

    With a `text` the client is refused: it gets Failed with `code` and `text`.  fds: `client` is the connection.
    """

    uid: int
    code: int = 0
    text: str = ""


@message(0xB4, (Proc.PARENT, Proc.CONTROL), fds=("courier",))
class PassFiles(Record):
    """Give the files of the client's last request to the process at the other end of `courier` (vmd.ipc.courier)."""
