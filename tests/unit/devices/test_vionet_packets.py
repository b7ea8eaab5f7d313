"""What the main thread hears of a guest, and tells it, while the kernel moves the frames."""

import socket
from collections.abc import Callable, Iterator

import pytest

from tests.support.figures import unseen
from tests.support.packets import DISCOVER, GUEST4, HOST4, LLADDR, OFFER, RELEASE, Answer, dhcp
from vmd.devices.vionet import announce
from vmd.devices.vionet.addresses import Addresses
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.local import LocalNetwork
from vmd.devices.vionet.packets import HEADER, Packets
from vmd.ipc import devmsg

LOCAL = Interface(lladdr=LLADDR, local=True, guest4=GUEST4, host4=HOST4, vhost=True)
PLAIN, UNSUMMED = bytes(HEADER), b"\1" + bytes(HEADER - 1)  # virtio headers: the latter leaves the sum to others


class Process:
    """A process that looks at a socket when it is told to."""

    def __init__(self) -> None:
        self.figures = unseen("vionet")
        self.slot = memoryview(bytearray(devmsg.FIGURES_SLOT_BYTES - 8 * devmsg.FIGURES_HEAD)).cast("Q")
        self.watched: dict[int, Callable[[], None]] = {}

    def post(self, job: Callable[[], None]) -> None:
        """Do it at once."""
        job()

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """It does not come to that."""

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Note it."""
        self.watched[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Forget it."""
        del self.watched[fd]

    def look(self) -> None:
        """Call back for what may be readable."""
        for handler in tuple(self.watched.values()):
            handler()


class Guest:
    """The other end of the socket, and what is behind this one."""

    def __init__(self, interface: Interface) -> None:
        self.socket, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.process, self.answered, self.told = Process(), 0, list[bytes]()
        local = None
        if interface.local:
            local = LocalNetwork(interface, self.inject, self.process, self.told.append)
        self.addresses = Addresses(interface.lladdr)
        self.packets = Packets(ours.detach(), self.process, local, self.addresses, self.count, self.fail)

    def inject(self, frame: bytes) -> None:
        """Have the guest receive a frame."""
        assert self.packets.send(frame)

    def fail(self) -> None:
        """The tap is up."""
        raise AssertionError

    def count(self) -> None:
        """Count a frame that was for us."""
        self.answered += 1

    def say(self, frame: bytes, header: bytes = PLAIN) -> None:
        """Send a frame, which the process looks at if it listens."""
        self.socket.send(header + frame)
        self.process.look()

    def hear(self) -> list[int]:
        """Return the kinds of the answers that have come."""
        kinds: list[int] = []
        while True:
            try:
                packet = self.socket.recv(4096)
            except BlockingIOError:
                return kinds
            assert packet[:HEADER] == PLAIN
            kinds.append(Answer(packet[HEADER:]).kind)


@pytest.fixture
def guest() -> Iterator[Guest]:
    """A guest of a local interface."""
    guest = Guest(LOCAL)
    with guest.socket:
        yield guest


def test_a_request_is_answered_while_the_kernel_moves_the_frames(guest: Guest) -> None:
    """Not before, for then it was seen on its way; and not afterwards."""
    guest.say(dhcp(DISCOVER))
    guest.packets.begin()
    guest.process.look()
    assert (guest.hear(), guest.answered) == ([], 0)

    guest.say(dhcp(DISCOVER))
    assert (guest.hear(), guest.answered) == ([OFFER], 1)

    guest.packets.end()
    guest.say(dhcp(DISCOVER))
    assert (guest.hear(), guest.process.watched) == ([], {})


def test_what_the_kernel_has_moved_is_heard_before_others_move_frames(guest: Guest) -> None:
    """Else a request that came just before would have no answer."""
    guest.packets.begin()
    guest.socket.send(PLAIN + dhcp(DISCOVER))

    guest.packets.end()

    assert guest.hear() == [OFFER]


def test_a_sum_that_was_left_to_others_is_not_looked_at(guest: Guest) -> None:
    """Linux sends so from an ordinary socket."""
    request = bytearray(dhcp(DISCOVER))
    request[40:42] = b"\x12\x34"  # the sum of UDP
    guest.packets.begin()

    guest.say(bytes(request))
    assert guest.hear() == []
    guest.say(bytes(request), UNSUMMED)
    assert guest.hear() == [OFFER]


@pytest.mark.parametrize(
    "frame", [b"", b"\0", bytes(14), bytes(60_000), dhcp(RELEASE, ciaddr=GUEST4), dhcp(DISCOVER)[:60]]
)
def test_what_gets_no_answer_ends_there(guest: Guest, frame: bytes) -> None:
    """Whatever it is; the next request is answered."""
    guest.packets.begin()

    guest.say(frame)
    guest.say(dhcp(DISCOVER))

    assert (guest.hear(), guest.answered) == ([OFFER], 1)


def test_a_guest_on_a_switch_is_listened_to() -> None:
    """What it says of its addresses goes along when it goes elsewhere; nothing is answered."""
    guest = Guest(LOCAL.replace(local=False))
    with guest.socket:
        guest.packets.begin()
        guest.say(announce.router_address(LLADDR, GUEST4))

        assert guest.addresses.known == (devmsg.ANNOUNCED.pack(devmsg.ANNOUNCED_4, GUEST4),)
        assert (guest.hear(), guest.answered) == ([], 0)
