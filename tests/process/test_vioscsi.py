"""The real, confined CD-ROM process with a faulty driver (hostile input 9, 10, 16, 18, 33)."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fakedriver import (
    DATA,
    INDIRECT_DESC,
    KIB,
    MIB,
    MODERN,
    ROM,
    WRITE,
    Desc,
    Device,
    Ring,
)  # fmt: skip
from vmd.ipc import devmsg

BLOCK = 2048
BLOCKS = 3000
SPARSE_BLOCKS = (5 << 30) // BLOCK
CONTROL, EVENT, REQUEST = 0, 1, 2
REQUEST_BYTES, RESPONSE_BYTES = 51, 108
DISC = bytes(range(251)) * (BLOCKS * BLOCK // 251 + 1)
OUR_LUN = b"\1\0\x40\0\0\0\0\0"

REQUEST_AT, RESPONSE_AT, BUFFER = DATA, DATA + 4 * KIB, DATA + 64 * KIB


class Answer(NamedTuple):
    """The fields of a response, and the data behind it."""

    used: int
    sense: bytes
    residual: int
    status: int
    response: int
    data: bytes


class Cdrom:
    """A device process, its three rings, and a driver with one request at a time."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.memory = device.memory
        self.rings: list[Ring] = []
        self.activate()

    def activate(self, features: int = MODERN | INDIRECT_DESC, size: int = 128) -> None:
        """Reset the device, and activate new rings."""
        self.device.command(devmsg.RESET)
        self.begin(features, size)

    def begin(self, features: int = MODERN | INDIRECT_DESC, size: int = 128) -> None:
        """Activate new rings."""
        for fd in (*self.device.kicks, *self.device.calls):
            self.device.take_event(fd)
        self.rings = [Ring(self.memory, size, 0x10000 * (number + 1)) for number in range(3)]
        assert self.device.activate_rows(features, *(ring.row() for ring in self.rings)) == 0

    def put_request(self, cdb: bytes, lun: bytes = OUR_LUN, at: int = REQUEST_AT) -> None:
        """Write a request into memory."""
        self.memory.load(at, (lun + bytes(11) + cdb).ljust(REQUEST_BYTES, b"\0"))

    def offer(self, *parts: Desc, queue: int = REQUEST) -> int:
        """Make a chain available."""
        return self.rings[queue].add(parts)

    def collect(self, count: int = 1, queue: int = REQUEST) -> list[tuple[int, int]]:
        """Notify, and wait for `count` used chains.  Return their heads and lengths."""
        return self.device.collect(self.rings[queue], count, queue)

    def answer(self, used: int, room: int = 0, at: int = RESPONSE_AT) -> Answer:
        """Parse a response and the data behind it."""
        raw = self.memory.read(at, RESPONSE_BYTES)
        length, residual, _, status, response = struct.unpack_from("<IIHBB", raw)
        assert raw[12 + length :] == bytes(96 - length)
        return Answer(used, raw[12 : 12 + length], residual, status, response, self.memory.read(BUFFER, room))

    def ask(self, cdb: bytes, room: int = 0, lun: bytes = OUR_LUN) -> Answer:
        """Carry out one command with a buffer of `room` bytes."""
        self.put_request(cdb, lun)
        self.memory.load(RESPONSE_AT, b"\xee" * RESPONSE_BYTES)
        self.memory.load(BUFFER, b"\xee" * room)
        parts = [Desc(REQUEST_AT, REQUEST_BYTES), Desc(RESPONSE_AT, RESPONSE_BYTES, WRITE)]
        self.offer(*parts, *([Desc(BUFFER, room, WRITE)] if room else []))
        ((_, used),) = self.collect()
        return self.answer(used, room)

    def task(self, subtype: int, lun: bytes = OUR_LUN) -> int:
        """Ask for a task management function; return the response."""
        self.memory.load(REQUEST_AT, struct.pack("<II", 0, subtype) + lun + bytes(8))
        self.memory.load(RESPONSE_AT, b"\xee")
        self.offer(Desc(REQUEST_AT, 24), Desc(RESPONSE_AT, 1, WRITE), queue=CONTROL)
        ((_, used),) = self.collect(queue=CONTROL)
        assert used == 1
        return self.memory.read(RESPONSE_AT, 1)[0]

    def works(self) -> bool:
        """Return whether the drive still reads."""
        got = self.ask(read10(5, 1), BLOCK)
        return got.data == DISC[5 * BLOCK : 6 * BLOCK] and got.status == got.response == 0


