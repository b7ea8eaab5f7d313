"""A local interface: the answers of the process, the work of the host's kernel, and real clients as a check.

The guest is our driver, or a Linux network stack in its own namespace, whose frames the driver moves.
"""

import contextlib
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fakedriver import DEADLINE_S
from tests.support.netdriver import (
    ALL,
    HEADER,
    MRG,
    NEEDS_CSUM,
    RX,
    NetDriver,
    Nic,
    net_start,
)
from tests.support.network import Network, TapInterface
from tests.support.packets import (
    ACK,
    ALL4,
    ANY4,
    DECLINE,
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
    udp,
)
from tests.support.waiting import pause
from vmd.devices.vionet.dhcp import REASONS
from vmd.devices.vionet.local import WAITING_MAX
from vmd.devices.vionet.receive import INJECTED_MAX
from vmd.ipc import devmsg
from vmd.parent.figures import host_names
from vmd.virtio import spec

pytestmark = pytest.mark.root

PREFIX6 = bytes.fromhex("fd00112233440305") + bytes(8)
HOST6 = PREFIX6[:15] + b"\1"
DNS4 = (bytes((9, 9, 9, 9)), bytes((1, 1, 1, 1)))
DNS6 = (bytes.fromhex("26200000000000000000000000fe00fe"),)
FEATURES = ALL & ~(1 << spec.VIRTIO_NET_F_GUEST_CSUM)  # so that received frames have complete checksums


def inet(address: bytes) -> str:
    """Return an address in its usual notation."""
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def local_net(flags: int = 0, mtu: int = 0) -> bytes:
    """Return devmsg.NET of a local interface."""
    return net_start(
        host_lladdr=HOST_LLADDR, flags=devmsg.NET_LOCAL | flags, mtu=mtu, guest4=GUEST4, host4=HOST4,
        prefix6=PREFIX6, dns4=DNS4, dns6=DNS6,
    )  # fmt: skip


def host_tap(network: Network, name: str) -> TapInterface:
    """Make a tap with the host's addresses, as priv does."""
    tap = TapInterface(network, name, ipv6=True)
    network.write(f"/proc/sys/net/ipv6/conf/{name}/accept_dad", "0")
    tap.set("down")
    tap.set("address", HOST_LLADDR.hex(":"))
    network.run("ip", "address", "add", f"{inet(HOST4)}/31", "dev", name)
    network.run("ip", "address", "add", f"{inet(HOST6)}/64", "dev", name, "nodad")
    tap.set("up")
    return tap


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Give the host's namespace."""
    with Network() as made:
        yield made


@pytest.fixture(scope="module")
def shared(network: Network) -> Iterator[Nic]:
    """Give a process with a local interface."""
    tap = host_tap(network, "tap0")
    nic = Nic(tap, NetDriver(tap, local_net(), host_name="web.example.org"))
    yield nic
    nic.close()


@pytest.fixture
def nic(shared: Nic) -> Nic:
    """Give the process after a reset, with buffers posted."""
    shared.device.read_log()
    shared.driver.renew(FEATURES)
    shared.forget()
    shared.driver.post(16)
    return shared


def next_of(nic: Nic, kind: int) -> bytes:
    """Return the next frame to the guest with this EtherType.  The host's kernel sends others by itself."""
    while True:
        received = nic.driver.receive()
        assert received.header[:10] == bytes(10)
        if received.frame[12:14] == kind.to_bytes(2, "big"):
            return received.frame


def ask(nic: Nic, frame: bytes) -> Answer:
    """Send a request and return the answer."""
    nic.driver.send(frame)
    return Answer(next_of(nic, 0x0800))


def passed(nic: Nic, frame: bytes) -> bool:
    """Send a frame.  Return whether it reaches the host.  A second frame, which does, marks the end."""
    nic.forget()
    nic.driver.send(frame)
    nic.driver.send(any_frame(60, 99))
    seen = []
    while any_frame(60, 99) not in seen:
        seen.append(nic.host.receive())
    return frame in seen


