"""What the event thread is told while a VM is sent or received (hostile-input 55)."""

import _thread
import errno
import os
import random
import select
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest

from tests.support import saved
from tests.unit.vm.test_stream import wait_for_threads
from vmd.errors import HostError, VmdError
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
from vmd.vm.stream import STILL, VERSION, Pipe, StreamReader, StreamWriter

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
    """Yield guest memory."""
    with GuestMemory.create(REGIONS) as made:
        yield made


@pytest.fixture
def loop() -> Iterator[Loop]:
    """Yield an event loop with a watchdog."""
    made = Loop()
    made.call_later(DEADLINE_S, made.stop)
    yield made
    made.close()


class Disk:
    """The process of a disk, with its answers whether all data is on stable storage."""

    kind = DISK
    label = "disk0"

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)

    def settle(self) -> int:
        """Return the next answer.  The last one is repeated for ever."""
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Machine:
    """The parts of a machine that a sender needs."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.disk = Disk(devmsg.SETTLED)

    def disks(self) -> list[Disk]:
        """Return its one disk."""
        return [self.disk]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, memory: GuestMemory) -> Any:  # noqa: ANN401
    """Return a machine whose header and state are sample records."""
    monkeypatch.setattr(state, "header", lambda _machine, one_shot: saved.header(one_shot=one_shot))
    monkeypatch.setattr(state, "save", lambda _machine, _clocks: saved.machine_state())
    monkeypatch.setattr(state, "check_sent", lambda _header, _state, _machine: None)
    return Machine(memory)


class Told:
    """Runs a receiver, and records its result."""

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
        """Record the machine."""
        self.machines.append(machine)
        self.loop.stop()

    def on_failed(self, text: str) -> None:
        """Record the failure."""
        self.failures.append(text)
        self.loop.stop()


def send(loop: Loop, machine: Any, fd: int) -> tuple[Sender, list[str]]:  # noqa: ANN401
    """Begin to send.  Return the sender and a list that will get its result, which also stops the loop."""
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
    """Nothing is written, and the caller still owns the descriptor.  One case is a number too large for a record."""
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
    """Touched memory of every region arrives, also of read-only firmware, and so do both records."""
    memory = machine.memory
    for gpa in (0, 3 * PAGE, HIGH + PAGE, HIGH - PAGE):
        memory.load(gpa, random.Random(gpa).randbytes(PAGE))
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sender, told = send(loop, machine, writing)
    with GuestMemory.create(REGIONS) as theirs:
        receiver = Told(loop, reading, theirs)
        while not (told and receiver.machines):
            loop.run()  # the first of them that is done stops the loop

        assert receiver.failures == []
        assert receiver.header == saved.header()
        assert receiver.machines == [saved.machine_state()]
        assert told == [""]
        assert theirs.resident_bytes() == 4 * PAGE  # before we look at the others
        assert bytes(theirs.memory) == bytes(memory.memory)
        assert receiver.receiver.pipe.moved_bytes == sender.pipe.moved_bytes
        assert receiver.receiver.total_bytes == saved.header().touched_bytes
        assert sender.pipe.fd == receiver.receiver.pipe.fd == -1


@pytest.mark.parametrize("answer", [devmsg.SETTLED, devmsg.SETTLED_FAILED])
def test_no_thread_is_left(loop: Loop, machine: Machine, answer: int) -> None:
    """Neither of a VM that was sent nor of one that was not: a VM of which copies are sent would have more and more."""
    before = _thread._count()
    machine.disk.answers = [answer]
    _, told = send(loop, machine, os.memfd_create("stream", os.MFD_CLOEXEC))
    loop.run()
    assert len(told) == 1
    wait_for_threads(before)


def test_a_failed_send_is_reported_once(loop: Loop, machine: Machine) -> None:
    """The descriptor is closed."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.close(reading)

    sender, told = send(loop, machine, writing)
    loop.run()

    assert told == ["the stream was closed by its reader"]
    assert sender.pipe.fd == -1


def test_the_stream_ends_when_the_disks_are_on_stable_storage(loop: Loop, machine: Machine) -> None:
    """A disk is asked until its data is on stable storage."""
    machine.disk.answers = [devmsg.SETTLED_NOT_YET] * 3 + [devmsg.SETTLED]
    file = os.memfd_create("stream", os.MFD_CLOEXEC)

    _, told = send(loop, machine, file)
    loop.run()

    assert told == [""]
    assert machine.disk.answers == [devmsg.SETTLED]


