"""Debian's stock kernel on interfaces whose frames the host's kernel moves: everything works as with the process."""

import contextlib
import ipaddress
from functools import partial
from pathlib import Path

import pytest

from tests.l1.test_network import (
    ADDRESSES,
    BOOT_S,
    HOST,
    NAME,
    RESOLVER,
    SINK_PORT,
    SMALL,
    WORLD,
    WORLD6,
    Guest,
    block,
    bridge_address,
    check_empty,
    eui64,
    join,
)
from tests.l1.test_vhost_vm import by_kernel
from tests.support import servers
from tests.support.hostnet import NetDaemon, load_modules
from tests.support.linux import LinuxGuest
from tests.support.network import Network
from tests.support.shell import Shell

pytestmark = [pytest.mark.l1, pytest.mark.root, pytest.mark.deep, pytest.mark.timeout(900)]

VM, NUMBER = "fast", 1
LOCAL, LAN = 0, 1  # the guest's interfaces eth0 and eth1
OTHER = "02:00:00:00:00:09"
CONF = 'local inet6 prefix fd42:1:2::/48\nswitch "lan" {\n    interface br0\n}\n'


def test_a_stock_kernel(linux: LinuxGuest, tmp_path: Path) -> None:
    """DHCP, advertisements, NAT, names, segments, a locked address and a reloaded driver work, all by the kernel."""
    load_modules()
    nics = ("local interface { vhost }", 'interface { switch "lan", locked lladdr, vhost }')
    with contextlib.ExitStack() as stack:
        host, world = stack.enter_context(Network()), stack.enter_context(Network())
        stack.callback(lambda: check_empty(host))
        join(host, world)
        stack.enter_context(servers.names(world, RESOLVER, {NAME: ADDRESSES}))
        stack.enter_context(servers.files(world, WORLD, {str(SMALL): partial(servers.noise, SMALL)}))
        stack.enter_context(servers.sink(world, WORLD, SINK_PORT))
        vmd = NetDaemon(tmp_path, host, CONF + block(VM, linux, "", *nics), name_servers=[RESOLVER])
        stack.enter_context(vmd)
        vmd.must("start", VM)
        host.run("ip", "address", "add", f"{bridge_address('eth1')}/24", "dev", "br0")
        guest = Guest(vmd, VM, NUMBER, Shell(stack.enter_context(vmd.attached(VM)), BOOT_S))

        has_the_network(guest)
        is_held_to_its_address(guest)
        for options in ("csum=0 gso=0", ""):
            guest.run(f"rmmod virtio_net && insmod /modules/virtio_net.ko {options}")
            has_the_network(guest)

        assert "process moves" not in vmd.log


def moved_by_kernel(guest: Guest) -> None:
    """Check that the kernel still moves the frames of both interfaces."""
    assert all(by_kernel(guest.vmd, VM, index) for index in (LOCAL, LAN))


def has_the_network(guest: Guest) -> None:
    """Check addresses of both families, and reach the host, the world and the switch with frames of all sizes."""
    nic, acks = guest.nic(LOCAL), guest.counters(LOCAL)["dhcp_acks"]
    leased = guest.leases()
    assert leased.startswith(f"dhcp: eth0 {nic['guest4']}/31 router {nic['host4']} dns {RESOLVER} ")
    assert guest.counters(LOCAL)["dhcp_acks"] == acks + 1
    guest.wait_for("ip -6 address show dev eth0 | grep -q 'scope global'")
    guest.wait_for("! ip -6 address show dev eth0 | grep -q tentative")
    prefix = str(nic["prefix6"])
    assert eui64(prefix, str(nic["lladdr"])) in guest.run("ip -6 address show dev eth0")
    guest.run(f"ip link set eth1 up && ip address add {guest.address('eth1')}/24 dev eth1")
    for address in (str(nic["host4"]), HOST, WORLD, bridge_address("eth1")):
        guest.pings(address)
    for address in (str(ipaddress.ip_network(prefix)[1]), WORLD6):
        guest.pings(address, "-6")
    guest.fetches(SMALL, NAME)
    moved_by_kernel(guest)


def is_held_to_its_address(guest: Guest) -> None:
    """Change the link-layer address of the locked interface.  No frame passes until the address is right again."""
    own, address = str(guest.nic(LAN)["lladdr"]), bridge_address("eth1")
    guest.pings(address)
    before = guest.counters(LAN)

    guest.run(f"ip link set eth1 down; ip link set eth1 address {OTHER}; ip link set eth1 up")
    said, ended = guest.tried(f"ping -c 2 -W 1 -i 0.2 {address}")
    after = guest.counters(LAN)
    guest.run(f"ip link set eth1 down; ip link set eth1 address {own}; ip link set eth1 up")

    assert (ended, " 100% packet loss" in said) == (1, True)
    assert after["tx_spoofed"] - before["tx_spoofed"] >= 2
    moved_by_kernel(guest)
    guest.pings(address)
