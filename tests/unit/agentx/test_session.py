"""A session with an SNMP agent: opening, requests, sets, notifications and its end, also with a faulty agent."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.agentmaster import SESSION, Master, asked, bulk
from tests.unit.agentx.test_mib import view, vm
from vmd.agentx import mib, pdu
from vmd.agentx import session as session_module
from vmd.agentx.notifications import KEPT_MAX, Notifications
from vmd.agentx.pdu import Oid, SearchRange
from vmd.agentx.session import Session
from vmd.ipc.loop import Loop
from vmd.ipc.messages.agentx import AgentxChanged

CONTEXT = "vms"
STATE = (*mib.OPER_STATE, 1)
DEADLINE_S = 60.0


def changed(state: str, vmid: int = 1, *, deleted: bool = False) -> AgentxChanged:
    """Return the parent's message about the state of a VM."""
    return AgentxChanged(vmid=vmid, name="a", state=state, persistent=True, deleted=deleted)


class Rig:
    """A subagent on a thread, and the agent's end of its connection."""

    def __init__(self, context: str = "") -> None:
        self.loop = Loop()
        self.lost: list[str] = []
        self.up = threading.Event()
        self.gone = threading.Event()
        self.asks = 0
        self.switches: dict[Oid, bool] = {mib.PER_VM: True, mib.BULK: False}
        self.notifications = Notifications(self.loop, self.switches)
        ours, theirs = socket.socketpair()
        self.master = Master(ours)
        self.session = Session(
            self.loop, theirs, context, ask=self._ask, switches=self.switches, on_up=self._on_up,
            on_lost=self._on_lost, on_set=lambda: None,
        )  # fmt: skip
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def _ask(self, done: Callable[[mib.View], None]) -> None:
        self.asks += 1
        self.loop.call_later(0, lambda: done(view(vm(1), vm(2))))

    def _on_up(self) -> None:
        self.notifications.begin(self.session)
        self.up.set()

    def _on_lost(self, why: str) -> None:
        self.lost.append(why)
        self.notifications.end()
        self.gone.set()

    def do(self, call: Callable[[], None]) -> None:
        """Run a call on the subagent's thread."""
        self.loop.call_from_thread(call)

    def change(self, state: str, *, vmid: int = 1, deleted: bool = False) -> None:
        """Report a change of a VM to the subagent."""
        self.do(lambda: self.notifications.add(changed(state, vmid, deleted=deleted)))

    def notified(self) -> pdu.Packet:
        """Answer the next notification, and return it."""
        header, payload = self.master.receive()
        assert header.kind == pdu.NOTIFY
        packet = pdu.parse(header.replace(kind=pdu.TEST_SET), payload)  # which has the same form
        self.master.answer(header)
        return packet

    def why(self) -> str:
        """Return why the connection was closed."""
        assert self.gone.wait(DEADLINE_S)
        (why,) = self.lost
        return why

    def close(self) -> None:
        """End subagent and agent."""
        self.loop.call_from_thread(self.loop.stop)
        self.thread.join(DEADLINE_S)
        self.session.close()
        self.master.sock.close()
        self.loop.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A subagent that has just begun."""
    made = Rig()
    yield made
    made.close()


@pytest.fixture
def served(rig: Rig) -> Rig:
    """A subagent whose session is open and registered."""
    rig.master.take_in()
    assert rig.up.wait(DEADLINE_S)
    return rig


def test_it_is_registered_and_answers(served: Rig) -> None:
    """It answers Get, GetNext and GetBulk."""
    assert served.master.ask(pdu.GET, *asked(STATE, (*mib.OPER_STATE, 9))) == (
        0,
        (
            pdu.VarBind(name=STATE, kind=pdu.INTEGER, value=4),
            pdu.VarBind(name=(*mib.OPER_STATE, 9), kind=pdu.NO_SUCH_INSTANCE),
        ),
    )
    _, (bind,) = served.master.ask(pdu.GET_NEXT, SearchRange(start=STATE))
    assert bind.name == (*mib.OPER_STATE, 2)
    _, binds = served.master.ask(pdu.GET_BULK, *asked(mib.NAME), head=bulk(0, 2))
    assert [each.value for each in binds] == [b"vm1", b"vm2"]


def test_requests_share_an_answer_of_the_parent(served: Rig) -> None:
    """They are answered in order, with as few requests to the parent as possible."""
    for number in (1, 2, 3):
        served.master.send(pdu.GET, pdu.oid(STATE) + pdu.oid(()), number=number)
    assert [served.master.answered().header.packet for _ in range(3)] == [1, 2, 3]
    assert served.asks <= 3


def test_too_many_requests(served: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limited number waits for figures.  Others get an error."""
    monkeypatch.setattr(session_module, "REQUESTS_MAX", 2)
    wait: list[Callable[[mib.View], None]] = []
    monkeypatch.setattr(served.session, "ask", wait.append)
    for number in (1, 2, 3):
        served.master.send(pdu.GET, pdu.oid(STATE) + pdu.oid(()), number=number)
    header, payload = served.master.receive()
    assert (header.packet, payload) == (3, pdu.response(pdu.GEN_ERR, 1))
    served.do(lambda: wait[0](view(vm(1))))
    assert [served.master.answered().header.packet for _ in range(2)] == [1, 2]


