"""Rings move between the process's threads and the kernel.  No frame is lost or duplicated."""

import errno
import fcntl
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fakedriver import DATA, DEADLINE_S, LAYOUT, MODERN, ROM, WRITE, Desc, Ring, release
from tests.support.fakevhost import RX, TX, FakeVhost
from tests.support.figures import unseen
from tests.support.movers import end_thread
from tests.support.packets import DISCOVER, GUEST4, HOST4, HOST_LLADDR, LLADDR, OFFER, Answer, any_frame, dhcp
from tests.support.packettap import PacketTap
from vmd.devices.process import Host
from vmd.devices.vionet import kernel as module
from vmd.devices.vionet import vhost
from vmd.devices.vionet.announce import address
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.kernel import NEEDED, KernelProcess, KernelVionet, make
from vmd.devices.vionet.tap import Tap
from vmd.errors import HostError, PeerError
from vmd.guestmem import GuestMemory
from vmd.ipc import devmsg
from vmd.privsep.confine import VHOST_IOCTLS
from vmd.privsep.title import EVENT
from vmd.virtio import spec
from vmd.virtio.queue import Queue

SIZE = 256
FEATURES = MODERN | NEEDED
RX_BASE, TX_BASE, STRIDE = DATA, 8 * DATA, 2048
START = 65_400  # near the end, so that indices wrap
HEADER = bytes(spec.NET_HDR_BYTES)
PLAIN = Interface(lladdr=LLADDR)
LOCAL = Interface(lladdr=LLADDR, host_lladdr=HOST_LLADDR, local=True, guest4=GUEST4, host4=HOST4)


