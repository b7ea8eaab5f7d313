"""Ids and addresses belong to a VM and its owner: whatever vm.conf says next, and however the daemon has ended."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.test_network import block
from tests.support.daemon import DEADLINE_S
from tests.support.hostnet import NetDaemon, ours, state_file
from tests.support.network import Network

pytestmark = [pytest.mark.root, pytest.mark.kvm]

WHAT_A_GUEST_KNOWS = ("lladdr", "guest4", "host4", "prefix6")
VMS = block("web", "local interface", "interface"), block("db1", "interface", "local interface")


@pytest.fixture
def network() -> Iterator[Network]:
    """Give an empty network; afterwards nothing of ours is left in it."""
    with Network() as made:
        yield made
        assert ours(made) == []
        assert not state_file(made).exists()


def identities(vmd: NetDaemon) -> dict[str, Any]:
    """Start two VMs and return what they, and others, know them by."""
    known = {}
    for name in ("web", "db1"):
        vmd.must("start", name)
        nics = [[nic[key] for key in WHAT_A_GUEST_KNOWS] for nic in vmd.interfaces(name)]
        known[name] = vmd.status(name)["id"], nics
    return known


def kill(vmd: NetDaemon) -> None:
    """End a daemon as nobody should."""
    assert vmd.process is not None
    os.kill(vmd.pid, signal.SIGKILL)
    vmd.process.wait(DEADLINE_S)


def test_other_vms_in_vm_conf_change_nothing(network: Network, tmp_path: Path) -> None:
    """Not when they are put above, at a stop and start of the daemon or after a kill; also with IPv6."""
    with NetDaemon(tmp_path, network, "local inet6\n" + "".join(VMS)) as vmd:
        before = identities(vmd)
        assert before["web"][1][0][3].startswith("fd")

        kill(vmd)
        new = block("aaa", "local interface")
        vmd.conf.write_text("local inet6\n" + new + "".join(reversed(VMS)))
        vmd.start()
        assert identities(vmd) == before
        assert vmd.status("aaa")["id"] == 3


def test_a_state_that_cannot_be_kept(network: Network, tmp_path: Path) -> None:
    """It is said, with the reason, and everything works as long as this daemon lives."""
    vmd = NetDaemon(tmp_path, network, "".join(VMS))
    vmd.prefix = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o ro tmpfs {vmd.state} && exec "$0" "$@"']
    vmd.state.mkdir()
    with vmd:
        before = identities(vmd)
        assert f"{vmd.state}/identities: Read-only file system: ids and addresses of VMs are not kept" in vmd.log
        vmd.must("stop", "-fw", "web")
        vmd.must("stop", "-fw", "db1")
        vmd.must("reload")
        assert identities(vmd) == before
        assert vmd.log.count("Read-only file system") == 1
