"""Other firewalls of the host: which of them may have dropped a guest's packet, and what the operator can do.

A firewall program is recognised by the names of its tables and chains.  Our table cannot accept a packet for it: each
base chain of a hook decides for itself, and one that drops is enough.
"""

import ipaddress

from vmd.priv import drops
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TAILSCALE = ipaddress.ip_network("100.64.0.0/10")  # it drops packets from these on interfaces of others
FAMILIES = {"ip": "iptables", "ip6": "ip6tables"}


class Chain(Record):
    """A chain of another program.  Only a base chain has a kind, a hook and a policy.

    `old`: it is a chain of the old iptables, which nft does not show.
    """

    table: str  # with its family: "ip filter"
    name: str
    kind: str = ""
    hook: str = ""
    policy: str = ""
    old: bool = False

    @property
    def family(self) -> str:
        """Its address family, as nft names it."""
        return self.table.partition(" ")[0]

    def concerns(self, families: "Iterable[str]") -> bool:
        """Return whether packets of one of these families, "ip" or "ip6", pass the chain."""
        return self.family == "inet" or self.family in families

    def __str__(self) -> str:
        """Return its name as nft reads it."""
        return f"{self.table} {self.name}"


class Guests(Record):
    """The guests whose packets were dropped: their networks as text, such as 100.64.1.2/31, or their bridge."""

    networks: tuple[str, ...] = ()
    bridge: str = ""

    @property
    def families(self) -> set[str]:
        """The address families of their packets."""
        if self.bridge:
            return {"ip", "ip6"}
        return {"ip6" if ":" in network else "ip" for network in self.networks}


def advice(loss: drops.Loss, chains: "Sequence[Chain]", guests: Guests) -> list[str]:
    """Return a sentence for each firewall that may have dropped these packets, with commands that let them pass."""
    hook = "input" if loss.place == drops.HOST else "forward"
    bases = [chain for chain in chains if chain.hook == hook and chain.concerns(guests.families)]
    found: list[str] = []
    unknown: list[Chain] = []
    for base in bases:
        names = [chain.name for chain in chains if (chain.table, chain.old) == (base.table, base.old)]
        sentences = known(base, names, guests, hook)
        found += [sentence for sentence in sentences if sentence not in found]
        if not sentences:
            unknown.append(base)
    strict = [chain for chain in unknown if chain.policy == "drop"]
    found += [f"{describe(chain)} can let them through: {'; '.join(accepts(chain, guests, hook))}" for chain in strict]
    if found:
        return found
    return [f"it may be {describe(chain)}: {'; '.join(accepts(chain, guests, hook))}" for chain in unknown]


def known(base: Chain, names: "Sequence[str]", guests: Guests, hook: str) -> list[str]:
    """Return a sentence for each known program that has rules in this chain; none for a chain of unknown programs."""
    found = []
    interface = guests.bridge or "tap+"
    if base.table.endswith(" firewalld"):
        commands = [f"firewall-cmd --permanent --zone=trusted --add-interface={interface}", "firewall-cmd --reload"]
        found.append(f"firewalld lets them through after: {'; '.join(commands)}")
    if hook == "forward" and "DOCKER-USER" in names:
        chain = base.replace(name="DOCKER-USER", old=True)  # Docker's chain for users, which is of iptables
        found.append(f"Docker lets them through after: {'; '.join(accepts(chain, guests, hook))}")
    if any(name.startswith(("ufw-", "ufw6-")) for name in names):
        if guests.bridge:
            commands = [f"ufw route allow in on {guests.bridge} out on {guests.bridge}"]
        elif hook == "input":
            commands = ["ufw allow in on tap+"]
        else:
            commands = [f"ufw route allow {way} on tap+" for way in ("in", "out")]
        found.append(f"ufw lets them through after: {'; '.join(commands)}")
    if f"ts-{hook}" in names and any(map(is_tailscales, guests.networks)):
        found.append(
            f"Tailscale claims all of {TAILSCALE} for its own network: give guests other addresses in vm.conf, "
            f"such as `local prefix 10.64.0.0/16`"
        )
    return found


def accepts(chain: Chain, guests: Guests, hook: str) -> list[str]:
    """Return the commands that insert rules for guests at the beginning of a chain."""
    if chain.old:
        program = FAMILIES.get(chain.family, "iptables")
        start, ways, end = f"{program} -I {chain.name}", ("-i", "-o"), "-j ACCEPT"
        interface = guests.bridge or "tap+"
    else:
        start, ways, end = f"nft insert rule {chain}", ("iifname", "oifname"), "accept"
        interface = f"'{guests.bridge or 'tap*'}'"
    matches = [f"{way} {interface}" for way in ways]
    if guests.bridge:
        matches = [" ".join(matches)]
    elif hook == "input":
        matches = matches[:1]
    return [f"{start} {match} {end}" for match in matches]


def describe(chain: Chain) -> str:
    """Return the name of a chain for a sentence."""
    return f"chain {chain.name} of the old {FAMILIES[chain.family]}" if chain.old else f"nftables chain {chain}"


def is_tailscales(text: str) -> bool:
    """Return whether a network overlaps the addresses that Tailscale claims."""
    network = ipaddress.ip_network(text)
    return isinstance(network, ipaddress.IPv4Network) and network.overlaps(TAILSCALE)
