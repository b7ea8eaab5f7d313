"""Answers of a local interface that wait for name servers: what the main thread does, and when."""

from collections.abc import Callable

import pytest

from tests.support.packets import DISCOVER, GUEST4, HOST4, LLADDR, OFFER, Answer, dhcp
from vmd.devices.figures import unseen
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.local import LocalNetwork
from vmd.ipc import devmsg

INTERFACE = Interface(lladdr=LLADDR, local=True, asks=True, guest4=GUEST4, host4=HOST4)


class Services:
    """A process whose main thread does what is posted when it is told to."""

    def __init__(self) -> None:
        self.posts: list[Callable[[], None]] = []
        self.figures = unseen("vionet")

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
    """The main thread may hear of a reset before it comes to what the transmit thread has posted."""
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
