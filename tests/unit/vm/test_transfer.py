"""Sending and receiving as the event thread sees it: what it is told, and when (hostile-input 55)."""

import os
import random
import select
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest

from tests.support import saved
from vmd.errors import VmdError
from vmd.guestmem import GuestMemory, RegionSpec
from vmd.ipc import devmsg
from vmd.ipc.imsg import pack
from vmd.ipc.loop import Loop
from vmd.units import PAGE
from vmd.vm import state, streamprobe
from vmd.vm.arrival import Receiver
from vmd.vm.header import read_header
from vmd.vm.kinds import DISK
from vmd.vm.sender import Sender
from vmd.vm.state import MachineState
from vmd.vm.stream import STILL, VERSION, Pipe, StreamWriter

DEADLINE_S = 20.0
HIGH = 1 << 32
REGIONS = (
    RegionSpec(gpa=0, size=16 * PAGE, name="ram"),
    RegionSpec(gpa=HIGH, size=16 * PAGE, name="high ram"),
    RegionSpec(gpa=HIGH - PAGE, size=PAGE, name="firmware", read_only=True),
)
Run = tuple[int, bytes]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Some memory."""
    with GuestMemory.create(REGIONS) as made:
        yield made


@pytest.fixture
def loop() -> Iterator[Loop]:
    """An event loop with a watchdog."""
    made = Loop()
    made.call_later(DEADLINE_S, made.stop)
    yield made
    made.close()


class Disk:
    """A disk's process, which answers so when it is asked whether all is on stable storage."""

    kind = DISK
    label = "disk0"

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)

    def settle(self) -> int:
        """Give the next answer, and the last one for ever."""
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Machine:
    """What a sender needs of a machine."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.disk = Disk(devmsg.SETTLED)

    def disks(self) -> list[Disk]:
        """Return its one disk."""
        return [self.disk]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, memory: GuestMemory) -> Any:  # noqa: ANN401
    """A machine whose records are made up."""
    monkeypatch.setattr(state, "header", lambda _machine, one_shot: saved.header(one_shot=one_shot))
    monkeypatch.setattr(state, "save", lambda _machine, _clocks: saved.machine_state())
    monkeypatch.setattr(state, "check_sent", lambda _header, _state, _machine: None)
    return Machine(memory)


class Told:
    """What a receiver tells, and the loop that hears it."""

    def __init__(self, loop: Loop, fd: int, memory: GuestMemory) -> None:
        self.loop = loop
        self.machines: list[MachineState] = []
        self.failures: list[str] = []
        beginning = streamprobe.unpack(streamprobe.probe(Pipe(fd, select.POLLIN)))
        assert isinstance(beginning, streamprobe.Beginning)
        self.header = read_header(beginning.version, beginning.header)
        self.receiver = Receiver(
            Pipe(fd, select.POLLIN, moved_bytes=beginning.read_bytes),
            beginning.version,
            self.header,
            memory,
            loop,
            on_machine=self.on_machine,
            on_failed=self.on_failed,
        )
        self.receiver.start()

    def on_machine(self, machine: MachineState) -> None:
        """Note the end."""
        self.machines.append(machine)
        self.loop.stop()

    def on_failed(self, text: str) -> None:
        """Note another end."""
        self.failures.append(text)
        self.loop.stop()


def send(loop: Loop, machine: Any, fd: int) -> tuple[Sender, list[str]]:  # noqa: ANN401
    """Begin to send; returns what is going to be told, which stops the loop."""
    told: list[str] = []

    def done(text: str) -> None:
        told.append(text)
        loop.stop()

    sender = Sender(machine, cast("Any", "clocks"), fd, loop, done, one_shot=True)
    sender.start()
    return sender, told


def test_a_machine_that_nobody_could_receive_is_not_sent(
    loop: Loop, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, and the descriptor stays its caller's; a number that no record takes is such a thing, too."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def refuse(_header: bytes, _state: bytes, _machine: object) -> None:
        raise ValueError("the state has other chips than this machine")

    monkeypatch.setattr(state, "check_sent", refuse)
    with pytest.raises(VmdError, match=r"^nobody could receive it: the state has other chips than this machine$"):
        send(loop, machine, writing)
    monkeypatch.setattr(state, "save", lambda _machine, _clocks: saved.machine_state().replace(kvmclock_ns=1 << 70))
    with pytest.raises(VmdError, match=r"^nobody could receive it: Integer value out of range$"):
        send(loop, machine, writing)

    with pytest.raises(BlockingIOError):
        os.read(reading, 1)
    os.close(writing)
    os.close(reading)


def test_a_machine_arrives(loop: Loop, machine: Machine) -> None:
    """Touched memory of every region, read-only firmware included, and both records."""
    memory = machine.memory
    for gpa in (3 * PAGE, HIGH + PAGE, HIGH - PAGE):
        memory.load(gpa, random.Random(gpa).randbytes(PAGE))
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sender, told = send(loop, machine, writing)
    with GuestMemory.create(REGIONS) as theirs:
        receiver = Told(loop, reading, theirs)
        while not (told and receiver.machines):
            loop.run()  # whoever is the first to be done stops it

        assert receiver.failures == []
        assert receiver.header == saved.header()
        assert receiver.machines == [saved.machine_state()]
        assert told == [""]
        assert theirs.resident_bytes() == 3 * PAGE  # before we look at the others
        assert bytes(theirs.memory) == bytes(memory.memory)
        assert receiver.receiver.pipe.moved_bytes == sender.pipe.moved_bytes
        assert receiver.receiver.total_bytes == saved.header().touched_bytes
        assert sender.pipe.fd == receiver.receiver.pipe.fd == -1


def test_what_cannot_be_sent_is_told_once(loop: Loop, machine: Machine) -> None:
    """And the descriptor is closed all the same."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.close(reading)

    sender, told = send(loop, machine, writing)
    loop.run()

    assert told == ["the stream was closed by its reader"]
    assert sender.pipe.fd == -1


