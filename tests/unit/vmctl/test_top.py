"""vmctl top: the activity of VMs is the difference of two readings, and the terminal is restored."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.support import schema
from tests.unit.test_exposition import Numbers, a_vm
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import DEADLINE_S, ROOT, FakeDaemon
from vmctl import rates
from vmctl.commands.top import Top
from vmctl.rates import Reading, Row
from vmctl.session import Session
from vmctl.terminal import RawTerminal
from vmd.ipc.messages.clients import End
from vmd.ipc.messages.figures import VmFigures
from vmd.record import Record
from vmd.units import NS

WEB = a_vm(Numbers()).replace(started_s=1_000_000, guest_bytes=300 << 20, process_bytes=20 << 20)


def later(vm: VmFigures, cpu_ns: int = 0, disk: int = 0, net: int = 0) -> VmFigures:
    """Return a VM after so much processor time, and so many bytes in each direction."""
    first, *others = vm.disks
    first = first.replace(read_bytes=first.read_bytes + disk, write_requests=first.write_requests + 6)
    nics = tuple(nic.replace(tx_bytes=nic.tx_bytes + net) for nic in vm.nics)
    return vm.replace(cpu_ns=vm.cpu_ns + cpu_ns, disks=(first, *others), nics=nics)


def compared(before: VmFigures | None, now: VmFigures, elapsed_ns: int = 2 * NS) -> Row:
    """Return the row of a VM, at this time after another reading."""
    past = Reading(at_ns=5, vms=(before,)) if before is not None else None
    (row,) = rates.rows(past, Reading(at_ns=5 + elapsed_ns, vms=(now,)), 1_000_100)
    return row


def test_a_row_is_a_difference() -> None:
    """It is divided by the time between the readings.  All disks are added up."""
    row = compared(WEB, later(WEB, cpu_ns=3 * NS, disk=1 << 20, net=500))

    assert (row.cpu_percent, row.read_bytes, row.write_bytes, row.requests) == (150.0, 1 << 19, 0, 3.0)
    assert (row.receive_bytes, row.send_bytes) == (0, 250)
    assert (row.memory_bytes, row.up_s, row.vcpus) == (320 << 20, 100, 2)


@pytest.mark.parametrize("before", [
    None, WEB.replace(pid=0), WEB.replace(pid=WEB.pid + 1), WEB.replace(vmid=WEB.vmid + 1), later(WEB, 1, 1, 1),
])  # fmt: skip
def test_rates_need_two_readings_of_one_life(before: VmFigures | None) -> None:
    """Another process, or a smaller counter, is another life."""
    row = compared(before, WEB)

    assert (row.cpu_percent, row.read_bytes, row.send_bytes) == (None, None, None)
    assert rates.line(row).split()[:2] == ["3", "-"]


def test_rates_need_counters() -> None:
    """A process of an earlier version has none.  A VM without a disk reads nothing."""
    uncounted = WEB.replace(disks=tuple(disk.replace(counted=False) for disk in WEB.disks))
    assert compared(uncounted, uncounted).read_bytes is None
    assert compared(WEB, WEB.replace(disks=())).read_bytes is None
    assert compared(uncounted, WEB).read_bytes is None
    none = WEB.replace(disks=())
    assert compared(none, none).read_bytes == 0


def test_unknown_rates_count_as_nothing() -> None:
    """For the order, too."""
    row = compared(None, WEB)

    assert (row.cpu_percent, row.disk_bytes, row.net_bytes) == (None, 0, 0)
    assert [rates.ORDERS[order][1](row) for order in "cdn"] == [0, 0, 0]
    some = row.replace(read_bytes=1, write_bytes=2, receive_bytes=3, send_bytes=4)
    assert (some.disk_bytes, some.net_bytes) == (3, 7)


@pytest.mark.parametrize(("started_s", "up_s"), [(0, 0), (1_000_099, 1), (1_000_100, 0), (1_000_101, 0)])
def test_how_long_a_vm_has_run(started_s: int, up_s: int) -> None:
    """Its start may be unknown, or later than now by the clock."""
    assert compared(None, WEB.replace(started_s=started_s)).up_s == up_s


@pytest.mark.parametrize("order", rates.ORDERS)
def test_rows_are_ordered(order: str) -> None:
    """The largest comes first, or rows are ordered by id or name.  The order can be reversed."""
    small = compared(WEB, WEB)
    large = compared(WEB, later(WEB, NS, 1, 1)).replace(vmid=2, name="a", memory_bytes=1 << 40)

    assert rates.ordered([small, large], order) == [large, small]
    assert rates.ordered([large, small], order, reverse=True) == [small, large]


def test_stopped_vms_have_no_row() -> None:
    """Impossible counter values do not make vmctl fail."""
    assert rates.rows(None, Reading(at_ns=0, vms=(WEB.replace(pid=0),)), 0) == []
    wild = later(WEB).replace(cpu_ns=(1 << 64) - 1, guest_bytes=(1 << 64) - 1)
    assert rates.line(compared(WEB, wild, 1)).endswith(" web")
    paused = compared(WEB, WEB.replace(state="paused"))
    assert rates.line(paused).endswith(" web (paused)")
    assert len(rates.line(paused.replace(name="", state="running"))) <= 80 - 16


def test_units() -> None:
    """Times have their two largest units.  Sizes are those that 64 bits can have."""
    for seconds, text in (
        (0, "0m 0s"), (59, "0m 59s"), (60, "1m 0s"), (3599, "59m 59s"), (3600, "1h 0m"), (86399, "23h 59m"),
        (86400, "1d 0h"), (90000, "1d 1h"),
    ):  # fmt: skip
        assert rates.up(seconds) == text
    for number, text in ((None, "-"), (0, "0B"), (1535.6, "1.5K"), (float(1 << 63), "8.0E"), (1e30, "8.0E")):
        assert rates.size(number) == text


def test_the_summary_of_a_first_reading() -> None:
    """Unknown rates count as nothing."""
    row = compared(None, WEB)
    assert rates.summary([row, row.replace(cpu_percent=12.4)], 3) == "2 of 3 VMs run; CPU 12%, memory 640M"
    document = rates.as_json(row.replace(cpu_percent=12.34, requests=1.26, read_bytes=1.6))
    names = ("cpu_percent", "disk_requests_per_s", "disk_read_bytes_per_s")
    assert [document[name] for name in names] == [12.3, 1.3, 2]
    assert document["send_bytes_per_s"] is None


@pytest.mark.parametrize(
    ("lines", "shown"), [(24, ["vm1", "vm2", "vm3"]), (6, ["vm1", "vm2", "vm3"]), (5, ["vm1", "and 2 more"]),
                         (4, ["and 3 more"]), (1, ["and 3 more"])],
)  # fmt: skip
def test_a_screen_of_any_height(monkeypatch: pytest.MonkeyPatch, lines: int, shown: list[str]) -> None:
    """The table has three lines above the VMs."""
    screen = Top(Session(), RawTerminal(0, "top"), 1.0, None)
    screen.now = Reading(at_ns=0, vms=tuple(WEB.replace(vmid=number, name=f"vm{number}") for number in (1, 2, 3)))
    painted: list[str] = []
    monkeypatch.setattr(screen, "_show", painted.append)
    monkeypatch.setattr(screen, "_size", lambda: (80, lines))
    screen._paint()

    _, _, _, *rows = painted[0].split("\r\n")
    assert len(rows) == len(shown)
    assert all(name in row for name, row in zip(shown, rows, strict=True))


@pytest.mark.parametrize(("seconds", "waits"), [(0.0, []), (0.25, [250]), (1.5, [500, 500, 500]), (0.0001, [1])])
def test_the_interval(monkeypatch: pytest.MonkeyPatch, seconds: float, waits: list[int]) -> None:
    """It is waited for in short polls, so that a signal is handled."""
    screen = Top(Session(), RawTerminal(0, "top"), 1.0, None)
    now_s = 100.0
    waited: list[int] = []

    def poll(wait_ms: int) -> list[object]:
        nonlocal now_s
        waited.append(wait_ms)
        now_s += wait_ms / 1000
        return []

    monkeypatch.setattr("vmctl.commands.top.time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr("vmctl.commands.top.select", SimpleNamespace(poll=lambda: SimpleNamespace(poll=poll)))
    assert screen._wait(100.0 + seconds)
    assert waited == waits


def test_the_size_of_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal without a size counts as one of the usual size."""
    screen = Top(Session(), RawTerminal(0, "top"), 1.0, None)
    for size, used in (((100, 50), (100, 50)), ((0, 0), (80, 24)), ((0, 5), (80, 5)), ((9, 0), (9, 24))):
        monkeypatch.setattr(os, "get_terminal_size", lambda _fd, size=size: os.terminal_size(size))
        assert screen._size() == used


