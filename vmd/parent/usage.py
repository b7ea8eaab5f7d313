"""The resources that a VM uses: memory that its guest has touched, memory of its processes, and processor time.

Only files of /proc that are readable without CAP_SYS_PTRACE are read, because not every vmd has it.
"""

import os

from vmd.units import NS

TICK_NS = NS // os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
BLOCK_BYTES = 512  # unit of st_blocks on all file systems


def host_pid(pidfd: int) -> int:
    """Return the pid of a pidfd's process on this host; 0 if the process has ended, or `pidfd` is no pidfd."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as info:
            return max([0, *(int(line.split()[1]) for line in info if line.startswith("Pid:"))])
    except (OSError, ValueError):
        return 0


def used_bytes(memory: int | None, pid: int) -> int:
    """Return the memory that a VM uses: the part that its guest has touched, and the private memory of its processes.

    `memory` is the descriptor of the guest's memory.  `pid` is the VM's process; its children are the devices.
    """
    return guest_bytes(memory) + sum(private_bytes(each) for each in (pid, *children(pid)))


def guest_bytes(memory: int | None) -> int:
    """Return how many bytes of its memory a guest has touched."""
    return os.fstat(memory).st_blocks * BLOCK_BYTES if memory is not None else 0


def private_bytes(pid: int) -> int:
    """Return the private memory of a process, without files and shared memory; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            _, resident, shared, *_ = statm.read().split()
            return (int(resident) - int(shared)) * PAGE_BYTES
    except (OSError, ValueError):
        return 0


def children(pid: int) -> list[int]:
    """Return the children that the first thread of a process has started."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as listing:
            return [int(word) for word in listing.read().split()]
    except (OSError, ValueError):
        return []


def cpu_ns(pid: int) -> int:
    """Return the processor time of all threads of a process, in the precision of a tick; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            words = stat.read().rpartition(")")[2].split()  # its name, in brackets, may have any character
            return (int(words[11]) + int(words[12])) * TICK_NS
    except (OSError, ValueError, IndexError):
        return 0


def thread_ns(pid: int, thread: int) -> int:
    """Return the processor time of a thread; 0 if it has ended, or this kernel has no schedstat."""
    try:
        with open(f"/proc/{pid}/task/{thread}/schedstat", encoding="ascii") as schedstat:
            return int(schedstat.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def threads(pid: int) -> dict[str, int]:
    """Return the thread ids of a process by the names of the threads."""
    found = {}
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/comm", encoding="utf-8", errors="replace") as comm:
                found[comm.read().rstrip("\n")] = int(thread)
    except (OSError, ValueError):
        pass  # the process, or one of its threads, has just ended
    return found
