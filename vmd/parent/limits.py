"""Limits on the resources that VMs take from the host, and on restarts."""

import errno
import os
import resource
import time
from collections import Counter

from vmd.config.model import Config, Globals, VmConfig
from vmd.errors import OperatorError
from vmd.log import log
from vmd.privsep.linux import DESCRIPTORS
from vmd.scaled import fmt_scaled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MEMINFO = "/proc/meminfo"
OVERCOMMIT = 2  # times the host's memory.  Guests rarely use all of theirs; more is almost certainly a typing error
# Descriptors that the parent or vmm needs for one VM, a little more than the most: a VM with four interfaces and boot
# files of its user.  FILES_BESIDES are for clients.
FILES_PER_VM = 16
FILES_BESIDES = 1024
# Limits of the kernel that VMs may reach: the file below /proc/sys, how many a VM takes, and what they are.  They hold
# for all programs of the host, so the daemon does not change them.
KERNEL_LIMITS = (
    ("kernel/pty/max", 1, "a terminal"),
    ("kernel/pid_max", 16, "16 processes and threads"),
    ("kernel/threads-max", 16, "16 processes and threads"),
)
NEIGHBOURS = "net/ipv4/neigh/default/gc_thresh3"  # one for each `local` interface
PORTS_MAX = 1023  # of a bridge of Linux (BR_MAX_PORTS)
FILES_TO_START = 64  # must be free for a start: disks and their backing files are open for a moment
RESTART_WINDOW_S = 6.0
RESTART_LIMIT = 3


def host_memory_bytes() -> int:
    """Return the memory of this host together with its swap."""
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open(MEMINFO, encoding="ascii") as meminfo:
            for line in meminfo:
                if line.startswith("SwapTotal:"):
                    total_bytes += int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass  # without the file, assume that there is no swap
    return total_bytes


def require_room(config: VmConfig, running: "Iterable[VmConfig]", settings: Globals) -> None:
    """Raise OperatorError if a VM would exceed a limit together with the running ones.

    EAGAIN for the number of VMs or of vCPUs, ENOMEM for memory.  Running VMs stay, even if a limit is lowered.
    """
    others = tuple(running)
    if len(others) >= settings.limit_vms:
        raise OperatorError(
            errno.EAGAIN, f"vm {config.name}: {len(others)} VMs are running, and there is a limit of "
            f"{settings.limit_vms} (limit vms)",
        )  # fmt: skip
    vcpus = config.vcpus + sum(other.vcpus for other in others)
    if vcpus > settings.limit_vcpus:
        raise OperatorError(
            errno.EAGAIN, f"vm {config.name}: with its {config.vcpus} there would be {vcpus} vcpus, and there is a "
            f"limit of {settings.limit_vcpus} (limit vcpus)",
        )  # fmt: skip
    limit_bytes, why = settings.limit_memory_bytes, ""
    if limit_bytes is None:
        limit_bytes, why = OVERCOMMIT * host_memory_bytes(), ", twice what this host has"
    memory_bytes = config.memory_bytes + sum(other.memory_bytes for other in others)
    if memory_bytes > limit_bytes:
        raise OperatorError(
            errno.ENOMEM, f"vm {config.name}: with its {fmt_scaled(config.memory_bytes)} guests would have "
            f"{fmt_scaled(memory_bytes)} of memory, and there is a limit of {fmt_scaled(limit_bytes)}{why} "
            "(limit memory)",
        )  # fmt: skip


def raise_file_limit(limit_vms: int) -> None:
    """Raise the limit of open files for so many VMs, in this process and in the processes that it starts."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_PER_VM * limit_vms + FILES_BESIDES
    for number in (max(most, wanted), most):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))
        except (OSError, ValueError):  # more than the kernel, or a container, allows root
            continue
        if number < wanted:
            log.warn(f"{number} open files at most, which may not be enough for {limit_vms} VMs")
        return


def host_warnings(config: Config, root: str = "/proc/sys") -> list[str]:
    """Return a sentence for each limit of this host's kernel that the VMs of a configuration may reach."""
    found = []
    vms = config.settings.limit_vms
    for name, each, what in KERNEL_LIMITS:
        most = number_in(f"{root}/{name}")
        if most and most < vms * each:
            sysctl = name.replace("/", ".")
            found.append(f"limit vms {vms}: a VM takes {what}, and this host has {most}: raise sysctl {sysctl}")
    nics = [nic for vm in config.vms for nic in vm.nics]
    locals_, most = sum(nic.local for nic in nics), number_in(f"{root}/{NEIGHBOURS}")
    if most and most < locals_:
        what = f"{locals_} local interfaces, and this host remembers {most} neighbours"
        found.append(f"{what}: raise sysctl {NEIGHBOURS.replace('/', '.')}")
    for switch, ports in Counter(nic.switch for nic in nics if nic.switch).items():
        if ports > PORTS_MAX:
            found.append(f'switch "{switch}": {ports} interfaces, and a bridge of Linux has {PORTS_MAX} at most')
    return found


def number_in(path: str) -> int:
    """Return the number in a file; 0 if there is none."""
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def require_files() -> None:
    """Raise OperatorError(EMFILE) if few descriptors are free: without one, even messages lose their descriptors."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        count = os.stat(DESCRIPTORS).st_size or len(os.listdir(DESCRIPTORS))  # the size is their number since Linux 6.2
    except OSError:  # no descriptor is free to look
        count = most
    if count + FILES_TO_START > most:
        raise OperatorError(errno.EMFILE, f"no room for another vm among the {most} files that vmd may have open")


class RestartLimit:
    """Stops a guest that reboots in a loop: the third start within 6 s of the one before is refused (*cat. 4.3*).

    Unlike vmd, only guest reboots count: a user who starts and stops a VM by hand is not a loop.
    """

    def __init__(self) -> None:
        self.last_start_s: float | None = None
        self.quick_restarts = 0

    def started_by_user(self) -> None:
        """Note a start that a user or vm.conf asked for."""
        self.last_start_s = time.monotonic()
        self.quick_restarts = 0

    def may_restart(self) -> bool:
        """Note a restart and return whether it is allowed."""
        now_s = time.monotonic()
        quick = self.last_start_s is not None and now_s - self.last_start_s < RESTART_WINDOW_S
        self.quick_restarts = self.quick_restarts + 1 if quick else 0
        self.last_start_s = now_s
        return self.quick_restarts < RESTART_LIMIT
