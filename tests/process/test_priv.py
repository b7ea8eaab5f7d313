"""A real priv process.  Each test has network namespaces of its own."""

import errno
import fcntl
import ipaddress
import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import ROOT
from tests.support.hostnet import addresses, links, ours, rules, setting
from tests.support.network import Network, TapInterface
from tests.support.privdriver import DEADLINE_S, RUN_DIRECTORY, Grouped, Made, Poor, Priv, nic, switch
from tests.support.throughhost import GUEST4, GUEST6, HOST4, PREFIX6, Guest, World, udp4, udp6
from vmd.ipc.messages.priv import ConfigureNetwork, NicsFailed, NicWanted, SwitchRequest
from vmd.priv.lists import Lists
from vmd.priv.rules import NFT_PATHS
from vmd.privsep import linux

pytestmark = pytest.mark.root

TUNGETIFF = 0x800454D2
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_PERSIST = 0x0002, 0x1000, 0x4000, 0x0800
SO_SET_REPLACE, ACCEPT = 64, -2  # iptables: setsockopt, and -NF_ACCEPT - 1
OTHER_PREFIX6 = bytes.fromhex("fd42004200420008") + bytes(8)
OTHER6 = OTHER_PREFIX6[:8] + bytes(7) + b"\x22"


@pytest.fixture
def priv(network: Network) -> Iterator[Priv]:
    """Give a priv that runs in the network namespace."""
    with Priv(network) as running:
        assert running.configure() == ()
        yield running


# --- taps ----------------------------------------------------------------------------------------------------


def test_a_tap_is_made_and_handed_over(network: Network, priv: Priv) -> None:
    """It has our alias, is up, and ends with its descriptor.  Its frames have virtio headers (TUNGETIFF)."""
    with priv.make(nic(alias="vm3-if0-db1"), vmid=3) as made:
        (tap,) = made.nics
        link = links(network)["tap0"]
        flags = struct.unpack_from("H", fcntl.ioctl(made.fds[0], TUNGETIFF, bytes(40)), 16)[0]

        assert (tap.name, tap.mtu, tap.link_local) == ("tap0", 1500, b"")
        assert tap.lladdr.hex(":") == link["address"]
        assert link["ifalias"] == "vm3-if0-db1"
        assert "UP" in link["flags"]
        assert addresses(link) == []
        assert flags & (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_PERSIST) == IFF_TAP | IFF_NO_PI | IFF_VNET_HDR


def test_the_next_free_name_is_taken(network: Network, priv: Priv) -> None:
    """Names of existing interfaces, and names that are reserved for other VMs, are skipped."""
    network.run("ip", "tuntap", "add", "tap0", "mode", "tap")

    with priv.make(nic(), nic("tap9"), nic(), reserved=("tap2",)) as made:
        assert made.names == ["tap1", "tap9", "tap3"]


def existing(name: str, **fields: object) -> NicWanted:
    """Return a request for a tap that may exist already."""
    return nic(name, existing=True, **fields)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (("link", "add", "tap4", "type", "bridge"), "and is not a tap"),
        (("tuntap", "add", "tap4", "mode", "tun"), "and is not a tap of one queue: ip tuntap add tap4 mode tap"),
        (("tuntap", "add", "tap4", "mode", "tap", "multi_queue"), "and is not a tap of one queue: ip tuntap"),
    ],
)
def test_a_name_that_is_taken_is_refused(
    network: Network, priv: Priv, kind: tuple[str, ...], reason: str
) -> None:
    """An existing interface that is not a tap, or is a tap of several queues, is neither used nor changed."""
    network.run("ip", *kind)
    before = links(network)["tap4"]

    failed = priv.refuse(existing("tap4"))

    assert f"interface tap4 exists already, {reason}" in failed.text
    assert links(network)["tap4"] == before


def test_an_existing_tap_is_refused_if_the_request_does_not_allow_it(network: Network, priv: Priv) -> None:
    """A user who names a tap for an instance could reach a network that they may not use."""
    network.run("ip", "tuntap", "add", "tap4", "mode", "tap")
    before = settings(network, "tap4")

    assert priv.refuse(nic("tap4")).text == "interface tap4 exists already"
    assert settings(network, "tap4") == before


@pytest.mark.deep
def test_a_tap_that_is_in_use_is_refused(network: Network, priv: Priv) -> None:
    """Another program uses it, or another of our VMs."""
    with TapInterface(network, "tap4"), priv.make(nic("tap5", alias="vm2-if0-web"), vmid=2):
        assert priv.refuse(existing("tap4")).text == "interface tap4 exists already, and another program uses it"
        assert priv.refuse(existing("tap5")).text == "interface tap5 exists already: vm2-if0-web"


def settings(network: Network, name: str) -> dict[str, Any]:
    """Return the settings of an interface that an administrator can make."""
    link = links(network)[name]
    keys = ("ifindex", "mtu", "group", "master", "ifalias", "address")
    given = [text for text in addresses(link) if not text.startswith("fe80")]
    return {key: link.get(key) for key in keys} | {"up": "UP" in link["flags"], "addresses": given}


def test_an_existing_tap_is_used_and_left(network: Network, priv: Priv) -> None:
    """It keeps its name, alias and addresses, and passes frames.  Afterwards it is as before, and can be used again."""
    network.run("ip", "tuntap", "add", "tap4", "mode", "tap")
    network.run("ip", "link", "set", "tap4", "alias", "the accountants", "address", "0a:00:00:00:00:04", "mtu", "1400")
    network.run("ip", "address", "add", "10.9.0.1/24", "dev", "tap4")
    before = settings(network, "tap4")

    for _ in range(2):
        with priv.make(existing("tap4")) as made:
            (tap,) = made.nics
            assert (tap.name, tap.mtu, tap.lladdr.hex(":")) == ("tap4", 1400, "0a:00:00:00:00:04")
            assert settings(network, "tap4") == before | {"up": True}
            network.run("ip", "neigh", "replace", "10.9.0.2", "lladdr", "02:00:00:00:00:02", "dev", "tap4")
            with network.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"hello", ("10.9.0.2", 7000))
            assert b"hello" in Guest(network, made).receive(b"hello")
            priv.remove()
        assert settings(network, "tap4") == before


