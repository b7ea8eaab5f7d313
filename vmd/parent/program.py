"""The command line of this daemon, with which the newly installed program is started in the same way."""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Program:
    """How vmd was started: its directory and its command line."""

    def __init__(self, arguments: "Sequence[str]") -> None:
        """`arguments` are the options.  Must be made before the program changes its directory."""
        try:
            self.directory = os.getcwd()
        except OSError:  # the directory was removed
            self.directory = "/"
        script = os.path.abspath(sys.argv[0])
        if os.access(script, os.X_OK):
            self._start = [script]
        else:  # python3 -m vmd
            words = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]
            self._start = [sys.executable, *words]
        self._arguments = list(arguments)

    def command(self, *options: str) -> list[str]:
        """Return the command line with more options.  It must be run in `directory`."""
        return [*self._start, *options, *self._arguments]
