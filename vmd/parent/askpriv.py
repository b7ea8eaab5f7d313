"""The line to priv: whether priv can be asked, how many answers are outstanding, and whether priv still answers.

priv may end or hang while guests use the taps that it has made.  Then another priv is started.  It is told about these
taps first (`Network.begin`), before any other request.
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

ANSWER_S = 30.0  # for the next answer; longer than priv waits for an nft that hangs
LAST_S = 20.0  # for an answer when the daemon ends


class AskPriv:
    """Sends messages to priv, and watches for its answers."""

    def __init__(self, core: "Core") -> None:
        self.core = core
        self.up = False  # priv was told about all interfaces, and takes requests
        self.outstanding = 0  # answers still to come
        self.answers = 0  # answers so far
        self.timer: Timer | None = None
        self.on_silent: Callable[[], None] = lambda: None  # called when an answer is overdue

    def send(self, message: "Record") -> None:
        """Send a message that has no answer.  Without a priv it is dropped."""
        self.core.peers.send(Proc.PRIV, message)

    def ask(self, message: "Record", fds: "Mapping[str, Sequence[int]]" = NO_FDS) -> None:
        """Send a message that has an answer, which is expected within ANSWER_S of the answer before."""
        self.outstanding += 1
        if self.timer is None:
            self._watch()
        self.core.peers.send(Proc.PRIV, message, fds=fds)

    def answered(self) -> None:
        """An answer has arrived."""
        self.answers += 1
        self.outstanding = max(0, self.outstanding - 1)
        self._watch()

    def lost(self) -> None:
        """priv has ended: no answer is outstanding."""
        self.up, self.outstanding = False, 0
        self._watch()

    def _watch(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.core.loop.call_later(ANSWER_S, self._silent) if self.outstanding else None

    def _silent(self) -> None:
        self.timer = None
        self.on_silent()


def remove_all(sock: socket.socket) -> None:
    """Let a new priv remove everything that earlier ones have made, and end.

    `sock` is the parent's end of its channel.  This blocks, so it is called only after all else.  Raises OSError.
    """
    sock.settimeout(LAST_S)
    for message in (ConfigureNetwork(nat=False), Quit()):
        sock.recv(MAX_MESSAGE)  # Ready, and then NetworkConfigured
        sock.send(encode(message)[0])