def test_an_existing_tap_on_a_switch_and_in_a_group(network: Network, tmp_path: Path) -> None:
    """It takes the MTU of the bridge while it is in it.  A tap that was in the bridge before stays in it."""
    network.run("ip", "link", "add", "mine", "type", "bridge")
    network.run("ip", "link", "add", "wire", "mtu", "9000", "type", "veth", "peer", "name", "other")
    network.run("ip", "link", "set", "wire", "master", "mine")
    for name in ("tap4", "tap5", "tap6"):
        network.run("ip", "tuntap", "add", name, "mode", "tap")
    network.run("ip", "link", "set", "tap5", "master", "mine", "mtu", "9000")
    before = [settings(network, name) for name in ("tap4", "tap5", "tap6")]
    with Priv(network, Grouped(tmp_path)) as priv:
        priv.configure(switch("br0"), switch("mine"))

        on_mine = (existing(name, bridge="mine") for name in ("tap5", "tap6"))
        with priv.make(existing("tap4", bridge="br0", groups=("web",)), *on_mine):
            there = links(network)
            assert [there[name]["master"] for name in ("tap4", "tap5", "tap6")] == ["br0", "mine", "mine"]
            assert (there["tap4"]["group"], there["tap6"]["mtu"], there["mine"]["mtu"]) == ("7", 9000, 9000)
            assert priv.configure(switch("mine")) == ()  # br0 stays until its last tap leaves, which is tap4
            assert "br0" in links(network)
            priv.remove()
        assert [settings(network, name) for name in ("tap4", "tap5", "tap6")] == before
        assert "br0" not in links(network)
        priv.configure(switch("br0"))
        assert "is in another bridge or VRF than br0" in priv.refuse(existing("tap5", bridge="br0")).text
        assert settings(network, "tap5") == before[1]


