"""The name under which ps(1) and top(1) show a process."""

import sys

from vmd import native
from vmd.privsep import linux

EVENT = "event"  # name of the thread that waits for events, in a process with several threads
COMM_MAX = 15  # bytes that the kernel keeps of PR_SET_NAME
ENCODING = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
STACK_STRINGS_MAX = 1 << 20  # arguments and environment are far smaller


def set_title(title: str) -> None:
    """Show this process as `vmd: title`.  If the title is longer than `comm`, its end is kept, which tells more."""
    comm = native.buffer(title.encode()[-COMM_MAX:] + b"\0")
    linux.prctl("set the process name", linux.PR_SET_NAME, native.addressof(comm))
    if AREA is None:
        return
    start, size = AREA
    shown = f"vmd: {title}".encode()[: size - 2]
    # If the last byte is not NUL, the kernel takes the area as one string that ends at its first NUL
    # (proc_pid_cmdline(5)).  Otherwise ps would show the padding as blanks.
    native.memory_at(start, size).raw = shown.ljust(size - 1, b"\0") + b"\1"


def name_thread(name: str) -> None:
    """Name the calling thread for `ps -L` and `top -H`.  Without these options ps shows the process's title."""
    comm = native.buffer(name.encode()[:COMM_MAX] + b"\0")
    linux.prctl("name a thread", linux.PR_SET_NAME, native.addressof(comm))


def argument_area() -> tuple[int, int] | None:
    """Return address and size of our argument strings; None if they are not at their original place.

    The kernel places them directly before the environment strings.  They are found without /proc, which a cell lacks.
    """
    array = native.c_void_p.in_dll(linux.libc, "environ").value
    first = array and native.c_void_p.from_address(array).value
    if not array or not first:
        return None
    expected = b"".join(argument.encode(*ENCODING) + b"\0" for argument in sys.orig_argv)
    start = first - len(expected)
    # The pointers are below the strings, unless setenv() has moved either to the heap.  Only if they are below, all
    # memory in between is known to be readable.
    if not array < start < first < array + STACK_STRINGS_MAX:
        return None
    if native.memory_at(start, len(expected)).raw != expected:
        return None
    return start, len(expected)


AREA = argument_area()  # found once, before `set_title` overwrites the arguments
