"""Drives each queue of each virtio device in the same way, to test the properties that all rings have.

An adapter makes valid requests of one queue, and checks that they were served.  `RingDriver` resets the device, gives
it rings, offers chains, and waits for the results.
"""

import contextlib
import os
import socket
import struct
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from tests.support.fakedriver import (
    DATA,
    DEADLINE_S,
    EVENT_IDX,
    FIGURES_SLOT,
    INDIRECT,
    INDIRECT_DESC,
    KIB,
    LAYOUT,
    MIB,
    MODERN,
    RING_BASE,
    WRITE,
    Desc,
    Device,
    Ring,
    chained,
)
from tests.support.netdriver import MRG, net_start
from tests.support.network import Host, Network, TapInterface
from tests.support.packets import any_frame
from vmd.guestmem import GuestMemory
from vmd.images.chain import Link, open_chain
from vmd.images.create import new_file, write_empty
from vmd.ipc import devmsg
from vmd.ipc.loop import Loop
from vmd.memfile import sealed_file
from vmd.units import SECTOR
from vmd.virtio import spec
from vmd.vm.entropy import Entropy
from vmd.vm.kinds import CDROM, DISK, ENTROPY, INTERFACE, Kind
from vmd.vm.slots import Slot

ALL = MODERN | INDIRECT_DESC | EVENT_IDX
STRIDE, REQUESTS = 8 * KIB, 64  # the memory of a request, and the number of requests
TABLE = 8 * MIB  # indirect tables, STRIDE for each request
LONG_TABLE = 9 * MIB  # the place of a longer one
UNTOUCHED = 0xEE
BLOCK = 2048  # of a CD
RING_ALIGN = 4 * KIB


