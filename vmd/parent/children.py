"""The parent's children: how each is started, where it runs, and how it is reaped."""

import os
import socket
import time

from vmd.closing import close_all
from vmd.config.model import IDS
from vmd.errors import HostError, VmdError
from vmd.files.prober import IMGPROBE_ENTRY, start_probe
from vmd.ipc.channel import socketpair
from vmd.ipc.messages.clients import Caller
from vmd.ipc.rights import refuse_files
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent import groups, usage
from vmd.privsep import linux
from vmd.privsep.cell import Cell, VmmCell
from vmd.privsep.hostfiles import HostFiles
from vmd.privsep.ids import Ids, user_namespace
from vmd.privsep.privplace import PrivPlace
from vmd.privsep.spawn import Child, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmd.ipc.loop import Loop
    from vmd.parent.lifelock import LifeLock
    from vmd.privsep.spawn import Place


SEND_NO_FILES = (Proc.CONTROL, Proc.OPENER, Proc.IMGWRITER, Proc.AGENTX, Proc.CONSOLELOG, Proc.METRICS)  # to us
OUTLIVE_US = (Proc.VMM, Proc.CONSOLELOG)  # not killed with the parent
LOGFILE_ENTRY = "vmd.logfile.main:main"
CALM_S = 60.0  # a process that has run for so long is started again without a delay
FIRST_S, LONGEST_S = 0.25, 15.0  # delays of repeated starts
PRIV_ENDS_S = 20.0  # how long priv may take to end
LOCK_FD = 4  # vmm's descriptor of the lock that shows that it lives
LATE_S, LATEST_S = 1.0, 60.0  # between looks at killed processes that have not ended


class Delay:
    """How long to wait before a process is started again: only one that ends repeatedly has to wait."""

    def __init__(self) -> None:
        self.last_s = -CALM_S
        self.delay_s = 0.0

    def next_s(self) -> float:
        """Return the delay of the start that is asked for now, in seconds."""
        now_s = time.monotonic()
        quiet = now_s - self.last_s >= CALM_S
        self.delay_s = 0.0 if quiet else min(max(FIRST_S, 2 * self.delay_s), LONGEST_S)
        self.last_s = now_s
        return self.delay_s


