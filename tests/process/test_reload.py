"""The effects of a reload of the configuration on existing VMs (*cat. 2.8, 2.9*)."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon
from tests.support.network import Network

pytestmark = [pytest.mark.root, pytest.mark.kvm]

PROMPT = "vmd-demo> "
MIB = 1 << 20


def block(name: str, *lines: str, memory: str = "32M", enabled: bool = False) -> str:
    """Return a vm block of the demonstration guest."""
    options = ["enable" if enabled else "disable", f"memory {memory}", f'boot "{guest("demo")}"', *lines]
    return f'vm "{name}" {{\n' + "".join(f"    {line}\n" for line in options) + "}\n"


@pytest.fixture
def vmd(tmp_path: Path) -> Iterator[Daemon]:
    """Yield a daemon with the running VM `a` and the stopped VM `b`."""
    with Daemon(tmp_path, block("a") + block("b")) as daemon:
        daemon.must("start", "a")
        yield daemon


@pytest.fixture
def connected(tmp_path: Path) -> Iterator[Daemon]:
    """Give a daemon on its own host, for VMs with interfaces."""
    with Network() as network, NetDaemon(tmp_path, network) as daemon:
        yield daemon


def states(vmd: Daemon) -> dict[str, str]:
    """Return the states of all VMs by name."""
    return {row["name"]: row["state"] for row in vmd.rows()}


def reload(vmd: Daemon, conf: str) -> str:
    """Load another configuration.  Return vmctl's output."""
    vmd.conf.write_text(conf)
    return vmd.must("reload")


def test_ids_change_with_the_next_start_only(vmd: Daemon) -> None:
    """Running processes keep the old ids, and a warning says so."""
    said = reload(vmd, "\nids 1879048192\n" + block("a"))

    assert said == f"vmctl: warning: {vmd.conf}:2: ids 1879048192 count when vmd is started again\n"


# --- files that cannot be used ---------------------------------------------------------------------------


BROKEN = {
    "value": 'vm "c" {\n memory lots\n}\n',
    "end": 'vm "c" {\n memory 32M\n',
    "owner": "socket owner nobody-of-that-name\n",
    "disk": 'vm "c" {\n disk ""\n}\n',
    "include": 'include "/nowhere/at/all"\n',
    "prefix": "local prefix 10.0.0.1/8\n",
    "switch": 'switch "s" {\n up\n}\n',
    "macro": "x = $x\n",
}


def test_a_file_that_cannot_be_used_changes_nothing(vmd: Daemon) -> None:
    """Case 59: reload, SIGHUP and load refuse the whole file.  The message has file and line."""
    before = vmd.rows()
    socket_before = vmd.socket.stat()
    good = "staggered start parallel 1 delay 1\nsocket owner nobody:nogroup\n"
    good += block("a", memory="48M") + block("new", enabled=True)
    assert vmd.process is not None

    for count, (what, broken) in enumerate(BROKEN.items(), 1):
        vmd.conf.write_text(good + broken)
        refused = vmd.vmctl("reload")
        loaded = vmd.vmctl("load", vmd.conf)
        vmd.process.send_signal(signal.SIGHUP)
        vmd.wait_log("vmd: 1 error, configuration unchanged\n", times=3 * count)

        for done in (refused, loaded):
            assert done.returncode == 1, what
            error, summary = done.stderr.splitlines()
            assert error.startswith(f"vmctl: {vmd.conf}:"), what
            vmd.wait_log(error.removeprefix("vmctl: "))
            assert summary == "vmctl: 1 error, configuration unchanged", what
        after = vmd.rows()
        assert [{**row, "resident_bytes": 0} for row in after] == [{**row, "resident_bytes": 0} for row in before], what
        socket_after = vmd.socket.stat()
        assert (socket_after.st_uid, socket_after.st_gid) == (socket_before.st_uid, socket_before.st_gid), what


def test_a_missing_file_changes_nothing(vmd: Daemon) -> None:
    """A missing file does not count as an empty one, so a mistyped or unmounted path removes no VM."""
    text = vmd.conf.read_text()
    vmd.conf.unlink()
    for done in (vmd.vmctl("reload"), vmd.vmctl("load", vmd.conf)):
        assert done.returncode == 1
        assert done.stderr == (
            f"vmctl: {vmd.conf}: No such file or directory\nvmctl: 1 error, configuration unchanged\n"
        )
    assert states(vmd) == {"a": "running", "b": "stopped"}
    vmd.conf.write_text(text)
    assert vmd.must("reload") == ""


