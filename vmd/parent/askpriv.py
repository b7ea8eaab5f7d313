"""The line to priv: whether it may be asked, how many answers it owes us, and whether it still gives any.

priv may end, or be stopped, while guests run on the taps that it made.  Then it is started again in place: the new one
is first told of these taps (`Network.begin`), and only after that of anything else.
"""

import socket

from vmd.ipc.imsg import MAX_MESSAGE, NO_FDS, encode
from vmd.ipc.messages.children import Quit
from vmd.ipc.messages.priv import ConfigureNetwork
from vmd.ipc.routes import Proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmd.ipc.loop import Timer
    from vmd.parent.core import Core
    from vmd.record import Record

ANSWER_S = 30.0  # longer than priv waits for an nft that hangs
LAST_S = 20.0  # ... when the daemon has to end


class AskPriv:
    """What is sent to priv goes this way."""

    def __init__(self, core: "Core") -> None:
        self.core = core
        self.up = False  # it knows what there is
        self.owed = 0  # answers
        self.heard = 0  # answers so far
        self.timer: Timer | None = None
        self.on_silent: Callable[[], None] = lambda: None  # called when it owes an answer and gives none

    def send(self, message: "Record") -> None:
        """Send what has no answer; without priv it is dropped."""
        self.core.peers.send(Proc.PRIV, message)

    def ask(self, message: "Record", fds: "Mapping[str, Sequence[int]]" = NO_FDS) -> None:
        """Send what has an answer, which shall be heard within `ANSWER_S` of the one before."""
        self.owed += 1
        if self.timer is None:
            self._watch()
        self.core.peers.send(Proc.PRIV, message, fds=fds)

    def answered(self) -> None:
        """It has given an answer."""
        self.heard += 1
        self.owed = max(0, self.owed - 1)
        self._watch()

    def lost(self) -> None:
        """It is gone, and will answer nothing."""
        self.up, self.owed = False, 0
        self._watch()

    def _watch(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.core.loop.call_later(ANSWER_S, self._silent) if self.owed else None

    def _silent(self) -> None:
        self.timer = None
        self.on_silent()


def remove_all(sock: socket.socket) -> None:
    """Have a priv that has just been started remove what its predecessors have made, and end.

    `sock` is our end of its channel.  To be called when nobody is served any more, for this waits.  Raises OSError.
    """
    sock.settimeout(LAST_S)
    for message in (ConfigureNetwork(nat=False), Quit()):
        sock.recv(MAX_MESSAGE)  # that it is ready, and that it has done so
        sock.send(encode(message)[0])
