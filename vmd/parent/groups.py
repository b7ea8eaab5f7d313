"""Control groups (cgroups(7), version 2): each VM and its devices are in one group, to be limited and killed together.

The groups are below one directory.  It is not below the group of the daemon's unit, because systemd cannot start a unit
again while guests are in its group.

    vmd-guests-N.scope/    a transient unit of systemd; without systemd vmd-guests-N, below the daemon's own group
        vmm/               vmm: it may not be in the group above, because that gives controllers to its children
        vm-1/ vm-2/ ...    one for each VM process, made before the process exists

N is the lowest free number.  The scope ends with its last process.
"""

import contextlib
import errno
import itertools
import os
import subprocess

from vmd.config.model import DEFAULT_WEIGHT, VmLimits
from vmd.errors import HostError, VmdError
from vmd.privsep.ids import TASKS_MAX
from vmd.privsep.spawn import ENVIRONMENT
from vmd.readable import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SYSTEMD = "/run/systemd/system"  # exists if systemd runs the host (sd_booted(3))
PREFIX = "vmd-guests-"
SCOPE_END = ".scope"
CORE = "core"
GROUP = "vm-"
SCOPE_S = 30.0  # for systemd to make a scope
SCOPES_MAX = 64  # units of other daemons that run or are about to end
TAKEN = "already"  # a word in systemd's error about a unit that exists
CONTROLLER = "pids"
# The memory controller is enabled from the start, because it never counts memory that was used before.  The cpu
# controller is enabled with the first limit: from then on the kernel divides processors among VMs, no longer threads.
MEMORY, CPU = "memory", "cpu"
CPU_PERIOD_US = 100_000
LIMIT, HOST = "memory limit", "host"  # which memory was used up when the kernel killed a process of a VM


def directory_of(pid: int) -> str:
    """Return the directory of a process's group.  Raises HostError."""
    tried = "find the control groups of version 2"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            mounts = file.read()
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            found = located(mounts, file.read())
    except OSError as error:
        raise HostError(tried, error) from error
    if found is None:
        raise HostError(tried, errno.ENODEV)
    return found


def located(mountinfo: str, cgroup: str) -> str | None:
    """Return the directory of the group in a /proc/PID/cgroup; None if no mount shows it (proc_pid_mountinfo(5))."""
    group = next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), "")
    for before, _, after in (line.partition(" - ") for line in mountinfo.splitlines()):
        if after.startswith("cgroup2 ") and group:
            root, top = before.split()[3:5]
            # A group outside of our cgroup namespace has no directory here.
            inside = f"{group}/".startswith(f"{root.rstrip('/')}/") and "/.." not in group
            return f"{top}{group.removeprefix(root.rstrip('/'))}".rstrip("/") if inside else None
    return None


def write(path: str, text: str) -> None:
    """Write to a file of a group.  Raises HostError."""
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        raise HostError(f"write {text} to {path}", error) from error


def move(pid: int, group: str) -> None:
    """Move a process to a group.  The group is made if it does not exist.  Raises HostError."""
    try:
        os.makedirs(group, 0o755, exist_ok=True)
    except OSError as error:
        raise HostError(f"make {group}", error) from error
    write(f"{group}/cgroup.procs", str(pid))


def give_controller(group: str, controller: str = CONTROLLER) -> bool:
    """Enable a controller for the groups in a group; False if it is not available there.  Raises HostError."""
    try:
        with open(f"{group}/cgroup.controllers", encoding="ascii") as file:
            known = file.read().split()
    except OSError as error:
        raise HostError(f"read {error.filename}", error) from error
    if controller in known:
        write(f"{group}/cgroup.subtree_control", f"+{controller}")
    return controller in known


def give_memory(group: str) -> None:
    """Enable the memory controller for the groups in a group, if it is available."""
    with contextlib.suppress(HostError):  # a limit that needs it fails later, with a sentence
        give_controller(group, MEMORY)


def wanted(limits: VmLimits) -> list[str]:
    """Return which limits are given, in words of vm.conf."""
    return [words for words, _, _, _, given in rows(limits) if given]


