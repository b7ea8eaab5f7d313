"""The rules, forwards and forwarding that priv makes, and the packets that others drop, on a model of a kernel."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.priv.hostmodel import (
    HOST4,
    LAN,
    LOCAL,
    LOCAL6,
    PREFIX6,
    Host,
    configure,
    refused,
    start,
    wanted,
)
from vmd.config.model import Forward
from vmd.errors import OperatorError
from vmd.ipc.messages.priv import (
    NicWanted,
    SetForwards,
)
from vmd.priv.damage import Damage
from vmd.priv.drops import HOST, Loss
from vmd.priv.firewalls import Chain
from vmd.priv.host import Wrong

WEB = Forward(port=8080, to=80)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """A host with the loopback interface."""
    made = Host(monkeypatch, str(tmp_path / "network"))
    yield made
    made.network.kept.close()


# --- filters -------------------------------------------------------------------------------------------------


def test_filters_of_taps(host: Host) -> None:
    """They are there while the kernel may move the frames."""
    start(host, wanted(vhost=True, locked=True), wanted(index=1, vhost=True), wanted(index=2, locked=True))
    assert [nic.vhost for nic in host.network.all_nics()] == [True, True, False]
    assert list(host.nft.netdev) == ["vmd_tap0"]
    host.network.remove_nics(3)
    assert host.nft.netdev == {}


def test_a_host_without_filters_uses_processes(host: Host) -> None:
    """Why is kept for status."""
    host.nft.refused.add("egress")
    start(host, wanted(vhost=True, locked=True))
    (nic,) = host.network.all_nics()
    assert (nic.vhost, nic.without) == (False, "there can be no filters on tap0: nftables cannot be used: refused")


def test_filters_go_with_a_tap_that_cannot_be_made(host: Host) -> None:
    """A tap of others with them would be cut off."""
    host.kernel.add("tap5", "tun")
    host.kernel.refused |= {"up tap0": errno.EPERM, "up tap5": errno.EPERM}
    for request_ in (wanted(vhost=True, locked=True), wanted(name="tap5", existing=True, vhost=True, locked=True)):
        refused(host, request_)
        assert host.nft.netdev == {}
    host.nft.delete_table = fail  # type: ignore[assignment,method-assign]
    refused(host, wanted(vhost=True, locked=True))
    assert host.said == ["the filters of tap0 were not removed: no"]


def fail(*_arguments: object) -> None:
    """Fail."""
    raise OperatorError(errno.EIO, "no")


def test_dropped_frames_are_told_by_interface(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM has several."""
    start(host, wanted(), wanted(index=1))
    start(host, wanted(4), vmid=4)
    dropped = type("", (), {"as_dict": lambda _self: {"spoofed": 2, "unwanted": 1}})()
    monkeypatch.setattr(host.network.filters, "news", lambda: {"tap1": dropped, "tap2": dropped})
    found = [(each.vmid, each.index, each.spoofed, each.unwanted) for each in host.network.frames_dropped()]
    assert found == [(3, 1, 2, 1), (4, 0, 2, 1)]
    for news in (dict, fail):
        monkeypatch.setattr(host.network.filters, "news", news)
        assert host.network.frames_dropped() == []


# --- forwards ------------------------------------------------------------------------------------------------


def test_forwarded_ports_belong_to_one_vm(host: Host) -> None:
    """A VM may take its own again."""
    start(host, LOCAL.replace(forwards=(WEB,)))
    assert "dport 8080 dnat ip to 100.64.3.3:80" in host.nft.text
    other = wanted(4, host4=bytes((100, 64, 4, 2)), guest4=bytes((100, 64, 4, 3)), forwards=(WEB.replace(to=81),))
    error = refused(host, other, vmid=4)
    assert error.number == errno.EADDRINUSE
    assert str(error) == "forward tcp port 8080 to port 81: vm 3 has tcp port 8080 to port 80"
    start(host, other.replace(forwards=()), vmid=4)
    with pytest.raises(OperatorError, match="vm 3 has tcp port 8080"):
        host.network.forward_ports(SetForwards(vmid=4, forwards=((WEB,),)))
    for forwards in ((WEB.replace(to=82),), (), (WEB.replace(udp=True),)):
        host.network.forward_ports(SetForwards(vmid=3, forwards=(forwards,)))
        assert ("100.64.3.3:82" in host.nft.text) is bool(forwards and not forwards[0].udp)
    assert "udp dport 8080" in host.nft.text
    host.network.forward_ports(SetForwards(vmid=4, forwards=((WEB,),)))
    assert "tcp dport 8080 dnat ip to 100.64.4.3:80" in host.nft.text


