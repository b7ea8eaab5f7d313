"""The main thread sends the answers of a local interface that had to wait for name servers."""

from collections.abc import Callable

import pytest

from tests.support.figures import unseen
from tests.support.packets import (
    ACK,
    DISCOVER,
    GUEST4,
    HOST4,
    HOST_LLADDR,
    LLADDR,
    NAK,
    OFFER,
    RELEASE,
    REQUEST,
    Answer,
    any_frame,
    bootp,
    dhcp,
    ethernet,
    ipv4,
    option,
    request,
    solicitation,
    tcp4,
    tcp6,
    udp,
)
from vmd.devices.vionet import dhcp as server
from vmd.devices.vionet import ra
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.local import LocalNetwork
from vmd.ipc import devmsg

INTERFACE = Interface(lladdr=LLADDR, local=True, asks=True, guest4=GUEST4, host4=HOST4)


class Services:
    """A device process.  `catch_up` runs the jobs that were posted to its main thread."""

    def __init__(self) -> None:
        self.posts: list[Callable[[], None]] = []
        self.plans: list[tuple[float, Callable[[], None]]] = []
        self.figures = unseen("vionet")
        self.slot = memoryview(bytearray(devmsg.FIGURES_SLOT_BYTES - 8 * devmsg.FIGURES_HEAD)).cast("Q")

    def post(self, job: Callable[[], None]) -> None:
        """Keep the job."""
        self.posts.append(job)

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """Keep the plan."""
        self.plans.append((delay_s, handler))

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


ROUTED = INTERFACE.replace(asks=False, host_lladdr=HOST_LLADDR, prefix6=bytes.fromhex("fd00112233440305") + bytes(8))
OTHER4 = bytes((192, 168, 1, 9))
# Frames of a guest, and whether they may be for us.
FRAMES = {
    "dhcp": (dhcp(DISCOVER), True),
    "IP options": (ethernet(ipv4(bytes(40), 17, GUEST4, HOST4, first=0x46, options=bytes(4)), 0x0800), True),
    "solicitation": (solicitation(), True),
    "another port": (ethernet(ipv4(udp(bytes(40), GUEST4, HOST4, (68, 53)), 17, GUEST4, HOST4), 0x0800), False),
    "from another port": (ethernet(ipv4(udp(bytes(40), GUEST4, HOST4, (53, 67)), 17, GUEST4, HOST4), 0x0800), False),
    "tcp": (tcp4(bytes(40)), False),
    "tcp over IPv6": (tcp6(bytes(40)), False),
    "another ICMPv6 message": (solicitation(kind=134), False),
    "another protocol": (any_frame(100), False),
    "too short": (bytes(12) + b"\x86\xdd", False),
}


@pytest.mark.parametrize(("frame", "expected"), FRAMES.values(), ids=FRAMES)
def test_few_bytes_tell_whether_a_frame_may_be_for_us(frame: bytes, expected: bool) -> None:
    """All other frames pass without another look."""
    local = LocalNetwork(ROUTED, lambda _: None, Services(), lambda _: None)
    assert local.concerns(frame[: local.look_bytes]) is expected


def figures(services: Services) -> dict[str, int]:
    """Return the figures that are not 0, without those of frames."""
    return {name: value for name, value in zip(devmsg.COUNTER_NAMES, services.figures, strict=False) if value}


