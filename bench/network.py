"""A network process alone: throughput each way, the cost of a frame, and its latency.

The benchmark itself drives the rings, and the tap is in its own namespace.  So the figures are those of the process and
the kernel, without guest and interrupts.  The cost is the processor time of the process only.  QEMU has no counterpart.
"""

import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

from bench.table import Row
from tests.support.fakedriver import WRITE, Desc, Device, chained
from tests.support.netdriver import (
    ALL,
    GSO_TCPV4,
    HEADER,
    NEEDS_CSUM,
    RX,
    RX_BASE,
    SIZE,
    TX,
    NetDriver,
)
from tests.support.network import Host, Network, TapInterface
from tests.support.packets import any_frame, tcp4

ROUNDS = 5
SEND_BYTES, SEND_FRAMES = 2 << 30, 100_000  # limits of a round; the first one reached ends it
RECEIVE_S = 1.0
LATENCIES = 2000
BUFFER_BYTES = 4096
SEGMENT = tcp4(bytes(65_000))
FRAMES = {
    "60 bytes": (bytes(10), any_frame(60)),
    "1514 bytes": (bytes(10), any_frame(1514)),
    "64 KiB to be segmented": (HEADER.pack(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16), SEGMENT),
}


def measure(_directory: Path, _guest: Callable[[str], Path]) -> list[Row]:
    """Measure frames of each length in each direction, and the latency of single frames."""
    rows = []
    with Network() as network, TapInterface(network) as tap:
        driver = NetDriver(tap)
        try:
            for name, (header, frame) in FRAMES.items():
                for way, move in (("sent", send), ("received", receive)):
                    rates, costs = [], []
                    for _ in range(ROUNDS):
                        frames, seconds, busy_s = move(driver, tap, header, frame)
                        rates.append(frames / seconds / 1000)
                        costs.append(busy_s / frames * 1e6)
                    rows.append(Row(f"frames {way}, {name}", "1000/s", rates, larger_is_better=True))
                    rows.append(Row("  processor time of one", "us", costs))
            rows.append(Row("one frame, notification to host", "us", [sent_alone(driver, tap) for _ in range(ROUNDS)]))
            rows.append(Row("one frame, host to interrupt", "us", [got_alone(driver, tap) for _ in range(ROUNDS)]))
        finally:
            driver.close()
    return rows


def busy_seconds(device: Device) -> float:
    """Return the processor time that the process of a device has used, in seconds."""
    total_ns = 0
    for thread in Path(f"/proc/{device.child.pid}/task").iterdir():
        total_ns += int((thread / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def send(driver: NetDriver, _tap: TapInterface, header: bytes, frame: bytes) -> tuple[int, float, float]:
    """Fill the ring, and again at each interrupt.  Return the frames, elapsed seconds and processor seconds."""
    driver.renew(ALL)
    parts = driver.lay_out(frame, header)
    heads = range(0, SIZE, len(parts))
    for head in heads:
        driver.tx.describe(head, chained(parts, head))
    entries = [heads[position % len(heads)] for position in range(SIZE)]
    driver.memory.load(driver.tx.avail + 4, struct.pack(f"<{SIZE}H", *entries))
    total = min(SEND_FRAMES, SEND_BYTES // len(frame)) // len(heads) * len(heads)
    before_s, begun_s = busy_seconds(driver.device), time.monotonic()
    for done in range(0, total, len(heads)):
        driver.tx.set_avail_idx(done + len(heads))
        driver.tx.set_used_event(done + len(heads) - 1)
        driver.device.kick(TX)
        while driver.tx.device_idx != driver.tx.avail_idx:
            driver.device.wait_interrupt(TX)
    return total, time.monotonic() - begun_s, busy_seconds(driver.device) - before_s


def receive(driver: NetDriver, tap: TapInterface, header: bytes, frame: bytes) -> tuple[int, float, float]:
    """Receive what `flood` sends.  Return the number of frames, elapsed seconds and processor seconds."""
    driver.renew(ALL)
    ring = driver.rx
    for head in range(SIZE):
        ring.describe(head, [Desc(RX_BASE + head * BUFFER_BYTES, BUFFER_BYTES, WRITE)])
        ring.offer(head)
    driver.device.kick(RX)
    used = ring.device_idx
    raw = driver.memory.memory
    elements = raw[ring.used + 4 : ring.used + 4 + 8 * SIZE].cast("I")
    entries = raw[ring.avail + 4 : ring.avail + 4 + 2 * SIZE].cast("H")
    sender = flood(tap, header, frame)
    counted, before_s, begun_s = driver.counters()["rx_packets"], busy_seconds(driver.device), time.monotonic()
    while time.monotonic() - begun_s < RECEIVE_S:
        found = ring.device_idx
        if found == used:
            ring.set_used_event(used)
            if ring.device_idx == used:
                driver.device.wait_interrupt(RX)
            continue
        old = ring.avail_idx
        for position in range(found - used & 0xFFFF):
            entries[old + position & SIZE - 1] = elements[2 * (used + position & SIZE - 1)]
        ring.set_avail_idx(old + (found - used & 0xFFFF))
        if (ring.avail_idx - ring.avail_event - 1 & 0xFFFF) < (ring.avail_idx - old & 0xFFFF):
            driver.device.kick(RX)
        used = found
    seconds, busy_s = time.monotonic() - begun_s, busy_seconds(driver.device) - before_s
    frames = driver.counters()["rx_packets"] - counted
    os.kill(sender, signal.SIGKILL)
    os.waitpid(sender, 0)
    elements.release()
    entries.release()
    return frames, seconds, busy_s


def flood(tap: TapInterface, header: bytes, frame: bytes) -> int:
    """Start a process that sends one frame repeatedly.  Return its pid."""
    pid = os.fork()
    if pid:
        return pid
    unfinished = any(header)
    with Host(tap, unfinished=unfinished) as host:
        raw = header + frame if unfinished else frame
        host.socket.setblocking(True)
        while os.getppid() != 1:
            host.try_send(raw)
    os._exit(0)


def sent_alone(driver: NetDriver, tap: TapInterface) -> float:
    """Return the median time in microseconds from the notification until the frame is at the host."""
    driver.renew(ALL)
    frame, times_ns = any_frame(60), []
    with Host(tap) as host:
        for _ in range(LATENCIES):
            driver.submit(frame, cuts=())
            begun_ns = time.monotonic_ns()
            driver.device.kick(TX)
            host.receive()
            times_ns.append(time.monotonic_ns() - begun_ns)
            while not driver.tx.reap():
                os.sched_yield()
    return sorted(times_ns)[LATENCIES // 2] / 1000


def got_alone(driver: NetDriver, tap: TapInterface) -> float:
    """Return the median time in microseconds from the host's sending of a frame until the interrupt."""
    driver.renew(ALL)
    driver.post(16)
    frame, times_ns = any_frame(60), []
    with Host(tap) as host:
        for _ in range(LATENCIES):
            driver.rx.set_used_event(driver.rx.used_idx)
            begun_ns = time.monotonic_ns()
            host.send(frame)
            driver.device.wait_interrupt(RX)
            times_ns.append(time.monotonic_ns() - begun_ns)
            driver.receive()
    return sorted(times_ns)[LATENCIES // 2] / 1000
