"""vmctl send and receive: the descriptors for the daemon, progress, and the end."""

import _thread
import errno
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.unit.vmctl.fake import DEADLINE_S, ROOT, FakeDaemon
from vmctl.bar import Bar
from vmd.client import Client
from vmd.ipc.messages.clients import Failed, ReceiveRequest, SendRequest, VmReceived, VmSent
from vmd.ipc.messages.shared import Live, TransferProgress

MIB = 1 << 20
SENT = VmSent(vmid=3, name="web", sent_bytes=150 * MIB)
RECEIVED = VmReceived(vmid=4, name="www", pid=1234, tty="/dev/pts/7", paused=False)
PROGRESS = TransferProgress(done_bytes=MIB, total_bytes=4 * MIB)


def run(daemon: FakeDaemon, *arguments: str, stdin: int, stdout: int) -> tuple[int, str]:
    """Run vmctl with these descriptors.  Return its exit status and errors."""
    done = subprocess.run(
        [sys.executable, "-m", "vmctl", "-s", str(daemon.path), *arguments],
        cwd=ROOT, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def send(daemon: FakeDaemon, tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Send into a file, which has contents that the fake daemon reads."""
    with (tmp_path / "stream").open("w+b") as file:
        file.write(b"what stdout is")
        file.seek(0)
        return run(daemon, "send", *arguments, stdin=subprocess.DEVNULL, stdout=file.fileno())


def receive(daemon: FakeDaemon, tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Receive from a file."""
    (tmp_path / "stream").write_bytes(b"what stdin is")
    with (tmp_path / "stream").open("rb") as file:
        return run(daemon, "receive", *arguments, stdin=file.fileno(), stdout=subprocess.DEVNULL)


def test_send_gives_standard_output_away(daemon: FakeDaemon, tmp_path: Path) -> None:
    """vmctl itself writes nothing to it, and progress is shown on terminals only."""
    daemon.answers(PROGRESS, PROGRESS, SENT)

    assert send(daemon, tmp_path, "web") == (0, "vmctl: sent vm 3 successfully (150M)\n")
    assert daemon.requests == [SendRequest(name="web")]
    assert daemon.files == [{"stream": b"what stdout is"}]


def test_send_and_keep(daemon: FakeDaemon, tmp_path: Path) -> None:
    """It makes a snapshot, here of a VM given by id."""
    daemon.answers(SENT)
    assert send(daemon, tmp_path, "-k", "3")[0] == 0
    assert daemon.requests == [SendRequest(vmid=3, name="3", keep=True)]


def test_send_while_it_runs(daemon: FakeDaemon, tmp_path: Path) -> None:
    """The message has the number of rounds, and the time for which the guest was paused."""
    daemon.answers(PROGRESS.replace(round=1), SENT.replace(rounds=3, still_ms=87))
    assert send(daemon, tmp_path, "-l", "web") == (
        0,
        "vmctl: sent vm 3 successfully (150M, 3 rounds, stood still for 87 ms)\n",
    )
    daemon.answers(SENT.replace(rounds=1, still_ms=2))
    assert send(daemon, tmp_path, "-kl", "-d", "20", "-r", "7", "web") == (
        0,
        "vmctl: sent vm 3 successfully (150M, 1 round, stood still for 2 ms)\n",
    )
    assert daemon.requests == [
        SendRequest(name="web", live=Live()),
        SendRequest(name="web", keep=True, live=Live(still_ms=20, rounds=7)),
    ]


@pytest.mark.parametrize(("arguments", "what"), [
    (("-d", "20", "web"), "-d without -l"), (("-r", "20", "web"), "-r without -l"),
    (("-l", "-d", "0", "web"), "number of milliseconds is too small: 0"),
    (("-l", "-r", "x", "web"), "number of rounds is invalid: x"),
])  # fmt: skip
def test_wrong_goals(daemon: FakeDaemon, tmp_path: Path, arguments: tuple[str, ...], what: str) -> None:
    """They are refused before any request."""
    status, errors = send(daemon, tmp_path, *arguments)
    assert (status, daemon.requests) == (2, [])
    assert errors.startswith(f"vmctl: {what}\n")


def test_receive_gives_standard_input_away(daemon: FakeDaemon, tmp_path: Path) -> None:
    """The message has the VM's console."""
    daemon.answers(PROGRESS, RECEIVED)

    assert receive(daemon, tmp_path, "www") == (0, "vmctl: received vm 4 successfully, tty /dev/pts/7\n")
    assert daemon.requests == [ReceiveRequest(name="www")]
    assert daemon.files == [{"stream": b"what stdin is"}]


def test_receive_and_stay_paused(daemon: FakeDaemon, tmp_path: Path) -> None:
    """The option is -p."""
    daemon.answers(RECEIVED.replace(paused=True))

    assert receive(daemon, tmp_path, "-p", "www") == (0, "vmctl: received vm 4 successfully, tty /dev/pts/7, paused\n")
    assert daemon.requests == [ReceiveRequest(name="www", paused=True)]


@pytest.mark.parametrize(("command", "sentence"), [
    ("send", "send vm command failed: it goes wrong"), ("receive", "receive vm command failed: it goes wrong"),
])  # fmt: skip
def test_failures(daemon: FakeDaemon, tmp_path: Path, command: str, sentence: str) -> None:
    """They have the daemon's text, also in the middle of a transfer."""
    daemon.answers(PROGRESS, Failed(code=errno.EIO, text="it goes wrong"))

    assert {"send": send, "receive": receive}[command](daemon, tmp_path, "web") == (1, f"vmctl: {sentence}\n")


@pytest.mark.parametrize("command", ["send", "receive"])
def test_daemon_that_ends(daemon: FakeDaemon, tmp_path: Path, command: str) -> None:
    """The fate of the VM is unknown."""
    daemon.script = lambda _request: None

    assert {"send": send, "receive": receive}[command](daemon, tmp_path, "web") == (3, "vmctl: pipe closed\n")


@pytest.mark.parametrize("command", ["send", "receive"])
def test_wrong_answers_are_refused(daemon: FakeDaemon, tmp_path: Path, command: str) -> None:
    """They are an error of the daemon."""
    daemon.answers(RECEIVED if command == "send" else SENT)
    status, errors = {"send": send, "receive": receive}[command](daemon, tmp_path, "web")
    assert status == 1
    assert errors.startswith("vmctl: vmd: sent Vm")


@pytest.mark.parametrize(("command", "what"), [
    ("send", "standard output is a terminal: redirect it to a file, or into a pipe"),
    ("receive", "standard input is a terminal: redirect it from a file, or from a pipe"),
])  # fmt: skip
def test_terminals_are_refused(daemon: FakeDaemon, command: str, what: str) -> None:
    """A stream would confuse a terminal, or would never arrive from one."""
    master, slave = pty.openpty()

    assert run(daemon, command, "web", stdin=slave, stdout=slave) == (1, f"vmctl: {what}\n")

    assert daemon.requests == []
    os.close(master)
    os.close(slave)


SEND_USAGE = "send [-kl] [-d ms] [-r rounds] id"


@pytest.mark.parametrize(("arguments", "usage"), [
    (("send",), SEND_USAGE), (("send", "a", "b"), SEND_USAGE), (("send", "-p", "a"), SEND_USAGE),
    (("send", "-l", "-d"), SEND_USAGE),
    (("receive",), "receive [-f] [-p | -w] name"), (("receive", "-k", "a"), "receive [-f] [-p | -w] name"),
])  # fmt: skip
def test_wrong_arguments(daemon: FakeDaemon, arguments: tuple[str, ...], usage: str) -> None:
    """The answer is the usage, without a request to the daemon."""
    status, errors = run(daemon, *arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert (status, daemon.requests) == (2, [])
    assert errors.endswith(f"usage:\tvmctl [-v] {usage}\n")


def test_a_number_is_no_name(daemon: FakeDaemon, tmp_path: Path) -> None:
    """The received VM needs a name, and a number is always read as an id."""
    assert receive(daemon, tmp_path, "7") == (2, "vmctl: invalid vm name\n")
    assert daemon.requests == []


def test_interrupted(daemon: FakeDaemon, tmp_path: Path) -> None:
    """^C ends vmctl at once.  The daemon then ends the transfer, because its client is gone."""
    with (tmp_path / "stream").open("w+b") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vmctl", "-s", str(daemon.path), "send", "web"],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        daemon.requested()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)

    assert (process.returncode, errors) == (1, "vmctl: send: interrupted\n")
    daemon.wait_left()


def test_interrupted_just_before_it_waits(daemon: FakeDaemon) -> None:
    """A signal that comes too early to interrupt the system call still ends the wait."""
    client = Client(str(daemon.path))
    timer = threading.Timer(0.2, _thread.interrupt_main)  # during the wait, and it interrupts no system call
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        client.answer(VmSent)
    timer.join()
    client.close()


def test_progress_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line has name, part, size, rate and remaining time, once the rate is measured.

    The estimated total may be too small.
    """
    master, slave = pty.openpty()
    monkeypatch.setattr("vmctl.output.STDERR", slave)
    monkeypatch.setattr("vmctl.bar.SETTLED_S", 0.0)
    monkeypatch.setattr("vmctl.bar.REDRAW_S", 0.0)
    bar = Bar("web", rate=True)
    bar.shown = True

    bar.began_s -= 10
    bar.show(100 * MIB, 400 * MIB)
    bar.show(500 * MIB, 400 * MIB)
    bar.end()
    first, second, left = Console(master).expect("\n", DEADLINE_S).split("\r")[1:]
    os.close(slave)
    os.close(master)

    assert first.startswith("web  25% |****")
    assert first.endswith("|   100M  10.0M/s 00:00:30")
    assert second.startswith(f"web 100% |{'*' * 37}")
    assert second.endswith("00:00:00")
    assert left == "\n"


def test_rounds_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the round stands at the end of the line, once it is known."""
    master, slave = pty.openpty()
    monkeypatch.setattr("vmctl.output.STDERR", slave)
    monkeypatch.setattr("vmctl.bar.REDRAW_S", 0.0)
    bar = Bar("web", rate=True, rounds=True)
    bar.shown = True

    bar.show(0, 400 * MIB)
    bar.show(100 * MIB, 400 * MIB, 12)
    bar.end()
    first, second, _ = Console(master).expect("\n", DEADLINE_S).split("\r")[1:]
    os.close(slave)
    os.close(master)

    assert first.endswith(" round     ")
    assert second.endswith(" round   12")
    assert len(first) == len(second) < 80


@pytest.mark.parametrize(("options", "round_"), [((), ""), (("-l",), " round    1")])
def test_a_transfer_that_is_done_is_shown_as_done(
    daemon: FakeDaemon, tmp_path: Path, options: tuple[str, ...], round_: str
) -> None:
    """It shows 100%, however little progress was reported.  A VM that runs meanwhile is sent in rounds."""
    master, slave = pty.openpty()
    daemon.answers(TransferProgress(done_bytes=0, total_bytes=4 * MIB, round=1), SENT)
    with (tmp_path / "stream").open("w+b") as file:
        done = subprocess.run(
            [sys.executable, "-m", "vmctl", "-s", str(daemon.path), "send", *options, "web"],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=slave, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
    shown = Console(master).expect("successfully", DEADLINE_S)
    os.close(slave)
    os.close(master)

    first, last = shown.split("\r\n")[0].split("\r")[1:]
    assert done.returncode == 0
    assert "100% |" in last
    assert first.endswith(round_ or "-")
    assert ("round" in last) is bool(round_)
