"""How often, and how, priv looks at what other firewalls drop; with an nft and a network that are none."""

import errno
import time
from typing import Any

import pytest

from vmd.errors import OperatorError
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.priv import AskDrops, DropsReported
from vmd.priv.host import Network
from vmd.priv.main import SWEEP_S, Priv
from vmd.priv.rules import Member

NET4 = (bytes((100, 64, 3, 4)), 31)


class OldNft:
    """An nft that knows no counters of sets, or nothing at all."""

    path = "/usr/sbin/nft"

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.applied: list[str] = []

    def apply(self, rules: str) -> None:
        """Take rules."""
        if any(word in rules for word in self.refused):
            raise OperatorError(errno.EOPNOTSUPP, "nftables cannot be used: syntax error")
        self.applied.append(rules)


def network_with(nft: OldNft) -> Network:
    """Return a network without a host."""
    network: Any = Network.__new__(Network)
    network.nft, network.counts, network.groups_seen, network.said = nft, True, set(), set()
    made: Network = network
    return made


def test_nat_works_where_nothing_can_be_counted() -> None:
    """It is tried once, and said once."""
    nft = OldNft("counter")
    network = network_with(nft)
    for _ in range(2):
        network.apply([Member(name="tap0", networks=(NET4,))], ())

    assert len(nft.applied) == 2
    assert "masquerade" in nft.applied[0]
    assert not network.counts
    assert network.said == {
        "what other firewalls drop of guests' packets cannot be counted: nftables cannot be used: syntax error"
    }


def test_an_nft_that_takes_nothing_is_not_blamed_for_its_counters() -> None:
    """There is no NAT, and that is the sentence; bridges alone are not worth a table without counters."""
    for refused, members in ((("",), [Member(name="tap0", networks=(NET4,))]), (("counter",), [Member(name="tap0")])):
        network = network_with(OldNft(*refused))
        with pytest.raises(OperatorError, match="syntax error"):
            network.apply(members, ("br0",))
        assert network.counts
        assert network.said == set()


def test_one_look_is_for_all_vms_of_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vmctl status -v` asks about one after the other; who asks again wants to know anew."""
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    looks: list[float] = []
    answers: list[DropsReported] = []
    priv: Any = Priv.__new__(Priv)
    priv.told, priv.looked_s = set(), -SWEEP_S
    loaded = type("", (), {"take": lambda _self, _family, _fd: None})()
    nothing: dict[str, Any] = {"losses": lambda _self, _vmid: [], "damages": lambda _self, _vmid: []}
    priv.network = type("", (), {"loaded": loaded, "look": lambda _self: looks.append(now_s), **nothing})()
    channel: Any = type("", (), {"send": lambda _self, message: answers.append(message)})()

    for vmid in range(1, 101):
        priv.on_ask_drops(AskDrops(vmid=vmid), Envelope(AskDrops(vmid=0), 0, 0, {}), channel)
    assert looks == [1000.0]
    priv.on_ask_drops(AskDrops(vmid=7), Envelope(AskDrops(vmid=0), 0, 0, {}), channel)
    assert len(looks) == 2
    now_s += 2 * SWEEP_S
    priv.on_ask_drops(AskDrops(vmid=8), Envelope(AskDrops(vmid=0), 0, 0, {}), channel)
    assert len(looks) == 3
    assert [answer.vmid for answer in answers] == [*range(1, 101), 7, 8]
