"""Guests' packets that other firewalls of the host drop, found by counting, with the rule sets of real firewalls."""

import ctypes
import errno
import os
import shlex
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests import guest as guest_image
from tests.support.hostnet import NetDaemon, rules, setting
from tests.support.network import Network
from tests.support.privdriver import DEADLINE_S, Priv, nic, switch
from tests.support.throughhost import GUEST4, GUEST6, HOST4, PREFIX6, Guest, World, udp4, udp6
from vmd.errors import HostError
from vmd.ipc.messages.priv import AskDrops, DropsReported, NetworkTrouble
from vmd.ipc.messages.shared import Trouble
from vmd.parent.forpriv import open_tables
from vmd.priv.legacy import (
    DROP,
    ENTRIES,
    FAMILIES,
    HOOKS,
    INFO,
    OFFSETS,
    SO_GET_ENTRIES,
    SO_GET_INFO,
    TABLE,
    TARGET,
    VERDICT,
    Family,
    Loaded,
    chains,
)
from vmd.privsep import linux

pytestmark = pytest.mark.root

RULE_SETS = Path(__file__).resolve().parents[1] / "data/firewalls"
WORLD4 = socket.inet_aton("192.0.2.2")
NEIGHBOUR4, NEIGHBOUR = bytes((10, 0, 0, 2)), bytes.fromhex("fee1bbd10002")
SO_SET_REPLACE, ACCEPT = 64, -2  # iptables: setsockopt, and -NF_ACCEPT - 1
TAPS = "-i tap+ -j ACCEPT", "-o tap+ -j ACCEPT"


@pytest.fixture
def priv(network: Network) -> Iterator[Priv]:
    """Give a priv for that network, with NAT and a switch."""
    with Priv(network) as running:
        assert running.configure(switch("br0")) == ()
        yield running


def load(network: Network, name: str) -> None:
    """Load the rule set of a firewall."""
    network.run("nft", "-f", str(RULE_SETS / f"{name}.nft"))


def dropped(priv: Priv, vmid: int = 1) -> tuple[Trouble, ...]:
    """Return the drops of a VM's packets that priv reports now."""
    with priv.network.inside():
        tables = open_tables()
    priv.send(AskDrops(vmid=vmid), tables)
    reported = priv.receive(DropsReported)
    assert reported.vmid == vmid
    return reported.troubles


def say(guest: Guest, target: bytes, port: int, count: int = 1, *, to: bytes = b"") -> None:
    """Send packets of a connection, identified by its port.  The kernel has filtered them when this returns."""
    for _ in range(count):
        guest.send(0x0800, udp4(GUEST4, target, b"hello", port), to)


TRUSTED = "firewall-cmd --permanent --zone=trusted --add-interface=tap+; firewall-cmd --reload"
FORWARDING = {
    "firewalld": (
        f"firewalld lets them through after: {TRUSTED}",
        # the rule that firewalld adds for it
        ["nft insert rule inet firewalld filter_FORWARD_ZONES iifname tap* accept"],
    ),
    "ufw": (
        "ufw lets them through after: ufw route allow in on tap+; ufw route allow out on tap+",
        ["nft insert rule ip filter ufw-user-forward iifname tap* accept"],
    ),
    "docker": (
        f"Docker lets them through after: iptables -I DOCKER-USER {TAPS[0]}; iptables -I DOCKER-USER {TAPS[1]}",
        ["nft insert rule ip filter DOCKER-USER iifname tap* accept"],
    ),
    "tailscale": (
        "Tailscale claims all of 100.64.0.0/10 for its own network: give guests other addresses in vm.conf",
        ["nft flush chain ip filter ts-forward"],
    ),
}


