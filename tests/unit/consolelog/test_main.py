"""How the keepers of console logs are started, looked after and ended."""

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.support.descriptors import open_descriptors
from vmd.backlog import Backlog
from vmd.consolelog import main as main_module
from vmd.consolelog.keeper import State
from vmd.consolelog.main import LAST_WORDS_S, LOOK_AGAIN_S, LOOK_S, ConsoleLogger
from vmd.errors import HostError
from vmd.ipc import process as process_module
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.consolelog import ConsoleFile, ConsoleKept, DropConsole, KeepConsole
from vmd.record import Record


class Keeper:
    """A keeper without a thread."""

    made: "list[Keeper]" = []  # emptied by the fixture
    error: Exception | None = None

    def __init__(self, name: str, backlog: Backlog, report: Callable[[State], None], _call: object) -> None:
        if Keeper.error is not None:
            raise Keeper.error
        self.name = name
        self.backlog = backlog
        self.report = report
        self.prints = False
        self.looks = 0
        self.files: list[tuple[bool, int]] = []
        self.ending = self.ended = False
        Keeper.made.append(self)

    def look(self) -> bool:
        """Return whether there is output."""
        self.looks += 1
        return self.prints

    def take_file(self, sock: socket.socket | None, size_bytes: int) -> None:
        """Take a file, or another limit."""
        self.files.append((sock is not None, size_bytes))
        if sock is not None:
            sock.close()

    def end(self) -> None:
        """Take note of the end."""
        self.ending = True


class Rig:
    """The process, which is not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        monkeypatch.setattr(process_module, "CHANNEL_FD", theirs.detach())
        self.logger = ConsoleLogger()
        self.logger.parent.close()
        ours.close()
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.said: list[Record] = []
        monkeypatch.setattr(self.logger, "parent", self)
        monkeypatch.setattr(self.logger.loop, "call_later", lambda s, call: self.timers.append((s, call)))
        monkeypatch.setattr(main_module, "Keeper", Keeper)

    def send(self, message: Record) -> None:
        """Take a message to the parent."""
        self.said.append(message)

    def keep(self, number: int) -> None:
        """Begin a log."""
        made = Backlog.create(0)
        message = KeepConsole(number=number, name=f"vm{number}")
        self.logger.on_keep(message, Envelope(message, 0, 0, {"shown": [os.dup(made.fd)]}), None)  # type: ignore[arg-type]
        made.close()

    def tell(self, message: ConsoleFile | DropConsole, **fds: int) -> None:
        """Send a message of the parent."""
        envelope = Envelope(message, 0, 0, {name: [fd] for name, fd in fds.items()})
        if isinstance(message, ConsoleFile):
            self.logger.on_file(message, envelope, None)  # type: ignore[arg-type]
        else:
            self.logger.on_drop(message, envelope, None)  # type: ignore[arg-type]

    def look(self) -> float:
        """Let the timer expire; return the delay of the next one."""
        ((_, look),) = self.timers
        self.timers.clear()
        look()
        return self.timers[0][0] if self.timers else 0.0


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """The process, which is not run."""
    Keeper.made.clear()
    made = Rig(monkeypatch)
    yield made
    Keeper.error = None
    for keeper in made.logger.keepers.values():
        keeper.backlog.close()
    made.logger.loop.close()


def test_all_logs_are_looked_at_together(rig: Rig) -> None:
    """Sooner while a guest prints; not at all without logs."""
    for number in (1, 2):
        rig.keep(number)
    assert [delay_s for delay_s, _ in rig.timers] == [LOOK_S]
    assert rig.look() == LOOK_S
    Keeper.made[1].prints = True
    assert rig.look() == LOOK_AGAIN_S
    assert [keeper.looks for keeper in Keeper.made] == [2, 2]

    for keeper in Keeper.made:
        keeper.report(State(ended=True))
    assert rig.look() == 0.0
    rig.keep(3)
    assert [delay_s for delay_s, _ in rig.timers] == [LOOK_S]


def test_each_log_has_its_own_reports(rig: Rig) -> None:
    """The parent knows a log by its number.  When it has ended, its backlog is closed."""
    before = open_descriptors()
    for number in (1, 2):
        rig.keep(number)
    Keeper.made[1].report(State("full", 7, files=2, wants_file=True))
    Keeper.made[0].report(State(ended=True))
    Keeper.made[1].report(State(ended=True))

    assert rig.said == [
        ConsoleKept(number=2, text="full", lost=7, files=2, wants_file=True),
        ConsoleKept(number=1, ended=True),
        ConsoleKept(number=2, ended=True),
    ]
    assert rig.logger.keepers == {}
    Keeper.made.clear()
    assert open_descriptors() == before


@pytest.mark.parametrize("error", [HostError("start keeper", 11), OSError(12, "no memory"), ValueError("odd")])
def test_a_log_that_cannot_begin_has_ended(rig: Rig, error: Exception) -> None:
    """The parent hears why; other logs go on.  Its backlog is closed."""
    before = open_descriptors()
    Keeper.error = error
    rig.keep(1)
    assert open_descriptors() == before

    (said,) = rig.said
    assert isinstance(said, ConsoleKept)
    assert (said.number, said.ended, bool(said.text)) == (1, True, True)
    assert (rig.logger.keepers, rig.timers) == ({}, [])


def test_files_and_ends_go_to_their_log(rig: Rig) -> None:
    """A message about a log that has ended meanwhile has no effect."""
    for number in (1, 2):
        rig.keep(number)
    ours, theirs = socket.socketpair()

    rig.tell(ConsoleFile(number=2, size_bytes=5), courier=theirs.detach())
    rig.tell(ConsoleFile(number=2, size_bytes=6))
    rig.tell(ConsoleFile(number=3, size_bytes=7))
    rig.tell(DropConsole(number=1))
    rig.tell(DropConsole(number=3))

    assert [keeper.files for keeper in Keeper.made] == [[], [(True, 5), (False, 6)]]
    assert [keeper.ending for keeper in Keeper.made] == [True, False]
    assert ours.recv(1) == b""
    ours.close()


def test_the_rest_of_all_logs_is_written_at_the_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that does not answer keeps the process only for a while."""
    for number in (1, 2):
        rig.keep(number)
    now, slept = [1000.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += 0.5
        Keeper.made[0].ended = True

    monkeypatch.setattr("vmd.consolelog.main.time.monotonic", lambda: now[0])
    monkeypatch.setattr("vmd.consolelog.main.time.sleep", sleep)

    rig.logger.finish()
    assert all(keeper.ending for keeper in Keeper.made)
    assert now[0] == 1000.0 + LAST_WORDS_S
    Keeper.made[1].ended = True
    slept.clear()
    rig.logger.finish()

    assert slept == []
