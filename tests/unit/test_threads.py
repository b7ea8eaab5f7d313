"""Our threads, events and conditions behave like those of `threading`, as far as a VM needs them."""

import _thread
import threading
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import pytest

from vmd import threads

DEADLINE_S = 60.0
both = pytest.mark.parametrize("module", [threads, threading], ids=["ours", "threading"])


@both
def test_a_thread_lives_from_its_start_to_its_end(module: ModuleType) -> None:
    """It can be waited for with a timeout, and after its end."""
    go = module.Lock()
    go.acquire()
    thread = module.Thread(target=go.acquire, name="waits", daemon=True)
    assert not thread.is_alive()
    thread.start()
    thread.join(0.01)
    assert thread.is_alive()

    go.release()
    thread.join(DEADLINE_S)
    thread.join()

    assert not thread.is_alive()
    assert thread.name == "waits"


@both
def test_an_event_wakes_all_who_wait(module: ModuleType) -> None:
    """Waiters with and without a deadline are woken, and later ones do not wait."""
    event, woken = module.Event(), []
    waiting = [
        module.Thread(target=lambda wait=wait: woken.append(event.wait(wait)), name="waits", daemon=True)
        for wait in (None, DEADLINE_S, DEADLINE_S)
    ]
    for thread in waiting:
        thread.start()
    assert not event.wait(0.01)
    assert not event.is_set()

    event.set()
    for thread in waiting:
        thread.join(DEADLINE_S)

    assert woken == [True] * 3
    assert event.wait(0)
    assert event.is_set()


def test_a_waiter_that_times_out_is_removed() -> None:
    """A vCPU that waits repeatedly must not fill memory."""
    event: Any = threads.Event()
    for _ in range(3):
        assert not event.wait(0)

    assert event._waiting == []


@both
def test_a_condition_is_waited_for_without_its_lock(module: ModuleType) -> None:
    """Another thread can change the guarded state meanwhile.  A change before the wait needs no wake-up."""
    condition, state = module.Condition(), [0]
    seen: SimpleQueue[int] = SimpleQueue()

    def follow() -> None:
        with condition:
            for wanted in range(1, 100):
                while state[0] < wanted:
                    condition.wait()
                seen.put(wanted)

    follower = module.Thread(target=follow, name="follows", daemon=True)
    follower.start()
    for number in range(1, 100):
        with condition:
            state[0] = number
            condition.notify()
        assert seen.get(timeout=DEADLINE_S) == number
    follower.join(DEADLINE_S)

    assert not follower.is_alive()


def test_no_room_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread has not begun, and the caller gets the same exception as from `threading`."""

    def refuse(_run: object, _arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    thread = threads.Thread(target=pytest.fail, name="none", daemon=True)
    with pytest.raises(RuntimeError):
        thread.start()

    assert not thread.is_alive()
