"""The command table, usage, abbreviations, the connection, and the modules loaded at start-up (*cat. 3.1, 3.2*)."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import ROOT, FakeDaemon, spawn, vm_info
from vmctl.__main__ import main
from vmctl.errors import UsageError
from vmctl.options import find_command, parse
from vmctl.table import COMMANDS, FILE, VM, Command, Operand, Option
from vmctl.usage import synopsis
from vmd.client import socket_owner
from vmd.ipc.imsg import HEADER
from vmd.ipc.messages.clients import (
    End,
    Failed,
    ListRequest,
    LoadRequest,
    LogRequest,
    Ok,
    ReloadRequest,
    ResetRequest,
    VmStarted,
)
from vmd.record import Record

USAGE = "usage:\tvmctl [-v] command [arg ...]\n"


# --- usage -----------------------------------------------------------------------------------------------


def test_no_command_is_answered_with_usage(capfd: pytest.CaptureFixture[str]) -> None:
    """The first line is upstream's, and every command has a line."""
    assert main([]) == 2

    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.startswith(USAGE)
    assert [line.split()[1] for line in errors.splitlines()[1:-1]] == [c.name for c in COMMANDS]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("frobnicate", "unknown argument: frobnicate\n"),
        ("stauts", "unknown argument: stauts: did you mean status?\n"),
        ("Start", "unknown argument: Start: did you mean start?\n"),
        ("st", "ambiguous argument: st: start, status or stop\n"),
        ("s", "ambiguous argument: s: send, show, snapshot, ssh, start, status or stop\n"),
        ("re", "ambiguous argument: re: receive, reload, reset or resize\n"),
        ("l", "ambiguous argument: l: load or log\n"),
        ("sta", "ambiguous argument: sta: start or status\n"),
    ],
)
def test_word_that_is_no_command(capfd: pytest.CaptureFixture[str], word: str, sentence: str) -> None:
    """The message has the candidates, and the usage is one line."""
    assert main([word]) == 2

    assert capfd.readouterr() == ("", f"{sentence}{USAGE}Try 'vmctl help'.\n")


def test_unknown_option_before_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    """The message is that of getopt(3)."""
    assert main(["-x", "status"]) == 2

    assert capfd.readouterr() == ("", f"vmctl: unknown option -- x\n{USAGE}Try 'vmctl help'.\n")


UPSTREAM = (
    "console", "create", "load", "log", "pause", "receive", "reload", "reset", "send", "show", "start", "status",
    "stop", "unpause", "wait",
)  # fmt: skip
ABBREVIATIONS = [
    (name[:length], name)
    for name in UPSTREAM
    for length in range(1, len(name) + 1)
    if [other for other in UPSTREAM if other.startswith(name[:length])] == [name] or length == len(name)
]


@pytest.mark.parametrize(("word", "name"), ABBREVIATIONS)
def test_abbreviations_of_upstream(word: str, name: str) -> None:
    """None of our commands takes one away.  A complete name means that command."""
    assert find_command(word).name == name


def test_which_commands_are_upstream_s() -> None:
    """An exact name wins, then an abbreviation of an upstream command, then one of ours."""
    assert tuple(command.name for command in COMMANDS if command.upstream) == UPSTREAM
    for command in COMMANDS:
        assert find_command(command.name) is command


TWO = Command(
    name="two",
    module="two",
    help="be about two things",
    options=(Option(name="-e", instead_of="path", help="have none"),),
    operand=Operand(name="id", kind=VM),
    more=(Operand(name="path", kind=FILE), Operand(name="tag", optional=True)),
)


def test_a_command_of_several_operands() -> None:
    """They come in order.  An option that replaces an operand gives its place to the next one."""
    assert synopsis(TWO) == "two id [path | -e] [tag]"
    assert parse(TWO, ["web", "/a", "x"]).operands == ["web", "/a", "x"]
    assert parse(TWO, ["web", "/a"]).operands == ["web", "/a"]
    assert parse(TWO, ["-e", "web", "x"]).operands == ["web", "x"]
    for words, sentence in (
        ([], "missing argument: id"),
        (["web"], "missing argument: path"),
        (["web", ""], "empty argument: path"),
        (["web", "/a", "x", "y"], "unexpected argument: y"),
        (["-e", "web", "x", "y"], "unexpected argument: y"),
    ):
        with pytest.raises(UsageError) as wrong:
            parse(TWO, words)
        assert str(wrong.value) == sentence


