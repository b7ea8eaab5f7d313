"""priv is killed after each of its changes.  The next priv undoes all of them, and changes nothing else."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.hostnet import addresses, links, load_modules
from tests.support.killing import die_after
from tests.support.network import Network
from tests.support.packets import LLADDR
from tests.support.privdriver import RUN_DIRECTORY
from vmd.ipc.messages.priv import ConfigureNetwork, MakeNics, NicWanted, SwitchRequest
from vmd.parent.forpriv import open_tuns
from vmd.priv import host
from vmd.priv.nics import Nic

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

Work = Callable[[host.HostNetwork, socket.socket], None]
PREFIX6 = bytes.fromhex("fd42004200420004") + bytes(8)


@pytest.fixture
def network() -> Iterator[Network]:
    """Give a network with a bridge, addresses and settings of the administrator."""
    RUN_DIRECTORY.mkdir(parents=True, exist_ok=True)
    load_modules()
    with Network() as made:
        made.run("ip", "link", "add", "office", "type", "bridge")
        made.run("ip", "addr", "add", "192.0.2.1/24", "dev", "office")
        made.run("ip", "link", "set", "office", "mtu", "9000", "address", "52:54:00:00:00:01")
        made.write("/proc/sys/net/ipv4/conf/all/accept_redirects", "0")
        yield made


def hand_over(holder: socket.socket, nics: list[Nic]) -> None:
    """Send the descriptors of taps to `holder`, as priv sends them to the parent."""
    for nic in nics:
        fd = nic.take_fd()
        socket.send_fds(holder, [b"tap"], [fd])
        os.close(fd)


def make_all_changes(network: host.HostNetwork, holder: socket.socket) -> None:
    """Make all kinds of changes that priv makes, send the taps to `holder`, and end."""
    lan = NicWanted(lladdr=LLADDR, name="", alias="vm1-if0-db", bridge="br0", groups=("lab",))
    local = NicWanted(lladdr=LLADDR, name="", alias="vm1-if1-db", host4=bytes((100, 64, 1, 4)), prefix6=PREFIX6)
    office = NicWanted(lladdr=LLADDR, name="tap7", alias="vm1-if2-db", bridge="office")
    alone = NicWanted(lladdr=LLADDR, name="", alias="vm2-if0-db", host4=bytes((100, 64, 2, 2)))
    network.own()
    switches = (
        SwitchRequest(interface="br0", alias="switch1-lan"),
        SwitchRequest(interface="office", alias="switch2-office"),
    )
    network.configure(ConfigureNetwork(nat=True, switches=switches))
    hand_over(holder, network.make_nics(MakeNics(vmid=1, ticket=1, nics=(lan, local, office)), open_tuns(3)))
    hand_over(holder, network.make_nics(MakeNics(vmid=2, ticket=2, nics=(alone,)), open_tuns(1)))
    network.remove_nics(1)
    network.close()


def make_changes_in_routing_domains(network: host.HostNetwork, holder: socket.socket) -> None:
    """Do the same with one switch and one interface, both in VRFs."""
    alone = NicWanted(lladdr=LLADDR, name="", alias="vm2-if0-db", host4=bytes((100, 64, 2, 2)), rdomain=9)
    network.own()
    switches = (SwitchRequest(interface="br0", alias="switch1-lan", rdomain=3),)
    network.configure(ConfigureNetwork(nat=False, switches=switches))
    hand_over(holder, network.make_nics(MakeNics(vmid=2, ticket=2, nics=(alone,)), open_tuns(1)))
    network.close()


def succeed(network: host.HostNetwork) -> None:
    """Start and end as the next priv does, without any request."""
    assert network.own()
    network.close()


def state(network: Network) -> dict[str, object]:
    """Return all interfaces, addresses, routes, rules and settings."""
    found: dict[str, object] = {
        name: (link.get("ifalias"), link["mtu"], link["address"], link["group"], addresses(link))
        for name, link in links(network).items()
    }
    found["rules"] = network.run("nft", "list", "ruleset")
    found["routes"] = network.run("ip", "route", "show", "table", "all")
    with network.inside():
        for path in settings():
            with contextlib.suppress(OSError):  # a secret that was never set cannot be read
                found[str(path)] = path.read_text().strip()
    return found


def settings() -> list[Path]:
    """Return all settings of IP and of interfaces."""
    top = Path("/proc/sys/net")
    return [top / "ipv4/ip_forward", *top.glob("ipv4/conf/*/*"), *top.glob("ipv6/conf/*/*")]


def difference(before: dict[str, object], after: dict[str, object]) -> dict[str, tuple[object, object]]:
    """Return all items that differ, with the values before and after."""
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return {name: (before.get(name), after.get(name)) for name in names}


def kill_after_changes(network: Network, work: Work, step: int) -> list[str]:
    """Kill priv after every `step`th of its changes, and run the next priv each time; return all changes as text."""
    before = state(network)
    turn = 0
    while True:
        holder, gift = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with holder, network.inside():
            with gift:
                killed, changes = die_after(turn, lambda mortal: work(mortal, gift))  # noqa: B023 - called now
            with held(holder):
                die_after(-1, succeed)
                assert difference(before, state(network)) == {}, f"after {changes[-3:]}"
        if not killed:
            return changes
        turn += step


@contextlib.contextmanager
def held(holder: socket.socket) -> Iterator[None]:
    """Keep the taps that were handed over, as device processes that outlive a killed priv do."""
    fds = []
    try:
        while (received := socket.recv_fds(holder, 16, 1))[0]:
            fds += received[1]
        yield
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.deep)])
def test_killed_after_changes(network: Network, step: int) -> None:
    """Interfaces, addresses, routes, rules and settings are as before, after whichever change priv was killed."""
    changes = kill_after_changes(network, make_all_changes, step)

    assert len(changes) > 60
    for words in ("link add br0", "tap ", "addr add", "nft add table", "set ipv4/ip_forward 1", "link del", "unlink"):
        assert any(change.startswith(words) for change in changes), words


@pytest.mark.l1
@pytest.mark.deep
def test_killed_after_changes_in_routing_domains(network: Network) -> None:
    """The next priv also removes VRFs, and the last routes of their tables."""
    changes = kill_after_changes(network, make_changes_in_routing_domains, 1)

    for words in ("link add vrf3", "link add vrf9", "route add", "link del"):
        assert any(change.startswith(words) for change in changes), words
