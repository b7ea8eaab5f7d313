"""vmctl without standard input, output or error: the number of a closed descriptor is never used for another file."""

import os
import shlex
import subprocess
import sys
import tty
from collections.abc import Iterator

import pytest

from tests.unit.vmctl.fake import DEADLINE_S, ROOT, FakeDaemon, vm_info
from vmd.ipc.messages.clients import (
    ConsoleAttached,
    ConsoleOutput,
    ConsoleRequest,
    End,
    ListRequest,
    ReceiveRequest,
    SendRequest,
    VmReceived,
    VmSent,
)
from vmd.record import Record
from vmd.version import VERSION

FULL_OUTPUT = "vmctl: standard output: No space left on device\n"
CLOSED_OUTPUT = "vmctl: standard output: Bad file descriptor\n"


@pytest.fixture
def serving(daemon: FakeDaemon) -> Iterator[FakeDaemon]:
    """A daemon that answers the requests of these tests."""
    master, slave = os.openpty()
    tty.setraw(slave)
    answers: dict[type[Record], tuple[Record, ...]] = {
        ListRequest: (vm_info(), End()),
        SendRequest: (VmSent(vmid=1, name="web", sent_bytes=0),),
        ReceiveRequest: (VmReceived(vmid=1, name="web", pid=1, tty="", paused=False),),
        ConsoleRequest: (ConsoleOutput(data=b"backlog"), ConsoleAttached(vmid=1, name="web", tty=os.ttyname(slave))),
    }
    daemon.script = lambda request: answers[type(request)]
    yield daemon
    os.close(master)
    os.close(slave)


def run(daemon: FakeDaemon, line: str) -> tuple[int, str, str]:
    """Run `vmctl` with the arguments and redirections of a shell's command line."""
    vmctl = shlex.join([sys.executable, "-m", "vmctl", "-s", str(daemon.path)])
    done = subprocess.run(
        ["sh", "-c", f"exec {vmctl} {line}"],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "errors"),
    [
        ("status >&-", CLOSED_OUTPUT),
        ("status --json <&- >&-", CLOSED_OUTPUT),
        ("status >/dev/full", FULL_OUTPUT),
        ("help >&-", CLOSED_OUTPUT),
        ("version >/dev/full", FULL_OUTPUT),
        ("-V >/dev/full", FULL_OUTPUT),
    ],
)
def test_output_that_cannot_be_written_is_a_failure(serving: FakeDaemon, line: str, errors: str) -> None:
    """The daemon's socket does not get the number of a closed output.  The daemon gets only requests."""
    assert run(serving, line) == (1, "", errors)

    assert serving.requests == ([ListRequest()] if line.startswith("status") else [])


def test_output_without_a_place_for_errors(serving: FakeDaemon) -> None:
    """No message is possible, but the exit status says that it failed."""
    assert run(serving, "status <&- >&- 2>&-") == (1, "", "")
    assert serving.requests == [ListRequest()]


@pytest.mark.parametrize("redirections", ["2>&-", "<&- 2>/dev/full"])
def test_unused_descriptors_may_be_closed(serving: FakeDaemon, redirections: str) -> None:
    """The list is printed."""
    status, output, errors = run(serving, f"-v status {redirections}")

    assert status == 0
    assert output.splitlines()[1].endswith("running web")
    assert output.count("\n") == 2
    assert errors == ""


def test_version_with_errors_closed(serving: FakeDaemon) -> None:
    """The version goes to standard output."""
    assert run(serving, "-V 2>&-") == (0, f"vmctl {VERSION}\n", "")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("send web >&-", "standard output is closed, or not open for writing: redirect it to a file, or into a pipe"),
        ("send web 1</dev/zero", "standard output is closed, or not open for writing: redirect it to a file,"),
        ("send web >/dev/null", "standard output is /dev/null: the VM would be lost"),
        ("receive web 0>/dev/full", "standard input is not open for reading: redirect it from a file, or from a pipe"),
    ],
)
def test_unusable_streams_are_refused(serving: FakeDaemon, line: str, sentence: str) -> None:
    """The VM is not sent, because it would be lost, or is not received."""
    status, output, errors = run(serving, line)

    assert (status, output, serving.requests) == (1, "", [])
    assert errors.startswith(f"vmctl: {sentence}")
    assert errors.count("\n") == 1


def test_snapshot_into_the_null_device(serving: FakeDaemon) -> None:
    """It is allowed: the VM is kept."""
    assert run(serving, "send -k web 1<>/dev/null")[0] == 0
    assert serving.requests == [SendRequest(name="web", keep=True)]


def test_receive_without_standard_input(serving: FakeDaemon) -> None:
    """The daemon gets an empty stream."""
    assert run(serving, "receive web <&-")[0] == 0
    assert serving.files == [{"stream": b""}]


def test_console_without_standard_input(serving: FakeDaemon) -> None:
    """As with the null device, vmctl prints the backlog and ends."""
    status, output, errors = run(serving, "console web <&-")

    assert (status, output) == (0, "backlog")
    assert errors.endswith("[EOT]\n")
