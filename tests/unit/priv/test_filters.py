"""Filters on taps whose frames the kernel moves, with a stand-in for nft."""

import errno
import json

import pytest

from vmd.errors import OperatorError
from vmd.ipc.messages.priv import NicWanted
from vmd.priv.filters import Filters

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
