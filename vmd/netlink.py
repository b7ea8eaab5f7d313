"""Headers of netlink(7) messages, for code that asks the kernel without a library."""

from struct import Struct

NLMSGHDR = Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
RTATTR = Struct("=HH")  # struct rtattr: length, type
NLM_F_REQUEST = 1
