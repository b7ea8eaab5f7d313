"""The log: neither a reader that does not read nor compromised processes lose the lines of others.

The attacker controls VM `bad`, or its drive; the bystander is another VM.
"""

import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bystander import DRIVE, NAME, Bystander, vm_block
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.descriptors import open_files
from tests.support.logreader import LogReader, borrowed

pytestmark = [pytest.mark.root, pytest.mark.kvm]

CONF = vm_block(NAME, DRIVE) + vm_block("bad", DRIVE)
ERRORS = 99  # errors in one configuration; each is a line of the log
BROKEN = "nonsense\n" * ERRORS
# The test's own journal, for a daemon that does not log to standard error.
WITH_JOURNAL = """
mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind "$0" /run/systemd/journal && exec "$@"
"""
NO_DEBUG = "import os, sys; a = [a for a in sys.argv[1:] if a != '-d']; os.execvp(a[0], a)"
LOST = re.compile(r"^vmd: (\d+) lines were lost: the log did not take them$")


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[LogReader]:
    """Yield a reader of the log."""
    with LogReader(tmp_path) as made:
        yield made


@pytest.fixture
def vmd(tmp_path: Path, reader: LogReader) -> Iterator[Daemon]:
    """Yield a daemon that logs to that reader."""
    with Daemon(tmp_path, CONF, prefix=reader.prefix) as daemon:
        yield daemon


@pytest.fixture
def bystander(vmd: Daemon) -> Iterator[Bystander]:
    """Yield a VM that attacks on another VM must not affect."""
    with Bystander(vmd) as made:
        yield made


def last_words(vmd: Daemon, title: str) -> "socket.socket":
    """Return the socket to which a process of the daemon writes its log lines."""
    return borrowed(vmd.processes()[title], 2)


def test_a_log_that_nobody_reads_stops_nobody(vmd: Daemon, reader: LogReader, tmp_path: Path) -> None:
    """Everything goes on, and the daemon can end.  Lines without room are counted, and the number is logged."""
    broken = tmp_path / "broken.conf"
    broken.write_text(BROKEN)
    with Bystander(vmd):
        reader.fill(vmd)

        for _ in range(10):
            assert vmd.vmctl("load", broken).returncode == 1
        vmd.must("start", "bad")
        vmd.must("stop", "-fw", "bad")

    reader.wait("lines were lost")
    deadline = time.monotonic() + DEADLINE_S
    while True:
        arrived = sum(f"{broken}:" in line for line in reader.lines)
        lost = sum(int(found[1]) for found in map(LOST.match, reader.lines) if found)
        if arrived + lost >= 10 * ERRORS:
            break
        assert time.monotonic() < deadline, reader.lines
        select.select([], [], [], 0.1)
    assert 0 < arrived < 10 * ERRORS
    assert arrived + lost < 10 * ERRORS + 20  # and other lines
    reader.fill(vmd)
    assert vmd.stop() == 0


@pytest.mark.usefixtures("bystander")
def test_a_device_can_only_shut_down_the_log_of_its_own_vm(vmd: Daemon, reader: LogReader) -> None:
    """A device calls shutdown(2) on its log socket.  Other lines arrive as before, and the log reports it."""
    vmd.must("start", "bad")

    with last_words(vmd, "vmd: vm/bad/vioscsi0") as taken:
        taken.shutdown(socket.SHUT_RDWR)

    for title in (f"vmd: vm/{NAME}", f"vmd: vm/{NAME}/vioscsi0", "vmd: vmm", "vmd: control", "vmd: priv"):
        with last_words(vmd, title) as own:
            own.send(b"<6>" + title.removeprefix("vmd: ").encode() + b": is heard")
    for title in (f"vm/{NAME}", f"vm/{NAME}/vioscsi0", "vmm", "control", "priv"):
        reader.wait(f"{title}: is heard")
    reader.wait("vm bad: one of its processes has shut down its log")
    vmd.must("stop", "-fw", "bad")  # works nevertheless
    vmd.must("start", "bad")
    with last_words(vmd, "vmd: vm/bad") as own:
        own.send(b"<6>vm/bad: is heard again")
    reader.wait("vm/bad: is heard again")


def test_every_line_of_a_vm_bears_its_name(vmd: Daemon, reader: LogReader) -> None:
    """Lines with other titles, several in one packet, parts of lines, control characters: all get that VM's name."""
    vmd.must("start", NAME)
    vmd.must("start", "bad")
    before = len(reader.lines)
    forged = [
        b"<2>vmd: forged a", b"<6>vm/bystander: forged b", b"vmd: forged c\n", b"<6>vm/bad: x\nvmd: forged d",
        b"<6>vm/bad: \x1b[2Jforged e\r", b"", b"vmd: ", b"forged f\n\nvmd: forged g\n", b"<9>vmd: forged h\n",
        b"<6>vm/badger: forged i", b"<6>vm/bad/vionet0: forged j", b"<6>\xff\xfe vmd: forged k", b"<6>",
        b"<6>vm/bad/a b: forged l", b"vmd: forged m" + b"m" * 5000, b"<6>vmd: " + b"n" * 5000, b"\nthe last\n",
    ]  # fmt: skip

    with last_words(vmd, "vmd: vm/bad/vioscsi0") as taken:
        for packet in forged:
            taken.send(packet)

    reader.wait("the last")
    said = [line for line in reader.lines[before:] if "started vm" not in line]
    assert [line for line in said if not re.match(r"vm/bad(/[a-z0-9]+)?: ", line)] == []
    assert [letter for letter in "abcdefghijklm" if not any(f"forged {letter}" in line for line in said)] == []
    assert all(line.isprintable() and len(line) <= 2100 for line in said)


