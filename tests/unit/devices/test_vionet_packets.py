"""The main thread receives frames of a guest and answers them while the kernel moves all frames."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

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
PLAIN, UNSUMMED = bytes(HEADER), b"\1" + bytes(HEADER - 1)  # virtio headers; with the second one the sum is missing


class Process:
    """A device process.  `look` calls the handlers of its sockets."""

    def __init__(self) -> None:
        self.figures = unseen("vionet")
        self.slot = memoryview(bytearray(devmsg.FIGURES_SLOT_BYTES - 8 * devmsg.FIGURES_HEAD)).cast("Q")
        self.watched: dict[int, Callable[[], None]] = {}

    def post(self, job: Callable[[], None]) -> None:
        """Run the job at once."""
        job()

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """Do nothing."""

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Keep the handler."""
        self.watched[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Remove the handler."""
        del self.watched[fd]

    def look(self) -> None:
        """Call all handlers."""
        for handler in tuple(self.watched.values()):
            handler()


class Guest:
    """A guest at the other end of the packet socket, with the objects that answer it."""

    def __init__(self, interface: Interface) -> None:
        self.socket, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.process, self.answered, self.told = Process(), 0, list[bytes]()
        local = None
        if interface.local:
            local = LocalNetwork(interface, self.inject, self.process, self.told.append)
        self.addresses = Addresses(interface.lladdr)
        self.packets = Packets(ours.detach(), self.process, local, self.addresses, self.count, self.fail)

    def close(self) -> None:
        """Close both ends."""
        self.socket.close()
        os.close(self.packets.fd)

    def inject(self, frame: bytes) -> None:
        """Send a frame to the guest."""
        assert self.packets.send(frame)

    def fail(self) -> None:
        """Fail, because the tap stays up."""
        raise AssertionError

    def count(self) -> None:
        """Count a frame that was answered."""
        self.answered += 1

    def send_frame(self, frame: bytes, header: bytes = PLAIN) -> None:
        """Send a frame, and let the process handle it if it listens."""
        self.socket.send(header + frame)
        self.process.look()

    def read_answers(self) -> list[int]:
        """Return the kinds of the answers so far."""
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
    """Yield a guest with a local interface."""
    with closing(Guest(LOCAL)) as guest:
        yield guest


def test_a_request_is_answered_while_the_kernel_moves_the_frames(guest: Guest) -> None:
    """A request before or after that is handled by the threads, and not answered here."""
    guest.send_frame(dhcp(DISCOVER))
    guest.packets.begin()
    guest.process.look()
    assert (guest.read_answers(), guest.answered) == ([], 0)

    guest.send_frame(dhcp(DISCOVER))
    assert (guest.read_answers(), guest.answered) == ([OFFER], 1)

    guest.packets.end()
    guest.send_frame(dhcp(DISCOVER))
    assert (guest.read_answers(), guest.process.watched) == ([], {})


def test_frames_that_the_kernel_has_moved_are_answered_at_the_end(guest: Guest) -> None:
    """Otherwise a request just before the threads take over would get no answer."""
    guest.packets.begin()
    guest.socket.send(PLAIN + dhcp(DISCOVER))

    guest.packets.end()

    assert guest.read_answers() == [OFFER]


def test_a_missing_checksum_is_not_checked(guest: Guest) -> None:
    """Linux sends such frames from an ordinary socket."""
    request = bytearray(dhcp(DISCOVER))
    request[40:42] = b"\x12\x34"  # the sum of UDP
    guest.packets.begin()

    guest.send_frame(bytes(request))
    assert guest.read_answers() == []
    guest.send_frame(bytes(request), UNSUMMED)
    assert guest.read_answers() == [OFFER]


@pytest.mark.parametrize(
    "frame", [b"", b"\0", bytes(14), bytes(60_000), dhcp(RELEASE, ciaddr=GUEST4), dhcp(DISCOVER)[:60]]
)
def test_a_frame_without_an_answer_is_dropped(guest: Guest, frame: bytes) -> None:
    """The next request is answered."""
    guest.packets.begin()

    guest.send_frame(frame)
    guest.send_frame(dhcp(DISCOVER))

    assert (guest.read_answers(), guest.answered) == ([OFFER], 1)


def test_addresses_of_a_guest_on_a_switch_are_recorded() -> None:
    """They are sent to the receiver of a migration.  There are no answers."""
    with closing(Guest(LOCAL.replace(local=False))) as guest:
        guest.packets.begin()
        guest.send_frame(announce.router_address(LLADDR, GUEST4))

        assert guest.addresses.known == (devmsg.ANNOUNCED.pack(devmsg.ANNOUNCED_4, GUEST4),)
        assert (guest.read_answers(), guest.answered) == ([], 0)
