"""The cost of a VM that starts or ends does not depend on the number of VMs, with stand-ins for netlink and nft."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from vmd.ipc.messages.priv import AskDrops, NicMade, NicWanted
from vmd.parent.status import COUNT_TIMEOUT_S
from vmd.priv import rules, sysctl
from vmd.priv.drops import Watch
from vmd.priv.filters import Filters
from vmd.priv.host import HostNetwork
from vmd.priv.lists import Link
from vmd.priv.main import REST, REST_MAX_S, Priv
from vmd.priv.nics import Nic, adopted

NFT_VERBS = ("add", "delete", "flush")


class Links:
    """Interfaces that can be looked up by name.  It counts the lists of all."""

    def __init__(self) -> None:
        self.lists = 0
        self.deleted: list[str] = []
        self.there: dict[str, Link] = {}

    def all(self) -> list[Link]:
        """Return all interfaces, and count the call."""
        self.lists += 1
        return list(self.there.values())

    def find(self, name: str) -> Link | None:
        """Look up an interface."""
        return self.there.get(name)

    def delete(self, link: Link) -> None:
        """Record that an interface is deleted."""
        self.deleted.append(link.name)


class Nft:
    """The sets of a table.  It counts the bytes of rules and the listings."""

    path = "/usr/sbin/nft"

    def __init__(self) -> None:
        self.told_bytes = self.asked = 0
        self.sets: dict[str, set[str]] = {}

    def apply(self, text: str) -> None:
        """Carry out the lines about sets."""
        self.told_bytes += len(text)
        for line in text.splitlines():
            verb, what, _family, _table, *rest = line.split(" ", 5)
            assert verb in NFT_VERBS
            if what == "set" and verb == "add":
                self.sets.setdefault(rest[0], set())
            elif what == "set":
                self.sets[rest[0]].clear()
            elif what == "element":
                found = set(rest[1].strip("{} ").split(", "))
                assert found.isdisjoint(self.sets[rest[0]]) if verb == "add" else found <= self.sets[rest[0]]
                self.sets[rest[0]] ^= found

    def counters(self) -> dict[str, dict[str, int]]:
        """Count a listing of the complete table."""
        self.asked += 1
        return {}


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the kernel's settings, so that no frames of bridges go through a firewall."""
    monkeypatch.setattr(sysctl, "read", lambda _name: None)


def nic(vmid: int, *, local: bool = True, groups: tuple[str, ...] = ()) -> Nic:
    """Return an interface of a VM."""
    host4 = bytes((100, 64, *(2 * vmid).to_bytes(2, "big"))) if local else b""
    request = NicWanted(
        name="", alias=f"vm{vmid}-if0-n", bridge="" if local else "br0", groups=groups, rdomain=None, up=True,
        host4=host4, prefix6=b"", lladdr=bytes(6), length4=31,
    )  # fmt: skip
    return adopted(vmid, request, NicMade(name=f"tap{vmid}", lladdr=bytes(6), link_local=b"", mtu=1500, index=vmid))


def network_of(nics: Sequence[Nic]) -> HostNetwork:
    """Return a network that has made these interfaces, without a host."""
    network: Any = HostNetwork.__new__(HostNetwork)
    network.nft, network.links, network.watch = Nft(), Links(), Watch()
    network.nat, network.counts, network.has_table = True, True, False
    network.groups_seen, network.watched, network.judged, network.said = set(), set(), set(), set()
    network.switches, network.shape, network.held = {"br0": None}, {}, Counter()
    network.filters = Filters(network.nft)
    network.damage = type("", (), {"forget": lambda _self, _names: None})()
    network.nics = {each.vmid: [each] for each in nics}
    network.links.there = {each.link.name: each.link for each in nics}
    network.write_rules()
    made: HostNetwork = network
    return made


def costs(count: int, *, local: bool) -> tuple[int, int, int]:
    """Return the cost of one more VM, from start to end: bytes for nft, its listings, lists of interfaces."""
    network: Any = network_of([nic(1000 + number, local=local) for number in range(count)])
    before = network.nft.told_bytes, network.nft.asked, network.links.lists
    one = nic(7000, local=local)
    network.nics[one.vmid], network.links.there[one.link.name] = [one], one.link
    network.change_rules(new=[one])
    network.remove_nics(one.vmid)
    assert network.links.deleted == [one.link.name]
    after = network.nft.told_bytes, network.nft.asked, network.links.lists
    told, asked, lists = (now - then for now, then in zip(after, before, strict=True))
    return told, asked, lists


