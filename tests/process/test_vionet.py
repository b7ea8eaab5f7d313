"""The real, confined network process on a real tap (hostile-input 6, 12, 18, 23, 24, 36-41, 43).

Everything is in a network namespace of its own.
"""

import itertools
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.descriptors import inheritable, open_files
from tests.support.fakedriver import (
    DATA,
    DEADLINE_S,
    EVENT_IDX,
    INDIRECT,
    INDIRECT_DESC,
    KIB,
    MIB,
    MODERN,
    NEXT,
    RAM_END,
    RING_BASE,
    WRITE,
    Desc,
    Device,
    Ring,
    chained,
)
from tests.support.netdriver import (
    ALL,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GUEST_TSO,
    HEADER,
    HOST_TSO,
    MRG,
    NEEDS_CSUM,
    OFFLOADS,
    RX,
    RX_BASE,
    SIZE,
    TX,
    NetDriver,
    Nic,
    net_start,
)
from tests.support.network import Host, Network, TapInterface, checksum
from tests.support.packets import (
    HOST_LLADDR,
    LLADDR,
    any_frame,
    tcp4,
    tcp6,
)
from vmd.ipc import devmsg
from vmd.virtio import spec

pytestmark = pytest.mark.root

COMBINATIONS = [
    sum(bits) for bits in itertools.product((0, MODERN), (0, MRG), (0, OFFLOADS), (0, EVENT_IDX), (0, INDIRECT_DESC))
]
MTU_MAX = 16384
UP, DOWN = True, False

Make = Callable[..., Nic]


def start(network: Network, net: bytes = b"", *, mtu: int = 1500) -> Nic:
    """Start a network process on its own tap."""
    tap = TapInterface(network, f"tap{next(NUMBERS)}", mtu=mtu)
    return Nic(tap, NetDriver(tap, net))


NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Give a namespace."""
    with Network() as made:
        yield made


@pytest.fixture(scope="module")
def shared(network: Network) -> Iterator[Nic]:
    """Yield a network process for all cases.  Damage by one case then shows in the next."""
    nic = start(network, mtu=MTU_MAX)
    yield nic
    nic.close()


@pytest.fixture
def nic(shared: Nic) -> Nic:
    """Give the shared process after a reset."""
    shared.device.read_log()
    shared.driver.renew()
    shared.forget()
    return shared


@pytest.fixture
def make(network: Network) -> Iterator[Make]:
    """Give a factory of network processes that end with the test."""
    made: list[Nic] = []

    def nic(net: bytes = b"") -> Nic:
        made.append(start(network, net))
        return made[-1]

    yield nic
    for one in made:
        one.close()


def test_threads_have_names(nic: Nic) -> None:
    """ps -L and top -H show which thread waits for events, and which moves frames."""
    tasks = Path(f"/proc/{nic.device.child.pid}/task")
    assert asleep(nic.device)  # a thread that sleeps has set its name

    assert {(task / "comm").read_text() for task in tasks.iterdir()} == {"event\n", "frames\n"}


# --- good frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", COMBINATIONS, ids=hex)
def test_frames_of_any_length_go_both_ways(nic: Nic, features: int) -> None:
    """Drivers are legacy or modern, and negotiate each combination of features that change headers or rings."""
    nic.driver.renew(features)
    nic.driver.post(8)

    for seed, length in enumerate((14, 15, 60, 61, 1513, 1514, 60, 200)):
        nic.sends(any_frame(max(length, 18), seed)[:length])
        received = nic.gets(any_frame(max(length, 18), seed, destination=LLADDR))
        assert received.header[:10] == bytes(10)
        assert received.header[10:] in (b"", b"\1\0")
        assert received.buffers == 1


@pytest.mark.parametrize("features", [MODERN, MODERN | INDIRECT_DESC, 0, ALL], ids=hex)
@pytest.mark.parametrize("layout", ["one", "usual", "split-header", "bytes", "many"])
def test_any_layout_for_sending_36(nic: Nic, features: int, layout: str) -> None:
    """Hostile input 36: the header is in its own descriptor, in one with the frame, or spread over several."""
    nic.driver.renew(features)
    header = nic.driver.header_bytes
    frame = any_frame(600)
    cuts = {
        "one": (),
        "usual": (header,),
        "split-header": (1, 7, header + 3, header + 14, header + 300),
        "bytes": tuple(range(1, header + 15)),
        "many": tuple(range(header, header + 600, 21)),
    }[layout]

    nic.sends(frame, cuts)


@pytest.mark.parametrize("features", [MODERN, MODERN | MRG | INDIRECT_DESC, 0, ALL], ids=hex)
@pytest.mark.parametrize("sizes", [(12, 1514), (3, 4, 5, 6, 7, 2000), (1,) * 30 + (1600,), (700, 900), (1526,)])
def test_any_layout_for_receiving(nic: Nic, features: int, sizes: tuple[int, ...]) -> None:
    """The header, with num_buffers, may be split at any place."""
    nic.driver.renew(features)
    nic.driver.post(3, sizes)

    for seed in range(7):
        received = nic.gets(any_frame(1514 - seed, seed))
        assert received.header[10:] in (b"", b"\1\0")


@pytest.mark.parametrize("features", [MODERN, ALL, ALL & ~MRG, 0], ids=hex)
def test_largest_frame_without_segmentation(nic: Nic, features: int) -> None:
    """16384 bytes and an Ethernet header (*cat. 6.5*)."""
    nic.driver.renew(features)
    nic.driver.post(12, (MTU_MAX + 14 + 12,) if not features & MRG else (4096,))

    nic.sends(any_frame(MTU_MAX + 14, 5))
    received = nic.gets(any_frame(MTU_MAX + 14, 6))
    assert received.buffers == (5 if features & MRG else 1)
    assert nic.driver.counters()["tx_long"] == 0


# --- frames with offloads ---------------------------------------------------------------------------------------------


def gso(kind: int, payload: int = 60_000, size: int = 1448) -> tuple[bytes, bytes]:
    """Return virtio header and frame of a large TCP segment."""
    frame = (tcp4 if kind == GSO_TCPV4 else tcp6)(random.Random(payload).randbytes(payload))
    headers = len(frame) - payload
    return HEADER.pack(NEEDS_CSUM, kind, headers, size, headers - 20, 16), frame


@pytest.mark.parametrize("features", [MODERN | HOST_TSO, HOST_TSO, ALL, ALL & ~MODERN], ids=hex)
@pytest.mark.parametrize("kind", [GSO_TCPV4, GSO_TCPV6])
def test_large_segment_is_sent_unsegmented(nic: Nic, features: int, kind: int) -> None:
    """Up to 64 KiB go to the kernel as they are, with the header that the kernel needs to segment them."""
    nic.driver.renew(features)
    with Host(nic.tap, unfinished=True) as host:
        for payload in (3000, 60_000, 65_535 - 60):
            header, frame = gso(kind, payload)
            nic.driver.send(frame, header)
            raw = host.receive()
            assert raw[10:] == frame
            assert raw[1] == kind
            assert HEADER.unpack(raw[:10])[3:] == HEADER.unpack(header)[3:]


def test_the_kernel_completes_the_checksum_of_a_sent_frame(nic: Nic) -> None:
    """The driver sets VIRTIO_NET_HDR_F_NEEDS_CSUM."""
    frame = tcp4(b"payload" * 20)
    nic.driver.send(frame, HEADER.pack(NEEDS_CSUM, GSO_NONE, 54, 0, 34, 16))

    # A packet socket gets the frame before the kernel completes the checksum.
    assert nic.host.receive() == frame
    assert nic.driver.counters()["tx_refused"] == 0


@pytest.mark.parametrize(
    ("features", "sizes"),
    [
        pytest.param(MODERN | MRG | GUEST_TSO, (1526,), id="mergeable-1526"),
        pytest.param(ALL, (4096,), id="mergeable-4096"),
        pytest.param(ALL, (300, 700), id="mergeable-chains"),
        pytest.param(MRG | GUEST_TSO, (2048,), id="legacy-mergeable"),
        pytest.param(MODERN | GUEST_TSO, (65562,), id="big"),
        pytest.param(MODERN | GUEST_TSO | INDIRECT_DESC, (12, *(4096,) * 17), id="big-pages"),
        pytest.param(GUEST_TSO, (10, *(4096,) * 17), id="legacy-big-pages"),
    ],
)
@pytest.mark.parametrize("kind", [GSO_TCPV4, GSO_TCPV6])
def test_large_segment_is_received_unsegmented(nic: Nic, features: int, sizes: tuple[int, ...], kind: int) -> None:
    """It takes as many buffers as it needs.  Small and large frames alternate, so the reads grow and shrink."""
    nic.driver.renew(features)
    room = sum(sizes)
    nic.driver.post(min(SIZE // (1 if features & INDIRECT_DESC else len(sizes)), 10 * MIB // room, SIZE), sizes)
    with Host(nic.tap, unfinished=True) as host:
        for payload in (60_000, 100, 2000, 65_000, 30_000, 65_000, *(700,) * 40, 65_000, 1):
            header, frame = gso(kind, payload) if payload > 1448 else (bytes(10), any_frame(payload + 60, payload))
            host.send(header + frame)
            received = nic.driver.receive()
            assert received.frame == frame
            assert received.header[1] == (kind if payload > 1448 else GSO_NONE)
            assert received.header[:10] == header or payload > 1448
            if features & MRG:
                assert received.buffers == -(-(len(frame) + nic.driver.header_bytes) // room)
    assert nic.driver.counters()["rx_no_room"] == 0


@pytest.mark.parametrize("features", [MODERN, MODERN | MRG, 0], ids=hex)
@pytest.mark.parametrize("kind", [GSO_TCPV4, GSO_TCPV6])
def test_the_kernel_segments_for_a_driver_without_offloads(nic: Nic, features: int, kind: int) -> None:
    """It also completes checksums.  The headers have no trace of offloads."""
    nic.driver.renew(features)
    nic.driver.post(64)
    header, frame = gso(kind, 20_000, 1400)
    start_of_payload = len(frame) - 20_000
    with Host(nic.tap, unfinished=True) as host:
        host.send(header + frame)
        content = b""
        while len(content) < 20_000:
            received = nic.driver.receive()
            assert len(received.frame) <= 1514
            assert received.header[:10] == bytes(10)
            assert sum_of_tcp(received.frame, kind) == 0
            content += received.frame[start_of_payload:]
    assert content == frame[start_of_payload:]


def sum_of_tcp(frame: bytes, kind: int) -> int:
    """Return the checksum of a segment with its pseudo header: 0 if the segment's checksum is right."""
    if kind == GSO_TCPV4:
        segment = frame[34 : 14 + int.from_bytes(frame[16:18], "big")]
        return checksum(frame[26:34] + struct.pack(">HH", 6, len(segment)) + segment)
    segment = frame[54:]
    return checksum(frame[22:54] + struct.pack(">II", len(segment), 6) + segment)


