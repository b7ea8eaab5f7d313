"""Limits on the resources of all VMs together, and the daemon's cost of many VMs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon, load_modules
from tests.support.network import Network
from tests.support.program import changed_program
from tests.support.transfers import Footprint, open_files
from tests.support.waiting import pause
from vmd.config.model import DEFAULT_LIMIT_VMS
from vmd.parent.groups import HOST, LIMIT
from vmd.parent.limits import FILES_BESIDES, FILES_PER_VM, host_memory_bytes

pytestmark = [pytest.mark.root, pytest.mark.kvm]

PROMPT = "vmd-demo> "


def block(name: str, *lines: str) -> str:
    """Return a vm block of the demonstration guest."""
    options = ["disable", "memory 32M", f'boot "{guest("demo")}"', *lines]
    return f'vm "{name}" {{\n' + "".join(f"    {line}\n" for line in options) + "}\n"


CONF = block("a") + block("b") + block("smp", "vcpus 4")


@pytest.mark.parametrize(
    ("limit", "who", "words"),
    [
        ("limit vms 1", "b", "vm b: 1 VMs are running, and there is a limit of 1 (limit vms)"),
        ("limit vcpus 4", "smp", "vm smp: with its 4 there would be 5 vcpus, and there is a limit of 4 (limit vcpus)"),
        (
            "limit memory 63M", "b",
            "vm b: with its 32.0M guests would have 64.0M of memory, and there is a limit of 63.0M (limit memory)",
        ),
    ],
    ids=["vms", "vcpus", "memory"],
)  # fmt: skip
def test_a_start_beyond_a_limit_is_refused(tmp_path: Path, limit: str, who: str, words: str) -> None:
    """The start fails with a message.  Running VMs go on, may reset themselves, and free their share when they end."""
    with Daemon(tmp_path, f"{limit}\n{CONF}") as vmd:
        vmd.must("start", "a")
        refused = vmd.vmctl("start", who)
        assert (refused.returncode, refused.stderr) == (1, f"vmctl: start vm command failed: {words}\n")
        assert vmd.status(who)["state"] == "stopped"
        with vmd.console("a") as console:
            console.expect(PROMPT, DEADLINE_S)
            console.answer("reset", PROMPT)  # a reset VM does not compete with itself
        vmd.must("stop", "-fw", "a")
        vmd.must("start", who)


def test_limits_change_with_the_configuration(tmp_path: Path) -> None:
    """A lower limit ends nothing, not even by a reset of the guest; a higher one lets the next start through."""
    with Daemon(tmp_path, CONF) as vmd:
        vmd.must("start", "a")
        vmd.must("start", "b")
        vmd.conf.write_text("limit vms 1\n" + CONF)
        assert vmd.must("reload") == ""
        assert [row["state"] for row in vmd.rows()] == ["running", "running", "stopped"]
        refused = vmd.vmctl("start", "smp")
        assert "2 VMs are running, and there is a limit of 1 (limit vms)" in refused.stderr
        with vmd.console("a") as console:
            console.type("\r")
            console.expect(PROMPT, DEADLINE_S)
            console.answer("reset", PROMPT)
        extra = tmp_path / "extra.conf"
        extra.write_text("limit vms 3\n")
        vmd.must("load", extra)
        vmd.must("start", "smp")


# Replaces the kernel's report about a group with a killed process: this host may have no controller for memory.
KILLED = """

def memory_lack(group):
    return {lack!r}
