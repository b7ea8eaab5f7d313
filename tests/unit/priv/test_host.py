"""What priv makes of a host's network, what it leaves alone, and what it removes, on a model of a kernel."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.priv.hostmodel import (
    HOST4,
    LAN,
    LLADDR,
    LOCAL,
    LOCAL6,
    PREFIX6,
    Host,
    configure,
    refused,
    start,
    wanted,
)
from vmd.errors import OperatorError
from vmd.ipc.messages.priv import (
    AddressGiven,
    AdoptNics,
    MakeNics,
    NicMade,
    NicWanted,
    SwitchRequest,
    TapBefore,
)
from vmd.priv import sysctl
from vmd.priv.damage import Damage
from vmd.priv.host import MTU_MAX, PREDECESSOR_PATIENCE_S
from vmd.priv.ifconfig import UNFINISHED, Route
from vmd.priv.nics import opposite

IN7 = LAN.replace(rdomain=7)
LINE = "br0 switch1-lan - up"
REMOVED = "removed what an earlier vmd has left"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """A host with the loopback interface."""
    made = Host(monkeypatch, str(tmp_path / "network"))
    yield made
    made.network.kept.close()


# --- switches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switch", "lines"),
    [
        (LAN, {LINE}),
        (LAN.replace(up=False), {"br0 switch1-lan - down"}),
        (LAN.replace(rdomain=0), {LINE}),
        (IN7, {"br0 switch1-lan vrf7 up", "vrf7 rdomain7 - up"}),
    ],
)
def test_a_bridge_is_made(host: Host, switch: SwitchRequest, lines: set[str]) -> None:
    """It ignores router advertisements of guests.  The routing table of a VRF ends."""
    assert configure(host, switch) == []
    assert host.kernel.show() == lines
    assert host.kernel.settings["ipv6/conf/br0/accept_ra"] == "0"
    assert host.kernel.ended == ({7} if switch.rdomain else set())


def test_a_kernel_without_ipv6_has_bridges(host: Host) -> None:
    """There is no setting then."""
    host.kernel.settings = {name: value for name, value in host.kernel.settings.items() if "ipv6" not in name}

    assert configure(host, LAN) == []


@pytest.mark.parametrize(
    ("before", "switch", "problem"),
    [
        ({"kind": "bridge"}, LAN, None),
        ({"kind": "bridge", "up": True, "alias": "mine"}, LAN.replace(up=False), None),
        ({"kind": "bridge", "master": 2}, IN7, None),
        ({"kind": "bridge", "master": 3}, IN7, "bridge br0 was there before vmd and is not in rdomain 7"),
        ({"kind": "bridge"}, IN7, "bridge br0 was there before vmd and is not in rdomain 7: it is left alone"),
        ({"kind": "bridge", "master": 4}, IN7, "bridge br0 was there before vmd and is not in rdomain 7"),
        ({"kind": "veth"}, LAN, "interface br0 is not a bridge but veth: switches need one"),
        ({"kind": ""}, LAN, "interface br0 is not a bridge but another kind of interface: switches need one"),
    ],
)
def test_a_bridge_of_others_is_not_changed(
    host: Host, before: dict[str, Any], switch: SwitchRequest, problem: str | None
) -> None:
    """It is used if it is in the right routing domain."""
    host.kernel.add("red", "vrf", table=7)
    host.kernel.add("blue", "vrf", table=8)
    host.kernel.add("seven", "bridge", table=7)
    host.kernel.add("br0", **before)
    lines = host.kernel.show()

    problems = configure(host, switch)
    assert host.kernel.show() == lines
    assert host.kernel.settings["ipv6/conf/br0/accept_ra"] == "1"
    assert problems == [] if problem is None else problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("before", "switch", "line"),
    [
        ({"alias": "switch4-old"}, LAN, LINE),
        ({"alias": "switch1-lan", "up": True}, LAN.replace(up=False), "br0 switch1-lan - down"),
        ({"alias": "switch1-lan", "master": 2}, LAN, LINE),
        ({"alias": "switch1-lan", "master": 2}, LAN.replace(rdomain=0), LINE),
        ({"alias": "switch1-lan"}, IN7, "br0 switch1-lan vrf7 up"),
    ],
)
def test_our_bridge_follows_the_configuration(
    host: Host, before: dict[str, Any], switch: SwitchRequest, line: str
) -> None:
    """An administrator may have put it elsewhere."""
    host.network.own()
    host.kernel.add("vrf7", "vrf", table=7, alias="rdomain7", up=True)
    host.kernel.add("br0", "bridge", **before)

    assert configure(host, switch) == []
    assert line in host.kernel.show()


NO_BRIDGE = "make bridge br0: this kernel has no such interfaces: load the module bridge"
NO_VRF = "rdomain 7: make VRF vrf7: this kernel has no such interfaces: load the module vrf"


@pytest.mark.parametrize(
    ("failing", "number", "switch", "problem"),
    [
        ("add br0", errno.EOPNOTSUPP, LAN, NO_BRIDGE),
        ("add br0", errno.EPERM, LAN, f"make bridge br0: {os.strerror(errno.EPERM)}"),
        ("add vrf7", errno.EOPNOTSUPP, IN7, NO_VRF),
        ("add vrf7", errno.EPERM, IN7, f"rdomain 7: make VRF vrf7: {os.strerror(errno.EPERM)}"),
        ("write ipv6/conf/br0/accept_ra", errno.EPERM, LAN, "write ipv6/conf/br0/accept_ra"),
        ("up br0", errno.EPERM, LAN, "up br0"),
        ("master br0", errno.EPERM, IN7, "master br0"),
        ("end 7", errno.EPERM, IN7, "end 7"),
        ("up vrf7", errno.EPERM, IN7, "up vrf7"),
    ],
)
def test_a_bridge_that_cannot_be_made_leaves_nothing(
    host: Host, failing: str, number: int, switch: SwitchRequest, problem: str
) -> None:
    """The next switch is made."""
    host.kernel.refused[failing] = number
    dmz = SwitchRequest(interface="br1", alias="switch2-dmz")

    problems = configure(host, switch, dmz)
    assert [each.partition(f": {os.strerror(number)}")[0] for each in problems] == [
        problem.partition(f": {os.strerror(number)}")[0]
    ]
    assert host.kernel.show() == {"br1 switch2-dmz - up"}


def test_a_bridge_that_exists_is_not_deleted_if_it_cannot_be_changed(host: Host) -> None:
    """Its ports would lose their network."""
    configure(host, LAN)
    host.kernel.refused["up br0"] = errno.EPERM

    assert len(configure(host, LAN)) == 1
    assert host.kernel.show() == {LINE}


@pytest.mark.parametrize(
    ("before", "rdomain", "problem"),
    [
        ({"kind": "bridge"}, 7, "interface vrf7 is not the VRF of routing table 7"),
        ({"kind": "bridge", "table": 7}, 7, "interface vrf7 is not the VRF of routing table 7"),
        ({"kind": "vrf", "table": 8}, 7, "interface vrf7 is not the VRF of routing table 7"),
        ({"kind": "vrf", "table": 7}, 7, None),
        (None, 253, "rdomain 253: the host's own routing table has that number"),
        (None, 255, "rdomain 255: the host's own routing table has that number"),
        (None, 9, "rdomain 9: packets of this host go to routing table 9, too, as `ip rule` shows; choose another"),
        (None, 252, None),
    ],
)
def test_routing_domains(host: Host, before: dict[str, Any] | None, rdomain: int, problem: str | None) -> None:
    """A VRF must not take a routing table that the host uses."""
    host.kernel.shared.add(9)
    if before is not None:
        host.kernel.add("vrf7", **before)

    problems = configure(host, LAN.replace(rdomain=rdomain))
    assert [each.startswith(str(problem)) for each in problems] == ([] if problem is None else [True])
    assert ("br0" in host.kernel.named()) is (problem is None)
    assert host.kernel.ended == ({252} if rdomain == 252 else set())  # a VRF of others is not changed


def test_ports_of_a_bridge_that_was_deleted(host: Host) -> None:
    """It is made again with its own ports, except those that another program has put elsewhere."""
    dmz = SwitchRequest(interface="br1", alias="switch2-dmz")
    configure(host, LAN, dmz)
    start(host, wanted(bridge="br0"), wanted(bridge="br1", index=1), wanted(bridge="br0", index=2))
    mine = host.kernel.add("mine", "bridge")
    for name in ("br0", "br1"):
        host.kernel.remove(host.kernel.named()[name].index)
    host.kernel.set_master(host.kernel.get("tap2"), mine)

    host.network.ensure_bridge(LAN)
    assert {line for line in host.kernel.show() if line.startswith("tap")} == {
        "tap0 vm3-if0-web br0 up", "tap1 vm3-if1-web - up", "tap2 vm3-if2-web mine up"
    }  # fmt: skip


def test_bridges_that_are_not_needed_any_more(host: Host) -> None:
    """They are removed with their VRF.  Those with interfaces of others stay, which is said once."""
    configure(host, IN7, SwitchRequest(interface="br1", alias="switch2-dmz", rdomain=8))
    host.kernel.add("eth0", "", master=host.kernel.named()["br1"].index)
    for _ in range(2):
        assert configure(host) == []
    assert host.kernel.show() == {"br1 switch2-dmz vrf8 up", "vrf8 rdomain8 - up", "eth0 - br1 down"}
    assert host.kernel.ended == {8}
    assert host.said == ["bridge br1 has interfaces in it that are not vmd's: it stays"]

    start(host, wanted(rdomain=9))
    host.kernel.add("eth1", "", master=host.kernel.named()["vrf9"].index)
    host.network.remove_nics(3)
    assert {"vrf9 rdomain9 - up", "eth1 - vrf9 down"} < host.kernel.show()
    assert host.said[1:] == ["vrf vrf9 has interfaces in it that are not vmd's: it stays"]


def test_a_bridge_stays_while_a_vm_uses_it(host: Host) -> None:
    """It goes with the last interface."""
    configure(host, LAN)
    start(host, wanted(bridge="br0"))
    start(host, wanted(4, bridge="br0"), vmid=4)
    configure(host)
    assert "br0" in host.kernel.named()
    host.network.remove_nics(3)
    assert host.kernel.show() == {LINE, "tap1 vm4-if0-web br0 up"}
    host.network.remove_nics(4)
    assert host.kernel.show() == set()
    assert host.said == []


def test_a_daemon_without_networks_is_not_the_owner(host: Host) -> None:
    """Another daemon may be."""
    assert configure(host) == []
    assert not os.path.exists(host.network.kept.path)
    configure(host, LAN)
    assert os.path.exists(host.network.kept.path)
    configure(host)
    assert host.kernel.show() == set()
    host.network.close()
    assert not os.path.exists(host.network.kept.path)


# --- ownership -----------------------------------------------------------------------------------------------


def leave(host: Host) -> None:
    """Leave interfaces and tables of a killed daemon and of others."""
    add = host.kernel.add
    add("br0", "bridge", alias="switch1-lan")
    add("br1", "bridge", alias="switch2-dmz")
    add("vrf7", "vrf", alias="rdomain7")
    add("vrf8", "vrf", alias="rdomain8")
    add("br9", "bridge", group=UNFINISHED)
    add("mine", "bridge")
    add("tap0", "tun", alias="vm1-if0-a", master=host.kernel.named()["br0"].index)
    add("tap1", "tun", alias="vm2-if0-b", master=host.kernel.named()["vrf7"].index)
    add("tap2", "tun")
    add("eth0", "", master=host.kernel.named()["br1"].index)
    add("eth1", "", master=host.kernel.named()["vrf8"].index)
    host.kernel.ended = {7, 8}
    host.nft.text = "add table inet vmd\n"
    host.nft.netdev = {"vmd_tap0": "", "other": ""}


def test_what_a_killed_daemon_has_left_is_removed(host: Host) -> None:
    """Interfaces of others stay, and bridges and VRFs with such interfaces."""
    leave(host)
    host.kernel.settings["ipv4/ip_forward"] = "1"
    Path(host.network.kept.path).write_text('["ipv4/ip_forward", "0", "1"]\n')
    assert host.network.own()
    assert host.kernel.show() == {
        "br1 switch2-dmz - down", "vrf8 rdomain8 - down", "mine - - down", "tap2 - - down", "eth0 - br1 down",
        "eth1 - vrf8 down",
    }  # fmt: skip
    assert (host.kernel.ended, host.nft.text, host.nft.netdev) == (set(), "", {"other": ""})
    gone = "vrf7, br9, tap0, tap1, br0, table inet vmd, table netdev vmd_tap0"
    assert host.said == [f"{REMOVED}: {gone}", "net/ipv4/ip_forward is 0 again"]
    assert host.network.own()
    assert len(host.said) == 2


def test_interfaces_of_running_vms_are_adopted(host: Host) -> None:
    """Bridges, rules and settings stay.  Taps of VMs that have ended go."""
    leave(host)
    host.kernel.settings["ipv4/ip_forward"] = "1"
    Path(host.network.kept.path).write_text('["ipv4/ip_forward", "0", "1"]\n')
    index = host.kernel.named()["tap0"].index
    made = NicMade(name="tap0", lladdr=LLADDR, link_local=b"", mtu=1500, index=index, vhost=True)
    host.network.adopting = True
    host.network.adopt(AdoptNics(vmid=1, nics=(wanted(1, locked=True, vhost=True),), made=(made,)))
    host.network.own()
    assert {line.split()[0] for line in host.kernel.show()} == {
        "br0", "br1", "vrf7", "vrf8", "mine", "tap0", "tap2", "eth0", "eth1"
    }  # fmt: skip
    assert (host.kernel.ended, bool(host.nft.text)) == ({7, 8}, True)
    assert set(host.nft.netdev) == {"vmd_tap0", "other"}
    assert host.said == [f"{REMOVED}: br9, tap1"]
    assert host.network.has_table
    assert host.kernel.settings["ipv4/ip_forward"] == "1"
    assert list(host.network.filters.laid) == ["tap0"]


def test_a_tap_without_vhost_has_no_filters_to_adopt(host: Host) -> None:
    """Its process does the checks."""
    made = NicMade(name="tap0", lladdr=LLADDR, link_local=b"", mtu=1500, index=9)
    host.network.adopt(AdoptNics(vmid=1, nics=(wanted(1, locked=True, vhost=True),), made=(made,)))
    assert host.network.filters.laid == {}


@pytest.mark.parametrize(
    ("vmid", "nics", "made"),
    [(1, 1, ()), (1, 1, ("tap0", "tap1")), (1, 2, ("tap0", "eth0")), (1, 2, ("eth0", "tap0")), (3, 1, ("tap0",))],
)
def test_interfaces_that_a_parent_may_not_adopt(host: Host, vmid: int, nics: int, made: tuple[str, ...]) -> None:
    """A parent that was taken over could name those of others."""
    start(host, wanted())
    requests = tuple(wanted(vmid, index) for index in range(nics))
    found = tuple(NicMade(name=name, lladdr=LLADDR, link_local=b"", mtu=1500, index=9) for name in made)
    with pytest.raises(OperatorError, match=f"refused: to adopt {len(made)} interfaces of vm {vmid}"):
        host.network.adopt(AdoptNics(vmid=vmid, nics=requests, made=found))
    assert [nic.link.name for nic in host.network.all_nics()] == ["tap0"]


def test_leftovers_that_cannot_be_removed(host: Host) -> None:
    """The daemon starts all the same.  What was removed is said, too."""
    host.kernel.add("tap0", "tun", alias="vm1-if0-a")
    host.kernel.add("tap1", "tun", alias="vm2-if0-b")
    host.kernel.refused["delete tap1"] = errno.EPERM
    assert host.network.own()
    assert host.said[0].startswith("what an earlier vmd has left could not be removed: delete tap1")
    assert host.said[1:] == [f"{REMOVED}: tap0"]


def test_a_network_that_belongs_to_another_daemon(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be ending, so priv waits a little."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    other = sysctl.ChangedSettings()
    assert other.lock()
    assert not host.network.own()
    with pytest.raises(OperatorError, match="belongs to another vmd, which is running") as error:
        start(host, wanted())
    assert error.value.number == errno.EBUSY
    assert PREDECESSOR_PATIENCE_S < now[0] - 100 < PREDECESSOR_PATIENCE_S + 1
    assert (host.kernel.show(), host.said) == (set(), [])
    monkeypatch.setattr(time, "sleep", lambda _seconds: other.close())
    start(host, wanted())


def test_ending_removes_everything(host: Host) -> None:
    """Settings have their old values again, and the next daemon may be the owner."""
    configure(host, IN7)
    start(host, wanted(bridge="br0"), wanted(index=1, host4=HOST4, prefix6=PREFIX6, groups=("web",)))
    start(host, wanted(4), vmid=4)
    assert host.kernel.settings["ipv4/ip_forward"] == "1"
    host.network.close()
    assert (host.kernel.show(), host.nft.text, host.kernel.ended) == (set(), "", set())
    assert host.kernel.settings["ipv4/ip_forward"] == host.kernel.settings["ipv6/conf/all/forwarding"] == "0"
    assert not os.path.exists(host.network.kept.path)
    host.network.close()


# --- interfaces ----------------------------------------------------------------------------------------------


def test_taps(host: Host) -> None:
    """The next free name is taken.  The address follows from the guest's."""
    host.kernel.add("tap1", "tun")
    configure(host, LAN)
    host.kernel.set_mtu(host.kernel.get("br0"), 9000)
    host.groups["dmz"] = 44
    fds = start(
        host, wanted(bridge="br0", rdomain=0), wanted(index=1, up=False, groups=("web", "dmz")),
        wanted(index=2, rdomain=7), wanted(index=3, name="tap7", existing=True), reserved=("tap2",),
    )  # fmt: skip
    assert host.kernel.show() - {"tap1 - - down"} == {
        LINE, "tap0 vm3-if0-web br0 up", "tap3 vm3-if1-web - down", "vrf7 rdomain7 - up", "tap4 vm3-if2-web vrf7 up",
        "tap7 vm3-if3-web - up",
    }  # fmt: skip
    named = host.kernel.named()
    assert named["tap0"].lladdr == opposite(wanted().lladdr)
    assert [named[name].mtu for name in ("tap0", "tap3")] == [9000, 1500]
    assert [named[name].group for name in ("tap0", "tap3")] == [0, 44]
    assert [host.kernel.taps[fd] for fd in fds] == [named[name].index for name in ("tap0", "tap3", "tap4", "tap7")]
    assert [nic.link for nic in host.network.all_nics()] == [named[name] for name in ("tap0", "tap3", "tap4", "tap7")]
    assert host.said == ["group web is not in /etc/iproute2/group: only nftables will know it, as set vmd_web"]
    assert host.kernel.settings["ipv6/conf/tap0/disable_ipv6"] == "1"