@pytest.mark.deep
@pytest.mark.usefixtures("bystander")
def test_a_vm_that_writes_without_end_is_held_back(vmd: Daemon, reader: LogReader) -> None:
    """Another VM's line arrives meanwhile, and the log names the VM that writes too much."""
    vmd.must("start", "bad")
    heard = False
    with last_words(vmd, "vmd: vm/bad/vioscsi0") as taken, last_words(vmd, f"vmd: vm/{NAME}") as own:
        deadline = time.monotonic() + DEADLINE_S
        for number in range(1 << 30):
            try:
                taken.send(b"<6>vm/bad/vioscsi0: again and again", socket.MSG_DONTWAIT)
            except BlockingIOError:
                select.select([], [taken], [], 0.01)
            if number == 2000:
                own.send(f"<6>vm/{NAME}: in between".encode())
            heard = number % 500 == 0 and any("in between" in line for line in reader.lines)
            if heard:
                break
            assert time.monotonic() < deadline
    reader.wait("log: vm bad writes too many lines")


@pytest.mark.deep
@pytest.mark.usefixtures("bystander")
def test_a_log_process_that_is_killed_is_started_again(vmd: Daemon, reader: LogReader) -> None:
    """Lines written while no log process ran are not lost, and the log reports the restart."""
    first = vmd.processes()["vmd: log"]
    os.kill(first, signal.SIGSTOP)  # so that it reads none of these lines
    with last_words(vmd, f"vmd: vm/{NAME}") as own:
        for number in range(100):
            own.send(f"<6>vm/{NAME}: line {number};".encode())

    os.kill(first, signal.SIGKILL)

    reader.wait(f"vm/{NAME}: line 99;")
    reader.wait("vmd: process log was killed by SIGKILL; starting another one")
    assert [line for line in reader.lines if ": line " in line] == [f"vm/{NAME}: line {n};" for n in range(100)]
    assert vmd.processes()["vmd: log"] != first


def test_lines_of_a_vm_have_fields_in_the_journal(tmp_path: Path, reader: LogReader) -> None:
    """The fields are the VM's name and id; lines of the daemon have none."""
    journal = tmp_path / "journal"
    journal.mkdir()
    prefix = ["unshare", "-m", "sh", "-c", WITH_JOURNAL, str(journal), *reader.prefix, sys.executable, "-c", NO_DEBUG]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as entries:
        entries.bind(str(journal / "socket"))
        entries.settimeout(DEADLINE_S)
        with Daemon(tmp_path, CONF, prefix=prefix) as vmd:
            vmd.must("start", NAME)
            with last_words(vmd, f"vmd: vm/{NAME}/vioscsi0") as own:
                own.send(f"<4>vm/{NAME}/vioscsi0: hears\nVM_NAME=bad".encode())
            pid, vmid = vmd.processes()[f"vmd: vm/{NAME}"], vmd.status(NAME)["id"]
            found: list[dict[str, str]] = []
            while not any("hears" in entry["MESSAGE"] for entry in found):
                lines = entries.recv(8192).decode().splitlines()
                found.append(dict(line.split("=", 1) for line in lines))
    started = next(entry for entry in found if "started" in entry["MESSAGE"])
    assert started.keys().isdisjoint({"VM_NAME", "VM_ID"})
    assert started["PRIORITY"] == "6"
    heard = found[-1]
    assert heard.pop("SYSLOG_PID") == str(os.getpid()) != str(pid)  # the test process has written it
    assert heard == {
        "PRIORITY": "4", "SYSLOG_FACILITY": "3", "SYSLOG_IDENTIFIER": "vmd", "VM_NAME": NAME, "VM_ID": str(vmid),
        "MESSAGE": f"vm/{NAME}/vioscsi0: hears\\x0aVM_NAME=bad",
    }  # fmt: skip


@pytest.mark.deep
@pytest.mark.usefixtures("bystander")
def test_a_log_process_that_is_stopped_is_replaced(vmd: Daemon, reader: LogReader) -> None:
    """A log process must answer in time.  No other process waits for it, and no line is lost."""
    first = vmd.processes()["vmd: log"]

    os.kill(first, signal.SIGSTOP)
    vmd.must("start", "bad")

    reader.wait("vmd: process log has not answered for 15 s; starting another one")
    reader.wait("vmd: started bad")


@pytest.mark.deep
def test_the_log_goes_on_for_the_last_words_of_a_killed_daemon(vmd: Daemon, reader: LogReader) -> None:
    """Lines from before the parent was killed are written, and then no process is left."""
    vmd.must("start", NAME)
    process = vmd.process
    assert process is not None
    logger = os.pidfd_open(vmd.processes()["vmd: log"])
    with last_words(vmd, f"vmd: vm/{NAME}") as own:
        os.kill(vmd.processes()["vmd: log"], signal.SIGSTOP)
        own.send(f"<6>vm/{NAME}: last words".encode())
        process.kill()
        process.wait()
        signal.pidfd_send_signal(logger, signal.SIGCONT)
        reader.wait(f"vm/{NAME}: last words")
    assert select.select([logger], [], [], DEADLINE_S)[0]
    os.close(logger)


@pytest.mark.deep
def test_the_log_process_holds_nothing_but_sockets(vmd: Daemon) -> None:
    """The log process has a filter, an ordinary uid, no capability, and no open regular file."""
    vmd.must("start", NAME)
    pid = vmd.processes()["vmd: log"]
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = {name.partition(":")[0] for name in open_files(pid).values()}

    assert (status["Seccomp"], status["CapEff"], status["NoNewPrivs"]) == ("2", "0" * 16, "1")
    assert "0" not in status["Uid"].split()
    assert files <= {"/dev/null", "socket", "anon_inode"}