def test_the_stream_ends_when_the_disks_are_on_stable_storage(loop: Loop, machine: Machine) -> None:
    """A disk is asked until it is done."""
    machine.disk.answers = [devmsg.SETTLED_NOT_YET] * 3 + [devmsg.SETTLED]
    file = os.memfd_create("stream", os.MFD_CLOEXEC)

    _, told = send(loop, machine, file)
    loop.run()

    assert told == [""]
    assert machine.disk.answers == [devmsg.SETTLED]


@pytest.mark.parametrize("answers", [(devmsg.SETTLED_FAILED,), (devmsg.SETTLED_NOT_YET, devmsg.SETTLED_FAILED)])
def test_a_disk_that_cannot_keep_what_it_was_given(loop: Loop, machine: Machine, answers: tuple[int, ...]) -> None:
    """The stream has no end, so that no receiver goes on without what was written."""
    machine.disk.answers = list(answers)
    file = os.memfd_create("stream", os.MFD_CLOEXEC)
    ours = os.dup(file)

    _, told = send(loop, machine, file)
    loop.run()

    assert told == [
        "disk0: what the guest has written cannot be brought to stable storage; `vmctl status -v` and the log say why"
    ]
    os.lseek(ours, 0, os.SEEK_SET)
    with GuestMemory.create(REGIONS) as theirs:
        receiver = Told(loop, ours, theirs)
        loop.run()
        assert [each for each in receiver.failures if "before its end" in each]


def test_cancelled_while_a_disk_takes_its_time(loop: Loop, machine: Machine) -> None:
    """Storage may never answer."""
    machine.disk.answers = [devmsg.SETTLED_NOT_YET]

    sender, told = send(loop, machine, os.memfd_create("stream", os.MFD_CLOEXEC))
    sender.cancel()
    loop.run()

    assert told == ["sending was interrupted"]


def test_cancelled(loop: Loop, machine: Machine) -> None:
    """Somebody pressed ^C."""
    machine.memory.load(0, bytes(16 * PAGE))
    machine.memory.load(HIGH, bytes(16 * PAGE))
    reading, writing = os.pipe2(os.O_CLOEXEC)

    sender, told = send(loop, machine, writing)
    sender.cancel()
    loop.run()

    assert told == ["sending was interrupted"]
    os.close(reading)


