"""Dispatch of messages, and what an unexpected exception costs whom."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from vmd.errors import PeerError
from vmd.ipc import fence as fence_module
from vmd.ipc import process as process_module
from vmd.ipc.fence import SOURCES_MAX, STRIKES, STRIKES_S, Fence, traceback
from vmd.ipc.imsg import Envelope
from vmd.ipc.logpair import logpair
from vmd.ipc.messages.children import Quit, SetVerbosity
from vmd.ipc.messages.priv import AskDrops, RemoveNics
from vmd.ipc.process import CORE, Process, handles
from vmd.ipc.rights import FD, fds_of, refuse_files, rights_of
from vmd.ipc.routes import Proc
from vmd.log import log


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of the log."""
    lines: list[str] = []
    for name in ("crit", "error", "warn"):
        monkeypatch.setattr(log, name, lines.append)
    return lines


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of fences, in one element."""
    found = [1000.0]
    monkeypatch.setattr(fence_module.time, "monotonic", lambda: found[0])  # type: ignore[attr-defined]
    return found


class Served(Process):
    """A process that serves some messages, one of them badly."""

    def __init__(self, me: Proc) -> None:
        super().__init__(me)
        self.served: list[object] = []
        self.given_up: list[object] = []
        self.ended: list[object] = []

    def on_quit(self, message: Quit, _envelope: Envelope, _channel: Any) -> None:  # noqa: ANN401 - none here
        """Serve it."""
        self.served.append(message)

    def on_ask(self, _message: AskDrops, _envelope: Envelope, _channel: Any) -> None:  # noqa: ANN401
        """Fail unexpectedly."""
        raise KeyError("a bug")

    def on_remove(self, _message: RemoveNics, _envelope: Envelope, _channel: Any) -> None:  # noqa: ANN401
        """Refuse it."""
        raise PeerError("parent", "not now")

    def give_up(self, envelope: Envelope, _channel: Any) -> None:  # noqa: ANN401
        """Answer."""
        self.given_up.append(envelope.message)

    def cut_off(self, source: Any) -> None:  # noqa: ANN401
        """End it."""
        self.ended.append(source)

    HANDLERS = {
        **handles(Proc.PARENT, Quit, on_quit),
        **handles(Proc.PARENT, AskDrops, on_ask),
        **handles(Proc.PARENT, RemoveNics, on_remove),
    }


def sent(process: Process, message: Any) -> None:  # noqa: ANN401
    """Dispatch a message of the parent."""
    channel: Any = type("", (), {"peer": Proc.PARENT, "label": "parent"})()
    process.dispatch(channel, Envelope(message, 0, 0, {}))


@pytest.fixture
def core() -> Iterator[Served]:
    """A process that all guests depend on."""
    made = Served(Proc.PRIV)
    yield made
    made.loop.close()


def test_messages_are_dispatched(core: Served, said: list[str]) -> None:
    """One that nothing serves is dropped.  One that breaks the protocol is the channel's business."""
    sent(core, Quit())
    assert core.served == [Quit()]
    sent(core, SetVerbosity(verbosity=1))
    assert said == ["parent: SetVerbosity is dropped: nothing here serves it"]
    with pytest.raises(PeerError, match="not now"):
        sent(core, RemoveNics(vmid=3))
    assert (core.given_up, core.exit_status) == ([], 0)


def test_a_core_process_survives_a_bug(core: Served, said: list[str]) -> None:
    """The sender is answered, and a VM that causes it again and again is ended."""
    for count in range(1, STRIKES + 1):
        sent(core, AskDrops(vmid=3))
        assert len(core.given_up) == count
        assert core.ended == ([(Proc.VM, 3)] if count == STRIKES else [])
    assert said[0] == "unexpected error in AskDrops of parent: KeyError: 'a bug'"
    core.given_up.clear()
    for _ in range(2 * STRIKES):
        sent(core, AskDrops(vmid=0))  # nobody's
    assert len(core.ended) == 1
    assert len(core.given_up) == 2 * STRIKES


@pytest.mark.parametrize("me", Proc)
def test_which_processes_have_a_fence(me: Proc) -> None:
    """All guests depend on these.  Another one ends by a bug."""
    process = Served(me)
    assert (process.loop.fence is not None) is (me in CORE)
    if me not in CORE:
        with pytest.raises(KeyError):
            sent(process, AskDrops(vmid=3))
    process.loop.close()
    assert set(CORE) == {Proc.PARENT, Proc.CONTROL, Proc.VMM, Proc.PRIV}


@pytest.mark.parametrize(("error", "status"), [(None, 0), (PeerError("parent", "is odd"), 1)])
def test_a_process_ends_with_its_parent(
    core: Served, said: list[str], monkeypatch: pytest.MonkeyPatch, error: PeerError | None, status: int
) -> None:
    """If the parent has broken the protocol, the log and the status say so."""
    stopped: list[int] = []
    monkeypatch.setattr(core.loop, "stop", lambda: stopped.append(1))
    core.on_parent_lost(None, error)  # type: ignore[arg-type]
    assert (core.exit_status, stopped, said) == (status, [1], [str(error)] if error else [])