def test_frames_in_the_tap_are_dropped_for_the_next_driver(nic: Nic) -> None:
    """Only the previous driver may have accepted their size."""
    nic.driver.renew(ALL)
    with Host(nic.tap, unfinished=True) as host:
        for _ in range(20):
            host.send(b"".join(gso(GSO_TCPV4)))
    nic.driver.renew(MODERN)
    nic.driver.post(4)

    assert nic.gets(any_frame(100, 9)).header == bytes(10) + b"\1\0"


# --- configuration ---------------------------------------------------------------------------------------------------


def test_features_and_configuration(make: Make) -> None:
    """MAC, status and one pair of queues; an MTU only if one is configured."""
    plain, with_mtu = make(), make(net_start(mtu=9000))
    bits = [
        spec.VIRTIO_NET_F_MAC, spec.VIRTIO_NET_F_STATUS, spec.VIRTIO_NET_F_MRG_RXBUF, spec.VIRTIO_NET_F_CSUM,
        spec.VIRTIO_NET_F_GUEST_CSUM, spec.VIRTIO_NET_F_HOST_TSO4, spec.VIRTIO_NET_F_HOST_TSO6,
        spec.VIRTIO_NET_F_HOST_ECN, spec.VIRTIO_NET_F_GUEST_TSO4, spec.VIRTIO_NET_F_GUEST_TSO6,
        spec.VIRTIO_NET_F_GUEST_ECN,
    ]  # fmt: skip

    assert plain.device.features & 0xFFFFFF == sum(1 << bit for bit in bits)
    assert with_mtu.device.features & 0xFFFFFF == plain.device.features & 0xFFFFFF | 1 << spec.VIRTIO_NET_F_MTU
    assert plain.device.config == struct.pack("<6sHHH", LLADDR, 1, 1, 0)
    assert with_mtu.device.config == struct.pack("<6sHHH", LLADDR, 1, 1, 9000)


def test_configuration_cannot_be_written(nic: Nic) -> None:
    """Legacy drivers try to write the address."""
    before = nic.device.config
    write = devmsg.CONFIG_WRITE_HEAD.pack(devmsg.CONFIG_WRITE, 0, 6) + b"abcdef"

    assert nic.device.ask(write)[devmsg.READY_HEAD.size :] == before
    assert nic.works()


def test_process_is_small_and_starts_soon(make: Make) -> None:
    """The test prints the figures, and does not judge them."""
    device = make().device

    print(f"vionet: ready {device.ready_ms:.1f} ms after spawn, PSS {device.pss_kib() / 1024:.1f} MiB")
    assert device.pss_kib() > 0


