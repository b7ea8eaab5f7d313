"""Headers of netlink(7) messages, for code that asks the kernel without a library."""

from struct import Struct

NLMSGHDR = Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
RTATTR = Struct("=HH")  # struct rtattr: length, type
NLM_F_REQUEST = 1
NETLINK_ROUTE = 0
RTM_NEWLINK = 16
IFLA_LINKINFO, IFLA_INFO_KIND = 18, 1  # an attribute, and one inside it