@pytest.mark.parametrize(
    "name", ["firewalld", "docker", *(pytest.param(name, marks=pytest.mark.deep) for name in ("ufw", "tailscale"))]
)
def test_a_firewall_that_drops_what_guests_send_is_named(network: Network, priv: Priv, name: str) -> None:
    """The trouble has numbers, the program and its remedy.  It ends when a packet gets through."""
    words, remedy = FORWARDING[name]
    # Tailscale drops only packets to its own network.
    with World(network, "tailscale0" if name == "tailscale" else "uplink") as world, priv.make(
        nic(host4=HOST4)
    ) as made, world.network.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        guest = Guest(network, made)
        server.bind(("192.0.2.2", 7000))
        server.settimeout(DEADLINE_S)
        say(guest, WORLD4, 5000)
        assert server.recvfrom(100)[1] == ("192.0.2.1", 5000)
        assert dropped(priv) == ()

        load(network, name)
        say(guest, WORLD4, 5001, 3)
        (trouble,) = dropped(priv)

        assert trouble.device == "interface0"
        assert trouble.text.startswith(
            "another firewall of this host has dropped 3 of 4 packets from the guest to others (tap0). "
        )
        assert words in trouble.text
        assert priv.hear() == NetworkTrouble(vmid=1, device="interface0", text=trouble.text)
        assert dropped(priv) == (trouble,)
        assert priv.log.count(trouble.text) == 1

        for command in remedy:
            network.run(*shlex.split(command))
        say(guest, WORLD4, 5002)
        assert server.recvfrom(100)[1] == ("192.0.2.1", 5002)
        assert dropped(priv) == ()
        assert priv.hear() == NetworkTrouble(vmid=1, device="interface0")
        assert priv.troubles == []


@pytest.mark.deep
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("firewalld", f"firewalld lets them through after: {TRUSTED}"),
        ("ufw", "ufw lets them through after: ufw allow in on tap+"),
        ("tailscale", "Tailscale claims all of 100.64.0.0/10 for its own network"),
    ],
)
def test_a_firewall_that_keeps_guests_from_the_host(network: Network, priv: Priv, name: str, words: str) -> None:
    """The trouble is shown but not logged, because this is the purpose of a host's firewall."""
    load(network, name)
    with priv.make(nic(host4=HOST4)) as made:
        say(Guest(network, made), HOST4, 5000, 2)

        (trouble,) = dropped(priv)

    assert "has dropped 2 of 2 packets from the guest to this host (tap0). " in trouble.text
    assert words in trouble.text
    assert "another firewall" not in priv.log


def test_docker_and_a_switch(network: Network, priv: Priv) -> None:
    """With br_netfilter, Docker filters frames between guests on a bridge; each VM on it shows the trouble."""
    load(network, "docker")
    with (
        priv.make(nic(bridge="br0")) as one,
        priv.make(nic(bridge="br0"), vmid=2) as two,
        priv.make(nic(), vmid=3),
    ):
        first, second = Guest(network, one), Guest(network, two)
        say(first, NEIGHBOUR4, 5000, 2, to=NEIGHBOUR)
        troubles = dropped(priv, 1)

        assert [trouble.device for trouble in troubles] == ["interface0"]
        assert "has dropped 2 of 2 packets between ports of the bridge (br0). " in troubles[0].text
        assert "Docker lets them through after: iptables -I DOCKER-USER -i br0 -o br0 -j ACCEPT" in troubles[0].text
        assert "sysctl net.bridge.bridge-nf-call-iptables=0" in troubles[0].text
        assert dropped(priv, 2) == troubles
        assert dropped(priv, 3) == ()

        network.run("nft", "insert rule ip filter DOCKER-USER iifname br0 oifname br0 accept")
        say(first, NEIGHBOUR4, 5001, to=NEIGHBOUR)
        assert b"hello" in second.receive(b"hello")
        assert dropped(priv, 1) == ()


@pytest.mark.deep
def test_docker_that_comes_later(network: Network, priv: Priv) -> None:
    """Frames on bridges are counted only while a firewall filters them."""
    with priv.make(nic(bridge="br0")) as made:
        guest = Guest(network, made)
        assert dropped(priv) == ()
        assert "inet vmd" not in network.run("nft", "list", "tables")
        with priv.make(nic(bridge="br0"), vmid=2):
            load(network, "docker")
            assert dropped(priv) == ()
            say(guest, NEIGHBOUR4, 5000, to=NEIGHBOUR)
            assert "1 of 1 packets between ports" in dropped(priv)[0].text
            network.run("nft", "flush", "ruleset")
            assert dropped(priv) == ()
            assert "inet vmd" not in network.run("nft", "list", "tables")


