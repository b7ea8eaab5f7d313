"""Options of a local interface in vm.conf, with the whole daemon: addresses, names and forwarded ports."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.process.test_adoption import NetKeptDaemon
from tests.process.test_network import block, move
from tests.support.daemon import DEADLINE_S
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon, addresses, links, rules
from tests.support.network import Network

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(400)]

SSH = {"protocol": "tcp", "port": 8022, "count": 1, "to": 22, "from": None}
OPTIONS = "address 10.9.0.77/24, hostname www.example.org, dns 9.9.9.9 1.1.1.1"


def net(*forwards: str) -> str:
    """Return the block of a VM that uses DHCP, with these forwards."""
    options = "".join(f", forward {forward}" for forward in forwards)
    return (
        f'vm "net" {{\n disable\n memory 64M\n boot "{guest("net")}"\n local interface {{ {OPTIONS}{options} }}\n}}\n'
    )


def forwarded(network: Network) -> list[str]:
    """Return the rules of our table that forward ports."""
    listing = network.run("nft", "list", "table", "inet", "vmd")
    return [line.strip() for line in listing.splitlines() if "dnat ip to" in line]


def wait_forwarded(network: Network, wanted: list[str]) -> None:
    """Wait until our table has exactly these rules.  A reload returns before priv has changed them."""
    deadline_s = time.monotonic() + DEADLINE_S
    while forwarded(network) != wanted:
        assert time.monotonic() < deadline_s, rules(network)


def shown(vmd: NetDaemon, name: str) -> dict[str, Any]:
    """Return the status of the only interface of a VM."""
    (nic,) = vmd.interfaces(name)
    return nic


def test_options_reach_the_guest_and_the_host(network: Network, tmp_path: Path) -> None:
    """DHCP gives the guest its options.  The host's rules survive the daemon and priv.  A reload changes forwards."""
    conf = net("tcp port 8022 to port 22") + block("other", "local interface { forward port 8000:8099 to port 80 }")
    with NetKeptDaemon(tmp_path, network, conf) as vmd:
        warning = 'vm "other": forward tcp port 8000:8099 to port 80: vm "net" has tcp port 8022 to port 22'
        assert f"{warning}: only one of them can run" in vmd.log
        vmd.must("start", "net")
        with vmd.console("net") as console:
            console.expect("ready", DEADLINE_S)
            offered = console.answer("dhcp", "ready", DEADLINE_S)
            assert shown(vmd, "net")["lease"] is None
            leased = console.answer("dhcp lease", "ready", DEADLINE_S)
        assert "offer 10.9.0.77 servers 9.9.9.9 1.1.1.1" in offered
        assert "ack 10.9.0.77 servers 9.9.9.9 1.1.1.1" in leased
        assert "called www example.org" in leased
        assert addresses(links(network)["tap0"]) == ["10.9.0.1/24"]
        wait_forwarded(network, ["tcp dport 8022 dnat ip to 10.9.0.77:22"])

        words = vmd.must("status", "-v", "net")
        nic = shown(vmd, "net")
        assert "    host 10.9.0.1, guest 10.9.0.77/24\n    forward tcp port 8022 to port 22\n" in words
        assert "    lease 10.9.0.77 given 20" in words
        assert " to guest-of-net\n" in words
        assert (nic["forwards"], nic["prefix4_length"]) == ([SSH], 24)
        assert (nic["lease"]["address"], nic["lease"]["hostname"]) == ("10.9.0.77", "guest-of-net")

        failed = vmd.vmctl("start", "other")
        assert "forward tcp port 8000:8099 to port 80: vm net has tcp port 8022 to port 22" in failed.stderr

        vmd.conf.write_text(conf.replace("port 8022 to port 22", "port 7022 to port 22 from 192.0.2.0/24"))
        assert "vm net: its new forwards count from now on" in vmd.must("reload")
        after = ["ip saddr 192.0.2.0/24 tcp dport 7022 dnat ip to 10.9.0.77:22"]
        wait_forwarded(network, after)
        nic["forwards"] = [{**SSH, "port": 7022, "from": "192.0.2.0/24"}]
        assert shown(vmd, "net") == nic
        vmd.kill()
        vmd.start()
        assert shown(vmd, "net") == nic
        assert forwarded(network) == after
        os.kill(vmd.processes()["vmd: priv"], signal.SIGKILL)
        vmd.must("start", "other")
        wait_forwarded(network, [*after, "tcp dport 8000-8099 dnat ip to "
                                 f"{shown(vmd, 'other')['guest4']}:tcp dport map {mapped()}"])  # fmt: skip

        vmd.conf.write_text(conf)
        said = vmd.must("reload")
        assert "vm other has tcp port 8000:8099 to port 80: its new forwards are not made; vmctl reload tries" in said
        assert "vm net: interfaces changed; that waits for its next start" in said
        assert shown(vmd, "net")["forwards"] == []
        vmd.conf.write_text(conf.replace("port 8022 to", "port 7022 to"))
        vmd.must("reload")
        assert shown(vmd, "net")["forwards"] == [{**SSH, "port": 7022}]
        with network.socket(socket.AF_INET, socket.SOCK_STREAM) as program:
            program.bind(("0.0.0.0", 8050))
            program.listen()
            vmd.must("stop", "-fw", "other")
            wait_forwarded(network, ["tcp dport 7022 dnat ip to 10.9.0.77:22"])
            refused = vmd.vmctl("start", "other")
        said = "forward tcp port 8000:8099 to port 80: a program of this host has tcp port 8050: `ss -ltnp` shows it"
        assert said in refused.stderr
        vmd.must("stop", "-fw", "net")
    assert "inet vmd" not in network.run("nft", "list", "tables")


def mapped() -> str:
    """Return the map in which nft shows a range of ports that is forwarded to other numbers."""
    return "{ " + ", ".join(f"{port} : {port - 7920}" for port in range(8000, 8100)) + " }"


@pytest.mark.deep
def test_options_are_sent_with_the_vm(network: Network, tmp_path: Path) -> None:
    """If a port is in use on the receiver, the VM is not received, and runs again on the sender."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    resident = block("resident", "local interface { forward port 8022 to port 1 }")
    with (
        Network() as other,
        NetDaemon(here, network, net()) as sender,
        NetDaemon(there, other, resident) as receiver,
    ):
        sender.must("start", "net")
        sender.conf.write_text(net("port 8022 to port 22"))
        sender.must("reload")
        wanted = shown(sender, "net")
        receiver.must("start", "resident")
        said = move(sender, receiver, "net", fails=True)
        assert "forward tcp port 8022 to port 22: vm resident has tcp port 8022 to port 1" in said
        assert sender.wait_state("net", "running")

        receiver.must("stop", "-fw", "resident")
        move(sender, receiver, "net")
        moved = shown(receiver, "net")
        assert {key: moved[key] for key in ("guest4", "host4", "forwards", "prefix4_length")} == {
            key: wanted[key] for key in ("guest4", "host4", "forwards", "prefix4_length")
        }
        wait_forwarded(other, ["tcp dport 8022 dnat ip to 10.9.0.77:22"])
        assert addresses(links(other)["tap0"]) == ["10.9.0.1/24"]
