"""How answers and failures of pyroute2 are handled, without netlink."""

import errno
import ipaddress
import socket
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from pyroute2.netlink import NLM_F_DUMP_INTR
from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkDumpInterrupted, NetlinkError

from vmd.errors import HostError
from vmd.priv.ifconfig import NO_GROUP, RTPROT_OURS, UNFINISHED, Links, Route, absent_is_fine, listed, trying
from vmd.priv.lists import DUMPS_MAX, Link

Answer = list[int] | Exception


def dump(*answers: Answer) -> Callable[[], list[dict[str, Any]]]:
    """Return a function that lists messages with these flags, or fails: one answer for each call."""
    left = list(answers)

    def listing() -> list[dict[str, Any]]:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [{"header": {"flags": flags}} for flags in answer]

    return listing


@pytest.mark.parametrize("broken", [[2, 2 | NLM_F_DUMP_INTR], NetlinkDumpInterrupted()], ids=["flag", "exception"])
def test_a_list_that_others_changed_is_read_again(broken: Answer) -> None:
    """An interface may be missing in it, and a bridge in use may look unused."""
    assert len(listed("list interfaces", dump(broken, broken, [2, 2, 2]))) == 3


def test_a_list_that_changes_each_time_is_given_up() -> None:
    """The list is not used."""
    with pytest.raises(HostError, match="list interfaces while others change them") as failed:
        listed("list interfaces", dump(*[[NLM_F_DUMP_INTR]] * DUMPS_MAX))

    assert failed.value.number == errno.EAGAIN


def test_a_list_that_is_refused_is_not_read_again() -> None:
    """The kernel's error says why."""
    with pytest.raises(HostError) as failed:
        listed("list routes", dump(NetlinkError(errno.EPERM)))

    assert failed.value.number == errno.EPERM


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NetlinkError(errno.EBUSY), errno.EBUSY),
        (NetlinkDecodeError(ValueError("nonsense")), errno.EPROTO),
        (TimeoutError(errno.ETIMEDOUT, "late"), errno.ETIMEDOUT),
    ],
    ids=["kernel", "nonsense", "late"],
)
def test_every_failure_is_a_host_error(error: Exception, code: int) -> None:
    """pyroute2 raises several kinds of exceptions, and priv only this one."""
    with pytest.raises(HostError, match="make bridge br0") as failed, trying("make bridge br0"):
        raise error

    assert failed.value.number == code


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ESRCH, errno.ENOENT])
def test_deleting_what_does_not_exist_is_no_error(code: int) -> None:
    """The kernel or another program may have deleted it."""
    with absent_is_fine():
        raise NetlinkError(code)


def test_deleting_without_permission_is_an_error() -> None:
    """Only missing objects are ignored."""
    with pytest.raises(NetlinkError), absent_is_fine():
        raise NetlinkError(errno.EPERM)


# --- what is asked of the kernel ----------------------------------------------------------------------------------


class Attributes(dict[str, Any]):
    """A message of pyroute2: fields, and attributes."""

    def __init__(self, fields: Mapping[str, object] | None = None, **attributes: object) -> None:
        super().__init__(fields or {}, header={"flags": 0})
        self.attributes = attributes

    def get_attr(self, name: str) -> Any:  # noqa: ANN401 - as pyroute2 has it
        """Return an attribute, or None."""
        return self.attributes.get(name)


