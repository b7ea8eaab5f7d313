"""The disk process on storage that fails, is full, is slow or dead (hostile-input 33-35; arch. 5).

The image is a file of a file system that the test serves.  So the test decides every error and delay that the process
sees, and sees every call that reaches the storage.
"""

import errno
import os
import select
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import fusefile
from tests.support.diskprocess import BUFFER, FEATURES, FLUSH, IN, IOERR, OK, OUT, UNSET, Disk, content
from tests.support.fakedriver import DATA, KIB, MIB, MODERN, RING_BASE, WRITE, Desc, Device
from tests.support.fusefile import HELD, FuseFile
from tests.support.images import problems
from tests.support.virtiopci import STATUS, BothHalves
from vmd.guestmem import GuestMemory, RegionSpec
from vmd.images.create import new_file, write_empty
from vmd.ipc import devmsg
from vmd.virtio import spec
from vmd.vm.kinds import DISK

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.path.exists(fusefile.DEVICE), reason=f"there is no {fusefile.DEVICE} on this host"),
]

BYTES = 4 * MIB
HEADERS = 12 * MIB  # guest-physical address of the request headers
CLUSTER = 64 * KIB
TROUBLES = devmsg.TYPE.pack(devmsg.TROUBLES)
QUIET = 5  # lines of log that a flood of one kind of error may cause


class Rig:
    """A disk on storage that the test controls."""

    def __init__(self, storage: FuseFile, disk: Disk) -> None:
        self.storage = storage
        self.disk = disk

    def put(self, kind: int, sector: int, data: Sequence[Desc], slot: int) -> int:
        """Offer a request whose header and status are in the memory of its slot.  Return its head."""
        base = HEADERS + 4 * KIB * slot
        self.disk.memory.load(base + 16, bytes((UNSET,)))
        return self.disk.ring.add([self.disk.header(kind, sector, base), *data, Desc(base + 16, 1, WRITE)])

    def status_of(self, slot: int) -> int:
        """Return the status byte of a request."""
        return self.disk.memory.read(HEADERS + 4 * KIB * slot + 16, 1)[0]


@pytest.fixture
def start() -> Iterator[Callable[..., Rig]]:
    """Give a function that starts a disk process on given content.  The process ends with the test."""
    rigs: list[Rig] = []

    def make(image: bytes, note: int = 0, features: int = FEATURES) -> Rig:
        storage = FuseFile(image)
        disk = Disk(Device("vioblk", [storage.fd], notes=[note]).start(), Path("disk"))
        disk.renew(features)
        rigs.append(Rig(storage, disk))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.storage.release()
        rig.disk.close()
        rig.storage.close()


@pytest.fixture
def rig(start: Callable[..., Rig]) -> Rig:
    """A raw disk."""
    return start(content(BYTES))


def read(sector: int, length: int = 4 * KIB, at: int = BUFFER) -> tuple[int, int, list[Desc]]:
    """Return the arguments of a read."""
    return IN, sector, [Desc(at, length, WRITE)]


# --- 33: errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opcode", "kind", "error", "words"),
    [
        (fusefile.READ, IN, errno.EIO, "Input/output error"),
        (fusefile.WRITE, OUT, errno.EIO, "Input/output error"),
        (fusefile.WRITE, OUT, errno.ENOSPC, "No space left on device"),
        (fusefile.WRITE, OUT, errno.EDQUOT, "Disk quota exceeded"),
        (fusefile.FSYNC, FLUSH, errno.EIO, "Input/output error"),
    ],
)
def test_error_of_the_host_33(rig: Rig, opcode: int, kind: int, error: int, words: str) -> None:
    """Hostile input 33: the request fails.  The guest may repeat it without limit, and the log stays short."""
    rig.storage.rule(opcode, error, 64 * KIB, 128 * KIB)
    data = {IN: [Desc(BUFFER, 4 * KIB, WRITE)], OUT: [Desc(BUFFER, 4 * KIB)], FLUSH: []}[kind]
    if opcode == fusefile.FSYNC:
        rig.storage.rule(opcode, error)

    for _ in range(100):
        assert rig.disk.request(kind, 128, data) == (IOERR, 1)
    log = rig.disk.device.read_log()
    assert words in log
    assert 1 <= log.count("\n") <= QUIET
    assert rig.disk.request(*read(0)) == (OK, 4 * KIB + 1)


