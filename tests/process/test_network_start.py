"""A VM's network is what vm.conf says, however early the VM is started, and again after a reload."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.test_network import SWITCH, block
from tests.support.daemon import DEADLINE_S, ROOT
from tests.support.hostnet import NetDaemon, addresses, links, ours, rules, setting, state_file
from tests.support.network import Network

pytestmark = [pytest.mark.root, pytest.mark.kvm]


@pytest.fixture
def network() -> Iterator[Network]:
    """Give an empty network; afterwards nothing of ours is left in it."""
    with Network() as made:
        yield made
        assert ours(made) == []
        assert not state_file(made).exists()


def start_early(vmd: NetDaemon, name: str, stop: threading.Event) -> None:
    """Try to start a VM from before the daemon listens until it has been started."""
    command = [sys.executable, "-m", "vmctl", "-s", str(vmd.socket), "start", name]
    while not stop.is_set() and subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode:
        pass


def test_a_client_that_comes_while_the_daemon_starts(network: Network, tmp_path: Path) -> None:
    """Its VM has its switch, its address, NAT and forwarding."""
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
    """A reload changes the rules of VMs that run: `local nat` is the host's, not theirs."""
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


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until priv has done what a reload asked it for, without waiting for it."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "priv has not done it"
