"""Status of VMs for clients: the lists, and the interfaces of a VM with the reports of its devices."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.unit.parent.timers import Timers
from vmd.config.model import Config, NicConfig, SwitchConfig, VmConfig
from vmd.ipc.devmsg import COUNTER_NAMES, COUNTERS_LEAST
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import (
    Caller,
    End,
    ListRequest,
    NicInfo,
    NicsRequest,
    SwitchesRequest,
    SwitchInfo,
    TroubleInfo,
    VmInfo,
)
from vmd.ipc.messages.priv import AskDrops, DropsReported
from vmd.ipc.messages.shared import TEXT_BYTES_MAX, Trouble
from vmd.ipc.messages.vm import AskDevices, DevicesReported, NicCounters, NicLink
from vmd.ipc.routes import Proc
from vmd.memfile import sealed_file
from vmd.parent import status as module
from vmd.parent.core import Core
from vmd.parent.status import BATCH, COUNT_TIMEOUT_S, TROUBLES_MAX, Status
from vmd.parent.vm import State, Vm
from vmd.record import Record

ROOT = Caller(uid=0, gid=0, pid=1)
UNUSED = cast("Any", None)
NICS = (NicConfig(switch="lan", lladdr=b"\2\0\0\0\0\1"), NicConfig(local=True))
LINKS = (
    NicLink(name="tap0", lladdr=NICS[0].lladdr, host_mac=bytes(6), locked=True, local=False, mtu=1500),
    NicLink(
        name="tap1", lladdr=b"", host_mac=bytes(6), locked=False, local=True, mtu=9000, guest4=b"\x64\x40\0\3",
        host4=b"\x64\x40\0\2", prefix6=bytes(16), length4=29,
    ),
)  # fmt: skip
COUNTED = tuple(range(1, len(COUNTER_NAMES) + 1))
FULL, SLOW, DROPPED = (Trouble(device="disk0", text=text, since_s=7) for text in ("full", "slow", "dropped"))
LACKING, LOGLESS = Trouble(device="interface0", text="no switch", since_s=5), Trouble(device="log", text="x", since_s=6)


def shown(*troubles: Trouble) -> list[Record]:
    """Return the rows of troubles."""
    return [TroubleInfo(device=each.device, text=each.text, since_s=each.since_s) for each in troubles]


class Network:
    """The interfaces of VMs."""

    def __init__(self) -> None:
        self.taps: dict[int, Any] = {}
        self.priv = self
        self.up = True
        self.asked: list[Record] = []  # questions to priv
        self.answers = 0
        self.lacking: list[Trouble] = []

    def ask(self, message: Record, fds: dict[str, list[int]]) -> None:
        """Replaces that of the line to priv."""
        assert fds == {"tables4": [1]}
        self.asked.append(message)

    def answered(self) -> None:
        """Replaces that of the line to priv."""
        self.answers += 1

    def counted(self, _vmid: int, _index: int, figures: dict[str, int]) -> dict[str, int]:
        """Return the figures that the device process has counted."""
        return figures

    def troubles(self, _vmid: int) -> list[Trouble]:
        """Return problems of interfaces."""
        return self.lacking


class Rig:
    """The room.  The test plays all its peers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timers = Timers()
        self.core = Core(cast("Any", self.timers), Config(switches=(SwitchConfig(name="lan", interface="br0"),)))
        self.answers: list[tuple[int, Record]] = []
        self.questions: list[Record] = []  # to vmm
        vmm = SimpleNamespace(send=lambda message, **_: self.questions.append(message))
        self.core.peers.channels = cast("Any", {Proc.CONTROL: self, Proc.VMM: vmm})
        self.network = Network()
        self.logs = SimpleNamespace(troubles=lambda _vmid: [])
        self.room = Status(self.core, cast("Any", self.network), cast("Any", self.logs))
        monkeypatch.setattr(module, "open_tables", lambda: {"tables4": [1]})
        monkeypatch.setattr(module, "describe", self.describe)

    def describe(self, vm: Vm, nics: tuple[NicInfo, ...], caller: Caller) -> Record:
        """Replaces `describe`."""
        assert caller is ROOT
        return VmInfo(
            vmid=vm.vmid, name=vm.name, pid=0, vcpus=1, memory_bytes=0, resident_bytes=0, tty="", uid=0, gid=None,
            owner="", state="", nics=nics,
        )  # fmt: skip

    def send(self, message: Record, *, peerid: int, fds: dict[str, list[int]]) -> None:
        """Take an answer."""
        assert not fds
        self.answers.append((peerid, message))

    def take(self) -> list[tuple[int, Record]]:
        """Return the answers since the last call."""
        answers, self.answers = self.answers, []
        return answers

    def vm(self, name: str = "a", *, taps: bool = True, pid: int = 4711) -> Vm:
        """Return a VM, which runs unless `pid` is 0."""
        vm = self.core.vms.add(VmConfig(name=name, nics=NICS), from_config=True)
        vm._state, vm.pid = State.RUNNING if pid else State.STOPPED, pid
        if taps:
            self.network.taps[vm.vmid] = SimpleNamespace(nics=NICS, links=LINKS)
        return vm

    def ask(self, client: int, vm: Vm) -> None:
        """Ask for the interfaces of a VM."""
        message = NicsRequest(name=vm.name)
        self.room.serve_nics(message, ROOT, Envelope(message, client, 0, {}))

    def nics(self, client: int) -> list[NicInfo]:
        """Return the interfaces in the answer to a client."""
        return [row for to, row in self.take() if to == client and isinstance(row, NicInfo)]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    """Return the room."""
    return Rig(monkeypatch)


