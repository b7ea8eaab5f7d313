"""Router advertisements of a local interface, and router solicitations (RFC 4861, RFC 8106)."""

import random
import struct

import pytest

from tests.support.network import checksum
from tests.support.packets import (
    ALL_NODES,
    ALL_ROUTERS,
    GUEST4,
    GUEST_LL,
    HOST4,
    HOST_LLADDR,
    LLADDR,
    ethernet,
    icmpv6,
    ipv6,
    solicitation,
)
from vmd.devices.vionet import ra
from vmd.devices.vionet.ethernet import link_local
from vmd.devices.vionet.interface import Interface

PREFIX = bytes.fromhex("fd00112233440305") + bytes(8)
NIC = Interface(
    lladdr=LLADDR, host_lladdr=HOST_LLADDR, local=True, guest4=GUEST4, host4=HOST4, prefix6=PREFIX,
)  # fmt: skip
ROUTER = bytes.fromhex("fe80000000000000081b2cfffe3d4e5f")


def options_of(message: bytes) -> dict[int, bytes]:
    """Return the options of an advertisement."""
    options, at = {}, 16
    while at < len(message):
        options[message[at]] = message[at : at + 8 * message[at + 1]]
        at += 8 * message[at + 1]
    assert at == len(message)
    return options


def test_advertisement_byte_by_byte() -> None:
    """It has the headers, the router, the prefix of the guest's addresses, and the MTU."""
    frame = ra.advertisement(NIC)

    assert frame[:14] == b"\x33\x33\0\0\0\1" + HOST_LLADDR + b"\x86\xdd"
    first, length, following, hops, source, destination = struct.unpack_from(">IHBB16s16s", frame, 14)
    message = frame[54:]
    assert (first, length, following, hops) == (6 << 28, len(message), 58, 255)
    assert (source, destination) == (ROUTER, ALL_NODES)
    assert checksum(source + destination + struct.pack(">II", length, 58) + message) == 0
    assert struct.unpack_from(">BBxxBBHII", message) == (134, 0, 64, 0, 1800, 0, 0)
    options = options_of(message)
    assert options[1] == b"\1\1" + HOST_LLADDR
    assert options[5] == struct.pack(">BBHI", 5, 1, 0, 1500)
    assert options[3] == struct.pack(">BBBBIII", 3, 4, 64, 0xC0, 2_592_000, 604_800, 0) + PREFIX
    assert set(options) == {1, 3, 5}


def test_name_servers_and_mtu() -> None:
    """They come from the configuration and from the host (RFC 8106, 5.1)."""
    dns = (bytes(15) + b"\1", bytes(15) + b"\2")

    options = options_of(ra.advertisement(NIC.replace(dns6=dns, mtu=9000))[54:])

    assert options[5][4:] == (9000).to_bytes(4, "big")
    assert options[25] == struct.pack(">BBHI", 25, 5, 0, 1800) + b"".join(dns)


def test_router_address() -> None:
    """It is the given address, else the one that Linux derives from the link-layer address."""
    told = bytes.fromhex("fe80") + bytes(13) + b"\x77"

    assert ra.advertisement(NIC.replace(host_link_local=told))[22:38] == told
    assert link_local(HOST_LLADDR) == ROUTER
    assert NIC.replace(host_lladdr=b"").router == b""


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(solicitation(), id="usual"),
        pytest.param(solicitation(options=b""), id="without-options"),
        pytest.param(solicitation(bytes(16), options=b""), id="without-address"),
        pytest.param(solicitation(destination=ROUTER, lladdr=HOST_LLADDR), id="to-us"),
        pytest.param(solicitation(options=b"\x0e\1abcdef\1\1" + LLADDR), id="unknown-option"),
        pytest.param(solicitation() + bytes(6), id="padding-of-the-link"),
    ],
)
def test_solicitation(frame: bytes) -> None:
    """The forms of solicitations that hosts send are recognised."""
    assert ra.is_solicitation(frame, NIC)


PASSED = {
    "from-another": solicitation(sender=HOST_LLADDR),
    "to-another": solicitation(lladdr=LLADDR),
    "to-another-address": solicitation(destination=ALL_NODES),
    "forwarded": solicitation(hops=254),
    "code": solicitation(code=1),
    "neighbour-solicitation": solicitation(kind=135),
    "advertisement": solicitation(kind=134),
    "no-address-but-lladdr": solicitation(bytes(16)),
    "option-of-length-0": solicitation(options=b"\1\0" + LLADDR),
    "option-past-the-end": solicitation(options=b"\1\2" + LLADDR),
    "half-an-option": solicitation(options=b"\1"),
    "ipv4": ethernet(solicitation()[14:], 0x0800, LLADDR, b"\x33\x33\0\0\0\2"),
    "udp": ethernet(ipv6(bytes(8), 17, GUEST_LL, ALL_ROUTERS), 0x86DD, LLADDR, b"\x33\x33\0\0\0\2"),
    "short": ethernet(
        ipv6(icmpv6(133, b"", GUEST_LL, ALL_ROUTERS), 58, GUEST_LL, ALL_ROUTERS) + bytes(20), 0x86DD, LLADDR,
        b"\x33\x33\0\0\0\2",
    ),
    "version": solicitation()[:14] + b"\x40" + solicitation()[15:],
}  # fmt: skip


@pytest.mark.parametrize("frame", PASSED.values(), ids=PASSED)
def test_frame_that_is_no_solicitation(frame: bytes) -> None:
    """The frame breaks RFC 4861, 6.1.1, or is not for routers."""
    assert not ra.is_solicitation(frame, NIC)


def test_missing_sum_is_accepted_if_the_device_computes_it() -> None:
    """Only then the sum is not checked."""
    frame = bytearray(solicitation())
    frame[56] ^= 1

    assert not ra.is_solicitation(bytes(frame), NIC)
    assert ra.is_solicitation(bytes(frame), NIC, sum_missing=True)


@pytest.mark.parametrize("sample", [solicitation(), solicitation(bytes(16), options=b"")])
def test_prefixes_and_flipped_bits(sample: bytes) -> None:
    """No prefix is a solicitation.  The sum shows every changed bit that it covers."""
    not_covered = {*range(14, 18)}  # the version has its own check; class and label do not matter
    for length in range(len(sample)):
        assert not ra.is_solicitation(sample[:length], NIC)
    for bit in range(len(sample) * 8):
        flipped = bytearray(sample)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not ra.is_solicitation(bytes(flipped), NIC) or bit // 8 in not_covered


def test_random_messages() -> None:
    """Random bytes, and solicitations with random bytes, cause no exception (fixed seed)."""
    choice = random.Random(45)
    results = set()
    for _ in range(20_000):
        frame = bytearray(solicitation(options=choice.randbytes(choice.randrange(40))))
        for _ in range(choice.randrange(4)):
            frame[choice.randrange(len(frame))] = choice.randrange(256)
        results.add(ra.is_solicitation(bytes(frame), NIC, sum_missing=True))
        results.add(ra.is_solicitation(choice.randbytes(choice.randrange(200)), NIC, sum_missing=True))
    assert results == {True, False}
