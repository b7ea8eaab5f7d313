"""The parent's half of networking: what priv is asked for, and what becomes of its answers (DESIGN 6).

A start takes two steps where a VM has interfaces.  Everything else that it needs is opened first; a `Launch` holds it
while priv makes the taps, and is sent off with them, or given up.  The taps of a VM that runs are held here too: they
outlive a reboot of the guest, with their names.
"""

import errno
import ipaddress
import os
import time
from collections.abc import Callable, Iterable

from vmd.config.model import IFNAME_MAX, ROOT, BootDevice, Config, NicConfig, SwitchConfig, VmConfig
from vmd.errors import HostError, OperatorError, PeerError
from vmd.ipc.devmsg import COUNTER_NAMES
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages import (
    AskDevices,
    AskDrops,
    AskResolvers,
    Caller,
    ConfigureNetwork,
    DevicesReported,
    DropsReported,
    End,
    MakeNics,
    NetworkConfigured,
    NicCounters,
    NicInfo,
    NicLink,
    NicMade,
    NicRequest,
    NicsFailed,
    NicsMade,
    NicsRequest,
    Proc,
    RemoveNics,
    Resolvers,
    ResumeReceived,
    StartVm,
    SwitchRequest,
    Trouble,
    TroubleInfo,
    brief,
)
from vmd.log import log
from vmd.parent import nameservers
from vmd.parent.addresses import Plan, random_ula, room
from vmd.parent.clients import For
from vmd.parent.hostroutes import covering, host_routes, network_of, overlapping, prefix_warnings
from vmd.parent.resources import copy_all
from vmd.parent.vmtable import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmd.config.model import Prefix
    from vmd.parent.core import Core
    from vmd.parent.hostroutes import HostRoute, IpNetwork

COUNT_TIMEOUT_S = 5.0
ALIAS_MAX = 255  # IFALIASZ
AUTOMATIC = ("", "tap")  # any name will do
LLADDR_BYTES = 6
MTU_MAX = 0xFFFF  # what virtio has room for
RESERVED_MAX = 512  # names that fit one message
SWITCHES_MAX = 40  # as well
TROUBLES_MAX = 32  # of the devices of a VM, as far as they are shown


class Launch:
    """A VM that waits for its interfaces; owns the descriptors that go with the message."""

    def __init__(
        self,
        vm: Vm,
        message: StartVm | ResumeReceived,
        fds: "Mapping[str, list[int]]",
        on_failed: Callable[[int, str], None],
    ) -> None:
        self.vm = vm
        self.message = message
        self.fds = dict(fds)
        self.on_failed = on_failed
        # What priv was asked for; by the time of its answer the configuration may be another.
        self.plan: Plan | None = None
        self.switches: list[SwitchConfig | None] = []
        self.lacking: dict[int, str] = {}

    def close(self) -> None:
        """Close everything that was to go along."""
        for fds in self.fds.values():
            while fds:
                os.close(fds.pop())


class Counting:
    """What was asked about a VM, and what has been answered so far: by its process, and by priv."""

    def __init__(self) -> None:
        self.asked = 0  # answers that are to come
        self.nics: tuple[NicCounters, ...] = ()
        self.troubles: tuple[Trouble, ...] = ()


class Taps:
    """The interfaces of a VM, from priv's answer to the end of the VM."""

    def __init__(self, launch: Launch, links: tuple[NicLink, ...], fds: list[int]) -> None:
        assert launch.plan is not None
        self.nics = launch.message.config.nics
        self.plan = launch.plan
        self.lacking = launch.lacking  # what is wrong with an interface, by its number
        self.since_s = int(time.time())
        self.links = links
        self.fds = fds

    def serve(self, nics: tuple[NicConfig, ...], plan: Plan, lacking: "Mapping[int, str]") -> bool:
        """Return whether a guest that boots again goes on with these: a switch that was not there may be there now."""
        return (self.nics, self.plan) == (nics, plan) and self.lacking.keys() <= lacking.keys()

    def close(self) -> None:
        """Let go of our descriptors."""
        while self.fds:
            os.close(self.fds.pop())


