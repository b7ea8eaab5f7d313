"""control: the clients of the control socket, and nothing they could break.

Runs as  _vmd; sees no files, no network; no exec, no fork
Peers    parent (requests out, answers back); any number of vmctl
Holds    the listening control socket and one socket per client
"""

import errno
import os
import socket

from vmd.control.clients import MAX_QUEUE, MAX_UNANSWERED, Client, Clients, peer_credentials
from vmd.errors import PeerError
from vmd.ipc import first
from vmd.ipc.channel import Channel
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.imsg import Envelope, Form, UnknownMessage
from vmd.ipc.messages import (
    ANSWERS,
    BY_CLASS,
    PROTOCOL,
    REQUESTS,
    ClientGone,
    Failed,
    Hello,
    Listen,
    Proc,
    Quit,
    Ready,
    Request,
    SetVerbosity,
    Who,
)
from vmd.ipc.process import Process, handles, handles_each
from vmd.log import RateLimit, log
from vmd.privsep.confine import CONTROL, confine
from vmd.record import Record
from vmd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.fence import Source
    from vmd.ipc.process import Handlers

LAST_WORDS_S = 2.0  # for a client to read why it is turned away
ACCEPT_PAUSE_S = 1.0  # after running out of descriptors (*cat. 1.9*)


class Control(Process):
    """Relays between clients and the parent."""

    def __init__(self) -> None:
        super().__init__(Proc.CONTROL)
        self.clients = Clients()
        self.listener: socket.socket | None = None
        self.complaints = RateLimit()
        self.parent = self.attach_parent(Proc.PARENT)

    def on_listen(self, _message: Listen, envelope: Envelope, _channel: Channel) -> None:
        """Start serving."""
        fd = envelope.take_fd("listener")
        assert fd is not None
        self.listener = socket.socket(fileno=fd)
        self.listener.setblocking(False)
        self.loop.add(fd, self.on_connection)

    def on_connection(self, _events: int) -> None:
        """Take a new client."""
        assert self.listener is not None
        try:
            sock, _ = self.listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                raise
            listener = self.listener
            self.loop.remove(listener.fileno())
            self.loop.call_later(ACCEPT_PAUSE_S, lambda: self.loop.add(listener.fileno(), self.on_connection))
            self.complaints.warn(f"no new clients for {ACCEPT_PAUSE_S:.0f} s: {os.strerror(error.errno)}")
            return
        caller = peer_credentials(sock)
        refusal = self.clients.refusal(caller)
        client = self.clients.add(caller)
        client.channel = self.attach(
            sock,
            Proc.CLIENT,
            f"client {client.number} (uid {caller.uid})",
            on_lost=lambda channel, error: self.on_client_lost(client, error),
            queue_limit=MAX_QUEUE,
        )
        client.channel.form = Form.FIRST  # until it says Hello
        client.channel.on_unknown = lambda error: self.on_unknown_request(client, error)
        if refusal is not None:
            self.complaints.warn(f"refused a client: {refusal[1]}")
            self.turn_away(client, Failed(code=refusal[0], text=refusal[1]))

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
        self.clients.remove(client)
        self.parent.send(ClientGone(), peerid=client.number)

    def on_request(self, message: Request, envelope: Envelope, channel: Channel) -> None:
        """Pass a request on, under the name of whoever really asks."""
        client = self.client_of(channel)
        if client is None:
            return
        uid = client.caller.uid
        if uid != 0 and BY_CLASS[type(message)].who is Who.ROOT:
            self.complaints.warn(f"denied request {type(message).__name__} from uid {uid}")
            self.turn_away(client, Failed(code=errno.EPERM, text="only root may do that"))
            return
        client.unanswered += 1
        if client.unanswered > MAX_UNANSWERED:
            raise PeerError(channel.label, f"more than {MAX_UNANSWERED} requests without waiting for answers")
        fds = {name: envelope.take_fds(name) for name in tuple(envelope.fds)}
        try:
            self.parent.send(
                message.replace(caller=client.caller),
                peerid=client.number,
                fds=fds,
                refused=lambda: self.on_refused(client),
            )
        except ValueError as error:  # it just fitted a packet, and no longer does with the caller in it
            self.turn_away(client, Failed(code=errno.EMSGSIZE, text=str(error)))

    def on_refused(self, client: Client) -> None:
        """A request could not be passed on with its files."""
        if self.clients.get(client.number) is client:
            text = f"vmd cannot pass files on: {os.strerror(errno.ETOOMANYREFS)}"
            self.turn_away(client, Failed(code=errno.ETOOMANYREFS, text=text))

    def on_answer(self, message: Record, envelope: Envelope, _channel: Channel) -> None:
        """Pass an answer back."""
        client = self.clients.get(envelope.peerid)
        if client is None or client.channel is None:
            return  # it has left meanwhile
        if not BY_CLASS[type(message)].partial:
            client.unanswered = max(0, client.unanswered - 1)  # a lost console is told of unasked
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
        **handles(Proc.PARENT, Listen, on_listen),
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