@pytest.mark.deep
def test_a_table_that_was_flushed_is_written_again(network: Network, priv: Priv) -> None:
    """A flush, as by a restart of nftables.service, is logged, and reported once for all VMs."""
    with priv.make(nic(host4=HOST4)), priv.make(nic(host4=bytes((100, 64, 2, 2))), vmid=2):
        before = rules(network)
        network.run("nft", "flush", "ruleset")
        (trouble,) = dropped(priv)
        assert trouble.text == "the nftables table inet vmd was removed by another program: it was written again"
        assert rules(network) == before
        assert trouble.text in priv.log
        assert priv.hear() == NetworkTrouble(text=trouble.text)
        assert dropped(priv, 2) == (trouble,)
        assert priv.troubles == []


@pytest.mark.deep
def test_counts_are_kept_when_other_vms_start_and_stop(network: Network, priv: Priv) -> None:
    """Counts are kept, although the rules are written again and the kernel's counters start from 0."""
    load(network, "docker")
    with World(network), priv.make(nic(host4=HOST4)) as made:
        guest = Guest(network, made)
        say(guest, WORLD4, 5000, 2)
        with priv.make(nic(host4=bytes((100, 64, 2, 2))), vmid=2):
            say(guest, WORLD4, 5001, 3)
        assert "has dropped 5 of 5 packets" in dropped(priv)[0].text


@pytest.mark.deep
def test_packets_that_no_firewall_drops_are_no_trouble(network: Network, priv: Priv) -> None:
    """A packet of no connection, one without a route and one with a false source are not counted."""
    load(network, "ufw")
    network.run("nft", "insert rule ip filter ufw-user-forward ip saddr 100.64.0.0/10 accept")
    with World(network), priv.make(nic(host4=HOST4)) as made:
        guest = Guest(network, made)
        say(guest, WORLD4, 5000)
        say(guest, bytes((203, 0, 113, 5)), 5001)
        guest.send(0x0800, udp4(bytes((100, 64, 1, 77)), WORLD4, b"spoofed"))
        reset = udp4(GUEST4, WORLD4, bytes(12))
        tcp = struct.pack("!HHIIBBHHH", 5000, 80, 1, 1, 0x50, 0x04, 0, 0, 0)
        packet = reset[:9] + b"\x06" + reset[10:20] + tcp
        guest.send(0x0800, packet[:10] + bytes(2) + packet[12:])

        assert dropped(priv) == ()


@pytest.mark.deep
@pytest.mark.parametrize("policy", ["drop", "accept"])
def test_a_firewall_of_the_administrators_own(network: Network, priv: Priv, policy: str) -> None:
    """The message names its chain, and its advice works."""
    network.run("nft", "add table inet mine")
    network.run("nft", f"add chain inet mine transit {{ type filter hook forward priority 0; policy {policy}; }}")
    if policy == "accept":
        network.run("nft", "add rule inet mine transit ip saddr 100.64.0.0/10 drop")
    with World(network) as world, priv.make(nic(host4=HOST4)) as made, world.network.socket(
        socket.AF_INET, socket.SOCK_DGRAM
    ) as server:
        guest = Guest(network, made)
        server.bind(("192.0.2.2", 7000))
        server.settimeout(DEADLINE_S)
        say(guest, WORLD4, 5000)
        (trouble,) = dropped(priv)
        assert "nftables chain inet mine transit" in trouble.text

        for command in trouble.text.rpartition(": ")[2].split("; "):
            network.run(*shlex.split(command))  # the advised commands succeed
        say(guest, WORLD4, 5001)
        assert server.recvfrom(100)[1] == ("192.0.2.1", 5001)
        assert dropped(priv) == ()


