"""Hosts whose storage is cut in two: a volume of GlusterFS on hosts without a cluster.

A brick drops the locks of a client after losing the connection.  So another host can get the disk while the guest of
the first host runs.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import churn
from tests.support.cluster import GlusterHosts, Node, until
from tests.support.daemon import Attached
from tests.support.guests import guest

MISSING = [name for name in ("glusterd", "mount.glusterfs", "qemu-img") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.root,
    pytest.mark.kvm,
    pytest.mark.deep,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' '.join(MISSING)}"),
]

PING = {"network.ping-timeout": "3", "performance.open-behind": "off"}
QUORUM = {"cluster.quorum-type": "auto", "client.strict-locks": "on"}
NO_QUORUM = {"cluster.quorum-type": "none"}


@contextmanager
def hosts(directory: Path, options: dict[str, str], *replicas: str) -> Iterator[GlusterHosts]:
    """Yield hosts with a shared volume.  The first one runs `db`."""
    disk = f"{GlusterHosts.place}/db"
    conf = f'vm "db" {{\n disable\n memory 64M\n boot "{guest("blk")}" cmdline "churn"\n disk "{disk}" format raw\n}}\n'
    with GlusterHosts(directory, conf, replicas=replicas, options=PING | options) as made:
        first = made.nodes[0]
        first.must("qemu-img", "create", "-q", "-f", "raw", disk, "8M")
        first.must("vmctl", "start", "db")
        check_disk(first)
        yield made


def check_disk(node: Node) -> None:
    """Let the guest write and read for some rounds, and check that it reports no error."""
    with node.console("db") as fd:
        churn.ask_until_rounds(Attached(fd, fd), 3)


def has_said(node: Node, text: str) -> bool:
    """Return whether a daemon has logged a text."""
    return text in (node.own / "vmd.log").read_text()


def test_a_host_without_a_quorum_of_its_storage_stops_its_guest(tmp_path: Path) -> None:
    """Its guest is paused or has ended when another host gets the disk.  Then nothing can resume it."""
    with hosts(tmp_path, QUORUM, "replica", "3", "arbiter", "1") as made:
        first, second, _ = made.nodes
        assert "in use" in second.run("vmctl", "start", "db").stderr

        made.cut(first)
        until(lambda: has_said(first, "/mnt/db: its lock may be lost: "), "the lost lock is noticed")
        # A VM whose requests hang in the storage cannot pause, and is ended.
        until(lambda: first.state("db")["state"] in ("paused", "stopped"), "the VM does not run")
        until(lambda: second.run("vmctl", "start", "db").returncode == 0, "the disk is free")
        made.heal(first)

        assert first.run("vmctl", "unpause", "db").returncode == 1
        first.run("vmctl", "stop", "-w", "db")
        assert first.state("db")["state"] == "stopped"
        check_disk(second)


def test_two_hosts_with_the_same_disk_do_not_both_continue(tmp_path: Path) -> None:
    """Without a quorum each half gives out the lock.  When they are connected again, at least one VM pauses or ends."""
    with hosts(tmp_path, NO_QUORUM, "replica", "2") as made:
        first, second, _ = made.nodes
        made.cut(first)
        until(lambda: second.run("vmctl", "start", "db").returncode == 0, "the other half gives out the lock")
        made.heal(first)
        until(lambda: any(node.state("db")["state"] != "running" for node in (first, second)), "one VM does not run")
        assert any(has_said(node, "/mnt/db: its lock ") for node in (first, second))
