"""The controller with the CD-ROM drive: requests in a ring, without a process."""

import errno
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.support.fakedriver import DATA, INDIRECT_DESC, KIB, LAYOUT, MIB, WRITE, Desc, Ring, release
from tests.support.figures import unseen
from vmd.devices.vioscsi import device as vioscsi
from vmd.devices.vioscsi.device import CONTROL, EVENT, REQUEST, Vioscsi
from vmd.errors import GuestError
from vmd.guestmem import GuestMemory
from vmd.ipc import devmsg
from vmd.log import RateLimit
from vmd.virtio.queue import Queue

BLOCK = 2048
DISC = bytes(range(251)) * (100 * BLOCK // 251)  # ends inside a block
REQUEST_BYTES, RESPONSE_BYTES = 51, 108
LUN, OTHER_LUN, OTHER_TARGET = b"\1\0\x40\0\0\0\0\0", b"\1\0\x40\1\0\0\0\0", b"\1\1\x40\0\0\0\0\0"
REQUEST_AT, RESPONSE_AT, BUFFER = DATA, DATA + 4 * KIB, DATA + 64 * KIB
READY, INQUIRY, LOCK = bytes(6), bytes.fromhex("120000002400"), bytes.fromhex("1e0000000100")
GOOD, OVERRUN, BAD_TARGET, FAILURE, REJECTED, INCORRECT_LUN = 0, 1, 3, 9, 11, 12


class Answer(NamedTuple):
    """The fields of a response, and the data behind it."""

    used: int
    residual: int
    status: int
    response: int
    sense: bytes
    data: bytes


class Services:
    """A process that counts interrupts."""

    def __init__(self) -> None:
        self.figures = unseen("vioscsi")
        self.interrupts: list[int] = []

    def interrupt(self, queue: int) -> None:
        """Count it."""
        self.interrupts.append(queue)


class Complaints(RateLimit):
    """Lines for the log."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        """Keep it."""
        self.said.append(text)


class Cdrom:
    """A controller, its rings, and a driver."""

    def __init__(self, memory: GuestMemory, content: bytes | None) -> None:
        self.memory = memory
        self.services = Services()
        self.device = Vioscsi(self.services, None if content is None else disc(content))
        self.device.complaints = complaints = Complaints()
        self.said = complaints.said
        self.rings = [Ring(memory, 16, 0x10000 * (number + 1)) for number in range(3)]
        self.queues = [Queue(memory, INDIRECT_DESC, 16, ring.desc, ring.avail, ring.used) for ring in self.rings]
        self.device.activate(0, list(self.queues))

    def figures(self) -> dict[str, int]:
        """Return all figures but the time."""
        named = dict(zip(devmsg.FIGURES["vioscsi"], self.services.figures, strict=True))
        return {name: value for name, value in named.items() if "ns" not in name}

    def offer(self, cdb: bytes, *parts: Desc, lun: bytes = LUN, at: int = REQUEST_AT) -> int:
        """Make a command available; its response is 108 bytes at RESPONSE_AT, unless parts are given."""
        self.memory.load(at, (lun + bytes(11) + cdb).ljust(REQUEST_BYTES, b"\0"))
        return self.rings[REQUEST].add([Desc(at, REQUEST_BYTES), *(parts or [Desc(RESPONSE_AT, 108, WRITE)])])

    def answer(self, room: int) -> Answer:
        """Serve the only request; return its response, and the data at BUFFER."""
        assert not self.device.on_notify(REQUEST)
        ((_, used),) = self.rings[REQUEST].reap()
        length, residual, _, status, response = struct.unpack("<IIHBB", self.memory.read(RESPONSE_AT, 12))
        sense = self.memory.read(RESPONSE_AT + 12, 96)
        assert sense[length:] == bytes(96 - length)
        return Answer(used, residual, status, response, sense[:length], self.memory.read(BUFFER, room))

    def ask(self, cdb: bytes, room: int = 0, lun: bytes = LUN) -> Answer:
        """Carry out a command with a buffer of `room` bytes."""
        self.memory.load(RESPONSE_AT, b"\xee" * RESPONSE_BYTES)
        self.memory.load(BUFFER, b"\xee" * room)
        self.offer(cdb, Desc(RESPONSE_AT, 108, WRITE), *[Desc(BUFFER, room, WRITE)] * bool(room), lun=lun)
        return self.answer(room)

    def control(self, request: bytes, room: int) -> bytes:
        """Send a control request; return its answer."""
        self.memory.load(REQUEST_AT, request)
        self.memory.load(RESPONSE_AT, b"\xee" * room)
        self.rings[CONTROL].add([Desc(REQUEST_AT, len(request)), Desc(RESPONSE_AT, room, WRITE)])
        assert not self.device.on_notify(CONTROL)
        ((_, used),) = self.rings[CONTROL].reap()
        assert self.memory.read(RESPONSE_AT + used, room - used) == b"\xee" * (room - used)
        return self.memory.read(RESPONSE_AT, used)

    def task(self, subtype: int, lun: bytes = LUN) -> int:
        """Ask for a task management function; return the response."""
        (response,) = self.control(struct.pack("<II", 0, subtype) + lun + bytes(8), 1)
        return response

    def close(self) -> None:
        """Release the memory."""
        self.device.close()
        for queue in self.queues:
            release(queue)


def disc(content: bytes) -> int:
    """Return a file with this content."""
    fd = os.memfd_create("disc")
    os.pwrite(fd, content, 0)
    return fd


def read10(lba: int, count: int) -> bytes:
    """Return the command block of a READ(10)."""
    return b"\x28\0" + lba.to_bytes(4, "big") + b"\0" + count.to_bytes(2, "big") + b"\0"


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Guest memory."""
    with GuestMemory.create(LAYOUT) as made:
        yield made


@pytest.fixture
def cdrom(memory: GuestMemory) -> Iterator[Cdrom]:
    """A drive with a disc."""
    made = Cdrom(memory, DISC)
    yield made
    made.close()


@pytest.fixture
def empty(memory: GuestMemory) -> Iterator[Cdrom]:
    """A drive without a disc."""
    made = Cdrom(memory, None)
    yield made
    made.close()


def test_read_is_counted(cdrom: Cdrom) -> None:
    """The guest gets the bytes of the disc and an interrupt; the last block ends with zeroes."""
    assert cdrom.ask(read10(3, 5), 5 * BLOCK) == (108 + 5 * BLOCK, 0, 0, GOOD, b"", DISC[3 * BLOCK : 8 * BLOCK])
    assert cdrom.ask(read10(99, 1), BLOCK + 9).data == DISC[99 * BLOCK :].ljust(BLOCK, b"\0") + b"\xee" * 9
    assert cdrom.ask(read10(99, 1), BLOCK + 9).residual == 9
    assert cdrom.services.interrupts == [REQUEST] * 3
    assert cdrom.figures() == {
        "commands": 3, "read_requests": 3, "read_bytes": 7 * BLOCK, "errors": 0, "size_bytes": len(DISC),
    }  # fmt: skip


LAYOUTS = {
    "one by one": [1] * 12,
    "response in parts": [5, 0, 100, 3, 2 * BLOCK],
    "response and data in one": [108 + 2 * BLOCK],
    "a boundary within the data": [100, 8 + 7, 0, BLOCK, BLOCK - 7],
}


@pytest.mark.parametrize("parts", LAYOUTS.values(), ids=LAYOUTS)
def test_response_and_data_in_any_layout(cdrom: Cdrom, parts: list[int]) -> None:
    """The driver chooses where to cut the writable bytes; the buffers are not adjacent."""
    if sum(parts) < 108:
        parts = [*parts, 108 - sum(parts) + 2 * BLOCK]
    places = [BUFFER + 2 * number * 8 * KIB for number in range(len(parts))]
    written = [Desc(place, length, WRITE) for place, length in zip(places, parts, strict=True)]
    cdrom.offer(read10(7, 2), *written)

    assert not cdrom.device.on_notify(REQUEST)

    assert cdrom.rings[REQUEST].reap() == [(0, 108 + 2 * BLOCK)]
    raw = b"".join(cdrom.memory.read(place, length) for place, length in zip(places, parts, strict=True))
    assert raw == bytes(108) + DISC[7 * BLOCK : 9 * BLOCK]


def test_many_bytes_and_many_buffers(cdrom: Cdrom) -> None:
    """A read is done in pieces of at most 1 MiB, which need not end where a buffer does."""
    big = bytes(range(256)) * (3 * MIB // 256)
    cdrom.device.change(disc(big), force=True)
    cdrom.ask(READY)  # takes the unit attention
    cdrom.offer(read10(1, 1024), Desc(RESPONSE_AT, 108, WRITE), Desc(4 * MIB, MIB + 5, WRITE),
                Desc(6 * MIB, MIB - 5, WRITE))  # fmt: skip
    assert cdrom.answer(0)[1:4] == (0, 0, GOOD)
    assert cdrom.memory.read(4 * MIB, MIB + 5) + cdrom.memory.read(6 * MIB, MIB - 5) == big[BLOCK : BLOCK + 2 * MIB]

    table = [Desc(REQUEST_AT, 51), Desc(RESPONSE_AT, 108, WRITE), *[
        Desc(4 * MIB + 4 * number, 3, WRITE) for number in range(1000)
    ]]  # fmt: skip
    cdrom.memory.load(REQUEST_AT, LUN + bytes(11) + read10(0, 1).ljust(32, b"\0"))
    cdrom.rings[REQUEST].add_indirect(table, 8 * MIB)
    assert cdrom.answer(0)[1:4] == (3000 - BLOCK, 0, GOOD)
    raw = b"".join(cdrom.memory.read(part.gpa, 3) for part in table[2:])
    assert raw[:BLOCK] == big[:BLOCK]


@pytest.mark.parametrize(
    ("lun", "response"),
    [
        (LUN, GOOD), (b"\1\0\0\0" + bytes(4), GOOD), (OTHER_LUN, BAD_TARGET), (OTHER_TARGET, BAD_TARGET),
        (b"\1\0\x80\0" + bytes(4), BAD_TARGET), (b"\2\0\x40\0" + bytes(4), BAD_TARGET),
    ],
)  # fmt: skip
def test_there_is_one_drive(cdrom: Cdrom, lun: bytes, response: int) -> None:
    """Commands and event requests to other addresses are answered, and have no effect."""
    answer = cdrom.ask(INQUIRY, 36, lun)

    assert answer.response == response
    assert answer.data == (b"\xee" * 36 if response else cdrom.ask(INQUIRY, 36).data)
    assert answer.used == 108 + (0 if response else 36)
    assert cdrom.figures()["errors"] == bool(response)
    for kind in (1, 2):
        assert cdrom.control(struct.pack("<I8sI", kind, lun, 0xFF), 5) == struct.pack("<IB", 0, response)


def test_refused_command_has_sense_data(cdrom: Cdrom) -> None:
    """The operator reads of an unknown command only."""
    assert cdrom.ask(b"\xff").sense[2:13:10] == bytes((5, 0x20))
    assert cdrom.said == ["unsupported opcode 0xff"]
    answer = cdrom.ask(read10(100, 1), BLOCK)
    assert (answer.used, answer.residual, answer.status, answer.response) == (108, BLOCK, 2, GOOD)
    assert answer.sense[2:13:10] == bytes((5, 0x21))
    assert len(cdrom.said) == 1
    assert cdrom.figures()["errors"] == 2


def test_too_small_a_buffer_overruns(cdrom: Cdrom) -> None:
    """Nothing is written but the response."""
    assert cdrom.ask(read10(0, 1), BLOCK - 1) == (108, BLOCK - 1, 0, OVERRUN, b"", b"\xee" * (BLOCK - 1))
    assert cdrom.ask(read10(0, 1), BLOCK).response == GOOD


def test_data_in_both_directions_is_refused(cdrom: Cdrom) -> None:
    """The feature for it is not offered; data to the drive alone is left over."""
    cdrom.memory.load(REQUEST_AT, LUN + bytes(11) + INQUIRY.ljust(32, b"\0"))
    for written, expected in (((Desc(BUFFER, 36, WRITE),), (108, 46, 0, FAILURE)), ((), (108, 10, 0, OVERRUN))):
        cdrom.rings[REQUEST].add([Desc(REQUEST_AT, 61), Desc(RESPONSE_AT, 108, WRITE), *written])
        assert cdrom.answer(0)[:4] == expected


def test_disc_that_cannot_be_read(cdrom: Cdrom) -> None:
    """Its file has become shorter: an error, of which the operator reads."""
    assert cdrom.device.fd is not None
    os.ftruncate(cdrom.device.fd, 10 * BLOCK)

    answer = cdrom.ask(read10(9, 2), 2 * BLOCK)

    assert (answer.used, answer.residual, answer.status, answer.response) == (108, 2 * BLOCK, 2, GOOD)
    assert answer.sense[2:13:10] == bytes((3, 0x3A))
    assert cdrom.said == [f"cannot read the disc at {9 * BLOCK}: the file has become shorter"]
    assert cdrom.ask(read10(9, 1), BLOCK).status == 0
    assert (cdrom.figures()["read_requests"], cdrom.figures()["errors"]) == (1, 1)


def test_drive_without_a_disc(empty: Cdrom) -> None:
    """It answers, and has no size; a disc that comes is announced."""
    assert empty.ask(READY).sense[2:13:10] == bytes((2, 0x3A))
    assert empty.figures()["size_bytes"] == 0
    empty.device.change(disc(DISC), force=False)
    assert empty.figures()["size_bytes"] == len(DISC)
    assert empty.ask(READY).sense[2:13:10] == bytes((6, 0x28))
    assert empty.ask(read10(1, 1), BLOCK).data == DISC[BLOCK : 2 * BLOCK]
    empty.device.change(None, force=False)
    assert empty.figures()["size_bytes"] == 0
    assert empty.ask(READY).sense[2:13:10] == bytes((2, 0x3A))


def test_locked_drive_keeps_its_disc(cdrom: Cdrom) -> None:
    """The new disc's descriptor is closed, and so is the old one's once it is replaced."""
    cdrom.ask(LOCK)
    old, new = cdrom.device.fd, disc(b"n" * BLOCK)
    assert old is not None
    with pytest.raises(OSError, match="the guest has locked the drive") as refused:
        cdrom.device.change(new, force=False)
    assert refused.value.errno == errno.EBUSY
    assert cdrom.ask(bytes.fromhex("4a010000100000000800"), 8).data.hex() == "0006041401020000"  # a request to eject
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(new)
    assert cdrom.ask(read10(1, 1), BLOCK).data == DISC[BLOCK : 2 * BLOCK]

    forced = disc(b"f" * BLOCK)
    os.dup2(forced, 900)
    os.close(forced)
    cdrom.device.change(900, force=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(old)
    assert cdrom.device.fd == 900
    cdrom.device.change(None, force=False)  # the change has unlocked the drive


@pytest.mark.parametrize(
    ("subtype", "lun", "response"),
    [
        *[(subtype, LUN, 0) for subtype in (0, 1, 3, 4, 5, 6, 7)],
        (2, LUN, REJECTED), (8, LUN, REJECTED), (0, OTHER_TARGET, BAD_TARGET), (4, OTHER_TARGET, BAD_TARGET),
        (5, OTHER_LUN, INCORRECT_LUN), (0, OTHER_LUN, INCORRECT_LUN), (4, OTHER_LUN, 0),
    ],
)  # fmt: skip
def test_task_management(cdrom: Cdrom, subtype: int, lun: bytes, response: int) -> None:
    """Functions for the drive are complete; the two resets unlock it."""
    cdrom.ask(LOCK)

    assert cdrom.task(subtype, lun) == response
    assert cdrom.device.drive.locked == (response != 0 or subtype not in (4, 5))


def test_commands_end_before_their_abort_is_answered(cdrom: Cdrom) -> None:
    """More commands than one budget: the abort waits for all of them."""
    for _ in range(3):
        cdrom.offer(read10(0, 100), Desc(RESPONSE_AT, 108, WRITE), Desc(4 * MIB, 4 * MIB, WRITE))
    ring = cdrom.rings[CONTROL]
    cdrom.memory.load(REQUEST_AT + KIB, bytes(8) + LUN + bytes(8))
    ring.add([Desc(REQUEST_AT + KIB, 24), Desc(RESPONSE_AT + KIB, 1, WRITE)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vioscsi, "BUDGET", 250_000)
        assert cdrom.device.on_notify(CONTROL)
        assert (cdrom.rings[REQUEST].device_idx, ring.device_idx) == (2, 0)
        assert not cdrom.device.on_notify(CONTROL)
    assert (cdrom.rings[REQUEST].device_idx, ring.device_idx) == (3, 1)


def test_control_request_of_an_unknown_type_comes_back(cdrom: Cdrom) -> None:
    """The form of its answer is not known, so it has none."""
    assert cdrom.control(struct.pack("<I", 77), 5) == b""
    assert cdrom.said == ["control request of unknown type 77"]


SHORT = {
    "request": (REQUEST, [Desc(REQUEST_AT, 50), Desc(RESPONSE_AT, 108, WRITE)], "request of 50 bytes instead of 51"),
    "response": (REQUEST, [Desc(REQUEST_AT, 51), Desc(RESPONSE_AT, 107, WRITE)], "of 107 bytes instead of 108"),
    "task": (CONTROL, [Desc(REQUEST_AT, 23), Desc(RESPONSE_AT, 1, WRITE)], "request of 23 bytes instead of 24"),
    "answer": (CONTROL, [Desc(REQUEST_AT, 24)], "control response of 0 bytes instead of 1"),
}


@pytest.mark.parametrize(("number", "parts", "words"), SHORT.values(), ids=SHORT)
def test_short_request_breaks_the_ring(cdrom: Cdrom, number: int, parts: list[Desc], words: str) -> None:
    """The sentence says what is missing."""
    cdrom.memory.load(REQUEST_AT, bytes(8) + LUN)
    cdrom.rings[number].add(parts)

    with pytest.raises(GuestError, match=words):
        cdrom.device.on_notify(number)


def test_event_buffers_stay_in_the_ring(cdrom: Cdrom) -> None:
    """There is never an event."""
    cdrom.rings[EVENT].add([Desc(BUFFER, 16, WRITE)])

    assert not cdrom.device.on_notify(EVENT)
    assert cdrom.rings[EVENT].device_idx == 0
    cdrom.rings[EVENT].set_avail_idx(40)
    with pytest.raises(GuestError):
        cdrom.device.on_notify(EVENT)


def test_notification_of_a_queue_that_is_not_used(cdrom: Cdrom) -> None:
    """Before the driver starts, and after a reset, nothing is done."""
    cdrom.device.queues[CONTROL] = cdrom.device.queues[REQUEST] = None
    assert not any(cdrom.device.on_notify(number) for number in range(3))
    cdrom.device.quiesce(forget=True)
    assert not any(cdrom.device.on_notify(number) for number in range(4))


def sizes(cdrom: Cdrom, offset: int, data: bytes) -> tuple[int, int]:
    """Write to the configuration space; return the sizes of sense data and command block in it."""
    cdrom.device.write_config(offset, data)
    fields = struct.unpack("<IIIIIIIHHI", cdrom.device.config)
    assert fields[:5] + fields[7:] == (1, 17, 2048, 1, 0, 0, 1, 1)
    return fields[5:7]


def test_driver_chooses_sizes_until_the_reset(cdrom: Cdrom) -> None:
    """Sense data is cut, and the command block is longer.  A pause changes nothing."""
    assert sizes(cdrom, 20, struct.pack("<II", 4, 48)) == (4, 48)
    cdrom.memory.load(REQUEST_AT, (LUN + bytes(11) + b"\xff").ljust(67, b"\0"))
    cdrom.rings[REQUEST].add([Desc(REQUEST_AT, 67), Desc(RESPONSE_AT, 16, WRITE)])
    assert not cdrom.device.on_notify(REQUEST)
    assert cdrom.rings[REQUEST].reap() == [(0, 16)]
    assert cdrom.memory.read(RESPONSE_AT, 17) == struct.pack("<IIHBB", 4, 0, 0, 2, 0) + b"\x70\0\5\0\0"
    assert sizes(cdrom, 24, struct.pack("<I", 255)) == (4, 255)
    assert sizes(cdrom, 20, struct.pack("<I", 1024)) == (1024, 255)
    cdrom.device.quiesce(forget=False)
    assert sizes(cdrom, 0, b"") == (1024, 255)
    cdrom.device.drive.locked = True
    cdrom.device.quiesce(forget=True)
    assert sizes(cdrom, 0, b"") == (96, 32)
    assert not cdrom.device.drive.locked


@pytest.mark.parametrize(
    ("offset", "data"),
    [(0, b"\xff" * 20), (20, struct.pack("<II", 1025, 256)), (24, bytes(4)), (34, bytes(4)), (-4, bytes(4))],
)
def test_invalid_configuration_changes_nothing(cdrom: Cdrom, offset: int, data: bytes) -> None:
    """Values out of range, writes to other fields, and across an end (hostile 9, 10)."""
    assert sizes(cdrom, offset, data) == (96, 32)