def rows(limits: VmLimits) -> list[tuple[str, str, str, str, bool]]:
    """Return a row for each file: word of vm.conf, controller, file, its text, and whether there is a limit."""
    share, weight, memory = limits.cpu_percent, limits.weight, limits.memory_bytes
    quota = str(share * CPU_PERIOD_US // 100) if share else "max"
    return [
        ("cpu", CPU, "cpu.max", f"{quota} {CPU_PERIOD_US}", bool(share)),
        ("weight", CPU, "cpu.weight", str(weight or DEFAULT_WEIGHT), bool(weight)),
        ("memory", MEMORY, "memory.max", str(memory or "max"), bool(memory)),
        # A VM cannot run without one of its processes, so the kernel kills all of them together.
        ("memory", MEMORY, "memory.oom.group", str(int(bool(memory))), False),
    ]


def limit(group: str, limits: VmLimits) -> dict[str, list[str]]:
    """Limit a VM's group; return the limits that have no effect, in words of vm.conf, by the missing controller.

    Raises HostError.
    """
    missing: dict[str, list[str]] = {}
    for words, controller, file, text, given in rows(limits):
        path = f"{group}/{file}"
        if given and not os.path.exists(path):
            top = os.path.dirname(group)
            if not top.endswith(SCOPE_END):  # for a scope systemd has enabled it above
                with contextlib.suppress(HostError):
                    give_controller(os.path.dirname(top), controller)
            give_controller(top, controller)
        if os.path.exists(path):
            write(path, text)
        elif given:
            missing.setdefault(controller, []).append(words)
    return missing


def memory_lack(group: str) -> str:
    """Return which memory was used up when the kernel killed a process of a group: LIMIT, HOST; "" if it has not."""
    counted: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError), open(f"{group}/memory.events", encoding="ascii") as file:
        counted = dict(line.split() for line in file)
    if counted.get("oom_kill", "0") == "0":
        return ""
    return HOST if counted.get("oom", "0") == "0" else LIMIT


class Groups:
    """The groups of one daemon's VMs."""

    def __init__(self, top: str, *, limited: bool) -> None:
        """`limited`: the number of tasks in a group can be limited.

        Groups that an earlier daemon has made there stay until `keep_only`.
        """
        self.top = top
        self.limited = limited
        self._numbers = itertools.count(1 + max(self._there(), default=0))
        self._over: set[int] = set()  # killed groups, which may not be empty yet

    def make(self) -> tuple[int, int]:
        """Make a group for a VM process; return its number and a descriptor.  Raises HostError.

        A process that writes 0 to the descriptor moves itself to the group.
        """
        number = next(self._numbers)
        path = self._path(number)
        try:
            os.mkdir(path, 0o755)
        except OSError as error:
            raise HostError(f"make {path}", error) from error
        try:
            if self.limited:
                write(f"{path}/pids.max", str(TASKS_MAX))
            return number, os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        except (OSError, HostError) as error:
            self._over.add(number)  # `remove` removes it
            raise error if isinstance(error, HostError) else HostError(f"make {path}", error) from error

    def end(self, number: int) -> str:
        """Kill all processes in a group, to be removed later; return what `memory_lack` says of it."""
        lack = memory_lack(self._path(number))
        with contextlib.suppress(HostError):  # the file exists since Linux 5.14
            write(f"{self._path(number)}/cgroup.kill", "1")
        self._over.add(number)
        return lack

    def remove(self) -> bool:
        """Remove the killed groups that are empty; return whether others still have processes."""
        for number in tuple(self._over):
            try:
                os.rmdir(self._path(number))
            except FileNotFoundError:
                pass
            except OSError:
                continue
            self._over.discard(number)
        return bool(self._over)

    def keep_only(self, numbers: "Sequence[int]") -> None:
        """End all groups of an earlier daemon except these, which are in use."""
        for number in self._there() - set(numbers):
            self.end(number)

    def _there(self) -> set[int]:
        """Return the numbers of the groups that exist."""
        try:
            names = os.listdir(self.top)
        except OSError:
            return set()
        numbers = (name.removeprefix(GROUP) for name in names if name.startswith(GROUP))
        return {int(number) for number in numbers if number.isascii() and number.isdigit()}

    def _path(self, number: int) -> str:
        return f"{self.top}/{GROUP}{number}"