@pytest.mark.kvm
def test_status_shows_it(network: Network, tmp_path: Path) -> None:
    """`vmctl status -v` shows that outside packets do not reach the guest, and why."""
    conf = f'vm "db1" {{\n disable\n memory 32M\n boot "{guest_image("demo")}"\n local interface\n}}\n'
    load(network, "docker")
    with World(network) as world, NetDaemon(tmp_path, network, conf) as vmd:
        vmd.must("start", "db1")
        world.network.run("ip", "route", "add", "100.64.0.0/10", "via", "192.0.2.1")
        (local,) = vmd.interfaces("db1")
        shown = ""
        with world.network.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            while "another firewall" not in shown:  # a firewall drops a packet a moment after it was sent
                client.sendto(b"hello", (local["guest4"], 7000))
                shown = vmd.must("status", "-v", "db1")

        (line,) = [line for line in shown.splitlines() if "another firewall" in line]
        assert line.startswith("db1 interface0: another firewall of this host has dropped ")
        assert "packets from others to the guest (tap0). " in line
        assert "Docker lets them through after: iptables -I DOCKER-USER" in line
        assert "(since " in line
        assert setting(network, "ipv4/ip_forward") == "1"


# --- the old iptables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.program)
def test_the_old_iptables_are_seen_too(network: Network, priv: Priv, family: Family) -> None:
    """Rules that nft does not list are seen, and tables that are not loaded stay so."""
    with network.inside():
        loaded = Path(f"/proc/net/{family.name}_tables_names")
        assert not loaded.exists() or loaded.read_text() == ""
        try:
            set_policy(family, "ACCEPT")
        except HostError as error:
            if error.number != errno.ENOPROTOOPT:
                raise
            pytest.skip(f"this kernel has no old {family.program}")
        assert loaded.read_text() == "filter\n"
        tables = Loaded()
        assert chains(family, tables) == []  # without the file
        tables.take(family, os.open(loaded, os.O_RDONLY))
        seen = chains(family, tables)
        assert [(chain.name, chain.policy) for chain in seen] == [("INPUT", "accept"), ("FORWARD", "accept")]
        set_policy(family, "DROP")
        seen = chains(family, tables)
        assert [(chain.name, chain.policy) for chain in seen] == [("INPUT", "accept"), ("FORWARD", "drop")]
        tables.take(family, None)
    with World(network), priv.make(nic(host4=HOST4, prefix6=PREFIX6)) as made:
        guest = Guest(network, made)
        if family.name == "ip":
            say(guest, WORLD4, 5000)
        else:
            guest.send(0x86DD, udp6(GUEST6, socket.inet_pton(socket.AF_INET6, "2001:db8::2"), b"hello"))
        (trouble,) = dropped(priv)
    assert f"chain FORWARD of the old {family.program} can let them through: " in trouble.text
    assert f"{family.program} -I FORWARD {TAPS[0]}; {family.program} -I FORWARD {TAPS[1]}" in trouble.text


def set_policy(family: Family, policy: str) -> None:
    """Do the same as `iptables -P FORWARD`, which loads the table if necessary (struct ipt_replace)."""
    with socket.socket(family.family, socket.SOCK_RAW, socket.IPPROTO_RAW) as any_socket:
        fd = any_socket.fileno()
        info = linux.getsockopt(fd, family.level, SO_GET_INFO, INFO.pack(TABLE, *bytes(13)))
        size, count = INFO.unpack(info)[13], INFO.unpack(info)[12]
        request = ENTRIES.pack(TABLE, size) + bytes(size)
        entries = bytearray(linux.getsockopt(fd, family.level, SO_GET_ENTRIES, request)[ENTRIES.size :])
        hook = {name: hook for hook, name in HOOKS.items()}["FORWARD"]
        forward = INFO.unpack(info)[7 + hook]
        target = forward + OFFSETS.unpack_from(entries, forward + family.offsets_at)[0]
        entries[target + TARGET.size : target + TARGET.size + VERDICT.size] = VERDICT.pack(
            DROP if policy == "DROP" else ACCEPT
        )
        counters = ctypes.create_string_buffer(16 * count)
        replace = struct.pack("=32sIII20s20sIQ", TABLE, 0x0E, count, size, info[36:56], info[56:76], count,
                              ctypes.addressof(counters))  # fmt: skip
        any_socket.setsockopt(family.level, SO_SET_REPLACE, replace + entries)
