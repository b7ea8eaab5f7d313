"""NAT and groups: our nftables table `inet vmd`, which is written as a whole to `nft -f -`.

    set vmd_<group>      names of the interfaces of a group, for rules of the administrator
    set local            names of `local` interfaces
    set nat4, nat6       networks of `local` interfaces, which are masqueraded
    set source4, source6 pairs of an interface and its network
    set from_first, from_last, to_first, to_last, host_first, host_last, switch_first, switch_last
                         `local` interfaces, and bridges of switches, with counters (`drops`)
    chain forward        drops packets of a guest with a wrong source address; counts packets before other firewalls
    chain forwarded      counts packets after other firewalls
    chain input, received
                         count packets to the host itself, before and after other firewalls
    chain postrouting    masquerades
    chain prerouting, output
                         pass packets to the host itself, from others and from the host, to chain forwards
    chain forwards       translates packets for ports that are forwarded to guests

Chains that others have put into the table stay as long as the table.  It is removed when no interface needs it any
more, or when the daemon ends.
"""

import errno
import ipaddress
import json
import os
import re
import subprocess

from vmd.errors import OperatorError, sentence
from vmd.priv import drops
from vmd.priv.firewalls import Chain
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from vmd.config.model import Forward

NFT_PATHS = ("/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft", "/usr/local/sbin/nft")
NFT_TIMEOUT_S = 10.0
# Statements for address translation as nft prints them, including those of iptables.  Neither `ct status dnat` nor
# `nd-redirect` is one.
TRANSLATES = re.compile(r"(?<![-\w])(masquerade|redirect|[sd]nat\b[^,}\n]* to)\b", re.IGNORECASE)
DSTNAT = -100  # the priority dstnat, whose name nft does not know at the hook output
BEFORE, BEHIND = -500, 1000  # priorities before and after those of any firewall
TABLE = "inet vmd"
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


SETS = (  # the sets besides those of groups and of counters, with their types
    ("local", "ifname"),
    ("nat4", "ipv4_addr; flags interval"),
    ("nat6", "ipv6_addr; flags interval"),
    ("source4", "ifname . ipv4_addr; flags interval"),
    ("source6", "ifname . ipv6_addr; flags interval"),
)
ENDINGS, PLACES = (drops.FIRST, drops.LAST), (drops.FROM, drops.TO, drops.HOST)  # of the names of sets with counters


class Member(Record):
    """One interface as the rules need it.  Networks are (packed address, prefix length)."""

    name: str
    groups: tuple[str, ...] = ()
    networks: tuple[tuple[bytes, int], ...] = ()  # those with NAT
    guest4: bytes = b""
    forwards: "tuple[Forward, ...]" = ()  # to `guest4`


def needed(members: "Iterable[Member]", bridges: "Iterable[str]" = ()) -> bool:
    """Return whether an interface or a bridge needs the table."""
    return any(bridges) or any(member.groups or member.networks for member in members)