def disk_bytes(length: int) -> bytes:
    """Return the content of the disk and of the CD.  Each sector is different."""
    return b"".join(number.to_bytes(4, "little") * (SECTOR // 4) for number in range(length // SECTOR))


CONTENT = disk_bytes(MIB)


# --- adapters --------------------------------------------------------------------------------------------------


class Adapter:
    """The driver of one queue of a device.  `host` is the other end of an interface."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    queue: ClassVar[int] = 0
    features: ClassVar[int] = 0  # besides those of rings
    image: ClassVar[str] = "raw"  # format of a disk's image.  The disks of other formats have processes of their own
    gives_back: ClassVar[bool] = True  # whether the device gives buffers back
    # How many requests a device serves at most before it does its other work; 0 if it serves none at all.  If the
    # device counts descriptors, this is the number of chains of the greatest length.
    budget: ClassVar[int]
    counts_descriptors: ClassVar[bool] = False

    def __init__(self, device: Device, host: Host | None) -> None:
        self.device = device
        self.memory = device.memory
        self.host = host

    def begin(self) -> None:
        """Discard the results of earlier rings."""

    def request(self, number: int) -> list[Desc]:
        """Write a valid request to its own memory; return its descriptors, not linked."""
        raise NotImplementedError

    def prompt(self, count: int) -> None:
        """Let the host send what the next `count` requests wait for."""

    def is_served(self, number: int, length: int) -> bool:
        """Return whether a request that was given back with this length was served correctly."""
        raise NotImplementedError

    def is_refused(self, number: int) -> bool:
        """Return whether a request that was given back reports an error."""
        return False

    def filled(self, parts: Sequence[Desc], data: bytes) -> list[Desc]:
        """Write data to the readable parts, and UNTOUCHED to the writable ones; return the parts."""
        for part in parts:
            if part.flags & WRITE:
                self.memory.load(part.gpa, bytes((UNTOUCHED,)) * part.length)
            else:
                self.memory.load(part.gpa, data[: part.length])
                data = data[part.length :]
        return list(parts)


def base(number: int) -> int:
    """Return the address of a request's memory."""
    return DATA + number % REQUESTS * STRIDE


class DiskRequests(Adapter):
    """Reads of one sector."""

    name, kind, budget = "vioblk", DISK, 64

    def request(self, number: int) -> list[Desc]:
        """Return a read of the sector with this number."""
        at = base(number)
        parts = [Desc(at, 16), Desc(at + KIB, SECTOR, WRITE), Desc(at + 64, 1, WRITE)]
        return self.filled(parts, struct.pack("<IIQ", spec.VIRTIO_BLK_T_IN, 0, number % REQUESTS))

    def is_served(self, number: int, length: int) -> bool:
        """Check length, status and data."""
        at, start = base(number), number % REQUESTS * SECTOR
        return (
            length == SECTOR + 1
            and self.memory.read(at + 64, 1)[0] == spec.VIRTIO_BLK_S_OK
            and self.memory.read(at + KIB, SECTOR) == CONTENT[start : start + SECTOR]
        )

    def is_refused(self, number: int) -> bool:
        """Check the status."""
        return self.memory.read(base(number) + 64, 1)[0] == spec.VIRTIO_BLK_S_IOERR


class Qcow2Requests(DiskRequests):
    """Reads of one sector of a qcow2 image.  The main thread does not read its file itself, but calls its driver."""

    name, image = "vioblk-qcow2", "qcow2"


class DiscRequests(Adapter):
    """Reads of one block."""

    name, kind, queue = "vioscsi-request", CDROM, 2
    budget, counts_descriptors = 32, True

    def request(self, number: int) -> list[Desc]:
        """Return a read of the block with this number."""
        at = base(number)
        read = b"\x28\0" + (number % REQUESTS).to_bytes(4, "big") + b"\0\0\1\0"
        parts = [Desc(at, 51), Desc(at + KIB, 108, WRITE), Desc(at + 2 * KIB, BLOCK, WRITE)]
        return self.filled(parts, (b"\1\0\x40\0\0\0\0\0" + bytes(11) + read).ljust(51, b"\0"))

    def is_served(self, number: int, length: int) -> bool:
        """Check length, response and data."""
        at, start = base(number), number % REQUESTS * BLOCK
        return (
            length == 108 + BLOCK
            and self.memory.read(at + KIB, 12) == bytes(12)
            and self.memory.read(at + 2 * KIB, BLOCK) == CONTENT[start : start + BLOCK]
        )


class DiscTasks(Adapter):
    """Requests to abort a command that does not exist."""

    name, kind, queue = "vioscsi-control", CDROM, 0
    budget, counts_descriptors = 32, True

    def request(self, number: int) -> list[Desc]:
        """Return a request to abort a command."""
        at = base(number)
        task = struct.pack("<II", 0, 0) + b"\1\0\x40\0\0\0\0\0" + bytes(8)
        return self.filled([Desc(at, 24), Desc(at + 64, 1, WRITE)], task)

    def is_served(self, number: int, length: int) -> bool:
        """Check length and response."""
        return length == 1 and self.memory.read(base(number) + 64, 1) == b"\0"


class DiscEvents(Adapter):
    """Buffers for events.  They stay in the ring, because there are no events."""

    name, kind, queue, budget, gives_back = "vioscsi-event", CDROM, 1, 0, False

    def request(self, number: int) -> list[Desc]:
        """Return a buffer for an event."""
        return self.filled([Desc(base(number), 16, WRITE)], b"")


class Frames(Adapter):
    """Frames of one interface.  Each frame is different."""

    kind = INTERFACE

    def __init__(self, device: Device, host: Host | None) -> None:
        super().__init__(device, host)
        assert host is not None
        self.wire = host
        self.count = 0  # the number of frames made so far

    def begin(self) -> None:
        """Discard the frames that the guest has sent."""
        while self.wire.try_receive() is not None:
            pass

    def frame(self) -> bytes:
        """Return the next frame."""
        self.count += 1
        return any_frame(60, self.count)


class FramesOut(Frames):
    """Frames that the guest sends."""

    name, queue, budget = "vionet-tx", 1, 128

    def request(self, number: int) -> list[Desc]:
        """Return a frame, with its header in a buffer of its own."""
        at = base(number)
        return self.filled([Desc(at, 12), Desc(at + 64, 60)], bytes(12) + self.frame())

    def is_served(self, number: int, length: int) -> bool:
        """Check that the host receives the frame."""
        return length == 0 and self.wire.receive() == self.memory.read(base(number) + 64, 60)


class FramesIn(Frames):
    """Buffers of two parts for frames from the host."""

    name, queue, budget = "vionet-rx", 0, 64  # if the other queue has frames, too

    def begin(self) -> None:
        """Also forget the frames that the host has sent."""
        super().begin()
        self.sent: list[bytes] = []

    def request(self, number: int) -> list[Desc]:
        """Return a buffer of two parts: the first is for the header."""
        at = base(number)
        return self.filled([Desc(at, 12, WRITE), Desc(at + 64, 1600, WRITE)], b"")

    def prompt(self, count: int) -> None:
        """Send frames."""
        for _ in range(count):
            self.sent.append(self.frame())
            self.wire.send(self.sent[-1])

    def is_served(self, number: int, length: int) -> bool:
        """Check that the buffer has the next frame that the host has sent."""
        return length == 72 and self.arrived(number) == self.sent.pop(0)

    def arrived(self, number: int) -> bytes:
        """Return the frame in a buffer."""
        return self.memory.read(base(number) + 64, 60)


class MergeableFramesIn(FramesIn):
    """Buffers of one part, which may be merged.  The device fills them in another loop of its code."""

    name, features = "vionet-rx-mergeable", MRG

    def request(self, number: int) -> list[Desc]:
        """Return a buffer of one part."""
        return self.filled([Desc(base(number), 2048, WRITE)], b"")

    def arrived(self, number: int) -> bytes:
        """Return the frame in a buffer."""
        return self.memory.read(base(number) + 12, 60)


class RandomBytes(Adapter):
    """Requests for random bytes, which the VM process serves itself."""

    name, kind, budget = "viornd", ENTROPY, 16

    def request(self, number: int) -> list[Desc]:
        """Return a buffer of two parts."""
        at = base(number)
        return self.filled([Desc(at, 40, WRITE), Desc(at + 64, 24, WRITE)], b"")

    def is_served(self, number: int, length: int) -> bool:
        """Check that both parts were filled."""
        parts = self.memory.read(base(number), 40), self.memory.read(base(number) + 64, 24)
        return length == 64 and not any(bytes((UNTOUCHED,)) * 8 in part for part in parts)


ADAPTERS: tuple[type[Adapter], ...] = (
    DiskRequests, Qcow2Requests, FramesIn, MergeableFramesIn, FramesOut, DiscTasks, DiscEvents, DiscRequests,
    RandomBytes,
)  # fmt: skip


# --- the device without a process --------------------------------------------------------------------------------


class EntropyDevice(Device):
    """The entropy device on an event thread of its own, with the interface of a device process."""

    def __init__(self) -> None:
        self.kind = ENTROPY.process
        self.memory = GuestMemory.create(LAYOUT)
        self.figures_fd = sealed_file("figures", devmsg.FIGURES_BYTES)
        self.entropy = Entropy(Slot(kind=ENTROPY, index=0, number=1), self.memory, self.figures_fd, FIGURES_SLOT)
        self.kicks, self.calls = self.entropy.kicks, self.entropy.calls
        self.informs, self.their_informs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sync, self.their_sync = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for channel in (self.sync, self.informs):
            channel.settimeout(DEADLINE_S)
        self.ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.activations = 0
        self.said = ""
        self.loop = Loop()
        self.entropy.serve(
            self.loop,
            on_interrupt=lambda: os.eventfd_write(self.calls[0], 1),
            on_needs_reset=self._on_needs_reset,
            on_event=lambda _what, _text: None,
        )
        self.loop.add(self.their_sync.fileno(), self._on_question)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException:
            self.said = traceback.format_exc()
        os.eventfd_write(self.ended, 1)

    def _on_needs_reset(self, text: str, life: int) -> None:
        self.their_informs.send(devmsg.NEEDS_RESET_HEAD.pack(devmsg.NEEDS_RESET, life) + text.encode())

    @property
    def end_fd(self) -> int:
        """A descriptor that is readable when the event thread has ended."""
        return self.ended

    def start(self) -> Self:
        """Start the event thread."""
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.call_from_thread(self.loop.stop)
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        self.loop.close()
        for channel in (self.sync, self.their_sync, self.informs, self.their_informs):
            channel.close()
        for fd in (*self.kicks, *self.calls, self.figures_fd, self.ended):
            os.close(fd)

    def read_log(self) -> str:
        """Return the traceback that ended the event thread, if any."""
        return self.said

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the event thread busy until the context ends.  Then it finds all packets and notifications at once."""
        stopped, over = threading.Event(), threading.Event()

        def stop() -> None:
            stopped.set()
            over.wait(DEADLINE_S)

        self.loop.call_from_thread(stop)
        assert stopped.wait(DEADLINE_S)
        try:
            yield
        finally:
            over.set()

    def _on_question(self, _events: int) -> None:
        """Answer on the event thread, so that a device that keeps the thread busy delays the answer."""
        self.their_sync.send(self._answer(self.their_sync.recv(devmsg.PACKET_MAX)))

    def _answer(self, packet: bytes) -> bytes:
        (kind,) = devmsg.TYPE.unpack_from(packet)
        if kind == devmsg.ACTIVATE:
            _, features, count = devmsg.ACTIVATE_HEAD.unpack_from(packet)
            rows = devmsg.QUEUE.iter_unpack(packet[devmsg.ACTIVATE_HEAD.size :])
            queues = [(size, bool(enabled), *rest) for size, enabled, _, *rest in rows]
            assert len(queues) == count
            return devmsg.STATUS.pack(kind, int(not self.entropy.activate(features, queues)))
        if kind == devmsg.EXPORT:
            queues, _ = self.entropy.export()
            packed = b"".join(devmsg.QUEUE.pack(0, 1, 0, 0, 0, 0, *indices) for indices in queues)
            return devmsg.EXPORT_HEAD.pack(kind, len(queues)) + packed
        return devmsg.STATUS.pack(kind, int(not self.entropy.command(kind)))


# --- driving -----------------------------------------------------------------------------------------------------


def write_disk(path: Path, image: str) -> int:
    """Make an image of this format with CONTENT; return the note that tells a device process its format."""
    if image == "raw":
        path.write_bytes(CONTENT)
        return 0
    with new_file(str(path)) as fd:
        write_empty(fd, str(path), image, len(CONTENT))
    made = open_chain([Link(fd=os.open(path, os.O_RDWR | os.O_CLOEXEC), path=str(path), format=image)], writable=True)
    made.pwritev(0, [memoryview(CONTENT)])
    made.close()
    return devmsg.RESOURCE_QCOW2


class Devices:
    """Running devices, one of each kind and format of images.  A context manager that ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = contextlib.ExitStack()
        self.running: dict[tuple[str, str], tuple[Device, Host | None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def driver(self, adapter: type[Adapter]) -> "RingDriver":
        """Return the driver of a queue.  Start its device if it does not run yet."""
        kind = adapter.kind.process
        key = kind, adapter.image
        if key not in self.running:
            host: Host | None = None
            if adapter.kind is INTERFACE:
                tap = self.stack.enter_context(TapInterface(self.stack.enter_context(Network())))
                host = self.stack.enter_context(Host(tap))
                device = Device(kind, [tap.fd], queues=2, net=net_start())
            elif adapter.kind is ENTROPY:
                device = EntropyDevice()
            else:
                path = self.folder / f"{kind}.{adapter.image}"
                note = write_disk(path, adapter.image)
                with path.open("rb+") as file:
                    device = Device(kind, [file.fileno()], notes=[note], queues=len(adapter.kind.queues))
            self.running[key] = self.stack.enter_context(device).start(), host
        return RingDriver(adapter, *self.running[key])


class RingDriver:
    """The driver of one queue.  The other queues of its device also have rings."""

    def __init__(self, adapter: type[Adapter], device: Device, host: Host | None) -> None:
        self.adapter = adapter(device, host)
        self.device = device
        self.memory = device.memory
        self.queue = adapter.queue
        self.size_max = adapter.kind.queues[adapter.queue]
        self.renew()

    def rings(self, size: int = 0, start: int = 0) -> list[Ring]:
        """Lay out all rings anew.  The tested ring has this size and starts at this index."""
        rings = []
        place = RING_BASE
        for number, usual in enumerate(self.adapter.kind.queues):
            ring = Ring(self.memory, size or usual if number == self.queue else usual, place)
            if number == self.queue:
                ring.set_avail_idx(start)
                ring.used_idx = start
                self.memory.load(ring.used + 2, struct.pack("<H", start))
            place = ring.used + 6 + 8 * ring.size + RING_ALIGN - 1 & -RING_ALIGN
            rings.append(ring)
        assert place <= DATA
        return rings

    def reset(self) -> None:
        """Reset the device, and discard its events."""
        self.device.command(devmsg.RESET)
        for fd in (*self.device.kicks, *self.device.calls):
            self.device.take_event(fd)

    def renew(self, features: int = ALL, *, size: int = 0, start: int = 0) -> Ring:
        """Reset the device, and give it new rings; return the tested one."""
        self.reset()
        self.adapter.begin()
        rings = self.all_rings = self.rings(size, start)
        self.ring = rings[self.queue]
        rows = [ring.row(True, start, start) if ring is self.ring else ring.row() for ring in rings]
        assert self.device.activate_rows(features | self.adapter.features, *rows) == 0
        return self.ring

    def kick(self) -> None:
        """Notify the queue."""
        self.device.kick(self.queue)

    def pause_and_resume(self) -> None:
        """Pause and resume the device, so that it finishes what it has begun."""
        self.device.command(devmsg.PAUSE)
        self.device.command(devmsg.RESUME)

    def interrupts(self) -> int:
        """Return the number of interrupts since the last call."""
        return self.device.take_event(self.device.calls[self.queue])

    def table(self, parts: Sequence[Desc], at: int = TABLE) -> Desc:
        """Link parts and write them to an indirect table; return its descriptor."""
        return self.raw_table(chained(parts), at)

    def raw_table(self, parts: Sequence[Desc], at: int = TABLE) -> Desc:
        """Write parts to an indirect table with their links unchanged; return its descriptor."""
        self.memory.load(at, b"".join(struct.pack("<QIHH", *part) for part in parts))
        return Desc(at, 16 * len(parts), INDIRECT)

    def put(self, parts: Sequence[Desc]) -> None:
        """Write descriptors from index 0 on, with their links unchanged, and make them available."""
        self.ring.describe(0, parts)
        self.ring.offer(0)

    def wait_used(self, used_idx: int) -> None:
        """Wait for a used index without interrupts, by asking the device again and again."""
        for _ in range(1_000_000):
            if self.ring.device_idx == used_idx & 0xFFFF:
                return
            assert not self.device.readable(self.device.end_fd), self.device.read_log()
            self.device.export()
        raise AssertionError(f"used index stays {self.ring.device_idx}")

    def finish(self, heads: dict[int, int]) -> None:
        """Notify, and wait for the requests with these heads.  Fail unless each was served correctly."""
        found = self.device.collect(self.ring, len(heads), self.queue)
        assert sorted(head for head, _ in found) == sorted(heads)
        for head, length in found:
            assert self.adapter.is_served(heads[head], length), f"request {heads[head]}: {length} bytes"

    def serve(self, count: int, *, indirect: bool = False) -> None:
        """Have several requests served at once."""
        heads = {}
        for number in range(count):
            parts = self.adapter.request(number)
            heads[self.ring.add([self.table(parts, TABLE + STRIDE * number)] if indirect else parts)] = number
        self.adapter.prompt(count)
        self.finish(heads)

    def works(self) -> bool:
        """Reset the device; return whether it serves good requests."""
        self.renew()
        if self.adapter.gives_back:
            self.serve(3)
            return True
        self.put(self.adapter.request(0))
        self.kick()
        self.pause_and_resume()
        self.device.command(devmsg.PAUSE)
        return self.device.export()[self.queue] == (0, 0) and not self.reset_requests()

    def reset_requests(self) -> list[str]:
        """Return the texts of all NEEDS_RESET of this activation that have arrived."""
        found = []
        while self.device.readable(self.device.informs.fileno()):
            packet = self.device.informs.recv(devmsg.PACKET_MAX)
            kind, life = devmsg.NEEDS_RESET_HEAD.unpack_from(packet)
            if (kind, life) == (devmsg.NEEDS_RESET, self.device.activations):
                found.append(packet[devmsg.NEEDS_RESET_HEAD.size :].decode())
        return found

    def outcome(self) -> str | list[tuple[int, int]]:
        """Notify, and wait for used elements or NEEDS_RESET; return the elements, or the text."""
        self.kick()
        while True:
            if found := self.ring.reap():
                return found
            if said := self.reset_requests():
                return said[0]
            self.device.wait_for(self.device.informs.fileno(), self.device.calls[self.queue])
            self.interrupts()
