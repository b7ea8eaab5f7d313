"""The peer of `guests/net`: it checks frames, sends them back, and sends frames that the guest asks for.

Every frame has a number and bytes that derive from it.  The formulas are those of the guest (`guests/net/frames.c`),
implemented a second time, so that each side checks the other.
"""

import select
import struct
import threading
from types import TracebackType
from typing import NamedTuple, Self

from tests.support.network import VNET_HDR_BYTES, Host, Interface, checksum

TYPE_OURS, TYPE_IPV4, TYPE_IPV6 = 0x88B5, 0x0800, 0x86DD
DATA, ECHO, ECHOED, ASK, COUNT, COUNTED = range(1, 7)
ASK_TCP4, ASK_TCP6 = 4, 6
LLADDR = bytes.fromhex("020000000001")
HEAD = struct.Struct("<HIIQ")  # after addresses and type: operation, number, argument, time stamp
PATTERN_AT = 32
LEAST, MOST = 32, 1514
WORDS = 16384 + 8192
PATTERN = b"".join(
    struct.pack("<Q", (word + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) for word in range(WORDS)
)  # fmt: skip
ASKED_STEP = 37
STREAM_BYTES, SEGMENT_BYTES = 60_000, 1440
VNET_HEADER = struct.Struct("<BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6 = 0, 1, 4
IP_TCP, TCP_BYTES, TCP_CHECKSUM = 6, 20, 16
HEADS = {TYPE_IPV4: 54, TYPE_IPV6: 74}
ADDRESSES = {
    TYPE_IPV4: (bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2))),
    TYPE_IPV6: (bytes.fromhex("20010db8" + "0" * 23 + "1"), bytes.fromhex("20010db8" + "0" * 23 + "2")),
}  # of the guest, and of its peer
DATAGRAMS_MAX = 64  # read in a row before other descriptors


def pattern(number: int, length: int) -> bytes:
    """Return `length` bytes derived from a number."""
    start = number * 40 % 65536
    return PATTERN[start : start + length]


class Seen(NamedTuple):
    """Counts of frames since the guest last asked."""

    good: int = 0
    bad: int = 0


