"""The addresses and ports of VMs: the plan of a VM's `local` interfaces, and conflicts with other users of them."""

import errno
import fcntl
import ipaddress
import time

from vmd.closing import close
from vmd.config.model import NicConfig, Prefix, VmConfig
from vmd.errors import OperatorError
from vmd.ipc.messages.priv import AdoptNics
from vmd.ipc.messages.vm import NicLink
from vmd.log import log
from vmd.parent import hostports
from vmd.parent.addresses import Plan, random_ula, room
from vmd.parent.hostroutes import covering, host_routes, network_of, overlapping
from vmd.parent.vm import AUTOMATIC, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmd.config.model import Forward
    from vmd.parent.core import Core
    from vmd.parent.hostroutes import HostRoute, IpNetwork

TUNGETIFF, IFREQ_BYTES = 0x800454D2, 40  # <linux/if_tun.h>


class Taps:
    """The interfaces of a VM, from priv's answer to the end of the VM."""

    def __init__(
        self,
        nics: tuple[NicConfig, ...],
        plan: Plan,
        lacking: dict[int, str],
        links: tuple[NicLink, ...],
        fds: list[int],
        known: AdoptNics,
    ) -> None:
        self.nics = nics
        self.plan = plan
        self.lacking = lacking  # the problem of an interface, by its number
        self.unresolved: dict[int, str] = {}  # why its guest has no name servers, by number of the interface
        self.since_s = int(time.time())  # when they were made, in seconds since 1970
        self.links = links
        self.fds = fds
        self.known = known  # what a new priv is told about them
        self.ranges4 = [(*range_of(link.host4, link.length4), link) for link in links if link.host4]
        # From the first to the last address of all ranges.  Without a range nothing is in between.
        self.first4 = min((first for first, _, _ in self.ranges4), default=1)
        self.last4 = max((last for _, last, _ in self.ranges4), default=0)
        self.networks6 = {link.prefix6: link for link in links if link.prefix6}
        self.dropped: dict[int, tuple[int, int]] = {}  # by filters (`FramesDropped`), by number of the interface

    def serve(self, nics: tuple[NicConfig, ...], plan: Plan, lacking: "Mapping[int, str]") -> bool:
        """Return whether a guest that boots again can keep these interfaces.

        It cannot if a switch that was missing exists now, or if another program has deleted a tap.
        """
        same = (self.nics, self.plan) == (nics, plan) and self.lacking.keys() <= lacking.keys()
        return same and all(map(has_interface, self.fds))

    def close(self) -> None:
        """Close the descriptors."""
        while self.fds:
            close(self.fds.pop())


def range_of(address: bytes, length: int) -> tuple[int, int]:
    """Return the first and the last address of a network, as numbers."""
    number, size = int.from_bytes(address, "big"), 1 << 8 * len(address) - length
    return number & -size, number | size - 1


def has_interface(tap: int) -> bool:
    """Return whether the interface of a tap still exists."""
    try:
        fcntl.ioctl(tap, TUNGETIFF, bytes(IFREQ_BYTES))
    except OSError as error:
        return error.errno != errno.EBADFD
    return True


