"""NAT and groups: the one nftables table of ours, `inet vmd`, written whole as text to `nft -f -`.

    set vmd_<group>      names of the interfaces of a group, for rules of the administrator's
    set local            names of `local` interfaces
    set nat4, nat6       their networks, which are hidden behind the host's addresses
    set source4, source6 which of these belongs to which interface
    chain forward        lets through what comes from `local` interfaces or goes to them
    chain postrouting    masquerades

Chains that somebody else put into the table stay as long as it does; it goes with the last need for it, or with
the daemon.
"""

import errno
import ipaddress
import json
import os
import subprocess

from vmd.errors import OperatorError, sentence
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NFT_PATHS = ("/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft", "/usr/local/sbin/nft")
NFT_TIMEOUT_S = 10.0
TABLE = "inet vmd"
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class Member(Record):
    """What the rules have to know of one interface; networks are (packed address, prefix length)."""

    name: str
    groups: tuple[str, ...] = ()
    networks: tuple[tuple[bytes, int], ...] = ()  # of those that have NAT


class Chain(Record):
    """A chain of somebody else's, as `nft list chains` has it; only a base chain has the last three."""

    table: str  # with its family: "ip filter"
    name: str
    kind: str = ""
    hook: str = ""
    policy: str = ""

    def concerns(self, family: str) -> bool:
        """Return whether packets of `family`, "ip" or "ip6", come by here."""
        return self.table.partition(" ")[0] in (family, "inet")

    def __str__(self) -> str:
        """Return its name as nft takes it."""
        return f"{self.table} {self.name}"


def needed(members: "Iterable[Member]") -> bool:
    """Return whether there is anything to have a table for."""
    return any(member.groups or member.networks for member in members)


def ruleset(members: "Sequence[Member]", kept_groups: "Iterable[str]" = ()) -> str:
    """Return what nft is told so that the table is as these interfaces need it, in one transaction.

    Sets of `kept_groups` stay, empty: a rule of the administrator's may name them.
    """
    groups: dict[str, list[str]] = {group: [] for group in kept_groups}
    for member in members:
        for group in member.groups:
            groups.setdefault(group, []).append(f'"{member.name}"')
    nat = [member for member in members if member.networks]
    networks = [network for member in nat for network in member.networks]
    sources = [(f'"{member.name}" . {text(*network)}', v6(network)) for member in nat for network in member.networks]
    lines = [f"add table {TABLE}"]
    for group, names in sorted(groups.items()):
        lines += of_set(f"vmd_{group}", "ifname", names)
    lines += of_set("local", "ifname", [f'"{member.name}"' for member in nat])
    lines += of_set("nat4", "ipv4_addr; flags interval", [text(*network) for network in networks if not v6(network)])
    lines += of_set("nat6", "ipv6_addr; flags interval", [text(*network) for network in networks if v6(network)])
    lines += of_set("source4", "ifname . ipv4_addr; flags interval", [source for source, is6 in sources if not is6])
    lines += of_set("source6", "ifname . ipv6_addr; flags interval", [source for source, is6 in sources if is6])
    lines += [
        f"add chain {TABLE} forward {{ type filter hook forward priority filter; policy accept; }}",
        f"flush chain {TABLE} forward",
        f"add chain {TABLE} postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}",
        f"flush chain {TABLE} postrouting",
    ]
    if nat:
        lines += [
            # A guest may only send from what it was given.  IPv6 has no rp_filter, and hosts that set the one of
            # IPv4 to "loose" for all interfaces have none for a single one.
            f"add rule {TABLE} forward iifname @local meta nfproto ipv4 iifname . ip saddr != @source4 drop",
            f"add rule {TABLE} forward iifname @local meta nfproto ipv6 iifname . ip6 saddr != @source6 drop",
            f"add rule {TABLE} forward iifname @local accept",
            f"add rule {TABLE} forward oifname @local accept",
            f"add rule {TABLE} postrouting ip saddr @nat4 oifname != @local masquerade",
            f"add rule {TABLE} postrouting ip6 saddr @nat6 oifname != @local masquerade",
        ]
    return "\n".join(lines) + "\n"


def of_set(name: str, kind: str, elements: list[str]) -> list[str]:
    """Return the lines that make a set hold these elements and no others."""
    lines = [f"add set {TABLE} {name} {{ type {kind}; }}", f"flush set {TABLE} {name}"]
    if elements:
        lines.append(f"add element {TABLE} {name} {{ {', '.join(elements)} }}")
    return lines


def v6(network: tuple[bytes, int]) -> bool:
    """Return whether a network is one of IPv6."""
    return len(network[0]) == 16


def text(address: bytes, length: int) -> str:
    """Return a network in the usual notation; the address may be any in it."""
    return str(ipaddress.ip_network((address, length), strict=False))


class Nft:
    """The program nft(8) of this host.  Methods raise OperatorError with what it says."""

    def __init__(self) -> None:
        self.path = next((path for path in NFT_PATHS if os.access(path, os.X_OK)), None)

    def apply(self, rules: str) -> None:
        """Have rules take effect, all or none."""
        self._run("-f", "-", given=rules)

    def has_table(self) -> bool:
        """Return whether there is a table of our name."""
        return self.path is not None and f"table {TABLE}" in self._run("list", "tables").splitlines()

    def delete_table(self) -> None:
        """Delete our table."""
        self.apply(f"add table {TABLE}\ndelete table {TABLE}\n")

    def chains(self) -> "list[Chain]":
        """Return the chains of others."""
        listing = self._run("-j", "list", "chains")
        try:
            found = [entry["chain"] for entry in json.loads(listing)["nftables"] if "chain" in entry]
            chains = [
                Chain(
                    table=f"{chain['family']} {chain['table']}",
                    name=chain["name"],
                    kind=chain.get("type", ""),
                    hook=chain.get("hook", ""),
                    policy=chain.get("policy", ""),
                )
                for chain in found
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            return []  # a version of nft that speaks otherwise
        return [chain for chain in chains if chain.table != TABLE]

    def _run(self, *arguments: str, given: str = "") -> str:
        if self.path is None:
            raise OperatorError(errno.ENOENT, "nft was not found: install nftables, or write `local nat disable`")
        try:
            done = subprocess.run(
                [self.path, *arguments], input=given, capture_output=True, text=True, errors="replace",
                timeout=NFT_TIMEOUT_S, env=ENVIRONMENT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise OperatorError(errno.ETIMEDOUT, f"nft does not answer for {NFT_TIMEOUT_S:.0f} s") from None
        except OSError as error:
            raise OperatorError(error.errno or errno.EIO, f"nft: {sentence(error)}") from None
        if done.returncode:
            said = done.stderr.strip().splitlines()
            reason = said[0] if said else f"exit status {done.returncode}"
            raise OperatorError(errno.EOPNOTSUPP, f"nftables cannot be used: {reason}")
        return done.stdout
