"""The real, confined entropy process against a driver that does not care (hostile-input 11-14, 16, 18, 44)."""

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fakedriver import DATA, EXTRA_END, MIB, MODERN, NEXT, RAM_END, ROM, WRITE, Desc, Device, Ring
from vmd.ipc import devmsg

SIZE = 64
REQUEST_MAX = 64 * 1024


class Rng:
    """An entropy process and a driver's ring."""

    def __init__(self) -> None:
        self.device = Device("viornd").start()
        self.memory = self.device.memory
        self.renew()

    def renew(self) -> None:
        """Reset, and start with a new ring."""
        self.ring: Ring = self.device.activate(SIZE, MODERN)

    def works(self) -> bool:
        """See whether a good request is served by the same process."""
        self.renew()
        self.memory.load(DATA, bytes(64))
        self.ring.add([Desc(DATA, 64, WRITE)])
        return self.device.collect(self.ring, 1)[0][1] == 64 and any(self.memory.read(DATA, 64))


@pytest.fixture(scope="module")
def shared() -> Iterator[Rng]:
    """Give a process that all cases share."""
    rng = Rng()
    yield rng
    rng.device.__exit__(None, None, None)


@pytest.fixture
def rng(shared: Rng) -> Rng:
    """Give the shared process after a reset."""
    shared.renew()
    return shared


def test_process_is_small_and_starts_soon() -> None:
    """The figures are shown, not judged."""
    with Device("viornd") as device:
        device.start()
        print(f"viornd: ready {device.ready_ms:.1f} ms after spawn, PSS {device.pss_kib() / 1024:.1f} MiB")
        assert device.config == b""


def test_a_vm_that_ends_while_it_starts() -> None:
    """The process ends as well, without a word: there is nobody to tell, and nothing to tell of."""
    with Device("viornd") as device:
        device.send_start(device.start_packet())
        device.sync.shutdown(socket.SHUT_RDWR)

        assert device.status() == 1
        assert device.read_log() == ""


def test_what_is_counted(rng: Rng) -> None:
    """Requests and bytes."""
    before = rng.device.figures()
    rng.ring.add([Desc(DATA, 100, WRITE), Desc(DATA + 200, 33, WRITE)])
    rng.ring.add([Desc(DATA + 4096, 100, WRITE)])
    rng.device.collect(rng.ring, 2)
    after = rng.device.figures()
    assert {name: value - before[name] for name, value in after.items()} == {"requests": 2, "bytes": 233, "delayed": 0}


def test_a_slot_that_there_is_not() -> None:
    """The process ends; what other devices have is not touched."""
    with Device("viornd") as device:
        device.send_start(device.start_packet(slot=devmsg.FIGURES_SLOTS))
        assert b"slot 16 of 16 for figures" in device.sync.recv(devmsg.PACKET_MAX)
        assert not any(os.pread(device.figures_fd, devmsg.FIGURES_BYTES, 0))


def test_chain_is_filled_and_nothing_beside_it(rng: Rng) -> None:
    """Every buffer to its last byte; two requests differ."""
    rng.memory.load(DATA, bytes(8192))
    rng.ring.add([Desc(DATA, 100, WRITE), Desc(DATA + 200, 0, WRITE), Desc(DATA + 300, 33, WRITE)])
    rng.ring.add([Desc(DATA + 4096, 100, WRITE)])

    assert [length for _, length in rng.device.collect(rng.ring, 2)] == [133, 100]
    raw = rng.memory.read(DATA, 8192)
    assert raw[100:300] == bytes(200)
    assert raw[333:4096] == bytes(3763)
    assert len({raw[:33], raw[300:333], raw[4096:4129], bytes(33)}) == 4


@pytest.mark.parametrize("length", [REQUEST_MAX + 1, 8 * MIB])
def test_huge_request_gets_what_one_request_may_44(rng: Rng, length: int) -> None:
    """Hostile input 44: no length is fatal, nor served in full."""
    rng.ring.add([Desc(DATA, length, WRITE)])

    assert rng.device.collect(rng.ring, 1)[0][1] == REQUEST_MAX
    assert rng.works()


