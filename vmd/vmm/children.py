"""The VM processes of vmm: one for each VM, and one in reserve."""

import os
import select
import time
from collections import Counter

from vmd import signals as signal
from vmd.closing import close, close_all
from vmd.errors import PeerError
from vmd.ipc import sockets as socket
from vmd.ipc.channel import Channel
from vmd.ipc.messages.shared import TransferProgress
from vmd.ipc.messages.vm import (
    AskResolvers,
    ConsoleSnapshot,
    DeviceEvent,
    DevicesReported,
    DisksBack,
    DisksLent,
    DisksLetGo,
    EndSend,
    LendDisks,
    LetDisksGo,
    Outcome,
    PauseDone,
    ReceivedMachine,
    ReceiveVm,
    ResumeReceived,
    SendDone,
    SendUndone,
    SendVm,
    StartVm,
    StopVm,
    TakeDisksBack,
    TakenBack,
    VmFailed,
    VmHalted,
    VmRunning,
)
from vmd.ipc.messages.vmm import VmHeld
from vmd.ipc.routes import BY_CLASS
from vmd.log import RateLimit, log
from vmd.signals import name_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from vmd.ipc.loop import Loop
    from vmd.record import Record

# Messages that a VM process sends unrequested or repeatedly: how many at once, and how many a second after that.
# Further ones are not passed on.
BUDGETS: "dict[type[Any], tuple[int, float]]" = {
    AskResolvers: (16, 4.0), DeviceEvent: (16, 1.0), TransferProgress: (1, 10.0),
}  # fmt: skip
# Descriptors that the next parent needs, if there is one.  Copies are kept as long as the VM is known.
KEPT = ("tty", "tty_slave", "shown", "memory", "log", "boot", "initrd", "taps", "figures", "seed")
# Answers that only clients wait for.  When the parent has gone, no client is connected any more.
OF_A_CLIENT = (BY_CLASS[ConsoleSnapshot].answers, (DevicesReported,))
SPARES_MAX = 4  # device processes that are started before their VM is known
USUAL_DEVICES = ["vionet.main", "vioblk.raw"]  # device processes of the first process in reserve
UNASKED = 64, 16.0  # unrequested messages of all kinds, at once and a second; a process that sends more is killed


def device_words(message: StartVm) -> list[str]:
    """Return the device processes of a VM (`vm/kinds.py`).  The next VM probably needs the same ones."""
    nics = ["vionet.kernel" if nic.vhost else "vionet.main" for nic in message.nics]
    formats = [[image.format for image in disk.images] for disk in message.disks]
    return [*nics, *("vioblk.raw" if each == ["raw"] else "vioblk.main" for each in formats)][:SPARES_MAX]


class Slot:
    """The user id and control group of a VM process.  The parent gives them before the process is started."""

    def __init__(self, uid: int = 0, group: int = 0, group_fd: int = -1) -> None:
        """`uid` 0: that of vmm.  `group` is its number in the parent; `group_fd` opens it, and is closed here."""
        self.uid = uid
        self.group = group
        self.group_fd = group_fd

    def close(self) -> None:
        """Close the descriptor of the group.  The slot cannot be used for a process after that."""
        if self.group_fd >= 0:
            close(self.group_fd)
            self.group_fd = -1


