"""The parent's half of networking: the requests to priv, and the use of its answers (arch. 6).

A VM with interfaces starts in two steps.  First its files are opened.  Then a `Launch` holds the message for vmm and
the descriptors that go with it while priv makes the taps.  The message is sent together with the taps, or the launch is
given up.  The parent also keeps the taps of a running VM: they, and their names, outlive a reset of the guest.
"""

import errno
import socket
import time
from collections.abc import Callable, Iterable

from vmd.closing import close, close_all
from vmd.config.model import (
    IFNAME_MAX,
    LLADDR_BYTES,
    ROOT,
    BootDevice,
    Config,
    NicConfig,
    SwitchConfig,
    VmConfig,
    with_forwards,
)
from vmd.errors import HostError, OperatorError, PeerError, number
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.priv import (
    AdoptNics,
    ConfigureNetwork,
    ForwardsSet,
    FramesDropped,
    MakeNics,
    NetworkConfigured,
    NetworkTrouble,
    NicMade,
    NicsFailed,
    NicsMade,
    NicsRemoved,
    NicWanted,
    RemoveNics,
    SetForwards,
    SwitchRequest,
)
from vmd.ipc.messages.shared import Trouble, brief
from vmd.ipc.messages.vm import AskResolvers, LimitVm, NicLink, Resolvers, ResumeReceived, StartVm
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent import nameservers, vhost
from vmd.parent.addresses import Plan
from vmd.parent.askpriv import AskPriv
from vmd.parent.forpriv import open_tables, open_tuns
from vmd.parent.hostroutes import host_routes, prefix_warnings
from vmd.parent.plans import Plans, Taps
from vmd.parent.resources import copy_all
from vmd.parent.tapstats import TapStats
from vmd.parent.vm import AUTOMATIC, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from vmd.ipc.loop import Timer
    from vmd.parent.core import Core

ALIAS_MAX = 255  # IFALIASZ
MTU_MAX = 0xFFFF  # the largest value of virtio's field
RESERVED_MAX = 512  # names that fit one message
SWITCHES_MAX = 40  # switches that fit one message
LAUNCH_S = 60.0  # without any answer of priv; the time covers the start of another priv
TRIES_MAX = 3
SILENT = "its interfaces cannot be made: priv does not answer"
ENDED = f"its interfaces cannot be made: priv has ended {TRIES_MAX} times while it made them"


class Launch:
    """A VM that waits for its interfaces.  Owns the descriptors that go with the message."""

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
        self.tries = 0  # how often priv was asked: the request may be what ends priv
        self.deadline: Timer | None = None
        self.answers_before = 0  # answers of priv when the deadline was set
        # The request to priv, and what it was made from: the configuration may change before priv answers.
        self.requests: tuple[NicWanted, ...] = ()
        self.plan: Plan | None = None
        self.switches: list[SwitchConfig | None] = []
        self.lacking: dict[int, str] = {}  # the problem of an interface, by its number
        self.no_vhost = ""  # why this host has no vhost-net, if an interface wants it

    def close(self) -> None:
        """Stop waiting, and close the descriptors."""
        self.answered()
        for fds in self.fds.values():
            while fds:
                close(fds.pop())

    def answered(self) -> None:
        """Priv has answered, or the launch is given up: cancel the deadline."""
        if self.deadline is not None:
            self.deadline.cancel()


