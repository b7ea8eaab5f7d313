"""Failures of vmctl: each is one sentence and an exit status.

ClientError       1  the daemon cannot be asked, or has refused the request (`vmd.client`)
  NoDaemon        3  there is no daemon, or it has ended
  CommandError    1  the command has failed
    UsageError    2  the command line cannot be understood; the usage of the command is shown, too
    ArgumentError 2  a word of the command line has an invalid value
    NoSuchVm      4  no VM has this name or number
"""

import errno

from vmd.client import ClientError, NoDaemon, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.errors import VmdError

NO_DAEMON = 3


class CommandError(ClientError):
    """The command has failed; `number` is 0 if there is no error number."""

    exit_status = 1


class UsageError(CommandError):
    """The command line is wrong.  The usage of the command is shown after the sentence."""

    exit_status = 2


class ArgumentError(CommandError):
    """A value on the command line is invalid."""

    exit_status = 2


class NoSuchVm(CommandError):
    """The daemon knows no such VM."""

    exit_status = 4

    def __init__(self, what: str) -> None:
        super().__init__(what, errno.ENOENT)


def exit_status(error: "VmdError") -> int:
    """Return the exit status of a command that fails with this error."""
    if isinstance(error, NoDaemon):
        return NO_DAEMON
    return error.exit_status if isinstance(error, CommandError) else CommandError.exit_status


def sentence_of(error: "VmdError") -> str:
    """Return the sentence for a failure.  "command failed" begins a refusal for which the command has no own words."""
    return f"command failed: {error}" if isinstance(error, Refused) else str(error)


def refused(words: str, error: Refused) -> CommandError:
    """Return the error for a refused request about one VM: the command's words and then the daemon's sentence."""
    sentence = f"{words}: {error.text}"
    return NoSuchVm(sentence) if error.number == errno.ENOENT else CommandError(sentence, error.number)
