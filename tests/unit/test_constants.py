"""Constants that the kernel or a standard defines, and units."""

import mmap
import os
import socket

from pyroute2.netlink import NLM_F_REQUEST, nlmsg
from pyroute2.netlink.rtnl import RTM_NEWLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from vmd import errors, netlink, units


def test_units() -> None:
    """They are those of this host."""
    assert (units.KIB, units.MIB, units.GIB) == (1024, 1024**2, 1024**3)
    assert (units.NS, units.DAY_S) == (10**9, 24 * 60 * 60)
    assert mmap.PAGESIZE == units.PAGE
    assert units.SECTOR == 512
    assert os.sysconf("SC_IOV_MAX") == units.IOV_MAX


def test_netlink() -> None:
    """As another library has them."""
    assert (netlink.NLM_F_REQUEST, netlink.RTM_NEWLINK) == (NLM_F_REQUEST, RTM_NEWLINK)
    assert socket.NETLINK_ROUTE == netlink.NETLINK_ROUTE
    attributes = [name for name, _ in ifinfmsg.nla_map]
    assert attributes[netlink.IFLA_LINKINFO] == "IFLA_LINKINFO"
    assert [name for name, _ in ifinfmsg.ifinfo.nla_map][netlink.IFLA_INFO_KIND] == "IFLA_INFO_KIND"
    assert (netlink.NLMSGHDR.size, netlink.RTATTR.size) == (16, 4)
    assert nlmsg is not None


def test_codes_of_failures() -> None:
    """The first ones are upstream's.  Programs know them, and none has two meanings."""
    codes = {name: value for name, value in vars(errors).items() if name.startswith("VMD_")}
    assert codes == {
        "VMD_BIOS_MISSING": 1001, "VMD_DISK_MISSING": 1002, "VMD_VM_STOP_INVALID": 1004, "VMD_CDROM_MISSING": 1005,
        "VMD_CDROM_INVALID": 1006, "VMD_PARENT_INVALID": 1007, "VMD_CONSOLE_TAKEN": 1008, "VMD_IN_DOUBT": 1009,
    }  # fmt: skip
