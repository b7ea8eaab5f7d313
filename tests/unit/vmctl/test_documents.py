"""Command lines of vmctl in documents: the commands and options are there."""

import re
import shlex
from pathlib import Path

import pytest

from vmctl.errors import UsageError
from vmctl.options import find_command, split
from vmctl.table import COMMANDS, COMMON, GLOBAL

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = ("README.md", "HACKING.md", "vm.conf.example", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")
))  # fmt: skip
QUOTED = re.compile(r"`(vmctl [^`\n]*)`")
SHOWN = re.compile(r"^(?: {4,}|\t)(?:[#$] )?(vmctl .*)$", re.MULTILINE)


def lines(text: str) -> list[str]:
    """Return the command lines of a document: those in quotes, and those that stand by themselves."""
    shown = [re.split(r"\s#|[|<>;]|&&", line)[0] for line in SHOWN.findall(text)]
    return [*QUOTED.findall(text), *shown]


def wrong(line: str) -> str:
    """Return what vmctl has to say of a command line that need not be complete; "" for nothing."""
    try:
        if line.split()[1] in {option.name for option in COMMON}:  # an option of every command
            return ""
        _, words = split(shlex.split(line)[1:], GLOBAL, permute=False)
        if not words or words[0].startswith("<"):
            return ""
        command = find_command(words[0])
        if command.name != words[0]:
            return f"{words[0]} is no command"
        split(words[1:], (*command.options, *COMMON), behind=[])
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_options_are_there(document: str) -> None:
    """What has gone, or has another name now, is not recommended."""
    found = lines((ROOT / document).read_text())

    assert [f"{document}: {line}: {what}" for line in found if (what := wrong(line))] == []


def test_the_readme_shows_what_is_done_every_day() -> None:
    """Its list of daily commands says what each is for; others are in the manual."""
    shown = {words[1] for line in lines((ROOT / "README.md").read_text()) if len(words := line.split()) > 1}
    rare = {"load", "log", "reset", "show", "unpause", "version", "wait"}
    missing = {command.name for command in COMMANDS} - shown - rare

    assert missing == set(), "README.md shows none of these commands; or they are rare, and the test says so"
