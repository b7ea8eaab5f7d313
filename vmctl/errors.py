"""How a command of vmctl can fail: one sentence and an exit status.

CommandError    1  the command cannot be done, or the daemon refused it
  UsageError    2  the command line cannot be understood; the usage of the command follows
  ArgumentError 2  a word of the command line has a value that it cannot have
  NoDaemon      3  there is no daemon, or it has ended
  NoSuchVm      4  no VM has this name or number
"""

import errno

from vmd.errors import VmdError


class CommandError(VmdError):
    """The command cannot be done; `number` is 0 where nobody gave one."""

    exit_status = 1

    def __init__(self, what: str, number: int | None = None) -> None:
        super().__init__(what, number)
        self.what = what
        self.number = number or 0

    def __str__(self) -> str:
        return self.what


class UsageError(CommandError):
    """The command line is wrong: a sentence, and then the usage of the command."""

    exit_status = 2


class ArgumentError(CommandError):
    """A value that was typed is none that there can be."""

    exit_status = 2


class NoDaemon(CommandError):
    """Nobody serves the socket, or serves it any longer."""

    exit_status = 3


class NoSuchVm(CommandError):
    """The daemon knows no such VM."""

    exit_status = 4

    def __init__(self, what: str) -> None:
        super().__init__(what, errno.ENOENT)


class Refused(CommandError):
    """The daemon answered Failed; commands put their own words before its sentence."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"command failed: {text}", number)
        self.text = text


def refused(words: str, error: Refused) -> CommandError:
    """Return a refusal of something that was asked for one VM: after the command's words, the daemon's sentence."""
    sentence = f"{words}: {error.text}"
    return NoSuchVm(sentence) if error.number == errno.ENOENT else CommandError(sentence, error.number)
