"""Command lines of vmctl in documents: their commands and options exist."""

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
    """Return the command lines of a document: those in quotes, and those in indented blocks."""
    shown = [re.split(r"\s#|[|<>;]|&&", line)[0] for line in SHOWN.findall(text)]
    return [*QUOTED.findall(text), *shown]


def wrong(line: str) -> str:
    """Return vmctl's complaint about a possibly incomplete command line, or ""."""
    try:
        if line.split()[1] in {option.name for option in COMMON}:  # an option that every command has
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
def test_commands_and_options_exist(document: str) -> None:
    """Documents do not name removed or renamed ones."""
    found = lines((ROOT / document).read_text())

    assert [f"{document}: {line}: {what}" for line in found if (what := wrong(line))] == []


def test_the_readme_shows_the_daily_commands() -> None:
    """Its list explains the daily commands.  Others are in the manual only."""
    shown = {words[1] for line in lines((ROOT / "README.md").read_text()) if len(words := line.split()) > 1}
    rare = {"load", "log", "reset", "show", "unpause", "version", "wait"}
    missing = {command.name for command in COMMANDS} - shown - rare

    assert missing == set(), "README.md does not show these commands, and `rare` does not have them"