class VmChild:
    """A VM process; `vmid` is 0 while it waits in reserve."""

    def __init__(
        self, pid: int, pidfd: int, channel: Channel, log: socket.socket | None = None, slot: Slot | None = None
    ) -> None:
        """`log` is the reading end of its log."""
        self.pid = pid
        self.pidfd = pidfd
        self.channel = channel
        self.log = log
        self.slot = slot or Slot()
        self.vmid = 0
        self.gone = False
        self.awaited: Counter[tuple[type[Any], ...]] = Counter()  # unanswered requests, by their possible answers
        self.budgets = {cls: RateLimit(at_once, 1 / per_s) for cls, (at_once, per_s) in BUDGETS.items()}
        self.unasked = RateLimit(UNASKED[0], 1 / UNASKED[1])
        self.stale: Counter[tuple[type[Any], ...]] = Counter()  # of these, the requests of a parent that is gone
        self.reported = False  # it has said whether its start succeeded
        self.last_words = ""
        self.held = VmHeld(vmid=0)
        self.kept: dict[str, list[int]] = {}

    def kill(self) -> None:
        """Send SIGKILL to the process, unless it was reaped."""
        if not self.gone:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def keep(self, fds: "Mapping[str, Sequence[int]]") -> None:
        """Keep copies of descriptors of KEPT for the next parent."""
        for name in set(KEPT).intersection(fds):
            if not fds[name]:
                continue
            copies: list[int] = []
            try:
                copies += (os.dup(fd) for fd in fds[name])
            except OSError as error:
                close_all(copies)
                log.warn(f"{self.channel.label}: {name} is not kept for another daemon: {error.strerror}")
                continue
            close_all(self.kept.pop(name, ()))
            self.kept[name] = copies

    def drop(self, *names: str) -> None:
        """Close kept descriptors: those of these names, or all."""
        for name in names or tuple(self.kept):
            close_all(self.kept.pop(name, ()))

    def become(self, message: "Record") -> None:
        """Update the known state of the VM by a message to it or from it."""
        held = self.held
        if isinstance(message, ReceiveVm):
            held = held.replace(arriving=True)
        elif isinstance(message, ResumeReceived):
            held = held.replace(resumed=True)
        elif isinstance(message, SendVm):
            held = held.replace(
                sending=True, keep=message.keep, two_way=message.two_way, written=False, let_go=False
            )
        elif isinstance(message, LetDisksGo):
            held = held.replace(letting_go=True)
        elif isinstance(message, EndSend):
            held = held.replace(stopping=held.stopping or message.sent, undoing=not message.sent)
        elif isinstance(message, StopVm):
            held = held.replace(stopping=True)
        elif isinstance(message, LendDisks):
            held = held.replace(lending=held.lending or not message.look)
        elif isinstance(message, DisksLent):
            held = held.replace(lent=held.lending)
        elif isinstance(message, TakeDisksBack):
            held = held.replace(returning=held.lent)
        elif isinstance(message, DisksBack):
            held = held.replace(lending=False, lent=False, returning=False)
        elif isinstance(message, VmRunning):
            held = held.replace(running=True, paused=message.paused, arriving=False)
        elif isinstance(message, VmHalted):
            held = held.replace(paused=True)
        elif isinstance(message, PauseDone):
            held = held.replace(paused=message.paused)
        elif isinstance(message, SendDone):
            written = held.two_way and not message.text
            held = held.replace(sending=written, written=written)
        elif isinstance(message, DisksLetGo):
            held = held.replace(letting_go=False, let_go=not message.text)
        elif isinstance(message, SendUndone):
            back = message.outcome is TakenBack.DONE
            held = held.replace(undoing=False, sending=not back, let_go=held.let_go and not back)
        elif isinstance(message, ReceivedMachine):
            held = held.replace(complete=True)
        self.held = held

    def expect(self, message: "Record") -> None:
        """Note that a request will be answered."""
        answers = BY_CLASS[type(message)].answers
        if answers:
            self.awaited[answers] += 1

    def account(self, message: "Record") -> bool:
        """Return whether a message has to be passed on.

        Raises PeerError for an answer that was not requested, and for too many other messages.
        """
        cls = type(message)
        info = BY_CLASS[cls]
        if (info.partial or not info.is_answer) and not self.unasked.allow():
            raise PeerError(self.channel.label, f"sends more than {UNASKED[1]:.0f} messages a second unasked")
        if info.is_answer:
            answers = next((answers for answers, count in self.awaited.items() if count and cls in answers), None)
            if answers is None and not info.partial:  # a partial answer may come late
                raise PeerError(self.channel.label, f"answers with {cls.__name__}, which was not requested")
            if answers is None:
                return False
            if not info.partial:
                self.awaited[answers] -= 1
                if self.stale[answers]:
                    self.stale[answers] -= 1
                    return False
        self.reported |= isinstance(message, VmRunning | VmFailed)
        budget = self.budgets.get(cls)
        return budget is None or budget.allow()


    def forget_questions(self) -> None:
        """The parent is gone, and its clients with it: do not pass on the answers to their requests."""
        for answers in OF_A_CLIENT:
            self.stale[answers] = self.awaited[answers]


def end_all(children: "Sequence[VmChild]", timeout_s: float) -> None:
    """Kill processes and wait for their end.  Without a pid namespace they would outlive vmm."""
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
    """Reaps VM processes, and their children that outlive them.  As pid 1, vmm becomes the parent of these."""

    def __init__(self, loop: "Loop", on_exit: "Callable[[VmChild, Outcome, str], None]") -> None:
        """`on_exit(child, outcome, how)` is called once for a watched process, when it was reaped."""
        self.on_exit = on_exit
        self.watched: dict[int, VmChild] = {}  # by pid
        loop.on_signal(signal.SIGCHLD, self.reap)

    def watch(self, child: VmChild) -> None:
        """Watch a process.  Must be called in the turn of the loop in which the process was started."""
        self.watched[child.pid] = child

    def reap(self) -> None:
        """Reap all processes that have ended.  One SIGCHLD may stand for several."""
        while (ended := wait_any()) is not None:
            child = self.watched.pop(ended.si_pid, None)
            if child is not None:
                child.gone = True
                self.on_exit(child, *judge(ended.si_code, ended.si_status))
                close(child.pidfd)  # after on_exit, which passes the last messages on, and this descriptor with them


def wait_any() -> "os.waitid_result | None":
    """Reap one child that has ended and return its status; None if there is none."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None


def judge(code: int, status: int) -> tuple[Outcome, str]:
    """Return the outcome of a VM process and a sentence, from waitid's si_code and si_status."""
    if code != os.CLD_EXITED:
        return Outcome.KILLED, f"vm process was killed by {name_of(status)}"
    if status in (Outcome.POWER_OFF, Outcome.REBOOT, Outcome.ENDED):
        return Outcome(status), ""
    return Outcome.FAILED, f"vm process exited with status {status}"
