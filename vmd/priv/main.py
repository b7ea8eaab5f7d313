"""priv: the only process that may change the host's network.

Runs as  root, with CAP_NET_ADMIN and CAP_NET_RAW and nothing else; sees nft and /proc/sys/net
Peers    parent
Holds    nothing yet: network interfaces come with the network devices
"""

from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages import Proc, Quit, Ready, SetVerbosity
from vmd.ipc.process import Process
from vmd.log import log
from vmd.privsep.confine import PRIV, confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.process import Handlers


class Priv(Process):
    """Serves the parent."""

    def __init__(self) -> None:
        super().__init__(Proc.PRIV)
        self.parent = self.attach_parent(Proc.PARENT)

    def on_set_verbosity(self, message: SetVerbosity, _envelope: Envelope, _channel: Channel) -> None:
        """Log more or less."""
        log.verbosity = message.verbosity

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """End."""
        self.loop.stop()

    HANDLERS: "Handlers" = {
        (Proc.PARENT, SetVerbosity): on_set_verbosity,
        (Proc.PARENT, Quit): on_quit,
    }


def main() -> int:
    """Run process priv."""
    process = Priv()
    process.ignore_terminal_signals()
    process.parent.send(Ready(warnings=tuple(confine(PRIV))))
    process.loop.run()
    return process.exit_status
