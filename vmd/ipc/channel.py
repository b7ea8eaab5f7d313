"""A channel to one peer: a SOCK_SEQPACKET socket on a loop.  Sending never blocks."""

import errno
import os

from vmd.closing import close_all
from vmd.errors import PeerError
from vmd.ipc import sockets as socket
from vmd.ipc.imsg import MAX_FDS, MAX_MESSAGE, NO_FDS, Envelope, Form, UnknownMessage, decode, encode
from vmd.ipc.loop import HANG_UP, READ, WRITE
from vmd.ipc.rights import FD, fds_of, rights_of
from vmd.ipc.routes import BY_CLASS, NAMED, TRUSTED, Proc
from vmd.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from vmd.ipc.loop import Loop
    from vmd.record import Record
else:
    from _collections import deque

OUTSIDE = (Proc.VM, Proc.CLIENT)  # peers that are cut off if their message leads to an unexpected exception
HANG_UPS = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
BATCH = 32  # messages taken from one peer before it is the others' turn
DRAIN_BATCHES = 32  # an exited peer has left no more; but a child that still has the peer's socket may send for ever
FD_SPACE = socket.CMSG_SPACE(MAX_FDS * FD.size)


def socketpair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a channel."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Channel:
    """Messages to and from one peer process.

    `on_message(channel, envelope)` gets each well-formed message whose route is declared.  Descriptors that it does not
    take are closed when it returns.
    `on_lost(channel, error)` is called once, when the peer has closed its end (None) or has broken the protocol
    (PeerError).  The channel is closed by then.
    A message that does not belong here, or not now, breaks the protocol.  But if the peer has started this process, the
    message is only dropped: such a peer breaks the protocol only with malformed packets.
    `queue_limit` is how many messages may wait for a peer that does not read.  With more the peer is cut off.
    `in_step`: nothing is read from the peer while a message waits for it.  So a peer that asks and does not read costs
    no memory.  Only one end of a channel may use it.  `hold` stops reading for other reasons.
    `batch` is how many messages are taken from the peer before it is the others' turn.
    `form` is the form in which records are sent, and may be changed.
    If `on_unknown(error)` is set, it is called for a message of an unknown type, and the peer is not cut off.
    `on_sent` is called when the last waiting message has been sent.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        me: Proc,
        peer: Proc,
        label: str,
        loop: "Loop",
        on_message: "Callable[[Channel, Envelope], None]",
        on_lost: "Callable[[Channel, PeerError | None], None]",
        queue_limit: int | None = None,
        in_step: bool = False,
        batch: int = BATCH,
    ) -> None:
        self.me = me
        self.peer = peer
        self.label = label
        self.queue_limit = queue_limit
        self.in_step = in_step
        self.batch = batch
        self.closed = False
        self.trusted = TRUSTED.get(me) is peer
        self.form = Form.NAMED if frozenset((me, peer)) in NAMED else Form.INSIDE
        self.on_unknown: Callable[[UnknownMessage], None] | None = None
        self.on_sent: Callable[[], None] | None = None
        self._sock = sock
        self._loop = loop
        self._on_message = on_message
        self._on_lost = on_lost
        self._queue: deque[tuple[bytes, list[int], Callable[[], None] | None]] = deque()
        self._closing = False
        self._held = False
        self._events = READ  # the events to wait for
        self._read_all = False  # the last read has found the socket empty
        sock.setblocking(False)
        loop.add(sock.fileno(), self._on_ready)

    def send(
        self,
        message: "Record",
        *,
        peerid: int = 0,
        fds: "Mapping[str, Sequence[int]]" = NO_FDS,
        refused: "Callable[[], None] | None" = None,
    ) -> None:
        """Queue a message.  The channel owns its descriptors from now on, and closes them when they have been sent.

        The kernel limits the descriptors in flight of each uid.  If the processes of our uid have too many, it refuses
        ours.  Then this message is dropped and `refused` is called; without `refused` the peer is lost.

        Raises:
            ValueError: the message does not fit a packet.  Its descriptors are closed.
        """
        order = [fd for each in fds.values() for fd in each]
        try:
            if (self.me, self.peer) not in BY_CLASS[type(message)].routes:
                route = f"{self.me.name} to {self.peer.name}"
                raise AssertionError(f"{type(message).__name__} may not go from {route}")
            packet, order = encode(message, peerid=peerid, pid=os.getpid(), fds=fds, form=self.form)
        except ValueError:
            close_all(order)
            raise
        if self.closed or self._closing:
            close_all(order)
            return
        self._queue.append((packet, order, refused))
        if len(self._queue) == 1:
            self._flush()
            self._wait()
        if self.queue_limit is not None and len(self._queue) > self.queue_limit:
            self._lose(PeerError(self.label, f"does not read: {len(self._queue)} messages wait for it"))

    @property
    def waiting(self) -> int:
        """The number of messages that wait for the peer to read."""
        return len(self._queue)

    def hold(self, *, held: bool) -> None:
        """Stop reading from the peer, or read on.  If the peer leaves meanwhile, its unread messages are lost too."""
        self._held = held
        self._wait()

    def finish(self) -> None:
        """Close as soon as all queued messages have been sent.  No more messages are received."""
        self._closing = True
        if not self._queue:
            self.close()
        else:
            self._wait()

    @property
    def _reads(self) -> bool:
        return not (self.closed or self._closing or self._held or (self.in_step and self._queue))

    def _wait(self) -> None:
        """Set the events to wait for."""
        events = (READ if self._reads else 0) | (WRITE if self._queue else 0)
        if events != self._events and not self.closed:
            self._events = events
            self._loop.modify(self._sock.fileno(), events)

    def flush_blocking(self, timeout_s: float) -> None:
        """Send the queued messages before this process ends.  Gives up at the first packet that takes too long."""
        if self.closed:
            return
        self._sock.settimeout(timeout_s)
        try:
            while self._queue:
                packet, fds, _ = self._queue[0]
                self._sendmsg(packet, fds)
                self._queue.popleft()
                close_all(fds)
        except OSError:
            return
        finally:
            self._sock.setblocking(False)  # the caller may still receive on this channel, and must not block

    def drain(self) -> None:
        """Handle the messages that an exited peer has left, then close.

        The end of file may never come: a child of the peer may still have its end, and may even send.
        """
        for _ in range(DRAIN_BATCHES):
            self._read_all = False
            self._on_ready(READ)
            if self.closed or self._read_all:
                break
        self.close()

    def close(self) -> None:
        """Close the channel without a call of `on_lost`."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove(self._sock.fileno())
        self._sock.close()
        for _packet, fds, _refused in self._queue:
            close_all(fds)
        self._queue.clear()

    def _lose(self, error: PeerError | None) -> None:
        if not self.closed:
            self.close()
            self._on_lost(self, error)

    def _lose_soon(self, error: PeerError) -> None:
        self._loop.call_later(0, lambda: self._lose(error))  # later, because the caller is still sending

    def _sendmsg(self, packet: bytes, fds: list[int]) -> None:
        self._sock.sendmsg([packet], rights_of(fds), socket.MSG_NOSIGNAL)

    def _flush(self) -> None:
        while self._queue:
            packet, fds, refused = self._queue[0]
            try:
                self._sendmsg(packet, fds)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS and refused is not None:
                    self._queue.popleft()
                    close_all(fds)
                    self._loop.call_later(0, refused)  # later, because the caller is still sending
                    continue
                for _packet, waiting, _refused in self._queue:
                    close_all(waiting)
                self._queue.clear()
                # The loop reports a hang-up.  Any other refusal of the kernel must be reported here.
                if error.errno not in HANG_UPS:
                    self._lose_soon(PeerError(self.label, f"a message cannot be sent to it: {error.strerror}"))
                return
            self._queue.popleft()
            close_all(fds)
        if self._closing:
            self.close()

    def _on_ready(self, events: int) -> None:
        try:
            self._serve(events)
        except Exception as error:
            if self._loop.fence is None or self.peer not in OUTSIDE:
                raise
            self._loop.fence.report(f"a message of {self.label}", error)
            self._lose(PeerError(self.label, "its message led to an unexpected error"))

    def _serve(self, events: int) -> None:
        if events & WRITE:
            self._flush()
            self._wait()
            if not self._queue and not self.closed and self.on_sent is not None:
                self.on_sent()
        if self.closed or not events & ~WRITE:
            return
        if self._closing:  # the peer has left while our last messages waited for it
            self.close()
            return
        if not self._reads and events & HANG_UP:
            self._lose(None)
            return
        for envelope in self._received():
            try:
                self._on_message(self, envelope)
            except PeerError as error:
                self._refuse(error)
            finally:
                close_all(envelope.untaken())

    def _refuse(self, error: PeerError) -> None:
        """Drop a well-formed message that does not belong here.  Also cut off the peer, unless it has started us."""
        if self.trusted:
            log.error(f"dropped: {error}")
        else:
            self._lose(error)

    def _received(self) -> "Iterator[Envelope]":
        for _ in range(self.batch):
            if not self._reads:
                return
            try:
                packet, ancillary, flags, _ = self._sock.recvmsg(MAX_MESSAGE, FD_SPACE, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                self._read_all = True
                return
            except ConnectionResetError:  # the peer left without reading all our messages; its own last ones follow
                continue
            except OSError:
                self._lose(None)
                return
            fds = fds_of(ancillary)
            if not packet:
                close_all(fds)
                self._lose(None)
                return
            try:
                if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                    raise PeerError(self.label, "its packet is too long, or has too many descriptors", packet)
                envelope = decode(packet, fds, self.label)
            except UnknownMessage as error:
                close_all(fds)
                (self.on_unknown or self._refuse)(error)
            except PeerError as error:
                close_all(fds)
                self._lose(error)
            except Exception:
                close_all(fds)
                raise
            else:
                if (self.peer, self.me) in BY_CLASS[type(envelope.message)].routes:
                    yield envelope
                else:
                    close_all(fds)
                    self._refuse(PeerError(self.label, f"may not send {type(envelope.message).__name__}", packet))
