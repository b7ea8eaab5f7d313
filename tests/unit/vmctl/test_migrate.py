"""vmctl migrate: its arguments, and the messages between both ends."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import schema
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import DEADLINE_S, ROOT, FakeDaemon, vm_info
from vmctl import carry
from vmctl.carried import is_hung_up
from vmctl.carry import ASKED, COMMIT, FAILED, SOURCE, TARGET, Ear, say
from vmctl.commands import migrate as migrate_
from vmctl.commands.migrate import destination, shell_words, uninterrupted
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


def test_how_much_other_output_is_skipped(tmp_path: Path) -> None:
    """A thousand lines, however long.  A line of the largest size is still understood."""
    said = b'{"vmctl": "receive", "at": "asked"}\n'
    assert hear(b"no\n" * carry.LINES_MAX + said, ASKED) == {"vmctl": "receive", "at": "asked"}
    with pytest.raises(CommandError, match="does not answer as vmctl"):
        hear(b"no\n" * (carry.LINES_MAX + 1) + said, ASKED)
    long = json.dumps({"vmctl": "receive", "at": "asked", "text": ""})
    long = long.replace('""', f'"{"x" * (carry.LINE_MAX - len(long))}"')
    assert len(long) == carry.LINE_MAX
    assert hear(f"{long}\n".encode(), ASKED) == json.loads(long)
    with (tmp_path / "endless").open("w+b") as file:
        file.truncate(3 * carry.LINE_MAX * carry.LINES_MAX)
        with pytest.raises(CommandError, match="does not answer as vmctl"):
            Ear(file.fileno(), TARGET).hear(ASKED)


def test_lines_are_waited_for() -> None:
    """A line that was read together with an earlier one is not waited for."""
    reading, writing = os.pipe()
    ear = Ear(reading, TARGET)
    assert not ear.poll(0)
    for _ in range(2):
        say(writing, TARGET, ASKED)
    assert ear.poll(0)
    assert ear.hear(ASKED) is not None
    assert ear.poll(0)
    assert ear.hear(ASKED) is not None
    assert not ear.poll(0)
    os.close(writing)
    assert ear.poll(0)
    os.close(reading)


def test_a_daemon_that_has_hung_up() -> None:
    """A message that was not read yet does not count."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not is_hung_up(ours.fileno())
        theirs.send(b"x")
        assert not is_hung_up(ours.fileno())
        theirs.close()
        assert is_hung_up(ours.fileno())


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


@pytest.mark.parametrize(
    ("listed", "status", "sentence"),
    [
        ((), 4, "vm web not found"),
        ((vm_info(running=False),), 1, "vm web is stopped"),
        ((vm_info(state="receiving"),), 1, "vm web is receiving"),
    ],
)
def test_vms_that_cannot_be_moved(
    vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path, listed: tuple[Record, ...], status: int, sentence: str
) -> None:
    """They are refused before the other host is asked, because ssh may ask for a password."""
    daemon.script = lambda _request: (*listed, End())
    shell = f"touch {tmp_path}/ran"
    assert vmctl("migrate", "-e", shell, "web", "host") == (
        status, "", f"vmctl: migrate vm command failed: {sentence}\n",
    )  # fmt: skip
    assert {type(request) for request in daemon.requests} == {ListRequest}
    assert not (tmp_path / "ran").exists()


def spoken(tmp_path: Path, *commands: str) -> str:
    """Return a shell that notes its arguments, and runs commands of sh."""
    program = tmp_path / "shell"
    program.write_text("\n".join((f"printf '%s\\n' \"$@\" >{tmp_path}/arguments", *commands, "")))
    return f"sh {program}"


ACCEPTS = (f"echo '{ASKED_LINE}'", f"echo '{COMPLETE_LINE}'", "read line", f"echo '{RUNNING_LINE}'")


@pytest.mark.parametrize(
    ("options", "where", "command"),
    [
        ((), "host", ["host", "vmctl", "receive", "-w", "web"]),
        (("-f",), "me@host:www", ["me@host", "vmctl", "receive", "-w", "-f", "www"]),
    ],
)
def test_the_command_at_the_other_host(
    vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path, options: tuple[str, ...], where: str, command: list[str]
) -> None:
    """Only with -f are the disks there not compared."""
    script(daemon)
    status, _, said = vmctl("migrate", *options, "-e", spoken(tmp_path, *ACCEPTS), "web", where)
    assert status == 0, said
    assert (tmp_path / "arguments").read_text().splitlines() == command


