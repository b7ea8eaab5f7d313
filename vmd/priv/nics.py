"""The interfaces of VMs as priv keeps them, and how it tells those that it has made from others."""

import hashlib
import re

from vmd.closing import close
from vmd.config.model import LLADDR_BYTES
from vmd.ipc.messages.priv import AddressGiven, TapBefore
from vmd.priv import rules
from vmd.priv.ifconfig import UNFINISHED
from vmd.priv.lists import Link
from vmd.priv.requests import INET6_BYTES, SWITCH_ALIAS, TAP_ALIAS, guest_of, is_tap_name, networks_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.messages.priv import NicMade, NicWanted

VRF_ALIAS = re.compile(r"rdomain[0-9]+$")
HIGHEST = b"\xfe"  # first byte of a link-layer address that no vendor assigns
HOST6 = (1).to_bytes(8, "big")  # the host has address ::1 of each /64


class Nic:
    """A tap that priv has made."""

    def __init__(self, vmid: int, link: Link, fd: int, request: "NicWanted") -> None:
        self.vmid = vmid
        self.link = link
        self.bridge = request.bridge
        self.fd = fd  # -1 when the parent has got it
        self.groups = request.groups
        self.networks = networks_of(request)
        self.guest4 = guest_of(request)
        self.forwards = request.forwards
        self.rdomain = request.rdomain
        self.up = request.up
        self.link_local = b""
        self.vhost = False  # the kernel may move its frames
        self.without = ""  # why it may not, although vm.conf asks for it

    def settings(self) -> list[tuple[str, str]]:
        """Return the settings that the tap must have, as names below /proc/sys/net and values.  Some may not exist."""
        name, families = self.link.name, {rules.v6(network) for network in self.networks}
        found = [
            to_itself(name),
            (f"ipv6/conf/{name}/addr_gen_mode", "1"),  # the kernel adds no addresses itself
            (f"ipv6/conf/{name}/disable_ipv6", "0" if True in families else "1"),
        ]
        if False in families:
            found.append((f"ipv4/conf/{name}/rp_filter", "1"))  # the guest sends from its own address
        return found

    def addresses(self) -> list[tuple[bytes, int]]:
        """Return the host's addresses on the tap, with their prefix lengths."""
        found = [(self.link_local, 64)] if self.link_local else []
        for network, length in self.networks:
            found.append((network[:8] + HOST6 if len(network) == INET6_BYTES else network, length))
        return found

    def take_fd(self) -> int:
        """Return the descriptor.  The caller owns it."""
        fd, self.fd = self.fd, -1
        return fd

    def as_it_was(self) -> TapBefore | None:
        """Return the state of the tap before the VM used it; None if priv has made it."""
        return None

    def close(self) -> None:
        """Close the descriptor if it was not taken."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1


class Attached(Nic):
    """A tap that another program has made, and the changes that priv has made to it."""

    def __init__(self, vmid: int, link: Link, fd: int, request: "NicWanted") -> None:
        super().__init__(vmid, link, fd, request)
        self.before = link
        self.added: list[AddressGiven] = []

    def settings(self) -> list[tuple[str, str]]:
        """Return none: the settings of the tap belong to the program that has made it."""
        return []

    def as_it_was(self) -> TapBefore:
        """Return the state of the tap before the VM used it, and the addresses that were added."""
        before = self.before
        return TapBefore(
            master=before.master, mtu=before.mtu, group=before.group, up=before.up, added=tuple(self.added)
        )  # fmt: skip


def adopted(vmid: int, request: "NicWanted", made: "NicMade") -> Nic:
    """Return the interface that an earlier priv has made."""
    link = Link(
        index=made.index, name=made.name, kind="tun", alias=request.alias, master=0, mtu=made.mtu, lladdr=made.lladdr,
        up=request.up,
    )  # fmt: skip
    before = made.before
    if before is None:
        nic = Nic(vmid, link, -1, request)
    else:
        was = link.replace(alias="", master=before.master, mtu=before.mtu, group=before.group, up=before.up)
        nic = lent = Attached(vmid, was, -1, request)
        lent.link, lent.added = link, list(before.added)
    nic.link_local = made.link_local
    nic.vhost = made.vhost
    return nic


def is_tap(link: Link) -> bool:
    """Return whether an interface is a tap that priv has made."""
    return link.kind == "tun" and is_tap_name(link.name) and bool(TAP_ALIAS.match(link.alias))


def is_bridge(link: Link) -> bool:
    """Return whether an interface is a bridge that priv has made."""
    return link.kind == "bridge" and bool(SWITCH_ALIAS.match(link.alias))


def is_vrf(link: Link) -> bool:
    """Return whether an interface is a VRF device that priv has made."""
    return link.kind == "vrf" and bool(VRF_ALIAS.match(link.alias))


def is_unfinished(link: Link) -> bool:
    """Return whether a priv was killed while it made this bridge or VRF."""
    return link.kind in ("bridge", "vrf") and link.group == UNFINISHED and not link.alias


def link_local(lladdr: bytes) -> bytes:
    """Return the IPv6 link-local address of an Ethernet address (RFC 4291, appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes((lladdr[0] ^ 2,)) + lladdr[1:3] + b"\xff\xfe" + lladdr[3:]


def opposite(guest: bytes) -> bytes:
    """Return the Ethernet address of the host's side of a tap, computed from that of the guest's side.

    The guest knows the address, so it must be the same after each start and on each host.
    """
    # A bridge without an address of its own takes the lowest one of its ports.  A tap's address must not be that, or a
    # host whose uplink is in the bridge would change its address.
    return HIGHEST + hashlib.sha256(b"vmd tap " + guest).digest()[: LLADDR_BYTES - 1]


def to_itself(name: str) -> tuple[str, str]:
    """Return the setting with which an interface ignores router advertisements of guests."""
    return f"ipv6/conf/{name}/accept_ra", "0"