def read10(lba: int, count: int) -> bytes:
    """Return the command block of a READ(10)."""
    return b"\x28\0" + lba.to_bytes(4, "big") + b"\0" + count.to_bytes(2, "big") + b"\0"


@pytest.fixture(scope="module")
def disc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a disc: a pattern, a hole, and one block beyond 4 GiB."""
    path = tmp_path_factory.mktemp("disc") / "disc.iso"
    with path.open("wb") as file:
        file.write(DISC[: BLOCKS * BLOCK])
        file.seek((SPARSE_BLOCKS - 1) * BLOCK)
        file.write(b"Z" * BLOCK)
    return path


@pytest.fixture(scope="module")
def running(disc: Path) -> Iterator[Device]:
    """Return a started process with the disc in it."""
    with disc.open("rb") as file, Device("vioscsi", [file.fileno()], queues=3) as device:
        yield device.start()


@pytest.fixture
def cdrom(running: Device) -> Cdrom:
    """Return the drive after a reset."""
    return Cdrom(running)


def test_configuration_is_that_of_vmd(running: Device) -> None:
    """All fields of *cat. 6.6*."""
    assert struct.unpack("<IIIIIIIHHI", running.config) == (1, 17, 2048, 1, 0, 96, 32, 0, 1, 1)


def test_inquiry(cdrom: Cdrom) -> None:
    """Response, data, residue and used length are right for a command that fills only a part of its buffer."""
    got = cdrom.ask(bytes.fromhex("12000000ff00"), 255)

    assert got[:5] == (RESPONSE_BYTES + 36, b"", 255 - 36, 0, 0)
    assert got.data == bytes.fromhex("058000021f000000") + b"OpenBSD VMM CD-ROM      001 " + b"\xee" * 219


def test_command_without_data(cdrom: Cdrom) -> None:
    """The answer is only the response."""
    assert cdrom.ask(bytes(6)) == (RESPONSE_BYTES, b"", 0, 0, 0, b"")


def test_unknown_opcode_is_answered(cdrom: Cdrom) -> None:
    """The answer is CHECK CONDITION with sense data.  Repetitions cause only a few log lines."""
    cdrom.device.read_log()
    answers = {cdrom.ask(b"\xff", 100)[:5] for _ in range(50)}

    sense = bytes.fromhex("7000050000000006000000002000")
    assert answers == {(RESPONSE_BYTES, sense, 100, 2, 0)}
    assert 1 <= cdrom.device.read_log().count("\n") <= 8


@pytest.mark.parametrize(
    "lun", [b"\1\1\x40\0", b"\1\0\x40\1", b"\1\0\x41\0", b"\0\0\x40\0", b"\xc1\1\0\0", b"\xff" * 4, b"\1\xff\0\0"]
)
def test_other_targets_and_luns_do_not_exist(cdrom: Cdrom, lun: bytes) -> None:
    """The response is BAD_TARGET."""
    got = cdrom.ask(bytes.fromhex("120000002400"), 36, lun + bytes(4))

    assert got == (RESPONSE_BYTES, b"", 36, 0, 3, b"\xee" * 36)


def test_both_notations_of_lun_0_reach_the_drive(cdrom: Cdrom) -> None:
    """They are the peripheral and the flat notation."""
    answers = [cdrom.ask(bytes(6), lun=lun + bytes(5)) for lun in (b"\1\0\0", b"\1\0\x40")]

    assert [got.response for got in answers] == [0, 0]


def test_the_figures_of_a_drive(cdrom: Cdrom) -> None:
    """They count commands, reads, read bytes and errors."""
    before = cdrom.device.figures()
    assert before["size_bytes"] == SPARSE_BLOCKS * BLOCK
    cdrom.ask(bytes(6))
    cdrom.ask(read10(17, 33), 33 * BLOCK)
    cdrom.ask(b"\xff", 100)
    after = cdrom.device.figures()
    assert after.pop("busy_ns") > before.pop("busy_ns")
    assert {name: value - before[name] for name, value in after.items()} == {
        "commands": 3, "read_requests": 1, "read_bytes": 33 * BLOCK, "errors": 1, "size_bytes": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("lba", "count"), [(0, 1), (17, 33), (BLOCKS - 1, 1), (100, 1024)])
def test_read(cdrom: Cdrom, lba: int, count: int) -> None:
    """The answer has the disc's bytes, and no residue."""
    size = count * BLOCK

    got = cdrom.ask(read10(lba, count), size)

    assert got[:5] == (RESPONSE_BYTES + size, b"", 0, 0, 0)
    assert got.data == DISC[lba * BLOCK :][:size]


