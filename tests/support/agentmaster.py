"""The master agent's end of an AgentX connection (RFC 2741).  Tests also send invalid packets with it."""

import select
import socket
import struct
from collections.abc import Sequence

from vmd.agentx import pdu
from vmd.agentx.pdu import Header, Oid, Packet, SearchRange, VarBind

DEADLINE_S = 60.0
SESSION = 77


class Master:
    """A master agent for one subagent.  It numbers its requests itself."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.transactions = 0

    def receive(self) -> tuple[Header, bytes]:
        """Return the next packet."""
        header = pdu.parse_header(self._take(pdu.HEADER.size))
        return header, self._take(header.length)

    def _take(self, count: int) -> bytes:
        raw = b""
        while len(raw) < count:
            assert select.select([self.sock], [], [], DEADLINE_S)[0], "the subagent says nothing"
            piece = self.sock.recv(count - len(raw))
            assert piece, "the subagent has gone"
            raw += piece
        return raw

    def answer(self, header: Header, error: int = 0) -> None:
        """Answer a packet of the subagent."""
        self.send(pdu.RESPONSE, pdu.response(error), number=header.packet)

    def send(self, kind: int, payload: bytes = b"", *, number: int = 0, context: bytes = b"") -> None:
        """Send a packet to the subagent."""
        self.sock.sendall(
            pdu.packet(kind, payload, session=SESSION, transaction=self.transactions, number=number, context=context)
        )

    def take_in(self) -> Header:
        """Accept the session and the registration; return the header of the packet that opened the session."""
        opening, _ = self.receive()
        self.answer(opening)
        registering, _ = self.receive()
        assert (opening.kind, registering.kind) == (pdu.OPEN, pdu.REGISTER)
        self.answer(registering)
        return opening

    def ask(
        self, kind: int, *ranges: SearchRange, head: bytes = b"", context: bytes = b"", same: bool = False
    ) -> tuple[int, Sequence[VarBind]]:
        """Send a request; return the error and the variables of its answer."""
        payload = b"".join(pdu.oid(each.start, include=each.include) + pdu.oid(each.end) for each in ranges)
        return self.request(kind, head + payload, context=context, same=same)

    def request(
        self, kind: int, payload: bytes = b"", *, context: bytes = b"", same: bool = False
    ) -> tuple[int, Sequence[VarBind]]:
        """Send a request, in the transaction of the last one (`same`) or in a new one; return its answer."""
        if not same:
            self.transactions += 1
        self.send(kind, payload, number=self.transactions, context=context)
        packet = self.answered()
        assert (packet.header.transaction, packet.header.packet) == (self.transactions, self.transactions)
        return packet.error, packet.binds

    def answered(self) -> Packet:
        """Return the next answer."""
        header, payload = self.receive()
        assert (header.kind, header.session) == (pdu.RESPONSE, SESSION)
        return pdu.parse(header, payload)


def bulk(non_repeaters: int, repetitions: int) -> bytes:
    """Return the two counts of a GetBulk request as bytes."""
    return struct.pack(">HH", non_repeaters, repetitions)


def asked(*names: Oid) -> list[SearchRange]:
    """Return search ranges that begin after each of these names and have no end."""
    return [SearchRange(start=name) for name in names]
