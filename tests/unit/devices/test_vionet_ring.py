"""The hot loops of vionet have the same results as simple implementations.  The wait for a full tap has a limit."""

import errno
import os
import posix
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.fakedriver import (
    DATA,
    EVENT_IDX,
    EXTRA,
    INDIRECT,
    INDIRECT_DESC,
    LAYOUT,
    NEXT,
    RING_BASE,
    ROM,
    WRITE,
    Desc,
    Ring,
    release,
)
from tests.support.figures import unseen
from tests.support.netdriver import GSO_TCPV4
from tests.support.packets import GUEST4, HOST4, HOST_LLADDR, LLADDR, any_frame
from tests.support.packets import dhcp as dhcp_request
from tests.support.packettap import PacketTap
from vmd.devices.vionet import buffers, receive, transmit
from vmd.devices.vionet.buffers import RUN, STOCK
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.local import LocalNetwork
from vmd.devices.vionet.receive import Receiver
from vmd.devices.vionet.tap import GONE
from vmd.devices.vionet.transmit import FRAME_MAX, WINDOWS_MAX, Transmitter
from vmd.devices.vionet.worker import GSO_FRAME_MAX, NEVER
from vmd.errors import GuestError
from vmd.guestmem import GuestMemory, RegionSpec
from vmd.ipc import devmsg
from vmd.units import IOV_MAX, MIB, PAGE
from vmd.virtio.queue import DESC, Queue
from vmd.virtio.spec import VIRTQ_USED_F_NO_NOTIFY

# (gpa, None: the next free place; length; flags; next, None: the following descriptor) each; in an indirect table
Parts = list[tuple[int | None, int, int, int | None]]
Chains = list[tuple[Parts, bool]]

SIZE = 16
FEATURES = INDIRECT_DESC | EVENT_IDX
TABLES, TABLE_BYTES = DATA - 0x4000, 512
GAPS = (0, 0, 64)  # bytes after descriptors, depending on their lengths: with 0 the next one is adjacent
LOCAL = Interface(lladdr=LLADDR, host_lladdr=HOST_LLADDR, local=True, guest4=GUEST4, host4=HOST4)
PLACES = 1 << 20  # bytes from DATA on that chains may use


class Services:
    """A device process that counts interrupts."""

    def __init__(self) -> None:
        self.interrupts = 0
        self.figures = unseen("vionet")

    def interrupt(self, queue: int) -> None:
        """Count an interrupt."""
        self.interrupts += 1

    def post(self, job: Callable[[], None]) -> None:
        """Run the job at once."""
        job()

    def broke(self, text: str) -> None:
        """Do nothing: the tests call the loop, which raises the error."""


def failed(error: OSError) -> None:
    """Raise the error."""
    raise error


class Ends:
    """A fake tap and its other end, as a context manager."""

    def __init__(self) -> None:
        self.host, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.host, ours):
            end.setsockopt(socket.SOL_SOCKET, 32, 8 << 20)  # SO_SNDBUFFORCE
            end.setblocking(False)
        self.tap = PacketTap(ours.detach())
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __enter__(self) -> "Ends":
        return self

    def __exit__(self, *_: object) -> None:
        self.host.close()
        os.close(self.tap.fd)
        os.close(self.kick)

    def transmitter(self, header: int = 12) -> Transmitter:
        """Return the worker of a transmit queue, without its thread."""
        made = Transmitter(Services(), self.kick, self.tap, failed)
        made.header = header
        made.link_up = True
        return made

    def receiver(self, header: int = 12, *, mergeable: bool = False, sums: bool = True) -> Receiver:
        """Return the worker of a receive queue, without its thread."""
        made = Receiver(Services(), self.kick, self.tap, failed)
        made.configure(header, mergeable=mergeable, sums=sums)
        made.link_up = True
        return made

    def frames(self) -> list[bytes]:
        """Return the frames that were written to the tap."""
        found = []
        while select.select([self.host], [], [], 0)[0]:
            found.append(self.host.recv(1 << 17))
        return found


def close(worker: Transmitter | Receiver) -> None:
    """Close the descriptors of a worker."""
    if isinstance(worker, Receiver):
        os.close(worker.injection)


# Mostly the values of real drivers, and some of everything else.
GPAS = st.sampled_from([None] * 12 + [0, EXTRA - 5, EXTRA + (1 << 20) - 1, ROM, 1 << 40, (1 << 64) - 1])
LENGTHS = st.sampled_from([12, 10, 60, 1514, 2048, 1, 0, 3, 14, 26, 4096, 17000, 65562, 0xFFFFFFFF])
NEXTS = st.sampled_from([None] * 12 + [0, 3, SIZE - 1, SIZE, 0xFFFF])


def chains(usual_flags: int, other_flags: list[int]) -> st.SearchStrategy[Chains]:
    """Return a strategy for the rings of one direction."""
    flags = st.sampled_from([usual_flags | NEXT] * 3 + [usual_flags] * 3 + other_flags)
    odd: st.SearchStrategy[Parts] = st.lists(st.tuples(GPAS, LENGTHS, flags, NEXTS), min_size=1, max_size=7)
    lengths = st.lists(st.sampled_from([12, 60, 1502, 2048, 2048, 4096, 20000]), min_size=1, max_size=4)
    usual: st.SearchStrategy[Parts] = lengths.map(
        lambda lengths: [
            (None, length, usual_flags | (NEXT if number < len(lengths) - 1 else 0), None)
            for number, length in enumerate(lengths)
        ]
    )
    one: st.SearchStrategy[Parts] = st.sampled_from([60, 2048, 4096]).map(
        lambda length: [(None, length, usual_flags, None)]
    )
    good = st.lists(st.tuples(st.one_of(one, usual), st.booleans()), min_size=1, max_size=14)
    last = st.lists(st.tuples(odd, st.booleans()), max_size=1)
    return st.tuples(good, last).map(lambda both: both[0] + both[1])