def test_counters_count(make: Make) -> None:
    """They count frames and bytes each way, without virtio's headers."""
    nic = make()
    nic.driver.post(4)
    nic.sends(any_frame(100))
    nic.sends(any_frame(200))
    nic.gets(any_frame(300))

    counters = nic.driver.counters()
    assert {name: value for name, value in counters.items() if value} == {
        "tx_packets": 2, "tx_bytes": 300, "rx_packets": 1, "rx_bytes": 300,
    }  # fmt: skip


def test_frames_above_the_limit_wait(make: Make) -> None:
    """Each direction has its own limit.  No frame is lost, a pause does not wait, and without a limit all move."""
    nic = make()
    driver, device = nic.driver, nic.device
    driver.post(200)
    device.informs.send(devmsg.LIMIT_BODY.pack(devmsg.LIMIT, 0, 64 * KIB))
    driver.settle()
    for _ in range(30):
        nic.sends(any_frame(1500))
    counted = driver.counters()
    assert counted["tx_throttled"]
    assert counted["tx_throttled_ns"]
    assert not counted["rx_throttled"]

    for _ in range(30):
        nic.host.send(any_frame(1500))
    driver.counter("rx_throttled", 1)
    device.command(devmsg.PAUSE)
    device.command(devmsg.RESUME)
    device.informs.send(devmsg.LIMIT_BODY.pack(devmsg.LIMIT, 0, 0))
    driver.settle()
    assert [len(received.frame) for received in driver.receive_all(30)] == [1500] * 30
    counted = driver.counters()
    for _ in range(10):
        nic.sends(any_frame(1500))
    assert driver.counters()["tx_throttled"] == counted["tx_throttled"]


# --- hostile: the set-up ---------------------------------------------------------------------------------------------


def row(**changed: int) -> bytes:
    """Return the row of a queue in ACTIVATE, with one error."""
    fields = {"size": SIZE, "enabled": 1, "desc": 0x40000, "avail": 0x50000, "used": 0x60000} | changed
    size, enabled, *places = fields.values()
    return devmsg.QUEUE.pack(size, enabled, 0, *places, 0, 0)


both_queues = pytest.mark.parametrize("queue", [RX, TX], ids=["rx", "tx"])


def drain_informs(device: Device) -> None:
    """Read all waiting messages of the `informs` channel."""
    while select.select([device.informs], [], [], 0)[0]:
        device.informs.recv(4096)


def test_notification_of_a_queue_without_ring_6(nic: Nic) -> None:
    """Hostile input 6: before DRIVER_OK, for a disabled queue, with only one queue, and with none."""
    nic.device.command(devmsg.RESET)
    for number in (RX, TX):
        nic.device.kick(number)
    nic.device.command(devmsg.PAUSE)
    nic.device.command(devmsg.RESUME)
    for rows in ([row(enabled=0, desc=3), row()], [row(), row(enabled=0, desc=3)], [row()], []):
        assert nic.device.activate_rows(ALL, *rows) == 0
        for number in (RX, TX):
            nic.device.kick(number)
        nic.host.send(any_frame(100))
        nic.device.command(devmsg.PAUSE)
        nic.device.command(devmsg.RESUME)
        assert asleep(nic.device)
    assert nic.works()


# --- hostile: rings --------------------------------------------------------------------------------------------------


def asleep(device: Device) -> bool:
    """Return whether all threads of the process sleep, and keep sleeping."""
    threads = [entry / "stat" for entry in Path(f"/proc/{device.child.pid}/task").iterdir()]
    deadline_s = time.monotonic() + DEADLINE_S
    calm = 0
    while calm < 50:
        states = {path.read_text().rpartition(")")[2].split()[0] for path in threads}
        calm = calm + 1 if states == {"S"} else 0
        device.ask(devmsg.TYPE.pack(devmsg.EXPORT))  # the time between two samples
        if time.monotonic() > deadline_s:
            return False
    return True


@both_queues
def test_broken_ring_stops_both_queues(nic: Nic, queue: int) -> None:
    """Until the driver resets, the device does nothing."""
    assert asleep(nic.device)
    nic.driver.post(4, kick=False)  # so that the device sees all of it at once
    ring = (nic.driver.rx, nic.driver.tx)[queue]
    ring.offer(SIZE)
    nic.device.kick(queue)
    assert "outside" in nic.device.needs_reset()

    nic.driver.submit(any_frame(60))
    nic.device.kick(TX)
    nic.host.send(any_frame(60))
    nic.device.command(devmsg.PAUSE)
    nic.device.command(devmsg.RESUME)
    assert asleep(nic.device)
    assert nic.driver.rx.reap() == nic.driver.tx.reap() == []
    assert nic.no_frame()
    assert nic.works()


@pytest.mark.parametrize(
    ("queue", "parts"),
    [
        pytest.param(RX, [Desc(DATA, 2048)], id="18-rx-for-reading"),
        pytest.param(RX, [Desc(DATA, 12, NEXT, 1), Desc(DATA, 2048, WRITE)], id="18-rx-partly-for-reading"),
        pytest.param(TX, [Desc(DATA, 100, WRITE)], id="18-tx-for-writing"),
        pytest.param(TX, [Desc(DATA, 100, NEXT, 1), Desc(DATA, 100, WRITE)], id="18-tx-partly-for-writing"),
        pytest.param(TX, [Desc(DATA, 0)], id="36-header-of-0"),
        pytest.param(TX, [Desc(DATA, 11)], id="36-header-of-11"),
        pytest.param(TX, [Desc(DATA, 5, NEXT, 1), Desc(DATA, 6)], id="36-header-of-5-and-6"),
        pytest.param(RX, [Desc(DATA, 0, WRITE)], id="38-room-of-0"),
        pytest.param(RX, [Desc(DATA, 11, WRITE)], id="38-room-of-11"),
        pytest.param(RX, [Desc(DATA, 1, WRITE)], id="38-room-of-1"),
    ],
)
def test_chain_for_the_other_direction_asks_for_a_reset(nic: Nic, queue: int, parts: list[Desc]) -> None:
    """Hostile input 18, 36, 38: wrong direction, short header, too little room."""
    ring = (nic.driver.rx, nic.driver.tx)[queue]
    ring.describe(0, parts)
    ring.offer(0)
    nic.device.kick(queue)

    assert nic.device.needs_reset()
    assert nic.works()


