"""Pausing and resuming a machine: the order of steps, and events in between (arch. 8)."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from vmd.errors import HostError, PeerError
from vmd.ipc import devmsg
from vmd.ipc.loop import Loop
from vmd.ipc.messages.vm import Outcome
from vmd.kvmapi.exits import INTERRUPTED, RETRY, Exit
from vmd.vm import pause as pauses
from vmd.vm.clocks import Clocks
from vmd.vm.pause import Pause
from vmd.vm.timers import HeldTimers
from vmd.vm.vcpu import VcpuThread
from vmd.vm.vmmci import SYNCRTC

DEADLINE_S = 20.0


class Thread:
    """A vCPU that parks when the test calls `park`."""

    def __init__(self, number: int, events: list[str]) -> None:
        self.number = number
        self.events = events
        self.vcpu = self
        self.on_parked: Callable[[], None] | None = None

    def ask_to_park(self, on_parked: Callable[[], None]) -> None:
        """Keep the callback."""
        self.on_parked = on_parked

    def park(self) -> None:
        """Report that the vCPU has parked."""
        assert self.on_parked is not None
        self.on_parked()

    def unpark(self) -> None:
        """Record that the vCPU runs."""
        self.on_parked = None
        self.events.append(f"run {self.number}")


class Function:
    """A device.  Its process does not answer the command `failing`."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name = name
        self.events = events
        self.server = self
        self.failing: int | None = None

    def command(self, kind: int) -> None:
        """Record a command."""
        if kind == self.failing:
            raise PeerError(self.name, "no answer in 10 s")
        self.events.append(f"{ {devmsg.PAUSE: 'pause', devmsg.RESUME: 'resume'}[kind]} {self.name}")

    def detach_interrupts(self) -> None:
        """Record the call."""
        self.events.append(f"detach {self.name}")

    def attach_interrupts(self) -> None:
        """Record the call."""
        self.events.append(f"attach {self.name}")


class Machine:
    """A machine with two vCPUs and two devices that records all steps."""

    def __init__(self, loop: Loop) -> None:
        self.events: list[str] = []
        self.vcpus = [Thread(0, self.events), Thread(1, self.events)]
        self.virtio = [Function("a", self.events), Function("b", self.events)]
        self.timers = HeldTimers(loop)
        self.listening = True
        self.asked: list[int] = []
        self.ends: list[tuple[Outcome, str]] = []
        self.kvm = self.clock = self.vmmci = self
        self.clocks_fail = False

    def sign_disks(self) -> None:
        """Record the call."""
        self.events.append("sign")

    def announce(self) -> None:
        """Record the call."""
        self.events.append("announce")

    def listen(self) -> None:
        """Accept console input."""
        self.listening = True

    def ask(self, command: int) -> None:
        """Record a command of vmmci to the guest."""
        self.asked.append(command)

    def end(self, outcome: Outcome, text: str) -> None:
        """Record the end."""
        self.ends.append((outcome, text))

    def park(self) -> None:
        """Let every vCPU park."""
        for thread in self.vcpus:
            thread.park()


class FakeClocks:
    """The clocks of a fake machine, which records all steps with them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @classmethod
    def take(cls, kvm: Machine, threads: list[Thread], clock: Machine, asked_ns: int) -> "FakeClocks":
        """Record that the clocks were saved, or fail."""
        assert clock is kvm
        assert threads is kvm.vcpus
        assert asked_ns <= time.monotonic_ns()
        kvm.events.append("take clocks")
        if kvm.clocks_fail:
            raise OSError(5, "KVM_GET_PIT2: Input/output error")
        return cls(kvm)

    def hold(self, _kvm: Machine, _vcpus: list[Thread]) -> None:
        """Record the call."""
        self.machine.events.append("hold clocks")

    def restore(self, _kvm: Machine, _vcpus: list[Thread], _clock: Machine) -> None:
        """Record the call."""
        self.machine.events.append("restore clocks")


@pytest.fixture(autouse=True)
def _clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the clocks, because there is no KVM."""
    monkeypatch.setattr(pauses, "Clocks", FakeClocks)


