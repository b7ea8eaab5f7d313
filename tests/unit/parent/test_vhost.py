"""The descriptors of an interface with vhost: which packets of a guest its process gets, and what a lack is called."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from struct import pack, unpack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from vmd import native
from vmd.errors import OperatorError
from vmd.parent import vhost

SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>
ETHERNET = bytes.fromhex("ffffffffffff fee1bbd10203")
IPV4, IPV6, ARP = b"\x08\x00", b"\x86\xdd", b"\x08\x06"
TCP, UDP, ICMPV6 = 6, 17, 58


def ip4(protocol: int = UDP, source: int = 68, to: int = 67, fragment: int = 0, words: int = 5) -> bytes:
    """Return a frame of IPv4 with a header of so many words, and ports."""
    header = pack(">BBHHHBBHII", 0x40 | words, 0, 300, 1, fragment, 64, protocol, 0, 0, 0xFFFFFFFF)
    return ETHERNET + IPV4 + header + bytes(4 * (words - 5)) + pack(">HHHH", source, to, 8, 0) + bytes(240)


def ip6(kind: int, protocol: int = ICMPV6) -> bytes:
    """Return a frame of IPv6 with a message of this type of ICMPv6."""
    return ETHERNET + IPV6 + pack(">IHBB", 0x60000000, 8, protocol, 255) + bytes(32) + bytes([kind]) + bytes(7)


FRAMES = {
    "DHCP": ip4(),
    "DHCP behind options": ip4(words=7),
    "DHCP that may not be fragmented": ip4(fragment=0x4000),
    "first fragment": ip4(fragment=0x2000),
    "last fragment": ip4(fragment=0x0001),
    "answer of DHCP": ip4(source=67, to=68),
    "other source": ip4(source=69),
    "other destination": ip4(to=53),
    "TCP with these ports": ip4(TCP),
    "router solicitation": ip6(133),
    "router advertisement": ip6(134),
    "neighbour solicitation": ip6(135),
    "neighbour advertisement": ip6(136),
    "UDP over IPv6": ip6(133, UDP),
    "ARP": ETHERNET + ARP + bytes(28),
    "unknown": ETHERNET + b"\x88\xcc" + bytes(60),
}
LOCAL = ["DHCP", "DHCP behind options", "DHCP that may not be fragmented", "router solicitation"]
OTHER = ["neighbour advertisement", "ARP"]


class Filtered:
    """A socket of this host with the filter of the kernel: a frame arrives if the filter accepts it."""

    def __init__(self, *, local: bool) -> None:
        self.sender, self.receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        code = vhost.program(local=local)
        instructions = native.buffer(code)
        program = pack("=H6xQ", len(code) // 8, native.addressof(instructions))
        self.receiver.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        self.receiver.setblocking(False)

    def accepts(self, frame: bytes) -> bool:
        """Return whether a frame arrives, as it was sent."""
        self.sender.send(frame)
        try:
            return self.receiver.recv(1 << 16) == frame
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Close both ends."""
        self.sender.close()
        self.receiver.close()


@pytest.fixture(params=[True, False], ids=["local", "other"])
def filtered(request: pytest.FixtureRequest) -> Iterator[tuple[Filtered, list[str]]]:
    """Give the filter of an interface, and which frames its process gets."""
    made = Filtered(local=request.param)
    yield made, LOCAL if request.param else OTHER
    made.close()


def test_the_process_gets_the_packets_that_it_has_to_know(filtered: tuple[Filtered, list[str]]) -> None:
    """A local interface answers them.  Of another one they tell the address of the guest."""
    made, wanted = filtered
    assert [name for name, frame in FRAMES.items() if made.accepts(frame)] == wanted


def test_a_frame_that_is_cut_off_is_not_read_beyond_its_end(filtered: tuple[Filtered, list[str]]) -> None:
    """A guest may send any length.  What the filter has to read must be there."""
    made, wanted = filtered
    for name in wanted:
        frame = FRAMES[name]
        least = next(size for size in range(1, len(frame) + 1) if made.accepts(frame[:size]))
        assert not any(made.accepts(frame[:size]) for size in range(1, least))
        assert all(made.accepts(frame[:size]) for size in range(least, len(frame) + 1))


