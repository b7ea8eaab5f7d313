"""The real network process tells the network and the guest that the guest has moved to another host."""

from collections.abc import Iterator

import pytest

from tests.support.netdriver import NetDriver, Nic, net_start
from tests.support.network import Network, TapInterface
from tests.support.packets import (
    ALL_NODES,
    ANY4,
    BROADCAST,
    GUEST4,
    GUEST_LL,
    HOST4,
    HOST_LLADDR,
    LLADDR,
    any_frame,
    ethernet,
    icmpv6,
    ipv6,
)
from vmd.devices.vionet.announce import ROUNDS_S
from vmd.ipc import devmsg
from vmd.virtio import spec

pytestmark = pytest.mark.root

ANNOUNCE = devmsg.TYPE.pack(devmsg.ANNOUNCE)
ETHERNET_IPV4 = bytes.fromhex("0001 0800 06 04")
WITHOUT_OFFLOADS = 1 << spec.VIRTIO_F_VERSION_1


@pytest.fixture
def network() -> Iterator[Network]:
    """Yield a network namespace."""
    with Network() as made:
        yield made


def start(network: Network, net: bytes) -> Nic:
    """Start a network process."""
    tap = TapInterface(network)
    return Nic(tap, NetDriver(tap, net))


@pytest.mark.parametrize("features", [0, WITHOUT_OFFLOADS, 1 << spec.VIRTIO_NET_F_MRG_RXBUF], ids=hex)
def test_switches_learn_where_the_guest_is(network: Network, features: int) -> None:
    """The process sends RARP several times, as other hypervisors do, with headers of either length."""
    nic = start(network, net_start(flags=devmsg.NET_LOCKED))
    try:
        nic.driver.renew(features)
        nic.device.informs.send(ANNOUNCE)

        frames = nic.host.receive_all(3)

        arp = ETHERNET_IPV4 + b"\0\3" + LLADDR + ANY4 + LLADDR + ANY4
        assert frames == [(BROADCAST + LLADDR + b"\x80\x35" + arp).ljust(60, b"\0")] * 3
        assert len(ROUNDS_S) > 3
    finally:
        nic.close()


def advertisement(target: bytes, flags: int = 0, *, source: bytes = GUEST_LL, destination: bytes = ALL_NODES) -> bytes:
    """Return a frame of the guest that advertises an address."""
    body = bytes((flags, 0, 0, 0)) + target + b"\x02\x01" + LLADDR
    return neighbour(136, body, source, destination)


def neighbour(kind: int, body: bytes, source: bytes, destination: bytes) -> bytes:
    """Return a frame of neighbour discovery."""
    return ethernet(ipv6(icmpv6(kind, body, source, destination), 58, source, destination), 0x86DD)


def arp(operation: int, source4: bytes, *, source: bytes = LLADDR) -> bytes:
    """Return a frame of the guest that asks or answers."""
    return ethernet(ETHERNET_IPV4 + bytes((0, operation)) + source + source4 + bytes(6) + HOST4, 0x0806)


@pytest.mark.parametrize("features", [0, WITHOUT_OFFLOADS], ids=hex)
def test_neighbours_learn_where_the_guest_is(network: Network, features: int) -> None:
    """Repeat what the guest told neighbours about its own addresses, but nothing about others, and not too often."""
    nic = start(network, net_start())
    try:
        nic.driver.renew(features)
        router, other = bytes.fromhex("20010db8" + "00" * 11 + "01"), bytes.fromhex("20010db8" + "00" * 11 + "02")
        told = [
            arp(1, ANY4), arp(2, GUEST4), arp(1, GUEST4).ljust(60, b"\0"), advertisement(GUEST_LL, 0xE0),
            advertisement(GUEST_LL, 0x20), advertisement(router, 0xE0),
            arp(2, HOST4, source=HOST_LLADDR), advertisement(ALL_NODES), advertisement(bytes(16)),
            neighbour(135, bytes(4) + other + b"\x01\x01" + LLADDR, other, ALL_NODES),
            ethernet(bytes(28), 0x0806), ethernet(bytes(72), 0x86DD), ethernet(bytes(64), 0x86DD),
        ]  # fmt: skip
        for frame in told:
            nic.driver.send(frame)
            nic.host.receive()
        known = nic.device.ask(devmsg.TYPE.pack(devmsg.ADDRESSES))[devmsg.TYPE.size :]
        assert [known[at : at + 17] for at in range(0, len(known), 17)] == [
            b"\7" + router, b"\6" + GUEST_LL, b"\4" + GUEST4 + bytes(12)
        ]  # fmt: skip

        nic.device.informs.send(ANNOUNCE + known)

        reverse, *frames = nic.host.receive_all(4)
        assert reverse[12:14] == b"\x80\x35"
        claim = ETHERNET_IPV4 + b"\0\1" + LLADDR + GUEST4 + bytes(6) + GUEST4
        all_nodes = bytes.fromhex("333300000001")
        expected = [
            all_nodes + advertisement(target, flags, source=target)[6:]
            for target, flags in ((router, 0xA0), (GUEST_LL, 0x20))
        ]
        assert frames == [*expected, (BROADCAST + LLADDR + b"\x08\x06" + claim).ljust(60, b"\0")]
    finally:
        nic.close()


def test_not_more_addresses_than_are_remembered(network: Network) -> None:
    """The last announced addresses are remembered."""
    nic = start(network, net_start())
    try:
        nic.driver.renew(WITHOUT_OFFLOADS)
        for number in range(40):
            nic.driver.send(arp(2, bytes((10, 0, 0, number))))
            nic.host.receive()
        known = nic.device.ask(devmsg.TYPE.pack(devmsg.ADDRESSES))[devmsg.TYPE.size :]
        assert [address[3] for _, address in devmsg.ANNOUNCED.iter_unpack(known)] == list(range(39, 23, -1))
    finally:
        nic.close()


def test_nothing_is_said_without_a_link(network: Network) -> None:
    """An interface that is down sends nothing; the pending announcements follow when it is up."""
    nic = start(network, net_start())
    try:
        nic.tap.set("down")
        nic.driver.send(any_frame(60))  # shows that no frame passes
        assert nic.driver.link() is False
        nic.device.informs.send(ANNOUNCE)
        nic.tap.set("up")
        assert nic.driver.link() is True
        assert nic.host.receive()[12:14] == b"\x80\x35"
    finally:
        nic.close()


def test_a_local_guest_learns_where_its_router_is(network: Network) -> None:
    """The guest gets the router's address without asking, because it would still use the old host's."""
    net = net_start(host_lladdr=HOST_LLADDR, flags=devmsg.NET_LOCAL, guest4=GUEST4, host4=HOST4)
    nic = start(network, net)
    try:
        nic.driver.renew(WITHOUT_OFFLOADS)
        nic.driver.post(4)
        nic.device.informs.send(ANNOUNCE)

        arp = ETHERNET_IPV4 + b"\0\1" + HOST_LLADDR + HOST4 + bytes(6) + HOST4
        assert nic.driver.receive().frame == (BROADCAST + HOST_LLADDR + b"\x08\x06" + arp).ljust(60, b"\0")
        assert nic.no_frame()
    finally:
        nic.close()