@pytest.mark.deep
def test_an_existing_tap_as_a_local_interface(network: Network, priv: Priv) -> None:
    """While a VM has it, it has our addresses besides its own."""
    priv.configure()
    network.run("ip", "tuntap", "add", "tap4", "mode", "tap")
    network.run("ip", "address", "add", "10.9.0.1/24", "dev", "tap4")
    before = settings(network, "tap4")
    rp_filter = setting(network, "ipv4/conf/tap4/rp_filter")

    local = existing("tap4", host4=HOST4, prefix6=PREFIX6)
    with (
        World(network) as world,
        priv.make(local) as made,
        world.network.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        assert {"10.9.0.1/24", "100.64.1.2/31", "fd42:42:42:4::1/64"} <= set(addresses(links(network)["tap4"]))
        server.bind(("192.0.2.2", 7000))
        server.settimeout(DEADLINE_S)
        Guest(network, made).send(0x0800, udp4(GUEST4, socket.inet_aton("192.0.2.2"), b"hello"))
        assert server.recvfrom(100)[0] == b"hello"
        priv.remove()
    assert settings(network, "tap4") == before
    priv.quit()
    assert setting(network, "ipv4/conf/tap4/rp_filter") == rp_filter


@pytest.mark.deep
def test_a_tap_that_was_in_use_when_priv_was_killed(network: Network) -> None:
    """It still exists, and so does its bridge.  The next daemon can use both."""
    network.run("ip", "tuntap", "add", "tap4", "mode", "tap")
    before = settings(network, "tap4")
    with Priv(network) as first:
        first.configure(switch("br0"))
        with first.make(existing("tap4", bridge="br0")):
            os.kill(first.child.pid, signal.SIGKILL)
            first.wait()
    with Priv(network) as second:
        assert second.configure(switch("br0")) == ()
        with second.make(existing("tap4", bridge="br0")):
            assert links(network)["tap4"]["master"] == "br0"
    assert set(links(network)) == {"lo", "tap4"}
    assert settings(network, "tap4") | {"up": False} == before


def test_a_tap_may_be_down(network: Network, priv: Priv) -> None:
    """A tap of an interface with `down` is made, and not set up."""
    with priv.make(nic(up=False)):
        assert "UP" not in links(network)["tap0"]["flags"]


def test_removing_does_not_wait_for_the_descriptor(network: Network, priv: Priv) -> None:
    """A descriptor of a removed tap that is still open cannot be used."""
    with priv.make(nic(), nic()) as made:
        priv.remove()

        assert set(links(network)) == {"lo"}
        with pytest.raises(OSError, match="File descriptor in bad state"):
            os.write(made.fds[0], bytes(64))


def test_all_interfaces_of_a_vm_or_none(network: Network, priv: Priv) -> None:
    """If one interface cannot be made, the earlier ones are removed.  The next request succeeds."""
    network.run("ip", "link", "add", "tap9", "type", "bridge")

    failed = priv.refuse(nic(host4=HOST4), nic("tap9"))

    assert failed.code == errno.EBUSY
    assert set(links(network)) == {"lo", "tap9"}
    with priv.make(nic(host4=HOST4)) as made:
        assert made.names == ["tap0"]


class FixedForwarding(Poor):
    """A host whose forwarding cannot be changed, such as a container."""

    def enter(self) -> None:
        """Mount the setting read-only over itself."""
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
        path = "/proc/sys/net/ipv4/ip_forward"
        linux.mount(path, path, None, linux.MS_BIND)
        linux.mount(None, path, None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY)
        super().enter()


def test_a_request_that_fails_late_leaves_no_rules(network: Network) -> None:
    """The rules were made already when forwarding could not be switched on, so they are removed."""
    with Priv(network, FixedForwarding()) as priv:
        priv.configure()
        failed = priv.refuse(nic(groups=("lab",), host4=HOST4))

        assert (failed.code, failed.text) == (errno.EROFS, "set net/ipv4/ip_forward to 1: Read-only file system")
        assert set(links(network)) == {"lo"}
        assert "tap0" not in network.run("nft", "list", "ruleset")
        assert "100.64" not in network.run("nft", "list", "ruleset")


def test_a_second_request_for_a_vm_is_refused(priv: Priv) -> None:
    """A second request for the same VM is refused, while the first one's interfaces exist."""
    with priv.make(nic()):
        assert priv.refuse(nic()).code == errno.EEXIST


def test_groups_are_linux_groups_and_nftables_sets(network: Network, tmp_path: Path) -> None:
    """A tap gets the first of its groups that the host defines.  All of its groups are sets of nftables."""
    with (
        Priv(network, Grouped(tmp_path)) as priv,
        priv.make(nic(groups=("lab", "web")), nic(groups=("web",))),
    ):
        assert [links(network)[name]["group"] for name in ("tap0", "tap1")] == ["7", "7"]
        assert 'set vmd_lab { type ifname elements = { "tap0" } }' in rules(network)
        assert 'set vmd_web { type ifname elements = { "tap0", "tap1" } }' in rules(network)
        assert priv.log.count("group lab is not in /etc/iproute2/group") == 1


def test_rules_of_the_administrator_stay(network: Network, priv: Priv) -> None:
    """A chain that the administrator puts into our table stays while VMs start and end, also if it names our sets."""
    with priv.make(nic(groups=("lab",))):
        network.run("nft", "add chain inet vmd mine { type filter hook input priority 0; }")
        network.run("nft", "add rule inet vmd mine iifname @vmd_lab tcp dport 22 drop")
        priv.remove()
        assert "iifname @vmd_lab tcp dport 22 drop" in rules(network)
        with priv.make(nic(groups=("lab",))):
            assert "iifname @vmd_lab tcp dport 22 drop" in rules(network)
            assert 'set vmd_lab { type ifname elements = { "tap0" } }' in rules(network)


def test_rules_that_were_flushed_come_back_with_a_reload(network: Network, priv: Priv) -> None:
    """Many firewalls begin with `flush ruleset` when they are restarted."""
    with priv.make(nic(host4=HOST4)):
        before = rules(network)
        network.run("nft", "flush", "ruleset")
        assert priv.configure() == ()

        assert rules(network) == before
    priv.remove()
    assert "inet vmd" not in network.run("nft", "list", "tables")


def test_interfaces_and_addresses_are_those_that_ip_shows(network: Network) -> None:
    """There are a bridge, a tap and veth pairs: more than the kernel lists in one answer."""
    for number in range(0, 80, 2):
        network.run("ip", "link", "add", f"d{number}", "type", "veth", "peer", "name", f"d{number + 1}")
    network.run("ip", "link", "add", "br0", "mtu", "1400", "type", "bridge")
    network.run("ip", "link", "set", "d7", "master", "br0", "up", "alias", "the ä one", "group", "12")
    network.run("ip", "address", "add", "10.1.2.3/24", "dev", "d7")
    network.run("ip", "address", "add", "10.1.2.4", "peer", "10.9.9.9/32", "dev", "d7")
    network.run("ip", "address", "add", "fd00::7/64", "dev", "d7")
    with TapInterface(network, "tap0"), network.inside():
        lists = Lists()
        found, one, none = lists.links(), lists.link("d7"), lists.link("nothing")
        given, others = lists.addresses(), lists.addresses({one.index if one else 0})
        lists.close()

        shown = links(network)
        assert {link.name for link in found} == shown.keys()
        assert none is None
        assert one in found
        by_index = {link.index: link.name for link in found}
        for link in found:
            row = shown[link.name]
            assert link.index == row["ifindex"]
            assert link.lladdr.hex(":") == row["address"]
            assert link.mtu == row["mtu"]
            assert link.up == ("UP" in row["flags"])
            assert by_index.get(link.master) == row.get("master")
            assert link.alias == row.get("ifalias", "")
            assert str(link.group) == row["group"].replace("default", "0")
            assert link.kind == row.get("linkinfo", {}).get("info_kind", "")
        addressed = {
            (row["ifindex"], ipaddress.ip_address(each["local"]).packed)
            for row in shown.values()
            for each in row["addr_info"]
        }
        assert set(given) == addressed
        assert one is not None
        assert set(others) == {pair for pair in addressed if pair[0] != one.index}


# --- switches ------------------------------------------------------------------------------------------------


def test_a_bridge_is_made_and_removed(network: Network, priv: Priv) -> None:
    """It is marked as ours and keeps its address when a tap joins it.  It is removed when the daemon ends."""
    assert priv.configure(switch("br7", alias="switch1-lan")) == ()
    before = links(network)["br7"]

    with priv.make(nic(bridge="br7")):
        after = links(network)

        assert before["linkinfo"]["info_kind"] == "bridge"
        assert before["ifalias"] == "switch1-lan"
        assert "UP" in before["flags"]
        assert after["tap0"]["master"] == "br7"
        assert after["br7"]["address"] == before["address"]
        assert addresses(after["tap0"]) == []
        assert setting(network, "ipv6/conf/tap0/disable_ipv6") == "1"
        assert setting(network, "ipv6/conf/br7/accept_ra") == "0"
        assert "inet vmd" not in network.run("nft", "list", "tables")
    priv.quit()
    assert set(links(network)) == {"lo"}


def test_an_existing_bridge_is_not_changed(network: Network, priv: Priv) -> None:
    """Only its ports change, and it still exists after the daemon has ended."""
    network.run("ip", "link", "add", "uplink", "type", "bridge", "forward_delay", "200")
    network.run("ip", "link", "set", "uplink", "alias", "the office", "address", "02:00:00:00:00:07")
    before = links(network)["uplink"]

    assert priv.configure(switch("uplink")) == ()
    with priv.make(nic(bridge="uplink")):
        assert links(network)["tap0"]["master"] == "uplink"
    priv.quit()

    after = links(network)["uplink"]
    for changing in (before, after):  # the kernel changes these itself
        changing["tso_max_size"] = changing["tso_max_segs"] = 0
        for key in ("tcn_timer", "gc_timer", "hello_timer", "topology_change_timer"):
            changing["linkinfo"]["info_data"].pop(key, None)
    assert after == before


def test_a_bridge_keeps_the_address_of_its_uplink(network: Network, priv: Priv) -> None:
    """A bridge without a set address takes the lowest address of its ports, so no tap may have a lower one.

    Otherwise the host's MAC address would change when a VM starts.
    """
    network.run("ip", "link", "add", "uplink", "type", "bridge")
    network.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "other")
    network.run("ip", "link", "set", "wire", "address", "f4:ce:46:00:00:01", "master", "uplink")
    assert links(network)["uplink"]["address"] == "f4:ce:46:00:00:01"
    priv.configure(switch("uplink"))

    guests = [bytes.fromhex(f"f0000000000{number}") for number in range(4)]
    with priv.make(*(nic(bridge="uplink", lladdr=guest) for guest in guests)) as made:
        assert links(network)["uplink"]["address"] == "f4:ce:46:00:00:01"
        assert [links(network)[tap.name]["address"] for tap in made.nics] == [tap.lladdr.hex(":") for tap in made.nics]
        assert len({tap.lladdr for tap in made.nics} - set(guests)) == 4


def test_the_tap_of_a_guest_always_has_the_same_address(network: Network, priv: Priv) -> None:
    """A guest that was stopped, or comes from another host, still has the address in its neighbour table."""
    guest = bytes.fromhex("525400123456")
    with priv.make(nic(lladdr=guest)) as made:
        before = made.nics[0].lladdr
    priv.remove()
    with Network() as elsewhere, Priv(elsewhere) as other, other.make(nic("tap7", lladdr=guest)) as made:
        assert made.nics[0].lladdr == before
        assert links(elsewhere)["tap7"]["address"] == before.hex(":")