class Children:
    """Starts and reaps all child processes of the parent."""

    def __init__(self, uid: int, gid: int, first_id: int, lock: "LifeLock | None" = None) -> None:
        """Each vmm shares `lock`.

        Children have the user ids from `first_id` on.  Where the host has no user namespaces, all of them except priv
        run as that one user.
        """
        self._uid = uid
        self._lock = lock
        self._own_ids = range(first_id, first_id + IDS + 1)
        self._left = usage.children(os.getpid())  # pids of children of the program that ran in this process before
        self._groups_place = group_place()
        self.cell = cell = Cell.build(uid, gid)
        priv = PrivPlace(cell.root_fd, first_id + IDS)
        vmm = vmm_place(cell, first_id)
        self.ids = cell.ids
        self._places: dict[Proc, Place] = {
            Proc.PRIV: priv, Proc.CONTROL: cell, Proc.VMM: vmm, Proc.OPENER: HostFiles(cell.root_fd),
            Proc.IMGWRITER: cell, Proc.AGENTX: cell, Proc.CONSOLELOG: cell, Proc.METRICS: cell,
        }  # fmt: skip
        self._present: dict[Proc, Child] = {}
        self._children: list[Child] = []  # includes processes that were killed and may not have ended yet
        self._loop: Loop | None = None
        self._late_s = 0.0  # delay of the next look at processes that end late; 0: no look is planned

    def begin(self, loop: "Loop") -> None:
        """Reap the children of the earlier program in this process, and from now on killed children that end late."""
        self._loop = loop
        self.bury()

    def start(
        self, proc: Proc, open_log: "Callable[[str], socket.socket]", title: str = ""
    ) -> tuple[Child, socket.socket]:
        """Start one child.  Return it and our end of its channel.  Raises HostError or VmdError.

        `open_log` makes the socket that a process of that name logs to.
        """
        self.bury()
        name = proc.name.lower()
        arguments = [name, log.form, str(log.verbosity)]
        try:
            ours, theirs = socketpair()
        except OSError as error:
            raise HostError(f"make a channel to {name}", error) from error
        if proc in SEND_NO_FILES:
            refuse_files(ours)
        fds: dict[int, int] = {}
        if proc is Proc.VMM and self._lock is not None and (lock_fd := self._lock.share()) >= 0:
            fds[LOCK_FD] = lock_fd
        try:
            with theirs, open_log(name) as writer:
                child = spawn(
                    title or name,
                    arguments,
                    channel=theirs,
                    fds=fds,
                    log_fd=writer.fileno(),
                    place=self._places[proc],
                    outlives=proc in OUTLIVE_US,
                )
        except BaseException:
            ours.close()
            raise
        finally:
            close_all(fds.values())
        if proc is not Proc.VMM:  # there may be several vmms
            self._present[proc] = child
        self._children.append(child)
        return child, ours

    def adopt(self, child: Child) -> None:
        """Take over a process that an earlier daemon has started, and that has to end with this one."""
        self._children.append(child)

    def make_groups(self, vmm: int) -> "groups.Groups | None":
        """Return the control groups for the VMs of a vmm, or None where the host has none."""
        if self._groups_place is None:
            return None
        try:
            made = self._groups_place.groups(vmm)
        except VmdError as error:
            warn_of_groups(error)
            return None
        if not made.limited:
            # The limit on the processes of a user id (RLIMIT_NPROC) holds instead.
            say = log.info if self.ids is not None else log.warn
            say(f"{made.top}: has no controller {groups.CONTROLLER}: tasks of VMs are not limited by it")
        return made

    def adopt_groups(self, top: str, *, limited: bool) -> "groups.Groups | None":
        """Return the control groups that an earlier daemon has made; None if there are none."""
        if not top or self._groups_place is None:
            return None
        self._groups_place.adopt(top)
        return groups.Groups(top, limited=limited)

    def start_probe(
        self, open_log: "Callable[[str], socket.socket]", *, entry: str = IMGPROBE_ENTRY, title: str = "imgprobe"
    ) -> tuple[Child, socket.socket]:
        """Start an imgprobe or another probe.  Return it and our end of its socket.  Raises HostError or VmdError."""
        self.bury()
        with open_log(title) as writer:
            child, ours = start_probe(self.cell, writer.fileno(), entry=entry, title=title)
        self._children.append(child)
        return child, ours

    def start_log_file(
        self, open_log: "Callable[[str], socket.socket]", name: str, arguments: "Sequence[str]", fds: "dict[int, int]"
    ) -> Child:
        """Start a logfile for the VM `name`.  The caller keeps the descriptors.  Raises HostError or VmdError."""
        self.bury()
        title, place = f"logfile/{name}", self._places[Proc.OPENER]
        with open_log(title) as writer:
            child = spawn(title, arguments, fds=fds, log_fd=writer.fileno(), place=place, entry=LOGFILE_ENTRY)
        self._children.append(child)
        return child

    def bury(self) -> None:
        """Reap the children that have ended.  Look again later for killed ones that have not."""
        self._left = [pid for pid in self._left if is_left(pid)]
        self._children = [child for child in self._children if child.reap() is None]
        if self._loop is not None and not self._late_s and self._is_late():
            self._look_again(self._loop, LATE_S)

    def _is_late(self) -> bool:
        return bool(self._left) or any(child.killed for child in self._children)

    def _look_again(self, loop: "Loop", delay_s: float) -> None:
        """Plan another look.  Storage or a busy host may delay a process for long, so the delay doubles each time."""

        def look() -> None:
            self.bury()
            self._late_s = 0.0
            if self._is_late():
                self._look_again(loop, min(2 * delay_s, LATEST_S))

        self._late_s = delay_s
        loop.call_later(delay_s, look)

    def kill(self, proc: Proc) -> None:
        """Kill the child of a kind, if there is one."""
        child = self._present.pop(proc, None)
        if child is not None:
            child.kill()

    def ended_well(self, proc: Proc) -> bool:
        """Return whether the last child of a kind has ended with status 0."""
        child = self._present.get(proc)
        return child is not None and child.status == 0

    def are_ours(self, caller: Caller) -> bool:
        """Return whether a client is one of the daemon's own processes, which may not use the control socket."""
        ours = caller.uid == self._uid or caller.uid in self._own_ids
        return ours or any(child.pid == caller.pid for child in self._children)

    def reap(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for all children to end.  Kill the rest, and wait once more.

        priv gets PRIV_ENDS_S: it removes the interfaces of every VM before it ends.
        """
        began_s = time.monotonic()
        patience_s = {self._present.get(Proc.PRIV): PRIV_ENDS_S}

        def left_s(child: Child) -> float:
            return max(0.0, began_s + patience_s.get(child, timeout_s) - time.monotonic())

        late = [child for child in self._children if child.reap(left_s(child)) is None]
        for child in late:
            log.warn(f"{child.title} does not end; killing it")
            child.kill()
        deadline_s = time.monotonic() + timeout_s
        # A process that waits for dead storage cannot be reaped, and is left behind.
        self._children = [child for child in late if child.reap(max(0.0, deadline_s - time.monotonic())) is None]
        if self._groups_place is not None:
            self._groups_place.close()


def is_left(pid: int) -> bool:
    """Return whether a child of the earlier program in this process still runs.  Reap it if it has ended."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def group_place() -> "groups.Scope | groups.Below | None":
    """Return where control groups can be made; None, with a warning, if this host has no such place."""
    try:
        return groups.place()
    except HostError as error:
        warn_of_groups(error)
        return None


def warn_of_groups(error: VmdError) -> None:
    """Warn that there are no control groups."""
    log.warn(f"{error}: VMs have no control groups of their own")


def vmm_place(cell: Cell, first_id: int) -> Cell:
    """Return where vmm runs, and give the cell its ids.  Warn of each namespace that this host does not have."""
    users_fd, own_pids = None, True
    try:
        users_fd = user_namespace(first_id)
        cell.ids = Ids(first_id)
    except HostError as error:
        log.warn(f"{error}: all VMs run as one user of the host, and their processes could signal each other")
    try:
        linux.old_pids(linux.new_pids())
    except HostError as error:
        log.warn(f"{error}: what runs below vmm could outlive the daemon")
        own_pids = False
    return VmmCell(cell, users_fd, own_pids=own_pids)