class Asked:
    """pyroute2's socket.  It records what is asked, and fails where the test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.fails: dict[str, int] = {}
        self.routes: list[Attributes] = []
        self.rules: list[Attributes] = []

    def _ask(self, what: str, given: Mapping[str, object]) -> list[Attributes]:
        self.calls.append((what, given))
        if what in self.fails:
            raise NetlinkError(self.fails[what])
        return self.routes if what == "route get" else []

    def link(self, verb: str, **given: object) -> list[Attributes]:
        """Change an interface."""
        return self._ask(f"link {verb}", given)

    def addr(self, verb: str, **given: object) -> list[Attributes]:
        """Change an address."""
        return self._ask(f"addr {verb}", given)

    def route(self, verb: str, **given: object) -> list[Attributes]:
        """Change or look up a route."""
        return self._ask(f"route {verb}", given)

    def get_rules(self, family: int) -> list[Attributes]:
        """Return routing rules."""
        return self.rules if family == socket.AF_INET else []

    def get_routes(self, family: int, proto: int) -> list[Attributes]:
        """Return routes, some of which another program has made."""
        assert proto == RTPROT_OURS
        return self.routes if family == socket.AF_INET else []


LLADDR = bytes.fromhex("0200000000aa")
BRIDGE = Link(index=4, name="br0", kind="bridge", alias="", master=0, mtu=1500, lladdr=LLADDR, up=True)
TAP = BRIDGE.replace(index=7, name="tap3", kind="tun", master=4)


class Network:
    """`Links` without a kernel."""

    def __init__(self, *there: Link) -> None:
        self.asked = Asked()
        made: Any = Links.__new__(Links)
        made.netlink = self.asked
        by_name = {link.name: link for link in there}
        made.lists = SimpleNamespace(links=lambda: list(there), link=by_name.get)
        self.links: Links = made


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        (lambda links: links.set_alias(TAP, "a"), {"ifalias": "a"}),
        (lambda links: links.set_group(TAP, 5), {"group": 5}),
        (lambda links: links.set_lladdr(TAP, bytes(5) + b"\xa1"), {"address": "00:00:00:00:00:a1"}),
        (lambda links: links.set_mtu(TAP, 9000), {"mtu": 9000}),
        (lambda links: links.set_master(TAP, BRIDGE), {"master": 4}),
        (lambda links: links.leave_master(TAP), {"master": 0}),
        (lambda links: links.set_up(TAP, up=True), {"state": "up"}),
        (lambda links: links.set_up(TAP, up=False), {"state": "down"}),
    ],
)
def test_one_interface_is_changed(change: Callable[[Links], None], asked: dict[str, object]) -> None:
    """It is given by its index: another program may have renamed it.  The error names the interface."""
    network = Network()
    change(network.links)
    assert network.asked.calls == [("link set", {"index": 7, **asked})]

    network.asked.fails["link set"] = errno.EPERM
    with pytest.raises(HostError, match="tap3") as error:
        change(network.links)
    assert error.value.number == errno.EPERM


def test_a_bridge_is_marked_until_it_has_its_alias() -> None:
    """A priv that is killed meanwhile leaves it with the mark.  Its address is set, so that it stays."""
    network = Network(BRIDGE)

    assert network.links.add_bridge("br0", "switch1-lan") == BRIDGE
    assert network.asked.calls == [
        ("link add", {"ifname": "br0", "kind": "bridge", "group": UNFINISHED}),
        ("link set", {"index": 4, "ifalias": "switch1-lan", "group": NO_GROUP}),
        ("link set", {"index": 4, "address": "02:00:00:00:00:aa"}),
    ]


def test_a_vrf_has_its_table() -> None:
    """It is marked in the same way."""
    network = Network(BRIDGE.replace(name="vrf5", kind="vrf"))

    network.links.add_vrf("vrf5", 5, "rdomain5")

    assert network.asked.calls[0] == (
        "link add", {"ifname": "vrf5", "kind": "vrf", "vrf_table": 5, "group": UNFINISHED},
    )  # fmt: skip


def test_nothing_is_left_of_a_bridge_that_cannot_be_finished() -> None:
    """It has no alias, so nothing else would remove it before the next start."""
    network = Network(BRIDGE)
    network.asked.fails["link set"] = errno.EPERM

    with pytest.raises(HostError, match="describe interface br0"):
        network.links.add_bridge("br0", "switch1-lan")

    assert network.asked.calls[-1] == ("link del", {"index": 4})


@pytest.mark.parametrize(
    ("address", "more"),
    [
        ("10.0.0.1", {}),
        ("fd00::1", {"family": socket.AF_INET6, "flags": 2, "scope": 0}),
        ("fe80::1", {"family": socket.AF_INET6, "flags": 2, "scope": 253}),
    ],
)
def test_an_address_is_added(address: str, more: dict[str, object]) -> None:
    """An IPv6 address can be used at once, and has the scope of its kind."""
    network = Network()

    network.links.add_address(TAP, ipaddress.ip_address(address).packed, 31)

    assert network.asked.calls == [("addr add", {"index": 7, "address": address, "prefixlen": 31, **more})]


@pytest.mark.parametrize(
    ("number", "is_error"),
    [(errno.EADDRNOTAVAIL, False), (errno.ENODEV, False), (errno.ESRCH, False), (errno.EPERM, True)],
)
def test_an_address_may_be_gone(number: int, is_error: bool) -> None:
    """So may its interface."""
    network = Network()
    network.asked.fails["addr del"] = number

    if is_error:
        with pytest.raises(HostError, match="take address fd00::1/64 from interface tap3"):
            network.links.delete_address(TAP, ipaddress.ip_address("fd00::1").packed, 64)
    else:
        network.links.delete_address(TAP, ipaddress.ip_address("fd00::1").packed, 64)
    given = {"index": 7, "address": "fd00::1", "prefixlen": 64, "family": socket.AF_INET6}
    assert network.asked.calls == [("addr del", given)]


def test_interfaces_are_found() -> None:
    """By name, by index, and by what they belong to."""
    links = Network(BRIDGE, TAP).links

    assert links.get("tap3") == TAP
    assert links.find("tap4") is None
    with pytest.raises(HostError, match="interface tap4") as error:
        links.get("tap4")
    assert error.value.number == errno.ENODEV
    assert links.members(BRIDGE) == [TAP]
    assert (links.name_of(7), links.name_of(9)) == ("tap3", "9")


# --- routes -------------------------------------------------------------------------------------------------------


def test_the_route_to_an_address() -> None:
    """A default route has the network of all addresses."""
    network = Network()
    network.asked.routes = [Attributes({"flags": 0, "dst_len": 8}, RTA_DST="10.0.0.0", RTA_OIF=3)]
    found = network.links.route_to(bytes((10, 1, 2, 3)), inside=5)
    assert found == Route(network=bytes((10, 0, 0, 0)), length=8, index=3)
    asked = {"flags": 0x2000, "dst": "10.1.2.3", "family": socket.AF_INET, "oif": 5}
    assert network.asked.calls == [("route get", asked)]

    network.asked.routes = [Attributes({"flags": 0, "dst_len": 0})]
    assert network.links.route_to(bytes(16)) == Route(network=bytes(16), length=0, index=0)


def test_there_may_be_no_route() -> None:
    """The kernel then reports an error, or only a copy of a route."""
    network = Network()
    assert network.links.route_to(bytes(4)) is None
    network.asked.routes = [Attributes({"flags": 0x200, "dst_len": 32}, RTA_DST="10.0.0.1")]
    assert network.links.route_to(bytes(4)) is None
    network.asked.fails["route get"] = errno.ENETUNREACH
    assert network.links.route_to(bytes(4)) is None


@pytest.mark.parametrize(
    ("rule", "shared"),
    [
        (Attributes({"table": 5}), True),
        (Attributes({"table": 0}, FRA_TABLE=5), True),
        (Attributes({"table": 5}, FRA_TABLE=6), False),
        (Attributes({"table": 6}), False),
        (Attributes({"table": 5}, FRA_IIFNAME="eth0"), False),
        (Attributes({"table": 5}, FRA_OIFNAME="eth0"), False),
        (Attributes({"table": 5}, FRA_L3MDEV=1), False),
    ],
)
def test_a_table_that_the_host_uses(rule: Attributes, shared: bool) -> None:
    """A rule for one interface does not concern the host's own packets."""
    network = Network()
    network.asked.rules = [rule]

    assert network.links.shared_table(5) is shared


