"""Which interfaces priv has made, and what its taps must have."""

import os

import pytest

from vmd.ipc.messages.priv import AddressGiven, NicMade, NicWanted, TapBefore
from vmd.priv.ifconfig import UNFINISHED
from vmd.priv.lists import Link
from vmd.priv.nics import Attached, Nic, adopted, is_bridge, is_tap, is_unfinished, is_vrf, link_local, opposite

LLADDR = bytes.fromhex("fee1bad10203")
HOST4 = bytes((100, 64, 3, 2))
PREFIX6 = bytes.fromhex("fd000000000000010000000000000000")
WANTED = NicWanted(name="tap3", alias="vm3-if0-web", lladdr=LLADDR)
TAP = Link(index=7, name="tap3", kind="tun", alias="vm3-if0-web", master=0, mtu=1500, lladdr=LLADDR, up=True)
BRIDGE = TAP.replace(name="br0", kind="bridge", alias="switch1-lan")
VRF = TAP.replace(name="vrf5", kind="vrf", alias="rdomain5")


@pytest.mark.parametrize("link", [TAP, BRIDGE, VRF])
def test_what_priv_has_made_has_its_alias(link: Link) -> None:
    """Each kind has another one.  Interfaces without it belong to others, and are never changed."""
    kinds = (is_tap, is_bridge, is_vrf)
    assert [made(link) for made in kinds] == [link.kind == kind for kind in ("tun", "bridge", "vrf")]
    for other in ({"alias": ""}, {"alias": "mine"}, {"kind": "veth"}, {"alias": f"x{link.alias}"}):
        assert not any(made(link.replace(**other)) for made in kinds)


def test_an_alias_alone_makes_no_tap_of_ours() -> None:
    """Neither does an alias of ours with something behind it make a VRF."""
    assert not is_tap(TAP.replace(name="uplink"))
    assert not is_vrf(VRF.replace(alias="rdomain5-mine"))


@pytest.mark.parametrize(
    ("changed", "unfinished"),
    [
        ({}, True), ({"kind": "vrf"}, True), ({"kind": "tun"}, False), ({"alias": "switch1-lan"}, False),
        ({"group": 0}, False), ({"group": UNFINISHED + 1}, False),
    ],
)  # fmt: skip
def test_a_priv_that_was_killed_leaves_a_mark(changed: dict[str, object], unfinished: bool) -> None:
    """Until the interface has its alias, it has a group that others do not use."""
    link = BRIDGE.replace(alias="", group=UNFINISHED).replace(**changed)

    assert is_unfinished(link) is unfinished


def test_the_settings_of_a_tap() -> None:
    """IPv6 is off without a network of it.  The kernel checks the source of IPv4 packets only where there are some."""
    ours = [("ipv6/conf/tap3/accept_ra", "0"), ("ipv6/conf/tap3/addr_gen_mode", "1")]
    v6_off = [*ours, ("ipv6/conf/tap3/disable_ipv6", "1")]
    v6_on = [*ours, ("ipv6/conf/tap3/disable_ipv6", "0")]
    source = [("ipv4/conf/tap3/rp_filter", "1")]

    assert Nic(3, TAP, -1, WANTED).settings() == v6_off
    assert Nic(3, TAP, -1, WANTED.replace(host4=HOST4)).settings() == v6_off + source
    assert Nic(3, TAP, -1, WANTED.replace(prefix6=PREFIX6)).settings() == v6_on
    assert Nic(3, TAP, -1, WANTED.replace(host4=HOST4, prefix6=PREFIX6)).settings() == v6_on + source


def test_the_addresses_of_a_tap() -> None:
    """The host has ::1 of the IPv6 network, and the address of the link."""
    nic = Nic(3, TAP, -1, WANTED.replace(host4=HOST4, length4=24, prefix6=PREFIX6))
    assert nic.addresses() == [(HOST4, 24), (PREFIX6[:15] + b"\1", 64)]
    nic.link_local = link_local(LLADDR)
    assert nic.addresses()[0] == (bytes.fromhex("fe80000000000000fce1bafffed10203"), 64)


def test_the_address_of_the_host_s_side() -> None:
    """It is always the same, and no bridge takes it for its own while it has another port."""
    assert opposite(LLADDR) == opposite(LLADDR)
    assert opposite(LLADDR) != opposite(LLADDR[:5] + b"\4")
    assert (len(opposite(LLADDR)), opposite(LLADDR)[0]) == (6, 0xFE)


def test_a_descriptor_is_taken_or_closed() -> None:
    """Once."""
    reading, writing = os.pipe()
    nic = Nic(3, TAP, reading, WANTED)
    assert nic.take_fd() == reading
    assert nic.take_fd() == -1
    nic.close()
    os.fstat(reading)
    os.close(reading)

    nic = Nic(3, TAP, writing, WANTED)
    nic.close()
    nic.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writing)


def test_a_tap_of_another_program_is_restored() -> None:
    """priv notes how it was; its settings are that program's."""
    before = TAP.replace(alias="", master=4, mtu=9000, group=2, up=False)
    nic = Attached(3, before, -1, WANTED.replace(host4=HOST4))
    nic.link = TAP
    nic.added.append(AddressGiven(address=HOST4, length=31))

    assert nic.settings() == []
    assert nic.as_it_was() == TapBefore(
        master=4, mtu=9000, group=2, up=False, added=(AddressGiven(address=HOST4, length=31),)
    )
    assert Nic(3, TAP, -1, WANTED).as_it_was() is None


@pytest.mark.parametrize("vhost", [False, True])
def test_an_adopted_tap_is_as_it_was_made(vhost: bool) -> None:
    """The parent says how an earlier priv has made it."""
    made = NicMade(name="tap3", lladdr=LLADDR, link_local=b"local", mtu=1500, index=7, vhost=vhost)

    nic = adopted(3, WANTED.replace(name=""), made)

    assert (nic.vmid, nic.link, nic.link_local, nic.vhost, nic.fd) == (3, TAP, b"local", vhost, -1)
    assert nic.as_it_was() is None


def test_an_adopted_tap_of_another_program_is_restored() -> None:
    """As if the same priv had attached to it."""
    before = TapBefore(master=4, mtu=9000, group=2, up=False, added=(AddressGiven(address=HOST4, length=31),))
    made = NicMade(name="tap3", lladdr=LLADDR, link_local=b"", mtu=1500, index=7, before=before)

    nic = adopted(3, WANTED, made)

    assert (nic.link, nic.as_it_was(), nic.settings(), nic.fd) == (TAP, before, [], -1)
