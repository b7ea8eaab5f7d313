"""Hosts whose storage is cut in two: a volume of GlusterFS, on three hosts, without a cluster above it.

Bricks drop the locks of a client that they do not hear of.  So another host can have the disk, while the guest of the
first one runs.
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
    """Have hosts, of which the first one runs `db`."""
    disk = f"{GlusterHosts.place}/db"
    conf = f'vm "db" {{\n disable\n memory 64M\n boot "{guest("blk")}" cmdline "churn"\n disk "{disk}" format raw\n}}\n'
    with GlusterHosts(directory, conf, replicas=replicas, options=PING | options) as made:
        first = made.nodes[0]
        first.must("qemu-img", "create", "-q", "-f", "raw", disk, "8M")
        first.must("vmctl", "start", "db")
        check_disk(first)
        yield made


def check_disk(node: Node) -> None:
    """Have the guest write and read some rounds, and say that nothing is wrong."""
    with node.console("db") as fd:
        churn.ask_until_rounds(Attached(fd, fd), 3)


def has_said(node: Node, text: str) -> bool:
    """Return whether a daemon has logged a text."""
    return text in (node.own / "vmd.log").read_text()


def test_a_host_without_a_quorum_of_its_storage_does_not_go_on(tmp_path: Path) -> None:
    """Its guest stands still, or has ended, when another host gets the disk; nothing has it go on or write then."""
    with hosts(tmp_path, QUORUM, "replica", "3", "arbiter", "1") as made:
        first, second, _ = made.nodes
        assert "in use" in second.run("vmctl", "start", "db").stderr

        made.cut(first)
        until(lambda: has_said(first, "/mnt/db: its lock may be lost: "), "the lock is missed")
        # A VM whose requests hang in its storage cannot stand still, and is ended.
        until(lambda: first.state("db")["state"] in ("paused", "stopped"), "it does not run")
        until(lambda: second.run("vmctl", "start", "db").returncode == 0, "the disk is free")
        made.heal(first)

        assert first.run("vmctl", "unpause", "db").returncode == 1
        first.run("vmctl", "stop", "-w", "db")
        assert first.state("db")["state"] == "stopped"
        check_disk(second)


def test_two_hosts_that_had_the_same_disk_do_not_go_on(tmp_path: Path) -> None:
    """Without a quorum each half hands out the lock.  When they meet again, one VM at least stands still or ends."""
    with hosts(tmp_path, NO_QUORUM, "replica", "2") as made:
        first, second, _ = made.nodes
        made.cut(first)
        until(lambda: second.run("vmctl", "start", "db").returncode == 0, "the other half hands out the lock")
        made.heal(first)
        until(lambda: any(node.state("db")["state"] != "running" for node in (first, second)), "one does not run")
        assert any(has_said(node, "/mnt/db: its lock ") for node in (first, second))
