"""The part of the host's network that vmd makes: bridges, taps, VRFs, addresses, rules, forwarding.

Interfaces that priv makes have an alias that no other program gives: switch<id>-<name>, vm<id>-if<n>-<name>,
rdomain<n>.  By these aliases priv finds the interfaces that a killed daemon has left.  An interface without such an
alias belongs to others and is never changed.  The exception is a tap that vm.conf names: its VM uses it, and later it
is restored (`Attached`).

All requests are checked once more (`requests.py`), so that a parent that was taken over cannot reach other interfaces.
"""

import errno
import ipaddress
import os
import time
from collections import Counter

from vmd.closing import close
from vmd.config.model import DEFAULT_ROUTES
from vmd.config.rules import HOST_TABLES
from vmd.errors import HostError, OperatorError
from vmd.ipc.messages.priv import AddressGiven, FramesDropped
from vmd.log import log
from vmd.priv import drops, groups, legacy, rules, sysctl, tap
from vmd.priv.damage import Damage, Damages
from vmd.priv.filters import Filters, needed
from vmd.priv.firewalls import Chain, Guests, advice
from vmd.priv.ifconfig import Links
from vmd.priv.lists import Link
from vmd.priv.nics import (
    HOST6,
    Attached,
    Nic,
    adopted,
    is_bridge,
    is_tap,
    is_unfinished,
    is_vrf,
    link_local,
    opposite,
    to_itself,
)
from vmd.priv.requests import (
    INET4_BYTES,
    INET6_BYTES,
    check_forwards,
    check_request,
    check_switch,
    inside,
    is_tap_name,
    networks_of,
    refuse,
)
from vmd.priv.rules import Member, Nft

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from vmd.config.model import Forward
    from vmd.ipc.messages.priv import (
        AdoptNics,
        ConfigureNetwork,
        MakeNics,
        NicWanted,
        SetForwards,
        SwitchRequest,
    )

MTU_MAX = 16384  # the largest MTU of OpenBSD's taps (*cat. 6.5*)
LOOPBACK = "lo"
PREDECESSOR_PATIENCE_S = 5.0
RETRY_S = 0.05
# Whether it is IPv6, its name, and its setting.
FORWARDING = ((False, "IPv4", "ipv4/ip_forward"), (True, "IPv6", "ipv6/conf/all/forwarding"))


class Wrong:
    """A trouble, and the interfaces that have it: the VM and the number of each."""

    def __init__(self, thing: "drops.Loss | Damage") -> None:
        self.thing = thing
        self.whose: list[tuple[int, int]] = []

    def where(self) -> tuple[int, str]:
        """Return the VM and its interface, or 0 and "" if several VMs have it."""
        (vmid, index), *others = self.whose
        return (0, "") if any(other != vmid for other, _ in others) else (vmid, f"interface{index}")