# --- DHCP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [FEATURES, FEATURES & ~MRG, 0], ids=hex)
def test_guest_gets_its_lease(nic: Nic, features: int) -> None:
    """DISCOVER, REQUEST and a renewal to our own address are answered.  None reaches the tap; the VM hears once."""
    nic.driver.renew(features)
    while nic.device.readable(nic.device.informs.fileno()):
        nic.device.informs.recv(devmsg.PACKET_MAX)
    nic.driver.post(8)
    before = nic.driver.counters()

    offer = ask(nic, dhcp(DISCOVER))
    assert (offer.kind, offer.yiaddr, offer.options[6]) == (OFFER, GUEST4, b"".join(DNS4))
    lease = ask(nic, dhcp(REQUEST, requested=offer.yiaddr))
    assert (lease.kind, lease.yiaddr) == (ACK, GUEST4)
    body = bootp(option(53, bytes((REQUEST,))) + b"\xff", ciaddr=GUEST4)
    renewal = ethernet(ipv4(udp(body, GUEST4, HOST4), 17, GUEST4, HOST4), 0x0800, LLADDR, HOST_LLADDR)
    assert ask(nic, renewal).kind == ACK
    assert ask(nic, dhcp(REQUEST, requested=bytes((10, 0, 0, 9)))).kind == NAK
    assert ask(nic, request(bootp(b"\xff"))).kind == 0

    after = nic.driver.counters()
    assert {name: after[name] - before[name] for name in after if name.startswith(("dhcp", "tx"))} == {
        "tx_packets": 0, "tx_bytes": 0, "tx_short": 0, "tx_long": 0, "tx_spoofed": 0, "tx_refused": 0,
        "tx_link_down": 0, "tx_busy": 0, "tx_answered": 5, "tx_throttled": 0, "tx_throttled_ns": 0,
        "dhcp_offers": 1, "dhcp_acks": 2, "dhcp_naks": 1, "dhcp_bootp": 1, **dict.fromkeys(REASONS, 0),
    }  # fmt: skip
    assert abs(after["lease_s"] - time.time()) < 3600
    assert nic.device.informs.recv(devmsg.PACKET_MAX) == devmsg.TYPE.pack(devmsg.LEASE)
    assert not nic.device.readable(nic.device.informs.fileno())


def test_requests_that_are_not_answered_are_counted(nic: Nic) -> None:
    """They are counted by reason, and go to the host.  A guest that releases its address has no lease."""
    ask(nic, dhcp(REQUEST))
    before = nic.driver.counters()
    frames = (
        dhcp(REQUEST, requested=GUEST4, more=option(54, bytes((10, 0, 0, 1)))), dhcp(DECLINE, requested=GUEST4),
        dhcp(99), request(bootp(b"\x0c\xff", size=0) + bytes(50)), dhcp(RELEASE, ciaddr=GUEST4),
    )  # fmt: skip
    assert all(passed(nic, frame) for frame in frames)

    after = nic.driver.counters()
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {
        "dhcp_other_server": 1, "dhcp_declines": 1, "dhcp_unknown_type": 1, "dhcp_malformed": 1, "dhcp_releases": 1,
        "tx_packets": 10, "tx_bytes": after["tx_bytes"] - before["tx_bytes"],
        "lease_s": -before["lease_s"],
    }  # fmt: skip


def test_the_vm_is_asked_for_name_servers_when_the_guest_asks(make: Callable[..., Nic]) -> None:
    """The VM gets one question for all waiting requests.  Its answer, new servers or no change, goes into theirs."""
    nic = make(local_net(devmsg.NET_ASKS))
    other4, other6 = bytes((192, 0, 2, 53)), bytes(15) + b"\x35"

    for frame in (dhcp(DISCOVER), dhcp(REQUEST, requested=GUEST4), solicitation()):
        nic.driver.send(frame)
    asked_once(nic)
    before = nic.driver.counters()["ra_sent"]
    nic.device.informs.send(devmsg.RESOLVERS_BODY.pack(devmsg.RESOLVERS, other4, other6))
    for kind in (OFFER, ACK):
        answer = Answer(next_of(nic, 0x0800))
        assert (answer.kind, answer.options[6]) == (kind, other4)
    assert other6 in advertised(nic)
    # One was solicited, one announces the change.  The router may also have sent unsolicited ones.
    assert nic.driver.counters()["ra_sent"] >= before + 2
    for told, expected in (
        (devmsg.TYPE.pack(devmsg.SAME_RESOLVERS), other4),
        (devmsg.RESOLVERS_BODY.pack(devmsg.RESOLVERS, b"", b""), HOST4),
    ):
        nic.driver.send(dhcp(DISCOVER))
        asked_once(nic)
        nic.device.informs.send(told)
        assert Answer(next_of(nic, 0x0800)).options[6] == expected
    assert nic.driver.counters()["dhcp_offers"] == 3