class Scope:
    """Makes groups in a unit of their own, on a host that systemd runs."""

    def groups(self, vmm: int) -> Groups:
        """Make a unit and move vmm to a group in it; return the groups.  Raises VmdError."""
        own = directory_of(os.getpid())
        for number in range(SCOPES_MAX):
            groups = self._make(f"{PREFIX}{number}{SCOPE_END}", own, vmm)
            if groups is not None:
                return groups
        raise VmdError(f"make a control group: there are {SCOPES_MAX} units {PREFIX}N.scope")

    def _make(self, unit: str, own: str, vmm: int) -> Groups | None:
        """Make one unit; return None if a unit of this name exists.  Raises VmdError."""
        above, name = os.path.split(own)
        # With memory accounting systemd may stop the whole scope when the kernel kills one guest for lack of memory
        # (OOMPolicy=stop, since version 253; earlier versions do not accept OOMPolicy= for a scope).
        options = ["Delegate=yes", "TasksMax=infinity", "MemoryAccounting=no"]
        if name.endswith(".service"):
            # Limits of the daemon's slice apply to its guests, too.  Before=: when the host shuts down, the daemon is
            # stopped first, and stops its guests.
            options += [f"Before={name}", f"Slice={os.path.basename(above)}"]
        command = ["systemd-run", "--scope", "--quiet", "--collect", f"--unit={unit}", "--description=Guests of vmd"]
        command += [f"--property={option}" for option in options]
        tried = f"make {unit} by systemd-run"
        try:
            # systemd makes no scope without a process.  `cat` is in the scope once it has answered.
            holder = subprocess.Popen(
                [*command, "cat"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise HostError(tried, error) from error
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        with holder:
            try:
                with contextlib.suppress(OSError):  # systemd-run has failed; its error is read below
                    holder.stdin.write(b"\n")
                if not readable(holder.stdout, SCOPE_S):
                    raise HostError(tried, errno.ETIMEDOUT)
                if not holder.stdout.read(1):
                    words = holder.stderr.read().decode(errors="replace").strip()
                    if TAKEN in words:
                        return None
                    raise VmdError(f"{tried}: {words}")
                top = directory_of(holder.pid)
                for pid in (vmm, holder.pid):
                    move(pid, f"{top}/vmm")
                give_memory(top)
                return Groups(top, limited=give_controller(top))
            finally:
                holder.kill()

    def adopt(self, _top: str) -> None:
        """Nothing: the unit ends with its last process."""

    def close(self) -> None:
        """Nothing: the unit ends with its last process."""


class Below:
    """Makes groups below the daemon's own group, on a host without systemd.

    A group that gives controllers to its children may not have processes, so the daemon moves to a group `core` below.
    """

    def __init__(self) -> None:
        """Move this process to `core`.  Called before it has children.  Raises HostError."""
        self.own = directory_of(os.getpid())
        if os.path.basename(self.own) == CORE and guests_below(os.path.dirname(self.own)):
            self.own = os.path.dirname(self.own)  # moved already, before this program was executed in place
        self.tops: list[str] = []
        move(os.getpid(), f"{self.own}/{CORE}")
        try:
            give_controller(self.own)
            give_memory(self.own)
        except HostError:  # such as when other programs are in the group
            with contextlib.suppress(HostError, OSError):
                move(os.getpid(), self.own)
                os.rmdir(f"{self.own}/{CORE}")
            raise

    def groups(self, vmm: int) -> Groups:
        """Remove empty groups of killed daemons; make a group and move vmm to a group in it; return the groups.

        Raises HostError.
        """
        with contextlib.suppress(OSError):
            for name in os.listdir(self.own):
                if name.startswith(PREFIX):
                    remove_if_empty(f"{self.own}/{name}")
        for number in itertools.count():
            top = f"{self.own}/{PREFIX}{number}"
            try:
                os.mkdir(top, 0o755)
                break
            except FileExistsError:
                continue
            except OSError as error:
                raise HostError(f"make {top}", error) from error
        self.tops.append(top)
        move(vmm, f"{top}/vmm")
        give_memory(top)
        return Groups(top, limited=give_controller(top))

    def adopt(self, top: str) -> None:
        """Take over a directory that an earlier daemon has made: `close` removes it, too."""
        self.tops.append(top)

    def close(self) -> None:
        """Remove all groups except `core`, which the log process is still in.  Called when all vmms have ended."""
        for top in self.tops:
            remove_if_empty(top)


def guests_below(directory: str) -> bool:
    """Return whether a daemon has made groups for guests below this group."""
    try:
        return any(name.startswith(PREFIX) for name in os.listdir(directory))
    except OSError:
        return False


def remove_if_empty(top: str) -> None:
    """Remove a group and all groups in it, unless there are processes."""
    with contextlib.suppress(OSError):
        with open(f"{top}/cgroup.events", encoding="ascii") as file:
            if "populated 0" not in file.read():
                return
        for directory, _, _ in os.walk(top, topdown=False):
            os.rmdir(directory)


def place() -> Scope | Below:
    """Return what makes groups on this host.  Called before the first child is started.  Raises HostError."""
    return Scope() if os.path.isdir(SYSTEMD) else Below()
