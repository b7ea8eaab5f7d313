"""vmctl pause and unpause under load: nothing is lost, and the guest's time stops (*cat. 4.5*, arch. 8)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import churn
from tests.support.blkdisk import Disk
from tests.support.clocks import Clocks
from tests.support.daemon import DEADLINE_S, Attached, Daemon
from tests.support.guests import guest

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

PROMPT = "vmd-demo> "
TIMES, TIMES_DEEP = 20, 1000
STATUS_EACH = 10  # pauses between two queries, because a query takes as long as a pause
ROUNDS = 10  # rounds of the guest between two pauses, so that it works when the next one comes
PM_HERTZ = 3579545


def block(name: str, kernel: str, cmdline: str = "", *lines: str, memory: str = "64M") -> str:
    """Return a vm block."""
    options = ("disable", f"memory {memory}", f'boot "{guest(kernel)}" cmdline "{cmdline}"', *lines)
    return f'vm "{name}" {{\n' + "\n".join(options) + "\n}\n"


@contextmanager
def busy(tmp_path: Path, cmdline: str, *lines: str) -> Iterator[tuple[Daemon, Attached]]:
    """Run the guest that keeps its disk busy."""
    disk = Disk(tmp_path / "disk")
    conf = block("busy", "blk", f"churn {cmdline}", f'disk "{disk.path}" format raw', *lines)
    with Daemon(tmp_path, conf) as vmd:
        vmd.must("start", "busy")
        with vmd.console("busy") as console:
            churn.begin(console)
            yield vmd, console


def pause_often(tmp_path: Path, times: int, cmdline: str, *lines: str) -> None:
    """Pause and unpause under load; check each time that the guest has gone on."""
    with busy(tmp_path, cmdline, *lines) as (vmd, console):
        for number in range(times):
            vmd.must("pause", "busy")
            if number % STATUS_EACH == 0:
                assert vmd.status("busy")["state"] == "paused"
            vmd.must("unpause", "busy")
            if number % STATUS_EACH == 0:
                assert vmd.status("busy")["state"] == "running"
            churn.ask_until_rounds(console, ROUNDS)
        report = churn.finish(console)
        console.drain(DEADLINE_S)
        assert vmd.wait_state("busy", "stopped")["text"] == "powered off by the guest"
        print(report)
    assert report.rounds >= times * ROUNDS




@churn.WAYS
def test_pauses_under_load(tmp_path: Path, cmdline: str, lines: tuple[str, ...]) -> None:
    """No interrupt or request is lost, with MSI-X, with INTx by either controller, and without interrupts."""
    pause_often(tmp_path, TIMES, cmdline, *lines)


@pytest.mark.deep
@pytest.mark.timeout(1200)
@churn.WAYS
def test_many_pauses_under_load(tmp_path: Path, cmdline: str, lines: tuple[str, ...]) -> None:
    """Pause a thousand times; for the variants, which differ only in interrupts, a hundred times."""
    pause_often(tmp_path, TIMES_DEEP if (cmdline, lines) == churn.LOADS[0] else TIMES_DEEP // 10, cmdline, *lines)


def test_a_paused_machine_does_nothing(tmp_path: Path) -> None:
    """Its processes use no processor time, its disk is not touched, and input waits."""
    with busy(tmp_path, "smp", "vcpus 2") as (vmd, console):
        vmd.must("pause", "busy")
        disk = (tmp_path / "disk").read_bytes()
        pids = [pid for title, pid in vmd.processes().items() if title.startswith("vmd: vm/busy")]
        assert len(pids) == 2  # with the disk's process
        console.type("\r")
        before = [ticks(pid) for pid in pids]
        for _ in range(3):
            vmd.must("status")  # lets some time pass, measured in work

        assert [ticks(pid) for pid in pids] == before
        assert (tmp_path / "disk").read_bytes() == disk
        assert "rounds" not in console.text()
        vmd.must("unpause", "busy")
        console.expect("churn: rounds=", DEADLINE_S)
        churn.finish(console)


def ticks(pid: int) -> int:
    """Return the processor time of a process, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_clocks_stand_still(tmp_path: Path) -> None:
    """kvmclock, the ACPI timer and the APIC's continue where they stopped; the battery-backed clock has gone on.

    The guest measures its own running time, so that a busy host does not matter.
    """
    with Daemon(tmp_path, block("clocks", "clocks")) as vmd:
        vmd.must("start", "clocks")
        with vmd.console("clocks") as console:
            console.expect("clocks: ready\r\n", DEADLINE_S)
            before = Clocks.ask(console)
            vmd.must("pause", "clocks")
            began_s, wall_s = time.monotonic(), int(time.time())
            while int(time.time()) < wall_s + 3:
                vmd.must("status")
            paused_s = time.monotonic() - began_s
            vmd.must("unpause", "clocks")
            after = Clocks.ask(console)

    ran_s = (after.kvmclock - before.kvmclock) / 1e9
    print(f"paused {paused_s:.2f} s, of which the guest's kvmclock saw {ran_s:.3f} s\n{before}\n{after}")
    assert 0 < ran_s < paused_s / 2
    assert (after.pm - before.pm) % (1 << 24) / PM_HERTZ == pytest.approx(ran_s, abs=0.2)
    assert after.beats - before.beats < paused_s * 100 / 2
    assert after.rtc - before.rtc >= 3


