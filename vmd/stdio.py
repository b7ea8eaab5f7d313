"""Standard input, output and error of our programs.  A program may be started with some of them closed."""

import os

from vmd.errors import HostError

STDIN, STDOUT, STDERR = 0, 1, 2
# How the null device is opened in place of a closed descriptor.  As standard output it is opened for reading only: a
# write then fails with EBADF, as it would with the closed descriptor.
STAND_INS = {STDIN: os.O_RDONLY, STDOUT: os.O_RDONLY, STDERR: os.O_WRONLY}


def fill() -> None:
    """Open the null device in place of each of the three that is closed.  A program calls this first.

    Otherwise the next file or socket would get that number, and messages for the operator would be written to it.
    """
    for fd, flags in STAND_INS.items():
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, flags)
            assert opened == fd  # the lowest number that is free


def say(text: str) -> None:
    """Write to standard error.  Errors are ignored."""
    try:
        os.write(STDERR, text.encode("utf-8", "backslashreplace"))
    except OSError:
        return


def show(text: str) -> None:
    """Write the result of a command to standard output.  Raises HostError."""
    try:
        os.write(STDOUT, text.encode())
    except OSError as error:
        raise HostError("standard output", error) from None
