"""What a VM costs the host: the memory that its guest has used, and that of its processes.

Only files of /proc that need no right to look into other processes are read: not every vmd has CAP_SYS_PTRACE.
"""

import os

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
BLOCK_BYTES = 512  # st_blocks, whatever the file system


def host_pid(pidfd: int) -> int:
    """Return the pid that this host has for the process of a pidfd; 0 if it is gone, or that is no pidfd."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as info:
            return max([0, *(int(line.split()[1]) for line in info if line.startswith("Pid:"))])
    except (OSError, ValueError):
        return 0


def used_bytes(memory: int | None, pid: int) -> int:
    """Return the memory that a VM uses: what its guest has touched, and what is its processes' own.

    `memory` is the guest's; `pid` the VM's process, whose children are its devices.
    """
    guest = os.fstat(memory).st_blocks * BLOCK_BYTES if memory is not None else 0
    return guest + sum(private_bytes(each) for each in (pid, *children(pid)))


def private_bytes(pid: int) -> int:
    """Return the memory that a process shares with no file and no other process; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            _, resident, shared, *_ = statm.read().split()
            return (int(resident) - int(shared)) * PAGE_BYTES
    except (OSError, ValueError):
        return 0


def children(pid: int) -> list[int]:
    """Return the processes that the first thread of a process has started."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as listing:
            return [int(word) for word in listing.read().split()]
    except (OSError, ValueError):
        return []