def test_a_table_has_an_end() -> None:
    """For both families, with the lowest preference."""
    network = Network()
    network.links.end_table(5)

    assert [(verb, given["dst"], given["table"], given["type"]) for verb, given in network.asked.calls] == [  # type: ignore[index]
        ("route add", "0.0.0.0/0", 5, "unreachable"), ("route add", "::/0", 5, "unreachable"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "is_error"),
    [(errno.EEXIST, False), (errno.EPERM, True), (errno.EAFNOSUPPORT, True), (errno.EOPNOTSUPP, True)],
)
def test_a_table_that_cannot_be_ended(number: int, is_error: bool) -> None:
    """It may have its end already.  A kernel without IPv4 does not run here."""
    network = Network()
    network.asked.fails["route add"] = number

    if is_error:
        with pytest.raises(HostError, match="end routing table 5"):
            network.links.end_table(5)
    else:
        network.links.end_table(5)


@pytest.mark.parametrize(("table", "gone"), [(None, [5, 300]), (5, [5]), (300, [300]), (6, [])])
def test_only_our_routes_are_deleted(table: int | None, gone: list[int]) -> None:
    """Those of others stay, even if the kernel lists them, too."""
    network = Network()
    network.asked.routes = [
        Attributes({"table": 5, "proto": RTPROT_OURS}),
        Attributes({"table": 252, "proto": RTPROT_OURS}, RTA_TABLE=300),
        Attributes({"table": 5, "proto": 3}),
    ]

    network.links.forget_routes(table)

    assert [given["table"] for _verb, given in network.asked.calls] == gone  # type: ignore[index]