@pytest.mark.parametrize(("rounds", "words"), [(0, ""), (1, "1 round, "), (2, "2 rounds, ")])
def test_the_report(
    vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int, words: str
) -> None:
    """It has the whole duration, and for programs in milliseconds.  The remote shell has ended by then."""
    script(daemon, DONE=SENT.replace(rounds=rounds))
    shells: list[subprocess.Popen[bytes]] = []

    def start(command: list[str]) -> "subprocess.Popen[bytes]":
        shells.append(started(command))
        return shells[-1]

    started = migrate_.started
    monkeypatch.setattr(migrate_, "started", start)
    times = iter((10.0, 12.5) * 2)
    monkeypatch.setattr(migrate_, "time", SimpleNamespace(monotonic=lambda: next(times)))
    shell = spoken(tmp_path, *ACCEPTS)
    assert vmctl("migrate", "-e", shell, "web", "host") == (
        0, "",
        f"vmctl: migrated vm 3 to host successfully, id 7 there (100B, {words}downtime 40 ms, 2.5 s in all)\n",
    )  # fmt: skip
    status, output, errors = vmctl("migrate", "--json", "-e", shell, "web", "host")
    assert (status, errors) == (0, "")
    found = schema.check(output, "migrate")
    assert (found["total_ms"], found["rounds"], found["host"]) == (2500, rounds, "host")
    assert [shell.returncode for shell in shells] == [0, 0]


def test_steps_are_told(vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path) -> None:
    """The option is -v."""
    script(daemon)
    _, _, said = vmctl("migrate", "-v", "-e", spoken(tmp_path, *ACCEPTS), "web", "host")
    assert said.splitlines()[:-1] == [
        "vmctl: host accepts the VM", "vmctl: host has received the VM", "vmctl: the disks are unlocked here",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ends", "how"),
    [
        ("exit 0", "the remote command has ended with status 0"),
        ("exit 5", "the remote command has ended with status 5"),
        ("kill -9 $$", "the remote command was killed by signal 9"),
        ("exec >&-; sleep 60", "has closed the connection"),
    ],
)
def test_how_the_remote_command_has_ended(
    vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, how: str
) -> None:
    """The daemon gets the reason.  A command that does not end is ended."""
    monkeypatch.setattr(migrate_, "END_S", 0.0 if "sleep" in ends else DEADLINE_S)
    script(daemon)
    assert vmctl("migrate", "-e", spoken(tmp_path, ends.replace("sleep", "exec sleep")), "web", "host")[0] == 1
    back = daemon.requests[-1]
    assert isinstance(back, MigrationStep)
    assert back.text == f"host: {how}"


def test_a_commit_that_cannot_be_sent(vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path) -> None:
    """The target cannot run the VM then."""
    script(daemon)
    shell = spoken(tmp_path, ACCEPTS[0], "exec <&-", ACCEPTS[1], "exit 5")
    assert vmctl("migrate", "-e", shell, "web", "host")[0] == 1
    back = daemon.requests[-1]
    assert isinstance(back, MigrationStep)
    assert (back.step, back.in_doubt, back.text) == (
        Step.BACK, False, "host: the remote command has ended with status 5",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("commands", "why"),
    [
        ((ACCEPTS[0], f"echo '{failed_line(in_doubt=False)}'"), "no room"),
        ((ACCEPTS[0], "exit 5"), "the remote command has ended with status 5"),
        ((ACCEPTS[0], ACCEPTS[1], "exit 5"), "the remote command has ended with status 5"),
    ],
)
def test_a_stream_that_fails(
    vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path, commands: tuple[str, ...], why: str
) -> None:
    """The target knows the reason better than the daemon here."""
    script(daemon, GO_ON=Failed(code=errno.EIO, text="broken pipe"))
    assert vmctl("migrate", "-e", spoken(tmp_path, *commands), "web", "host") == (
        1, "", f"vmctl: migrate vm command failed: broken pipe: host: {why}\n",
    )  # fmt: skip
    script(daemon, GO_ON=Failed(code=errno.EBUSY, text="busy"))
    assert vmctl("migrate", "-e", spoken(tmp_path, *commands), "web", "host")[2].endswith(" failed: busy\n")


def test_a_remote_shell_that_is_not_there(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Nothing is requested, and ^C works as before."""
    script(daemon)
    before = signal.getsignal(signal.SIGINT)
    assert vmctl("migrate", "-e", "/none/ssh -v", "web", "host") == (
        1, "", "vmctl: /none/ssh: No such file or directory\n",
    )  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is before
    assert {type(request) for request in daemon.requests} == {ListRequest}


def test_interrupts_while_the_vm_is_handed_over(capfd: pytest.CaptureFixture[str]) -> None:
    """The first one is only answered, because the VM would be in doubt."""
    before = signal.getsignal(signal.SIGINT)
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with uninterrupted():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err == (
        "vmctl: the VM is being handed over: another interrupt leaves it in doubt\n"
    )  # fmt: skip
