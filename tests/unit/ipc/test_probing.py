"""Questions to a probe and its answers, which go over a socket with the files that they are about."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.descriptors import open_descriptors
from vmd.ipc import probing
from vmd.ipc.probemsg import ANSWER_MAX

DEADLINE_S = 60.0
Answer = Callable[[list[str], list[int]], bytes]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The asker's end and the probe's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], socket.socket]]:
    """A function that starts a probe on a thread and returns the asker's end.  The probe must return 0 at the end."""
    with contextlib.ExitStack() as stack:

        def start(answer: Answer) -> socket.socket:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            monkeypatch.setattr(probing, "CHANNEL_FD", theirs.detach())
            results: list[int] = []
            thread = threading.Thread(target=lambda: results.append(probing.serve(answer)))
            thread.start()

            def end() -> None:
                ours.close()
                thread.join(DEADLINE_S)
                assert results == [0]

            stack.callback(end)
            return ours

        yield start


def test_arguments_and_files_arrive(serve: Callable[[Answer], socket.socket]) -> None:
    """Question by question, also with bytes that are no UTF-8.  The probe closes its copies after each answer."""
    file = os.memfd_create("image")
    inode = os.fstat(file).st_ino
    asked: list[list[str]] = []
    kept: list[int] = []

    def answer(arguments: list[str], files: list[int]) -> bytes:
        assert [os.fstat(fd).st_ino for fd in files] == [inode] * len(files)
        asked.append(arguments)
        kept.append(len(open_descriptors()) - len(files))
        return b"answer %d" % len(files)

    sock = serve(answer)
    for number, arguments in enumerate((["a", ""], [], ["/dir/\udcff", "x" * 30000])):
        assert probing.ask(sock, arguments, [file] * number, DEADLINE_S) == b"answer %d" % number
    assert asked == [["a", ""], [""], ["/dir/\udcff", "x" * 30000]]
    assert kept == [kept[0]] * 3
    os.close(file)


def test_a_probe_whose_asker_has_gone_ends(serve: Callable[[Answer], socket.socket]) -> None:
    """Also if it was about to answer."""
    sock: list[socket.socket] = []
    begun = threading.Event()

    def answer(_arguments: list[str], _files: list[int]) -> bytes:
        assert begun.wait(DEADLINE_S)
        sock[0].close()
        return b"too late"

    sock.append(serve(answer))
    probing.send_question(sock[0], ["a"], [])
    begun.set()


def test_a_probe_that_has_ended(ends: tuple[socket.socket, socket.socket]) -> None:
    """It gives an empty answer, whether it ended before or after the question."""
    ours, theirs = ends
    probing.send_question(ours, ["a"], [])
    theirs.close()
    assert probing.wait_for_answer(ours, DEADLINE_S) == b""
    assert probing.ask(ours, ["a"], [], DEADLINE_S) == b""
    assert probing.wait_patiently(ours, DEADLINE_S, lambda: None) == b""


def test_a_probe_that_takes_its_time(ends: tuple[socket.socket, socket.socket]) -> None:
    """There is no answer yet, and one later."""
    ours, theirs = ends
    assert probing.ask(ours, ["a"], [], 0) is None
    theirs.send(b"x" * ANSWER_MAX)
    assert probing.wait_for_answer(ours, 0) == b"x" * ANSWER_MAX


def test_somebody_who_waits_goes_on_meanwhile(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each look, until there is the answer, or until it has taken too long."""
    ours, theirs = ends
    monkeypatch.setattr(probing, "LOOK_S", 0.0)
    looks: list[int] = []

    def go_on() -> None:
        looks.append(1)
        if len(looks) == 3:
            theirs.send(b"answer")

    assert probing.wait_patiently(ours, DEADLINE_S, go_on) == b"answer"
    assert len(looks) == 3
    with pytest.raises(TimeoutError):
        probing.wait_patiently(ours, 0.0, go_on)
    assert len(looks) == 3


def test_somebody_waits_until_the_end_of_their_time(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look begins as long as any time is left."""
    monkeypatch.setattr(probing, "LOOK_S", 0.0)
    now_s = iter((100.0, 100.5, 100.99, 101.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now_s))
    looks: list[int] = []

    with pytest.raises(TimeoutError):
        probing.wait_patiently(ends[0], 1.0, lambda: looks.append(1))
    assert len(looks) == 2
