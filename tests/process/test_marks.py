"""Each device process marks the pages of guest memory that it changes, while marking is on (arch. 15)."""

import struct
from pathlib import Path

import pytest

from tests.support.blkdriver import FEATURES, WRITE_THROUGH, BlockDriver, Request
from tests.support.fakedriver import (
    DATA,
    EVENT_IDX,
    EXTRA,
    INDIRECT_DESC,
    KIB,
    MIB,
    MODERN,
    WRITE,
    Desc,
    Device,
)
from tests.support.marks import all_marked
from tests.support.netdriver import ALL, GUEST_TSO, MRG, NetDriver, Nic, net_start
from tests.support.network import Network, TapInterface
from tests.support.packets import LLADDR, any_frame
from vmd.ipc import devmsg
from vmd.virtio import spec

SIZE = 64
BLOCK = 2048
FLYING_MAX = 9  # requests under way; together their buffers are less than half of guest memory
GET_ID = spec.VIRTIO_BLK_T_GET_ID


@pytest.mark.parametrize("features", [
    pytest.param(FEATURES, id="flush"),
    pytest.param(WRITE_THROUGH, id="write-through", marks=pytest.mark.deep),
    pytest.param(0, id="legacy", marks=pytest.mark.deep),
])  # fmt: skip
def test_disk(tmp_path: Path, features: int) -> None:
    """A disk marks data and status of all kinds of requests, on the main thread and on workers."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(range(256)) * (8 * MIB // 256))
    with BlockDriver([path], ["raw"], features=features) as driver:
        with all_marked(driver.device, [driver.ring]):
            for number in range(150):
                length = driver.choice.choice((512, 4 * KIB, 64 * KIB, driver.data_max // 512 * 512))
                sector = driver.choice.randrange((8 * MIB - length) // 512)
                if number % 3:
                    driver.read(sector, length)
                else:
                    driver.write(sector, bytes(length))
                if number % 20 == 0:
                    driver.submit(Request(GET_ID, 0, 0))
                    driver.flush()
                while len(driver.flying) > FLYING_MAX:
                    driver.wait()
            while driver.flying:
                driver.wait()
        with all_marked(driver.device, [driver.ring]):  # marking works again after it was off
            driver.read(0, 4 * KIB)
            while driver.flying:
                driver.wait()


def test_requests_that_fail(tmp_path: Path) -> None:
    """A disk marks the status byte of a request that fails, and a buffer across two regions of memory."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    with BlockDriver([path], ["raw"]) as driver:
        device, ring = driver.device, driver.ring
        device.memory.load(DATA, struct.pack("<IIQ", spec.VIRTIO_BLK_T_IN, 0, 0))
        with all_marked(device, [ring]):
            device.memory.load(EXTRA + 5 * KIB, b"\xee" * 3)
            ring.add([Desc(DATA, 16), Desc(1 << 40, 512, WRITE), Desc(EXTRA + 5 * KIB, 1, WRITE)])
            for gpa in (EXTRA - 512, EXTRA):
                device.memory.load(gpa, b"\xee" * 512)
            ring.add([Desc(DATA, 16), Desc(EXTRA - 512, 1024, WRITE), Desc(EXTRA + 9 * KIB, 1, WRITE)])
            device.collect(ring, 2)


@pytest.mark.parametrize(("features", "sizes", "flags"), [
    pytest.param(features, sizes, flags, id=f"{name}-{'locked' if flags else 'open'}", marks=marks)
    for name, features, sizes, often in (
        ("all", ALL, (), True), ("merged", MODERN | MRG, (1500,), False), ("single", MODERN | EVENT_IDX, (), False),
        ("indirect", MODERN | INDIRECT_DESC, (12, 700, 4000), True), ("large", MODERN | GUEST_TSO, (), False),
        ("legacy", 0, (10, 2048), False),
    )
    for flags in (0, devmsg.NET_LOCKED)
    for marks in [() if often and not flags else pytest.mark.deep]
])  # fmt: skip
def test_interface(features: int, sizes: tuple[int, ...], flags: int) -> None:
    """An interface marks received frames, in one buffer or several.  A frame that is sent changes only the ring."""
    with Network() as network:
        tap = TapInterface(network, "tap0", mtu=1500)
        nic = Nic(tap, NetDriver(tap, net_start(flags=flags)))
        try:
            driver = nic.driver
            driver.renew(features)
            nic.forget()
            with all_marked(nic.device, [driver.rx, driver.tx]):
                driver.post(32, sizes)
                for number in range(60):
                    nic.gets(any_frame(60 + 20 * number, number, destination=LLADDR))
                    nic.sends(any_frame(60 + 20 * number, number))
        finally:
            nic.close()


def test_disc_drive(tmp_path: Path) -> None:
    """A disc drive marks responses, data, and the answers of the control queue."""
    (tmp_path / "disc").write_bytes(bytes(range(251)) * (BLOCK * 100 // 251 + 1))
    with (tmp_path / "disc").open("rb") as disc, Device("vioscsi", [disc.fileno()], queues=3) as device:
        device.start()
        rings = device.activate_all((SIZE,) * 3, MODERN)
        memory, lun = device.memory, b"\1\0\x40\0\0\0\0\0"
        with all_marked(device, rings):
            for number, cdb in enumerate((b"\x28\0\0\0\0\x05\0\0\x14", b"\x12\0\0\0\x24", b"\xff")):
                at = DATA + number * MIB
                memory.load(at, (lun + bytes(11) + cdb).ljust(51, b"\0"))
                memory.load(at + 8 * KIB, b"\xee" * (108 + 20 * BLOCK))
                buffer = Desc(at + 8 * KIB + 108, 20 * BLOCK, WRITE)
                rings[2].add([Desc(at, 51), Desc(at + 8 * KIB, 108, WRITE), buffer])
            device.collect(rings[2], 3, 2)
            memory.load(DATA, struct.pack("<II", 0, 5) + lun + bytes(8))
            memory.load(EXTRA, b"\xee")
            rings[0].add([Desc(DATA, 24), Desc(EXTRA, 1, WRITE)])
            device.collect(rings[0], 1, 0)


def test_a_reset_marks_the_rings() -> None:
    """The device may have stored flags since it last marked the rings, without a used element."""
    with Device("vioscsi", queues=3) as device:
        device.start()
        rings = device.activate_all((SIZE,) * 3, MODERN, base=MIB)
        device.command(devmsg.MARK)
        device.command(devmsg.RESET)
        pages = {page for page, mark in enumerate(device.memory.marks) if mark}
        ends = [end for ring in rings for end in (ring.used, ring.used + 5 + 8 * SIZE)]
        assert pages == {device.memory.offset(end, 1) >> 12 for end in ends}
