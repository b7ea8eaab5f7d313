"""The real, confined disk process with a faulty driver (hostile-input 16, 20, 21, 27-34)."""

import os
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.support.descriptors import inheritable, open_files
from tests.support.diskprocess import (
    BUFFER,
    DISCARD,
    DISK,
    FEATURES,
    FLUSH,
    GET_ID,
    HEAD,
    IN,
    IOERR,
    OK,
    OUT,
    SECTORS,
    STATUS,
    UNSET,
    UNSUPP,
    WRITE_ZEROES,
    Disk,
    content,
    start_disk,
)
from tests.support.fakedriver import (
    DATA,
    EVENT_IDX,
    EXTRA_END,
    KIB,
    MIB,
    MODERN,
    NEXT,
    RAM_END,
    RING_BASE,
    ROM,
    WRITE,
    Desc,
    Device,
    chained,
)
from vmd.images.create import new_file, write_empty
from vmd.ipc import devmsg
from vmd.virtio import spec
from vmd.virtio.fence import full_fence


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """Yield a disk process for all hostile cases.  Damage by one case then shows in the next."""
    disk = start_disk(tmp_path_factory.mktemp("disk") / "disk.raw")
    yield disk
    disk.close()


@pytest.fixture
def disk(shared: Disk) -> Disk:
    """Give the shared process after a reset."""
    shared.device.read_log()
    shared.renew()
    return shared


class Factory(Protocol):
    """Makes disk processes that end with the test."""

    def __call__(self, *, flags: int = 0, note: int = 0) -> Disk:
        """Make one."""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Factory]:
    """Give a factory of disk processes."""
    made: list[Disk] = []

    def disk(*, flags: int = 0, note: int = 0) -> Disk:
        made.append(start_disk(tmp_path / f"disk{len(made)}", flags=flags, note=note))
        return made[-1]

    yield disk
    for one in made:
        one.close()


# --- good requests ---------------------------------------------------------------------------------------------


def test_configuration_space_describes_the_disk(disk: Disk) -> None:
    """All fields of struct virtio_blk_config (5.2.4)."""
    fields = struct.unpack("<QIIHBBIBBHIBBHIIIIIB3x", disk.device.config)

    assert fields[0] == SECTORS
    assert fields[2] == 254
    assert fields[6] == 512
    assert fields[11] == 1
    assert fields[14:20] == (1 << 22, 16, 8, 1 << 17, 4, 1)


def test_process_is_small_and_starts_soon(make: Factory) -> None:
    """The test prints the figures, and does not judge them."""
    device = make().device

    print(f"vioblk: ready {device.ready_ms:.1f} ms after spawn, PSS {device.pss_kib() / 1024:.1f} MiB")
    assert device.pss_kib() > 0


@pytest.mark.parametrize("features", [0, FEATURES, FEATURES & ~EVENT_IDX, MODERN], ids=hex)
def test_a_read_returns_written_data(disk: Disk, features: int) -> None:
    """Drivers negotiate no feature (legacy), all features, or some of them."""
    disk.renew(features)
    data = content(8192)[::-1]
    disk.memory.write(BUFFER, data)

    assert disk.request(OUT, 40, [Desc(BUFFER, 8192)]) == (OK, 1)
    assert disk.path.read_bytes()[40 * 512 :][:8192] == data
    assert disk.request(IN, 40, [Desc(BUFFER + 8192, 8192, WRITE)]) == (OK, 8193)
    assert disk.memory.read(BUFFER + 8192, 8192) == data


