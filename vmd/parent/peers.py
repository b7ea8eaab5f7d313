"""The channels to the parent's own processes: controls, vmm and priv."""

from vmd.closing import close_all
from vmd.ipc.imsg import NO_FDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Protocol

    from vmd.ipc.routes import Proc
    from vmd.record import Record

    class Peer(Protocol):
        """A channel, or a room that finds the right one of several channels for a message."""

        def send(
            self, message: Record, *, peerid: int = 0, fds: "Mapping[str, Sequence[int]]" = NO_FDS
        ) -> None:
            """Send a message, and take over its descriptors."""

        def flush_blocking(self, timeout_s: float) -> None:
            """Send what is queued before the daemon ends."""


class Peers:
    """Channels by process.  A message to a process that is gone is dropped."""

    def __init__(self) -> None:
        self.channels: dict[Proc, Peer] = {}

    def send(
        self, proc: "Proc", message: "Record", *, peerid: int = 0, fds: "Mapping[str, Sequence[int]]" = NO_FDS
    ) -> None:
        """Send a message, and take over its descriptors.  Raises ValueError if the message is too long."""
        channel = self.channels.get(proc)
        if channel is not None:
            channel.send(message, peerid=peerid, fds=fds)
            return
        for each in fds.values():
            close_all(each)

    def send_all(self, message: "Record") -> None:
        """Send a message to every process."""
        for proc in list(self.channels):
            self.send(proc, message)
