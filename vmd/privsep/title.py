"""The name under which ps(1) and top(1) show a process."""

import ctypes
import os
import sys

from vmd.privsep import linux

EVENT = "event"  # the thread that waits for events, where a process has others beside it
COMM_MAX = 15  # bytes the kernel keeps of PR_SET_NAME
STACK_STRINGS_MAX = 1 << 20  # arguments and environment are far smaller


def set_title(title: str) -> None:
    """Show this process as `vmd: title`; a `comm` too short for the title shows its end, which tells most."""
    comm = ctypes.create_string_buffer(title.encode()[-COMM_MAX:])
    linux.prctl("set the process name", linux.PR_SET_NAME, ctypes.addressof(comm))
    if AREA is None:
        return
    start, size = AREA
    shown = f"vmd: {title}".encode()[: size - 2]
    # A last byte that is not NUL tells the kernel that this is one string, ending at its first NUL
    # (proc_pid_cmdline(5)); otherwise ps would show the padding as blanks.
    ctypes.memmove(start, shown.ljust(size - 1, b"\0") + b"\1", size)


def name_thread(name: str) -> None:
    """Show the calling thread under a name of its own, for `ps -L` and `top -H`; ps shows the process by its title."""
    comm = ctypes.create_string_buffer(name.encode()[:COMM_MAX])
    linux.prctl("name a thread", linux.PR_SET_NAME, ctypes.addressof(comm))


def argument_area() -> tuple[int, int] | None:
    """Return address and size of our argument strings; None if they are not where a new process has them.

    The kernel lays them out right before the environment.  Looked for without /proc, which a cell has not.
    """
    array = ctypes.c_void_p.in_dll(linux.libc, "environ").value
    first = array and ctypes.c_void_p.from_address(array).value
    if not array or not first:
        return None
    expected = b"".join(os.fsencode(argument) + b"\0" for argument in sys.orig_argv)
    start = first - len(expected)
    # The pointers stand below the strings.  If setenv() has moved either to the heap this does not hold, and only
    # if it holds is all that lies between known to be readable.
    if not array < start < first < array + STACK_STRINGS_MAX:
        return None
    if ctypes.string_at(start, len(expected)) != expected:
        return None
    return start, len(expected)


AREA = argument_area()  # found once, while the arguments still stand there; a title can then be changed
