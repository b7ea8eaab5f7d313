"""Help, version and manual: each has every command and option of the table."""

import errno
import re
from pathlib import Path

import pytest

from tests.support import manual, schema
from tests.support.manual import items
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import ROOT, Answers, FakeDaemon, vm_info
from vmctl.__main__ import main
from vmctl.table import COMMANDS, COMMON, GLOBAL, Command, Option
from vmctl.usage import synopsis
from vmd.errors import VMD_PARENT_INVALID
from vmd.ipc.messages.clients import End, Failed, GenerationInfo, ListRequest, StartRequest
from vmd.record import Record
from vmd.version import VERSION

every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


@pytest.mark.parametrize("arguments", [["help"], ["--help"], ["-h"], ["-v", "-h"], ["help", "--help"]])
def test_help(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """It goes to standard output without an error, and its lines fit a terminal."""
    assert main(arguments) == 0

    output, errors = capfd.readouterr()
    assert errors == ""
    if arguments != ["help", "--help"]:
        for command in COMMANDS:
            assert f"\n  {command.name} " in output
    assert max(map(len, output.splitlines())) < 80


@every_command
def test_help_of_a_command(vmctl: Vmctl, daemon: FakeDaemon, command: Command) -> None:
    """Every form prints the same help, also at the end of a complete command line.  Nothing is done."""
    status, output, errors = vmctl("help", command.name)

    assert (status, errors) == (0, "")
    assert " ".join(output.split("\n\n")[0].split()) == f"usage: vmctl {synopsis(command)}"
    for option in (*command.options, *COMMON):
        assert option.name in output.split("\n\n", 1)[1]
    for line in output.splitlines():
        assert len(line) < 80
    for words in (["--help"], ["-h"], ["web", "--help"], ["a", "b", "-h"]):
        assert vmctl(command.name, *words) == (0, output, "")
    assert vmctl("--help", command.name) == (0, output, "")
    assert daemon.requests == []


def test_help_of_an_unknown_command(vmctl: Vmctl) -> None:
    """It is an ordinary usage error."""
    assert vmctl("help", "stat")[0] == 0
    assert vmctl("help", "st") == (
        2, "", "vmctl: ambiguous argument: st: start, status or stop\nusage:\tvmctl [-v] help [command]\n"
    )  # fmt: skip


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version_of_vmctl(capfd: pytest.CaptureFixture[str], option: str) -> None:
    """It needs no daemon, and later arguments are ignored."""
    assert main([option]) == main([option, "status"]) == 0

    assert capfd.readouterr() == (f"vmctl {VERSION}\n" * 2, "")


def test_version(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It prints the daemon's version, too: a running daemon keeps its code when the programs are replaced."""
    daemon.answers(GenerationInfo(number=1, version="9.9", vms=3), End())

    assert vmctl("version") == (0, f"vmctl {VERSION}\nvmd 9.9\n", "")


def test_versions_that_still_serve_vms(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """They are the versions of earlier daemons."""
    rows = [GenerationInfo(number=number, version=f"9.{number}", vms=number) for number in (1, 2)]
    daemon.answers(*rows, End())

    lines = (f"vmctl {VERSION}", "vmd 9.9", "generation 1: vmd 9.1, 1 VM", "generation 2: vmd 9.2, 2 VMs", "")
    assert vmctl("version") == (0, "\n".join(lines), "")
    assert schema.document(vmctl("version", "--json"), "version")["generations"] == [
        {"number": 1, "version": "9.1", "vms": 1}, {"number": 2, "version": "9.2", "vms": 2}
    ]  # fmt: skip


def test_version_of_a_daemon_without_generations(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Such a daemon does not know the request."""
    daemon.answers(Failed(code=errno.ENOSYS, text="vmd 9.9 knows no request 0x2f; a later one may"))

    assert vmctl("version") == (0, f"vmctl {VERSION}\nvmd 9.9\n", "")


def test_version_of_a_daemon_without_hello(vmctl: Vmctl, tmp_path: Path) -> None:
    """It is older than the release that introduced Hello."""
    older = FakeDaemon(tmp_path / "older.sock", older=True)

    assert vmctl("version", socket=str(older.path)) == (0, f"vmctl {VERSION}\nvmd older than 0.2.0\n", "")
    older.close()


def test_version_without_a_daemon(vmctl: Vmctl, tmp_path: Path) -> None:
    """vmctl's own version comes first."""
    status, output, errors = vmctl("version", socket=str(tmp_path / "none"))

    assert (status, output) == (3, f"vmctl {VERSION}\n")
    assert "is vmd running?" in errors


def test_version_is_that_of_the_packages() -> None:
    """The version number is in the change log, unless it is one of development."""
    released = re.findall(r"^## (\S+), \d{4}-\d\d-\d\d$", Path(ROOT, "CHANGELOG.md").read_text(), re.M)

    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", VERSION)
    assert VERSION in released or ".dev" in VERSION


def test_every_command_is_in_the_table() -> None:
    """A module that is not in the table could not be run."""
    modules = {path.stem for path in Path(ROOT, "vmctl/commands").glob("*.py")} - {"__init__"}

    assert {command.module for command in COMMANDS} == modules


# --- the manual ------------------------------------------------------------------------------------------


def heads() -> dict[str, list[str]]:
    """Return, for each command of vmctl(8), its synopsis and the items of its options."""
    found: dict[str, list[str]] = {}
    name = ""
    for item in items(Path(ROOT, "man/vmctl.8").read_text()):
        if item.split(" ")[0] in {command.name for command in COMMANDS}:
            name = item.split(" ")[0]
            found[name] = [item]
        elif name and item.startswith("-"):
            found[name].append(item)
    return found


@pytest.mark.parametrize("option", GLOBAL, ids=lambda option: option.name)
def test_manual_has_every_option_before_the_command(option: Option) -> None:
    """Each is an item, and in the synopsis unless it is a long name."""
    page = Path(ROOT, "man/vmctl.8").read_text()
    item = f"{option.name} {option.value}".rstrip()

    assert item in [name for each in items(page) for name in each.split(" , ")], f"vmctl(8) does not explain {item}"
    assert option.name.startswith("--") or item in re.split(r"[][|]| (?=-)", manual.synopsis(page).replace(" | ", "|"))


@every_command
def test_manual_has_the_synopsis(command: Command) -> None:
    """The synopsis in vmctl(8) is that of the table."""
    assert command.name in heads(), f"vmctl(8) has no item for {command.name}"
    assert heads()[command.name][0] == synopsis(command)


@every_command
def test_manual_explains_every_option(command: Command) -> None:
    """Excluded are options of all commands, and a second name of a command."""
    described = {word.split()[0] for word in heads().get(command.name, [])[1:]}

    if command.name != "show":
        missing = {option.name for option in command.options} - {"--json"} - described
        assert missing == set(), f"vmctl(8) does not explain these options of {command.name}"


@pytest.mark.parametrize(
    ("arguments", "errors"),
    [
        (["status", "wbe"], "vmctl: vm wbe not found: did you mean web?\n"),
        (["pause", "wbe"], "vmctl: pause vm command failed: vm wbe not found: did you mean web?\n"),
        (["start", "WEB"], "vmctl: start vm command failed: vm WEB not found: did you mean web?\n"),
        (["stop", "wbe"], "stopping vm wbe: vm not found: did you mean web?\n"),
        (["wait", "we"], "waiting for vm we: vm not found: did you mean web?\n"),
        (["start", "-t", "wbe", "new"], "vmctl: invalid template: template wbe not found: did you mean web?\n"),
        (["start", "-t", "web", "new"], "vmctl: invalid template: it may not be\n"),
        (["status", "mail"], "vmctl: vm mail not found\n"),
        (["status", "17"], "vmctl: vm 17 not found\n"),
    ],
)
def test_mistyped_vm(vmctl: Vmctl, daemon: FakeDaemon, arguments: list[str], errors: str) -> None:
    """The message names the most similar VM, and nothing is done to that one."""

    def answer(request: Record) -> Answers:
        if isinstance(request, ListRequest):
            return (vm_info("web"), End())
        if isinstance(request, StartRequest) and request.template:
            what = "it may not be" if request.template == "web" else f"template {request.template} not found"
            return (Failed(code=VMD_PARENT_INVALID, text=what),)
        return (Failed(code=errno.ENOENT, text=f"vm {arguments[-1]} not found"),)

    daemon.script = answer

    status, _, said = vmctl(*arguments)

    assert (status, said) == (1 if "-t" in arguments else 4, errors)


def test_manual_explains_every_option_before_the_command() -> None:
    """It has all of their names."""
    page = Path(ROOT, "man/vmctl.8").read_text()
    heads = items(page[: page.index("The commands are")])
    described = {word for head in heads for word in head.replace(",", "").split() if word.startswith("-")}

    assert described == {option.name for option in GLOBAL}