def test_the_largest_mtu(host: Host) -> None:
    """A bridge may have a larger one."""
    configure(host, LAN)
    host.kernel.set_mtu(host.kernel.get("br0"), MTU_MAX + 1)
    start(host, wanted(bridge="br0"))
    assert host.kernel.named()["tap0"].mtu == MTU_MAX


def test_local_interfaces(host: Host) -> None:
    """The host has the first address, a link-local address and ::1."""
    start(host, LOCAL.replace(prefix6=PREFIX6, length4=24), wanted(index=1))
    assert host.kernel.addresses_of("tap0") == {"100.64.3.2/24", "fd00:0:0:1::1/64", link_local_of(host, "tap0")}
    assert host.kernel.addresses_of("tap1") == set()
    settings = {name.partition("/tap0/")[2]: value for name, value in host.kernel.settings.items() if "/tap0/" in name}
    assert settings == {
        "accept_ra": "0", "disable_ipv6": "0", "addr_gen_mode": "1", "rp_filter": "1", "forwarding": "0"
    }  # fmt: skip
    assert "masquerade" in host.nft.text
    host.network.remove_nics(3)
    assert (host.kernel.there, host.nft.text) == ([], "")


def link_local_of(host: Host, name: str) -> str:
    """Return the link-local address of an interface."""
    address = host.kernel.named()[name].lladdr
    raw = b"\xfe\x80" + bytes(6) + bytes((address[0] ^ 2,)) + address[1:3] + b"\xff\xfe" + address[3:]
    return f"{socket.inet_ntop(socket.AF_INET6, raw)}/64"