class Peer:
    """Answers on its own thread while the context lasts.  When it ends, raises an error of that thread."""

    def __init__(self, tap: Interface) -> None:
        self.host = Host(tap, unfinished=True, buffer_bytes=64 << 20)
        self.guest = bytes(6)
        self.seen = Seen()
        self.complaints: list[str] = []
        self.failure: BaseException | None = None
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name="peer")

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self.thread.join()
        self.host.__exit__(None, None, None)
        if self.complaints:
            print("--- the peer did not like\n" + "\n".join(self.complaints))
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            poll = select.poll()
            poll.register(self.host.socket, select.POLLIN)
            while not self.stopping.is_set():
                poll.poll(100)
                for _ in range(DATAGRAMS_MAX):
                    raw = self.host.try_receive()
                    if raw is None:
                        break
                    self._take(raw[:VNET_HDR_BYTES], raw[VNET_HDR_BYTES:])
        except BaseException as error:
            self.failure = error

    def _take(self, header: bytes, frame: bytes) -> None:
        kind = int.from_bytes(frame[12:14], "big")
        self.guest = frame[6:12]
        if kind in HEADS:
            self._count(self._segment_problem(header, frame, kind))
            return
        operation, number, argument, stamp = HEAD.unpack_from(frame, 14)
        problem = ""
        if kind != TYPE_OURS or frame[:6] != LLADDR:
            problem = f"type {kind:#x} to {frame[:6].hex(':')}"
        elif any(header):
            problem = f"header {header.hex()}"
        elif frame[PATTERN_AT:] != pattern(number, len(frame) - PATTERN_AT):
            problem = f"bytes of number {number}, {len(frame)} of them"
        if operation == DATA or problem:
            self._count(problem)
        elif operation == ECHO:
            self._send_frame(ECHOED, number, argument, len(frame))
        elif operation == COUNT:
            self._send_frame(COUNTED, self.seen.good, self.seen.bad, LEAST)
            self.seen = Seen()
        elif operation == ASK and argument:
            kind = {ASK_TCP4: TYPE_IPV4, ASK_TCP6: TYPE_IPV6}[argument]
            for index in range(number):
                self.host.send(self._segment(kind, index))
        elif operation == ASK:
            for index in range(number):
                self._send_frame(DATA, index, 0, LEAST + index * ASKED_STEP % (MOST - LEAST + 1))
        else:
            self._count(f"operation {operation}, stamp {stamp}")

    def _count(self, problem: str) -> None:
        good, bad = self.seen
        self.seen = Seen(good, bad + 1) if problem else Seen(good + 1, bad)
        if problem and len(self.complaints) < 20:
            self.complaints.append(problem)

    def _send_frame(self, operation: int, number: int, argument: int, length: int) -> None:
        head = self.guest + LLADDR + TYPE_OURS.to_bytes(2, "big") + HEAD.pack(operation, number, argument, 0)
        self.host.send(bytes(VNET_HDR_BYTES) + head + pattern(number, length - PATTERN_AT))

    def _segment(self, kind: int, number: int) -> bytes:
        """Return a large segment with its virtio header; the kernel or the guest completes it."""
        guest, here = ADDRESSES[kind]
        payload = pattern(number, STREAM_BYTES)
        length = TCP_BYTES + len(payload)
        tcp = struct.pack(">HHIIBBHHH", 80, 4000, number << 16, 0, 0x50, 0x10, 1000, 0, 0)
        if kind == TYPE_IPV4:
            packet = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 0, 0, 64, IP_TCP, 0, here, guest)
            packet = packet[:10] + checksum(packet).to_bytes(2, "big") + packet[12:]
        else:
            packet = struct.pack(">IHBB16s16s", 6 << 28, length, IP_TCP, 64, here, guest)
        partial = ~checksum(pseudo(here, guest, length)) & 0xFFFF
        tcp = tcp[:TCP_CHECKSUM] + partial.to_bytes(2, "big") + tcp[TCP_CHECKSUM + 2 :]
        head = HEADS[kind]
        gso = GSO_TCPV4 if kind == TYPE_IPV4 else GSO_TCPV6
        header = VNET_HEADER.pack(NEEDS_CSUM, gso, head, SEGMENT_BYTES, head - TCP_BYTES, TCP_CHECKSUM)
        return header + self.guest + LLADDR + kind.to_bytes(2, "big") + packet + tcp + payload

    @staticmethod
    def _segment_problem(raw: bytes, frame: bytes, kind: int) -> str:
        """Return the problem of a segment; empty if it is correct."""
        head = HEADS[kind]
        flags, gso, _, size, start, offset = VNET_HEADER.unpack(raw)
        tcp, packet = frame[head - TCP_BYTES :], frame[14:]
        sequence, payload = int.from_bytes(tcp[4:8], "big"), frame[head:]
        whole = len(payload) > SEGMENT_BYTES
        guest, here = ADDRESSES[kind]
        expected = (
            NEEDS_CSUM, (GSO_TCPV4 if kind == TYPE_IPV4 else GSO_TCPV6) if whole else GSO_NONE,
            SEGMENT_BYTES if whole else 0, head - TCP_BYTES, TCP_CHECKSUM,
        )  # fmt: skip
        if (flags, gso, size, start, offset) != expected:
            return f"segment of {len(payload)} bytes with header {raw.hex()}"
        if kind == TYPE_IPV4 and (checksum(packet[:20]) or packet[2:4] != len(packet).to_bytes(2, "big")):
            return "IPv4 header"
        if (packet[12:20] if kind == TYPE_IPV4 else packet[8:40]) != guest + here:
            return "addresses"
        partial = ~checksum(pseudo(guest, here, len(tcp))) & 0xFFFF
        if tcp[TCP_CHECKSUM : TCP_CHECKSUM + 2] != partial.to_bytes(2, "big"):
            return "partial checksum"
        if sequence & 0xFFFF or payload != pattern(sequence >> 16, len(payload)):
            return f"bytes of segment {sequence:#x}, {len(payload)} of them"
        return ""


def pseudo(source: bytes, destination: bytes, length: int) -> bytes:
    """Return the TCP pseudo-header."""
    if len(source) == 4:
        return source + destination + struct.pack(">HH", IP_TCP, length)
    return source + destination + struct.pack(">II", length, IP_TCP)
