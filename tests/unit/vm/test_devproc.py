"""A VM process checks all messages of a device process (hostile-input 57).  The tests send them in its place."""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from vmd.errors import HostError, OperatorError, PeerError, VmdError
from vmd.guestmem import GuestMemory, RegionSpec
from vmd.ipc import devmsg
from vmd.ipc.loop import Loop
from vmd.log import log
from vmd.readable import readable
from vmd.units import PAGE
from vmd.vm import devproc
from vmd.vm.devproc import DeviceProcess, DeviceProcesses, Interrupts, are_addresses, start_packet
from vmd.vm.kinds import DISK, ENTROPY, INTERFACE, KERNEL, MAIN, RAW, SEED, Kind
from vmd.vm.slots import Slot

CONFIG = bytes(60)
READY = devmsg.READY_HEAD.pack(devmsg.READY, 0x1234, 60) + CONFIG
DONE = devmsg.STATUS.pack(devmsg.RESET, 0)
TITLE = "vm/test/vioblk0"


class Child:
    """A process that has ended with a status, or still runs."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.killed = False

    def reap(self, _timeout_s: float = 0) -> int | None:
        """Return the exit status; None if it still runs."""
        return self.status

    def kill(self) -> None:
        """End the process as SIGKILL does."""
        self.killed = True
        self.status = -9


class Impostor:
    """The device's side: two channels without a process."""

    def __init__(self) -> None:
        self.child = Child()
        self.channels: dict[int, socket.socket] = {}

    def spawn(self, _title: str, *, channel: socket.socket, fds: Mapping[int, int], entry: str) -> Child:
        """Keep the channels that a process would get."""
        assert entry == "vmd.devices.vioblk.main:main"
        for number, fd in ((devmsg.FD_SYNC, channel.fileno()), (devmsg.FD_ASYNC, fds[devmsg.FD_ASYNC])):
            self.channels[number] = socket.socket(fileno=os.dup(fd))
            self.channels[number].setblocking(False)  # what the VM sends is there when its call returns
        return self.child

    @property
    def sync(self) -> socket.socket:
        """Return the sync channel, on which the VM asks."""
        return self.channels[devmsg.FD_SYNC]

    @property
    def informs(self) -> socket.socket:
        """Return the async channel, on which the device informs the VM."""
        return self.channels[devmsg.FD_ASYNC]

    def be_ready(self, first: bytes = READY, second: bytes = READY) -> None:
        """Send READY on both channels."""
        self.sync.send(first)
        self.informs.send(second)

    def end(self, status: int) -> None:
        """End with a status, and close both channels."""
        self.child.status = status
        for channel in self.channels.values():
            channel.close()


@pytest.fixture
def impostor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Impostor]:
    """Yield the impostor that is started instead of a device process."""
    made = Impostor()
    monkeypatch.setattr(devproc, "spawn", made.spawn)
    monkeypatch.setattr(devproc, "START_TIMEOUT_S", 0.05)
    monkeypatch.setattr(devmsg, "ANSWER_TIMEOUT_S", 0.05)
    yield made
    for channel in made.channels.values():
        channel.close()


@pytest.fixture
def process(impostor: Impostor) -> Iterator[DeviceProcess]:
    """Yield the VM's side.  It has sent START."""
    made = DeviceProcess(DISK)
    with GuestMemory.create([RegionSpec(gpa=0, size=4096, name="ram")]) as memory:
        slot = Slot(kind=DISK, index=0, number=1, fds=(memory.fd,), notes=(devmsg.RESOURCE_QCOW2,), names=("/a",))
        made.begin("vm/test", slot, memory, memory.fd, 3)
    yield made
    made._sync.close()
    made._async.close()
    for fd in (*made.kicks, *made.calls, made.resample, made.page):
        os.close(fd)


@pytest.fixture
def running(impostor: Impostor, process: DeviceProcess) -> DeviceProcess:
    """Return the VM's side of a device that has sent READY."""
    impostor.be_ready()
    process.wait_ready()
    return process


class Reader:
    """An event loop that runs until the VM has given up the device, or has read all its messages."""

    def __init__(self, process: DeviceProcess) -> None:
        self.loop = Loop()
        self.channel = process._async.fileno()
        self.failures: list[str] = []
        self.resets: list[tuple[str, int]] = []
        self.configs: list[bytes] = []
        self.asked: list[bool] = []
        self.lost: list[str] = []
        self.events: list[tuple[str, str]] = []
        process.serve(
            self.loop,
            on_failed=self.fail,
            on_needs_reset=lambda text, life: self.resets.append((text, life)),
            on_config=self.configs.append,
            on_ask_resolvers=lambda: self.asked.append(True),
            on_lock_lost=self.lost.append,
            on_event=lambda what, text: self.events.append((what, text)),
        )

    def fail(self, text: str) -> None:
        """Record that the device has failed."""
        self.failures.append(text)
        self.loop.stop()

    def read(self) -> None:
        """Read all messages of the device."""
        while not self.failures and readable(self.channel):
            self.loop.call_from_thread(self.loop.stop)
            self.loop.run()


@pytest.fixture
def reader(running: DeviceProcess) -> Iterator[Reader]:
    """Yield an object that reads the messages of the running device."""
    made = Reader(running)
    yield made
    made.loop.close()


