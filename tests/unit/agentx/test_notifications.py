"""Notifications about VMs: which changes have one, what is kept for an agent, and how many are sent."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vmd.agentx import mib, notifications
from vmd.agentx.notifications import BULK_S, KEPT_MAX, KEPT_S, VMS_MAX, Notifications, affected
from vmd.agentx.pdu import Reader, VarBind
from vmd.ipc.messages.agentx import AgentxChanged
from vmd.log import RateLimit, log

TRAP = notifications.SNMP_TRAP_OID
RUNS = AgentxChanged(vmid=3, name="web", state="running", persistent=True, deleted=False)


class Rig:
    """Notifications, and what an agent has got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, per_vm: bool = True, bulk: bool = False) -> None:
        self.got: list[tuple[VarBind, ...]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.now_s = 1000.0
        self.switches = {mib.PER_VM: per_vm, mib.BULK: bulk}
        loop: Any = SimpleNamespace(call_later=self.call_later)
        monkeypatch.setattr(notifications, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.all = Notifications(loop, self.switches)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> object:
        """Take note of a timer."""
        self.timers.append((delay_s, call))
        return self

    def begin(self) -> None:
        """Let there be an agent."""
        session: Any = SimpleNamespace(notify=lambda raw: self.got.append(Reader(raw, big=True).binds()))
        self.all.begin(session)

    def numbers(self) -> list[int]:
        """Return the numbers of the notifications."""
        return [binds[0].value[-1] for binds in self.got if isinstance(binds[0].value, tuple)]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    """Notifications with an agent."""
    made = Rig(monkeypatch)
    made.begin()
    return made


# RFC 7666, VirtualMachineOperState and the notifications of section 6
@pytest.mark.parametrize(
    ("oper_state", "number"), [(1, None), (3, None), (4, 1), (5, 5), (7, 7), (8, 4), (9, 8), (10, 2), (11, 3), (12, 9)]
)
def test_states_with_a_notification(rig: Rig, oper_state: int, number: int | None) -> None:
    """Its number is that of the MIB."""
    states = [state for state, value in mib.OPER_STATES.items() if value == oper_state]
    for state in states:
        rig.all.add(RUNS.replace(state=state))

    assert states
    assert rig.numbers() == ([] if number is None else [number] * len(states))


def test_a_notification_of_one_vm(rig: Rig) -> None:
    """It has the name and the state; whether vm.conf has the VM only if it is deleted."""
    rig.all.add(RUNS)
    rig.all.add(RUNS.replace(deleted=True, persistent=False))

    running, deleted = rig.got
    assert [bind.name for bind in running] == [TRAP, (*mib.NAME, 3), (*mib.UUID, 3), (*mib.OPER_STATE, 3)]
    assert [bind.value for bind in running] == [(*mib.NOTIFICATIONS, 1), b"web", b"", mib.RUNNING]
    assert [bind.name for bind in deleted[4:]] == [(*mib.PERSISTENT, 3)]
    assert (deleted[0].value, deleted[4].value) == ((*mib.NOTIFICATIONS, 10), 3)


@pytest.mark.parametrize("per_vm", [True, False])
def test_notifications_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, per_vm: bool) -> None:
    """The agent does so."""
    rig = Rig(monkeypatch, per_vm=per_vm)
    rig.begin()

    rig.all.add(RUNS)

    assert (rig.numbers(), rig.timers) == ([1] if per_vm else [], [])


def test_an_agent_gets_what_has_happened_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest, if it is not too old.  Once."""
    rig = Rig(monkeypatch)
    rig.all.add(RUNS.replace(vmid=1))
    rig.now_s += KEPT_S
    for vmid in range(2, 2 + KEPT_MAX - 1):
        rig.all.add(RUNS.replace(vmid=vmid))

    rig.begin()
    assert [binds[1].name[-1] for binds in rig.got] == list(range(2, 2 + KEPT_MAX - 1))
    rig.all.end()
    rig.begin()

    assert len(rig.got) == KEPT_MAX - 1


def test_no_more_than_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go."""
    rig = Rig(monkeypatch)
    for vmid in range(1, KEPT_MAX + 3):
        rig.all.add(RUNS.replace(vmid=vmid))

    rig.begin()

    assert [binds[1].name[-1] for binds in rig.got] == list(range(3, KEPT_MAX + 3))


def test_a_state_without_a_notification_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would push out another one."""
    rig = Rig(monkeypatch)
    rig.all.add(RUNS)
    for _ in range(KEPT_MAX):
        rig.all.add(RUNS.replace(state="something new"))

    rig.begin()

    assert rig.numbers() == [1]


def test_many_vms_have_one_notification(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each kind of change within a second."""
    rig = Rig(monkeypatch, per_vm=False, bulk=True)
    rig.begin()
    for vmid in (1, 9, 9):
        rig.all.add(RUNS.replace(vmid=vmid))
    rig.all.add(RUNS.replace(vmid=2, deleted=True))
    ((delay_s, send),) = rig.timers
    assert (delay_s, rig.got) == (BULK_S, [])

    send()

    assert [[(bind.name, bind.value) for bind in binds] for binds in rig.got] == [
        [(TRAP, (*mib.NOTIFICATIONS, 11)), (mib.AFFECTED, b"\x80\x80")],
        [(TRAP, (*mib.NOTIFICATIONS, 20)), (mib.AFFECTED, b"\x40")],
    ]
    rig.all.add(RUNS)
    assert len(rig.timers) == 2
    rig.all.end()
    rig.timers[1][1]()
    assert len(rig.got) == 2


def test_too_many_are_dropped_and_counted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says how many."""
    said: list[str] = []
    monkeypatch.setattr(log, "warn", said.append)
    monkeypatch.setattr(rig.all, "limit", RateLimit(2, 1e9))
    for _ in range(5):
        rig.all.add(RUNS)
    assert (len(rig.got), said) == (2, [])

    rig.all.limit.tokens = 2.0
    for _ in range(2):
        rig.all.add(RUNS)

    assert len(rig.got) == 4
    assert said == ["3 notifications were not sent: too much happened at a time"]


@pytest.mark.parametrize(
    ("vms", "bits"),
    [
        ({1}, b"\x80"), ({8}, b"\x01"), ({9}, b"\0\x80"), ({1, 2, 16}, b"\xc0\x01"), ({0}, b"\0"),
        ({VMS_MAX}, bytes(VMS_MAX // 8 - 1) + b"\1"), ({VMS_MAX + 1}, bytes(VMS_MAX // 8)),
        ({1, 1 << 30}, b"\x80" + bytes(VMS_MAX // 8 - 1)),
    ],
)  # fmt: skip
def test_a_list_of_vms(vms: set[int], bits: bytes) -> None:
    """The first VM has the highest bit of the first byte.  A large number does not make it long."""
    assert affected(vms) == bits