def test_every_error_has_its_line(vmd: Daemon) -> None:
    """vmctl prints as many errors as fit, and then their number.  The log has all of them."""
    vmd.conf.write_text("".join(f"memory lots {'x' * 60}\n" for _ in range(99)) + "# é\r\n")
    done = vmd.vmctl("reload")
    lines = done.stderr.splitlines()
    where = [line.partition(": syntax error")[0] for line in lines[:40]]
    assert where == [f"vmctl: {vmd.conf}:{number}" for number in range(1, 41)]
    assert lines[-1] == "vmctl: 99 errors, configuration unchanged"
    assert "\\x" not in done.stderr
    vmd.wait_log(f"vmd: {vmd.conf}:99: syntax error")
    assert [f"vmd: {vmd.conf}:{number}: syntax error" in vmd.log for number in range(1, 100)] == [True] * 99


def test_paths_are_relative_to_the_directory_of_the_file(vmd: Daemon) -> None:
    """The daemon has changed its working directory since its start."""
    (vmd.directory / "kernel").write_bytes(Path(guest("demo")).read_bytes())
    (vmd.directory / "more.conf").write_text('vm "c" {\n disable\n memory 32M\n boot kernel\n}\n')
    assert reload(vmd, vmd.conf.read_text() + "include more.conf\n") == ""
    vmd.must("start", "c")
    assert states(vmd)["c"] == "running"


def test_vmctl_prints_the_warnings_of_a_reload(vmd: Daemon, tmp_path: Path) -> None:
    """The warnings are those of `vmd -n` that do not depend on the host.  `load` prints them, too."""
    text = 'unused = "x"\n' + block("c", 'interface switch "nope"')
    (tmp_path / "more.conf").write_text(text.replace('"c"', '"d"'))
    said = [reload(vmd, vmd.conf.read_text() + text), vmd.must("load", tmp_path / "more.conf")]
    for each in said:
        assert "vmctl: warning: macro 'unused' not used\n" in each
        assert 'interface 0: switch "nope" not found: the interface is connected to nothing\n' in each
    assert said[0].count("\n") == said[1].count("\n") == 2
    assert states(vmd) == {"a": "running", "b": "stopped", "c": "stopped", "d": "stopped"}


# --- running VMs -----------------------------------------------------------------------------------------


def test_changes_wait_for_the_next_start(vmd: Daemon) -> None:
    """A running VM is unchanged.  vmctl says which changes wait, and the next start applies them."""
    pid = vmd.status("a")["pid"]
    said = reload(vmd, block("a", "vcpus 2", memory="48M") + block("b"))
    assert "vm a: memory, vcpus changed; that waits for its next start" in said
    row = vmd.status("a")
    assert (row["pid"], row["memory_bytes"], row["vcpus"]) == (pid, 32 * MIB, 1)
    with vmd.console("a") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.answer("reset", PROMPT)  # a guest that resets itself keeps its configuration
    assert vmd.status("a")["memory_bytes"] == 32 * MIB
    assert "waits for its next start" in vmd.must("reload")  # the change still waits
    vmd.must("stop", "-fw", "a")
    assert vmd.status("a")["memory_bytes"] == 48 * MIB
    vmd.must("start", "a")
    row = vmd.status("a")
    assert (row["memory_bytes"], row["vcpus"]) == (48 * MIB, 2)


def limited(iops: int, rate: str, limits: str) -> str:
    """Return the configuration of a VM with limits of every kind."""
    disk = f'disk "{guest("demo")}" format raw limit iops {iops}'
    return block("a", disk, f"interface {{ limit rate {rate} }}", f"limit {{ {limits} }}", memory="32M")