def ruleset(
    members: "Sequence[Member]", kept_groups: "Iterable[str]" = (), bridges: "Iterable[str]" = (), *,
    counted: bool = True,
) -> str:  # fmt: skip
    """Return the input of nft that writes the table for these interfaces, in one transaction.

    Sets of `kept_groups` stay even if they are empty, because a rule of the administrator may use them.  Packets
    between the ports of `bridges` are counted.  Without `counted`, nothing is counted: sets have counters since Linux
    5.7 and nftables 0.9.5.
    """
    # A dict, so that each element is there once: of two interfaces with the same name, one is gone and its VM will soon
    # be forgotten.
    found: dict[str, dict[str, None]] = {f"vmd_{group}": {} for group in kept_groups}
    for member in members:
        for name, element in elements(member, counted=counted):
            found.setdefault(name, {})[element] = None
    nat = [member for member in members if member.networks]
    lines = [f"add table {TABLE}"]
    for name in sorted(name for name in found if name.startswith("vmd_")):
        lines += of_set(name, "ifname", found[name])
    for name, kind in SETS:
        lines += of_set(name, kind, found.get(name, ()))
    pairs = [f'"{bridge}" . "{bridge}"' for bridge in sorted(bridges)]
    for ending in ENDINGS if counted else ():  # nft lists sets in this order, and the first ones must be read first
        for place in PLACES:
            lines += of_set(place + ending, "ifname; counter", found.get(place + ending, ()))
        lines += of_set(drops.SWITCH + ending, "ifname . ifname; counter", pairs)
    for chain, kind, hook, priority in (
        ("forward", "filter", "forward", BEFORE),
        ("forwarded", "filter", "forward", BEHIND),
        ("input", "filter", "input", BEFORE),
        ("received", "filter", "input", BEHIND),
        ("postrouting", "nat", "postrouting", "srcnat"),
        ("prerouting", "nat", "prerouting", "dstnat"),
        ("output", "nat", "output", DSTNAT),
    ):
        lines += [
            f"add chain {TABLE} {chain} {{ type {kind} hook {hook} priority {priority}; policy accept; }}",
            f"flush chain {TABLE} {chain}",
        ]
    forwards = [line for member in nat for line in forwarding(member)]
    lines += [f"add chain {TABLE} forwards", f"flush chain {TABLE} forwards", *forwards]
    if forwards:
        # Except packets to 127.0.0.1: they would need route_localnet, with which the kernel takes packets to that
        # address from guests.  Whenever a firewall has flushed our table, guests could reach what listens there.
        to_us = "meta nfproto ipv4 ip daddr != 127.0.0.0/8 fib daddr type local jump forwards"
        lines += [f"add rule {TABLE} {chain} {to_us}" for chain in ("prerouting", "output")]
        # A guest may connect to a port of the host that is forwarded to itself.  Without masquerading, the packets
        # would have its own address as their source.
        lines.append(f"add rule {TABLE} postrouting ct status dnat oifname . ip saddr @source4 masquerade")
    if nat:
        lines += [
            # A guest may send only from its own addresses.  rp_filter cannot check that: IPv6 has none, and a host that
            # sets it to "loose" for all interfaces cannot make it strict for one.
            f"add rule {TABLE} forward iifname @local meta nfproto ipv4 iifname . ip saddr != @source4 drop",
            f"add rule {TABLE} forward iifname @local meta nfproto ipv6 iifname . ip6 saddr != @source6 drop",
            f"add rule {TABLE} postrouting ip saddr @nat4 oifname != @local masquerade",
            f"add rule {TABLE} postrouting ip6 saddr @nat6 oifname != @local masquerade",
        ]
    for ending, forward, receive in ((drops.FIRST, "forward", "input"), (drops.LAST, "forwarded", "received")):
        if not counted:
            break
        if nat:
            # Packets of no connection are not counted, because most firewalls drop them, with good reason.
            lines += [
                f"add rule {TABLE} {forward} iifname @local ct state != invalid iifname @{drops.FROM}{ending}",
                f"add rule {TABLE} {forward} oifname @local ct state != invalid oifname @{drops.TO}{ending}",
                f"add rule {TABLE} {receive} iifname @local ct state != invalid meta pkttype host "
                f"iifname @{drops.HOST}{ending}",
            ]
        if pairs:
            lines.append(f"add rule {TABLE} {forward} iifname . oifname @{drops.SWITCH}{ending}")
    return "\n".join(lines) + "\n"


def elements(member: Member, *, counted: bool) -> "Iterator[tuple[str, str]]":
    """Yield the elements of an interface in sets, as (name of the set, element)."""
    name = f'"{member.name}"'
    for group in member.groups:
        yield f"vmd_{group}", name
    for network in member.networks:
        version = 6 if v6(network) else 4
        yield f"nat{version}", text(*network)
        yield f"source{version}", f"{name} . {text(*network)}"
    if member.networks:
        yield "local", name
        for ending in ENDINGS if counted else ():
            yield from ((place + ending, name) for place in PLACES)


def difference(gone: "Iterable[tuple[str, str]]", new: "Iterable[tuple[str, str]]") -> str:
    """Return the input of nft that deletes and adds elements of sets, in one transaction."""
    lines = []
    for verb, pairs in (("delete", gone), ("add", new)):
        found: dict[str, list[str]] = {}
        for name, element in pairs:
            found.setdefault(name, []).append(element)
        lines += [f"{verb} element {TABLE} {name} {{ {', '.join(each)} }}\n" for name, each in found.items()]
    return "".join(lines)


def forwarding(member: Member) -> "Iterator[str]":
    """Yield the rules that translate packets for the ports that are forwarded to an interface's guest."""
    guest = str(ipaddress.ip_address(member.guest4)) if member.guest4 else ""
    for forward in member.forwards:
        source = f"ip saddr {text(forward.source.address, forward.source.length)} " if forward.source else ""
        port = f"{forward.protocol} dport"
        ports = forward.ports
        where = f"{ports[0]}-{ports[-1]}" if forward.count > 1 else str(forward.port)
        if forward.to == forward.port:
            to = guest
        elif forward.count == 1:
            to = f"{guest}:{forward.to}"
        else:
            pairs = ", ".join(f"{each} : {forward.to + index}" for index, each in enumerate(ports))
            to = f"{guest} : {port} map {{ {pairs} }}"
        yield f"add rule {TABLE} forwards {source}{port} {where} dnat ip to {to}"