class Network:
    """Interfaces and switches, as the parent knows them."""

    def __init__(self, core: "Core", on_sent: Callable[[Vm], None]) -> None:
        """`on_sent` is called with a VM that vmm has been told of."""
        self.core = core
        self.on_sent = on_sent
        self.tickets = 0
        self.launches: dict[int, Launch] = {}  # by ticket
        self.taps: dict[int, Taps] = {}  # by vmid
        self.unresolved_s = 0  # since when guests cannot be told a name server, in seconds since 1970; 0: they can
        self.counting: dict[int, Counting] = {}  # by vmid, of VMs that have been asked

    # --- the configuration -------------------------------------------------------------------------------

    def configure(self, config: Config) -> list[str]:
        """Have priv make what the switches of a configuration need.  Returns what the operator should know."""
        switches = [
            SwitchRequest(
                interface=switch.interface,
                alias=alias(f"switch{number}-{switch.name}"),
                rdomain=switch.rdomain,
                up=switch.up,
            )
            for number, switch in enumerate(enabled_switches(config), 1)
        ]
        message = ConfigureNetwork(nat=config.settings.local_nat)
        while len(switches) > SWITCHES_MAX:
            self.core.peers.send(Proc.PRIV, message.replace(switches=tuple(switches[:SWITCHES_MAX]), more=True))
            del switches[:SWITCHES_MAX]
        self.core.peers.send(Proc.PRIV, message.replace(switches=tuple(switches)))
        warnings = prefix_warnings(config, host_routes())
        for warning in warnings:
            log.warn(warning)
        return warnings

    def on_configured(self, message: NetworkConfigured, _envelope: Envelope) -> None:
        """Log what cannot be; a VM that needs it will be told the same."""
        for problem in message.problems:
            log.error(f"switch: {problem}")

    def prefix6(self) -> "Prefix | None":
        """Return the range of this host's local interfaces for IPv6, if they have that."""
        settings = self.core.config.settings
        if not settings.local_inet6:
            return None
        if settings.local_inet6_prefix is not None:
            return settings.local_inet6_prefix
        identities = self.core.vms.identities
        if identities.ula is None:
            identities.ula = random_ula()
            identities.on_change()
        return identities.ula

    def plan_of(self, vm: Vm, config: VmConfig) -> Plan:
        """Return what the addresses of a VM follow from: its own number, or what one that was sent had elsewhere.

        Raises:
            OperatorError: no number is free.
        """
        if config.plan_id and config.plan_prefix4 is not None:
            return Plan(number=config.plan_id, prefix4=config.plan_prefix4, prefix6=config.plan_prefix6)
        plan = Plan(number=0, prefix4=self.core.config.settings.local_prefix, prefix6=self.prefix6())
        if any(nic.local for nic in config.nics):
            plan = plan.replace(number=self.number(vm, config, plan))
        return plan

    def number(self, vm: Vm, config: VmConfig, plan: Plan) -> int:
        """Return the number of a VM: what it had, or, if another VM that runs has its addresses, a free one.

        Raises OperatorError if none is free.
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
                raise OperatorError(
                    errno.EADDRINUSE,
                    f"vm {config.name}: all addresses of `{what}` are in {route.network}, which this host reaches by "
                    f"{route.interface}",
                )

        def free(number: int) -> bool:
            candidate = plan.replace(number=number)
            return not self.user_of(vm, config, candidate) and not self.route_to(config, candidate, routes)

        chosen = identities.choose_number(key, room(plan.prefix4, plan.prefix6), free, self.core.vms.present())
        if not chosen:
            raise OperatorError(
                errno.ERANGE,
                f"vm {config.name}: no addresses are left for its local interfaces; see `local prefix` and "
                "`local inet6 prefix`",
            )
        if identity.number and identity.number != chosen:
            log.info(f"vm {config.name}: its local interfaces have other addresses than before, which are not free")
        if identity.number != chosen:
            identity.number = chosen
            identities.on_change()
        return chosen

    def check(self, vm: Vm, config: VmConfig) -> None:
        """Raise OperatorError if this VM's interfaces cannot be had here and now."""
        plan = self.plan_of(vm, config)
        if not self.holds(vm, plan):
            self.check_addresses(vm, config, plan)
        for nic in config.nics:
            if nic.tap not in AUTOMATIC:
                for vmid, taps in self.taps.items():
                    if vmid != vm.vmid and any(link.name == nic.tap for link in taps.links):
                        raise OperatorError(
                            errno.EBUSY,
                            f"vm {config.name}: interface {nic.tap} is in use by vm {self.name_of(vmid)}",
                        )

    def holds(self, vm: Vm, plan: Plan) -> bool:
        """Return whether a VM has the addresses of a plan: its guest resets itself and keeps them."""
        held = self.taps.get(vm.vmid)
        return held is not None and held.plan == plan

    def check_addresses(self, vm: Vm, config: VmConfig, plan: Plan) -> None:
        """Raise OperatorError if addresses of local interfaces do not exist, or another VM or a network has them."""
        try:
            user = self.user_of(vm, config, plan)
            taken = self.route_to(config, plan, host_routes())
        except OperatorError as error:
            raise OperatorError(error.code, f"vm {config.name}: {error}") from None
        if user is not None:
            raise OperatorError(
                errno.EADDRINUSE,
                f"vm {config.name}: its local interfaces have addresses that vm {self.name_of(user[0])} has here, "
                f"such as {user[1]}",
            )
        if taken is not None:
            network, route = taken
            raise OperatorError(
                errno.EADDRINUSE,
                f"vm {config.name}: its local interfaces have addresses out of {route.network}, which this host "
                f"reaches by {route.interface}, such as {network}",
            )

    def route_to(
        self, config: VmConfig, plan: Plan, routes: "Sequence[HostRoute]"
    ) -> "tuple[IpNetwork, HostRoute] | None":
        """Return which network of a VM's local interfaces the host reaches already, and how; None for none of them.

        Raises OperatorError if the addresses do not exist.
        """
        for index, nic in enumerate(config.nics):
            if not nic.local or nic.rdomain:
                continue
            networks = [network_of(plan.host4(index), 31)]
            if plan.prefix6 is not None:
                networks.append(network_of(plan.network6(index), 64))
            for network in networks:
                for route in overlapping(network, routes):
                    return network, route
        return None

    def user_of(self, vm: Vm, config: VmConfig, plan: Plan) -> tuple[int, str] | None:
        """Return which other VM has an address that this one would have, and which; None if there is none.

        Raises OperatorError if the addresses do not exist.
        """
        indices = [index for index, nic in enumerate(config.nics) if nic.local]
        wanted = {plan.host4(index) for index in indices} | {plan.network6(index) for index in indices} - {b""}
        for vmid, taps in self.taps.items():
            for link in taps.links if vmid != vm.vmid else ():
                for address in (link.host4, link.prefix6):
                    if address in wanted:
                        return vmid, str(ipaddress.ip_address(address))
        return None

    def switch_of(self, nic: NicConfig) -> SwitchConfig | None:
        """Return the switch of an interface, if it has one that is there.

        As with vmd(8), an interface of an unknown switch, or of one that is disabled, is connected to nothing.
        """
        for switch in self.core.config.switches:
            if switch.name == nic.switch:
                return switch if switch.enabled else None
        return None

    def unconnected(self, nics: tuple[NicConfig, ...]) -> dict[int, str]:
        """Return a sentence for each interface whose switch is not there, by its number."""
        disabled = {switch.name for switch in self.core.config.switches if not switch.enabled}
        return {
            index: f'switch "{nic.switch}" {"is disabled" if nic.switch in disabled else "not found"}: '
            "the interface is connected to nothing"
            for index, nic in enumerate(nics)
            if nic.switch and self.switch_of(nic) is None
        }

    def notes(self, config: VmConfig) -> list[str]:
        """Return what should be known of a start of a VM with such interfaces."""
        return [f"interface {index}: {what}" for index, what in self.unconnected(config.nics).items()]

    def require_switches(self, config: VmConfig) -> None:
        """Raise OperatorError if a VM that is still connected elsewhere would not be so here."""
        for note in self.notes(config):
            raise OperatorError(errno.ENOENT, f"vm {config.name}: {note}")

    def name_of(self, vmid: int) -> str:
        """Return the name of a VM, for sentences."""
        vm = self.core.vms.find(vmid, "")
        return vm.name if vm else str(vmid)

    # --- starting ----------------------------------------------------------------------------------------

    def launch(
        self,
        vm: Vm,
        message: StartVm | ResumeReceived,
        fds: "Mapping[str, list[int]]",
        on_failed: Callable[[int, str], None],
    ) -> None:
        """Send a message to vmm as soon as the VM has its interfaces.  Owns the descriptors.

        `on_failed` is called with an errno and a sentence if there will be none.  Raises OperatorError, HostError.
        """
        launch = Launch(vm, message, fds, on_failed)
        try:
            config = message.config
            if config.nics:
                self.check(vm, config)
            held = self.taps.get(vm.vmid)
            plan = self.plan_of(vm, config)
            launch.lacking = self.unconnected(config.nics)
            if held is not None and config.nics and held.serve(config.nics, plan, launch.lacking):
                self._send(launch, held)
                return
            self.release(vm.vmid)
            if not config.nics:
                self._send(launch, None)
                return
            launch.plan = plan
            launch.switches = [self.switch_of(nic) for nic in config.nics]
            requests = tuple(request(vm, launch, index) for index in range(len(config.nics)))
        except (OperatorError, HostError):
            launch.close()
            raise
        self.tickets += 1
        self.launches[self.tickets] = launch
        reserved = {nic.tap for other in self.core.vms for nic in other.nics() if nic.tap not in AUTOMATIC}
        self.core.peers.send(Proc.PRIV,
            MakeNics(vmid=vm.vmid, ticket=self.tickets, nics=requests, reserved=tuple(sorted(reserved)[:RESERVED_MAX]))
        )

    def on_made(self, message: NicsMade, envelope: Envelope) -> None:
        """Send a VM on its way with its taps; if it was stopped meanwhile they go back.

        Raises PeerError if these cannot be the interfaces that were asked for.
        """
        launch = self.launches.get(message.ticket)
        if launch is not None and not fits(message, launch, len(envelope.fds.get("taps", ()))):
            raise PeerError("priv", f"made other interfaces than vm {launch.vm.name} has")
        self.launches.pop(message.ticket, None)
        fds = envelope.take_fds("taps")
        if launch is None:
            for fd in fds:
                os.close(fd)
            return
        vm, config, plan = launch.vm, launch.message.config, launch.plan
        assert plan is not None
        links = describe(config, plan, message.nics, launch.switches, self.name_servers())
        taps = self.taps[vm.vmid] = Taps(launch, links, fds)
        log.debug(f"vm {vm.name}: {', '.join(link.name for link in links)}")
        for text in dict.fromkeys(self.name_server_problems(taps).values()):
            log.warn(f"vm {vm.name}: {text}")
            vm.notes = (*vm.notes, brief(text))
        try:
            self._send(launch, taps)
        except (OperatorError, HostError) as error:
            launch.close()
            self.release(vm.vmid)
            launch.on_failed(error.code if isinstance(error, OperatorError) else error.errno, str(error))

    def on_failed(self, message: NicsFailed, _envelope: Envelope) -> None:
        """There will be no such VM."""
        launch = self.launches.pop(message.ticket, None)
        if launch is not None:
            launch.close()
            launch.on_failed(message.code, message.text)

    def _send(self, launch: Launch, taps: Taps | None) -> None:
        """Give a VM to vmm.  Raises OperatorError or HostError; the descriptors may be closed then."""
        message, vm = launch.message, launch.vm
        if taps is not None:
            config = message.config
            if any(nic.local for nic in config.nics):
                plan = taps.plan
                config = config.replace(
                    plan_id=plan.number, plan_prefix4=plan.prefix4, plan_prefix6=plan.prefix6
                )
            message = message.replace(nics=taps.links, config=config)
            launch.fds["taps"] = copy_all(taps.fds, f"hand over the interfaces of vm {vm.name}")
        fds, launch.fds = launch.fds, {}
        try:
            self.core.peers.send(Proc.VMM, message, fds=fds)
        except ValueError as error:
            raise OperatorError(errno.E2BIG, f"vm {vm.name}: configuration too long: {error}") from error
        self.on_sent(vm)

    # --- name servers ------------------------------------------------------------------------------------

    def name_servers(self) -> nameservers.Servers:
        """Return the name servers that guests are to be told now."""
        return nameservers.servers(self.core.config.settings.local_dns)

    def on_ask_resolvers(self, message: AskResolvers, _envelope: Envelope) -> None:
        """A guest of this VM asks for its addresses, and is told the name servers along with them."""
        dns4, dns6 = self.name_servers()
        self.core.peers.send(Proc.VMM, Resolvers(vmid=message.vmid, dns4=dns4, dns6=dns6))

    def name_server_problems(self, taps: Taps) -> dict[int, str]:
        """Return why guests will not get answers from name servers, by number of the interface."""
        found = self.name_servers()
        problems = {
            index: nameservers.problem(found, link.host4, link.prefix6)
            for index, link in enumerate(taps.links)
            if link.local and link.host4
        }
        problems = {index: text for index, text in problems.items() if text}
        self.unresolved_s = (self.unresolved_s or int(time.time())) if problems else 0
        return problems

    # --- counters ----------------------------------------------------------------------------------------

    def serve(self, message: NicsRequest, _caller: Caller, envelope: Envelope) -> None:
        """Describe the interfaces of a VM to a client, with what they have done if the VM says so in time.

        What is wrong with any of its devices comes with that.  Every user of the socket may see them, as they may see
        the list.

        A VM is asked one thing at a time: many who want to know must not be a burden to it, or to its owner.
        """
        vm, client = self.core.vms.get(message.vmid, message.name), envelope.peerid
        if not vm.pid:
            self._answer(vm.vmid, client)
            return
        counting = self.counting.get(vm.vmid)
        if counting is None:
            counting = self.counting[vm.vmid] = Counting()
            counting.asked = 1
            self.core.peers.send(Proc.VMM, AskDevices(vmid=vm.vmid))
            if vm.vmid in self.taps and Proc.PRIV in self.core.peers.channels:
                counting.asked += 1
                self.core.peers.send(Proc.PRIV, AskDrops(vmid=vm.vmid))
        wait = self.core.clients.wait(client, For.DEVICES, vm.vmid)

        def give_up() -> None:
            if self.core.clients.done(wait):
                self._answer(vm.vmid, client, counting.nics, counting.troubles)

        self.core.loop.call_later(COUNT_TIMEOUT_S, give_up)

    def on_reported(self, message: DevicesReported, _envelope: Envelope) -> None:
        """Take what the VM says, which may be anything."""
        self._take(message.vmid, message.nics, message.troubles[:TROUBLES_MAX])

    def on_drops(self, message: DropsReported, _envelope: Envelope) -> None:
        """Take what priv says."""
        self._take(message.vmid, (), message.troubles)

    def _take(self, vmid: int, nics: tuple[NicCounters, ...], troubles: tuple[Trouble, ...]) -> None:
        """Take an answer; with the last one all who wait are answered."""
        counting = self.counting.get(vmid)
        if counting is None:
            return
        counting.nics = nics or counting.nics
        counting.troubles += troubles
        counting.asked -= 1
        if not counting.asked:
            self.answer_counted(vmid)

    def answer_counted(self, vmid: int) -> None:
        """Answer all who wait: everything has been said, or the VM is gone and will say nothing more."""
        counting = self.counting.pop(vmid, None) or Counting()
        for client in self.core.clients.take(For.DEVICES, vmid):
            self._answer(vmid, client, counting.nics, counting.troubles)

    def _answer(
        self, vmid: int, client: int, counted: tuple[NicCounters, ...] = (), troubles: tuple[Trouble, ...] = ()
    ) -> None:
        vm = self.core.vms.find(vmid, "")
        if vm is None:
            return
        for info in self.infos(vm):
            values = counted[info.index].values if info.index < len(counted) else ()
            plausible = len(values) == len(COUNTER_NAMES) and all(0 <= value < 1 << 64 for value in values)
            self.core.clients.answer(client, info.replace(counters=values) if info.tap and plausible else info)
        taps = self.taps.get(vmid)
        if taps is not None:
            for index, what in taps.lacking.items():
                trouble_info = TroubleInfo(device=f"interface{index}", text=what, since_s=taps.since_s)
                self.core.clients.answer(client, trouble_info)
            for index, sentence in self.name_server_problems(taps).items():
                trouble_info = TroubleInfo(device=f"interface{index}", text=brief(sentence), since_s=self.unresolved_s)
                self.core.clients.answer(client, trouble_info)
        for trouble in troubles:
            text = TroubleInfo(device=brief(trouble.device), text=brief(trouble.text), since_s=trouble.since_s)
            self.core.clients.answer(client, text)
        self.core.clients.answer(client, End())

    def infos(self, vm: Vm) -> tuple[NicInfo, ...]:
        """Return the interfaces of a VM, or those that it is to have, without counters."""
        config = vm.running_config or vm.config
        taps = self.taps.get(vm.vmid)
        found = []
        for index, nic in enumerate(taps.nics if taps else config.nics):
            info = NicInfo(
                index=index,
                tap="",
                switch=nic.switch,
                lladdr=nic.lladdr,
                up=nic.up,
                locked=nic.locked,
                local=nic.local,
            )
            if taps is not None:
                link = taps.links[index]
                info = info.replace(
                    tap=link.name,
                    locked=link.locked,
                    mtu=link.mtu,
                    guest4=link.guest4,
                    host4=link.host4,
                    prefix6=link.prefix6,
                )
            found.append(info)
        return tuple(found)

    # --- ending ------------------------------------------------------------------------------------------

    def give_up(self, vm: Vm) -> bool:
        """Take a VM back that waits for its interfaces; False if it does not."""
        for ticket, launch in self.launches.items():
            if launch.vm is vm:
                del self.launches[ticket]
                launch.close()
                self.core.peers.send(Proc.PRIV, RemoveNics(vmid=vm.vmid))
                return True
        return False

    def release(self, vmid: int) -> None:
        """The VM is gone, and has no use for its interfaces any more."""
        taps = self.taps.pop(vmid, None)
        if taps is not None:
            taps.close()
            self.core.peers.send(Proc.PRIV, RemoveNics(vmid=vmid))

    def on_priv_lost(self) -> None:
        """Nobody will answer any more."""
        launches, self.launches = self.launches, {}
        for launch in launches.values():
            launch.close()
            launch.on_failed(errno.EPIPE, "its interfaces cannot be made: lost child: priv")

    def close(self) -> None:
        """Let go of everything, at the end; priv removes what it made."""
        for launch in self.launches.values():
            launch.close()
        for taps in self.taps.values():
            taps.close()
        self.launches.clear()
        self.taps.clear()