def test_read_beyond_4_gib(cdrom: Cdrom) -> None:
    """The last block can be read, and a block behind it is refused."""
    assert cdrom.ask(read10(SPARSE_BLOCKS - 1, 1), BLOCK).data == b"Z" * BLOCK
    assert cdrom.ask(read10(SPARSE_BLOCKS, 1), BLOCK).sense == bytes.fromhex("7000050000000006000000002100")


def test_read_into_too_small_a_buffer_overruns(cdrom: Cdrom) -> None:
    """The response is OVERRUN, and the buffer is unchanged."""
    assert cdrom.ask(read10(0, 2), BLOCK) == (RESPONSE_BYTES, b"", BLOCK, 0, 1, b"\xee" * BLOCK)


def test_read_into_more_descriptors_than_one_call_takes(cdrom: Cdrom) -> None:
    """A table of 1024 descriptors has one page many times, and then three other pages."""
    cdrom.put_request(read10(0, 2048))
    pages = [Desc(BUFFER, 4096, WRITE)] * 1021 + [Desc(2 * MIB, 3 * 4096, WRITE)]
    parts = [Desc(REQUEST_AT, REQUEST_BYTES), Desc(RESPONSE_AT, RESPONSE_BYTES, WRITE), *pages]
    cdrom.rings[REQUEST].add_indirect(parts, 8 * MIB)

    ((_, used),) = cdrom.collect()

    assert cdrom.answer(used)[:5] == (RESPONSE_BYTES + 4 * MIB, b"", 0, 0, 0)
    assert cdrom.memory.read(2 * MIB, 3 * 4096) == DISC[1021 * 4096 : 1024 * 4096]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layout(cdrom: Cdrom, data: st.DataObject) -> None:
    """Requests, responses and buffers in random pieces, also empty ones, give the same answer."""

    def cut(start: int, size: int, flags: int) -> list[Desc]:
        cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=5)))
        ends = [*cuts, size]
        return [Desc(start + a, b - a, flags) for a, b in zip([0, *cuts], ends, strict=True)]

    lba, count = data.draw(st.integers(0, 200)), data.draw(st.integers(1, 3))
    cdrom.put_request(read10(lba, count))
    writable = RESPONSE_BYTES + count * BLOCK
    cdrom.offer(*cut(REQUEST_AT, REQUEST_BYTES, 0), *cut(RESPONSE_AT, writable, WRITE))

    ((_, used),) = cdrom.collect()

    assert cdrom.answer(used)[:5] == (writable, b"", 0, 0, 0)
    assert cdrom.memory.read(RESPONSE_AT + RESPONSE_BYTES, count * BLOCK) == DISC[lba * BLOCK :][: count * BLOCK]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cdb=st.binary(max_size=32), room=st.sampled_from([0, 1, 36, 4096, 512 * KIB]))
def test_any_command(cdrom: Cdrom, cdb: bytes, room: int) -> None:
    """Used length and residue add up to the buffer.  There is sense data exactly with CHECK CONDITION."""
    got = cdrom.ask(cdb, room)

    assert got.response in (0, 1)
    assert got.used + got.residual == RESPONSE_BYTES + room
    assert (got.status == 2) == bool(got.sense)


