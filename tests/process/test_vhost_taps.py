"""Taps whose frames the kernel moves: the filters of priv and the packet sockets, which replace checks of the process.

There is no vhost-net here.  The test writes and reads the frames of a tap, as the kernel would.
"""

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.figures import unseen
from tests.support.network import VNET_HDR_BYTES, Network, TapInterface
from tests.support.packets import (
    ALL4,
    ALL_ROUTERS,
    ANY4,
    BROADCAST,
    DISCOVER,
    GUEST_LL,
    LLADDR,
    any_frame,
    dhcp,
    ethernet,
    icmpv6,
    ipv4,
    ipv6,
    solicitation,
    tcp4,
    tcp6,
    udp,
)
from tests.support.privdriver import DEADLINE_S, Poor, Priv, nic, switch
from tests.support.throughhost import GUEST4, HOST4, PREFIX6
from tests.support.waiting import pause
from vmd.devices.vionet.addresses import Addresses
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.local import LocalNetwork
from vmd.devices.vionet.packets import Packets
from vmd.ipc import devmsg
from vmd.ipc.messages.priv import AdoptNics, AskDrops, DropsReported, FramesDropped
from vmd.parent.tapstats import TapStats
from vmd.parent.vhost import packet_socket
from vmd.priv.rules import NFT_PATHS

pytestmark = pytest.mark.root

HEADER = bytes(VNET_HDR_BYTES)
OTHER = bytes.fromhex("0200deadbeef")
NEAR = bytes((*LLADDR[:5], LLADDR[5] ^ 1))
LOCAL = {"host4": HOST4, "guest4": GUEST4, "prefix6": PREFIX6, "vhost": True}
LOCKED = {"locked": True, "vhost": True}
TAG = b"\x81\0\0\5"  # of VLAN 5
IPV4, IPV6 = 0x0800, 0x86DD


@pytest.fixture
def network() -> Iterator[Network]:
    """A network namespace as the host."""
    with Network() as network:
        yield network


@pytest.fixture
def priv(network: Network) -> Iterator[Priv]:
    """A priv in the network of that host."""
    with Priv(network) as priv:
        yield priv


def tables(network: Network) -> list[str]:
    """Return the names of the nftables tables for taps."""
    found = json.loads(network.run("nft", "-j", "list", "tables"))["nftables"]
    return sorted(each["table"]["name"] for each in found if each.get("table", {}).get("family") == "netdev")


