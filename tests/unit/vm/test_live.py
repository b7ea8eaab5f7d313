"""Sending a running machine: its memory arrives unchanged, it is paused when the goal is met, and sending may fail."""

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import saved
from tests.unit.vm.test_transfer import HIGH, REGIONS, Told
from vmd.errors import HostError, PeerError, VmdError
from vmd.guestmem import GuestMemory
from vmd.ipc import devmsg
from vmd.ipc.loop import Loop
from vmd.ipc.messages.shared import Live
from vmd.units import PAGE
from vmd.vm import dirty, live, state
from vmd.vm.kinds import DISK, ENTROPY
from vmd.vm.live import LiveSender

DEADLINE_S = 60.0
NOT_STABLE = (
    "disk0: what the guest has written cannot be brought to stable storage; `vmctl status -v` and the log say why"
)


class Kvm:
    """The dirty logs of two slots, which `Machine.store` sets."""

    def __init__(self) -> None:
        self.logs = {0: 0, 1: 0}
        self.logging = False

    def set_memory_region(self, _slot: int, _gpa: int, _size: int, _hva: int, flags: int) -> None:
        """Begin or end logging."""
        self.logging = bool(flags)

    def get_dirty_log(self, slot: int, _size: int) -> bytes:
        """Return the log of a slot, and clear it."""
        log, self.logs[slot] = self.logs[slot], 0
        return log.to_bytes(8, "little")


