"""Command lines, parsed by the table of commands."""

import pytest

from vmctl.errors import ArgumentError, CommandError, NoSuchVm, UsageError
from vmctl.options import Given, alternatives, find_command, split
from vmctl.table import COMMANDS, COMMON, GLOBAL


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_the_whole_name_of_a_command(name: str) -> None:
    """It may begin that of another one."""
    assert find_command(name).name == name


def test_what_was_given() -> None:
    """Of several values of an option the last one counts, and of operands the first."""
    given = Given([("-m", "1G"), ("-c", ""), ("-m", "2G")])
    assert (given.value("-m"), given.value("-c"), given.value("-x")) == ("2G", "", None)
    assert given.operand == ""
    given.operands = ["a", "b"]
    assert given.operand == "a"


def test_the_end_of_the_options() -> None:
    """The words after `--` are operands, or are passed on."""
    assert split(["-v", "a", "--", "-v", "b"], GLOBAL) == ([("-v", "")], ["a", "-v", "b"])
    behind: list[str] = []
    assert split(["a", "--", "-v", "b"], GLOBAL, behind=behind) == ([], ["a"])
    assert behind == ["-v", "b"]
    assert split(["-v", "a", "-v"], GLOBAL, permute=False) == ([("-v", "")], ["a", "-v"])


@pytest.mark.parametrize("option", [option.name for option in COMMON if option.name.startswith("--")])
def test_an_option_of_commands_before_the_command(option: str) -> None:
    """Such as --json; the message says so.  Those that may be there, too, are accepted."""
    if any(option == each.name for each in GLOBAL):
        assert split([option], GLOBAL, permute=False) == ([(option, "")], [])
    else:
        with pytest.raises(UsageError, match=r": it belongs after the command$"):
            split([option], GLOBAL, permute=False)
    with pytest.raises(UsageError, match=r"^unknown option -- frobnicate$"):
        split(["--frobnicate"], GLOBAL, permute=False)


@pytest.mark.parametrize(
    ("words", "text"), [((), ""), (("a",), "a"), (("a", "b"), "a or b"), (("a", "b", "c"), "a, b or c")]
)
def test_alternatives(words: tuple[str, ...], text: str) -> None:
    """They are a part of a sentence."""
    assert alternatives(words) == text


def test_exit_statuses() -> None:
    """Those of vmctl(8)."""
    kinds = (CommandError, UsageError, ArgumentError, NoSuchVm)

    assert [kind.exit_status for kind in kinds] == [1, 2, 2, 4]
