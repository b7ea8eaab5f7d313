"""What netlink answers; with a kernel that is none."""

import errno
from typing import Any

import pytest

from vmd.errors import HostError
from vmd.netlink import NLMSGHDR, RTM_NEWLINK
from vmd.priv.lists import LINK, NLMSG_DONE, NLMSG_ERROR, Lists


class Kernel:
    """Answers each question with the same messages."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.answers = answers

    def send(self, question: bytes) -> None:
        """Take a question."""
        _, _, _, self.sequence, _ = NLMSGHDR.unpack_from(question)

    def recv(self, _length: int) -> bytes:
        """Return all of the answer."""
        return b"".join(
            NLMSGHDR.pack(NLMSGHDR.size + len(body), kind, 0, self.sequence, 0) + body for kind, body in self.answers
        )


def asked(*answers: tuple[int, bytes]) -> Lists:
    """Return lists of such a kernel."""
    lists: Any = Lists.__new__(Lists)
    lists._sock, lists._sequence = Kernel(*answers), 0
    made: Lists = lists
    return made


def number(code: int) -> bytes:
    """Return how the kernel says an error."""
    return (-code).to_bytes(4, "little", signed=True)


def test_the_reason_of_the_kernel_is_said() -> None:
    """Not that it was netlink by which it was asked."""
    refuses = asked((NLMSG_ERROR, number(errno.EPERM)))
    with pytest.raises(HostError, match=r"^list interfaces: Operation not permitted$") as caught:
        refuses.links()
    assert caught.value.number == errno.EPERM
    with pytest.raises(HostError, match=r"^look up interface tap0: Operation not permitted$"):
        refuses.link("tap0")
    assert asked((NLMSG_ERROR, number(errno.ENODEV))).link("tap0") is None


def test_a_list_that_is_not_whole_is_none() -> None:
    """The kernel says so at its end."""
    link = (RTM_NEWLINK, LINK.pack(0, 0, 7, 0, 0))
    assert [each.index for each in asked(link, (NLMSG_DONE, number(0))).links()] == [7]
    with pytest.raises(HostError, match=r"^list interfaces: Message too long$"):
        asked(link, (NLMSG_DONE, number(errno.EMSGSIZE))).links()
