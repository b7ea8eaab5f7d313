"""The kernel's counters of a tap (linux/if_link.h).  They count all frames, also those that vhost-net moves."""

import socket
from struct import Struct

from vmd.netlink import NLM_F_REQUEST, NLMSGHDR, RTATTR

IF_STATS_MSG = Struct("=BxxxII")  # family, index of the interface, mask of statistics
RTM_NEWSTATS, RTM_GETSTATS = 92, 94
IFLA_STATS_LINK_64 = 1
STATS = Struct("=QQQQ")  # the start of rtnl_link_stats64: packets received, sent, bytes received, sent
ANSWER_MAX = 8192


class TapStats:
    """A netlink socket, which is opened at its first use."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def of(self, index: int) -> dict[str, int]:
        """Return the counters of an interface by the index of its tap; {} if the kernel has none.

        They are the guest's: a frame that the tap has received was sent by the guest.
        """
        try:
            if self._socket is None:
                kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
                self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
            body = IF_STATS_MSG.pack(0, index, 1 << IFLA_STATS_LINK_64 - 1)
            self._socket.send(NLMSGHDR.pack(NLMSGHDR.size + len(body), RTM_GETSTATS, NLM_F_REQUEST, 0, 0) + body)
            answer = self._socket.recv(ANSWER_MAX)  # netlink answers before send(2) returns
        except OSError:
            return {}
        at = NLMSGHDR.size + IF_STATS_MSG.size
        if len(answer) < at + RTATTR.size + STATS.size:
            return {}  # an error: the tap is gone
        _, kind, *_ = NLMSGHDR.unpack_from(answer)
        _, found, *_ = IF_STATS_MSG.unpack_from(answer, NLMSGHDR.size)
        _, attribute = RTATTR.unpack_from(answer, at)
        if (kind, found, attribute) != (RTM_NEWSTATS, index, IFLA_STATS_LINK_64):
            return {}
        received, sent, received_bytes, sent_bytes = STATS.unpack_from(answer, at + RTATTR.size)
        return {"rx_packets": sent, "rx_bytes": sent_bytes, "tx_packets": received, "tx_bytes": received_bytes}