def test_jumbo_frames_where_the_bridge_has_them(network: Network, priv: Priv) -> None:
    """A tap takes the MTU of its bridge, up to 16384.  The MTU of the bridge does not change."""
    for name, mtu in (("jumbo", "9000"), ("giant", "60000")):
        network.run("ip", "link", "add", name, "type", "bridge")
        network.run("ip", "link", "set", name, "mtu", mtu)
    priv.configure(switch("jumbo"), switch("giant", alias="switch2-giant"))

    with priv.make(nic(bridge="jumbo"), nic(bridge="giant")) as made:
        assert [tap.mtu for tap in made.nics] == [9000, 16384]
        assert [links(network)[name]["mtu"] for name in ("tap0", "tap1", "jumbo", "giant")] == [
            9000, 16384, 9000, 60000,
        ]  # fmt: skip


def test_a_switch_on_an_interface_that_is_no_bridge(network: Network, priv: Priv) -> None:
    """The interface is neither used nor changed.  A VM that needs it is refused with the same message."""
    network.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "other")
    before = links(network)["wire"]

    (problem,) = priv.configure(switch("wire"))
    failed = priv.refuse(nic(bridge="wire"))

    assert problem == failed.text == "interface wire is not a bridge but veth: switches need one"
    assert links(network) == {**links(network), "wire": before}


def test_switches_follow_the_configuration(network: Network, priv: Priv) -> None:
    """A bridge that the configuration no longer names is removed with its last tap."""
    priv.configure(switch("br0"), switch("br1", alias="switch2-b"))
    with priv.make(nic(bridge="br0")):
        priv.configure(switch("br2", alias="switch1-c"))

        assert set(links(network)) == {"lo", "br0", "br2", "tap0"}
        assert priv.refuse(nic(bridge="br0"), vmid=2).text == "bridge br0 belongs to no switch"
        priv.remove()
        assert set(links(network)) == {"lo", "br2"}


def test_switches_in_several_messages(network: Network, priv: Priv) -> None:
    """They take effect with the last message.  If there are too many, they are dropped."""
    priv.send(ConfigureNetwork(nat=True, switches=(switch("br1", alias="switch1-a"),), more=True))
    assert priv.configure(switch("br2", alias="switch2-b")) == ()
    assert set(links(network)) == {"lo", "br1", "br2"}
    assert priv.configure() == ()
    assert set(links(network)) == {"lo"}

    many = tuple(switch(f"br{number}") for number in range(200))
    for _ in range(51):
        priv.send(ConfigureNetwork(nat=True, switches=many, more=True))
    assert priv.configure(switch("br3", alias="switch3-c")) == ()
    assert set(links(network)) == {"lo", "br3"}
    assert "dropped: parent: wants 10200 switches" in priv.log


def test_a_bridge_that_was_deleted_is_made_again(network: Network, priv: Priv) -> None:
    """If an administrator deletes a bridge, taps of running VMs join the new bridge."""
    priv.configure(switch("br0"))
    with priv.make(nic(bridge="br0")):
        network.run("ip", "link", "delete", "br0")
        with priv.make(nic(bridge="br0"), vmid=2):
            assert [links(network)[tap]["master"] for tap in ("tap0", "tap1")] == ["br0", "br0"]

            network.run("ip", "link", "delete", "br0")
            network.run("ip", "link", "add", "mine", "type", "bridge")
            network.run("ip", "link", "set", "tap1", "master", "mine")
            assert priv.configure(switch("br0")) == ()
            assert [links(network)[tap]["master"] for tap in ("tap0", "tap1")] == ["br0", "mine"]


def test_a_bridge_with_a_port_of_the_administrator_stays(network: Network) -> None:
    """If the administrator has put the uplink into our bridge, removing the bridge would cut the host off."""
    with Priv(network) as priv:
        priv.configure(switch("br0"))
        network.run("ip", "link", "add", "uplink", "type", "veth", "peer", "name", "other")
        network.run("ip", "link", "set", "uplink", "master", "br0")
    assert links(network)["uplink"]["master"] == "br0"
    with Priv(network) as priv:
        assert links(network)["uplink"]["master"] == "br0"
        assert priv.configure(switch("br0")) == ()
        network.run("ip", "link", "delete", "uplink")
    assert set(links(network)) == {"lo"}


def test_a_switch_may_be_down(network: Network, priv: Priv) -> None:
    """The bridge of a switch with `down` is made, and not set up."""
    priv.configure(switch("br0", up=False))
    assert "UP" not in links(network)["br0"]["flags"]


def test_a_kernel_without_vrfs_is_reported(network: Network, priv: Priv) -> None:
    """`tests/l1/test_vrf.py` has the tests with VRFs."""
    with network.inside():
        have_vrf = os.system("ip link add probe type vrf table 9 2>/dev/null") == 0
    if have_vrf:
        network.run("ip", "link", "delete", "probe")
        pytest.skip("this kernel has VRFs")

    failed = priv.refuse(nic(rdomain=3))
    (problem,) = priv.configure(switch("br0", rdomain=3))

    sentence = "rdomain 3: make VRF vrf3: this kernel has no such interfaces: load the module vrf"
    assert (failed.code, failed.text, problem) == (errno.EOPNOTSUPP, sentence, sentence)
    assert set(links(network)) == {"lo"}


def test_a_routing_table_that_the_host_uses_is_no_rdomain(network: Network, priv: Priv) -> None:
    """The last route of a routing domain's table refuses all other packets.  That would break a VPN of the host."""
    network.run("ip", "rule", "add", "pref", "5270", "lookup", "52")
    network.run("ip", "-6", "rule", "add", "fwmark", "1", "lookup", "51")
    for rdomain in (52, 51):
        failed = priv.refuse(nic(rdomain=rdomain))
        assert failed.code == errno.EBUSY
        assert f"rdomain {rdomain}: packets of this host go to routing table {rdomain}, too" in failed.text


@pytest.mark.parametrize("rdomain", [253, 254, 255])
def test_the_tables_of_the_host_are_no_rdomains(priv: Priv, rdomain: int) -> None:
    """The tables main, local and default belong to the host."""
    assert priv.refuse(nic(rdomain=rdomain)).code == errno.EINVAL


def test_one_routing_domain_per_switch(priv: Priv) -> None:
    """A port of a bridge cannot be in another routing domain than the bridge.  Domain 0 is the host's."""
    priv.configure(switch("br0"))
    failed = priv.refuse(nic(bridge="br0", rdomain=3))
    assert (failed.code, "in the rdomain of the switch" in failed.text) == (errno.EINVAL, True)
    with priv.make(nic(bridge="br0", rdomain=0)):
        pass