BAD_CHAINS = {
    "18: nothing to write": [Desc(REQUEST_AT, 51), Desc(RESPONSE_AT, 108)],
    "18: nothing to read": [Desc(REQUEST_AT, 51, WRITE), Desc(RESPONSE_AT, 108, WRITE)],
    "short request": [Desc(REQUEST_AT, 50), Desc(RESPONSE_AT, 108, WRITE)],
    "short response": [Desc(REQUEST_AT, 51), Desc(RESPONSE_AT, 107, WRITE)],
    "empty": [Desc(REQUEST_AT, 0)],
}


@pytest.mark.parametrize("name", BAD_CHAINS)
def test_broken_request_needs_a_reset(cdrom: Cdrom, name: str) -> None:
    """The device sends a sentence.  After the reset the drive works."""
    cdrom.put_request(read10(0, 2))
    cdrom.offer(*BAD_CHAINS[name])
    cdrom.device.kick(REQUEST)

    assert cdrom.device.needs_reset()
    cdrom.activate()
    assert cdrom.works()


def test_only_the_needed_part_of_a_4_gib_buffer_is_touched(cdrom: Cdrom) -> None:
    """Hostile 16: the residue is right, and nothing is allocated for the rest or read from it."""
    room = 0xFFFFFFFF - RESPONSE_BYTES - REQUEST_BYTES
    cdrom.put_request(bytes.fromhex("120000002400"))
    cdrom.offer(Desc(REQUEST_AT, 51), Desc(RESPONSE_AT, 108, WRITE), Desc(BUFFER, room, WRITE))

    ((_, used),) = cdrom.collect()

    assert cdrom.answer(used)[:3] == (RESPONSE_BYTES + 36, b"", room - 36)


def test_reads_beyond_a_rounds_budget_are_finished(cdrom: Cdrom) -> None:
    """Sixteen reads of 4 MiB with one notification."""
    cdrom.put_request(read10(0, 2048))
    parts = [Desc(REQUEST_AT, 51), Desc(RESPONSE_AT, 108, WRITE), Desc(4 * MIB, 4 * MIB, WRITE)]
    heads = [cdrom.offer(*parts) for _ in range(16)]

    assert cdrom.collect(16) == [(head, RESPONSE_BYTES + 4 * MIB) for head in heads]


@pytest.mark.parametrize(
    ("subtype", "lun", "response"),
    [
        *[(subtype, OUR_LUN, 0) for subtype in (0, 1, 3, 4, 5, 6, 7)],
        (2, OUR_LUN, 11), (8, OUR_LUN, 11), (0xFFFFFFFF, OUR_LUN, 11),
        (0, b"\1\1\x40\0" + bytes(4), 3), (5, b"\1\0\x40\1" + bytes(4), 12), (4, b"\1\0\x40\1" + bytes(4), 0),
    ],
)  # fmt: skip
def test_task_management(cdrom: Cdrom, subtype: int, lun: bytes, response: int) -> None:
    """Functions for the drive are complete.  Unknown functions are rejected, and other addresses refused."""
    assert cdrom.task(subtype, lun) == response


def test_commands_end_before_their_abort_is_answered(cdrom: Cdrom) -> None:
    """A driver that gets the answer frees the memory of its commands."""
    cdrom.put_request(read10(0, 2048), at=REQUEST_AT + KIB)
    parts = [Desc(REQUEST_AT + KIB, 51), Desc(RESPONSE_AT + KIB, 108, WRITE), Desc(4 * MIB, 4 * MIB, WRITE)]
    heads = [cdrom.offer(*parts) for _ in range(8)]

    assert cdrom.task(0) == 0
    assert [head for head, _ in cdrom.rings[REQUEST].reap()] == heads


