"""How long figures are used, and what is said about agents that come and go."""

import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.agentx.test_mib import vm
from vmd.agentx import main as main_module
from vmd.agentx import mib
from vmd.agentx.main import FRESH_S, Agentx
from vmd.ipc import process as process_module
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.agentx import (
    AgentxChanged,
    AgentxLost,
    AgentxMaster,
    AgentxUp,
    AgentxVms,
    AskAgentxVms,
)
from vmd.ipc.messages.children import Quit
from vmd.log import log
from vmd.privsep.confine import AGENTX
from vmd.record import Record

ALL = AgentxVms(began_ns=1, changed_ns=2)
CHANGED = AgentxChanged(vmid=3, name="web", state="running", persistent=True, deleted=False)


class Session:
    """A session with an agent, which does nothing by itself."""

    def __init__(self, _loop: object, sock: socket.socket, context: str, **calls: Callable[..., None]) -> None:
        self.sock = sock
        self.context = context
        self.on_up, self.on_lost, self.on_set = calls["on_up"], calls["on_lost"], calls["on_set"]
        self.closed = False

    def close(self) -> None:
        """Close the connection."""
        self.closed = True
        self.sock.close()


class Rig:
    """The process, which is not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        monkeypatch.setattr(process_module, "CHANNEL_FD", theirs.detach())
        self.agentx = Agentx()
        self.agentx.parent.close()
        ours.close()
        self.sent: list[Record] = []
        self.now_s = 1000.0
        self.lines: list[str] = []
        self.views: list[object] = []
        self.sessions: list[Session] = []
        monkeypatch.setattr(self.agentx, "parent", self)
        monkeypatch.setattr(main_module, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(main_module, "Session", self.make)
        monkeypatch.setattr(mib, "View", lambda *given, **more: (*given, more))
        monkeypatch.setattr(log, "warn", self.lines.append)
        monkeypatch.setattr(log, "info", self.lines.append)

    def make(self, *given: Any, **more: Any) -> Session:  # noqa: ANN401 - a session's arguments
        """Make a session."""
        self.sessions.append(Session(*given, **more))
        return self.sessions[-1]

    def send(self, message: Record) -> None:
        """Take a message to the parent."""
        self.sent.append(message)

    def ask(self) -> None:
        """Ask for the variables."""
        self.agentx.ask(self.views.append)

    def all(self) -> None:
        """End the parent's list of VMs."""
        self.agentx.on_vms(ALL, Envelope(ALL, 0, 0, {}), None)  # type: ignore[arg-type]

    def changed(self) -> None:
        """Report a change of a VM."""
        self.agentx.on_changed(CHANGED, Envelope(CHANGED, 0, 0, {}), None)  # type: ignore[arg-type]

    def master(self, number: int, context: str = "") -> Session:
        """Connect to an agent."""
        ours, theirs = socket.socketpair()
        ours.close()
        message = AgentxMaster(number=number, path="/agent", context=context)
        self.agentx.on_master(message, Envelope(message, 0, 0, {"master": [theirs.detach()]}), None)  # type: ignore[arg-type]
        return self.sessions[-1]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """The process, which is not run."""
    made = Rig(monkeypatch)
    yield made
    for session in made.sessions:
        session.close()
    made.agentx.loop.close()


def test_requests_share_the_parent_s_answer(rig: Rig) -> None:
    """It is asked once, and again when its answer is a second old."""
    for _ in range(2):
        rig.ask()
    assert (rig.sent, rig.views) == ([AskAgentxVms()], [])
    rig.all()
    assert len(rig.views) == 2

    rig.now_s += FRESH_S / 2
    rig.ask()
    assert len(rig.views) == 3
    assert rig.views[2] is rig.views[0]
    rig.now_s += FRESH_S / 2
    rig.ask()
    assert (len(rig.views), len(rig.sent)) == (3, 2)


def test_a_change_makes_figures_old(rig: Rig) -> None:
    """The agent would otherwise see the state before its notification."""
    rig.ask()
    rig.all()
    rig.changed()

    rig.ask()

    assert rig.sent == [AskAgentxVms()] * 2


