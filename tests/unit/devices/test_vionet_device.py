"""A network interface around its two queues: the tap's settings, announcements, the link, and the end of a driver."""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.support.figures import unseen
from tests.support.movers import end_thread
from tests.support.packets import GUEST4, HOST4, HOST_LLADDR, LLADDR
from tests.support.packettap import PacketTap
from vmd.devices.vionet import announce
from vmd.devices.vionet.device import Vionet
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.local import LocalNetwork
from vmd.devices.vionet.tap import WRITABLE
from vmd.errors import HostError
from vmd.ipc import devmsg
from vmd.virtio import spec

PLAIN = Interface(lladdr=LLADDR, mtu=1400)
LOCAL = Interface(lladdr=LLADDR, host_lladdr=HOST_LLADDR, local=True, asks=True, guest4=GUEST4, host4=HOST4)
MRG, MODERN = 1 << spec.VIRTIO_NET_F_MRG_RXBUF, 1 << spec.VIRTIO_F_VERSION_1
CSUM, TSO4 = 1 << spec.VIRTIO_NET_F_GUEST_CSUM, 1 << spec.VIRTIO_NET_F_GUEST_TSO4
TSO6, ECN = 1 << spec.VIRTIO_NET_F_GUEST_TSO6, 1 << spec.VIRTIO_NET_F_GUEST_ECN


class FakeTap(PacketTap):
    """A tap that keeps what it was asked for."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.offloads = 15
        self.header = 10
        self.steps: list[tuple[object, ...]] = []
        self.up = True
        self.gone = False

    def configure(self, header: int, offloads: int) -> None:
        """Keep it."""
        self.steps.append(("configure", header, offloads))
        if self.gone:
            raise HostError("tap0", errno.EBADFD)

    def forget_frames(self) -> None:
        """Keep it."""
        self.steps.append(("forget",))

    def is_up(self) -> bool:
        """Return what the test has set."""
        if self.gone:
            raise HostError("tap0", errno.ENODEV)
        return self.up


class Services:
    """A device process.  Its main thread is the test's thread."""

    def __init__(self) -> None:
        self.figures = unseen("vionet")
        self.slot = memoryview(bytearray(devmsg.FIGURES_SLOT_BYTES - 8 * devmsg.FIGURES_HEAD)).cast("Q")
        self.watched: dict[int, tuple[Callable[[], None], int]] = {}
        self.plans: list[tuple[float, Callable[[], None]]] = []
        self.told: list[bytes] = []

    def watch(self, fd: int, handler: Callable[[], None], events: int = 0) -> None:
        """Keep the handler."""
        assert fd not in self.watched
        self.watched[fd] = handler, events

    def unwatch(self, fd: int) -> None:
        """Remove the handler."""
        del self.watched[fd]

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """Keep the plan."""
        self.plans.append((delay_s, handler))

    def tell(self, packet: bytes) -> None:
        """Keep the message."""
        self.told.append(packet)

    def post(self, job: Callable[[], None]) -> None:
        """Call the job at once."""
        job()

    def broke(self, text: str) -> None:
        """Fail, because no ring is broken in these tests."""
        raise AssertionError(text)

    def interrupt(self, queue: int) -> None:
        """Fail, because there are no rings in these tests."""
        raise AssertionError(queue)


class Nic:
    """An interface, and the network at the other end of its tap."""

    def __init__(self, interface: Interface, *, up: bool = True) -> None:
        self.network, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.network.setblocking(False)
        self.tap = FakeTap(ours.detach())
        self.tap.up = up
        self.services = Services()
        self.kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        self.device = Vionet(interface, self.tap, self.kicks, self.services)

    def sent(self) -> list[bytes]:
        """Return the frames that the network got since the last time, without their headers."""
        found = []
        while True:
            try:
                found.append(self.network.recv(4096)[self.tap.header :])
            except BlockingIOError:
                return found

    def links(self) -> list[bool]:
        """Return the state of the link as the guest was told since the last time; both queues must know it."""
        told, self.services.told = self.services.told, []
        assert {worker.link_up for worker in self.device.workers} == {self.device.link_up}
        found = []
        for packet in told:
            kind, features, length = devmsg.READY_HEAD.unpack_from(packet)
            assert (kind, features, length) == (devmsg.CONFIG_CHANGED, self.device.features, 12)
            found.append(bool(struct.unpack("<6sHHH", packet[devmsg.READY_HEAD.size :])[1]))
        return found

    def close(self) -> None:
        """End the thread, and close the descriptors."""
        self.device.quiesce(forget=True)
        end_thread(self.device.mover)
        self.network.close()
        os.close(self.tap.fd)


@pytest.fixture
def nic() -> Iterator[Nic]:
    """An interface on a switch."""
    made = Nic(PLAIN)
    yield made
    made.close()


