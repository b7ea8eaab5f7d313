"""vmctl(8): sends requests to a running vmd, and shows its answers."""

import errno
import gc
import sys

from vmctl.errors import CommandError, NoSuchVm, UsageError, exit_status, sentence_of
from vmctl.options import Given, find_command, parse, split
from vmctl.output import clean, notice, put_json, warn
from vmctl.session import Session
from vmctl.table import GLOBAL, Command
from vmctl.usage import HINT, usage, usage_of
from vmd import stdio
from vmd.client import DEFAULT_SOCKET, ClientError
from vmd.errors import VmdError
from vmd.stdio import STDERR, STDOUT

COMPLETE = "--complete"  # first argument of the completions of shells


def fail(session: Session, error: VmdError) -> int:
    """Show the error; return the exit status."""
    text = sentence_of(error)
    if text and not session.quiet:
        for line in text.split("\n"):  # a configuration has a line for each mistake
            warn(line)
    if session.json:
        put_error(text, (error.number or None) if isinstance(error, ClientError) else None, session.json_fd)
    return exit_status(error)


def put_error(text: str, code: int | None, fd: int = STDOUT) -> None:
    """Write the document of a failure.  Raises CommandError."""
    put_json({"error": "\n".join(map(clean, text.split("\n"))), "code": code}, fd)


def run_command(session: Session, command: Command, words: list[str]) -> int:
    """Run one command, or explain it; return the exit status."""
    given = Given([])
    try:
        try:
            session.json = "--json" in words  # also for a command line that cannot be parsed
            session.json_fd = STDERR if command.writes_data else STDOUT
            given = parse(command, words)
            session.json = given.has("--json")
            if given.wants_help:
                return explain(command.name)
            name = f"vmctl.commands.{command.module}"
            __import__(name)  # saves loading `importlib`
            module = sys.modules[name]
            gc.freeze()  # so that no collection examines the imported modules, at exit either
            gc.enable()
            status: int = module.run(session, given)
            return status
        except UsageError as error:
            status = fail(session, error)
            if not session.quiet:
                notice(usage_of(command))
            return status
        except NoSuchVm as error:
            return fail(session, NoSuchVm(f"{error}{session.meant(given.operand)}"))
        except VmdError as error:
            return fail(session, error)
    except CommandError as error:
        return error.exit_status  # standard output fails; this may also be the error itself
    except KeyboardInterrupt:
        return interrupted(session, command)
    finally:
        session.close()


def interrupted(session: Session, command: Command) -> int:
    """Show that ^C has ended a command; return the exit status."""
    try:
        return fail(session, CommandError(f"{command.name}: interrupted", errno.EINTR))
    except CommandError as error:
        return error.exit_status


def explain(word: str = "") -> int:
    """Show the help for a command, or for all of vmctl; return the exit status."""
    from vmctl.commands import help as help_

    help_.show(word)
    return 0


def show_version() -> int:
    """Show the version of vmctl; return the exit status."""
    from vmctl.commands import version

    try:
        return version.show()
    except CommandError as error:
        warn(str(error))
        return error.exit_status


def no_command(words: list[str], error: UsageError) -> int:
    """Return the exit status for a command line without a valid command.  With --json, print a document, too."""
    if "--json" in words:
        try:
            put_error(str(error), None)
        except CommandError:
            return error.exit_status
    return error.exit_status


def main(arguments: list[str] | None = None) -> int:
    """Run vmctl; return the exit status."""
    stdio.fill()
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == [COMPLETE]:
        from vmctl import completion

        return completion.answer(words[1:])
    try:
        options, rest = split(words, GLOBAL, permute=False)
    except UsageError as error:
        warn(str(error))
        notice(HINT)
        return no_command(words, error)
    given = Given(options)
    session = Session(given.value("-s") or DEFAULT_SOCKET, verbose=given.has("-v"))
    if given.wants_help:
        rest = ["help", *rest]
    elif given.has("-V") or given.has("--version"):
        return show_version()
    if not rest:
        notice(usage())
        return UsageError.exit_status
    try:
        command = find_command(rest[0])
    except UsageError as error:
        notice(f"{clean(str(error))}\n{HINT}")
        return no_command(rest, error)
    return run_command(session, command, rest[1:])


if __name__ == "__main__":
    sys.exit(main())