@pytest.mark.deep
def test_a_guest_at_its_firmware_can_be_paused(tmp_path: Path) -> None:
    """A guest in real mode can be paused at any moment.  Upstream waits until it halts."""
    firmware = "/usr/share/seabios/bios-256k.bin"
    conf = f'vm "bios" {{\n disable\n memory 64M\n vcpus 2\n boot "{firmware}"\n}}\n'
    with Daemon(tmp_path, conf) as vmd:
        vmd.must("start", "bios")
        with vmd.console("bios") as console:
            console.expect("SeaBIOS (version", DEADLINE_S)
            for _ in range(10):
                vmd.must("pause", "bios")
                vmd.must("unpause", "bios")
            console.expect("No bootable device", 2 * DEADLINE_S)
        vmd.must("stop", "-fw", "bios")


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon whose VM `demo` runs."""
    with Daemon(tmp_path, block("demo", "demo", "", "vcpus 2")) as vmd:
        vmd.must("start", "demo")
        yield vmd


def test_pausing_twice_is_no_failure(demo: Daemon) -> None:
    """Neither pausing nor unpausing twice is an error (cat. 4.5)."""
    for word in ("pause", "pause", "unpause", "unpause"):
        assert demo.must(word, "demo") == f"vmctl: {word}d vm 1 successfully\n"
    for word in ("pause", "unpause"):
        assert demo.must(word, "1") == f"vmctl: {word}d vm 1 successfully\n"


def test_a_vm_that_does_not_run_cannot_be_paused(demo: Daemon) -> None:
    """Each case gives a message."""
    refused = demo.vmctl("pause", "nobody")
    assert refused.stderr == "vmctl: pause vm command failed: vm nobody not found\n"
    demo.must("stop", "-fw", "demo")
    for word in ("pause", "unpause"):
        refused = demo.vmctl(word, "demo")
        assert (refused.returncode, refused.stderr) == (1, f"vmctl: {word} vm command failed: vm demo is not running\n")


def test_a_paused_machine_can_be_used(demo: Daemon) -> None:
    """Its console can be attached and its state shown.  Input arrives when it goes on."""
    with demo.console("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
        demo.must("pause", "demo")
        console.type("echo back again\r")
        with demo.attached("demo") as viewer:
            viewer.expect(PROMPT, DEADLINE_S)  # earlier output
        demo.must("unpause", "demo")
        console.expect("back again\r\nback again\r\n", DEADLINE_S)


def test_a_paused_machine_can_be_stopped(demo: Daemon) -> None:
    """A stop lets the machine run, so that its guest shuts down.  A stop by force ends it at once."""
    with demo.console("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
    demo.must("pause", "demo")
    demo.must("stop", "-w", "demo")
    assert demo.wait_state("demo", "stopped")["text"] == "powered off by the guest"

    demo.must("start", "demo")
    demo.must("pause", "demo")
    demo.must("stop", "-fw", "demo")
    assert demo.wait_state("demo", "stopped")["text"] == "stopped by force"


def test_a_daemon_that_ends_lets_paused_machines_shut_down(demo: Daemon) -> None:
    """Paused machines run again and shut down like running ones."""
    with demo.console("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
    demo.must("pause", "demo")
    assert demo.stop() == 0
    assert "terminated vm 1: powered off by the guest" in demo.log


@pytest.mark.parametrize("victim", ["vm/busy", pytest.param("vm/busy/vioblk0", marks=pytest.mark.deep)])
def test_death_while_paused(tmp_path: Path, victim: str) -> None:
    """The VM has ended, with a reason that `unpause` prints, and it can be started again."""
    with busy(tmp_path, "smp", "vcpus 2") as (vmd, _console):
        vmd.must("pause", "busy")
        os.kill(vmd.processes()[f"vmd: {victim}"], signal.SIGKILL)
        row = vmd.wait_state("busy", "stopped")
        print(row["text"])
        assert "SIGKILL" in row["text"]
        assert "not running" in vmd.vmctl("unpause", "busy").stderr
        vmd.must("start", "busy")
        vmd.must("pause", "busy")
        vmd.must("stop", "-fw", "busy")


def test_many_clients_at_once(tmp_path: Path) -> None:
    """Many concurrent pauses and unpauses: each is answered with its own result, and the guest lives."""
    with busy(tmp_path, "smp", "vcpus 2") as (vmd, console):
        clients = [
            subprocess.Popen(
                [sys.executable, "-m", "vmctl", "-s", vmd.socket, word, "busy"],
                cwd=vmd.code, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for word in ("pause", "unpause") * 8
        ]  # fmt: skip
        for client, word in zip(clients, ("pause", "unpause") * 8, strict=True):
            _, errors = client.communicate(timeout=DEADLINE_S)
            assert (client.returncode, errors) == (0, f"vmctl: {word}d vm 1 successfully\n")
        vmd.must("unpause", "busy")
        churn.ask_until_rounds(console, ROUNDS)
        churn.finish(console)