def test_forwards_that_do_not_fit(host: Host) -> None:
    """Those of a VM without interfaces have no effect."""
    host.network.forward_ports(SetForwards(vmid=3, forwards=((WEB,),)))
    start(host, LOCAL, wanted(index=1))
    for forwards in (((WEB,),), ((), (WEB,)), ((), (), ())):
        with pytest.raises(OperatorError, match="refused: to forward ports to "):
            host.network.forward_ports(SetForwards(vmid=3, forwards=forwards))
        assert "dnat" not in host.nft.text.replace("ct status dnat", "")


# --- rules ---------------------------------------------------------------------------------------------------


def test_nat_may_be_off(host: Host) -> None:
    """Then neither networks nor forwards are in the table, and the host forwards nothing."""
    configure(host, LAN, nat=False)
    start(host, LOCAL.replace(forwards=(WEB,)))
    assert host.nft.text == ""
    assert host.kernel.settings["ipv4/ip_forward"] == "0"
    assert configure(host, LAN) == []
    assert "8080" in host.nft.text
    assert host.kernel.settings["ipv4/ip_forward"] == "1"


def test_the_table_is_there_while_it_is_needed(host: Host) -> None:
    """Sets of groups stay, because rules of the administrator may use them."""
    start(host, wanted())
    assert host.nft.writes == 0
    start(host, wanted(4, host4=HOST4), vmid=4)
    host.network.remove_nics(4)
    assert (host.nft.text, host.network.has_table) == ("", False)
    start(host, wanted(5, groups=("web",)), vmid=5)
    assert 'vmd_web { "tap1" }' in host.nft.text
    host.network.remove_nics(5)
    assert "add set inet vmd vmd_web" in host.nft.text
    assert "tap1" not in host.nft.text
    host.network.close()
    assert host.nft.text == ""


def test_a_host_without_nftables_has_groups_of_its_own(host: Host) -> None:
    """That is said once.  Sentences about NAT say so."""
    host.nft.refused.add("inet vmd")
    start(host, wanted(groups=("web",)))
    start(host, wanted(4, groups=("dmz",)), vmid=4)
    assert [line for line in host.said if "nftables:" in line] == [
        "groups have no sets in nftables: nftables cannot be used: refused"
    ]
    assert not host.network.has_table
    error = refused(host, wanted(5, host4=HOST4), vmid=5)
    assert str(error) == "NAT for local interfaces: nftables cannot be used: refused"


def test_a_table_that_another_program_has_changed_is_written(host: Host) -> None:
    """Elements cannot be added to a set that is gone."""
    start(host, LOCAL)
    applied: list[str] = []
    apply = host.nft.apply

    def changed(text: str) -> None:
        applied.append(text)
        if not text.startswith("add table"):
            raise OperatorError(errno.ENOENT, "no set")
        apply(text)

    host.nft.apply = changed  # type: ignore[method-assign]
    start(host, wanted(4, host4=bytes((100, 64, 4, 2))), vmid=4)
    assert [text.startswith("add table inet vmd") for text in applied] == [False, True]
    assert '"tap1" . 100.64.4.2/31' in host.nft.text