def shape(ruleset: str) -> dict[str, int]:
    """Return the number of rules of each chain of a ruleset, and of elements of each set, by their names."""
    found: dict[str, int] = {}
    for verb, what, _family, _table, *name in (line.split(" ", 5) for line in ruleset.splitlines()):
        if verb == "add" and what in ("chain", "set"):
            found.setdefault(f"{what} {name[0]}", 0)
        elif verb == "add" and what == "rule":
            found[f"chain {name[0]}"] += 1
        elif verb == "add" and what == "element":
            found[f"set {name[0]}"] += name[1].count(", ") + 1
    return found


def of_set(name: str, kind: str, elements: "Collection[str]") -> list[str]:
    """Return the lines of nft that give a set these elements and no others."""
    lines = [f"add set {TABLE} {name} {{ type {kind}; }}", f"flush set {TABLE} {name}"]
    if elements:
        lines.append(f"add element {TABLE} {name} {{ {', '.join(elements)} }}")
    return lines


def v6(network: tuple[bytes, int]) -> bool:
    """Return whether a network is of IPv6."""
    return len(network[0]) == 16


def text(address: bytes, length: int) -> str:
    """Return a network as ADDRESS/LENGTH.  `address` may be any address in it."""
    return str(ipaddress.ip_network((address, length), strict=False))


class Nft:
    """The program nft(8) of this host.  Methods raise OperatorError with its error message."""

    def __init__(self) -> None:
        self.path = next((path for path in NFT_PATHS if os.access(path, os.X_OK)), None)

    def apply(self, rules: str) -> None:
        """Apply rules in one transaction."""
        self._run("-f", "-", given=rules)

    def has_table(self) -> bool:
        """Return whether a table with the name of ours exists."""
        return f"table {TABLE}" in self.tables()

    def tables(self) -> list[str]:
        """Return all tables, a line for each."""
        return self._run("list", "tables").splitlines() if self.path is not None else []

    def delete_table(self, name: str = TABLE) -> None:
        """Delete a table, if it exists."""
        self.apply(f"add table {name}\ndelete table {name}\n")

    def listing(self, *what: str) -> str:
        """Return the JSON output of `nft list`."""
        return self._run("-j", "list", *what)

    def chains(self) -> "list[Chain]":
        """Return the chains of other programs."""
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
            return []  # a version of nft with another output
        return [chain for chain in chains if chain.table != TABLE]

    def translates(self, table: str) -> bool:
        """Return whether a table of another program has rules that translate addresses.

        Many tables have NAT chains without rules.  Raises OperatorError.
        """
        return TRANSLATES.search(self._run("list", "table", *table.split(" ", 1))) is not None

    def shape(self) -> dict[str, int]:
        """Return the `shape` of our table as it is now.  Raises OperatorError, also if the table is gone."""
        listing = self._run("-j", "list", "table", *TABLE.split())
        found: dict[str, int] = {}
        try:
            for entry in json.loads(listing)["nftables"]:
                if "chain" in entry:
                    found.setdefault(f"chain {entry['chain']['name']}", 0)
                elif "rule" in entry:
                    chain = f"chain {entry['rule']['chain']}"
                    found[chain] = found.get(chain, 0) + 1
                elif "set" in entry:
                    found[f"set {entry['set']['name']}"] = len(entry["set"].get("elem", ()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}  # a version of nft with another output
        return found

    def counters(self) -> dict[str, dict[str, int]]:
        """Return the counters of the sets of our table: set -> interface -> packets.

        Raises OperatorError, also if the table is gone.
        """
        listing = self._run("-j", "list", "table", *TABLE.split())
        counted: dict[str, dict[str, int]] = {}
        try:
            for entry in json.loads(listing)["nftables"]:
                for element in entry.get("set", {}).get("elem", ()):
                    inner = element.get("elem", {}) if isinstance(element, dict) else {}
                    if "counter" in inner:
                        value = inner["val"]
                        name = value["concat"][0] if isinstance(value, dict) else value
                        counted.setdefault(entry["set"]["name"], {})[name] = inner["counter"]["packets"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return {}  # a version of nft with another output
        return counted

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
