"""A tap for tests of the threads of a network interface."""

import os

from vmd.devices.vionet.tap import Tap


class PacketTap(Tap):
    """A tap as the threads see it, without an interface."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.name = "tap0"
        self.offloads = 0
        os.set_blocking(fd, False)