@pytest.mark.parametrize("features", [FEATURES, MODERN | 1 << 13 | 1 << 14], ids=["write-back", "write-through"])
def test_the_figures_of_a_disk(make: Factory, features: int) -> None:
    """Requests, bytes and time by type, and failures apart, all counted before the guest gets the answer."""
    disk = make()
    assert disk.device.figures()["size_bytes"] == DISK
    disk.renew(features)
    disk.memory.write(BUFFER, content(8192))
    begun_ns = time.monotonic_ns()
    expected = dict.fromkeys(devmsg.FIGURES["vioblk"], 0) | {"size_bytes": DISK}
    times = {name for name in expected if name.endswith("_ns")}

    def after(request: tuple[int, list[Desc]], status: int, **more: int) -> None:
        kind, data = request
        assert disk.request(kind, 8, data)[0] == status
        for name, value in more.items():
            expected[name] += value
        found = disk.device.figures()
        assert {name: value for name, value in found.items() if name not in times} == {
            name: value for name, value in expected.items() if name not in times
        }
        for name in times - {"busy_ns", "throttled_ns"}:
            assert bool(found[name]) == bool(expected[name.replace("_ns", "_requests")])
        assert 0 < found["busy_ns"] < time.monotonic_ns() - begun_ns

    for _ in range(2):
        after((IN, [Desc(BUFFER, 512, WRITE)]), OK, read_requests=1, read_bytes=512)
    after((IN, [Desc(2 * MIB, 4 * MIB, WRITE)]), OK, read_requests=1, read_bytes=4 * MIB)
    after((OUT, [Desc(BUFFER, 8192)]), OK, write_requests=1, write_bytes=8192)
    after((OUT, [Desc(2 * MIB, 4 * MIB)]), OK, write_requests=1, write_bytes=4 * MIB)
    after((FLUSH, []), OK, flush_requests=1)
    disk.memory.write(BUFFER, struct.pack("<QIIQII", 64, 16, 0, 128, 8, 0))
    after((DISCARD, [Desc(BUFFER, 32)]), OK, discard_requests=1, discard_bytes=24 * 512)
    after((WRITE_ZEROES, [Desc(BUFFER, 32)]), OK, zero_requests=1, zero_bytes=24 * 512)
    after((GET_ID, [Desc(BUFFER, 20, WRITE)]), OK)
    after((IN, [Desc(BUFFER, 511, WRITE)]), IOERR, errors=1)
    after((99, []), UNSUPP, refused=1)
    disk.device.command(devmsg.RESET)
    assert disk.device.figures()["errors"] == 1


@pytest.mark.parametrize("megabytes", [1, 4])
def test_large_request(disk: Disk, megabytes: int) -> None:
    """Requests that are too large for the main thread."""
    length = megabytes * MIB
    data = content(length)[::-1]
    disk.memory.write(2 * MIB, data)

    assert disk.request(OUT, 0, [Desc(2 * MIB, length)]) == (OK, 1)
    disk.memory.write(2 * MIB, bytes(length))
    assert disk.request(IN, 0, [Desc(2 * MIB, length, WRITE)]) == (OK, length + 1)
    assert disk.memory.read(2 * MIB, length) == data


def test_segments_of_any_length_and_alignment(disk: Disk) -> None:
    """Only their sum has to be a whole number of sectors."""
    lengths = [1, 511, 0, 3, 700, 321]
    gpas = [BUFFER + 5000 * i + 3 * i for i in range(len(lengths))]
    parts = [Desc(gpa, length, WRITE) for gpa, length in zip(gpas, lengths, strict=True)]

    assert disk.request(IN, 7, parts) == (OK, 1537)
    got = b"".join(disk.memory.read(p.gpa, p.length) for p in parts if p.length)
    assert got == disk.path.read_bytes()[7 * 512 :][:1536]