# --- local interfaces ----------------------------------------------------------------------------------------


def test_local_addresses(network: Network, priv: Priv) -> None:
    """A tap has a /31.  With IPv6 it also has ::1 of its /64 and a link-local address, and can use both at once."""
    with priv.make(nic(host4=HOST4, prefix6=PREFIX6)) as made:
        link = links(network)["tap0"]
        link_local = socket.inet_ntop(socket.AF_INET6, made.nics[0].link_local)

        assert set(addresses(link)) == {"100.64.1.2/31", "fd42:42:42:4::1/64", f"{link_local}/64"}
        assert not any(each.get("tentative") for each in link["addr_info"])
        assert setting(network, "ipv6/conf/tap0/accept_ra") == "0"
        assert setting(network, "ipv4/conf/tap0/rp_filter") == "1"


def test_local_without_ipv6(network: Network, priv: Priv) -> None:
    """Without `local inet6` a tap has no IPv6 address, not even a link-local one."""
    with priv.make(nic(host4=HOST4)) as made:
        assert addresses(links(network)["tap0"]) == ["100.64.1.2/31"]
        assert made.nics[0].link_local == b""
        assert setting(network, "ipv6/conf/all/forwarding") == "0"


@pytest.mark.parametrize(
    ("command", "request_", "words"),
    [
        ("100.64.1.3/10", nic(host4=HOST4), "100.64.1.2/31 is in use: the host has 100.64.1.3"),
        ("fd42:42:42:4::77/48", nic(host4=HOST4, prefix6=PREFIX6), "fd42:42:42:4::/64 is in use"),
    ],
)
def test_addresses_that_the_host_uses_are_refused(
    network: Network, priv: Priv, command: str, request_: NicWanted, words: str
) -> None:
    """A guest must not get an address or a prefix in which the host has an address."""
    network.run("ip", "addr", "add", command, "dev", "lo")

    failed = priv.refuse(request_)

    assert failed.code == errno.EADDRINUSE
    assert words in failed.text
    assert set(links(network)) == {"lo"}


@pytest.mark.parametrize(
    ("commands", "words"),
    [
        (["addr add 100.64.0.1/10 dev wire"], "100.64.0.0/10 by wire; see `local prefix`"),
        (
            ["addr add 192.0.2.1/24 dev wire", "route add 100.64.1.3 via 192.0.2.2"],
            "100.64.1.3/32 by wire; see `local prefix`",
        ),
        (
            ["route add 100.64.1.2 dev wire table 52", "rule add pref 5270 lookup 52"],
            "100.64.1.2/32 by wire; see `local prefix`",
        ),
        (["-6 route add fd42:42:42::/48 dev wire"], "fd42:42:42::/48 by wire; see `local inet6 prefix`"),
    ],
)
def test_networks_that_the_host_reaches_are_refused(
    network: Network, priv: Priv, commands: list[str], words: str
) -> None:
    """Routes of all tables count, because a VPN often has a table of its own."""
    network.run("ip", "link", "add", "wire", "up", "type", "bridge")
    for command in commands:
        network.run("ip", *command.split())

    failed = priv.refuse(nic(host4=HOST4, prefix6=PREFIX6))

    assert failed.code == errno.EADDRINUSE
    assert failed.text.endswith(f" is in use: the host reaches {words}")
    assert set(links(network)) == {"lo", "wire"}


def test_default_routes_do_not_count_as_networks(network: Network, priv: Priv) -> None:
    """Blackhole routes do not count either, nor do the halves of a default route, with which VPNs override it."""
    network.run("ip", "link", "add", "wire", "up", "type", "bridge")
    for command in ("default", "0.0.0.0/1", "128.0.0.0/1", "-6 default", "-6 2000::/3"):
        family = command.split()[:-1]
        network.run("ip", *family, "route", "add", command.split()[-1], "dev", "wire")
    network.run("ip", "route", "add", "blackhole", "100.64.0.0/16")

    with priv.make(nic(host4=HOST4, prefix6=PREFIX6)):
        assert "100.64.1.2/31" in addresses(links(network)["tap0"])


@pytest.mark.parametrize(
    ("family", "kind", "ours_", "guest4", "target", "seen"),
    [
        (socket.AF_INET, 0x0800, udp4, GUEST4, "192.0.2.2", "192.0.2.1"),
        (socket.AF_INET6, 0x86DD, udp6, GUEST6, "2001:db8::2", "2001:db8::1"),
    ],
    ids=["IPv4", "IPv6"],
)
def test_nat(
    network: Network, priv: Priv, family: socket.AddressFamily, kind: int, ours_: Any, guest4: bytes, target: str,  # noqa: ANN401
    seen: str,
) -> None:  # fmt: skip
    """A server sees the host's address, and its answer reaches the guest.  Spoofed packets do not leave the host."""
    priv.configure()
    with World(network) as world, priv.make(nic(host4=HOST4, prefix6=PREFIX6)) as made:
        guest = Guest(network, made)
        packed = socket.inet_pton(family, target)
        with world.network.socket(family, socket.SOCK_DGRAM) as server:
            server.bind((target, 7000))
            server.settimeout(DEADLINE_S)

            guest.send(kind, ours_(guest4[:-1] + b"\x77" if family == socket.AF_INET else packed, packed, b"spoofed"))
            guest.send(kind, ours_(guest4, packed, b"hello"))
            payload, sender = server.recvfrom(100)
            server.sendto(b"hello yourself", sender)
            answer = guest.receive(b"hello yourself")

        assert (payload, sender[0]) == (b"hello", seen)
        assert answer[:6] == Guest.lladdr
        assert guest4 in answer


def test_spoofed_packets_are_dropped_although_rp_filter_is_loose(network: Network, priv: Priv) -> None:
    """Ubuntu sets rp_filter to loose for all interfaces, which overrides the strict setting of one interface."""
    network.write("/proc/sys/net/ipv4/conf/all/rp_filter", "2")
    with World(network) as world, priv.make(nic(host4=HOST4)) as made:
        guest = Guest(network, made)
        target = socket.inet_aton("192.0.2.2")
        with world.network.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("192.0.2.2", 7000))
            server.settimeout(DEADLINE_S)

            for source in ("192.0.2.1", "192.0.2.9", "100.64.1.119", "203.0.113.5"):
                guest.send(0x0800, udp4(socket.inet_aton(source), target, b"spoofed"))
            guest.send(0x0800, udp4(GUEST4, target, b"hello"))

            assert server.recvfrom(100) == (b"hello", ("192.0.2.1", 5000))