def test_buffer_without_room_for_any_frame_38(nic: Nic) -> None:
    """Hostile input 38: without mergeable buffers each must have room for an Ethernet header."""
    nic.driver.renew(MODERN)
    nic.driver.post(1, (12 + 13,))
    assert "too small" in nic.device.needs_reset()
    nic.driver.renew(MODERN)
    nic.driver.post(1, (12 + 14,))
    before = nic.driver.counters()["rx_no_room"]
    nic.host.send(any_frame(60))
    nic.driver.counter("rx_no_room", before + 1)
    assert nic.works()


def test_frames_into_rings_23(nic: Nic) -> None:
    """Hostile input 23: the receive buffers are the rings of both queues.  The process survives."""
    for target in (nic.driver.rx.desc, nic.driver.rx.avail, nic.driver.rx.used, nic.driver.tx.desc, nic.driver.tx.used):
        nic.driver.renew()
        nic.driver.rx.describe(0, [Desc(target & ~15, 1600, WRITE)])
        for _ in range(4):
            nic.driver.rx.offer(0)
        nic.device.kick(RX)
        for number in range(8):
            nic.host.send(b"\xff" * 12 + random.Random(number).randbytes(1400))
        for number in (RX, TX):
            nic.device.kick(number)
        nic.device.command(devmsg.PAUSE)
        nic.device.command(devmsg.RESUME)
        nic.device.command(devmsg.RESET)
        drain_informs(nic.device)
    assert nic.works()


def test_ring_full_of_single_bytes_24(nic: Nic) -> None:
    """Hostile input 24: a frame uses all descriptors, and the device still answers commands meanwhile."""
    nic.driver.renew(ALL & ~INDIRECT_DESC)
    frame = any_frame(SIZE - 12)
    nic.driver.tx.describe(0, chained([Desc(DATA + 7 * n, 1) for n in range(SIZE)]))
    for number, byte in enumerate(bytes(12) + frame):
        nic.memory.load(DATA + 7 * number, bytes((byte,)))
    for _ in range(SIZE):
        nic.driver.tx.offer(0)
    nic.device.kick(TX)
    nic.device.command(devmsg.PAUSE)
    nic.device.command(devmsg.RESUME)
    assert nic.device.collect(nic.driver.tx, SIZE, TX) == [(0, 0)] * SIZE
    assert nic.host.receive_all(SIZE) == [frame] * SIZE
    assert nic.works()


@pytest.mark.parametrize("parts", [1000, 1023, 1024])
def test_frame_in_more_pieces_than_the_kernel_takes(nic: Nic, parts: int) -> None:
    """An indirect table may be longer than an iovec."""
    frame = any_frame(parts - 12)
    nic.memory.load(DATA, bytes(12) + frame)
    raw = b"".join(struct.pack("<QIHH", *part) for part in chained([Desc(DATA + n, 1) for n in range(parts)]))
    nic.memory.load(2 * MIB, raw)
    nic.driver.give([Desc(2 * MIB, len(raw), INDIRECT)])

    assert nic.host.receive() == frame

    nic.driver.renew(ALL & ~MRG)
    table = [part._replace(flags=part.flags | WRITE) for part in chained([Desc(DATA + n, 2) for n in range(parts)])]
    nic.memory.load(2 * MIB, b"".join(struct.pack("<QIHH", *part) for part in table))
    nic.driver.rx.add([Desc(2 * MIB, len(raw), INDIRECT)])
    nic.device.kick(RX)
    before = nic.driver.counters()["rx_packets"]
    nic.host.send(any_frame(500))
    nic.driver.counter("rx_packets", before + 1)
    assert nic.works()


# --- hostile: frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 13])
def test_frame_that_is_too_short_36(nic: Nic, length: int) -> None:
    """Hostile input 36: the frame is dropped, and its buffer returned."""
    before = nic.driver.counters()["tx_short"]
    nic.driver.send(any_frame(60)[:length], cuts=() if not length else None)

    assert nic.driver.counters()["tx_short"] == before + 1
    assert nic.no_frame()
    assert nic.works()


@pytest.mark.parametrize(
    ("length", "kind"), [(MTU_MAX + 15, GSO_NONE), (65_000, GSO_NONE), (65_551, GSO_TCPV4), (90_000, GSO_TCPV4)]
)
def test_frame_that_is_too_long_36(nic: Nic, length: int, kind: int) -> None:
    """Hostile input 36: the frame is dropped, and its buffer returned."""
    before = nic.driver.counters()["tx_long"]
    nic.driver.send(any_frame(length), HEADER.pack(0, kind, 54, 1448, 0, 0))

    assert nic.driver.counters()["tx_long"] == before + 1
    assert nic.no_frame()
    assert nic.works()


def test_frame_of_4_gib_36(nic: Nic) -> None:
    """Hostile input 36, 17: every descriptor is valid, and nothing is copied."""
    before = nic.driver.counters()["tx_long"]
    parts = [Desc(0, RAM_END)] * 255
    nic.driver.tx.describe(0, chained(parts))
    nic.driver.tx.offer(0)

    assert nic.device.collect(nic.driver.tx, 1, TX) == [(0, 0)]
    assert nic.driver.counters()["tx_long"] == before + 1
    assert nic.works()


BAD_HEADERS = {
    "unknown-gso": HEADER.pack(0, 77, 54, 1448, 34, 16),
    "gso-of-size-0": HEADER.pack(NEEDS_CSUM, GSO_TCPV4, 54, 0, 34, 16),
    "sum-behind-the-frame": HEADER.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 2000, 16),
    "sum-across-the-end": HEADER.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 200, 0xFFF0),
    "header-behind-the-frame": HEADER.pack(0, GSO_TCPV4, 0xFFFF, 1448, 0, 0),
    "all-ones": b"\xff" * 12,
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_header_that_does_not_fit_the_frame_37(nic: Nic, header: bytes) -> None:
    """Hostile input 37: the kernel refuses the frame.  It is dropped, and the next one is sent."""
    before = nic.driver.counters()["tx_refused"]
    nic.driver.send(tcp4(bytes(150)), header)

    assert nic.driver.counters()["tx_refused"] == before + 1
    assert nic.no_frame()
    nic.sends(any_frame(60))


def test_headers_of_noise_37(nic: Nic) -> None:
    """Hostile input 37: each frame is sent or refused, and its buffer is returned."""
    choice = random.Random(37)
    before = nic.driver.counters()
    for _ in range(500):
        header = bytes(choice.choice((0, 1, 2, 3, 4, 5, 255)) for _ in range(2)) + choice.randbytes(10)
        nic.driver.send(tcp4(bytes(choice.randrange(3000))), header)
    after = nic.driver.counters()
    sent, refused = (after[name] - before[name] for name in ("tx_packets", "tx_refused"))
    assert sent + refused == 500
    assert refused
    nic.forget()
    assert nic.works()