@pytest.mark.parametrize("layout", ["split-header", "status-with-data", "one-buffer-each", "header-with-data"])
def test_any_layout_27(disk: Disk, layout: str) -> None:
    """Hostile input 27: header shorter and longer than its descriptor, status behind the data."""
    kind = OUT if layout == "header-with-data" else IN
    disk.header(kind, 5)
    disk.memory.write(HEAD + 16, content(1024)[:512])
    chains = {
        "split-header": [Desc(HEAD, 3), Desc(HEAD + 3, 13), Desc(BUFFER, 512, WRITE), Desc(STATUS, 1, WRITE)],
        "status-with-data": [Desc(HEAD, 16), Desc(STATUS - 512, 513, WRITE)],
        "one-buffer-each": [Desc(HEAD, 16), Desc(BUFFER, 512, WRITE), Desc(STATUS, 1, WRITE), Desc(BUFFER, 0, WRITE)],
        "header-with-data": [Desc(HEAD, 16 + 512), Desc(STATUS, 1, WRITE)],
    }
    # In "status-with-data" the buffer ends with the status byte, and begins before the header's page.
    assert disk.do(chains[layout]) == (OK, 1 if kind == OUT else 513)


def test_serial_number(disk: Disk) -> None:
    """GET_ID fills 20 bytes, or the buffer."""
    disk.memory.write(BUFFER, b"x" * 40)

    assert disk.request(GET_ID, 0, [Desc(BUFFER, 40, WRITE)]) == (OK, 21)
    assert disk.memory.read(BUFFER, 24) == b"vioblk0".ljust(20, b"\0") + b"xxxx"


def test_discard_and_write_zeroes(disk: Disk) -> None:
    """The range reads as zeroes, and the bytes beside it are unchanged."""
    before = disk.path.read_bytes()
    disk.memory.write(BUFFER, struct.pack("<QIIQII", 8, 8, 0, 64, 16, 1))
    assert disk.request(WRITE_ZEROES, 0, [Desc(BUFFER, 32)]) == (OK, 1)

    after = disk.path.read_bytes()
    assert after == before[:4096] + bytes(4096) + before[8192 : 64 * 512] + bytes(8192) + before[80 * 512 :]

    disk.memory.write(BUFFER, struct.pack("<QII", 1024, 2048, 0))
    assert disk.request(DISCARD, 0, [Desc(BUFFER, 16)]) == (OK, 1)
    disk.path.write_bytes(before)


@pytest.mark.parametrize(
    ("feature", "served", "unknown"),
    [
        (spec.VIRTIO_BLK_F_DISCARD, DISCARD, WRITE_ZEROES),
        (spec.VIRTIO_BLK_F_WRITE_ZEROES, WRITE_ZEROES, DISCARD),
    ],
)
def test_discard_and_write_zeroes_are_two_features(disk: Disk, feature: int, served: int, unknown: int) -> None:
    """A driver may know only one of them."""
    disk.renew(MODERN | 1 << feature)
    disk.memory.write(BUFFER, struct.pack("<QII", 8, 8, 0))

    assert disk.request(served, 0, [Desc(BUFFER, 16)]) == (OK, 1)
    assert disk.request(unknown, 0, [Desc(BUFFER, 16)]) == (UNSUPP, 1)
    disk.path.write_bytes(content())


def test_drivers_without_flush_get_write_through(disk: Disk) -> None:
    """So do drivers that ask for it.  The requests are served in both modes."""
    for features in (MODERN, FEATURES):
        disk.renew(features)
        answer = disk.device.ask(devmsg.CONFIG_WRITE_HEAD.pack(devmsg.CONFIG_WRITE, 32, 1) + b"\0")
        assert answer[devmsg.READY_HEAD.size + 32] == (0 if features == FEATURES else 1)
        heads = []
        for number in range(20):
            base = DATA + 2 * MIB + 8192 * number
            disk.header(OUT, 8 * number, base)
            heads.append(disk.ring.add([Desc(base, 16), Desc(base, 4096), Desc(base + 4096, 1, WRITE)]))
        found = disk.device.collect(disk.ring, 20)
        assert sorted(found) == sorted((head, 1) for head in heads)
    assert disk.works()


# --- hostile: rings --------------------------------------------------------------------------------------------