def test_a_switch_is_seen_at_once(rig: Rig) -> None:
    """The figures stay."""
    session = rig.master(1)
    rig.ask()
    rig.all()
    rig.agentx.switches[mib.BULK] = True
    session.on_set()
    rig.ask()

    assert rig.views == [([], ALL, {"per_vm": True, "bulk": bulk}) for bulk in (False, True)]
    assert len(rig.sent) == 1


@pytest.mark.parametrize(("context", "shown"), [("", ""), ("vms", " as context vms")])
def test_an_agent_that_accepts_us(rig: Rig, context: str, shown: str) -> None:
    """The parent and the log hear so."""
    session = rig.master(4, context)
    assert session.context == context

    session.on_up()

    assert rig.sent == [AgentxUp(number=4)]
    assert rig.lines == [f"the SNMP agent at /agent serves VM-MIB{shown}"]


def test_an_agent_that_refuses_us_is_logged_once(rig: Rig) -> None:
    """Until another reason, or until it has accepted us."""
    ends = ("no", False), ("no", False), ("gone", False), ("gone", True), ("gone", False)
    for number, (why, up) in enumerate(ends):
        session = rig.master(number)
        if up:
            session.on_up()
        session.on_lost(why)

    assert [line for line in rig.lines if "serves" not in line] == [
        f"the SNMP agent at /agent {why}" for why in ("no", "gone", "gone")
    ]
    assert [message for message in rig.sent if isinstance(message, AgentxLost)] == [
        AgentxLost(number=number) for number in range(5)
    ]


def test_another_agent_replaces_the_first(rig: Rig) -> None:
    """Its requests are forgotten, too."""
    first = rig.master(1)
    rig.ask()
    second = rig.master(2)
    rig.all()

    assert (first.closed, second.closed, rig.views) == (True, False, [])
    rig.agentx.leave()
    assert second.closed


def test_notifications_wait_for_an_agent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end with it."""
    begun: list[object] = []
    monkeypatch.setattr(rig.agentx.notifications, "begin", begun.append)
    monkeypatch.setattr(rig.agentx.notifications, "end", lambda: begun.append(None))
    session = rig.master(1)
    begun.clear()

    session.on_up()
    session.on_lost("gone")

    assert begun == [session, None]


@pytest.mark.parametrize("quits", [True, False])
def test_the_session_ends_with_the_process(rig: Rig, monkeypatch: pytest.MonkeyPatch, quits: bool) -> None:
    """The agent is told, so that it does not wait for answers."""
    stopped: list[int] = []
    monkeypatch.setattr(rig.agentx.loop, "stop", lambda: stopped.append(1))
    session = rig.master(1)

    if quits:
        rig.agentx.on_quit(Quit(), Envelope(Quit(), 0, 0, {}), None)  # type: ignore[arg-type]
    else:
        rig.agentx.on_parent_lost(None, None)  # type: ignore[arg-type]

    assert (session.closed, rig.agentx.session, stopped) == (True, None, [1])


def test_the_process(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is confined before it serves anything."""
    done: list[object] = []
    monkeypatch.setattr(main_module, "Agentx", lambda: rig.agentx)
    monkeypatch.setattr(rig.agentx, "ignore_terminal_signals", lambda: done.append("signals"))
    monkeypatch.setattr(main_module, "set_title", done.append)
    monkeypatch.setattr(main_module, "limit_memory", lambda most: done.append(most == main_module.MEMORY_BYTES))
    monkeypatch.setattr(main_module, "confine", done.append)
    monkeypatch.setattr(rig.agentx.loop, "run", lambda: done.append("run"))
    rig.agentx.exit_status = 5

    assert main_module.main() == 5
    assert done == ["signals", "agentx", True, AGENTX, "run"]


def test_the_lists_of_the_parent_replace_each_other(rig: Rig) -> None:
    """Each begins anew."""
    one = vm(1)
    for _ in range(2):
        rig.changed()
        rig.ask()
        rig.agentx.on_vm(one, Envelope(one, 0, 0, {}), None)  # type: ignore[arg-type]
        rig.all()

    assert rig.views == [([one], ALL, {"per_vm": True, "bulk": False})] * 2