def enabled_switches(config: Config) -> Iterable[SwitchConfig]:
    """Return the switches that are used, each name once."""
    found: dict[str, SwitchConfig] = {}
    for switch in config.switches:
        if switch.enabled:
            found.setdefault(switch.name, switch)
    return found.values()


def request(vm: Vm, launch: Launch, index: int) -> NicRequest:
    """Return what priv is asked for one interface.  Raises OperatorError."""
    config, plan, switch = launch.message.config, launch.plan, launch.switches[index]
    assert plan is not None
    nic = config.nics[index]
    groups = (nic.group, switch.group if switch else "")
    return NicRequest(
        name="" if nic.tap in AUTOMATIC else nic.tap,
        existing=nic.tap not in AUTOMATIC and is_operators(vm, nic.tap),
        alias=alias(f"vm{vm.vmid}-if{index}-{config.name}"),
        bridge=switch.interface if switch else "",
        groups=tuple(dict.fromkeys(group for group in groups if group)),
        rdomain=nic.rdomain,
        up=nic.up,
        host4=plan.host4(index) if nic.local else b"",
        prefix6=plan.network6(index) if nic.local else b"",
        lladdr=nic.lladdr,
    )


def is_operators(vm: Vm, tap: str) -> bool:
    """Return whether root has given a tap to a VM, in vm.conf or by starting a VM of root's.

    Others, who name what they like for an instance or in a stream, do not get into somebody else's networks that way.
    """
    if vm.from_config:
        return any(nic.tap == tap for nic in vm.config.nics)
    return vm.uid == vm.config.owner.uid == ROOT


