"""The routes of the host, as /proc/net lists them, and warnings about the ranges of local interfaces."""

import ipaddress
from pathlib import Path

import pytest

from vmd.config.model import Config, Globals, NicConfig, Prefix, VmConfig
from vmd.parent.hostroutes import HostRoute, covering, host_routes, overlapping, prefix_warnings

ROUTE = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
wg0\t00000080\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
eth0\t0000000A\t0101A8C0\t0003\t0\t0\t0\t000000FF\t0\t0\t0
*\t0000050A\t00000000\t0201\t0\t0\t0\t0000FFFF\t0\t0\t0
tap0\t02014064\t00000000\t0001\t0\t0\t0\tFEFFFFFF\t0\t0\t0
tap9\t00024064\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""
ROUTE6 = """\
20010db8000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
fd000005000000000000000000000000 30 00000000000000000000000000000000 00 20010db8000000000000000000000002 00000400 00000001 00000000 00000003     eth0
fd000007000000000000000000000000 38 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00450003     eth0
fd420000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     tap0
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 20010db8000000000000000000000002 00000400 00000001 00000000 00000003     eth0
20010db8000000000000000000000001 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000002 00000000 80200001     eth0
ff000000000000000000000000000000 08 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000003 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
"""  # noqa: E501 - as the kernel writes it


def prefix(text: str) -> Prefix:
    """Parse an address range."""
    network = ipaddress.ip_network(text)
    return Prefix(address=network.network_address.packed, length=network.prefixlen)


def route(text: str, interface: str = "eth0") -> HostRoute:
    """Return a route."""
    return HostRoute(network=ipaddress.ip_network(text), interface=interface)


def test_the_routes_that_the_kernel_lists(tmp_path: Path) -> None:
    """Rejected networks, default routes, VPNs' halves of them, link-local routes and our taps are left out."""
    four, six = tmp_path / "route", tmp_path / "ipv6_route"
    four.write_text(ROUTE)
    six.write_text(ROUTE6)

    assert host_routes(str(four), str(six)) == [
        route("192.168.1.0/24"),
        route("10.0.0.0/8"),
        route("100.64.2.0/24", "tap9"),
        route("2001:db8::/64"),
        route("fd00:5::/48"),
        route("fd00:7::/56"),  # announced by a router
    ]
    assert host_routes(str(tmp_path / "none"), str(four)) == []


def test_parts_of_a_default_route(tmp_path: Path) -> None:
    """A VPN has two halves of IPv4, and eighths of IPv6 such as 2000::/3.  Smaller networks are those of hosts."""
    four, six = tmp_path / "route", tmp_path / "ipv6_route"
    heading, _, half, *_ = ROUTE.splitlines()
    quarter = "000000C0".join(half.rsplit("00000080", 1))
    four.write_text("\n".join((heading, half, quarter)))
    line = ROUTE6.splitlines()[0]
    prefixes = [f"20000000{line[8:33]}{length:02x}{line[35:]}" for length in (3, 4)]
    six.write_text("\n".join(prefixes))

    assert host_routes(str(four), str(six)) == [route("128.0.0.0/2", "wg0"), route("2000::/4")]


@pytest.mark.parametrize("length", range(0, len(ROUTE), 7))
def test_a_truncated_list(tmp_path: Path, length: int) -> None:
    """Complete lines count."""
    path = tmp_path / "route"
    path.write_text(ROUTE[:length])
    complete = [route("192.168.1.0/24"), route("10.0.0.0/8"), route("100.64.2.0/24", "tap9")]
    found = host_routes(str(path), str(tmp_path))
    assert found[:-1] == complete[: len(found[:-1])]


def test_networks_that_overlap() -> None:
    """Either network may be the larger one.  IPv4 and IPv6 do not overlap."""
    routes = [route("10.1.0.0/16"), route("10.1.2.0/24"), route("10.2.0.0/16"), route("fd00::/8")]

    assert list(overlapping(ipaddress.ip_network("10.1.2.4/31"), routes)) == routes[:2]
    assert list(overlapping(ipaddress.ip_network("10.0.0.0/8"), routes)) == routes[:3]
    assert list(overlapping(ipaddress.ip_network("::/0"), routes)) == routes[3:]
    edges = [route("10.1.2.0/32"), route("10.1.2.255/32"), route("10.1.1.255/32"), route("10.1.3.0/32")]
    assert list(overlapping(ipaddress.ip_network("10.1.2.0/24"), edges)) == edges[:2]
    assert covering(prefix("10.1.0.0/16"), routes) == routes[0]
    assert covering(prefix("10.0.0.0/15"), routes) is None
    assert covering(None, routes) is None


def test_warnings_about_ranges() -> None:
    """They name the line of vm.conf, unless the range is the default.  Without local interfaces there are none."""
    settings = Globals(
        local_prefix=prefix("192.168.0.0/16"), local_prefix_origin="vm.conf:3", local_inet6_prefix=prefix("fd00:5::/48")
    )
    vm = VmConfig(name="a", nics=(NicConfig(local=True),))
    routes = [route("192.168.1.0/24"), route("10.0.0.0/8"), route("fd00::/8", "wg0")]

    assert prefix_warnings(Config(settings=settings, vms=(vm,)), routes) == [
        "vm.conf:3: local prefix 192.168.0.0/16 overlaps 192.168.1.0/24, which this host reaches by eth0: "
        "VMs get no addresses out of it",
        "local inet6 prefix fd00:5::/48 overlaps fd00::/8, which this host reaches by wg0: "
        "no VM can have a local interface",
    ]
    assert prefix_warnings(Config(settings=settings, vms=(vm.replace(nics=(NicConfig(),)),)), routes) == []
