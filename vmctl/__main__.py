"""vmctl(8): asks a running vmd to do things, and shows what it answers."""

import importlib
import sys

from vmctl.errors import CommandError, Refused, UsageError
from vmctl.options import parse_options
from vmctl.output import clean, notice, put_json, warn
from vmctl.session import DEFAULT_SOCKET, Session
from vmd.errors import VmdError
from vmd.record import Record

USAGE = "usage:\tvmctl [-v] command [arg ...]\n"
START_USAGE = (
    "[-cL] [-B device] [-b path] [-d disk] [-I initrd] [-i count] [-k cmdline] [-m size] [-n switch]"
    " [-p vcpus] [-r path] [-t name] [--json] id | name"
)


class Command(Record):
    """One command: `module` of vmctl.commands has `run(session, arguments) -> exit status`."""

    name: str
    module: str
    usage: str


COMMANDS = (
    Command(name="console", module="console", usage="id"),
    Command(name="create", module="create", usage="[-b base | -i disk] [-s size] disk"),
    Command(name="load", module="load", usage="filename"),
    Command(name="log", module="log", usage="brief | verbose"),
    Command(name="pause", module="pause", usage="[--json] id"),
    Command(name="receive", module="receive", usage="[-p] name"),
    Command(name="reload", module="reload", usage=""),
    Command(name="reset", module="reset", usage="[all | switches | vms]"),
    Command(name="send", module="send", usage="[-k] id"),
    Command(name="show", module="status", usage="[-rv] [--json] [id]"),
    Command(name="start", module="start", usage=START_USAGE),
    Command(name="status", module="status", usage="[-rv] [--json] [id]"),
    Command(name="stop", module="stop", usage="[-fw] [--json] [id | -a]"),
    Command(name="unpause", module="unpause", usage="[--json] id"),
    Command(name="wait", module="wait", usage="[--json] id"),
)


def find_command(word: str) -> Command:
    """Return the command that `word` is, or the only one that it abbreviates.  Raises UsageError."""
    found = [command for command in COMMANDS if command.name.startswith(word)]
    exact = [command for command in found if command.name == word]
    if len(found) > 1 and not exact:
        raise UsageError(f"ambiguous argument: {word}")
    if not found:
        raise UsageError(f"unknown argument: {word}")
    return (exact or found)[0]


def usage() -> str:
    """Return what vmctl takes, command by command."""
    lines = [f"\tvmctl {command.name} {command.usage}".rstrip() + "\n" for command in COMMANDS]
    return USAGE + "".join(lines) + f"\tvmctl -s socket command: use another socket than {DEFAULT_SOCKET}\n"


def fail(session: Session, error: VmdError) -> int:
    """Say what went wrong; return the exit status."""
    if str(error):
        warn(str(error))
    if session.json:
        code = error.code if isinstance(error, (CommandError, Refused)) else None
        put_json({"error": clean(str(error)), "code": code})
    return 1


def run_command(session: Session, command: Command, arguments: list[str]) -> int:
    """Run one command; return the exit status."""
    try:
        status: int = importlib.import_module(f"vmctl.commands.{command.module}").run(session, arguments)
    except UsageError as error:
        if error.what:
            warn(error.what)
        notice(f"usage:\tvmctl [-v] {command.name} {command.usage}".rstrip() + "\n")
        return 1
    except VmdError as error:
        try:
            return fail(session, error)
        except CommandError:
            return 1  # standard output is gone, which may be the very failure
    except KeyboardInterrupt:
        warn(f"{command.name}: interrupted")
        return 1
    finally:
        session.close()
    return status


def main(arguments: list[str] | None = None) -> int:
    """Run vmctl; return the exit status."""
    socket_path, verbose = DEFAULT_SOCKET, False
    try:
        given, rest = parse_options(sys.argv[1:] if arguments is None else arguments, "s:v", permute=False)
        for option, value in given:
            if option == "-s":
                socket_path = value
            else:
                verbose = True
    except UsageError as error:
        warn(error.what)
        notice(usage())
        return 1
    if not rest:
        notice(usage())
        return 1
    try:
        command = find_command(rest[0])
    except UsageError as error:
        notice(f"{clean(error.what)}\n{usage()}")
        return 1
    return run_command(Session(socket_path, verbose=verbose), command, rest[1:])


if __name__ == "__main__":
    sys.exit(main())
