"""The base of all internal processes: a channel to the process's parent at fd 3, a loop, and dispatch by table."""


from vmd import signals as signal
from vmd.errors import PeerError
from vmd.ipc import sockets as socket
from vmd.ipc.channel import BATCH, Channel
from vmd.ipc.fence import Fence
from vmd.ipc.loop import Loop
from vmd.ipc.routes import Proc
from vmd.log import RateLimit, log
from vmd.privsep.start import CHANNEL_FD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, TypeVar

    from vmd.ipc.fence import Source
    from vmd.ipc.imsg import Envelope
    from vmd.record import Record, RecordType

    M = TypeVar("M", bound=Record)
    Handlers = Mapping[tuple[Proc, RecordType], "Handler"]  # the key is the sender and the message's class

CORE = (Proc.PARENT, Proc.CONTROL, Proc.VMM, Proc.PRIV)  # all guests depend on these


class Handler:
    """The handler of a message: a method, called with (process, message, envelope, channel).

    Only `handles` and `handles_each` make handlers, so that type checkers see whether the method takes the message.
    """

    __slots__ = ("_method",)

    def __init__(self, method: "Callable[[Any, Any, Envelope, Channel], None]") -> None:
        self._method = method

    def __call__(self, process: "Process", message: "Record", envelope: "Envelope", channel: Channel) -> None:
        """Serve a message."""
        self._method(process, message, envelope, channel)


def handles(peer: Proc, cls: "type[M]", method: "Callable[[Any, M, Envelope, Channel], None]") -> "Handlers":
    """Return a row of a HANDLERS table: `method` of a process serves messages of class `cls` from `peer`."""
    return {(peer, cls): Handler(method)}


def handles_each(
    peer: Proc, classes: "Iterable[type[M]]", method: "Callable[[Any, M, Envelope, Channel], None]"
) -> "Handlers":
    """Return the rows for a method that serves several classes of messages, for example all that are relayed."""
    return {(peer, cls): Handler(method) for cls in classes}


class Process:
    """A process that serves messages until its parent ends or sends Quit.

    HANDLERS lists everything that peers can make it do.  A message that is declared but not in HANDLERS is dropped, so
    that a forgotten row ends no process.
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
        """Serve the channel to our parent, which is at fd 3."""
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
        """A handler has raised an unexpected exception: give up the message, and go on."""
        fence = self.loop.fence
        if fence is None:
            raise error
        doing = f"{type(envelope.message).__name__} of {channel.label}"
        fence.report(doing, error)
        source = self.source_of(envelope, channel)
        fence.run(f"the end of {doing}", lambda: self.give_up(envelope, channel))
        fence.strike(source)

    def source_of(self, envelope: "Envelope", _channel: Channel) -> "Source | None":
        """Return the client or VM that a message is for, or None."""
        vmid = getattr(envelope.message, "vmid", 0)
        return (Proc.VM, vmid) if vmid else None

    def give_up(self, envelope: "Envelope", channel: Channel) -> None:
        """Answer a message whose handler has failed, so that its sender does not wait."""

    def cut_off(self, source: "Source") -> None:
        """End the connection of a client, or a VM."""

    def on_parent_lost(self, _channel: Channel, error: PeerError | None) -> None:
        """Our parent has ended, or has broken the protocol: end this process."""
        if error is not None:
            log.crit(str(error))
            self.exit_status = 1
        self.loop.stop()

    def ignore_terminal_signals(self) -> None:
        """Ignore ^C and signals to the whole process group: the parent acts on them, and tells this process."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_IGN)