def test_what_the_table_lacks(host: Host) -> None:
    """A table without differences lacks nothing.  One that is gone is None."""
    assert host.network.lost_rules() == []
    start(host, LOCAL)
    assert host.network.lost_rules() == []
    host.nft.lost = {"set source4", "chain forward", "chain prerouting"}  # the last one is empty
    assert sorted(host.network.lost_rules() or ()) == ["chain forward", "chain prerouting", "set source4"]
    writes = host.nft.writes
    host.network.take_rules_as_they_are()  # this nft never shows them
    assert host.nft.writes == writes + 1
    assert host.network.lost_rules() == []
    host.network.take_rules_as_they_are()
    assert host.nft.writes == writes + 1
    host.nft.refused.add("shape")
    assert host.network.lost_rules() == []  # the table is there, but nft does not show it
    host.nft.text = ""
    assert host.network.lost_rules() is None


# --- other firewalls -----------------------------------------------------------------------------------------

FORWARD_CHAIN = Chain(table="ip filter", name="FORWARD", hook="forward", kind="filter", policy="drop")


@pytest.mark.parametrize(
    ("tables", "hook", "path", "counts", "judged"),
    [
        ({"iptables": "1"}, "forward", "nft", True, True),
        ({"ip6tables": "1"}, "forward", "nft", True, True),
        ({"iptables": "0", "ip6tables": "0"}, "forward", "nft", True, False),
        ({}, "forward", "nft", True, False),
        ({"iptables": "1"}, "input", "nft", True, False),
        ({"iptables": "1"}, "forward", None, True, False),
        ({"iptables": "1"}, "forward", "nft", False, False),
    ],
)
def test_bridges_whose_frames_pass_a_firewall(
    host: Host, tables: dict[str, str], hook: str, path: str | None, counts: bool, judged: bool
) -> None:
    """Those are counted."""
    configure(host, LAN)
    start(host, wanted(bridge="br0"), wanted(index=1))
    host.kernel.settings |= {f"bridge/bridge-nf-call-{name}": value for name, value in tables.items()}
    host.nft.others = [FORWARD_CHAIN.replace(hook=hook)]
    host.nft.path, host.network.counts = path, counts
    assert host.network.judged_bridges() == ({"br0"} if judged else set())
    host.network.look()
    assert ('"br0" . "br0"' in host.nft.text) is judged
    assert host.network.watched == ({"br0"} if judged else set())
    host.nft.refused.add("chains")
    assert host.network.judged_bridges() == set()
    host.network.remove_nics(3)
    assert host.nft.text == ""


def test_lost_packets(host: Host) -> None:
    """They are logged and shown, with the interface, and whether there is a remedy."""
    start(host, LOCAL, wanted(index=1))
    counts = {"from_first": 9, "from_last": 4, "host_first": 3, "host_last": 1}
    host.nft.counts = {name: {"tap0": packets} for name, packets in counts.items()}
    host.network.look()
    words = "another firewall of this host has dropped 5 of 9 packets from the guest to others (tap0)"
    assert host.said[-1] == f"{words}. `nft list ruleset` shows its rules"
    assert [(index, loss.lost) for index, loss in host.network.losses(3)] == [(0, 5), (0, 2)]
    assert host.network.losses(4) == []
    wrong = host.network.wrong()
    assert {key: each.where() for key, each in wrong.items()} == {"from tap0": (3, "interface0")}
    host.nft.others = [FORWARD_CHAIN]
    (found,) = wrong.values()
    assert isinstance(found.thing, Loss)
    assert host.network.sentence(found.thing).startswith(f"{words}. nftables chain ip filter FORWARD can let them")
    host.nft.others = [FORWARD_CHAIN.replace(table="ip6 filter")]
    assert host.network.sentence(found.thing) == f"{words}. `nft list ruleset` shows its rules"
    bridge = host.network.sentence(found.thing.replace(place="switch", name="br0"))
    assert bridge.endswith("sysctl net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0")
    assert found.thing.place != HOST


def test_counters_that_are_gone(host: Host) -> None:
    """Nothing is read if nothing is counted."""
    host.nft.refused.add("counters")
    assert host.network.count()
    start(host, LOCAL)
    assert not host.network.count()
    host.network.counts = False
    assert host.network.count()


