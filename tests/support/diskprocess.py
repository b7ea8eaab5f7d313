"""A disk driver, correct or faulty, with the real, confined device process."""

import random
import struct
from collections.abc import Sequence
from pathlib import Path

from tests.support.fakedriver import DATA, EVENT_IDX, INDIRECT_DESC, KIB, MIB, MODERN, WRITE, Desc, Device, Ring
from vmd.ipc import devmsg
from vmd.virtio import spec

IN, OUT, FLUSH, GET_ID = (
    spec.VIRTIO_BLK_T_IN, spec.VIRTIO_BLK_T_OUT, spec.VIRTIO_BLK_T_FLUSH, spec.VIRTIO_BLK_T_GET_ID,
)  # fmt: skip
DISCARD, WRITE_ZEROES = spec.VIRTIO_BLK_T_DISCARD, spec.VIRTIO_BLK_T_WRITE_ZEROES
OK, IOERR, UNSUPP = spec.VIRTIO_BLK_S_OK, spec.VIRTIO_BLK_S_IOERR, spec.VIRTIO_BLK_S_UNSUPP
FEATURES = (
    MODERN | INDIRECT_DESC | EVENT_IDX
    | 1 << spec.VIRTIO_BLK_F_FLUSH | 1 << spec.VIRTIO_BLK_F_CONFIG_WCE
    | 1 << spec.VIRTIO_BLK_F_DISCARD | 1 << spec.VIRTIO_BLK_F_WRITE_ZEROES
)  # fmt: skip
SIZE = 256
DISK = 8 * MIB
SECTORS = DISK // 512
HEAD, BUFFER, STATUS, TABLE = DATA, DATA + 64 * KIB, DATA + 0x100, DATA + 0x1000
UNSET = 0xEE


def content(length: int = DISK) -> bytes:
    """Return content without repetition."""
    return random.Random(1).randbytes(length)


class Disk:
    """A disk process with one image, and the driver's ring."""

    def __init__(self, device: Device, path: Path) -> None:
        self.path = path
        self.device = device
        self.memory = device.memory
        self.renew()

    def renew(self, features: int = FEATURES) -> Ring:
        """Reset, and start with a new ring."""
        self.ring = self.device.activate(SIZE, features)
        self.features = features
        return self.ring

    def header(self, kind: int, sector: int, gpa: int = HEAD) -> Desc:
        """Write a header."""
        self.memory.load(gpa, struct.pack("<IIQ", kind, 0, sector))
        return Desc(gpa, 16)

    def do(self, parts: Sequence[Desc], status: int = STATUS) -> tuple[int, int]:
        """Submit one chain and wait; return its status byte and the length in the used ring."""
        self.memory.load(status, bytes((UNSET,)))
        head = self.ring.add(parts)
        ((used, length),) = self.device.collect(self.ring, 1)
        assert used == head
        return self.memory.read(status, 1)[0], length

    def request(self, kind: int, sector: int = 0, data: Sequence[Desc] = ()) -> tuple[int, int]:
        """Submit a request of the usual form and wait; return status byte and length."""
        return self.do([self.header(kind, sector), *data, Desc(STATUS, 1, WRITE)])

    def works(self) -> bool:
        """Reset the device; return whether the same process then serves a valid request."""
        self.renew()
        expected = self.path.read_bytes()[1024 : 1024 + 4096]
        self.memory.load(BUFFER, bytes(4096))
        return (
            self.request(IN, 2, [Desc(BUFFER, 4096, WRITE)]) == (OK, 4097)
            and self.memory.read(BUFFER, 4096) == expected
        )

    def close(self) -> None:
        """End it."""
        self.device.__exit__(None, None, None)


def start_disk(path: Path, *, flags: int = 0, note: int = 0) -> Disk:
    """Make an image and start its process."""
    path.write_bytes(content())
    with path.open("rb" if flags & devmsg.START_READ_ONLY else "rb+") as file:
        return Disk(Device("vioblk", [file.fileno()], notes=[note], flags=flags).start(), path)