def test_asynchronous_notification_is_answered(cdrom: Cdrom) -> None:
    """No event can be subscribed to.  An unknown request is returned without an answer."""
    cdrom.memory.load(REQUEST_AT, struct.pack("<I8sI", 2, OUR_LUN, 0xFF))
    cdrom.offer(Desc(REQUEST_AT, 16), Desc(RESPONSE_AT, 5, WRITE), queue=CONTROL)
    cdrom.memory.load(REQUEST_AT + 64, struct.pack("<I", 77))
    cdrom.offer(Desc(REQUEST_AT + 64, 4), Desc(RESPONSE_AT + 64, 5, WRITE), queue=CONTROL)

    assert [used for _, used in cdrom.collect(2, CONTROL)] == [5, 0]
    assert cdrom.memory.read(RESPONSE_AT, 5) == bytes(5)


@pytest.mark.parametrize("parts", [
    [Desc(REQUEST_AT, 3), Desc(RESPONSE_AT, 1, WRITE)],
    [Desc(REQUEST_AT, 23), Desc(RESPONSE_AT, 1, WRITE)],
    [Desc(REQUEST_AT, 24)],
    [Desc(REQUEST_AT, 24), Desc(ROM, 1, WRITE)],
])  # fmt: skip
def test_broken_control_request_needs_a_reset(cdrom: Cdrom, parts: list[Desc]) -> None:
    """The control queue behaves like the request queue."""
    cdrom.memory.load(REQUEST_AT, bytes(24))
    cdrom.offer(*parts, queue=CONTROL)
    cdrom.device.kick(CONTROL)

    assert cdrom.device.needs_reset()


def test_event_buffers_are_kept(cdrom: Cdrom) -> None:
    """They are neither used nor returned."""
    cdrom.offer(Desc(BUFFER, 16, WRITE), queue=EVENT)
    cdrom.device.kick(EVENT)

    assert cdrom.works()
    assert cdrom.device.export()[EVENT] == (0, 0)


def configure(device: Device, offset: int, data: bytes) -> tuple[int, ...]:
    """Write to the configuration space.  Return all its fields."""
    answer = device.ask(devmsg.CONFIG_WRITE_HEAD.pack(devmsg.CONFIG_WRITE, offset, len(data)) + data)
    return struct.unpack("<IIIIIIIHHI", answer[devmsg.READY_HEAD.size :])


def test_driver_chooses_sizes(cdrom: Cdrom) -> None:
    """Sense data is cut, and the command block is longer.  A reset undoes both."""
    assert configure(cdrom.device, 20, struct.pack("<II", 4, 48))[5:7] == (4, 48)
    cdrom.put_request(b"\xff")
    cdrom.memory.load(RESPONSE_AT, b"\xee" * RESPONSE_BYTES)
    cdrom.offer(Desc(REQUEST_AT, 19 + 48), Desc(RESPONSE_AT, 16, WRITE))

    ((_, used),) = cdrom.collect()

    assert used == 16
    assert cdrom.memory.read(RESPONSE_AT, 17) == struct.pack("<IIHBB", 4, 0, 0, 2, 0) + b"\x70\0\5\0\xee"
    cdrom.activate()
    assert cdrom.works()


def test_driver_chooses_sizes_before_it_starts(cdrom: Cdrom) -> None:
    """Linux does so.  The sizes hold until the reset."""
    cdrom.device.command(devmsg.RESET)
    assert configure(cdrom.device, 20, struct.pack("<II", 4, 48))[5:7] == (4, 48)
    cdrom.begin()
    cdrom.put_request(b"\xff")
    cdrom.offer(Desc(REQUEST_AT, 19 + 48), Desc(RESPONSE_AT, 16, WRITE))
    assert cdrom.collect() == [(0, 16)]
    cdrom.device.command(devmsg.RESET)

    assert configure(cdrom.device, 0, b"")[5:7] == (96, 32)


@pytest.mark.parametrize(("offset", "data"), [(0, b"\xff" * 20), (20, b"\xff" * 8), (24, bytes(4)), (34, bytes(4))])
def test_an_invalid_configuration_changes_nothing(cdrom: Cdrom, offset: int, data: bytes) -> None:
    """Hostile 9 and 10: zero, huge values, and writes to read-only fields or across the end."""
    assert configure(cdrom.device, offset, data) == (1, 17, 2048, 1, 0, 96, 32, 0, 1, 1)
    assert cdrom.works()