def test_a_mistake_of_ours_is_told_too(
    loop: Loop, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest must not stand still for ever because a thread has died."""

    def broken(_writer: StreamWriter, _body: bytes, _version: int) -> None:
        raise RuntimeError("a mistake")

    shown: list[sys.UnraisableHookArgs] = []
    monkeypatch.setattr(StreamWriter, "header", broken)
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    reading, writing = os.pipe2(os.O_CLOEXEC)

    sender, told = send(loop, machine, writing)
    loop.run()
    sender._thread.join(DEADLINE_S)

    assert told == ["internal error while it was sent"]
    assert [str(each.exc_value) for each in shown] == ["a mistake"]
    os.close(reading)


# --- streams that lie ---------------------------------------------------------------------------------------------


def stream(*runs: Run, states: tuple[bytes, ...] = (), version: int = STILL) -> int:
    """Return a file with a stream in it, its digests right."""
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    writer = StreamWriter(Pipe(fd, select.POLLOUT))
    writer.header(pack(saved.header()), version)
    for gpa, data in runs:
        writer.memory(gpa, memoryview(data))
    for body in states:
        writer.state(body)
    writer.end()
    writer.hasher.close()
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


GOOD = pack(saved.machine_state())
ONE_PAGE = bytes(PAGE)


@pytest.mark.parametrize(("runs", "states", "what"), [
    ((), (), "the stream has no state of the machine"),
    ((), (GOOD, GOOD), "section 1: the state of the machine comes twice"),
    (((PAGE, ONE_PAGE), (PAGE, ONE_PAGE)), (GOOD,), "section 1: memory at 0x1000 comes twice or out of order"),
    (((PAGE, ONE_PAGE), (0, ONE_PAGE)), (GOOD,), "section 1: memory at 0x0 comes twice or out of order"),
    (((PAGE, ONE_PAGE), (PAGE + 1, b"x")), (GOOD,), "section 1: memory at 0x1001 comes twice or out of order"),
    (((HIGH, ONE_PAGE), (0, ONE_PAGE)), (GOOD,), "section 1: memory at 0x0 comes twice or out of order"),
    (((16 * PAGE, b"x"),), (GOOD,), "section 0: guest address 0x10000: no memory"),
    (((16 * PAGE - 1, b"xy"),), (GOOD,), "section 0: guest address 0xffff: no memory for 2 bytes"),
    (((HIGH - 2 * PAGE, ONE_PAGE),), (GOOD,), "section 0: guest address 0xffffe000: no memory"),
    ((((1 << 64) - 1, b"x"),), (GOOD,), "section 0: guest address 0xffffffffffffffff: no memory"),
    ((), (b"",), "section 0: "),
    ((), (b"\xc1",), "section 0: "),
    ((), (b"\x91" * 2000,), "section 0: "),  # as deep as can be
    ((), (b"\xdd\xff\xff\xff\xff",), "section 0: "),  # a list that claims to have 2^32 elements
    ((), (pack(saved.header()),), "section 0: "),
    ((), (GOOD + b"x",), "section 0: "),
    ((), (GOOD[:-1],), "section 0: "),
])  # fmt: skip
def test_impossible_streams(
    loop: Loop, memory: GuestMemory, runs: tuple[Run, ...], states: tuple[bytes, ...], what: str
) -> None:
    """Refused with a sentence, once, and nothing else is told."""
    told = Told(loop, stream(*runs, states=states), memory)

    loop.run()

    assert told.machines == []
    assert len(told.failures) == 1
    assert told.failures[0].startswith("the stream ")
    assert what in told.failures[0]


def test_memory_of_a_machine_that_ran_comes_again(loop: Loop, memory: GuestMemory) -> None:
    """In any order; what came last counts."""
    runs = ((HIGH, b"new"), (PAGE, b"old"), (0, bytes(PAGE)), (PAGE, b"new"))
    told = Told(loop, stream(*runs, states=(GOOD,), version=VERSION), memory)

    loop.run()

    assert told.failures == []
    assert len(told.machines) == 1
    assert (memory.read(PAGE, 3), memory.read(HIGH, 3)) == (b"new", b"new")


def test_a_record_may_not_be_longer_than_such_a_machine_needs(loop: Loop, memory: GuestMemory) -> None:
    """A list takes seventy times the room of what announces it, so that the limit is tight."""
    most = state.bytes_max(saved.header())
    told = Told(loop, stream(states=(b"\x90" * (most + 1),)), memory)

    loop.run()

    assert most < 1 << 20
    assert f"has a section 0 of kind 2 and length {most + 1}" in told.failures[0]
