"""--json of commands that fail: there is one document for any mistake, and every command takes the option."""

import errno
from pathlib import Path

import pytest

from tests.support import schema
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import FakeDaemon, vm_info
from vmctl.options import parse
from vmctl.output import SCHEMA_VERSION
from vmctl.table import COMMANDS, Command
from vmd.ipc.messages.clients import End, Failed, ListRequest

every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


def test_the_version_is_that_of_the_schema() -> None:
    """A program compares this key with the version that it was written for."""
    assert schema.definition("schema")["const"] == SCHEMA_VERSION


@every_command
def test_every_command_is_described(command: Command) -> None:
    """A new command needs a definition of its own name in docs/vmctl.schema.json."""
    assert command.name in schema.SCHEMA["$defs"], f"docs/vmctl.schema.json has no definition of {command.name}"
    assert schema.definition(command.name)
    assert parse(command, ["--json", "--help"]).has("--json")


@every_command
def test_a_wrong_command_line(vmctl: Vmctl, daemon: FakeDaemon, command: Command) -> None:
    """The document has the message.  That of `send` goes to standard error, without other text."""
    status, output, errors = vmctl(command.name, "--json", *["a"] * max(2, len(command.operands) + 1))

    assert status == 2
    assert schema.check(errors if command.writes_data else output, "error")["error"].startswith("un")
    assert daemon.requests == []


@pytest.mark.parametrize("words", [["nonsense", "--json"], ["s", "--json"], ["-x", "status", "--json"]])
def test_no_command_at_all(vmctl: Vmctl, words: list[str]) -> None:
    """Without a command, its options are unknown, too."""
    status, output, _ = vmctl(*words)

    assert status == 2
    assert schema.check(output, "error")["code"] is None


@pytest.mark.parametrize("command", ["status", "start", "pause", "unpause", "console"])
def test_no_such_vm(vmctl: Vmctl, daemon: FakeDaemon, command: str) -> None:
    """The code is an errno."""
    missing = Failed(code=errno.ENOENT, text="vm nobody not found")
    daemon.script = lambda request: (vm_info(), End()) if isinstance(request, ListRequest) else (missing,)

    status, output, _ = vmctl(command, "nobody", "--json")

    assert status == 4
    assert schema.check(output, "error")["code"] == errno.ENOENT


def test_the_console_of_a_vm_that_does_not_run(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """A stopped VM has none.  That of a running VM is printed, and vmctl does not attach to it."""
    daemon.answers(vm_info("web", running=False), vm_info("db", vmid=2), End())

    status, output, _ = vmctl("console", "web", "--json")
    assert (status, schema.check(output, "error")["error"]) == (1, "console not found: vm web is not running")
    status, output, _ = vmctl("console", "2", "--json")
    assert (status, schema.check(output, "console")["tty"]) == (0, "/dev/pts/3")
    assert daemon.requests == [ListRequest(), ListRequest()]


@pytest.mark.parametrize("option", ["-f", "-r"])
def test_a_console_is_not_attached_to(vmctl: Vmctl, daemon: FakeDaemon, option: str) -> None:
    """Options that would attach are refused before any request."""
    status, output, _ = vmctl("console", option, "web", "--json")

    assert status == 2
    assert option in schema.check(output, "error")["error"]
    assert daemon.requests == []


def test_versions(vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path) -> None:
    """The document has both versions, or why the daemon's is unknown."""
    daemon.answers(End())

    assert schema.document(vmctl("version", "--json"), "version")["vmd"] == "9.9"
    status, output, _ = vmctl("version", "--json", socket=str(tmp_path / "none.sock"))
    assert (status, schema.check(output, "error")["code"]) == (3, errno.ENOENT)


def test_an_image_that_cannot_be_made(vmctl: Vmctl) -> None:
    """A command without a daemon has the same document."""
    status, output, _ = vmctl("create", "-s", "1M", "/nonexistent/x.raw", "--json")

    assert status == 1
    assert schema.check(output, "error")["error"] != ""
