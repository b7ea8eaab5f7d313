"""Figures from `metrics listen` and `vmctl metrics` agree with the counts of guest, kernel and tap."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.process.test_metrics import get, path_of
from tests.support.daemon import DEADLINE_S
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon
from tests.support.netpeer import Peer
from tests.support.network import Interface, Network
from tests.unit.test_exposition import samples

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.deep]

CONF = """
metrics listen "{directory}/metrics.sock"
vm "blk" {{
    disable
    memory 64M
    boot "{blk}" cmdline "bench"
    disk "{directory}/disk.raw" format raw
}}
vm "net" {{
    disable
    memory 64M
    boot "{net}"
    interface {{ lladdr fe:e1:ba:00:00:09 }}
}}
"""
REQUESTS, REQUEST_BYTES = 40, 65536
FRAMES = 200
TICKS_S = 0.1  # tolerance: the kernel counts the time of each thread in ticks


class Scraped:
    """The samples of one page, read by HTTP."""

    def __init__(self, vmd: NetDaemon) -> None:
        self.of: dict[tuple[str, ...], float] = {}
        for name, labels, value in samples(get(vmd, path_of(vmd)).text):
            vm = labels.pop("vm", "")
            self.of[(name, *(labels[key] for key in sorted(labels)), vm)] = value

    def __getitem__(self, key: tuple[str, ...]) -> float:
        return self.of[key]


def fresh(vmd: NetDaemon) -> Scraped:
    """Return figures that are newer than this call.  Older ones may be served for a second."""
    time.sleep(1.1)
    return Scraped(vmd)


def of_vmctl(vmd: NetDaemon, name: str) -> dict[str, Any]:
    """Return the figures of a VM from `vmctl metrics --json`."""
    (found,) = json.loads(vmd.must("metrics", "--json", name))["vms"]
    figures: dict[str, Any] = found
    return figures


def cpu_s(pid: int) -> float:
    """Return the processor time of a VM's processes from the kernel."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    words = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in (pid, *children)]
    return sum(int(each[11]) + int(each[12]) for each in words) / 100


def test_reported_figures_are_right(tmp_path: Path) -> None:
    """Requests, bytes and packets are exact.  Processor time is between the kernel's values before and after."""
    (tmp_path / "disk.raw").write_bytes(bytes(16 << 20))
    conf = CONF.format(directory=tmp_path, blk=guest("blk"), net=guest("net"))
    with Network() as network:
        for scope in ("all", "default"):
            network.write(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "1")
        with NetDaemon(tmp_path, network, conf) as vmd:
            vmd.wait_log("metrics are served at")
            disk(vmd)
            interface(vmd)


def disk(vmd: NetDaemon) -> None:
    """Compare with the guest's count of requests, and with processor time from the kernel."""
    vmd.must("start", "blk")
    with vmd.console("blk") as console:
        console.expect("ready", DEADLINE_S)
        before, pid = fresh(vmd), vmd.status("blk")["pid"]
        console.type(f"write bytes={REQUEST_BYTES} depth=4 count={REQUESTS} piece={REQUEST_BYTES} asleep\r")
        console.expect(f"done {REQUESTS} requests", DEADLINE_S)
        console.expect("ready", DEADLINE_S)
    least_s = cpu_s(pid)
    after = fresh(vmd)
    most_s = cpu_s(pid)
    for name, key, difference in (
        ("vmd_disk_requests_total", ("0", "write"), REQUESTS), ("vmd_disk_requests_total", ("0", "read"), 0),
        ("vmd_disk_bytes_total", ("0", "write"), REQUESTS * REQUEST_BYTES), ("vmd_disk_errors_total", ("0",), 0),
    ):  # fmt: skip
        assert after[(name, *key, "blk")] - before[(name, *key, "blk")] == difference, name
    assert after[("vmd_disk_size_bytes", "0", "blk")] == 16 << 20
    assert least_s - TICKS_S <= after[("vmd_vm_cpu_seconds_total", "blk")] <= most_s + TICKS_S
    said = of_vmctl(vmd, "blk")
    assert said["disks"][0]["write_requests"] == after[("vmd_disk_requests_total", "0", "write", "blk")]
    assert said["started"] == after[("vmd_vm_start_timestamp_seconds", "blk")]
    vmd.must("stop", "-fw", "blk")


def interface(vmd: NetDaemon) -> None:
    """Compare with the tap's counters, and with the number of frames that guest and peer have exchanged."""
    vmd.must("start", "net")
    (nic,) = vmd.interfaces("net")
    tap = Interface(vmd.network, nic["tap"])
    with Peer(tap), vmd.console("net") as console:
        console.expect("ready", DEADLINE_S)
        said = console.answer(f"frames count={FRAMES}", "ready", DEADLINE_S)
        assert "frames are through" in said
    after = fresh(vmd)
    (host,) = json.loads(vmd.network.run("ip", "-j", "-s", "link", "show", nic["tap"]))
    rx, tx = host["stats64"]["rx"], host["stats64"]["tx"]  # of the host, which receives the frames that the guest sends
    for name, unit in (("vmd_interface_packets_total", "packets"), ("vmd_interface_bytes_total", "bytes")):
        assert after[(name, "transmit", "0", "net")] == rx[unit]
        assert after[(name, "receive", "0", "net")] == tx[unit]
    assert rx["packets"] >= FRAMES
    vmd.must("stop", "-fw", "net")
