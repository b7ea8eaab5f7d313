"""AgentX packets: they are as in RFC 2741, in both byte orders.  Truncated and random packets are refused."""

import contextlib
import random
import struct

import pytest

from vmd.agentx import pdu
from vmd.agentx.pdu import Header, SearchRange, VarBind
from vmd.errors import PeerError

NAME = (1, 3, 6, 1, 2, 1, 1, 1, 0)
VALUES: list[tuple[int, int | bytes | tuple[int, ...] | None]] = [
    (pdu.INTEGER, -1), (pdu.COUNTER32, 0xFFFFFFFF), (pdu.GAUGE32, 7), (pdu.TIME_TICKS, 1), (pdu.COUNTER64, 1 << 63),
    (pdu.OCTET_STRING, b""), (pdu.OCTET_STRING, b"abcde"), (pdu.IP_ADDRESS, bytes(4)), (pdu.OPAQUE, b"x" * 8),
    (pdu.OBJECT_IDENTIFIER, ()), (pdu.OBJECT_IDENTIFIER, (0, 0)), (pdu.OBJECT_IDENTIFIER, (1, 3, 6, 1, 4, 1, 300)),
    (pdu.NULL, None), (pdu.NO_SUCH_OBJECT, None), (pdu.NO_SUCH_INSTANCE, None), (pdu.END_OF_MIB_VIEW, None),
]  # fmt: skip


def parsed(raw: bytes) -> pdu.Packet:
    """Return the parsed form of a packet."""
    header = pdu.parse_header(raw[: pdu.HEADER.size])
    assert header.length == len(raw) - pdu.HEADER.size
    return pdu.parse(header, raw[pdu.HEADER.size :])


def test_object_identifiers() -> None:
    """RFC 2741, 5.1: an identifier below 1.3.6.1.N omits this prefix, and the null identifier is empty."""
    assert pdu.oid(NAME).hex() == "04020000" + "00000001" * 3 + "00000000"
    assert pdu.oid((1, 2), include=True).hex() == "02000100" + "00000001" + "00000002"
    assert pdu.oid(()).hex() == "00000000"
    assert pdu.oid((1, 3, 6, 1, 256)).hex() == "05000000" + "".join(f"{each:08x}" for each in (1, 3, 6, 1, 256))


def test_header() -> None:
    """RFC 2741, 6.1: it is in network byte order, and the context stands before the payload."""
    raw = pdu.packet(pdu.REGISTER, pdu.register((1, 3, 6, 1, 2)), session=1, transaction=2, number=3, context=b"vms")
    assert raw.hex() == (
        "01031800" "00000001" "00000002" "00000003" "00000014"
        "00000003" "766d7300" "007f0000" "00020000"
    ).replace("00000014", f"{len(raw) - 20:08x}")  # fmt: skip
    assert len(raw) == 20 + 8 + 4 + 4


def test_values_can_be_parsed() -> None:
    """There is one of each type."""
    payload = b"".join(pdu.bind(kind, NAME, value) for kind, value in VALUES)

    packet = parsed(pdu.packet(pdu.TEST_SET, payload, context=b"c"))

    assert packet.context == b"c"
    assert packet.binds == tuple(VarBind(name=NAME, kind=kind, value=value) for kind, value in VALUES)


def test_counters_wrap_around() -> None:
    """Numbers that are too large raise no exception."""
    (bind,) = parsed(pdu.packet(pdu.TEST_SET, pdu.bind(pdu.COUNTER64, NAME, (1 << 64) + 5))).binds
    assert bind.value == 5


def test_both_byte_orders() -> None:
    """A master may use the byte order of its host."""
    header = pdu.LITTLE_HEADER.pack(1, pdu.GET_BULK, 0, 0, 9, 8, 7, 4 + 12 + 4)
    payload = struct.pack("<HH", 1, 2) + struct.pack("<BBBBII", 2, 0, 1, 0, 1, 77) + struct.pack("<BBBB", 0, 0, 0, 0)

    packet = parsed(header + payload)

    assert (packet.header.session, packet.header.transaction, packet.header.packet) == (9, 8, 7)
    assert (packet.non_repeaters, packet.repetitions) == (1, 2)
    assert packet.ranges == (SearchRange(start=(1, 77), include=True),)


PACKETS = {
    pdu.GET: pdu.oid(NAME) + pdu.oid(()),
    pdu.GET_NEXT: pdu.oid(NAME, include=True) + pdu.oid((1, 3, 6, 2)),
    pdu.GET_BULK: struct.pack(">HH", 0, 9) + pdu.oid(NAME) + pdu.oid(()),
    pdu.TEST_SET: b"".join(pdu.bind(kind, NAME, value) for kind, value in VALUES),
    pdu.RESPONSE: pdu.response(5, 1, [pdu.bind(pdu.INTEGER, NAME, 3)]),
    pdu.CLOSE: bytes((5, 0, 0, 0)),
}


@pytest.mark.parametrize("kind", PACKETS)
def test_a_packet_that_ends_too_early(kind: int) -> None:
    """Each prefix is refused, or is a shorter list that ends between two items."""
    payload, whole = PACKETS[kind], pdu.parse(Header(kind=kind, flags=pdu.NETWORK_BYTE_ORDER), PACKETS[kind])
    for length in range(len(payload)):
        with contextlib.suppress(PeerError):
            part = pdu.parse(Header(kind=kind, flags=pdu.NETWORK_BYTE_ORDER), payload[:length])
            assert len(part.ranges) + len(part.binds) < len(whole.ranges) + len(whole.binds)


def test_noise() -> None:
    """Any packet raises PeerError only."""
    rng = random.Random(2741)
    for _ in range(5000):
        kind = rng.choice((*PACKETS, pdu.NOTIFY, 99))
        flags = rng.choice((0, pdu.NETWORK_BYTE_ORDER)) | rng.choice((0, pdu.NON_DEFAULT_CONTEXT))
        payload = bytearray(PACKETS.get(kind, b"") if rng.random() < 0.5 else rng.randbytes(4 * rng.randrange(20)))
        for _ in range(rng.randrange(4) if payload else 0):
            payload[rng.randrange(len(payload))] = rng.randrange(256)
        with contextlib.suppress(PeerError):
            pdu.parse(Header(kind=kind, flags=flags), bytes(payload))


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (pdu.HEADER.pack(2, 5, 16, 0, 0, 0, 0, 0), "speaks version 2 of AgentX, and not 1"),
        (pdu.HEADER.pack(1, 5, 16, 0, 0, 0, 0, pdu.PAYLOAD_MAX + 4), f"sends a packet of {pdu.PAYLOAD_MAX + 4} bytes"),
        (pdu.HEADER.pack(1, 5, 16, 0, 0, 0, 0, 3), "sends a packet of 3 bytes"),
    ],
)
def test_invalid_headers(raw: bytes, error: str) -> None:
    """They are refused before the payload is read."""
    with pytest.raises(PeerError) as refused:
        pdu.parse_header(raw)
    assert refused.value.what == error


def test_an_object_identifier_that_is_too_long() -> None:
    """RFC 2741 allows 128 numbers."""
    with pytest.raises(PeerError, match="of 129 numbers"):
        pdu.parse(Header(kind=pdu.GET, flags=pdu.NETWORK_BYTE_ORDER), bytes((129, 0, 0, 0)) + bytes(129 * 4))
