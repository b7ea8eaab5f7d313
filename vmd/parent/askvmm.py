"""The line to vmm: whether it still serves what is sent to it.

vmm cannot be replaced: every VM ends with it.  When it is stopped or hangs, guests run on, and only what is asked of
vmm waits.  So behind a message goes a question whether vmm is there, and those who wait for vmm are told when it does
not answer.
"""

from vmd.ipc.imsg import NO_FDS
from vmd.ipc.messages.children import Ping
from vmd.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmd.ipc.channel import Channel
    from vmd.ipc.loop import Loop, Timer
    from vmd.record import Record

LOOK_S = 5.0  # between two looks at whether it has answered
LOOKS_MAX = 6  # so many without an answer: several, so that a host that stood still counts as one
SILENT = f"vmm does not answer for {LOOKS_MAX * LOOK_S:.0f} s"


class LineToVmm:
    """To the others it is the channel to vmm (`Peers`)."""

    def __init__(self, loop: "Loop", channel: "Channel", on_silent: "Callable[[], None]") -> None:
        """`on_silent` is called when vmm does not answer, and again at each later look for as long as it does not."""
        self.channel = channel
        self._loop = loop
        self._on_silent = on_silent
        self._timer: Timer | None = None  # runs while there is something to find out
        self._looks = 0  # since it was asked
        self._behind = False  # something was sent after the question

    def send(self, message: "Record", *, peerid: int = 0, fds: "Mapping[str, Sequence[int]]" = NO_FDS) -> None:
        """Send a message; its descriptors are not the caller's any more.  Raises ValueError if it is too long."""
        self.channel.send(message, peerid=peerid, fds=fds)
        self._behind = True
        if self._timer is None:
            self._ask()

    def flush_blocking(self, timeout_s: float) -> None:
        """Send what is queued before we end."""
        self.channel.flush_blocking(timeout_s)

    def on_pong(self) -> None:
        """It has served everything up to the question."""
        if self._timer is None:
            return  # nobody has asked
        if self._looks >= LOOKS_MAX:
            log.warn("vmm answers again")
        self._timer.cancel()
        self._timer = self._loop.call_later(LOOK_S, self._ask) if self._behind else None

    def _ask(self) -> None:
        self._looks, self._behind = 0, False
        self.channel.send(Ping())
        self._timer = self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        """It has not answered so far."""
        if self.channel.closed:
            return
        self._timer = self._loop.call_later(LOOK_S, self._look)
        self._looks += 1
        if self._looks == LOOKS_MAX:
            log.error(f"{SILENT}: guests run on, but none starts or ends")
        if self._looks >= LOOKS_MAX:
            self._on_silent()