class HostNetwork:
    """The part of the host's network that vmd makes.  Methods raise OperatorError or HostError."""

    def __init__(self) -> None:
        self.links = Links()
        self.nft = Nft()
        self.kept = sysctl.ChangedSettings()
        self.nat = False
        self.switches: dict[str, SwitchRequest] = {}  # by interface
        self.nics: dict[int, list[Nic]] = {}  # by vmid
        self.groups_seen: set[str] = set()  # groups that have a set in our table
        self.has_table = False
        self.said: set[str] = set()  # sentences that `say_once` has logged
        self.watch = drops.Watch()
        self.counts = True  # sets of nftables can have counters on this host
        self.watched: set[str] = set()  # the interfaces and bridges whose packets are counted
        self.judged: set[str] = set()  # ... of these, the bridges
        self.held: Counter[tuple[str, str]] = Counter()  # elements of sets, and how many interfaces have each
        self.loaded = legacy.Loaded()
        self.shape: dict[str, int] = {}  # `rules.shape` of our table as it was written
        self.damage = Damages(self)
        self.filters = Filters(self.nft)
        self.adopting = False  # interfaces that an earlier priv has made stay

    # --- ownership ---------------------------------------------------------------------------------------

    def own(self) -> bool:
        """Become the owner of the network and remove what an earlier vmd has left.  False if another vmd is the owner.

        If interfaces were adopted, bridges, rules and settings stay, too.  The configuration that follows tidies them.
        """
        if self.kept.fd >= 0:
            return True
        if not self.kept.lock():
            return False
        self.remove_leftovers()
        return True

    def require_ownership(self) -> None:
        """Become the owner; wait if another daemon is just ending.  Raises OperatorError if it keeps the network."""
        deadline_s = time.monotonic() + PREDECESSOR_PATIENCE_S
        while not self.own():
            if time.monotonic() > deadline_s:
                raise OperatorError(errno.EBUSY, "the network of this host belongs to another vmd, which is running")
            time.sleep(RETRY_S)

    def remove_leftovers(self) -> None:
        """Remove interfaces with our aliases and our table, and undo changed settings.  Failures are logged."""
        removed = []
        kept = {nic.link.index for nic in self.all_nics()}
        try:
            links = [link for link in self.links.all() if link.index not in kept]
            if self.adopting:
                self.has_table = self.nft.has_table()
                links = [link for link in links if is_tap(link) or is_unfinished(link)]
            for link in links:
                if is_tap(link) or is_unfinished(link) or (is_vrf(link) and not self.foreign_members(link)):
                    self.links.delete(link)
                    removed.append(link.name)
            for link in links:
                if is_bridge(link) and not self.foreign_members(link):
                    self.links.delete(link)
                    removed.append(link.name)
            if not self.adopting:
                self.links.forget_routes()
            if not self.adopting and self.nft.has_table():
                self.nft.delete_table()
                removed.append(f"table {rules.TABLE}")
            removed += self.filters.remove_others()
        except (OperatorError, HostError) as error:
            log.warn(f"what an earlier vmd has left could not be removed: {error}")
        if removed:
            log.info(f"removed what an earlier vmd has left: {', '.join(removed)}")
        if not self.adopting:
            self.put_back()

    def close(self) -> None:
        """Remove everything that priv has made."""
        if self.kept.fd < 0:
            return
        for vmid in list(self.nics):
            self.drop(self.nics.pop(vmid))
        self.switches = {}
        self.attempt(self.remove_idle, self.remove_rules)
        self.put_back()
        self.kept.close()

    # --- switches ----------------------------------------------------------------------------------------

    def configure(self, message: "ConfigureNetwork") -> list[str]:
        """Make the bridges of a configuration.  Returns a sentence for each failure."""
        self.nat = message.nat
        if not message.switches and not self.nics and self.kept.fd < 0:
            return []  # a daemon without networks need not be the owner
        self.require_ownership()
        problems = []
        self.switches = {}
        for switch in message.switches:
            try:
                check_switch(switch)
                self.switches[switch.interface] = switch
                self.ensure_bridge(switch)
            except (OperatorError, HostError) as error:
                problems.append(str(error))
        self.tidy()  # also writes the rules: a firewall that was restarted may have flushed ours with its own
        try:
            self.forward()  # for interfaces that were made before NAT was configured
        except HostError as error:
            problems.append(str(error))
        return problems

    def ensure_bridge(self, switch: "SwitchRequest") -> Link:
        """Return the bridge of a switch, and make it if it is missing.  A bridge of others is not changed."""
        name = switch.interface
        link = self.links.find(name)
        if link is not None and link.kind != "bridge":
            what = link.kind or "another kind of interface"
            raise OperatorError(errno.EEXIST, f"interface {name} is not a bridge but {what}: switches need one")
        made = link is None
        if link is None:
            try:
                link = self.links.add_bridge(name, switch.alias)
            except HostError as error:
                raise OperatorError(error.number, lacking(error, f"make bridge {name}", "bridge")) from None
        try:
            if made and sysctl.entries("ipv6/conf"):
                sysctl.write(*to_itself(name))
                for nic in self.ports(name):  # of an earlier bridge that another program has deleted
                    self.links.set_master(nic.link, link)
            if is_bridge(link):
                if switch.rdomain:
                    self.links.set_master(link, self.ensure_vrf(switch.rdomain))
                elif link.master:
                    self.links.leave_master(link)
                if link.alias != switch.alias:
                    self.links.set_alias(link, switch.alias)
                self.links.set_up(link, up=switch.up)
            elif switch.rdomain:
                self.require_rdomain(link, switch.rdomain)
        except (OperatorError, HostError):
            if made:
                self.links.delete(link)
            raise
        return self.links.get(name)

    def ports(self, bridge: str) -> "list[Nic]":
        """Return the existing interfaces of VMs that belong into a bridge and are in none."""
        free = {link.index for link in self.links.all() if not link.master}
        return [nic for nic in self.all_nics() if nic.bridge == bridge and nic.link.index in free]

    def require_rdomain(self, bridge: Link, rdomain: int) -> None:
        """Raise OperatorError unless a bridge of others is in a routing domain."""
        vrf = next((link for link in self.links.all() if link.index == bridge.master), None)
        if vrf is None or vrf.kind != "vrf" or vrf.table != rdomain:
            raise OperatorError(
                errno.EEXIST,
                f"bridge {bridge.name} was there before vmd and is not in rdomain {rdomain}: it is left alone",
            )

    def ensure_vrf(self, rdomain: int) -> Link:
        """Return the VRF device of a routing domain, and make it if it is missing."""
        name = f"vrf{rdomain}"
        link = self.links.find(name)
        if link is not None:
            if link.kind != "vrf" or link.table != rdomain:
                raise OperatorError(errno.EEXIST, f"interface {name} is not the VRF of routing table {rdomain}")
            return link
        if rdomain in HOST_TABLES:
            raise OperatorError(errno.EINVAL, f"rdomain {rdomain}: the host's own routing table has that number")
        if self.links.shared_table(rdomain):  # `end_table` would make the host's own packets unreachable
            raise OperatorError(
                errno.EBUSY,
                f"rdomain {rdomain}: packets of this host go to routing table {rdomain}, too, as `ip rule` shows; "
                "choose another number",
            )
        try:
            link = self.links.add_vrf(name, rdomain, f"rdomain{rdomain}")
        except HostError as error:
            raise OperatorError(error.number, lacking(error, f"rdomain {rdomain}: make VRF {name}", "vrf")) from None
        try:
            self.links.end_table(rdomain)
            self.links.set_up(link, up=True)
        except HostError:
            self.links.delete(link)
            raise
        return link

    def remove_idle(self) -> None:
        """Remove our bridges and VRFs that are not needed any more.  One with interfaces of others stays."""
        for kind in (is_bridge, is_vrf):
            for link in self.links.all():
                if not kind(link) or link.name in self.switches:
                    continue
                members = self.links.members(link)
                if not members:
                    self.links.delete(link)
                    if link.table:
                        self.links.forget_routes(link.table)
                elif self.foreign_members(link):
                    self.say_once(f"{link.kind} {link.name} has interfaces in it that are not vmd's: it stays")

    def foreign_members(self, link: Link) -> list[str]:
        """Return the names of the interfaces of others in a bridge or VRF."""
        attached = {nic.link.index for nic in self.all_nics()}
        return [
            member.name for member in self.links.members(link)
            if not (is_tap(member) or is_bridge(member) or member.index in attached)
        ]  # fmt: skip

    # --- interfaces of VMs -------------------------------------------------------------------------------

    def make_nics(self, message: "MakeNics", tuns: "list[int]") -> list[Nic]:
        """Make all interfaces of a VM, or none.  Removes from `tuns` the descriptors that it takes over."""
        check_request(message)
        if len(tuns) != len(message.nics):
            raise refuse(f"{len(message.nics)} interfaces out of {len(tuns)} descriptors")
        self.require_ownership()
        if message.vmid in self.nics:
            raise OperatorError(errno.EEXIST, f"vm {message.vmid} has interfaces already")
        self.require_free_ports(message.vmid, [each for nic in message.nics for each in nic.forwards])
        made: list[Nic] = []
        try:
            for request in message.nics:
                made.append(self.make_nic(message.vmid, request, message.reserved, tuns))
            self.nics[message.vmid] = made
            self.change_rules(new=made)
            self.forward()
        except (OperatorError, HostError):
            self.nics.pop(message.vmid, None)
            self.drop(made)
            self.tidy()
            raise
        return made

    def adopt(self, message: "AdoptNics") -> None:
        """Adopt the interfaces of a VM that an earlier priv has made."""
        check_request(message)
        named = all(is_tap_name(made.name) for made in message.made)
        if len(message.made) != len(message.nics) or message.vmid in self.nics or not named:
            raise refuse(f"to adopt {len(message.made)} interfaces of vm {message.vmid}")
        self.nics[message.vmid] = nics = [
            adopted(message.vmid, request, made) for request, made in zip(message.nics, message.made, strict=True)
        ]
        for nic, request in zip(nics, message.nics, strict=True):
            if nic.vhost:
                self.filters.adopt(nic.link.name, request)

    def forward_ports(self, message: "SetForwards") -> None:
        """Forward these ports, and no others, to the interfaces of a VM."""
        nics = self.nics.get(message.vmid)
        if nics is None:
            return
        if len(nics) != len(message.forwards):
            raise refuse(f"to forward ports to {len(message.forwards)} interfaces of {len(nics)}")
        for nic, forwards in zip(nics, message.forwards, strict=True):
            check_forwards(nic.guest4, forwards)
        self.require_free_ports(message.vmid, [each for forwards in message.forwards for each in forwards])
        for nic, forwards in zip(nics, message.forwards, strict=True):
            nic.forwards = forwards
        self.write_rules()

    def require_free_ports(self, vmid: int, forwards: "Sequence[Forward]") -> None:
        """Raise OperatorError if one of these ports is already forwarded to another VM."""
        for nic in self.all_nics() if forwards else ():
            for theirs in nic.forwards if nic.vmid != vmid else ():
                for ours in forwards:
                    if ours.overlaps(theirs):
                        raise OperatorError(errno.EADDRINUSE, f"forward {ours}: vm {nic.vmid} has {theirs}")

    def tidy(self) -> None:
        """Remove rules, bridges and VRFs that no interface needs any more.  Failures are logged."""
        self.attempt(self.write_rules, self.remove_idle)

    def attempt(self, *attempts: "Callable[[], None]") -> None:
        """Call all of these.  Failures are logged."""
        for attempt in attempts:
            try:
                attempt()
            except (OperatorError, HostError) as error:
                log.error(str(error))

    def make_nic(self, vmid: int, request: "NicWanted", reserved: "Collection[str]", tuns: "list[int]") -> Nic:
        """Make one tap and put it into its bridge or VRF.  Takes the first descriptor of `tuns` over."""
        bridge = None
        if request.bridge:
            switch = self.switches.get(request.bridge)
            if switch is None:
                raise OperatorError(errno.ENOENT, f"bridge {request.bridge} belongs to no switch")
            bridge = self.ensure_bridge(switch)
            if request.rdomain not in (None, switch.rdomain or 0):
                raise OperatorError(
                    errno.EINVAL,
                    f"rdomain {request.rdomain}: an interface on a switch is in the rdomain of the switch, "
                    f"{switch.rdomain or 0}",
                )
        existing = self.links.find(request.name) if request.name else None
        if existing is not None and request.existing:
            return self.attach(vmid, existing, request, bridge, tuns)
        name = tap.make(tuns[0], request.name, reserved)
        fd = tuns.pop(0)
        try:
            link = self.links.get(name)
            self.links.set_alias(link, request.alias)
            self.links.set_lladdr(link, opposite(request.lladdr))
            link = self.links.get(name)
            nic = Nic(vmid, link, fd, request)
            self.filter(nic, request)
            self.configure_tap(nic, request, bridge)
            nic.link = self.links.get(name)
        except (OperatorError, HostError):
            close(fd)  # removes the tap
            self.unfilter(name)
            raise
        return nic

    def attach(self, vmid: int, link: Link, request: "NicWanted", bridge: Link | None, tuns: "list[int]") -> Attached:
        """Use an existing tap.  It keeps its name and addresses, and gets what the request adds."""
        if is_tap(link):
            raise OperatorError(errno.EBUSY, f"interface {link.name} exists already: {link.alias}")
        if link.kind != "tun":
            raise OperatorError(errno.EBUSY, f"interface {link.name} exists already, and is not a tap")
        tap.attach(tuns[0], link.name)
        nic = Attached(vmid, link, tuns.pop(0), request)
        try:
            self.filter(nic, request)
            self.configure_attached(nic, request, bridge)
            nic.link = self.links.get(link.name)
        except (OperatorError, HostError):
            nic.close()
            self.give_back(nic)
            self.unfilter(link.name)
            raise
        return nic

    def filter(self, nic: Nic, request: "NicWanted") -> None:
        """Lay the filters that replace the checks of the interface's process, if the kernel moves the frames.

        If the filters cannot be laid, the kernel may not move the frames.
        """
        self.unfilter(nic.link.name)  # of a deleted tap of this name
        if not request.vhost:
            return
        try:
            if needed(request):
                self.filters.lay(nic.link.name, request)
        except OperatorError as error:
            nic.without = f"there can be no filters on {nic.link.name}: {error}"
        else:
            nic.vhost = True

    def unfilter(self, tap: str) -> None:
        """Remove the filters of a tap.  Failures are logged."""
        try:
            self.filters.remove(tap)
        except OperatorError as error:
            log.error(f"the filters of {tap} were not removed: {error}")

    def configure_attached(self, nic: Attached, request: "NicWanted", bridge: Link | None) -> None:
        """Make the changes of a request to an existing tap, and no others."""
        link = nic.link
        master = bridge
        if master is None and request.rdomain:
            master = self.ensure_vrf(request.rdomain)
        if master is not None and link.master not in (0, master.index):
            raise OperatorError(
                errno.EBUSY, f"interface {link.name} exists already, and is in another bridge or VRF than {master.name}"
            )
        self.join_group(link, request.groups)
        if master is not None and not link.master:
            if bridge is not None:
                self.links.set_mtu(link, min(bridge.mtu, MTU_MAX))  # as `configure_tap` does
            self.links.set_master(link, master)
        self.require_free(link, networks_of(request))
        if request.host4:
            self.kept.change(f"ipv4/conf/{link.name}/rp_filter", "1")
            self.lend_address(nic, request.host4, request.length4)
        if request.prefix6:
            if not sysctl.entries("ipv6/conf"):
                raise OperatorError(errno.EAFNOSUPPORT, f"interface {link.name}: local inet6: this kernel has no IPv6")
            self.kept.change(f"ipv6/conf/{link.name}/disable_ipv6", "0")
            nic.link_local = link_local(link.lladdr)
            self.lend_address(nic, nic.link_local, 64)
            self.lend_address(nic, request.prefix6[:8] + HOST6, 64)
        if request.up:
            self.links.set_up(link, up=True)

    def lend_address(self, nic: Attached, address: bytes, length: int) -> None:
        """Add an address to a tap of another program, unless it has the address."""
        if (nic.link.index, address) not in self.links.addresses():
            self.links.add_address(nic.link, address, length)
            nic.added.append(AddressGiven(address=address, length=length))

    def give_back(self, nic: Attached) -> None:
        """Undo the changes to a tap of another program.  Failures are logged."""
        try:
            link, before = self.links.find(nic.link.name), nic.before
            if link is None or link.index != before.index:
                return
            for given in nic.added:
                self.links.delete_address(link, given.address, given.length)
            # It leaves a bridge of ours even if it was there before: a killed daemon may have put it there.
            ours = any(other.index == link.master and (is_bridge(other) or is_vrf(other)) for other in self.links.all())
            if link.master and (link.master != before.master or ours):
                self.links.leave_master(link)
            if link.mtu != before.mtu:
                self.links.set_mtu(link, before.mtu)
            if link.group != before.group:
                self.links.set_group(link, before.group)
            if link.up and not before.up:
                self.links.set_up(link, up=False)
        except HostError as error:
            log.error(str(error))

    def configure_tap(self, nic: Nic, request: "NicWanted", bridge: Link | None) -> None:
        """Give a tap its group, bridge or VRF, and addresses, and switch it on."""
        link = nic.link
        self.join_group(link, request.groups)
        ipv6 = bool(request.prefix6)
        if ipv6 and sysctl.read("ipv6/conf/all/forwarding") is None:
            raise OperatorError(errno.EAFNOSUPPORT, f"interface {link.name}: local inet6: this kernel has no IPv6")
        for setting, value in nic.settings():
            if sysctl.read(setting) is not None:
                sysctl.write(setting, value)
        if bridge is not None:
            # The MTU first: a bridge without an MTU of its own takes the smallest one of its ports.
            self.links.set_mtu(link, min(bridge.mtu, MTU_MAX))
            self.links.set_master(link, bridge)
        elif request.rdomain:
            self.links.set_master(link, self.ensure_vrf(request.rdomain))
        self.require_free(link, networks_of(request))
        self.require_no_route(link, request)
        if request.host4:
            self.links.add_address(link, request.host4, request.length4)
        if request.prefix6:
            nic.link_local = link_local(link.lladdr)
            self.links.add_address(link, nic.link_local, 64)
            self.links.add_address(link, request.prefix6[:8] + HOST6, 64)
        if request.up:
            self.links.set_up(link, up=True)

    def require_free(self, link: Link, networks: "Sequence[tuple[bytes, int]]") -> None:
        """Raise OperatorError if the host has an address of these networks on another interface."""
        if not networks:
            return
        for index, address in self.links.addresses():
            for network, length in networks:
                if index != link.index and inside(address, network, length):
                    why = f"the host has {ipaddress.ip_address(address)} on another interface"
                    raise in_use(link, network, length, why)

    def require_no_route(self, link: Link, request: "NicWanted") -> None:
        """Raise OperatorError if the host has a route to an address of a `local` interface by another interface.

        With addresses of the host's own network on a tap, the host would send packets for that network to the tap,
        perhaps even those for its router.
        """
        vrf = self.links.find(f"vrf{request.rdomain}") if request.rdomain else None
        for network, length in networks_of(request):
            first = int.from_bytes(network, "big") & ~((1 << (8 * len(network) - length)) - 1)
            # For IPv6, only the network address and the host's address are checked.
            guest = int.from_bytes(request.guest4 or network, "big") if len(network) == INET4_BYTES else first
            for number in {first, first + 1, guest}:
                route = self.links.route_to(number.to_bytes(len(network), "big"), vrf.index if vrf else 0)
                if route is None or route.index == link.index or route.length <= DEFAULT_ROUTES[len(network)]:
                    continue
                reached = f"{rules.text(route.network, route.length)} by {self.links.name_of(route.index)}"
                raise in_use(link, network, length, f"the host reaches {reached}")

    def join_group(self, link: Link, names: "Sequence[str]") -> None:
        """Put an interface into the first group that the host knows.  All groups are sets of nftables."""
        for name in names:
            number = groups.number(name)
            if number is not None:
                self.links.set_group(link, number)
                return
            self.say_once(f"group {name} is not in /etc/iproute2/group: only nftables will know it, as set vmd_{name}")

    def remove_nics(self, vmid: int) -> None:
        """Remove the interfaces of a VM, if it has some."""
        nics = self.nics.pop(vmid, None)
        if nics is None:
            return
        self.drop(nics)
        names = {nic.link.name for nic in nics}
        self.damage.forget(names)
        attempts = [lambda: self.change_rules(gone=nics)]
        if any(nic.rdomain or (nic.bridge and nic.bridge not in self.switches) for nic in nics):
            attempts.append(self.remove_idle)
        self.attempt(*attempts)

    def drop(self, nics: "Sequence[Nic]") -> None:
        """Delete taps that priv has made, and restore those of others.  Failures are logged.

        A tap is deleted even if a process still has its descriptor.
        """
        for nic in nics:
            nic.close()
            if isinstance(nic, Attached):
                self.give_back(nic)
            else:
                self.delete_tap(nic)
            self.unfilter(nic.link.name)

    def delete_tap(self, nic: Nic) -> None:
        """Delete a tap that priv has made.  Failures are logged."""
        try:
            link = self.links.find(nic.link.name)
            if link is not None and link.index == nic.link.index and is_tap(link):
                self.links.delete(link)
        except HostError as error:
            log.error(str(error))

    # --- damage ------------------------------------------------------------------------------------------

    def is_ours(self, link: Link) -> bool:
        """Return whether priv has made a bridge."""
        return is_bridge(link)

    def bridge_settings(self, name: str) -> list[tuple[str, str]]:
        """Return the settings that a bridge must have, if priv has made it."""
        link = self.links.find(name)
        return [to_itself(name)] if link is not None and is_bridge(link) else []

    def lacks_forwarding(self) -> list[str]:
        """Return the names of the address families that interfaces need forwarding for, and that have it off."""
        networks = [network for member in self.members() for network in member.networks]
        needed = {rules.v6(network) for network in networks}
        return [words for six, words, setting in FORWARDING if six in needed and sysctl.read(setting) == "0"]

    def lost_rules(self) -> list[str] | None:
        """Return the chains and sets of our table that lack rules or elements; None if the table is gone."""
        if not self.has_table:
            return []
        try:
            there = self.nft.shape()
        except OperatorError:
            return [] if self.nft.has_table() else None
        return [name for name, count in self.shape.items() if there.get(name, -1) < count] if there else []

    def take_rules_as_they_are(self) -> None:
        """Do not report again what the table lacks right after it was written.

        A version of nft may show sets differently than they were written.  The table is written once more first,
        because another program may have deleted something since the last writing.
        """
        lost = set(self.lost_rules() or ())
        if lost:
            self.write_rules()
            lost &= set(self.lost_rules() or ())
        for name in lost:
            del self.shape[name]

    def damages(self, vmid: int) -> list[tuple[int, Damage]]:
        """Return recent damage to a VM's interfaces, each with the number of the interface."""
        return [
            (index, damage) for index, nic in enumerate(self.nics.get(vmid, ())) for damage in self.damage.of(nic)
        ]

    def frames_dropped(self) -> list[FramesDropped]:
        """Return the counts of frames that filters of taps have dropped, where they have grown since the last call."""
        try:
            news = self.filters.news()
        except OperatorError:
            return []  # the filters are gone; `damage` reports that
        return [
            FramesDropped(vmid=vmid, index=index, **news[nic.link.name].as_dict())
            for vmid, nics in (self.nics.items() if news else ())
            for index, nic in enumerate(nics)
            if nic.link.name in news
        ]

    # --- rules -------------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """Return all interfaces as the rules need them."""
        return [self.member(nic) for nic in self.all_nics()]

    def member(self, nic: Nic) -> Member:
        """Return an interface as the rules need it."""
        return Member(
            name=nic.link.name,
            groups=nic.groups,
            networks=nic.networks if self.nat else (),
            guest4=nic.guest4,
            forwards=nic.forwards if self.nat else (),
        )

    def change_rules(self, *, gone: "Sequence[Nic]" = (), new: "Sequence[Nic]" = ()) -> None:
        """Update our table after interfaces have gone or come.  Write it as a whole only if more than sets changes.

        The sets have the elements of hundreds of other interfaces, whose counters go on.
        """
        bridges = self.judged_bridges()
        less, more = (Counter(pair for nic in nics for pair in self.elements(nic)) for nics in (gone, new))
        if bridges == self.judged and not less and not more:
            return
        if bridges != self.judged or not self.only_sets_change(gone, new):
            self.write_rules()
            return
        # A new tap may have the name of one that is gone and whose VM is still known, so elements are counted.
        over = [pair for pair in less if self.held[pair] <= less[pair]]
        first = [pair for pair in more if not self.held[pair]]
        try:
            self.nft.apply(rules.difference(over, first))
        except OperatorError:  # another program has changed the table
            self.write_rules()
            return
        self.held.update(more)
        self.held.subtract(less)
        for pair in over:
            del self.held[pair]
        for change, pairs in ((-1, over), (1, first)):
            for name, _ in pairs:
                if f"set {name}" in self.shape:
                    self.shape[f"set {name}"] += change
        for nic in (*gone, *new):
            is_watched = ("local", f'"{nic.link.name}"') in self.held
            (self.watched.add if is_watched else self.watched.discard)(nic.link.name)
        self.watch.keep(self.watched)

    def elements(self, nic: Nic) -> "Iterator[tuple[str, str]]":
        """Yield the elements of an interface in the sets of our table."""
        return rules.elements(self.member(nic), counted=self.counts)

    def only_sets_change(self, gone: "Sequence[Nic]", new: "Sequence[Nic]") -> bool:
        """Return whether these interfaces change only elements of sets of our table."""
        if not self.has_table:
            return False
        for nic in (*gone, *new):
            if (self.nat and nic.forwards) or not self.groups_seen.issuperset(nic.groups):
                return False
        others = [nic for nic in self.all_nics() if nic not in new]
        networks = any(nic.networks for nic in (*gone, *new))
        return any(nic.networks for nic in others) if networks and self.nat else any(nic.groups for nic in others)

    def write_rules(self) -> None:
        """Write our table for all interfaces, or remove it if none needs it.

        A host without nftables cannot have NAT.  It still has groups, those of `ip link`.
        """
        self.count()  # writing resets the counters
        members = self.members()
        self.judged = bridges = self.judged_bridges()
        self.watched = bridges | {member.name for member in members if member.networks}
        self.watch.restart(self.watched)
        if not rules.needed(members, bridges):
            if self.has_table and not self.groups_seen:
                self.remove_rules()
            elif self.has_table:
                self.write(rules.ruleset([], self.groups_seen))
            return
        try:
            self.apply(members, bridges)
        except OperatorError as error:
            if any(member.networks for member in members):
                raise OperatorError(error.number, f"NAT for local interfaces: {error}") from None
            if any(member.groups for member in members):
                self.say_once(f"groups have no sets in nftables: {error}")
            return
        self.has_table = True
        self.held = Counter(pair for nic in self.all_nics() for pair in self.elements(nic))
        self.groups_seen.update(group for member in members for group in member.groups)

    def apply(self, members: "Sequence[Member]", bridges: "Collection[str]") -> None:
        """Write our table, without counters if sets cannot have them on this host."""
        if self.counts:
            try:
                self.write(rules.ruleset(members, self.groups_seen, bridges))
                return
            except OperatorError as error:
                if not any(member.networks or member.groups for member in members):
                    raise
                failed = error
        self.write(rules.ruleset(members, self.groups_seen, counted=False))
        if self.counts:
            self.counts = False
            self.say_once(f"packets of guests that other firewalls drop cannot be counted: {failed}")

    def write(self, text: str) -> None:
        """Write our table, and note its shape."""
        self.nft.apply(text)
        self.shape = rules.shape(text)

    def remove_rules(self) -> None:
        """Delete our table."""
        if self.has_table:
            self.nft.delete_table()
            self.has_table = False

    # --- what other firewalls drop -----------------------------------------------------------------------

    def judged_bridges(self) -> set[str]:
        """Return the bridges of VMs whose frames pass a firewall of the host (br_netfilter)."""
        bridges = {nic.bridge for nics in self.nics.values() for nic in nics if nic.bridge}
        if not bridges or self.nft.path is None or not self.counts:
            return set()
        if "1" not in (sysctl.read(f"bridge/bridge-nf-call-{tables}") for tables in ("iptables", "ip6tables")):
            return set()
        return bridges if any(chain.hook == "forward" for chain in self.other_chains()) else set()

    def other_chains(self) -> list[Chain]:
        """Return the chains of other programs, including those of the old iptables; none if they cannot be listed."""
        try:
            chains = self.nft.chains()
        except OperatorError:
            chains = []
        return chains + [chain for family in legacy.FAMILIES for chain in legacy.chains(family, self.loaded)]

    def count(self) -> bool:
        """Read the counters; return False if they are gone."""
        if not self.has_table or not self.watched or not self.counts:
            return True
        try:
            self.watch.take(self.nft.counters(), time.time())
        except OperatorError:
            return False
        return True

    def look(self) -> None:
        """Repair damage, read the counters, and log which packets of guests are dropped."""
        if not self.nics:
            return
        self.damage.repair()  # the kernel does not report each change of a setting
        self.count()
        if self.judged_bridges() != self.judged:
            self.tidy()  # a firewall was started or stopped
        for loss in self.watch.to_log(time.monotonic()):
            log.warn(self.sentence(loss))

    def losses(self, vmid: int) -> list[tuple[int, drops.Loss]]:
        """Return the current losses of a VM's packets, each with the number of the interface."""
        return [
            (index, loss)
            for index, nic in enumerate(self.nics.get(vmid, ()))
            for loss in self.watch.losses(nic.link.name, nic.bridge)
        ]

    def wrong(self) -> "dict[str, Wrong]":
        """Return the current troubles of all interfaces.  Each trouble is there once, with all interfaces that have it.

        Losses of packets to the host itself are left out, see `drops.Watch.to_log`.
        """
        found: dict[str, Wrong] = {}
        lost = [loss for loss in self.watch.losses() if loss.place != drops.HOST]
        if not lost and not self.damage.found:
            return found  # the usual case
        for vmid, nics in self.nics.items():
            for index, nic in enumerate(nics):
                names = nic.link.name, nic.bridge
                things: dict[str, drops.Loss | Damage]
                things = {f"{loss.place} {loss.name}": loss for loss in lost if loss.name in names}
                things |= {damage.text: damage for damage in self.damage.of(nic)}
                for key, thing in things.items():
                    found.setdefault(key, Wrong(thing)).whose.append((vmid, index))
        return found

    def sentence(self, loss: drops.Loss) -> str:
        """Return sentences about dropped packets: how many, which firewall may have dropped them, and what to do."""
        networks = [
            rules.text(*network) for nic in self.all_nics() if nic.link.name == loss.name
            for network in nic.networks
        ]  # fmt: skip
        guests = Guests(networks=tuple(networks), bridge=loss.name if loss.place == drops.SWITCH else "")
        sentences = advice(loss, self.other_chains(), guests)
        if guests.bridge:
            sentences.append(
                "br_netfilter passes frames of bridges through the firewall; if that is not needed: "
                "sysctl net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0"
            )
        return ". ".join([str(loss), *(sentences or ["`nft list ruleset` shows its rules"])])

    def all_nics(self) -> "list[Nic]":
        """Return the interfaces of all VMs."""
        return [nic for nics in self.nics.values() for nic in nics]

    # --- forwarding --------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Switch forwarding on for each address family that an interface needs it for."""
        networks = [network for member in self.members() for network in member.networks]
        if any(not rules.v6(network) for network in networks) and sysctl.read("ipv4/ip_forward") == "0":
            self.remember_forwarding("ipv4")
            self.kept.remember("ipv4/conf/all/accept_redirects")  # the kernel changes it with ip_forward
            if self.kept.change("ipv4/ip_forward", "1"):
                log.info("switched IPv4 forwarding on, for local interfaces with NAT")
        if any(rules.v6(network) for network in networks) and sysctl.read("ipv6/conf/all/forwarding") == "0":
            # With forwarding on, Linux ignores router advertisements unless accept_ra is 2.  The host must keep its
            # default route.
            for name in sysctl.entries("ipv6/conf"):
                setting = f"ipv6/conf/{name}/accept_ra"
                if name == "all":
                    continue
                if sysctl.read(setting) == "1":
                    self.kept.change(setting, "2")
                else:
                    self.kept.remember(setting)  # so that it is not taken for one that has inherited our default
            self.remember_forwarding("ipv6")
            if self.kept.change("ipv6/conf/all/forwarding", "1"):
                log.info("switched IPv6 forwarding on, for local interfaces with NAT")

    def remember_forwarding(self, family: str) -> None:
        """Note interfaces that have forwarding on already: switching it off for all would change them, too."""
        for name in sysctl.entries(f"{family}/conf"):
            setting = f"{family}/conf/{name}/forwarding"
            if name != "all" and sysctl.read(setting) == "1":
                self.kept.remember(setting)

    def put_back(self) -> None:
        """Undo changed settings, except forwarding that other programs may rely on."""
        left = []
        for family, words, switch in (
            ("ipv4", "IPv4", "net.ipv4.ip_forward"), ("ipv6", "IPv6", "net.ipv6.conf.all.forwarding"),
        ):  # fmt: skip
            users = self.users_of_forwarding(family) if self.kept.changes(family) else []
            if users:
                left.append(family)
                self.say_once(
                    f"{words} forwarding stays on, since others may rely on it: {', '.join(users)}; "
                    f"to switch it off: sysctl {switch}=0"
                )
        self.kept.put_back(left)

    def users_of_forwarding(self, family: str) -> list[str]:
        """Return possible other users of forwarding: two or more interfaces with addresses, or NAT of other programs.

        If that cannot be found out, return a sentence that says so.
        """
        size, nft_family = (4, "ip") if family == "ipv4" else (16, "ip6")
        try:
            addressed = {
                index for index, address in self.links.addresses()
                if len(address) == size and not ipaddress.ip_address(address).is_link_local
            }  # fmt: skip
            names = [
                link.name for link in self.links.all()
                if link.up and link.index in addressed and link.name != LOOPBACK
                if not (is_tap(link) or is_bridge(link) or is_vrf(link))
            ]  # fmt: skip
            chains = self.nft.chains() if self.nft.path is not None else []
            tables = {chain.table for chain in chains if chain.kind == "nat" and chain.concerns({nft_family})}
            nat = [f"nftables table {table}" for table in sorted(tables) if self.nft.translates(table)]
        except (OperatorError, HostError) as error:
            return [f"its users are not known ({error})"]
        return [*names, *nat] if len(names) > 1 or nat else []

    def say_once(self, sentence: str) -> None:
        """Log a warning, but only the first time."""
        if sentence not in self.said:
            self.said.add(sentence)
            log.warn(sentence)


def in_use(link: Link, network: bytes, length: int, why: str) -> OperatorError:
    """Return the error for a `local` interface whose network the host uses."""
    keyword = "local inet6 prefix" if len(network) == INET6_BYTES else "local prefix"
    text = rules.text(network, length)
    return OperatorError(errno.EADDRINUSE, f"interface {link.name}: {text} is in use: {why}; see `{keyword}`")


def lacking(error: HostError, tried: str, module: str) -> str:
    """Return why an interface of a kind cannot be made, and what to do."""
    if error.number == errno.EOPNOTSUPP:
        return f"{tried}: this kernel has no such interfaces: load the module {module}"
    return f"{tried}: {os.strerror(error.number)}"
