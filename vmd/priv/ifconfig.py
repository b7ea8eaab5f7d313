"""Network interfaces by netlink: what `ip link`, `ip address` and `ip route` do.

This is the only user of pyroute2 (through `netlink`), whose packets are dictionaries.  Other modules see `Link`
records.  `lists` reads interfaces and addresses.  pyroute2 changes them, and handles routes and routing rules.
"""

import contextlib
import errno
import ipaddress
import socket

from vmd.errors import HostError
from vmd.priv.lists import DUMPS_MAX, Link, Lists
from vmd.priv.netlink import NLM_F_DUMP_INTR, IPRoute, NetlinkDecodeError, NetlinkError
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from typing import Any

RTM_F_CLONED, RTM_F_FIB_MATCH = 0x0200, 0x2000
IFA_F_NODAD = 0x02  # no duplicate address detection: the link leads to one guest only, and need not wait
RT_SCOPE_LINK, RT_SCOPE_UNIVERSE = 253, 0
RTPROT_OURS = 0x76  # marks routes that priv has made, so that the next priv can remove them
# Group of a bridge or VRF that has no alias yet.  The kernel takes a group when it makes an interface, but no alias.
UNFINISHED = int.from_bytes(b"vmd", "big")
NO_GROUP = 0
LAST_RESORT = 4278198272  # metric of the unreachable route that ends a VRF's table (Documentation/networking/vrf.rst)


class Route(Record):
    """A route of the host: the packed address and prefix length of a network, and the index of an interface."""

    network: bytes
    length: int
    index: int


