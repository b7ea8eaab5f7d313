"""The packet socket on the tap: it receives the frames that this process needs while the kernel moves them (vhost-net).

The socket has a locked filter (`parent/vhost.py`), which lets few frames of the guest through.  On a `local` interface
these are DHCP and router solicitations, which filters on the tap keep from the host.  On other interfaces they are the
frames that tell an address of the guest.  Frames sent on the socket go to the guest.  Everything here runs on the main
thread.
"""

import posix as os

from vmd.devices.vionet.addresses import LOOK_BYTES
from vmd.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.devices.vionet.addresses import Addresses
    from vmd.devices.vionet.local import LocalNetwork

    class Services(Protocol):
        """The part of the process that is used here."""

        def watch(self, fd: int, handler: Callable[[], None]) -> None:
            """Call `handler` when `fd` is readable."""

        def unwatch(self, fd: int) -> None:
            """Stop watching `fd`."""


HEADER = spec.NET_HDR_BYTES_LEGACY  # size of the headers of PACKET_VNET_HDR; it does not depend on the driver
NO_HEADER = bytes(HEADER)
BUDGET = 16  # frames of one wake-up
FRAME_MAX = 65536
STALE_MAX = 4096  # frames; more than the socket's buffer has room for


class Packets:
    """The socket.  Owns the descriptor.  Frames are ignored until `begin`."""

    def __init__(
        self,
        fd: int,
        services: "Services",
        local: "LocalNetwork | None",
        addresses: "Addresses",
        answered: "Callable[[], None]",
        failed: "Callable[[], None]",
    ) -> None:
        """`answered` is called for each frame that was answered, `failed` when the tap may be down or gone."""
        self.fd = fd
        self.services = services
        self.local = local
        self.addresses = addresses
        self.answered = answered
        self.failed = failed
        self.serving = False
        os.set_blocking(fd, False)

    def begin(self) -> None:
        """Start to take frames, because the kernel is about to move them.

        Frames that wait in the socket are dropped: our own thread has seen them in the ring.
        """
        if not self.serving:
            for _ in range(STALE_MAX):
                if self._read() is None:
                    break
            self.serving = True
            self.services.watch(self.fd, self.on_readable)

    def end(self) -> None:
        """Take the frames that the kernel has moved until now, then stop.  Our own thread sees the next ones."""
        if self.serving:
            self._look(STALE_MAX)
            self.serving = False
            self.services.unwatch(self.fd)

    def send(self, frame: bytes) -> bool:
        """Send a frame to the guest.  Returns False if the tap does not take it."""
        try:
            os.write(self.fd, NO_HEADER + frame)
        except OSError:
            return False
        return True

    def on_readable(self) -> None:
        """Take frames of the guest, up to BUDGET."""
        if self.serving:
            self._look(BUDGET)

    def _look(self, budget: int) -> None:
        for _ in range(budget):
            packet = self._read()
            if packet is None:
                return
            frame = packet[HEADER:]
            if self.local is None:
                self.addresses.learn(frame[:LOOK_BYTES])
            elif (
                len(frame) <= self.local.frame_max
                and self.local.concerns(frame)
                and self.local.answer(frame, bool(packet[0] & spec.VIRTIO_NET_HDR_F_NEEDS_CSUM))
            ):
                self.answered()

    def _read(self) -> bytes | None:
        """Return the next frame with its header; b"" after an error that the read has cleared; None without a frame."""
        try:
            return os.read(self.fd, FRAME_MAX)
        except BlockingIOError:
            return None
        except OSError:  # the tap went down, for example; the socket reports an error once
            self.failed()
            return b""
