"""What the parent starts and ends, where it brings a message, and what a lost process or a failed handler causes."""

import errno
import signal
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.unit.parent.test_serving import Connections, Peer
from vmd.config.model import NAME_MAX, Config, VmConfig
from vmd.errors import HostError, OperatorError, PeerError
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.children import Quit, Ready
from vmd.ipc.messages.clients import Failed, ListRequest, Ok, StopRequest
from vmd.ipc.messages.opener import OpenerAt
from vmd.ipc.messages.priv import NetworkTrouble
from vmd.ipc.messages.vm import ConsoleSnapshotEnd, PauseDone
from vmd.ipc.routes import Proc
from vmd.parent import main
from vmd.parent.clients import For
from vmd.parent.main import SERVES, Parent
from vmd.parent.options import Options
from vmd.parent.vm import State, Vm
from vmd.record import Record

AnyParent = Any  # a Parent whose rooms are replaced by test doubles


class Ended(Peer):
    """A channel that can be flushed."""

    def flush_blocking(self, _timeout_s: float) -> None:
        """Note it among the messages."""
        self.told.append(Ok())


@pytest.fixture
def parent() -> Iterator[AnyParent]:
    """Yield a parent whose rooms exist, and whose processes do not."""
    parent: AnyParent = Parent(Options(), Config(), cast("Any", None))
    controls = Connections()
    parent.connections = controls
    parent.core.peers.channels = {Proc.PRIV: Ended(Proc.PRIV), Proc.CONTROL: controls, Proc.VMM: Ended(Proc.VMM)}
    parent.children = SimpleNamespace(kill=lambda _proc: None)
    yield parent
    parent.loop.close()


class Calls:
    """Notes calls, and gives the same answer to each."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def note(self, name: str, answer: object = None) -> Callable[..., Any]:
        """Return a function that notes its name and arguments."""

        def call(*given: object, **named: object) -> object:
            self.made.append((name, *given, *named.values()) if given or named else name)
            return answer

        return call


@pytest.fixture
def calls() -> Calls:
    """Return a place for calls."""
    return Calls()


# --- start and end ----------------------------------------------------------------------------------------------


def test_what_a_start_starts(parent: AnyParent, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every room gets the means to start its processes.  The signals have their meanings."""
    children = SimpleNamespace(cell="cell", ids=range(9), begin=calls.note("begin"))
    rooms = ("vmms", "connections", "openings", "snapshots", "agentx", "console_logs", "metrics")
    for name in (*rooms, "logs"):
        monkeypatch.setattr(getattr(parent, name), "start", calls.note(name), raising=False)
    monkeypatch.setattr(parent, "start_process", calls.note("start_process"))
    monkeypatch.setattr(parent.lasting, "keep", calls.note("keep"))
    monkeypatch.setattr(parent.lasting, "keep_listener", calls.note("keep_listener"))
    signals: dict[int, Any] = {}
    monkeypatch.setattr(parent.loop, "on_signal", signals.__setitem__)
    parent.start(children, "listener", 5)

    starts = [(name, children, parent.logs.open) for name in rooms[1:]]
    assert calls.made == [
        ("logs", "cell"), ("begin", parent.loop), ("keep", parent.generations, parent.network),
        ("start_process", Proc.PRIV), ("vmms", children, 5, None), *starts, ("keep_listener", "listener"),
    ]  # fmt: skip
    assert (parent.core.slots.ids, parent.listener, parent.children) == (range(9), "listener", children)
    assert signals.keys() == {
        signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGPIPE, signal.SIGUSR1
    }  # fmt: skip
    assert signals[signal.SIGTERM] == signals[signal.SIGINT] == parent.life.stop_all
    assert signals[signal.SIGHUP] == parent.configuration.on_hangup
    assert signals[signal.SIGUSR2] == parent.hand_over
    for signum in (signal.SIGPIPE, signal.SIGUSR1):
        assert signals[signum]() is None


