"""The main thread sends the answers of a local interface that had to wait for name servers."""

from collections.abc import Callable

import pytest

from tests.support.figures import unseen
from tests.support.packets import DISCOVER, GUEST4, HOST4, LLADDR, OFFER, RELEASE, REQUEST, Answer, dhcp, option
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.local import LocalNetwork
from vmd.ipc import devmsg

INTERFACE = Interface(lladdr=LLADDR, local=True, asks=True, guest4=GUEST4, host4=HOST4)


class Services:
    """A device process.  `catch_up` runs the jobs that were posted to its main thread."""

    def __init__(self) -> None:
        self.posts: list[Callable[[], None]] = []
        self.figures = unseen("vionet")
        self.slot = memoryview(bytearray(devmsg.FIGURES_SLOT_BYTES - 8 * devmsg.FIGURES_HEAD)).cast("Q")

    def post(self, job: Callable[[], None]) -> None:
        """Keep the job."""
        self.posts.append(job)

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """Do nothing."""

    def catch_up(self) -> None:
        """Run the posted jobs."""
        for job in self.posts:
            job()


@pytest.mark.parametrize("reset", [False, True])
def test_request_is_answered_unless_its_driver_was_reset(reset: bool) -> None:
    """The main thread may handle a reset before a job that the other thread has posted."""
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
    """Send a guest's request for its address.  Return the name that is recorded then."""
    assert local.answer(dhcp(REQUEST, requested=GUEST4, more=b"".join(options)), sum_missing=False)
    return named_now(services)


def named_now(services: Services) -> bytes:
    """Return the recorded name, as readers of the figures see it."""
    slot = bytes(8 * devmsg.FIGURES_HEAD) + bytes(services.slot)
    return slot[devmsg.FIGURES_SLOT_BYTES - devmsg.HOST_NAME_BYTES : devmsg.FIGURES_SLOT_BYTES].rstrip(b"\0")


def test_the_host_name_of_a_request_is_recorded() -> None:
    """It is recorded after the figures, as long as the lease exists."""
    services = Services()
    local = LocalNetwork(INTERFACE.replace(asks=False), lambda _: None, services, lambda _: None)

    assert named(local, services, option(12, b"web.example.org")) == b"web.example.org"
    assert named(local, services) == b""
    assert named(local, services, option(12, b"web")) == b"web"
    local.answer(dhcp(RELEASE, ciaddr=GUEST4), sum_missing=False)
    assert named_now(services) == b""


def test_configured_name_servers_need_no_question() -> None:
    """The interface uses its own servers, and does not ask for the host's."""
    told: list[bytes] = []
    injected: list[bytes] = []
    local = LocalNetwork(
        INTERFACE.replace(asks=False, dns4=(bytes((9, 9, 9, 9)),)), injected.append, Services(), told.append
    )
    assert local.answer(dhcp(DISCOVER), sum_missing=False)

    assert told == []
    assert Answer(injected[0]).options[6] == bytes((9, 9, 9, 9))
