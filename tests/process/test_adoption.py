"""A daemon is killed or restarted, and its successor takes over the VMs."""

import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.test_daemon import demo, wait_gone
from tests.process.test_network import block
from tests.support.blkdisk import Disk
from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon
from tests.support.keeper import KeptDaemon
from tests.support.netpeer import Peer
from tests.support.network import Interface, Network
from tests.support.transfers import Footprint, ended, vmctl

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(400)]

PROMPT = "vmd-demo> "
ROUNDS_OF_LEAKS = 12
LINGERS = f'vm "mci" {{\n disable\n memory 32M\n boot "{guest("vmmci")}" cmdline "linger"\n}}\n'
OTHER_VERSION = "0.1.99"


class NetKeptDaemon(NetDaemon, KeptDaemon):
    """A daemon with a keeper, in a network of its own."""


@pytest.fixture
def vmd(tmp_path: Path) -> Iterator[KeptDaemon]:
    """Yield a daemon with a keeper and two stopped VMs."""
    with KeptDaemon(tmp_path, demo("a") + demo("b")) as daemon:
        yield daemon


def lasting(vmd: Daemon) -> dict[str, Any]:
    """Return the status of the VM without its memory use, which changes when unneeded reserve processes end."""
    return {key: value for key, value in vmd.status("a").items() if key != "resident_bytes"}


def again(vmd: KeptDaemon) -> None:
    """Kill the daemon, and start the next one."""
    vmd.kill()
    vmd.start()


def figures(vmd: KeptDaemon, name: str) -> dict[str, Any]:
    """Return the counters of a paused VM."""
    (row,) = json.loads(vmd.must("status", "-v", "--json", name))["vms"]
    found: dict[str, Any] = row["figures"]
    return {key: found[key] for key in ("starts", "vcpus", "entropy", "guest_bytes")}


