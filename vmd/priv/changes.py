"""The kernel's notice that the network has changed: interfaces, addresses, settings, nftables.

The notices are not parsed, because they also report our own changes.  `damage` finds the changes that need a repair.
"""

import socket

from vmd.errors import HostError
from vmd.netlink import NETLINK_ROUTE

NETLINK_NETFILTER = 12
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR = 0x1, 0x10, 0x100
RTMGRP_IPV4_NETCONF, RTMGRP_IPV6_NETCONF = 1 << 23, 1 << 24  # RTNLGRP_IPV4_NETCONF is 24: forwarding, rp_filter
LINKS = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR | RTMGRP_IPV4_NETCONF | RTMGRP_IPV6_NETCONF
NFNLGRP_NFTABLES = 7
PIECE, PIECES_MAX = 65536, 64


class Changes:
    """Two netlink sockets that become readable when the network has changed."""

    def __init__(self) -> None:
        """Raises HostError."""
        self.sockets: list[socket.socket] = []
        try:
            for family, groups in (
                (NETLINK_ROUTE, LINKS),
                (NETLINK_NETFILTER, 1 << NFNLGRP_NFTABLES - 1),
            ):
                self.sockets.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, family))
                self.sockets[-1].bind((0, groups))
        except OSError as error:
            raise HostError("listen for changes of the network", error) from error

    def forget(self) -> None:
        """Read and drop all notices.  An overflow (ENOBUFS) makes no difference."""
        for each in self.sockets:
            for _ in range(PIECES_MAX):
                try:
                    each.recv(PIECE)
                except BlockingIOError:
                    break
                except OSError:
                    continue