@pytest.fixture
def loop() -> Iterator[Loop]:
    """Yield an event loop that the test runs."""
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def machine(loop: Loop) -> Machine:
    """Return a running machine."""
    return Machine(loop)


@pytest.fixture
def pause(machine: Machine, loop: Loop) -> Pause:
    """Return the object that pauses the machine."""
    return Pause(cast("Any", machine), loop)


def turn(loop: Loop) -> None:
    """Run the loop for the calls that were posted until now."""
    loop.call_from_thread(loop.stop)
    loop.run()


def pause_machine(pause: Pause, machine: Machine, loop: Loop) -> None:
    """Pause a machine."""
    told: list[str] = []
    pause.pause(told.append)
    machine.park()
    turn(loop)
    assert told == [""]
    assert pause.paused


PAUSING = ["pause a", "pause b", "detach a", "detach b", "take clocks", "hold clocks"]
RESUMING = ["restore clocks", "attach a", "attach b", "resume a", "resume b", "run 0", "run 1"]


# --- order -----------------------------------------------------------------------------------------------------------


def test_order_of_pausing_and_resuming(pause: Pause, machine: Machine, loop: Loop) -> None:
    """All vCPUs park, devices pause, interrupts are detached, and clocks stop.  Resuming has the reverse order."""
    told: list[str] = []
    pause.pause(told.append)
    machine.vcpus[1].park()
    turn(loop)
    assert (machine.events, told, pause.under_way) == ([], [], True)

    machine.vcpus[0].park()
    turn(loop)

    assert (machine.events, told, pause.paused, pause.under_way) == (PAUSING, [""], True, False)
    assert not machine.listening
    machine.events.clear()
    pause.unpause()
    assert (machine.events, pause.paused, machine.listening) == (RESUMING, False, True)
    assert machine.asked == []  # the pause was short


def test_a_second_pause_or_unpause_changes_nothing(pause: Pause, machine: Machine, loop: Loop) -> None:
    """To pause a paused machine succeeds (cat. 4.5), and so does resuming a running one."""
    pause.unpause()
    pause_machine(pause, machine, loop)
    machine.events.clear()

    told: list[str] = []
    pause.pause(told.append)

    assert (told, machine.events) == ([""], [])


def test_the_guest_is_told_of_a_long_pause(
    pause: Pause, machine: Machine, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest's wall clock is behind, so vmmci asks the guest to set it (cat. 4.6)."""
    pause_machine(pause, machine, loop)
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 60)

    pause.unpause()

    assert machine.asked == [SYNCRTC]


def test_a_received_machine_starts_paused(machine: Machine, loop: Loop) -> None:
    """Its timers and input wait.  It is asked to set its clock, and it is announced to the network once."""
    pause = Pause(cast("Any", machine), loop, cast("Clocks", FakeClocks(machine)))
    assert pause.paused
    assert machine.timers.holding
    assert not machine.listening

    pause.unpause()

    assert machine.events == ["sign", *RESUMING, "announce"]
    assert not pause._arrived
    assert machine.asked == [SYNCRTC]
    assert not machine.timers.holding



def test_timers_wait_during_a_pause(machine: Machine, loop: Loop) -> None:
    """Timers that are due during a pause are called in order when the machine resumes."""
    due: list[int] = []
    machine.timers.schedule(0, lambda: due.append(1))
    machine.timers.schedule(0, lambda: due.append(2))
    machine.timers.hold()
    turn(loop)  # takes the timers
    turn(loop)
    assert due == []

    machine.timers.release()

    assert due == [1, 2]


# --- several at once -----------------------------------------------------------------------------------------------


def test_one_pause_answers_all_requests(pause: Pause, machine: Machine, loop: Loop) -> None:
    """The machine is paused once, and both callers are answered."""
    told: list[str] = []
    pause.pause(lambda text: told.append(f"first{text}"))
    pause.pause(lambda text: told.append(f"second{text}"))
    machine.park()
    turn(loop)

    assert told == ["first", "second"]
    assert machine.events == PAUSING