def test_limits_change_at_once(connected: Daemon) -> None:
    """New limits apply to a running VM at once; other changes wait.  Each message appears once per change."""
    vmd = connected
    reload(vmd, limited(100, "1M", "memory 1G") + block("b"))
    vmd.must("start", "a")
    pid = vmd.status("a")["pid"]
    news = "vm a: its new limits count from now on"

    assert news in reload(vmd, limited(200, "1M", "memory 1G") + block("b"))
    assert news in reload(vmd, limited(200, "2M", "memory 1G") + block("b"))
    assert news in reload(vmd, limited(200, "2M", "memory 2G") + block("b"))
    assert reload(vmd, limited(200, "2M", "memory 2G") + block("b")) == ""

    said = reload(vmd, limited(200, "3M", "memory 2G").replace("memory 32M", "memory 48M") + block("b"))
    assert news in said
    assert "vm a: memory changed; that waits for its next start" in said
    assert vmd.status("a")["pid"] == pid
    assert vmd.status("a")["memory_bytes"] == 32 * MIB


def test_a_reverted_change(vmd: Daemon) -> None:
    """No change waits any more."""
    conf = vmd.conf.read_text()
    assert "memory changed" in reload(vmd, block("a", memory="48M"))
    assert reload(vmd, conf) == ""
    vmd.must("stop", "-fw", "a")
    assert vmd.status("a")["memory_bytes"] == 32 * MIB


def test_nothing_changed(vmd: Daemon) -> None:
    """Moved lines, comments and explicit defaults are no changes."""
    conf = "# a comment\n\n" + block("b") + "# another\n" + block("a", "interfaces 0")
    assert reload(vmd, conf) == ""
    assert states(vmd) == {"a": "running", "b": "stopped"}


def test_a_vm_that_is_removed_runs_on_and_is_then_forgotten(vmd: Daemon) -> None:
    """A stopped VM is forgotten at once."""
    said = reload(vmd, "")
    assert said == "vmctl: vm a is no longer configured; it is forgotten when it stops\n"
    assert states(vmd) == {"a": "running"}
    vmd.must("stop", "-fw", "a")
    assert states(vmd) == {}


def test_a_vm_that_is_removed_and_comes_back(vmd: Daemon) -> None:
    """It comes back while it runs.  Then it is known again, with the values in the file."""
    reload(vmd, "")
    said = reload(vmd, block("a", memory="48M"))
    assert "vm a: memory changed" in said
    vmd.must("stop", "-fw", "a")
    assert (vmd.status("a")["state"], vmd.status("a")["memory_bytes"]) == ("stopped", 48 * MIB)


def test_ids_survive(vmd: Daemon) -> None:
    """VMs that stay, and VMs that come back, keep their ids (cat. 4.1)."""
    before = {row["name"]: row["id"] for row in vmd.rows()}
    reload(vmd, block("new") + block("b") + block("a"))
    reload(vmd, block("new"))
    reload(vmd, block("b") + block("new") + block("a"))
    after = {row["name"]: row["id"] for row in vmd.rows()}
    assert after == {**before, "new": 3}


def test_a_vm_of_vmctl_that_is_added_to_the_file(vmd: Daemon) -> None:
    """It becomes a VM of the configuration, which decides what it boots the next time."""
    vmd.must("start", "-m", "24M", "-b", guest("hello"), "-k", "wait", "c")
    said = reload(vmd, vmd.conf.read_text() + block("c", "cmdline quiet"))
    assert "vm c: " in said
    vmd.must("stop", "-fw", "c")
    assert vmd.status("c")["memory_bytes"] == 32 * MIB
    vmd.must("start", "c")
    with vmd.console("c") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.answer("reset", PROMPT)  # this kernel is not that of the first start


def test_enabled_vms_start(vmd: Daemon) -> None:
    """New VMs and VMs that were stopped by hand start.  A running VM is not started again."""
    pid = vmd.status("a")["pid"]
    reload(vmd, block("a", enabled=True) + block("b", enabled=True) + block("c", enabled=True))
    for name in ("b", "c"):
        vmd.wait_state(name, "running")
    assert vmd.status("a")["pid"] == pid


def test_sighup(vmd: Daemon) -> None:
    """SIGHUP does the same as `vmctl reload`.  The messages are in the log."""
    vmd.conf.write_text(block("a", memory="48M") + block("c"))
    assert vmd.process is not None
    vmd.process.send_signal(signal.SIGHUP)
    vmd.wait_log("vm a: memory changed; that waits for its next start")
    assert states(vmd) == {"a": "running", "c": "stopped"}