@pytest.mark.parametrize("extra", [1, 512, BLOCK - 1])
def test_disc_of_an_odd_length_ends_with_zeroes(tmp_path: Path, extra: int) -> None:
    """Its last block can be read alone and together with others."""
    path = tmp_path / "odd.iso"
    path.write_bytes(DISC[: 60 * BLOCK + extra])
    last = DISC[60 * BLOCK : 60 * BLOCK + extra].ljust(BLOCK, b"\0")
    with path.open("rb") as file, Device("vioscsi", [file.fileno()], queues=3) as device:
        cdrom = Cdrom(device.start())

        assert cdrom.ask(b"\x25" + bytes(9), 8).data == struct.pack(">II", 60, BLOCK)
        assert cdrom.ask(read10(60, 1), BLOCK).data == last
        assert cdrom.ask(read10(58, 3), 3 * BLOCK).data == DISC[58 * BLOCK : 60 * BLOCK] + last


def test_disc_that_becomes_shorter_gives_read_errors(tmp_path: Path) -> None:
    """Hostile 33: the answer is sense 3/3A without data.  The rest of the disc can be read."""
    path = tmp_path / "short.iso"
    path.write_bytes(DISC[: 100 * BLOCK])
    with path.open("rb") as file, Device("vioscsi", [file.fileno()], queues=3) as device:
        cdrom = Cdrom(device.start())
        os.truncate(path, 50 * BLOCK)

        got = cdrom.ask(read10(40, 20), 20 * BLOCK)

        assert got[:5] == (RESPONSE_BYTES, bytes.fromhex("7000030000000006000000003a00"), 20 * BLOCK, 2, 0)
        assert cdrom.works()


def test_drive_without_a_disc() -> None:
    """The drive answers, and says that it has no medium."""
    with Device("vioscsi", queues=3) as device:
        cdrom = Cdrom(device.start())

        assert cdrom.ask(bytes(6)).sense == bytes.fromhex("7000020000000006000000003a00")
        assert cdrom.ask(bytes.fromhex("120000002400"), 36).residual == 0


def test_memory_does_not_grow_with_requests(cdrom: Cdrom) -> None:
    """A second run of the same requests leaves no more memory in use."""

    def ask_a_lot() -> None:
        for number in range(300):
            cdrom.ask(read10(number, 64), 64 * BLOCK)
            cdrom.ask(bytes((number & 0xFF,)), 512)

    ask_a_lot()
    before = cdrom.device.own_kib()

    ask_a_lot()

    assert cdrom.device.own_kib() < before + 256


# --- another disc ------------------------------------------------------------------------------------------------


def change(device: Device, fd: int | None, *, force: bool = False) -> tuple[int, str]:
    """Insert a disc, or remove it (`fd` None).  Return errno and sentence of the answer."""
    packet = devmsg.DISC_HEAD.pack(devmsg.DISC, devmsg.DISC_FORCE if force else 0) + (b"" if fd is None else b"other")
    socket.send_fds(device.informs, [packet], [] if fd is None else [fd])
    device.wait_for(device.informs.fileno())
    packet = device.informs.recv(devmsg.PACKET_MAX)
    kind, number = devmsg.CHANGED_HEAD.unpack_from(packet)
    assert kind == devmsg.CHANGED
    return number, packet[devmsg.CHANGED_HEAD.size :].decode()


READY, READ_CAPACITY, LOCK, UNLOCK = bytes(6), b"\x25" + bytes(9), b"\x1e\0\0\0\1\0", b"\x1e\0\0\0\0\0"


def key_and_code(answer: Answer) -> tuple[int, int]:
    """Return sense key and additional sense code."""
    assert answer.status == 2
    return answer.sense[2], answer.sense[12]