def test_a_paused_machine_stays_paused(
    pause: Pause, machine: Machine, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline of the vCPUs ends with the pause.  Else they would run without clocks, and their disks be in use."""
    told: list[str] = []
    for _ in range(2):
        pause.pause(told.append)
    machine.park()
    turn(loop)
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 2 * pauses.PARK_TIMEOUT_S)
    loop.call_later(0, loop.stop)
    loop.run()
    assert (machine.events, told, pause.paused) == (PAUSING, ["", ""], True)


def test_requests_are_handled_in_order(pause: Pause, machine: Machine, loop: Loop) -> None:
    """For pause, unpause and pause in quick succession, each callback finds its state.  The last request wins."""
    told: list[str] = []
    pause.pause(lambda _text: told.append(f"paused {pause.paused}"))

    def go_on(_text: str) -> None:
        pause.unpause()
        told.append(f"unpaused {not pause.paused}")

    pause.pause(go_on)
    pause.pause(lambda _text: told.append(f"paused again {pause.paused}"))
    machine.park()
    turn(loop)
    assert told == ["paused True", "unpaused True"]

    machine.park()
    turn(loop)

    assert told[2:] == ["paused again True"]
    assert machine.events == PAUSING + RESUMING + PAUSING


def test_a_vcpu_that_parks_late_counts_for_its_own_round(
    pause: Pause, machine: Machine, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause that took too long has failed.  A vCPU's late report does not count for the next pause."""
    monkeypatch.setattr(pauses, "PARK_TIMEOUT_S", 0.0)
    told: list[str] = []
    pause.pause(told.append)
    late = machine.vcpus[0].on_parked
    machine.vcpus[1].park()
    turn(loop)
    turn(loop)
    assert told == ["a vcpu did not stop within 0 s"]
    assert machine.events == ["run 0", "run 1"]

    monkeypatch.setattr(pauses, "PARK_TIMEOUT_S", DEADLINE_S)
    pause.pause(told.append)
    assert late is not None
    late()
    machine.vcpus[1].park()
    turn(loop)
    assert told[1:] == []

    machine.vcpus[0].park()
    turn(loop)
    assert told[1:] == [""]
    assert pause.paused


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [0, 1])
def test_a_device_that_does_not_pause_ends_the_machine(
    pause: Pause, machine: Machine, loop: Loop, name: int
) -> None:
    """The device has failed, so the VM ends.  `done` is not called: the end of the VM answers the caller."""
    machine.virtio[name].failing = devmsg.PAUSE
    told: list[str] = []
    pause.pause(told.append)
    machine.park()
    turn(loop)

    assert told == []
    assert machine.ends == [(Outcome.FAILED, f"{'ab'[name]}: no answer in 10 s")]
    assert "run 0" not in machine.events


def test_a_refusal_of_the_host_leaves_it_running(pause: Pause, machine: Machine, loop: Loop) -> None:
    """Devices, interrupts and vCPUs that were stopped run again."""
    machine.clocks_fail = True
    told: list[str] = []
    pause.pause(told.append)
    machine.park()
    turn(loop)

    assert told == ["KVM_GET_PIT2: Input/output error"]
    assert not pause.paused
    assert machine.ends == []
    assert machine.events[-6:] == ["attach a", "attach b", "resume a", "resume b", "run 0", "run 1"]
    assert not machine.timers.holding


def test_a_refusal_that_cannot_be_undone_ends_it(pause: Pause, machine: Machine, loop: Loop) -> None:
    """If a device cannot resume after the refusal, the VM ends."""
    machine.clocks_fail = True
    machine.virtio[1].failing = devmsg.RESUME
    told: list[str] = []
    pause.pause(told.append)
    machine.park()
    turn(loop)

    assert told == []
    assert machine.ends == [(Outcome.FAILED, "b: no answer in 10 s")]


def test_a_machine_that_cannot_go_on_raises_an_error(pause: Pause, machine: Machine, loop: Loop) -> None:
    """The caller of `unpause` gets the error."""
    pause_machine(pause, machine, loop)
    machine.virtio[0].failing = devmsg.RESUME
    with pytest.raises((PeerError, HostError), match="no answer in 10 s"):
        pause.unpause()