class Network:
    """Interfaces and switches, as the parent knows them."""

    def __init__(self, core: "Core", on_sent: Callable[[Vm], None]) -> None:
        """`on_sent` is called with each VM that was sent to vmm."""
        self.core = core
        self.on_sent = on_sent
        self.priv = AskPriv(core)
        self.tickets = 0
        self.launches: dict[int, Launch] = {}  # by ticket
        self.taps: dict[int, Taps] = {}  # by vmid
        self.left: dict[int, AdoptNics] = {}  # by vmid: interfaces that priv has not removed yet
        self.plans = Plans(core, self.taps)
        self.tap_stats = TapStats()
        self.unresolved_s = 0  # since when guests have no name server, in seconds since 1970; 0: they have one

    # --- the configuration -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Tell a new priv about all interfaces and switches, and repeat the requests that were not answered."""
        for known in (*self.left.values(), *(taps.known for taps in self.taps.values())):
            self.priv.send(known)
        self._tell(self.core.config)
        self.priv.up = True
        if not self.core.serving:
            self._warn(self.core.config)
        for vmid in self.left:
            self.priv.ask(RemoveNics(vmid=vmid))
        for ticket in list(self.launches):
            self._ask(ticket)

    def configure(self, config: Config) -> list[str]:
        """Let priv set up the switches of a configuration.  Returns warnings for the operator."""
        if self.priv.up:
            self._tell(config)
        return self._warn(config)

    def _warn(self, config: Config) -> list[str]:
        """Log and return warnings about prefixes of the configuration that collide with routes of this host."""
        warnings = prefix_warnings(config, host_routes())
        for warning in warnings:
            log.warn(warning)
        return warnings

    def _tell(self, config: Config) -> None:
        """Send the switches of a configuration to priv."""
        switches = [
            SwitchRequest(
                interface=switch.interface,
                alias=alias(f"switch{number}-{switch.name}"),
                rdomain=switch.rdomain,
                up=switch.up,
            )
            for number, switch in enumerate(enabled_switches(config), 1)
        ]
        again = self.core.serving or self.core.adopts
        message = ConfigureNetwork(nat=config.settings.local_nat, again=again)
        while len(switches) > SWITCHES_MAX:
            self.priv.send(message.replace(switches=tuple(switches[:SWITCHES_MAX]), more=True))
            del switches[:SWITCHES_MAX]
        self.priv.ask(message.replace(switches=tuple(switches)))

    def on_configured(self, message: NetworkConfigured, _envelope: Envelope) -> None:
        """Log the switches that priv could not set up.  The start of a VM that needs one fails with the same reason."""
        self.priv.answered()
        for problem in message.problems:
            log.error(f"switch: {problem}")

    def switch_of(self, nic: NicConfig) -> SwitchConfig | None:
        """Return the switch of an interface, if it has one that is known and enabled.

        As with vmd(8), an interface with another switch is connected to nothing.
        """
        for switch in self.core.config.switches:
            if switch.name == nic.switch:
                return switch if switch.enabled else None
        return None

    def unconnected(self, nics: tuple[NicConfig, ...]) -> dict[int, str]:
        """Return a sentence for each interface whose switch is unknown or disabled, by number of the interface."""
        disabled = {switch.name for switch in self.core.config.switches if not switch.enabled}
        return {
            index: f'switch "{nic.switch}" {"is disabled" if nic.switch in disabled else "not found"}: '
            "the interface is connected to nothing"
            for index, nic in enumerate(nics)
            if nic.switch and self.switch_of(nic) is None
        }

    def notes(self, config: VmConfig) -> list[str]:
        """Return the notes for the start of a VM about its interfaces."""
        return [f"interface {index}: {what}" for index, what in self.unconnected(config.nics).items()]

    def require_switches(self, config: VmConfig) -> None:
        """Raise OperatorError if this host lacks a switch of a VM that comes from another host."""
        for note in self.notes(config):
            raise OperatorError(errno.ENOENT, f"vm {config.name}: {note}")

    # --- starting ----------------------------------------------------------------------------------------

    def launch(
        self,
        vm: Vm,
        message: StartVm | ResumeReceived,
        fds: "Mapping[str, list[int]]",
        on_failed: Callable[[int, str], None],
    ) -> None:
        """Send a message to vmm as soon as the VM has its interfaces.  Owns the descriptors.

        `on_failed` is called with an errno and a sentence if priv cannot make them.  Raises OperatorError, HostError.
        """
        launch = Launch(vm, message, fds, on_failed)
        try:
            config = message.config
            plan = self.plans.check(vm, config) if config.nics else self.plans.plan_of(vm, config)
            held = self.taps.get(vm.vmid)
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
            launch.no_vhost = vhost.lacking() if any(nic.vhost for nic in config.nics) else ""
            launch.requests = tuple(request(vm, launch, index) for index in range(len(config.nics)))
            close_all(open_tuns(1))  # so that a host without taps fails the request at once
        except (OperatorError, HostError):
            launch.close()
            raise
        self.tickets += 1
        ticket = self.tickets
        self.launches[ticket] = launch
        self._watch(ticket)
        if self.priv.up:
            self._ask(ticket)

    def _watch(self, ticket: int) -> None:
        """Set the deadline of a launch.  It passes when priv has answered no request at all for LAUNCH_S.

        Any answer counts, because hundreds of VMs may start at the same time, and priv serves one after the other.
        """
        launch = self.launches[ticket]
        launch.answers_before = self.priv.answers
        launch.deadline = self.core.loop.call_later(LAUNCH_S, lambda: self._check_deadline(ticket))

    def _check_deadline(self, ticket: int) -> None:
        launch = self.launches.get(ticket)
        if launch is not None and launch.answers_before != self.priv.answers:
            self._watch(ticket)
        else:
            self._fail(ticket, errno.ETIMEDOUT, SILENT)

    def _ask(self, ticket: int) -> None:
        """Ask priv for the interfaces of a VM."""
        launch = self.launches[ticket]
        launch.tries += 1
        if launch.tries > TRIES_MAX:
            self._fail(ticket, errno.EPIPE, ENDED)
            return
        try:
            fds = {"tuns": open_tuns(len(launch.requests)), **open_tables()}
        except OperatorError as error:
            self._fail(ticket, error.number, str(error))
            return
        reserved = {nic.tap for other in self.core.vms for nic in other.claims}.difference(AUTOMATIC)
        self.priv.ask(
            MakeNics(
                vmid=launch.vm.vmid,
                ticket=ticket,
                nics=launch.requests,
                reserved=tuple(sorted(reserved)[:RESERVED_MAX]),
            ),
            fds,
        )

    def _fail(self, ticket: int, code: int, text: str) -> None:
        """Give up a launch, and report the error."""
        launch = self.launches.pop(ticket, None)
        if launch is not None:
            launch.close()
            self._remove(launch.vm.vmid)
            launch.on_failed(code, text)

    def on_made(self, message: NicsMade, envelope: Envelope) -> None:
        """Priv has made interfaces: send the VM to vmm with its taps.  If it was stopped meanwhile, close the taps.

        Raises PeerError if the answer does not fit the request.
        """
        launch = self.launches.get(message.ticket)
        if launch is not None and not fits(message, launch, len(envelope.fds.get("taps", ()))):
            raise PeerError("priv", f"made other interfaces than vm {launch.vm.name} has")
        self.priv.answered()
        self.launches.pop(message.ticket, None)
        fds = envelope.take_fds("taps")
        if launch is None:
            close_all(fds)
            return
        launch.answered()
        vm, config, plan = launch.vm, launch.message.config, launch.plan
        assert plan is not None
        links = describe(config, plan, message.nics, launch.switches, self.name_servers())
        known = AdoptNics(vmid=vm.vmid, nics=launch.requests, made=message.nics)
        taps = self.taps[vm.vmid] = Taps(config.nics, plan, launch.lacking, links, fds, known)
        self.core.changed(vm.vmid)
        for index, what in launch.lacking.items():
            self.core.events.add("trouble", vm, text=what, device=f"interface{index}")
        log.debug(f"vm {vm.name}: {', '.join(link.name for link in links)}")
        without = without_vhost(config.nics, message.nics, launch.no_vhost)
        for text in dict.fromkeys((*self.name_server_problems(taps).values(), *without)):
            log.warn(f"vm {vm.name}: {text}")
            vm.notes = (*vm.notes, brief(text))
        try:
            self._send(launch, taps)
        except (OperatorError, HostError) as error:
            launch.close()
            self.release(vm.vmid)
            launch.on_failed(number(error), str(error))

    def on_failed(self, message: NicsFailed, _envelope: Envelope) -> None:
        """Priv could not make the interfaces of a VM: the start fails."""
        self.priv.answered()
        launch = self.launches.pop(message.ticket, None)
        if launch is not None:
            launch.close()
            launch.on_failed(message.code, message.text)

    def _send(self, launch: Launch, taps: Taps | None) -> None:
        """Send a VM to vmm.  Raises OperatorError or HostError; the descriptors may be closed then."""
        message, vm = launch.message, launch.vm
        if taps is not None:
            config = message.config
            if any(nic.local for nic in config.nics):
                plan = taps.plan
                config = config.replace(
                    plan_id=plan.number, plan_prefix4=plan.prefix4, plan_prefix6=plan.prefix6
                )
            links, vhosts = self.for_kernel(vm, taps)
            message = message.replace(nics=links, config=config)
            if vhosts:
                launch.fds["vhosts"] = vhosts
            launch.fds["taps"] = copy_all(taps.fds, f"hand over the interfaces of vm {vm.name}")
        if isinstance(message, StartVm):
            self.core.slots.give()
        self.core.write()  # first, so that a next parent knows every VM that vmm has
        fds, launch.fds = launch.fds, {}
        try:
            self.core.peers.send(Proc.VMM, message, fds=fds)
        except ValueError as error:
            raise OperatorError(errno.E2BIG, f"vm {vm.name}: configuration too long: {error}") from error
        if vm.receiving is not None:
            vm.receiving.resumed = True
        self.on_sent(vm)

    def for_kernel(self, vm: Vm, taps: Taps) -> tuple[tuple[NicLink, ...], list[int]]:
        """Open the descriptors for vhost-net; an interface for which that fails does without vhost-net."""
        links: list[NicLink] = []
        fds: list[int] = []
        for link, made in zip(taps.links, taps.known.made, strict=True):
            if link.vhost:
                try:
                    fds += vhost.open_for(link, made.index)
                except OperatorError as error:
                    log.warn(f"vm {vm.name}: interface {len(links)}: {vhost.BY_PROCESS}: {error}")
                    link = link.replace(vhost=False)
            links.append(link)
        return tuple(links), fds

    # --- ports of the host -------------------------------------------------------------------------------

    def change_forwards(
        self, vm: Vm, wanted: VmConfig, done: str = "its new forwards count from now on"
    ) -> list[str]:
        """Give a running VM the forwards of a configuration.  If one of them cannot be made, none is changed.

        Returns sentences for the operator: that the forwards have changed, or why they have not.
        """
        before = vm.running_config or vm.config
        now, taps = with_forwards(before, wanted), self.taps.get(vm.vmid)
        if now == before or taps is None:
            return []
        try:
            self.plans.check_forwards(vm, now)
        except OperatorError as error:
            return [f"{error}: its new forwards are not made; vmctl reload tries again"]
        vm.config = with_forwards(vm.config, wanted)
        vm.running_config = vm.running_config and now
        forwards = tuple(nic.forwards for nic in now.nics)
        requests = zip(taps.known.nics, forwards, strict=True)
        taps.nics = now.nics
        taps.known = taps.known.replace(nics=tuple(nic.replace(forwards=each) for nic, each in requests))
        self.core.changed(vm.vmid)
        if self.priv.up:
            self.priv.ask(SetForwards(vmid=vm.vmid, forwards=forwards))
        self.core.peers.send(Proc.VMM, LimitVm(vmid=vm.vmid, config=now))
        return [f"vm {vm.name}: {done}"]

    def drop_forwards(self, vm: Vm, wanted: VmConfig) -> list[str]:
        """Remove the forwards of a running VM that a configuration no longer gives it: another VM may get them.

        Returns sentences for the operator.
        """
        before = vm.running_config or vm.config
        nics = [
            nic.replace(forwards=tuple(each for each in nic.forwards if each in other.forwards))
            for nic, other in zip(before.nics, wanted.nics, strict=False)
        ]
        ended = "the forwards that were removed from vm.conf have ended"
        return self.change_forwards(vm, before.replace(nics=tuple(nics)), ended)

    def on_forwards_set(self, message: ForwardsSet, _envelope: Envelope) -> None:
        """Priv has changed the forwards of a VM, or has failed to."""
        self.priv.answered()
        vm = self.core.vms.find(message.vmid, "")
        if message.text and vm is not None:
            log.error(f"vm {vm.name}: its forwards were not changed: {message.text}")

    # --- name servers ------------------------------------------------------------------------------------

    def name_servers(self) -> nameservers.Servers:
        """Return the name servers for guests."""
        return nameservers.servers(self.core.config.settings.local_dns)

    def on_ask_resolvers(self, message: AskResolvers, _envelope: Envelope) -> None:
        """A guest asks for its addresses: send the name servers of this host, which belong to the answer."""
        taps = self.taps.get(message.vmid)
        if taps is not None:
            self.name_server_problems(taps)  # report problems that are new, or mended
        dns4, dns6 = self.name_servers()
        self.core.peers.send(Proc.VMM, Resolvers(vmid=message.vmid, dns4=dns4, dns6=dns6))

    def name_server_problems(self, taps: Taps) -> dict[int, str]:
        """Return why a guest will not reach name servers, by number of the interface.  Reports changes as events."""
        found = self.name_servers()
        problems = {
            index: nameservers.problem(found if link.asks else (link.dns4, link.dns6), link.host4, link.prefix6)
            for index, link in enumerate(taps.links)
            if link.local and link.host4
        }
        problems = {index: text for index, text in problems.items() if text}
        self.unresolved_s = (self.unresolved_s or int(time.time())) if problems else 0
        before, taps.unresolved = taps.unresolved, problems
        vm = self.core.vms.find(taps.known.vmid, "")
        for index in sorted(problems.keys() ^ before.keys()):
            text = problems.get(index, "")
            self.core.events.add("trouble" if text else "mended", vm, text=text, device=f"interface{index}")
        return problems

    def on_dropped(self, message: FramesDropped, _envelope: Envelope) -> None:
        """Priv reports how many frames the filters on a tap have dropped."""
        taps = self.taps.get(message.vmid)
        if taps is not None and 0 <= message.index < len(taps.links):
            taps.dropped[message.index] = message.spoofed, message.unwanted

    def counted(self, vmid: int, index: int, figures: "dict[str, Any]") -> "dict[str, Any]":
        """Return the figures of an interface, completed if it uses vhost-net.

        The interface's process does not see the frames that the kernel moves.  So the packets and bytes come from the
        counters of the tap, which include the frames that the process has moved.
        """
        taps = self.taps.get(vmid)
        if "rx_packets" not in figures or taps is None or index >= len(taps.links) or not taps.links[index].vhost:
            return figures
        figures = figures | self.tap_stats.of(taps.known.made[index].index)
        for name, more in zip(("tx_spoofed", "rx_filtered"), taps.dropped.get(index, (0, 0)), strict=True):
            figures[name] = figures.get(name, 0) + more
        return figures

    def on_trouble(self, message: NetworkTrouble, _envelope: Envelope) -> None:
        """Priv has found something wrong with an interface, or that it is mended."""
        vm = self.core.vms.find(message.vmid, "")
        if message.vmid and (vm is None or not vm.alive):
            return
        what = "trouble" if message.text else "mended"
        self.core.events.add(what, vm, text=message.text, device=message.device[:IFNAME_MAX])

    def troubles(self, vmid: int) -> list[Trouble]:
        """Return the known problems of a VM's interfaces."""
        taps = self.taps.get(vmid)
        if taps is None:
            return []
        unresolved = self.name_server_problems(taps)
        found = [(index, what, taps.since_s) for index, what in taps.lacking.items()]
        found += [(index, what, self.unresolved_s) for index, what in unresolved.items()]
        return [Trouble(device=f"interface{index}", text=what, since_s=since_s) for index, what, since_s in found]

    def guest_address(self, vmid: int, device: str) -> str:
        """Return the IPv4 address for the guest of a `local` interface; "" if there is none."""
        taps = self.taps.get(vmid)
        links = taps.links if taps is not None else ()
        found = [link.guest4 for index, link in enumerate(links) if device == f"interface{index}"]
        return socket.inet_ntoa(found[0]) if found and found[0] else ""

    # --- ending ------------------------------------------------------------------------------------------

    def give_up(self, vm: Vm) -> bool:
        """Cancel the launch of a VM; return False if it does not wait for its interfaces."""
        for ticket, launch in self.launches.items():
            if launch.vm is vm:
                del self.launches[ticket]
                launch.close()
                self._remove(vm.vmid)
                return True
        return False

    def release(self, vmid: int) -> None:
        """A VM needs its interfaces no longer: close the taps, and let priv remove the interfaces."""
        taps = self.taps.pop(vmid, None)
        if taps is not None:
            taps.close()
            self.left[vmid] = taps.known
            self.core.changed(vmid)
            self._remove(vmid)

    def _remove(self, vmid: int) -> None:
        """Let priv remove the interfaces of a VM.  A priv that is started later learns from `begin` what is left."""
        if self.priv.up:
            self.priv.ask(RemoveNics(vmid=vmid))

    def on_removed(self, message: NicsRemoved, _envelope: Envelope) -> None:
        """Priv has removed the interfaces of a VM."""
        self.priv.answered()
        if self.left.pop(message.vmid, None) is not None:
            self.core.changed(message.vmid)

    def on_priv_lost(self, *, for_good: bool) -> None:
        """Priv has ended.  Launches wait for the next one; with `for_good` there is no next one, and they fail."""
        self.priv.lost()
        if for_good:
            for ticket in list(self.launches):
                self._fail(ticket, errno.EPIPE, "its interfaces cannot be made: lost child: priv")

    def close(self) -> None:
        """Close everything, because the daemon ends.  Priv removes what it has made."""
        for launch in self.launches.values():
            launch.close()
        for taps in self.taps.values():
            taps.close()
        self.launches.clear()
        self.taps.clear()
        self.tap_stats.close()