class Growing:
    """A script: its VM reads one MiB between any two readings."""

    def __init__(self) -> None:
        self.vm = WEB.replace(started_s=int(time.time()))

    def __call__(self, _request: Record) -> tuple[Record, ...]:
        """Answer a request for figures."""
        self.vm = later(self.vm, NS // 10, 1 << 20)
        return self.vm, a_vm(Numbers(), "db").replace(vmid=4, pid=0), End()


def test_tables_without_a_terminal(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Each is for an interval, so none is printed before the first interval."""
    daemon.script = Growing()

    status, output, errors = vmctl("top", "-n", "2", "0.1")

    summary, header, web, gap, *second = output.splitlines()
    assert (status, errors, gap, len(second)) == (0, "", "", 4)
    assert summary.startswith("1 of 2 VMs run; CPU ")
    assert (header.split(), web.split()[-1]) == (rates.HEADER.split(), "web")
    assert "-" not in web.split()
    assert len(daemon.requests) == 3


def test_the_document(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It is for one interval of any length."""
    daemon.script = Growing()

    document = schema.document(vmctl("top", "--json", "0.1"), "top")

    (vm,) = document["vms"]
    assert document["interval_s"] >= 0.1
    assert abs(vm["disk_read_bytes_per_s"] * document["interval_s"] - (1 << 20)) < (1 << 20) / 50
    assert vm["receive_bytes_per_s"] == 0


@pytest.mark.parametrize("words", [["x"], ["0"], ["nan"], ["1e9"], ["-n", "0"], ["-n", "x"], ["1", "2"]])
def test_invalid_arguments(vmctl: Vmctl, daemon: FakeDaemon, words: list[str]) -> None:
    """No request is sent."""
    status, output, errors = vmctl("top", *words)

    assert (status, output, daemon.requests) == (2, "", [])
    assert words[-1] in errors


class OnTerminal:
    """`vmctl top` on its own terminal."""

    def __init__(self, daemon: FakeDaemon, *words: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 6, 80, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmctl", "-s", str(daemon.path), "top", *words],
            cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
        self.slave = slave
        self.shown = b""

    def expect(self, wanted: bytes) -> None:
        """Wait until vmctl has printed this since the last call."""
        deadline_s = time.monotonic() + 5 * DEADLINE_S
        while wanted not in self.shown:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, self.shown
            if select.select([self.master], [], [], left_s)[0]:
                self.shown += os.read(self.master, 4096)
        self.shown = self.shown.partition(wanted)[2]

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.master, keys)

    def end(self) -> int:
        """Wait for the end, check that the terminal's settings are restored, and return the exit status."""
        status = self.process.wait(5 * DEADLINE_S)
        assert termios.tcgetattr(self.slave) == self.before
        return status


@pytest.fixture
def screen(daemon: FakeDaemon) -> Iterator[OnTerminal]:
    """vmctl top that reads only when a key asks for it."""
    daemon.script = Growing()
    made = OnTerminal(daemon, "3600")
    yield made
    made.process.kill()
    made.process.wait()
    os.close(made.master)
    os.close(made.slave)


def test_keys(screen: OnTerminal) -> None:
    """They sort, read and leave.  The previous screen is shown again at the end."""
    screen.expect(b"\x1b[?1049h")
    screen.expect(b"by cpu")
    screen.expect(b"CPU%")
    screen.type(b"dr")
    screen.expect(b"by disk, reversed")
    screen.type(b" ")
    screen.expect(b"1 of 2 VMs run; CPU ")
    screen.expect(b"READ/s")
    screen.type(b"q")
    screen.expect(b"\x1b[?1049l")
    assert screen.end() == 0


@pytest.mark.parametrize("ending", ["\x03", signal.SIGTERM])
def test_the_terminal_is_given_back(screen: OnTerminal, ending: "str | signal.Signals") -> None:
    """It is restored after ^C and after a signal."""
    screen.expect(b"web")
    if isinstance(ending, str):
        screen.type(ending.encode())
    else:
        screen.process.send_signal(ending)
    screen.expect(b"\x1b[?1049l")
    assert screen.end() == (0 if isinstance(ending, str) else 1)


def test_a_daemon_that_is_away_for_a_moment(screen: OnTerminal, daemon: FakeDaemon) -> None:
    """As during an upgrade: the last reading stays on the screen."""
    screen.expect(b"web")
    daemon.hang_up()
    screen.type(b" ")
    screen.expect(b"pipe closed")
    screen.expect(b"web")
    screen.type(b" ")
    screen.expect(b"VMs run")
    screen.type(b"q")
    assert screen.end() == 0


def test_a_screen_that_is_too_small(daemon: FakeDaemon) -> None:
    """The number of VMs that do not fit is shown."""
    vms = [WEB.replace(vmid=number, name=f"vm{number}") for number in range(1, 30)]
    daemon.script = lambda _request: (*vms, End())
    screen = OnTerminal(daemon, "-n", "1", "0.1")
    screen.expect(b"and 27 more")
    assert screen.end() == 0
    os.close(screen.master)
    os.close(screen.slave)
    assert len(daemon.requests) == 2