class Plans:
    """Finds the plan of each VM, and checks that its addresses and ports are free."""

    def __init__(self, core: "Core", taps: "Mapping[int, Taps]") -> None:
        self.core = core
        self.taps = taps  # by vmid

    def prefix6(self) -> "Prefix | None":
        """Return the IPv6 range of this host's local interfaces; None if they have no IPv6."""
        settings = self.core.config.settings
        if not settings.local_inet6:
            return None
        if settings.local_inet6_prefix is not None:
            return settings.local_inet6_prefix
        identities = self.core.vms.identities
        if identities.ula is None:
            identities.ula = random_ula()
            identities.changed()
        return identities.ula

    def plan_of(self, vm: Vm, config: VmConfig) -> Plan:
        """Return the plan of a VM: from its own number, or the plan of the host that has sent it.

        Raises:
            OperatorError: no number is free.
        """
        fixed = tuple(nic.address for nic in config.nics)
        fixed = fixed if any(fixed) else ()
        if config.plan_id and config.plan_prefix4 is not None:
            prefixes = config.plan_prefix4, config.plan_prefix6
            return Plan(number=config.plan_id, prefix4=prefixes[0], prefix6=prefixes[1], fixed=fixed)
        plan = Plan(
            number=0, prefix4=self.core.config.settings.local_prefix, prefix6=self.prefix6(), fixed=fixed
        )
        if any(nic.local for nic in config.nics):
            plan = plan.replace(number=self.number(vm, config, plan))
        return plan

    def number(self, vm: Vm, config: VmConfig, plan: Plan) -> int:
        """Return the number of a VM: the one it had before, or another one if those addresses are not free now.

        Raises OperatorError if no number is free.
        """
        identities = self.core.vms.identities
        key = config.name, config.owner.uid
        identity = identities.of(key)
        if self.holds(vm, plan.replace(number=identity.number)):
            return identity.number
        # An interface in a routing domain has routes of its own.
        routes = host_routes() if any(nic.local and not nic.rdomain for nic in config.nics) else []
        for what, prefix in (("local prefix", plan.prefix4), ("local inet6 prefix", plan.prefix6)):
            route = covering(prefix, routes)
            if route is not None:
                why = f"are in {route.network}, which this host reaches by {route.interface}"
                raise OperatorError(errno.EADDRINUSE, f"vm {config.name}: all addresses of `{what}` {why}")

        reserved = [
            network_of(nic.address.address, nic.address.length)
            for other in self.core.vms
            for nic in other.claims
            if other is not vm and nic.address is not None
        ]

        # Fixed addresses do not depend on the number.
        ours = config.replace(nics=tuple(nic.replace(local=nic.local and nic.address is None) for nic in config.nics))

        def free(number: int) -> bool:
            candidate = plan.replace(number=number)
            if any(network.overlaps(each) for network in networks4(ours, candidate) for each in reserved):
                return False
            return not self.user_of(vm, ours, candidate) and not self.route_to(ours, candidate, routes)

        chosen = identities.choose_number(key, room(plan.prefix4, plan.prefix6), free, self.core.vms.present)
        if not chosen:
            text = "no addresses are left for its local interfaces; see `local prefix` and `local inet6 prefix`"
            raise OperatorError(errno.ERANGE, f"vm {config.name}: {text}")
        if identity.number and identity.number != chosen:
            log.info(f"vm {config.name}: its local interfaces get other addresses, because the earlier ones are in use")
        if identity.number != chosen:
            identity.number = chosen
            identities.changed(key)
        return chosen

    def check(self, vm: Vm, config: VmConfig) -> Plan:
        """Return the plan of a VM.  Raises OperatorError if its addresses, ports or taps are not free."""
        plan = self.plan_of(vm, config)
        if not self.holds(vm, plan):
            self.check_addresses(vm, config, plan)
        held = self.taps.get(vm.vmid)
        if held is None or forwards_of(held.nics) != forwards_of(config.nics):
            self.check_forwards(vm, config)
        for tap in {nic.tap for nic in config.nics}.difference(AUTOMATIC):
            for vmid, taps in self.taps.items():
                if vmid != vm.vmid and any(link.name == tap for link in taps.links):
                    what = f"interface {tap} is in use by vm {self.name_of(vmid)}"
                    raise OperatorError(errno.EBUSY, f"vm {config.name}: {what}")
        return plan

    def holds(self, vm: Vm, plan: Plan) -> bool:
        """Return whether a VM already has the addresses of a plan, as after a reset of its guest."""
        held = self.taps.get(vm.vmid)
        return held is not None and held.plan == plan

    def check_addresses(self, vm: Vm, config: VmConfig, plan: Plan) -> None:
        """Raise OperatorError unless the addresses of local interfaces are in their range and free.

        Another VM may have them, or a route of this host may lead to them.
        """
        try:
            user = self.user_of(vm, config, plan)
            taken = self.route_to(config, plan, host_routes())
        except OperatorError as error:
            raise OperatorError(error.number, f"vm {config.name}: {error}") from None
        if user is not None:
            where = f"that vm {self.name_of(user[0])} has here, such as {user[1]}"
        elif taken is not None:
            network, route = taken
            where = f"out of {route.network}, which this host reaches by {route.interface}, such as {network}"
        else:
            return
        raise OperatorError(errno.EADDRINUSE, f"vm {config.name}: its local interfaces have addresses {where}")

    def route_to(
        self, config: VmConfig, plan: Plan, routes: "Sequence[HostRoute]"
    ) -> "tuple[IpNetwork, HostRoute] | None":
        """Return a network of a VM's local interfaces that this host has a route to, and the route, or None.

        Raises OperatorError if the number is too large for the range of addresses.
        """
        for index, nic in enumerate(config.nics):
            if not nic.local or nic.rdomain:
                continue
            networks = [network_of(plan.host4(index), plan.length4(index))]
            if plan.prefix6 is not None:
                networks.append(network_of(plan.network6(index), 64))
            for network in networks:
                for route in overlapping(network, routes):
                    return network, route
        return None

    def user_of(self, vm: Vm, config: VmConfig, plan: Plan) -> tuple[int, str] | None:
        """Return the id of another VM that has an address of this plan, and the address; None if there is none.

        Raises OperatorError if the number is too large for the range of addresses.
        """
        indices = [index for index, nic in enumerate(config.nics) if nic.local]
        wanted4 = [range_of(plan.host4(index), plan.length4(index)) for index in indices]
        wanted6 = {plan.network6(index) for index in indices} - {b""}
        for lowest, highest in wanted4:
            # This excludes most VMs at once.
            near = [each for each in self.taps.items() if each[1].first4 <= highest and lowest <= each[1].last4]
            for vmid, taps in near:
                for first, last, link in taps.ranges4:
                    if vmid != vm.vmid and first <= highest and lowest <= last:
                        return vmid, str(ipaddress.ip_address(link.host4))
        for vmid, taps in self.taps.items() if wanted6 else ():
            for network in wanted6.intersection(taps.networks6):
                if vmid != vm.vmid:
                    return vmid, str(ipaddress.ip_address(network))
        return None

    def check_forwards(self, vm: Vm, config: VmConfig) -> None:
        """Raise OperatorError if a port of this host that a VM wants belongs to another VM or to a program."""
        forwards = [(index, forward) for index, nic in enumerate(config.nics) for forward in nic.forwards]
        if not forwards:
            return
        if not self.core.config.settings.local_nat:
            what = f"forward {forwards[0][1]}: not without NAT (local nat disable)"
            raise OperatorError(errno.EINVAL, f"vm {config.name}: interface {forwards[0][0]}: {what}")
        others = [(vmid, each) for vmid, taps in self.taps.items() for nic in taps.nics for each in nic.forwards]
        for index, forward in forwards:
            what = f"vm {config.name}: interface {index}: forward {forward}"
            for vmid, other in others:
                if vmid != vm.vmid and forward.overlaps(other):
                    raise OperatorError(errno.EADDRINUSE, f"{what}: vm {self.name_of(vmid)} has {other}")
            if why := hostports.in_the_way(forward):
                raise OperatorError(errno.EADDRINUSE, f"{what}: {why}")

    def name_of(self, vmid: int) -> str:
        """Return the name of a VM, for sentences."""
        vm = self.core.vms.find(vmid, "")
        return vm.name if vm else str(vmid)


def networks4(config: VmConfig, plan: Plan) -> "list[IpNetwork]":
    """Return the IPv4 networks of a VM's local interfaces."""
    return [
        network_of(plan.host4(index), plan.length4(index)) for index, nic in enumerate(config.nics) if nic.local
    ]


def forwards_of(nics: "Sequence[NicConfig]") -> "list[tuple[Forward, ...]]":
    """Return the forwards of each interface."""
    return [nic.forwards for nic in nics]
