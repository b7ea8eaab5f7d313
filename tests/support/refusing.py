"""Runs a program with some system calls refused, as in containers and under old filters.

    python -m tests.support.refusing ERRNO FIRST-LAST KNOWN,... -- COMMAND [ARGUMENT ...]

Calls with the numbers FIRST to LAST fail with ERRNO, except those that KNOWN lists.
"""

import errno
import os
import sys

from vmd.privsep.seccomp import (
    JEQ,
    JGE,
    LD_ABS,
    OFFSET_NR,
    RET,
    RET_ALLOW,
    RET_ERRNO,
    X32_SYSCALL_BIT,
    install,
    instruction,
)


def program(first: int, last: int, known: list[int], number: int) -> bytes:
    """Return the seccomp filter."""
    allow = instruction(RET, RET_ALLOW)
    steps = [instruction(LD_ABS, OFFSET_NR), instruction(JGE, first, 1, 0), allow]
    steps += [instruction(JGE, last + 1, 0, 1), allow]
    for call in known:
        steps += [instruction(JEQ, call, 0, 1), allow]
    return b"".join([*steps, instruction(RET, RET_ERRNO | number)])


def refusing(number: int, first: int, last: int = X32_SYSCALL_BIT - 1, known: tuple[int, ...] = ()) -> list[str]:
    """Return a command prefix that runs a program so."""
    listed = ",".join(map(str, known))
    return [sys.executable, "-m", "tests.support.refusing", errno.errorcode[number], f"{first}-{last}", listed, "--"]


def main(arguments: list[str]) -> None:
    """Install the filter and become the command."""
    name, bounds, listed, _, *command = arguments
    first, last = map(int, bounds.split("-"))
    known = [int(call) for call in listed.split(",") if call]
    install(program(first, last, known, getattr(errno, name)))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
