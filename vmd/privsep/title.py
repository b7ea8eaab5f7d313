"""The name under which ps(1) and top(1) show a process."""

import sys

from vmd import native
from vmd.privsep import linux

EVENT = "event"  # the thread that waits for events, where a process has others beside it
COMM_MAX = 15  # bytes the kernel keeps of PR_SET_NAME
ENCODING = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
STACK_STRINGS_MAX = 1 << 20  # arguments and environment are far smaller


def set_title(title: str) -> None:
    """Show this process as `vmd: title`; a `comm` too short for the title shows its end, which tells most."""
    comm = native.buffer(title.encode()[-COMM_MAX:] + b"\0")
    linux.prctl("set the process name", linux.PR_SET_NAME, native.addressof(comm))
    if AREA is None:
        return
    start, size = AREA
    shown = f"vmd: {title}".encode()[: size - 2]
    # A last byte that is not NUL tells the kernel that this is one string, ending at its first NUL
    # (proc_pid_cmdline(5)); otherwise ps would show the padding as blanks.
    native.memory_at(start, size).raw = shown.ljust(size - 1, b"\0") + b"\1"


def name_thread(name: str) -> None:
    """Show the calling thread under a name of its own, for `ps -L` and `top -H`; ps shows the process by its title."""
    comm = native.buffer(name.encode()[:COMM_MAX] + b"\0")
    linux.prctl("name a thread", linux.PR_SET_NAME, native.addressof(comm))


def argument_area() -> tuple[int, int] | None:
    """Return address and size of our argument strings; None if they are not where a new process has them.

    The kernel lays them out right before the environment.  Looked for without /proc, which a cell has not.
    """
    array = native.c_void_p.in_dll(linux.libc, "environ").value
    first = array and native.c_void_p.from_address(array).value
    if not array or not first:
        return None
    expected = b"".join(argument.encode(*ENCODING) + b"\0" for argument in sys.orig_argv)
    start = first - len(expected)
    # The pointers stand below the strings.  If setenv() has moved either to the heap this does not hold, and only
    # if it holds is all that lies between known to be readable.
    if not array < start < first < array + STACK_STRINGS_MAX:
        return None
    if native.memory_at(start, len(expected)).raw != expected:
        return None
    return start, len(expected)


AREA = argument_area()  # found once, while the arguments still stand there; a title can then be changed
