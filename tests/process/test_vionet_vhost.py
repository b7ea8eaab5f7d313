"""The real, confined process of an interface with `vhost`, on a host whose kernel does not move the frames.

`tests/l1/test_vhost.py` has a kernel that moves them.
"""

import socket
from collections.abc import Iterator

import pytest

from tests.support.descriptors import open_files
from tests.support.netdriver import ALL, NetDriver, Nic, net_start
from tests.support.network import Network, TapInterface
from vmd.ipc import devmsg

pytestmark = pytest.mark.root

ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR = 263, 15


@pytest.fixture
def network() -> Iterator[Network]:
    """Give a namespace."""
    with Network() as made:
        yield made


def packet_socket(tap: TapInterface) -> socket.socket:
    """Return a packet socket on a tap, without a filter."""
    with tap.network.inside():
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    made.bind((tap.name, ETH_P_ALL))
    return made


def test_a_kernel_without_vhost(network: Network) -> None:
    """A file that is no vhost-net refuses the first request.  One line says so, and the process moves the frames."""
    net = net_start(flags=devmsg.NET_VHOST)
    with TapInterface(network) as tap, packet_socket(tap) as ear, open("/dev/null", "rb+", buffering=0) as null:
        nic = Nic(tap, NetDriver(tap, net, more=(null.fileno(), ear.fileno())))
        try:
            direct(nic, on=True)
            nic.driver.renew(ALL)
            assert nic.works()
            direct(nic, on=False)
            assert nic.works()
            log = nic.device.read_log()
            assert log.count("vhost") == 1
            assert "tap0: /dev/vhost-net: Inappropriate ioctl for device; the process moves the frames" in log
            assert nic.device.figures()["vhost"] == 0
            assert "/dev/null" in open_files(nic.device.child.pid).values()
        finally:
            nic.close()


def direct(nic: Nic, *, on: bool) -> None:
    """Tell the process whether an interrupt needs only its eventfd."""
    answer = nic.device.ask(devmsg.DIRECT_BODY.pack(devmsg.DIRECT, on))
    assert answer == devmsg.STATUS.pack(devmsg.DIRECT, 0)