FIRST = [Desc(HEAD, 16, NEXT, 1)]
LAST = Desc(STATUS, 1, WRITE)
BROKEN = [
    pytest.param([Desc(RAM_END * 4, 16, NEXT, 1), LAST], id="16-header-nowhere"),
    pytest.param([*FIRST, Desc((1 << 64) - 1, 1, WRITE)], id="16-status-nowhere"),
    pytest.param([*FIRST, Desc(ROM, 1, WRITE)], id="16-status-read-only"),
    pytest.param([Desc(HEAD, 8, NEXT, 1), LAST], id="27-short-header"),
    pytest.param([Desc(HEAD, 16)], id="28-no-status"),
    pytest.param([*FIRST, Desc(STATUS, 1)], id="28-status-not-writable"),
    pytest.param([*FIRST, Desc(STATUS, 0, WRITE)], id="28-status-of-no-length"),
]


@pytest.mark.parametrize("parts", BROKEN)
def test_broken_chain_asks_for_a_reset(disk: Disk, parts: list[Desc]) -> None:
    """Hostile input 16, 27, 28.  The id of a case begins with its number."""
    disk.header(IN, 0)
    disk.ring.describe(0, parts)
    disk.ring.offer(0)
    disk.device.kick()

    assert disk.device.needs_reset()
    disk.device.kick()
    disk.device.command(devmsg.PAUSE)
    disk.device.command(devmsg.RESUME)
    assert disk.ring.reap() == []
    assert disk.works()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(Desc(RAM_END * 3, 512, WRITE), id="nowhere"),
        pytest.param(Desc((1 << 64) - 256, 512, WRITE), id="wrapping"),
        pytest.param(Desc(EXTRA_END - 256, 512, WRITE), id="across-the-end"),
        pytest.param(Desc(ROM, 512, WRITE), id="read-only"),
        pytest.param(Desc(BUFFER, 0xFFFFFE00, WRITE), id="4-gib"),
    ],
)
def test_data_outside_memory_16(disk: Disk, data: Desc) -> None:
    """Hostile input 16: only that request fails."""
    assert disk.request(IN, 0, [data]) == (IOERR, 1)
    assert disk.works()


def test_a_read_that_overwrites_its_own_descriptors_20(disk: Disk) -> None:
    """Hostile input 20: it also overwrites its header and the available ring.  The device uses only checked copies."""
    disk.path.write_bytes(b"\xff" * DISK)
    base = RING_BASE
    parts = [disk.header(IN, 0), Desc(base, 512, WRITE), Desc(HEAD, 512, WRITE), LAST]
    disk.memory.load(STATUS, bytes((UNSET,)))
    disk.ring.add(parts)
    disk.device.kick()
    disk.device.wait_interrupt()

    assert disk.memory.read(STATUS, 1)[0] == OK
    disk.path.write_bytes(content())
    assert disk.works()


# --- hostile: requests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sector", "length", "status"),
    [
        pytest.param(IN, SECTORS, 512, IOERR, id="29-behind-the-end"),
        pytest.param(IN, SECTORS - 1, 1024, IOERR, id="29-across-the-end"),
        pytest.param(IN, 1 << 55, 512, IOERR, id="29-overflow"),
        pytest.param(IN, (1 << 64) - 1, 512, IOERR, id="29-last-sector-of-all"),
        pytest.param(IN, 0, 513, IOERR, id="29-no-multiple-of-512"),
        pytest.param(IN, SECTORS, 0, OK, id="29-nothing"),
        pytest.param(IN, SECTORS + 1, 0, IOERR, id="29-nothing-behind-the-end"),
        pytest.param(2, 0, 512, UNSUPP, id="30-scsi"),
        pytest.param(0xFFFFFFFF, 0, 512, UNSUPP, id="30-unknown"),
        pytest.param(GET_ID, 0, 0, OK, id="30-id-without-buffer"),
        pytest.param(GET_ID, 0, 7, OK, id="30-id-in-short-buffer"),
        pytest.param(FLUSH, 77, 512, OK, id="30-flush-with-data"),
        pytest.param(OUT, 0, 512, OK, id="18-write-from-writable"),
    ],
)
def test_odd_request(disk: Disk, kind: int, sector: int, length: int, status: int) -> None:
    """Hostile input 29, 30.  A write whose buffers are all device-writable has no data."""
    before = disk.path.read_bytes()
    got, used = disk.request(kind, sector, [Desc(BUFFER, length, WRITE)] if length else [])

    assert got == status
    assert used == 1 + (length if kind == GET_ID else 0)
    assert disk.path.read_bytes() == before
    assert disk.works()