def test_lost_data_is_not_forgotten_33(rig: Rig) -> None:
    """Hostile input 33: after one failed flush all flushes fail, although the kernel reports the loss only once."""
    rig.storage.rule(fusefile.FSYNC, errno.EIO)
    assert rig.disk.request(FLUSH) == (IOERR, 1)
    rig.storage.release()

    assert rig.disk.request(FLUSH) == (IOERR, 1)
    assert rig.disk.request(*read(0)) == (OK, 4 * KIB + 1)
    log = rig.disk.device.read_log()
    assert log.count("\n") == 1
    assert "flush fails: disk 0: data was lost: Input/output error" in log


def test_short_transfers_are_continued_33(rig: Rig) -> None:
    """Hostile input 33: the host reads and writes only a few bytes at a time."""
    rig.storage.rule(fusefile.READ, most=1000)
    rig.storage.rule(fusefile.WRITE, most=700)
    rig.disk.memory.write(BUFFER, content(8 * KIB)[::-1])
    assert rig.disk.request(OUT, 9, [Desc(BUFFER, 5 * KIB), Desc(BUFFER + 5 * KIB, 3 * KIB)]) == (OK, 1)
    assert rig.disk.request(IN, 9, [Desc(2 * MIB, 3 * KIB, WRITE), Desc(3 * MIB, 5 * KIB, WRITE)]) == (OK, 8 * KIB + 1)

    assert rig.disk.memory.read(2 * MIB, 3 * KIB) + rig.disk.memory.read(3 * MIB, 5 * KIB) == content(8 * KIB)[::-1]
    assert rig.storage.content[:4608] == content(BYTES)[:4608]


