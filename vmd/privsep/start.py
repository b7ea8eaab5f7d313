"""The first code that a started process runs, before it knows which process it is."""

import posix as os
import sys

from vmd.privsep import linux
from vmd.privsep.title import set_title

CHANNEL_FD = 3


def begin(title: str, parent_pid: int | None, uid: int = 0, group_fd: int = -1) -> None:
    """Take the name `title`, bind our life to our parent's, and keep what we inherited to ourselves.

    `parent_pid` None: we outlive our parent.  With `uid`, become that user first: the rest is undone by that.  With
    `group_fd`, be in that control group: it counts who has opened that file, not who writes to it (Linux 5.16).
    """
    if group_fd >= 0:
        os.write(group_fd, b"0")
        os.close(group_fd)
    if uid:
        linux.become_user(uid, uid, 0)
    # Everything from fd 3 on came over an exec and so would pass over the next one also.
    linux.close_on_exec_from(CHANNEL_FD)
    linux.prctl("forbid being traced", linux.PR_SET_DUMPABLE, 0)  # exec had made us traceable again
    if parent_pid is not None:
        linux.die_with_parent(linux.SIGKILL)
        if os.getppid() != parent_pid:  # it died before the kernel knew that we care
            sys.exit(1)
    set_title(title)
    sys.argv[0] = "vmd"
