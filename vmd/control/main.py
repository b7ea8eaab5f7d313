"""control: serves the clients of one user, and holds nothing that they could damage.

A request is read only if it can be passed on at once.  No further request is read of a client with too many unanswered
ones, or of one that does not read its answers.  While the parent has not read their requests, nothing is read of all
clients.

Runs as  an id of its own; sees no files, no network; no exec, no fork
Peers    parent (requests out, answers back); any number of vmctl of that user
Holds    one socket per client, which the parent has accepted; the files of a request, until an opener or the process
         of a VM asks for them over a courier
"""

import contextlib
import errno

from vmd.closing import close_all
from vmd.control.clients import MAX_QUEUE, Client
from vmd.errors import PeerError
from vmd.ipc import courier, first
from vmd.ipc import sockets as socket
from vmd.ipc.channel import Channel
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.imsg import Envelope, Form, UnknownMessage
from vmd.ipc.messages.children import Ping, Pong, Quit, Ready, SetVerbosity
from vmd.ipc.messages.clients import ANSWERS, PROTOCOL, REQUESTS, Failed, Hello, Request, StartRequest
from vmd.ipc.messages.control import ClientGone, NewClient, PassFiles, ServeUser
from vmd.ipc.process import Process, handles, handles_each
from vmd.ipc.routes import BY_CLASS, Proc, Who
from vmd.log import RateLimit, log
from vmd.privsep.confine import CONTROL, confine
from vmd.privsep.title import set_title
from vmd.record import Record
from vmd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.fence import Source
    from vmd.ipc.process import Handlers

LAST_WORDS_S = 2.0  # how long a client that is refused may take to read why


