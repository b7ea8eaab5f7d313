"""Ports at which programs of this host listen, as the kernel says it of real sockets."""

import socket

import pytest

from tests.support.network import Network
from vmd.config.model import Forward
from vmd.parent.hostports import in_the_way

pytestmark = pytest.mark.root

LISTENERS = (
    (socket.AF_INET, "0.0.0.0", True),
    (socket.AF_INET, "192.0.2.1", True),
    (socket.AF_INET, "127.0.0.1", False),
    (socket.AF_INET, "127.9.9.9", False),
    (socket.AF_INET6, "::", True),
    (socket.AF_INET6, "::ffff:192.0.2.1", True),
    (socket.AF_INET6, "::ffff:127.0.0.1", False),
    (socket.AF_INET6, "::1", False),
)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_programs_that_listen(network: Network, kind: socket.SocketKind) -> None:
    """Conflicts are programs that listen for others, with the same protocol, at any port of a range."""
    udp = kind == socket.SOCK_DGRAM
    network.run("ip", "address", "add", "192.0.2.1/32", "dev", "lo")
    protocol, flags = ("udp", "-lunp") if udp else ("tcp", "-ltnp")
    words = f"a program of this host has {protocol} port 8022: `ss {flags}` shows it"

    def way(port: int, count: int = 1, *, udp: bool = udp) -> str:
        with network.inside():
            return in_the_way(Forward(port=port, to=1, count=count, udp=udp))

    for family, address, for_others in LISTENERS:
        with network.socket(family, kind) as listener:
            listener.bind((address, 8022))
            if not udp:
                listener.listen()
            assert way(8022) == way(8000, 99) == (words if for_others else ""), address
            assert way(8023) == way(8022, udp=not udp) == ""


def test_a_connection_is_in_nobodys_way(network: Network) -> None:
    """An established connection with the port is no conflict."""
    with network.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 8022))
        listener.listen()
        with network.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.connect(("127.0.0.1", 8022))
            with network.inside():
                assert in_the_way(Forward(port=client.getsockname()[1], to=1)) == ""