def ranges(*rows: tuple[int, int, int]) -> bytes:
    """Return the data of a discard or write-zeroes request: (sector, sectors, flags) of each range."""
    return b"".join(struct.pack("<QII", *fields) for fields in rows)


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"", IOERR, id="none"),
        pytest.param(ranges((0, 8, 0))[:15], IOERR, id="15-bytes"),
        pytest.param(ranges((0, 8, 0)) + b"\0", IOERR, id="17-bytes"),
        pytest.param(ranges(*[(0, 0, 0)] * 17), IOERR, id="too-many"),
        pytest.param(ranges((0, 0xFFFFFFFF, 0)), IOERR, id="too-long"),
        pytest.param(ranges((SECTORS, 1, 0)), IOERR, id="behind-the-end"),
        pytest.param(ranges(((1 << 64) - 1, 1, 0)), IOERR, id="overflow"),
        pytest.param(ranges((0, 1, 0), (SECTORS, 1, 0)), IOERR, id="second-behind-the-end"),
        pytest.param(ranges((0, 1, 2)), UNSUPP, id="unknown-flag"),
    ],
)
def test_odd_ranges_32(disk: Disk, kind: int, data: bytes, status: int) -> None:
    """Hostile input 32: nothing is touched if one range is wrong."""
    before = disk.path.read_bytes()
    disk.memory.write(BUFFER, data)

    assert disk.request(kind, 0, [Desc(BUFFER, len(data))] if data else []) == (status, 1)
    assert disk.path.read_bytes() == before
    assert disk.works()


def test_discard_knows_no_unmap_flag_32(disk: Disk) -> None:
    """Hostile input 32."""
    disk.memory.write(BUFFER, ranges((0, 8, 1)))

    assert disk.request(DISCARD, 0, [Desc(BUFFER, 16)]) == (UNSUPP, 1)


def test_read_only_disk_31(make: Factory) -> None:
    """Hostile input 31."""
    disk = make(flags=devmsg.START_READ_ONLY)
    disk.memory.write(BUFFER, ranges((0, 8, 0)))

    assert disk.device.features >> spec.VIRTIO_BLK_F_RO & 1
    assert not disk.device.features >> spec.VIRTIO_BLK_F_DISCARD & 1
    assert disk.request(OUT, 0, [Desc(BUFFER, 512)]) == (IOERR, 1)
    assert disk.request(WRITE_ZEROES, 0, [Desc(BUFFER, 16)]) == (IOERR, 1)
    assert disk.request(FLUSH) == (OK, 1)
    assert disk.works()


def test_guessed_raw_disk_gets_no_signature_31(make: Factory) -> None:
    """Hostile input 31: the guest cannot make its disk look like an image with a backing file."""
    disk = make(note=devmsg.RESOURCE_GUESSED)
    disk.memory.write(BUFFER, b"QFI\xfb".ljust(512, b"\0"))

    assert disk.request(OUT, 0, [Desc(BUFFER, 512)]) == (IOERR, 1)
    assert disk.request(OUT, 1, [Desc(BUFFER, 512)]) == (OK, 1)
    assert "signature" in disk.device.read_log()
    assert disk.works()


