"""A disk driver that keeps many requests of every kind and shape in flight, on the real device process."""

import itertools
import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.fakedriver import (
    EVENT_IDX,
    INDIRECT,
    INDIRECT_DESC,
    KIB,
    MIB,
    MODERN,
    WRITE,
    Desc,
    Device,
    chained,
)
from vmd.ipc import devmsg
from vmd.units import SECTOR
from vmd.virtio import spec

READ, WRITE_DATA, FLUSH = spec.VIRTIO_BLK_T_IN, spec.VIRTIO_BLK_T_OUT, spec.VIRTIO_BLK_T_FLUSH
DISCARD, WRITE_ZEROES = spec.VIRTIO_BLK_T_DISCARD, spec.VIRTIO_BLK_T_WRITE_ZEROES
OK, IOERR = spec.VIRTIO_BLK_S_OK, spec.VIRTIO_BLK_S_IOERR
RANGES = 1 << spec.VIRTIO_BLK_F_DISCARD | 1 << spec.VIRTIO_BLK_F_WRITE_ZEROES
WRITE_THROUGH = MODERN | INDIRECT_DESC | EVENT_IDX | RANGES
FEATURES = WRITE_THROUGH | 1 << spec.VIRTIO_BLK_F_FLUSH
UNSET = 0xEE

SLOTS = 24
SLOT_BYTES = 512 * KIB
SLOT_BASE = 2 * MIB
SLOT_DESCRIPTORS = 10
STATUS_AT, RANGES_AT, TABLE_AT, DATA_AT = 64, 128, 1024, 4 * KIB
DATA_MAX = SLOT_BYTES - DATA_AT


class Request:
    """A request, in flight or completed."""

    def __init__(self, kind: int, sector: int, length: int, note: object = None) -> None:
        self.kind = kind
        self.sector = sector
        self.length = length  # bytes of data
        self.note = note
        self.slot = -1
        self.status = UNSET