def test_the_socket_has_its_new_owner(vmd: Daemon) -> None:
    """Global statements take effect at once."""
    reload(vmd, "socket owner nobody:nogroup\n" + vmd.conf.read_text())
    status = vmd.socket.stat()
    assert (status.st_uid, status.st_gid) == (65534, 65534)


def test_a_reload_while_a_vm_stops(vmd: Daemon) -> None:
    """The VM still stops, and remains known."""
    with subprocess.Popen(
        [sys.executable, "-m", "vmctl", "-s", vmd.socket, "stop", "-w", "a"],
        cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as stopping:  # fmt: skip
        vmd.must("reload")
        assert stopping.wait(DEADLINE_S) == 0
    assert states(vmd) == {"a": "stopped", "b": "stopped"}


# --- load ------------------------------------------------------------------------------------------------


def test_load_does_not_change_known_vms(vmd: Daemon, tmp_path: Path) -> None:
    """Running and stopped VMs are unchanged.  New VMs are added, and started if they are enabled."""
    extra = tmp_path / "extra.conf"
    extra.write_text(block("a", memory="48M") + block("b", memory="48M") + block("c", enabled=True))
    vmd.must("load", extra)
    vmd.wait_state("c", "running")
    assert [row["memory_bytes"] // MIB for row in vmd.rows()] == [32, 32, 32]
    vmd.must("stop", "-fw", "a")
    assert vmd.status("a")["memory_bytes"] == 32 * MIB


def test_load_of_an_instance(vmd: Daemon, tmp_path: Path) -> None:
    """Its template may be a known VM.  An unknown template is reported, and the other VMs are added."""
    extra = tmp_path / "extra.conf"
    extra.write_text(
        'vm "a" instance "c" {\n disable\n vcpus 2\n}\nvm "nowhere" instance "d" {\n disable\n}\n' + block("e")
    )
    assert "vm d: template nowhere not found" in vmd.must("load", extra)
    assert states(vmd) == {"a": "running", "b": "stopped", "c": "stopped", "e": "stopped"}


def test_a_reload_forgets_what_was_loaded(vmd: Daemon, tmp_path: Path) -> None:
    """Only the VMs of the main file remain.  A running one is forgotten when it stops."""
    extra = tmp_path / "extra.conf"
    extra.write_text(block("c") + block("d"))
    vmd.must("load", extra)
    vmd.must("start", "c")
    assert "vm c is no longer configured" in vmd.must("reload")
    assert states(vmd) == {"a": "running", "b": "stopped", "c": "running"}
    vmd.must("stop", "-fw", "c")
    assert states(vmd) == {"a": "running", "b": "stopped"}


# --- reset -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["vms", "all"])
def test_reset_forgets_everything_before_it_answers(vmd: Daemon, what: str) -> None:
    """A reload right after the answer starts from nothing, also with the ids."""
    pid = vmd.status("a")["pid"]
    vmd.must("start", "-m", "16M", "-b", guest("hello"), "adhoc")
    vmd.must("reset", what)
    assert states(vmd) == {}
    assert not Path(f"/proc/{pid}").exists()
    reload(vmd, block("b", enabled=True) + block("a"))
    vmd.wait_state("b", "running")
    assert {row["name"]: row["id"] for row in vmd.rows()} == {"b": 1, "a": 2}


def test_reset_of_switches_leaves_vms_alone(vmd: Daemon) -> None:
    """Running VMs run on."""
    pid = vmd.status("a")["pid"]
    vmd.must("reset", "switches")
    assert vmd.status("a")["pid"] == pid
    assert states(vmd) == {"a": "running", "b": "stopped"}


def test_a_reload_that_overtakes_a_reset(vmd: Daemon) -> None:
    """VMs that still end come back after their end with the values in the file, and are started."""
    before = vmd.status("a")["pid"]
    vmm = vmd.processes()["vmd: vmm"]
    os.kill(vmm, signal.SIGSTOP)  # no VM can end while vmm is stopped
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "vmctl", "-s", vmd.socket, "reset", "vms"],
            cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
        ) as resetting:  # fmt: skip
            while set(states(vmd)) != {"a"} or states(vmd)["a"] != "stopping":
                pass  # each look takes time, because it starts a process
            assert reload(vmd, block("a", memory="48M", enabled=True) + block("c", enabled=True)) == ""
            assert states(vmd)["a"] == "stopping"
            busy = vmd.vmctl("start", "a")
            assert busy.returncode == 1
            os.kill(vmm, signal.SIGCONT)
            assert resetting.wait(DEADLINE_S) == 0
    finally:
        os.kill(vmm, signal.SIGCONT)
    row = vmd.wait_state("a", "running")
    assert row["pid"] != before
    assert row["memory_bytes"] == 48 * MIB
    vmd.wait_state("c", "running")


