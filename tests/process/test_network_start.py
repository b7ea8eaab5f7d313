"""A VM has the network that vm.conf describes, also if it is started very early, and after a reload."""

import ipaddress
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.process.test_network import SWITCH, block
from tests.support.daemon import DEADLINE_S, ROOT
from tests.support.hostnet import NetDaemon, addresses, links, rules, setting
from tests.support.network import Network
from tests.support.waiting import pause
from vmd.client import Client, ClientError
from vmd.ipc.messages.clients import StartRequest, VmStarted

pytestmark = [pytest.mark.root, pytest.mark.kvm]


def start_early(vmd: NetDaemon, name: str, stop: threading.Event) -> None:
    """Start a VM as soon as the control socket accepts a connection."""
    while not stop.is_set():
        try:
            client = Client(str(vmd.socket))
        except ClientError:
            continue
        client.send(StartRequest(name=name))
        client.answer(VmStarted)
        client.close()
        return


def test_a_client_that_comes_while_the_daemon_starts(network: Network, tmp_path: Path) -> None:
    """A VM that it starts has its switch, its address, NAT and forwarding."""
    vmd = NetDaemon(tmp_path, network, SWITCH + block("db1", 'interface switch "lan"', "local interface"))
    stop = threading.Event()
    client = threading.Thread(target=start_early, args=(vmd, "db1", stop))
    client.start()
    try:
        with vmd:
            vmd.wait_state("db1", "running")
            there = links(network)
            assert there["tap0"]["master"] == "br7"
            assert f"elements = {{ {addresses(there['tap1'])[0]} }}" in rules(network)
            assert setting(network, "ipv4/ip_forward") == "1"
    finally:
        stop.set()
        client.join()


def test_nat_that_is_switched_on_and_off(network: Network, tmp_path: Path) -> None:
    """A reload changes the NAT of running VMs, because `local nat` belongs to the host and not to a VM."""
    conf = block("db1", "local interface")
    with NetDaemon(tmp_path, network, "local nat disable\n" + conf) as vmd:
        vmd.must("start", "db1")
        assert setting(network, "ipv4/ip_forward") == "0"

        vmd.conf.write_text(conf)
        vmd.must("reload")
        wait_for(lambda: setting(network, "ipv4/ip_forward") == "1")
        assert f"elements = {{ {addresses(links(network)['tap0'])[0]} }}" in rules(network)

        vmd.conf.write_text("local nat disable\n" + conf)
        vmd.must("reload")
        wait_for(lambda: "inet vmd" not in network.run("nft", "list", "tables"))


def test_a_range_that_covers_the_network_of_the_host(network: Network, tmp_path: Path) -> None:
    """At the start and with `vmd -n` a warning names its line.  No guest gets an address of the host's network."""
    network.run("ip", "link", "add", "lan0", "up", "type", "bridge")
    for address in ("10.9.0.1/17", "10.9.128.1/18", "10.9.192.1/19", "10.9.224.1/20"):
        network.run("ip", "addr", "add", address, "dev", "lan0")
    conf = "# ours\nlocal prefix 10.9.0.0/16\n" + block("db1", "local interface")
    with NetDaemon(tmp_path, network, conf) as vmd:
        vmd.must("start", "db1")
        guest = ipaddress.ip_address(vmd.interfaces("db1")[0]["guest4"])
        assert guest in ipaddress.ip_network("10.9.240.0/20")

        warning = f"{vmd.conf}:2: local prefix 10.9.0.0/16 overlaps 10.9.0.0/17, which this host reaches by lan0"
        assert f"{warning}: VMs get no addresses out of it" in vmd.log
        with network.inside():
            command = [sys.executable, "-m", "vmd", "-n", "-f", str(vmd.conf)]
            checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert warning in checked.stderr

        network.run("ip", "addr", "add", "10.9.0.2/15", "dev", "lan0")
        assert "no VM can have a local interface" in vmd.must("reload")
        vmd.must("stop", "-fw", "db1")
        refused = vmd.vmctl("start", "db1").stderr
        assert "vm db1: all addresses of `local prefix` are in 10.8.0.0/15, which this host reaches by lan0" in refused


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true.  A reload returns before priv has done its part."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "priv has not done it"
        pause()