def test_file_that_ends_early_33(rig: Rig) -> None:
    """Hostile input 33: a read behind the present end of the file is an error, not zeroes."""
    del rig.storage.content[MIB:]

    assert rig.disk.request(*read(MIB // 512 - 4)) == (IOERR, 1)
    assert rig.disk.request(*read(0)) == (OK, 4 * KIB + 1)


def empty_qcow2(folder: Path) -> bytes:
    """Return a qcow2 image with nothing in it."""
    path = folder / "empty.qcow2"
    with new_file(str(path)) as fd:
        write_empty(fd, str(path), "qcow2", BYTES)
    return path.read_bytes()


def check(storage: FuseFile, folder: Path) -> dict[str, int]:
    """Return the problems that qemu-img finds in the image that is on storage now."""
    path = folder / "found.qcow2"
    path.write_bytes(storage.content)
    return problems(path)


def test_full_disk_while_a_qcow2_image_grows_33(start: Callable[..., Rig], tmp_path: Path) -> None:
    """Hostile input 33: writes without room are refused, and nothing is damaged.  With room, all writes succeed."""
    rig = start(empty_qcow2(tmp_path), devmsg.RESOURCE_QCOW2)
    rig.storage.room = len(rig.storage.content) + 6 * CLUSTER
    outcomes = []
    for cluster in range(16):
        rig.disk.memory.write(BUFFER, bytes((cluster + 1,)) * CLUSTER)
        outcomes.append(rig.disk.request(OUT, cluster * CLUSTER // 512, [Desc(BUFFER, CLUSTER)])[0])
        rig.disk.request(FLUSH)
    assert outcomes[:3] == [OK] * 3
    assert outcomes[8:] == [IOERR] * 8
    log = rig.disk.device.read_log()
    assert "No space left on device" in log
    assert log.count("\n") <= 2 * QUIET
    assert not check(rig.storage, tmp_path).keys() - {"leaks"}

    rig.storage.room = 1 << 40
    for cluster, before in enumerate(outcomes):
        assert rig.disk.request(IN, cluster * CLUSTER // 512, [Desc(BUFFER, CLUSTER, WRITE)]) == (OK, CLUSTER + 1)
        there = rig.disk.memory.read(BUFFER, CLUSTER)
        assert there == bytes((cluster + 1,)) * CLUSTER if before == OK else set(there) <= {0, cluster + 1}
        rig.disk.memory.write(BUFFER, bytes((cluster + 101,)) * CLUSTER)
        assert rig.disk.request(OUT, cluster * CLUSTER // 512, [Desc(BUFFER, CLUSTER)]) == (OK, 1)
    assert rig.disk.request(FLUSH) == (OK, 1)
    assert not check(rig.storage, tmp_path).keys() - {"leaks"}


def write_cluster(rig: Rig, cluster: int) -> int:
    """Write a cluster of an image of 64 KiB clusters; return the status."""
    rig.disk.memory.write(BUFFER, bytes((cluster + 1,)) * CLUSTER)
    return rig.disk.request(OUT, cluster * CLUSTER // 512, [Desc(BUFFER, CLUSTER)])[0]


def test_each_change_of_a_failing_flush_is_logged_once_even_in_a_full_log_33(
    start: Callable[..., Rig], tmp_path: Path
) -> None:
    """Hostile input 33: a flush fails, works, fails and works: four lines, although the log's limit was reached before.

    Data that found no room is kept.  The first flush that succeeds makes all of it durable.
    """
    rig = start(empty_qcow2(tmp_path), devmsg.RESOURCE_QCOW2)
    assert write_cluster(rig, 0) == OK
    assert rig.disk.request(FLUSH)[0] == OK
    rig.storage.rule(fusefile.READ, errno.EIO)
    for _ in range(100):
        rig.disk.request(*read(0))
    rig.disk.device.read_log()
    said = []
    for change in range(2):
        rig.storage.release()
        rig.storage.rule(fusefile.WRITE, errno.ENOSPC, 2 * CLUSTER, 5 * CLUSTER)  # refcounts and tables
        assert write_cluster(rig, 1 + change) == OK
        for _ in range(20):
            assert rig.disk.request(FLUSH)[0] == IOERR
        said.append(rig.disk.device.read_log())
        rig.storage.release()
        for _ in range(20):
            assert rig.disk.request(FLUSH)[0] == OK
        said.append(rig.disk.device.read_log())

    assert [line.count("\n") for line in said] == [1, 1, 1, 1]
    assert [line.partition(": ")[2] for line in said] == [
        "flush fails: disk 0: No space left on device\n",
        "disk 0: flush works again, and nothing was lost\n",
    ] * 2
    assert check(rig.storage, tmp_path) == {}
    informs = rig.disk.device.informs
    told = [informs.recv(devmsg.PACKET_MAX) for _ in range(4)]
    assert told == [TROUBLES + b"flush fails: No space left on device", TROUBLES] * 2


def test_a_flush_that_fails_at_the_end_is_logged_and_tried_again_33(start: Callable[..., Rig], tmp_path: Path) -> None:
    """Hostile input 33: the log says why a write is lost.  The image is not damaged."""
    rig = start(empty_qcow2(tmp_path), devmsg.RESOURCE_QCOW2)
    assert write_cluster(rig, 0) == OK
    assert rig.disk.request(FLUSH)[0] == OK
    rig.storage.rule(fusefile.WRITE, errno.ENOSPC, 4 * CLUSTER, 5 * CLUSTER)  # the L2 table
    assert write_cluster(rig, 1) == OK
    rig.disk.device.informs.send(devmsg.TYPE.pack(devmsg.SHUTDOWN))
    assert rig.disk.device.status() == 0

    log = rig.disk.device.read_log()
    assert log.count("\n") == 1
    assert "close: disk 0: No space left on device" in log
    assert set(check(rig.storage, tmp_path)) <= {"leaks"}


# --- when a write is done -----------------------------------------------------------------------------------------


def test_write_of_a_driver_without_flush_is_on_storage_when_done(start: Callable[..., Rig]) -> None:
    """Write-through (5.2.6.2): the flush precedes the answer, and a write fails if its flush fails."""
    rig = start(content(BYTES), features=MODERN)
    for number in range(5):
        assert rig.disk.request(OUT, number, [Desc(BUFFER, 512)]) == (OK, 1)
        assert rig.storage.count(fusefile.FSYNC) == number + 1
        assert rig.storage.log[-1].opcode == fusefile.FSYNC
    rig.storage.rule(fusefile.FSYNC, HELD)
    heads = [rig.put(OUT, 8 * slot, [Desc(BUFFER, 4 * KIB)], slot) for slot in range(8)]
    rig.disk.device.kick()
    rig.storage.wait_held(1)
    assert rig.disk.ring.reap() == []
    rig.storage.release()
    done = rig.disk.device.collect(rig.disk.ring, 8)
    assert sorted(head for head, _ in done) == sorted(heads)
    rig.storage.rule(fusefile.FSYNC, errno.EIO)

    assert rig.disk.request(OUT, 0, [Desc(BUFFER, 512)]) == (IOERR, 1)


def test_driver_chooses_when_a_write_is_done(rig: Rig) -> None:
    """A device-config write of `writeback` (5.2.5): 0 flushes each write from then on, 1 leaves it to FLUSH."""
    def set_writeback(value: int) -> None:
        head = devmsg.CONFIG_WRITE_HEAD.pack(devmsg.CONFIG_WRITE, 32, 1)
        answer = rig.disk.device.ask(head + bytes((value,)))
        assert answer[devmsg.READY_HEAD.size :][32] == value

    assert rig.disk.request(OUT, 0, [Desc(BUFFER, 512)]) == (OK, 1)
    assert rig.storage.count(fusefile.FSYNC) == 0
    set_writeback(0)
    assert rig.disk.request(OUT, 0, [Desc(BUFFER, 512)]) == (OK, 1)
    rig.disk.device.command(devmsg.PAUSE)
    rig.disk.device.command(devmsg.RESUME)
    flushes = rig.storage.count(fusefile.FSYNC)
    assert flushes == 2  # one is for the write before the change
    set_writeback(1)
    assert rig.disk.request(OUT, 0, [Desc(BUFFER, 512)]) == (OK, 1)
    assert rig.storage.count(fusefile.FSYNC) == flushes
    rig.disk.renew()
    assert rig.disk.request(OUT, 0, [Desc(BUFFER, 512)]) == (OK, 1)

    assert rig.storage.count(fusefile.FSYNC) == flushes


# --- slow storage ---------------------------------------------------------------------------------------------------


def large_reads(rig: Rig, count: int) -> list[int]:
    """Offer reads in the upper half of the disk, too large for the main thread.  Return their heads."""
    return [rig.put(IN, BYTES // 1024, [Desc(4 * MIB, 2 * MIB, WRITE)], 10 + n) for n in range(count)]


@pytest.mark.parametrize("slow", [1, 4, 12])
def test_slow_requests_delay_no_others(rig: Rig, slow: int) -> None:
    """While some requests wait for storage, others are served, flushes too."""
    rig.storage.rule(fusefile.READ, HELD, BYTES // 2)
    heads = large_reads(rig, slow)
    rig.disk.device.kick()
    rig.storage.wait_held(slow)
    for number in range(50):
        fast = rig.put(*read(8 * number), slot=0)
        assert rig.disk.device.collect(rig.disk.ring, 1) == [(fast, 4 * KIB + 1)]
        assert rig.disk.memory.read(BUFFER, 4 * KIB) == content(BYTES)[4 * KIB * number : 4 * KIB * (number + 1)]
    assert rig.disk.request(FLUSH) == (OK, 1)
    assert {rig.status_of(10 + n) for n in range(slow)} == {UNSET}
    rig.storage.release()

    assert sorted(rig.disk.device.collect(rig.disk.ring, slow)) == [(head, 2 * MIB + 1) for head in heads]
    assert rig.disk.memory.read(4 * MIB, 2 * MIB) == content(BYTES)[BYTES // 2 :]


def test_the_answer_to_reset_waits_for_requests_in_flight_34(rig: Rig) -> None:
    """Hostile input 34: the reset is done when the storage has answered.  Nothing touches the old ring after it."""
    rig.storage.rule(fusefile.READ, HELD, BYTES // 2)
    large_reads(rig, 8)
    rig.disk.device.kick()
    rig.storage.wait_held(8)
    rig.disk.device.sync.send(devmsg.TYPE.pack(devmsg.RESET))
    assert not select.select([rig.disk.device.sync], [], [], 0)[0]
    rig.storage.release()
    assert rig.disk.device.sync.recv(devmsg.PACKET_MAX) == devmsg.STATUS.pack(devmsg.RESET, 0)
    reads = rig.storage.count(fusefile.READ)
    parts = ((RING_BASE, 16 * KIB), (4 * MIB, 12 * MIB))
    before = [rig.disk.memory.read(*part) for part in parts]
    rig.disk.ring = rig.disk.device.activate(256, FEATURES, base=4 * RING_BASE)
    assert rig.disk.request(*read(0, at=2 * MIB)) == (OK, 4 * KIB + 1)

    assert [rig.disk.memory.read(*part) for part in parts] == before
    assert rig.storage.count(fusefile.READ) == reads + 1


def test_pause_waits_for_requests_in_flight(rig: Rig) -> None:
    """Requests that were taken from the ring are completed before PAUSE is answered; none is lost."""
    rig.storage.rule(fusefile.READ, HELD, BYTES // 2)
    heads = large_reads(rig, 6)
    rig.disk.device.kick()
    rig.storage.wait_held(6)
    rig.disk.device.sync.send(devmsg.TYPE.pack(devmsg.PAUSE))
    rig.storage.release()
    assert rig.disk.device.sync.recv(devmsg.PACKET_MAX) == devmsg.STATUS.pack(devmsg.PAUSE, 0)
    ((avail, used),) = rig.disk.device.export()
    assert avail == used
    rig.disk.device.command(devmsg.RESUME)

    assert sorted(head for head, _ in rig.disk.device.collect(rig.disk.ring, 6)) == heads


# --- dead storage ---------------------------------------------------------------------------------------------------


@pytest.fixture
def vm() -> Iterator[tuple[BothHalves, FuseFile]]:
    """A disk on storage that the test controls, seen from its VM."""
    ram = [RegionSpec(gpa=0, size=16 * MIB, name="ram")]
    with GuestMemory.create(ram) as memory, FuseFile(content(BYTES)) as storage:
        made = BothHalves(DISK, memory, storage.fd)
        yield made, storage
        storage.release()
        made.close()


@pytest.mark.deep
@pytest.mark.parametrize(
    ("kind", "opcode", "sentence"),
    [
        pytest.param(FLUSH, fusefile.FSYNC, "/vm/image: requests did not end in 9 s", id="worker"),
        pytest.param(OUT, fusefile.WRITE, "no answer in 10 s", id="main-thread"),
    ],
)
def test_dead_storage_ends_the_vm_with_a_sentence(
    vm: tuple[BothHalves, FuseFile], kind: int, opcode: int, sentence: str
) -> None:
    """The reset cannot be done: the vCPU returns, and the VM is told why it has to end (arch. 5)."""
    half, storage = vm
    storage.rule(opcode, HELD)
    half.start(1 << spec.VIRTIO_F_VERSION_1 | 1 << spec.VIRTIO_BLK_F_FLUSH)
    data = [Desc(BUFFER, 512)] if kind == OUT else []
    half.memory.write(DATA, struct.pack("<IIQ", kind, 0, 0))
    half.ring.add([Desc(DATA, 16), *data, Desc(DATA + 16, 1, WRITE)])
    half.machine.notify(0)
    storage.wait_held(1)

    vcpu = threading.Thread(target=half.machine.write, args=(STATUS, 1, 0))
    vcpu.start()
    vcpu.join(30)

    assert not vcpu.is_alive()
    assert len(half.machine.failures) == 1
    assert sentence in half.machine.failures[0]