@pytest.fixture
def local() -> Iterator[Nic]:
    """A `local` interface."""
    made = Nic(LOCAL)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("features", "supported", "header", "offloads"),
    [
        (0, 15, 10, 0), (MRG, 15, 12, 0), (MODERN, 15, 12, 0), (MRG | MODERN, 15, 12, 0), (CSUM, 15, 10, 1),
        (CSUM | TSO4, 15, 10, 3), (CSUM | TSO6, 15, 10, 5), (CSUM | TSO4 | TSO6 | ECN, 15, 10, 15),
        (CSUM | ECN, 15, 10, 1), (TSO4 | TSO6 | ECN, 15, 10, 0), (CSUM | TSO6 | ECN, 15, 10, 13),
        (CSUM | TSO4 | TSO6 | ECN, 7, 10, 7), (CSUM | TSO4 | ECN, 1, 10, 1), (CSUM | TSO4 | TSO6 | ECN, 0, 10, 0),
    ],
)  # fmt: skip
def test_tap_is_set_to_what_the_driver_has_accepted(
    nic: Nic, features: int, supported: int, header: int, offloads: int
) -> None:
    """Segmentation needs checksums, and ECN needs segmentation.  Frames for an earlier driver are dropped then."""
    nic.tap.offloads = supported
    nic.device.receiver.held = bytearray(b"of an earlier driver")
    nic.device.activate(features, [None, None])
    assert nic.tap.steps == [("configure", header, offloads), ("forget",)]
    receiver = nic.device.receiver
    assert (receiver.header, receiver.mergeable, receiver.sums) == (header, bool(features & MRG), bool(offloads))
    assert nic.device.transmitter.header == header
    assert receiver.held == b""


def test_queues_are_given_and_forgotten(nic: Nic) -> None:
    """Each direction has its own.  A pause keeps them, and a driver may leave one out."""
    one, two = object(), object()
    for queues, expected in (([one, two], [one, two]), ([one], [one, None]), ([], [None, None])):
        nic.device.activate(0, queues)  # type: ignore[arg-type]
        assert [worker.queue for worker in nic.device.workers] == expected
    nic.device.activate(0, [one, two])  # type: ignore[list-item]
    nic.device.receiver.held = bytearray(b"waits")
    nic.device.quiesce(forget=False)
    assert [worker.queue for worker in nic.device.workers] == [one, two]
    assert nic.device.receiver.held == b"waits"
    nic.device.quiesce(forget=True)
    assert [worker.queue for worker in nic.device.workers] == [None, None]
    assert nic.device.receiver.held == b""


def test_local_network_hears_of_each_driver(local: Nic) -> None:
    """Answers for the last one are dropped."""
    network = local.device.local
    assert isinstance(network, LocalNetwork)
    local.device.activate(0, [None, None])
    assert (network.life, [delay_s for delay_s, _ in local.services.plans]) == (1, [1.0])
    network.waiting.append(lambda: None)
    local.device.quiesce(forget=False)
    assert len(network.waiting) == 1
    local.device.quiesce(forget=True)
    assert (network.life, network.waiting) == (2, [])


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("interface", [PLAIN, LOCAL], ids=["switch", "local"])
def test_what_each_kind_of_interface_looks_at(interface: Interface, locked: bool) -> None:
    """Only a locked one filters, only a local one answers, and only one on a switch learns addresses."""
    nic = Nic(interface.replace(locked=locked))
    device = nic.device
    assert (device.receiver.accepted, device.transmitter.allowed) == ((LLADDR,) * 2 if locked else (b"",) * 2)
    assert (device.transmitter.answers is not None) == interface.local == (device.transmitter.addresses is None)
    assert device.transmitter.answers is device.local
    nic.close()


# --- after a move ------------------------------------------------------------------------------------------------

KNOWN = devmsg.ANNOUNCED.pack(devmsg.ANNOUNCED_4, GUEST4)


def test_guest_is_announced_in_rounds(nic: Nic) -> None:
    """Each round tells switches and neighbours, and is planned when the one before is done."""
    nic.device.announce((KNOWN,))
    delays = [0.0]
    for number in range(len(announce.ROUNDS_S)):
        assert nic.sent() == [announce.reverse_request(LLADDR), announce.address(LLADDR, KNOWN)]
        assert len(nic.services.plans) == (number + 1 < len(announce.ROUNDS_S))
        if nic.services.plans:
            delay_s, again = nic.services.plans.pop()
            delays.append(delays[-1] + delay_s)
            again()
    assert delays == pytest.approx(list(announce.ROUNDS_S))
    assert nic.device.addresses.known == (KNOWN,)


