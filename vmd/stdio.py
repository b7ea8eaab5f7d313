"""Standard input, output and error of our programs, which may be started without them."""

import os

from vmd.errors import HostError

STDIN, STDOUT, STDERR = 0, 1, 2
# How the null device stands in for a closed one.  It cannot be written to as standard output: whoever tries gets EBADF,
# as without it.
STAND_INS = {STDIN: os.O_RDONLY, STDOUT: os.O_RDONLY, STDERR: os.O_WRONLY}


def fill() -> None:
    """Open the null device wherever one of the three is closed; the first thing that a program does.

    Otherwise the next file or socket gets that number, and words for the operator are written into it.
    """
    for fd, flags in STAND_INS.items():
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, flags)
            assert opened == fd  # the lowest number that is free


def say(text: str) -> None:
    """Write to standard error; one that is closed or full stops nothing."""
    try:
        os.write(STDERR, text.encode("utf-8", "backslashreplace"))
    except OSError:
        return


def show(text: str) -> None:
    """Write what was asked for to standard output.  Raises HostError."""
    try:
        os.write(STDOUT, text.encode())
    except OSError as error:
        raise HostError("standard output", error) from None