FAILURES = ("alias tap1", "lladdr tap1", "mtu tap1", "master tap1", "up tap1", "write ipv6/conf/tap1/accept_ra")


@pytest.mark.parametrize("failing", FAILURES)
def test_all_interfaces_or_none(host: Host, failing: str) -> None:
    """A failure at the second one removes the first one, too."""
    configure(host, LAN)
    host.kernel.refused[failing] = errno.EPERM
    error = refused(host, wanted(bridge="br0"), wanted(index=1, bridge="br0", host4=HOST4))
    assert error.number == errno.EPERM
    host.kernel.refused.clear()
    start(host, wanted(bridge="br0"))


@pytest.mark.parametrize(
    ("request_", "number", "words"),
    [
        (wanted(bridge="br5"), errno.ENOENT, "bridge br5 belongs to no switch"),
        (wanted(bridge="br0", rdomain=7), errno.EINVAL, "rdomain 7: an interface on a switch is in the rdomain of the"),
        (wanted(bridge="br7", rdomain=0), errno.EINVAL, "in the rdomain of the switch, 7"),
        (wanted(name="tap8", existing=True), errno.EBUSY, "interface tap8 exists already: vm8-if0-x"),
        (wanted(name="tap9", existing=True), errno.EBUSY, "interface tap9 exists already, and is not a tap"),
        (wanted(name="tap7"), errno.EBUSY, "interface tap7 exists already"),
        (LOCAL, errno.EOPNOTSUPP, "NAT for local interfaces: nftables cannot be used: refused"),
    ],
)
def test_interfaces_that_cannot_be_made(host: Host, request_: NicWanted, number: int, words: str) -> None:
    """The error says why."""
    host.kernel.add("veth", "veth")
    configure(host, LAN, SwitchRequest(interface="br7", alias="switch2-x", rdomain=7))
    host.kernel.add("tap7", "tun")
    host.kernel.add("tap8", "tun", alias="vm8-if0-x")
    host.kernel.add("tap9", "veth")
    host.nft.refused.add("masquerade")
    error = refused(host, wanted(index=1, bridge="br0"), request_)
    assert (error.number, words in str(error)) == (number, True), error
    assert start(host, wanted(bridge="br7", rdomain=7), wanted(index=1, bridge="br7"))


