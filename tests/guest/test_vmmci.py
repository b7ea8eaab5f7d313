"""vmmci with the whole daemon: every reaction of a guest to a request to end (*cat. 4.4, 4.6*)."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, Attached, Daemon
from tests.support.guests import guest
from tests.support.transfers import move

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

READY = re.compile(r"vmmci: ready, features 7, clock (\d+), rtc (\d+)\r\n")
CLOCK = re.compile(r"clock (\d+), rtc (\d+)\r\n")
RTC_EPOCH = 946684800  # the year 2000
ROOM_BYTES = 1 << 20
MORE_ACKNOWLEDGEMENTS = 50_000


def block(what: str) -> str:
    """Return a vm block."""
    return f'vm "mci" {{\n disable\n memory 32M\n boot "{guest("vmmci")}" cmdline "{what}"\n}}\n'


@contextmanager
def running(tmp_path: Path, what: str) -> Iterator[tuple[Daemon, Attached]]:
    """Run the guest until its driver is up."""
    with Daemon(tmp_path, block(what)) as vmd:
        vmd.must("start", "mci")
        with vmd.console("mci") as console:
            console.expect("rtc", DEADLINE_S)
            yield vmd, console


ENDINGS = [
    ("", "stopped as asked"),  # by a triple fault, with which OpenBSD resets a machine
    ("slow", "stopped as asked"),
    ("silent", "stopped as asked"),
    ("crash", "stopped as asked"),
    ("off", "powered off by the guest"),
    ("ignore", "did not notice vmmci in 3 s"),
]


@pytest.mark.parametrize(("what", "text"), ENDINGS, ids=[what or "obeys" for what, _ in ENDINGS])
def test_guest_that_is_asked_to_stop(tmp_path: Path, what: str, text: str) -> None:
    """It is asked to reboot, because after a halt it could wait for a key.  In each case the VM ends with a reason."""
    with running(tmp_path, what) as (vmd, console):
        assert vmd.must("stop", "-w", "mci") == "stopping vm mci: terminated vm 1\n"
        console.drain(DEADLINE_S)

    assert "asked for 2, spurious 0" in console.text()
    assert ("acknowledged" in console.text()) == (what in ("", "slow", "off"))
    assert f"mci: terminated vm 1: {text}" in vmd.log
    assert "rebooting" not in vmd.log


@pytest.mark.deep
@pytest.mark.timeout(400)
def test_guest_that_never_finishes(tmp_path: Path) -> None:
    """The VM is ended two minutes after the guest has acknowledged the request."""
    with running(tmp_path, "linger") as (vmd, console):
        vmd.must("stop", "mci")
        console.expect("acknowledged", DEADLINE_S)
        began_s = time.monotonic()
        vmd.must("wait", "mci", timeout_s=300)
        assert time.monotonic() - began_s >= 115
        assert vmd.status("mci")["text"] == "did not shut down in 120 s"


def test_guest_that_lingers_can_be_forced(tmp_path: Path) -> None:
    """`stop -f` overtakes `stop`."""
    with running(tmp_path, "linger") as (vmd, console):
        vmd.must("stop", "mci")
        console.expect("acknowledged", DEADLINE_S)
        assert vmd.status("mci")["state"] == "stopping"
        assert "already stopping" in vmd.vmctl("stop", "mci").stderr
        vmd.must("stop", "-fw", "mci")
        assert vmd.status("mci")["text"] == "stopped by force"


@pytest.mark.deep
def test_guest_that_acknowledges_for_ever(tmp_path: Path) -> None:
    """Further acknowledgements have no effect: the VM process does not grow, and still serves (hostile-input 48)."""
    with running(tmp_path, "flood") as (vmd, console):
        pid = vmd.status("mci")["pid"]
        vmd.must("stop", "mci")
        console.expect("acknowledged", DEADLINE_S)
        before, began = resident(pid), exits(vmd)
        while exits(vmd) < began + MORE_ACKNOWLEDGEMENTS:
            vmd.must("status")
        after = resident(pid)
        vmd.must("stop", "-fw", "mci")
    print(f"{before >> 10} KiB, then {after >> 10} KiB")
    assert after < before + ROOM_BYTES


def resident(pid: int) -> int:
    """Return the private memory of a process, in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def exits(vmd: Daemon) -> int:
    """Return an estimate of the guest's exits, from the processor time of the VM process at 20 µs an exit."""
    fields = Path(f"/proc/{vmd.status('mci')['pid']}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * 500  # ticks of 10 ms


@pytest.mark.parametrize("what", ["announce", pytest.param("announce-flood", marks=pytest.mark.deep)])
def test_guest_that_announces_its_end(tmp_path: Path, what: str) -> None:
    """The VM ends three seconds later, because the guest may not be able to power it off (cat. 4.4)."""
    with running(tmp_path, what) as (vmd, console):
        console.expect("announcing", DEADLINE_S)
        console.drain(DEADLINE_S)
        assert vmd.wait_state("mci", "stopped")["text"] == "powered off by the guest"
    assert "asked for" not in console.text()


def test_guest_that_announces_its_end_and_resets(tmp_path: Path) -> None:
    """It is started again, unless it resets too often."""
    with Daemon(tmp_path, block("announce-reset")) as vmd:
        vmd.must("start", "mci")
        assert vmd.wait_state("mci", "stopped")["text"] == "restarted too quickly"
        assert vmd.log.count("rebooting") >= 2


def test_daemon_that_ends(tmp_path: Path) -> None:
    """The daemon asks its guests to shut down, as `vmctl stop` does."""
    with running(tmp_path, "slow") as (vmd, _console):
        assert vmd.stop() == 0  # `stop` sends one SIGTERM; a second one would end the wait
        assert "mci: terminated vm 1: stopped as asked" in vmd.log


def check_clock(found: "re.Match[str] | None") -> None:
    """Raise AssertionError unless both clocks show the present time."""
    assert found is not None
    now_s = time.time()
    assert now_s - 60 < int(found[1]) <= now_s
    assert abs(int(found[2]) + RTC_EPOCH - int(found[1])) <= 1


@pytest.mark.deep
def test_clock_after_a_long_pause(tmp_path: Path) -> None:
    """The guest is told to read the host's clock, because its own is wrong (cat. 4.6), but not after a short pause."""
    with running(tmp_path, "") as (vmd, console):
        console.expect("\r\n", DEADLINE_S)
        check_clock(READY.search(console.text()))
        vmd.must("pause", "mci")
        vmd.must("unpause", "mci")
        vmd.must("pause", "mci")
        until_s = time.monotonic() + 5.1
        while time.monotonic() < until_s:
            vmd.must("status")
        vmd.must("unpause", "mci")
        console.expect("asked for 3, spurious 0\r\n", DEADLINE_S)
        check_clock(CLOCK.match(console.expect("then asked for 0\r\n", DEADLINE_S)))
        assert console.text().count("asked for 3") == 1
        vmd.must("stop", "-w", "mci")


def test_received_guest(tmp_path: Path) -> None:
    """The guest reads the clock again, and its driver still serves requests."""
    with running(tmp_path, "") as (vmd, _console):
        move(vmd, "mci", "other")
        with vmd.attached("other") as viewer:
            viewer.expect("asked for 3, spurious 0\r\n", DEADLINE_S)
            viewer.expect("then asked for 0\r\n", DEADLINE_S)
            vmd.must("stop", "-w", "other")
            viewer.expect("acknowledged", DEADLINE_S)
        assert "other: terminated vm 2: stopped as asked" in vmd.log
