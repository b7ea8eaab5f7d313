"""vmctl migrate: its arguments, and the messages between both ends."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.vmctl.fake import DEADLINE_S, ROOT, FakeDaemon, vm_info
from vmctl import carry
from vmctl.carry import ASKED, COMMIT, FAILED, SOURCE, TARGET, Ear, say
from vmctl.commands.migrate import destination, shell_words
from vmctl.errors import ArgumentError, CommandError
from vmd.errors import VMD_IN_DOUBT
from vmd.ipc.messages.clients import (
    End,
    Failed,
    ListRequest,
    MigrateInRequest,
    MigrateRequest,
    MigrationAt,
    MigrationStep,
    Step,
    VmReceived,
    VmSent,
)
from vmd.ipc.messages.shared import Live, TransferProgress
from vmd.record import Record


@pytest.mark.parametrize(("word", "host", "name"), [
    ("h2", "h2", ""), ("me@h2", "me@h2", ""), ("h2:b", "h2", "b"), ("me@h2.example:b", "me@h2.example", "b"),
    ("[fe80::1]", "fe80::1", ""), ("me@[::1]:b", "me@::1", "b"), ("10.0.0.1:b", "10.0.0.1", "b"),
])  # fmt: skip
def test_destination(word: str, host: str, name: str) -> None:
    """The forms are those of ssh and scp."""
    assert destination(word) == (host, name)


@pytest.mark.parametrize("word", [
    "", ":", ":b", "h2:", "me@", "me@:b", "@h2", "-oProxyCommand=x", "me@-x", "-x:b", "fe80::1", "::1:b", "[]", "h2:3",
    "h2:-b", "-@h2",
])  # fmt: skip
def test_no_destination(word: str) -> None:
    """Words that ssh would read as options, and ambiguous addresses, are refused."""
    with pytest.raises(ArgumentError):
        destination(word)


def test_shell() -> None:
    """Words are split as by a shell."""
    assert shell_words("ssh -p 22 -i 'a b'") == ["ssh", "-p", "22", "-i", "a b"]
    for text in ("", "'"):
        with pytest.raises(ArgumentError, match="command"):
            shell_words(text)


def hear(said: bytes, *wanted: str, who: str = TARGET) -> "carry.Words | None":
    """Return the first of the wanted messages in some output."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as sink:
        sink.write(said)
    with os.fdopen(reading, "rb") as source:
        return Ear(source.fileno(), who).hear(*wanted)


def test_messages_are_found_after_the_output_of_a_login() -> None:
    """That output may be long, and may contain other JSON."""
    reading, writing = os.pipe()
    os.write(writing, b'Welcome!\n\n[1]\n{"vmctl": 1}\n\xff\n' + b"x" * 20_000 + b"\n")
    say(writing, TARGET, ASKED, locks_travel=True)
    os.close(writing)
    ear = Ear(reading, TARGET)
    assert ear.hear(ASKED, FAILED) == {"vmctl": "receive", "at": "asked", "locks_travel": True}
    assert ear.hear(FAILED) is None
    os.close(reading)


@pytest.mark.parametrize("said", [b"", b'{"vmctl": "receive", "at": "asked"', b"x" * 9000, b"no\n"])
def test_incomplete_messages(said: bytes) -> None:
    """Half a line is no message."""
    assert hear(said, ASKED) is None


def test_unexpected_messages() -> None:
    """An end that sends them is not trusted."""
    with pytest.raises(CommandError, match="'asked', where running or failed was expected"):
        hear(b'{"vmctl": "receive", "at": "asked"}\n', carry.RUNNING, FAILED)
    with pytest.raises(CommandError, match="does not answer as vmctl"):
        hear(b"no\n" * 2000, ASKED)


def test_one_end_does_not_hear_itself() -> None:
    """A shell may echo its input."""
    assert hear(b'{"vmctl": "migrate", "at": "commit"}\n', COMMIT, FAILED) is None
    assert hear(b'{"vmctl": "migrate", "at": "commit"}\n', COMMIT, who=SOURCE) is not None