def enabled_switches(config: Config) -> Iterable[SwitchConfig]:
    """Return the enabled switches; of several with one name the first."""
    found: dict[str, SwitchConfig] = {}
    for switch in config.switches:
        if switch.enabled:
            found.setdefault(switch.name, switch)
    return found.values()


def request(vm: Vm, launch: Launch, index: int) -> NicWanted:
    """Return the request to priv for one interface.  Raises OperatorError."""
    config, plan, switch = launch.message.config, launch.plan, launch.switches[index]
    assert plan is not None
    nic = config.nics[index]
    groups = (nic.group, switch.group if switch else "")
    return NicWanted(
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
        length4=plan.length4(index),
        guest4=plan.guest4(index) if nic.local else b"",
        forwards=nic.forwards,
        locked=nic.locked or bool(switch and switch.locked),
        vhost=nic.vhost and not launch.no_vhost,
    )


def without_vhost(nics: "Sequence[NicConfig]", made: "Sequence[NicMade]", why: str) -> list[str]:
    """Return a sentence for each interface that should use vhost-net but cannot; `why`, if given, counts for all."""
    return [
        f"interface {index}: {vhost.BY_PROCESS}: {why or tap.without}"
        for index, (nic, tap) in enumerate(zip(nics, made, strict=True))
        if nic.vhost and not tap.vhost
    ]


def is_operators(vm: Vm, tap: str) -> bool:
    """Return whether root has given a tap to a VM: in vm.conf, or by starting a VM that belongs to root.

    A user may put any name into an instance or a stream.  That must not give access to a tap of another user.
    """
    if vm.from_config:
        return any(nic.tap == tap for nic in vm.config.nics)
    return vm.uid == vm.config.owner.uid == ROOT


def fits(message: NicsMade, launch: Launch, taps: int) -> bool:
    """Return whether an answer of priv fits the request."""
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
    """Return the descriptions of a VM's interfaces that its process gets."""
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
            vhost=tap.vhost,
        )
        if nic.local:
            prefix6 = plan.network6(index)
            dns4, dns6 = nameservers.servers(nic.dns) if nic.dns else name_servers
            link = link.replace(
                guest4=plan.guest4(index),
                host4=plan.host4(index),
                length4=plan.length4(index),
                asks=not nic.dns,
                host_ll=tap.link_local,
                prefix6=prefix6,
                dns4=dns4,
                dns6=dns6 if prefix6 else (),
            )
        links.append(link)
    return tuple(links)


def alias(text: str) -> str:
    """Return a text as an alias of an interface: printable ASCII, ALIAS_MAX characters at most."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:ALIAS_MAX]
