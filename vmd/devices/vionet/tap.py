"""The tap: a descriptor, two requests, and what its errors mean (linux/if_tun.h)."""

import errno
import fcntl
import posix as os
import select
from struct import Struct

from vmd.errors import HostError

TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8
INT = Struct("i")

GONE = frozenset({errno.EBADFD, errno.EBADF, errno.ENODEV, errno.ENXIO})  # the interface was deleted
DOWN = frozenset({errno.EIO})  # it is there, and not up
WRITABLE = select.EPOLLOUT  # only of an interface that is up
STALE_FRAMES_MAX = 4096  # more than any queue length an administrator sets


class Tap:
    """An open tap that prefixes frames with a virtio-net header; ours from here on.

    The thread that moves frames reads and writes `fd`; everything else is the main thread's.
    """

    def __init__(self, fd: int, name: str) -> None:
        """Raises HostError if it is none."""
        self.fd = fd
        self.name = name
        self.header = 10  # bytes before each frame
        os.set_blocking(fd, False)
        self.offloads = 0  # that it can take from the network for the guest
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
        """Have frames come with headers of so many bytes, and unsegmented or without sums where the guest can.

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
        """Send a frame of ours, as if it came from the guest; False if the tap does not take it."""
        try:
            os.write(self.fd, bytes(self.header) + frame)
        except OSError:
            return False
        return True

    def forget_frames(self) -> None:
        """Throw away what waits: it was meant for another driver, and may be segmented as only that one can take."""
        waste = [bytearray(64)]
        try:
            for _ in range(STALE_FRAMES_MAX):
                os.readv(self.fd, waste)
        except OSError:
            return

    def is_up(self) -> bool:
        """Return whether the interface is up.

        Raises:
            HostError: it is gone.
        """
        poll = select.poll()
        poll.register(self.fd, WRITABLE)
        events = sum(found for _, found in poll.poll(0))
        if events & (select.POLLERR | select.POLLHUP):
            raise HostError(self.name, errno.ENODEV)
        return bool(events)
