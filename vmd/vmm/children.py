"""The VM processes of vmm: one per VM, and one in reserve."""

import os
import select
import signal
import socket
import time
from collections import Counter

from vmd.closing import close
from vmd.errors import PeerError
from vmd.ipc.channel import Channel
from vmd.ipc.messages import BY_CLASS, AskResolvers, Outcome, TransferProgress, VmFailed, VmRunning
from vmd.log import RateLimit
from vmd.privsep.spawn import signal_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from vmd.ipc.loop import Loop
    from vmd.record import Record

# What a VM process says on its own, or again and again: how much at once, and then in a second.  More is not passed on.
BUDGETS: "dict[type[Any], tuple[int, float]]" = {AskResolvers: (16, 4.0), TransferProgress: (1, 10.0)}
UNASKED = 64, 16.0  # ... of all this and last words together; a process that says more is cut off


class Slot:
    """What a VM process is given before it exists: a user id, and a control group."""

    def __init__(self, uid: int = 0, group: int = 0, group_fd: int = -1) -> None:
        """`uid` 0: ours.  `group` is the parent's number; `group_fd` leads into the group, and is ours to close."""
        self.uid = uid
        self.group = group
        self.group_fd = group_fd

    def close(self) -> None:
        """Be of no use for another process."""
        if self.group_fd >= 0:
            close(self.group_fd)
            self.group_fd = -1


class VmChild:
    """A VM process; `vmid` is 0 while it waits in reserve."""

    def __init__(
        self, pid: int, pidfd: int, channel: Channel, log: socket.socket | None = None, slot: Slot | None = None
    ) -> None:
        """`log` is what its lines come out of."""
        self.pid = pid
        self.pidfd = pidfd
        self.channel = channel
        self.log = log
        self.slot = slot or Slot()
        self.vmid = 0
        self.gone = False
        self.awaited: Counter[tuple[type[Any], ...]] = Counter()  # answers, any of which will do
        self.budgets = {cls: RateLimit(at_once, 1 / per_s) for cls, (at_once, per_s) in BUDGETS.items()}
        self.unasked = RateLimit(UNASKED[0], 1 / UNASKED[1])
        self.reported = False  # how its start went
        self.last_words = ""

    def kill(self) -> None:
        """End the process without asking it; harmless when it is gone."""
        if not self.gone:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def expect(self, message: "Record") -> None:
        """Note what is going to be answered."""
        answers = BY_CLASS[type(message)].answers
        if answers:
            self.awaited[answers] += 1

    def account(self, message: "Record") -> bool:
        """Return whether a message is worth passing on.

        Raises PeerError for an answer that nobody asked for, and for too much of anything else.
        """
        cls = type(message)
        info = BY_CLASS[cls]
        if (info.partial or not info.is_answer) and not self.unasked.allow():
            raise PeerError(self.channel.label, f"sends more than {UNASKED[1]:.0f} messages a second unasked")
        if info.is_answer:
            answers = next((answers for answers, count in self.awaited.items() if count and cls in answers), None)
            if answers is None and not info.partial:  # which may be late
                raise PeerError(self.channel.label, f"answers with {cls.__name__}, which was not requested")
            if answers is None:
                return False
            if not info.partial:
                self.awaited[answers] -= 1
        self.reported |= isinstance(message, VmRunning | VmFailed)
        budget = self.budgets.get(cls)
        return budget is None or budget.allow()


def end_all(children: "Sequence[VmChild]", timeout_s: float) -> None:
    """Kill processes and wait for their ends, which without a pid namespace our own does not bring."""
    for child in children:
        child.kill()
    deadline_s = time.monotonic() + timeout_s
    for child in children:
        ended = select.poll()
        ended.register(child.pidfd, select.POLLIN)
        if not child.gone and ended.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
            child.gone = True


class Reaper:
    """Collects exit statuses: of VM processes, and of what they leave behind, whose parent pid 1 becomes."""

    def __init__(self, loop: "Loop", on_exit: "Callable[[VmChild, Outcome, str], None]") -> None:
        """`on_exit(child, outcome, how)` is called once, when a process that is watched is gone and reaped."""
        self.on_exit = on_exit
        self.watched: dict[int, VmChild] = {}  # by pid
        loop.on_signal(signal.SIGCHLD, self.reap)

    def watch(self, child: VmChild) -> None:
        """Wait for the end of a process that was started since the loop went on."""
        self.watched[child.pid] = child

    def reap(self) -> None:
        """Reap whatever has ended; one signal may stand for many."""
        while (ended := wait_any()) is not None:
            child = self.watched.pop(ended.si_pid, None)
            if child is not None:
                close(child.pidfd)
                child.gone = True
                self.on_exit(child, *judge(ended.si_code, ended.si_status))


def wait_any() -> "os.waitid_result | None":
    """Reap a child that has ended and return how; None if there is none."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None


def judge(code: int, status: int) -> tuple[Outcome, str]:
    """Return what the end of a VM process means, from waitid's si_code and si_status."""
    if code != os.CLD_EXITED:
        return Outcome.KILLED, f"vm process was killed by {signal_name(status)}"
    if status in (Outcome.POWER_OFF, Outcome.REBOOT, Outcome.ENDED):
        return Outcome(status), ""
    return Outcome.FAILED, f"vm process exited with status {status}"