def test_descriptors_and_vms_that_do_not_fit(host: Host) -> None:
    """A parent that works never asks for that."""
    for tuns in ([], [1, 2]):
        with pytest.raises(OperatorError, match=f"refused: 1 interfaces out of {len(tuns)} descriptors"):
            host.network.make_nics(MakeNics(vmid=3, ticket=1, nics=(wanted(),)), tuns)
    start(host, wanted())
    with pytest.raises(OperatorError, match="vm 3 has interfaces already") as error:
        start(host, wanted())
    assert error.value.number == errno.EEXIST
    assert host.kernel.show() == {"tap0 vm3-if0-web - up"}


IN_NET6 = "fd00::1:909:909:909:909"
IN_USE = "interface tap0: {} is in use: {}; see `{}`"


@pytest.mark.parametrize(
    ("address", "length", "request_", "why"),
    [
        (bytes((100, 64, 3, 3)), 24, LOCAL, ("100.64.3.2/31", "100.64.3.3", "local prefix")),
        (bytes((100, 64, 3, 2)), 31, LOCAL, ("100.64.3.2/31", "100.64.3.2", "local prefix")),
        (bytes((100, 64, 3, 1)), 24, LOCAL, None),
        (bytes((100, 64, 3, 4)), 24, LOCAL, None),
        (PREFIX6[:8] + bytes((9,) * 8), 64, LOCAL6, ("fd00:0:0:1::/64", IN_NET6, "local inet6 prefix")),
        (PREFIX6[:7] + bytes((2,) * 9), 64, LOCAL6, None),
    ],
)
def test_addresses_that_the_host_has(
    host: Host, address: bytes, length: int, request_: NicWanted, why: tuple[str, str, str] | None
) -> None:
    """Guests would be unreachable, or would take the host's connections."""
    host.kernel.add_address(host.kernel.add("eth0", "", up=True), address, length)
    if why is None:
        start(host, request_)
        return
    network, there, keyword = why
    error = refused(host, request_)
    assert str(error) == IN_USE.format(network, f"the host has {there} on another interface", keyword)
    assert error.number == errno.EADDRINUSE