ODD: st.SearchStrategy[tuple[int | None, int, int, int | None]] = st.tuples(
    st.sampled_from([None, DATA, EXTRA - 5, 1 << 40]),
    st.sampled_from([0, 12, PAGE - 1, PAGE]),
    st.sampled_from([0, NEXT, NEXT | WRITE, INDIRECT]),
    NEXTS,
)


def of_pages(
    first: int, numbers: list[int], last: int, odd: list[tuple[int, tuple[int | None, int, int, int | None]]]
) -> Parts:
    """Return a frame of pages, with some of its descriptors replaced by `odd` ones."""
    parts: Parts = [(None, first, NEXT, None)]
    parts += [(DATA + PAGE * number, PAGE, NEXT, None) for number in numbers]
    parts.append((None, last, 0, None))
    for place, other in odd:
        parts[place % len(parts)] = other
    return parts


def pages() -> st.SearchStrategy[Chains]:
    """Return a strategy for frames of many pages, some of which are in several frames."""
    numbers = st.lists(st.integers(0, 30), min_size=5, max_size=15)
    odd = st.lists(st.tuples(st.integers(0, 30), ODD), max_size=1)
    frame = st.builds(of_pages, st.sampled_from([12, 66, 78]), numbers, st.sampled_from([1, 60, PAGE]), odd)
    return st.lists(st.tuples(frame, st.just(True)), min_size=1, max_size=10)


def build(memory: GuestMemory, rings: Chains) -> Ring:
    """Put chains into a ring.  No two descriptors share memory, except for wrong ones."""
    ring = Ring(memory, SIZE)
    at, place = 0, DATA
    memory.load(DATA, random.Random(3).randbytes(PLACES))
    for number, (parts, indirect) in enumerate(rings):
        first = 0 if indirect else at
        rows = b""
        for position, (gpa, length, flags, following) in enumerate(parts):
            where = place if gpa is None else gpa
            place += min(length, 70_000) + GAPS[length % len(GAPS)]
            rows += struct.pack("<QIHH", where, length, flags, first + position + 1 if following is None else following)
        if indirect:
            memory.load(TABLES + TABLE_BYTES * number, rows)
            rows = struct.pack("<QIHH", TABLES + TABLE_BYTES * number, len(rows), INDIRECT, 0)
        if at + len(rows) // 16 > SIZE:
            break
        memory.load(ring.desc + 16 * at, rows)
        ring.offer(at)
        at += len(rows) // 16
    return ring


def queue_of(memory: GuestMemory, ring: Ring) -> Queue:
    """Return the device's queue for a ring."""
    return Queue(memory, FEATURES, SIZE, ring.desc, ring.avail, ring.used)


# --- transmitting ------------------------------------------------------------------------------------------------


def reference_send(queue: Queue, header: int) -> tuple[str, list[bytes]]:
    """Transmit in the simplest way.  Return the error that stopped it, or "", and the frames for the tap."""
    sent = []
    try:
        while (chain := queue.take()) is not None:
            if chain.writable:
                raise GuestError("frame with a writable descriptor")
            parts = [queue.memory.slices(gpa, length) for gpa, length in chain.readable if length]
            length = sum(size for _, size in chain.readable) - header
            if length < 0:
                raise GuestError(f"frame without a header: {length + header} of {header} bytes")
            raw = b"".join(window for windows in parts for window in windows) if length <= GSO_FRAME_MAX else b""
            if 14 <= length <= FRAME_MAX or (FRAME_MAX < length <= GSO_FRAME_MAX and raw[1]):
                sent.append(raw)
            queue.put(chain.head, 0)
    except GuestError as error:
        return str(error), sent
    finally:
        queue.publish()
    return "", sent


@settings(max_examples=300)
@given(st.one_of(chains(0, [WRITE, INDIRECT, INDIRECT | NEXT, 8, 8 | NEXT]), pages()), st.sampled_from([10, 12]))
def test_transmit_loop_has_the_results_of_the_reference(rings: Chains, header: int) -> None:
    """Frames, used elements and error are the same."""
    outcomes = []
    for fast in (False, True):
        with GuestMemory.create(LAYOUT) as memory, Ends() as ends:
            ring = build(memory, rings)
            queue = queue_of(memory, ring)
            worker = ends.transmitter(header)
            error = ""
            if fast:
                try:
                    while worker.serve(queue):
                        pass
                except GuestError as stopped:
                    error = str(stopped)
                frames = ends.frames()
            else:
                error, frames = reference_send(queue, header)
                worker.packets, worker.bytes = len(frames), sum(map(len, frames)) - header * len(frames)
                worker.show()
            counted = [worker.figures[at] for at in (transmit.PACKETS, transmit.BYTES)]
            # After an error the position in the ring does not matter, because only a reset follows.
            outcomes.append((error, frames, counted, ring.reap(), error or queue.next_avail))
            close(worker)
            release(queue)
            del queue, worker
    assert outcomes[0] == outcomes[1]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Yield a fake tap and its other end."""
    with Ends() as both:
        yield both


def is_waiting(worker: Transmitter) -> bool:
    """Return whether a worker waits for its tap.  Raise AssertionError if that wait has no limit."""
    assert bool(worker.tap_events) == (worker.until_s < NEVER)
    return bool(worker.tap_events)


def test_wait_for_a_full_tap_has_a_limit_43(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile input 43: frames stay in the ring.  Each wait that ends by its limit drops one frame."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.transmitter()
        given = 0
        ring.describe(0, [Desc(DATA, 60_000)])
        memory.load(DATA, b"\0\1".ljust(12, b"\0"))
        worker.queue = queue
        while not is_waiting(worker):  # until the tap is full
            ring.offer(0)
            given += 1
            worker.turn()
        taken = len(ends.frames())
        assert ring.device_idx == taken == given - 1

        worker.turn()
        assert not worker.more  # the tap had room
        assert ring.device_idx == given
        assert not is_waiting(worker)

        while not is_waiting(worker):
            ring.offer(0)
            worker.turn()
        before = ring.device_idx
        worker.turn()
        assert is_waiting(worker)  # the limit is not reached
        clock = worker.until_s
        monkeypatch.setattr(time, "monotonic", lambda: clock)
        worker.turn()
        assert (worker.dropped_busy, ring.device_idx) == (1, before + 1)
        close(worker)
        release(queue)
        del queue


@pytest.mark.parametrize("count", [7, 8, 64, 65, IOV_MAX - 2, IOV_MAX - 1, IOV_MAX])
@pytest.mark.parametrize("apart", [0, 1])
def test_frame_of_many_pieces_is_sent_whole(ends: Ends, count: int, apart: int) -> None:
    """The pieces are adjacent or apart.  The second frame of the same pieces is whole too."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.transmitter()
        memory.load(DATA, random.Random(count).randbytes(1 << 16))
        memory.load(DATA, bytes(12))
        parts = [Desc(DATA, 26), *(Desc(DATA + 32 + (1 + apart) * number, 1) for number in range(count - 1))]
        wanted = b"".join(memory.read(part.gpa, part.length) for part in parts)
        for _ in range(2):
            ring.add_indirect(parts, DATA + (1 << 16))
            worker.serve(queue)
            assert ends.frames() == [wanted]
        close(worker)
        release(queue)
        del queue, worker