class Control(Process):
    """Relays between clients and the parent."""

    def __init__(self) -> None:
        super().__init__(Proc.CONTROL)
        self.clients: dict[int, Client] = {}  # by the number that the parent has given each
        self.complaints = RateLimit()
        self.parent = self.attach_parent(Proc.PARENT)
        self.parent.on_sent = self.read_all

    def on_serve_user(self, message: ServeUser, _envelope: Envelope, _channel: Channel) -> None:
        """Serve a user from now on: leave the reserve."""
        log.title = message.title
        set_title(message.title)

    def on_new_client(self, message: NewClient, envelope: Envelope, _channel: Channel) -> None:
        """Serve a client, or tell it why it is refused."""
        fd = envelope.take_fd("client")
        assert fd is not None
        client = self.clients[envelope.peerid] = Client(envelope.peerid, message.uid)
        client.channel = self.attach(
            socket.socket(fileno=fd),
            Proc.CLIENT,
            f"client {client.number} (uid {client.uid})",
            on_lost=lambda channel, error: self.on_client_lost(client, error),
            queue_limit=MAX_QUEUE,
            in_step=True,
        )
        client.channel.form = Form.FIRST  # until it says Hello
        client.channel.on_unknown = lambda error: self.on_unknown_request(client, error)
        self.read(client)
        if message.text:
            self.turn_away(client, Failed(code=message.code, text=message.text))

    def on_ping(self, _message: Ping, _envelope: Envelope, _channel: Channel) -> None:
        """Answer, which shows that no file of a client blocks this process."""
        self.parent.send(Pong())

    def turn_away(self, client: Client, answer: Failed) -> None:
        """Answer a client and close its connection."""
        assert client.channel is not None
        channel = client.channel
        channel.send(answer)
        channel.finish()
        self.loop.call_later(LAST_WORDS_S, channel.close)  # even if it has not read the answer
        self.forget(client)

    def on_hello(self, _message: Hello, _envelope: Envelope, channel: Channel) -> None:
        """The client knows messages with named fields: use them from now on."""
        channel.form = Form.NAMED
        channel.send(Hello(version=PROTOCOL, program=VERSION))

    def on_unknown_request(self, client: Client, error: UnknownMessage) -> None:
        """Refuse a request that this version does not know."""
        self.complaints.warn(str(error))
        text = f"vmd {VERSION} knows no request {error.code:#x}; a later one may"
        self.turn_away(client, Failed(code=errno.ENOSYS, text=text))

    def on_client_lost(self, client: Client, error: PeerError | None) -> None:
        """A client has left, or broke the protocol."""
        if error is not None:
            self.complaints.warn(str(error))
        self.forget(client)

    def forget(self, client: Client) -> None:
        """Forget a client, and tell the parent that it is gone."""
        if self.clients.pop(client.number, None) is not None:
            self.parent.send(ClientGone(), peerid=client.number)
        client.drop_files()

    def on_request(self, message: Request, envelope: Envelope, channel: Channel) -> None:
        """Pass a request on to the parent, under the number of its client."""
        client = self.client_of(channel)
        if client is None:
            return
        if client.uid != 0 and BY_CLASS[type(message)].who is Who.ROOT:
            self.complaints.warn(f"denied request {type(message).__name__} from uid {client.uid}")
            self.turn_away(client, Failed(code=errno.EPERM, text="only root may do that"))
            return
        client.asks(message)
        if any(envelope.fds.values()):
            if client.files:
                raise PeerError(channel.label, "passes more files before those of its last request were used")
            client.files = {name: envelope.take_fds(name) for name in tuple(envelope.fds)}
        message = message.replace(caller=None)
        if isinstance(message, StartRequest):
            message = message.replace(files=tuple(name for name, fds in client.files.items() if fds))
        try:
            self.parent.send(message, peerid=client.number)
        except ValueError as error:  # with fields that later versions have added it does not fit into a packet
            self.turn_away(client, Failed(code=errno.EMSGSIZE, text=str(error)))
        if self.parent.waiting:
            self.read_all()
        else:
            self.read(client)

    def read(self, client: Client) -> None:
        """Read requests of a client, or stop reading while it may send none."""
        assert client.channel is not None
        client.channel.hold(held=self.parent.waiting > 0 or not client.may_ask)

    def read_all(self) -> None:
        """Read requests of all clients, or stop reading."""
        for client in list(self.clients.values()):
            self.read(client)

    def on_pass_files(self, _message: PassFiles, envelope: Envelope, _channel: Channel) -> None:
        """Give a client's files to the process at the other end of a courier, when it asks.  The parent gets none."""
        fd = envelope.take_fd("courier")
        assert fd is not None
        client = self.clients.get(envelope.peerid)
        files = client.take_files() if client is not None else {}
        sock = socket.socket(fileno=fd)

        def on_asked(_events: int) -> None:
            self.loop.remove(fd)
            with sock, contextlib.suppress(OSError):  # the other end is closed, or too many files are on their way
                courier.give(sock, files)
            close_all(each for fds in files.values() for each in fds)

        self.loop.add(fd, on_asked)

    def on_answer(self, message: Record, envelope: Envelope, _channel: Channel) -> None:
        """Pass an answer back."""
        client = self.clients.get(envelope.peerid)
        if client is None or client.channel is None:
            return  # the client has left
        client.is_answered(message)
        self.read(client)
        if client.channel.form is Form.FIRST and not first.knows(type(message)):
            return  # a message that old clients do not know
        try:
            client.channel.send(message)
        except ValueError as error:  # with the names of fields it does not fit into a packet any more
            client.channel.send(Failed(code=errno.EMSGSIZE, text=str(error)))

    def client_of(self, channel: Channel) -> Client | None:
        """Return the client of a channel, if it is still served."""
        number = int(channel.label.split()[1])
        return self.clients.get(number)

    # --- unexpected exceptions ------------------------------------------------------------------------------

    def source_of(self, envelope: Envelope, channel: Channel) -> "Source | None":
        """Return the client that a message is from or for."""
        client = self.client_of(channel) if channel.peer is Proc.CLIENT else self.clients.get(envelope.peerid)
        return (Proc.CLIENT, client.number) if client is not None else None

    def give_up(self, envelope: Envelope, channel: Channel) -> None:
        """Refuse the client of a message whose handler has failed."""
        source = self.source_of(envelope, channel)
        client = self.clients.get(source[1]) if source is not None else None
        if client is not None:
            self.turn_away(client, Failed(code=errno.EIO, text=OUR_FAULT))

    def on_set_verbosity(self, message: SetVerbosity, _envelope: Envelope, _channel: Channel) -> None:
        """Set the verbosity of the log."""
        log.verbosity = message.verbosity

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """End."""
        self.loop.stop()

    HANDLERS: "Handlers" = {
        **handles(Proc.PARENT, ServeUser, on_serve_user),
        **handles(Proc.PARENT, NewClient, on_new_client),
        **handles(Proc.PARENT, Ping, on_ping),
        **handles(Proc.PARENT, PassFiles, on_pass_files),
        **handles(Proc.PARENT, SetVerbosity, on_set_verbosity),
        **handles(Proc.PARENT, Quit, on_quit),
        **handles_each(Proc.PARENT, ANSWERS, on_answer),
        **handles(Proc.CLIENT, Hello, on_hello),
        **handles_each(Proc.CLIENT, REQUESTS, on_request),
    }


def main() -> int:
    """Run process control."""
    process = Control()
    process.ignore_terminal_signals()
    process.parent.send(Ready(warnings=tuple(confine(CONTROL))))
    process.loop.run()
    return process.exit_status