def test_answers_are_counted_by_kind() -> None:
    """A lease is a figure, too, until the guest gives it back; the VM hears of the first one of each driver."""
    services, told, injected = Services(), list[bytes](), list[bytes]()
    local = LocalNetwork(ROUTED, injected.append, services, told.append)
    local.begin()
    for frame, times in (
        (dhcp(DISCOVER), 4), (request(bootp(b"\xff")), 1), (dhcp(REQUEST, requested=GUEST4), 3),
        (dhcp(REQUEST, requested=OTHER4), 2), (solicitation(), 5),
    ):  # fmt: skip
        assert all(local.answer(frame, sum_missing=False) for _ in range(times))
    found = figures(services)
    assert found.pop("lease_s")
    assert found == {
        "dhcp_offers": 4, "dhcp_acks": 3, "dhcp_naks": 2, "dhcp_bootp": 1, "ra_sent": 5,
        "lease_requested": int.from_bytes(GUEST4, "big"),
    }  # fmt: skip
    assert [Answer(frame).kind for frame in injected[:10]] == [OFFER] * 4 + [0] + [ACK] * 3 + [NAK] * 2
    assert injected[10:] == [ra.advertisement(ROUTED)] * 5
    assert told == [devmsg.TYPE.pack(devmsg.LEASE)]

    assert not local.answer(dhcp(RELEASE, ciaddr=GUEST4), sum_missing=False)
    assert not local.answer(dhcp(99), sum_missing=False)
    assert not local.answer(any_frame(100), sum_missing=False)
    found = figures(services)
    assert (found[server.RELEASED], found[server.UNKNOWN_TYPE]) == (1, 1)
    assert not found.keys() & {"lease_s", "lease_requested"}
    local.begin()
    local.answer(dhcp(REQUEST, requested=GUEST4), sum_missing=False)
    assert len(told) == 2


def test_router_is_advertised_soon_then_seldom() -> None:
    """Three times at first (RFC 4861, 6.2.4), and not to a driver that was reset; each host has its own interval."""
    services, injected = Services(), list[bytes]()
    local = LocalNetwork(ROUTED, injected.append, services, lambda _: None)
    local.begin()
    delays = []
    for sent in range(5):
        delay_s, advertise = services.plans.pop()
        delays.append(delay_s)
        assert (services.plans, len(injected)) == ([], sent)
        advertise()
    assert delays[:3] == [1.0, 16, 16]
    assert all(225 <= delay_s <= 375 for delay_s in delays[3:])
    assert injected == [ra.advertisement(ROUTED)] * 5
    assert figures(services) == {"ra_sent": 5}

    _, advertise = services.plans.pop()
    local.end()
    advertise()
    assert (services.plans, len(injected)) == ([], 5)


def test_interface_without_a_prefix_advertises_nothing() -> None:
    """Neither by itself nor for a solicitation, nor because of other name servers."""
    services, injected = Services(), list[bytes]()
    local = LocalNetwork(INTERFACE.replace(asks=False), injected.append, services, lambda _: None)
    local.begin()
    services.plans.pop()[1]()
    assert not local.answer(solicitation(), sum_missing=False)
    local.go_on(INTERFACE.replace(asks=False, dns6=(bytes(16),)))
    assert injected == []


def test_other_name_servers_are_advertised_at_once() -> None:
    """The same ones are not."""
    services, injected = Services(), list[bytes]()
    local = LocalNetwork(ROUTED, injected.append, services, lambda _: None)
    other = ROUTED.replace(dns6=(bytes(15) + b"\1",))
    local.go_on(ROUTED.replace())
    local.go_on(other)
    local.go_on(other.replace())
    assert injected == [ra.advertisement(other)]
    assert figures(services) == {"ra_sent": 1}


def test_few_answers_wait_for_name_servers() -> None:
    """The VM is asked once for all of them, and again for later ones; one that has become too long is dropped."""
    services, told, injected = Services(), list[bytes](), list[bytes]()
    local = LocalNetwork(INTERFACE, injected.append, services, told.append)
    for _ in range(20):
        local.answer(dhcp(DISCOVER), sum_missing=False)
    services.catch_up()
    assert (len(told), injected) == (1, [])

    def too_long() -> None:
        raise server.Unanswered(server.NO_ADDRESS)

    local.waiting[-1] = too_long
    local.go_on(INTERFACE)
    assert [Answer(frame).kind for frame in injected] == [OFFER] * 7
    assert figures(services) == {"dhcp_offers": 7, server.NO_ADDRESS: 1}
    services.posts.clear()
    local.answer(dhcp(DISCOVER), sum_missing=False)
    services.catch_up()
    assert (len(told), len(local.waiting)) == (2, 1)