def test_the_channel_to_the_parent_is_not_passed_on(core: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that a process starts must not speak for it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    fd = theirs.detach()
    monkeypatch.setattr(process_module, "CHANNEL_FD", fd)
    channel = core.attach_parent(Proc.PARENT)
    assert channel.label == "parent"
    with socket.socket(fileno=fd) as again:
        assert not again.get_inheritable()
        again.detach()
    channel.close()
    ours.close()


# --- fences --------------------------------------------------------------------------------------------------


def test_only_exceptions_in_a_short_time_count(said: list[str], now: list[float]) -> None:
    """And only those of the same source."""
    ended: list[object] = []
    fence = Fence(ended.append)
    for source in ((Proc.VM, 1), (Proc.VM, 2), (Proc.CLIENT, 1)):
        for _ in range(STRIKES - 1):
            fence.strike(source)
    fence.strike(None)
    now[0] += STRIKES_S
    fence.strike((Proc.VM, 1))
    assert ended == []
    fence.strike((Proc.VM, 1))
    fence.strike((Proc.VM, 1))
    assert ended == [(Proc.VM, 1)]
    assert said == [f"vm 1 is cut off after {STRIKES} unexpected errors within 60 s"]


def test_so_many_sources_are_remembered(now: list[float]) -> None:
    """The one that was quiet for longest is forgotten."""
    ended: list[object] = []
    fence = Fence(ended.append)
    for number in range(SOURCES_MAX + 1):
        for _ in range(STRIKES - 1):
            fence.strike((Proc.CLIENT, number))
    fence.strike((Proc.CLIENT, 0))
    assert ended == []
    fence.strike((Proc.CLIENT, 2))
    assert ended == [(Proc.CLIENT, 2)]
    assert now


def test_a_failing_cut_is_no_end(said: list[str]) -> None:
    """It is logged."""

    def fail(_source: object) -> None:
        raise KeyError("another bug")

    fence = Fence(fail)
    for _ in range(STRIKES):
        fence.strike((Proc.VM, 1))
    assert "unexpected error in cutting off vm 1: KeyError: 'another bug'" in said
    assert fence.run("it", lambda: None)
    assert not fence.run("it", lambda: fail(None))


def test_tracebacks_are_limited(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """How many were not shown is said once."""
    monkeypatch.setattr(fence_module, "traceback", lambda _error: ["place"])
    fence = Fence(lambda _source: None)
    fence._told.tokens, fence._told.interval_s = 2.0, 1e9
    for _ in range(5):
        fence.report("it", KeyError("x"))
    assert said == ["unexpected error in it: KeyError: 'x'", "  place"] * 2
    for _ in range(2):
        fence._told.tokens = 1.0
        fence.report("it", KeyError("x"))
    assert said[4:] == [
        "unexpected error in it: KeyError: 'x'", "  place", "  (3 more not shown)",
        "unexpected error in it: KeyError: 'x'", "  place",
    ]  # fmt: skip


def fails(how: str) -> None:
    """Raise an exception that has another one as its cause, or came while it was handled."""
    try:
        raise KeyError("first")
    except KeyError as error:
        if how == "cause":
            raise ValueError("second") from error
        if how == "none":
            raise ValueError("second") from None
        raise ValueError("second")  # noqa: B904 - without a cause


@pytest.mark.parametrize(("how", "first"), [("cause", True), ("context", True), ("none", False)])
def test_a_traceback_has_the_causes_first(how: str, first: bool) -> None:
    """The innermost place is last."""
    try:
        fails(how)
    except ValueError as error:
        lines = traceback(error)
    assert [line for line in lines if line.endswith("; then")] == (["KeyError: 'first'; then"] if first else [])
    places = [line.rpartition(":")[0] + line[line.rindex(" in") :] for line in lines if " in " in line]
    here = "ipc/test_process.py in "
    own = [f"{here}fails"] if first else []
    assert places == [*own, f"{here}test_a_traceback_has_the_causes_first", f"{here}fails"]


# --- sockets -------------------------------------------------------------------------------------------------


def test_a_writer_of_the_log_never_waits() -> None:
    """Neither does the reader, which hears which process has written."""
    reader, writer = logpair()
    with reader, writer:
        assert not os.get_blocking(reader.fileno())
        assert not os.get_blocking(writer.fileno())
        assert reader.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)


def test_descriptors_beside_a_packet() -> None:
    """Other ancillary data is left out, and half of a number is none."""
    raw = FD.pack(5) + FD.pack(6)
    assert rights_of([5, 6]) == [(socket.SOL_SOCKET, socket.SCM_RIGHTS, raw)]
    assert rights_of([]) == []
    found = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, bytes(12)), (socket.SOL_SOCKET, socket.SCM_RIGHTS, raw + b"x")]
    assert fds_of(found) == [5, 6]


def test_a_kernel_may_refuse_descriptors() -> None:
    """One that cannot is no error."""
    options: list[tuple[int, ...]] = []
    sock: Any = type("", (), {"setsockopt": lambda _self, *given: options.append(given)})()
    refuse_files(sock)
    assert options == [(socket.SOL_SOCKET, 83, 0)]

    def fail(*_: object) -> None:
        raise OSError(92, "no")

    sock.setsockopt = fail
    refuse_files(sock)
