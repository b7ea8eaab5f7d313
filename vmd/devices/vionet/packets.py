"""What the guest says to its host and we must hear, while the kernel moves its frames (vhost-net).

A packet socket on the tap, whose filter nobody can change any more (`parent/vhost.py`), hears little of what the guest
sends: of a `local` interface DHCP and router solicitations, which filters on the tap keep from the host; of others what
tells an address of the guest.  What is sent there goes to the guest.  All of this is the main thread's.
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
        """What of the process is used here."""

        def watch(self, fd: int, handler: Callable[[], None]) -> None:
            """Call back when there is something to read."""

        def unwatch(self, fd: int) -> None:
            """Call back no more."""


HEADER = spec.NET_HDR_BYTES_LEGACY  # PACKET_VNET_HDR has headers of this size, whatever the driver has
NO_HEADER = bytes(HEADER)
BUDGET = 16  # frames of one wake-up
FRAME_MAX = 65536
STALE_MAX = 4096  # more than its buffer has room for


class Packets:
    """The socket, which is ours from here on; silent until `begin`."""

    def __init__(
        self,
        fd: int,
        services: "Services",
        local: "LocalNetwork | None",
        addresses: "Addresses",
        answered: "Callable[[], None]",
        failed: "Callable[[], None]",
    ) -> None:
        """`answered` is called for each frame that was for us, `failed` when the tap may be down or gone."""
        self.fd = fd
        self.services = services
        self.local = local
        self.addresses = addresses
        self.answered = answered
        self.failed = failed
        self.serving = False
        os.set_blocking(fd, False)

    def begin(self) -> None:
        """Listen: the kernel moves the frames from now on.  What has come until now was seen elsewhere."""
        if not self.serving:
            for _ in range(STALE_MAX):
                if self._read() is None:
                    break
            self.serving = True
            self.services.watch(self.fd, self.on_readable)

    def end(self) -> None:
        """Listen no more, once all is heard that the kernel has moved: what comes now is seen elsewhere."""
        if self.serving:
            self._look(STALE_MAX)
            self.serving = False
            self.services.unwatch(self.fd)

    def send(self, frame: bytes) -> bool:
        """Send the guest a frame; False if its tap does not take it."""
        try:
            os.write(self.fd, NO_HEADER + frame)
        except OSError:
            return False
        return True

    def on_readable(self) -> None:
        """Look at what the guest has sent, up to a budget."""
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
        """Return the next frame with its header, b"" for an error that is over now; None if there is none."""
        try:
            return os.read(self.fd, FRAME_MAX)
        except BlockingIOError:
            return None
        except OSError:  # such as that the tap was switched off, which is said once
            self.failed()
            return b""