@pytest.mark.parametrize(
    ("family", "kind", "ours_", "own", "other", "target"),
    [
        (socket.AF_INET, 0x0800, udp4, GUEST4, bytes((100, 64, 2, 3)), "192.0.2.2"),
        (socket.AF_INET6, 0x86DD, udp6, GUEST6, OTHER6, "2001:db8::2"),
    ],
    ids=["IPv4", "IPv6"],
)
def test_a_guest_cannot_use_the_address_of_another(
    network: Network, priv: Priv, family: socket.AddressFamily, kind: int, ours_: Any, own: bytes, other: bytes,  # noqa: ANN401
    target: str,
) -> None:  # fmt: skip
    """A packet with the address of another guest's interface is dropped, too."""
    network.write("/proc/sys/net/ipv4/conf/all/rp_filter", "2")
    priv.configure()
    with (
        World(network) as world,
        priv.make(nic(host4=HOST4, prefix6=PREFIX6)) as made,
        priv.make(nic(host4=bytes((100, 64, 2, 2)), prefix6=OTHER_PREFIX6), vmid=2),
        world.network.socket(family, socket.SOCK_DGRAM) as server,
    ):
        guest = Guest(network, made)
        server.bind((target, 7000))
        server.settimeout(DEADLINE_S)
        packed = socket.inet_pton(family, target)

        guest.send(kind, ours_(other, packed, b"spoofed"))
        guest.send(kind, ours_(own, packed, b"hello"))

        assert server.recvfrom(100)[0] == b"hello"


def test_guests_reach_each_other_without_nat(network: Network, priv: Priv) -> None:
    """Packets between local interfaces keep their source address."""
    priv.configure()
    with (
        priv.make(nic(host4=HOST4)) as one,
        priv.make(nic(host4=bytes((100, 64, 2, 2))), vmid=2) as two,
    ):
        network.run("ip", "neigh", "replace", "100.64.2.3", "lladdr", Guest.lladdr.hex(":"), "dev", "tap1")
        Guest(network, one).send(0x0800, udp4(GUEST4, bytes((100, 64, 2, 3)), b"neighbour"))

        frame = Guest(network, two).receive(b"neighbour")

        assert frame[26:30] == GUEST4


def test_forwarding_is_switched_on_and_put_back(network: Network, priv: Priv) -> None:
    """It is on only while a local interface needs it.  Meanwhile the host still accepts router advertisements."""
    names = (
        "ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/default/accept_ra", "ipv6/conf/lo/accept_ra",
        "ipv4/conf/lo/forwarding", "ipv6/conf/lo/forwarding",
    )  # fmt: skip
    network.write("/proc/sys/net/ipv4/conf/lo/forwarding", "1")  # set by the administrator, for one interface
    before = [setting(network, name) for name in names]
    priv.configure(switch("br0"))
    with priv.make(nic(bridge="br0")):
        assert [setting(network, name) for name in names] == before
    priv.remove()

    with priv.make(nic(host4=HOST4, prefix6=PREFIX6)):
        assert [setting(network, name) for name in names] == ["1", "1", "2", "2", "1", "1"]
    assert "switched IPv4 forwarding on" in priv.log
    assert "switched IPv6 forwarding on" in priv.log
    priv.quit()
    assert [setting(network, name) for name in names] == before


def test_accept_redirects_is_put_back(network: Network, priv: Priv) -> None:
    """When forwarding is switched off, the kernel accepts redirects again.  priv restores the administrator's value."""
    network.write("/proc/sys/net/ipv4/conf/all/accept_redirects", "0")
    with priv.make(nic(host4=HOST4)):
        assert setting(network, "ipv4/ip_forward") == "1"
    priv.quit()

    assert setting(network, "ipv4/ip_forward") == setting(network, "ipv4/conf/all/accept_redirects") == "0"


def test_forwarding_that_was_on_before_stays_on(network: Network, priv: Priv) -> None:
    """priv switches off only forwarding that it has switched on."""
    network.write("/proc/sys/net/ipv4/ip_forward", "1")
    with priv.make(nic(host4=HOST4)):
        pass
    priv.quit()
    assert setting(network, "ipv4/ip_forward") == "1"
    assert "switched" not in priv.log


def test_forwarding_that_the_administrator_switches_off_stays_off(network: Network, priv: Priv) -> None:
    """If forwarding was switched off by others, priv does not change it."""
    with priv.make(nic(host4=HOST4)):
        network.write("/proc/sys/net/ipv4/ip_forward", "0")
    network.write("/proc/sys/net/ipv4/conf/default/forwarding", "1")
    priv.quit()
    assert setting(network, "ipv4/ip_forward") == "0"


def with_nat(network: Network) -> Priv:
    """Return a priv with NAT in its configuration."""
    priv = Priv(network)
    assert priv.configure() == ()
    return priv


def give_address(network: Network, name: str, address: str, *kind: str) -> None:
    """Make an interface with an address, as another program does."""
    network.run("ip", "link", "add", name, "type", *(kind or ("bridge",)))
    network.run("ip", "address", "add", address, "dev", name, *(("nodad",) if ":" in address else ()))
    network.run("ip", "link", "set", name, "up")


def test_forwarding_that_others_may_rely_on_stays(network: Network) -> None:
    """Docker, libvirt and WireGuard may rely on forwarding that vmd has switched on, so it stays on when vmd ends.

    One message for each address family gives the command that switches forwarding off.
    """
    with with_nat(network) as priv, priv.make(nic(host4=HOST4, prefix6=PREFIX6)):
        give_address(network, "eth0", "192.0.2.7/24", "veth", "peer", "name", "wire")
        give_address(network, "docker0", "172.17.0.1/16")
        give_address(network, "wg0", "fd77::1/64")  # the only IPv6 interface, so it forwards nothing
        priv.quit()

        assert setting(network, "ipv4/ip_forward") == "1"
        assert setting(network, "ipv6/conf/all/forwarding") == "0"
        (line,) = [line for line in priv.log.splitlines() if "stays on" in line]
        assert "IPv4 forwarding stays on, since others may rely on it: eth0, docker0; " in line
        network.run(*line.partition("to switch it off: ")[2].split())
    assert setting(network, "ipv4/ip_forward") == "0"


