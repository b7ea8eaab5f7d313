"""control: the clients of one user, and nothing they could break.

Nothing is read that could not be passed on at once.  A client waits that has asked enough and one that does not read
what it is answered, and all of them wait while the parent has not read what they have asked.

Runs as  an id of its own; sees no files, no network; no exec, no fork
Peers    parent (requests out, answers back); any number of vmctl of that user
Holds    one socket per client, which the parent has accepted; the files that came with a request, until an opener, or
         the process of a VM, asks for them over a courier
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

LAST_WORDS_S = 2.0  # for a client to read why it is turned away


class Control(Process):
    """Relays between clients and the parent."""

    def __init__(self) -> None:
        super().__init__(Proc.CONTROL)
        self.clients: dict[int, Client] = {}  # by the number under which the parent knows them
        self.complaints = RateLimit()
        self.parent = self.attach_parent(Proc.PARENT)
        self.parent.on_sent = self.read_all

    def on_serve_user(self, message: ServeUser, _envelope: Envelope, _channel: Channel) -> None:
        """Leave the reserve."""
        log.title = message.title
        set_title(message.title)

    def on_new_client(self, message: NewClient, envelope: Envelope, _channel: Channel) -> None:
        """Serve a client, or turn it away."""
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
        """Say that no file of a client keeps us."""
        self.parent.send(Pong())

    def turn_away(self, client: Client, answer: Failed) -> None:
        """Answer a client and close."""
        assert client.channel is not None
        channel = client.channel
        channel.send(answer)
        channel.finish()
        self.loop.call_later(LAST_WORDS_S, channel.close)  # whether it has read them or not
        self.forget(client)

    def on_hello(self, _message: Hello, _envelope: Envelope, channel: Channel) -> None:
        """A client of this version or a later one: everything goes by name from now on."""
        channel.form = Form.NAMED
        channel.send(Hello(version=PROTOCOL, program=VERSION))

    def on_unknown_request(self, client: Client, error: UnknownMessage) -> None:
        """A request that a later version has, or nobody."""
        self.complaints.warn(str(error))
        text = f"vmd {VERSION} knows no request {error.code:#x}; a later one may"
        self.turn_away(client, Failed(code=errno.ENOSYS, text=text))

    def on_client_lost(self, client: Client, error: PeerError | None) -> None:
        """A client is gone, or sent what no client sends."""
        if error is not None:
            self.complaints.warn(str(error))
        self.forget(client)

    def forget(self, client: Client) -> None:
        """Tell the parent that nobody waits under this number any more."""
        if self.clients.pop(client.number, None) is not None:
            self.parent.send(ClientGone(), peerid=client.number)
        client.drop_files()

    def on_request(self, message: Request, envelope: Envelope, channel: Channel) -> None:
        """Pass a request on, under the number of whoever asks."""
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
        except ValueError as error:  # it just fitted a packet, and no longer does with what later versions added
            self.turn_away(client, Failed(code=errno.EMSGSIZE, text=str(error)))
        if self.parent.waiting:
            self.read_all()
        else:
            self.read(client)

    def read(self, client: Client) -> None:
        """Read what a client asks, or nothing while it may ask nothing."""
        assert client.channel is not None
        client.channel.hold(held=self.parent.waiting > 0 or not client.may_ask)

    def read_all(self) -> None:
        """Go on, or stop, with every client."""
        for client in list(self.clients.values()):
            self.read(client)

    def on_pass_files(self, _message: PassFiles, envelope: Envelope, _channel: Channel) -> None:
        """Give a client's files to who asks at the other end of a courier; the parent has none of them."""
        fd = envelope.take_fd("courier")
        assert fd is not None
        client = self.clients.get(envelope.peerid)
        files = client.take_files() if client is not None else {}
        sock = socket.socket(fileno=fd)

        def on_asked(_events: int) -> None:
            self.loop.remove(fd)
            with sock, contextlib.suppress(OSError):  # nobody wants them any more, or too many are on their way
                courier.give(sock, files)
            close_all(each for fds in files.values() for each in fds)

        self.loop.add(fd, on_asked)

    def on_answer(self, message: Record, envelope: Envelope, _channel: Channel) -> None:
        """Pass an answer back."""
        client = self.clients.get(envelope.peerid)
        if client is None or client.channel is None:
            return  # it has left meanwhile
        client.is_answered(message)
        self.read(client)
        if client.channel.form is Form.FIRST and not first.knows(type(message)):
            return  # one of many
        try:
            client.channel.send(message)
        except ValueError as error:  # it just fitted the packet from the parent, and does not with names in it
            client.channel.send(Failed(code=errno.EMSGSIZE, text=str(error)))

    def client_of(self, channel: Channel) -> Client | None:
        """Return the client on a channel."""
        number = int(channel.label.split()[1])
        return self.clients.get(number)

    # --- what a handler did not expect ------------------------------------------------------------------------

    def source_of(self, envelope: Envelope, channel: Channel) -> "Source | None":
        """Everything is for a client."""
        client = self.client_of(channel) if channel.peer is Proc.CLIENT else self.clients.get(envelope.peerid)
        return (Proc.CLIENT, client.number) if client is not None else None

    def give_up(self, envelope: Envelope, channel: Channel) -> None:
        """Turn a client away whose request, or whose answer, is lost."""
        source = self.source_of(envelope, channel)
        client = self.clients.get(source[1]) if source is not None else None
        if client is not None:
            self.turn_away(client, Failed(code=errno.EIO, text=OUR_FAULT))

    def on_set_verbosity(self, message: SetVerbosity, _envelope: Envelope, _channel: Channel) -> None:
        """Log more or less."""
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