# --- start --------------------------------------------------------------------------------------------------------


def test_start_describes_the_device(impostor: Impostor, process: DeviceProcess) -> None:
    """START is one packet, with the descriptors of the memory, the figures and the resources in order."""
    packet, fds, _, _ = socket.recv_fds(impostor.sync, devmsg.PACKET_MAX, 8)
    head = devmsg.START_HEAD.unpack_from(packet)
    at = devmsg.START_HEAD.size + devmsg.REGION.size

    assert head == (devmsg.START, log.verbosity, 0, 0, 1, 1, 0, 1, 3)
    assert devmsg.RESOURCE.unpack_from(packet, at) == (devmsg.RESOURCE_QCOW2,)
    assert packet[at + devmsg.RESOURCE.size :] == b"vm/test/vioblk0\0/a"
    assert len(fds) == 3
    assert process.name == "vioblk0"
    for fd in fds:
        os.close(fd)


def test_a_process_that_cannot_get_start_ends_at_once(impostor: Impostor) -> None:
    """Until START it listens on the sync channel only, so it could not read the request to end on the async channel."""
    made = DeviceProcess(DISK)
    with GuestMemory.create([RegionSpec(gpa=0, size=PAGE, name="ram")]) as memory:
        slot = Slot(kind=DISK, index=0, number=1, fds=(1 << 20,), notes=(0,), names=("/a",))
        with pytest.raises(HostError, match=r"^pass vm/test/vioblk0 its descriptors: Bad file descriptor$"):
            made.begin("vm/test", slot, memory, memory.fd, 0)
    made.shut_down()

    assert impostor.sync.recv(1) == b""
    made._async.close()
    for fd in (*made.kicks, *made.calls, made.resample, made.page):
        os.close(fd)


def test_a_process_that_has_ended_before_start(impostor: Impostor, process: DeviceProcess) -> None:
    """The error tells how it has ended."""
    impostor.end(1)
    slot = Slot(kind=DISK, index=0, number=1)
    wanted = f"^{TITLE}: ended with status 1 before it was needed$"
    with (
        GuestMemory.create([RegionSpec(gpa=0, size=PAGE, name="ram")]) as memory,
        pytest.raises(PeerError, match=wanted),
    ):
        process.begin("vm/test", slot, memory, memory.fd, 0)


@pytest.mark.parametrize(("module", "direct"), [(MAIN, False), (RAW, False), (KERNEL, True)])
def test_which_devices_the_kernel_may_serve(
    impostor: Impostor, process: DeviceProcess, module: str, direct: bool
) -> None:
    """Only those whose process can hand over its rings."""
    with GuestMemory.create([RegionSpec(gpa=0, size=PAGE, name="ram")]) as memory:
        process.begin("vm/test", Slot(kind=DISK, index=0, number=1, module=module), memory, memory.fd, 0)
    assert process.may_be_direct is direct


def test_start_has_room_for_a_serial_number() -> None:
    """A serial number is padded with zeroes.  Without one, START has no field for it."""
    with GuestMemory.create([RegionSpec(gpa=0, size=PAGE, name="ram")]) as memory:
        plain, given = (
            start_packet("t", Slot(kind=DISK, index=0, number=2, flags=1, serial=serial), memory, 0)
            for serial in (b"", b"abc")
        )

    at = devmsg.START_HEAD.size + devmsg.REGION.size
    assert (plain[at:], given[at:]) == (b"t", b"abc".ljust(20, b"\0") + b"t")
    assert [devmsg.START_HEAD.unpack_from(packet)[6] for packet in (plain, given)] == [1, 1 | devmsg.START_SERIAL]


def test_ready_device(running: DeviceProcess) -> None:
    """Features and configuration are those of READY."""
    assert (running.features, running.config) == (0x1234, CONFIG)


NO_READY = {
    "empty": b"",
    "no-type": b"\2\0\0",
    "short": READY[:15],
    "too-little": READY[:-1],
    "too-much": READY + b"\0",
    "larger-than-its-place": devmsg.READY_HEAD.pack(devmsg.READY, 0, 105) + bytes(105),
    "another": DONE,
    "short-error": devmsg.ERROR_HEAD.pack(devmsg.ERROR, 5)[:7],
}


@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize("packet", NO_READY.values(), ids=NO_READY)
def test_device_that_sends_a_bad_ready_57(
    impostor: Impostor, process: DeviceProcess, packet: bytes, channel: int
) -> None:
    """Hostile input 57: after a bad READY on either channel the VM does not start."""
    impostor.be_ready(*((packet, READY), (READY, packet))[channel])

    with pytest.raises(PeerError, match=TITLE):
        process.wait_ready()


def test_device_that_is_never_ready_57(process: DeviceProcess) -> None:
    """Hostile input 57: the wait for READY has a limit."""
    with pytest.raises(PeerError, match="not ready after"):
        process.wait_ready()


@pytest.mark.parametrize(("status", "how"), [(1, "ended with status 1"), (-31, "was killed by SIGSYS")])
def test_device_that_ends_instead_of_being_ready_57(
    impostor: Impostor, process: DeviceProcess, status: int, how: str
) -> None:
    """Hostile input 57: the error tells how the device ended."""
    impostor.end(status)

    with pytest.raises(PeerError, match=f"{TITLE}: {how} while it was starting"):
        process.wait_ready()