def test_a_trouble_belongs_to_a_vm_or_to_several(host: Host) -> None:
    """Damage is a trouble, too."""
    damage = Damage(text="x", since_s=0, names=frozenset({"br0"}), lasting=True)
    configure(host, LAN)
    start(host, wanted(), wanted(index=1, bridge="br0"), wanted(index=2, bridge="br0"))
    assert host.network.wrong() == {}
    host.network.damage.found = [damage]
    assert {key: (each.where(), each.whose) for key, each in host.network.wrong().items()} == {
        "x": ((3, "interface1"), [(3, 1), (3, 2)])
    }
    start(host, wanted(4, bridge="br0"), vmid=4)
    assert host.network.wrong()["x"].where() == (0, "")
    alone = Wrong(damage)
    alone.whose.append((5, 0))
    assert alone.where() == (5, "interface0")


def test_a_look_repairs_damage(host: Host) -> None:
    """The kernel does not report each change of a setting."""
    host.network.look()
    start(host, LOCAL)
    host.kernel.settings |= {"ipv4/conf/tap0/rp_filter": "2", "ipv4/ip_forward": "0"}
    assert host.network.lacks_forwarding() == ["IPv4"]
    host.network.look()
    assert host.kernel.settings["ipv4/conf/tap0/rp_filter"] == "1"
    assert host.kernel.settings["ipv4/ip_forward"] == "1"
    assert host.network.lacks_forwarding() == []


# --- forwarding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "on"), [(wanted(), set()), (LOCAL, {4}), (LOCAL6, {6}), (LOCAL.replace(prefix6=PREFIX6), {4, 6})]
)
def test_forwarding_is_switched_on_for_the_families_that_need_it(
    host: Host, request_: NicWanted, on: set[int]
) -> None:
    """With IPv6 forwarding, interfaces that learn routes go on doing so.  Afterwards all is as before."""
    host.kernel.add("eth0", "", up=True)
    host.kernel.add("eth1", "", up=True)
    host.kernel.settings |= {
        "ipv6/conf/eth1/accept_ra": "0", "ipv4/conf/eth1/forwarding": "1", "ipv6/conf/eth1/forwarding": "1",
        "ipv4/conf/all/accept_redirects": "1", "ipv6/conf/default/accept_ra": "1",
    }  # fmt: skip
    before = dict(host.kernel.settings)
    start(host, request_)
    settings = host.kernel.settings
    assert settings["ipv4/ip_forward"] == ("1" if 4 in on else "0")
    assert settings["ipv6/conf/all/forwarding"] == ("1" if 6 in on else "0")
    assert settings["ipv6/conf/eth0/accept_ra"] == settings["ipv6/conf/default/accept_ra"] == ("2" if 6 in on else "1")
    assert settings["ipv6/conf/eth1/accept_ra"] == "0"
    assert settings["ipv6/conf/all/accept_ra"] == "1"
    said = [f"switched IPv{version} forwarding on, for local interfaces with NAT" for version in sorted(on)]
    assert [line for line in host.said if line.startswith("switched")] == said
    # What the kernel does when forwarding is switched for all.
    settings |= {f"ipv4/conf/{name}/forwarding": "1" for name in ("eth0", "eth1") if 4 in on}
    settings |= {"ipv4/conf/all/accept_redirects": "0"} if 4 in on else {}
    settings |= {f"ipv6/conf/{name}/forwarding": "1" for name in ("eth0", "eth1") if 6 in on}
    write = host.kernel.write

    def switch(name: str, value: str) -> None:
        write(name, value)
        for family in {"ipv4/ip_forward": "ipv4", "ipv6/conf/all/forwarding": "ipv6"}.get(name, "").split():
            settings.update({f"{family}/conf/{each}/forwarding": value for each in ("eth0", "eth1")})

    host.kernel.write = switch  # type: ignore[method-assign]
    host.network.close()
    assert {name: value for name, value in settings.items() if "tap0" not in name} == before


