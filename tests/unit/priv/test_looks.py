"""How often and how priv looks for packets that other firewalls drop, with stand-ins for nft and the network."""

import errno
import time
from typing import Any

import pytest

from vmd.errors import OperatorError
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.priv import AskDrops, DropsReported, FramesDropped, NetworkTrouble
from vmd.priv.damage import Damage
from vmd.priv.host import HostNetwork, Wrong
from vmd.priv.main import SWEEP_S, Priv
from vmd.priv.rules import Member

NET4 = (bytes((100, 64, 3, 4)), 31)


class OldNft:
    """An nft that refuses rules with these words, such as counters of sets."""

    path = "/usr/sbin/nft"

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.applied: list[str] = []

    def apply(self, rules: str) -> None:
        """Accept rules, or refuse them."""
        if any(word in rules for word in self.refused):
            raise OperatorError(errno.EOPNOTSUPP, "nftables cannot be used: syntax error")
        self.applied.append(rules)


def network_with(nft: OldNft) -> HostNetwork:
    """Return a network without a host."""
    network: Any = HostNetwork.__new__(HostNetwork)
    network.nft, network.counts, network.groups_seen, network.said = nft, True, set(), set()
    made: HostNetwork = network
    return made


def test_nat_works_without_counters() -> None:
    """Counters are tried once, and the failure is reported once."""
    nft = OldNft("counter")
    network = network_with(nft)
    for _ in range(2):
        network.apply([Member(name="tap0", networks=(NET4,))], ())

    assert len(nft.applied) == 2
    assert "masquerade" in nft.applied[0]
    assert not network.counts
    assert network.said == {
        "packets of guests that other firewalls drop cannot be counted: nftables cannot be used: syntax error"
    }


def test_an_nft_that_refuses_everything_is_not_reported_as_without_counters() -> None:
    """The error says that there is no NAT.  Bridges alone need no table without counters."""
    for refused, members in ((("",), [Member(name="tap0", networks=(NET4,))]), (("counter",), [Member(name="tap0")])):
        network = network_with(OldNft(*refused))
        with pytest.raises(OperatorError, match="syntax error"):
            network.apply(members, ("br0",))
        assert network.counts
        assert network.said == set()


@pytest.mark.parametrize(("times", "watched"), [(0, True), (1, True), (9, False)])
def test_a_set_that_is_deleted_while_rules_are_written_is_restored(times: int, watched: bool) -> None:
    """Otherwise it would not be watched any more.  A set that nft never lists as written is not watched."""
    network: Any = network_with(OldNft())
    network.has_table = True
    member = Member(name="tap0", networks=(NET4,))
    lacking = [{"set source4"}] * times

    def shape() -> dict[str, int]:
        missing = lacking.pop() if lacking else set()
        return {name: count for name, count in network.shape.items() if name not in missing}

    network.nft.shape = shape
    network.write_rules = lambda: network.apply([member], ())
    network.write_rules()
    network.take_rules_as_they_are()

    assert ("set source4" in network.shape) is watched


class TroubleReports(Priv):
    """The part of priv that reports troubles."""

    def __init__(self) -> None:
        self.wrong: dict[str, tuple[int, str]] = {}
        self.sent: list[NetworkTrouble] = []
        self.found: dict[str, Wrong] = {}
        here: Any = self
        here.parent = type("", (), {"send": lambda _self, message: self.sent.append(message)})()
        network = {"wrong": lambda _self: self.found, "nics": {1: (), 2: ()}}
        here.network = type("", (), network)()

    def find(self, **found: tuple[tuple[int, int], ...]) -> list[NetworkTrouble]:
        """Find these faults, each with its VMs and interfaces.  Return the messages."""
        self.found = {}
        for text, whose in found.items():
            self.found[text] = Wrong(Damage(text=text, since_s=0, names=frozenset()))
            self.found[text].whose += whose
        self.sent.clear()
        self.tell()
        return sorted(self.sent, key=lambda message: (message.vmid, message.device, message.text))


def test_each_trouble_is_reported_once() -> None:
    """It has its VM, or none if several VMs have it.  Its end is reported for each interface."""
    priv = TroubleReports()
    of_all, of_one, more = ((1, 0), (2, 0)), ((1, 1),), ((1, 0), (1, 1))
    assert priv.find(flushed=of_all, deleted=of_one) == [
        NetworkTrouble(text="flushed"), NetworkTrouble(vmid=1, device="interface1", text="deleted")
    ]  # fmt: skip
    assert priv.find(flushed=of_all, deleted=of_one) == []
    assert priv.find(deleted=of_one, dropped=of_one, off=more) == [
        NetworkTrouble(), NetworkTrouble(vmid=1, device="interface0", text="off"),
        NetworkTrouble(vmid=1, device="interface1", text="dropped"),
    ]  # fmt: skip
    assert priv.find(dropped=of_one) == [NetworkTrouble(vmid=1, device="interface0")]
    assert priv.find(gone=((3, 0),)) == [
        NetworkTrouble(vmid=1, device="interface1"), NetworkTrouble(vmid=3, device="interface0", text="gone")
    ]  # fmt: skip
    assert priv.find() == []  # it ended with the VM


def test_one_look_is_for_all_vms_of_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vmctl status -v` asks about one VM after another.  A second question about a VM needs a new look."""
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    looks: list[float] = []
    answers: list[DropsReported | FramesDropped] = []
    dropped: list[FramesDropped] = []
    priv: Any = Priv.__new__(Priv)
    priv.told, priv.looked_s, priv.look_took_s, priv.wrong = set(), -SWEEP_S, 0.0, {}
    loaded = type("", (), {"take": lambda _self, _family, _fd: None})()
    nothing: dict[str, Any] = {name: lambda _self, _vmid: [] for name in ("losses", "damages")}
    nothing["wrong"] = lambda _self: {}
    nothing["frames_dropped"] = lambda _self: dropped
    priv.network = type("", (), {"loaded": loaded, "look": lambda _self: looks.append(now_s), **nothing})()
    channel: Any = type("", (), {"send": lambda _self, message: answers.append(message)})()
    priv.parent = channel

    for vmid in range(1, 101):
        priv.on_ask_drops(AskDrops(vmid=vmid), Envelope(AskDrops(vmid=0), 0, 0, {}), channel)
    assert looks == [1000.0]
    priv.on_ask_drops(AskDrops(vmid=7), Envelope(AskDrops(vmid=0), 0, 0, {}), channel)
    assert len(looks) == 2
    now_s += 2 * SWEEP_S
    priv.on_ask_drops(AskDrops(vmid=8), Envelope(AskDrops(vmid=0), 0, 0, {}), channel)
    assert len(looks) == 3
    assert [answer.vmid for answer in answers] == [*range(1, 101), 7, 8]

    # The counts of filters are told first: clients are shown both together.
    answers.clear()
    dropped.append(FramesDropped(vmid=9, index=0, spoofed=3, unwanted=4))
    now_s += 2 * SWEEP_S
    priv.on_ask_drops(AskDrops(vmid=9), Envelope(AskDrops(vmid=0), 0, 0, {}), channel)
    assert answers == [*dropped, DropsReported(vmid=9)]
