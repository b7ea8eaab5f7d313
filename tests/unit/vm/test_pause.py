"""Standing still and going on: in which order what happens, and what may come in between (arch. 8)."""

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
    """A vCPU that parks when the test says so."""

    def __init__(self, number: int, events: list[str]) -> None:
        self.number = number
        self.events = events
        self.vcpu = self
        self.on_parked: Callable[[], None] | None = None

    def ask_to_park(self, on_parked: Callable[[], None]) -> None:
        """Note it."""
        self.on_parked = on_parked

    def park(self) -> None:
        """Be parked."""
        assert self.on_parked is not None
        self.on_parked()

    def unpark(self) -> None:
        """Go on."""
        self.on_parked = None
        self.events.append(f"run {self.number}")


class Function:
    """A device; `failing` makes its process break the protocol when it is asked that."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name = name
        self.events = events
        self.server = self
        self.failing: int | None = None

    def command(self, kind: int) -> None:
        """Note a question."""
        if kind == self.failing:
            raise PeerError(self.name, "no answer in 10 s")
        self.events.append(f"{ {devmsg.PAUSE: 'pause', devmsg.RESUME: 'resume'}[kind]} {self.name}")

    def detach_interrupts(self) -> None:
        """Note it."""
        self.events.append(f"detach {self.name}")

    def attach_interrupts(self) -> None:
        """Note it."""
        self.events.append(f"attach {self.name}")


class Machine:
    """A machine of two vCPUs and two devices that notes what is done to it."""

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
        """Note that it is about to run."""
        self.events.append("sign")

    def announce(self) -> None:
        """Tell the network."""
        self.events.append("announce")

    def listen(self) -> None:
        """Take input."""
        self.listening = True

    def ask(self, command: int) -> None:
        """Have vmmci ask the guest for something."""
        self.asked.append(command)

    def end(self, outcome: Outcome, text: str) -> None:
        """Note the end."""
        self.ends.append((outcome, text))

    def park(self) -> None:
        """Let every vCPU park."""
        for thread in self.vcpus:
            thread.park()


class FakeClocks:
    """Clocks of such a machine; what is done with them is noted there."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @classmethod
    def take(cls, kvm: Machine, threads: list[Thread], clock: Machine, asked_ns: int) -> "FakeClocks":
        """Stop."""
        assert clock is kvm
        assert threads is kvm.vcpus
        assert asked_ns <= time.monotonic_ns()
        kvm.events.append("take clocks")
        if kvm.clocks_fail:
            raise OSError(5, "KVM_GET_PIT2: Input/output error")
        return cls(kvm)

    def hold(self, _kvm: Machine, _vcpus: list[Thread]) -> None:
        """Have no timer interrupt."""
        self.machine.events.append("hold clocks")

    def restore(self, _kvm: Machine, _vcpus: list[Thread], _clock: Machine) -> None:
        """Go on."""
        self.machine.events.append("restore clocks")