def asked_once(nic: Nic) -> None:
    """Wait until the process asks the VM for name servers.  Assert that it asks only once for all requests."""
    asked = devmsg.TYPE.pack(devmsg.LEASE)  # a LEASE may come before it
    while asked == devmsg.TYPE.pack(devmsg.LEASE):
        nic.device.wait_for(nic.device.informs.fileno())
        asked = nic.device.informs.recv(devmsg.PACKET_MAX)
    assert asked == devmsg.TYPE.pack(devmsg.ASK_RESOLVERS)
    nic.driver.settle()
    assert not nic.device.readable(nic.device.informs.fileno())


@pytest.mark.deep
def test_a_guest_that_never_stops_asking(make: Callable[..., Nic]) -> None:
    """Waiting requests are bounded, and dropped when the driver resets."""
    nic = make(local_net(devmsg.NET_ASKS))
    same = devmsg.TYPE.pack(devmsg.SAME_RESOLVERS)
    for _ in range(100):
        nic.driver.send(dhcp(DISCOVER))
    asked_once(nic)
    nic.device.informs.send(same)
    for _ in range(WAITING_MAX):
        assert Answer(next_of(nic, 0x0800)).kind == OFFER
    assert nic.driver.counters()["dhcp_offers"] == WAITING_MAX

    nic.driver.send(dhcp(DISCOVER))
    asked_once(nic)
    nic.driver.renew(FEATURES)
    nic.driver.post(16)
    nic.device.informs.send(same)
    nic.driver.settle()  # a request before the answer would cause no question
    nic.driver.send(dhcp(REQUEST, requested=GUEST4))
    asked_once(nic)
    nic.device.informs.send(same)
    assert Answer(next_of(nic, 0x0800)).kind == ACK
    assert nic.driver.counters()["dhcp_offers"] == WAITING_MAX


def test_the_lease_record_has_the_requested_address(nic: Nic) -> None:
    """It is among the counters."""
    ask(nic, dhcp(REQUEST, requested=GUEST4))
    assert nic.driver.counters()["lease_requested"] == int.from_bytes(GUEST4, "big")
    ask(nic, dhcp(REQUEST))
    assert nic.driver.counters()["lease_requested"] == 0


def test_a_request_with_a_partial_checksum(nic: Nic) -> None:
    """A guest with the feature CSUM renews through an ordinary socket, so the device has to complete the checksum."""
    body = bootp(option(53, bytes((REQUEST,))) + b"\xff", ciaddr=GUEST4)
    datagram = udp(body, GUEST4, HOST4, kind="pseudo")
    frame = ethernet(ipv4(datagram, 17, GUEST4, HOST4), 0x0800, LLADDR, HOST_LLADDR)

    nic.driver.send(frame, HEADER.pack(NEEDS_CSUM, 0, 42, 0, 34, 6))
    assert Answer(next_of(nic, 0x0800)).kind == ACK


@pytest.mark.parametrize("cuts", [(), (20,), (12, 26, 46, 54, 300), tuple(range(1, 70))])
def test_request_in_any_layout(nic: Nic, cuts: tuple[int, ...]) -> None:
    """OpenBSD's vmd reads only the first segment; we read all."""
    nic.driver.send(dhcp(DISCOVER), cuts=cuts)

    assert Answer(next_of(nic, 0x0800)).kind == OFFER


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(any_frame(342), id="other"),
        pytest.param(dhcp(DISCOVER).replace(LLADDR, HOST_LLADDR), id="other-client"),
        pytest.param(request(bootp(option(53, b"\1\1") + b"\xff")), id="42-bad-option"),
        pytest.param(request(bootp(b"\x0c\xff", size=0) + bytes(50)), id="42-option-past-the-end"),
        pytest.param(request(bootp(b"\xff", hlen=255)), id="42-hlen"),
        pytest.param(request(bootp(b"\xff", giaddr=GUEST4)), id="42-giaddr"),
        pytest.param(
            ethernet(ipv4(udp(bootp(b"\xff"), ANY4, ALL4, kind="wrong"), 17, ANY4, ALL4), 0x0800), id="42-sum"
        ),
        pytest.param(ethernet(ipv4(udp(bytes(300), GUEST4, HOST4, (68, 68)), 17, GUEST4, HOST4), 0x0800), id="port"),
        pytest.param(solicitation(hops=254), id="forwarded-solicitation"),
    ],
)
def test_other_frames_go_to_the_host_42(nic: Nic, frame: bytes) -> None:
    """Hostile input 42: frames that we do not answer reach the host unchanged."""
    assert passed(nic, frame)