def test_file_that_becomes_shorter_33(make: Factory) -> None:
    """Hostile input 33: reads behind the new end fail instead of returning zeroes, and the log stays short."""
    disk = make()
    os.truncate(disk.path, 64 * KIB)

    for _ in range(100):
        assert disk.request(IN, 4096, [Desc(BUFFER, 512, WRITE)]) == (IOERR, 1)
    assert 1 <= disk.device.read_log().count("\n") <= 5
    assert disk.works()


def test_reset_with_requests_in_flight_34(disk: Disk) -> None:
    """Hostile input 34: after the answer, requests in flight touch neither the old rings nor the new ones."""
    for _ in range(20):
        for number in range(16):
            base = DATA + 4096 * number
            disk.header(OUT, 0, base)
            disk.ring.add([Desc(base, 16), Desc(2 * MIB, MIB), Desc(base + 16, 1, WRITE)])
        disk.device.kick()
        disk.device.command(devmsg.RESET)
        old = disk.ring.device_idx
        ring = disk.renew()
        assert (ring.device_idx, old <= 16) == (0, True)
    disk.path.write_bytes(content())
    assert disk.works()


def test_pause_completes_requests_in_flight(disk: Disk) -> None:
    """After it available and used indices agree, and do not change until the device is resumed."""
    for number in range(8):
        base = DATA + 4096 * number
        disk.header(IN, 0, base)
        disk.ring.add([Desc(base, 16), Desc(2 * MIB, 2 * MIB, WRITE), Desc(base + 16, 1, WRITE)])
    disk.device.kick()
    disk.device.command(devmsg.PAUSE)
    ((avail, used),) = disk.device.export()
    assert avail == used == disk.ring.device_idx
    disk.device.kick()
    assert disk.device.export() == [(avail, used)]

    disk.device.command(devmsg.RESUME)
    assert len(disk.device.collect(disk.ring, 8)) == 8


# --- interrupts --------------------------------------------------------------------------------------------------


def test_event_index_loses_no_wake_up_21(disk: Disk) -> None:
    """Hostile input 21: a driver that notifies and waits only when told to never gets stuck (2.7.7, 2.7.10).

    Each side stores its index and then reads the event index of the other.  Without a fence in between, either may read
    too early.  Then both wait for ever, and this test would hang.
    """
    ring, device = disk.renew(), disk.device
    rounds, in_flight, offered, done = 20_000, 0, 0, 0
    header = disk.header(IN, 0)
    for slot in range(4):
        ring.describe(4 * slot, chained([header, Desc(BUFFER + 512 * slot, 512, WRITE), LAST], 4 * slot))
    while done < rounds:
        while in_flight < 1 + done % 4 and offered < rounds:
            before = ring.avail_idx
            ring.offer(4 * (offered % 4))
            full_fence()
            if (ring.avail_idx - ring.avail_event - 1 & 0xFFFF) < (ring.avail_idx - before & 0xFFFF):
                device.kick()
            in_flight, offered = in_flight + 1, offered + 1
        ring.set_used_event(ring.used_idx)
        full_fence()
        if not (found := ring.reap()):
            device.wait_interrupt()
            found = ring.reap()
        in_flight, done = in_flight - len(found), done + len(found)

    assert (done, in_flight) == (rounds, 0)


# --- the process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", ["sync", "informs"])
def test_end_of_a_channel_ends_the_process(make: Factory, channel: str) -> None:
    """A closed channel means that the VM is gone.  The process ends in an orderly way."""
    device = make().device
    getattr(device, channel).close()

    assert device.status() == 0


