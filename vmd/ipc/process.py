"""What all internal processes share: a channel to their parent at fd 3, a loop, and dispatch by table."""


from vmd import signals as signal
from vmd.errors import PeerError
from vmd.ipc import sockets as socket
from vmd.ipc.channel import BATCH, Channel
from vmd.ipc.fence import Fence
from vmd.ipc.loop import Loop
from vmd.ipc.routes import Proc
from vmd.log import RateLimit, log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, TypeVar

    from vmd.ipc.fence import Source
    from vmd.ipc.imsg import Envelope
    from vmd.record import Record, RecordType

    M = TypeVar("M", bound=Record)
    Handlers = Mapping[tuple[Proc, RecordType], "Handler"]  # by who sends, and the message

CHANNEL_FD = 3
CORE = (Proc.PARENT, Proc.CONTROL, Proc.VMM, Proc.PRIV)  # all guests hang on these


class Handler:
    """What serves a message: a method, called with (process, message, envelope, channel).

    Only `handles` and `handles_each` make one, so that type checkers see whether a method takes the message.
    """

    __slots__ = ("_method",)

    def __init__(self, method: "Callable[[Any, Any, Envelope, Channel], None]") -> None:
        self._method = method

    def __call__(self, process: "Process", message: "Record", envelope: "Envelope", channel: Channel) -> None:
        """Serve a message."""
        self._method(process, message, envelope, channel)


def handles(peer: Proc, cls: "type[M]", method: "Callable[[Any, M, Envelope, Channel], None]") -> "Handlers":
    """Return a row of a HANDLERS table: the method of a process that serves this message of this peer."""
    return {(peer, cls): Handler(method)}


def handles_each(
    peer: Proc, classes: "Iterable[type[M]]", method: "Callable[[Any, M, Envelope, Channel], None]"
) -> "Handlers":
    """Return the rows of a method that serves several messages, such as all that a process relays."""
    return {(peer, cls): Handler(method) for cls in classes}


class Process:
    """A process that serves messages until its parent is gone or tells it to stop.

    HANDLERS is the whole of what peers can make it do.  A message that is declared and not in there is dropped: nobody
    has to end because somebody has forgotten it here.
    """

    HANDLERS: "Handlers" = {}

    def __init__(self, me: Proc) -> None:
        self.me = me
        self.loop = Loop()
        if me in CORE:
            self.loop.fence = Fence(self.cut_off)
        self.exit_status = 0
        self.unserved = RateLimit()

    def attach_parent(self, peer: Proc) -> Channel:
        """Take the channel that our parent left at fd 3."""
        sock = socket.socket(fileno=CHANNEL_FD)
        sock.set_inheritable(False)
        return self.attach(sock, peer, peer.name.lower(), on_lost=self.on_parent_lost)

    def attach(
        self,
        sock: socket.socket,
        peer: Proc,
        label: str,
        *,
        on_lost: "Callable[[Channel, PeerError | None], None]",
        queue_limit: int | None = None,
        in_step: bool = False,
        batch: int = BATCH,
    ) -> Channel:
        """Serve a peer."""
        return Channel(
            sock,
            me=self.me,
            peer=peer,
            label=label,
            loop=self.loop,
            on_message=self.dispatch,
            on_lost=on_lost,
            queue_limit=queue_limit,
            in_step=in_step,
            batch=batch,
        )

    def dispatch(self, channel: Channel, envelope: "Envelope") -> None:
        """Call the handler of a message, which may raise PeerError."""
        message = envelope.message
        handler = type(self).HANDLERS.get((channel.peer, type(message)))
        if handler is None:
            self.unserved.warn(f"{channel.label}: {type(message).__name__} is dropped: nothing here serves it")
            return
        try:
            handler(self, message, envelope, channel)
        except PeerError:
            raise
        except Exception as error:
            self.failed(error, envelope, channel)

    def failed(self, error: Exception, envelope: "Envelope", channel: Channel) -> None:
        """A handler did not expect this: end what it was doing, and go on."""
        fence = self.loop.fence
        if fence is None:
            raise error
        doing = f"{type(envelope.message).__name__} of {channel.label}"
        fence.report(doing, error)
        source = self.source_of(envelope, channel)
        fence.run(f"the end of {doing}", lambda: self.give_up(envelope, channel))
        fence.strike(source)

    def source_of(self, envelope: "Envelope", _channel: Channel) -> "Source | None":
        """Return for which client or VM a message is; None: for neither."""
        vmid = getattr(envelope.message, "vmid", 0)
        return (Proc.VM, vmid) if vmid else None

    def give_up(self, envelope: "Envelope", channel: Channel) -> None:
        """Answer for a handler that has failed, so that nobody waits for what will not come."""

    def cut_off(self, source: "Source") -> None:
        """End the connection of a client, or a VM."""

    def on_parent_lost(self, _channel: Channel, error: PeerError | None) -> None:
        """Our parent is gone, or not to be trusted any more: there is nobody to work for."""
        if error is not None:
            log.crit(str(error))
            self.exit_status = 1
        self.loop.stop()

    def ignore_terminal_signals(self) -> None:
        """Leave it to the parent to act on ^C and on signals to the whole group; it will tell us."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_IGN)
