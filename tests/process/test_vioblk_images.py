"""qcow2 through the real disk process: requests of guests, and the image after the process is killed.

QEMU's programs check the images.  Hostile-input 33, 52 and 53, as a guest or a host can cause them.
"""

import hashlib
import os
import random
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.blkdriver import (
    DISCARD,
    FEATURES,
    FLUSH,
    IOERR,
    OK,
    SLOTS,
    WRITE_THROUGH,
    WRITE_ZEROES,
    BlockDriver,
    BlockScribbler,
    Request,
)
from tests.support.images import KIB, MIB, chain_formats, flat_file, make_chain, problems, qemu, same, small_file_system
from vmd.images.create import create
from vmd.units import SECTOR

SIZE = 6 * MIB + 3 * SECTOR


def fingerprints(paths: list[Path]) -> list[str]:
    """Return a hash of each file."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        pytest.param(f"cluster_size={size},{more}", levels, id=f"{size}-{more}-{levels}")
        for size, more, levels in [
            ("64k", "compat=1.1", 0),
            ("64k", "compat=1.1", 1),
            ("64k", "compat=1.1", 3),
            ("512", "refcount_bits=64", 1),
            ("1k", "refcount_bits=1", 0),
            ("4k", "compat=0.10", 3),
            ("2M", "compat=1.1", 1),
            ("64k", "preallocation=metadata", 0),
            ("16k", "lazy_refcounts=on", 0),
        ]
    ],
)
def test_scribble_through_the_device(tmp_path: Path, options: str, levels: int) -> None:
    """Requests of every kind, many at a time.  The image is then clean and right, and its bases are unchanged."""
    paths, flat = make_chain(tmp_path, options, SIZE, levels)
    assert chain_formats(paths).count("raw") == (levels > 0)
    before = fingerprints(paths[1:])

    with BlockDriver(paths, chain_formats(paths), seed=levels) as driver:
        assert driver.sectors == SIZE // SECTOR
        BlockScribbler(driver, flat, seed=1).run(600)
        driver.shut_down()

    assert problems(paths[0]) == {}
    same(paths[0], flat, tmp_path)
    assert fingerprints(paths[1:]) == before


@pytest.mark.parametrize("features", [0, WRITE_THROUGH], ids=["legacy", "write-through"])
def test_scribble_by_a_driver_that_never_flushes(tmp_path: Path, features: int) -> None:
    """All answered writes are in the image after a kill, because this driver cannot flush."""
    paths, flat = make_chain(tmp_path, "cluster_size=64k", SIZE, 1)

    with BlockDriver(paths, chain_formats(paths), features=features) as driver:
        choice = random.Random(3)
        for _ in range(60):
            sector = choice.randrange(SIZE // SECTOR - 200)
            data = choice.randbytes(choice.randrange(1, 200) * SECTOR)
            driver.write(sector, data)
            flat[sector * SECTOR : sector * SECTOR + len(data)] = data
            driver.wait_all()
        driver.device.child.kill(signal.SIGKILL)
        assert driver.device.status() == -signal.SIGKILL

    assert "corruptions" not in problems(paths[0])
    same(paths[0], flat, tmp_path)


def test_scribble_over_compressed_clusters_and_a_snapshot(tmp_path: Path) -> None:
    """Neither is overwritten in place, and the snapshot keeps its content."""
    path = tmp_path / "image"
    before = flat_file(tmp_path / "raw", SIZE, seed=9, density=0.8)
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=16k", "-f", "raw", tmp_path / "raw", path)
    qemu("qemu-img", "snapshot", "-c", "old", path)
    flat = bytearray(before)

    with BlockDriver([path]) as driver:
        BlockScribbler(driver, flat, seed=2).run(600)
        driver.shut_down()

    assert problems(path) == {}
    same(path, flat, tmp_path)
    qemu("qemu-img", "snapshot", "-a", "old", path)
    same(path, before, tmp_path)


# --- killed -------------------------------------------------------------------------------------------------------

UNIT = 8 * KIB  # a unit holds one number, repeated in each of its sectors
UNITS = 512
PER_UNIT = UNIT // SECTOR
ANY = -1  # the content after a discard is undefined
BASE_NUMBER = 0xBA5E


class Ledger:
    """The numbers that each unit may hold: the one of the last flush, or any written since."""

    def __init__(self, first: int, *, write_through: bool) -> None:
        self.possible: list[set[int]] = [{first} for _ in range(UNITS)]
        self.settled = [first] * UNITS  # number of the last answered change
        self.write_through = write_through

    def submitted(self, unit: int, number: int) -> None:
        """A change is in flight."""
        self.possible[unit].add(number)

    def answered(self, unit: int, number: int) -> None:
        """A change has been answered."""
        self.settled[unit] = number
        if self.write_through and number != ANY:
            self.possible[unit] = {number}

    def promise(self) -> list[int]:
        """Return the numbers that a flush submitted now has to make durable."""
        return list(self.settled)

    def flushed(self, promised: list[int], since: list[set[int]]) -> None:
        """A flush has been answered.  `since` has the numbers in flight when it began or submitted after that."""
        for unit in range(UNITS):
            self.possible[unit] &= {promised[unit]} | since[unit]


class Victim:
    """A driver that writes numbers everywhere until its device is killed."""

    def __init__(self, driver: BlockDriver, ledger: Ledger, seed: int) -> None:
        self.driver = driver
        self.ledger = ledger
        self.choice = random.Random(seed)
        self.number = 0
        self.busy: dict[int, int] = {}  # unit -> number in flight
        self.flushes: list[tuple[Request, list[int], list[set[int]]]] = []
        self.answers = 0

    def submit(self) -> None:
        """Submit a random request."""
        what = self.choice.random()
        if what < 0.06 and not self.ledger.write_through:
            since = [{self.busy[unit]} if unit in self.busy else set() for unit in range(UNITS)]
            self.flushes.append((self.driver.flush(), self.ledger.promise(), since))
            return
        unit = self.choice.randrange(UNITS)
        while unit in self.busy:
            unit = self.choice.randrange(UNITS)
        self.number += 1
        number = self.number if what < 0.75 else 0 if what < 0.9 else ANY
        self.busy[unit] = number
        self.ledger.submitted(unit, number)
        for _, _, since in self.flushes:
            since[unit].add(number)
        sector = unit * PER_UNIT
        if number == ANY:
            self.driver.change_ranges(DISCARD, [(sector, PER_UNIT, 0)], (unit, number))
        elif number == 0:
            self.driver.change_ranges(WRITE_ZEROES, [(sector, PER_UNIT, self.choice.randrange(2))], (unit, number))
        else:
            self.driver.write(sector, number.to_bytes(4, "little") * (UNIT // 4), (unit, number))

    def take(self, requests: list[Request]) -> None:
        """Record answered requests."""
        for request in requests:
            assert request.status == OK
            self.answers += 1
            if request.kind == FLUSH:
                (found,) = [entry for entry in self.flushes if entry[0] is request]
                self.flushes.remove(found)
                self.ledger.flushed(found[1], found[2])
            else:
                assert isinstance(request.note, tuple)
                unit, number = request.note
                del self.busy[unit]
                self.ledger.answered(unit, number)

    def run(self, answers: int) -> None:
        """Submit requests until `answers` have been answered.  Others are still in flight then."""
        self.fill()
        while self.answers < answers:
            self.take(self.driver.wait())
            self.fill()

    def fill(self) -> None:
        """Submit requests until all slots are in flight."""
        while len(self.driver.flying) < SLOTS:
            self.submit()


def kill_and_check(tmp_path: Path, seed: int) -> int:
    """Kill the process in the middle of writes, and check the image.  Return the number of unanswered requests."""
    choice = random.Random(seed)
    options = f"cluster_size={choice.choice(('512', '4k', '64k', '64k', '2M'))},compat={choice.choice(('0.10', '1.1'))}"
    write_through = choice.random() < 0.3
    path, base, content = tmp_path / f"image{seed}", tmp_path / f"base{seed}", tmp_path / f"content{seed}"
    size = UNITS * UNIT
    paths = [path]
    if choice.random() < 0.5:
        base.write_bytes(BASE_NUMBER.to_bytes(4, "little") * (size // 4))
        qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, "-F", "raw", "-b", base, path)
        paths.append(base)
    else:
        qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, path, size)
    features = WRITE_THROUGH if write_through else FEATURES
    ledger = Ledger(BASE_NUMBER if len(paths) > 1 else 0, write_through=write_through)

    with BlockDriver(paths, chain_formats(paths), features=features, seed=seed) as driver:
        victim = Victim(driver, ledger, seed)
        victim.run(choice.randrange(20, 200 if write_through else 2500))
        for _ in range(choice.choice((0, 10_000, 100_000))):
            pass  # kill after a different delay each time
        driver.device.child.kill(signal.SIGKILL)
        assert driver.device.status() == -signal.SIGKILL
        victim.take(driver.take())  # answers that had not been collected yet
        flying = len(driver.flying)

    found = problems(path)
    assert set(found) <= {"leaks"}, f"seed {seed}: {found}"
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, content)
    raw = content.read_bytes()
    for unit, possible in enumerate(ledger.possible):
        if ANY in possible:
            continue
        for sector in range(unit * PER_UNIT, (unit + 1) * PER_UNIT):
            data = raw[sector * SECTOR : (sector + 1) * SECTOR]
            number = int.from_bytes(data[:4], "little")
            assert number in possible, f"seed {seed}: sector {sector} holds {number}, not one of {possible}"
            assert data == data[:4] * (SECTOR // 4)
    with BlockDriver(paths, chain_formats(paths), seed=seed) as driver:  # the next VM can use the image
        flat = bytearray(raw)
        BlockScribbler(driver, flat, seed=seed).run(40)
        driver.shut_down()
    assert set(problems(path)) <= {"leaks"}
    same(path, flat, tmp_path)
    for used in (*paths, content):
        used.unlink()
    return flying


@pytest.mark.parametrize("seed", [0])
def test_killed_device_loses_nothing_that_was_flushed(tmp_path: Path, seed: int) -> None:
    """The image has all flushed data, and nothing worse than leaks."""
    kill_and_check(tmp_path, seed)


@pytest.mark.deep
@pytest.mark.timeout(1800)
def test_killed_devices_lose_nothing_that_was_flushed(tmp_path: Path) -> None:
    """The same fifty times, with and without a base, with every cluster size, with and without write-through."""
    unanswered = [kill_and_check(tmp_path, seed) for seed in range(1, 51)]

    print(f"requests in flight when it was killed: {unanswered}")
    assert sum(map(bool, unanswered)) > 25, "the process was seldom killed with requests in flight"


# --- malformed images, failing hosts -------------------------------------------------------------------------------

CLUSTER = 64 * KIB
HEADER_LIES: dict[str, tuple[int, bytes]] = {
    "version": (4, (9).to_bytes(4, "big")),
    "cluster-size": (20, (40).to_bytes(4, "big")),
    "size": (24, (1 << 63).to_bytes(8, "big")),
    "l1-size": (36, (0xFFFFFFFF).to_bytes(4, "big")),
    "l1-offset": (40, (0xFFFFFFFFFFFF0000).to_bytes(8, "big")),
    "refcounts": (56, (0x7FFFFFFF).to_bytes(4, "big")),
    "features": (72, (1 << 20).to_bytes(8, "big")),
    "extension": (104, (0x12345678FFFFFFFF).to_bytes(8, "big")),
    "l2-table": (3 * CLUSTER, (1 << 63 | 3 * CLUSTER).to_bytes(8, "big")),
    "refcount-block": (CLUSTER, (3 * CLUSTER).to_bytes(8, "big")),
    "corrupt": (72, (2).to_bytes(8, "big")),
}


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Change some bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_an_image_with_a_false_header_is_answered_with_a_sentence_52(tmp_path: Path, lie: str) -> None:
    """Hostile input 52: the process sends what is wrong with the image, and ends without a traceback."""
    path = tmp_path / "image"
    create(str(path), "qcow2", MIB)
    overwrite(path, *HEADER_LIES[lie])
    driver = BlockDriver([path])

    with driver.device as device:
        device.send_start(device.start_packet())
        number, sentence = device.error(device.sync)

        assert (device.status(), device.read_log()) == (1, "")
    assert sentence.startswith("disk 0: ")
    assert len(sentence) > len("disk 0: ") + 10
    assert number == 0


def test_an_image_without_its_base_is_answered_with_a_sentence_52(tmp_path: Path) -> None:
    """Hostile input 52: the process uses no backing file except one that the parent has opened."""
    path = tmp_path / "image"
    create(str(path), "qcow2", MIB, "/etc/passwd", "raw")
    driver = BlockDriver([path])

    with driver.device as device:
        device.send_start(device.start_packet())

        assert device.error(device.sync)[1] == "disk 0: needs its backing file /etc/passwd"


def deflated(data: bytes) -> bytes:
    """Compress as qcow2 does."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -12)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("packed", "at", "status"),
    [
        (b"\xff" * 600, 5 * CLUSTER, IOERR),
        (deflated(b"short"), 5 * CLUSTER, IOERR),
        (deflated(bytes(100 * MIB)), 5 * CLUSTER, OK),  # a decompression bomb, of which only one cluster is needed
        (deflated(bytes(CLUSTER)), (1 << 54) - 512, IOERR),
        (b"", 0, IOERR),
    ],
    ids=["bad", "short", "bomb", "past-eof", "header"],
)
def test_a_malformed_compressed_cluster_52(tmp_path: Path, packed: bytes, at: int, status: int) -> None:
    """Hostile input 52: only that cluster fails, in bounded memory.  Other clusters can be read and written."""
    path = tmp_path / "image"
    create(str(path), "qcow2", 4 * MIB)
    with BlockDriver([path]) as driver:
        driver.write(0, b"a" * 2 * CLUSTER)
        driver.wait_all()
        driver.shut_down()
    overwrite(path, 4 * CLUSTER, (1 << 62 | 0x7F << 54 | at).to_bytes(8, "big"))
    if packed:
        overwrite(path, 5 * CLUSTER, packed[: CLUSTER - 512])

    with BlockDriver([path]) as driver:
        before_kib = driver.device.own_kib()
        for _ in range(30):
            assert driver.wait_for(driver.read(0, 4 * KIB)).status == status
        beside = driver.wait_for(driver.read(CLUSTER // SECTOR, 4 * KIB))
        assert driver.result(beside) == b"a" * 4 * KIB
        assert driver.wait_for(driver.write(2 * MIB // SECTOR, b"b" * 4 * KIB)).status == OK
        assert driver.device.own_kib() - before_kib < 8 * KIB
        assert len(driver.device.read_log().splitlines()) <= 5 + 1  # the burst of the log limit
        driver.shut_down()


def test_corruption_found_while_writing_stops_the_writing_52(tmp_path: Path) -> None:
    """Hostile input 52: a table entry points into the refcounts.  The rest of the disk can still be read."""
    path = tmp_path / "image"
    create(str(path), "qcow2", 4 * MIB)
    with BlockDriver([path]) as driver:
        driver.write(0, b"a" * 2 * CLUSTER)
        driver.wait_all()
        driver.shut_down()
    overwrite(path, 4 * CLUSTER, (1 << 63 | 2 * CLUSTER).to_bytes(8, "big"))
    refcounts = path.read_bytes()[2 * CLUSTER : 3 * CLUSTER]

    with BlockDriver([path]) as driver:
        assert driver.wait_for(driver.write(0, b"x" * 512)).status == IOERR
        assert driver.wait_for(driver.write(MIB // SECTOR, b"x" * 512)).status == IOERR
        beside = driver.wait_for(driver.read(CLUSTER // SECTOR, 4 * KIB))
        assert driver.result(beside) == b"a" * 4 * KIB
        assert "image is corrupt" in driver.device.read_log()
        assert "image is corrupt" in driver.shut_down(quiet=False)  # it is logged again, and the process ends normally

    assert path.read_bytes()[2 * CLUSTER : 3 * CLUSTER] == refcounts


def test_base_that_becomes_shorter_is_an_error_33(tmp_path: Path) -> None:
    """Hostile input 33: data that was there when the disk was opened reads as an error now, not as zeroes."""
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"b" * MIB)
    create(str(top), "qcow2", MIB, str(base), "raw")

    with BlockDriver([top, base], ("qcow2", "raw")) as driver:
        os.truncate(base, 512 * KIB)
        assert driver.wait_for(driver.read(0, 4 * KIB)).status == OK
        assert driver.wait_for(driver.read(768 * KIB // SECTOR, 4 * KIB)).status == IOERR
        assert "has become shorter" in driver.device.read_log()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 2 MiB."""
    with small_file_system(tmp_path / "small") as path:
        yield path


@pytest.mark.root
@pytest.mark.parametrize("features", [FEATURES, WRITE_THROUGH])
def test_host_without_room_33(small: Path, features: int) -> None:
    """Hostile input 33: writes without room are refused, other data is kept, and writes work again with room."""
    path = small / "image"
    create(str(path), "qcow2", 8 * MIB)
    filler = small / "filler"
    filler.write_bytes(bytes(MIB))
    flat = bytearray(8 * MIB)
    refused = 0

    with BlockDriver([path], features=features) as driver:
        choice = random.Random(1)
        for number in range(200):
            unit = choice.randrange(1024)
            request = driver.wait_for(driver.write(unit * 16, bytes([number + 1]) * 8 * KIB))
            if request.status == OK:
                flat[unit * 8 * KIB : (unit + 1) * 8 * KIB] = bytes([number + 1]) * 8 * KIB
            else:
                # A write that failed may have been done in part.
                flat[unit * 8 * KIB : (unit + 1) * 8 * KIB] = driver.read_now(unit * 16, 8 * KIB)
                refused += 1
            if number == 150:
                filler.unlink()
                before = refused
        assert "No space left on device" in driver.device.read_log()
        assert before
        assert driver.wait_for(driver.flush()).status == OK
        assert driver.read_now(0, 8 * MIB) == flat
        driver.shut_down()

    assert set(problems(path)) <= {"leaks"}
    same(path, flat, small.parent)