def test_device_that_cannot_start_reports_why(impostor: Impostor, process: DeviceProcess) -> None:
    """The error has the sentence and the errno of the device, and the sentence only once."""
    impostor.sync.send(devmsg.ERROR_HEAD.pack(devmsg.ERROR, 12) + b"map guest memory: Cannot allocate memory")

    with pytest.raises(OperatorError, match=f"^{TITLE}: map guest memory: Cannot allocate memory$") as failed:
        process.wait_ready()
    assert failed.value.number == 12


@pytest.mark.parametrize("size", [0, PAGE - 1, PAGE + 1])
def test_the_page_that_a_device_shares_with_its_vm_keeps_its_size(process: DeviceProcess, size: int) -> None:
    """If the device could shrink it, SIGBUS would end the VM process when it reads the page of interrupts."""
    with pytest.raises(PermissionError):
        os.ftruncate(process.page, size)
    assert not process.interrupts.pending(0)


# --- questions ---------------------------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[DeviceProcess], object]] = {
    "activate": lambda process: process.activate(0, [(256, True, 0, 0, 0, 0, 0)]),
    "reset": lambda process: process.command(devmsg.RESET),
    "config-write": lambda process: process.write_config(32, b"\0"),
}
BAD_ANSWERS = {
    "no-type": b"\4",
    "another": devmsg.STATUS.pack(devmsg.PAUSE, 0),
    "unknown": devmsg.STATUS.pack(99, 0),
    "short": devmsg.TYPE.pack(devmsg.RESET),
    "long": DONE + bytes(4000),
    "start": devmsg.TYPE.pack(devmsg.START),
    "async": devmsg.NEEDS_RESET_HEAD.pack(devmsg.NEEDS_RESET, 0),
    "error": devmsg.ERROR_HEAD.pack(devmsg.ERROR, 5) + b"disk: lost",
    "short-error": devmsg.TYPE.pack(devmsg.ERROR),
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_bad_answer_57(
    impostor: Impostor, running: DeviceProcess, question: Callable[[DeviceProcess], object], answer: bytes
) -> None:
    """Hostile input 57: every bad answer raises PeerError."""
    impostor.sync.send(answer)

    with pytest.raises(PeerError, match=TITLE):
        question(running)


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_no_answer_57(running: DeviceProcess, question: Callable[[DeviceProcess], object]) -> None:
    """Hostile input 57: the wait for an answer has a limit."""
    with pytest.raises(PeerError, match="no answer"):
        question(running)


def test_only_an_interface_that_the_kernel_may_serve_gets_direct(impostor: Impostor, running: DeviceProcess) -> None:
    """It gets DIRECT only when the value changes."""
    impostor.sync.recv(devmsg.PACKET_MAX)  # START
    running.tell_direct(True)
    running.may_be_direct = True
    for direct in (False, True, True, False):
        impostor.sync.send(devmsg.STATUS.pack(devmsg.DIRECT, 0))
        running.tell_direct(direct)

    told = [devmsg.DIRECT_BODY.unpack(impostor.sync.recv(devmsg.PACKET_MAX)) for _ in range(2)]
    assert told == [(devmsg.DIRECT, 1), (devmsg.DIRECT, 0)]
    with pytest.raises(BlockingIOError):
        impostor.sync.recv(devmsg.PACKET_MAX)


def test_a_late_answer_is_not_taken_for_another_one(impostor: Impostor, running: DeviceProcess) -> None:
    """Storage did not answer for a while.  After a question that timed out, later questions get their own answers."""
    for question in (devmsg.MARK, devmsg.UNMARK):
        with pytest.raises(PeerError, match="no answer in 10 s"):
            running.command(question)  # the second question is not even sent
    assert impostor.sync.recv(devmsg.PACKET_MAX)[:4] == devmsg.TYPE.pack(devmsg.START)
    assert impostor.sync.recv(devmsg.PACKET_MAX) == devmsg.TYPE.pack(devmsg.MARK)
    impostor.sync.send(devmsg.STATUS.pack(devmsg.MARK, 0))
    impostor.sync.send(devmsg.STATUS.pack(devmsg.PAUSE, 0))

    assert running.command(devmsg.PAUSE)
    assert impostor.sync.recv(devmsg.PACKET_MAX) == devmsg.TYPE.pack(devmsg.PAUSE)


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_device_that_ends_instead_of_answering_57(
    impostor: Impostor, running: DeviceProcess, question: Callable[[DeviceProcess], object]
) -> None:
    """Hostile input 57: a device that ends raises PeerError at once, and the error tells how it has ended."""
    impostor.end(1)

    with pytest.raises(PeerError, match=f"^{TITLE}: ended with status 1$"):
        question(running)


def test_the_last_answer_of_a_device_tells_why_it_ends(impostor: Impostor, running: DeviceProcess) -> None:
    """The error has the device's sentence, and not that the device has ended."""
    impostor.sync.send(devmsg.ERROR_HEAD.pack(devmsg.ERROR, 5) + b"/a: requests did not end in 9 s")

    with pytest.raises(PeerError, match=f"^{TITLE}: /a: requests did not end in 9 s$"):
        running.command(devmsg.RESET)


Ask = Callable[[DeviceProcess], object]


def status(kind: int, value: int = 0) -> bytes:
    """Return the answer with a status."""
    return devmsg.STATUS.pack(kind, value)


RINGS = [(256, True, 1, 2, 3, 4, 5), (128, False, 6, 7, 8, 9, 10)]
ACTIVATE = devmsg.ACTIVATE_HEAD.pack(devmsg.ACTIVATE, 7, 2) + b"".join(
    devmsg.QUEUE.pack(size, enabled, 0, *rest) for size, enabled, *rest in RINGS
)
CONFIG_WRITE = devmsg.CONFIG_WRITE_HEAD.pack(devmsg.CONFIG_WRITE, 20, 2) + b"ab"
LARGE = bytes(devmsg.CONFIG_MAX)
ADDRESS = devmsg.ANNOUNCED.pack(devmsg.ANNOUNCED_6, b"a" * 16)
ANSWERS: list[tuple[Ask, bytes, bytes, object]] = [
    (lambda it: it.activate(7, RINGS), ACTIVATE, status(devmsg.ACTIVATE), True),
    (lambda it: it.activate(7, RINGS), ACTIVATE, status(devmsg.ACTIVATE, 1), False),
    (lambda it: it.write_config(20, b"ab"), CONFIG_WRITE, devmsg.READY_HEAD.pack(devmsg.READY, 0, 104) + LARGE, LARGE),
    (lambda it: it.write_config(20, b"ab"), CONFIG_WRITE, devmsg.READY_HEAD.pack(devmsg.READY, 0, 0), b""),
    (lambda it: it.restore(b"own"), devmsg.TYPE.pack(devmsg.RESTORE) + b"own", status(devmsg.RESTORE), True),
    (lambda it: it.restore(b"own"), devmsg.TYPE.pack(devmsg.RESTORE) + b"own", status(devmsg.RESTORE, 1), False),
    (lambda it: it.addresses(), devmsg.TYPE.pack(devmsg.ADDRESSES), devmsg.TYPE.pack(devmsg.ADDRESSES) + ADDRESS,
     ADDRESS),
]  # fmt: skip
PLAIN: list[tuple[int, Ask, dict[int, object]]] = [  # questions without data: each with its results by status
    (devmsg.PAUSE, lambda it: it.command(devmsg.PAUSE), {0: True, 1: False}),
    (devmsg.SETTLE, DeviceProcess.settle, {value: value for value in range(3)}),
    (devmsg.LET_GO, DeviceProcess.let_go, {0: True, 1: False}),
    (devmsg.TAKE_BACK, DeviceProcess.take_back, {value: value for value in range(6)}),
    (devmsg.SIGN, DeviceProcess.sign, {0: None, 1: None}),
    (devmsg.RELOAD, DeviceProcess.reload, {0: True, 1: False}),
]
ANSWERS += [
    (ask, devmsg.TYPE.pack(kind), status(kind, value), result)
    for kind, ask, results in PLAIN
    for value, result in results.items()
]


def test_questions_and_their_answers(impostor: Impostor, running: DeviceProcess) -> None:
    """The device gets each question with its data, and the caller gets what the device has answered."""
    impostor.sync.recv(devmsg.PACKET_MAX)  # START
    for ask, question, answer, result in ANSWERS:
        impostor.sync.send(answer)
        assert ask(running) == result, question
        assert impostor.sync.recv(devmsg.PACKET_MAX) == question
    assert running.activations == 2


@pytest.mark.parametrize("kind", [kind for kind, _, _ in PLAIN])
def test_an_answer_of_a_wrong_length_57(impostor: Impostor, running: DeviceProcess, kind: int) -> None:
    """Hostile input 57: neither a shorter nor a longer status is taken for one."""
    (ask,) = (ask for number, ask, _ in PLAIN if number == kind)
    for answer in (devmsg.TYPE.pack(kind), status(kind) + b"\0"):
        impostor.sync.send(answer)
        with pytest.raises(PeerError, match="of a wrong length"):
            ask(running)


def exported(*rows: tuple[int, int], own: bytes = b"", count: int | None = None) -> bytes:
    """Return the answer to EXPORT."""
    head = devmsg.EXPORT_HEAD.pack(devmsg.EXPORT, len(rows) if count is None else count)
    return head + b"".join(devmsg.QUEUE.pack(256, 1, 0, 1, 2, 3, *row) for row in rows) + own


@pytest.mark.parametrize(("answer", "rows", "own"), [
    (exported((4, 5)), [(4, 5)], b""), (exported(), [], b""),
    (exported((4, 5), own=b"x" * devmsg.OWN_MAX), [(4, 5)], b"x" * devmsg.OWN_MAX),
])  # fmt: skip
def test_the_state_of_a_device(
    impostor: Impostor, running: DeviceProcess, answer: bytes, rows: list[tuple[int, int]], own: bytes
) -> None:
    """It has its place in each ring, and its own state up to a limit."""
    impostor.sync.send(answer)
    assert running.export() == (rows, own)


@pytest.mark.parametrize("answer", [
    devmsg.TYPE.pack(devmsg.EXPORT), exported((4, 5), (6, 7)), exported((4, 5), own=b"x" * (devmsg.OWN_MAX + 1)),
    exported(count=1), exported((4, 5))[:-1], exported(count=0xFFFFFFFF, own=b"x" * 40),
])  # fmt: skip
def test_a_state_that_no_device_has_57(impostor: Impostor, running: DeviceProcess, answer: bytes) -> None:
    """Hostile input 57: more queues than the device has, more or fewer bytes than it says, and too much own state."""
    impostor.sync.send(answer)
    with pytest.raises(PeerError, match="EXPORT"):
        running.export()


@pytest.mark.parametrize(("raw", "good"), [
    (b"", True), (ADDRESS, True), (ADDRESS * devmsg.ANNOUNCED_MAX, True), (ADDRESS * (devmsg.ANNOUNCED_MAX + 1), False),
    (ADDRESS[:-1], False), (ADDRESS + b"\4", False),
    *((bytes((kind,)) + bytes(16), kind in (4, 6, 7)) for kind in (0, 3, 4, 5, 6, 7, 8, 255)),
])  # fmt: skip
def test_addresses_of_a_guest_57(impostor: Impostor, running: DeviceProcess, raw: bytes, good: bool) -> None:
    """Hostile input 57: whole addresses of known kinds, and not too many."""
    assert are_addresses(raw) is good
    impostor.sync.send(devmsg.TYPE.pack(devmsg.ADDRESSES) + raw)
    if good:
        assert running.addresses() == raw
    else:
        with pytest.raises(PeerError, match="ADDRESSES of a wrong length"):
            running.addresses()


def test_the_files_of_a_disk(impostor: Impostor, running: DeviceProcess) -> None:
    """The caller gets them in order.  A disk that cannot write out its tables lends nothing."""
    first, second = os.pipe()
    socket.send_fds(impostor.sync, [status(devmsg.LEND)], [first, second])
    lent = running.lend()
    assert [os.fstat(fd).st_ino for fd in lent] == [os.fstat(fd).st_ino for fd in (first, second)]
    for fd in (*lent, first, second):
        os.close(fd)
    impostor.sync.send(status(devmsg.LEND, 1))
    with pytest.raises(VmdError, match=r"^disk0: cached data of the disk cannot be written; the log says why$"):
        running.lend()


# --- informing ---------------------------------------------------------------------------------------------------


def test_what_a_device_is_told(impostor: Impostor, running: DeviceProcess) -> None:
    """Limits are told when they change: at first there are none.  Then the device goes on to listen until it ends."""
    running.limit(0, 0)
    running.limit(1, 0)
    running.limit(1, 0)
    running.limit(1, 2)
    running.limit(0, 0)
    running.set_verbosity(2)
    running.announce()
    running.arrived_with = ADDRESS
    running.announce()
    running.shut_down()

    limits = [devmsg.LIMIT_BODY.pack(devmsg.LIMIT, *each) for each in ((1, 0), (1, 2), (0, 0))]
    announce = devmsg.TYPE.pack(devmsg.ANNOUNCE)
    told = [
        *limits, devmsg.VERBOSITY_BODY.pack(devmsg.VERBOSITY, 2), announce, announce + ADDRESS,
        devmsg.TYPE.pack(devmsg.SHUTDOWN),
    ]  # fmt: skip
    assert [impostor.informs.recv(devmsg.PACKET_MAX) for _ in told] == told
    impostor.sync.send(DONE)
    assert running.command(devmsg.RESET)


def test_messages_that_a_device_may_send(impostor: Impostor, reader: Reader) -> None:
    """A device may report a broken ring, with the life of the device that it concerns, and a new configuration."""
    impostor.informs.send(devmsg.NEEDS_RESET_HEAD.pack(devmsg.NEEDS_RESET, 3) + b"descriptor 9")
    impostor.informs.send(devmsg.READY_HEAD.pack(devmsg.CONFIG_CHANGED, 0, 60) + b"\1" * 60)
    reader.read()

    assert (reader.resets, reader.configs, reader.failures) == ([("descriptor 9", 3)], [b"\1" * 60], [])
    assert reader.events == [("fault", "descriptor 9")]


def test_a_network_interface_reports_a_lease(impostor: Impostor, running: DeviceProcess, reader: Reader) -> None:
    """An interface may send LEASE."""
    running.kind = INTERFACE
    impostor.informs.send(devmsg.TYPE.pack(devmsg.LEASE))
    reader.read()

    assert (reader.events, reader.failures) == ([("lease", "")], [])


def test_a_disk_has_lost_its_lock(impostor: Impostor, running: DeviceProcess, reader: Reader) -> None:
    """The report has a bounded length, and is kept until the lock is taken again."""
    for _ in range(2):
        impostor.informs.send(devmsg.TYPE.pack(devmsg.LOCK_LOST) + b"gone\xff" + b"x" * 500)
    reader.read()
    assert reader.failures == []
    assert len(reader.lost) == 2
    assert reader.lost[0].startswith("disk0: gone")
    assert len(reader.lost[0]) < devmsg.TROUBLE_MAX + 10
    assert reader.events == [("trouble", running.lock_lost)]
    for status, lost in ((devmsg.TAKEN_IN_USE, True), (devmsg.TAKEN, False)):
        impostor.sync.send(devmsg.STATUS.pack(devmsg.TAKE_BACK, status))
        assert running.take_back() == status
        assert bool(running.lock_lost) == lost


def test_an_interface_has_no_lock(impostor: Impostor, running: DeviceProcess, reader: Reader) -> None:
    """An interface that reports a lost lock has failed."""
    running.kind = INTERFACE
    impostor.informs.send(devmsg.TYPE.pack(devmsg.LOCK_LOST))
    reader.read()
    assert len(reader.failures) == 1


def test_a_network_interface_asks_for_name_servers(impostor: Impostor, running: DeviceProcess, reader: Reader) -> None:
    """The VM sends the servers, with zeroes for absent ones, or the message that they are the same as before."""
    running.kind = INTERFACE
    impostor.informs.send(devmsg.TYPE.pack(devmsg.ASK_RESOLVERS))
    reader.read()
    running.tell_resolvers(((b"aaaa", b"bbbb"), (bytes(16),)))
    running.tell_resolvers(None)

    assert (reader.asked, reader.failures) == ([True], [])
    assert impostor.informs.recv(200) == devmsg.RESOLVERS_BODY.pack(devmsg.RESOLVERS, b"aaaabbbb", b"")
    assert impostor.informs.recv(200) == devmsg.TYPE.pack(devmsg.SAME_RESOLVERS)


def test_a_change_is_answered_once(impostor: Impostor, running: DeviceProcess, reader: Reader, tmp_path: Path) -> None:
    """One change at a time is allowed.  The disc's descriptor is sent too, and the caller still owns its copy."""
    answers: list[tuple[int, str]] = []

    def note(number: int, text: str) -> None:
        answers.append((number, text))

    running.resize(1 << 40, note)
    running.resize(1 << 41, note)
    assert answers == [(errno.EBUSY, "another change is under way")]
    assert impostor.informs.recv(200) == devmsg.RESIZE_BODY.pack(devmsg.RESIZE, 1 << 40)
    impostor.informs.send(devmsg.CHANGED_HEAD.pack(devmsg.CHANGED, errno.ENOSPC) + b"no room")
    reader.read()
    assert answers[1:] == [(errno.ENOSPC, "no room")]

    (tmp_path / "disc").write_bytes(b"d")
    fd = os.open(tmp_path / "disc", os.O_RDONLY)
    running.change_disc(fd, "/disc", note, force=True)
    os.close(fd)
    packet, fds, _, _ = socket.recv_fds(impostor.informs, 200, 4)
    assert packet == devmsg.DISC_HEAD.pack(devmsg.DISC, devmsg.DISC_FORCE) + b"/disc"
    assert [os.read(each, 9) for each in fds] == [b"d"]
    os.close(fds[0])
    impostor.informs.send(devmsg.CHANGED_HEAD.pack(devmsg.CHANGED, 0))
    reader.read()
    assert answers[2:] == [(0, "")]
    assert reader.failures == []

    impostor.informs.send(devmsg.CHANGED_HEAD.pack(devmsg.CHANGED, 0))
    reader.read()
    assert [f"unexpected message {devmsg.CHANGED}" in text for text in reader.failures] == [True]


def test_a_change_of_a_device_that_has_ended(impostor: Impostor, running: DeviceProcess) -> None:
    """Each request is answered with the reason: none of them is under way."""
    answers: list[tuple[int, str]] = []
    impostor.end(1)
    for _ in range(2):
        running.resize(1, lambda number, text: answers.append((number, text)))
    assert answers == [(errno.EPIPE, "Broken pipe")] * 2


def test_the_last_words_of_a_device(impostor: Impostor, reader: Reader) -> None:
    """The VM ends with the sentence of its device."""
    impostor.informs.send(devmsg.ERROR_HEAD.pack(devmsg.ERROR, 5) + b"/a: lost")
    reader.read()
    assert reader.failures == [f"{TITLE}: /a: lost"]


def test_a_device_that_closes_its_channel(impostor: Impostor, running: DeviceProcess, reader: Reader) -> None:
    """It has not ended, and is of no use any more."""
    for channel in impostor.channels.values():
        channel.close()
    with pytest.raises(PeerError, match=f"^{TITLE}: has closed its channel$"):
        running.command(devmsg.RESET)
    reader.read()
    assert reader.failures == [f"{TITLE}: has closed its channel"]


def troubles(*texts: bytes) -> bytes:
    """Return the message TROUBLES with these texts."""
    return devmsg.TYPE.pack(devmsg.TROUBLES) + b"\0".join(texts)


def test_a_trouble_of_a_device_is_kept_until_it_ends(
    impostor: Impostor, running: DeviceProcess, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trouble has the time of its first report.  A trouble that is no longer reported is removed."""
    for now_s, said in (
        (100.5, troubles(b"old")), (200.5, troubles(b"flush fails", b"old")), (300.5, troubles(b"flush fails"))
    ):  # fmt: skip
        monkeypatch.setattr(time, "time", lambda now_s=now_s: now_s)
        impostor.informs.send(said)
        reader.read()
    assert running.troubles == {"flush fails": 200}
    assert running.label == "disk0"

    impostor.informs.send(troubles())
    reader.read()
    assert running.troubles == {}
    assert reader.events == [("trouble", "old"), ("trouble", "flush fails"), ("mended", "")]


@pytest.mark.parametrize(
    "said", [troubles(*[b"%d" % number for number in range(1000)]), troubles(b"x" * 4000), troubles(b"\xff" * 4000)]
)
def test_a_device_that_reports_too_many_troubles_57(
    impostor: Impostor, running: DeviceProcess, reader: Reader, said: bytes
) -> None:
    """Hostile input 57: only a few short sentences are kept, even if the device sends many and long ones."""
    for _ in range(20):
        impostor.informs.send(said)
        reader.read()

    assert len(running.troubles) <= devmsg.TROUBLES_MAX
    assert all(len(text.encode()) <= devmsg.TROUBLE_MAX for text in running.troubles)
    assert reader.failures == []


BAD_MESSAGES = {
    "no-type": b"\4\0",
    "unknown": devmsg.TYPE.pack(0xFFFFFFFF),
    "question": devmsg.TYPE.pack(devmsg.RESET),
    "ready-again": READY,
    "tells-of-a-lease": devmsg.TYPE.pack(devmsg.LEASE),
    "asks-for-name-servers": devmsg.TYPE.pack(devmsg.ASK_RESOLVERS),
    "short-needs-reset": devmsg.TYPE.pack(devmsg.NEEDS_RESET),
    "short-configuration": devmsg.READY_HEAD.pack(devmsg.CONFIG_CHANGED, 0, 60) + bytes(59),
    "large-configuration": devmsg.READY_HEAD.pack(devmsg.CONFIG_CHANGED, 0, 4000) + bytes(4000),
    "error": devmsg.ERROR_HEAD.pack(devmsg.ERROR, 5) + b"\xff\0\n" * 300,
    "short-error": devmsg.TYPE.pack(devmsg.ERROR),
}


@pytest.mark.parametrize("packet", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_bad_message_57(impostor: Impostor, reader: Reader, packet: bytes) -> None:
    """Hostile input 57: the VM ends with one sentence of a bounded length.  Later messages are not read."""
    impostor.informs.send(packet)
    impostor.informs.send(packet)
    reader.read()
    reader.read()

    assert len(reader.failures) == 1
    assert reader.failures[0].startswith(TITLE)
    assert len(reader.failures[0]) < 600
    assert (reader.resets, reader.configs) == ([], [])


@pytest.mark.parametrize(("status", "how"), [(0, "ended with status 0"), (-31, "was killed by SIGSYS")])
def test_device_that_ends_57(impostor: Impostor, reader: Reader, status: int, how: str) -> None:
    """Hostile input 57: the VM cannot go on without the device, so it fails."""
    impostor.end(status)
    reader.read()

    assert reader.failures == [f"{TITLE}: {how}"]


def test_device_that_never_stops_talking_57(impostor: Impostor, reader: Reader) -> None:
    """Hostile input 57: the loop reads one message at a time, so that it can handle other events in between."""
    packet = devmsg.NEEDS_RESET_HEAD.pack(devmsg.NEEDS_RESET, 0) + b"x" * 4000
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        try:
            while True:
                impostor.informs.send(packet)
        except BlockingIOError:
            reader.loop.call_from_thread(turn if turns < 50 else reader.loop.stop)

    reader.loop.call_from_thread(turn)
    reader.loop.run()

    assert turns == 50
    assert len(reader.resets) >= 49
    assert {len(text) for text, _ in reader.resets} == {200}


def test_descriptors_from_a_device_are_dropped_57(impostor: Impostor, running: DeviceProcess, reader: Reader) -> None:
    """Hostile input 57: the VM process accepts no descriptors from a device, so no descriptor stays open."""
    before = open_descriptors()
    for _ in range(20):
        socket.send_fds(impostor.sync, [DONE], [0, 1, 2])
        assert running.command(devmsg.RESET)
        packet = devmsg.NEEDS_RESET_HEAD.pack(devmsg.NEEDS_RESET, 0)
        socket.send_fds(impostor.informs, [packet], [0, 1, 2])
    reader.read()

    assert len(reader.resets) == 20
    assert len(open_descriptors()) == len(before)


def test_device_that_does_not_listen_57(impostor: Impostor, running: DeviceProcess) -> None:
    """Hostile input 57: sending never blocks.  The VM kills no process; the kernel ends a device that does not end."""
    for _ in range(5000):
        running.set_verbosity(1)
    running.shut_down()
    running.reap(0)

    assert not impostor.child.killed
    assert running.status is None


def test_who_does_not_end_is_named(
    impostor: Impostor, running: DeviceProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the log, and only then."""
    running.reap(0)
    assert f"{TITLE} does not end; the kernel kills it with its vm" in capfd.readouterr().err
    assert not running.has_ended()
    impostor.end(0)
    running.reap(0)
    assert capfd.readouterr().err == ""
    assert running.has_ended()



def test_an_interrupt_is_pending_until_the_guest_has_read_isr() -> None:
    """Each queue has its own counter, which wraps around."""
    words = memoryview(bytearray(8 * devmsg.QUEUES_MAX)).cast("I")
    words[1] = words[devmsg.QUEUES_MAX + 1] = 0xFFFFFFFF
    interrupts = Interrupts(words)
    assert not interrupts.take(3)

    interrupts.add(1)
    assert [interrupts.pending(queue) for queue in range(3)] == [False, True, False]
    assert (words[1], interrupts.take(1), interrupts.take(2), interrupts.take(2)) == (0, False, True, False)
    interrupts.restore_pending(2)
    assert [interrupts.pending(queue) for queue in range(3)] == [False, False, True]
    assert interrupts.take(3)


# --- all devices of a vm ---------------------------------------------------------------------------------------------


class Started:
    """A device process.  `log` has the calls of all of them, in order."""

    def __init__(self, log: list[Any], kind: Kind, module: str) -> None:
        self.kind, self.module, self.log, self.ended = kind, module, log, False
        self.place: tuple[object, ...] = ()

    def has_ended(self) -> bool:
        """Return whether it has."""
        return self.ended

    def begin(self, title: str, slot: Slot, _memory: object, figures_fd: int, place: int) -> None:
        """Take its place."""
        self.place = title, slot.name, figures_fd, place

    def set_verbosity(self, verbosity: int) -> None:
        """Note it."""
        self.log.append(("verbosity", self.module, verbosity))

    def shut_down(self) -> None:
        """Note it."""
        self.log.append(("end", self.module))

    def reap(self, timeout_s: float) -> None:
        """Note it."""
        assert timeout_s == devproc.END_TIMEOUT_S
        self.log.append(("wait", self.module))


class Fleet(DeviceProcesses):
    """All device processes of a VM, and what was started: at most `most`."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []
        self.most = 100

    def start(self, kind: Kind, module: str) -> Started:
        """Replace `DeviceProcess`."""
        if sum(step == "start" for step, *_ in self.log) == self.most:
            raise HostError("start a process", errno.EAGAIN)
        self.log.append(("start", module))
        return Started(self.log, kind, module)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """Return the processes of a VM that has none yet."""
    made = Fleet()
    monkeypatch.setattr(devproc, "DeviceProcess", made.start)
    return made


def modules(processes: list[DeviceProcess]) -> list[str]:
    """Return their main modules."""
    return [each.module for each in processes]


def test_processes_in_reserve_are_taken_once(fleet: Fleet) -> None:
    """By devices of the same program.  A seed is a disk.  Others, and those whose spare has ended, get new ones."""
    fleet.fill_reserve([(DISK, MAIN), (DISK, RAW), (DISK, RAW), (INTERFACE, MAIN)])
    first, seed, ended, interface = fleet.reserve
    cast("Any", ended).ended = True
    fleet.log.clear()
    fleet.spawn([(ENTROPY, MAIN), (INTERFACE, KERNEL), (DISK, MAIN), (SEED, RAW), (DISK, RAW)])

    assert fleet.log == [("start", KERNEL), ("start", RAW)]
    assert fleet.running[1:3] == [first, seed]
    assert [each.kind for each in fleet.running] == [INTERFACE, DISK, SEED, DISK]
    assert fleet.reserve == [ended, interface]


def test_a_host_that_cannot_fill_the_reserve(fleet: Fleet) -> None:
    """What is there is kept.  Who needs a process that cannot be started is told."""
    fleet.most = 1
    fleet.fill_reserve([(DISK, MAIN), (INTERFACE, MAIN)])
    assert modules(fleet.reserve) == [MAIN]
    fleet.spawn([(DISK, MAIN)])
    with pytest.raises(HostError, match="start a process"):
        fleet.spawn([(DISK, MAIN)])


def test_the_reserve_is_dropped_until_it_has_ended(fleet: Fleet) -> None:
    """Those that have ended are forgotten, and the others are asked again."""
    fleet.fill_reserve([(DISK, RAW), (INTERFACE, KERNEL)])
    fleet.log.clear()
    fleet.drop_reserve()
    assert fleet.log == [("end", RAW), ("end", KERNEL)]
    cast("Any", fleet.reserve[0]).ended = True
    fleet.drop_reserve()
    assert fleet.log[2:] == [("end", KERNEL)]
    assert modules(fleet.reserve) == [KERNEL]


def test_each_process_becomes_its_device(fleet: Fleet) -> None:
    """Its counters have the place of its slot.  The VM process itself serves the first slot."""
    fleet.spawn([(ENTROPY, MAIN), (INTERFACE, MAIN), (DISK, RAW)])
    slots = [Slot(kind=kind, index=0, number=number) for number, kind in enumerate((ENTROPY, INTERFACE, DISK), 1)]
    fleet.begin("vm/a", slots, cast("Any", None), 9)
    assert [cast("Any", each).place for each in fleet.running] == [
        ("vm/a", "vionet0", 9, 1), ("vm/a", "vioblk0", 9, 2),
    ]  # fmt: skip


def test_all_processes_end_at_the_same_time(fleet: Fleet) -> None:
    """Each is asked before one is waited for, also those in reserve."""
    fleet.spawn([(INTERFACE, KERNEL), (DISK, RAW)])
    fleet.fill_reserve([(DISK, MAIN)])
    fleet.log.clear()
    fleet.set_verbosity(2)
    assert fleet.log == [("verbosity", KERNEL, 2), ("verbosity", RAW, 2)]
    fleet.log.clear()
    fleet.end()
    all_of_them = (KERNEL, RAW, MAIN)
    assert fleet.log == [*(("end", module) for module in all_of_them), *(("wait", module) for module in all_of_them)]
    assert (fleet.running, fleet.reserve) == ([], [])
