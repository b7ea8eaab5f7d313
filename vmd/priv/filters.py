"""Filters on taps whose frames the kernel moves (vhost-net).

Without vhost-net, the process of the interface does the same checks.

One table of nftables for each tap that needs it, written and deleted as a whole, `netdev vmd_<tap>`:

    chain sent       frames that the guest sends.  With a locked address, those from another address are dropped.  On a
                     `local` interface, DHCP and router solicitations are dropped, so that they do not reach the host;
                     the process gets them by its packet socket
    chain received   frames to the guest.  With a locked address, those to another address are dropped, except groups
    counter spoofed, unwanted
                     dropped frames of `sent` and of `received`

Linux has the hook of `sent` (ingress) since 4.2, and that of `received` (egress) since 5.16.
"""

import errno
import json

from vmd.errors import OperatorError
from vmd.priv.rules import BEFORE
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmd.ipc.messages.priv import NicWanted
    from vmd.priv.rules import Nft

PREFIX = "vmd_"
SPOOFED, UNWANTED = "spoofed", "unwanted"
# Offsets and lengths are in bits.  `ether daddr` and similar matches never match at egress: nft adds a test of the type
# of the interface by which a frame has come in.
SOURCE, DESTINATION, GROUP, ETHERTYPE = "@ll,48,48", "@ll,0,48", "@ll,7,1", "@ll,96,16"
DHCP = f"{ETHERTYPE} 0x0800 @nh,50,14 0 udp sport 68 udp dport 67"  # no fragments
SOLICITATION = f"{ETHERTYPE} 0x86dd @nh,48,8 58 @nh,320,8 133"  # without extension headers, as guests send them


class Dropped(Record):
    """The frames that the filters of a tap have dropped."""

    spoofed: int = 0
    unwanted: int = 0


def table(tap: str) -> str:
    """Return the table of a tap, with its family, as nft names it."""
    return f"netdev {PREFIX}{tap}"


def needed(request: "NicWanted") -> bool:
    """Return whether an interface needs filters."""
    return request.vhost and bool(request.locked or request.host4)


def ruleset(tap: str, request: "NicWanted") -> str:
    """Return the input of nft that gives a tap its filters, in one transaction."""
    return "\n".join((f"add table {table(tap)}", f"delete table {table(tap)}", *_lines(tap, request))) + "\n"


def _lines(tap: str, request: "NicWanted") -> "Iterator[str]":
    ours, lladdr = table(tap), f"0x{request.lladdr.hex()}"
    yield f"add table {ours}"
    for counter in (SPOOFED, UNWANTED):
        yield f"add counter {ours} {counter}"
    for chain, hook in (("sent", "ingress"), ("received", "egress")):
        if chain == "sent" or request.locked:
            hooked = f"type filter hook {hook} device {tap} priority {BEFORE}; policy accept;"
            yield f"add chain {ours} {chain} {{ {hooked} }}"
    if request.locked:
        yield f"add rule {ours} sent {SOURCE} != {lladdr} counter name {SPOOFED} drop"
        yield f"add rule {ours} received {GROUP} 0 {DESTINATION} != {lladdr} counter name {UNWANTED} drop"
    if request.host4:
        yield f"add rule {ours} sent {DHCP} drop"
    if request.prefix6:
        yield f"add rule {ours} sent {SOLICITATION} drop"


def shape(ruleset: str) -> dict[str, int]:
    """Return the number of rules of each chain of a ruleset, by family, table and chain."""
    found: dict[str, int] = {}
    for verb, what, family, ours, *rest in (line.split(" ", 5) for line in ruleset.splitlines()):
        if (verb, what) == ("add", "chain"):
            found.setdefault(f"{family} {ours} {rest[0]}", 0)
        elif (verb, what) == ("add", "rule"):
            found[f"{family} {ours} {rest[0]}"] += 1
    return found