@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_piece_of_a_frame_crosses_the_end_of_memory(ends: Ends, place: int) -> None:
    """In the file, the bytes of another region come next."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.transmitter()
        parts = [Desc(DATA, 26), Desc(EXTRA, 32), Desc(DATA + 64, 60)]  # the two kinds of memory, in turn
        ring.add(parts)
        worker.serve(queue)
        assert len(ends.frames()) == 1
        parts[place] = Desc(EXTRA + MIB - 8, 16)
        ring.add(parts)
        with pytest.raises(GuestError):
            worker.serve(queue)
        assert ends.frames() == []
        close(worker)
        release(queue)
        del queue, worker


def test_frames_are_counted_before_they_are_used(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures never lag behind the used index that the guest sees."""
    seen: list[int] = []
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.transmitter()
        figures = worker.figures
        memory.write(DATA, bytes((0, 1)) + bytes(10) + any_frame(60_000))
        ring.describe(0, [Desc(DATA, 12 + 60_000)])
        for _ in range(SIZE):
            ring.offer(0)

        def look(_fd: int, views: Sequence[bytes | memoryview]) -> int:
            seen.append(ring.device_idx)
            assert figures[transmit.PACKETS] == ring.device_idx
            return sum(map(len, views))

        monkeypatch.setattr(posix, "writev", look)
        worker.serve(queue)
        assert sorted(set(seen)) == [0, 5, 10, 15]
        assert ring.device_idx == figures[transmit.PACKETS] == SIZE
        close(worker)
        release(queue)
        del queue, worker


