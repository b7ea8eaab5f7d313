"""What a VM costs the host: the memory that its guest has used, that of its processes, and their processor time.

Only files of /proc that need no right to look into other processes are read: not every vmd has CAP_SYS_PTRACE.
"""

import os

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
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
    return guest_bytes(memory) + sum(private_bytes(each) for each in (pid, *children(pid)))


def guest_bytes(memory: int | None) -> int:
    """Return how much of its memory a guest has touched."""
    return os.fstat(memory).st_blocks * BLOCK_BYTES if memory is not None else 0


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


def cpu_ns(pid: int) -> int:
    """Return for how long the threads of a process have had a processor, in ticks; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            words = stat.read().rpartition(")")[2].split()  # its name may be anything
            return (int(words[11]) + int(words[12])) * TICK_NS
    except (OSError, ValueError, IndexError):
        return 0


def thread_ns(pid: int, thread: int) -> int:
    """Return for how long a thread has had a processor; 0 if it is gone, or this kernel does not say."""
    try:
        with open(f"/proc/{pid}/task/{thread}/schedstat", encoding="ascii") as schedstat:
            return int(schedstat.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def threads(pid: int) -> dict[str, int]:
    """Return the threads of a process by the names that it has given them."""
    found = {}
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/comm", encoding="utf-8", errors="replace") as comm:
                found[comm.read().rstrip("\n")] = int(thread)
    except (OSError, ValueError):
        pass  # it has just ended, or one of its threads has
    return found