class BlockDriver:
    """A disk process with a chain of images, top image first.  A context manager that ends the process."""

    def __init__(
        self,
        paths: Sequence[Path],
        formats: Sequence[str] = (),
        *,
        features: int = FEATURES,
        flags: int = 0,
        seed: int = 0,
        slots: int = SLOTS,
        granularity: int = 0,
    ) -> None:
        """Without `formats` all images are qcow2.  The slots share one memory: fewer `slots` allow larger requests.

        `granularity` is the discard granularity of a block device, in bytes.
        """
        self.choice = random.Random(seed)
        notes = [devmsg.RESOURCE_QCOW2 if kind == "qcow2" else 0 for kind in formats or ("qcow2",) * len(paths)]
        notes = [note | granularity // SECTOR << devmsg.RESOURCE_DISCARD_SHIFT for note in notes]
        mode = os.O_RDONLY if flags & devmsg.START_READ_ONLY else os.O_RDWR
        fds = [os.open(path, os.O_RDONLY if number else mode) for number, path in enumerate(paths)]
        try:
            self.device = Device("vioblk", fds, notes=notes, flags=flags)
        finally:
            for fd in fds:
                os.close(fd)
        self.features = features
        self.slots = slots
        self.slot_bytes = SLOTS * SLOT_BYTES // slots
        self.data_max = self.slot_bytes - DATA_AT
        self.flying: dict[int, Request] = {}  # by slot
        self.done: list[Request] = []  # in the order in which the driver saw them

    def __enter__(self) -> Self:
        self.device.__enter__()
        try:
            self.device.start()
            self.sectors = int.from_bytes(self.device.config[:8], "little")
            self.ring = self.device.activate(256, self.features)
        except BaseException as error:
            self.device.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.device.__exit__(kind, error, trace)

    def reset(self) -> list[Request]:
        """Reset the device and give it a new ring; return the requests that were never completed."""
        self.device.command(devmsg.RESET)
        self.take()
        lost, self.flying = list(self.flying.values()), {}
        self.ring = self.device.activate(256, self.features)
        return lost

    def shut_down(self, *, quiet: bool = True) -> str:
        """End the process as a stopping VM does; return its log.  With `quiet` the log must be empty."""
        self.device.informs.send(devmsg.TYPE.pack(devmsg.SHUTDOWN))
        status = self.device.status()
        log = self.device.read_log()
        assert status == 0
        assert not (quiet and log), log
        return log

    # --- requests ------------------------------------------------------------------------------------------------

    def _base(self, slot: int) -> int:
        """Return where the memory of a slot begins."""
        return SLOT_BASE + slot * self.slot_bytes

    def _data_parts(self, start: int, length: int, flags: int) -> list[Desc]:
        """Cut a buffer into descriptors of any length."""
        cuts = sorted(self.choice.randrange(1, length) for _ in range(self.choice.randrange(SLOT_DESCRIPTORS - 3)))
        edges = [0, *dict.fromkeys(cuts), length]
        return [Desc(start + a, b - a, flags) for a, b in itertools.pairwise(edges)]

    def submit(self, request: Request, data: bytes = b"", ranges: Sequence[tuple[int, int, int]] = ()) -> None:
        """Offer a request.  If all slots are in use, first wait until a request completes."""
        while len(self.flying) == self.slots:
            self.wait()
        slot = request.slot = next(number for number in range(self.slots) if number not in self.flying)
        base, memory = self._base(slot), self.device.memory
        memory.load(base, struct.pack("<IIQ", request.kind, 0, request.sector))
        memory.load(base + STATUS_AT, bytes((UNSET,)))
        parts = [Desc(base, 16)]
        if ranges:
            raw = b"".join(struct.pack("<QII", *one) for one in ranges)
            memory.load(base + RANGES_AT, raw)
            parts.append(Desc(base + RANGES_AT, len(raw)))
        elif request.length:
            if request.kind == WRITE_DATA:
                memory.load(base + DATA_AT, data)
            parts += self._data_parts(base + DATA_AT, request.length, WRITE if request.kind == READ else 0)
        parts.append(Desc(base + STATUS_AT, 1, WRITE))
        head = slot * SLOT_DESCRIPTORS
        if self.features & INDIRECT_DESC and self.choice.random() < 0.5:
            memory.load(base + TABLE_AT, b"".join(struct.pack("<QIHH", *part) for part in chained(parts)))
            parts = [Desc(base + TABLE_AT, 16 * len(parts), INDIRECT)]
        self.ring.describe(head, chained(parts, head))
        self.flying[slot] = request
        self.ring.offer(head)
        self.device.kick()

    def read(self, sector: int, length: int, note: object = None) -> Request:
        """Offer a read."""
        request = Request(READ, sector, length, note)
        self.submit(request)
        return request

    def write(self, sector: int, data: bytes, note: object = None) -> Request:
        """Offer a write."""
        request = Request(WRITE_DATA, sector, len(data), note)
        self.submit(request, data)
        return request

    def flush(self, note: object = None) -> Request:
        """Offer a flush."""
        request = Request(FLUSH, 0, 0, note)
        self.submit(request)
        return request

    def change_ranges(self, kind: int, ranges: Sequence[tuple[int, int, int]], note: object = None) -> Request:
        """Offer a DISCARD or WRITE_ZEROES of (sector, sectors, flags)."""
        request = Request(kind, 0, 0, note)
        self.submit(request, ranges=ranges)
        return request

    def result(self, request: Request) -> bytes:
        """Return the data of a completed read; valid until its slot is used again."""
        return self.device.memory.read(self._base(request.slot) + DATA_AT, request.length)

    # --- completions -----------------------------------------------------------------------------------------------

    def take(self) -> list[Request]:
        """Return the requests completed since the last call, without waiting."""
        found = []
        for head, length in self.ring.reap():
            request = self.flying.pop(head // SLOT_DESCRIPTORS)
            base = self._base(request.slot)
            request.status = self.device.memory.read(base + STATUS_AT, 1)[0]
            assert length == 1 + (request.length if request.kind == READ and request.status == OK else 0)
            found.append(request)
        self.done += found
        return found

    def wait(self) -> list[Request]:
        """Wait until requests complete; return them."""
        found = self.take()
        while not found:
            self.ring.set_used_event(self.ring.used_idx)
            found = self.take()  # completed before the device could see that an interrupt is wanted
            if not found:
                self.device.wait_interrupt()
                found = self.take()
        return found

    def wait_for(self, request: Request) -> Request:
        """Wait until one request is completed."""
        while request.status == UNSET:
            self.wait()
        return request

    def wait_all(self) -> None:
        """Wait until nothing is in flight."""
        while self.flying:
            self.wait()

    def read_now(self, sector: int, length: int) -> bytes:
        """Read any length, with no other request in flight; return the data."""
        self.wait_all()
        parts = []
        step = self.data_max // SECTOR * SECTOR
        for start in range(0, length, step):
            request = self.wait_for(self.read(sector + start // SECTOR, min(step, length - start)))
            assert request.status == OK
            parts.append(self.result(request))
        return b"".join(parts)


class BlockScribbler:
    """Changes a disk through its driver, and a flat copy of the disk, at random; compares every read with the copy.

    Requests in flight at the same time never touch the same sectors, because their order is not defined.
    """

    def __init__(self, driver: BlockDriver, flat: bytearray, seed: int) -> None:
        self.driver = driver
        self.flat = flat
        self.sectors = len(flat) // SECTOR
        self.choice = random.Random(seed)

    def place(self, most: int = 600) -> tuple[int, int]:
        """Return a random range: first sector and number of sectors."""
        count = self.choice.choice((1, 8, self.choice.randrange(1, 64), self.choice.randrange(1, most)))
        sector = self.choice.randrange(self.sectors)
        return sector, min(count, self.sectors - sector, DATA_MAX // SECTOR)

    def make_room(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Wait until no request in flight overlaps the ranges."""
        while any(
            sector < theirs + count and theirs < sector + sectors
            for request in self.driver.flying.values()
            for theirs, count in self.touched(request)
            for sector, sectors in ranges
        ):
            self.settle(self.driver.wait())

    @staticmethod
    def touched(request: Request) -> list[tuple[int, int]]:
        """Return the ranges that a request touches."""
        if isinstance(request.note, list):
            return request.note
        return [(request.sector, request.length // SECTOR)]

    def settle(self, requests: Sequence[Request]) -> None:
        """Check completed requests before their slots are used again."""
        for request in requests:
            assert request.status == OK
            if request.kind == READ:
                start = request.sector * SECTOR
                expected = self.flat[start : start + request.length]
                assert self.driver.result(request) == expected, f"{request.length} bytes at {start} differ"

    def step(self) -> None:
        """Do one thing."""
        what = self.choice.random()
        driver = self.driver
        if len(driver.flying) >= SLOTS - 1:
            self.settle(driver.wait())
        if what < 0.5:
            sector, sectors = self.place()
            self.make_room([(sector, sectors)])
            data = self.choice.randbytes(sectors * SECTOR)
            driver.write(sector, data)
            self.flat[sector * SECTOR : (sector + sectors) * SECTOR] = data
        elif what < 0.75:
            sector, sectors = self.place()
            self.make_room([(sector, sectors)])
            driver.read(sector, sectors * SECTOR)
        elif what < 0.87:
            ranges = [self.place(1500) for _ in range(self.choice.randrange(1, 5))]
            self.make_room(ranges)
            driver.change_ranges(WRITE_ZEROES, [(*one, self.choice.randrange(2)) for one in ranges], ranges)
            for sector, sectors in ranges:
                self.flat[sector * SECTOR : (sector + sectors) * SECTOR] = bytes(sectors * SECTOR)
        elif what < 0.93:
            self.discard([self.place(3000) for _ in range(self.choice.randrange(1, 17))])
        else:
            driver.flush()

    def discard(self, ranges: list[tuple[int, int]]) -> None:
        """Discard, then read the sectors into the flat copy: virtio does not define what discarded sectors hold."""
        self.make_room(ranges)
        request = self.driver.change_ranges(DISCARD, [(*one, 0) for one in ranges], ranges)
        while request.status == UNSET:
            self.settle(self.driver.wait())
        self.drain()
        for sector, sectors in ranges:
            left = self.driver.read_now(sector, sectors * SECTOR)
            self.flat[sector * SECTOR : (sector + sectors) * SECTOR] = left

    def drain(self) -> None:
        """Wait until all requests in flight are completed, and check them."""
        while self.driver.flying:
            self.settle(self.driver.wait())

    def run(self, steps: int) -> None:
        """Do many steps, then compare the whole disk with the copy."""
        for _ in range(steps):
            self.step()
        self.drain()
        assert self.driver.read_now(0, self.sectors * SECTOR) == self.flat[: self.sectors * SECTOR]