@pytest.mark.parametrize("local", [True, False])
def test_one_more_vm_costs_the_same_among_many(local: bool) -> None:
    """Nothing is listed, no counter is read, and nft gets only the changes of this VM."""
    few, many = costs(10, local=local), costs(1000, local=local)
    assert few == many
    assert few[1:] == (0, 0)


def test_changes_of_sets_lead_to_the_same_sets_as_writing_all() -> None:
    """VMs start and end in random order, among them the last with NAT and the first of a group."""
    chance = random.Random(1)
    network: Any = network_of([])
    for vmid in range(1, 300):
        if network.nics and chance.random() < 0.5:
            network.remove_nics(chance.choice(list(network.nics)))
        else:
            groups = chance.choice(((), ("lab",), ("lab", "dmz"), (f"g{vmid % 3}",)))
            one = nic(vmid, local=chance.random() < 0.5, groups=groups)
            network.nics[vmid], network.links.there[one.link.name] = [one], one.link
            network.change_rules(new=[one])
        if not rules.needed(network.members()):
            continue
        complete = Nft()
        text = rules.ruleset(network.members(), network.groups_seen)
        complete.apply(text)
        assert network.nft.sets == complete.sets
        assert network.shape == rules.shape(text)
        assert network.watched == {each.link.name for each in network.all_nics() if each.networks}


def test_two_interfaces_have_the_same_name_for_a_moment() -> None:
    """A new tap may get the name of a deleted one whose VM is still known.  The new tap keeps its elements."""
    network: Any = network_of([nic(1), nic(2)])
    other = nic(3)
    other.link = other.link.replace(name="tap1")
    network.nics[3] = [other]
    network.change_rules(new=[other])
    network.remove_nics(1)
    assert '"tap1"' in network.nft.sets["local"]
    complete = Nft()
    text = rules.ruleset(network.members())
    complete.apply(text)
    assert (network.nft.sets, network.shape) == (complete.sets, rules.shape(text))
    network.remove_nics(3)
    assert network.nft.sets["local"] == {'"tap2"'}


def test_asking_about_each_vm_does_not_look_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at hundreds of interfaces may take longer than many questions.

    A repeated question is answered by a look that begins later, perhaps together with questions about other VMs.
    """
    now_s, looks, answers = 1000.0, 0, 0
    later: list[tuple[float, Callable[[], None]]] = []
    monkeypatch.setattr("time.monotonic", lambda: now_s)

    def look(_self: object) -> None:
        nonlocal now_s, looks
        now_s, looks = now_s + 0.5, looks + 1

    def answer(_self: object, _message: object) -> None:
        nonlocal answers
        answers += 1

    def ask(vmid: int) -> None:
        nonlocal now_s
        now_s += 0.005
        priv.on_ask_drops(AskDrops(vmid=vmid), envelope, cast("Any", None))
        for due in [each for each in later if each[0] <= now_s]:
            later.remove(due)
            due[1]()

    priv: Any = Priv.__new__(Priv)
    priv.told, priv.looked_s, priv.look_took_s, priv.wrong = set(), -1.0, 0.0, {}
    priv.parent = type("", (), {"send": answer})()
    priv.loop = type("", (), {"call_later": lambda _self, delay_s, call: later.append((now_s + delay_s, call))})()
    nothing: dict[str, Any] = {name: lambda *_: [] for name in ("losses", "damages", "frames_dropped")}
    loaded = type("", (), {"take": lambda _self, _family, _fd: None})()
    priv.network = type("", (), {"look": look, "loaded": loaded, "wrong": lambda _self: {}, **nothing})()
    envelope: Any = type("", (), {"take_fd": lambda _self, _name: None})()
    for vmid in range(1, 501):
        ask(vmid)
    assert (looks, answers) == (1, 500)
    for _ in range(2000):  # the same VM, repeatedly
        ask(1)
    assert 1 < looks <= 2 + 2500 * 0.005 / REST_MAX_S
    assert answers + len(later) == 2500
    now_s += 2 * REST * 0.5
    ask(1)
    assert (answers, later) == (2501, [])
    priv.look_took_s = 60.0  # as on a host that is very busy
    ask(1)
    now_s += COUNT_TIMEOUT_S
    ask(2)
    assert (answers, later) == (2503, [])