class FakeTap(PacketTap):
    """A tap with a socket as its other end."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.offloads = 1
        self.up = True

    def configure(self, header: int, offloads: int) -> None:
        """Keep the length of headers."""
        self.header = header

    def forget_frames(self) -> None:
        """Do nothing."""

    def is_up(self) -> bool:
        """Return the value that the test has set."""
        return self.up


class FakeHost:
    """The eventfds of the queues."""

    def __init__(self) -> None:
        self.kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        self.calls = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]


class Services:
    """A device process.  Its main thread is the test's thread."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.host = FakeHost()
        self.figures = unseen("vionet")
        self.slot = memoryview(bytearray(devmsg.FIGURES_SLOT_BYTES - 8 * devmsg.FIGURES_HEAD)).cast("Q")
        self.handlers: dict[int, Callable[[], None]] = {}
        self.raised = [0, 0]
        self.told: list[bytes] = []

    def watch(self, fd: int, handler: Callable[[], None], events: int = select.EPOLLIN) -> None:
        """Keep the handler."""
        assert fd not in self.handlers
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Remove the handler."""
        del self.handlers[fd]

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """Do nothing."""

    def tell(self, packet: bytes) -> None:
        """Keep the message."""
        self.told.append(packet)

    def post(self, job: Callable[[], None]) -> None:
        """Fail, because no thread fails in these tests."""
        raise AssertionError(job)

    def broke(self, text: str) -> None:
        """Fail, because no ring is broken in these tests."""
        raise AssertionError(text)

    def interrupt(self, queue: int) -> None:
        """Count an interrupt, and signal it to the driver."""
        self.raised[queue] += 1
        os.eventfd_write(self.host.calls[queue], 1)


class Rig:
    """An interface with its driver, network and kernel."""

    def __init__(self, memory: GuestMemory, kernel: FakeVhost, interface: Interface = PLAIN) -> None:
        self.memory = memory
        self.kernel = kernel
        self.network, ours = pair()
        self.guest_side, end = pair()  # the guest's end of the packet socket
        self.tap = FakeTap(ours.detach())
        self.services = Services(memory)
        self.device = KernelVionet(interface, self.tap, self.services, kernel.fd, end.detach())  # type: ignore[arg-type]
        self.begin()

    def begin(self, features: int = FEATURES) -> None:
        """Start a new driver, whose rings are not served yet."""
        rows = []
        self.rings = []
        for base in (0x10000, 0x20000):
            ring = Ring(self.memory, SIZE, base)
            ring.avail_idx = ring.used_idx = START
            for place in (ring.avail + 2, ring.used + 2):
                self.memory.load(place, struct.pack("<H", START))
            self.rings.append(ring)
            rows.append(Queue(self.memory, features, SIZE, ring.desc, ring.avail, ring.used, START, START))
        self.queues = rows
        self.device.activate(features, list(rows))

    def post(self, count: int) -> None:
        """Offer receive buffers."""
        for number in range(count):
            self.rings[RX].add([Desc(RX_BASE + number * STRIDE, STRIDE, WRITE)])
        os.eventfd_write(self.services.host.kicks[RX], 1)

    def send(self, number: int) -> None:
        """Offer a frame to send."""
        place = TX_BASE + number % SIZE * STRIDE
        raw = HEADER + any_frame(60 + number, number)
        self.memory.load(place, raw)
        self.rings[TX].add([Desc(place, len(raw))])
        os.eventfd_write(self.services.host.kicks[TX], 1)

    def send_from_network(self, number: int) -> None:
        """Send a frame from the network."""
        self.network.send(HEADER + any_frame(60 + number, number, destination=LLADDR))

    def wait(self, queue: int, count: int) -> list[bytes]:
        """Wait until `count` buffers are used.  Return their content."""
        ring, found = self.rings[queue], []
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            if self.kernel.serves():
                self.kernel.move()
            for head, length in ring.reap():
                gpa = struct.unpack("<Q", self.memory.read(ring.desc + 16 * head, 8))[0]
                found.append(self.memory.read(gpa, length)[len(HEADER) :])
            if len(found) >= count:
                return found
            assert select.select([self.services.host.calls[queue]], [], [], deadline_s - time.monotonic())[0]
            os.eventfd_read(self.services.host.calls[queue])

    def arrived(self) -> list[bytes]:
        """Return the frames that have reached the network."""
        found = []
        while select.select([self.network], [], [], 0)[0]:
            found.append(self.network.recv(1 << 16)[len(HEADER) :])
        return found

    def close(self) -> None:
        """Release everything that uses the memory, and close the descriptors."""
        self.kernel.refuses = ""
        self.device.quiesce(forget=True)
        end_thread(self.device.mover)
        self.device.queues = []
        self.device.receiver.begin()
        for end in (self.network, self.guest_side):
            end.close()
        for fd in (self.tap.fd, self.device.packets.fd, self.device.vhost.failed, *self.services.host.calls):
            os.close(fd)
        for queue in self.queues:
            release(queue)


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that carry frames."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, 32, 8 << 20)  # SO_SNDBUFFORCE
        end.setblocking(False)
    return ends


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVhost]:
    """Yield a fake kernel with guest memory."""
    with GuestMemory.create(LAYOUT) as memory:
        made = FakeVhost(memory)
        monkeypatch.setattr(fcntl, "ioctl", made.ioctl)
        yield made
        os.close(made.fd)


@pytest.fixture
def rig(kernel: FakeVhost) -> Iterator[Rig]:
    """Yield an interface whose rings the kernel serves."""
    made = Rig(kernel.memory, kernel)
    made.device.set_direct(True)
    made.device.resume()
    assert kernel.serves()
    yield made
    made.close()


def set_limit(device: KernelVionet, on: bool) -> None:
    """Set or remove a limit, which is so high that no frame has to wait."""
    device.limit(1 << 40 if on else 0)


def set_marking(device: KernelVionet, on: bool) -> None:
    """Begin or end marking changed pages."""
    device.services.memory.marking = on
    device.reconsider()


def set_paused(device: KernelVionet, on: bool) -> None:
    """Pause or resume."""
    if on:
        device.quiesce(forget=False)
    else:
        device.resume()


CAUSES: dict[str, Callable[[KernelVionet, bool], None]] = {
    "INTx": lambda device, on: device.set_direct(not on),
    "a limit": set_limit,
    "marks": set_marking,
    "a pause": set_paused,
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_process_serves_what_the_kernel_cannot(rig: Rig, cause: str) -> None:
    """Each cause alone takes the rings from the kernel, until it ends.  The figure `vhost` is 1 while it has them."""
    vhost_figure = devmsg.COUNTER_NAMES.index("vhost")
    assert rig.services.figures[vhost_figure] == 1

    CAUSES[cause](rig.device, True)
    assert not rig.kernel.serves()
    assert rig.services.figures[vhost_figure] == 0
    assert all(ring.kick == vhost.NONE for ring in rig.kernel.rings)
    if cause == "INTx":  # the kernel does not write the interrupt page, so its interrupts are raised again
        assert all(rig.services.raised)
    if cause != "a pause":
        rig.send(1)
        rig.wait(TX, 1)

    CAUSES[cause](rig.device, False)
    assert rig.kernel.serves()
    assert rig.services.figures[vhost_figure] == 1


def test_each_of_two_causes_counts(rig: Rig) -> None:
    """While one of two causes remains, the kernel does not get the rings."""
    for one in CAUSES:
        for other in CAUSES:
            if one != other:
                CAUSES[one](rig.device, True)
                CAUSES[other](rig.device, True)
                CAUSES[one](rig.device, False)
                assert not rig.kernel.serves(), (one, other)
                CAUSES[other](rig.device, False)
                assert rig.kernel.serves(), (one, other)


def test_earlier_notifications_reach_the_kernel(rig: Rig) -> None:
    """The kernel has not seen them, so both queues are notified again when the kernel listens."""
    for kick in rig.services.host.kicks:
        os.eventfd_read(kick)
    rig.device.set_direct(False)
    rig.device.set_direct(True)

    assert [os.eventfd_read(kick) for kick in rig.services.host.kicks] == [1, 1]


@pytest.mark.parametrize("missing", [spec.VIRTIO_NET_F_MRG_RXBUF, spec.VIRTIO_NET_F_GUEST_CSUM])
def test_rings_of_a_driver_that_needs_changed_headers_stay(rig: Rig, missing: int) -> None:
    """The kernel would set header fields that this driver has not accepted."""
    rig.device.quiesce(forget=True)
    rig.begin(FEATURES & ~(1 << missing))
    rig.device.resume()

    assert not rig.kernel.serves()


@pytest.mark.parametrize("seed", range(4))
def test_no_frame_is_lost_or_duplicated_while_rings_move(rig: Rig, seed: int) -> None:
    """Frames go both ways in order, while kernel and process take turns and indices wrap."""
    random_ = random.Random(seed)
    rig.post(SIZE)
    on: set[str] = set()
    handovers = 0
    for number in range(SIZE):
        rig.send(number)
        rig.send_from_network(number)
        if random_.random() < 0.5:
            cause = random_.choice(list(CAUSES))
            before = rig.kernel.serves()
            CAUSES[cause](rig.device, cause not in on)
            on ^= {cause}
            handovers += before != rig.kernel.serves()
        elif rig.kernel.serves() and random_.random() < 0.5:
            rig.kernel.move()
    for cause in on:
        CAUSES[cause](rig.device, False)
    received = rig.wait(RX, SIZE)
    rig.wait(TX, SIZE)

    assert handovers > 10
    assert received == [any_frame(60 + number, number, destination=LLADDR) for number in range(SIZE)]
    assert rig.arrived() == [any_frame(60 + number, number) for number in range(SIZE)]
    rig.device.quiesce(forget=False)
    assert [(queue.next_avail, queue.next_used) for queue in rig.queues] == [(START + SIZE & 0xFFFF,) * 2] * 2


REQUESTS = sorted(name for name in vars(vhost) if name.startswith("VHOST_") and name != "VHOST_GET_VRING_BASE")


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_process_serves_if_refused(kernel: FakeVhost, request_: str, capfd: pytest.CaptureFixture[str]) -> None:
    """After any refusal the process serves.  There is one log line, and the kernel is not asked again."""
    rig = Rig(kernel.memory, kernel)
    kernel.refuses = request_
    rig.device.set_direct(True)
    rig.device.resume()
    rig.send(1)
    rig.wait(TX, 1)
    kernel.refuses = ""
    asked = len(kernel.asked)
    rig.device.quiesce(forget=False)
    rig.device.resume()

    assert rig.arrived() == [any_frame(61, 1)]
    assert all((ring.tap, ring.kick) == (vhost.NONE, vhost.NONE) for ring in kernel.rings)
    assert kernel.asked[asked:] == []
    said = capfd.readouterr().err
    reason = os.strerror(errno.ENOTTY)
    assert said.count("vhost") == 1
    assert f"tap0: /dev/vhost-net: {reason}; the process moves the frames" in said
    rig.close()


def test_a_kernel_that_lacks_a_feature_of_the_driver(kernel: FakeVhost, capfd: pytest.CaptureFixture[str]) -> None:
    """A feature that the driver has accepted cannot be withdrawn, so the process serves."""
    kernel.offered &= ~(1 << spec.VIRTIO_F_VERSION_1)
    rig = Rig(kernel.memory, kernel)
    rig.device.set_direct(True)
    rig.device.resume()

    assert not kernel.serves()
    assert "it lacks the features 0x100000000" in capfd.readouterr().err
    rig.close()


def test_rings_that_the_kernel_keeps_end_the_process(rig: Rig) -> None:
    """The process must not use rings that the kernel may still use."""
    rig.kernel.refuses = "VHOST_NET_SET_BACKEND off"

    with pytest.raises(HostError, match="take rings back from /dev/vhost-net"):
        rig.device.quiesce(forget=False)


def test_a_ring_error_in_the_kernel_returns_the_rings_until_the_next_driver(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    """The process either names the error or can handle the ring."""
    rig.send(1)
    rig.kernel.complain(TX)
    rig.services.handlers[rig.device.vhost.failed]()
    rig.wait(TX, 1)
    rig.device.quiesce(forget=False)
    rig.device.resume()
    assert not rig.kernel.serves()
    assert "the kernel found an error in a ring" in capfd.readouterr().err

    rig.device.quiesce(forget=True)
    rig.begin()
    rig.device.resume()
    assert rig.kernel.serves()


def test_a_ring_error_of_an_earlier_driver_is_ignored(rig: Rig) -> None:
    """The kernel's report may arrive after a reset."""
    rig.send(1)
    rig.kernel.complain(TX)
    rig.device.quiesce(forget=True)
    rig.begin()
    rig.device.resume()
    rig.services.handlers[rig.device.vhost.failed]()
    assert rig.kernel.serves()