@pytest.mark.parametrize(
    ("request_", "asked", "length", "inside", "is_refused"),
    [
        (LOCAL, "100.64.3.2", 24, "", True),
        (LOCAL, "100.64.3.3", 2, "", True),
        (LOCAL, "100.64.3.3", 1, "", False),  # half of all addresses: a default route of a VPN
        (LOCAL, "100.64.3.1", 24, "", False),
        (LOCAL.replace(length4=24, guest4=bytes((100, 64, 3, 77))), "100.64.3.77", 24, "", True),
        (LOCAL.replace(length4=24, guest4=bytes((100, 64, 3, 77))), "100.64.3.0", 24, "", True),
        (LOCAL.replace(length4=24, guest4=bytes((100, 64, 3, 77))), "100.64.3.1", 24, "", True),
        (LOCAL.replace(length4=24, guest4=bytes((100, 64, 3, 77))), "100.64.3.2", 24, "", False),
        (LOCAL6, "fd00:0:0:1::", 4, "", True),
        (LOCAL6, "fd00:0:0:1::1", 64, "", True),
        (LOCAL6, "fd00:0:0:1::1", 3, "", False),
        (LOCAL.replace(rdomain=7), "100.64.3.2", 24, "", False),
        (LOCAL.replace(rdomain=7), "100.64.3.2", 24, "vrf7", True),
    ],
)
def test_networks_that_the_host_reaches(
    host: Host, request_: NicWanted, asked: str, length: int, inside: str, is_refused: bool
) -> None:
    """Default routes do not count.  In a routing domain its own routes do."""
    eth0 = host.kernel.add("eth0", "", up=True)
    vrf = host.kernel.add("vrf7", "vrf", alias="mine", table=7)
    raw = socket.inet_pton(socket.AF_INET6 if ":" in asked else socket.AF_INET, asked)
    host.kernel.routes[asked, vrf.index if inside else 0] = Route(network=raw, length=length, index=eth0.index)
    if not is_refused:
        start(host, request_)
        return
    error = refused(host, request_)
    assert error.number == errno.EADDRINUSE
    assert "is in use: the host reaches " in str(error)
    assert f"/{length} by eth0; see `local " in str(error)


