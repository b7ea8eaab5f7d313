"""The command line of vmd(8)."""

import getopt
import os
from collections.abc import Sequence

from vmd.errors import VmdError
from vmd.record import Record

USAGE = "usage: vmd [-dnv] [-D macro=value] [-f file] [-s socket]"
DEFAULT_CONF = "/etc/vm.conf"
DEFAULT_SOCKET = "/run/vmd.sock"


class UsageError(VmdError):
    """The command line is wrong; `str` is what to print."""


class Options(Record):
    """What was asked for on the command line."""

    debug: bool = False  # -d: stay in the foreground, log to stderr
    check_only: bool = False  # -n
    verbosity: int = 0
    macros: tuple[str, ...] = ()
    conf_path: str = DEFAULT_CONF
    conf_given: bool = False
    socket_path: str = DEFAULT_SOCKET


def parse(arguments: Sequence[str]) -> Options:
    """Return the options; raises UsageError."""
    options = Options()
    try:
        given, rest = getopt.getopt(list(arguments), "dD:f:ns:v")
    except getopt.GetoptError as error:
        raise UsageError(f"vmd: {error.msg}\n{USAGE}") from None
    if rest:
        raise UsageError(f"vmd: unexpected argument: {rest[0]}\n{USAGE}")
    for option, value in given:
        match option:
            case "-d":
                options = options.replace(debug=True)
            case "-D":
                options = options.replace(macros=(*options.macros, value))
            case "-f":
                # Absolute: a daemon changes its directory, and reload reads the file again.
                options = options.replace(conf_path=os.path.abspath(value), conf_given=True)
            case "-n":
                options = options.replace(check_only=True)
            case "-s":
                options = options.replace(socket_path=os.path.abspath(value))
            case "-v":
                options = options.replace(verbosity=min(2, options.verbosity + 1))
    return options