class Device:
    """The process of a disk or of another device.  It records its commands."""

    label = "disk0"

    def __init__(self, kind: Any) -> None:  # noqa: ANN401
        self.kind = kind
        self.told: list[int] = []
        self.answers = [devmsg.SETTLED]

    def command(self, kind: int) -> None:
        """Record a command."""
        self.told.append(kind)

    def settle(self) -> int:
        """Return the next answer.  The last one is repeated for ever."""
        self.told.append(devmsg.SETTLE)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Machine:
    """The parts of a machine that a sender needs."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.kvm = Kvm()
        self.disk = Device(DISK)
        self.entropy = Device(ENTROPY)
        self.virtio = [SimpleNamespace(server=self.entropy), SimpleNamespace(server=self.disk)]

    def disks(self) -> list[Device]:
        """Return its one disk."""
        return [self.disk]

    def store(self, page: int, data: bytes) -> None:
        """Store into a page, as a vCPU does."""
        self.memory.load(page * PAGE if page < 16 else HIGH + (page - 16) * PAGE, data)
        self.kvm.logs[page // 16] |= 1 << page % 16


class Pause:
    """Pauses a machine, or refuses."""

    def __init__(self, machine: Machine, loop: Loop) -> None:
        self.machine = machine
        self.loop = loop
        self.clocks: Any = None
        self.refusal = ""
        self.before: Callable[[], None] = lambda: None
        self.given_up: list[str] = []
        self.sender: Any = None

    def pause(self, done: Callable[[str], None]) -> None:
        """Pause the machine, unless there is a refusal."""
        assert threading.current_thread() is threading.main_thread()
        self.before()
        if not self.refusal:
            self.clocks = "clocks"
        done(self.refusal)

    def give_up(self, text: str) -> None:
        """Record the reason."""
        self.given_up.append(text)


@pytest.fixture
def loop() -> Iterator[Loop]:
    """Yield an event loop with a watchdog."""
    made = Loop()
    made.call_later(DEADLINE_S, made.stop)
    yield made
    made.close()


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch, loop: Loop) -> Iterator[Pause]:
    """Yield an object that pauses a machine whose header and state are sample records."""
    monkeypatch.setattr(state, "header", lambda _machine, one_shot: saved.header(one_shot=one_shot))
    monkeypatch.setattr(state, "save", lambda _machine, _clocks: saved.machine_state())
    monkeypatch.setattr(state, "check_sent", lambda _header, _state, _machine: None)
    monkeypatch.setattr(state, "check_sent_header", lambda _header, _machine: None)
    with GuestMemory.create(REGIONS) as memory:
        yield Pause(Machine(memory), loop)


class Sending:
    """Sends a machine into a file."""

    def __init__(self, pause: Pause, goal: Live) -> None:
        self.file = os.memfd_create("stream", os.MFD_CLOEXEC)
        self.told: list[str] = []
        loop = pause.loop

        def done(text: str) -> None:
            self.told.append(text)
            loop.stop()

        stream = os.dup(self.file)
        self.sender = LiveSender(pause, stream, loop, done, one_shot=True, goal=goal)  # type: ignore[arg-type]
        pause.sender = self.sender
        self.sender.start()
        loop.run()

    def arrives(self, pause: Pause) -> None:
        """Raise AssertionError unless a receiver gets the same machine from the file."""
        assert self.told == [""]
        os.lseek(self.file, 0, os.SEEK_SET)
        with GuestMemory.create(REGIONS) as theirs:
            receiver = Told(pause.loop, self.file, theirs)
            pause.loop.run()
            assert receiver.failures == []
            assert receiver.machines == [saved.machine_state()]
            assert bytes(theirs.memory) == bytes(pause.machine.memory.memory)


def goal(still_ms: int = 1_000_000, rounds: int = 5) -> Live:
    """Return a goal.  The default is reached at once."""
    return Live(still_ms=still_ms, rounds=rounds)


def test_a_machine_that_stores_all_the_time_arrives(pause: Pause, monkeypatch: pytest.MonkeyPatch) -> None:
    """vCPUs, devices and this process store into every region, in each round and until the pause."""
    machine, memory = pause.machine, pause.machine.memory
    generator = random.Random(5)
    memory.load(HIGH - PAGE, b"firmware")
    for page in (0, 3, 15, 16, 31):
        machine.store(page, generator.randbytes(PAGE))

    def work() -> None:
        for _ in range(5):
            machine.store(generator.randrange(32), generator.randbytes(100))
        memory.write(generator.randrange(16) * PAGE, b"by us")
        page = generator.randrange(16)
        memory.load(HIGH + page * PAGE, b"by a device")
        memory.mark(HIGH + page * PAGE, 11)

    runs = dirty.runs

    def runs_and_work(pages: bytes) -> Iterator[tuple[int, int]]:
        for run in runs(pages):
            yield run
            work()  # after each run that was copied

    monkeypatch.setattr(live, "runs", runs_and_work)

    def last() -> None:
        work()
        monkeypatch.setattr(live, "runs", runs)

    pause.before = last
    sending = Sending(pause, goal(still_ms=0))

    assert sending.sender.round == 5
    assert sending.sender.still_s > 0
    sending.arrives(pause)
    assert machine.disk.told[0] == machine.entropy.told[0] == devmsg.MARK
    assert machine.kvm.logging
    sending.sender.end_log()
    assert machine.disk.told[-1] == machine.entropy.told[-1] == devmsg.UNMARK
    assert not machine.kvm.logging


def test_the_machine_is_paused_when_the_rest_is_small_enough(pause: Pause) -> None:
    """It is paused after the second round, because the disks settle only after the first one."""
    pause.machine.store(3, b"x")
    sending = Sending(pause, goal(rounds=100))

    assert sending.sender.round == 2
    sending.arrives(pause)
    mark, ahead, settle = devmsg.MARK, devmsg.SETTLE_AHEAD, devmsg.SETTLE
    assert pause.machine.disk.told == [mark, ahead, settle, ahead, settle, settle, settle, settle]


def test_an_idle_machine_is_paused_at_once(pause: Pause) -> None:
    """Nothing is left to write, which takes no time."""
    sending = Sending(pause, goal(still_ms=0, rounds=100))
    assert sending.sender.round == 2
    sending.arrives(pause)


def test_a_long_run_is_cut_into_pieces(pause: Pause, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section has a limit of bytes and of runs.  Regions that touch in the file give separate runs."""
    monkeypatch.setattr(live, "PIECE_BYTES", 3 * PAGE)
    monkeypatch.setattr(live, "RUNS_MAX", 2)
    generator = random.Random(1)
    for page in (1, 3, 5, 7, *range(9, 25)):
        pause.machine.store(page, generator.randbytes(PAGE))

    Sending(pause, goal()).arrives(pause)


@pytest.mark.parametrize(("refusal", "what"), [
    ("a vcpu did not stop within 15 s", "a vcpu did not stop within 15 s"),
])  # fmt: skip
def test_a_machine_that_cannot_be_paused_is_not_sent(pause: Pause, refusal: str, what: str) -> None:
    """Sending ends with the reason."""
    pause.refusal = refusal
    assert Sending(pause, goal()).told == [what]


