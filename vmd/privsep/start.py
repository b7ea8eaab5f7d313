"""The first code that a started process runs, before it knows which process it is."""

import posix as os
import sys

from vmd.privsep import linux
from vmd.privsep.title import set_title

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

CHANNEL_FD = 3
CODE_FD = 9  # a process outside the cell finds the cell's root here, until it has loaded its code from there
CODE = "/vmd"  # where our packages are, in the cell
CODE_OUTSIDE = f"/proc/self/fd/{CODE_FD}{CODE}"  # the same for a process outside


def begin(title: str, parent_pid: int | None, uid: int = 0, group_fd: int = -1) -> None:
    """Take the name `title`, arrange to be killed with our parent, and mark inherited descriptors close-on-exec.

    With `parent_pid` None this process outlives its parent.  With `uid` it becomes that user first, because that would
    undo the other steps.  With `group_fd` it joins that control group.  For this the kernel checks the rights of the
    process that has opened the file, not of the one that writes to it (Linux 5.16).
    """
    if group_fd >= 0:
        os.write(group_fd, b"0")
        os.close(group_fd)
    if uid:
        linux.become_user(uid, uid, 0)
    # Descriptors from 3 on were inherited over an exec, so the next exec would pass them on too.
    linux.close_on_exec_from(CHANNEL_FD)
    linux.prctl("forbid being traced", linux.PR_SET_DUMPABLE, 0)  # the exec has made us traceable again
    if parent_pid is not None:
        linux.die_with_parent(linux.SIGKILL)
        if os.getppid() != parent_pid:  # the parent ended before die_with_parent
            sys.exit(1)
    set_title(title)
    sys.argv[0] = "vmd"


def run(main: "Callable[[], int]") -> "NoReturn":
    """Call a process's main function, and end the process as `sys.exit` would with its result.

    The interpreter is not finalized.  CPython frees the states of all threads then, and a thread that was started but
    has not run yet reads its state first: a segmentation fault.
    """
    try:
        sys.exit(main())
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    os._exit(status)
