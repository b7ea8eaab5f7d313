"""The command that has started the daemon, to start the program that is installed now in the same way."""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Program:
    """How vmd was started: where, and by which words."""

    def __init__(self, arguments: "Sequence[str]") -> None:
        """`arguments` are the options.  Made at the start of the program, before it goes anywhere else."""
        try:
            self.directory = os.getcwd()
        except OSError:  # it has been removed
            self.directory = "/"
        script = os.path.abspath(sys.argv[0])
        if os.access(script, os.X_OK):
            self._start = [script]
        else:  # python3 -m vmd
            words = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]
            self._start = [sys.executable, *words]
        self._arguments = list(arguments)

    def command(self, *options: str) -> list[str]:
        """Return what starts it, with more options; to be run in `directory`."""
        return [*self._start, *options, *self._arguments]