def test_flood_is_slowed_down_44(rng: Rng) -> None:
    """Hostile input 44: a guest that only asks is served on, by the clock, and questions are answered meanwhile."""
    rng.ring.describe(0, [Desc(DATA, REQUEST_MAX, WRITE)])
    for _ in range(SIZE):
        rng.ring.offer(0)
    rng.device.kick()
    rng.device.command(devmsg.PAUSE)  # returns though most of the requests still wait
    rng.device.command(devmsg.RESUME)

    assert rng.device.collect(rng.ring, SIZE) == [(0, REQUEST_MAX)] * SIZE
    assert rng.works()


def test_rings_that_come_during_a_pause_wait_for_its_end(rng: Rng) -> None:
    """As those of a machine that was received: the process touches nothing before the machine goes on."""
    ring = Ring(rng.memory, SIZE)
    ring.add([Desc(DATA, 64, WRITE)])
    rng.device.command(devmsg.RESET)
    rng.device.command(devmsg.PAUSE)

    assert rng.device.activate_rows(MODERN, ring.row()) == 0
    rng.device.kick()
    assert rng.device.export() == [(0, 0)]
    assert ring.device_idx == 0

    rng.device.command(devmsg.RESUME)
    assert rng.device.collect(ring, 1) == [(0, 64)]
    assert rng.works()


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([Desc(DATA, 16, NEXT, SIZE)], id="13"),
        pytest.param([Desc(DATA, 16, NEXT | WRITE, 0)], id="14"),
        pytest.param([Desc(RAM_END * 4, 16, WRITE)], id="16-nowhere"),
        pytest.param([Desc((1 << 64) - 8, 16, WRITE)], id="16-wrapping"),
        pytest.param([Desc(EXTRA_END - 8, 16, WRITE)], id="16-across-the-end"),
        pytest.param([Desc(ROM, 16, WRITE)], id="16-read-only"),
        pytest.param([Desc(DATA, 16)], id="18-for-reading"),
        pytest.param([Desc(DATA, 0xFFFFFFFF, WRITE | NEXT, 1), Desc(DATA, 2, WRITE)], id="44-more-than-4-gib"),
    ],
)
def test_broken_request_asks_for_a_reset(rng: Rng, parts: list[Desc]) -> None:
    """Hostile input 13, 14, 16, 18, 44; the number is in the case's name."""
    rng.ring.describe(0, parts)
    rng.ring.offer(0)
    rng.device.kick()

    assert rng.device.needs_reset()
    assert rng.works()


def test_broken_indices_ask_for_a_reset_11_12(rng: Rng) -> None:
    """Hostile input 11, 12."""
    rng.ring.set_avail_idx(SIZE + 1)
    rng.device.kick()
    assert "ahead" in rng.device.needs_reset()
    rng.renew()
    rng.ring.offer(SIZE)
    rng.device.kick()
    assert "outside" in rng.device.needs_reset()
    assert rng.works()


def test_end_of_a_channel_ends_the_process() -> None:
    """The VM is gone."""
    with Device("viornd") as device:
        device.start().sync.close()

        assert device.status() == 0


@pytest.mark.parametrize("packet", [b"", b"\0", struct.pack("<I", 77), bytes(range(64))])
def test_process_is_not_started_by_garbage(packet: bytes) -> None:
    """Whatever it is, the process ends."""
    with Device("viornd") as device:
        if packet:
            device.send_start(packet)
        else:
            device.sync.close()

        assert device.status() == 1
        assert "Traceback" not in device.read_log()


def test_process_is_confined(rng: Rng) -> None:
    """Filtered."""
    assert "Seccomp:\t2\n" in Path(f"/proc/{rng.device.child.pid}/status").read_text()
