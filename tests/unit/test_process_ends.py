"""Each process of the daemon is confined before it serves anybody, answers the parent's watchdog, and ends
when it is told to, or with the parent.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.inprocess import End
from vmd.agentx.main import Agentx
from vmd.consolelog.main import ConsoleLogger
from vmd.control.main import Control
from vmd.imgwriter.main import ImgWriter
from vmd.ipc import process as processes
from vmd.ipc.channel import socketpair
from vmd.ipc.imsg import MAX_MESSAGE, decode
from vmd.ipc.loop import Loop
from vmd.ipc.messages.children import Ping, Pong, Quit, Ready
from vmd.ipc.process import Process
from vmd.ipc.routes import Proc
from vmd.logger.main import Logger
from vmd.metrics.main import Metrics
from vmd.opener.main import Opener
from vmd.vmm.main import Vmm

WATCHDOG_S = 60.0
ALL = (Agentx, ConsoleLogger, Control, ImgWriter, Logger, Metrics, Opener, Vmm)
SERVED = {each: {cls for peer, cls in each.HANDLERS if peer is Proc.PARENT} for each in ALL}


class Rig:
    """A process, and the parent's end of its channel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> None:
        ours, theirs = socketpair()
        monkeypatch.setattr(processes, "CHANNEL_FD", theirs.detach())
        self.process: Any = make()
        self.parent = End(self.process.loop, ours, Proc.PARENT, self.process.me)

    def runs_on(self) -> bool:
        """Run the process for a few rounds of its loop; return whether it has not ended by itself."""
        loop, left = self.process.loop, [8]

        def next_round() -> None:
            left[0] -= 1
            if left[0]:
                loop.call_later(0, next_round)
            else:
                loop.stop()

        loop.call_later(0, next_round)
        loop.run()
        return not left[0]

    def ends(self) -> bool:
        """Run the process to its end.  Return False if that does not come."""
        late: list[bool] = []

        def give_up() -> None:
            late.append(True)
            self.process.loop.stop()

        self.process.loop.call_later(WATCHDOG_S, give_up)
        self.process.loop.run()
        return not late

    def close(self) -> None:
        """Close everything."""
        self.parent.close()
        self.process.parent.close()
        self.process.loop.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # vmm reaps its children


@pytest.mark.parametrize("make", [each for each in ALL if Ping in SERVED[each]])
def test_a_process_that_works_answers_the_watchdog(monkeypatch: pytest.MonkeyPatch, make: type[Process]) -> None:
    """Each Ping is answered once."""
    rig = Rig(monkeypatch, make)
    for _ in range(2):
        rig.parent.send(Ping())
        assert rig.runs_on()
    assert [envelope.message for envelope in rig.parent.got] == [Pong(), Pong()]
    rig.close()


@pytest.mark.parametrize("make", [each for each in ALL if Quit in SERVED[each]])
def test_a_process_ends_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch, make: type[Process]) -> None:
    """And not before."""
    rig = Rig(monkeypatch, make)
    assert rig.runs_on()
    rig.parent.send(Quit())
    assert rig.ends()
    assert rig.process.exit_status == 0
    rig.close()


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(("garbage", "status"), [(b"", 0), (b"x", 1)])
def test_a_process_ends_with_its_parent(
    monkeypatch: pytest.MonkeyPatch, make: type[Process], garbage: bytes, status: int
) -> None:
    """Also if that sends garbage, which is a failure."""
    rig = Rig(monkeypatch, make)
    if garbage:
        rig.parent.channel._sock.send(garbage)
    else:
        rig.parent.channel.close()
    assert rig.ends()
    assert rig.process.exit_status == status
    rig.close()


@pytest.mark.parametrize("make", ALL)
def test_the_steps_of_a_start(monkeypatch: pytest.MonkeyPatch, make: type[Process]) -> None:
    """Signals of a terminal are for the parent only.  A process is confined before it serves the first message."""
    module: Any = importlib.import_module(make.__module__)
    ours, theirs = socketpair()
    monkeypatch.setattr(processes, "CHANNEL_FD", theirs.detach())
    steps: list[str] = []

    def confine(_confinement: object) -> list[str]:
        steps.append("confined")
        return ["this kernel lacks something"]

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(Process, "ignore_terminal_signals", lambda _self: steps.append("ignores signals"))
    monkeypatch.setattr(module, "confine", confine)
    monkeypatch.setattr(Loop, "run", lambda _self: steps.append("runs"))
    monkeypatch.setattr(os, "_exit", end)
    for name, step in (("end_all", "ends its children"), ("set_title", ""), ("limit_memory", "limits its memory")):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *_, step=step: steps.append(step))
    if hasattr(make, "finish"):
        monkeypatch.setattr(make, "finish", lambda _self: steps.append("writes the rest"))
        monkeypatch.setattr(module, "Sink", lambda *_: steps.append("begins to write"), raising=False)
    if make is Logger:
        monkeypatch.setattr(module, "has_journal", lambda: False)
    made: list[Any] = []
    init = Process.__init__

    def note(self: Process, me: Proc) -> None:
        made.append(self)
        init(self, me)

    monkeypatch.setattr(Process, "__init__", note)
    with pytest.raises(SystemExit) as ended:
        sys.exit(module.main())
    assert ended.value.code == 0
    expected = ["ignores signals", "confined"]
    expected += ["begins to write"] if make is Logger else []
    expected += ["runs", *(["writes the rest"] if hasattr(make, "finish") else [])]
    expected += ["ends its children"] if make is Vmm else []
    assert [step for step in steps if step not in ("", "limits its memory")] == expected
    assert ("limits its memory" in steps[: steps.index("runs")]) == hasattr(module, "limit_memory")
    ours.setblocking(False)
    if make in (Control, Vmm):
        assert decode(ours.recv(MAX_MESSAGE), [], "it").message == Ready(warnings=("this kernel lacks something",))
    ours.close()
    (process,) = made
    process.parent.close()
    process.loop.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