@pytest.mark.deep
@pytest.mark.parametrize(("family", "rule"), [("ip", "masquerade"), ("inet", "tcp dport 80 dnat ip to 10.0.0.2")])
def test_forwarding_stays_for_nat_of_others(network: Network, family: str, rule: str) -> None:
    """NAT needs forwarding even on a host with one interface, for example for services of Kubernetes."""
    hook, priority = ("postrouting", "srcnat") if rule == "masquerade" else ("prerouting", "dstnat")
    with with_nat(network) as priv, priv.make(nic(host4=HOST4)):
        network.run("nft", f"add table {family} kube-proxy")
        network.run("nft", f"add chain {family} kube-proxy x {{ type nat hook {hook} priority {priority}; }}")
        network.run("nft", f"add rule {family} kube-proxy x {rule}")
        priv.quit()
        assert f"nftables table {family} kube-proxy; " in priv.log
    assert setting(network, "ipv4/ip_forward") == "1"


@pytest.mark.deep
def test_forwarding_is_put_back_although_a_firewall_has_nat_chains(network: Network) -> None:
    """firewalld has NAT chains on every host.  Without rules in them, nobody needs forwarding."""
    network.run("nft", "-f", str(ROOT / "tests/data/firewalls/firewalld.nft"))
    give_address(network, "eth0", "192.0.2.7/24", "veth", "peer", "name", "wire")
    with with_nat(network) as priv, priv.make(nic(host4=HOST4)):
        assert setting(network, "ipv4/ip_forward") == "1"
    assert setting(network, "ipv4/ip_forward") == "0"


def test_forwarding_stays_on_across_a_crash_and_restart(network: Network) -> None:
    """The next daemon switches it off when it ends, because the interfaces of other programs are gone then."""
    with with_nat(network) as first, first.make(nic(host4=HOST4, prefix6=PREFIX6)):
        for name, number in (("docker0", 1), ("virbr0", 2)):
            give_address(network, name, f"172.17.{number}.1/24")
            network.run("ip", "address", "add", f"fd77:{number}::1/64", "dev", name, "nodad")
        os.kill(first.child.pid, signal.SIGKILL)
        first.wait()
        with Priv(network) as second:
            assert "IPv4 forwarding stays on" in second.log
            assert "IPv6 forwarding stays on" in second.log
            assert " again" not in second.log  # it was not switched off, not even for a moment
            assert setting(network, "ipv4/ip_forward") == setting(network, "ipv6/conf/all/forwarding") == "1"
            assert setting(network, "ipv6/conf/lo/accept_ra") == "2"
            network.run("ip", "link", "delete", "docker0")
            network.run("ip", "link", "delete", "virbr0")
    assert setting(network, "ipv4/ip_forward") == setting(network, "ipv6/conf/all/forwarding") == "0"
    assert setting(network, "ipv6/conf/lo/accept_ra") == "1"


def test_new_interfaces_do_not_keep_our_settings(network: Network) -> None:
    """New interfaces inherit accept_ra 2 from our default.  An interface that had it before keeps it."""
    network.run("ip", "link", "add", "mine", "type", "bridge")
    network.write("/proc/sys/net/ipv6/conf/mine/accept_ra", "2")
    network.run("ip", "link", "add", "deaf", "type", "bridge")
    network.write("/proc/sys/net/ipv6/conf/deaf/accept_ra", "0")
    with with_nat(network) as priv, priv.make(nic(prefix6=PREFIX6)):
        network.run("ip", "link", "add", "late", "type", "bridge")
        assert setting(network, "ipv6/conf/late/accept_ra") == "2"
    names = ("late", "mine", "deaf", "default")
    assert [setting(network, f"ipv6/conf/{name}/accept_ra") for name in names] == ["1", "2", "0", "1"]


def test_nat_disabled(network: Network, priv: Priv) -> None:
    """With `local nat disable` a tap has its addresses, but there are no rules and no forwarding."""
    priv.configure(nat=False)
    with priv.make(nic(host4=HOST4, prefix6=PREFIX6)):
        assert "100.64.1.2/31" in addresses(links(network)["tap0"])
        assert ours(network) == ["tap0 (vm1-if0-a)"]
        assert setting(network, "ipv4/ip_forward") == setting(network, "ipv6/conf/all/forwarding") == "0"


def test_the_table_is_removed_with_the_last_interface_that_needs_it(network: Network, priv: Priv) -> None:
    """The networks of each VM are added and removed with its interfaces."""
    with priv.make(nic(host4=HOST4), nic(host4=bytes((100, 64, 1, 4)))):
        with priv.make(nic(host4=bytes((100, 64, 2, 2))), vmid=2):
            assert "elements = { 100.64.1.2/31, 100.64.1.4/31, 100.64.2.2/31 }" in rules(network)
            priv.remove(2)
            assert "elements = { 100.64.1.2/31, 100.64.1.4/31 }" in rules(network)
        priv.remove()
        assert ours(network) == []


# --- start and end of priv -----------------------------------------------------------------------------------


def make_each_kind(priv: Priv) -> Made:
    """Have priv make a switch, an interface on it, and a local interface."""
    priv.configure(switch("br0"))
    return priv.make(nic(bridge="br0", groups=("lab",)), nic("tap7", host4=HOST4, prefix6=PREFIX6))


def test_priv_leaves_all_interfaces_when_the_parent_has_ended(network: Network) -> None:
    """The guests may still run.  priv ends at the end of its channel, and the next priv removes the interfaces."""
    with Priv(network) as priv, make_each_kind(priv):
        before = ours(network)
        priv.sock.close()
        assert priv.wait() == 0
        assert ours(network) == before
        assert setting(network, "ipv6/conf/all/forwarding") == "1"
        with Priv(network):
            assert ours(network) == []
    assert setting(network, "ipv4/ip_forward") == setting(network, "ipv6/conf/all/forwarding") == "0"


def test_the_next_priv_removes_what_a_killed_one_has_left(network: Network) -> None:
    """It removes bridges, rules and taps, open ones too, and restores forwarding.  Other interfaces and tables stay."""
    network.run("ip", "link", "add", "switch1", "type", "bridge")
    network.run("ip", "link", "set", "switch1", "alias", "switches of the third floor")
    network.run("ip", "tuntap", "add", "tap8", "mode", "tap")
    network.run("nft", "add table inet vmd2")
    foreign = links(network)
    with Priv(network) as first, make_each_kind(first):
        os.kill(first.child.pid, signal.SIGKILL)
        first.wait()
        assert len(ours(network)) == 4
        assert setting(network, "ipv6/conf/all/forwarding") == "1"

        with Priv(network) as second:
            assert ours(network) == []
            assert "removed what an earlier vmd has left: tap0, tap7, br0, table inet vmd" in second.log
            assert set(links(network)) == set(foreign)
            assert setting(network, "ipv4/ip_forward") == setting(network, "ipv6/conf/all/forwarding") == "0"
            assert setting(network, "ipv6/conf/lo/accept_ra") == "1"
            with make_each_kind(second):
                pass
    assert "vmd2" in network.run("nft", "list", "tables")


