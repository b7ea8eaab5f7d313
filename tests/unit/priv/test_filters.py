"""Filters on taps whose frames the kernel moves; with an nft that is none."""

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
    """Has no tables, whatever it was told, and knows some taps."""

    path = "/usr/sbin/nft"

    def __init__(self, *taps: str) -> None:
        self.taps = set(taps)

    def apply(self, text: str) -> None:
        """Refuse what is of another tap."""
        if not any(f" device {tap} " in text for tap in self.taps):
            raise OperatorError(errno.EINVAL, "No such file or directory")

    def listing(self, *_what: str) -> str:
        """Return what there is."""
        return json.dumps({"nftables": []})


def test_a_tap_that_is_gone_keeps_no_other_from_its_filters() -> None:
    """Somebody has deleted it, and flushed all rules: guests of others would be whoever they like."""
    nft = Nft("tap0", "tap1", "tap2")
    filters = Filters(nft)  # type: ignore[arg-type]
    for tap in ("tap0", "tap1", "tap2"):
        filters.lay(tap, REQUEST)
    nft.taps.remove("tap0")
    repaired: list[str] = []
    with pytest.raises(OperatorError, match="No such file"):
        repaired.extend(filters.repair())
    assert repaired == ["tap1", "tap2"]
