"""The tap: its descriptor, two ioctl requests, and the meaning of its errors (linux/if_tun.h)."""

import errno
import fcntl
import posix as os
import select
from struct import Struct

from vmd.errors import HostError
from vmd.privsep.confine import TUNSETOFFLOAD, TUNSETVNETHDRSZ

TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8
INT = Struct("i")

GONE = frozenset({errno.EBADFD, errno.EBADF, errno.ENODEV, errno.ENXIO})  # the interface was deleted
DOWN = frozenset({errno.EIO})  # the interface exists, but is not up
WRITABLE = select.EPOLLOUT  # the kernel reports it only for an interface that is up
STALE_FRAMES_MAX = 4096  # more than any queue length that an administrator sets


class Tap:
    """An open tap, which prefixes frames with a virtio-net header.  Owns the descriptor.

    The thread that moves frames reads and writes `fd`.  The main thread does everything else.
    """

    def __init__(self, fd: int, name: str) -> None:
        """Raises HostError if `fd` is not a tap."""
        self.fd = fd
        self.name = name
        self.header = 10  # bytes before each frame
        os.set_blocking(fd, False)
        self.offloads = 0  # flags of TUNSETOFFLOAD that the tap supports
        for offloads in (
            TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6, TUN_F_CSUM,
        ):  # fmt: skip
            if self._accepts(offloads):
                self.offloads = offloads
                break
        self.configure(self.header, 0)

    def _accepts(self, offloads: int) -> bool:
        try:
            self._set_offload(offloads)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise HostError(self.name, error) from error
        return True

    def _set_offload(self, offloads: int) -> None:
        fcntl.ioctl(self.fd, TUNSETOFFLOAD, offloads)

    def _set_header(self, header: int) -> None:
        fcntl.ioctl(self.fd, TUNSETVNETHDRSZ, INT.pack(header))

    def configure(self, header: int, offloads: int) -> None:
        """Set the size of the header before each frame, and the offloads that the guest accepts.

        Raises:
            HostError: the interface is gone.
        """
        try:
            self._set_header(header)
            self.header = header
            self._set_offload(offloads)
        except OSError as error:
            raise HostError(self.name, error) from error

    def send(self, frame: bytes) -> bool:
        """Send a frame of this process as if it came from the guest.  Returns False if the tap does not take it."""
        try:
            os.write(self.fd, bytes(self.header) + frame)
        except OSError:
            return False
        return True

    def forget_frames(self) -> None:
        """Drop the frames that wait in the tap.

        They arrived with the offloads of the previous driver, which this driver may not accept.
        """
        waste = [bytearray(64)]
        try:
            for _ in range(STALE_FRAMES_MAX):
                os.readv(self.fd, waste)
        except OSError:
            return

    def is_up(self) -> bool:
        """Return whether the interface is up.

        Raises:
            HostError: the interface is gone.
        """
        poll = select.poll()
        poll.register(self.fd, WRITABLE)
        events = sum(found for _, found in poll.poll(0))
        if events & (select.POLLERR | select.POLLHUP):
            raise HostError(self.name, errno.ENODEV)
        return bool(events)