@pytest.mark.parametrize(("raised", "what", "given_up"), [
    (ValueError("the state has no chips"), "nobody could receive it: the state has no chips", []),
    (OSError(errno.EIO, "Input/output error"), "Input/output error", []),
    (HostError("x", errno.EIO), "x: Input/output error", []),
    (PeerError("vioblk0", "was killed"), "vioblk0: was killed", ["vioblk0: was killed"]),
    (RuntimeError("a mistake"), "internal error while its state was read", []),
])  # fmt: skip
def test_a_state_that_cannot_be_read_is_not_sent(
    pause: Pause, monkeypatch: pytest.MonkeyPatch, raised: Exception, what: str, given_up: list[str]
) -> None:
    """Sending ends with the reason.  If a device has ended, the VM ends."""

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(state, "save", fail)
    if isinstance(raised, RuntimeError):
        with pytest.raises(RuntimeError):
            Sending(pause, goal())
        pause.loop.run()
        return
    assert Sending(pause, goal()).told == [what]
    assert pause.given_up == given_up


def test_a_machine_that_nobody_could_receive_is_not_sent(pause: Pause, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is found before anything is written."""

    def refuse(_header: object, _machine: object) -> None:
        raise ValueError("it has 99 devices")

    monkeypatch.setattr(state, "check_sent_header", refuse)
    with pytest.raises(VmdError, match=r"^nobody could receive it: it has 99 devices$"):
        Sending(pause, goal())


def test_the_length_of_the_stream_is_estimated(pause: Pause, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each round it is what was written before, and the pages that are left."""
    seen: list[tuple[int, int]] = []
    runs = dirty.runs

    def noted(pages: bytes) -> Iterator[tuple[int, int]]:
        sender = pause.sender
        seen.append((sender.total_bytes - sender.pipe.moved_bytes, pages.count(1) * PAGE))
        yield from runs(pages)

    pause.machine.store(3, bytes(2 * PAGE))
    monkeypatch.setattr(live, "runs", noted)
    Sending(pause, goal())
    assert seen[0] == (2 * PAGE, 2 * PAGE)


def test_a_disk_that_fails_before_the_pause(pause: Pause) -> None:
    """The machine is not paused, and sending fails."""
    pause.machine.disk.answers = [devmsg.SETTLED_NOT_YET, devmsg.SETTLED_FAILED]
    assert Sending(pause, goal()).told == [NOT_STABLE]
    assert pause.clocks is None


def test_a_disk_that_fails_during_the_pause(pause: Pause) -> None:
    """Its last writes are not on stable storage, so sending fails."""
    pause.machine.disk.answers = [*[devmsg.SETTLED] * 3, devmsg.SETTLED_NOT_YET, devmsg.SETTLED_FAILED]
    assert Sending(pause, goal()).told == [NOT_STABLE]


def test_sending_can_be_cancelled_at_any_step(pause: Pause, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps are the first round, a later one, the wait for a slow disk, and the pause."""
    cancel = LiveSender.cancel
    at_work: list[LiveSender] = []
    write_pages, pause_machine = LiveSender._write_pages, LiveSender._pause_machine
    for step in range(4):
        pause.clocks = None
        pause.machine.store(3, b"x")
        pause.machine.disk.answers = [devmsg.SETTLED, devmsg.SETTLED_NOT_YET] if step == 2 else [devmsg.SETTLED]

        def write(sender: LiveSender, writer: Any, pages: bytes, step: int = step) -> None:  # noqa: ANN401
            at_work.append(sender)
            if sender.round == step + 1:
                cancel(sender)
            pause.machine.store(4, b"y")
            write_pages(sender, writer, pages)

        def pause_and_cancel(sender: LiveSender, step: int = step) -> None:
            pause_machine(sender)
            if step == 3:
                cancel(sender)

        def settle(step: int = step) -> int:
            if step == 2 and len(pause.machine.disk.answers) == 1:  # asked again
                cancel(at_work[-1])
            return Device.settle(pause.machine.disk)

        monkeypatch.setattr(LiveSender, "_write_pages", write)
        monkeypatch.setattr(LiveSender, "_pause_machine", pause_and_cancel)
        monkeypatch.setattr(pause.machine.disk, "settle", settle)
        assert Sending(pause, goal(still_ms=0 if step == 1 else 1_000_000)).told == ["sending was interrupted"], step
        assert (pause.clocks is None) == (step != 3), step

