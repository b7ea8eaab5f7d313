"""An SNMP agent's end of an AgentX connection (RFC 2741), as good or bad as a test wants it."""

import select
import socket
import struct
from collections.abc import Sequence

from vmd.agentx import pdu
from vmd.agentx.pdu import Header, Oid, Packet, SearchRange, VarBind

DEADLINE_S = 60.0
SESSION = 77


class Master:
    """What a subagent talks to; requests are numbered by themselves."""

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
        """Send a packet."""
        self.sock.sendall(
            pdu.packet(kind, payload, session=SESSION, transaction=self.transactions, number=number, context=context)
        )

    def take_in(self) -> Header:
        """Open the session, and accept what is registered; return what has opened it."""
        opening, _ = self.receive()
        self.answer(opening)
        registering, _ = self.receive()
        assert (opening.kind, registering.kind) == (pdu.OPEN, pdu.REGISTER)
        self.answer(registering)
        return opening

    def ask(
        self, kind: int, *ranges: SearchRange, head: bytes = b"", context: bytes = b"", same: bool = False
    ) -> tuple[int, Sequence[VarBind]]:
        """Return the error and the variables that a question is answered by."""
        payload = b"".join(pdu.oid(each.start, include=each.include) + pdu.oid(each.end) for each in ranges)
        return self.request(kind, head + payload, context=context, same=same)

    def request(
        self, kind: int, payload: bytes = b"", *, context: bytes = b"", same: bool = False
    ) -> tuple[int, Sequence[VarBind]]:
        """Send a request, of the `same` transaction as the last one or another, and return its answer."""
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
    """Return how much is asked for."""
    return struct.pack(">HH", non_repeaters, repetitions)


def asked(*names: Oid) -> list[SearchRange]:
    """Return ranges that begin behind these names and have no end."""
    return [SearchRange(start=name) for name in names]