# --- both ends, with a fake daemon ----------------------------------------------------------------------------------


AT = MigrationAt(vmid=3, name="web", locks_travel=True, paused=True)
SENT = VmSent(vmid=3, name="web", sent_bytes=100, rounds=2, downtime_ms=40)
RECEIVED = VmReceived(vmid=7, name="web", pid=9, tty="/dev/pts/9", paused=True)
COMMIT_LINE = '{"vmctl": "migrate", "at": "commit", "paused": true}\n'


def script(daemon: FakeDaemon, **answers: "Record | None") -> None:
    """Answer a step with the given record.  Other steps succeed, and None closes the connection."""

    def answer(request: Record) -> "tuple[Record, ...] | None":
        if isinstance(request, ListRequest):
            return (vm_info(vmid=3), End())
        name = request.step.name if isinstance(request, MigrationStep) else "BEGIN"
        usual = {"DONE": SENT, "BACK": Failed(code=errno.EIO, text="vm web goes on here")}
        found = answers.get(name, usual.get(name, AT))
        progress = TransferProgress(done_bytes=1, total_bytes=2)
        return None if found is None else (progress, found) if name == "GO_ON" else (found,)

    daemon.reads_files = False
    daemon.script = answer


def receive(daemon: FakeDaemon, said: str = COMMIT_LINE) -> tuple[int, list[Any]]:
    """Run `vmctl receive -w web`, with this input after the stream.  Return its status and messages."""
    done = subprocess.run(
        [sys.executable, "-m", "vmctl", "-s", str(daemon.path), "receive", "-w", "web"],
        cwd=ROOT, input=said, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_target_reports_each_step(daemon: FakeDaemon) -> None:
    """On commit it runs the VM, paused if the VM was paused."""
    script(daemon, COMMIT=RECEIVED)
    status, said = receive(daemon)
    assert (status, [words["at"] for words in said]) == (0, ["asked", "complete", "running"])
    assert said[0]["locks_travel"] is True
    assert said[2]["tty"] == "/dev/pts/9"
    assert daemon.requests == [
        MigrateInRequest(name="web"),
        MigrationStep(vmid=3, name="web", step=Step.GO_ON),
        MigrationStep(vmid=3, name="web", step=Step.COMMIT, paused=True),
    ]


@pytest.mark.parametrize(("answers", "said", "in_doubt"), [
    ({"BEGIN": Failed(code=1, text="no")}, COMMIT_LINE, False),
    ({"GO_ON": Failed(code=1, text="no")}, COMMIT_LINE, False),
    ({"GO_ON": None}, COMMIT_LINE, False),
    ({}, "", False),
    ({}, '{"vmctl": "migrate", "at": "something"}\n', False),
    ({"COMMIT": Failed(code=errno.EBUSY, text="no")}, COMMIT_LINE, False),
    ({"COMMIT": Failed(code=VMD_IN_DOUBT, text="no")}, COMMIT_LINE, True),
    ({"COMMIT": None}, COMMIT_LINE, True),
])  # fmt: skip
def test_the_target_says_whether_the_vm_may_run_there(
    daemon: FakeDaemon, answers: "dict[str, Record | None]", said: str, in_doubt: bool
) -> None:
    """It may run there only after the commit, unless its daemon reports a definite failure."""
    script(daemon, **answers)
    status, lines = receive(daemon, said)
    assert status == 1
    assert (lines[-1]["at"], lines[-1]["in_doubt"]) == ("failed", in_doubt)


def test_a_daemon_that_ends_before_the_commit_runs_nothing(daemon: FakeDaemon) -> None:
    """Its client has not sent the commit, and knows that."""
    script(daemon)
    command = [sys.executable, "-m", "vmctl", "-s", str(daemon.path), "receive", "-w", "web"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert [json.loads(process.stdout.readline())["at"] for _ in range(2)] == ["asked", "complete"]
        daemon.hang_up()
        process.stdin.write(COMMIT_LINE)
        process.stdin.flush()
        last = json.loads(process.stdout.readline())
    assert (process.returncode, last["at"], last["in_doubt"]) == (1, "failed", False)
    assert last["text"] == "vmd has ended"


def migrate(daemon: FakeDaemon, tmp_path: Path, *lines: str) -> tuple[int, str]:
    """Run `vmctl migrate web host` with a shell that prints these lines, and reads one at `...`."""
    said = tmp_path / "said"
    said.write_text("".join(f"{line}\n" for line in lines if line != "..."))
    behind = lines.index("...") if "..." in lines else len(lines)
    program = tmp_path / "shell"
    hears = "read line" if "..." in lines else ":"
    program.write_text(f"head -n {behind} {said}; {hears}; tail -n +{behind + 1} {said}; exit 5\n")
    done = subprocess.run(
        [sys.executable, "-m", "vmctl", "-s", str(daemon.path), "migrate", "-e", f"sh {program}", "web", "host"],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


ASKED_LINE = '{"vmctl": "receive", "at": "asked", "locks_travel": true}'
COMPLETE_LINE = '{"vmctl": "receive", "at": "complete"}'
RUNNING_LINE = '{"vmctl": "receive", "at": "running", "id": 7, "tty": "/dev/pts/9"}'


def failed_line(*, in_doubt: bool) -> str:
    """Return the last message of a target that has failed."""
    return json.dumps({"vmctl": "receive", "at": "failed", "text": "no room", "in_doubt": in_doubt})


def test_the_source_takes_its_steps(daemon: FakeDaemon, tmp_path: Path) -> None:
    """It takes each step after the target has completed its own."""
    script(daemon)
    status, said = migrate(daemon, tmp_path, "Welcome!", ASKED_LINE, COMPLETE_LINE, "...", RUNNING_LINE)
    assert status == 0, said
    assert said.startswith("vmctl: migrated vm 3 to host successfully, id 7 there (100B, 2 rounds, downtime 40 ms, ")
    assert daemon.requests[1:] == [
        MigrateRequest(vmid=0, name="web", live=Live()),
        MigrationStep(name="web", step=Step.GO_ON, locks_travel=True),
        MigrationStep(name="web", step=Step.COMMIT),
        MigrationStep(name="web", step=Step.DONE),
    ]


@pytest.mark.parametrize(("lines", "in_doubt"), [
    ((failed_line(in_doubt=True),), False),  # not in doubt here: the target was not told to run the VM
    (("Welcome!",), False),
    ((ASKED_LINE, failed_line(in_doubt=False)), False),
    ((ASKED_LINE,), False),
    ((ASKED_LINE, RUNNING_LINE), False),
    ((ASKED_LINE, COMPLETE_LINE, "...", failed_line(in_doubt=False)), False),
    ((ASKED_LINE, COMPLETE_LINE, "...", failed_line(in_doubt=True)), True),
    ((ASKED_LINE, COMPLETE_LINE, "..."), True),
    ((ASKED_LINE, COMPLETE_LINE, "...", ASKED_LINE), True),
    ((ASKED_LINE, COMPLETE_LINE, "...", '{"vmctl": "receive", "at": "failed"}'), True),
])  # fmt: skip
def test_the_source_says_whether_the_vm_may_run_there(
    daemon: FakeDaemon, tmp_path: Path, lines: tuple[str, ...], in_doubt: bool
) -> None:
    """It may run there only after the commit, unless the target has denied it."""
    script(daemon)
    assert migrate(daemon, tmp_path, *lines) == (1, "vmctl: migrate vm command failed: vm web goes on here\n")
    back = daemon.requests[-1]
    assert isinstance(back, MigrationStep)
    assert (back.step, back.in_doubt) == (Step.BACK, in_doubt)
    assert back.text.startswith("host: ") or "the other side says" in back.text


def test_the_source_cannot_be_ended(daemon: FakeDaemon, tmp_path: Path) -> None:
    """The message first says that the VM runs at the target."""
    script(daemon, DONE=None)
    status, said = migrate(daemon, tmp_path, ASKED_LINE, COMPLETE_LINE, "...", RUNNING_LINE)
    assert status == 1
    assert said.startswith("vmctl: vm web runs at host, but it could not be ended here: ")
