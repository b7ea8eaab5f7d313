"""Packets of guests that other firewalls of the host drop, found by counters of our table (`rules`).

Packets are counted at the beginning and at the end of a hook of the kernel.  Packets that are missing at the end were
dropped by rules in between.  So priv knows whether a firewall of any program blocks guests, and whether a remedy has
helped.
"""

from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

FIRST, LAST = "_first", "_last"  # endings of the names of sets
FROM, TO, HOST, SWITCH = "from", "to", "host", "switch"  # beginnings of the names of sets
PLACES = {
    FROM: "from the guest to others",
    TO: "from others to the guest",
    HOST: "from the guest to this host",
    SWITCH: "between ports of the bridge",
}
LOG_AGAIN_S = 600.0


class Seen:
    """The counts of one place for one interface or bridge.  `lost` and `arrived` are packets since the start."""

    def __init__(self) -> None:
        self.arrived = self.lost = 0
        self.now = False  # packets were lost when packets came last
        self.since_s = 0  # when the loss began, in seconds since 1970
        self.logged_s = -LOG_AGAIN_S
        self.restart()

    def restart(self) -> None:
        """The kernel's counters were reset."""
        self.first = self.missing = 0

    def take(self, first: int, last: int, now_s: float) -> None:
        """Take new counts.  `first` was read before `last`, so that a packet on its way does not count as lost."""
        if first < self.first:
            self.restart()
        arrived, lost = first - self.first, max(0, first - last - self.missing)
        self.first, self.missing = first, self.missing + lost
        self.arrived += arrived
        self.lost += lost
        if lost and not self.now:
            self.since_s = int(now_s)
        if lost or arrived:
            self.now = bool(lost)


class Loss(Record):
    """A place of an interface or bridge where packets are lost now."""

    place: str
    name: str
    lost: int
    arrived: int
    since_s: int

    def __str__(self) -> str:
        """Return a sentence about the loss."""
        return (
            f"another firewall of this host has dropped {self.lost} of {self.arrived} packets {PLACES[self.place]} "
            f"({self.name})"
        )


class Watch:
    """The counts of all places, interfaces and bridges."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], Seen] = {}

    def restart(self, names: "set[str]") -> None:
        """The kernel's counters were reset; only these interfaces and bridges are counted from now on."""
        self.keep(names)
        for seen in self.seen.values():
            seen.restart()

    def keep(self, names: "set[str]") -> None:
        """Only these interfaces and bridges are counted from now on.  The counters were not reset."""
        self.seen = {key: seen for key, seen in self.seen.items() if key[1] in names}

    def take(self, counted: "Mapping[str, Mapping[str, int]]", now_s: float) -> None:
        """Take the counters of the sets of our table: set -> interface -> packets."""
        for place in PLACES:
            last = counted.get(place + LAST, {})
            for name, packets in counted.get(place + FIRST, {}).items():
                self.seen.setdefault((place, name), Seen()).take(packets, last.get(name, packets), now_s)

    def losses(self, *names: str) -> list[Loss]:
        """Return the present losses of these interfaces and bridges; without names, of all."""
        return [
            Loss(place=place, name=name, lost=seen.lost, arrived=seen.arrived, since_s=seen.since_s)
            for (place, name), seen in self.seen.items()
            if seen.now and (not names or name in names)
        ]

    def to_log(self, now_s: float) -> list[Loss]:
        """Return the present losses that were not logged within LOG_AGAIN_S.  `now_s` is of the monotonic clock.

        Losses of packets to the host itself are left out, because a firewall of a host normally drops them.
        """
        found = []
        for (place, name), seen in self.seen.items():
            if place != HOST and seen.now and now_s - seen.logged_s >= LOG_AGAIN_S:
                seen.logged_s = now_s
                found += [loss for loss in self.losses(name) if loss.place == place]
        return found
