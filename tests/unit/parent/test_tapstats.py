"""The kernel's counters of a tap: the guest's point of view, and answers that are no counters."""

import socket
from collections.abc import Iterator
from struct import pack
from typing import Any

import pytest

from tests.support.descriptors import open_descriptors
from vmd.parent.tapstats import TapStats

COUNTED = {"rx_packets": 22, "rx_bytes": 2200, "tx_packets": 11, "tx_bytes": 1100}
NEWSTATS, GETSTATS, ERROR = 92, 94, 2  # <linux/rtnetlink.h>, <linux/netlink.h>
LINK_64 = 1  # IFLA_STATS_LINK_64


def answer(index: int = 7, kind: int = NEWSTATS, attribute: int = LINK_64) -> bytes:
    """Return a message of the kernel: the tap has received 11 frames and has sent 22 (struct rtnl_link_stats64)."""
    counters = pack("=4Q", 11, 22, 1100, 2200) + bytes(8 * 20)
    body = pack("=BxxxII", 0, index, 1) + pack("=HH", 4 + len(counters), attribute) + counters
    return pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


class Kernel:
    """Replaces a netlink socket."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.answers: list[bytes | OSError] = []
        self.made: list[tuple[int, int, int]] = []
        self.closed = 0

    def make(self, family: int, kind: int, protocol: int) -> "Kernel":
        """Replaces `socket.socket`."""
        self.made.append((family, kind, protocol))
        return self

    def send(self, request: bytes) -> None:
        """Take a request."""
        self.asked.append(request)

    def recv(self, size: int) -> bytes:
        """Return the next answer."""
        found = self.answers.pop(0)
        if isinstance(found, OSError):
            raise found
        return found[:size]

    def close(self) -> None:
        """Count it."""
        self.closed += 1


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """Replaces the kernel."""
    kernel = Kernel()
    monkeypatch.setattr(socket, "socket", kernel.make)
    yield kernel
    assert kernel.answers == []


def test_what_the_tap_receives_the_guest_has_sent(kernel: Kernel) -> None:
    """One socket is used for all questions.  It never blocks the parent, and no process inherits it."""
    stats = TapStats()
    kernel.answers = [answer(), answer(300)]
    assert (stats.of(7), stats.of(300)) == (COUNTED, COUNTED)

    assert [request[16:] for request in kernel.asked] == [pack("=BxxxII", 0, index, 1) for index in (7, 300)]
    assert {request[:16] for request in kernel.asked} == {pack("=IHHII", 28, GETSTATS, 1, 0, 0)}
    ((family, kind, protocol),) = kernel.made
    assert (family, protocol) == (socket.AF_NETLINK, 0)
    assert kind & socket.SOCK_NONBLOCK
    assert kind & socket.SOCK_CLOEXEC
    for _ in range(2):
        stats.close()
    assert kernel.closed == 1


@pytest.mark.parametrize(
    "found",
    [
        pack("=IHHIIi", 36, ERROR, 0, 0, 0, -19) + bytes(16),
        answer(8),
        answer(kind=16),
        answer(attribute=2),
        answer()[: 16 + 12 + 4 + 31],
        b"",
        BlockingIOError(),
        OSError(19, "No such device"),
    ],
    ids=["error", "other tap", "other message", "other attribute", "too short", "empty", "late", "failure"],
)
def test_an_answer_without_counters_of_this_tap(kernel: Kernel, found: "bytes | OSError") -> None:
    """The status has no counters then."""
    kernel.answers = [found]
    assert TapStats().of(7) == {}


def test_the_smallest_answer_that_has_all_counters(kernel: Kernel) -> None:
    """A kernel may add counters, and the first ones stay where they are."""
    kernel.answers = [answer()[: 16 + 12 + 4 + 32]]
    assert TapStats().of(7) == COUNTED


def test_the_real_kernel_knows_its_interfaces() -> None:
    """The loopback interface receives what it sends.  An index that nobody has, has no counters."""
    before = open_descriptors()
    stats = TapStats()
    found: dict[str, Any] = stats.of(socket.if_nametoindex("lo"))
    assert found["rx_packets"] == found["tx_packets"]
    assert found["rx_bytes"] == found["tx_bytes"]
    assert stats.of(0x7FFFFFF0) == {}
    stats.close()
    assert open_descriptors() == before