# --- the thread of a vCPU -------------------------------------------------------------------------------------------


class FakeVcpu:
    """A vCPU whose guest runs until it is kicked.  It counts its entries."""

    def __init__(self, exit_: Exit = INTERRUPTED) -> None:
        self.exit = exit_
        self.kicked = threading.Event()
        self.entered = threading.Semaphore(0)
        self.exits = 0

    def bind_thread(self) -> None:
        """Do nothing."""

    unbind_thread = bind_thread

    def run_pio(self, _read: object, _write: object) -> Exit:
        """Run the guest."""
        self.entered.release()
        if self.exit is INTERRUPTED:
            assert self.kicked.wait(DEADLINE_S)
        return self.exit

    def kick(self) -> None:
        """Make the guest exit."""
        self.kicked.set()

    def clear_kick(self) -> None:
        """Allow the guest to run again."""
        self.kicked.clear()


class Bus:
    """A bus whose ports the guest does not use."""

    pio_read = pio_write = None


@pytest.fixture(params=[INTERRUPTED, RETRY], ids=["runs", "waits to be started"])
def thread(request: pytest.FixtureRequest) -> Iterator[VcpuThread]:
    """Yield the thread of a vCPU that runs, or of an application processor that was not started."""
    made = VcpuThread(0, cast("Any", FakeVcpu(request.param)), cast("Any", Bus()), cast("Any", None), print)
    made.start()
    yield made
    made.ask_to_stop()
    assert made.join()


def runs(thread: VcpuThread) -> None:
    """Wait until the vCPU enters the guest."""
    assert cast("FakeVcpu", thread.vcpu).entered.acquire(timeout=DEADLINE_S)


def test_a_vcpu_parks_and_goes_on(thread: VcpuThread) -> None:
    """A vCPU parks and resumes a hundred times."""
    for _ in range(100):
        runs(thread)
        parked = threading.Event()
        thread.ask_to_park(parked.set)
        assert parked.wait(DEADLINE_S)
        while cast("FakeVcpu", thread.vcpu).entered.acquire(blocking=False):
            pass
        thread.unpark()


def test_a_vcpu_that_is_asked_again_before_it_went_on_reports_again(thread: VcpuThread) -> None:
    """The vCPU has parked already, or is about to wait.  It still reports to the second request."""
    second, third = threading.Event(), threading.Event()

    def at_once() -> None:
        thread.unpark()
        thread.ask_to_park(second.set)

    thread.ask_to_park(at_once)
    assert second.wait(DEADLINE_S)

    thread.unpark()
    thread.ask_to_park(third.set)
    assert third.wait(DEADLINE_S)
    thread.unpark()


def test_who_asks_last_is_told_by_a_parked_vcpu(thread: VcpuThread) -> None:
    """It is told at once: the vCPU does not run in between."""
    for parked in (threading.Event(), threading.Event()):
        thread.ask_to_park(parked.set)
        assert parked.wait(DEADLINE_S)
    thread.unpark()


def test_a_vcpu_can_be_asked_before_it_is_started() -> None:
    """A vCPU of a received machine parks before it runs for the first time."""
    made = VcpuThread(0, cast("Any", FakeVcpu()), cast("Any", Bus()), cast("Any", None), print)
    parked = threading.Event()
    made.ask_to_park(parked.set)

    made.start()

    assert parked.wait(DEADLINE_S)
    made.unpark()
    made.ask_to_stop()
    assert made.join()


def test_a_parked_vcpu_can_be_stopped(thread: VcpuThread) -> None:
    """A VM can be stopped by force while it is paused."""
    parked = threading.Event()
    thread.ask_to_park(parked.set)
    assert parked.wait(DEADLINE_S)

    thread.ask_to_stop()

    assert thread.join()


def test_a_request_that_is_taken_back_leaves_it_running(thread: VcpuThread) -> None:
    """The vCPU runs on, whether it had parked or not."""
    for _ in range(100):
        thread.ask_to_park(lambda: None)
        thread.unpark()
    cast("FakeVcpu", thread.vcpu).kick()
    runs(thread)
