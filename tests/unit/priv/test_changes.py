"""How priv hears that the network has changed, with a stand-in for netlink."""

import errno
import socket
import subprocess

import pytest

from vmd.errors import HostError
from vmd.netlink import NETLINK_ROUTE, NLMSGHDR, RTATTR
from vmd.priv import changes, lists, sysctl
from vmd.priv.changes import LINKS, NETLINK_NETFILTER, NFNLGRP_NFTABLES, PIECES_MAX, Changes


class Socket:
    """A netlink socket.  Each answer is bytes, or an error; without answers there is no notice."""

    made: list["Socket"]
    refuses = -1  # the family that cannot be opened

    def __init__(self, family: int, kind: int, protocol: int) -> None:
        if protocol == Socket.refuses:
            raise OSError(errno.EPROTONOSUPPORT, "no")
        self.opened = family, kind, protocol
        self.answers: list[OSError | bytes] = []
        self.address: tuple[int, int] | None = None
        Socket.made.append(self)

    def bind(self, address: tuple[int, int]) -> None:
        """Subscribe to groups."""
        self.address = address

    def recv(self, _size: int) -> bytes:
        """Return a notice."""
        answer = self.answers.pop(0) if self.answers else BlockingIOError()
        if isinstance(answer, OSError):
            raise answer
        return answer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Socket]:
    """The sockets that were made."""
    Socket.made = []
    monkeypatch.setattr(Socket, "refuses", -1)
    monkeypatch.setattr(socket, "socket", Socket)
    return Socket.made


def test_it_subscribes_to_interfaces_and_nftables(made: list[Socket]) -> None:
    """The sockets do not block."""
    Changes()
    raw = socket.SOCK_RAW | socket.SOCK_NONBLOCK
    assert [(each.opened, each.address) for each in made] == [
        ((socket.AF_NETLINK, raw, NETLINK_ROUTE), (0, LINKS)),
        ((socket.AF_NETLINK, raw, NETLINK_NETFILTER), (0, 1 << NFNLGRP_NFTABLES - 1)),
    ]


@pytest.mark.parametrize("family", [NETLINK_ROUTE, NETLINK_NETFILTER])
def test_a_kernel_without_such_notices(made: list[Socket], family: int) -> None:
    """The error says what was tried."""
    Socket.refuses = family
    with pytest.raises(HostError, match="listen for changes of the network") as error:
        Changes()
    assert error.value.number == errno.EPROTONOSUPPORT


def test_all_notices_are_dropped(made: list[Socket]) -> None:
    """After an overflow, too; but a flood of notices does not keep priv from its work."""
    found = Changes()
    made[0].answers = [b"notice", OSError(errno.ENOBUFS, "overflow"), b"notice"]
    made[1].answers = [b"notice"] * (PIECES_MAX + 1)
    found.forget()
    assert (made[0].answers, made[1].answers) == ([], [b"notice"])


def test_numbers_are_the_kernels() -> None:
    """A compiler compares them."""
    names = {name: getattr(lists, name) for name in vars(lists) if name.startswith(("IFLA_", "IFA_", "RTM_", "NLM"))}
    names |= {name: getattr(changes, name) for name in ("RTMGRP_LINK", "RTMGRP_IPV4_IFADDR", "RTMGRP_IPV6_IFADDR")}
    names |= {"NFNLGRP_NFTABLES": NFNLGRP_NFTABLES, "NETLINK_NETFILTER": NETLINK_NETFILTER, "IFF_UP": lists.IFF_UP}
    names |= {
        "1 << (RTNLGRP_IPV4_NETCONF - 1)": changes.RTMGRP_IPV4_NETCONF,
        "1 << (RTNLGRP_IPV6_NETCONF - 1)": changes.RTMGRP_IPV6_NETCONF,
        "RTEXT_FILTER_SKIP_STATS": lists.RTEXT_FILTER_SKIP_STATS, "SO_NETNS_COOKIE": sysctl.SO_NETNS_COOKIE,
        "sizeof(struct ifinfomsg)": lists.LINK.size, "sizeof(struct ifaddrmsg)": lists.ADDRESS.size,
        "sizeof(struct nlmsghdr)": NLMSGHDR.size, "sizeof(struct rtattr)": RTATTR.size,
        "NLA_F_NESTED": lists.NESTED + 1,
    }  # fmt: skip
    del names["NLMSGHDR"]
    heads = ("sys/socket.h", "linux/rtnetlink.h", "linux/if_link.h", "linux/if_addr.h", "linux/if.h")
    lines = [f"#include <{head}>" for head in (*heads, "linux/netfilter/nfnetlink.h")]
    lines += ["#ifndef SO_NETNS_COOKIE", "#define SO_NETNS_COOKIE 71  /* Linux 5.14 */", "#endif"]
    lines += [f'_Static_assert(({name}) == {value}, "{name}");' for name, value in names.items()]

    subprocess.run(["gcc", "-fsyntax-only", "-x", "c", "-"], input="\n".join(lines) + "\n", text=True, check=True)