def counting_on(ruleset: str, dropped: Dropped) -> str:
    """Return a ruleset whose counters begin at the counts of `dropped`."""
    for name, frames in dropped.as_dict().items():
        ruleset = ruleset.replace(f" {name}\n", f" {name} {{ packets {frames} bytes 0 ; }}\n")
    return ruleset


class Filters:
    """The filters of all taps.  Methods raise OperatorError."""

    def __init__(self, nft: "Nft") -> None:
        self.nft = nft
        self.laid: dict[str, str] = {}  # rulesets, by tap
        self._told: dict[str, Dropped] = {}  # the counts that `news` has returned last, by tap

    def lay(self, tap: str, request: "NicWanted") -> None:
        """Lay the filters of a tap.  Must be called before any frame passes."""
        text = ruleset(tap, request)
        if self.nft.path is None:
            raise OperatorError(errno.ENOENT, "nft was not found: install nftables")
        self.nft.apply(text)
        self.laid[tap] = text

    def adopt(self, tap: str, request: "NicWanted") -> None:
        """Adopt the filters that an earlier priv has laid.  If they are gone, `repair` lays them again."""
        if needed(request):
            self.laid[tap] = ruleset(tap, request)

    def remove(self, tap: str) -> None:
        """Remove the filters of a tap, if it has some.  The tap may be gone."""
        if self.laid.pop(tap, None) is not None:
            self._told.pop(tap, None)
            self.nft.delete_table(table(tap))

    def remove_others(self) -> list[str]:
        """Remove the filters that an earlier daemon has left, and return their tables."""
        tables = (line.removeprefix("table ") for line in self.nft.tables())
        left = [name for name in tables if name.startswith(table("tap")) and name not in map(table, self.laid)]
        for name in left:
            self.nft.delete_table(name)
        return [f"table {name}" for name in left]

    def repair(self) -> "Iterator[str]":
        """Lay filters again that another program has removed, and yield their taps.

        A failure, such as for a tap that is gone, is raised when all taps were checked.
        """
        there = self._shapes() if self.laid else None
        failed: OperatorError | None = None
        if there is None:
            return
        for tap, text in self.laid.items():
            if any(there.get(name, -1) < count for name, count in shape(text).items()):
                try:
                    self.nft.apply(counting_on(text, self._told.get(tap, Dropped())))
                except OperatorError as error:
                    failed = error
                else:
                    yield tap
        if failed is not None:
            raise failed

    def _shapes(self) -> dict[str, int] | None:
        """Return the `shape` of all present filters; None if the output of this nft cannot be read."""
        found: dict[str, int] = {}
        try:
            for entry in json.loads(self.nft.listing("ruleset", "netdev"))["nftables"]:
                for what, name in (("chain", "name"), ("rule", "chain")):
                    if what in entry:
                        key = f"netdev {entry[what]['table']} {entry[what][name]}"
                        found[key] = found.get(key, 0) + (what == "rule")
        except (ValueError, KeyError, TypeError):
            return None
        return found

    def news(self) -> dict[str, Dropped]:
        """Return the dropped frames by tap, for taps whose counts have changed since the last call."""
        now = self._dropped() if self.laid else {}
        told, nothing = self._told, Dropped()
        news = {tap: each for tap, each in now.items() if tap in self.laid and each != told.get(tap, nothing)}
        self._told |= news
        return news

    def _dropped(self) -> dict[str, Dropped]:
        found: dict[str, dict[str, int]] = {}
        try:
            for entry in json.loads(self.nft.listing("counters", "netdev"))["nftables"]:
                counter = entry.get("counter")
                if counter is not None and counter["name"] in Dropped.fields:
                    tap = counter["table"].removeprefix(PREFIX)
                    found.setdefault(tap, {})[counter["name"]] = int(counter["packets"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}  # a version of nft with another output
        return {tap: Dropped(**counts) for tap, counts in found.items()}