def test_a_route_by_the_tap_itself_is_no_obstacle(host: Host) -> None:
    """The kernel adds it with an address."""
    tap = host.kernel.made + 1
    host.kernel.routes["100.64.3.2", 0] = Route(network=HOST4, length=31, index=tap)
    start(host, LOCAL)
    assert host.kernel.named()["tap0"].index == tap


def test_a_kernel_without_ipv6_has_no_local_inet6(host: Host) -> None:
    """Interfaces without it can be made."""
    for name in [name for name in host.kernel.settings if name.startswith("ipv6")]:
        del host.kernel.settings[name]
    host.kernel.add("tap4", "tun")
    for name in [name for name in host.kernel.settings if name.startswith("ipv6")]:
        del host.kernel.settings[name]
    error = refused(host, LOCAL6.replace(name="tap4", existing=True))
    assert str(error) == "interface tap4: local inet6: this kernel has no IPv6"
    assert error.number == errno.EAFNOSUPPORT


# --- taps of others ------------------------------------------------------------------------------------------

THEIRS = {"alias": "mine", "mtu": 1400, "group": 5}


def test_a_tap_of_others_is_used_and_restored(host: Host) -> None:
    """It keeps its alias and addresses."""
    host.groups["web"] = 9
    configure(host, LAN)
    theirs = host.kernel.add("tap5", "tun", **THEIRS)
    host.kernel.add_address(theirs, bytes((10, 0, 0, 1)), 8)
    before = dict(host.kernel.links), list(host.kernel.there)
    lent = wanted(name="tap5", existing=True)
    fds = start(host, lent.replace(bridge="br0", groups=("web",)), LOCAL.replace(prefix6=PREFIX6, alias="vm3-if1-x"))
    assert host.kernel.attached == {fds[0]: "tap5"}
    link = host.kernel.named()["tap5"]
    assert (link.alias, link.mtu, link.group, link.lladdr, link.up) == ("mine", 1500, 9, theirs.lladdr, True)
    assert link.master == host.kernel.named()["br0"].index
    assert host.network.nics[3][0].link == link
    assert host.network.nics[3][0].as_it_was() == TapBefore(master=0, mtu=1400, group=5, up=False)
    host.kernel.close(fds[0])
    host.network.remove_nics(3)
    assert (host.kernel.links, host.kernel.there) == before