def test_another_context_than_ours() -> None:
    """RFC 2741, 7.2: it is refused.  Our own context is in the registration."""
    rig = Rig(CONTEXT)
    try:
        opening, _ = rig.master.receive()
        rig.master.answer(opening)
        registering, payload = rig.master.receive()
        assert registering.flags & pdu.NON_DEFAULT_CONTEXT
        assert payload == pdu.string(b"vms") + pdu.register(mib.VM_MIB)
        rig.master.answer(registering)
        for context, error in ((b"vms", 0), (b"", pdu.UNSUPPORTED_CONTEXT), (b"x", pdu.UNSUPPORTED_CONTEXT)):
            assert rig.master.ask(pdu.GET, *asked(STATE), context=context)[0] == error
        rig.change("running")
        notify, _ = rig.master.receive()
        assert notify.flags & pdu.NON_DEFAULT_CONTEXT
    finally:
        rig.close()


def test_setting(served: Rig) -> None:
    """RFC 2741, 7.2.4: a set is tested, committed and undone."""
    both = pdu.bind(pdu.INTEGER, mib.PER_VM, mib.FALSE) + pdu.bind(pdu.INTEGER, mib.BULK, mib.TRUE)
    before, after = dict(served.switches), {mib.PER_VM: False, mib.BULK: True}
    master = served.master

    assert master.request(pdu.TEST_SET, both)[0] == 0
    assert served.switches == before
    assert master.request(pdu.COMMIT_SET, same=True)[0] == 0
    assert served.switches == after
    assert master.request(pdu.UNDO_SET, same=True)[0] == 0
    assert served.switches == before
    assert master.request(pdu.COMMIT_SET, same=True)[0] == 0
    master.send(pdu.CLEANUP_SET)
    assert master.request(pdu.COMMIT_SET, same=True)[0] == pdu.COMMIT_FAILED  # the transaction was cleaned up
    assert served.switches == after


@pytest.mark.parametrize(
    ("bind", "error"),
    [
        (pdu.bind(pdu.INTEGER, mib.PER_VM, 3), pdu.WRONG_VALUE),
        (pdu.bind(pdu.OCTET_STRING, mib.PER_VM, b"1"), pdu.WRONG_TYPE),
        (pdu.bind(pdu.INTEGER, STATE, 1), pdu.NOT_WRITABLE),
    ],
)
def test_invalid_sets(served: Rig, bind: bytes, error: int) -> None:
    """None of the variables is set.  The answer has the number of the wrong one."""
    good = pdu.bind(pdu.INTEGER, mib.BULK, mib.TRUE)
    for kind, given, refusal in (
        (pdu.TEST_SET, good + bind, pdu.response(error, 2)),
        (pdu.TEST_SET, bind + good, pdu.response(error, 1)),
        (pdu.COMMIT_SET, b"", pdu.response(pdu.COMMIT_FAILED, 1)),
    ):
        served.master.send(kind, given)
        assert served.master.receive()[1] == refusal
    assert not served.switches[mib.BULK]


def test_a_set_in_another_context(served: Rig) -> None:
    """We have no variables there."""
    good = pdu.bind(pdu.INTEGER, mib.BULK, mib.TRUE)

    assert served.master.request(pdu.TEST_SET, good, context=b"x")[0] == pdu.NOT_WRITABLE
    assert served.master.request(pdu.COMMIT_SET, same=True)[0] == pdu.COMMIT_FAILED


