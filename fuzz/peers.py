"""Targets for messages that processes which may be taken over, and other programs, send to more privileged processes.

Each function takes an input and raises the exceptions of its parser.
"""

import os
import socket
import struct

from vmd.agentx import pdu
from vmd.backlog import FILE_BYTES, Backlog, LoggedBacklog
from vmd.errors import OperatorError, PeerError
from vmd.ipc import bootmsg, devmsg, holdermsg, probemsg, seedmsg
from vmd.log import LINE_MAX
from vmd.logger.source import Source
from vmd.parent.figures import host_names, slots
from vmd.vm import streamprobe
from vmd.vm.devproc import DeviceProcess
from vmd.vm.kinds import DISK, INTERFACE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH = struct.Struct("<H")


def has_sentence(error: Exception) -> None:
    """Check that a refusal has a message."""
    if not str(error):
        raise RuntimeError(f"{type(error).__name__} without a sentence")


def pieces(data: bytes) -> "list[bytes]":
    """Return the packets in an input.  Each follows its length.  The last one may be shorter."""
    found, at = [], 0
    while at + LENGTH.size <= len(data):
        end = at + LENGTH.size + LENGTH.unpack_from(data, at)[0]
        found.append(data[at + LENGTH.size : end])
        at = end
    return found


def joined(*packets: bytes) -> bytes:
    """Return the input that contains some packets."""
    return b"".join(LENGTH.pack(len(packet)) + packet for packet in packets)


# --- processes that answer one question ------------------------------------------------------------------------------

ANSWERS: "tuple[Callable[[bytes], object], ...]" = (
    probemsg.unpack, bootmsg.unpack_file, seedmsg.unpack, streamprobe.unpack, holdermsg.unpack,
)  # fmt: skip


def answer(data: bytes) -> int:
    """Parse an answer with each of its parsers.  Return how many accept it.  Expected errors are caught."""
    taken = 0
    for unpack in ANSWERS:
        try:
            taken += unpack(data) is not None
        except ValueError as error:
            has_sentence(error)
    return taken


# --- the process of a device -----------------------------------------------------------------------------------------


class Ended:
    """A process that has ended with status 0."""

    def reap(self, _timeout_s: float) -> int:
        """Return the exit status."""
        return 0


class Impostor(DeviceProcess):
    """The VM's side of a device process that consists only of its messages."""

    def __init__(self, interface: bool) -> None:
        self.kind = INTERFACE if interface else DISK
        self.title = self.name = self.label = "vm/a/device"
        self.troubles = {}
        self.lock_lost = ""
        self.status = 0
        self.kicks = [0, 0]
        self.said: list[object] = []
        self._on_changed = lambda *what: self.said.append(what)
        self._on_needs_reset = lambda *what: self.said.append(what)
        self._on_config = self.said.append
        self._on_ask_resolvers = lambda: self.said.append("")
        self._on_lock_lost = self.said.append
        self._on_event = lambda *what: self.said.append(what)
        self._answer = b""

    def ask(self, packet: bytes, fds: "list[int] | None" = None) -> bytes:
        """Return the current packet as the answer."""
        kind = self._kind(self._answer)
        if kind == devmsg.ERROR:
            raise PeerError(self.title, self._error(self._answer)[1])
        if kind not in (self._kind(packet), devmsg.READY):
            raise PeerError(self.title, "answered by another", self._answer)
        return self._answer

    def take(self, number: int, packet: bytes) -> None:
        """Handle a packet: the first ones as answers to a request each, the others as news.  Raises PeerError."""
        self._answer = packet
        questions: tuple[Callable[[], object], ...] = (
            lambda: self._ready(packet), self.export, self.addresses, lambda: self.write_config(0, b"a"),
            lambda: self.command(devmsg.RESET), self.settle, self.take_back,
        )  # fmt: skip
        if number < len(questions):
            questions[number]()
        else:
            self._handle_async(packet)


def device(data: bytes) -> int:
    """Handle a device's packets as a VM does.  Return how many are accepted.  Expected errors are caught."""
    taken = 0
    process = Impostor(bool(data[:1]))
    process.kind = INTERFACE if data[:1] == b"\1" else DISK
    for number, packet in enumerate(pieces(data[1:])):
        try:
            process.take(number, packet)
            taken += 1
        except (PeerError, OperatorError) as error:
            has_sentence(error)
    assert len(process.troubles) <= devmsg.TROUBLES_MAX
    return taken


# --- memory that a VM writes -----------------------------------------------------------------------------------------


def shared(data: bytes) -> int:
    """Read these bytes as a file of figures and as a backlog.  Return the number of items found."""
    fd = os.memfd_create("shared", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        found = len(slots(fd)) + len(host_names(fd))
    except BaseException:
        os.close(fd)
        raise
    os.ftruncate(fd, FILE_BYTES)
    start = data[-1] if data else 0
    for backlog in (Backlog(os.dup(fd), start), LoggedBacklog(fd, start)):
        try:
            output = backlog.read()
            assert len(output.data) <= FILE_BYTES
            found += len(output.since(start))
            backlog.read(upto=1000)
            if isinstance(backlog, LoggedBacklog):
                gone, fresh = backlog.fresh()
                backlog.log(gone + len(fresh))
        finally:
            backlog.close()
    return found


# --- an SNMP master agent, and log lines -----------------------------------------------------------------------------


def snmp(data: bytes) -> int:
    """Parse the packets of a master agent.  Return their number.  Raises PeerError."""
    count = at = 0
    while at + pdu.HEADER.size <= len(data):
        header = pdu.parse_header(data[at : at + pdu.HEADER.size])
        at += pdu.HEADER.size
        if at + header.length > len(data):
            break
        pdu.parse(header, data[at : at + header.length])
        at += header.length
        count += 1
    return count


def lines(data: bytes) -> int:
    """Parse the lines that processes of a VM log.  Return their number."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    found = 0
    try:
        source = Source(ours, "vm/a", 1)
        for packet in pieces(data)[:64]:
            if packet:
                theirs.send(packet[: 2 * LINE_MAX])
                for line in source.receive() or ():
                    assert line.text.startswith("vm/a")
                    assert line.text.isprintable()
                    assert 0 <= line.severity < 8
                    found += 1
        theirs.close()
        while (last := source.receive()) is not None:
            found += len(last)
            if source.ended:
                break
    finally:
        ours.close()
        theirs.close()
    return found