def test_shutdown_ends_the_process(make: Factory) -> None:
    """It ends with status 0, and logs nothing."""
    device = make().device
    device.informs.send(devmsg.TYPE.pack(devmsg.SHUTDOWN))

    assert device.status() == 0
    assert device.read_log() == ""


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(b"\1", id="short"),
        pytest.param(devmsg.TYPE.pack(999), id="unknown"),
        pytest.param(devmsg.TYPE.pack(devmsg.ACTIVATE), id="short-activate"),
        pytest.param(
            devmsg.ACTIVATE_HEAD.pack(devmsg.ACTIVATE, 0, 9) + bytes(9 * devmsg.QUEUE.size), id="too-many-queues"
        ),
        pytest.param(devmsg.ACTIVATE_HEAD.pack(devmsg.ACTIVATE, 0, 1), id="no-queue"),
        pytest.param(devmsg.CONFIG_WRITE_HEAD.pack(devmsg.CONFIG_WRITE, 0, 8) + b"1", id="short-write"),
        pytest.param(devmsg.TYPE.pack(devmsg.RESET) + b"x", id="long-reset"),
        pytest.param(os.urandom(4096), id="random"),
    ],
)
@pytest.mark.parametrize("channel", ["sync", "informs"])
def test_garbage_on_a_channel_ends_the_process(make: Factory, channel: str, packet: bytes) -> None:
    """The process sends a sentence on the `informs` channel, and logs no traceback."""
    device = make().device
    getattr(device, channel).send(packet)

    assert device.status() == 1
    assert "vm process: " in device.error(device.informs)[1]
    assert "Traceback" not in device.read_log()