@pytest.mark.parametrize("size", [1, 7, 20, 21])
def test_packets_in_pieces(served: Rig, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A packet is served when its last byte has arrived, and answers are sent as a whole."""
    monkeypatch.setattr(session_module, "PIECE_BYTES", size)

    for _ in range(3):
        _, (bind,) = served.master.ask(pdu.GET, *asked(STATE))
        assert bind.value == mib.RUNNING


def test_transactions_that_are_never_cleaned_up(served: Rig) -> None:
    """The oldest ones are removed."""
    for _ in range(session_module.SETS_MAX + 5):
        served.master.request(pdu.TEST_SET, pdu.bind(pdu.INTEGER, mib.BULK, mib.TRUE))
    assert len(served.session.sets) == session_module.SETS_MAX


def test_notifications(served: Rig) -> None:
    """RFC 7666: they name the notification and the VM.  Some states have no notification."""
    served.change("starting")
    served.change("running")
    served.change("stopped", deleted=True)

    running, deleted = served.notified(), served.notified()

    assert [(each.name, each.value) for each in running.binds] == [
        ((1, 3, 6, 1, 6, 3, 1, 1, 4, 1, 0), (*mib.VM_MIB, 0, 1)),
        ((*mib.NAME, 1), b"a"), ((*mib.UUID, 1), b""), (STATE, mib.RUNNING),
    ]  # fmt: skip
    assert [each.value for each in deleted.binds] == [(*mib.VM_MIB, 0, 10), b"a", b"", mib.SHUTDOWN, 2]


def test_bulk_notifications(served: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes within a short time are one notification, with a bit for each VM."""
    monkeypatch.setattr("vmd.agentx.notifications.BULK_S", 0.0)
    served.switches.update({mib.PER_VM: False, mib.BULK: True})

    def happen() -> None:
        for vmid in (1, 9, 2):
            served.notifications.add(changed("paused", vmid))

    served.do(happen)
    assert [each.value for each in served.notified().binds] == [(*mib.VM_MIB, 0, 14), b"\xc0\x80"]


def test_notifications_wait_for_an_agent(rig: Rig) -> None:
    """The latest ones are kept."""
    for vmid in range(KEPT_MAX + 5):
        rig.change("running", vmid=vmid)
    rig.do(rig.up.set)  # after the changes
    assert rig.up.wait(DEADLINE_S)
    rig.master.take_in()
    found = [rig.notified().binds[1].name[-1] for _ in range(KEPT_MAX)]
    assert found == list(range(5, KEPT_MAX + 5))


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\2" * 20, "speaks version 2 of AgentX, and not 1"),
        (pdu.packet(pdu.GET, b"\1\0\0\0"), f"sends a packet of type {pdu.GET} that ends too early"),
        (pdu.packet(pdu.CLOSE, b"\5\0\0\0"), "closes the session: shutdown"),
    ],
)
def test_an_agent_that_cannot_be_served(served: Rig, raw: bytes, why: str) -> None:
    """The connection is closed, and the message says why."""
    served.master.sock.sendall(raw)
    assert served.why() == why


def test_an_agent_that_ends(served: Rig) -> None:
    """Requests that wait for figures are dropped."""
    served.master.send(pdu.GET, pdu.oid(STATE) + pdu.oid(()))
    served.master.sock.shutdown(socket.SHUT_RDWR)
    assert served.why().startswith("is gone")


@pytest.mark.parametrize("step", [pdu.OPEN, pdu.REGISTER])
def test_an_agent_that_refuses(rig: Rig, step: int) -> None:
    """It refuses to open the session, or to register the MIB."""
    opening, _ = rig.master.receive()
    if step == pdu.OPEN:
        rig.master.answer(opening, 256)
        assert rig.why() == "refuses a session: open failed"
    else:
        rig.master.answer(opening)
        registering, _ = rig.master.receive()
        rig.master.answer(registering, 263)
        assert rig.why() == "refuses to register VM-MIB: somebody else has registered that"


def test_an_agent_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is closed."""
    monkeypatch.setattr(session_module, "ANSWER_S", 0.0)
    rig = Rig()
    try:
        assert rig.why() == "does not answer for 0 s"
    finally:
        rig.close()


def test_an_agent_that_does_not_read(served: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unsent data for it is bounded."""
    monkeypatch.setattr(session_module, "UNREAD_MAX", 1 << 16)
    payload = bulk(0, 60000) + pdu.oid(mib.VM_MIB) + pdu.oid(())
    served.master.sock.settimeout(DEADLINE_S)
    while not served.gone.is_set():
        try:
            served.master.send(pdu.GET_BULK, payload)
        except OSError:
            break
    assert served.why().startswith("does not read what it has asked for")


def test_an_agent_that_owes_answers(served: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of unanswered notifications is bounded."""
    monkeypatch.setattr(session_module, "ANSWERS_MAX", 3)
    for _ in range(4):
        served.change("running")
    assert served.why() == "owes 3 answers"


def test_requests_of_another_session(served: Rig) -> None:
    """They get an error, as do packets that a master never sends, and the session goes on."""
    for session, kind, error in ((SESSION + 1, pdu.GET, pdu.NOT_OPEN), (SESSION, pdu.PING, pdu.PARSE_ERROR)):
        served.master.sock.sendall(pdu.packet(kind, session=session))
        header, payload = served.master.receive()
        assert (header.session, pdu.parse(header, payload).error) == (session, error)
    assert served.master.ask(pdu.GET, *asked(STATE))[0] == 0


def test_closing_a_session(served: Rig) -> None:
    """One Close packet is sent, and `on_lost` is not called."""
    served.do(served.session.close)
    header, payload = served.master.receive()
    assert (header.kind, payload) == (pdu.CLOSE, b"\5\0\0\0")
    assert served.master.sock.recv(1) == b""
    assert served.lost == []


def test_a_notification_that_is_not_taken(served: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged; one that is taken is not."""
    said: list[str] = []
    monkeypatch.setattr(served.session.complaints, "warn", said.append)
    for error in (0, 267):
        served.change("running")
        header, _ = served.master.receive()
        served.master.answer(header, error)
    assert served.master.ask(pdu.GET, *asked(STATE))[0] == 0  # so the answers were read
    assert said == ["the SNMP agent has not taken a notification: request denied"]