def test_log_does_not_fill_39(make: Make) -> None:
    """Hostile input 39: a thousand refused frames cause only a few lines."""
    nic = make()
    for _ in range(1000):
        nic.driver.submit(any_frame(100), BAD_HEADERS["unknown-gso"])
        assert len(nic.device.collect(nic.driver.tx, 1, TX)) == 1

    assert nic.driver.counters()["tx_refused"] == 1000
    assert 1 <= nic.device.read_log().count("\n") < 100  # five, and one more for each ten seconds that it takes


@pytest.mark.parametrize("features", [MODERN, MODERN | MRG, MODERN | MRG | EVENT_IDX], ids=hex)
def test_flood_without_buffers_38(nic: Nic, features: int) -> None:
    """Hostile input 38: frames stay in the tap, no thread spins, and the oldest arrive when there are buffers."""
    nic.driver.renew(features)
    sent = 0
    while nic.host.try_send(any_frame(60, sent)):
        sent += 1
    assert sent > 400
    assert asleep(nic.device)
    nic.driver.post(8)

    assert [nic.driver.receive().frame for _ in range(400)] == [any_frame(60, number) for number in range(400)]
    assert nic.works()


def test_flood_with_few_buffers_38(nic: Nic) -> None:
    """Hostile input 38: there are two buffers at a time.  The driver notifies only when the device asks for it."""
    nic.driver.renew(MODERN | MRG)
    for number in range(400):
        nic.host.send(any_frame(60, number))
    nic.driver.post(2)
    assert [nic.driver.receive().frame for _ in range(400)] == [any_frame(60, number) for number in range(400)]


def test_large_frame_waits_for_buffers_38(nic: Nic) -> None:
    """Hostile input 38: some of its buffers are offered only in the middle of the frame."""
    nic.driver.renew(ALL)
    header, frame = gso(GSO_TCPV4, 60_000)
    with Host(nic.tap, unfinished=True) as host:
        nic.driver.post(10, (2048,))
        before = nic.tap.taken()
        host.send(header + frame)
        host.send(bytes(10) + any_frame(80, 7))
        nic.tap.wait_taken(before + 1)  # not longer: the device holds a frame only for HOLD_S
        assert nic.driver.rx.device_idx == 0

        # The first ten buffers are still offered; more follow.
        place = RX_BASE + 10 * 2048
        for number in range(10, 40):
            part = Desc(place, 2048, WRITE)
            place += 2048
            nic.driver.rx.describe(number, [part])
            nic.driver.posted[number] = [part]
            nic.driver.rx.offer(number)
        nic.device.kick(RX)
        assert nic.driver.receive().frame == frame
        assert nic.driver.receive().frame == any_frame(80, 7)


@pytest.mark.parametrize(
    ("features", "count", "sizes"),
    [
        pytest.param(ALL, SIZE, (200,), id="all-buffers-together"),
        pytest.param(MODERN | GUEST_TSO, 4, (2048,), id="one-buffer"),
        pytest.param(ALL, 3, (2048,), id="driver-has-no-more"),
    ],
)
def test_a_frame_without_room_is_dropped_38(
    nic: Nic, features: int, count: int, sizes: tuple[int, ...]
) -> None:
    """Hostile input 38: the whole frame is dropped, at once or later, and the next frame arrives."""
    nic.driver.renew(features)
    before = nic.driver.counters()["rx_no_room"]
    nic.driver.post(count, sizes)
    with Host(nic.tap, unfinished=True) as host:
        host.send(b"".join(gso(GSO_TCPV4, 60_000)))
        host.send(bytes(10) + any_frame(80, 7))

        assert nic.driver.receive().frame == any_frame(80, 7)
    assert nic.driver.counters()["rx_no_room"] == before + 1
    assert nic.works()


def test_no_control_queue_41(nic: Nic) -> None:
    """Hostile input 41: no control queue is offered, so none can be abused.  A third queue ends the VM."""
    assert not nic.device.features >> 17 & 1
    nic.device.kick(TX)
    assert nic.works()


# --- hostile: the tap ------------------------------------------------------------------------------------------------


def test_tap_that_is_taken_down_and_up(make: Make) -> None:
    """The guest sees its link go down and up.  Frames sent meanwhile are dropped, and their buffers returned."""
    nic = make()
    nic.tap.set("down")
    for _ in range(50):
        nic.driver.send(any_frame(60))
    assert nic.driver.link() is DOWN
    assert nic.driver.counters()["tx_link_down"] == 50
    assert asleep(nic.device)

    nic.tap.set("up")
    assert nic.driver.link() is UP
    assert nic.works()
    assert nic.device.read_log() == ""


def test_tap_that_is_down_at_the_start(network: Network) -> None:
    """The guest's link comes up when the tap does."""
    with TapInterface(network, "tapdown") as tap:
        tap.set("down")
        driver = NetDriver(tap)
        assert driver.device.config[6] == 0
        tap.set("up")
        assert driver.link() is UP
        nic = Nic(tap, driver)
        assert nic.works()
        nic.close()


def test_tap_that_vanishes_43(make: Make) -> None:
    """Hostile input 43: the link stays down, one line says so, and the process still answers and returns buffers."""
    nic = make()
    nic.driver.post(4)
    nic.tap.remove()
    for _ in range(50):
        nic.driver.send(any_frame(60))

    assert nic.driver.link() is DOWN
    assert nic.device.read_log().count("\n") == 1
    assert asleep(nic.device)
    for _ in range(3):
        nic.driver.renew()
        nic.driver.post(4)
        for _ in range(10):
            nic.driver.send(any_frame(60))
    assert asleep(nic.device)
    assert nic.driver.counters()["tx_link_down"] == 80
    assert nic.device.read_log() == ""
    assert not select.select([nic.device.informs], [], [], 0)[0]


def test_tap_that_vanishes_while_nothing_is_sent_43(make: Make) -> None:
    """Hostile input 43: the receiving thread notices."""
    nic = make()
    nic.driver.post(4)
    nic.gets(any_frame(60))
    nic.tap.remove()

    assert nic.driver.link() is DOWN
    assert asleep(nic.device)


def test_tap_that_is_down_and_vanishes_43(make: Make) -> None:
    """Hostile input 43: the link stays down, and the process sleeps."""
    nic = make()
    nic.tap.set("down")
    nic.driver.send(any_frame(60))
    assert nic.driver.link() is DOWN
    nic.tap.remove()
    nic.driver.send(any_frame(60))
    assert asleep(nic.device)

    nic.driver.renew()
    nic.driver.send(any_frame(60))
    assert nic.device.config[6] == 0
    assert asleep(nic.device)


# --- pause, reset, export --------------------------------------------------------------------------------------------


