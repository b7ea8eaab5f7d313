"""The command line of vmd(8)."""

import getopt
import os
from collections.abc import Sequence

from vmd.config.check import parse_macro_definition
from vmd.config.model import DEFAULT_SOCKET
from vmd.errors import VmdError
from vmd.record import Record
from vmd.version import VERSION

DEFAULT_CONF = "/etc/vm.conf"


class Option(Record):
    """One option: its names, the shortest first, the name of its value, if it has one, and what it does."""

    names: tuple[str, ...]
    help: str
    value: str = ""


OPTIONS = (
    Option(names=("-D",), value="macro=value", help="define a macro for the configuration file"),
    Option(
        names=("--check-adopt",),
        help="check whether this version could replace the running daemon (vmctl upgrade -n)",
    ),
    Option(names=("-d",), help="do not go to the background, and log to standard error"),
    Option(names=("-f",), value="file", help=f"read this file instead of {DEFAULT_CONF}"),
    Option(names=("-h", "--help"), help="show this help"),
    Option(names=("-n",), help="check the configuration file and exit"),
    Option(names=("-s",), value="socket", help=f"serve this socket instead of {DEFAULT_SOCKET}"),
    Option(names=("-V", "--version"), help="show the version"),
    Option(names=("-v",), help="log more; twice, log every detail"),
)
NAMES = [name for option in OPTIONS for name in option.names]
FLAGS = "".join(option.names[0][1:] for option in OPTIONS if not option.value and not option.names[0].startswith("--"))
VALUES = " ".join(f"[{option.names[0]} {option.value}]" for option in OPTIONS if option.value)
USAGE = f"usage: vmd [-{FLAGS}] {VALUES}"
ROWS = "".join(f"  {', '.join(option.names)} {option.value}".ljust(20) + f"{option.help}\n" for option in OPTIONS)
HELP = f"""{USAGE}

Runs the virtual machines that vm.conf describes.

{ROWS}
See vmd(8) and vm.conf(5) for details.  vmctl(8) controls a running vmd.
"""
# As getopt has them.
SHORT = "".join(
    option.names[0][1:] + ":" * bool(option.value) for option in OPTIONS if not option.names[0].startswith("--")
)
LONG = [name.removeprefix("--") for name in NAMES if name.startswith("--")]


class UsageError(VmdError):
    """The command line is wrong; `str` is what to print."""


class Shown(VmdError):
    """The user asked for a text, such as the help.  `str` is that text; nothing is started."""


class Options(Record):
    """The options of the command line."""

    debug: bool = False  # -d: stay in the foreground, log to stderr
    check_only: bool = False  # -n
    check_adopt: bool = False  # --check-adopt
    verbosity: int = 0
    macros: tuple[tuple[str, str], ...] = ()  # -D: name and value
    conf_path: str = DEFAULT_CONF
    conf_given: bool = False
    socket_path: str = DEFAULT_SOCKET


def parse(arguments: Sequence[str]) -> Options:
    """Return the options.  Raises UsageError, Shown."""
    options = Options()
    try:
        given, rest = getopt.getopt(list(arguments), SHORT, LONG)
    except getopt.GetoptError as error:
        raise UsageError(f"vmd: {error.msg}\n{USAGE}") from None
    if rest:
        raise UsageError(f"vmd: unexpected argument: {rest[0]}\n{USAGE}")
    for option, value in given:
        match option:
            case "--check-adopt":
                options = options.replace(check_adopt=True)
            case "-d":
                options = options.replace(debug=True)
            case "-D":
                options = options.replace(macros=(*options.macros, _macro(value)))
            case "-f":
                # Absolute: a daemon changes its directory, and reload reads the file again.
                options = options.replace(conf_path=os.path.abspath(value), conf_given=True)
            case "-h" | "--help":
                raise Shown(HELP)
            case "-n":
                options = options.replace(check_only=True)
            case "-s":
                options = options.replace(socket_path=os.path.abspath(value))
            case "-V" | "--version":
                raise Shown(f"vmd {VERSION}\n")
            case "-v":
                options = options.replace(verbosity=min(2, options.verbosity + 1))
    return options


def _macro(text: str) -> tuple[str, str]:
    """Return name and value of a macro definition.  Raises UsageError."""
    try:
        return parse_macro_definition(text)
    except VmdError as error:
        raise UsageError(f"vmd: {error}") from None
