"""Ports of the host that are forwarded to guests: real packets from outside, from the host, and from other guests."""

import errno
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.support.hostnet import rules
from tests.support.network import Network
from tests.support.packets import LLADDR
from tests.support.privdriver import DEADLINE_S, Priv, nic
from tests.support.throughhost import World
from tests.support.wire import KernelGuest, ask
from vmd.config.model import Forward, Prefix
from vmd.ipc.messages.priv import AdoptNics, ForwardsSet, NicsFailed, SetForwards

pytestmark = pytest.mark.root

OTHER_LLADDR = LLADDR[:5] + bytes((LLADDR[5] ^ 1,))
HOST, OUTSIDE = "192.0.2.1", "192.0.2.2"  # of the host at its uplink, and of the world behind that
HOST4, GUEST4 = bytes((100, 64, 1, 2)), bytes((100, 64, 1, 3))
WEB: dict[str, Any] = {"host4": HOST4, "guest4": GUEST4}
WORLD = Prefix(address=bytes((192, 0, 2, 0)), length=24)
NOBODY = Prefix(address=bytes((198, 51, 100, 0)), length=24)
SSH = Forward(port=8022, to=22)
RANGE = Forward(port=8000, to=8000, count=3)
MOVED = Forward(port=9000, to=19000, count=3)
DNS = Forward(port=5353, to=53, udp=True)
FROM_WORLD = Forward(port=8080, to=80, source=WORLD)
FROM_NOBODY = Forward(port=8081, to=80, source=NOBODY)
FORWARDS = (SSH, RANGE, MOVED, DNS, FROM_WORLD, FROM_NOBODY)


class Place(NamedTuple):
    """A host between an outside network and two guests; the first guest has forwarded ports."""

    host: Network
    world: Network
    priv: Priv
    web: KernelGuest
    other: KernelGuest


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Yield the host, with servers in the first guest."""
    fixed: dict[str, Any] = {"host4": bytes((10, 9, 0, 1)), "guest4": bytes((10, 9, 0, 77)), "length4": 24}
    with (
        Network() as network,
        Priv(network) as priv,
        World(network) as world,
        priv.make(nic(**WEB, forwards=FORWARDS)) as made,
        priv.make(nic(alias="vm2-if0-b", lladdr=OTHER_LLADDR, **fixed), vmid=2) as second,
        KernelGuest(made.fds[0], LLADDR, "100.64.1.3/31", "100.64.1.2") as web,
        KernelGuest(second.fds[0], OTHER_LLADDR, "10.9.0.77/24", "10.9.0.1") as other,
        web.listen(22), web.listen(80), web.listen(8001), web.listen(19002), web.listen(53, socket.SOCK_DGRAM),
    ):  # fmt: skip
        world.network.run("ip", "route", "add", "default", "via", HOST)
        yield Place(network, world.network, priv, web, other)


@pytest.mark.parametrize("port", [8022, 8001, 9002, 8080])
def test_from_outside(place: Place, port: int) -> None:
    """The guest sees the client's address.  A range keeps its order, whether moved or not."""
    assert ask(place.world, HOST, port) == OUTSIDE


def test_from_outside_by_udp(place: Place) -> None:
    """UDP is forwarded too; TCP of the same port number is not."""
    assert ask(place.world, HOST, 5353, socket.SOCK_DGRAM) == OUTSIDE
    with pytest.raises(ConnectionRefusedError):
        ask(place.world, HOST, 5353)


@pytest.mark.parametrize("port", [22, 8003, 9003, 8081])
def test_what_is_not_forwarded(place: Place, port: int) -> None:
    """Other ports, and ports at other addresses, stay the host's."""
    with pytest.raises(ConnectionRefusedError):
        ask(place.world, HOST, port)


@pytest.mark.parametrize("address", [HOST, "100.64.1.2", "10.9.0.1"])
def test_from_the_host_itself(place: Place, address: str) -> None:
    """The host reaches a forward at each of its addresses."""
    assert ask(place.host, address, 8022) == address


def test_not_by_the_loopback_interface(place: Place) -> None:
    """Services at 127.0.0.1 stay private to the host, in both directions."""
    with pytest.raises(ConnectionRefusedError):
        ask(place.host, "127.0.0.1", 8022)
    assert place.host.run("cat", "/proc/sys/net/ipv4/conf/tap0/route_localnet").strip() == "0"


@pytest.mark.parametrize("address", [HOST, "10.9.0.1"])
def test_from_another_guest(place: Place, address: str) -> None:
    """Another guest connects to the host's address, and its own address is visible."""
    assert ask(place.other.network, address, 8022) == "10.9.0.77"


def test_from_the_guest_itself(place: Place) -> None:
    """The guest reaches its own forward through the host."""
    assert ask(place.web.network, HOST, 8022) == "100.64.1.2"