LIES: dict[str, dict[str, Any]] = {
    "kind": {"kind": 99},
    "queues": {"queues": 4000},
    "queues-without-descriptors": {"queues": 8},
    "regions": {"regions": 4000},
    "regions-missing": {"regions": 8},
    "form": {"form": 77},
    "no-resource": {"resources": 0},
    "resources": {"resources": 4000},
    "resources-without-descriptors": {"resources": 3, "notes": (0, 0, 0)},
    "memory-unaligned": {"rows": devmsg.REGION.pack(1, 4096, 0, 0), "regions": 1},
    "memory-too-large": {"rows": devmsg.REGION.pack(0, 1 << 40, 0, 0), "regions": 1},
    "memory-at-odd-offset": {"rows": devmsg.REGION.pack(0, 4096, 77, 0), "regions": 1},
    "memory-twice": {"rows": devmsg.REGION.pack(0, 4096, 0, 0) * 2, "regions": 2},
    "no-memory": {"rows": b"", "regions": 0},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_false_start_message_is_answered_with_a_sentence(tmp_path: Path, lie: dict[str, Any]) -> None:
    """The process sends what is wrong, and ends."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    with path.open("rb+") as file, Device("vioblk", [file.fileno()]) as device:
        device.send_start(device.start_packet(**lie))

        _number, text = device.error(device.sync)
        assert text
        assert device.status() == 1
        assert "Traceback" not in device.read_log()


def test_a_file_that_is_no_image_is_answered_with_a_sentence(tmp_path: Path) -> None:
    """The sentence names the disk, because users of the VM see it."""
    path = tmp_path / "disk"
    path.write_bytes(b"QFI\xfb" + bytes(100))
    with path.open("rb+") as file, Device("vioblk", [file.fileno()], notes=[devmsg.RESOURCE_QCOW2]) as device:
        device.send_start(device.start_packet())

        assert device.error(device.sync)[1].startswith("disk 0: ")
        assert device.status() == 1


def open_chain(paths: Sequence[Path], notes: Sequence[int]) -> Device:
    """Return a process with a chain of images, the disk itself first.  It has not got its start message yet."""
    fds = [os.open(path, os.O_RDONLY if depth else os.O_RDWR) for depth, path in enumerate(paths)]
    try:
        return Device("vioblk", fds, notes=notes)
    finally:
        for fd in fds:
            os.close(fd)


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path]:
    """Make a qcow2 disk on top of a raw file, whose content is an empty qcow2 image."""
    overlay, base = tmp_path / "overlay.qcow2", tmp_path / "base"
    with new_file(str(base)) as fd:
        write_empty(fd, str(base), "qcow2", MIB)
    with new_file(str(overlay)) as fd:
        write_empty(fd, str(overlay), "qcow2", MIB, "base", "raw")
    return overlay, base


def test_the_vm_decides_the_format_of_a_backing_file(chain: tuple[Path, Path]) -> None:
    """Its first bytes, which a guest may once have written, do not count."""
    with open_chain(chain, (devmsg.RESOURCE_QCOW2, 0)) as device:
        disk = Disk(device.start(), chain[0])

        assert disk.request(IN, 0, [Desc(BUFFER, 512, WRITE)]) == (OK, 513)
        assert disk.memory.read(BUFFER, 512) == chain[1].read_bytes()[:512]


def test_only_an_image_declared_as_qcow2_gets_its_backing_file_31(chain: tuple[Path, Path]) -> None:
    """Hostile input 31, 52: a raw image has no backing file, and neither has an image whose format was guessed."""
    for note in (0, devmsg.RESOURCE_QCOW2 | devmsg.RESOURCE_GUESSED):
        with open_chain(chain, (note, 0)) as device:
            device.send_start(device.start_packet())

            assert "backing file" in device.error(device.sync)[1]
            assert device.status() == 1


@pytest.mark.parametrize("notes", [(devmsg.RESOURCE_QCOW2,), (0, 0)])
def test_a_process_for_raw_disks_takes_no_other(notes: tuple[int, ...]) -> None:
    """It has no code for other formats."""
    fd = os.memfd_create("disk", os.MFD_CLOEXEC)
    os.ftruncate(fd, MIB)
    with Device("vioblk", [fd] * len(notes), notes=[0]) as device:
        os.close(fd)
        device.send_start(device.start_packet(notes=notes, resources=len(notes)))

        assert device.error(device.sync)[1].endswith("an image that is not raw")
        assert device.status() == 1


def test_process_is_confined(disk: Disk) -> None:
    """It has a seccomp filter, no capabilities, and only the descriptors that it got and those of its event loop."""
    pid = disk.device.child.pid
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    leaked = {os.readlink(f"/proc/self/fd/{fd}") for fd in inheritable()}  # by the test runner
    links = open_files(pid)
    given = {*disk.device.fds, 0, 1, 2, devmsg.FD_SYNC}
    own = [link for fd, link in links.items() if fd not in given and link not in (*leaked, str(disk.path))]

    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == 0
    # Python's mmap objects keep descriptors of what they map.
    assert {link for link in own if "memfd:" not in link} == {"anon_inode:[eventfd]", "anon_inode:[eventpoll]"}


# --- limits ----------------------------------------------------------------------------------------------------


def test_requests_above_the_limit_wait_in_the_ring(make: Factory) -> None:
    """They stay there while the disk is paused, and until the limit is removed.  A malformed LIMIT ends the process.

    The first requests are served at once: they use up the burst.
    """
    disk = make()
    device, ring = disk.device, disk.ring
    device.inform(devmsg.LIMIT_BODY.pack(devmsg.LIMIT, 1, 0))
    heads = []
    for number in range(60):
        heads.append(ring.add([disk.header(IN, 0), Desc(BUFFER + 512 * number, 512, WRITE), Desc(STATUS, 1, WRITE)]))
    found = len(device.collect(ring, 1))
    assert ring.device_idx < 60
    device.command(devmsg.PAUSE)
    served = ring.device_idx
    assert served < 60
    device.command(devmsg.RESUME)

    device.informs.send(devmsg.LIMIT_BODY.pack(devmsg.LIMIT, 0, 0))
    found += len(device.collect(ring, 60 - found))
    assert found == 60

    device.informs.send(devmsg.LIMIT_BODY.pack(devmsg.LIMIT, 0, 0)[:-1])
    assert device.child.reap(60.0) == 1