def test_a_tap_of_others_as_a_local_interface(host: Host) -> None:
    """It gets only the addresses that it lacks, and loses only those."""
    theirs = host.kernel.add("tap5", "tun", up=True)
    host.kernel.add_address(theirs, HOST4, 24)
    start(host, LOCAL.replace(name="tap5", existing=True, prefix6=PREFIX6))
    assert host.kernel.addresses_of("tap5") == {"100.64.3.2/24", "fd00:0:0:1::1/64", link_local_of(host, "tap5")}
    lent = host.network.nics[3][0].as_it_was()
    assert lent is not None
    assert [given.length for given in lent.added] == [64, 64]
    assert host.kernel.settings["ipv4/conf/tap5/rp_filter"] == "1"
    assert host.kernel.settings["ipv6/conf/tap5/disable_ipv6"] == "0"
    host.network.remove_nics(3)
    assert host.kernel.addresses_of("tap5") == {"100.64.3.2/24"}
    assert host.kernel.named()["tap5"] == theirs
    host.network.close()
    assert host.kernel.settings["ipv4/conf/tap5/rp_filter"] == "0"


@pytest.mark.parametrize("failing", ["group tap5", "mtu tap5", "master tap5", "address tap5", "up tap5"])
def test_a_tap_of_others_is_restored_if_it_cannot_be_used(host: Host, failing: str) -> None:
    """The descriptor is closed."""
    host.groups["web"] = 9
    configure(host, LAN)
    theirs = host.kernel.add("tap5", "tun", **THEIRS)
    host.kernel.refused[failing] = errno.EPERM
    on_switch = wanted(name="tap5", existing=True, bridge="br0", groups=("web",), host4=HOST4)
    assert refused(host, on_switch).number == errno.EPERM
    assert host.kernel.named()["tap5"].replace(mtu=1400) == theirs
    assert host.kernel.attached == {}


