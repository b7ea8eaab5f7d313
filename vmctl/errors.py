"""How a command of vmctl can fail: one sentence and an exit status.

ClientError       1  the daemon cannot be asked, or refused it (`vmd.client`)
  NoDaemon        3  there is no daemon, or it has ended
  CommandError    1  the command cannot be done
    UsageError    2  the command line cannot be understood; the usage of the command follows
    ArgumentError 2  a word of the command line has a value that it cannot have
    NoSuchVm      4  no VM has this name or number
"""

import errno

from vmd.client import ClientError, NoDaemon, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.errors import VmdError

NO_DAEMON = 3


class CommandError(ClientError):
    """The command cannot be done; `number` is 0 where nobody gave one."""

    exit_status = 1


class UsageError(CommandError):
    """The command line is wrong: a sentence, and then the usage of the command."""

    exit_status = 2


class ArgumentError(CommandError):
    """A value that was typed is none that there can be."""

    exit_status = 2


class NoSuchVm(CommandError):
    """The daemon knows no such VM."""

    exit_status = 4

    def __init__(self, what: str) -> None:
        super().__init__(what, errno.ENOENT)


def exit_status(error: "VmdError") -> int:
    """Return the exit status of a command that fails so."""
    if isinstance(error, NoDaemon):
        return NO_DAEMON
    return error.exit_status if isinstance(error, CommandError) else CommandError.exit_status


def sentence_of(error: "VmdError") -> str:
    """Return what is said of a failure: a refusal for which a command has no words of its own says whose it is."""
    return f"command failed: {error}" if isinstance(error, Refused) else str(error)


def refused(words: str, error: Refused) -> CommandError:
    """Return a refusal of something that was asked for one VM: after the command's words, the daemon's sentence."""
    sentence = f"{words}: {error.text}"
    return NoSuchVm(sentence) if error.number == errno.ENOENT else CommandError(sentence, error.number)