def test_undelivered_answers_are_bounded_42(make: Callable[..., Nic]) -> None:
    """Hostile input 42: a guest sends requests, and posts no buffers."""
    nic = make(net_start(flags=devmsg.NET_LOCAL, guest4=GUEST4, host4=HOST4))  # no router, which sends by itself
    nic.driver.renew(FEATURES)
    for _ in range(200):
        nic.driver.send(dhcp(DISCOVER))
    assert nic.driver.counters()["rx_injected_lost"] == 200 - INJECTED_MAX
    nic.driver.post(32)
    for _ in range(INJECTED_MAX):
        assert Answer(next_of(nic, 0x0800)).kind == OFFER
    assert nic.device.read_log() == ""


@pytest.fixture
def make(network: Network) -> Iterator[Callable[..., Nic]]:
    """Give a factory of processes, which end with the test."""
    made: list[Nic] = []

    def nic(net: bytes, host_name: str = "") -> Nic:
        tap = host_tap(network, f"tap{1 + len(made)}")
        made.append(Nic(tap, NetDriver(tap, net, host_name=host_name, features=FEATURES)))
        made[-1].driver.post(16)
        return made[-1]

    yield nic
    for one in made:
        one.close()


def test_boot_from_the_network(make: Callable[..., Nic]) -> None:
    """The answer has boot file, host name and MTU, and the interface is locked."""
    nic = make(local_net(devmsg.NET_PXE | devmsg.NET_LOCKED, 9000), "db1")

    answer = ask(nic, dhcp(DISCOVER))
    assert answer.file.rstrip(b"\0") == b"auto_install"
    assert (answer.options[12], answer.options[26]) == (b"db1", (9000).to_bytes(2, "big"))
    nic.driver.send(dhcp(DISCOVER).replace(LLADDR, HOST_LLADDR))
    assert nic.driver.counters()["tx_spoofed"] == 1


def test_unknown_address_of_the_host(make: Callable[..., Nic]) -> None:
    """Without the host's address we answer only broadcasts, and there is no router."""
    nic = make(net_start(flags=devmsg.NET_LOCAL, guest4=GUEST4, host4=HOST4, prefix6=PREFIX6))
    assert ask(nic, dhcp(DISCOVER)).kind == OFFER
    assert passed(nic, solicitation())


def test_renewal_at_the_host_s_address(nic: Nic) -> None:
    """A client that renews sends to the server that it knows, not to all."""
    body = bootp(option(53, bytes((REQUEST,))) + b"\xff", ciaddr=GUEST4)
    renewal = ethernet(ipv4(udp(body, GUEST4, HOST4), 17, GUEST4, HOST4), 0x0800, LLADDR, HOST_LLADDR)
    assert ask(nic, renewal).kind == ACK


# --- IPv6 ------------------------------------------------------------------------------------------------------------


def advertised(nic: Nic) -> bytes:
    """Return the next router advertisement that the guest gets."""
    while True:
        frame = next_of(nic, 0x86DD)
        if frame[20] == 58 and frame[54] == 134:
            return frame


def test_solicitation_is_answered(nic: Nic) -> None:
    """The answer has the prefix, the host as router, and its name servers.  The tap gets no solicitation."""
    assert not passed(nic, solicitation())

    frame = advertised(nic)
    assert frame[:14] == b"\x33\x33\0\0\0\1" + HOST_LLADDR + b"\x86\xdd"
    assert frame[22:38] == bytes.fromhex("fe80000000000000081b2cfffe3d4e5f")
    assert PREFIX6 in frame
    assert DNS6[0] in frame


def test_the_router_advertises_unsolicited(nic: Nic) -> None:
    """It sends an advertisement soon after a driver has started, and again for the next driver."""
    for _ in range(2):
        before = nic.driver.counters()["ra_sent"]
        nic.driver.renew(FEATURES)
        nic.driver.post(16)
        assert PREFIX6 in advertised(nic)
        assert nic.driver.counters()["ra_sent"] > before


# --- the host's kernel, and other kernels as guests --------------------------------------------------------------