# --- what this host has -----------------------------------------------------------------------------------------


def test_a_host_without_vhost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says what to do, if the module is missing."""
    monkeypatch.setattr(vhost, "VHOST_NET", str(tmp_path / "vhost-net"))
    assert vhost.lacking() == f"{tmp_path}/vhost-net: No such file or directory: load the kernel module vhost_net"
    with pytest.raises(OperatorError) as refused:
        vhost.open_vhost()
    assert refused.value.number == errno.ENOENT
    (tmp_path / "vhost-net").mkdir()
    assert vhost.lacking() == f"{tmp_path}/vhost-net: Is a directory"


def test_a_host_with_vhost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look leaves nothing open."""
    before = open_descriptors()
    monkeypatch.setattr(vhost, "VHOST_NET", os.devnull)
    assert vhost.lacking() == ""
    assert open_descriptors() == before


class PacketSocket:
    """Replaces a packet socket.  It notes what is done to it."""

    def __init__(self, *kind: int) -> None:
        self.kind = kind
        self.done: list[str] = []
        self.trouble: OSError | None = None
        self.instructions = 0  # of its filter
        self.closed = False

    def __enter__(self) -> "PacketSocket":
        return self

    def __exit__(self, *_error: object) -> None:
        self.closed = True

    def setsockopt(self, level: int, option: int, value: Any) -> None:  # noqa: ANN401 - a number or bytes
        """Set an option."""
        self.done.append(f"{level}.{option}")
        if option == SO_ATTACH_FILTER:
            self.instructions = unpack("=H6xQ", value)[0]

    def bind(self, address: tuple[str, int]) -> None:
        """Bind it."""
        if self.trouble is not None:
            raise self.trouble
        self.done.append(f"bind {address[0]}")

    def detach(self) -> int:
        """Give it away."""
        return os.dup(0)


LINK = cast("Any", SimpleNamespace(name="vmd3", local=True))


@pytest.mark.parametrize("case", ["good", "replaced", "cannot be bound"])
def test_both_descriptors_of_an_interface(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The socket receives nothing before its filter is set and locked.  A new interface may have an old name."""
    before = open_descriptors()
    monkeypatch.setattr(vhost, "VHOST_NET", os.devnull)
    made: list[PacketSocket] = []

    def make(*kind: int) -> PacketSocket:
        made.append(PacketSocket(*kind))
        if case == "cannot be bound":
            made[0].trouble = OSError(errno.ENETDOWN, "Network is down")
        return made[0]

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", make)
        patch.setattr(socket, "if_nametoindex", lambda _name: 8 if case == "replaced" else 7)
        if case == "good":
            fds = vhost.open_for(LINK, 7)
        else:
            text = {"replaced": "interface vmd3 was replaced by another one",
                    "cannot be bound": "packet socket on vmd3: Network is down"}[case]  # fmt: skip
            with pytest.raises(OperatorError, match=text):
                vhost.open_for(LINK, 7)
            fds = []
    assert len(fds) == (2 if case == "good" else 0)
    for fd in fds:
        os.close(fd)
    assert open_descriptors() == before
    (family, kind), *_ = [each.kind for each in made]
    assert family == socket.AF_PACKET
    assert kind & socket.SOCK_NONBLOCK
    assert kind & socket.SOCK_CLOEXEC
    if case == "good":
        assert made[0].done[-1] == "bind vmd3"
        assert made[0].instructions * 8 == len(vhost.program(local=True))
        assert made[0].done[:2] == [f"{socket.SOL_SOCKET}.26", f"{socket.SOL_SOCKET}.44"]  # the filter, and its lock
        assert {"263.15", "263.23"} <= {*made[0].done}  # PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING
