"""How priv answers its parent, on a model of a kernel."""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.parent.timers import Timers
from tests.unit.priv.hostmodel import LAN, LOCAL, Host, wanted
from vmd.config.model import Forward
from vmd.errors import HostError, OperatorError, PeerError
from vmd.ipc import process as process_module
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.imsg import Envelope
from vmd.ipc.loop import Loop
from vmd.ipc.messages.children import Quit, Ready, SetVerbosity
from vmd.ipc.messages.priv import (
    AdoptNics,
    AskDrops,
    ConfigureNetwork,
    DropsReported,
    ForwardsSet,
    FramesDropped,
    MakeNics,
    NetworkConfigured,
    NicMade,
    NicsFailed,
    NicsMade,
    NicsRemoved,
    RemoveNics,
    SetForwards,
    SwitchRequest,
)
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.priv import legacy
from vmd.priv import main as main_module
from vmd.priv.damage import Damage
from vmd.priv.drops import Loss
from vmd.priv.main import DROP_MAX, DROPS_MAX, LOOK_S, PROBLEMS_MAX, REPAIR_S, REST, SWITCHES_MAX, Priv
from vmd.record import Record


class Rig:
    """priv, which is not run, and what it sends."""

    label = "parent"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        monkeypatch.setattr(process_module, "CHANNEL_FD", theirs.detach())
        self.host = host
        self.sent: list[Record] = []
        self.taps: list[int] = []
        monkeypatch.setattr(main_module, "HostNetwork", lambda: host.network)
        monkeypatch.setattr(main_module, "close_all", self.close_all)
        self.priv = Priv()
        self.priv.parent.close()
        ours.close()
        monkeypatch.setattr(self.priv, "parent", self)

    def close_all(self, fds: list[int]) -> None:
        """Close descriptors."""
        for fd in fds:
            self.host.kernel.close(fd)

    def send(self, message: Record, *, fds: Mapping[str, list[int]] | None = None) -> None:
        """Take what priv sends."""
        self.sent.append(message)
        self.taps += (fds or {}).get("taps", [])

    def asks(self, message: Record, **fds: list[int]) -> list[Record]:
        """Send priv a message, and return what it sends."""
        self.sent.clear()
        channel: Any = self
        channel.peer = Proc.PARENT
        self.priv.dispatch(channel, Envelope(message, 0, 0, dict(fds)))
        return list(self.sent)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """A host without networks of ours."""
    made = Host(monkeypatch, str(tmp_path / "network"))
    yield made
    made.network.kept.close()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, host: Host) -> Iterator[Rig]:
    """A priv on that host."""
    made = Rig(monkeypatch, host)
    yield made
    made.priv.loop.close()
    log.verbosity = 0


def test_switches_come_in_several_messages(rig: Rig) -> None:
    """The last one is answered, and the next configuration begins anew."""
    dmz = SwitchRequest(interface="br1", alias="switch2-dmz")
    assert rig.asks(ConfigureNetwork(nat=True, switches=(LAN,), more=True)) == []
    assert rig.host.kernel.show() == set()
    assert rig.asks(ConfigureNetwork(nat=True, switches=(dmz,))) == [NetworkConfigured()]
    assert {line.split()[0] for line in rig.host.kernel.show()} == {"br0", "br1"}
    assert rig.asks(ConfigureNetwork(nat=True, switches=(dmz,))) == [NetworkConfigured()]
    assert {line.split()[0] for line in rig.host.kernel.show()} == {"br1"}


