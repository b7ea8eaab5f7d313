"""Routing domains on a kernel with VRFs: priv alone, and the whole daemon, each in its own network."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hostnet import NetDaemon, addresses, links, load_modules, ours, setting
from tests.support.linux import LinuxGuest
from tests.support.network import Network
from tests.support.privdriver import Priv, nic, switch

pytestmark = [pytest.mark.l1, pytest.mark.root, pytest.mark.timeout(400)]

HOST4 = bytes((100, 64, 1, 2))


@pytest.fixture
def network() -> Iterator[Network]:
    """Yield an empty network.  Check at the end that vmd has left nothing in it."""
    load_modules()
    with Network() as made:
        made.run("ip", "link", "add", "probe", "type", "vrf", "table", "99")
        made.run("ip", "link", "delete", "probe")
        yield made
        assert ours(made) == []


def routes(network: Network, table: int) -> str:
    """Return the IPv4 and IPv6 routes of a table."""
    return network.run("ip", "route", "show", "table", str(table)) + network.run(
        "ip", "-6", "route", "show", "table", str(table)
    )


@pytest.mark.deep
def test_a_vrf_is_made_and_removed(network: Network) -> None:
    """A VRF is shared, ends in "unreachable", has the interface's routes, and is removed with its last user."""
    with Priv(network) as priv:
        priv.configure()
        with (
            priv.make(nic(rdomain=3, host4=HOST4)),
            priv.make(nic(rdomain=3, alias="vm2-if0-b"), vmid=2),
        ):
            there = links(network)
            assert there["vrf3"]["linkinfo"]["info_data"]["table"] == 3
            assert there["vrf3"]["ifalias"] == "rdomain3"
            assert "UP" in there["vrf3"]["flags"]
            assert [there[name]["master"] for name in ("tap0", "tap1")] == ["vrf3", "vrf3"]
            assert addresses(there["tap0"]) == ["100.64.1.2/31"]
            assert "100.64.1.2/31" in routes(network, 3)
            assert routes(network, 3).count("unreachable default") == 2
            assert "100.64.1.2" not in network.run("ip", "route")
            priv.remove(2)
            assert "vrf3" in links(network)
            priv.remove(1)
            assert set(links(network)) == {"lo"}
            assert "unreachable" not in routes(network, 3)


@pytest.mark.deep
def test_an_existing_vrf_is_not_removed(network: Network) -> None:
    """An existing VRF of the administrator is used, and is not removed."""
    network.run("ip", "link", "add", "vrf4", "type", "vrf", "table", "4")
    network.run("ip", "link", "set", "vrf4", "up")
    before = links(network)["vrf4"]
    with Priv(network) as priv, priv.make(nic(rdomain=4)):
        assert links(network)["tap0"]["master"] == "vrf4"
    assert links(network)["vrf4"] == before


@pytest.mark.deep
@pytest.mark.parametrize("kind", [("vrf", "table", "6"), ("bridge",)])
def test_another_interface_of_that_name(network: Network, kind: tuple[str, ...]) -> None:
    """An interface of another kind is not mistaken for the VRF."""
    network.run("ip", "link", "add", "vrf5", "type", *kind)
    with Priv(network) as priv:
        assert priv.refuse(nic(rdomain=5)).text == "interface vrf5 is not the VRF of routing table 5"


@pytest.mark.deep
def test_switches_in_routing_domains(network: Network) -> None:
    """Our switches are put into their domains.  An existing bridge is only checked."""
    network.run("ip", "link", "add", "theirs", "type", "bridge")
    with Priv(network) as priv:
        problems = priv.configure(switch("br0", rdomain=7), switch("theirs", alias="switch2-theirs", rdomain=7))
        assert problems == ("bridge theirs was there before vmd and is not in rdomain 7: it is left alone",)
        assert links(network)["br0"]["master"] == "vrf7"
        assert "master" not in links(network)["theirs"]
        network.run("ip", "link", "set", "theirs", "master", "vrf7")
        assert priv.configure(switch("theirs", rdomain=7)) == ()
        with priv.make(nic(bridge="theirs", rdomain=7)):
            assert links(network)["tap0"]["master"] == "theirs"
    assert links(network)["theirs"].get("master") == "vrf7"  # it is not ours, so its ports stay
    network.run("ip", "link", "delete", "vrf7")


@pytest.mark.deep
def test_a_switch_leaves_its_routing_domain(network: Network) -> None:
    """A reloaded configuration gives the switch no routing domain, or another one."""
    with Priv(network) as priv:
        priv.configure(switch("br0", rdomain=7))
        assert priv.configure(switch("br0", rdomain=8)) == ()
        assert links(network)["br0"]["master"] == "vrf8"
        assert priv.configure(switch("br0")) == ()
        assert "master" not in links(network)["br0"]
        assert set(links(network)) == {"lo", "br0"}


@pytest.mark.deep
def test_vrfs_of_a_killed_priv_are_removed(network: Network) -> None:
    """The next priv also removes VRFs and the last routes of their tables."""
    with Priv(network) as first:
        first.configure(switch("br0", rdomain=7))
        with first.make(nic(rdomain=3, host4=HOST4)):
            first.child.kill()
            first.wait()
            assert "unreachable" in routes(network, 3)
            with Priv(network):
                assert set(links(network)) == {"lo"}
                assert "unreachable" not in routes(network, 3) + routes(network, 7)


@pytest.mark.deep
def test_the_whole_way_from_vm_conf(network: Network, linux: LinuxGuest, tmp_path: Path) -> None:
    """`rdomain` of an interface and of a switch works, NAT is enabled, and nothing is left at the end."""
    conf = f"""
switch "lan" {{
    interface br0
    rdomain 7
}}
vm "db1" {{
    disable
    memory 128M
    boot "{linux.kernel}" initrd "{linux.initrd}" cmdline "console=ttyS0 quiet panic=-1 vmdtest=wait"
    interface switch "lan"
    local interface rdomain 3
    local interface
}}
"""
    with NetDaemon(tmp_path, network, conf) as vmd:
        vmd.must("start", "db1")
        there = links(network)
        assert [there["br0"]["master"], there["tap0"]["master"], there["tap1"]["master"]] == ["vrf7", "br0", "vrf3"]
        assert "master" not in there["tap2"]
        assert setting(network, "ipv4/ip_forward") == "1"
        print(vmd.must("status", "-v").strip())
        vmd.must("stop", "-fw", "db1")
    assert set(links(network)) == {"lo"}
    assert setting(network, "ipv4/ip_forward") == "0"
