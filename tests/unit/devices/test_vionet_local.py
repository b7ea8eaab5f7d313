"""Answers of a local interface that wait for name servers: what the main thread does, and when."""

from collections.abc import Callable

import pytest

from tests.support.figures import unseen
from tests.support.packets import DISCOVER, GUEST4, HOST4, LLADDR, OFFER, RELEASE, REQUEST, Answer, dhcp, option
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.local import LocalNetwork
from vmd.ipc import devmsg

INTERFACE = Interface(lladdr=LLADDR, local=True, asks=True, guest4=GUEST4, host4=HOST4)


class Services:
    """A process whose main thread does what is posted when it is told to."""

    def __init__(self) -> None:
        self.posts: list[Callable[[], None]] = []
        self.figures = unseen("vionet")
        self.slot = memoryview(bytearray(devmsg.FIGURES_SLOT_BYTES - 8 * devmsg.FIGURES_HEAD)).cast("Q")

    def post(self, job: Callable[[], None]) -> None:
        """Keep it."""
        self.posts.append(job)

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """It does not come to that."""

    def catch_up(self) -> None:
        """Do what was posted."""
        for job in self.posts:
            job()


@pytest.mark.parametrize("reset", [False, True])
def test_request_is_answered_unless_its_driver_is_gone(reset: bool) -> None:
    """The main thread may hear of a reset before it comes to what the other thread has posted."""
    services, told, injected = Services(), list[bytes](), list[bytes]()
    local = LocalNetwork(INTERFACE, injected.append, services, told.append)
    local.begin()
    assert local.answer(dhcp(DISCOVER), sum_missing=False)
    if reset:
        local.end()
        local.begin()
    services.catch_up()
    local.go_on(INTERFACE)

    assert told == ([] if reset else [devmsg.TYPE.pack(devmsg.ASK_RESOLVERS)])
    assert [Answer(frame).kind for frame in injected] == ([] if reset else [OFFER])


def named(local: LocalNetwork, services: Services, *options: bytes) -> bytes:
    """Have a guest ask for its address; return the name of which it is noted."""
    assert local.answer(dhcp(REQUEST, requested=GUEST4, more=b"".join(options)), sum_missing=False)
    return named_now(services)


def named_now(services: Services) -> bytes:
    """Return the name that is noted, as others read it."""
    slot = bytes(8 * devmsg.FIGURES_HEAD) + bytes(services.slot)
    return slot[devmsg.FIGURES_SLOT_BYTES - devmsg.HOST_NAME_BYTES : devmsg.FIGURES_SLOT_BYTES].rstrip(b"\0")


def test_the_host_name_that_a_guest_asks_with_is_noted() -> None:
    """Behind the figures, and no longer than the lease."""
    services = Services()
    local = LocalNetwork(INTERFACE.replace(asks=False), lambda _: None, services, lambda _: None)

    assert named(local, services, option(12, b"web.example.org")) == b"web.example.org"
    assert named(local, services) == b""
    assert named(local, services, option(12, b"web")) == b"web"
    local.answer(dhcp(RELEASE, ciaddr=GUEST4), sum_missing=False)
    assert named_now(services) == b""


def test_name_servers_of_its_own_are_not_asked_for() -> None:
    """What others are told is nothing to it."""
    told: list[bytes] = []
    injected: list[bytes] = []
    local = LocalNetwork(
        INTERFACE.replace(asks=False, dns4=(bytes((9, 9, 9, 9)),)), injected.append, Services(), told.append
    )
    assert local.answer(dhcp(DISCOVER), sum_missing=False)

    assert told == []
    assert Answer(injected[0]).options[6] == bytes((9, 9, 9, 9))
