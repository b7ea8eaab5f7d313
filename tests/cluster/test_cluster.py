"""Three hosts under corosync and pacemaker, with our resource agent (`docs/fleet.md`).

The tests print times, and assert none.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import churn
from tests.support.bystander import PROMPT, vm_block
from tests.support.cluster import Cluster, Node, until
from tests.support.daemon import DEADLINE_S, ROOT, Attached
from tests.support.guests import guest
from tests.support.lostlock import stolen

MISSING = [name for name in ("corosync", "pacemakerd", "crm_resource", "qemu-img") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.root,
    pytest.mark.kvm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' '.join(MISSING)}"),
]

UPTIME = re.compile(r"up (\d+):(\d+):(\d+)")
KILLS = 10
DISK_BYTES = "8M"


def made(directory: Path) -> Cluster:
    """Return a cluster with the VM `mon`, which answers at its console, and `db`, whose disk is `directory`/db."""
    disk = directory / "db"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, DISK_BYTES], check=True)
    db = f'boot "{guest("blk")}" cmdline "churn"'
    conf = vm_block("mon") + f'vm "db" {{\n disable\n memory 64M\n {db}\n disk "{disk}" format qcow2\n}}\n'
    return Cluster(directory, conf, ("mon", "db"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Give a cluster where both VMs run."""
    begun_s = time.monotonic()
    with made(tmp_path_factory.mktemp("cluster")) as cluster:
        for vm in cluster.vms:
            cluster.wait_running(vm)
        print(f"three nodes and two VMs: {time.monotonic() - begun_s:.1f} s")
        yield cluster


def uptime_s(node: Node) -> int:
    """Return the uptime that the guest of `mon` reports."""
    with node.console("mon") as fd:
        console = Attached(fd, fd)
        found = UPTIME.search(console.answer("uptime", PROMPT, DEADLINE_S))
        while found is None:  # an earlier viewer may have typed something
            found = UPTIME.search(console.expect(PROMPT, DEADLINE_S))
    hours, minutes, seconds = map(int, found.groups())
    return hours * 3600 + minutes * 60 + seconds


def check_disk(node: Node, more: int = 3) -> None:
    """Let the guest of `db` write and read for some rounds, and check that it reports no error."""
    with node.console("db") as fd:
        churn.ask_until_rounds(Attached(fd, fd), more)


def other(cluster: Cluster, *nodes: Node) -> Node:
    """Return a running node that is not one of these."""
    return next(node for node in cluster.alive if node not in nodes)


@pytest.mark.deep
def test_a_vm_whose_process_is_killed_is_started_again(cluster: Cluster) -> None:
    """The next monitor action notices, and the cluster starts the VM again."""
    node = cluster.wait_running("mon")
    pid = node.state("mon")["pid"]
    node.must("kill", "-9", str(pid))
    until(lambda: any(each.state("mon")["pid"] not in (None, pid) for each in cluster.running("mon")), "it runs again")


@pytest.mark.deep
def test_a_vm_moves_while_its_guest_runs(cluster: Cluster) -> None:
    """Its uptime and its disk continue."""
    for vm in cluster.vms:
        source = cluster.wait_running(vm)
        target = other(cluster, source)
        before_s = uptime_s(source) if vm == "mon" else 0
        begun_s = time.monotonic()
        cluster.move(vm, target)
        assert cluster.wait_running(vm) is target
        print(f"move of {vm}: {time.monotonic() - begun_s:.1f} s")
        log = (target.own / "vmd.log").read_text()
        assert log.rindex(f"received {vm} ") > log.rfind(f"started {vm} "), "the VM was started, not moved"
        downtime = re.findall(rf"{vm}: migrated vm .*", (source.own / "vmd.log").read_text())
        print(downtime[-1])
        if vm == "mon":
            assert uptime_s(target) >= before_s
        else:
            check_disk(target)


@pytest.mark.deep
def test_a_vm_that_cannot_be_received_continues_at_its_node(cluster: Cluster) -> None:
    """The agent reports the failure, and the guest does not notice."""
    source = cluster.wait_running("mon")
    target = other(cluster, source)
    before_s = uptime_s(source)
    target.must("mv", "/usr/sbin/vmctl", "/usr/sbin/vmctl-away")
    try:
        done = source.agent("mon", "migrate_to", CRM_meta_migrate_target=target.name)
    finally:
        target.must("mv", "/usr/sbin/vmctl-away", "/usr/sbin/vmctl")
    assert done.returncode == 1
    assert "ocf-exit-reason:migrate vm command failed" in done.stderr
    assert cluster.running("mon") == [source]
    assert uptime_s(source) >= before_s


