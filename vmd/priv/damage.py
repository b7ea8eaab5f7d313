"""Damage: changes by other programs to the network of running VMs.  It is found, repaired, and kept for status."""

import ipaddress
import time

from vmd.errors import HostError, OperatorError
from vmd.log import log
from vmd.priv import rules, sysctl
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from vmd.priv.host import HostNetwork
    from vmd.priv.nics import Nic

FOUND_MAX = 1000
REPAIRED_S = 600.0  # repaired damage is shown for so long
AGAIN_S = 60.0  # the same damage is logged again only after this time: two programs may undo each other's work
NAMED_MAX = 4  # chains and sets in one sentence
BY_WHOM = "by another program"


class Damage(Record):
    """A change by another program: a sentence, and when it was noticed."""

    text: str
    since_s: int
    names: frozenset[str]  # of the interfaces and bridges that it concerns
    lasting: bool = False  # it cannot be repaired


class Damages:
    """The damage to a network."""

    def __init__(self, network: "HostNetwork") -> None:
        self.network = network
        self.found: list[Damage] = []
        self._lasting: set[str] = set()  # sentences about present damage that cannot be repaired

    def repair(self) -> None:
        """Look for damage, and repair it if possible.  Failures are logged."""
        if not self.network.nics:
            return
        self._lasting.clear()
        for attempt in (self._bridges, self._settings, self._taps, self._forwarding, self._rules, self._filters):
            try:
                attempt()
            except (OperatorError, HostError) as error:
                log.error(str(error))
        self.found = [damage for damage in self.found if not damage.lasting or damage.text in self._lasting]

    def forget(self, names: "Collection[str]") -> None:
        """Interfaces were removed: forget their damage that could not be repaired."""
        self.found = [damage for damage in self.found if not (damage.lasting and damage.names & set(names))]

    def of(self, nic: "Nic") -> list[Damage]:
        """Return the recent damage to an interface, the latest first."""
        recent_s = time.time() - REPAIRED_S
        return [
            damage
            for damage in reversed(self.found)
            if damage.names & {nic.link.name, nic.bridge} and (damage.lasting or damage.since_s > recent_s)
        ]

    def _note(self, text: str, names: "Collection[str]", *, lasting: bool = False) -> None:
        """Keep damage for status, and log it."""
        now_s = int(time.time())
        if lasting:
            self._lasting.add(text)
        if any(damage.text == text and (lasting or damage.since_s > now_s - AGAIN_S) for damage in self.found):
            return
        log.warn(text)
        new = Damage(text=text, since_s=now_s, names=frozenset(names), lasting=lasting)
        self.found = [*(damage for damage in self.found if damage.text != text), new][-FOUND_MAX:]

    # --- checks ------------------------------------------------------------------------------------------

    def _bridges(self) -> None:
        """Check bridges of switches that VMs use.  Those that priv has not made are left alone."""
        network = self.network
        links = {link.name: link for link in network.links.all()}
        for name in sorted({nic.bridge for nic in network.all_nics()} & network.switches.keys()):
            switch, link = network.switches[name], links.get(name)
            if link is None:
                text = f"bridge {name} was deleted {BY_WHOM}: it was made again"
            elif not network.is_ours(link):
                continue
            elif switch.up and not link.up:
                text = f"bridge {name} was switched off {BY_WHOM}: it was switched on again"
            elif switch.rdomain and link.master != getattr(links.get(f"vrf{switch.rdomain}"), "index", -1):
                text = f"bridge {name} was taken out of rdomain {switch.rdomain} {BY_WHOM}: it was put back"
            else:
                continue
            network.ensure_bridge(switch)
            self._note(text, {name})

    def _settings(self) -> None:
        """Check the kernel settings of our taps and bridges."""
        network = self.network
        wanted = {name: network.bridge_settings(name) for name in {nic.bridge for nic in network.all_nics()} if name}
        wanted |= {nic.link.name: nic.settings() for nic in network.all_nics()}
        for name, settings in sorted(wanted.items()):
            for setting, value in settings:
                if sysctl.read(setting) not in (None, value):
                    sysctl.write(setting, value)
                    self._note(f"net/{setting} was changed {BY_WHOM}: it is {value} again", {name})

    def _taps(self) -> None:
        """Check taps: name, bridge or VRF, state and addresses."""
        network = self.network
        links = {link.index: link for link in network.links.all()}
        names = {link.name: link for link in links.values()}
        addressed = set(network.links.addresses())
        remedy = "the next start of the VM repairs that"
        for nic in network.all_nics():
            name, link = nic.link.name, links.get(nic.link.index)
            if link is None:
                text = f"{name} was deleted {BY_WHOM}: the next start of the VM makes it again"
                self._note(text, {name}, lasting=True)
                continue
            if link.name != name:
                self._note(f"{name} was renamed to {link.name} {BY_WHOM}: {remedy}", {name}, lasting=True)
            master = names.get(nic.bridge) if nic.bridge in network.switches else None
            if nic.rdomain and not nic.bridge:
                master = network.ensure_vrf(nic.rdomain)
            if master is not None and link.master not in (0, master.index):
                other = getattr(links.get(link.master), "name", link.master)
                text = f"{name} was put into {other} instead of {master.name} {BY_WHOM}: {remedy}"
                self._note(text, {name}, lasting=True)
            elif master is not None and not link.master:
                network.links.set_master(link, master)
                self._note(f"{name} was taken out of {master.name} {BY_WHOM}: it was put back", {name})
            if nic.up and not link.up:
                network.links.set_up(link, up=True)
                self._note(f"{name} was switched off {BY_WHOM}: it was switched on again", {name})
                addressed = set(network.links.addresses())  # switching it off has removed its IPv6 addresses
            for address, length in nic.addresses():
                if (link.index, address) not in addressed:
                    network.links.add_address(link, address, length)
                    text = f"{ipaddress.ip_address(address)} was removed from {name} {BY_WHOM}"
                    self._note(f"{text}: it was added again", {name})

    def _forwarding(self) -> None:
        """Check forwarding, which is a setting of the whole host."""
        network = self.network
        off = network.lacks_forwarding()
        if off:
            network.forward()
            names = {member.name for member in network.members() if member.networks}
            for words in off:
                self._note(f"{words} forwarding was switched off {BY_WHOM}: it was switched on again", names)

    def _rules(self) -> None:
        """Check our table of nftables.  What others have added to it stays until the table is written again."""
        network = self.network
        lost = network.lost_rules()
        if lost is None:
            text = f"the nftables table {rules.TABLE} was removed {BY_WHOM}: it was written again"
        elif lost:
            what = ", ".join(lost[:NAMED_MAX]) + (" and more" if len(lost) > NAMED_MAX else "")
            text = f"rules or elements of the nftables table {rules.TABLE} ({what}) were deleted {BY_WHOM}"
            text += ": it was written again"
        else:
            return
        network.write_rules()
        if not network.has_table:
            return  # it was only needed for a firewall that is gone, too
        network.take_rules_as_they_are()
        self._note(text, {nic.link.name for nic in network.all_nics()})

    def _filters(self) -> None:
        """Check filters on taps."""
        for tap in self.network.filters.repair():
            self._note(f"filters on {tap} were removed {BY_WHOM}: they were laid again", {tap})
