"""The VM processes of vmm: one per VM, and one in reserve."""

import os
import signal
import time

from vmd.closing import close
from vmd.errors import PeerError
from vmd.ipc.channel import Channel
from vmd.ipc.messages import (
    AskDevices,
    AskResolvers,
    ConsoleSnapshot,
    ConsoleSnapshotEnd,
    DevicesReported,
    Outcome,
    PauseDone,
    PauseVm,
    ReceivedHeader,
    ReceivedMachine,
    ReceiveVm,
    SendDone,
    SendVm,
    TransferProgress,
)
from vmd.privsep.spawn import signal_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from vmd.ipc.loop import Loop
    from vmd.record import Record, RecordType

PROGRESS_MIN_S = 0.1  # what comes faster is not passed on
ASKS_MAX, ASKS_PER_S = 16.0, 4.0  # for name servers: at once, and then; what is more is not passed on


class VmChild:
    """A VM process; `vmid` is 0 while it waits in reserve."""

    def __init__(self, pid: int, pidfd: int, channel: Channel) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.channel = channel
        self.vmid = 0
        self.gone = False
        self.reported = False  # how its start went
        self.snapshots = 0  # of its console, asked for and not complete
        self.pauses = 0  # asked for, or their ends, and not answered
        self.sends = 0  # as well
        self.reports = 0  # of devices, as well
        self.receiving: list[RecordType] = []  # what it has to say of the stream that it reads
        self.progress_s = 0.0  # when it last told of progress
        self.asks = ASKS_MAX  # for name servers, that it may have at once
        self.asked_s = 0.0
        self.last_words = ""

    def kill(self) -> None:
        """End the process without asking it; harmless when it is gone."""
        if not self.gone:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def expect(self, message: "Record") -> None:
        """Note what is going to be answered."""
        self.snapshots += isinstance(message, ConsoleSnapshot)
        self.pauses += isinstance(message, PauseVm)
        self.sends += isinstance(message, SendVm)
        self.reports += isinstance(message, AskDevices)
        if isinstance(message, ReceiveVm):
            self.receiving = [ReceivedHeader, ReceivedMachine]

    def account(self, message: "Record") -> bool:
        """Return whether a message is worth passing on; PeerError for what nobody asked this VM process to say."""
        if isinstance(message, ConsoleSnapshotEnd):
            if not self.snapshots:
                self.unasked("a console")
            self.snapshots -= 1
        elif isinstance(message, PauseDone):
            if not self.pauses:
                self.unasked("a pause")
            self.pauses -= 1
        elif isinstance(message, SendDone):
            if not self.sends:
                self.unasked("a stream")
            self.sends -= 1
        elif isinstance(message, DevicesReported):
            if not self.reports:
                self.unasked("a report of its devices")
            self.reports -= 1
        elif isinstance(message, AskResolvers):
            now_s = time.monotonic()
            self.asks = min(ASKS_MAX, self.asks + (now_s - self.asked_s) * ASKS_PER_S)
            self.asked_s = now_s
            if self.asks < 1:
                return False
            self.asks -= 1
        elif isinstance(message, TransferProgress):
            now_s = time.monotonic()
            if now_s < self.progress_s + PROGRESS_MIN_S:
                return False
            self.progress_s = now_s
        elif isinstance(message, ReceivedHeader | ReceivedMachine):
            if self.receiving[:1] != [type(message)]:
                self.unasked("a stream")
            del self.receiving[0]
        else:
            if self.reported:
                raise PeerError(self.channel.label, "reports its start twice")
            self.reported = True
        return True

    def unasked(self, what: str) -> "NoReturn":
        """Raise PeerError."""
        raise PeerError(self.channel.label, f"speaks of {what} nobody asked for")

    def end(self) -> None:
        """Kill the process and wait for its end, so that nothing is left for init."""
        if not self.gone:
            self.kill()
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            self.gone = True


class Reaper:
    """Collects exit statuses through pidfds, so that no signal is raced."""

    def __init__(self, loop: "Loop") -> None:
        self.loop = loop

    def watch(self, child: VmChild, on_exit: "Callable[[VmChild, Outcome, str], None]") -> None:
        """Call `on_exit(child, outcome, how)` once, when the process is gone and reaped."""

        def reap(_events: int) -> None:
            result = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOHANG)
            if result is None:
                return
            self.loop.remove(child.pidfd)
            close(child.pidfd)
            child.gone = True
            on_exit(child, *judge(result.si_code, result.si_status))

        self.loop.add(child.pidfd, reap)


def judge(code: int, status: int) -> tuple[Outcome, str]:
    """Return what the end of a VM process means, from waitid's si_code and si_status."""
    if code != os.CLD_EXITED:
        return Outcome.KILLED, f"vm process was killed by {signal_name(status)}"
    if status in (Outcome.POWER_OFF, Outcome.REBOOT, Outcome.ENDED):
        return Outcome(status), ""
    return Outcome.FAILED, f"vm process exited with status {status}"
