"""The description of a network interface that comes with START."""

from vmd.devices.vionet.ethernet import GROUP, link_local
from vmd.ipc import devmsg
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MTU_MIN, MTU_MAX = 68, 16384  # the minimum of IPv4; the maximum of OpenBSD's taps (*cat. 6.5*)
MTU_USUAL = 1500


class Interface(Record):
    """One NIC.  Addresses are bytes in wire order; an empty address is not given."""

    lladdr: bytes  # the guest's
    host_lladdr: bytes = b""
    locked: bool = False
    local: bool = False
    pxe: bool = False
    asks: bool = False  # the VM is asked for name servers before the guest is answered
    mtu: int = 0  # 0: the guest is told none
    guest4: bytes = b""
    host4: bytes = b""
    host_link_local: bytes = b""
    prefix6: bytes = b""  # 16 bytes, of which the first 8 count
    dns4: tuple[bytes, ...] = ()
    dns6: tuple[bytes, ...] = ()
    host_name: str = ""
    length4: int = 31  # prefix length of the network of `guest4` and `host4`
    vhost: bool = False  # the kernel may move the frames

    def check(self) -> None:
        """Refuse impossible values.  Raises ValueError."""
        if not any(self.lladdr) or self.lladdr[0] & GROUP:
            raise ValueError(f"{self.lladdr.hex(':')} cannot be the address of an interface")
        if self.mtu and not MTU_MIN <= self.mtu <= MTU_MAX:
            raise ValueError(f"mtu {self.mtu} is not between {MTU_MIN} and {MTU_MAX}")
        if self.local and not (self.guest4 and self.host4):
            raise ValueError("a local interface without addresses")
        if not 0 < self.length4 < 32:
            raise ValueError(f"a network with a prefix of {self.length4} bits")

    @classmethod
    def from_start(cls, fields: "tuple[Any, ...]", host_name: str) -> "Interface":
        """Take the fields of `devmsg.NET`.  Raises ValueError."""
        lladdr, host_lladdr, flags, mtu, guest4, host4, host_link_local, prefix6, dns4, dns6, length4 = fields
        return cls(
            lladdr=lladdr,
            host_lladdr=given(host_lladdr),
            locked=bool(flags & devmsg.NET_LOCKED),
            local=bool(flags & devmsg.NET_LOCAL),
            pxe=bool(flags & devmsg.NET_PXE),
            asks=bool(flags & devmsg.NET_ASKS),
            mtu=mtu,
            guest4=given(guest4),
            host4=given(host4),
            host_link_local=given(host_link_local),
            prefix6=given(prefix6),
            dns4=servers(dns4, 4),
            dns6=servers(dns6, 16),
            host_name=host_name,
            length4=length4 or 31,
            vhost=bool(flags & devmsg.NET_VHOST),
        )

    @property
    def netmask(self) -> bytes:
        """The mask of the network of guest and host."""
        return (0xFFFFFFFF << 32 - self.length4 & 0xFFFFFFFF).to_bytes(4, "big")

    @property
    def router(self) -> bytes:
        """The host's link-local address; empty if neither that nor its link-layer address is known."""
        if self.host_link_local:
            return self.host_link_local
        return link_local(self.host_lladdr) if self.host_lladdr else b""


def given(address: bytes) -> bytes:
    """Return the address, or b"" if it is all zero."""
    return address if any(address) else b""


def servers(raw: bytes, size: int) -> tuple[bytes, ...]:
    """Split `raw` into addresses of `size` bytes; leave out those that are all zero."""
    addresses = [raw[at : at + size] for at in range(0, len(raw), size)]
    return tuple(address for address in addresses if any(address))
