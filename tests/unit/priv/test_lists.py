"""Answers of netlink, with a stand-in for the kernel."""

import errno
from typing import Any

import pytest

from vmd.errors import HostError
from vmd.netlink import NLMSGHDR, RTM_NEWLINK
from vmd.priv.lists import (
    ADDRESS,
    ANSWER_S,
    DUMPS_MAX,
    LINK,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    RTM_NEWADDR,
    Link,
    Lists,
    attribute,
    attributes,
    link_of,
    messages,
)


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


class Changing(Kernel):
    """A kernel that sends one message at a time, in pieces, each with its flags."""

    def __init__(self, *lists: list[tuple[int, int, bytes]]) -> None:
        self.lists = list(lists)
        self.asked: list[bytes] = []

    def send(self, question: bytes) -> None:
        """Begin an answer."""
        super().send(question)
        self.asked.append(question)
        self.left = self.lists.pop(0)

    def recv(self, _length: int) -> bytes:
        """Return the next piece, and before it the answer to an earlier question."""
        kind, flags, body = self.left.pop(0)
        old = NLMSGHDR.pack(NLMSGHDR.size + len(body), NLMSG_ERROR, 0, self.sequence - 1, 0) + number(errno.EPERM)
        old = old.ljust(NLMSGHDR.size + len(body) + 3 & ~3, b"\0")
        return old + NLMSGHDR.pack(NLMSGHDR.size + len(body), kind, flags, self.sequence, 0) + body


def changing(*answers: list[tuple[int, int, bytes]]) -> tuple[Lists, Changing]:
    """Return the lists of such a kernel, and the kernel."""
    lists: Any = Lists.__new__(Lists)
    lists._sock, lists._sequence = Changing(*answers), 0
    return lists, lists._sock


def interface(index: int) -> bytes:
    """Return a message of an interface."""
    return LINK.pack(0, 0, index, 0, 0)


def test_a_list_that_changes_meanwhile_is_read_again() -> None:
    """Wherever the kernel says so.  In the end it is given up."""
    seven, end = (RTM_NEWLINK, 2, interface(7)), (NLMSG_DONE, 2, number(0))
    broken = (
        [seven, (NLMSG_DONE, NLM_F_DUMP_INTR, number(0))], [(RTM_NEWLINK, NLM_F_DUMP_INTR, interface(7)), seven, end]
    )  # fmt: skip
    lists, kernel = changing(*map(list, broken), [seven, (RTM_NEWLINK, 2, interface(9)), end])
    assert [each.index for each in lists.links()] == [7, 9]
    assert len(kernel.asked) == 3

    lists, kernel = changing(*(list(broken[0]) for _ in range(DUMPS_MAX)))
    with pytest.raises(HostError, match=r"^list interfaces while others change them: ") as caught:
        lists.links()
    assert caught.value.number == errno.EAGAIN


def test_one_interface_is_asked_for_by_its_name() -> None:
    """Only one answer is awaited."""
    lists, kernel = changing([(RTM_NEWLINK, 0, interface(7))])
    found = lists.link("tap3")
    assert found is not None
    assert found.index == 7
    length, kind, flags, _, _ = NLMSGHDR.unpack_from(kernel.asked[0])
    assert (length, kind, flags) == (len(kernel.asked[0]), 18, 1)
    assert LINK.unpack_from(kernel.asked[0], NLMSGHDR.size) == (0, 0, 0, 0, 0)
    assert attributes(kernel.asked[0], NLMSGHDR.size + LINK.size) == {29: bytes((8, 0, 0, 0)), 3: b"tap3\0"}


def test_what_an_interface_has() -> None:
    """A VRF has its table two levels down.  What the kernel does not say is nothing."""
    four = b"\4\0\0\0"
    info = attribute(1, b"vrf\0") + attribute(2, attribute(1, b"\7\0\0\0"))
    body = LINK.pack(0, 0, 5, 1, 0) + attribute(1, bytes(6)) + attribute(3, b"vrf7\0") + attribute(4, b"\xdc\5\0\0")
    body += attribute(10, four) + attribute(18 | 0x8000, info) + attribute(20, b"rdomain\xff\0more")
    body += attribute(27, b"\t\0\0\0")
    full = Link(
        index=5, name="vrf7", kind="vrf", alias="rdomain\ufffd", master=4, mtu=1500, lladdr=bytes(6), up=True, table=7,
        group=9,
    )  # fmt: skip
    assert link_of(body) == full
    assert link_of(body.replace(b"vrf\0", b"tun\0")).table == 0
    nothing = Link(index=6, name="", kind="", alias="", master=0, mtu=0, lladdr=b"", up=False)
    assert link_of(LINK.pack(0, 0, 6, 0x1002, 0)) == nothing
    assert (nothing.table, nothing.group) == (0, 0)
    assert link_of(LINK.pack(0, 0, 6, 0, 0) + attribute(4, b"\1\2\3")).mtu == 0


def test_addresses() -> None:
    """The local one counts, where there is a peer, too.  Interfaces may be left out."""
    ours, peer = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
    found = [
        ADDRESS.pack(2, 8, 0, 0, 1) + attribute(1, peer) + attribute(2, ours),
        ADDRESS.pack(2, 8, 0, 0, 2) + attribute(1, peer),
        ADDRESS.pack(2, 8, 0, 0, 3),
        ADDRESS.pack(2, 8, 0, 0, 4) + attribute(1, ours),
    ]
    lists, kernel = changing([*((RTM_NEWADDR, 2, body) for body in found), (NLMSG_DONE, 2, number(0))])
    assert lists.addresses([4]) == [(1, ours), (2, peer)]
    assert NLMSGHDR.unpack_from(kernel.asked[0])[1:3] == (22, 0x301)


def test_invalid_messages_and_attributes() -> None:
    """A length that is too small would never end."""
    body = attribute(3, b"abc") + attribute(4, b"")
    assert attributes(b"12" + body, 2) == {3: b"abc", 4: b""}
    assert attributes(body + b"\3\0\5\0", 0) == {3: b"abc", 4: b""}
    assert attributes(body + b"\4\0\5", 0) == {3: b"abc", 4: b""}
    assert len(attribute(3, b"a")) == len(attribute(3, b"abcd")) == 8
    one = NLMSGHDR.pack(NLMSGHDR.size + 1, 1, 2, 7, 0) + b"a\0\0\0"
    empty = NLMSGHDR.pack(NLMSGHDR.size, 3, 0, 7, 0)
    assert list(messages(one + empty, 7)) == [(1, 2, b"a"), (3, 0, b"")]
    assert list(messages(one + empty, 8)) == []
    assert list(messages(one + NLMSGHDR.pack(NLMSGHDR.size - 1, 3, 0, 7, 0) + empty, 7)) == [(1, 2, b"a")]
    assert list(messages(empty[:-1], 7)) == []


def test_the_kernel_answers_soon_or_never() -> None:
    """priv does not wait longer, and leaves no socket to a program that it starts."""
    lists = Lists()
    assert lists._sock.gettimeout() == ANSWER_S
    assert not lists._sock.get_inheritable()
    assert "lo" in [link.name for link in lists.links()]
    found = lists.link("lo")
    assert found is not None
    assert found in lists.links()
    lists.close()
    assert lists._sock.fileno() == -1