def test_a_used_index_that_a_driver_has_changed_is_not_handed_over(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """The kernel would use the driver's value, but the process has its own copy."""
    rig.device.quiesce(forget=False)
    rig.memory.load(rig.rings[TX].used + 2, struct.pack("<H", 7))
    rig.device.resume()

    assert not rig.kernel.serves()
    assert f"used index of queue 1 is 7, and was left at {START}" in capfd.readouterr().err


def test_chains_that_the_kernel_used_are_not_marked(rig: Rig) -> None:
    """When the process takes over, nothing is left to publish, so it reads no chains that the kernel has used."""
    rig.send(1)
    rig.wait(TX, 1)
    set_marking(rig.device, True)

    assert [queue.published for queue in rig.queues] == [queue.next_used for queue in rig.queues]
    set_marking(rig.device, False)


def test_read_only_memory_is_not_given_to_the_kernel(rig: Rig) -> None:
    """vhost has no read-only memory."""
    wanted = [(each.gpa, each.size, rig.memory.base + each.offset, 0) for each in rig.memory.regions if each.gpa != ROM]
    assert rig.kernel.regions == wanted


# --- the packet socket ---------------------------------------------------------------------------------------------


def send_from_guest(rig: Rig, frame: bytes, flags: int = 0) -> None:
    """Let the packet socket receive a frame of the guest."""
    rig.guest_side.send(bytes((flags,)) + bytes(9) + frame)
    handler = rig.services.handlers.get(rig.device.packets.fd)
    if handler is not None:
        handler()


def told(rig: Rig) -> list[bytes]:
    """Return the frames that the guest got through the packet socket."""
    found = []
    while select.select([rig.guest_side], [], [], 0)[0]:
        raw = rig.guest_side.recv(1 << 16)
        assert raw[:10] == bytes(10)
        found.append(raw[10:])
    return found


@pytest.fixture
def local(kernel: FakeVhost, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Yield a `local` interface whose rings the kernel serves."""
    made = Rig(kernel.memory, kernel, LOCAL.replace(**getattr(request, "param", {})))
    made.device.set_direct(True)
    made.device.resume()
    yield made
    made.close()


@pytest.mark.parametrize("missing", [True, False])
def test_dhcp_is_answered_through_the_packet_socket(local: Rig, missing: bool) -> None:
    """A request whose checksum is left to the device is answered too."""
    request = bytearray(dhcp(DISCOVER))
    if missing:
        request[14 + 20 + 6 : 14 + 20 + 8] = b"\x12\x34"
    send_from_guest(local, bytes(request), missing * spec.VIRTIO_NET_HDR_F_NEEDS_CSUM)

    assert [Answer(frame).kind for frame in told(local)] == [OFFER]
    assert local.services.figures[devmsg.COUNTER_NAMES.index("tx_answered")] == 1
    assert local.services.figures[devmsg.COUNTER_NAMES.index("dhcp_offers")] == 1


@pytest.mark.parametrize("local", [{"locked": True}], indirect=True)
def test_a_locked_guest_is_answered_at_its_own_address_only(local: Rig) -> None:
    """The tap's filters do not cover the packet socket, so the process checks the address itself."""
    request = bytearray(dhcp(DISCOVER))
    request[6:12] = b"\x02spoof"
    send_from_guest(local, bytes(request))
    assert told(local) == []

    send_from_guest(local, dhcp(DISCOVER))
    assert [Answer(frame).kind for frame in told(local)] == [OFFER]


def test_a_frame_is_not_answered_twice(local: Rig) -> None:
    """While the threads serve, the packet socket is ignored, and frames of that time are dropped later."""
    local.device.set_direct(False)
    send_from_guest(local, dhcp(DISCOVER))
    local.guest_side.send(bytes(10) + dhcp(DISCOVER))
    local.device.set_direct(True)
    local.services.handlers[local.device.packets.fd]()

    assert told(local) == []


def test_waiting_answers_are_sent_when_the_kernel_takes_over(local: Rig) -> None:
    """The threads can no longer deliver them, so the packet socket does."""
    local.device.set_direct(False)
    local.device._inject(b"\xff" * 60)
    local.device.set_direct(True)

    assert told(local) == [b"\xff" * 60]


def test_a_frame_that_waits_for_buffers_is_placed_or_counted(rig: Rig) -> None:
    """The kernel cannot know such a frame, so it is delivered or counted before the kernel gets the rings."""
    large = HEADER + any_frame(3 * STRIDE, 5)
    rig.device.quiesce(forget=False)
    for enough in (True, False):
        rig.device.receiver.held = bytearray(large)
        rig.post(4 if enough else 1)
        rig.device.resume()
        assert rig.kernel.serves()
        rig.device.quiesce(forget=False)
        assert rig.device.receiver.held == b""
        if enough:
            assert b"".join(rig.wait(RX, 4))[:1] == large[12:13]
    assert rig.services.figures[devmsg.COUNTER_NAMES.index("rx_no_room")] == 1


def test_addresses_of_a_guest_are_learnt_by_the_packet_socket(rig: Rig) -> None:
    """They are for the announcement after a move."""
    entry = devmsg.ANNOUNCED.pack(devmsg.ANNOUNCED_4, GUEST4)
    send_from_guest(rig, address(LLADDR, entry))

    assert rig.device.addresses.known == (entry,)


@pytest.mark.parametrize("gone", [False, True])
def test_a_tap_that_goes_down_or_is_removed(rig: Rig, gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packet socket gets an error, and the guest is told that the link is down, and later that it is up."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENETDOWN, "down")

    def ended(_: Tap) -> bool:
        raise HostError("tap0", errno.ENODEV)

    rig.tap.up = False
    with monkeypatch.context() as patch:
        patch.setattr("vmd.devices.vionet.packets.os", FailingReads(fail))
        if gone:
            patch.setattr(FakeTap, "is_up", ended)
        rig.services.handlers[rig.device.packets.fd]()
    assert not rig.kernel.serves()
    assert not rig.device.link_up

    rig.tap.up = True
    if not gone:
        rig.services.handlers[rig.tap.fd]()
    assert rig.kernel.serves() == (not gone)
    assert len(rig.services.told) == 1 + (not gone)


def test_a_tap_that_is_removed_while_it_goes_down(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tap is down at first, and removed when the rings are back."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENETDOWN, "down")

    looks = iter([False])

    def look(_: Tap) -> bool:
        for up in looks:
            return up
        raise HostError("tap0", errno.ENODEV)

    with monkeypatch.context() as patch:
        patch.setattr("vmd.devices.vionet.packets.os", FailingReads(fail))
        patch.setattr(FakeTap, "is_up", look)
        rig.services.handlers[rig.device.packets.fd]()
    assert not rig.kernel.serves()
    assert rig.device.gone
    assert set(rig.services.handlers) == {rig.device.vhost.failed}


class FailingReads:
    """A replacement for `posix` whose every read fails."""

    def __init__(self, fail: Callable[..., None]) -> None:
        self.read = fail


def test_a_tap_that_is_down_when_the_kernel_would_take_over(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packet socket tells it first, so the kernel does not get the rings until the tap is up."""
    rig.device.quiesce(forget=False)
    rig.tap.up = False
    begin = rig.device.packets.begin

    def find_down() -> None:
        begin()
        rig.device._look_at_tap()

    monkeypatch.setattr(rig.device.packets, "begin", find_down)
    rig.device.resume()
    assert not rig.kernel.serves()
    assert not rig.device.link_up
    assert rig.device.packets.fd not in rig.services.handlers
    monkeypatch.undo()
    rig.tap.up = True
    rig.services.handlers[rig.tap.fd]()
    assert rig.device.link_up


# --- the process -----------------------------------------------------------------------------------------------------


class Asked(KernelVionet):
    """The device behind the process.  It keeps its calls, and whether memory was being marked then."""

    def __init__(self, memory: "Memory") -> None:
        self.memory = memory
        self.calls: list[tuple[object, ...]] = []

    def set_direct(self, direct: bool) -> None:
        """Keep it."""
        self.calls.append(("direct", direct))

    def reconsider(self) -> None:
        """Keep it."""
        self.calls.append(("reconsider", self.memory.marking))


class Memory:
    """The part of guest memory that is used here."""

    marking = False


class Bare(KernelProcess):
    """The process without memory and loop."""

    def __init__(self, *resources: int, flags: int = devmsg.NET_VHOST) -> None:
        self.memory = Memory()  # type: ignore[assignment]
        self.host = Host.__new__(Host)
        self.host.net = devmsg.NET.unpack(
            devmsg.NET.pack(LLADDR, HOST_LLADDR, flags, 0, bytes(4), bytes(4), b"", b"", b"", b"", 0)
        )
        self.host.host_name = ""
        self.host.kicks = [0, 0]
        self.host.resources, self.host.names = list(resources), ["tap7", "vhost", "packets"]


def test_questions_that_move_the_rings() -> None:
    """The answer comes when the kernel has given them back.  An interface without vhost has none to move."""
    process = Bare()
    process.device = device = Asked(process.memory)  # type: ignore[arg-type]
    for direct in (1, 0):
        question = devmsg.DIRECT_BODY.pack(devmsg.DIRECT, direct)
        assert process.QUESTIONS[devmsg.DIRECT](process, question) == devmsg.STATUS.pack(devmsg.DIRECT, 0)
    for kind in (devmsg.MARK, devmsg.UNMARK):
        assert process.QUESTIONS[kind](process, devmsg.TYPE.pack(kind)) == devmsg.STATUS.pack(kind, 0)
    assert device.calls == [("direct", True), ("direct", False), ("reconsider", True), ("reconsider", False)]
    with pytest.raises(PeerError):
        process.QUESTIONS[devmsg.DIRECT](process, devmsg.TYPE.pack(devmsg.DIRECT))

    process.device = object()  # type: ignore[assignment]
    question = devmsg.DIRECT_BODY.pack(devmsg.DIRECT, 1)
    assert process.QUESTIONS[devmsg.DIRECT](process, question) == devmsg.STATUS.pack(devmsg.DIRECT, 0)
    process.QUESTIONS[devmsg.MARK](process, devmsg.TYPE.pack(devmsg.MARK))
    assert process.memory.marking


def test_the_descriptors_of_an_interface_with_vhost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its place, and there are exactly three.  Without vhost the interface is made as any other."""
    made: list[tuple[object, ...]] = []
    monkeypatch.setattr(module, "KernelVionet", lambda *words: made.append(words))
    monkeypatch.setattr(module, "make_plain", lambda *words: made.append(words))
    monkeypatch.setattr(module, "Tap", lambda *words: words)
    monkeypatch.setattr(module, "name_thread", lambda *words: made.append(words))
    process = Bare(100, 101, 102)
    make(process)
    assert made[0] == (EVENT,)
    assert made[1] == (Interface(lladdr=LLADDR, host_lladdr=HOST_LLADDR, vhost=True), (100, "tap7"), process, 101, 102)
    for resources in ((100,), (100, 101), (100, 101, 102, 103)):
        with pytest.raises(PeerError, match=f"{len(resources)} resources instead of tap"):
            make(Bare(*resources))
    made.clear()
    plain = Bare(100, flags=0)
    make(plain)
    assert made == [(plain,)]


# --- constants -----------------------------------------------------------------------------------------------------


def test_the_filter_allows_exactly_the_used_requests() -> None:
    """A process that was taken over must not make other requests, such as for a log in memory of its choice."""
    assert sorted(VHOST_IOCTLS) == sorted(number for name, number in vars(vhost).items() if name.startswith("VHOST_"))


@pytest.mark.skipif(not Path("/usr/include/linux/vhost.h").exists(), reason="<linux/vhost.h> is needed to compare with")
def test_numbers_are_the_kernels(tmp_path: Path) -> None:
    """Requests, and the sizes of their arguments, are those of <linux/vhost.h>."""
    sizes = {"vhost_vring_state": vhost.STATE, "vhost_vring_file": vhost.FILE, "vhost_vring_addr": vhost.ADDR,
             "vhost_memory": vhost.MEMORY, "vhost_memory_region": vhost.REGION}  # fmt: skip
    checks = [f'_Static_assert({name} == {number}u, "");' for name, number in vars(vhost).items() if "VHOST_" in name]
    checks += [f'_Static_assert(sizeof(struct {name}) == {each.size}, "");' for name, each in sizes.items()]
    source = tmp_path / "vhost.c"
    source.write_text("#include <sys/ioctl.h>\n#include <linux/vhost.h>\n" + "\n".join(checks))
    assert os.spawnlp(os.P_WAIT, "gcc", "gcc", "-fsyntax-only", str(source)) == 0


def test_the_kernel_is_told_of_all_features_that_rings_depend_on(rig: Rig) -> None:
    """It finds chains and stores indices by them.  Bit 27 means something else to it."""
    rig.device.quiesce(forget=True)
    rig.begin((1 << 33) - 1)
    rig.device.resume()

    assert rig.kernel.serves()
    assert rig.kernel.features == sum(1 << bit for bit in (15, 24, 28, 29, 32))


@pytest.mark.parametrize("mtu", [0, 1400])
def test_features_and_configuration_of_an_interface(kernel: FakeVhost, mtu: int) -> None:
    """Offloads for frames to the guest depend on the tap, and the MTU is known if it is configured (5.1.3, 5.1.4)."""
    rig = Rig(kernel.memory, kernel, PLAIN.replace(mtu=mtu))
    always = {0, 5, 11, 12, 13, 15, 16} | ({3} if mtu else set())

    for offloads, bits in ((0, set[int]()), (1, {1}), (7, {1, 7, 8}), (15, {1, 7, 8, 9})):
        rig.tap.offloads = offloads
        assert rig.device.features == sum(1 << bit for bit in always | bits)
    assert rig.device.config == LLADDR + struct.pack("<HHH", 1, 1, mtu)
    rig.close()