"""


@pytest.mark.parametrize(
    ("lack", "words"),
    [
        pytest.param(LIMIT, "memory limit of 160M reached: ", id="limit"),
        pytest.param(HOST, "host out of memory: ", id="host", marks=pytest.mark.deep),
    ],
)
def test_a_vm_killed_for_its_memory_has_that_reason(tmp_path: Path, lack: str, words: str) -> None:
    """The log, `vmctl status` and the event report it; the next end does not."""
    code = changed_program(tmp_path / "code", {"vmd/parent/groups.py": KILLED.format(lack=lack)})
    with Daemon(tmp_path, block("a", "limit { memory 160M }"), code=code) as vmd:
        vmd.must("start", "a")
        os.kill(vmd.status("a")["pid"], signal.SIGKILL)
        vmd.wait_state("a", "stopped")
        row = vmd.status("a")
        events = [json.loads(line) for line in vmd.must("events", "-l", "--json", "a").splitlines()]
        vmd.must("start", "a")
        vmd.must("stop", "-fw", "a")
        again = vmd.status("a")
        text = vmd.log
    expected = words + "vm process was killed by SIGKILL"
    assert row["ended"]["text"] == expected
    assert (events[-1]["event"], events[-1]["text"]) == ("crash", expected)
    assert f"a: terminated vm 1: {expected}" in text
    assert lack not in again["ended"]["text"]


def test_a_batch_goes_as_far_as_the_limit(tmp_path: Path) -> None:
    """VMs beyond the limit show the reason in `vmctl status`."""
    enabled = "".join(block(name).replace("disable", "enable") for name in ("a", "b", "c"))
    with Daemon(tmp_path, "limit vms 2\nstaggered start parallel 3 delay 1\n" + enabled) as vmd:
        for name in ("a", "b"):
            vmd.wait_state(name, "running")
        row = vmd.status("c")
        assert (row["state"], "limit vms" in row["text"]) == ("stopped", True)


def test_a_received_vm_counts_for_the_limits(tmp_path: Path) -> None:
    """The limits apply to the VM in a stream.  It is refused as soon as its size is known."""
    with Daemon(tmp_path, "limit vcpus 4\n" + CONF) as vmd:
        vmd.must("start", "smp")
        stream = tmp_path / "stream"
        with stream.open("wb") as out:
            subprocess.run(
                [sys.executable, "-m", "vmctl", "-s", vmd.socket, "send", "smp"],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, timeout=DEADLINE_S, check=True,
            )  # fmt: skip
        vmd.must("start", "a")
        with stream.open("rb") as back:
            refused = subprocess.run(
                [sys.executable, "-m", "vmctl", "-s", vmd.socket, "receive", "smp"],
                cwd=ROOT, stdin=back, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
            )  # fmt: skip
        assert refused.returncode == 1
        assert "vm smp: with its 4 there would be 5 vcpus" in refused.stderr
        assert vmd.status("smp")["state"] == "stopped"


def test_more_than_the_host_has(tmp_path: Path) -> None:
    """The default limit is twice the memory of the host.  A guest may be larger than the host."""
    host_bytes = host_memory_bytes()
    fit = 2 * host_bytes >> 40  # number of guests with 1 TiB
    conf = "".join(block(f"n{number}").replace("32M", "1024G") for number in range(fit + 1))
    conf += block("large").replace("32M", str(host_bytes + (64 << 20)))
    with Daemon(tmp_path, conf) as vmd:
        vmd.must("start", "large")
        vmd.must("stop", "-fw", "large")
        for number in range(fit):
            vmd.must("start", f"n{number}")
        refused = vmd.vmctl("start", f"n{fit}")
        assert f"vm n{fit}: with its 1.0T guests would have {fit + 1}.0T of memory" in refused.stderr
        assert "twice what this host has (limit memory)" in refused.stderr


def test_descriptors_of_a_vm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A VM with all devices costs no process more than FILES_PER_VM descriptors.  The test prints the numbers."""
    load_modules()
    kernel, disc = tmp_path / "kernel", tmp_path / "disc"
    kernel.write_bytes(guest("demo").read_bytes())
    disc.write_bytes(bytes(4096))
    disks = []
    for number in range(4):
        disks.append(tmp_path / f"disk{number}")
        disks[-1].write_bytes(bytes(1 << 20))
    options = [word for disk in disks for word in ("-d", f"raw:{disk}")]
    command: list[str | Path] = ["start", "-m", "16M", "-i", "4", "-r", disc, "-b", kernel, "-I", disc, *options]
    command += ["-C", "hostname=rick"]
    with Network() as network, NetDaemon(tmp_path, network, block("a")) as vmd:
        idle = Footprint(vmd).files
        vmd.must(*command, "first")
        # The descriptor of its console, which is kept for a moment, is counted for the second VM.
        vmd.must("stop", "-fw", "first")
        vmd.must(*command, "second")
        deadline = time.monotonic() + DEADLINE_S
        while True:  # descriptors for a new process in reserve are not the VM's
            busy = Footprint(vmd).files
            cost = {title: busy[title] - idle[title] for title in idle}
            if max(cost.values()) <= FILES_PER_VM or time.monotonic() > deadline:
                break
            pause()
        own = open_files(vmd.status("second")["pid"])
        limits = Path(f"/proc/{vmd.processes()['vmd: vmm']}/limits").read_text()
    (most,) = [int(line.split()[3]) for line in limits.splitlines() if line.startswith("Max open files")]
    with capsys.disabled():
        print(f"\ndescriptors of a VM with everything: {cost}, itself {own}; at most {most}", end="")
    assert max(cost.values()) <= FILES_PER_VM
    assert most >= FILES_PER_VM * DEFAULT_LIMIT_VMS + FILES_BESIDES
    assert own < 512
