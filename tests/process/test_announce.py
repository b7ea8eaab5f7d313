"""The real network process tells the network, and the guest, that the guest goes on at another place."""

from collections.abc import Iterator

import pytest

from tests.support.netdriver import NetDriver, Nic, net_start
from tests.support.network import Network, TapInterface
from tests.support.packets import ANY4, BROADCAST, GUEST4, HOST4, HOST_LLADDR, LLADDR
from vmd.devices.vionet.announce import ROUNDS_S
from vmd.ipc import devmsg
from vmd.virtio import spec

pytestmark = pytest.mark.root

ANNOUNCE = devmsg.TYPE.pack(devmsg.ANNOUNCE)
ETHERNET_IPV4 = bytes.fromhex("0001 0800 06 04")
WITHOUT_OFFLOADS = 1 << spec.VIRTIO_F_VERSION_1


@pytest.fixture
def network() -> Iterator[Network]:
    """Give a namespace."""
    with Network() as made:
        yield made


def start(network: Network, net: bytes) -> Nic:
    """Start a network process."""
    tap = TapInterface(network)
    return Nic(tap, NetDriver(tap, net))


@pytest.mark.parametrize("features", [0, WITHOUT_OFFLOADS, 1 << spec.VIRTIO_NET_F_MRG_RXBUF], ids=hex)
def test_switches_learn_where_the_guest_is(network: Network, features: int) -> None:
    """By RARP, as other hypervisors do, and again: in headers of either length."""
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


def test_nothing_is_said_without_a_link(network: Network) -> None:
    """An interface that is down stays silent, and what was to be said later is said when it is up."""
    nic = start(network, net_start())
    try:
        nic.device.informs.send(devmsg.LINK_BODY.pack(devmsg.LINK, 0))
        assert nic.driver.link() is False
        nic.device.informs.send(ANNOUNCE)
        nic.device.informs.send(devmsg.LINK_BODY.pack(devmsg.LINK, 1))
        assert nic.driver.link() is True
        assert nic.host.receive()[12:14] == b"\x80\x35"
    finally:
        nic.close()


def test_a_local_guest_learns_where_its_router_is(network: Network) -> None:
    """Before it asks: it would go on to use what it has learned at the other place.  The host needs no telling."""
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
