"""Filters on taps whose frames the kernel moves, with a stand-in for nft."""

import errno
import json
from typing import Any

import pytest

from vmd.errors import OperatorError
from vmd.ipc.messages.priv import NicWanted
from vmd.priv.filters import Dropped, Filters, needed, ruleset, shape

REQUEST = NicWanted(
    name="", alias="vm1-if0-n", bridge="br0", groups=(), rdomain=None, up=True, host4=b"", prefix6=b"",
    lladdr=bytes((2, 0, 0, 0, 0, 1)), length4=31, locked=True, vhost=True,
)  # fmt: skip


class Nft:
    """An nft that has no tables, and knows some taps."""

    path = "/usr/sbin/nft"

    def __init__(self, *taps: str) -> None:
        self.taps = set(taps)

    def apply(self, text: str) -> None:
        """Refuse rules of another tap."""
        if not any(f" device {tap} " in text for tap in self.taps):
            raise OperatorError(errno.EINVAL, "No such file or directory")

    def listing(self, *_what: str) -> str:
        """Return an empty list."""
        return json.dumps({"nftables": []})


def test_a_deleted_tap_does_not_prevent_the_filters_of_others() -> None:
    """Another program has deleted a tap and flushed all rules.

    Without filters the other guests could spoof addresses.
    """
    nft = Nft("tap0", "tap1", "tap2")
    filters = Filters(nft)  # type: ignore[arg-type]
    for tap in ("tap0", "tap1", "tap2"):
        filters.lay(tap, REQUEST)
    nft.taps.remove("tap0")
    repaired: list[str] = []
    with pytest.raises(OperatorError, match="No such file"):
        repaired.extend(filters.repair())
    assert repaired == ["tap1", "tap2"]


class Tables:
    """An nft that has tables.  It lists chains, rules and counters as they were written."""

    path: str | None = "/usr/sbin/nft"

    def __init__(self) -> None:
        self.there: dict[str, str] = {}  # rulesets by table
        self.counts: dict[str, dict[str, int]] = {}  # by table
        self.more: list[dict[str, Any]] = []  # entries of others
        self.text = ""  # another output
        self.refused: set[str] = set()

    def apply(self, text: str) -> None:
        """Write a table."""
        if text.split()[3] in self.refused:
            raise OperatorError(errno.EINVAL, "No such file or directory")
        self.there[text.split()[3]] = text

    def tables(self) -> list[str]:
        """List all tables."""
        return ["table inet vmd", "table netdev mine", *(f"table netdev {name}" for name in self.there)]

    def delete_table(self, name: str) -> None:
        """Delete a table."""
        assert name.startswith("netdev ")
        del self.there[name.removeprefix("netdev ")]

    def listing(self, *what: str) -> str:
        """List chains and rules, or counters."""
        found: list[dict[str, Any]] = [{"metainfo": {}}, *self.more]
        if what == ("counters", "netdev"):
            for table, counts in self.counts.items():
                found += [{"counter": {"table": table, "name": name, "packets": n}} for name, n in counts.items()]
        else:
            assert what == ("ruleset", "netdev")
            for table, text in self.there.items():
                for name, count in shape(text).items():
                    chain = name.split()[2]
                    found += [{"chain": {"table": table, "name": chain}}]
                    found += [{"rule": {"table": table, "chain": chain}}] * count
        return self.text or json.dumps({"nftables": found})


@pytest.fixture
def nft() -> Tables:
    """An nft without tables."""
    return Tables()


@pytest.fixture
def filters(nft: Tables) -> Filters:
    """The filters of that nft."""
    return Filters(nft)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "chains"),
    [
        ({"locked": False}, None),
        ({"vhost": False}, None),
        ({}, {"sent": 1, "received": 1}),
        ({"locked": False, "host4": bytes(4)}, {"sent": 1}),
        ({"host4": bytes(4), "prefix6": bytes(16)}, {"sent": 3, "received": 1}),
    ],
)
def test_which_filters_an_interface_has(changed: dict[str, Any], chains: dict[str, int] | None) -> None:
    """None if the process of the interface does the checks, or if nothing has to be checked."""
    request = REQUEST.replace(**changed)
    assert needed(request) is (chains is not None)
    if chains is not None:
        found = shape(ruleset("tap0", request))
        assert found == {f"netdev vmd_tap0 {name}": count for name, count in chains.items()}