def test_pause_stops_both_queues_and_resume_continues(nic: Nic) -> None:
    """Neither queue moves while the device is paused.  No frame is lost."""
    nic.driver.post(8)
    nic.sends(any_frame(60, 1))
    nic.gets(any_frame(60, 2))
    nic.device.command(devmsg.PAUSE)
    state = nic.device.export()
    assert state == [(1, 1), (1, 1)]
    nic.driver.submit(any_frame(60, 3))
    nic.device.kick(TX)
    nic.device.kick(RX)
    nic.host.send(any_frame(60, 4))
    assert asleep(nic.device)
    assert nic.device.export() == state
    assert (nic.driver.rx.device_idx, nic.driver.tx.device_idx) == (1, 1)

    nic.device.command(devmsg.RESUME)
    assert nic.host.receive() == any_frame(60, 3)
    assert nic.driver.receive().frame == any_frame(60, 4)


def flood(nic: Nic, stop: Callable[[], bool]) -> None:
    """Send to and from the guest as fast as possible, until told to stop."""
    number = 0
    while not stop():
        for _ in range(32):
            nic.host.try_send(any_frame(60 + number % 1400, number))
            if nic.driver.tx.avail_idx - nic.driver.tx.device_idx & 0xFFFF < SIZE - 8:
                nic.driver.submit(any_frame(60 + number % 1400, number), cuts=())
            number += 1
        nic.device.kick(TX)
        nic.driver.rx.reap()
        nic.device.kick(RX)
        nic.forget()


@pytest.mark.parametrize("features", [ALL, MODERN], ids=hex)
def test_reset_under_traffic(nic: Nic, features: int) -> None:
    """After the answer nothing touches the old rings, or the new ones before ACTIVATE."""
    for _ in range(25):
        nic.driver.renew(features)
        nic.driver.post(64)
        rounds = iter(range(3))
        flood(nic, lambda rounds=rounds: next(rounds, None) is None)  # type: ignore[misc]
        nic.device.command(devmsg.RESET)
        rings = nic.memory.read(RING_BASE, 64 * KIB)
        for _ in range(20):
            nic.host.try_send(any_frame(60))
        for queue in (RX, TX):
            nic.device.kick(queue)
        nic.device.ask(devmsg.TYPE.pack(devmsg.EXPORT))
        assert nic.memory.read(RING_BASE, 64 * KIB) == rings
    assert nic.works()


def test_pause_under_traffic(nic: Nic) -> None:
    """The exported indices agree with the rings after each pause."""
    nic.driver.renew(ALL)
    nic.driver.post(64)
    for _ in range(40):
        rounds = iter(range(2))
        flood(nic, lambda rounds=rounds: next(rounds, None) is None)  # type: ignore[misc]
        nic.device.command(devmsg.PAUSE)
        (rx_avail, rx_used), (tx_avail, tx_used) = nic.device.export()
        assert (rx_used, tx_used) == (nic.driver.rx.device_idx, nic.driver.tx.device_idx)
        assert (rx_avail, tx_avail) == (rx_used, tx_used)
        nic.device.command(devmsg.RESUME)
    assert nic.works()


@pytest.mark.deep
def test_receiving_goes_on_while_sending_is_saturated(nic: Nic) -> None:
    """A transmit ring that is always full delays no received frame."""
    nic.driver.post(32)
    frame = any_frame(1514)
    parts = nic.driver.lay_out(frame, cuts=())
    nic.driver.tx.describe(0, parts)
    expected = 0
    for number in range(3000):
        while nic.driver.tx.avail_idx - nic.driver.tx.device_idx & 0xFFFF < SIZE:
            nic.driver.tx.offer(0)
        nic.device.kick(TX)
        if nic.host.try_send(any_frame(60, number)):
            assert nic.driver.receive().frame == any_frame(60, number)
            expected += 1
        nic.forget()
    assert expected > 2900
    assert nic.works()


# --- locked ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked_nic(network: Network) -> Iterator[Nic]:
    """Give a process whose interface is locked."""
    nic = start(network, net_start(flags=devmsg.NET_LOCKED))
    yield nic
    nic.close()


@pytest.fixture
def locked(locked_nic: Nic) -> Nic:
    """Give the process of the locked interface after a reset."""
    locked_nic.device.read_log()
    locked_nic.driver.renew()
    locked_nic.forget()
    return locked_nic


def vlan(frame: bytes) -> bytes:
    """Return a frame with a VLAN tag."""
    return frame[:12] + b"\x81\x00\x00\x07" + frame[12:]


@pytest.mark.parametrize("features", [ALL, MODERN, 0], ids=hex)
def test_locked_interface_sends_from_its_own_address_only_40(locked: Nic, features: int) -> None:
    """Hostile input 40: another host's address, multicast, VLAN tags, with descriptors that end anywhere."""
    locked.driver.renew(features)
    header = locked.driver.header_bytes
    spoofed = [
        any_frame(60, source=HOST_LLADDR),
        any_frame(60, source=b"\xff" * 6),
        any_frame(60, source=b"\x01" + LLADDR[1:]),
        any_frame(60, source=LLADDR[:5] + b"\x04"),
        vlan(any_frame(60, source=HOST_LLADDR)),
        any_frame(60, source=HOST_LLADDR, destination=LLADDR),
    ]
    before = locked.driver.counters()["tx_spoofed"]
    cuts: tuple[int, ...]
    for cuts in ((), (header,), (header + 7,), tuple(range(1, header + 14))):
        for frame in spoofed:
            locked.driver.send(frame, cuts=cuts)
        assert locked.no_frame()
        locked.sends(any_frame(1514, 3), cuts)
        locked.driver.send(vlan(any_frame(60, 4)), cuts=cuts)
        assert locked.host.receive() == any_frame(60, 4)  # a packet socket gets the tag apart from the frame
        locked.sends(any_frame(14 + 4, 5)[:14], cuts)

    assert locked.driver.counters()["tx_spoofed"] == before + 4 * len(spoofed)
    assert locked.device.read_log().count("\n") < 4 * len(spoofed)


@pytest.mark.parametrize("features", [ALL, MODERN | GUEST_TSO, MODERN, 0], ids=hex)
def test_locked_interface_receives_only_its_own_frames_40(locked: Nic, features: int) -> None:
    """Hostile input 40: frames to it, multicast and broadcast arrive.  No byte of others gets into its memory."""
    locked.driver.renew(features)
    locked.driver.post(8)
    locked.memory.load(RX_BASE, bytes(8 * 2048))
    before = locked.driver.counters()["rx_filtered"]
    for number in range(20):
        locked.host.send(any_frame(1000, number, source=HOST_LLADDR, destination=HOST_LLADDR[:5] + bytes((number,))))
    assert locked.driver.counter("rx_filtered", before + 20) == before + 20
    assert locked.memory.read(RX_BASE, 8 * 2048) == bytes(8 * 2048)
    for destination in (LLADDR, b"\xff" * 6, b"\x33\x33\0\0\0\1", b"\x01\0\x5e\0\0\1"):
        received = locked.gets(any_frame(1000, 1, source=HOST_LLADDR, destination=destination))
        assert received.header[10:] in (b"", b"\1\0")


