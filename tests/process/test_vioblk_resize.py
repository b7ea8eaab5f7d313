"""The real, confined disk process: its disk becomes larger while the driver uses it."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.diskprocess import BUFFER, IN, IOERR, OK, OUT, Disk
from tests.support.fakedriver import KIB, MIB, WRITE, Desc, Device
from tests.support.images import problems, qemu
from vmd.ipc import devmsg

FORMATS = {"raw": 0, "qcow2": devmsg.RESOURCE_QCOW2}


@pytest.fixture(params=FORMATS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """Give a process with a disk of 1 MiB."""
    path = tmp_path / f"disk.{request.param}"
    qemu("qemu-img", "create", "-qf", request.param, path, MIB)
    with path.open("rb+") as file:
        one = Disk(Device("vioblk", [file.fileno()], notes=[FORMATS[request.param]]).start(), path)
    yield one
    one.close()
    if request.param == "qcow2":
        assert problems(path) == {}


def inform(disk: Disk) -> bytes:
    """Return the next message of the device that is not TROUBLES."""
    while True:
        disk.device.wait_for(disk.device.informs.fileno())
        packet = disk.device.informs.recv(devmsg.PACKET_MAX)
        if packet[:4] != devmsg.TYPE.pack(devmsg.TROUBLES):
            return packet


def resize(disk: Disk, size: int) -> tuple[int, int, str]:
    """Ask for a size.  Return the size that the guest is told (0: none), and errno and sentence of the answer."""
    disk.device.informs.send(devmsg.RESIZE_BODY.pack(devmsg.RESIZE, size))
    packet, told = inform(disk), 0
    if packet[:4] == devmsg.TYPE.pack(devmsg.CONFIG_CHANGED):
        config = packet[devmsg.READY_HEAD.size :]
        assert config[8:] == disk.device.config[8:]
        told = int.from_bytes(config[:8], "little") * 512
        packet = inform(disk)
    kind, number = devmsg.CHANGED_HEAD.unpack_from(packet)
    assert kind == devmsg.CHANGED
    return told, number, packet[devmsg.CHANGED_HEAD.size :].decode()


def test_the_driver_hears_of_the_new_sectors_and_can_use_them(disk: Disk) -> None:
    """Sectors behind the old end are errors before the change, and zeroes after it.  The last one can be written."""
    last = 8 * MIB // 512 - 1
    disk.memory.load(BUFFER, b"n" * 512)
    assert disk.request(OUT, last, [Desc(BUFFER, 512)])[0] == IOERR

    assert resize(disk, 8 * MIB) == (8 * MIB, 0, "")

    assert disk.request(OUT, last, [Desc(BUFFER, 512)])[0] == OK
    assert disk.request(IN, last - 1, [Desc(BUFFER, 1024, WRITE)]) == (OK, 1025)
    assert disk.memory.read(BUFFER, 1024) == bytes(512) + b"n" * 512
    assert disk.request(OUT, last + 1, [Desc(BUFFER, 512)])[0] == IOERR
    disk.device.command(devmsg.RESET)
    assert disk.device.ask(devmsg.CONFIG_WRITE_HEAD.pack(devmsg.CONFIG_WRITE, 0, 0))[
        devmsg.READY_HEAD.size :
    ].startswith((last + 1).to_bytes(8, "little"))


def test_a_paused_disk(disk: Disk) -> None:
    """It has the new size when it is resumed."""
    disk.device.command(devmsg.PAUSE)

    assert resize(disk, 2 * MIB) == (2 * MIB, 0, "")

    disk.device.command(devmsg.RESUME)
    disk.memory.load(BUFFER, b"n" * 4 * KIB)
    assert disk.request(OUT, 2 * MIB // 512 - 8, [Desc(BUFFER, 4 * KIB)])[0] == OK


def test_an_impossible_size_is_refused_with_a_sentence_and_changes_nothing(disk: Disk) -> None:
    """The guest is not told, and its disk works as before."""
    told, number, text = resize(disk, 512 * KIB)
    assert (told, number) == (0, errno.EINVAL)
    assert text == f"disk 0: has {MIB} bytes, and a disk is never made smaller"

    told, number, text = resize(disk, 1 << 63)
    assert (told, number) == (0, errno.EFBIG)
    assert text.startswith(f"disk 0: {1 << 63} bytes are ")

    assert disk.request(IN, MIB // 512 - 8, [Desc(BUFFER, 4 * KIB, WRITE)]) == (OK, 4 * KIB + 1)
    assert resize(disk, MIB) == (MIB, 0, "")


def test_a_process_that_ends_while_its_disk_grows(disk: Disk) -> None:
    """The disk has the old size or the new one, nothing in between."""
    disk.device.informs.send(devmsg.RESIZE_BODY.pack(devmsg.RESIZE, 64 * MIB))
    disk.device.informs.send(devmsg.TYPE.pack(devmsg.SHUTDOWN))

    assert disk.device.status() == 0

    if disk.path.suffix == ".raw":
        assert os.stat(disk.path).st_size in (MIB, 64 * MIB)
