"""How messages of netlink(7) begin, for those who ask the kernel something without a library."""

from struct import Struct

NLMSGHDR = Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
RTATTR = Struct("=HH")  # struct rtattr: length, type
NLM_F_REQUEST = 1