@pytest.mark.parametrize("features", [ALL, MODERN | GUEST_TSO], ids=hex)
def test_locked_interface_moves_large_segments(locked: Nic, features: int) -> None:
    """It sends and receives them."""
    locked.driver.renew(features)
    locked.driver.post(64 if features & MRG else 8)
    with Host(locked.tap, unfinished=True) as host:
        header, frame = gso(GSO_TCPV4, 60_000)
        locked.driver.send(frame, header)
        assert host.receive()[10:] == frame
        frame = LLADDR + HOST_LLADDR + frame[12:]
        host.send(header + frame)
        received = locked.driver.receive()
        assert received.frame == frame
        assert received.header[1] == GSO_TCPV4


def test_a_source_address_that_changes_during_the_check_40(locked: Nic) -> None:
    """Hostile input 20, 40: the checked copy of the header is the one that is sent."""
    parts = locked.driver.lay_out(any_frame(60), cuts=())
    locked.driver.tx.describe(0, parts)
    place = parts[0].gpa + 12 + 6
    memory = locked.memory.memory
    for _ in range(20):
        for _ in range(SIZE):
            locked.driver.tx.offer(0)
        locked.device.kick(TX)
        for _ in range(2000):
            memory[place : place + 6] = HOST_LLADDR
            memory[place : place + 6] = LLADDR
        locked.device.collect(locked.driver.tx, SIZE, TX)
        while (frame := locked.host.try_receive()) is not None:
            assert frame[6:12] == LLADDR


# --- interrupts and notifications ------------------------------------------------------------------------------------


def test_notifications_are_enabled_only_while_a_ring_is_empty(nic: Nic) -> None:
    """Without event indices, the flag asks for notifications about buffers or frames to send."""
    nic.driver.renew(MODERN)
    assert asleep(nic.device)
    flags = [nic.memory.read(ring.used, 2) for ring in (nic.driver.rx, nic.driver.tx)]
    assert flags == [b"\0\0", b"\0\0"]
    nic.driver.post(2)
    nic.gets(any_frame(60))
    assert asleep(nic.device)
    assert nic.memory.read(nic.driver.rx.used, 2) == b"\1\0"
    nic.sends(any_frame(60))
    assert asleep(nic.device)
    assert nic.memory.read(nic.driver.tx.used, 2) == b"\0\0"


# --- soak ------------------------------------------------------------------------------------------------------------


class Soak:
    """A driver that notifies and waits only when the event indices, or the flags, tell it to."""

    def __init__(self, nic: Nic, features: int, seed: int) -> None:
        self.nic = nic
        self.choice = random.Random(seed)
        self.event_idx = bool(features & EVENT_IDX)
        driver = nic.driver
        driver.renew(features)
        self.header = driver.header_bytes
        frame = any_frame(60)
        nic.memory.load(DATA, bytes(self.header) + frame)
        driver.tx.describe(0, [Desc(DATA, self.header + len(frame))])
        for queue, part in ((RX, Desc(RX_BASE, 2048, WRITE)), (TX, Desc(DATA, self.header + len(frame)))):
            ring = self.ring(queue)
            ring.describe(0, [part])
            nic.memory.load(ring.avail + 4, bytes(2 * SIZE))  # every entry is head 0
        self.words = {queue: self.views(self.ring(queue)) for queue in (RX, TX)}
        self.moved = {RX: 0, TX: 0}
        self.interrupts = {RX: 0, TX: 0}

    def ring(self, queue: int) -> Ring:
        """Return a queue."""
        return (self.nic.driver.rx, self.nic.driver.tx)[queue]

    def views(self, ring: Ring) -> dict[str, memoryview]:
        """Return the shared words of a ring: flags, indices and event indices."""
        raw = self.nic.memory.memory
        places = {
            "flags": ring.avail, "avail": ring.avail + 2, "used_event": ring.avail + 4 + 2 * SIZE,
            "used_flags": ring.used, "used": ring.used + 2, "avail_event": ring.used + 4 + 8 * SIZE,
        }  # fmt: skip
        return {name: raw[at : at + 2].cast("H") for name, at in places.items()}

    def offer(self, queue: int, count: int) -> None:
        """Offer `count` chains, and notify if the device asks for it."""
        words = self.words[queue]
        old = words["avail"][0]
        new = old + count & 0xFFFF
        words["avail"][0] = new
        os.sched_yield()  # a system call suffices as a fence: it takes and drops the interpreter's lock
        if self.event_idx:
            wanted = (new - words["avail_event"][0] - 1 & 0xFFFF) < (new - old & 0xFFFF)
        else:
            wanted = not words["used_flags"][0] & 1
        if wanted:
            self.nic.device.kick(queue)

    def collect(self, queue: int, seen: int, delay: int) -> int:
        """Wait for used elements, with an interrupt asked for `delay` elements later.  Return their number."""
        words = self.words[queue]
        call = self.nic.device.calls[queue]
        while words["used"][0] == seen:
            if self.event_idx:
                words["used_event"][0] = seen + delay & 0xFFFF
            else:
                words["flags"][0] = 0
            os.sched_yield()
            if words["used"][0] != seen and not delay:
                break
            if self.event_idx and (words["used"][0] - seen & 0xFFFF) > delay:
                break
            self.nic.device.wait_for(call)  # fails if no interrupt comes
            Device.take_event(call)
            self.interrupts[queue] += 1
        if not self.event_idx:
            words["flags"][0] = 1
        return words["used"][0] - seen & 0xFFFF

    def send(self, total: int) -> None:
        """Send frames in random bursts, and wait only for interrupts."""
        seen = outstanding = 0
        words = self.words[TX]
        words["used_event"][0] = 0xFFFF
        while self.moved[TX] < total:
            burst = self.choice.choice((1, 1, 2, 3, 17, 64, 100, SIZE))
            burst = min(burst, SIZE - outstanding)
            if burst:
                self.offer(TX, burst)
                outstanding += burst
            if outstanding == SIZE or self.choice.random() < 0.3:
                delay = self.choice.randrange(outstanding) if self.event_idx else 0
                back = self.collect(TX, seen, delay)
                seen = seen + back & 0xFFFF
                outstanding -= back
                self.moved[TX] += back
        while outstanding:
            back = self.collect(TX, seen, 0)
            seen = seen + back & 0xFFFF
            outstanding -= back

    def receive(self, total: int) -> None:
        """Receive random bursts of frames from a host, sometimes with many buffers, sometimes with few."""
        seen = posted = 0
        frame = any_frame(60)
        expected = 0
        while self.moved[RX] < total:
            if posted < self.choice.choice((1, 2, 8, 200)):
                more = self.choice.choice((1, 2, 30, SIZE - posted))
                more = min(more, SIZE - posted)
                self.offer(RX, more)
                posted += more
            for _ in range(self.choice.choice((1, 1, 2, 40))):
                if expected < 200 and self.nic.host.try_send(frame):
                    expected += 1
            if not expected:
                continue
            back = self.collect(RX, seen, 0)
            seen = seen + back & 0xFFFF
            posted -= back
            expected -= back
            self.moved[RX] += back
        while expected:
            if not posted:
                self.offer(RX, SIZE)
                posted = SIZE
            back = self.collect(RX, seen, 0)
            seen = seen + back & 0xFFFF
            posted -= back
            expected -= back


