"""The command line of vmd: usage, help, getopt and manual agree with the table."""

import re
from pathlib import Path

import pytest

from tests.support.manual import items, synopsis
from vmd.config.model import DEFAULT_SOCKET
from vmd.parent.options import HELP, OPTIONS, USAGE, Option, Options, Shown, UsageError, parse

MANUAL = (Path(__file__).resolve().parents[3] / "man/vmd.8").read_text()
every_option = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.names[0])


@every_option
def test_help_and_usage_have_every_option(option: Option) -> None:
    """The usage leaves out long options, which are only for vmd itself."""
    assert f"\n  {', '.join(option.names)}" in HELP
    assert option.names[0].startswith("--") or re.search(rf"\[-\w*{option.names[0][1]}", USAGE)


@every_option
def test_manual_has_every_option(option: Option) -> None:
    """It is in the synopsis, and has an item with its value."""
    value = f" {option.value}" if option.value else ""
    flags = re.findall(r"-[\w-]+", synopsis(MANUAL))
    letters = {f"-{letter}" for flag in flags if not flag.startswith("--") for letter in flag[1:]}

    assert option.names[0] in letters | set(flags), f"the synopsis of vmd(8) does not have {option.names[0]}"
    item = ", ".join(option.names) + value
    found = [each.replace(" , ", ", ").replace(" = ", "=") for each in items(MANUAL)]
    assert item in found, f"vmd(8) does not explain {item}"


def test_manual_has_no_other_option() -> None:
    """An option that was removed is removed from the manual, too."""
    described = {word for item in items(MANUAL) for word in re.findall(r"(?:^|, )(-[\w-]+)", item.replace(" , ", ", "))}

    assert described == {name for option in OPTIONS for name in option.names}


@every_option
def test_every_option_is_read(option: Option) -> None:
    """It changes a setting, or prints something."""
    for name in option.names:
        words = [name, "a=b"] if option.value else [name]
        try:
            changed = parse(words) != Options()
        except Shown:
            changed = True
        assert changed, f"vmd {name} does nothing"


@pytest.mark.parametrize("words", [["-x"], ["--debug"], ["-f"], ["now"], ["-D", "a b=2"]])
def test_a_wrong_command_line(words: list[str]) -> None:
    """The message names the error, and shows the usage where that helps."""
    with pytest.raises(UsageError, match=r"^vmd: ") as wrong:
        parse(words)
    assert words[0] == "-D" or str(wrong.value).endswith(f"\n{USAGE}")


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ([], {}),
        (["-d"], {"debug": True}),
        (["-n"], {"check_only": True}),
        (["--check-adopt"], {"check_adopt": True}),
        (["-v"], {"verbosity": 1}),
        (["-vv"], {"verbosity": 2}),
        (["-v", "-vv"], {"verbosity": 2}),
        (["-D", "a=b", "-Dc=d"], {"macros": (("a", "b"), ("c", "d"))}),
        (["-f", "/x/../y"], {"conf_path": "/y", "conf_given": True}),
        (["-s", "z"], {"socket_path": f"{Path.cwd()}/z"}),
    ],
)
def test_what_an_option_sets(words: list[str], fields: dict[str, object]) -> None:
    """Nothing else.  Paths become absolute, because a daemon changes its directory."""
    usual = {
        "debug": False, "check_only": False, "check_adopt": False, "verbosity": 0, "macros": (),
        "conf_path": "/etc/vm.conf", "conf_given": False, "socket_path": DEFAULT_SOCKET,
    }  # fmt: skip
    assert parse(words).as_dict() == usual | fields


def test_the_help_has_columns() -> None:
    """Each option is explained at the same place."""
    rows = [line for line in HELP.splitlines() if line.startswith("  -")]
    assert len(rows) == len(OPTIONS)
    assert {line.index(option.help) for line, option in zip(rows, OPTIONS, strict=True)} == {20}
    assert all(line[19] == " " for line in rows)