@pytest.mark.deep
def test_a_vm_is_refused_at_a_second_node(cluster: Cluster) -> None:
    """A start by hand fails, because the disk is locked."""
    source = cluster.wait_running("db")
    done = other(cluster, source).run("vmctl", "start", "db")
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert cluster.running("db") == [source]
    check_disk(source)


@pytest.mark.deep
def test_guests_outlive_a_daemon_that_is_killed(cluster: Cluster) -> None:
    """The cluster waits for the next daemon, and does nothing else."""
    node = cluster.wait_running("mon")
    pid, before_s, fenced = node.state("mon")["pid"], uptime_s(node), list(cluster.fenced)
    parent = node.must("pgrep", "-o", "-f", "^[^ ]*python[^ ]* -m vmd -d").strip()
    manager = node.must("pgrep", "-o", "-f", "tests.cluster.node vmd").strip()
    node.must("kill", "-STOP", manager)
    node.must("kill", "-9", parent)
    alone = node.agent("mon", "monitor", CRM_meta_timeout="6000")
    node.must("kill", "-CONT", manager)
    assert alone.returncode == 1, "an agent without a daemon must not report that the VM does not run"
    assert node.agent("mon", "monitor").returncode == 0
    assert node.state("mon")["pid"] == pid
    assert uptime_s(node) >= before_s
    assert cluster.fenced == fenced


PLAYBOOK = """
- hosts: nodes
  gather_facts: false
  tasks:
    - vmd.vmd.vmd_config:
        path: "{{ conf }}"
        content: "{{ lookup('file', wanted, rstrip=false) }}"
    - vmd.vmd.vmd_vm:
        name: tool
    - vmd.vmd.vmd_info:
        name: tool
      register: found
    - ansible.builtin.assert:
        that: found.vms | map(attribute='state') | list == ['running']
"""


@pytest.mark.deep
@pytest.mark.skipif(shutil.which("ansible-playbook") is None, reason="ansible-core is not installed")
def test_a_playbook_brings_all_nodes_to_one_state(cluster: Cluster, tmp_path: Path) -> None:
    """A second run changes nothing, nor does a mistake in the configuration.  The VMs form an inventory."""
    place = tmp_path / "ansible_collections/vmd"
    place.mkdir(parents=True)
    place.joinpath("vmd").symlink_to(ROOT / "fleet/ansible")
    ssh = tmp_path / "ssh"
    tmp_path.joinpath("pids").write_text(json.dumps({node.name: node.init for node in cluster.nodes}))
    ssh.write_text(f'#!/bin/sh\ncd {ROOT}\nexec {sys.executable} -m tests.cluster.node ssh {tmp_path}/pids "$@"\n')
    ssh.chmod(0o755)
    common = f"ansible_ssh_executable={ssh} ansible_python_interpreter=/usr/bin/python3"
    rows = [f"{node.name} conf={node.own}/vm.conf {common}\n" for node in cluster.nodes]
    tmp_path.joinpath("hosts").write_text("[nodes]\n" + "".join(rows))
    tmp_path.joinpath("play.yml").write_text(PLAYBOOK)
    wanted = tmp_path / "vm.conf"
    whole = cluster.conf + vm_block("tool")
    wanted.write_text(whole)
    environment = {
        **os.environ, "ANSIBLE_COLLECTIONS_PATH": str(tmp_path), "ANSIBLE_PIPELINING": "1", "HOME": str(tmp_path),
    }  # fmt: skip

    def play(*options: str) -> tuple[int, set[str]]:
        done = subprocess.run(
            ["ansible-playbook", "-i", "hosts", "-e", f"wanted={wanted}", *options, "play.yml"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        print(done.stdout[-4000:], done.stderr)
        return done.returncode, set(re.findall(r"changed=(\d+)", done.stdout))

    one = ("--limit", cluster.nodes[0].name)
    assert play("--check", *one) == (2, {"1"}), "a check would write the file, and then find no such VM"
    assert [node.state("tool")["state"] for node in cluster.nodes] == [""] * 3
    assert play() == (0, {"2"})
    assert play() == (0, {"0"})
    pids = [node.state("tool")["pid"] for node in cluster.nodes]
    wanted.write_text(whole + "vm oops\n")
    assert play(*one) == (2, {"0"})
    assert [(node.own / "vm.conf").read_text() for node in cluster.nodes] == [whole] * 3
    tmp_path.joinpath("vmd.yml").write_text(
        f"plugin: vmd.vmd.vmd\nhosts: [{', '.join(node.name for node in cluster.nodes)}]\nshell: {ssh}\n"
    )
    listed = subprocess.run(
        ["ansible-inventory", "-i", "vmd.yml", "--list"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
    groups = json.loads(listed.stdout)
    assert set(groups["vmd_running"]["hosts"]) == {"mon", "db", "tool"}, listed.stderr
    assert groups["_meta"]["hostvars"]["tool"]["vmd"]["pid"] in pids
    for node in cluster.nodes:
        node.must("vmctl", "stop", "-fw", "tool")


@pytest.mark.deep
def test_a_vm_that_has_lost_its_lock_is_stopped_and_started_again(cluster: Cluster) -> None:
    """It is paused, so its monitor fails and the cluster stops it.  It starts again only when the disk is free."""
    node = cluster.wait_running("db")
    disk = cluster.directory / "db"
    with stolen(node.host_pid("vmd: vm/db/vioblk0"), disk):
        until(lambda: "paused: disk0: its lock is lost" in (node.own / "vmd.log").read_text(), "the VM is paused")
        before = disk.read_bytes()
        until(lambda: node.state("db")["state"] in ("stopped", ""), "the cluster stops the VM")
        assert disk.read_bytes() == before
        assert not cluster.running("db")
    check_disk(cluster.wait_running("db"))


@pytest.mark.deep
def test_a_node_that_dies_is_fenced_and_its_vms_start_elsewhere(cluster: Cluster) -> None:
    """They start only after the fence agent has reported that the node is off."""
    node = cluster.wait_running("db")
    fenced = len(cluster.fenced)
    begun_s = time.monotonic()
    node.switch_off()
    now = cluster.wait_running("db", but=node)
    print(f"failover: {time.monotonic() - begun_s:.1f} s")
    assert node.name in cluster.fenced[fenced:]
    check_disk(now)
    cluster.make_whole()


@pytest.mark.deep
def test_a_node_that_is_cut_off_loses_its_vms(cluster: Cluster) -> None:
    """It has no quorum, and the other nodes fence it.  The VM never runs twice."""
    node = cluster.wait_running("db")
    cluster.cut(node)
    now = cluster.wait_running("db", but=node)
    assert not node.init, "the node was not fenced"
    check_disk(now)
    cluster.make_whole()


@pytest.mark.deep
def test_nodes_without_a_quorum_stop_their_vms(cluster: Cluster) -> None:
    """No node has a quorum, so none is fenced, and no VM runs.  The VMs run again after the network is repaired."""
    fenced = list(cluster.fenced)
    for node in cluster.nodes:
        cluster.cut(node)
    until(lambda: not any(cluster.running(vm) for vm in cluster.vms), "all stop their VMs")
    assert cluster.fenced == fenced
    for node in cluster.nodes:
        cluster.heal(node)
    for vm in cluster.vms:
        cluster.wait_running(vm)
    cluster.make_whole()


def kill_nodes(cluster: Cluster, rounds: int, seed: int) -> None:
    """Kill one node at a time, at any moment.  Each VM runs again, once, and the disk has no error."""
    chance = random.Random(seed)
    for number in range(rounds):
        victim = chance.choice(cluster.nodes)
        if chance.random() < 0.5:  # in the middle of a move
            vm = chance.choice(cluster.vms)
            source = cluster.wait_running(vm)
            mover = subprocess.Popen(other(cluster, source).entered("crm_resource", "--move", "-r", vm))
            time.sleep(chance.random())
            victim.switch_off()
            mover.wait()
        begun_s = time.monotonic()
        victim.switch_off()
        for vm in cluster.vms:
            cluster.wait_running(vm, but=victim)
        print(f"round {number}: {victim.name}, {time.monotonic() - begun_s:.1f} s")
        check_disk(cluster.wait_running("db"))
        cluster.make_whole()
        for vm in cluster.vms:
            cluster.nodes[0].run("crm_resource", "--clear", "-r", vm)


def end(cluster: Cluster) -> None:
    """Stop everything in order, and check the disk."""
    for node in cluster.alive:
        node.run("vmctl", "stop", "-fw", "db")
    cluster.end()
    checked = subprocess.run(
        ["qemu-img", "check", "--output=json", cluster.directory / "db"], capture_output=True, text=True, check=False
    )
    assert '"corruptions"' not in checked.stdout, checked.stdout
    assert checked.returncode in (0, 3), checked.stdout + checked.stderr  # 3: leaks, which any kill may leave


@pytest.mark.deep
def test_nodes_die_at_any_time(cluster: Cluster) -> None:
    """No data is lost, and no VM runs twice."""
    kill_nodes(cluster, KILLS, 14)
    end(cluster)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_nodes_die_for_any_number_of_rounds(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The same, with one round for each 200 sequences: 50 rounds by default."""
    with made(tmp_path) as cluster:
        kill_nodes(cluster, max(1, request.config.getoption("--sequences") // 200), request.config.getoption("--seed"))
        end(cluster)