SOAKS = pytest.mark.parametrize("features", [MODERN | EVENT_IDX, MODERN | EVENT_IDX | MRG, MODERN], ids=hex)


@SOAKS
def test_no_wake_up_is_lost(make: Make, features: int) -> None:
    """Move many frames each way.  A lost notification or interrupt shows as a wait that never ends."""
    soak(make(), features, 70_000, 35_000)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@SOAKS
def test_no_wake_up_is_lost_in_millions(make: Make, features: int) -> None:
    """Ten million frames in all."""
    soak(make(), features, 2_500_000, 850_000)


def soak(nic: Nic, features: int, sent: int, received: int) -> None:
    """Move frames from the guest, then to the guest."""
    nic.host.socket.setsockopt(socket.SOL_SOCKET, 33, 4096)  # the host socket may drop frames
    run = Soak(nic, features, features)
    run.send(sent)
    run.receive(received)
    counters = nic.driver.counters()
    print(f"{counters['tx_packets']} sent, {run.interrupts[TX]} interrupts; "
          f"{counters['rx_packets']} received, {run.interrupts[RX]} interrupts")  # fmt: skip
    assert counters["tx_packets"] >= sent
    assert counters["rx_packets"] >= received
    for view in (view for words in run.words.values() for view in words.values()):
        view.release()


# --- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", ["sync", "informs"])
def test_end_of_a_channel_ends_the_process(make: Make, channel: str) -> None:
    """A closed channel means that the VM is gone.  The tap goes with the process."""
    nic = make()
    getattr(nic.device, channel).close()

    assert nic.device.status() == 0
    nic.tap.close()
    for fd in nic.device.resources:
        os.close(fd)
    nic.device.resources = []
    assert nic.tap.name not in nic.tap.network.run("ip", "link")


def test_shutdown_ends_the_process_under_traffic(make: Make) -> None:
    """It ends with status 0, and logs nothing."""
    nic = make()
    nic.driver.post(64)
    rounds = iter(range(10))
    flood(nic, lambda: next(rounds, None) is None)
    nic.device.informs.send(devmsg.TYPE.pack(devmsg.SHUTDOWN))

    assert nic.device.status() == 0
    assert nic.device.read_log() == ""


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(b"\1", id="short"),
        pytest.param(devmsg.TYPE.pack(999), id="unknown"),
        pytest.param(devmsg.TYPE.pack(devmsg.ACTIVATE), id="short-activate"),
        pytest.param(devmsg.ACTIVATE_HEAD.pack(devmsg.ACTIVATE, 0, 3) + row() * 3, id="41-third-queue"),
        pytest.param(devmsg.TYPE.pack(devmsg.ADDRESSES) + b"x", id="long-addresses"),
        pytest.param(devmsg.TYPE.pack(devmsg.LIMIT), id="short-limit"),
        pytest.param(os.urandom(4096), id="random"),
    ],
)
@pytest.mark.parametrize("channel", ["sync", "informs"])
def test_garbage_on_a_channel_ends_the_process(make: Make, channel: str, packet: bytes) -> None:
    """The process sends a sentence on the `informs` channel, and logs no traceback."""
    device = make().device
    getattr(device, channel).send(packet)

    assert device.status() == 1
    assert "vm process: " in device.error(device.informs)[1]
    assert "Traceback" not in device.read_log()


STARTS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "kind": (net_start(), {"kind": 99}),
    "short": (net_start()[:20], {}),
    "no-address": (net_start(lladdr=bytes(6)), {}),
    "multicast-address": (net_start(lladdr=b"\1" * 6), {}),
    "mtu": (net_start(mtu=20), {}),
    "large-mtu": (net_start(mtu=40_000), {}),
    "local-without-addresses": (net_start(flags=devmsg.NET_LOCAL), {}),
    "no-tap": (net_start(), {"resources": 0}),
    "two-taps": (net_start(), {"resources": 2, "notes": (0, 0)}),
    "one-queue": (net_start(), {"queues": 1}),
}


@pytest.mark.parametrize(("net", "lie"), STARTS.values(), ids=STARTS)
def test_a_false_start_message_is_answered_with_a_sentence(
    network: Network, net: bytes, lie: dict[str, Any]
) -> None:
    """The process sends what is wrong, and ends."""
    with TapInterface(network, "taplie") as tap, Device("vionet", [tap.fd], queues=2, net=net) as device:
        device.send_start(device.start_packet(**lie))

        _number, text = device.error(device.sync)
        assert text
        assert device.status() == 1
        assert "Traceback" not in device.read_log()


def test_interface_without_its_addresses_is_refused(network: Network) -> None:
    """The START message is one for a disk."""
    with TapInterface(network, "taplie") as tap, Device("vionet", [tap.fd], queues=2) as device:
        device.send_start(device.start_packet())

        assert "addresses" in device.error(device.sync)[1]
        assert device.status() == 1


def test_file_instead_of_a_tap_is_refused(tmp_path: Path) -> None:
    """The sentence names the tap."""
    with (
        (tmp_path / "file").open("wb+") as file,
        Device("vionet", [file.fileno()], queues=2, net=net_start()) as device,
    ):
        device.send_start(device.start_packet())

        assert "tap0" in device.error(device.sync)[1]
        assert device.status() == 1


def test_process_is_confined(make: Make) -> None:
    """It has a seccomp filter, no capabilities, and only the descriptors that it got and those of its event loops."""
    device = make().device
    pid = device.child.pid
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    links = open_files(pid)
    given = {*device.fds, 0, 1, 2, devmsg.FD_SYNC}
    leaked = {os.readlink(f"/proc/self/fd/{fd}") for fd in inheritable()}  # by the test runner
    own = [link for fd, link in links.items() if fd not in given and link not in leaked and "memfd:" not in link]

    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == 0
    assert status["Threads"] == "2"
    assert set(own) == {"anon_inode:[eventfd]", "anon_inode:[eventpoll]", "/dev/net/tun"}