@pytest.mark.parametrize(
    ("links", "tables", "users"),
    [
        ({"eth0": 4}, (), None),
        ({"eth0": 4, "eth1": 4}, (), "eth0, eth1"),
        ({"eth0": 4, "eth1": 6}, (), None),
        ({"eth0": 4, "down": 4}, (), None),
        ({"eth0": 4, "lo": 4}, (), None),
        ({"eth0": 4, "br7": 4, "vrf8": 4, "tap9": 4}, (), None),
        ({"eth0": 4, "local": 4}, (), None),
        ({}, ("ip nat",), "nftables table ip nat"),
        ({"eth0": 4}, ("ip nat", "inet fw"), "eth0, nftables table inet fw, nftables table ip nat"),
        ({}, ("ip6 nat",), None),
        ({}, ("ip filter",), None),
        ({}, ("ip idle",), None),
    ],
)
def test_forwarding_that_others_may_rely_on_stays(
    host: Host, links: dict[str, int], tables: tuple[str, ...], users: str | None
) -> None:
    """Two interfaces with addresses, or NAT of others."""
    kinds = {"br7": ("bridge", "switch7-x"), "vrf8": ("vrf", "rdomain8"), "tap9": ("tun", "vm9-if0-x"), "lo": ("", "")}
    start(host, LOCAL)
    for number, (name, version) in enumerate(links.items(), 1):
        kind, alias = kinds.get(name, ("", ""))
        link = host.kernel.add(name, kind, alias=alias, up=name != "down")
        address = bytes((10, number, 0, 1)) if version == 4 else bytes((0x20, 1, *bytes(13), number))
        host.kernel.add_address(link, bytes((169, 254, 1, 1)) if name == "local" else address, 24)
    kinds_of = {"ip filter": "filter"}
    host.nft.others = [
        Chain(table=name, name="x", hook="postrouting", kind=kinds_of.get(name, "nat")) for name in tables
    ]
    host.nft.translating = set(tables) - {"ip idle"}
    host.network.drop(host.network.nics.pop(3))
    host.said.clear()
    host.network.put_back()
    stays = users is not None
    assert host.kernel.settings["ipv4/ip_forward"] == ("1" if stays else "0")
    words = "IPv4 forwarding stays on, since others may rely on it: "
    said = [line for line in host.said if line.startswith("IPv4")]
    assert said == ([f"{words}{users}; to switch it off: sysctl net.ipv4.ip_forward=0"] if stays else [])


@pytest.mark.parametrize("failing", [lambda host: host.nft.refused.add("chains"), lambda host: refuse_lists(host)])
def test_forwarding_stays_if_its_users_are_not_known(host: Host, failing: Callable[[Host], None]) -> None:
    """It may be needed."""
    start(host, LOCAL6)
    host.network.remove_nics(3)
    host.said.clear()
    failing(host)
    host.network.put_back()
    assert host.kernel.settings["ipv6/conf/all/forwarding"] == "1"
    assert host.said[0].startswith("IPv6 forwarding stays on, since others may rely on it: its users are not known (")


def refuse_lists(host: Host) -> None:
    """Let the kernel list nothing."""
    host.kernel.refused["list all"] = errno.ENOBUFS


def test_forwarding_of_a_host_without_nftables(host: Host) -> None:
    """Then there is no NAT of others."""
    start(host, LOCAL)
    host.network.remove_nics(3)
    host.nft.path = None
    host.nft.refused.add("chains")
    host.network.put_back()
    assert host.kernel.settings["ipv4/ip_forward"] == "0"


def test_two_ipv6_interfaces_rely_on_forwarding(host: Host) -> None:
    """Link-local addresses do not count."""
    for number in (1, 2):
        link = host.kernel.add(f"eth{number}", "", up=True)
        host.kernel.add_address(link, bytes((0xFE, 0x80, *bytes(13), number)), 64)
    assert host.network.users_of_forwarding("ipv6") == []
    for number in (1, 2):
        link = host.kernel.get(f"eth{number}")
        host.kernel.add_address(link, bytes((0x20, 1, *bytes(13), number)), 64)
    assert host.network.users_of_forwarding("ipv6") == ["eth1", "eth2"]
    assert host.network.users_of_forwarding("ipv4") == []
