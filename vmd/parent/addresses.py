"""Addresses of the interfaces of VMs (*cat. 2.5, 7.2*)."""

import errno
import os
from collections.abc import Collection

from vmd.config.model import MAX_NICS, PAIR, Prefix
from vmd.errors import OperatorError
from vmd.record import Record

LLADDR_START = bytes.fromhex("fee1bb")
LLADDR_NIC = 0xD0  # ORed with the number of the interface, from 1
PLAN_NICS = 127  # a VM has 256 addresses: two for each interface; the first two are not used
SUBNET_BITS = 64  # prefix length of an interface's IPv6 network
ULA = 0xFD  # first byte of a unique local IPv6 address (RFC 4193)


class Plan(Record):
    """The data from which the addresses of a VM's `local` interfaces are computed."""

    number: int  # of the VM, among those that have such interfaces
    prefix4: Prefix
    prefix6: Prefix | None = None
    fixed: tuple[Prefix | None, ...] = ()  # the guest's addresses that the operator has chosen, by interface

    def chosen4(self, nic: int) -> Prefix | None:
        """Return the guest's address that the operator has chosen for interface `nic`, if any."""
        return self.fixed[nic] if nic < len(self.fixed) else None

    def length4(self, nic: int) -> int:
        """Return the prefix length of the IPv4 network of interface `nic`."""
        chosen = self.chosen4(nic)
        return PAIR if chosen is None else chosen.length

    def host4(self, nic: int) -> bytes:
        """Return the host's address on interface `nic`, from 0.  The guest's address is the next one.

        If the operator has chosen the guest's address, the host's is the first other address of that network.

        Raises:
            OperatorError: the prefix has no room for this VM.
        """
        chosen = self.chosen4(nic)
        if chosen is not None:
            guest = int.from_bytes(chosen.address, "big")
            if chosen.length == PAIR:
                return (guest ^ 1).to_bytes(4, "big")
            first = (guest >> 32 - chosen.length << 32 - chosen.length) + 1
            return (first + (first == guest)).to_bytes(4, "big")
        start = int.from_bytes(self.prefix4.address, "big")
        host = start + (self.number << 8) + (nic + 1) * 2
        if nic >= PLAN_NICS or self.number <= 0 or host - start >= 1 << (32 - self.prefix4.length):
            raise OperatorError(errno.ERANGE, f"dhcp address range exceeded, vm number {self.number} interface {nic}")
        return host.to_bytes(4, "big")

    def guest4(self, nic: int) -> bytes:
        """Return the guest's address on interface `nic`.  Raises OperatorError."""
        chosen = self.chosen4(nic)
        if chosen is not None:
            return chosen.address
        return (int.from_bytes(self.host4(nic), "big") + 1).to_bytes(4, "big")

    def network6(self, nic: int) -> bytes:
        """Return the first address of the /64 of interface `nic`; empty without IPv6.

        Unlike vmd: each guest has its own /64.  In vmd guests share the first 64 bits, so they could not configure
        their addresses themselves.

        Raises:
            OperatorError: the prefix has no room for this VM.
        """
        if self.prefix6 is None:
            return b""
        subnet = self.number * MAX_NICS + nic
        if nic >= MAX_NICS or self.number <= 0 or subnet >= 1 << (SUBNET_BITS - self.prefix6.length):
            raise OperatorError(errno.ERANGE, f"inet6 prefix exhausted, vm number {self.number} interface {nic}")
        start = int.from_bytes(self.prefix6.address, "big")
        return (start | subnet << SUBNET_BITS).to_bytes(16, "big")


def room(prefix4: Prefix, prefix6: Prefix | None) -> int:
    """Return the highest number that a VM can have with these prefixes, plus 1.  The lowest number is 1."""
    end = 1 << (32 - 8 - prefix4.length)
    if prefix6 is not None:
        end = min(end, (1 << (SUBNET_BITS - prefix6.length)) // MAX_NICS)
    return end


def random_ula() -> Prefix:
    """Return a random unique local /48 (RFC 4193, 3.2)."""
    return Prefix(address=bytes((ULA,)) + os.urandom(5) + bytes(10), length=48)


def random_lladdr(index: int, taken: Collection[bytes]) -> bytes:
    """Return a link-layer address that is not `taken`: fe:e1:bb:d<n>:xx:xx.  `index` is the interface, from 0.

    Raises:
        OperatorError: all of them are taken.
    """
    start = int.from_bytes(os.urandom(2), "big")
    for number in range(1 << 16):
        lladdr = LLADDR_START + bytes((LLADDR_NIC | (index + 1),)) + (start + number & 0xFFFF).to_bytes(2, "big")
        if lladdr not in taken:
            return lladdr
    raise OperatorError(errno.ENOSPC, "no link-layer address is left for another interface")
