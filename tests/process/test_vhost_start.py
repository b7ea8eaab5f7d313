"""A VM whose vm.conf says `vhost`: its packet sockets and filters, the messages to users, and the cleanup.

The kernel moves no frames here.  A file without the requests of vhost-net replaces /dev/vhost-net, so the process of
the interface moves the frames in the end.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.test_network import PROMPT, SWITCH, block
from tests.process.test_vhost_taps import tables, until
from tests.support.daemon import DEADLINE_S, ROOT
from tests.support.descriptors import open_files
from tests.support.hostnet import NetDaemon, links
from tests.support.network import Network

pytestmark = [pytest.mark.root, pytest.mark.kvm]


def packet_sockets(network: Network) -> set[str]:
    """Return the packet sockets of a host, by their names in /proc/PID/fd."""
    rows = network.run("cat", "/proc/thread-self/net/packet").splitlines()[1:]
    return {f"socket:[{row.split()[-1]}]" for row in rows}


def holders(vmd: NetDaemon, files: set[str]) -> set[str]:
    """Return the processes of a daemon that have at least one of these files open."""
    return {title for title, pid in vmd.processes().items() if files & set(open_files(pid).values())}


@pytest.mark.deep
@pytest.mark.skipif(os.path.exists("/dev/vhost-net"), reason="this host has vhost-net")
def test_a_host_without_vhost_net(network: Network, tmp_path: Path) -> None:
    """The VM starts, the process of the interface moves the frames, and the user who starts the VM is told why."""
    with NetDaemon(tmp_path, network, block("db1", "interface { vhost }", "local interface")) as vmd:
        said = vmd.must("start", "db1")
        why = "/dev/vhost-net: No such file or directory: load the kernel module vhost_net"
        assert f"interface 0: vhost: a process moves its frames, not the kernel: {why}" in said
        assert [nic["vhost"] for nic in vmd.interfaces("db1")] == [True, False]
        command = [sys.executable, "-m", "vmd", "-n", "-f", str(vmd.conf)]
        checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert f'{vmd.conf}:1: vm "db1": interface 0: vhost: a process moves its frames' in checked.stderr
        assert "vhost not in use" in vmd.must("status", "-v")
        assert (packet_sockets(network), tables(network)) == (set(), [])


@pytest.mark.deep
def test_each_life_of_a_vm_gets_new_packet_sockets(network: Network, tmp_path: Path) -> None:
    """A packet socket is open only in the process of its interface.  The filters exist as long as the VM."""
    nics = "local interface { vhost }", 'interface { switch "lan", vhost }', "interface { vhost, limit rate 1M }"
    with NetDaemon(tmp_path, network, SWITCH + block("db1", *nics), vhost_net=True) as vmd:
        assert "vhost" not in vmd.must("start", "db1")
        processes = {f"vmd: vm/db1/vionet{index}" for index in range(3)}
        first = packet_sockets(network)
        assert (len(first), holders(vmd, first)) == (3, processes)
        assert tables(network) == ["vmd_tap0", "vmd_tap1"]  # a plain interface needs no filters

        with vmd.console("db1") as console:
            console.expect(PROMPT, DEADLINE_S)
            console.answer("reset", PROMPT)
        second = packet_sockets(network)
        assert (len(second), holders(vmd, second)) == (3, processes)
        assert not first & second

        priv = vmd.processes()["vmd: priv"]
        os.kill(priv, signal.SIGKILL)
        until(lambda: vmd.processes().get("vmd: priv", priv) != priv, "priv was not started again")
        vmd.must("reload")
        assert tables(network) == ["vmd_tap0", "vmd_tap1"]
        counters = vmd.interfaces("db1")[1]["counters"]
        assert (counters["vhost"], counters["tx_spoofed"]) == (0, 0)

        vmd.must("stop", "-fw", "db1")
        until(lambda: tables(network) == [], "filters are left")
        assert packet_sockets(network) == set()
    assert set(links(network)) == {"lo"}
