"""Ids and addresses belong to a VM and its owner.  They survive changes of vm.conf, and any end of the daemon."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.process.test_network import block
from tests.support.daemon import DEADLINE_S
from tests.support.hostnet import NetDaemon
from tests.support.network import Network

pytestmark = [pytest.mark.root, pytest.mark.kvm]

KNOWN_TO_GUESTS = ("lladdr", "guest4", "host4", "prefix6")
VM = block("db1", "interface", "local interface")


def identity(vmd: NetDaemon) -> dict[str, Any]:
    """Start the VM.  Return its id, and the addresses of its interfaces."""
    vmd.must("start", "db1")
    nics = [[nic[key] for key in KNOWN_TO_GUESTS] for nic in vmd.interfaces("db1")]
    return {"id": vmd.status("db1")["id"], "nics": nics}


def kill(vmd: NetDaemon) -> None:
    """Kill the daemon."""
    assert vmd.process is not None
    os.kill(vmd.pid, signal.SIGKILL)
    vmd.process.wait(DEADLINE_S)


def test_other_vms_in_vm_conf_change_nothing(network: Network, tmp_path: Path) -> None:
    """Other VMs change no identity: not when they come before it in vm.conf, and not after a kill; also with IPv6."""
    with NetDaemon(tmp_path, network, "local inet6\n" + VM) as vmd:
        before = identity(vmd)
        assert before["nics"][1][3].startswith("fd")

        kill(vmd)
        vmd.conf.write_text("local inet6\n" + block("aaa", "local interface") + VM)
        vmd.start()
        assert identity(vmd) == before
        assert vmd.status("aaa")["id"] == 2


def test_a_state_that_cannot_be_kept(network: Network, tmp_path: Path) -> None:
    """vmd logs it once, with the reason, and everything works."""
    vmd = NetDaemon(tmp_path, network, VM)
    vmd.prefix = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o ro tmpfs {vmd.state} && exec "$0" "$@"']
    vmd.state.mkdir()
    with vmd:
        assert identity(vmd)["id"] == 1
        assert f"{vmd.state}/identities: Read-only file system: ids and addresses of VMs are not kept" in vmd.log
        vmd.must("reload")
        assert vmd.log.count("Read-only file system") == 1
