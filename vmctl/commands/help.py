"""vmctl help: all commands, or one command with its options, from the table."""

import textwrap

from vmctl.options import Given, find_command
from vmctl.output import put, put_json
from vmctl.session import Session
from vmctl.table import COMMANDS, COMMON, GLOBAL, Command, Option
from vmctl.usage import synopsis

WIDTH = 79
INDENT = 20
TOGETHER = "\N{NO-BREAK SPACE}"  # keeps an option and its value on one line


def run(session: Session, given: Given) -> int:
    """Show the help; the daemon is not asked."""
    if session.json:
        put_json({"commands": [described(each) for each in commands(given.operand)]})
    else:
        show(given.operand)
    return 0


def commands(word: str) -> tuple[Command, ...]:
    """Return the command that `word` is or abbreviates, or all commands without a word.  Raises UsageError."""
    return (find_command(word),) if word else COMMANDS


def described(command: Command) -> dict[str, object]:
    """Return a command for --json."""
    return {
        "name": command.name,
        "help": command.help,
        "usage": synopsis(command),
        "options": [
            {"name": option.name, "value": option.value or None, "help": option.help} for option in command.options
        ],
    }


def show(word: str = "") -> None:
    """Show the help for the command that `word` is or abbreviates, or for vmctl.  Raises UsageError, CommandError."""
    text = explain(find_command(word)) if word else overview()
    put(text.encode())


def overview() -> str:
    """Return the help for vmctl as a whole."""
    commands = [row(command.name, command.help) for command in COMMANDS]
    return (
        "usage: vmctl [-v] [-s socket] command [arg ...]\n\nCommands:\n"
        + "".join(commands)
        + "\nOptions before the command:\n"
        + "".join(rows(GLOBAL))
        + "\nA command may be shortened to any beginning that no other command shares.\n"
        "'vmctl help command' shows its options; vmctl(8) explains everything.\n"
    )


def explain(command: Command) -> str:
    """Return the help for one command."""
    usage = f"usage: vmctl {synopsis(command, TOGETHER)}"
    usage = textwrap.fill(usage, WIDTH, subsequent_indent=" " * 8, break_on_hyphens=False)
    sentence = f"{command.help[0].upper()}{command.help[1:]}."
    parts = [usage.replace(TOGETHER, " "), textwrap.fill(sentence, WIDTH), "".join(rows((*command.options, *COMMON)))]
    return "\n\n".join(parts)


def rows(options: tuple[Option, ...]) -> list[str]:
    """Return a row for each option.  Two names of the same option share a row if they are neighbours."""
    found: list[tuple[str, str]] = []
    for option in options:
        name = f"{option.name} {option.value}".rstrip()
        if found and found[-1][1] == option.help:
            found[-1] = f"{found[-1][0]}, {name}", option.help
        else:
            found.append((name, option.help))
    return [row(name, text) for name, text in found]


def row(name: str, text: str) -> str:
    """Return a name and its explanation, in two columns."""
    filled = textwrap.fill(text, WIDTH, initial_indent=f"  {name:<{INDENT - 2}}", subsequent_indent=" " * INDENT)
    return f"{filled}\n"
