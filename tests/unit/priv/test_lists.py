"""Answers of netlink, with a stand-in for the kernel."""

import errno
from typing import Any

import pytest

from vmd.errors import HostError
from vmd.netlink import NLMSGHDR, RTM_NEWLINK
from vmd.priv.lists import LINK, NLMSG_DONE, NLMSG_ERROR, Lists


class Kernel:
    """A kernel that answers each question with the same messages."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.answers = answers

    def send(self, question: bytes) -> None:
        """Accept a question."""
        _, _, _, self.sequence, _ = NLMSGHDR.unpack_from(question)

    def recv(self, _length: int) -> bytes:
        """Return the whole answer."""
        return b"".join(
            NLMSGHDR.pack(NLMSGHDR.size + len(body), kind, 0, self.sequence, 0) + body for kind, body in self.answers
        )


def lists_of(*answers: tuple[int, bytes]) -> Lists:
    """Return the lists of such a kernel."""
    lists: Any = Lists.__new__(Lists)
    lists._sock, lists._sequence = Kernel(*answers), 0
    made: Lists = lists
    return made


def number(code: int) -> bytes:
    """Return the bytes of an error."""
    return (-code).to_bytes(4, "little", signed=True)


def test_an_error_has_the_reason_of_the_kernel() -> None:
    """The text does not mention netlink."""
    refuses = lists_of((NLMSG_ERROR, number(errno.EPERM)))
    with pytest.raises(HostError, match=r"^list interfaces: Operation not permitted$") as caught:
        refuses.links()
    assert caught.value.number == errno.EPERM
    with pytest.raises(HostError, match=r"^look up interface tap0: Operation not permitted$"):
        refuses.link("tap0")
    assert lists_of((NLMSG_ERROR, number(errno.ENODEV))).link("tap0") is None


def test_an_incomplete_list_is_an_error() -> None:
    """The kernel reports that at its end."""
    link = (RTM_NEWLINK, LINK.pack(0, 0, 7, 0, 0))
    assert [each.index for each in lists_of(link, (NLMSG_DONE, number(0))).links()] == [7]
    with pytest.raises(HostError, match=r"^list interfaces: Message too long$"):
        lists_of(link, (NLMSG_DONE, number(errno.EMSGSIZE))).links()
