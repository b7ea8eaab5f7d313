"""Fifty VMs on one host.  They start in batches, use almost no processor time while idle, and stop."""

import os
import time
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.guests import guest
from tests.support.pss import pss_kib
from vmd.client import Client

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(300)]

VMS = 50
MEMORY_MIB = 16
PARALLEL = 10
IDLE_S = 2.0
ROUNDS = 10
START_S = 120.0
BUSY_LIMIT = 0.5  # of one processor, for all VMs.  A single VM that spins would use more


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.deep
def test_fifty_vms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All VMs run, sleep while idle, and stop by the power button.  The test prints figures."""
    conf = f"staggered start parallel {PARALLEL} delay 1\n" + "".join(
        f'vm "n{number}" {{\n memory {MEMORY_MIB}M\n boot "{guest("tick")}" cmdline "idle"\n}}\n'
        for number in range(VMS)
    )
    began = time.monotonic()
    with Daemon(tmp_path, conf) as vmd:
        assert any(row["state"] == "waiting" for row in vmd.rows()), "no VM waits for its turn"
        rows = vmd.rows()
        while not all(row["state"] == "running" for row in rows):
            assert time.monotonic() < began + START_S, rows
            vmd.wait_log("successfully")
            rows = vmd.rows()
        started_s = time.monotonic() - began
        for row in rows:
            with vmd.console(row["name"]) as console:
                console.expect("READY", START_S)
        pids = [row["pid"] for row in rows]
        before = sum(cpu_s(pid) for pid in pids)
        idle_from = time.monotonic()
        time.sleep(IDLE_S)  # the time of the measurement
        share = (sum(cpu_s(pid) for pid in pids) - before) / (time.monotonic() - idle_from)
        costs = sorted(pss_kib(pid) for pid in pids)
        spent_s = cpu_s(vmd.pid)
        client = Client(str(vmd.socket))
        for _ in range(ROUNDS):
            assert [vm.entropy is not None and vm.entropy.counted for vm in client.figures()] == [True] * VMS
        client.close()
        asked_s = (cpu_s(vmd.pid) - spent_s) / ROUNDS
        vmd.must("stop", "-aw", timeout_s=START_S)
        assert all(row["state"] == "stopped" for row in vmd.rows())
    with capsys.disabled():
        print(
            f"\n{VMS} VMs: running after {started_s:.1f} s, idle together {share * 100:.2f} % of a processor, "
            f"figures of all take the daemon {asked_s * 1000:.0f} ms, "
            f"memory beyond the guest's {costs[len(costs) // 2] / 1024:.1f} MiB PSS each (median)"
        )
    assert share < BUSY_LIMIT