def until(what: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


# --- VMs that are taken over -------------------------------------------------------------------------------


def test_guests_go_on_when_the_daemon_is_killed(vmd: KeptDaemon) -> None:
    """Guests keep their processes, consoles and states, and the next daemon can control them completely."""
    for name in "ab":
        vmd.must("start", name)
    vmd.must("pause", "b")
    before = {row["name"]: row for row in vmd.rows()}
    counted = figures(vmd, "b")
    assert counted["entropy"]["counted"]
    with vmd.console("a") as console:
        console.expect(PROMPT, DEADLINE_S)
        again(vmd)
        assert console.answer("echo still here", "still here\r\n" + PROMPT)

    after = {row["name"]: row for row in vmd.rows()}
    for name in "ab":
        assert after[name] == before[name]
    assert after["b"]["state"] == "paused"
    assert figures(vmd, "b") == counted
    vmd.must("unpause", "b")
    with vmd.attached("b") as console:
        console.expect(PROMPT, DEADLINE_S)
    vmd.must("stop", "-w", "a")
    vmd.must("stop", "-fw", "b")
    vmd.must("start", "a")


@pytest.mark.deep
def test_interfaces_disks_and_owner_go_on(network: Network, tmp_path: Path) -> None:
    """Taps, addresses and rules are as before; a guest that resets itself has the same ones, and its disk."""
    disk = Disk(tmp_path / "disk.raw")
    kernel = "local interface { locked lladdr, vhost }"  # the rules include filters on its tap
    conf = block("a", "interface", "local interface", kernel, f"disk {disk.path}", "owner nobody")
    with NetKeptDaemon(tmp_path, network, conf, vhost_net=True) as vmd:
        vmd.must("start", "a")
        with vmd.console("a") as console:
            console.expect(PROMPT, DEADLINE_S)
            before, shown = vmd.interfaces("a"), network.run("ip", "address") + network.run("nft", "list", "ruleset")
            row = lasting(vmd)
            again(vmd)
            assert vmd.interfaces("a") == before
            assert "table netdev vmd_tap2" in shown
            assert network.run("ip", "address") + network.run("nft", "list", "ruleset") == shown
            assert lasting(vmd) == row

            console.answer("reset", PROMPT)
            vmd.wait_log("a: rebooting (vm 1)")
            assert vmd.wait_state("a", "running")["restarts"] == 1
            assert vmd.interfaces("a") == before
            again(vmd)
            assert vmd.status("a")["restarts"] == 1
            console.answer("reset", PROMPT)
            assert vmd.interfaces("a") == before
        vmd.must("stop", "-fw", "a")
        until(lambda: "tap" not in network.run("ip", "link"))  # the answer does not wait for the removal
    disk.check_untouched()


@pytest.mark.deep
def test_a_stop_that_is_under_way_goes_on(tmp_path: Path) -> None:
    """The VM's own process keeps the deadline of the stop, and the next daemon can stop it by force earlier."""
    with KeptDaemon(tmp_path, LINGERS + LINGERS.replace("mci", "other", 1)) as vmd:
        for name in ("mci", "other"):
            vmd.must("start", name)
            with vmd.console(name) as console:
                console.expect("rtc", DEADLINE_S)
                vmd.must("stop", name)
                console.expect("acknowledged", DEADLINE_S)
        again(vmd)
        assert [row["state"] for row in vmd.rows()] == ["stopping"] * 2
        assert "already stopping" in vmd.vmctl("stop", "mci").stderr
        vmd.must("stop", "-fw", "other")
        vmd.must("wait", "mci", timeout_s=300)
        assert vmd.status("mci")["text"] == "did not shut down in 120 s"


# --- what happens while there is no daemon -------------------------------------------------------------------


@pytest.mark.deep
def test_a_guest_that_resets_itself_meanwhile_boots_again(network: Network, tmp_path: Path) -> None:
    """The guest boots again when the next daemon runs, with the same console and taps."""
    with NetKeptDaemon(tmp_path, network, block("a", "local interface")) as vmd:
        vmd.must("start", "a")
        before = vmd.interfaces("a")
        with vmd.console("a") as console:
            console.expect(PROMPT, DEADLINE_S)
            pid = vmd.status("a")["pid"]
            vmd.kill()
            console.type("reset\r")
            wait_gone([pid])
            vmd.start()
            console.expect(PROMPT, DEADLINE_S)
        assert vmd.wait_state("a", "running")["restarts"] == 1
        assert vmd.interfaces("a") == before


@pytest.mark.deep
def test_a_guest_that_ends_meanwhile_has_ended(vmd: KeptDaemon) -> None:
    """The next daemon knows how the VM ended and shows its last output, and the VM can be started again."""
    vmd.must("start", "a")
    with vmd.console("a") as console:
        console.expect(PROMPT, DEADLINE_S)
        pid = vmd.status("a")["pid"]
        vmd.kill()
        console.type("off\r")
        wait_gone([pid])
    vmd.start()
    assert vmd.wait_state("a", "stopped")["text"] == "powered off by the guest"
    assert "switching off" in vmd.vmctl("console", "a").stdout
    vmd.must("start", "a")


@pytest.mark.deep
def test_a_vm_process_that_is_killed_meanwhile_has_ended(vmd: KeptDaemon) -> None:
    """The next daemon reports the end of the VM."""
    vmd.must("start", "a")
    pid = vmd.status("a")["pid"]
    vmd.kill()
    os.kill(pid, signal.SIGKILL)
    vmd.start()
    assert "SIGKILL" in vmd.wait_state("a", "stopped")["text"]


@pytest.mark.deep
def test_a_vm_that_is_sent_meanwhile_stays(vmd: KeptDaemon) -> None:
    """The VM stays, because its sender's connection ended with the daemon."""
    vmd.must("start", "a")
    reader, writer = os.pipe()  # nobody reads it, so the send does not end
    sender = vmctl(vmd, "send", "a", stdout=writer)
    os.close(writer)
    vmd.wait_state("a", "sending")
    again(vmd)
    vmd.wait_state("a", "running")
    os.close(reader)
    assert ended(sender)[0] != 0
    with vmd.attached("a") as console:
        assert console.answer("echo here", "here\r\n" + PROMPT)


@pytest.mark.deep
def test_without_its_vmm_nothing_goes_on(vmd: KeptDaemon) -> None:
    """VMs whose vmm has died are stopped, and the next daemon starts without them."""
    vmd.must("start", "a")
    vmm = vmd.processes()["vmd: vmm"]
    vmd.kill()
    os.kill(vmm, signal.SIGKILL)
    vmd.keeper.wait_names("listener", "state")
    vmd.start()
    assert vmd.wait_state("a", "stopped")["text"] == ""
    vmd.must("start", "a")


# --- configurations ------------------------------------------------------------------------------------------


def test_a_broken_vm_conf_ends_nobody(vmd: KeptDaemon) -> None:
    """After a crash vm.conf is not read.  After a restart its errors are logged and the old one stays in force."""
    vmd.must("start", "a")
    row = lasting(vmd)
    vmd.conf.write_text(demo("a") + "nonsense\n")
    again(vmd)
    assert lasting(vmd) == row
    assert "syntax error" not in vmd.log
    vmd.wait_log("the configuration is that of the vmd before this one")

    vmd.restart()
    vmd.wait_log("configuration unchanged")
    assert lasting(vmd) == row
    assert [each["name"] for each in vmd.rows()] == ["a", "b"]
    assert vmd.vmctl("reload").returncode != 0

    vmd.conf.write_text(demo("a") + demo("c"))
    vmd.restart()
    until(lambda: [each["name"] for each in vmd.rows()] == ["a", "c"])
    assert vmd.status("a")["pid"] == row["pid"]
    vmd.must("stop", "-fw", "a")


@pytest.mark.deep
def test_a_vm_that_vm_conf_does_not_name_goes_on(vmd: KeptDaemon) -> None:
    """A VM that a client described, with its own kernel, boots again from that kernel."""
    vmd.must("start", "mine", "-m", "32M", "-b", guest("demo"))
    again(vmd)
    with vmd.console("mine") as console:
        console.answer("echo here", "here\r\n" + PROMPT)
        console.answer("reset", PROMPT)
    assert vmd.wait_state("mine", "running")["restarts"] == 1
    vmd.must("stop", "-fw", "mine")
    assert "mine" not in [row["name"] for row in vmd.rows()]


@pytest.mark.deep
def test_a_state_that_is_damaged(vmd: KeptDaemon) -> None:
    """Without it the owners of guests are unknown: the guests are asked to shut down, and the daemon starts afresh."""
    vmd.must("start", "a")
    with vmd.console("a") as console:
        console.expect(PROMPT, DEADLINE_S)
    vmd.kill()
    os.pwrite(vmd.keeper.fd("state"), bytes(4096), 0)
    vmd.start()  # long before the guests would be killed
    assert "its guests are shut down" in vmd.log
    assert vmd.status("a")["state"] == "stopped"
    vmd.must("start", "a")
    again(vmd)
    assert vmd.status("a")["state"] == "running"


@pytest.mark.deep
def test_a_daemon_that_cannot_go_on_leaves_guests_to_the_next(tmp_path: Path) -> None:
    """A broken program ends at every start.  Guests run on, and a working program then adopts them."""
    code = copy(tmp_path)
    with KeptDaemon(tmp_path, demo("a")) as vmd:
        vmd.must("start", "a")
        row = lasting(vmd)
        (code / "vmd/priv/main.py").write_text("raise SystemExit(1)\n")
        with vmd.console("a") as console:
            console.expect(PROMPT, DEADLINE_S)
            vmd.kill()
            vmd.code = code
            for _ in range(2):
                with pytest.raises(AssertionError, match="did not start"):
                    vmd.start()
            vmd.code = ROOT
            vmd.start()
            assert console.answer("echo still here", "still here\r\n" + PROMPT)
        assert lasting(vmd) == row
        again(vmd)
        assert lasting(vmd) == row
        vmd.must("stop", "-fw", "a")


# --- again and again -----------------------------------------------------------------------------------------


@pytest.mark.deep
def test_nothing_is_left_of_many_daemons(vmd: KeptDaemon) -> None:
    """The descriptors and processes of the daemon and vmm do not increase with each killed daemon."""
    vmd.must("start", "a")
    again(vmd)
    vmm = family(vmd)["vmd: vmm"]
    seen = []
    for number in range(ROUNDS_OF_LEAKS):
        vmd.must("start", "b")
        again(vmd)
        vmd.must("stop", "-fw", "b")
        files = settled_files(vmd, vmm)
        if number >= ROUNDS_OF_LEAKS // 2:
            seen.append(files)
    assert family(vmd)["vmd: vmm"] == vmm
    print(seen)
    for each in seen[1:]:
        assert each["vmm"] <= seen[0]["vmm"] + 2
        assert each["parent"] <= seen[0]["parent"] + 4
    assert vmd.keeper.names == ["listener", "state", "vmm-1"]


def settled_files(vmd: KeptDaemon, vmm: int) -> dict[str, int]:
    """Wait until the reserve is there and nothing opens or closes files.  Return the numbers of open files."""
    found: dict[str, int] = {}
    same = 0

    def settled() -> bool:
        nonlocal found, same
        last, found = found, {"vmm": open_files(vmm), "parent": open_files(vmd.pid)}
        same = same + 1 if found == last and {"vmd: opener", "vmd: control/reserve"} <= vmd.processes().keys() else 0
        return same >= 5

    until(settled)
    return found


def open_files(pid: int) -> int:
    """Return how many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def family(vmd: KeptDaemon) -> dict[str, int]:
    """Return the processes of the daemon and of its adopted VMs, whose parent is vmm."""
    pid = vmd.status("a")["pid"]
    vmm = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return {**vmd.processes(), "vmd: vmm": vmm}


@pytest.mark.deep
def test_frames_and_sectors_are_not_lost(network: Network, tmp_path: Path) -> None:
    """While daemons are killed, one guest checks all its network data, and another guest all its disk data."""
    for scope in ("all", "default"):
        network.write(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "1")
    disk = Disk(tmp_path / "disk.raw")
    net = f'vm "net" {{\n disable\n memory 64M\n boot "{guest("net")}"\n interface\n}}\n'
    blk = f'vm "blk" {{\n disable\n memory 64M\n boot "{guest("blk")}"\n disk {disk.path}\n}}\n'
    with NetKeptDaemon(tmp_path, network, net + blk) as vmd:
        for name in ("net", "blk"):
            vmd.must("start", name)
        with (
            Peer(Interface(network, vmd.interfaces("net")[0]["tap"])),
            vmd.console("net") as console,
            vmd.console("blk") as disks,
        ):
            console.expect("ready", DEADLINE_S)
            console.type("frames count=20000\r")
            for _ in range(4):
                again(vmd)
            assert "frames are through" in console.expect("ready", 3 * DEADLINE_S)
            disks.drain(3 * DEADLINE_S)
        assert "blk: " in disks.text()
        assert " 0 failed" in disks.text()
        assert vmd.wait_state("blk", "stopped")["text"] == "powered off by the guest"
        vmd.must("stop", "-fw", "net")
    disk.check_tested()


# --- generations ---------------------------------------------------------------------------------------------


def copy(directory: Path) -> Path:
    """Return a copy of the program."""
    code = directory / "code"
    for package in ("vmd", "vmctl"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    return code


def other_version(directory: Path) -> Path:
    """Return a copy of the program that reports another version."""
    code = copy(directory)
    (code / "vmd/version.py").write_text(f'"""The version."""\n\nVERSION = "{OTHER_VERSION}"\n')
    return code


@pytest.mark.deep
def test_a_new_version_starts_new_guests_and_serves_the_old_ones(network: Network, tmp_path: Path) -> None:
    """Each guest keeps its vmm.  A guest that resets itself moves to the newer vmm, and then the older one ends."""
    with NetKeptDaemon(tmp_path, network, block("a", "local interface") + block("b", "interface")) as vmd:
        vmd.must("start", "a")
        old = family(vmd)["vmd: vmm"]
        nics = vmd.interfaces("a")
        vmd.code = other_version(tmp_path)
        vmd.restart()
        assert vmd.keeper.names == ["listener", "state", "vmm-1", "vmm-2"]
        assert family(vmd)["vmd: vmm"] == old
        vmd.must("start", "b")
        again(vmd)
        assert [row["state"] for row in vmd.rows()] == ["running"] * 2
        with vmd.console("a") as a, vmd.console("b") as b:
            for console in (a, b):
                console.answer("echo here", "here\r\n" + PROMPT)
            a.answer("reset", PROMPT)
        wait_gone([old])
        assert family(vmd)["vmd: vmm"] != old
        assert vmd.interfaces("a") == nics
        vmd.keeper.wait_names("listener", "state", "vmm-2")
        vmd.wait_log("vmm-1, of version")
        again(vmd)
        assert [row["state"] for row in vmd.rows()] == ["running"] * 2


@pytest.mark.deep
def test_a_vmm_of_an_older_version_that_dies_takes_its_guests_only(tmp_path: Path) -> None:
    """The daemon and the guests of the other vmm go on."""
    with KeptDaemon(tmp_path, demo("a") + demo("b")) as vmd:
        vmd.must("start", "a")
        old = family(vmd)["vmd: vmm"]
        vmd.code = other_version(tmp_path)
        vmd.restart()
        vmd.must("start", "b")
        os.kill(old, signal.SIGKILL)
        assert vmd.wait_state("a", "stopped")["text"] == "ended with its vmm"
        assert vmd.status("b")["state"] == "running"
        vmd.must("start", "a")
        vmd.must("stop", "-fw", "a")
        Footprint(vmd)


# --- at any moment -------------------------------------------------------------------------------------------

ROUNDS_OF_KILLS = 15
NAMES = ("a", "b", "c")


@pytest.mark.deep
@pytest.mark.timeout(1200)
def test_daemons_that_are_killed_at_any_moment(network: Network, tmp_path: Path) -> None:
    """Daemons are killed while VMs start, stop, pause and reset: then every VM's state is correct and usable."""
    conf = "".join(block(name, "local interface", "interface") for name in NAMES)
    chance = random.Random(5)
    with NetKeptDaemon(tmp_path, network, conf) as vmd:
        clients: list[subprocess.Popen[str]] = []
        for number in range(ROUNDS_OF_KILLS):
            for name in NAMES:
                what = chance.choice((("start",), ("start",), ("stop", "-f"), ("pause",), ("unpause",), ("stop",)))
                clients.append(vmctl(vmd, *what, name))
            if number % 2:
                clients[-1].wait(DEADLINE_S)
            time.sleep(chance.random() * 0.6)  # so that the kill comes at any moment
            again(vmd)
            check(vmd, network)
        for client in clients:
            ended(client)
        for name in NAMES:
            vmd.vmctl("stop", "-fw", name)
            vmd.wait_state(name, "stopped")
            vmd.must("start", name)
        check(vmd, network)
        for name in NAMES:
            vmd.must("stop", "-fw", name)
        until(lambda: "tap" not in network.run("ip", "link"))
        assert vmd.keeper.names == ["listener", "state", "vmm-1"]
        assert "Traceback" not in vmd.log


def check(vmd: NetKeptDaemon, network: Network) -> None:
    """Raise AssertionError unless every VM with a pid has that process, and there are no other taps."""

    def is_true() -> bool:
        rows = vmd.rows()
        if any(row["state"] in ("starting", "waiting") for row in rows):
            return False
        alive = [row for row in rows if row["state"] != "stopped"]
        return all(row["pid"] and Path(f"/proc/{row['pid']}").exists() for row in alive) and (
            len(re.findall(r"^\d+: tap", network.run("ip", "link"), re.MULTILINE)) == 2 * len(alive)
        )

    until(is_true)


@pytest.mark.deep
def test_whoever_waits_for_a_vm_waits_on(tmp_path: Path) -> None:
    """The client waits on with the next daemon, and hears of an end that came while no daemon ran."""
    with KeptDaemon(tmp_path, LINGERS + demo("a")) as vmd:
        for name in ("mci", "a"):
            vmd.must("start", name)
        with vmd.console("mci") as console, vmd.console("a") as monitor:
            console.expect("rtc", DEADLINE_S)
            monitor.expect(PROMPT, DEADLINE_S)
            clients = [vmctl(vmd, *words) for words in (("wait", "mci"), ("stop", "-w", "mci"), ("wait", "a"))]
            console.expect("acknowledged", DEADLINE_S)
            vmd.must("status")
            pid = vmd.status("a")["pid"]
            vmd.kill()
            monitor.type("off\r")
            wait_gone([pid])
            vmd.start()
        assert ended(clients[2])[0] == 0
        again(vmd)
        vmd.must("stop", "-fw", "mci")
        for client in clients[:2]:
            status, said = ended(client)
            assert status == 0, said
            assert "terminated vm 1" in said