def test_kernel_answers_arp(nic: Nic) -> None:
    """The host has its /31 address on the tap."""
    arp = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, LLADDR, GUEST4, bytes(6), HOST4)
    nic.driver.send(ethernet(arp.ljust(46, b"\0"), 0x0806))

    while (reply := next_of(nic, 0x0806))[20:22] != b"\0\2":
        continue  # the host may also send requests
    assert reply[22:32] == HOST_LLADDR + HOST4


class KernelGuest:
    """A Linux network stack in its own namespace, with our driver as its network card."""

    def __init__(self, nic: Nic, network: Network) -> None:
        self.nic = nic
        self.network = network
        # Its packets have complete checksums: a tap offers no offloads by default.
        self.card = TapInterface(network, "eth0", ipv6=True)
        self.card.be_a_card(LLADDR)

    def pump(self) -> None:
        """Move waiting frames both ways."""
        while True:
            try:
                frame = os.read(self.card.fd, 1 << 16)[10:]
            except BlockingIOError:
                break
            self.nic.driver.send(frame)
        while (received := self.nic.driver.try_receive()) is not None:
            with contextlib.suppress(OSError):  # the guest's stack may refuse a frame
                os.writev(self.card.fd, [bytes(10), received.frame])

    def run(self, *command: str) -> str:
        """Run a program in the guest until it ends, and move its frames.  Return its output."""
        with self.network.inside():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        end = os.pidfd_open(process.pid)
        poll = select.poll()
        for fd in (end, self.card.fd, self.nic.device.calls[RX]):
            poll.register(fd, select.POLLIN)
        deadline_s = time.monotonic() + DEADLINE_S
        ready: set[int] = set()
        while end not in ready and time.monotonic() < deadline_s:
            self.nic.driver.rx.set_used_event(self.nic.driver.rx.used_idx)
            self.nic.device.kick(RX)
            self.pump()
            ready = {fd for fd, _ in poll.poll(200)}
            self.nic.device.take_event(self.nic.device.calls[RX])
        os.close(end)
        if process.poll() is None:
            process.kill()
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output

    def until(self, text: str, *command: str) -> str:
        """Repeat a program until its output has a text."""
        deadline_s = time.monotonic() + DEADLINE_S
        while text not in (output := self.run(*command)):
            assert time.monotonic() < deadline_s, output
            pause()
        return output


@pytest.fixture
def guest(nic: Nic) -> Iterator[KernelGuest]:
    """Give a guest kernel behind our driver."""
    with Network() as network:
        made = KernelGuest(nic, network)
        with made.card:
            yield made


def test_dhcp_client_configures_itself(guest: KernelGuest, tmp_path: Path) -> None:
    """busybox's udhcpc accepts the lease, and its addresses reach the host."""
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n[ $1 = bound ] && env\nexit 0\n")
    script.chmod(0o755)
    udhcpc = ("busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "5", "-s", str(script))
    output = guest.run(*udhcpc, "-x", "hostname:guest-1")
    told = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)

    assert told["ip"] == inet(GUEST4)
    assert told["subnet"] == "255.255.255.254"
    assert told["router"] == told["serverid"] == inet(HOST4)
    assert told["dns"] == " ".join(map(inet, DNS4))
    assert told["lease"] == str(0xFFFFFFFF)
    assert (told["hostname"], told["domain"]) == ("web", "example.org")
    assert host_names(guest.nic.device.figures_fd) == {0: "guest-1"}

    guest.run("ip", "address", "add", f"{inet(GUEST4)}/31", "dev", "eth0")
    guest.run("busybox", "ping", "-c", "2", "-W", "10", told["router"])


def test_guest_kernel_configures_itself_for_ipv6(guest: KernelGuest) -> None:
    """Linux takes prefix, route and lifetimes from the advertisement, and reaches the host."""
    addresses = guest.until(inet(PREFIX6).removesuffix("::"), "ip", "-6", "address", "show", "dev", "eth0")
    assert "dynamic" in addresses
    routes = guest.until("default", "ip", "-6", "route", "show")
    assert "via fe80::81b:2cff:fe3d:4e5f" in routes

    guest.run("busybox", "ping6", "-c", "2", "-W", "10", inet(HOST6))
    guest.run("busybox", "ping6", "-c", "2", "-W", "10", "fe80::81b:2cff:fe3d:4e5f%eth0")