def test_guest_whose_link_is_down_is_announced_when_it_is_up(nic: Nic) -> None:
    """The later rounds do that."""
    nic.tap.up = nic.device.tap_up = False
    nic.device.announce((KNOWN,))
    assert nic.sent() == []
    nic.device.tap_up = True
    nic.services.plans.pop()[1]()
    assert len(nic.sent()) == 2


@pytest.mark.parametrize("lladdr", [HOST_LLADDR, b""])
def test_guest_of_a_local_interface_hears_of_its_router(lladdr: bytes) -> None:
    """Nobody else is on its link.  Without an address of the host there is nothing to tell."""
    nic = Nic(LOCAL.replace(host_lladdr=lladdr))
    nic.device.announce((KNOWN,))
    assert nic.device.receiver.injected == ([announce.router_address(lladdr, HOST4)] if lladdr else [])
    assert (nic.sent(), nic.services.plans) == ([], [])
    nic.close()


@pytest.mark.parametrize("asks", [False, True])
def test_name_servers(asks: bool) -> None:
    """Those of the host replace the ones before, unless the operator has named some; waiting guests are answered."""
    nic = Nic(LOCAL.replace(asks=asks, dns4=(b"\1" * 4,)))
    network = nic.device.local
    assert network is not None
    done: list[int] = []
    network.waiting.append(lambda: done.append(1))
    nic.device.set_resolvers((b"\x09" * 4,), (b"\x06" * 16,))
    expected = ((b"\x09" * 4,), (b"\x06" * 16,)) if asks else ((b"\1" * 4,), ())
    assert (nic.device.interface.dns4, nic.device.interface.dns6) == expected
    assert (network.interface, done) == (nic.device.interface, [1])
    nic.close()


# --- the link ----------------------------------------------------------------------------------------------------


def test_a_tap_that_is_down_at_the_start() -> None:
    """It is watched until it comes up; then the guest is told."""
    nic = Nic(PLAIN, up=False)
    assert nic.links() == []
    assert nic.device.config == struct.pack("<6sHHH", LLADDR, 0, 1, 1400)
    handler, events = nic.services.watched[nic.tap.fd]
    assert events == WRITABLE
    handler()  # not up yet
    assert nic.links() == []
    nic.tap.up = True
    handler()
    assert (nic.links(), nic.services.watched) == ([True], {})
    assert nic.device.config == struct.pack("<6sHHH", LLADDR, 1, 1, 1400)
    handler()  # an event that was on its way
    assert nic.links() == []
    nic.close()


def test_a_tap_that_goes_down_and_up(nic: Nic) -> None:
    """Both queues may report it; it counts once."""
    down = OSError(errno.EIO, "down")
    nic.device._on_tap_failed(down)
    nic.device._on_tap_failed(down)
    assert nic.links() == [False]
    nic.services.watched[nic.tap.fd][0]()
    assert (nic.links(), nic.services.watched) == ([True], {})


@pytest.mark.parametrize("was_up", [True, False])
@pytest.mark.parametrize("how", ["frame", "look", "configure"])
def test_a_tap_that_is_deleted(how: str, was_up: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """It is not waited for any more, and logged once; the guest is told that the link is down."""
    nic = Nic(PLAIN, up=was_up)
    if how == "look" and was_up:
        nic.device._tap_failed(OSError(errno.EIO, "down"))
    nic.links()
    nic.tap.gone = True
    handler = nic.services.watched[nic.tap.fd][0] if nic.services.watched else None
    for _ in range(2):
        if how == "frame":
            nic.device._on_tap_failed(OSError(errno.EBADFD, "bad state"))
        elif how == "configure":
            nic.device.activate(0, [None, None])
        else:
            assert handler is not None
            handler()
    assert (nic.links(), nic.services.watched, nic.device.link_up) == ([False], {}, False)
    assert capfd.readouterr().err.count("the interface was deleted, so the link is down") == 1
    nic.device._on_tap_failed(OSError(errno.EIO, "down"))
    assert (nic.links(), nic.services.watched) == ([], {})
    nic.close()


def test_the_thread_hears_of_changes(nic: Nic, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new limit, and another state of the link: otherwise a queue would wait on."""
    looks: list[tuple[bool, bool]] = []
    receiver = nic.device.receiver
    monkeypatch.setattr(nic.device.mover, "look", lambda: looks.append((receiver.bucket is None, receiver.link_up)))
    nic.device.limit(1 << 20)
    assert all(worker.bucket is not None and worker.bucket.rate == 1 << 20 for worker in nic.device.workers)
    nic.device.limit(0)
    nic.device._tap_failed(OSError(errno.EIO, "down"))
    assert looks == [(False, True), (True, True), (True, False)]
    monkeypatch.undo()
    nic.links()