def test_the_whole_text() -> None:
    """The table is written anew.  `received` has the hook for frames to the guest."""
    lines = ruleset("tap0", REQUEST.replace(host4=bytes(4), prefix6=bytes(16))).splitlines()
    assert lines == [
        "add table netdev vmd_tap0", "delete table netdev vmd_tap0", "add table netdev vmd_tap0",
        "add counter netdev vmd_tap0 spoofed", "add counter netdev vmd_tap0 unwanted",
        "add chain netdev vmd_tap0 sent { type filter hook ingress device tap0 priority -500; policy accept; }",
        "add chain netdev vmd_tap0 received { type filter hook egress device tap0 priority -500; policy accept; }",
        "add rule netdev vmd_tap0 sent @ll,48,48 != 0x020000000001 counter name spoofed drop",
        "add rule netdev vmd_tap0 received @ll,7,1 0 @ll,0,48 != 0x020000000001 counter name unwanted drop",
        "add rule netdev vmd_tap0 sent @ll,96,16 0x0800 @nh,50,14 0 udp sport 68 udp dport 67 drop",
        "add rule netdev vmd_tap0 sent @ll,96,16 0x86dd @nh,48,8 58 @nh,320,8 133 drop",
    ]  # fmt: skip


def test_filters_are_laid_and_removed(nft: Tables, filters: Filters) -> None:
    """Those of an earlier daemon, too; tables of others stay."""
    nft.there = {"vmd_tap7": "", "vmd_other": ""}
    for tap in ("tap0", "tap1"):
        filters.lay(tap, REQUEST)
    assert nft.there["vmd_tap1"] == ruleset("tap1", REQUEST)
    assert filters.remove_others() == ["table netdev vmd_tap7"]
    filters.remove("tap0")
    filters.remove("tap0")
    filters.remove("tap8")
    assert list(nft.there) == ["vmd_other", "vmd_tap1"]
    nft.path = None
    with pytest.raises(OperatorError, match="nft was not found: install nftables") as error:
        filters.lay("tap2", REQUEST)
    assert error.value.number == errno.ENOENT
    assert list(filters.laid) == ["tap1"]


def test_only_removed_filters_are_laid_again(nft: Tables, filters: Filters) -> None:
    """Rules that others have added do not matter.  Adopted filters that are gone are laid, too."""
    filters.lay("tap0", REQUEST)
    filters.lay("tap1", REQUEST)
    filters.adopt("tap2", REQUEST)
    filters.adopt("tap3", REQUEST.replace(vhost=False))
    nft.more = [{"rule": {"table": "vmd_tap0", "chain": "sent"}}, {"chain": {"table": "mine", "name": "x"}}]
    assert list(filters.repair()) == ["tap2"]
    assert list(filters.repair()) == []
    nft.there["vmd_tap1"] = nft.there["vmd_tap1"].replace("add rule netdev vmd_tap1 sent", "flush x y z ")
    assert list(filters.repair()) == ["tap1"]
    for text in ("nonsense", "[]", '{"nftables": [{"rule": {}}]}'):
        nft.text = text
        assert list(filters.repair()) == []


def test_dropped_frames(nft: Tables, filters: Filters) -> None:
    """They are reported when there are more, and go on where filters are laid again."""
    filters.lay("tap0", REQUEST)
    filters.lay("tap1", REQUEST)
    nft.counts = {"vmd_tap0": {"spoofed": 3, "unwanted": 1, "mine": 9}, "vmd_tap1": {"spoofed": 0}}
    nft.counts["vmd_tap9"] = {"spoofed": 1}
    assert filters.news() == {"tap0": Dropped(spoofed=3, unwanted=1)}
    assert filters.news() == {}
    nft.counts["vmd_tap1"]["unwanted"] = 2
    assert filters.news() == {"tap1": Dropped(spoofed=0, unwanted=2)}
    nft.there.clear()
    assert list(filters.repair()) == ["tap0", "tap1"]
    assert "add counter netdev vmd_tap0 spoofed { packets 3 bytes 0 ; }\n" in nft.there["vmd_tap0"]
    assert "add counter netdev vmd_tap0 unwanted { packets 1 bytes 0 ; }\n" in nft.there["vmd_tap0"]
    filters.remove("tap0")
    filters.lay("tap0", REQUEST)
    assert filters.news() == {"tap0": Dropped(spoofed=3, unwanted=1)}  # another VM's
    for text in ("nonsense", "[]", '{"nftables": [{"counter": {}}]}', '{"nftables": [7]}'):
        nft.text = text
        assert filters.news() == {}


def test_without_filters_nft_is_not_asked(nft: Tables, filters: Filters) -> None:
    """It is a program to start."""
    nft.listing = lambda *_: pytest.fail("asked")  # type: ignore[method-assign]
    assert filters.news() == {}
    assert list(filters.repair()) == []