@pytest.fixture(autouse=True)
def _clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have clocks without KVM."""
    monkeypatch.setattr(pauses, "Clocks", FakeClocks)


@pytest.fixture
def loop() -> Iterator[Loop]:
    """An event loop that is run by hand."""
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def machine(loop: Loop) -> Machine:
    """A machine that runs."""
    return Machine(loop)


@pytest.fixture
def pause(machine: Machine, loop: Loop) -> Pause:
    """What stops it."""
    return Pause(cast("Any", machine), loop)


def turn(loop: Loop) -> None:
    """Let the loop do what it has been asked for so far."""
    loop.call_from_thread(loop.stop)
    loop.run()


def stand_still(pause: Pause, machine: Machine, loop: Loop) -> None:
    """Stop a machine."""
    told: list[str] = []
    pause.pause(told.append)
    machine.park()
    turn(loop)
    assert told == [""]
    assert pause.paused


STANDING_STILL = ["pause a", "pause b", "detach a", "detach b", "take clocks", "hold clocks"]
GOING_ON = ["restore clocks", "attach a", "attach b", "resume a", "resume b", "run 0", "run 1"]


# --- order -----------------------------------------------------------------------------------------------------------


def test_order_of_standing_still_and_going_on(pause: Pause, machine: Machine, loop: Loop) -> None:
    """Devices when every vCPU has parked, interrupts when they are done, clocks last; and all of it backwards."""
    told: list[str] = []
    pause.pause(told.append)
    machine.vcpus[1].park()
    turn(loop)
    assert (machine.events, told, pause.under_way) == ([], [], True)

    machine.vcpus[0].park()
    turn(loop)

    assert (machine.events, told, pause.paused, pause.under_way) == (STANDING_STILL, [""], True, False)
    assert not machine.listening
    machine.events.clear()
    pause.unpause()
    assert (machine.events, pause.paused, machine.listening) == (GOING_ON, False, True)
    assert machine.asked == []  # it was not long


def test_what_is_so_already_stays_so(pause: Pause, machine: Machine, loop: Loop) -> None:
    """Pausing twice is a success (cat. 4.5), and so is going on."""
    pause.unpause()
    stand_still(pause, machine, loop)
    machine.events.clear()

    told: list[str] = []
    pause.pause(told.append)

    assert (told, machine.events) == ([""], [])


def test_a_long_pause_is_told_to_the_guest(
    pause: Pause, machine: Machine, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock of the wall has fallen behind (cat. 4.6)."""
    stand_still(pause, machine, loop)
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 60)

    pause.unpause()

    assert machine.asked == [SYNCRTC]


def test_a_machine_that_was_received_begins_with_standing_still(machine: Machine, loop: Loop) -> None:
    """Its timers and its input wait like any other's; nobody knows how long it was away; the network is told once."""
    pause = Pause(cast("Any", machine), loop, cast("Clocks", FakeClocks(machine)))
    assert pause.paused
    assert machine.timers.holding
    assert not machine.listening

    pause.unpause()

    assert machine.events == ["sign", *GOING_ON, "announce"]
    assert not pause._arrived
    assert machine.asked == [SYNCRTC]
    assert not machine.timers.holding



def test_timers_wait(machine: Machine, loop: Loop) -> None:
    """Those that are due while it stands still come in their order when it goes on."""
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


def test_who_asks_meanwhile_is_told_as_well(pause: Pause, machine: Machine, loop: Loop) -> None:
    """One pause for all who want one."""
    told: list[str] = []
    pause.pause(lambda text: told.append(f"first{text}"))
    pause.pause(lambda text: told.append(f"second{text}"))
    machine.park()
    turn(loop)

    assert told == ["first", "second"]
    assert machine.events == STANDING_STILL


def test_requests_have_their_turn(pause: Pause, machine: Machine, loop: Loop) -> None:
    """Pause, unpause and pause in one breath: each finds the machine as it wants it, the last one wins."""
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
    assert machine.events == STANDING_STILL + GOING_ON + STANDING_STILL


