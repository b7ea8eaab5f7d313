"""Who has locked a file: one process for each question, which may be silent, and which never blocks the daemon."""

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from vmd.fileid import FileId
from vmd.ipc.holdermsg import FD_ANSWER, FD_PROC, Holder, pack
from vmd.ipc.loop import Timer
from vmd.parent.holders import ANSWER_S, AT_A_TIME, GONE_S, Holders, in_words

FILE = FileId(device=8, inode=4711)
ANSWER = pack(77, 1000, b"qemu")
FOUND = Holder(pid=77, uid=1000, program="qemu")


class Child:
    """A lockholder.  `answer` is the writing end of its pipe."""

    def __init__(self, answer: int) -> None:
        self.answer = os.dup(answer)
        self.killed = self.ended = False
        self.reaped = 0

    def say(self, answer: bytes) -> None:
        """Answer, and end."""
        os.write(self.answer, answer)
        self.hang_up()

    def hang_up(self) -> None:
        """End."""
        if self.answer >= 0:
            os.close(self.answer)
            self.answer = -1

    def kill(self) -> None:
        """Be killed."""
        self.killed = True

    def reap(self) -> int | None:
        """Be reaped."""
        self.reaped += 1
        return 0 if self.ended else None


class Rig:
    """The room, on a loop that the test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: dict[int, Callable[[int], None]] = {}
        self.timers: list[tuple[float, Timer]] = []
        self.children: list[Child] = []
        self.arguments: list[list[str]] = []
        self.trouble: OSError | None = None
        self.answers: list[Holder | None] = []
        self.holders = Holders(cast("Any", self), None, self.open_log)
        monkeypatch.setattr("vmd.parent.holders.spawn", self.spawn)

    def add(self, fd: int, on_ready: Callable[[int], None]) -> None:
        """Replaces the loop's."""
        self.files[fd] = on_ready

    def remove(self, fd: int) -> None:
        """Replaces the loop's."""
        del self.files[fd]

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Replaces the loop's."""
        timer = Timer(delay_s, callback)
        self.timers.append((delay_s, timer))
        return timer

    def open_log(self, _title: str) -> socket.socket:
        """Return a socket for log lines."""
        reader, writer = socket.socketpair()
        reader.close()
        return writer

    def spawn(self, _title: str, arguments: list[str], *, fds: dict[int, int], **_more: object) -> Child:
        """Replaces `spawn`."""
        if self.trouble is not None:
            raise self.trouble
        assert os.readlink(f"/proc/self/fd/{fds[FD_PROC]}") == "/proc"
        self.arguments.append(arguments)
        self.children.append(Child(fds[FD_ANSWER]))
        return self.children[-1]

    def ask(self, *marks: int) -> None:
        """Ask for the holder of a file."""
        self.holders.ask(FILE, marks, self.answers.append)

    def ready(self) -> None:
        """Let the answers arrive."""
        for on_ready in list(self.files.values()):
            on_ready(1)

    def fire(self, delay_s: float) -> None:
        """Run the timers of this delay."""
        for each, timer in list(self.timers):
            if each == delay_s and timer.callback is not None:
                callback, timer.callback = timer.callback, None
                callback()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Give the room.  No descriptor is left."""
    before = open_descriptors()
    rig = Rig(monkeypatch)
    yield rig
    for child in rig.children:
        child.hang_up()
    assert rig.files == {}
    assert open_descriptors() == before


@pytest.mark.parametrize(("marks", "words"), [((), ["8", "4711"]), ((100, 201), ["8", "4711", "100", "201"])])
def test_the_process_that_has_a_lock(rig: Rig, marks: tuple[int, ...], words: list[str]) -> None:
    """The lockholder is ended, and reaped when it has ended."""
    rig.ask(*marks)
    (child,) = rig.children
    assert (rig.arguments, rig.answers) == ([words], [])
    child.say(ANSWER)
    rig.ready()
    rig.fire(ANSWER_S)

    assert (rig.answers, child.killed) == ([FOUND], True)
    assert (rig.holders.at_work, rig.holders.ending) == ([], cast("Any", [child]))
    child.ended = True
    rig.fire(GONE_S)
    assert rig.holders.ending == []


@pytest.mark.parametrize("answer", [b"", ANSWER[:-1], ANSWER + b"x"])
def test_no_answer_names_no_process(rig: Rig, answer: bytes) -> None:
    """A malformed one neither."""
    rig.ask()
    rig.children[0].say(answer)
    rig.ready()
    assert rig.answers == [None]


def test_a_lockholder_that_is_silent(rig: Rig) -> None:
    """The client is not kept waiting, and the process is killed.  It is reaped however late it ends."""
    rig.ask()
    rig.fire(ANSWER_S)
    (child,) = rig.children
    assert (rig.answers, child.killed) == ([None], True)
    rig.fire(GONE_S)
    assert rig.holders.ending == cast("Any", [child])
    child.ended = True
    rig.ask()
    assert rig.holders.ending == []
    rig.fire(ANSWER_S)


def test_questions_at_a_time(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """One more gets no answer, but not before its question has been asked."""
    for _ in range(AT_A_TIME + 1):
        rig.ask()
    assert (len(rig.children), rig.answers) == (AT_A_TIME, [])
    rig.fire(0)
    assert rig.answers == [None]
    assert f"{AT_A_TIME} processes lockholder are running already" in capfd.readouterr().err
    for child in rig.children:
        child.say(ANSWER)
    rig.ready()
    assert rig.answers == [None, *[FOUND] * AT_A_TIME]


def test_a_lockholder_that_cannot_be_started(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is left of it."""
    rig.trouble = OSError(11, "Resource temporarily unavailable")
    rig.ask()
    rig.fire(0)
    assert (rig.answers, rig.holders.at_work) == ([None], [])
    assert "cannot find out who uses a file" in capfd.readouterr().err


def test_only_root_is_told_the_pid() -> None:
    """Processes of other users are nobody's business."""
    assert in_words(FOUND.replace(uid=0), 0) == '"qemu" (pid 77, user root)'
    assert in_words(FOUND.replace(uid=0), 1000) == '"qemu" (user root)'
