"""The line to a vmm: sends messages, and checks that the vmm still handles them.

A vmm cannot be replaced, because all its VMs end with it.  If it is stopped or hangs, its guests run on; only requests
to it wait.  So messages are followed by a Ping, one every LOOK_S at most.  If the vmm does not answer it, the waiting
clients get an error.
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

LOOK_S = 5.0  # between two checks for an answer
LOOKS_MAX = 6  # checks without an answer; several, because a host that was suspended counts as one check only
SILENT = f"vmm does not answer for {LOOKS_MAX * LOOK_S:.0f} s"


class LineToVmm:
    """A channel to a vmm, for those that send to it (`Peers`)."""

    def __init__(self, loop: "Loop", channel: "Channel", on_silent: "Callable[[], None]") -> None:
        """`on_silent` is called when vmm does not answer, and again at each later check until it answers."""
        self.channel = channel
        self._loop = loop
        self._on_silent = on_silent
        self._timer: Timer | None = None  # runs while a Ping is not answered, and for LOOK_S after that
        self._looks = 0  # checks since the Ping
        self._behind = False  # a message was sent after the Ping

    def send(self, message: "Record", *, peerid: int = 0, fds: "Mapping[str, Sequence[int]]" = NO_FDS) -> None:
        """Send a message.  Owns its descriptors.  Raises ValueError if the message is too long."""
        self.channel.send(message, peerid=peerid, fds=fds)
        self._behind = True
        if self._timer is None:
            self._ask()

    def flush_blocking(self, timeout_s: float) -> None:
        """Send what is queued, before this process ends."""
        self.channel.flush_blocking(timeout_s)

    def on_pong(self) -> None:
        """The vmm has handled all messages before the Ping."""
        if self._timer is None:
            return  # no Ping was sent
        if self._looks >= LOOKS_MAX:
            log.warn("vmm answers again")
        self._timer.cancel()
        self._timer = self._loop.call_later(LOOK_S, self._ask) if self._behind else None

    def _ask(self) -> None:
        self._looks, self._behind = 0, False
        self.channel.send(Ping())
        self._timer = self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        """Check for an answer: there is none so far."""
        if self.channel.closed:
            return
        self._timer = self._loop.call_later(LOOK_S, self._look)
        self._looks += 1
        if self._looks == LOOKS_MAX:
            log.error(f"{SILENT}: guests run on, but none starts or ends")
        if self._looks >= LOOKS_MAX:
            self._on_silent()
