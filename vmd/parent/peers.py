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
        """A channel, or what finds one of several for the client that a message is for."""

        def send(
            self, message: Record, *, peerid: int = 0, fds: "Mapping[str, Sequence[int]]" = NO_FDS
        ) -> None:
            """Send a message; its descriptors are not the caller's any more."""

        def flush_blocking(self, timeout_s: float) -> None:
            """Send what is queued before we end."""


class Peers:
    """Channels by process; what is sent to a process that is gone is dropped."""

    def __init__(self) -> None:
        self.channels: dict[Proc, Peer] = {}

    def send(
        self, proc: "Proc", message: "Record", *, peerid: int = 0, fds: "Mapping[str, Sequence[int]]" = NO_FDS
    ) -> None:
        """Send a message; its descriptors are not the caller's any more.  Raises ValueError if it is too long."""
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
