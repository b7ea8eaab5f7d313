"""One session with an SNMP agent, the AgentX master (RFC 2741, 7): open, register, answer requests, notify.

The agent is not trusted.  A packet is parsed as a whole before anything is done.  The requests and bytes that may wait
here are bounded, and nothing here blocks.
"""

import socket
from collections import deque

from vmd.agentx import mib, pdu
from vmd.closing import close
from vmd.errors import PeerError, sentence
from vmd.ipc.loop import READ, WRITE
from vmd.log import RateLimit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.agentx.pdu import Oid, Packet
    from vmd.ipc.loop import Loop

ANSWER_S = 30.0  # for the agent to open a session
TIMEOUT_S = 20  # the time for our answers that we ask the agent for
PIECE_BYTES = 1 << 16
UNREAD_MAX = 4 << 20  # unsent bytes for an agent that does not read
REQUESTS_MAX = 64  # requests that wait for figures
ANSWERS_MAX = 2000  # outstanding answers of the agent
BULK_MAX = 2000  # variables in an answer to GetBulk
SETS_MAX = 64  # transactions at a time
DESCRIPTION = b"vmd"


class Session:
    """A connection to an agent.

    `ask(done)` calls `done` with a `mib.View`, perhaps at once.  `on_up` is called when the agent has accepted us, and
    `on_lost(why)` once, when the connection has ended.  `switches` are the variables that the agent may set; `on_set`
    is called after that.
    """

    def __init__(
        self,
        loop: "Loop",
        sock: socket.socket,
        context: str,
        *,
        ask: "Callable[[Callable[[mib.View], None]], None]",
        switches: "dict[Oid, bool]",
        on_up: "Callable[[], None]",
        on_lost: "Callable[[str], None]",
        on_set: "Callable[[], None]",
    ) -> None:
        self.loop = loop
        self.sock = sock
        self.context = context.encode("utf-8", "surrogateescape")
        self.ask = ask
        self.switches = switches
        self.on_up = on_up
        self.on_lost = on_lost
        self.on_set = on_set
        self.up = False
        self.closed = False
        self.number = 0  # of the session
        self.packets = 0  # number of packets sent that are no answers
        self.answers: dict[int, Callable[[Packet], None]] = {}  # handlers of outstanding answers, by packet number
        self.requests: deque[Packet] = deque()  # requests that wait for figures
        self.sets: dict[int, tuple[dict[Oid, bool], dict[Oid, bool]]] = {}  # new and old values by transaction
        self.unread = bytearray()  # the received part of a packet
        self.unsent = bytearray()
        self.complaints = RateLimit()
        sock.setblocking(False)
        loop.add(sock.fileno(), self._on_ready)
        self.deadline = loop.call_later(ANSWER_S, lambda: self.lose(f"does not answer for {ANSWER_S:.0f} s"))
        self._tell(pdu.OPEN, pdu.open_session(TIMEOUT_S, DESCRIPTION), self._on_opened, context=b"")

    # --- its life --------------------------------------------------------------------------------------------

    def _on_opened(self, packet: "Packet") -> None:
        if packet.error:
            self.lose(f"refuses a session: {pdu.error(packet.error)}")
            return
        self.number = packet.header.session
        self._tell(pdu.REGISTER, pdu.register(mib.VM_MIB), self._on_registered)

    def _on_registered(self, packet: "Packet") -> None:
        if packet.error:
            self.lose(f"refuses to register VM-MIB: {pdu.error(packet.error)}")
            return
        self.deadline.cancel()
        self.up = True
        self.on_up()

    def close(self) -> None:
        """Close the session.  `on_lost` is not called."""
        if not self.closed:
            if self.number:
                self._send(pdu.packet(pdu.CLOSE, bytes((pdu.SHUTDOWN, 0, 0, 0)), session=self.number))
            self._close()

    def _close(self) -> None:
        self.closed, self.up = True, False
        self.deadline.cancel()
        self.loop.remove(self.sock.fileno())
        close(self.sock.detach())

    def lose(self, why: str) -> None:
        """Close the connection, and call `on_lost`."""
        if not self.closed:
            self._close()
            self.on_lost(why)

    def lose_soon(self, why: str) -> None:
        """Close the connection once the present call has returned to the loop."""
        self.loop.call_later(0, lambda: self.lose(why))

    # --- packets ---------------------------------------------------------------------------------------------

    def _tell(
        self, kind: int, payload: bytes, done: "Callable[[Packet], None]", *, context: bytes | None = None
    ) -> None:
        """Send a packet of our own; `done` is called with the answer."""
        if len(self.answers) >= ANSWERS_MAX:
            self.lose_soon(f"owes {len(self.answers)} answers")
            return
        self.packets += 1
        self.answers[self.packets] = done
        context = self.context if context is None else context
        self._send(pdu.packet(kind, payload, session=self.number, number=self.packets, context=context))

    def _send(self, raw: bytes) -> None:
        waits = bool(self.unsent)
        self.unsent += raw
        if not waits:
            self._write()
        if len(self.unsent) > UNREAD_MAX:
            self.lose_soon(f"does not read what it has asked for: {len(self.unsent)} bytes")

    def _write(self) -> None:
        try:
            while self.unsent:
                del self.unsent[: self.sock.send(self.unsent[:PIECE_BYTES], socket.MSG_NOSIGNAL)]
        except (BlockingIOError, InterruptedError):
            self.loop.modify(self.sock.fileno(), READ | WRITE)
            return
        except OSError:
            self.unsent.clear()  # the next read reports that the agent is gone
        self.loop.modify(self.sock.fileno(), READ)

    def _on_ready(self, events: int) -> None:
        if events & WRITE:
            self._write()
        if not events & ~WRITE:
            return
        try:
            raw = self.sock.recv(PIECE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.lose(f"is gone: {sentence(error)}")
            return
        if not raw:
            self.lose("is gone")
            return
        self.unread += raw
        try:
            while not self.closed and self._take():
                pass
        except PeerError as error:
            self.lose(error.what)

    def _take(self) -> bool:
        """Serve the next packet, if it has arrived as a whole."""
        if len(self.unread) < pdu.HEADER.size:
            return False
        header = pdu.parse_header(bytes(self.unread[: pdu.HEADER.size]))
        length = pdu.HEADER.size + header.length
        if len(self.unread) < length:
            return False
        packet = pdu.parse(header, bytes(self.unread[pdu.HEADER.size : length]))
        del self.unread[:length]
        self._serve(packet)
        return True

    def _serve(self, packet: "Packet") -> None:
        kind = packet.header.kind
        if kind == pdu.RESPONSE:
            done = self.answers.pop(packet.header.packet, None)
            if done is not None:
                done(packet)
        elif kind == pdu.CLOSE:
            self.lose(f"closes the session: {pdu.REASONS.get(packet.reason, packet.reason)}")
        elif kind not in pdu.REQUESTS:
            self._answer(packet, error=pdu.PARSE_ERROR)
        elif packet.header.session != self.number or not self.up:
            self._answer(packet, error=pdu.NOT_OPEN)
        elif kind in (pdu.GET, pdu.GET_NEXT, pdu.GET_BULK):
            self._on_question(packet)
        else:
            self._on_set(packet)

    def _answer(
        self, packet: "Packet", *, error: int = 0, index: int = 0, binds: "list[pdu.VarBind] | None" = None
    ) -> None:
        header = packet.header
        payload = pdu.response(error, index, [pdu.bind(each.kind, each.name, each.value) for each in binds or ()])
        self._send(
            pdu.packet(
                pdu.RESPONSE, payload, session=header.session, transaction=header.transaction, number=header.packet
            )
        )

    # --- requests -------------------------------------------------------------------------------------------

    def _on_question(self, packet: "Packet") -> None:
        if packet.context != self.context:
            self._answer(packet, error=pdu.UNSUPPORTED_CONTEXT)
            return
        if len(self.requests) >= REQUESTS_MAX:
            self._answer(packet, error=pdu.GEN_ERR, index=1)
            return
        self.requests.append(packet)
        if len(self.requests) == 1:
            self.ask(self._answer_all)

    def _answer_all(self, view: mib.View) -> None:
        while self.requests and not self.closed:
            packet = self.requests.popleft()
            kind, ranges = packet.header.kind, packet.ranges
            if kind == pdu.GET:
                binds = [view.get(each.start) for each in ranges]
            elif kind == pdu.GET_NEXT:
                binds = [view.following(each) for each in ranges]
            else:
                binds = view.bulk(ranges, packet.non_repeaters, packet.repetitions, BULK_MAX)
            self._answer(packet, binds=binds)

    # --- sets -----------------------------------------------------------------------------------------------

    def _on_set(self, packet: "Packet") -> None:
        """Serve a step of a transaction that sets the switches: test, commit or not, perhaps undo, and clean up."""
        kind, transaction = packet.header.kind, packet.header.transaction
        if kind == pdu.TEST_SET:
            self._test_set(packet)
        elif kind == pdu.CLEANUP_SET:
            self.sets.pop(transaction, None)  # CleanupSet has no answer
        elif transaction not in self.sets:
            self._answer(packet, error=pdu.COMMIT_FAILED, index=1)
        else:
            wanted, before = self.sets[transaction]
            self.switches.update(wanted if kind == pdu.COMMIT_SET else before)
            self.on_set()
            self._answer(packet)

    def _test_set(self, packet: "Packet") -> None:
        wanted = {}
        for index, each in enumerate(packet.binds, 1):
            error = 0
            if packet.context != self.context or each.name not in self.switches:
                error = pdu.NOT_WRITABLE
            elif each.kind != pdu.INTEGER:
                error = pdu.WRONG_TYPE
            elif each.value not in (mib.TRUE, mib.FALSE):
                error = pdu.WRONG_VALUE
            if error:
                self._answer(packet, error=error, index=index)
                return
            wanted[each.name] = each.value == mib.TRUE
        self.sets.pop(packet.header.transaction, None)
        if len(self.sets) >= SETS_MAX:  # the agent never cleaned them up
            del self.sets[next(iter(self.sets))]
        self.sets[packet.header.transaction] = wanted, {name: self.switches[name] for name in wanted}
        self._answer(packet)

    # --- notifications --------------------------------------------------------------------------------------

    def notify(self, payload: bytes) -> None:
        """Send a notification.  The first of its variables identifies it."""
        self._tell(pdu.NOTIFY, payload, self._on_notified)

    def _on_notified(self, packet: "Packet") -> None:
        if packet.error:
            self.complaints.warn(f"the SNMP agent has not taken a notification: {pdu.error(packet.error)}")
