"""Checks of the parent's requests, so that a parent that was taken over cannot reach other interfaces.

An intact parent sends nothing that is refused here: vm.conf could not say it.
"""

import errno
import re

from vmd.config import rules as rules_of_vms
from vmd.config.model import FIXED_LENGTHS, LLADDR_BYTES, MAX_NICS, MAX_RDOMAIN
from vmd.config.rules import bridge_name, group_name, tap_name
from vmd.errors import OperatorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmd.config.model import Forward
    from vmd.ipc.messages.priv import AdoptNics, MakeNics, NicWanted, SwitchRequest

ALIAS = re.compile(r"[ -~]{1,255}")
SWITCH_ALIAS = re.compile(r"switch[0-9]+-")
TAP_ALIAS = re.compile(r"vm[0-9]+-if[0-9]+-")
INET4_BYTES, INET6_BYTES = 4, 16


def refuse(what: str) -> OperatorError:
    """Return the error for a request that an intact parent never makes."""
    return OperatorError(errno.EPERM, f"refused: {what}")


def keeps(rule: "Callable[[str], str]", value: str) -> bool:
    """Return whether a configuration can have a value."""
    try:
        rule(value)
    except ValueError:
        return False
    return True


def is_tap_name(name: str) -> bool:
    """Return whether an interface of a VM can have this name."""
    return name not in ("", "tap") and keeps(tap_name, name)


def check_switch(switch: "SwitchRequest") -> None:
    """Raise OperatorError unless a configuration can have this switch."""
    if not keeps(bridge_name, switch.interface):
        raise refuse("that is not a name of a bridge")
    if not ALIAS.fullmatch(switch.alias) or not SWITCH_ALIAS.match(switch.alias):
        raise refuse(f"bridge {switch.interface} with an alias that is not a switch's")
    if switch.rdomain is not None and not 0 <= switch.rdomain <= MAX_RDOMAIN:
        raise refuse(f"bridge {switch.interface} in rdomain {switch.rdomain}")


def check_request(message: "MakeNics | AdoptNics") -> None:
    """Raise OperatorError unless a configuration can lead to this request."""
    if message.vmid <= 0 or not 0 < len(message.nics) <= MAX_NICS:
        raise refuse(f"{len(message.nics)} interfaces for vm {message.vmid}")
    for nic in message.nics:
        if nic.name and not is_tap_name(nic.name):
            raise refuse("an interface of a VM that is not called tap<n>")
        if not ALIAS.fullmatch(nic.alias) or not TAP_ALIAS.match(nic.alias):
            raise refuse("an interface with an alias that is not a VM's")
        if len(nic.groups) > 2 or not all(group and keeps(group_name, group) for group in nic.groups):
            raise refuse("that is not a name of a group")
        if nic.rdomain is not None and not 0 <= nic.rdomain <= MAX_RDOMAIN:
            raise refuse(f"rdomain {nic.rdomain}")
        if len(nic.host4) not in (0, 4) or len(nic.prefix6) not in (0, 16) or any(nic.prefix6[8:]):
            raise refuse("that is not an address")
        if len(nic.lladdr) != LLADDR_BYTES or nic.length4 not in FIXED_LENGTHS:
            raise refuse("that is not an address")
        if nic.guest4 and not (nic.host4 and inside(nic.guest4, nic.host4, nic.length4)):
            raise refuse("that is not an address of a guest")
        check_forwards(guest_of(nic), nic.forwards)


def check_forwards(guest4: bytes, forwards: "Sequence[Forward]") -> None:
    """Raise OperatorError unless a configuration can lead to these forwards to a guest with that address."""
    if forwards and not guest4:
        raise refuse("to forward ports to an interface that has no address")
    try:
        rules_of_vms.forwards(forwards)
    except ValueError as error:
        raise refuse(str(error)) from None


def guest_of(request: "NicWanted") -> bytes:
    """Return the guest's IPv4 address.

    A daemon of an earlier version does not send it.  Its networks have two addresses, so it follows from the host's.
    """
    if request.guest4 or not request.host4:
        return request.guest4
    return (int.from_bytes(request.host4, "big") ^ 1).to_bytes(INET4_BYTES, "big")


def networks_of(request: "NicWanted") -> tuple[tuple[bytes, int], ...]:
    """Return the networks of a `local` interface."""
    found = []
    if request.host4:
        found.append((request.host4, request.length4))
    if request.prefix6:
        found.append((request.prefix6, 64))
    return tuple(found)


def inside(address: bytes, network: bytes, length: int) -> bool:
    """Return whether an address is in a network.  `network` may be any address of the network."""
    if len(address) != len(network):
        return False
    different = int.from_bytes(address, "big") ^ int.from_bytes(network, "big")
    return not different >> (8 * len(address) - length)
