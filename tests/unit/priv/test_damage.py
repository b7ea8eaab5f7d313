"""Changes by other programs to the network of VMs: what is repaired, what is said, and for how long."""

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from vmd.errors import OperatorError
from vmd.ipc.messages.priv import NicWanted, SwitchRequest
from vmd.log import log
from vmd.priv import damage as damage_module
from vmd.priv import sysctl
from vmd.priv.damage import AGAIN_S, NAMED_MAX, REPAIRED_S, Damages
from vmd.priv.lists import Link
from vmd.priv.nics import Nic

HOST4 = bytes((100, 64, 3, 2))
TAP = Link(index=7, name="tap3", kind="tun", alias="vm3-if0-web", master=0, mtu=1500, lladdr=bytes(6), up=True)
BRIDGE = TAP.replace(index=4, name="br0", kind="bridge", alias="switch1-lan")
VRF = TAP.replace(index=5, name="vrf9", kind="vrf", alias="rdomain9")
BY = "by another program"


class Host:
    """A network of one VM, and the repairs that are made."""

    def __init__(self, wanted: NicWanted, *links: Link, switch: SwitchRequest | None = None) -> None:
        self.there = {link.index: link for link in links}
        self.nic = Nic(3, TAP, -1, wanted)
        self.nics = {3: [self.nic]}
        self.switches = {} if switch is None else {switch.interface: switch}
        self.addressed = [(TAP.index, address) for address, _ in self.nic.addresses()]
        self.done: list[tuple[object, ...]] = []
        self.off: list[str] = []
        self.lost: list[str] | None = []
        self.has_table = True
        self.filtered: list[str] = []
        self.links: Any = SimpleNamespace(
            all=lambda: list(self.there.values()),
            addresses=lambda: self.addressed,
            set_master=lambda link, master: self.done.append(("into", link.name, master.name)),
            set_up=lambda link, up: self.done.append(("up", link.name, up)),
            add_address=lambda link, address, length: self.done.append(("address", link.name, address, length)),
        )
        self.filters = SimpleNamespace(repair=lambda: iter(self.filtered))

    def all_nics(self) -> list[Nic]:
        """Return the VM's interface."""
        return [self.nic]

    def is_ours(self, link: Link) -> bool:
        """Return whether priv has made a bridge."""
        return link.alias.startswith("switch")

    def bridge_settings(self, name: str) -> list[tuple[str, str]]:
        """Return the settings of a bridge."""
        return [(f"{name}/accept_ra", "0")]

    def ensure_bridge(self, switch: SwitchRequest) -> None:
        """Make a bridge."""
        self.done.append(("bridge", switch.interface))

    def ensure_vrf(self, _rdomain: int) -> Link:
        """Make a VRF."""
        return VRF

    def lacks_forwarding(self) -> list[str]:
        """Return the families without forwarding."""
        return self.off

    def forward(self) -> None:
        """Switch forwarding on."""
        self.done.append(("forward",))

    def members(self) -> list[Any]:
        """Return the interfaces for the rules."""
        return [SimpleNamespace(name="tap3", networks=self.nic.networks)]

    def lost_rules(self) -> list[str] | None:
        """Return what our table lacks."""
        return self.lost

    def write_rules(self) -> None:
        """Write our table."""
        self.done.append(("rules",))

    def take_rules_as_they_are(self) -> None:
        """Take note of them."""


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The settings of the kernel; those that are not here do not exist."""
    found: dict[str, str] = {}
    monkeypatch.setattr(sysctl, "read", found.get)
    monkeypatch.setattr(sysctl, "write", found.__setitem__)
    return found


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of day, in one element."""
    time = [1_000_000.0]
    monkeypatch.setattr(damage_module, "time", SimpleNamespace(time=lambda: time[0]))
    return time


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings and errors."""
    lines: list[str] = []
    monkeypatch.setattr(log, "warn", lines.append)
    monkeypatch.setattr(log, "error", lines.append)
    return lines


def wanted(**more: object) -> NicWanted:
    """Return a request for the interface."""
    return NicWanted(name="tap3", alias=TAP.alias, lladdr=bytes(6)).replace(**more)


def repaired(host: Host) -> tuple[Damages, list[str]]:
    """Repair a network.  Return what is said about the interface."""
    network: Any = host
    damages = Damages(network)
    damages.repair()
    return damages, [damage.text for damage in damages.of(host.nic)]


def test_an_intact_network() -> None:
    """Nothing is done."""
    host = Host(wanted(host4=HOST4), TAP)

    assert repaired(host)[1] == []
    assert host.done == []


LAN = SwitchRequest(interface="br0", alias="switch1-lan")


@pytest.mark.parametrize(
    ("bridge", "switch", "said"),
    [
        (None, LAN, f"bridge br0 was deleted {BY}: it was made again"),
        (BRIDGE.replace(up=False), LAN, f"bridge br0 was switched off {BY}: it was switched on again"),
        (BRIDGE.replace(up=False), LAN.replace(up=False), None),
        (BRIDGE.replace(up=False, alias="mine"), LAN, None),
        (BRIDGE, LAN.replace(rdomain=9), f"bridge br0 was taken out of rdomain 9 {BY}: it was put back"),
        (BRIDGE.replace(master=VRF.index), LAN.replace(rdomain=9), None),
        (BRIDGE, LAN, None),
    ],
)
def test_bridges(bridge: Link | None, switch: SwitchRequest, said: str | None) -> None:
    """Those of others are left alone."""
    links = [each for each in (bridge, VRF, TAP.replace(master=BRIDGE.index)) if each is not None]
    host = Host(wanted(bridge="br0"), *links, switch=switch)

    assert repaired(host)[1] == ([said] if said else [])
    assert host.done == ([("bridge", "br0")] if said else [])


@pytest.mark.parametrize(
    ("tap", "more", "done", "said"),
    [
        (TAP.replace(up=False), {}, [("up", "tap3", True)], f"tap3 was switched off {BY}: it was switched on again"),
        (TAP.replace(up=False), {"up": False}, [], None),
        (TAP, {"bridge": "br0"}, [("into", "tap3", "br0")], f"tap3 was taken out of br0 {BY}: it was put back"),
        (TAP, {"rdomain": 9}, [("into", "tap3", "vrf9")], f"tap3 was taken out of vrf9 {BY}: it was put back"),
        (TAP.replace(master=5), {"rdomain": 9}, [], None),
        (TAP.replace(master=4), {"bridge": "br0"}, [], None),
    ],
)
def test_taps(tap: Link, more: dict[str, object], done: list[tuple[object, ...]], said: str | None) -> None:
    """They are put back where they were."""
    host = Host(wanted(**more), tap, BRIDGE, VRF, switch=LAN)

    assert repaired(host)[1] == ([said] if said else [])
    assert host.done == done


def test_a_removed_address_is_added_again() -> None:
    """With its length."""
    host = Host(wanted(host4=HOST4), TAP)
    host.addressed = [(TAP.index + 1, HOST4)]

    assert repaired(host)[1] == [f"100.64.3.2 was removed from tap3 {BY}: it was added again"]
    assert host.done == [("address", "tap3", HOST4, 31)]


@pytest.mark.parametrize(
    ("links", "said"),
    [
        ((BRIDGE,), f"tap3 was deleted {BY}: the next start of the VM makes it again"),
        (
            (TAP.replace(name="mine", master=4), BRIDGE),
            f"tap3 was renamed to mine {BY}: the next start of the VM repairs that",
        ),
        (
            (TAP.replace(master=8), BRIDGE, BRIDGE.replace(index=8, name="br8")),
            f"tap3 was put into br8 instead of br0 {BY}: the next start of the VM repairs that",
        ),
    ],
)
def test_what_cannot_be_repaired_is_shown_as_long_as_it_lasts(
    links: tuple[Link, ...], said: str, now: list[float], logged: list[str]
) -> None:
    """It is logged once."""
    host = Host(wanted(bridge="br0"), *links, switch=LAN)
    damages, first = repaired(host)
    assert first == [said]

    now[0] += 10 * REPAIRED_S
    damages.repair()
    assert [damage.text for damage in damages.of(host.nic)] == [said]
    assert logged == [said]
    host.there = {link.index: link for link in (TAP.replace(master=4), BRIDGE)}
    damages.repair()

    assert damages.of(host.nic) == []


def test_settings(settings: dict[str, str]) -> None:
    """A setting that the kernel lacks is none."""
    settings |= {"ipv6/conf/tap3/accept_ra": "2", "ipv6/conf/tap3/disable_ipv6": "1", "br0/accept_ra": "1"}
    host = Host(wanted(bridge="br0"), TAP.replace(master=4), BRIDGE, switch=LAN)

    assert repaired(host)[1] == [
        f"net/ipv6/conf/tap3/accept_ra was changed {BY}: it is 0 again",
        f"net/br0/accept_ra was changed {BY}: it is 0 again",
    ]
    assert settings == {"ipv6/conf/tap3/accept_ra": "0", "ipv6/conf/tap3/disable_ipv6": "1", "br0/accept_ra": "0"}


def test_forwarding() -> None:
    """It concerns the interfaces with networks."""
    host = Host(wanted(host4=HOST4), TAP)
    host.off = ["IPv4", "IPv6"]

    assert repaired(host)[1] == [
        f"{words} forwarding was switched off {BY}: it was switched on again" for words in ("IPv6", "IPv4")
    ]
    assert host.done == [("forward",)]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (None, f"the nftables table inet vmd was removed {BY}: it was written again"),
        (["a"], f"rules or elements of the nftables table inet vmd (a) were deleted {BY}: it was written again"),
        (
            [str(number) for number in range(NAMED_MAX)],
            f"rules or elements of the nftables table inet vmd (0, 1, 2, 3) were deleted {BY}: it was written again",
        ),
        (
            [str(number) for number in range(NAMED_MAX + 1)],
            f"rules or elements of the nftables table inet vmd (0, 1, 2, 3 and more) were deleted {BY}"
            ": it was written again",
        ),
    ],
)
def test_rules(lost: list[str] | None, said: str) -> None:
    """The first chains and sets are named."""
    host = Host(wanted(), TAP)
    host.lost = lost

    assert repaired(host)[1] == [said]
    assert host.done == [("rules",)]


def test_rules_that_are_not_needed_any_more() -> None:
    """They were for a firewall that is gone, too."""
    host = Host(wanted(), TAP)
    host.lost, host.has_table = None, False

    assert repaired(host)[1] == []


def test_filters() -> None:
    """Those of other taps do not concern this one."""
    host = Host(wanted(), TAP)
    host.filtered = ["tap4", "tap3"]
    damages, said = repaired(host)

    assert said == [f"filters on tap3 were removed {BY}: they were laid again"]
    assert len(damages.found) == 2


def test_repaired_damage_is_shown_for_a_while(now: list[float], logged: list[str]) -> None:
    """Two programs may undo each other's work: the same damage is logged now and then."""
    host = Host(wanted(), TAP.replace(up=False))
    damages, _ = repaired(host)
    for passed_s, lines in ((AGAIN_S - 1, 1), (1.0, 2), (1.0, 2)):
        now[0] += passed_s
        damages.repair()
        assert len(logged) == lines
        assert len(damages.of(host.nic)) == 1

    now[0] += REPAIRED_S - 2
    assert len(damages.of(host.nic)) == 1
    now[0] += 2
    assert damages.of(host.nic) == []


def test_one_failure_does_not_keep_others_from_being_repaired(logged: list[str]) -> None:
    """It is logged."""
    host = Host(wanted(), TAP)
    host.filtered = ["tap3"]

    def fail() -> list[Link]:
        raise OperatorError(errno.EIO, "no list")

    host.links.all = fail

    assert len(repaired(host)[1]) == 1
    assert logged[:2] == ["no list", "no list"]


def test_damage_goes_with_its_interface() -> None:
    """Damage that was repaired is still shown: it says what has happened to the bridge."""
    host = Host(wanted(bridge="br0"), BRIDGE.replace(up=False), switch=LAN)
    damages, said = repaired(host)
    assert len(said) == 2

    damages.forget(["tap4"])
    assert len(damages.of(host.nic)) == 2
    damages.forget(["tap3", "br0"])

    assert [damage.lasting for damage in damages.of(host.nic)] == [False]


def test_without_vms_nothing_is_looked_at(logged: list[str]) -> None:
    """There is nothing to repair."""
    host = Host(wanted())
    host.nics.clear()

    assert repaired(host)[1] == []
    assert logged == []
