"""What other firewalls of the host drop of guests' packets, by counters of ours (`rules`).

A packet that passes a hook of the kernel is counted at its beginning and at its end.  What is missing at the end was
dropped by somebody's rules in between.  So it is known whether guests are kept from the world, whatever the program is
called that does it, and whether the remedy has helped.
"""

from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

FIRST, LAST = "_first", "_last"  # how the names of the sets end
FROM, TO, HOST, SWITCH = "from", "to", "host", "switch"  # and begin
PLACES = {
    FROM: "from the guest to others",
    TO: "from others to the guest",
    HOST: "from the guest to this host",
    SWITCH: "between ports of the bridge",
}
LOG_AGAIN_S = 600.0


class Seen:
    """What was counted at one place for one interface or bridge; `lost` and `arrived` are packets since the start."""

    def __init__(self) -> None:
        self.arrived = self.lost = 0
        self.now = False  # whether some were lost when packets came last
        self.since_s = 0  # seconds since 1970
        self.logged_s = -LOG_AGAIN_S
        self.restart()

    def restart(self) -> None:
        """Take note that the counters of the kernel begin again."""
        self.first = self.missing = 0

    def take(self, first: int, last: int, now_s: float) -> None:
        """Take what the kernel has counted; `first` was read before `last`, so a packet on its way is not missing."""
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
    """Packets that were lost at a place of an interface or bridge, and still are."""

    place: str
    name: str
    lost: int
    arrived: int
    since_s: int

    def __str__(self) -> str:
        """Return the words for it."""
        return (
            f"another firewall of this host has dropped {self.lost} of {self.arrived} packets {PLACES[self.place]} "
            f"({self.name})"
        )


class Watch:
    """All counters."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], Seen] = {}

    def restart(self, names: "set[str]") -> None:
        """Take note that the counters of the kernel begin again, and are of these interfaces and bridges."""
        self.keep(names)
        for seen in self.seen.values():
            seen.restart()

    def keep(self, names: "set[str]") -> None:
        """Take note that only these interfaces and bridges are counted; the counters go on."""
        self.seen = {key: seen for key, seen in self.seen.items() if key[1] in names}

    def take(self, counted: "Mapping[str, Mapping[str, int]]", now_s: float) -> None:
        """Take what the sets of our table have counted: set -> interface -> packets."""
        for place in PLACES:
            last = counted.get(place + LAST, {})
            for name, packets in counted.get(place + FIRST, {}).items():
                self.seen.setdefault((place, name), Seen()).take(packets, last.get(name, packets), now_s)

    def losses(self, *names: str) -> list[Loss]:
        """Return what is lost now of these interfaces and bridges, or of all."""
        return [
            Loss(place=place, name=name, lost=seen.lost, arrived=seen.arrived, since_s=seen.since_s)
            for (place, name), seen in self.seen.items()
            if seen.now and (not names or name in names)
        ]

    def to_log(self, now_s: float) -> list[Loss]:
        """Return what is lost now and has not been logged for a while; the time is a monotonic one.

        Nothing of what is for the host itself: to keep guests from that is what firewalls of hosts are mostly for.
        """
        found = []
        for (place, name), seen in self.seen.items():
            if place != HOST and seen.now and now_s - seen.logged_s >= LOG_AGAIN_S:
                seen.logged_s = now_s
                found += [loss for loss in self.losses(name) if loss.place == place]
        return found