def test_a_vcpu_that_parks_late_is_of_an_earlier_round(
    pause: Pause, machine: Machine, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause that took too long has been answered; what comes then does not count for the next."""
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
def test_a_device_that_does_not_stand_still_ends_the_machine(
    pause: Pause, machine: Machine, loop: Loop, name: int
) -> None:
    """It has failed, and nothing goes on without it; how the VM ends is the answer to whoever asked."""
    machine.virtio[name].failing = devmsg.PAUSE
    told: list[str] = []
    pause.pause(told.append)
    machine.park()
    turn(loop)

    assert told == []
    assert machine.ends == [(Outcome.FAILED, f"{'ab'[name]}: no answer in 10 s")]
    assert "run 0" not in machine.events


def test_a_refusal_of_the_host_leaves_it_running(pause: Pause, machine: Machine, loop: Loop) -> None:
    """As before, with all that had been stopped by then."""
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
    """Half a machine is none."""
    machine.clocks_fail = True
    machine.virtio[1].failing = devmsg.RESUME
    told: list[str] = []
    pause.pause(told.append)
    machine.park()
    turn(loop)

    assert told == []
    assert machine.ends == [(Outcome.FAILED, "b: no answer in 10 s")]


def test_a_machine_that_cannot_go_on_says_so(pause: Pause, machine: Machine, loop: Loop) -> None:
    """To whoever let it go."""
    stand_still(pause, machine, loop)
    machine.virtio[0].failing = devmsg.RESUME
    with pytest.raises((PeerError, HostError), match="no answer in 10 s"):
        pause.unpause()


# --- the thread of a vCPU -------------------------------------------------------------------------------------------


class FakeVcpu:
    """A guest that runs until it is kicked, and each time notes that it does."""

    def __init__(self, exit_: Exit = INTERRUPTED) -> None:
        self.exit = exit_
        self.kicked = threading.Event()
        self.entered = threading.Semaphore(0)
        self.exits = 0

    def bind_thread(self) -> None:
        """Do nothing."""

    unbind_thread = bind_thread

    def run_pio(self, _read: object, _write: object) -> Exit:
        """Run."""
        self.entered.release()
        if self.exit is INTERRUPTED:
            assert self.kicked.wait(DEADLINE_S)
        return self.exit

    def kick(self) -> None:
        """Get it out."""
        self.kicked.set()

    def clear_kick(self) -> None:
        """Let it in again."""
        self.kicked.clear()


class Bus:
    """Ports that nobody uses."""

    pio_read = pio_write = None


@pytest.fixture(params=[INTERRUPTED, RETRY], ids=["runs", "waits to be started"])
def thread(request: pytest.FixtureRequest) -> Iterator[VcpuThread]:
    """A vCPU that runs, or an application processor that nobody has started."""
    made = VcpuThread(0, cast("Any", FakeVcpu(request.param)), cast("Any", Bus()), cast("Any", None), print)
    made.start()
    yield made
    made.ask_to_stop()
    assert made.join()


def runs(thread: VcpuThread) -> None:
    """Wait until the guest is entered."""
    assert cast("FakeVcpu", thread.vcpu).entered.acquire(timeout=DEADLINE_S)


def test_a_vcpu_parks_and_goes_on(thread: VcpuThread) -> None:
    """A hundred times."""
    for _ in range(100):
        runs(thread)
        parked = threading.Event()
        thread.ask_to_park(parked.set)
        assert parked.wait(DEADLINE_S)
        while cast("FakeVcpu", thread.vcpu).entered.acquire(blocking=False):
            pass
        thread.unpark()


def test_a_vcpu_that_is_asked_again_before_it_went_on_says_so(thread: VcpuThread) -> None:
    """It stands still already, or is just about to wait, and would otherwise never tell."""
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


def test_a_vcpu_can_be_asked_before_it_is_started() -> None:
    """As one of a machine that was received."""
    made = VcpuThread(0, cast("Any", FakeVcpu()), cast("Any", Bus()), cast("Any", None), print)
    parked = threading.Event()
    made.ask_to_park(parked.set)

    made.start()

    assert parked.wait(DEADLINE_S)
    made.unpark()
    made.ask_to_stop()
    assert made.join()


def test_a_parked_vcpu_can_be_stopped(thread: VcpuThread) -> None:
    """By force, while its machine is paused."""
    parked = threading.Event()
    thread.ask_to_park(parked.set)
    assert parked.wait(DEADLINE_S)

    thread.ask_to_stop()

    assert thread.join()


def test_a_request_that_is_taken_back_leaves_it_running(thread: VcpuThread) -> None:
    """Whether it had parked by then or not."""
    for _ in range(100):
        thread.ask_to_park(lambda: None)
        thread.unpark()
    cast("FakeVcpu", thread.vcpu).kick()
    runs(thread)
