"""Announcements at another host, byte by byte, and the addresses for them, which a guest has told its neighbours."""

import struct

import pytest

from tests.support.network import checksum
from tests.support.packets import ALL_NODES, GUEST4, GUEST_LL, LLADDR, ethernet, icmpv6, ipv6
from vmd.devices.vionet import announce
from vmd.devices.vionet.addresses import LENGTHS, LOOK_BYTES, Addresses
from vmd.ipc import devmsg

GLOBAL6 = bytes.fromhex("fd00112233440305") + bytes(7) + b"\5"
TO_ALL = b"\x33\x33\0\0\0\1"


def entry(kind: int, address: bytes) -> bytes:
    """Return an address as it is sent to another host."""
    return bytes((kind,)) + address.ljust(16, b"\0")


OF_4 = entry(devmsg.ANNOUNCED_4, GUEST4)
OF_6, OF_ROUTER = entry(devmsg.ANNOUNCED_6, GLOBAL6), entry(devmsg.ANNOUNCED_ROUTER, GLOBAL6)


def arp(operation: int, target: bytes, source4: bytes, target4: bytes, kind: int = 0x0806) -> bytes:
    """Return an ARP or RARP frame of the guest to all."""
    head = struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation)
    return ethernet(head + LLADDR + source4 + target + target4, kind).ljust(60, b"\0")


def advertisement(
    target: bytes = GLOBAL6, *, flags: int = 0x20, kind: int = 136, code: int = 0, hops: int = 255,
    source: bytes = GLOBAL6, sender: bytes = LLADDR, option: bytes = b"\2\1" + LLADDR,
) -> bytes:  # fmt: skip
    """Return a neighbour advertisement to all; arguments replace its usual fields."""
    message = icmpv6(kind, bytes((flags, 0, 0, 0)) + target + option, source, ALL_NODES, code)
    return ethernet(ipv6(message, 58, source, ALL_NODES, hops), 0x86DD, sender, TO_ALL)


def test_frames_of_an_announcement() -> None:
    """RFC 903, RFC 5227 3, RFC 4861 7.2.6."""
    assert announce.reverse_request(LLADDR) == arp(3, LLADDR, bytes(4), bytes(4), 0x8035)
    assert announce.router_address(LLADDR, GUEST4) == arp(1, bytes(6), GUEST4, GUEST4)
    assert announce.address(LLADDR, OF_4) == arp(1, bytes(6), GUEST4, GUEST4)
    for told, flags in ((OF_6, 0x20), (OF_ROUTER, 0xA0)):
        frame = announce.address(LLADDR, told)
        assert frame == advertisement(flags=flags)
        assert checksum(GLOBAL6 + ALL_NODES + struct.pack(">II", len(frame) - 54, 58) + frame[54:]) == 0


def learnt(*frames: bytes) -> tuple[bytes, ...]:
    """Return the addresses that a guest is known to have after these frames."""
    addresses = Addresses(LLADDR)
    for frame in frames:
        addresses.learn(frame[:LOOK_BYTES])
    return addresses.known


@pytest.mark.parametrize("told", [OF_4, OF_6, OF_ROUTER], ids=["IPv4", "IPv6", "router"])
def test_announced_address_is_learnt(told: bytes) -> None:
    """Its frame has one of the lengths that are looked at, with or without padding and the option."""
    frame = announce.address(LLADDR, told)
    short = frame[:42] if told == OF_4 else advertisement(flags=0xA0 if told == OF_ROUTER else 0x20, option=b"")
    assert {len(frame), len(short)} <= set(LENGTHS)
    assert learnt(frame) == learnt(short) == (told,)
    assert learnt(short[:-1]) == ()


NOT_LEARNT = {
    "of another": ethernet(advertisement()[14:], 0x86DD, b"\2" + LLADDR[1:], TO_ALL),
    "ARP for another": arp(1, bytes(6), GUEST4, GUEST4).replace(LLADDR + GUEST4, LLADDR[:5] + b"\0" + GUEST4),
    "ARP probe": arp(1, bytes(6), bytes(4), GUEST4),
    "ARP of another network": arp(1, bytes(6), GUEST4, GUEST4)[:15] + b"\2" + arp(1, bytes(6), GUEST4, GUEST4)[16:],
    "ARP of longer addresses": arp(1, bytes(6), GUEST4, GUEST4)[:19] + b"\5" + arp(1, bytes(6), GUEST4, GUEST4)[20:],
    "RARP": arp(3, LLADDR, GUEST4, GUEST4, 0x8035),
    "from a router away": advertisement(hops=254),
    "solicitation": advertisement(kind=135),
    "another code": advertisement(code=1),
    "no address": advertisement(bytes(16)),
    "from no address": advertisement(source=bytes(16)),
    "of a group": advertisement(b"\xff\2" + GLOBAL6[2:]),
    "no ICMPv6": ethernet(ipv6(advertisement()[54:], 17, GLOBAL6, ALL_NODES), 0x86DD, LLADDR, TO_ALL),
    "no IPv6": ethernet(b"\x50" + advertisement()[15:], 0x86DD, LLADDR, TO_ALL),
}


@pytest.mark.parametrize("frame", NOT_LEARNT.values(), ids=NOT_LEARNT)
def test_frame_that_tells_no_address(frame: bytes) -> None:
    """It is of another one, or says that the address is not in use yet."""
    assert learnt(frame) == ()


def test_latest_addresses_are_kept() -> None:
    """The latest first, each once; a guest that begins or stops to be a router has one entry."""
    link_local = advertisement(GUEST_LL, source=GUEST_LL)
    of_link_local = entry(devmsg.ANNOUNCED_6, GUEST_LL)
    arp4 = arp(2, LLADDR, GUEST4, GUEST4)
    assert learnt(arp4, link_local, advertisement(), link_local) == (of_link_local, OF_6, OF_4)
    assert learnt(advertisement(), link_local, advertisement(flags=0x80)) == (OF_ROUTER, of_link_local)
    assert learnt(advertisement(flags=0x80), advertisement()) == (OF_6,)

    many = [GLOBAL6[:15] + bytes((number,)) for number in range(1, devmsg.ANNOUNCED_MAX + 3)]
    found = learnt(*[advertisement(each, source=each) for each in many])
    assert found == tuple(entry(devmsg.ANNOUNCED_6, each) for each in many[:1:-1])