def until(true: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds.  `what` is the failure message."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline_s, what
        pause()


def taken(fd: int) -> list[bytes]:
    """Read all frames that wait in a tap or a packet socket."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(os.read(fd, 1 << 17)[VNET_HDR_BYTES:])
    return found


def received(fd: int, last: bytes) -> list[bytes]:
    """Return the frames that a tap receives before the frame `last`."""
    found: list[bytes] = []

    def come() -> bool:
        found.extend(taken(fd))
        return last in found

    until(come, "the last frame has not arrived")
    return found[: found.index(last)]


def of_guests(frames: list[bytes]) -> list[bytes]:
    """Return the frames that guests have sent.  The host may send frames by itself."""
    return [frame for frame in frames if frame[6:12] in (LLADDR, OTHER, NEAR, bytes(6))]


def send(fd: int, *sent: bytes) -> None:
    """Send frames, as if by the kernel."""
    for frame in sent:
        os.write(fd, HEADER + frame)


def dropped(priv: Priv) -> tuple[int, int]:
    """Return the next counts of dropped frames that priv reports: spoofed, and unwanted."""
    found: list[tuple[int, int]] = []

    def said() -> bool:
        """Ask for the counts.  A priv that has read them just before does not read them again for the question."""
        priv.send(AskDrops(vmid=1))
        while not isinstance(message := priv.receive_any().message, DropsReported):
            assert isinstance(message, FramesDropped), message
            assert (message.vmid, message.index) == (1, 0)
            found.append((message.spoofed, message.unwanted))
        return bool(found)

    until(said, "nothing was dropped")
    return found[-1]


def quiet(network: Network, *names: str) -> None:
    """Stop the host from sending frames by itself on some interfaces."""
    for name in names:
        network.write(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "1")


def test_a_locked_guest_uses_only_its_own_address(network: Network, priv: Priv) -> None:
    """Frames that it sends from another address, and frames to another address, are dropped at its tap."""
    priv.configure(switch("br0"))
    with (
        priv.make(nic("tap0", bridge="br0", **LOCKED)) as ours,
        priv.make(nic("tap1", bridge="br0", lladdr=OTHER, alias="vm2-if0-b"), vmid=2) as theirs,
    ):
        quiet(network, "br0", "tap0", "tap1")
        assert (ours.nics[0].vhost, ours.nics[0].without, theirs.nics[0].vhost) == (True, "", False)
        spoofed = [any_frame(60, source=OTHER), any_frame(61, source=NEAR), any_frame(62, source=bytes(6))]
        spoofed += [ethernet(bytes(60), 0x8100, source=NEAR), dhcp(DISCOVER).replace(LLADDR, NEAR, 1)]
        good = [any_frame(length, source=LLADDR) for length in (60, 1514)]
        good.append(any_frame(70, source=LLADDR, destination=OTHER))
        last = any_frame(99, 9, source=LLADDR)
        send(ours.fds[0], *spoofed, *good, last)
        assert of_guests(received(theirs.fds[0], last)) == good

        groups = BROADCAST, bytes.fromhex("01005e000001"), bytes.fromhex("333300000001")
        for_it = [any_frame(64, n, source=OTHER, destination=each) for n, each in enumerate((LLADDR, *groups))]
        others = [any_frame(65, n, source=OTHER, destination=each) for n, each in enumerate((NEAR, bytes(6)))]
        last = any_frame(99, 9, source=OTHER)
        send(theirs.fds[0], *others, *for_it, last)
        assert of_guests(received(ours.fds[0], last)) == for_it

        assert dropped(priv) == (len(spoofed), len(others))
    priv.remove()
    assert tables(network) == []


def unusual() -> Iterator[bytes]:
    """Yield frames for the process of a `local` interface, frames that resemble them, and randomly changed ones."""
    drawn = random.Random(3)
    request, ask = dhcp(DISCOVER), solicitation()
    yield from (request, ask, tcp4(b"a" * 100), tcp6(b"b" * 100))
    for ports in ((68, 68), (67, 67), (67, 68)):
        yield ethernet(ipv4(udp(bytes(300), ANY4, ALL4, ports), 17, ANY4, ALL4), IPV4)
    datagram = udp(bytes(300), ANY4, ALL4)
    yield ethernet(ipv4(datagram, 6, ANY4, ALL4), IPV4)
    yield ethernet(ipv4(datagram, 17, ANY4, ALL4, first=0x47, options=bytes(8)), IPV4)
    for fragment in (0x2000, 1, 0x2001, 0x4000):
        yield ethernet(ipv4(datagram, 17, ANY4, ALL4, fragment=fragment), IPV4)
    for kind in (128, 134, 135, 136):
        yield ethernet(ipv6(icmpv6(kind, bytes(20), GUEST_LL, ALL_ROUTERS), 58, GUEST_LL, ALL_ROUTERS), IPV6)
    for frame in (request, ask):
        yield frame[:12] + TAG + frame[12:]
        for _ in range(60):
            changed = bytearray(frame)
            changed[drawn.randrange(14, 62)] = drawn.randrange(256)
            yield bytes(changed)


def is_ip(frame: bytes) -> bool:
    """Return whether the host would accept a frame as an IP packet."""
    if int.from_bytes(frame[12:14], "big") == IPV6:
        return True
    return frame[14] >> 4 == 4 and frame[14] & 15 >= 5 and int.from_bytes(frame[16:18], "big") <= len(frame) - 14


@pytest.mark.deep
def test_each_frame_goes_either_to_the_process_or_to_the_host(network: Network, priv: Priv) -> None:
    """Only the socket of a `local` interface gets the frames for its process.  Only the host gets all others."""
    with priv.make(nic("tap0", **LOCAL)) as made, contextlib.ExitStack() as stack:
        with network.inside():
            process = packet_socket("tap0", made.nics[0].index, local=True)
        stack.callback(os.close, process)
        hosts = [stack.enter_context(network.socket(socket.AF_PACKET, socket.SOCK_RAW)) for _ in range(2)]
        for each, kind in zip(hosts, (IPV4, IPV6), strict=True):  # these sockets get a frame only after the filters
            each.setblocking(False)
            each.bind(("tap0", kind))
        heard_by_process = 0
        for frame in unusual():
            for each in hosts:
                at_host(each)
            send(made.fds[0], frame)  # the kernel delivers before this returns

            heard, by_host = len(taken(process)), sum(len(at_host(each)) for each in hosts)
            heard_by_process += heard
            assert heard + by_host == 1 or (not is_ip(frame) and heard + by_host > 1), (frame.hex(), heard, by_host)
        assert 3 <= heard_by_process < 120
        assert process_receives(made.fds[0], process, dhcp(DISCOVER)) == [dhcp(DISCOVER)]


def process_receives(tap: int, process: int, frame: bytes) -> list[bytes]:
    """Send a frame from the guest.  Return the frames that the packet socket of the process then has."""
    send(tap, frame)
    return taken(process)


def at_host(sock: socket.socket) -> list[bytes]:
    """Return the frames from the guest that the host has received."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            frame, where = sock.recvfrom(1 << 16)
            if where[2] != 4:  # PACKET_OUTGOING
                found.append(frame)
    return found


def test_a_packet_socket_gets_only_the_frames_that_it_needs(network: Network, priv: Priv) -> None:
    """It gets no other frames, and none to the guest.  Its filter stays.  Frames that it sends reach the guest."""
    with priv.make(nic("tap0", vhost=True)) as made, network.inside():
        quiet(network, "tap0")
        stats = TapStats()
        tap, index = made.fds[0], made.nics[0].index
        process = socket.socket(fileno=packet_socket("tap0", index, local=False))
        with process:
            arp = ethernet(bytes(46), 0x0806)
            told = ethernet(ipv6(icmpv6(136, bytes(20), GUEST_LL, ALL_ROUTERS), 58, GUEST_LL, ALL_ROUTERS), IPV6)
            send(tap, dhcp(DISCOVER), arp, tcp4(b"a"), told, solicitation(), any_frame(60, source=LLADDR))
            assert taken(process.fileno()) == [arp, told]

            taken(tap)
            before = stats.of(index)
            assert before["tx_packets"] == 6
            process.send(HEADER + arp)
            assert taken(tap) == [arp]
            assert taken(process.fileno()) == []
            after = stats.of(index)
            assert (after["rx_packets"] - before["rx_packets"], after["rx_bytes"] - before["rx_bytes"]) == (1, len(arp))
            for option, value in ((26, bytes(16)), (27, bytes(4)), (44, bytes(4))):  # attach, detach, unlock
                with pytest.raises(PermissionError):
                    process.setsockopt(socket.SOL_SOCKET, option, value)
        stats.close()


class Answers:
    """The work of an interface's process while the kernel moves the frames.  The test is its event loop."""

    def __init__(self, interface: Interface, fd: int) -> None:
        self.figures = unseen("vionet")
        self.slot = memoryview(bytearray(devmsg.FIGURES_SLOT_BYTES - 8 * devmsg.FIGURES_HEAD)).cast("Q")
        local = LocalNetwork(interface, self.inject, self, lambda _packet: None)
        self.packets = Packets(fd, self, local, Addresses(interface.lladdr), lambda: None, lambda: None)
        self.packets.begin()

    def inject(self, frame: bytes) -> None:
        """Have the guest receive a frame."""
        assert self.packets.send(frame)

    def post(self, job: Callable[[], None]) -> None:
        """Run the job at once."""
        job()

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """Do nothing: the tests need no messages that the process sends by itself."""

    def watch(self, fd: int, handler: Callable[[], None], events: int = 0) -> None:
        """Do nothing: the test calls the handler."""

    def unwatch(self, fd: int) -> None:
        """Do nothing: nothing is watched."""


class KernelGuest:
    """A Linux guest in its own namespace.  `pump` moves the frames between its card and our tap, as vhost-net would."""

    def __init__(self, network: Network, tap: int, answers: Answers) -> None:
        self.network, self.tap, self.answers = network, tap, answers
        self.card = TapInterface(network, "eth0", ipv6=True)
        self.card.be_a_card(LLADDR)

    def pump(self) -> None:
        """Move waiting frames both ways, and let the process answer."""
        send(self.tap, *taken(self.card.fd))
        self.answers.packets.on_readable()
        for frame in taken(self.tap):
            with contextlib.suppress(OSError):  # the guest's stack may refuse a frame
                send(self.card.fd, frame)

    def run(self, *command: str) -> str:
        """Run a program in the guest until it ends.  Return its output."""
        with self.network.inside():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        poll = select.poll()
        for fd in (self.card.fd, self.tap):
            poll.register(fd, select.POLLIN)

        def ended() -> bool:
            poll.poll(20)
            self.pump()
            return process.poll() is not None

        until(ended, f"{command} does not end")
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output


@pytest.mark.deep
def test_a_guest_is_given_its_addresses(network: Network, priv: Priv, tmp_path: Path) -> None:
    """A real DHCP client and a real kernel get their addresses over the socket, and reach the host."""
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n[ $1 = bound ] && env\nexit 0\n")
    script.chmod(0o755)
    with priv.make(nic("tap0", **LOCAL, locked=True)) as made, Network() as elsewhere:
        tap = made.nics[0]
        interface = Interface(
            lladdr=LLADDR, host_lladdr=tap.lladdr, local=True, locked=True, guest4=GUEST4, host4=HOST4,
            host_link_local=tap.link_local, prefix6=PREFIX6, dns4=(HOST4,), vhost=True,
        )  # fmt: skip
        with network.inside():
            answers = Answers(interface, packet_socket("tap0", tap.index, local=True))
            server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with server:
            server.bind(("0.0.0.0", 67))
            guest = KernelGuest(elsewhere, made.fds[0], answers)
            with guest.card:
                client = ("busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "5", "-s", str(script))
                told = dict(line.split("=", 1) for line in guest.run(*client).splitlines() if "=" in line)
                assert (told["ip"], told["router"]) == ("100.64.1.3", "100.64.1.2")
                guest.run("ip", "address", "add", "100.64.1.3/31", "dev", "eth0")
                guest.run("busybox", "ping", "-c", "2", "-W", "10", "100.64.1.2")
                until(lambda: "dynamic" in guest.run("ip", "-6", "address", "show", "dev", "eth0"), "no prefix")
                guest.run("busybox", "ping6", "-c", "2", "-W", "10", "fd42:42:42:4::1")
                guest.run("ip", "link", "set", "eth0", "address", OTHER.hex(":"))  # it takes another address
                assert "100% packet loss" in guest.run("sh", "-c", "busybox ping -c 1 -W 1 100.64.1.2; true")
            with pytest.raises(BlockingIOError):
                server.recv(1)
        assert dropped(priv)[0] > 0


@pytest.mark.deep
def test_filters_are_there_as_long_as_the_interface(network: Network) -> None:
    """They survive the end of a priv.  The next priv adopts those of known interfaces, and removes all others."""
    plain = nic("tap2", vhost=True, alias="vm1-if2-a")
    requests = nic("tap0", **LOCKED), nic("tap1", **LOCAL, alias="vm1-if1-a"), plain
    with Priv(network) as first, first.make(*requests) as made:
        os.kill(first.child.pid, signal.SIGKILL)
        first.wait()
        assert tables(network) == ["vmd_tap0", "vmd_tap1"]
        send(made.fds[0], any_frame(60, source=OTHER))

        known = AdoptNics(vmid=1, nics=requests, made=made.nics)
        with Priv(network, adopted=known) as second:
            assert tables(network) == ["vmd_tap0", "vmd_tap1"]
            send(made.fds[0], any_frame(60, source=OTHER))
            assert dropped(second) == (2, 0)
            os.kill(second.child.pid, signal.SIGKILL)
            second.wait()
        with Priv(network) as third:
            assert tables(network) == []
            assert "table netdev vmd_tap0, table netdev vmd_tap1" in third.log


def test_a_host_that_cannot_filter(network: Network) -> None:
    """An interface that needs filters gets no vhost, and the parent is told why.  A plain interface gets vhost."""
    with (
        Priv(network, Poor(*NFT_PATHS)) as priv,
        priv.make(nic("tap0", **LOCKED), nic("tap1", vhost=True, alias="vm1-if1-a")) as made,
    ):
        locked, plain = made.nics
        assert (locked.vhost, plain.vhost, plain.without) == (False, True, "")
        assert locked.without == "there can be no filters on tap0: nft was not found: install nftables"


@pytest.mark.deep
def test_priv_restores_filters_that_others_remove(network: Network, priv: Priv) -> None:
    """After a flush of all rules, and of one chain.  The message names the tap."""
    with priv.make(nic("tap0", **LOCKED)):
        before = network.run("nft", "list", "table", "netdev", "vmd_tap0")
        network.run("nft", "flush", "ruleset")
        assert priv.hear().text == "filters on tap0 were removed by another program: they were laid again"
        assert network.run("nft", "list", "table", "netdev", "vmd_tap0") == before
        network.run("nft", "flush", "chain", "netdev", "vmd_tap0", "sent")
        until(lambda: network.run("nft", "list", "table", "netdev", "vmd_tap0") == before, "not restored")


def test_the_counts_of_dropped_frames_survive_the_filters(network: Network, priv: Priv) -> None:
    """A counter that goes back would look like a new interface."""
    with priv.make(nic("tap0", **LOCKED)) as made:
        spoofed = any_frame(60, source=OTHER)
        send(made.fds[0], spoofed)
        assert dropped(priv) == (1, 0)
        network.run("nft", "flush", "ruleset")
        assert "laid again" in priv.hear().text
        send(made.fds[0], spoofed)
        assert dropped(priv) == (2, 0)


@pytest.mark.deep
def test_the_filters_of_a_deleted_tap_do_not_apply_to_the_next_tap_of_that_name(network: Network, priv: Priv) -> None:
    """Another VM, whose guest has another address, may get the name of a tap that was deleted by hand."""
    priv.configure(switch("br0"))
    with (
        priv.make(nic("tap0", **LOCKED)),
        priv.make(nic("tap1", bridge="br0", lladdr=NEAR, alias="vm3-if0-c"), vmid=3) as third,
    ):
        network.run("ip", "link", "delete", "tap0")
        with priv.make(nic("tap0", bridge="br0", lladdr=OTHER, alias="vm2-if0-b"), vmid=2) as second:
            frame, last = any_frame(60, source=OTHER), any_frame(99, 9, source=OTHER)
            send(second.fds[0], frame, last)
            assert frame in received(third.fds[0], last)
            priv.remove(1)
            assert tables(network) == []
