"""The command line of vmd: usage, help, getopt and manual have what the table has."""

import re
from pathlib import Path

import pytest

from tests.support.manual import items, synopsis
from vmd.parent.options import HELP, OPTIONS, USAGE, Option, Options, Shown, UsageError, parse

MANUAL = (Path(__file__).resolve().parents[3] / "man/vmd.8").read_text()
every_option = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.names[0])


@every_option
def test_help_and_usage_have_every_option(option: Option) -> None:
    """Usage leaves out those that are words: they are for vmd itself."""
    assert f"\n  {', '.join(option.names)}" in HELP
    assert option.names[0].startswith("--") or re.search(rf"\[-\w*{option.names[0][1]}", USAGE)


@every_option
def test_manual_has_every_option(option: Option) -> None:
    """In the synopsis, and as an item, with its value."""
    value = f" {option.value}" if option.value else ""
    flags = re.findall(r"-[\w-]+", synopsis(MANUAL))
    letters = {f"-{letter}" for flag in flags if not flag.startswith("--") for letter in flag[1:]}

    assert option.names[0] in letters | set(flags), f"the synopsis of vmd(8) does not have {option.names[0]}"
    item = ", ".join(option.names) + value
    found = [each.replace(" , ", ", ").replace(" = ", "=") for each in items(MANUAL)]
    assert item in found, f"vmd(8) does not explain {item}"


def test_manual_has_no_other_option() -> None:
    """One that has gone is gone from there, too."""
    described = {word for item in items(MANUAL) for word in re.findall(r"(?:^|, )(-[\w-]+)", item.replace(" , ", ", "))}

    assert described == {name for option in OPTIONS for name in option.names}


@every_option
def test_every_option_is_read(option: Option) -> None:
    """It changes something, or shows something."""
    for name in option.names:
        words = [name, "a=b"] if option.value else [name]
        try:
            changed = parse(words) != Options()
        except Shown:
            changed = True
        assert changed, f"vmd {name} does nothing"


@pytest.mark.parametrize("words", [["-x"], ["--debug"], ["-f"], ["now"], ["-D", "a b=2"]])
def test_a_wrong_command_line(words: list[str]) -> None:
    """It says what is wrong, and, where the table can help, the usage."""
    with pytest.raises(UsageError, match=r"^vmd: ") as wrong:
        parse(words)
    assert words[0] == "-D" or str(wrong.value).endswith(f"\n{USAGE}")