def test_a_reset_whose_client_has_left(vmd: Daemon) -> None:
    """The reset is still carried out."""
    vmm = vmd.processes()["vmd: vmm"]
    os.kill(vmm, signal.SIGSTOP)
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "vmctl", "-s", vmd.socket, "reset"],
            cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
        ) as resetting:  # fmt: skip
            while states(vmd) != {"a": "stopping"}:
                pass
            resetting.send_signal(signal.SIGINT)
            assert resetting.wait(DEADLINE_S) == 1
    finally:
        os.kill(vmm, signal.SIGCONT)
    vmd.must("reset")  # it waits for the same VMs
    assert states(vmd) == {}


# --- batches ---------------------------------------------------------------------------------------------


def test_a_batch_goes_on(tmp_path: Path) -> None:
    """VMs start one by one.  A reload does not start waiting VMs earlier, unless it changes the delay."""
    names = ("a", "b", "c")
    conf = "".join(block(name, enabled=True) for name in names)
    with Daemon(tmp_path, "staggered start parallel 1 delay 3600\n" + conf) as vmd:
        vmd.wait_state("a", "running")
        for _ in range(2):
            vmd.must("reload")
            assert states(vmd) == {"a": "running", "b": "waiting", "c": "waiting"}
        vmd.must("stop", "c")
        assert states(vmd) == {"a": "running", "b": "waiting", "c": "stopped"}
        vmd.must("start", "c")  # by hand, before its turn
        assert states(vmd) == {"a": "running", "b": "waiting", "c": "running"}
        reload(vmd, "staggered start parallel 1 delay 0\n" + conf)
        vmd.wait_state("b", "running")


def test_a_vm_that_cannot_start_does_not_hold_up_the_others(tmp_path: Path) -> None:
    """Its status has the reason, and the next VM starts."""
    kernel = tmp_path / "kernel"
    kernel.touch()
    conf = f'vm "a" {{\n memory 32M\n boot "{kernel}"\n cdrom "{tmp_path}/nothing"\n}}\n'
    with Daemon(tmp_path, "staggered start parallel 1 delay 0\n" + conf + block("b", enabled=True)) as vmd:
        vmd.wait_state("b", "running")
        row = vmd.status("a")
        assert row["state"] == "stopped"
        assert "nothing: No such file or directory" in row["text"]


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.deep
def test_a_name_that_is_a_number(tmp_path: Path) -> None:
    """A number means the VM with this name, and an id only if no VM has the name."""
    with Daemon(tmp_path, block("2") + block("b") + block("c")) as vmd:
        ids = {row["name"]: row["id"] for row in vmd.rows()}
        assert ids == {"2": 1, "b": 2, "c": 3}
        vmd.wait_log(f'vmd: warning: {vmd.conf}:1: vm "2": the name is a number')
        for name in ("2", "b", "3"):  # the last one is an id, because no VM has this name
            vmd.must("start", name)
        assert states(vmd) == {"2": "running", "b": "running", "c": "running"}
        vmd.must("pause", "2")
        assert states(vmd) == {"2": "paused", "b": "running", "c": "running"}
        vmd.must("stop", "-fw", "2")
        assert states(vmd) == {"2": "stopped", "b": "running", "c": "running"}
        refused = vmd.vmctl("stop", "-f", "2")
        assert refused.returncode == 1
        assert states(vmd) == {"2": "stopped", "b": "running", "c": "running"}
        vmd.must("stop", "-fw", "3")
        assert states(vmd)["c"] == "stopped"
