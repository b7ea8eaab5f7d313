"""Drivers with random memory contents, for every kind of device process (hostile-input 11-24).

Each round fills rings, tables and buffers with half plausible bytes, and changes them while the device works.  The
device must still answer its VM, keep within its memory, and serve a correct driver afterwards.
"""

import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fakedriver import (
    EVENT_IDX,
    EXTRA_END,
    INDIRECT,
    INDIRECT_DESC,
    KIB,
    MIB,
    MODERN,
    NEXT,
    RAM_END,
    WRITE,
    Device,
    Ring,
)
from vmd.images.create import new_file, write_empty
from vmd.ipc import devmsg
from vmd.virtio import spec

ROUNDS = 150
SCRIBBLES = 200
GROWTH_MAX_KIB = 4 * KIB  # of the process, over all rounds
TABLES, TABLE_BYTES, HEADERS = 2 * MIB, 4 * KIB, 3 * MIB
BLK_FEATURES = 1 << spec.VIRTIO_BLK_F_FLUSH | 1 << spec.VIRTIO_BLK_F_DISCARD | 1 << spec.VIRTIO_BLK_F_WRITE_ZEROES


class Garbage:
    """A source of random driver errors, which a seed determines."""

    def __init__(self, device: Device, rings: list[Ring], seed: int) -> None:
        self.device = device
        self.rings = rings
        self.choice = random.Random(seed)

    def gpa(self) -> int:
        """Return an address, mostly one in memory."""
        draw = self.choice.random()
        if draw < 0.5:
            return HEADERS + 64 * self.choice.randrange(64)
        if draw < 0.9:
            return self.choice.randrange(EXTRA_END)
        return self.choice.choice((RAM_END - 8, EXTRA_END - 8, 32 * MIB, 1 << 40, (1 << 64) - 16, TABLES, 0x10000))

    def descriptor(self, size: int) -> bytes:
        """Return a table entry."""
        length = self.choice.choice((1, 1, 16, 24, 51, 108, 512, 512, 4096, 0, 3, 70000, 0xFFFFFFFF))
        flags = self.choice.choice((0, NEXT, NEXT, NEXT, NEXT | WRITE, NEXT | WRITE, WRITE, WRITE, INDIRECT, 7, 0xFFFF))
        gpa = self.gpa()
        if flags == INDIRECT and self.choice.random() < 0.9:
            gpa = TABLES + TABLE_BYTES * self.choice.randrange(16)
            length = 16 * self.choice.choice((1, 3, 3, 5, 200, 0, 1 << 27))
        following = self.choice.randrange(size) if self.choice.random() < 0.97 else self.choice.randrange(1 << 16)
        return struct.pack("<QIHH", gpa, length, flags, following)

    def header(self) -> bytes:
        """Return bytes that may pass for the header of a request of one of the devices."""
        kind = self.choice.choice((0, 1, 4, 8, 11, 13, 2, 99))
        cdb = bytes((self.choice.choice((0x00, 0x12, 0x25, 0x28, 0xA8, 0x43, 0xFF)),)) + self.choice.randbytes(15)
        return struct.pack("<IIQ", kind, 0, self.choice.choice((0, 1, 7, 2000, 1 << 60))) + cdb.ljust(48, b"\0")

    def fill(self) -> None:
        """Fill headers, tables and rings."""
        memory = self.device.memory
        for at in range(64):
            memory.load(HEADERS + 64 * at, self.header())
        for at in range(16):
            memory.load(TABLES + TABLE_BYTES * at, b"".join(self.descriptor(8) for _ in range(TABLE_BYTES // 16)))
        for ring in self.rings:
            memory.load(ring.desc, b"".join(self.descriptor(ring.size) for _ in range(ring.size)))
            for _ in range(self.choice.randrange(1, ring.size // 4)):
                ring.offer(self.choice.randrange(ring.size))
            ring.set_used_event(self.choice.randrange(1 << 16))
            if self.choice.random() < 0.05:
                ring.set_avail_idx(self.choice.randrange(1 << 16))

    def scribble(self) -> None:
        """Change bytes that the device may be reading."""
        ring = self.choice.choice(self.rings)
        slot, head = self.choice.randrange(ring.size), self.choice.randrange(ring.size)
        at, what = self.choice.choice((
            (ring.desc + 16 * slot, self.descriptor(ring.size)),
            (TABLES + 16 * self.choice.randrange(1024), self.descriptor(8)),
            (HEADERS + 64 * self.choice.randrange(64), self.header()),
            (ring.avail + 4 + 2 * slot, struct.pack("<H", head)),
            (ring.used + self.choice.randrange(8 * ring.size), self.choice.randbytes(4)),
        ))  # fmt: skip
        self.device.memory.load(at, what)


def renew(device: Device, sizes: tuple[int, ...], features: int) -> list[Ring]:
    """Reset the device, and activate empty rings at consecutive addresses."""
    device.command(devmsg.RESET)
    rings = [Ring(device.memory, size, 0x10000 * (number + 1)) for number, size in enumerate(sizes)]
    assert device.activate_rows(features, *(ring.row() for ring in rings)) == 0
    return rings


def raw_disk(path: Path) -> int:
    """Make a raw image.  Return the note about its format."""
    path.write_bytes(random.Random(1).randbytes(4 * MIB))
    return 0


def qcow2_disk(path: Path) -> int:
    """Make a qcow2 image.  Return the note about its format."""
    with new_file(str(path)) as fd:
        write_empty(fd, str(path), "qcow2", 4 * MIB)
    return devmsg.RESOURCE_QCOW2


KINDS: dict[str, tuple[str, tuple[int, ...], Callable[[Path], int] | None, int]] = {
    "raw": ("vioblk", (256,), raw_disk, BLK_FEATURES),
    "raw-write-through": ("vioblk", (256,), raw_disk, 0),
    "qcow2": ("vioblk", (256,), qcow2_disk, BLK_FEATURES),
    "cdrom": ("vioscsi", (128, 128, 128), raw_disk, 0),
}


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Device, tuple[int, ...], int]]:
    """A running device process of each kind, the sizes of its queues, and the features to negotiate."""
    kind, sizes, make, features = request.param
    resources, notes = [], []
    if make is not None:
        notes.append(make(tmp_path / "image"))
        resources.append(os.open(tmp_path / "image", os.O_RDWR | os.O_CLOEXEC))
    device = Device(kind, resources, notes=notes, queues=len(sizes))
    for fd in resources:
        os.close(fd)
    with device:
        yield device.start(), sizes, features


@pytest.mark.parametrize("ring_features", [0, INDIRECT_DESC | EVENT_IDX])
def test_random_garbage_11_to_24(
    subject: tuple[Device, tuple[int, ...], int], ring_features: int
) -> None:
    """Hostile input 11-24: the process lives and answers, and neither its memory nor its log grows with the errors."""
    device, sizes, own_features = subject
    features = MODERN | ring_features | own_features
    before_kib, broken = 0, 0
    for number in range(ROUNDS):
        garbage = Garbage(device, renew(device, sizes, features), seed=number)
        garbage.fill()
        for queue in range(len(sizes)):
            device.kick(queue)
        for _ in range(SCRIBBLES):
            garbage.scribble()
        device.command(devmsg.PAUSE)
        device.command(devmsg.RESUME)
        while Device.readable(device.informs.fileno()):
            device.informs.recv(devmsg.PACKET_MAX)
            broken += 1
        if number == ROUNDS // 3:
            before_kib = device.own_kib()

    assert broken > ROUNDS // 2  # otherwise the garbage was too harmless
    assert device.own_kib() < before_kib + GROWTH_MAX_KIB
    log = device.read_log()
    assert "Traceback" not in log
    assert log.count("\n") <= 40
    rings = renew(device, sizes, features)
    assert [device.export()[number] for number in range(len(rings))] == [(0, 0)] * len(rings)