@pytest.mark.parametrize("answers", [(devmsg.SETTLED_FAILED,), (devmsg.SETTLED_NOT_YET, devmsg.SETTLED_FAILED)])
def test_a_disk_that_cannot_settle_fails_the_send(loop: Loop, machine: Machine, answers: tuple[int, ...]) -> None:
    """The stream has no end, so no receiver starts the guest without its last writes."""
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


def test_sending_is_cancelled_while_a_disk_is_slow(loop: Loop, machine: Machine) -> None:
    """The disk never settles, because its storage does not answer."""
    machine.disk.answers = [devmsg.SETTLED_NOT_YET]

    sender, told = send(loop, machine, os.memfd_create("stream", os.MFD_CLOEXEC))
    sender.cancel()
    loop.run()

    assert told == ["sending was interrupted"]


def test_sending_is_cancelled(loop: Loop, machine: Machine) -> None:
    """The user pressed ^C."""
    machine.memory.load(0, bytes(16 * PAGE))
    machine.memory.load(HIGH, bytes(16 * PAGE))
    reading, writing = os.pipe2(os.O_CLOEXEC)

    sender, told = send(loop, machine, writing)
    sender.cancel()
    loop.run()

    assert told == ["sending was interrupted"]
    os.close(reading)


def test_an_internal_error_is_reported_too(
    loop: Loop, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the guest would stay paused for ever after a thread has ended with an exception."""

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


# --- bad streams --------------------------------------------------------------------------------------------------


def stream(*runs: Run, states: tuple[bytes, ...] = (), version: int = STILL) -> int:
    """Return a file with a stream that has correct digests."""
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
    ((), (b"\x91" * 2000,), "section 0: "),  # nested as deep as possible
    ((), (b"\xdd\xff\xff\xff\xff",), "section 0: "),  # a list that claims to have 2^32 elements
    ((), (pack(saved.header()),), "section 0: "),
    ((), (GOOD + b"x",), "section 0: "),
    ((), (GOOD[:-1],), "section 0: "),
])  # fmt: skip
def test_impossible_streams_are_refused(
    loop: Loop, memory: GuestMemory, runs: tuple[Run, ...], states: tuple[bytes, ...], what: str
) -> None:
    """The receiver reports one failure, and no machine."""
    told = Told(loop, stream(*runs, states=states), memory)

    loop.run()

    assert told.machines == []
    assert len(told.failures) == 1
    assert told.failures[0].startswith("the stream ")
    assert what in told.failures[0]


@pytest.mark.parametrize(("error", "text"), [
    (HostError("start thread hasher", errno.EAGAIN), "start thread hasher: Resource temporarily unavailable"),
    (RuntimeError("a mistake"), "internal error while the stream was read"),
])  # fmt: skip
def test_a_receiver_that_fails_for_another_reason(
    loop: Loop, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    """It is reported, too: nobody else would notice that the thread has ended.  The stream is closed."""
    shown: list[sys.UnraisableHookArgs] = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)

    def fail(_reader: StreamReader, *_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(StreamReader, "sections_until_end", fail)
    told = Told(loop, stream(states=(GOOD,)), memory)
    loop.run()
    told.receiver._thread.join(DEADLINE_S)

    assert (told.machines, told.failures) == ([], [text])
    assert (told.receiver.over, told.receiver.pipe.fd) == (True, -1)
    assert len(shown) == isinstance(error, RuntimeError)


def test_memory_of_a_machine_that_ran_may_be_repeated(loop: Loop, memory: GuestMemory) -> None:
    """The order of addresses is free, and the last content counts."""
    runs = ((HIGH, b"new"), (PAGE, b"old"), (0, bytes(PAGE)), (PAGE, b"new"))
    told = Told(loop, stream(*runs, states=(GOOD,), version=VERSION), memory)

    loop.run()

    assert told.failures == []
    assert len(told.machines) == 1
    assert (memory.read(PAGE, 3), memory.read(HIGH, 3)) == (b"new", b"new")


def test_a_record_has_a_limit_that_depends_on_the_machine(loop: Loop, memory: GuestMemory) -> None:
    """A decoded list takes seventy times the space of its bytes, so the limit is tight."""
    most = state.bytes_max(saved.header())
    told = Told(loop, stream(states=(b"\x90" * (most + 1),)), memory)

    loop.run()

    assert most < 1 << 20
    assert f"has a section 0 of kind 2 and length {most + 1}" in told.failures[0]