@pytest.mark.parametrize(
    ("arguments", "sentence", "usage"),
    [
        (["console"], "missing argument: id", "console [-F] [-f | -r | -l] id"),
        (["console", "a", "b"], "unexpected argument: b", "console [-F] [-f | -r | -l] id"),
        (["console", ""], "empty argument: id", "console [-F] [-f | -r | -l] id"),
        (["load"], "missing argument: filename", "load filename"),
        (["log"], "missing argument: brief | verbose", "log brief | verbose"),
        (["log", "loud"], "unknown argument: loud: brief or verbose", "log brief | verbose"),
        (["log", "verbsoe"], "unknown argument: verbsoe: did you mean verbose?", "log brief | verbose"),
        (["log", ""], "empty argument: brief | verbose", "log brief | verbose"),
        (["reload", "now"], "unexpected argument: now", "reload"),
        (["reset", "everything"], "unknown argument: everything: all, switches or vms", "reset [all | switches | vms]"),
        (["reset", "vms", "all"], "unexpected argument: all", "reset [all | switches | vms]"),
        (["status", "a", "b"], "unexpected argument: b", "status [-rv] [id]"),
        (["show", "a", "b"], "unexpected argument: b", "show [-rv] [id]"),
        (["stop"], "missing argument: id", "stop [-fw] [id | -a]"),
        (["stop", "-a", "web"], "unexpected argument: web", "stop [-fw] [id | -a]"),
        (["stop", "a", "b"], "unexpected argument: b", "stop [-fw] [id | -a]"),
        (["wait"], "missing argument: id", "wait id"),
        (["help", "a", "b"], "unexpected argument: b", "help [command]"),
        (["create"], "missing argument: disk", "create [-b base | -i disk] [-c sum] [-s size] disk"),
    ],
)
def test_wrong_arguments_are_answered_with_the_usage_of_the_command(
    vmctl: Vmctl, daemon: FakeDaemon, arguments: list[str], sentence: str, usage: str
) -> None:
    """There is one message and one line of usage, and no request to the daemon."""
    assert vmctl(*arguments) == (2, "", f"vmctl: {sentence}\nusage:\tvmctl [-v] {usage}\n")
    assert daemon.requests == []


def too_many(command: Command) -> list[str]:
    """Return more arguments than a command takes."""
    return ["a"] * max(2, len(command.operands) + 1)


def test_wrong_arguments_are_found_without_a_daemon(vmctl: Vmctl, tmp_path: Path) -> None:
    """vmctl connects only when the command line is valid."""
    for command in COMMANDS:
        status, output, errors = vmctl(command.name, *too_many(command), socket=str(tmp_path / "none"))

        assert (status, output) == (2, "")
        assert errors.startswith("vmctl: unexpected argument: ")


def test_wrong_arguments_are_a_document_with_json(vmctl: Vmctl) -> None:
    """A calling program reads standard output, also after mistakes."""
    status, output, errors = vmctl("status", "--json", "a", "b")

    assert (status, json.loads(output)) == (
        2,
        {"schema": 1, "error": "unexpected argument: b", "code": None},
    )
    assert errors.startswith("vmctl: unexpected argument: b\nusage:")


def test_usage_of_start_lists_every_option(vmctl: Vmctl) -> None:
    """It has upstream's options and ours."""
    status, _, errors = vmctl("start")

    assert status == 2
    for letter in "cLBbdIikmnprt":
        assert f"[-{letter}" in errors or letter in "cL"
    assert "[-cL]" in errors
    assert errors.endswith("id | name\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stop", "-x", "web"], "unknown option -- x"),
        (["start", "-m"], "option requires an argument -- m"),
        (["status", "--yaml"], "unknown option -- yaml"),
        (["status", "--jsno"], "unknown option -- jsno: did you mean --json?"),
        (["start", "-:", "web"], "unknown option -- :"),
    ],
)
def test_wrong_option_is_named(vmctl: Vmctl, arguments: list[str], sentence: str) -> None:
    """One message, then the usage of the command."""
    status, _, errors = vmctl(*arguments)

    assert status == 2
    assert errors.startswith(f"vmctl: {sentence}\nusage:\tvmctl [-v] {arguments[0]} ")


# --- simple commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (["reload"], ReloadRequest()),
        (["rel"], ReloadRequest()),
        (["reset"], ResetRequest(vms=True, switches=True)),
        (["reset", "all"], ResetRequest(vms=True, switches=True)),
        (["res", "vms"], ResetRequest(vms=True, switches=False)),
        (["reset", "switches"], ResetRequest(vms=False, switches=True)),
        (["log", "brief"], LogRequest(verbosity=0)),
        (["log", "VERB"], LogRequest(verbosity=2)),
        (["lo", "/etc/more.conf"], None),
        (["load", "/etc/more.conf"], LoadRequest(path="/etc/more.conf")),
        (["load", "more.conf"], LoadRequest(path=f"{os.getcwd()}/more.conf")),
    ],
)
def test_simple_command(vmctl: Vmctl, daemon: FakeDaemon, arguments: list[str], request_: Record | None) -> None:
    """The request is sent, and a success is silent.  `lo` is ambiguous: load or log."""
    daemon.answers(Ok())

    status, output, errors = vmctl(*arguments)

    if request_ is None:
        assert status == 2
        assert errors.startswith("ambiguous argument: lo: load or log\n")
    else:
        assert (status, output, errors) == (0, "", "")
        assert daemon.requests == [request_]