class Links:
    """The host's interfaces.  All methods except `route_to` raise HostError, which says what was tried."""

    def __init__(self) -> None:
        try:
            self.netlink = IPRoute()
            self.lists = Lists()
        except OSError as error:
            raise HostError("open a netlink socket", error) from error

    def all(self) -> list[Link]:
        """Return all interfaces.  Raises HostError."""
        return self.lists.links()

    def find(self, name: str) -> Link | None:
        """Return the interface of this name, or None.  Raises HostError."""
        return self.lists.link(name)

    def get(self, name: str) -> Link:
        """Return the interface of this name.  Raises HostError(ENODEV) if there is none."""
        link = self.find(name)
        if link is None:
            raise HostError(f"interface {name}", errno.ENODEV)
        return link

    def members(self, master: Link) -> list[Link]:
        """Return the interfaces that belong to a bridge or VRF."""
        return [link for link in self.all() if link.master == master.index]

    def add_bridge(self, name: str, alias: str) -> Link:
        """Make a bridge.  Its link-layer address is set, so that it does not change to the lowest one of its ports."""
        with trying(f"make bridge {name}"):
            self.netlink.link("add", ifname=name, kind="bridge", group=UNFINISHED)
        link = self._finish(name, alias)
        with trying(f"give bridge {name} its address"), self.or_none(link):
            self.netlink.link("set", index=link.index, address=link.lladdr.hex(":"))
        return link

    def add_vrf(self, name: str, table: int, alias: str) -> Link:
        """Make a VRF device."""
        with trying(f"make VRF {name}"):
            self.netlink.link("add", ifname=name, kind="vrf", vrf_table=table, group=UNFINISHED)
        return self._finish(name, alias)

    def _finish(self, name: str, alias: str) -> Link:
        link = self.get(name)
        with trying(f"describe interface {name}"), self.or_none(link):
            self.netlink.link("set", index=link.index, ifalias=alias, group=NO_GROUP)
        return self.get(name)

    @contextlib.contextmanager
    def or_none(self, link: Link) -> "Iterator[None]":
        """Delete an interface that was just made if the code inside fails."""
        try:
            yield
        except Exception:
            with contextlib.suppress(HostError):
                self.delete(link)
            raise

    def delete(self, link: Link) -> None:
        """Delete an interface, if it still exists."""
        with trying(f"delete interface {link.name}"), absent_is_fine():
            self.netlink.link("del", index=link.index)

    def set_alias(self, link: Link, alias: str) -> None:
        """Set the alias of an interface."""
        with trying(f"describe interface {link.name}"):
            self.netlink.link("set", index=link.index, ifalias=alias)

    def set_group(self, link: Link, group: int) -> None:
        """Set the group of an interface; it has one group only."""
        with trying(f"put interface {link.name} into group {group}"):
            self.netlink.link("set", index=link.index, group=group)

    def set_lladdr(self, link: Link, lladdr: bytes) -> None:
        """Set the link-layer address of an interface."""
        with trying(f"give interface {link.name} the address {lladdr.hex(':')}"):
            self.netlink.link("set", index=link.index, address=lladdr.hex(":"))

    def set_mtu(self, link: Link, mtu: int) -> None:
        """Set the MTU of an interface."""
        with trying(f"set the mtu of interface {link.name} to {mtu}"):
            self.netlink.link("set", index=link.index, mtu=mtu)

    def set_master(self, link: Link, master: Link) -> None:
        """Make an interface a port of a bridge, or a member of a VRF."""
        with trying(f"add interface {link.name} to {master.name}"):
            self.netlink.link("set", index=link.index, master=master.index)

    def leave_master(self, link: Link) -> None:
        """Take an interface out of its bridge or VRF."""
        with trying(f"take interface {link.name} out of its bridge or VRF"):
            self.netlink.link("set", index=link.index, master=0)

    def set_up(self, link: Link, *, up: bool) -> None:
        """Switch an interface on or off."""
        with trying(f"switch interface {link.name} {'on' if up else 'off'}"):
            self.netlink.link("set", index=link.index, state="up" if up else "down")

    def add_address(self, link: Link, address: bytes, length: int) -> None:
        """Add an address to an interface.  It can be used at once."""
        text = str(ipaddress.ip_address(address))
        options: dict[str, Any] = {}
        if len(address) == 16:
            options = {"family": socket.AF_INET6, "flags": IFA_F_NODAD}
            link_local = ipaddress.IPv6Address(address).is_link_local
            options["scope"] = RT_SCOPE_LINK if link_local else RT_SCOPE_UNIVERSE
        with trying(f"give interface {link.name} address {text}/{length}"):
            self.netlink.addr("add", index=link.index, address=text, prefixlen=length, **options)

    def delete_address(self, link: Link, address: bytes, length: int) -> None:
        """Remove an address from an interface, if the interface has it."""
        text = str(ipaddress.ip_address(address))
        family = {"family": socket.AF_INET6} if len(address) == 16 else {}
        try:
            with trying(f"take address {text}/{length} from interface {link.name}"), absent_is_fine():
                self.netlink.addr("del", index=link.index, address=text, prefixlen=length, **family)
        except HostError as error:
            if error.number != errno.EADDRNOTAVAIL:
                raise

    def addresses(self, besides: "Collection[int]" = ()) -> list[tuple[int, bytes]]:
        """Return (index of the interface, packed address) of all addresses, except those of interfaces in `besides`."""
        return self.lists.addresses(besides)

    def route_to(self, address: bytes, inside: int = 0) -> Route | None:
        """Return the route by which the host would reach an address.  Routing rules and all tables are used.

        `inside` is the index of a VRF, or 0.  None if there is no route, or the kernel does not tell it.
        """
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        wanted: dict[str, Any] = {"dst": str(ipaddress.ip_address(address)), "family": family}
        if inside:
            wanted["oif"] = inside
        try:
            with trying(f"look up the route to {wanted['dst']}"):
                found = list(self.netlink.route("get", flags=RTM_F_FIB_MATCH, **wanted))
        except HostError:
            return None  # the kernel reports an unreachable address as an error
        if not found or found[0]["flags"] & RTM_F_CLONED:  # not the route itself: Linux before 4.13, IPv6 before 5.6
            return None
        network = found[0].get_attr("RTA_DST")
        return Route(
            network=ipaddress.ip_address(network).packed if network else bytes(len(address)),
            length=found[0]["dst_len"],
            index=found[0].get_attr("RTA_OIF") or 0,
        )

    def name_of(self, index: int) -> str:
        """Return the name of an interface; its index as text if it is gone."""
        return next((link.name for link in self.all() if link.index == index), str(index))

    def shared_table(self, table: int) -> bool:
        """Return whether a routing rule sends packets of any interface to this table."""
        rules = [
            rule
            for family in (socket.AF_INET, socket.AF_INET6)
            for rule in listed("list routing rules", self.netlink.get_rules, family=family)
        ]
        return any(
            (rule.get_attr("FRA_TABLE") or rule["table"]) == table
            and not (rule.get_attr("FRA_IIFNAME") or rule.get_attr("FRA_OIFNAME") or rule.get_attr("FRA_L3MDEV"))
            for rule in rules
        )

    def end_table(self, table: int) -> None:
        """Add an unreachable default route to a routing table, so that the kernel does not go on to the next table."""
        for family, everything in ((socket.AF_INET, "0.0.0.0/0"), (socket.AF_INET6, "::/0")):
            try:
                with trying(f"end routing table {table}"):
                    self.netlink.route(
                        "add", family=family, dst=everything, table=table, type="unreachable",
                        priority=LAST_RESORT, proto=RTPROT_OURS,
                    )  # fmt: skip
            except HostError as error:
                no_family = family == socket.AF_INET6 and error.number in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP)
                if error.number != errno.EEXIST and not no_family:
                    raise

    def forget_routes(self, table: int | None = None) -> None:
        """Delete the routes of `end_table`, in one table or in all."""
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in listed("list routes", self.netlink.get_routes, family=family, proto=RTPROT_OURS):
                where = route.get_attr("RTA_TABLE") or route["table"]
                if route["proto"] != RTPROT_OURS or table not in (None, where):
                    continue
                with trying(f"delete the end of routing table {where}"), absent_is_fine():
                    self.netlink.route(
                        "del", family=family, dst="0.0.0.0/0" if family == socket.AF_INET else "::/0", table=where,
                        type="unreachable", priority=LAST_RESORT, proto=RTPROT_OURS,
                    )  # fmt: skip

    def close(self) -> None:
        """Close the sockets."""
        self.netlink.close()
        self.lists.close()


def listed(what: str, dump: "Callable[..., Iterable[Any]]", **wanted: object) -> "list[Any]":
    """Return a complete list of the kernel.  It is read again if the kernel reports a change during the reading.

    Raises HostError.
    """
    for _ in range(DUMPS_MAX):
        with trying(what):
            try:
                found = list(dump(**wanted))
            except NetlinkError as error:
                if error.code > 0:
                    raise
                continue  # some versions of pyroute2 raise this for a change
        if not any(message["header"]["flags"] & NLM_F_DUMP_INTR for message in found):
            return found
    raise HostError(f"{what} while others change them", errno.EAGAIN)


@contextlib.contextmanager
def trying(what: str) -> "Iterator[None]":
    """Turn exceptions of pyroute2 into HostError; `what` names what was tried."""
    try:
        yield
    except NetlinkError as error:
        raise HostError(what, error.code) from error
    except NetlinkDecodeError as error:
        raise HostError(what, errno.EPROTO) from error
    except OSError as error:
        raise HostError(what, error) from error


@contextlib.contextmanager
def absent_is_fine() -> "Iterator[None]":
    """Ignore the error of deleting something that is gone."""
    try:
        yield
    except NetlinkError as error:
        if error.code not in (errno.ENODEV, errno.ESRCH, errno.ENOENT):
            raise