def test_too_many_switches(rig: Rig) -> None:
    """A parent that was taken over could fill the memory."""
    many = ConfigureNetwork(nat=True, switches=(LAN,) * (SWITCHES_MAX // 2), more=True)
    assert rig.asks(many) == rig.asks(many) == []
    with pytest.raises(PeerError, match=f"wants {SWITCHES_MAX + 1} switches"):
        rig.asks(ConfigureNetwork(nat=True, switches=(LAN,)))
    assert rig.asks(ConfigureNetwork(nat=True, switches=(LAN,))) == [NetworkConfigured()]


def test_more_problems_than_fit(rig: Rig) -> None:
    """The others are in the log."""
    switches = [SwitchRequest(interface=f"br{number}", alias="mine") for number in range(PROBLEMS_MAX + 2)]
    (answer,) = rig.asks(ConfigureNetwork(nat=True, switches=tuple(switches)))
    assert isinstance(answer, NetworkConfigured)
    words = [f"refused: bridge br{number} with an alias that is not a switch's" for number in range(PROBLEMS_MAX + 2)]
    assert answer.problems == tuple(words[:PROBLEMS_MAX]) == tuple(words[:3])
    assert rig.host.said == words[PROBLEMS_MAX:]


def test_the_first_configuration_removes_leftovers(rig: Rig) -> None:
    """Once.  A priv that was started again adopts instead."""
    rig.host.kernel.add("tap0", "tun", alias="vm1-if0-a")
    assert rig.asks(ConfigureNetwork(nat=True)) == [NetworkConfigured()]
    assert rig.host.kernel.show() == set()
    assert not rig.host.network.adopting
    rig.host.network.kept.close()
    rig.host.kernel.add("tap0", "tun", alias="vm1-if0-a")
    rig.asks(ConfigureNetwork(nat=True))
    assert "tap0" in rig.host.kernel.named()


def test_a_priv_that_was_started_again_keeps_interfaces(rig: Rig) -> None:
    """Guests use them."""
    index = rig.host.kernel.add("tap0", "tun", alias="vm1-if0-a").index
    made = NicMade(name="tap0", lladdr=bytes(6), link_local=b"", mtu=1500, index=index)
    assert rig.asks(AdoptNics(vmid=1, nics=(wanted(1),), made=(made,))) == []
    assert rig.asks(AdoptNics(vmid=1, nics=(wanted(1),), made=(made,))) == []
    assert rig.host.said == ["refused: to adopt 1 interfaces of vm 1"]
    rig.asks(ConfigureNetwork(nat=True, again=True))
    assert "tap0" in rig.host.kernel.named()


def test_a_network_that_cannot_be_owned(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon works without networks."""

    def fail(*_: object) -> None:
        raise HostError("open the file", errno.EROFS)

    monkeypatch.setattr(rig.host.network, "own", fail)
    (answer,) = rig.asks(ConfigureNetwork(nat=True, switches=(LAN,)))
    words = f"open the file: {os.strerror(errno.EROFS)}"
    assert answer == NetworkConfigured(problems=(words,))
    assert rig.host.said == [f"networks will not work: {words}"]


def test_interfaces_are_made_and_removed(rig: Rig, tmp_path: Path) -> None:
    """The descriptors of the taps go back to the parent, and those that are not needed are closed."""
    tables = os.open(tmp_path / "tables", os.O_RDWR | os.O_CREAT)
    tuns = rig.host.tuns(2)
    nics = (LOCAL.replace(vhost=True), wanted(index=1))
    (answer,) = rig.asks(MakeNics(vmid=3, ticket=9, nics=nics), tuns=list(tuns), tables4=[tables])
    assert isinstance(answer, NicsMade)
    assert (answer.vmid, answer.ticket, rig.taps) == (3, 9, tuns)
    assert rig.host.network.loaded.fds == {"ip": tables}
    for nic, (name, vhost) in zip(answer.nics, (("tap0", True), ("tap1", False)), strict=True):
        link = rig.host.kernel.named()[name]
        expected = NicMade(
            name=name, lladdr=link.lladdr, link_local=b"", mtu=1500, index=link.index, before=None, vhost=vhost
        )  # fmt: skip
        assert nic == expected
    again = rig.host.tuns(1)
    answers = rig.asks(MakeNics(vmid=3, ticket=10, nics=(wanted(),)), tuns=again)
    assert answers == [NicsFailed(vmid=3, ticket=10, code=errno.EEXIST, text="vm 3 has interfaces already")]
    assert rig.host.network.loaded.fds == {}
    assert rig.asks(RemoveNics(vmid=3)) == rig.asks(RemoveNics(vmid=3)) == [NicsRemoved(vmid=3)]
    assert rig.host.kernel.show() == set()


def test_a_failed_removal_is_answered(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM has ended in any case."""

    def fail(_vmid: int) -> None:
        raise HostError("x", errno.EIO)

    monkeypatch.setattr(rig.host.network, "remove_nics", fail)
    assert rig.asks(RemoveNics(vmid=3)) == [NicsRemoved(vmid=3)]
    assert len(rig.host.said) == 1


def test_forwards_are_set_or_not(rig: Rig) -> None:
    """The answer says why not, and so does the log."""
    rig.asks(MakeNics(vmid=3, ticket=1, nics=(LOCAL,)), tuns=rig.host.tuns(1))
    web = Forward(port=80, to=80)
    assert rig.asks(SetForwards(vmid=3, forwards=((web,),))) == [ForwardsSet(vmid=3)]
    words = "refused: to forward ports to 2 interfaces of 1"
    rig.host.said.clear()
    assert rig.asks(SetForwards(vmid=3, forwards=((web,), ()))) == [ForwardsSet(vmid=3, text=words)]
    assert rig.host.said == [words]


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (ConfigureNetwork(nat=True), NetworkConfigured(problems=(OUR_FAULT,))),
        (ConfigureNetwork(nat=True, more=True), None),
        (MakeNics(vmid=3, ticket=7, nics=()), NicsFailed(vmid=3, ticket=7, code=errno.EIO, text=OUR_FAULT)),
        (SetForwards(vmid=3, forwards=()), ForwardsSet(vmid=3, text=OUR_FAULT)),
        (AskDrops(vmid=3), DropsReported(vmid=3)),
        (RemoveNics(vmid=3), None),
    ],
)
def test_a_bug_is_answered(rig: Rig, message: Record, answer: Record | None) -> None:
    """Otherwise the parent would wait."""
    channel: Any = rig
    rig.priv.give_up(Envelope(message, 0, 0, {}), channel)
    assert rig.sent == ([] if answer is None else [answer])


def test_quitting(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a priv that is told to end removes what it has made."""
    stopped: list[int] = []
    monkeypatch.setattr(rig.priv.loop, "stop", lambda: stopped.append(1))
    rig.asks(SetVerbosity(verbosity=2))
    assert (log.verbosity, stopped, rig.priv.cleans_up) == (2, [], False)
    rig.asks(Quit())
    assert (stopped, rig.priv.cleans_up) == ([1], True)


@pytest.mark.parametrize("quits", [True, False])
def test_the_process(rig: Rig, monkeypatch: pytest.MonkeyPatch, quits: bool) -> None:
    """It is ready when it is confined and hears of changes."""
    done: list[str] = []
    rig.priv.cleans_up, rig.priv.exit_status = quits, 7
    monkeypatch.setattr(main_module, "Priv", lambda: rig.priv)

    def confined(_place: object) -> list[str]:
        done.append("confined")
        return ["a warning"]

    monkeypatch.setattr(main_module, "confine", confined)
    steps = ((rig.priv, "ignore_terminal_signals"), (rig.priv, "listen"), (rig.priv.loop, "run"))
    for owner, name in (*steps, (rig.host.network, "close")):
        monkeypatch.setattr(owner, name, lambda name=name: done.append(f"{name} {len(rig.sent)}"))
    assert main_module.main() == 7
    assert rig.sent == [Ready(warnings=("a warning",))]
    closed = ["close 1"] if quits else []
    assert done == ["ignore_terminal_signals 0", "confined", "listen 0", "run 1", *closed]


# --- what happens by itself ----------------------------------------------------------------------------------


@pytest.fixture
def timers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Timers:
    """The timers of a loop that does not run."""
    found = Timers()
    monkeypatch.setattr(rig.priv.loop, "call_later", found.call_later)
    return found


class Notices:
    """Notices of changes."""

    def __init__(self, *fds: int) -> None:
        self.sockets = [SimpleNamespace(fileno=lambda fd=fd: fd) for fd in fds]
        self.forgotten = 0

    def forget(self) -> None:
        """Drop all."""
        self.forgotten += 1


def test_many_changes_are_repaired_once(rig: Rig, timers: Timers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A little later, and less often on a host where that takes long."""
    added: dict[int, Callable[[int], None]] = {}
    notices, now, delays = Notices(8, 9), [0.0], []
    monkeypatch.setattr(main_module, "Changes", lambda: notices)
    monkeypatch.setattr(rig.priv.loop, "add", added.__setitem__)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def later(delay_s: float, call: Callable[[], None]) -> object:
        delays.append(delay_s)
        return timers.call_later(delay_s, call)

    def repair() -> None:
        now[0] += 2.0

    monkeypatch.setattr(rig.priv.loop, "call_later", later)
    monkeypatch.setattr(rig.host.network.damage, "repair", repair)
    told: list[float] = []
    monkeypatch.setattr(rig.priv, "tell", lambda: told.append(now[0]))
    rig.priv.listen()
    assert set(added) == {8, 9}
    for _ in range(2):
        added[8](1)
        added[9](1)
        assert rig.priv.repairing is not None
        rig.priv.repair()
    assert delays == [REPAIR_S, REST * 2.0]
    assert told == [2.0, 4.0]
    assert notices.forgotten == 4


def test_a_kernel_that_tells_no_changes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests work all the same."""

    def fail() -> None:
        raise HostError("listen", errno.EPERM)

    monkeypatch.setattr(main_module, "Changes", fail)
    rig.priv.listen()
    assert rig.host.said == [f"damage to networks will not be repaired: listen: {os.strerror(errno.EPERM)}"]
    assert rig.priv.changes is None


def test_the_first_look_comes_by_itself(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """It begins them all."""
    delays: list[tuple[float, str]] = []
    monkeypatch.setattr(Loop, "call_later", lambda _loop, delay_s, call: delays.append((delay_s, call.__name__)))
    Rig(monkeypatch, host)
    assert delays == [(LOOK_S, "look")]


@pytest.mark.parametrize("fails", [False, True])
def test_looks_are_repeated(rig: Rig, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """A failure does not end them.  Dropped frames are told at each one."""
    delays: list[float] = []
    monkeypatch.setattr(rig.priv.loop, "call_later", lambda delay_s, _call: delays.append(delay_s))
    frames = FramesDropped(vmid=3, index=0, spoofed=1, unwanted=0)
    monkeypatch.setattr(rig.host.network, "frames_dropped", lambda: [frames])

    def look() -> None:
        if fails:
            raise OperatorError(errno.EIO, "no nft")

    monkeypatch.setattr(rig.host.network, "look", look)
    rig.priv.look()
    assert (delays, rig.sent, rig.host.said) == ([LOOK_S], [frames], ["no nft"] if fails else [])


def test_an_answer_about_drops(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses first, then damage, of each so many."""
    monkeypatch.setattr(main_module, "REST_MAX_S", 0.0)  # no question waits, however busy the host is
    loss = Loss(place="from", name="tap0", lost=5, arrived=9, since_s=77)
    damage = Damage(text="x" * (DROP_MAX + 1), since_s=88, names=frozenset())
    monkeypatch.setattr(rig.host.network, "losses", lambda vmid: [(vmid, loss)] * (DROPS_MAX + 1))
    monkeypatch.setattr(rig.host.network, "damages", lambda _vmid: [(1, damage)] * (DROPS_MAX + 1))
    taken: list[tuple[str, int | None]] = []
    monkeypatch.setattr(rig.host.network.loaded, "take", lambda family, fd: taken.append((family.name, fd)))
    (answer,) = rig.asks(AskDrops(vmid=3), tables6=[77])
    assert taken == [(legacy.FAMILIES[0].name, None), (legacy.FAMILIES[1].name, 77)]
    assert isinstance(answer, DropsReported)
    assert [trouble.device for trouble in answer.troubles] == ["interface3"] * 8 + ["interface1"] * 8
    assert [(len(trouble.text), trouble.since_s) for trouble in answer.troubles[-1:]] == [(1500, 88)]
    assert answer.troubles[0].text.startswith("another firewall of this host has dropped 5 of 9 packets")
    assert answer.troubles[0].since_s == 77

    def fail(_vmid: int) -> None:
        raise OperatorError(errno.EIO, "no nft")

    monkeypatch.setattr(rig.host.network, "losses", fail)
    monkeypatch.setattr(rig.host.network, "look", lambda: fail(0))
    assert rig.asks(AskDrops(vmid=3)) == [DropsReported(vmid=3)]
    assert rig.host.said == ["no nft", "no nft"]