def test_notes_of_a_success_are_shown(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Each is a line, and control characters in names are escaped."""
    daemon.answers(Ok(notes=("vm web: memory changes at its next start", "odd \x1b[2Jname")))

    assert vmctl("reload") == (
        0,
        "",
        "vmctl: vm web: memory changes at its next start\nvmctl: odd \\x1b[2Jname\n",
    )


def test_refusal_carries_the_daemons_sentence(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It stands where upstream has strerror's text."""
    daemon.answers(Failed(code=errno.EPERM, text="only root may reload the configuration"))

    assert vmctl("reload") == (1, "", "vmctl: command failed: only root may reload the configuration\n")


def test_refusal_without_a_sentence(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The errno's text is printed."""
    daemon.answers(Failed(code=errno.EPERM, text=""))

    assert vmctl("log", "brief") == (1, "", "vmctl: command failed: Operation not permitted\n")


def test_too_long_a_path(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """A request that does not fit into a message is reported and not sent."""
    assert vmctl("load", "/" + "x" * 17000) == (1, "", "vmctl: LoadRequest is too long for one message\n")


def test_load_from_a_directory_that_is_gone(daemon: FakeDaemon, tmp_path: Path) -> None:
    """A relative name has no path there."""
    program = (
        "import os, sys, vmctl.commands.load; from vmctl.__main__ import main;"
        "os.mkdir(sys.argv[1]); os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); sys.exit(main(sys.argv[2:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "gone"), "-s", str(daemon.path), "load", "more.conf"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (1, "vmctl: more.conf: No such file or directory\n")


# --- the connection --------------------------------------------------------------------------------------


def test_no_daemon(vmctl: Vmctl, tmp_path: Path) -> None:
    """The message has the path, the reason, and the most likely cause."""
    path = str(tmp_path / "none.sock")

    status = vmctl("status", socket=path)

    assert status == (3, "", f"vmctl: connect: {path}: No such file or directory: is vmd running?\n")


def test_stale_socket(vmctl: Vmctl, tmp_path: Path) -> None:
    """A daemon that was killed leaves its socket."""
    path = str(tmp_path / "stale.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(path)

    assert vmctl("status", socket=path) == (3, "", f"vmctl: connect: {path}: Connection refused: is vmd running?\n")


def test_path_too_long_for_a_socket(vmctl: Vmctl) -> None:
    """The kernel's limit is 107 bytes."""
    path = "/tmp/" + "x" * 200

    sentence = "it has 205 bytes, and at most 107 are possible"
    assert vmctl("status", socket=path) == (1, "", f"vmctl: connect: {path}: {sentence}\n")


@pytest.mark.root
def test_an_option_of_commands_before_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    """The message says that it is in the wrong place."""
    assert main(["--json", "status"]) == 2
    assert capfd.readouterr().err.startswith("vmctl: unknown option -- json: it belongs after the command\n")


def test_socket_of_another_user_is_explained(tmp_path: Path) -> None:
    """The message says who may use it."""
    path = tmp_path / "vmd.sock"
    path.touch()
    os.chown(path, 0, 4242424)

    assert socket_owner(str(path)).startswith(": the socket is for user root and group 4242424; ")
    assert socket_owner(str(tmp_path / "none")) == ""


@pytest.mark.root
def test_permission_denied(open_folder: Path) -> None:
    """Another user gets the owner of the socket in the message."""
    path = open_folder / "vmd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
    os.chmod(path, 0o600)
    program = "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(main(sys.argv[1:]))"

    done = subprocess.run(
        [sys.executable, "-c", f"from vmctl.__main__ import main; import grp, pwd, vmctl.commands.reload; {program}",
         "-s", str(path), "reload"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert done.stderr == (
        f"vmctl: connect: {path}: Permission denied: the socket is for user root and group root; "
        "'socket owner' in vm.conf changes that\n"
    )


def test_lost_connection(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The text is upstream's."""
    daemon.script = lambda _request: None

    assert vmctl("reload") == (3, "", "vmctl: pipe closed\n")


@pytest.mark.parametrize(
    ("packet", "sentence"),
    [
        (b"hello", "vmd: packet of 5 bytes has no header"),
        (HEADER.pack(0x777, 16, 0, 0, 0), "vmd 9.9: unknown message type 0x777"),
    ],
)
def test_daemon_that_sends_invalid_packets(vmctl: Vmctl, daemon: FakeDaemon, packet: bytes, sentence: str) -> None:
    """There is one message and no traceback."""

    def script(_request: Record) -> list[Record]:
        daemon.send_raw(packet)
        return []

    daemon.script = script

    status, output, errors = vmctl("status")

    assert (status, output) == (1, "")
    assert errors.startswith(f"vmctl: {sentence}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (VmStarted(vmid=1, name="a", pid=1, tty=""), "vmd: sent VmStarted instead of Ok"),
        (ListRequest(), "vmd: sent ListRequest, which is not for clients"),
    ],
)
def test_answer_to_another_question(vmctl: Vmctl, daemon: FakeDaemon, answer: Record, sentence: str) -> None:
    """An answer of the wrong type is an error."""
    daemon.answers(answer)

    assert vmctl("reload") == (1, "", f"vmctl: {sentence}\n")


def test_failure_is_a_document_with_json(vmctl: Vmctl, tmp_path: Path) -> None:
    """Programs read standard output, and people read the message."""
    status, output, errors = vmctl("status", "--json", socket=str(tmp_path / "none.sock"))

    assert status == 3
    assert errors != ""
    document = json.loads(output)
    assert document["code"] == errno.ENOENT
    assert f"vmctl: {document['error']}\n" == errors


def test_verbose_shows_the_messages(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The option is -v."""
    daemon.answers(Ok())

    assert vmctl("-v", "reload") == (
        0,
        "",
        f"vmctl: connected to {daemon.path}\nvmctl: sent Hello\nvmctl: received Hello\n"
        "vmctl: sent ReloadRequest\nvmctl: received Ok\n",
    )


def test_interrupt_is_one_sentence(daemon: FakeDaemon) -> None:
    """^C ends the wait for a slow daemon."""
    process = spawn(daemon, "reload")
    daemon.requested()

    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)

    assert (process.returncode, output, errors) == (1, "", "vmctl: reload: interrupted\n")


def test_reader_that_has_gone(daemon: FakeDaemon) -> None:
    """`vmctl status | true` ends with a message and without a traceback."""
    daemon.answers(vm_info(), End())
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "vmctl", "-s", str(daemon.path), "status"],
        cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)

    assert (done.returncode, done.stderr) == (1, "vmctl: standard output: Broken pipe\n")


# --- start-up --------------------------------------------------------------------------------------------

def test_garbage_is_collected_while_a_command_runs(
    vmctl: Vmctl, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A console may be open for months.  Only the modules are left out."""
    calls: list[str] = []
    found = {name: lambda name=name: calls.append(name) for name in ("freeze", "enable")}
    monkeypatch.setattr("vmctl.__main__.gc", SimpleNamespace(**found))
    daemon.answers(Ok())

    assert vmctl("reload")[0] == 0
    assert calls == ["freeze", "enable"]


HEAVY = {
    "argparse", "ast", "contextlib", "dataclasses", "datetime", "getopt", "gettext", "inspect", "json", "logging",
    "math", "pathlib", "pyroute2", "re", "subprocess", "termios", "tempfile", "traceback", "typing",
}  # fmt: skip
PROBE = """
import sys
sys.path += sys.argv[1:3]
from vmctl.__main__ import main
status = main(sys.argv[3:])
print(*sorted(sys.modules))
sys.exit(status)
"""


def test_status_loads_nothing_heavy(daemon: FakeDaemon) -> None:
    """Start-up must take no noticeable time, so modules of other commands are not loaded."""
    daemon.answers(End())
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROBE, str(ROOT), sysconfig.get_path("purelib"),
         "-s", str(daemon.path), "status"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")

    loaded = set(done.stdout.splitlines()[-1].split())

    assert loaded & HEAVY == {"datetime"}  # its C part only: the Python part would import `math`
    assert {name for name in loaded if name.startswith("vmctl.commands.")} == {"vmctl.commands.status"}
    assert {name for name in loaded if name.startswith("vmd.")} == {
        "vmd.client", "vmd.config", "vmd.config.model", "vmd.enums", "vmd.errors", "vmd.ipc", "vmd.ipc.figures",
        "vmd.ipc.first",
        "vmd.ipc.imsg", "vmd.ipc.messages", "vmd.ipc.messages.clients", "vmd.ipc.messages.figures",
        "vmd.ipc.messages.shared", "vmd.ipc.packing", "vmd.ipc.routes", "vmd.record", "vmd.scaled",
        "vmd.stdio", "vmd.units", "vmd.version",
    }  # fmt: skip
