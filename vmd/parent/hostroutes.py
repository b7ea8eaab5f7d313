"""The networks that the host reaches (proc_net(5), route and ipv6_route).  No guest gets an address of one.

Only the main routing table is read.  That is enough to choose addresses and to warn early.  priv asks the kernel about
each address before it sets it.
"""

import ipaddress
import re

from vmd.config.model import DEFAULT_ROUTES, Config, Prefix
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

ROUTES4, ROUTES6 = "/proc/net/route", "/proc/net/ipv6_route"
READ_MAX = 1 << 20  # bytes; an internet router has more, and is read in part
RTF_UP, RTF_REJECT, RTF_ANYCAST, RTF_LOCAL = 0x0001, 0x0200, 0x0010_0000, 0x8000_0000
LINK_LOCAL_AND_MULTICAST = (ipaddress.IPv6Network("fe80::/10"), ipaddress.IPv6Network("ff00::/8"))
TAP = re.compile(r"tap[0-9]+")
ON_TAP4, ON_TAP6 = "FEFFFFFF", "40"  # masks of 31 and 64 bits: of networks on our taps, which `plans` knows

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class HostRoute(Record):
    """A network that the host reaches, and the interface of its route."""

    network: IpNetwork
    interface: str


def host_routes(path4: str = ROUTES4, path6: str = ROUTES6) -> list[HostRoute]:
    """Return the networks of the host's routes, without default routes; none if the files cannot be read."""
    return [
        route
        for route in (*parsed(path4, parse4), *parsed(path6, parse6))
        if route.network.prefixlen > DEFAULT_ROUTES[len(route.network.network_address.packed)]
    ]


def parsed(path: str, parse: "Callable[[Sequence[str]], HostRoute | None]") -> "Iterator[HostRoute]":
    """Yield the routes of the lines of a file; lines without one are left out."""
    try:
        with open(path, "rb") as file:
            lines = file.read(READ_MAX).decode("ascii", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            route = parse(line.split())
        except (ValueError, IndexError):  # the heading, or a line that READ_MAX has cut
            continue
        if route is not None:
            yield route


def parse4(words: "Sequence[str]") -> HostRoute | None:
    """Return the route of a line of /proc/net/route, if it counts.  Raises ValueError or IndexError if it has none."""
    interface, destination, _gateway, flags = words[:4]
    if words[7] == ON_TAP4 and TAP.fullmatch(interface):  # fast path: most routes, where there are many VMs
        return None
    address, mask = (int(word, 16).to_bytes(4, "little") for word in (destination, words[7]))
    if int(flags, 16) & (RTF_UP | RTF_REJECT) != RTF_UP:
        return None
    length = int.from_bytes(mask, "big").bit_count()
    return HostRoute(network=ipaddress.IPv4Network((address, length)), interface=interface)


def parse6(words: "Sequence[str]") -> HostRoute | None:
    """Return the route of a line of /proc/net/ipv6_route, as `parse4`.  Raises ValueError or IndexError."""
    flags, interface = int(words[8], 16), words[9]
    if words[1] == ON_TAP6 and TAP.fullmatch(interface):
        return None
    network = ipaddress.IPv6Network((bytes.fromhex(words[0]), int(words[1], 16)))
    if flags & (RTF_UP | RTF_REJECT | RTF_ANYCAST | RTF_LOCAL) != RTF_UP or interface == "lo":
        return None
    if any(network.subnet_of(each) for each in LINK_LOCAL_AND_MULTICAST):
        return None
    return HostRoute(network=network, interface=interface)


def network_of(address: bytes, length: int) -> IpNetwork:
    """Return the network that an address is in."""
    return ipaddress.ip_network((address, length), strict=False)


def overlapping(network: IpNetwork, routes: "Iterable[HostRoute]") -> "Iterator[HostRoute]":
    """Yield the routes whose network overlaps this one."""
    first, last = int(network.network_address), int(network.broadcast_address)
    for route in routes:
        other = route.network
        if other.version != network.version:
            continue
        if int(other.network_address) <= last and first <= int(other.broadcast_address):
            yield route


def covering(prefix: Prefix | None, routes: "Iterable[HostRoute]") -> HostRoute | None:
    """Return a route whose network has every address of a range; None if there is none."""
    if prefix is None:
        return None
    inside = network_of(prefix.address, prefix.length)
    found = overlapping(inside, routes)
    return next((route for route in found if route.network.prefixlen <= inside.prefixlen), None)


def prefix_warnings(config: Config, routes: "Sequence[HostRoute]") -> list[str]:
    """Return a sentence for each network of the host that overlaps a range for local interfaces."""
    if not any(nic.local for vm in config.vms for nic in vm.nics):
        return []
    settings = config.settings
    ranges = (
        ("local prefix", settings.local_prefix, settings.local_prefix_origin),
        ("local inet6 prefix", settings.local_inet6_prefix, settings.local_inet6_prefix_origin),
    )
    found = []
    for what, prefix, origin in ranges:
        if prefix is None:
            continue
        network = network_of(prefix.address, prefix.length)
        where = f"{origin}: " if origin else ""
        for route in overlapping(network, routes):
            covers = route.network.prefixlen <= network.prefixlen
            outcome = "no VM can have a local interface" if covers else "VMs get no addresses out of it"
            sentence = f"{what} {network} overlaps {route.network}, which this host reaches by {route.interface}"
            found.append(f"{where}{sentence}: {outcome}")
    return found