# --- lists ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, BATCH, BATCH + 1, 2 * BATCH + 1])
def test_all_vms_are_listed_in_batches(rig: Rig, count: int) -> None:
    """Other messages are served between two batches.  The list has one end, also if it is empty."""
    for number in range(count):
        rig.core.vms.add(VmConfig(name=f"n{number}"), from_config=True)
    message = ListRequest()
    rig.room.serve_list(message, ROOT, Envelope(message, 3, 0, {}))
    turns = 1
    while rig.timers.timers:
        assert len(rig.answers) == turns * BATCH
        rig.timers.fire(0)
        turns += 1

    names = [row.name for _, row in rig.answers if isinstance(row, VmInfo)]
    assert names == [f"n{number}" for number in range(count)]
    assert rig.answers[-1] == (3, End())
    assert len(rig.answers) == count + 1
    assert turns == max(1, -(-count // BATCH))


def test_a_vm_that_ends_while_vms_are_listed_is_left_out(rig: Rig) -> None:
    """Another VM may have its id."""
    for number in range(BATCH + 2):
        rig.core.vms.add(VmConfig(name=f"n{number}"), from_config=True)
    message = ListRequest()
    rig.room.serve_list(message, ROOT, Envelope(message, 3, 0, {}))
    gone = rig.core.vms.get(0, f"n{BATCH}")
    rig.core.vms.remove(gone)
    rig.take()
    rig.timers.fire(0)

    assert [getattr(row, "name", "") for _, row in rig.take()] == [f"n{BATCH + 1}", ""]


def test_switches_are_listed(rig: Rig) -> None:
    """With their interfaces."""
    message = SwitchesRequest()
    rig.room.serve_switches(message, ROOT, Envelope(message, 3, 0, {}))

    assert rig.take() == [(3, SwitchInfo(name="lan", interface="br0")), (3, End())]


# --- interfaces -------------------------------------------------------------------------------------------------


def test_interfaces_have_the_addresses_of_their_taps(rig: Rig) -> None:
    """A VM without taps has those of its configuration."""
    vm = rig.vm()
    lan = NicInfo(
        index=0, tap="tap0", switch="lan", lladdr=NICS[0].lladdr, up=NICS[0].up, locked=True, local=False, mtu=1500
    )
    local = NicInfo(
        index=1, tap="tap1", switch="", lladdr=b"", up=NICS[1].up, locked=False, local=True, mtu=9000,
        guest4=LINKS[1].guest4, host4=LINKS[1].host4, prefix6=bytes(16), length4=29,
    )  # fmt: skip
    assert rig.room.infos(vm) == (lan, local)
    rig.network.taps.clear()
    bare = rig.room.infos(vm)
    assert [(nic.tap, nic.switch, nic.locked) for nic in bare] == [("", "lan", NICS[0].locked), ("", "", False)]
    vm.running_config = vm.config.replace(nics=NICS[:1])
    assert len(rig.room.infos(vm)) == 1


def test_a_vm_without_a_process_is_not_asked(rig: Rig) -> None:
    """The client gets its answer at once.  A VM that has vanished has none."""
    vm = rig.vm(taps=False, pid=0)
    rig.network.lacking = [LACKING]
    rig.logs.troubles = lambda _vmid: [LOGLESS]
    rig.ask(1, vm)

    assert (rig.questions, rig.timers.timers) == ([], [])
    rows = [row for _, row in rig.take()]
    assert [type(row) for row in rows[:2]] == [NicInfo, NicInfo]
    assert rows[2:] == [*shown(LACKING, LOGLESS), End()]
    rig.room.answer_devices(99)
    assert rig.take() == []


@pytest.mark.parametrize("first", ["vm", "priv"])
def test_the_answers_of_the_vm_and_of_priv_are_put_together(rig: Rig, first: str) -> None:
    """Clients are answered after the second, in the order of their requests.  One question serves all of them."""
    vm = rig.vm()
    for client in (1, 2):
        rig.ask(client, vm)
    assert (rig.questions, rig.network.asked) == ([AskDevices(vmid=vm.vmid)], [AskDrops(vmid=vm.vmid)])
    reported = DevicesReported(vmid=vm.vmid, nics=(NicCounters(values=COUNTED),), troubles=(FULL, SLOW))
    dropped = DropsReported(vmid=vm.vmid, troubles=(DROPPED,))
    for which in (first, "priv" if first == "vm" else "vm"):
        assert rig.take() == []
        if which == "vm":
            rig.room.on_reported(reported, UNUSED)
        else:
            rig.room.on_drops(dropped, UNUSED)

    troubles = (FULL, SLOW, DROPPED) if first == "vm" else (DROPPED, FULL, SLOW)
    answers = rig.take()
    for client in (1, 2):
        rows = [row for to, row in answers if to == client]
        assert [row.counters for row in rows[:2] if isinstance(row, NicInfo)] == [COUNTED, ()]
        assert rows[2:] == [*shown(*troubles), End()]
    assert [to for to, row in answers if row == End()] == [1, 2]
    rig.timers.fire(COUNT_TIMEOUT_S)
    assert rig.take() == []
    assert rig.network.answers == 1


@pytest.mark.parametrize(("taps", "up"), [(False, True), (True, False)])
def test_priv_is_asked_only_about_taps(rig: Rig, taps: bool, up: bool) -> None:
    """And only if it serves."""
    vm = rig.vm(taps=taps)
    rig.network.up = up
    rig.ask(1, vm)
    assert rig.network.asked == []
    rig.room.on_drops(DropsReported(vmid=vm.vmid, troubles=(DROPPED,)), UNUSED)  # of an earlier question
    assert rig.take() == []
    rig.room.on_reported(DevicesReported(vmid=vm.vmid), UNUSED)

    assert rig.take()[2:] == [(1, End())]


def test_a_priv_that_ends_gives_no_answer(rig: Rig) -> None:
    """Clients get the rest.  A VM about which priv was not asked is still waited for."""
    vm, other = rig.vm(), rig.vm("b", taps=False)
    rig.ask(1, vm)
    rig.ask(2, other)
    rig.room.on_reported(DevicesReported(vmid=vm.vmid, troubles=(FULL,)), UNUSED)
    rig.room.on_priv_lost()
    rig.room.on_priv_lost()

    answers = rig.take()
    assert {to for to, _ in answers} == {1}
    assert [row for _, row in answers[2:]] == [*shown(FULL), End()]


def test_a_vm_that_does_not_answer(rig: Rig) -> None:
    """Each client gets what there is after its own time.  Clients that come later do not ask again."""
    vm = rig.vm()
    rig.ask(1, vm)
    rig.room.on_drops(DropsReported(vmid=vm.vmid, troubles=(DROPPED,)), UNUSED)
    rig.timers.fire(COUNT_TIMEOUT_S)
    assert rig.take()[2:] == [*((1, row) for row in shown(DROPPED)), (1, End())]
    rig.ask(2, vm)
    assert len(rig.questions) == 1
    rig.room.answer_devices(vm.vmid)  # it has ended

    assert [row for to, row in rig.take() if to == 2][2:] == [*shown(DROPPED), End()]
    rig.room.on_reported(DevicesReported(vmid=vm.vmid), UNUSED)
    rig.room.on_drops(DropsReported(vmid=vm.vmid), UNUSED)
    assert rig.take() == []
    rig.ask(3, vm)
    assert len(rig.questions) == 2


def test_what_a_vm_reports_is_bounded(rig: Rig) -> None:
    """It is not trusted."""
    vm = rig.vm(taps=False)
    many = (FULL.replace(text="x" * 2 * TEXT_BYTES_MAX, device="d" * 2 * TEXT_BYTES_MAX),) * (TROUBLES_MAX + 1)
    rig.ask(1, vm)
    rig.room.on_reported(DevicesReported(vmid=vm.vmid, troubles=many), UNUSED)

    rows = [row for _, row in rig.take() if isinstance(row, TroubleInfo)]
    assert len(rows) == TROUBLES_MAX
    assert all(len(row.text) < TEXT_BYTES_MAX + 10 and len(row.device) < TEXT_BYTES_MAX + 10 for row in rows)


@pytest.mark.parametrize(
    ("values", "believed"),
    [
        (COUNTED, True),
        (COUNTED[:COUNTERS_LEAST], True),  # of an earlier version
        (COUNTED[: COUNTERS_LEAST - 1], False),
        ((*COUNTED, 1), False),
        ((0,) * len(COUNTED), True),
        ((*COUNTED[:-1], (1 << 64) - 1), True),
        ((*COUNTED[:-1], 1 << 64), False),
        ((-1, *COUNTED[1:]), False),
        ((), False),
    ],
)
def test_counters_that_are_not_plausible_are_left_out(rig: Rig, values: tuple[int, ...], believed: bool) -> None:
    """Clients could not read them."""
    vm = rig.vm()
    rig.network.up = False
    rig.ask(1, vm)
    rig.room.on_reported(DevicesReported(vmid=vm.vmid, nics=(NicCounters(values=values),)), UNUSED)

    assert [nic.counters for nic in rig.nics(1)] == [values if believed else (), ()]


def test_an_interface_without_a_tap_has_no_counters(rig: Rig) -> None:
    """Its VM does not run any more."""
    vm = rig.vm(taps=False)
    rig.ask(1, vm)
    rig.room.on_reported(DevicesReported(vmid=vm.vmid, nics=(NicCounters(values=COUNTED),)), UNUSED)

    assert [nic.counters for nic in rig.nics(1)] == [(), ()]


def test_figures_replace_the_report_of_a_vm(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM that has a file of figures does not report them.  The file has the host names of guests, too."""
    vm = rig.vm()
    vm.figures = sealed_file("figures", 16)
    figures = dict(zip(COUNTER_NAMES, COUNTED, strict=True))
    monkeypatch.setattr(module, "slots", lambda fd: {("vionet", 1): figures} if fd == vm.figures else {})
    monkeypatch.setattr(module, "host_names", lambda fd: {1: "web"} if fd == vm.figures else {})
    rig.ask(1, vm)
    rig.room.on_reported(DevicesReported(vmid=vm.vmid), UNUSED)
    rig.room.on_priv_lost()

    nics = rig.nics(1)
    assert [nic.counters for nic in nics] == [(), COUNTED]
    assert [nic.lease_name for nic in nics] == ["", "web"]