def test_addresses_that_are_not_the_hosts_are_left_alone(place: Place) -> None:
    """A guest's connection to a forwarded port at an outside address goes outside."""
    with place.world.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind((OUTSIDE, 8022))
        server.listen()
        with place.other.network.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(DEADLINE_S)
            client.connect((OUTSIDE, 8022))
            connection, who = server.accept()
            connection.close()
        assert who[0] == HOST


def test_others_while_it_runs(place: Place) -> None:
    """Forwards are added and removed while the VM runs; invalid ones change nothing."""
    new = Forward(port=7022, to=22)
    place.priv.send(SetForwards(vmid=1, forwards=((SSH, new),)))
    assert place.priv.receive(ForwardsSet) == ForwardsSet(vmid=1)
    assert ask(place.world, HOST, 7022) == ask(place.world, HOST, 8022) == OUTSIDE
    with pytest.raises(ConnectionRefusedError):
        ask(place.world, HOST, 8001)

    beyond, none = Forward(port=1, to=65530, count=9), Forward(port=0, to=1)
    for wrong in (((SSH,), (SSH,)), ((SSH, SSH),), ((none,),), ((beyond,),)):
        place.priv.send(SetForwards(vmid=1, forwards=wrong))
        assert place.priv.receive(ForwardsSet).text
    assert ask(place.world, HOST, 7022) == OUTSIDE

    place.priv.send(SetForwards(vmid=2, forwards=((new,),)))
    assert place.priv.receive(ForwardsSet).text == "forward tcp port 7022 to port 22: vm 1 has tcp port 7022 to port 22"
    failed = place.priv.ask(nic(alias="vm3-if0-c", host4=HOST4, guest4=GUEST4, forwards=(SSH,)), vmid=3)
    assert isinstance(failed, NicsFailed)
    assert failed.text == "forward tcp port 8022 to port 22: vm 1 has tcp port 8022 to port 22"

    place.priv.send(SetForwards(vmid=1, forwards=(FORWARDS,)))
    assert place.priv.receive(ForwardsSet) == ForwardsSet(vmid=1)
    place.priv.send(SetForwards(vmid=9, forwards=(FORWARDS,)))  # which has ended meanwhile
    assert place.priv.receive(ForwardsSet) == ForwardsSet(vmid=9)
    assert ask(place.world, HOST, 8001) == OUTSIDE


@pytest.mark.parametrize("command", ["flush ruleset", "flush chain inet vmd forwards", "flush chain inet vmd output"])
def test_what_a_firewall_flushes_is_written_again(place: Place, command: str) -> None:
    """vmd notices a flush by itself.  Until then the ports are the host's."""
    before = rules(place.host).count("dnat ip to")
    place.host.run("nft", command)
    deadline_s = time.monotonic() + DEADLINE_S
    while "table inet vmd" not in place.host.run("nft", "list", "tables") or (
        rules(place.host).count("dnat ip to"), rules(place.host).count("jump forwards")
    ) != (before, 2):  # fmt: skip
        assert time.monotonic() < deadline_s, place.priv.log
    assert ask(place.world, HOST, 8022) == OUTSIDE


def test_no_rules_without_nat(network: Network) -> None:
    """Without NAT the operator has their own rules."""
    with Priv(network) as priv:
        priv.configure(nat=False)
        with priv.make(nic(**WEB, forwards=FORWARDS)):
            assert "table inet vmd" not in network.run("nft", "list", "tables")


@pytest.mark.parametrize(
    "wrong",
    [
        {"forwards": (SSH,)},
        {**WEB, "guest4": bytes((100, 64, 1, 4))},
        {**WEB, "length4": 8},
        {**WEB, "length4": 32},
        {**WEB, "forwards": (SSH, SSH)},
        {**WEB, "forwards": (Forward(port=22, to=70000),)},
        {**WEB, "forwards": (Forward(port=22, to=22, source=Prefix(address=b"; flush ruleset", length=0)),)},
        {**WEB, "forwards": tuple(Forward(port=port, to=port) for port in range(1, 18))},
    ],
    ids=range(8),
)
def test_what_no_configuration_leads_to_is_refused(place: Place, wrong: dict[str, Any]) -> None:
    """priv refuses forwards that no configuration allows, even from a compromised parent."""
    before = rules(place.host)
    failed = place.priv.ask(nic(alias="vm3-if0-c", **wrong), vmid=3)
    assert isinstance(failed, NicsFailed)
    assert failed.code == errno.EPERM
    assert rules(place.host) == before


def test_an_interface_that_an_earlier_version_has_made(network: Network) -> None:
    """Its record lacks the guest's address, which is the other one of two."""
    with Priv(network) as first:
        request = nic(host4=HOST4)
        with first.make(request) as made, Network() as other, Priv(other) as second:
            second.send(AdoptNics(vmid=1, nics=(request,), made=made.nics))
            second.send(SetForwards(vmid=1, forwards=((SSH,),)))
            assert second.receive(ForwardsSet).text == ""
            assert "tcp dport 8022 dnat ip to 100.64.1.3:22" in rules(other)