@pytest.mark.parametrize(
    ("master", "request_", "becomes"),
    [
        ("br0", wanted(name="tap5", existing=True, bridge="br0"), "br0"),
        ("mine", wanted(name="tap5", existing=True, bridge="br0"), None),
        ("mine", wanted(name="tap5", existing=True, rdomain=7), None),
        ("mine", wanted(name="tap5", existing=True), "mine"),
        ("-", wanted(name="tap5", existing=True, rdomain=7), "vrf7"),
        ("-", wanted(name="tap5", existing=True, rdomain=0), "-"),
    ],
)
def test_the_bridge_of_a_tap_of_others(host: Host, master: str, request_: NicWanted, becomes: str | None) -> None:
    """It is not taken out of another one.  Only a bridge gives it an MTU."""
    configure(host, LAN)
    host.kernel.add("mine", "bridge", alias="x")
    host.kernel.add("tap5", "tun", mtu=1400)
    if master != "-":
        host.kernel.set_master(host.kernel.get("tap5"), host.kernel.get(master))
    if becomes is None:
        error = refused(host, request_)
        assert "interface tap5 exists already, and is in another bridge or VRF than " in str(error)
        assert error.number == errno.EBUSY
        return
    start(host, request_)
    assert f"tap5 - {becomes} up" in host.kernel.show()
    assert host.kernel.named()["tap5"].mtu == 1400
    host.network.remove_nics(3)
    assert f"tap5 - {'-' if master == 'br0' else master} down" in host.kernel.show()  # ours may be of a killed daemon


def test_a_tap_of_others_that_was_replaced_is_left(host: Host) -> None:
    """Another program has deleted it and made another one of this name."""
    theirs = host.kernel.add("tap5", "tun")
    start(host, LOCAL.replace(name="tap5", existing=True))
    host.kernel.remove(theirs.index)
    new = host.kernel.add("tap5", "tun", up=True, mtu=1300)
    host.network.remove_nics(3)
    assert host.kernel.named()["tap5"] == new
    assert host.said[1:] == []


def test_adopted_taps_of_others_are_restored(host: Host) -> None:
    """priv was started again in between."""
    theirs = host.kernel.add("tap5", "tun", up=True, group=9)
    host.kernel.add_address(theirs, HOST4, 31)
    before = TapBefore(master=0, mtu=1400, group=0, up=False, added=(AddressGiven(address=HOST4, length=31),))
    made = NicMade(name="tap5", lladdr=LLADDR, link_local=b"", mtu=1500, index=theirs.index, before=before)
    host.network.adopt(AdoptNics(vmid=3, nics=(LOCAL.replace(name="tap5", existing=True),), made=(made,)))
    host.network.remove_nics(3)
    assert host.kernel.named()["tap5"] == theirs.replace(up=False, mtu=1400, group=0)
    assert host.kernel.there == []


# --- removal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "stays"),
    [({}, False), ({"name": "tap0", "kind": "veth"}, True), ({"alias": "mine"}, True), ({"kind": "veth"}, True)],
)
def test_only_a_tap_of_ours_is_deleted(host: Host, changed: dict[str, Any], stays: bool) -> None:
    """Another program may have made something of its name in the meantime."""
    start(host, wanted())
    link = host.kernel.named()["tap0"]
    host.kernel.links[link.index] = link.replace(**changed)
    host.network.remove_nics(3)
    assert ("tap0" in host.kernel.named()) is stays


def test_a_new_tap_of_the_same_name_is_not_deleted(host: Host) -> None:
    """Its number is another one."""
    start(host, wanted())
    host.kernel.remove(host.kernel.named()["tap0"].index)
    host.kernel.add("tap0", "tun", alias="vm9-if0-new")
    host.network.remove_nics(3)
    assert host.kernel.show() == {"tap0 vm9-if0-new - down"}
    host.network.remove_nics(3)


def test_a_failure_does_not_keep_other_interfaces(host: Host) -> None:
    """It is logged."""
    start(host, wanted(), wanted(index=1), wanted(index=2, name="tap5"))
    host.kernel.refused["delete tap0"] = errno.EPERM
    host.network.remove_nics(3)
    assert host.kernel.show() == {"tap0 vm3-if0-web - up"}
    assert [line.partition(":")[0] for line in host.said] == ["delete tap0"]


def test_a_routing_domain_ends_with_its_last_interface(host: Host) -> None:
    """So does the end of its table."""
    start(host, wanted(rdomain=7))
    start(host, wanted(4, rdomain=7), vmid=4)
    host.network.remove_nics(3)
    assert (host.kernel.ended, "vrf7" in host.kernel.named()) == ({7}, True)
    host.network.remove_nics(4)
    assert (host.kernel.ended, host.kernel.show()) == (set(), set())


def test_damage_of_a_removed_interface_is_forgotten(host: Host) -> None:
    """The next VM may have a tap of its name."""
    start(host, wanted())
    host.network.damage.found = [Damage(text="x", since_s=0, names=frozenset({"tap0"}), lasting=True)]
    assert host.network.damages(3) == [(0, host.network.damage.found[0])]
    host.network.remove_nics(3)
    assert host.network.damage.found == []
    assert host.network.damages(3) == []