def test_what_an_end_ends(parent: AnyParent, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every room, and every process, which is waited for.  The networks go after the processes that use them."""
    rooms = ("connections", "openings", "snapshots", "agentx", "console_logs", "metrics", "consoles", "network")
    for name in (*rooms, "lasting"):
        monkeypatch.setattr(getattr(parent, name), "close", calls.note(name), raising=False)
    monkeypatch.setattr(parent.lasting, "forget", calls.note("forget"))
    del parent.core.peers.channels[Proc.CONTROL]
    parent.listener = socket.socket()
    parent.finish()

    assert calls.made == ["forget", *rooms, "lasting"]
    assert (parent.core.ending, parent.listener.fileno()) == (True, -1)
    assert [peer.told for peer in parent.core.peers.channels.values()] == [[Quit(), Ok()]] * 2


@pytest.mark.parametrize(
    ("serving", "up", "well", "again"),
    [(True, True, True, False), (True, True, False, True), (True, False, True, True), (False, False, False, False)],
)
def test_who_removes_what_priv_has_left(
    parent: AnyParent, calls: Calls, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    serving: bool, up: bool, well: bool, again: bool,
) -> None:  # fmt: skip
    """Another priv, if the first could not.  If that fails, too, the log says what is left."""
    ours, theirs = socket.socketpair()
    parent.core.serving, parent.network.priv.up = serving, up
    parent.children = SimpleNamespace(
        ended_well=lambda proc: well and proc is Proc.PRIV, start=calls.note("start", (None, ours))
    )
    monkeypatch.setattr(main, "remove_all", calls.note("remove_all"))
    parent.clean_up()
    assert calls.made == ([("start", Proc.PRIV, parent.logs.open), ("remove_all", ours)] if again else [])
    said = capfd.readouterr().err
    assert ("priv could not remove its interfaces and rules: another one does" in said) == again
    assert "are left" not in said
    assert ours.fileno() == (-1 if again else ours.fileno())
    for error in (HostError("start priv", errno.ENOMEM), OSError(errno.EPIPE, "Broken pipe")):

        def fail(*_given: object, error: Exception = error) -> None:
            raise error

        parent.children.start = fail
        parent.clean_up()
        assert ("interfaces and rules are left: " in capfd.readouterr().err) == again
    ours.close()
    theirs.close()


# --- processes --------------------------------------------------------------------------------------------------


def hear(parent: AnyParent, proc: Proc, message: Record, peerid: int = 0) -> None:
    """Have the parent handle a message of a process."""
    envelope = Envelope(message, peerid, 0, {})
    Parent.HANDLERS[proc, type(message)](parent, message, envelope, parent.core.peers.channels[proc])


def test_warnings_of_processes_are_logged_once(parent: AnyParent, capfd: pytest.CaptureFixture[str]) -> None:
    """Many processes find the same about their host."""
    hear(parent, Proc.VMM, Ready(warnings=("no landlock", "old kernel")))
    hear(parent, Proc.PRIV, Ready(warnings=("no landlock",)))
    said = capfd.readouterr().err
    assert (said.count("no landlock"), said.count("old kernel")) == (1, 1)
    with pytest.raises(PeerError, match="is ready twice"):
        hear(parent, Proc.VMM, Ready())


def test_when_priv_is_told_about_the_network(
    parent: AnyParent, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all are ready, and the VMs of an earlier daemon are known.  Later each new priv is told."""
    monkeypatch.setattr(parent.network, "begin", calls.note("begin"))
    monkeypatch.setattr(parent.adoption, "when_serving", calls.note("when_serving"))
    parent.adoption.waiting = {object()}
    for proc in (Proc.VMM, Proc.PRIV, Proc.CONTROL):
        hear(parent, proc, Ready())
    parent.on_settled()
    assert calls.made == []
    parent.adoption.waiting = set()
    parent.on_settled()
    assert calls.made == ["begin"]

    parent.core.serving = True
    parent.on_settled()  # a vmm has answered late
    assert calls.made == ["begin", "when_serving"]
    parent.core.ready -= {Proc.PRIV, Proc.VMM}
    hear(parent, Proc.PRIV, Ready())
    assert len(calls.made) == 2
    hear(parent, Proc.VMM, Ready())
    assert len(calls.made) == 2
    parent.core.ready.discard(Proc.PRIV)
    hear(parent, Proc.PRIV, Ready())
    assert calls.made[2:] == ["begin"]


@pytest.mark.parametrize(("adopted", "text"), [
    (None, "startup"), (0, "adopted 0 VMs of an earlier vmd"), (1, "adopted 1 VM of an earlier vmd"),
    (2, "adopted 2 VMs of an earlier vmd"),
])  # fmt: skip
@pytest.mark.parametrize("planned", [False, True])
def test_what_a_daemon_does_that_begins_to_serve(
    parent: AnyParent, calls: Calls, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    adopted: int | None, text: str, planned: bool,
) -> None:  # fmt: skip
    """One that takes the place of another reads vm.conf only if that was planned."""
    if adopted is not None:
        parent.truth, parent.adoption.adopted = SimpleNamespace(planned=planned), adopted
    listener = object()
    parent.listener, parent.on_ready = listener, calls.note("ready")
    for room, name in (
        ("connections", "listen"), ("metrics", "configure"), ("adoption", "when_serving"), ("throttles", "begin"),
        ("life", "start_batch"), ("configuration", "on_hangup"),
    ):  # fmt: skip
        monkeypatch.setattr(getattr(parent, room), name, calls.note(name))
    parent.serve(listener)

    reloads = adopted is not None and planned
    assert calls.made == [
        ("listen", listener), "ready", ("configure", parent.core.config.settings), "when_serving", "begin",
        "start_batch", *(["on_hangup"] if reloads else []),
    ]  # fmt: skip
    assert (parent.listener, parent.core.serving) == (None, True)
    assert [event.text for event in parent.core.events._past] == [text]
    said = capfd.readouterr().err
    assert "startup" in said
    assert ("the configuration is that of the vmd before this one" in said) == (adopted is not None and not planned)


@pytest.mark.parametrize("adopts", [False, True])
@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("proc", [Proc.PRIV, Proc.CONTROL])
def test_a_process_that_is_lost(
    parent: AnyParent, calls: Calls, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    proc: Proc, serving: bool, adopts: bool,
) -> None:  # fmt: skip
    """priv is started again while clients are served.  Otherwise the daemon ends, and leaves guests it has adopted."""
    parent.core.serving, parent.core.adopts = serving, adopts
    parent.core.ready = {Proc.PRIV, Proc.CONTROL}
    monkeypatch.setattr(parent, "start_again", calls.note("start_again"))
    monkeypatch.setattr(parent.life, "stop_all", calls.note("stop_all"))
    monkeypatch.setattr(parent.loop, "stop", calls.note("stop"))
    monkeypatch.setattr(parent.network, "on_priv_lost", calls.note("network"))
    monkeypatch.setattr(parent.status, "on_priv_lost", calls.note("status"))
    parent.children.kill = calls.note("kill")
    channel = Peer(proc)
    parent.on_child_lost(channel, None)

    assert (proc in parent.core.peers.channels, proc in parent.core.ready) == (False, False)
    again = proc is Proc.PRIV and serving
    last = ("start_again", Proc.PRIV) if again else "stop" if adopts else "stop_all"
    of_priv = [("network", not serving), "status"] if proc is Proc.PRIV else []
    assert calls.made == [("kill", proc), *of_priv, last]
    assert (parent.exit_status, parent.handed_over) == (0 if again else 1, adopts and not again)
    name = proc.name.lower()
    assert (f"lost child: {name}: it is started again" if again else f"lost child: {name}") in capfd.readouterr().err

    parent.core.ending = True
    parent.core.serving = False
    calls.made.clear()
    parent.on_child_lost(Peer(Proc.CONTROL), PeerError("control", "is mad"))
    assert calls.made == [("kill", Proc.CONTROL)]


def test_a_process_that_cannot_be_started_again(
    parent: AnyParent, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is tried until it succeeds, after a longer and longer time."""
    timers: list[tuple[float, Callable[[], None]]] = []
    monkeypatch.setattr(parent.loop, "call_later", lambda delay_s, call: timers.append((delay_s, call)))
    outcomes: list[Exception | None] = [
        HostError("start priv", errno.ENOMEM), OSError(errno.EMFILE, "Too many open files"), None
    ]  # fmt: skip
    started: list[Proc] = []

    def start(proc: Proc) -> None:
        if error := outcomes.pop(0):
            raise error
        started.append(proc)

    monkeypatch.setattr(parent, "start_process", start)
    parent.start_again(Proc.PRIV)
    for _ in range(3):
        assert (len(timers), started) == (3 - len(outcomes) + 1, [])
        timers[-1][1]()
    assert (len(timers), started) == (3, [Proc.PRIV])
    delays = [delay_s for delay_s, _ in timers]
    assert delays == sorted(delays)
    assert delays[0] == 0 < delays[1] < delays[2]
    said = capfd.readouterr().err
    assert "priv cannot be started again: start priv: Cannot allocate memory" in said
    assert "priv cannot be started again: Too many open files" in said


def test_a_priv_that_does_not_answer(parent: AnyParent, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is replaced.  If it has ended already, nothing happens."""
    monkeypatch.setattr(parent, "on_child_lost", calls.note("lost"))
    parent.on_priv_silent()
    assert calls.made == []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = parent.attach(ours, Proc.PRIV, "priv", on_lost=lambda *_: None)
    parent.core.peers.channels[Proc.PRIV] = channel
    parent.on_priv_silent()
    ((_, lost, error),) = calls.made
    assert (lost, channel.closed, str(error)) == (channel, True, "priv: does not answer for 30 s")
    theirs.close()


def test_a_daemon_that_hands_over(parent: AnyParent, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that this was planned, so that the next one reads vm.conf."""
    monkeypatch.setattr(parent.lasting, "plan", calls.note("plan"))
    monkeypatch.setattr(parent.loop, "stop", calls.note("stop"))
    parent.hand_over()
    assert (calls.made, parent.handed_over, parent.exit_status) == ([("plan", True), "stop"], True, 0)


# --- messages ---------------------------------------------------------------------------------------------------


def test_every_request_has_its_room(parent: AnyParent) -> None:
    """A room that is not in the table would answer each request with an error of ours."""
    assert {room for room, _ in SERVES.values()} <= parent.rooms.keys()


def test_a_message_of_an_opener_reaches_its_room(parent: AnyParent) -> None:
    """With the channel: the room knows which opener it is."""
    parent.core.peers.channels[Proc.OPENER] = Peer(Proc.OPENER)
    with pytest.raises(PeerError, match="answered a request that was not made"):
        hear(parent, Proc.OPENER, OpenerAt(what="kernel"))


ROOT = 7


@pytest.mark.parametrize(
    ("trouble", "code", "text"),
    [
        (OperatorError(errno.ENOENT, "vm a: no"), errno.ENOENT, "vm a: no"),
        (HostError("fork", errno.EAGAIN), errno.EAGAIN, "fork: Resource temporarily unavailable"),
        (ValueError("embedded null byte"), errno.EINVAL, "embedded null byte"),
        (OSError(errno.EMFILE, "Too many open files"), errno.EMFILE, "Too many open files"),
    ],
)
def test_each_error_of_a_request_is_its_answer(
    parent: AnyParent, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], trouble: Exception,
    code: int, text: str,
) -> None:  # fmt: skip
    """What the host is short of is logged, too."""

    def fail(*_given: object) -> None:
        raise trouble

    monkeypatch.setattr(main, "SERVES", {StopRequest: (type(parent.life), fail)})
    hear(parent, Proc.CONTROL, StopRequest(name="a"), ROOT)
    assert parent.connections.told == [Failed(code=code, text=text)]
    assert (f"StopRequest: {text}" in capfd.readouterr().err) == isinstance(trouble, OSError)


def test_requests_that_no_room_gets(parent: AnyParent) -> None:
    """The longest name is served.  A client that was cut off gets no answer but one."""
    hear(parent, Proc.CONTROL, StopRequest(name="n" * NAME_MAX), ROOT)
    hear(parent, Proc.CONTROL, StopRequest(name="n" * (NAME_MAX + 1)), ROOT)
    parent.cut_off((Proc.CLIENT, ROOT))
    hear(parent, Proc.CONTROL, ListRequest(), ROOT)
    known, long, cut = parent.connections.told
    assert "too long" not in known.text
    assert (long.code, long.text) == (errno.EINVAL, f"vm name too long: {'n' * NAME_MAX}...")
    assert cut == Failed(code=errno.EIO, text=OUR_FAULT)


def test_a_request_that_is_not_served(parent: AnyParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one of a later vmctl."""
    monkeypatch.setattr(main, "SERVES", {})
    hear(parent, Proc.CONTROL, ListRequest(), ROOT)
    assert parent.connections.told == [Failed(code=errno.ENOSYS, text="this vmd does not serve ListRequest")]


def test_what_is_canceled_when_a_client_leaves(
    parent: AnyParent, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transfers and work on images, which only this client wanted, and its console."""
    monkeypatch.setattr(parent.consoles, "on_client_gone", calls.note("console"))
    monkeypatch.setattr(parent.transfers, "on_client_gone", calls.note("transfer"))
    monkeypatch.setattr(parent.snapshots, "on_client_gone", calls.note("images"))
    for vmid, what in enumerate(For, 1):
        parent.core.clients.wait(ROOT, what, vmid)
        parent.core.clients.wait(8, what, 100 + vmid)
    vmids = {what: vmid for vmid, what in enumerate(For, 1)}
    parent.forget_client(ROOT)
    assert calls.made[0] == ("console", ROOT)
    assert sorted(calls.made[1:]) == sorted([
        ("transfer", vmids[For.TRANSFER]), ("transfer", vmids[For.CARRYING]), ("images", vmids[For.IMAGES])
    ])  # fmt: skip


# --- unexpected exceptions in handlers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("proc", "message", "peerid", "source"),
    [
        (Proc.CONTROL, StopRequest(vmid=3), 9, (Proc.CLIENT, 9)),
        (Proc.OPENER, OpenerAt(what="x"), 9, (Proc.VM, 5)),
        (Proc.IMGWRITER, Ok(), 9, (Proc.VM, 6)),
        (Proc.VMM, PauseDone(vmid=3, paused=True), 9, (Proc.VM, 3)),
        (Proc.VMM, ConsoleSnapshotEnd(end=1), 9, (Proc.VM, 9)),
        (Proc.VMM, Ready(), 0, None),
        (Proc.PRIV, NetworkTrouble(vmid=3, device="x"), 9, (Proc.VM, 3)),
        (Proc.PRIV, Ready(), 9, None),
    ],
)
def test_whose_message_it_is(
    parent: AnyParent, calls: Calls, monkeypatch: pytest.MonkeyPatch, proc: Proc, message: Record, peerid: int,
    source: tuple[Proc, int] | None,
) -> None:  # fmt: skip
    """A failure of its handler counts for that client or VM, which is answered or given up."""
    monkeypatch.setattr(parent.openings, "vm_of", lambda _channel: 5)
    monkeypatch.setattr(parent.snapshots, "vm_of", lambda _channel: 6)
    monkeypatch.setattr(parent.life, "give_up", calls.note("give up"))
    envelope, channel = Envelope(message, peerid, 0, {}), Peer(proc)
    assert parent.source_of(envelope, channel) == source
    parent.give_up(envelope, channel)
    answers = [Failed(code=errno.EIO, text=OUR_FAULT)] if proc is Proc.CONTROL else []
    assert parent.connections.told == answers
    gives_up = source is not None and proc is not Proc.CONTROL
    assert calls.made == ([("give up", source[1], message)] if gives_up and source else [])


def test_a_vm_whose_messages_fail_too_often_is_killed(
    parent: AnyParent, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not run, or is not known any more, is left alone."""
    monkeypatch.setattr(parent.life, "kill", calls.note("kill"))
    vm: Vm = parent.core.vms.add(VmConfig(name="a"), from_config=True)
    parent.cut_off((Proc.VM, vm.vmid))
    parent.cut_off((Proc.VM, 99))
    assert calls.made == []
    vm.restore_state(State.RUNNING)
    parent.cut_off((Proc.VM, vm.vmid))
    assert calls.made == [("kill", vm)]
    assert parent.core.clients.cut_off == set()


def test_messages_for_an_earlier_parent_are_dropped(
    parent: AnyParent, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    """Only those of a vmm can be."""
    monkeypatch.setattr(parent.adoption, "is_stale", lambda _message, _channel: True)
    monkeypatch.setattr(Parent, "HANDLERS", {
        (Proc.VMM, PauseDone): calls.note("vmm"), (Proc.PRIV, NetworkTrouble): calls.note("priv")
    })  # fmt: skip
    stale, fresh = PauseDone(vmid=3, paused=True), NetworkTrouble(vmid=3, device="x")
    parent.dispatch(Peer(Proc.VMM), Envelope(stale, 0, 0, {}))
    assert calls.made == []
    parent.dispatch(Peer(Proc.PRIV), Envelope(fresh, 0, 0, {}))
    assert [call[0] for call in calls.made] == ["priv"]