def test_a_disc_is_changed_under_a_driver(disc: Path, tmp_path: Path) -> None:
    """It is told once, and reads the other disc.  Then the disc is removed, and one inserted into the empty drive."""
    other = tmp_path / "other.iso"
    other.write_bytes(b"o" * 7 * BLOCK)
    with (
        disc.open("rb") as file,
        other.open("rb") as second,
        Device("vioscsi", [file.fileno()], queues=3) as device,
    ):
        cdrom = Cdrom(device.start())
        assert cdrom.works()

        assert change(device, second.fileno()) == (0, "")
        assert key_and_code(cdrom.ask(READY)) == (6, 0x28)
        assert cdrom.ask(READ_CAPACITY, 8).data == (6).to_bytes(4, "big") + BLOCK.to_bytes(4, "big")
        assert cdrom.ask(read10(6, 1), BLOCK).data == b"o" * BLOCK
        assert key_and_code(cdrom.ask(read10(7, 1), BLOCK)) == (5, 0x21)

        assert change(device, None) == (0, "")
        assert key_and_code(cdrom.ask(read10(0, 1), BLOCK)) == (2, 0x3A)
        device.command(devmsg.PAUSE)
        assert change(device, file.fileno()) == (0, "")
        device.command(devmsg.RESUME)
        assert key_and_code(cdrom.ask(READY)) == (6, 0x28)
        assert cdrom.works()
        held = [os.readlink(f"/proc/{device.child.pid}/fd/{n}") for n in os.listdir(f"/proc/{device.child.pid}/fd")]
        assert [Path(link).name for link in held if link.endswith(".iso")] == ["disc.iso"]


def test_a_drive_that_is_locked_keeps_its_disc(disc: Path) -> None:
    """The guest gets an eject request.  `force` removes the disc, and the lock with it."""
    with disc.open("rb") as file, Device("vioscsi", [file.fileno()], queues=3) as device:
        cdrom = Cdrom(device.start())
        events = b"\x4a\1\0\0\x10\0\0\0\x08\0"
        cdrom.ask(LOCK)

        assert change(device, None) == (
            errno.EBUSY, "the guest has locked the drive, as it does while it uses a disc"
        )  # fmt: skip
        assert cdrom.ask(events, 8).data[4:6] == b"\1\2"
        assert cdrom.works()
        assert change(device, None, force=True) == (0, "")
        assert cdrom.ask(events, 8).data[4:6] == b"\3\0"
        assert change(device, file.fileno()) == (0, "")


def test_a_lost_descriptor_does_not_empty_the_drive(disc: Path) -> None:
    """A DISC message names a disc, but its descriptor is missing: the drive keeps its disc."""
    with disc.open("rb") as file, Device("vioscsi", [file.fileno()], queues=3) as device:
        cdrom = Cdrom(device.start())
        device.informs.send(devmsg.DISC_HEAD.pack(devmsg.DISC, 0) + b"other")
        device.wait_for(device.informs.fileno())
        assert devmsg.CHANGED_HEAD.unpack_from(device.informs.recv(devmsg.PACKET_MAX)) == (devmsg.CHANGED, errno.EMFILE)
        assert cdrom.works()


def test_pending_unit_attentions_move_with_the_guest(disc: Path) -> None:
    """EXPORT appends the drive's own state, and RESTORE gives it to another process."""
    with disc.open("rb") as file, Device("vioscsi", [file.fileno()], queues=3) as device:
        cdrom = Cdrom(device.start())
        assert change(device, file.fileno()) == (0, "")
        cdrom.ask(b"\x12\0\0\0\x24\0", 36)
        device.command(devmsg.PAUSE)
        own = device.ask(devmsg.TYPE.pack(devmsg.EXPORT))[devmsg.EXPORT_HEAD.size + 3 * devmsg.QUEUE.size :]
    with disc.open("rb") as file, Device("vioscsi", [file.fileno()], queues=3) as device:
        cdrom = Cdrom(device.start())
        assert device.ask(devmsg.TYPE.pack(devmsg.RESTORE) + own) == devmsg.STATUS.pack(devmsg.RESTORE, 0)
        assert key_and_code(cdrom.ask(READY)) == (6, 0x28)
        assert cdrom.works()
