"""The descriptors of an interface whose frames the kernel moves (vhost-net): /dev/vhost-net, and a packet socket.

The process of the interface uses the socket to receive the guest's packets that it has to know, and to answer them.  A
locked filter (classic BPF) keeps all other packets from it.  Both are opened for each start of a guest and are not
kept, because /dev/vhost-net belongs to the process that uses it first.
"""

import errno
import os
import socket
from struct import Struct

from vmd import native
from vmd.closing import close, close_all
from vmd.errors import OperatorError, sentence
from vmd.privsep.seccomp import instruction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.messages.vm import NicLink

VHOST_NET = "/dev/vhost-net"
BY_PROCESS = "vhost: a process moves its frames, not the kernel"
SO_ATTACH_FILTER, SO_LOCK_FILTER = 26, 44  # asm-generic/socket.h
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23  # linux/if_packet.h
PACKET_OUTGOING = 4
ETH_P_ALL = 3
BUFFER_BYTES = 64 << 10
FPROG = Struct("=H6xQ")  # sock_fprog: number of instructions, where they are

# linux/filter.h: codes of instructions that load and that jump.  Offsets count from the Ethernet header.
WORD, HALF, BYTE, HEADER_LENGTH, WORD_BEHIND_HEADER = 0x20, 0x28, 0x30, 0xB1, 0x40
EQUAL, ANY_BIT, RETURN = 0x15, 0x45, 0x06
ANCILLARY, PACKET_TYPE, VLAN_TAG_PRESENT = 0xFFFFF000, 4, 48  # SKF_AD_OFF, SKF_AD_PKTTYPE, SKF_AD_VLAN_TAG_PRESENT
ALL_BYTES, NOTHING = 0x40000, 0

ETHERTYPE, IPV4, IPV6, ARP = 12, 0x0800, 0x86DD, 0x0806
IP4, IP4_FRAGMENT, IP4_PROTOCOL = 14, 20, 23
IP6_NEXT, ICMP6_TYPE = 20, 54
UDP, ICMPV6 = 17, 58
CLIENT_TO_SERVER = 68 << 16 | 67
FRAGMENT = 0x3FFF  # flag "more fragments", and the fragment offset
ROUTER_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 133, 136


def load(code: int, at: int) -> bytes:
    """Return an instruction that loads from an offset."""
    return instruction(code, at)


# Tests: the loading instructions, a jump, its value, and whether the jump has to be taken.
FROM_THE_GUEST = (
    (load(WORD, ANCILLARY + PACKET_TYPE), EQUAL, PACKET_OUTGOING, False),
    (load(WORD, ANCILLARY + VLAN_TAG_PRESENT), EQUAL, 0, True),
)
DHCP_REQUEST = (
    (load(HALF, ETHERTYPE), EQUAL, IPV4, True),
    (load(BYTE, IP4_PROTOCOL), EQUAL, UDP, True),
    (load(HALF, IP4_FRAGMENT), ANY_BIT, FRAGMENT, False),
    (load(HEADER_LENGTH, IP4) + load(WORD_BEHIND_HEADER, IP4), EQUAL, CLIENT_TO_SERVER, True),
)
ARP_PACKET = ((load(HALF, ETHERTYPE), EQUAL, ARP, True),)


def icmpv6(kind: int) -> "tuple[tuple[bytes, int, int, bool], ...]":
    """Return the tests for a message of ICMPv6 without extension headers."""
    return (
        (load(HALF, ETHERTYPE), EQUAL, IPV6, True),
        (load(BYTE, IP6_NEXT), EQUAL, ICMPV6, True),
        (load(BYTE, ICMP6_TYPE), EQUAL, kind, True),
    )


def program(*, local: bool) -> bytes:
    """Return the filter.

    For a `local` interface it accepts DHCP requests and router solicitations.  For another one it accepts the packets
    that tell a guest's address: ARP and neighbour advertisements.
    """
    if local:
        return _any_of(DHCP_REQUEST, icmpv6(ROUTER_SOLICITATION))
    return _any_of(ARP_PACKET, icmpv6(NEIGHBOUR_ADVERTISEMENT))


def _any_of(*cases: "tuple[tuple[bytes, int, int, bool], ...]") -> bytes:
    return b"".join(_all_of(*FROM_THE_GUEST, *case) for case in cases) + instruction(RETURN, NOTHING)


def _all_of(*tests: "tuple[bytes, int, int, bool]") -> bytes:
    """Return instructions that accept a frame if all tests hold, and else continue after the last of them."""
    body = b""
    left = sum(len(loads) // 8 + 1 for loads, *_ in tests) + 1
    for loads, jump, value, wanted in tests:
        left -= len(loads) // 8 + 1
        body += loads + instruction(jump, value, 0 if wanted else left, left if wanted else 0)
    return body + instruction(RETURN, ALL_BYTES)


def lacking() -> str:
    """Return why this host's kernel cannot move frames; empty if it can."""
    try:
        close(open_vhost())
    except OperatorError as error:
        return str(error)
    return ""


def open_vhost() -> int:
    """Open /dev/vhost-net for one interface.  The caller owns it.  Raises OperatorError."""
    try:
        return os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        gone = error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV)
        advice = ": load the kernel module vhost_net" if gone else ""
        raise OperatorError(error.errno or errno.EIO, f"{VHOST_NET}: {sentence(error)}{advice}") from None


def packet_socket(tap: str, index: int, *, local: bool) -> int:
    """Return a packet socket on a tap with the filter of `program`.  It also sends to the guest.  The caller owns it.

    `index` is the interface index of the tap.  Raises OperatorError.
    """
    code = program(local=local)
    instructions = native.buffer(code)
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as made:
            filter_ = FPROG.pack(len(code) // 8, native.addressof(instructions))
            made.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_)
            made.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            made.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            if socket.if_nametoindex(tap) != index:
                raise OperatorError(errno.ENODEV, f"interface {tap} was replaced by another one")
            made.bind((tap, ETH_P_ALL))  # the socket receives only from now on, when the filter is set
            return made.detach()
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"packet socket on {tap}: {sentence(error)}") from None


def open_for(link: "NicLink", index: int) -> list[int]:
    """Open both descriptors of an interface, in the order of StartVm's `vhosts`.  Raises OperatorError."""
    fds: list[int] = []
    try:
        fds.append(open_vhost())
        fds.append(packet_socket(link.name, index, local=link.local))
    except OperatorError:
        close_all(fds)
        raise
    return fds
