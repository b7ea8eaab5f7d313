"""Counters and resource use of VMs, as the daemon reports them, compared with the host's and the guest's."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.test_daemon import PROMPT
from tests.support import schema
from tests.support.daemon import DEADLINE_S
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon
from tests.support.network import Network
from vmd.client import Client
from vmd.ipc.figures import CdromFigures
from vmd.ipc.messages.figures import VmFigures
from vmd.parent.groups import directory_of

pytestmark = [pytest.mark.root, pytest.mark.kvm]

CONF = """
vm "demo" {{
    disable
    memory 128M
    vcpus 2
    boot "{kernel}"
    disk "{directory}/disk.raw" format raw
    interface {{ switch "lan" }}
}}
vm "blk" {{
    disable
    memory 64M
    boot "{blk}" cmdline "bench"
    disk "{directory}/busy.raw" format raw
    cdrom "{directory}/disc.iso"
}}
switch "lan" {{ interface br9 }}
"""
WITHOUT_PTRACE = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
TICK_NS = 10_000_000
DISK_BYTES = 16 << 20


@pytest.fixture(scope="module")
def vmd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetDaemon]:
    """Yield a daemon without the right to inspect other processes."""
    tmp_path = tmp_path_factory.mktemp("figures")
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "busy.raw").write_bytes(bytes(DISK_BYTES))
    (tmp_path / "disc.iso").write_bytes(bytes(4096))
    with Network() as network:
        conf = CONF.format(kernel=guest("demo"), blk=guest("blk"), directory=tmp_path)
        daemon = NetDaemon(tmp_path, network, conf)
        daemon.prefix = [*WITHOUT_PTRACE]
        with daemon:
            yield daemon


def figures(vmd: NetDaemon, name: str = "demo") -> VmFigures:
    """Return the daemon's figures of a VM."""
    client = Client(str(vmd.socket))
    try:
        (row,) = client.figures(name)
    finally:
        client.close()
    return row


def vcpus_ns(pid: int) -> list[int]:
    """Return the vCPUs' processor time from the kernel."""
    tasks = {(task / "comm").read_text().strip(): task for task in Path(f"/proc/{pid}/task").iterdir()}
    return [int((tasks[f"vcpu{index}"] / "schedstat").read_text().split()[0]) for index in range(2)]


def ticks_ns(pid: int) -> int:
    """Return the processor time of a process and of its running children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    words = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in (pid, *children)]
    return sum(int(each[11]) + int(each[12]) for each in words) * TICK_NS


def used_us(group: Path) -> int:
    """Return the processor time of a control group."""
    found = re.search(r"usage_usec (\d+)", (group / "cpu.stat").read_text())
    assert found is not None
    return int(found[1])


def test_processor_and_memory(vmd: NetDaemon) -> None:
    """Values are between the kernel's before and after; a paused guest uses no processor time."""
    assert (figures(vmd).pid, figures(vmd).starts) == (0, 0)
    vmd.must("start", "demo")
    with vmd.console("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
        before = figures(vmd)
        console.answer("spin 1", PROMPT)
        pid = vmd.status("demo")["pid"]
        least, least_ns = vcpus_ns(pid), ticks_ns(pid)
        group = Path(directory_of(pid))
        assert group.name.startswith("vm-")
        least_us = used_us(group)
        row = figures(vmd)
        most_us = used_us(group)
        assert row.group is not None
        assert row.group.cpu_ns is not None
        assert least_us * 1000 <= row.group.cpu_ns <= most_us * 1000
        most, most_ns = vcpus_ns(pid), ticks_ns(pid)
        assert row.pid == pid
        for had, low, vcpu, high in zip(before.vcpus, least, row.vcpus, most, strict=True):
            assert had.cpu_ns <= low <= vcpu.cpu_ns <= high
        assert before.vcpus[0].cpu_ns < row.vcpus[0].cpu_ns  # the second vCPU has not been started
        assert least_ns <= row.cpu_ns <= most_ns

        guest_memory = [Path(f"/proc/{pid}/fd") / name for name in os.listdir(f"/proc/{pid}/fd")]
        (memory,) = {path.stat().st_blocks * 512 for path in guest_memory if "guest-memory" in os.readlink(path)}
        assert row.guest_bytes == memory
        anonymous = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert anonymous is not None
        assert row.process_bytes > int(anonymous[1]) << 10
        assert row.memory_bytes == 128 << 20

        vmd.must("pause", "demo")
        still = figures(vmd)
        assert (still.state, [vcpu.cpu_ns for vcpu in still.vcpus]) == ("paused", vcpus_ns(pid))
        vmd.must("unpause", "demo")

        console.answer("reset", PROMPT)
        again = figures(vmd)
        assert (again.starts, again.restarts, again.started_s) == (1, 1, row.started_s)
        assert again.pid != pid
        assert [vcpu.cpu_ns > 0 for vcpu in again.vcpus] == [True, True]
    vmd.must("stop", "-fw", "demo")
    ended = figures(vmd)
    assert (ended.pid, ended.starts, ended.started_s) == (0, 1, 0)
    assert ended.ended is not None
    assert ended.ended.how == "killed"


def test_a_disk_counts_what_its_guest_does(vmd: NetDaemon) -> None:
    """Requests and bytes are exact once the guest has its answers, and `status -v` shows them."""
    began_ns = time.monotonic_ns()
    vmd.must("start", "blk")
    with vmd.console("blk") as console:
        console.expect("ready", DEADLINE_S)
        idle = figures(vmd, "blk")
        (disk,) = idle.disks
        assert (disk.counted, disk.size_bytes, disk.in_flight) == (True, DISK_BYTES, 0)
        assert disk.path == str(vmd.directory / "busy.raw")
        assert idle.cdrom == CdromFigures(index=0, counted=True, size_bytes=4096)
        assert idle.entropy is not None
        assert idle.entropy.counted
        for command, requests, length in (("randread", 60, 4096), ("write", 40, 65536), ("read", 12, 1 << 20)):
            before = figures(vmd, "blk").disks[0]
            console.type(f"{command} bytes={length} depth=4 count={requests} piece={min(length, 65536)} asleep\r")
            console.expect(f"done {requests} requests", DEADLINE_S)
            after = figures(vmd, "blk").disks[0]
            changed = {
                name: value - getattr(before, name) for name, value in after.as_dict().items()
                if name.endswith(("_requests", "_bytes", "errors", "refused", "in_flight")) and name != "size_bytes"
            }  # fmt: skip
            did = "write" if command == "write" else "read"
            assert {name: value for name, value in changed.items() if value} == {
                f"{did}_requests": requests, f"{did}_bytes": requests * length,
            }  # fmt: skip
            assert 0 < after.busy_ns - before.busy_ns < time.monotonic_ns() - began_ns
            assert getattr(after, f"{did}_ns") > getattr(before, f"{did}_ns")
            console.expect("ready", DEADLINE_S)
    said = vmd.must("status", "-v", "blk")
    assert f"blk disk 0: 16.0M\n    read 72 requests, {60 * 4096 + (12 << 20)} bytes, " in said
    (row,) = schema.check(vmd.must("status", "-v", "--json", "blk"), "status")["vms"]
    counted = row["figures"]["disks"][0]
    assert (counted["write_requests"], counted["write_bytes"]) == (40, 40 << 16)
    vmd.must("stop", "-fw", "blk")
    assert not figures(vmd, "blk").disks[0].counted


@pytest.mark.deep
def test_a_disk_that_waits_for_its_limits_is_one_event(vmd: NetDaemon) -> None:
    """A disk that waits often is one event; work without a limit is none."""
    conf = vmd.conf.read_text()
    line = f'"{vmd.directory}/busy.raw" format raw'
    vmd.conf.write_text(conf.replace(line, f"{line} limit iops 40") + "\n")
    vmd.must("reload")
    vmd.must("start", "blk")
    deadline_s, after = time.monotonic() + 2 * DEADLINE_S, 0
    with vmd.console("blk") as console:
        while after < 2:
            console.expect("ready", DEADLINE_S)
            console.type("randread bytes=4096 depth=4 count=400 piece=4096 asleep\r")
            console.expect("done 400 requests", DEADLINE_S)
            heard = [json.loads(line) for line in vmd.must("events", "-l", "--json", "blk").splitlines()]
            found = [event for event in heard if event["event"] == "throttled"]
            after += bool(found)
            assert time.monotonic() < deadline_s
    (event,) = found
    assert event["device"] == "disk0"
    assert re.fullmatch(r"limit iops 40: has waited for \d+\.\d s of the last \d+", event["text"])
    vmd.must("stop", "-fw", "blk")
    vmd.conf.write_text(conf)
    vmd.must("reload")


def test_a_disk_waits_for_its_limits_and_counts_that(vmd: NetDaemon) -> None:
    """The limits are those of vm.conf, also after a reload while the guest works."""
    conf = vmd.conf.read_text()
    line = f'"{vmd.directory}/busy.raw" format raw'
    vmd.conf.write_text(conf.replace(line, f"{line} limit iops 40 rate 64M") + "\n")
    vmd.must("reload")
    vmd.must("start", "blk")
    with vmd.console("blk") as console:
        for rate in (64, 32):
            console.expect("ready", DEADLINE_S)
            before = figures(vmd, "blk").disks[0]
            console.type("randread bytes=4096 depth=4 count=60 piece=4096 asleep\r")
            console.expect("done 60 requests", DEADLINE_S)
            disk = figures(vmd, "blk").disks[0]
            assert (disk.iops_limit, disk.rate_limit) == (40, rate << 20)
            assert disk.read_requests - before.read_requests == 60
            assert disk.throttled > before.throttled
            assert disk.throttled_ns > before.throttled_ns
            vmd.conf.write_text(conf.replace(line, f"{line} limit iops 40 rate 32M"))
            vmd.must("reload")
        said = vmd.must("status", "-v", "blk")
        assert re.search(r"limited to 40 requests and 32.0M each second, throttled \d+ times, for \d+\.\d\d s\n", said)
        vmd.conf.write_text(conf)
        vmd.must("reload")
        for _ in range(20):  # its process gets the limits a moment later
            console.expect("ready", DEADLINE_S)
            before = figures(vmd, "blk").disks[0]
            console.type("randread bytes=4096 depth=4 count=60 piece=4096 asleep\r")
            console.expect("done 60 requests", DEADLINE_S)
            disk = figures(vmd, "blk").disks[0]
            assert (disk.iops_limit, disk.rate_limit) == (0, 0)
            assert disk.read_requests - before.read_requests == 60
            if disk.throttled == before.throttled:
                break
        assert (disk.throttled, disk.throttled_ns) == (before.throttled, before.throttled_ns)
    vmd.must("stop", "-fw", "blk")