def fits(message: NicsMade, launch: Launch, taps: int) -> bool:
    """Return whether an answer of priv has what was asked for."""
    nics = launch.message.config.nics
    return (
        message.vmid == launch.vm.vmid
        and len(nics) == len(message.nics) == taps
        and all(len(nic.lladdr) == LLADDR_BYTES and len(nic.link_local) in (0, 16) for nic in message.nics)
        and all(0 < len(nic.name) <= IFNAME_MAX and nic.name.isascii() for nic in message.nics)
        and all(0 <= nic.mtu <= MTU_MAX for nic in message.nics)
    )


def describe(
    config: VmConfig,
    plan: Plan,
    made: tuple[NicMade, ...],
    switches: list[SwitchConfig | None],
    name_servers: nameservers.Servers,
) -> tuple[NicLink, ...]:
    """Return what a VM is told of its interfaces."""
    dns4, dns6 = name_servers
    links = []
    for index, (nic, tap, switch) in enumerate(zip(config.nics, made, switches, strict=True)):
        link = NicLink(
            name=tap.name,
            lladdr=nic.lladdr,
            host_mac=tap.lladdr,
            locked=nic.locked or bool(switch and switch.locked),
            local=nic.local,
            mtu=tap.mtu,
            pxe=index == 0 and config.boot_device is BootDevice.NET,
        )
        if nic.local:
            prefix6 = plan.network6(index)
            link = link.replace(
                guest4=plan.guest4(index),
                host4=plan.host4(index),
                host_ll=tap.link_local,
                prefix6=prefix6,
                dns4=dns4,
                dns6=dns6 if prefix6 else (),
            )
        links.append(link)
    return tuple(links)


def alias(text: str) -> str:
    """Return a description of an interface: printable ASCII, and not too long."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:ALIAS_MAX]