@pytest.mark.deep
def test_the_first_of_two_daemons_has_the_network(network: Network, priv: Priv) -> None:
    """The second one removes and makes nothing, and says why.  It takes over when the first one has ended."""
    with make_each_kind(priv), Priv(network) as second:
        assert len(ours(network)) == 4
        assert second.configure() == ()
        failed = second.refuse(nic())
        assert (failed.code, "belongs to another vmd" in failed.text) == (errno.EBUSY, True)
        assert len(ours(network)) == 4
        priv.quit()
        with second.make(nic()):
            assert set(links(network)) == {"lo", "tap0"}


# --- hosts that lack something ---------------------------------------------------------------------------------


def test_too_few_or_too_many_descriptors_are_refused(network: Network) -> None:
    """The parent must send exactly one descriptor of /dev/net/tun for each tap."""
    with Priv(network) as priv:
        for tuns in (0, 1, 3):
            failed = priv.ask(nic(), nic(), tuns=tuns)
            assert isinstance(failed, NicsFailed)
            assert failed.text == f"refused: 2 interfaces out of {tuns} descriptors"
        assert set(links(network)) == {"lo"}
        with priv.make(nic(), nic()) as made:
            assert made.names == ["tap0", "tap1"]


def test_a_host_without_nftables(network: Network, tmp_path: Path) -> None:
    """Only NAT is refused.  Groups are Linux groups, without sets of nftables."""
    with Priv(network, Grouped(tmp_path, *NFT_PATHS)) as priv:
        priv.configure(switch("br0"))
        failed = priv.refuse(nic(host4=HOST4))
        assert failed.text == (
            "NAT for local interfaces: nft was not found: install nftables, or write `local nat disable`"
        )
        with priv.make(nic(bridge="br0", groups=("web",))):
            assert links(network)["tap0"]["group"] == "7"
        assert priv.log.count("groups have no sets in nftables: nft was not found") == 1
        priv.remove()
        priv.configure(nat=False)
        with priv.make(nic(host4=HOST4)):
            assert addresses(links(network)["tap0"]) == ["100.64.1.2/31"]


def test_a_host_without_ipv6(network: Network) -> None:
    """A request with IPv6 is refused, with the reason.  All others work."""
    with Priv(network, Poor("/proc/sys/net/ipv6")) as priv:
        priv.configure(switch("br0"))
        failed = priv.refuse(nic(host4=HOST4, prefix6=PREFIX6))
        assert failed.text == "interface tap0: local inet6: this kernel has no IPv6"
        with priv.make(nic(host4=HOST4), nic(bridge="br0")):
            assert setting(network, "ipv4/ip_forward") == "1"


def test_a_host_whose_run_directory_cannot_be_written(network: Network) -> None:
    """priv changes nothing if it cannot record the settings that it has to restore."""
    with Priv(network, Poor(str(RUN_DIRECTORY))) as priv:
        failed = priv.refuse(nic())
        assert (failed.code, "open /run/vmd/priv/network-" in failed.text) == (errno.EROFS, True)
        assert "networks will not work" in priv.log
    assert set(links(network)) == {"lo"}


# --- requests that no honest parent makes --------------------------------------------------------------------

MALICIOUS = (
    (nic("eth0"),),
    (nic("lo"),),
    (nic("tap"),),
    (nic("tap0x"),),
    (nic("tap0\nnext"),),
    (nic("tap12345678901234"),),
    (nic("../tap0"),),
    (nic(alias="eth0's"),),
    (nic(alias="vm1-if0-a\n"),),
    (nic(alias="switch1-lan"),),
    (nic(alias="vm1-if0-" + "a" * 250),),
    (nic(bridge="eth0"),),
    (nic(bridge="lo"),),
    (nic(groups=('x" }; flush ruleset; #',)),),
    (nic(groups=("a", "b", "c")),),
    (nic(groups=("",)),),
    (nic(rdomain=-1),),
    (nic(rdomain=1 << 31),),
    (nic(host4=b"\0"),),
    (nic(host4=bytes(16)),),
    (nic(prefix6=bytes(4)),),
    (nic(prefix6=bytes(15) + b"\1"),),
    (),
    tuple(nic() for _ in range(5)),
)


def test_malicious_requests_change_nothing(network: Network, priv: Priv) -> None:
    """Each is refused with a message, and priv serves the next one."""
    network.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    before = links(network)

    for request in MALICIOUS:
        failed = priv.ask(*request)
        assert isinstance(failed, NicsFailed), request
        assert failed.code in (errno.EPERM, errno.ENOENT), request
        assert failed.text
    assert isinstance(priv.ask(nic(), vmid=0), NicsFailed)
    assert isinstance(priv.ask(nic(), vmid=-1), NicsFailed)

    assert links(network) == before
    assert ours(network) == []
    with priv.make(nic()):
        pass


@pytest.mark.parametrize(
    "request_",
    [
        switch("lo"), switch("tap0"), switch(".."), switch("a/b"), switch("x" * 16), switch(""), switch("br0\n"),
        switch("br%d"), switch("all"), switch("default"),
        switch("br0", alias="mine"), switch("br0", alias="switch1-\x1b"), switch("br0", rdomain=256),
    ],
    ids=repr,
)  # fmt: skip
def test_malicious_switches_change_nothing(network: Network, priv: Priv, request_: SwitchRequest) -> None:
    """Each is refused with a message, and priv serves the next one."""
    before = links(network)

    assert len(priv.configure(request_)) == 1

    assert links(network) == before
    assert priv.configure() == ()


def test_more_problems_than_fit_into_a_message(network: Network, priv: Priv) -> None:
    """The answer has some of them, and the log has the others."""
    network.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "other")
    problems = priv.configure(*(switch("wire") for _ in range(40)))
    assert len(problems) + priv.log.count("is not a bridge but veth") >= 40


def test_a_malformed_message_ends_priv(network: Network) -> None:
    """The parent is broken or hostile.  Guests keep their interfaces until the next priv removes them."""
    with Priv(network) as priv, make_each_kind(priv):
        made = ours(network)
        priv.sock.send(b"garbage")
        assert priv.wait() == 1
    assert {*made} >= {*ours(network)} >= {"table inet vmd"}
    with Priv(network) as priv:
        assert priv.configure() == ()
        assert ours(network) == []


def test_removing_an_unknown_vm_is_ignored(priv: Priv) -> None:
    """The request is ignored."""
    priv.remove(77)
    with priv.make(nic()):
        pass