def test_cached_views_are_bounded(ends: Ends) -> None:
    """Their number has a limit for any pages and any lengths of tables.  Each frame is sent correctly."""
    header, count = bytes((0, GSO_TCPV4)).ljust(12, b"\0"), 3000
    layout = (RegionSpec(gpa=0, size=DATA + PAGE * count, name="ram"),)
    with GuestMemory.create(layout) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.transmitter()
        most = 0
        for number in range(count):
            memory.load(DATA + PAGE * number, number.to_bytes(8, "little") * (PAGE // 8))
        memory.load(TABLES - PAGE, header)
        used = 0
        for middle in [*range(1, 16), *[14] * (count // 28)]:
            used %= count - 40
            whole = [Desc(DATA + PAGE * (used + number), PAGE) for number in range(0, 2 * middle, 2)]
            parts = [Desc(TABLES - PAGE, 12), *whole, Desc(DATA, 8)]
            used += 2 * middle
            ring.add_indirect(parts, TABLES)
            worker.serve(queue)
            wanted = header + b"".join(memory.read(part.gpa, part.length) for part in parts[1:])
            assert ends.frames() == [wanted]
            assert sum(len(views) for views, _ in worker.tables.values()) == worker.windows <= WINDOWS_MAX
            most = max(most, worker.windows)
        assert most > WINDOWS_MAX - 64  # the cache was used
        close(worker)
        release(queue)
        del queue, worker


class NoServices:
    """The services of a process, which a frame without an answer must not use."""

    figures = unseen("vionet")
    slot = memoryview(bytearray(devmsg.FIGURES_SLOT_BYTES)).cast("Q")

    def post(self, _job: object) -> None:
        """Fail."""
        raise AssertionError

    def call_after(self, _delay_s: float, _job: object) -> None:
        """Fail."""
        raise AssertionError


def test_the_checked_bytes_are_sent_20(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile input 20, 40: the guest changes the source address or the DHCP packet between the check and the write."""
    frame = any_frame(400)
    request = dhcp_request(99)  # an unknown type, in a packet with a wrong checksum: it is not answered
    request = request[:40] + b"\x12\x34" + request[42:]
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.transmitter()
        worker.allowed = LLADDR
        worker.answers = LocalNetwork(LOCAL, never, NoServices(), never)
        write = os.writev

        def change_and_write(fd: int, views: Sequence[bytes | memoryview]) -> int:
            for place in (DATA, DATA + 4096):
                memory.load(place + 12 + 6, HOST_LLADDR + b"\x08\x00")
                memory.load(place + 12 + 14, bytes(40))
            return write(fd, views)

        monkeypatch.setattr(posix, "writev", change_and_write)
        for place, content in ((DATA, frame), (DATA + 4096, request)):
            memory.load(place, bytes(12) + content)
            ring.add([Desc(place, 12 + len(content))])
            worker.serve(queue)
            sent = ends.frames()[0][12:]
            # Of a frame for which only the source address is checked, the guest may change the rest.
            assert sent[:14] == content[:14]
            assert sent == content or content is frame
        assert worker.packets == 2
        close(worker)
        release(queue)
        del queue


def never(_frame: bytes) -> None:
    """Fail, because no frame is answered here."""
    raise AssertionError


# (frame, its header, a failing write, the figure that counts it)
NOT_SENT: dict[str, tuple[bytes, bytes, int, str]] = {
    "short": (any_frame(60)[:13], bytes(12), 0, "tx_short"),
    "only a header": (b"", bytes(12), 0, "tx_short"),
    "long": (any_frame(FRAME_MAX + 1), bytes(12), 0, "tx_long"),
    "too long for segmentation": (any_frame(GSO_FRAME_MAX + 1), bytes((0, GSO_TCPV4)) + bytes(10), 0, "tx_long"),
    "spoofed": (any_frame(60)[:6] + HOST_LLADDR + any_frame(60)[12:], bytes(12), 0, "tx_spoofed"),
    "refused": (any_frame(60), bytes(12), errno.EINVAL, "tx_refused"),
    "down": (any_frame(60), bytes(12), errno.EIO, "tx_link_down"),
    "gone": (any_frame(60), bytes(12), errno.EBADFD, "tx_link_down"),
}


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("name", NOT_SENT)
def test_a_frame_that_is_not_sent_is_counted_once(
    ends: Ends, name: str, locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffer comes back, and the frames around it are sent whole.  After a failing tap the link is down."""
    frame, header, error, figure = NOT_SENT[name]
    good, dropped = any_frame(100), name != "spoofed" or locked
    failures: list[OSError] = []
    writes = 0

    def failing(write: Callable[..., int]) -> Callable[..., int]:
        def once(fd: int, data: object) -> int:
            nonlocal writes
            writes += 1
            if error and writes == 2:
                raise OSError(error, os.strerror(error))
            return write(fd, data)

        return once

    monkeypatch.setattr(posix, "write", failing(posix.write))
    monkeypatch.setattr(posix, "writev", failing(posix.writev))
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.transmitter()
        worker.failed = failures.append
        worker.allowed = LLADDR if locked else b""
        place = DATA
        for raw in (bytes(12) + good, header + frame, bytes(12) + good):
            memory.load(place, raw)
            cut = min(len(raw), 20)
            parts = [Desc(place, cut), Desc(place + cut, len(raw) - cut)] if len(raw) > cut else [Desc(place, cut)]
            ring.add(parts)
            place += 1 << 17
        worker.serve(queue)
        is_down = figure == "tx_link_down"
        expected = [bytes(12) + good, *([] if dropped else [header + frame]), *([] if is_down else [bytes(12) + good])]
        assert ends.frames() == expected
        figures = {name: worker.figures[at] for at, name in enumerate(devmsg.COUNTER_NAMES) if worker.figures[at]}
        assert figures.pop("tx_packets") == len(expected)
        assert figures.pop("tx_bytes") == sum(map(len, expected)) - 12 * len(expected)
        assert figures == ({figure: 1 + is_down} if dropped else {})
        assert len(ring.reap()) == 3
        assert [failure.errno for failure in failures] == ([error] if is_down else [])
        assert worker.link_up == (not is_down)
        failures.clear()
        close(worker)
        release(queue)
        del queue, worker


@pytest.mark.parametrize("direction", ["transmit", "receive"])
@pytest.mark.parametrize(
    ("head", "table", "words"),
    [(SIZE, 0, "outside a table"), *((0, size, f"table of {size} bytes") for size in (0, 31, 33))],
)  # fmt: skip
def test_ring_that_is_broken(ends: Ends, direction: str, head: int, table: int, words: str) -> None:
    """The sentence says why, whichever loop finds it."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        flags = WRITE if direction == "receive" else 0
        memory.load(TABLES, struct.pack("<QIHH", DATA, 2048, flags, 0) * 3)
        ring.describe(0, [Desc(TABLES, table, INDIRECT)])
        ring.offer(head)
        worker: Transmitter | Receiver = ends.transmitter() if direction == "transmit" else ends.receiver()
        with pytest.raises(GuestError, match=words):
            worker.serve(queue)
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


# --- receiving -----------------------------------------------------------------------------------------------------


def reference_receive(
    queue: Queue, frames: list[bytes], header: int, *, mergeable: bool, sums: bool
) -> tuple[str, list[int]]:
    """Receive in the simplest way.  Return the error that stopped it, or "".

    Also return how many frames had no room, how many arrived, and their bytes.
    """
    no_room = packets = received = 0
    pending = list(frames)
    taken: list[tuple[int, list[memoryview]]] = []
    least = header if mergeable else header + 14
    try:
        # The device reads chains ahead, and here it reads all of them.
        while (chain := queue.take()) is not None:
            if chain.readable:
                raise GuestError("receive buffer with a readable descriptor")
            parts = [
                window
                for gpa, length in chain.writable
                if length
                for window in queue.memory.slices(gpa, length, write=True)
            ]
            room = sum(map(len, parts))
            if room < least:
                raise GuestError(f"receive buffer of {room} bytes, too small for any frame")
            taken.append((chain.head, parts))
    except GuestError as error:
        return str(error), []
    while pending and taken:
        data = bytearray(pending[0])
        need, count, room = len(data), 0, 0
        while room < need and count < len(taken):
            room += sum(map(len, taken[count][1]))
            count += 1
            if not mergeable:
                break
        if room < need:
            if mergeable:
                break  # the frame waits for more buffers
            no_room += 1
            pending.pop(0)
            continue
        pending.pop(0)
        packets, received = packets + 1, received + len(data) - header
        if not sums:
            data[0] = 0
        if header == 12:
            data[10:12] = struct.pack("<H", count)
        for head, parts in taken[:count]:
            written = 0
            for part in parts:
                piece = data[: len(part)]
                part[: len(piece)] = piece
                del data[: len(piece)]
                written += len(piece)
            queue.put(head, written)
        del taken[:count]
    queue.publish()
    return "", [no_room, packets, received]


FRAME_LENGTHS = st.lists(st.sampled_from([14, 60, 60, 1514, 2036, 2037, 3000, 9000, 65562]), min_size=1, max_size=8)


@settings(max_examples=300)
@given(
    chains(WRITE, [0, NEXT, INDIRECT, INDIRECT | NEXT, WRITE | INDIRECT, WRITE | 8]),
    FRAME_LENGTHS,
    st.sampled_from([(10, False), (12, False), (12, True)]),
    st.booleans(),
)
def test_receive_loop_has_the_results_of_the_reference(
    rings: Chains, lengths: list[int], layout: tuple[int, bool], sums: bool
) -> None:
    """Memory, used elements and error are the same."""
    assume(not any(covers_ring(gpa, length) for parts, _ in rings for gpa, length, _, _ in parts))
    header, mergeable = layout
    frames = [random.Random(n).randbytes(header + length) for n, length in enumerate(lengths)]
    outcomes = []
    for fast in (False, True):
        with GuestMemory.create(LAYOUT) as memory, Ends() as ends:
            ring = build(memory, rings)
            queue = queue_of(memory, ring)
            worker = ends.receiver(header, mergeable=mergeable, sums=sums)
            error = ""
            if fast:
                for frame in frames:
                    ends.host.send(frame)
                try:
                    worker.serve(queue)
                except GuestError as stopped:
                    error = str(stopped)
                counted = [worker.no_room, *(worker.figures[at] for at in (receive.PACKETS, receive.BYTES))]
            else:
                error, counted = reference_receive(queue, frames, header, mergeable=mergeable, sums=sums)
            used = ring.reap()
            # Bytes after a frame do not count: a read of a frame that was dropped may have left bytes there.
            content = []
            if not error and is_apart(memory, ring):
                content = [bytes(placed(memory, ring, head, length)) for head, length in used]
            # After an error the position in the ring does not matter, because only a reset follows.
            outcomes.append((error, error or used, content, error or counted))
            assert len(worker.chains.known) <= STOCK
            assert len(worker.run.ends) <= RUN
            worker.begin()
            close(worker)
            release(queue)
            del queue, worker
    assert outcomes[0] == outcomes[1]


def covers_ring(gpa: int | None, length: int) -> bool:
    """Return whether a buffer overlaps the ring.  The content of the ring then depends on the time of reading."""
    return gpa == 0 and RING_BASE < length < DATA


def is_apart(memory: GuestMemory, ring: Ring) -> bool:
    """Return whether no descriptor is in two chains.  Otherwise a frame in one chain would change the other one."""
    queue = queue_of(memory, ring)
    places = []
    while (chain := queue.take()) is not None:
        places += [gpa for gpa, length in chain.writable if length]
    release(queue)
    return len(set(places)) == len(places)


def placed(memory: GuestMemory, ring: Ring, head: int, length: int) -> bytes:
    """Return the first bytes of a chain's buffers."""
    queue = queue_of(memory, ring)
    found = b""
    for gpa, size in queue.walk(head).writable:
        part = min(size, length - len(found))
        if part:
            found += memory.read(gpa, part)
    release(queue)
    return found


@pytest.mark.parametrize("parts", [[Desc(DATA, 0, 0)], [Desc(DATA, 0, WRITE)], [Desc(DATA, 25, WRITE)]], ids=str)
def test_first_buffer_without_room_for_a_frame_breaks_the_ring(ends: Ends, parts: list[Desc]) -> None:
    """This holds even if the ring is correct otherwise."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver()
        ring.add(parts)
        with pytest.raises(GuestError):
            worker.serve(queue)
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


# (bytes of each buffer, bytes between one and the next)
BUFFERS = {
    "side by side": ([4096] * SIZE, 0),
    "apart": ([2048] * SIZE, 4096),
    "of many sizes": ([1536, 1536, 1920, 1536, 9000, 2048, 1526, 4096] * (SIZE // 8), 0),
    "as small as can be": ([12] * SIZE, 20),
}


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_are_filled_in_many_rounds(ends: Ends, kind: str, shuffled: bool) -> None:
    """The buffers have any order, the indices wrap, and buffers of earlier rounds may be left."""
    sizes, gap = BUFFERS[kind]
    places = [DATA + sum(sizes[:head]) + head * gap for head in range(SIZE)]
    lengths = [length for length in (14, 60, 60, 170, 1514, 4084, 4085, 9000, 20000) if 12 + length <= sum(sizes)]
    rng = random.Random(kind)
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        ring.avail_idx, ring.used_idx = 0xFFF0, 0xFFF5  # as for a VM that was received
        queue = Queue(memory, FEATURES, SIZE, ring.desc, ring.avail, ring.used, ring.avail_idx, ring.used_idx)
        worker = ends.receiver(mergeable=True)
        for head in range(SIZE):
            ring.describe(head, [Desc(places[head], sizes[head], WRITE)])
        free = list(range(SIZE))
        arrived: list[bytes] = []
        sent: list[bytes] = []
        while len(arrived) < 500:
            if shuffled:
                rng.shuffle(free)
            offered = max(0, len(free) - rng.choice([0, 0, 2, 5]))
            for head in free[:offered]:
                ring.offer(head)
            del free[:offered]
            small = len(sent) // 100 % 2  # long enough that the worker expects only small frames
            for _ in range(rng.randrange(20 if small else 4)):
                sent.append(rng.randbytes(12 + rng.choice(lengths[: 3 if small else None])))
                ends.host.send(sent[-1])
            while worker.serve(queue):
                pass
            used = ring.reap()
            while used:
                first = memory.read(places[used[0][0]], 12)
                count = int.from_bytes(first[10:], "little")
                parts = [memory.read(places[head], length) for head, length in used[:count]]
                assert all(length == sizes[head] for head, length in used[: count - 1])
                arrived.append(b"".join(parts))
                free += [head for head, _ in used[:count]]
                del used[:count]
            assert [frame[12:] for frame in sent[: len(arrived)]] == [frame[12:] for frame in arrived]
        assert (worker.packets, worker.no_room) == (len(arrived), 0)
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


def test_a_single_frame_is_published_before_the_next_read(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest may wait for it.  Later frames of the same turn are published together."""
    seen: list[int] = []
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver(mergeable=True)
        figures = worker.figures
        for head in range(SIZE):
            ring.describe(head, [Desc(DATA + 4096 * head, 4096, WRITE)])
            ring.offer(head)
        read = os.readv

        def look_and_read(fd: int, views: Sequence[bytearray | memoryview]) -> int:
            seen.append(ring.device_idx)
            assert figures[receive.PACKETS] == ring.device_idx  # counted before the guest can see them
            return read(fd, views)

        monkeypatch.setattr(posix, "readv", look_and_read)
        for frames in (1, 6, 6):
            for _ in range(frames):
                ends.host.send(bytes(12) + any_frame(60))
            worker.serve(queue)
        assert seen == [0, 1] + [1] + [2] * 6 + [7] * 7
        assert ring.device_idx == 13
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


def test_no_descriptor_is_read_twice(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if frames go through our own memory, and buffers have many pieces, a turn stays short."""
    pieces, looks = 20, 0

    class Counting:
        def unpack_from(self, buffer: memoryview, offset: int) -> tuple[int, ...]:
            nonlocal looks
            looks += 1
            return DESC.unpack_from(buffer, offset)

    monkeypatch.setattr(buffers, "DESC", Counting())
    monkeypatch.setattr(buffers, "IOV_MAX", pieces + 2)  # a frame for two buffers goes through our own memory
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver(mergeable=True)
        for number in range(SIZE):
            parts = [Desc(DATA + 4096 * number + 100 * place, 2, WRITE) for place in range(pieces)]
            ring.add_indirect(parts, TABLES + TABLE_BYTES * number)
        for _ in range(SIZE // 2):
            ends.host.send(bytes(12) + any_frame(60))
        worker.serve(queue)
        assert ring.device_idx == SIZE
        assert looks == SIZE * (1 + pieces)
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


def test_large_frames_leave_the_other_queue_its_turn(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn ends after a number of bytes, which is small if that queue waits.  The next turn takes the rest."""
    monkeypatch.setattr(receive, "ALONE", (SIZE, 100_000))
    monkeypatch.setattr(receive, "SHARED", (SIZE, 1))
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver(mergeable=True)
        ring.describe(0, [Desc(DATA, 1 << 20, WRITE)])
        for _ in range(SIZE):
            ring.offer(0)
        for _ in range(8):
            ends.host.send(bytes(12) + any_frame(60_000))
        turns = []
        for worker.shared in (False, True, False, False):
            turns.append((worker.serve(queue), ring.device_idx))
        assert turns == [(True, 3), (True, 4), (True, 7), (False, 8)]
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


@pytest.mark.parametrize("gap", [0, 8], ids=["side by side", "apart"])
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 300])
def test_the_header_of_a_frame_has_its_number_of_buffers(ends: Ends, count: int, gap: int) -> None:
    """5.1.6.3.2: num_buffers has two bytes, and is correct for every number and position of buffers."""
    size, room = 512, 16
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, size)
        queue = Queue(memory, FEATURES, size, ring.desc, ring.avail, ring.used)
        worker = ends.receiver(mergeable=True)
        for head in range(size):
            ring.describe(head, [Desc(DATA + (room + gap) * head, room, WRITE)])
            ring.offer(head)
        for number in range(3):
            frame = random.Random(number).randbytes(room * count - (number if count > 1 else 0))
            if len(frame) < 12 + 14:
                frame = frame.ljust(12 + 14, b"!")
            needed = -(-len(frame) // room)
            ends.host.send(frame)
            worker.serve(queue)
            used = ring.reap()
            assert len(used) == needed
            got = b"".join(memory.read(DATA + (room + gap) * head, length) for head, length in used)
            assert got[:10] + got[12:] == frame[:10] + frame[12:]
            assert got[10:12] == needed.to_bytes(2, "little")
            for head, _ in used:
                ring.offer(head)
        assert (worker.packets, worker.no_room, worker.bytes > 0) == (3, 0, True)
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


@pytest.mark.parametrize("header", [10, 12])
def test_a_frame_stays_in_its_buffer_if_buffers_are_not_merged(ends: Ends, header: int) -> None:
    """A longer frame is dropped.  The adjacent next buffer keeps its bytes."""
    room = 100
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = Queue(memory, FEATURES, SIZE, ring.desc, ring.avail, ring.used)
        worker = ends.receiver(header)
        for head in range(4):
            ring.describe(head, [Desc(DATA + room * head, room, WRITE)])
            ring.offer(head)
        memory.write(DATA, b"?" * 4 * room)
        for length in (150, 60):
            ends.host.send(random.Random(length).randbytes(header + length))

        worker.serve(queue)

        assert ring.reap() == [(0, header + 60)]
        assert (worker.packets, worker.no_room) == (1, 1)
        assert memory.read(DATA + room, 3 * room) == b"?" * 3 * room
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


@pytest.mark.parametrize("first", [1, 9, 10, 11, 12, 13])
def test_a_header_may_lie_in_two_pieces(ends: Ends, first: int) -> None:
    """The number of buffers is correct even if its two bytes are in different pieces."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = Queue(memory, FEATURES, SIZE, ring.desc, ring.avail, ring.used)
        worker = ends.receiver(mergeable=True)
        frame = random.Random(first).randbytes(12 + 60)
        ring.add([Desc(DATA, first, WRITE), Desc(DATA + 64, 2048, WRITE)])
        ends.host.send(frame)

        worker.serve(queue)

        assert ring.reap() == [(0, len(frame))]
        got = memory.read(DATA, first) + memory.read(DATA + 64, len(frame) - first)
        assert got == frame[:10] + b"\1\0" + frame[12:]
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


@pytest.mark.parametrize("count", [IOV_MAX - 2, IOV_MAX - 1, IOV_MAX])
def test_a_buffer_of_many_pieces_is_filled(ends: Ends, count: int) -> None:
    """As far as one read takes them: all but one, which is for the rest of a frame that does not fit."""
    length = min(count, IOV_MAX - 1)
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver()
        ring.add_indirect([Desc(DATA + 2 * number, 1, WRITE) for number in range(count)], DATA + (1 << 16))
        frame = random.Random(count).randbytes(length)
        ends.host.send(frame + b"!")
        ends.host.send(frame)
        worker.serve(queue)
        assert (ring.reap(), worker.no_room, worker.packets) == ([(0, length)], 1, 1)
        assert b"".join(memory.read(DATA + 2 * number, 1) for number in range(12, length)) == frame[12:]
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("gap", [0, 8], ids=["side by side", "apart"])
def test_a_frame_that_is_too_long_for_a_full_ring_is_dropped(ends: Ends, gap: int, filtered: bool) -> None:
    """A frame that fills the ring to its last byte arrives.  A frame with one more byte would wait for ever."""
    room = 128
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver(mergeable=True)
        worker.accepted = b"\xff" * 6 if filtered else b""
        for head in range(SIZE):
            ring.describe(head, [Desc(DATA + (room + gap) * head, room, WRITE)])
            ring.offer(head)
        for length, arrives in ((room * SIZE, True), (room * SIZE + 1, False), (room * SIZE + 1, False), (60, True)):
            dropped, packets = worker.no_room, worker.packets
            ends.host.send((bytes(12) + b"\xff" * length)[:length])
            worker.serve(queue)
            used = ring.reap()
            assert sum(written for _, written in used) == (length if arrives else 0)
            assert (worker.packets - packets, worker.no_room - dropped) == ((1, 0) if arrives else (0, 1))
            assert [worker.figures[at] for at in (receive.PACKETS, receive.BYTES)] == [worker.packets, worker.bytes]
            for head, _ in used:
                ring.offer(head)
        assert worker.bytes == room * SIZE - 12 + 60 - 12
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


def test_the_wait_of_a_frame_for_buffers_has_a_limit(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that offers buffers in time gets the frame.  After the limit the frame is dropped."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver(mergeable=True)
        for head in range(SIZE):
            ring.describe(head, [Desc(DATA + 128 * head, 128, WRITE)])
        ring.offer(0)
        ends.host.send(bytes(12) + b"\xff" * 150)
        worker.serve(queue)
        assert (worker.until_s, ring.reap()) == (now + receive.HOLD_S, [])
        now += receive.HOLD_S / 2
        worker.serve(queue)  # the limit does not start again
        assert worker.until_s == 100.0 + receive.HOLD_S
        ring.offer(1)
        worker.serve(queue)
        assert (ring.reap(), worker.until_s, worker.no_room) == ([(0, 128), (1, 34)], NEVER, 0)

        ring.offer(2)
        ends.host.send(bytes(12) + b"\xff" * 150)
        worker.serve(queue)
        now += receive.HOLD_S
        ends.host.send(bytes(12) + b"\xff" * 20)
        worker.serve(queue)
        assert (ring.reap(), worker.no_room, worker.packets) == ([(2, 32)], 1, 2)
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("header", [10, 12])
def test_a_frame_without_a_whole_ethernet_header_is_dropped(ends: Ends, header: int, filtered: bool) -> None:
    """It is counted, and its buffer gets the next frame.  A frame of only an Ethernet header arrives."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver(header)
        worker.accepted = b"\xff" * 6 if filtered else b""
        ring.add([Desc(DATA, 2048, WRITE)])
        for length in (header + 13, header, 1, header + 14):
            ends.host.send((bytes(header) + b"\xff" * 14)[:length])
        worker.serve(queue)

        assert ring.reap() == [(0, header + 14)]
        assert (worker.malformed, worker.packets, worker.bytes) == (3, 1, 14)
        assert list(worker.figures[receive.PACKETS : receive.BYTES + 1]) == [1, 14]
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


def test_a_locked_interface_gets_no_frames_for_others(ends: Ends) -> None:
    """Frames for its own address or for a group arrive."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver()
        worker.accepted = LLADDR
        for head in range(SIZE):
            ring.add([Desc(DATA + 2048 * head, 2048, WRITE)])
        group, other = b"\x33\x33\0\0\0\1", LLADDR[:5] + bytes((LLADDR[5] ^ 1,))
        for number, to in enumerate((LLADDR, other, b"\xff" * 6, HOST_LLADDR, group)):
            ends.host.send(bytes(12) + to + bytes(8 + number))
        worker.serve(queue)

        assert [length for _, length in ring.reap()] == [26, 28, 30]
        assert (worker.filtered, worker.packets) == (2, 3)
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


def test_waiting_answers_of_our_own_are_bounded(ends: Ends) -> None:
    """Too many answers are dropped and counted.  The others come before frames of the tap, in order."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, 64)
        queue = Queue(memory, FEATURES, 64, ring.desc, ring.avail, ring.used)
        worker = ends.receiver()
        for head in range(64):
            ring.add([Desc(DATA + 2048 * head, 2048, WRITE)])
        for number in range(receive.INJECTED_MAX + 2):
            worker.inject(bytes(60 + number))
        assert (worker.injected_lost, worker.figures[receive.INJECTED_LOST]) == (2, 2)
        assert os.eventfd_read(worker.injection) == receive.INJECTED_MAX
        ends.host.send(bytes(12) + any_frame(200))
        worker.serve(queue)

        lengths = [length - 12 for _, length in ring.reap()]
        assert lengths == [*range(60, 60 + receive.INJECTED_MAX), 200]
        worker.inject(bytes(60))
        worker.held = bytearray(b"x" * 80)
        worker.large = 3
        worker.forget()
        assert (len(worker.injected), len(worker.held), worker.large) == (0, 0, 0)
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize(
    ("number", "gone"),
    [(errno.EBADFD, True), (errno.ENODEV, True), (errno.EIO, True), (errno.EINVAL, False), (errno.ENOMEM, False)],
)
def test_failing_reads(ends: Ends, monkeypatch: pytest.MonkeyPatch, number: int, gone: bool, filtered: bool) -> None:
    """A tap that is removed or down is no longer read.  After any other error the next frame is read."""
    failures: list[OSError] = []
    read = os.readv
    left = [number]

    def fail_once(fd: int, views: Sequence[bytearray | memoryview]) -> int:
        if left:
            raise OSError(left[0], os.strerror(left.pop()))
        return read(fd, views)

    monkeypatch.setattr(posix, "readv", fail_once)
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver()
        worker.failed = failures.append
        worker.accepted = b"\xff" * 6 if filtered else b""
        ring.add([Desc(DATA, 2048, WRITE)])
        ends.host.send(bytes(12) + b"\xff" * 60)
        assert not worker.serve(queue)

        assert [error.errno for error in failures] == ([number] if gone else [])
        assert (worker.link_up, worker.malformed) == (not gone, 0 if gone else 1)
        assert ring.reap() == ([] if gone else [(0, 72)])
        # The worker waits for the tap only if it has buffers.
        ring.add([Desc(DATA, 2048, WRITE)])
        worker.serve(queue)
        assert worker.tap_events == (0 if gone else select.EPOLLIN)
        failures.clear()
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


@pytest.mark.parametrize("kind", ["one buffer", "two buffers", "filtered"])
def test_a_descriptor_with_an_end(ends: Ends, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It is no tap, and is treated like a tap that is gone."""
    failures: list[OSError] = []
    monkeypatch.setattr(posix, "readv", lambda _fd, _views: 0)
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver()
        worker.failed = failures.append
        worker.accepted = b"\xff" * 6 if kind == "filtered" else b""
        ring.add([Desc(DATA, 100, WRITE), Desc(DATA + 4096, 2048, WRITE)][kind != "two buffers" :])
        assert not worker.serve(queue)

        assert [str(error) for error in failures] == [f"[Errno {min(GONE)}] end of file"]
        assert (worker.link_up, worker.malformed, worker.no_room) == (False, 0, 0)
        assert ring.reap() == []
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


@pytest.mark.parametrize("behind", [0, 26, 2048])
@pytest.mark.parametrize(("room", "fits"), [(72, True), (71, False)])
def test_a_frame_of_ours_may_fill_its_buffer(ends: Ends, room: int, fits: bool, behind: int) -> None:
    """A frame that fits exactly arrives.  If the buffer is too small, the frame is dropped and the buffer stays.

    The size of the next buffer does not count.
    """
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.receiver()
        ring.add([Desc(DATA, room, WRITE)])
        if behind:
            ring.add([Desc(DATA + 4096, behind, WRITE)])
        worker.inject(b"\xff" * 60)
        worker.serve(queue)

        assert ring.reap() == ([(0, 72)] if fits else [])
        assert (worker.packets, worker.no_room) == ((1, 0) if fits else (0, 1))
        worker.begin()
        close(worker)
        release(queue)
        del queue, worker


def test_notifications_are_disabled_while_frames_are_sent(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """2.7.10: each notification costs the guest an exit.  When all frames are sent, notifications are enabled again."""
    seen: list[int] = []
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = Queue(memory, 0, SIZE, ring.desc, ring.avail, ring.used)
        worker = ends.transmitter()
        memory.write(DATA, bytes(12) + any_frame(60))
        ring.add([Desc(DATA, 72)])

        def look(_fd: int, views: Sequence[bytes | memoryview]) -> int:
            seen.append(memory.read(ring.used, 1)[0])
            return sum(map(len, views))

        monkeypatch.setattr(posix, "writev", look)
        worker.serve(queue)
        assert seen == [VIRTQ_USED_F_NO_NOTIFY]
        assert memory.read(ring.used, 1)[0] == 0
        close(worker)
        release(queue)
        del queue, worker


def test_a_new_driver_does_not_wait_for_the_tap_of_the_last_one(ends: Ends) -> None:
    """If the new driver uses no transmit queue, a tap with room would wake the thread again and again."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = queue_of(memory, ring)
        worker = ends.transmitter()
        worker.queue = queue
        ring.describe(0, [Desc(DATA, 60_000)])
        memory.load(DATA, b"\0\1".ljust(12, b"\0"))
        while not is_waiting(worker):
            ring.offer(0)
            worker.turn()
        worker.queue = None
        worker.begin()
        assert not is_waiting(worker)
        close(worker)
        release(queue)
        del queue, worker
