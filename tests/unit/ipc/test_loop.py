"""The event loop: order of timers, removal during a round, calls from threads, signals."""

import os
import select
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from vmd.ipc.fence import STRIKES, Fence
from vmd.ipc.loop import REST_S, Loop
from vmd.ipc.routes import Proc

if TYPE_CHECKING:
    from vmd.ipc.fence import Source


def test_timers_run_in_order_and_can_be_cancelled() -> None:
    """Timers run in the order of their times, not in the order in which they were made."""
    loop = Loop()
    seen: list[str] = []
    loop.call_later(0.02, lambda: seen.append("second"))
    loop.call_later(0.01, lambda: seen.append("first"))
    loop.call_later(0.015, lambda: seen.append("never")).cancel()
    loop.call_later(0.03, loop.stop)

    loop.run()

    assert seen == ["first", "second"]
    loop.close()


def test_a_callback_removed_in_the_same_round_is_not_called() -> None:
    """Two descriptors are ready, and the first callback removes the other."""
    loop = Loop()
    pipes = [os.pipe(), os.pipe()]
    calls: list[int] = []

    def ready(mine: int, other: int) -> None:
        calls.append(mine)
        loop.remove(other)
        loop.stop()

    loop.add(pipes[0][0], lambda _events: ready(pipes[0][0], pipes[1][0]))
    loop.add(pipes[1][0], lambda _events: ready(pipes[1][0], pipes[0][0]))
    for _, writer in pipes:
        os.write(writer, b"x")

    loop.run()

    assert len(calls) == 1
    loop.close()
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


def test_an_event_of_a_closed_descriptor_is_not_given_to_a_new_one_of_the_same_number() -> None:
    """Two descriptors are ready.  The first callback closes the other, and a silent pipe gets its number."""
    loop = Loop()
    pipes = [os.pipe(), os.pipe()]
    silent = os.pipe()
    calls: list[int] = []
    strays: list[int] = []

    def ready(mine: int, other: int) -> None:
        calls.append(mine)
        loop.remove(mine)
        loop.remove(other)
        os.dup2(silent[0], other)
        loop.add(other, strays.append)
        loop.call_later(0, loop.stop)  # at the next round

    loop.add(pipes[0][0], lambda _events: ready(pipes[0][0], pipes[1][0]))
    loop.add(pipes[1][0], lambda _events: ready(pipes[1][0], pipes[0][0]))
    for _, writer in pipes:
        os.write(writer, b"x")

    loop.run()

    assert len(calls) == 1
    assert strays == []
    loop.close()
    for pipe in (*pipes, silent):
        for fd in pipe:
            os.close(fd)


def test_a_descriptor_added_in_a_round_is_served_in_the_next() -> None:
    """It is served although it was ready before it was added."""
    loop = Loop()
    pipes = [os.pipe(), os.pipe()]
    calls: list[int] = []

    def first(_events: int) -> None:
        loop.remove(pipes[0][0])
        loop.add(pipes[1][0], second)

    def second(events: int) -> None:
        calls.append(events)
        loop.stop()

    loop.add(pipes[0][0], first)
    for _, writer in pipes:
        os.write(writer, b"x")

    loop.run()

    assert calls == [select.EPOLLIN]
    loop.close()
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


def test_calls_from_threads_run_in_the_loop() -> None:
    """A call that another thread requests runs on the loop's thread."""
    loop = Loop()
    where: list[int] = []

    def call() -> None:
        where.append(threading.get_ident())
        loop.stop()

    thread = threading.Thread(target=loop.call_from_thread, args=(call,))
    thread.start()
    loop.run()
    thread.join()

    assert where == [threading.get_ident()]
    loop.close()


def test_signals_are_handled_in_the_loop() -> None:
    """A signal becomes one call by the loop."""
    loop = Loop()
    old = signal.getsignal(signal.SIGUSR2)
    seen: list[int] = []

    def on_signal() -> None:
        seen.append(1)
        loop.stop()

    loop.on_signal(signal.SIGUSR2, on_signal)
    os.kill(os.getpid(), signal.SIGUSR2)
    loop.run()

    assert seen == [1]
    loop.close()
    signal.signal(signal.SIGUSR2, old)


def test_an_exception_ends_the_loop_without_a_fence() -> None:
    """An example is a VM process, whose end affects no other VM."""
    loop = Loop()
    loop.call_later(0, fails_at_once)

    with pytest.raises(KeyError):
        loop.run()

    loop.close()


def test_behind_a_fence_the_loop_continues(capfd: pytest.CaptureFixture[str]) -> None:
    """It continues after failing callbacks of timers and descriptors.

    A failing descriptor rests, so the loop does not spin.
    """
    loop = Loop()
    cut_off: list[Source] = []
    loop.fence = Fence(cut_off.append)
    reader, writer = os.pipe()
    os.write(writer, b"x")
    calls: list[int] = []

    def fails(events: int) -> None:
        calls.append(events)
        if len(calls) == 3:
            os.read(reader, 1)
            loop.stop()
        raise KeyError("a bug")

    loop.add(reader, fails)
    for _ in range(STRIKES):
        loop.call_later(0, fails_at_once, (Proc.VM, 7))
    loop.call_from_thread(fails_at_once)
    began_s = time.monotonic()

    loop.run()

    assert len(calls) == 3
    assert time.monotonic() - began_s >= 2 * REST_S  # a rest after each of the first two
    assert cut_off == [(Proc.VM, 7)]
    assert "KeyError: 'a bug'" in capfd.readouterr().err
    loop.remove(reader)
    loop.close()
    os.close(reader)
    os.close(writer)


def fails_at_once() -> None:
    """Raise an unexpected exception."""
    raise KeyError("at once")


def test_a_resting_descriptor_may_be_changed_and_removed() -> None:
    """Its number may be used again meanwhile, and the end of the rest does not affect the new descriptor."""
    loop = Loop()
    loop.fence = Fence(lambda _source: None)
    reader, writer = os.pipe()
    os.write(writer, b"x")
    calls: list[str] = []

    def fails(_events: int) -> None:
        loop.call_later(0, again)
        raise KeyError("a bug")

    def again() -> None:
        loop.modify(reader, 0)
        loop.remove(reader)
        loop.add(reader, lambda _events: calls.append("new"), 0)
        loop.call_later(2 * REST_S, loop.stop)

    loop.add(reader, fails)

    loop.run()

    assert calls == []
    loop.close()
    os.close(reader)
    os.close(writer)
