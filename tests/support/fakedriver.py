"""The driver of a virtio device without a guest: the real, confined device process, and the test at its other side.

`Device` starts a process and holds the other ends of its channels and eventfds, and guest memory.  `Ring` is a driver's
half of a queue; it writes any content that a test wants, valid or not.  No KVM is needed.
"""

import contextlib
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from vmd.guestmem import GuestMemory, RegionSpec
from vmd.ipc import devmsg
from vmd.memfile import sealed_file
from vmd.parent.figures import slots
from vmd.privsep.spawn import Child, spawn
from vmd.virtio import spec
from vmd.virtio.queue import Queue
from vmd.vm.kinds import KERNEL, MAIN, RAW

KIB, MIB = 1 << 10, 1 << 20
DEADLINE_S = 60.0  # a watchdog

NEXT, WRITE, INDIRECT = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT
INDIRECT_DESC, EVENT_IDX = 1 << spec.VIRTIO_F_RING_INDIRECT_DESC, 1 << spec.VIRTIO_F_RING_EVENT_IDX
MODERN = 1 << spec.VIRTIO_F_VERSION_1

# Two adjacent regions, a read-only one, and holes around them.
RAM_END = 16 * MIB
EXTRA, EXTRA_END = RAM_END, RAM_END + MIB
ROM, ROM_END = 32 * MIB, 33 * MIB
LAYOUT = (
    RegionSpec(gpa=0, size=RAM_END, name="ram"),
    RegionSpec(gpa=EXTRA, size=MIB, name="extra"),
    RegionSpec(gpa=ROM, size=MIB, name="rom", read_only=True),
)
RING_BASE = 0x10000
DATA = MIB  # the address of the tests' buffers
FIGURES_SLOT = 5  # any slot will do


class Desc(NamedTuple):
    """One descriptor, with the fields of the table."""

    gpa: int
    length: int
    flags: int = 0
    next: int = 0


def chained(parts: Sequence[Desc], first: int = 0) -> list[Desc]:
    """Link descriptors to a chain; they take consecutive indices from `first` on."""
    last = len(parts) - 1
    return [
        part._replace(flags=part.flags | (NEXT if i < last else 0), next=first + i + 1 if i < last else 0)
        for i, part in enumerate(parts)
    ]


class Ring:
    """The driver's half of one queue."""

    def __init__(self, memory: GuestMemory, size: int, base: int = RING_BASE) -> None:
        self.memory = memory
        self.size = size
        self.desc = base
        self.avail = base + 16 * size
        self.used = (self.avail + 6 + 2 * size + 3) & ~3
        self.avail_idx = 0
        self.used_idx = 0
        self.free = 0
        memory.load(base, bytes(self.used + 6 + 8 * size - base))

    def row(self, enabled: bool = True, next_avail: int = 0, next_used: int = 0) -> bytes:
        """Return the row of this queue in ACTIVATE."""
        return devmsg.QUEUE.pack(self.size, enabled, 0, self.desc, self.avail, self.used, next_avail, next_used)

    def describe(self, index: int, parts: Sequence[Desc]) -> None:
        """Write descriptors to the table, from an index on."""
        for position, part in enumerate(parts):
            self.memory.load(self.desc + 16 * (index + position), struct.pack("<QIHH", *part))

    def offer(self, head: int) -> None:
        """Make a head available."""
        self.memory.load(self.avail + 4 + 2 * (self.avail_idx % self.size), struct.pack("<H", head))
        self.set_avail_idx(self.avail_idx + 1)

    def set_avail_idx(self, value: int) -> None:
        """Store the available index."""
        self.avail_idx = value & 0xFFFF
        self.memory.memory[self.avail + 2 : self.avail + 4].cast("H")[0] = self.avail_idx

    def add(self, parts: Sequence[Desc]) -> int:
        """Write parts as a chain to free descriptors and make it available; return the head."""
        if self.free + len(parts) > self.size:
            self.free = 0
        head = self.free
        self.describe(head, chained(parts, head))
        self.free += len(parts)
        self.offer(head)
        return head

    def add_indirect(self, parts: Sequence[Desc], table: int) -> int:
        """Write parts as a chain to an indirect table, and make that available; return the head."""
        raw = b"".join(struct.pack("<QIHH", *part) for part in chained(parts))
        self.memory.load(table, raw)
        return self.add([Desc(table, len(raw), INDIRECT)])

    def set_flags(self, flags: int) -> None:
        """Store the driver's flags."""
        self.memory.load(self.avail, struct.pack("<H", flags))

    def set_used_event(self, index: int) -> None:
        """Store used_event: the used index at which the driver wants an interrupt."""
        self.memory.load(self.avail + 4 + 2 * self.size, struct.pack("<H", index & 0xFFFF))

    @property
    def avail_event(self) -> int:
        """avail_event: the available index at which the device wants a notification."""
        return int.from_bytes(self.memory.read(self.used + 4 + 8 * self.size, 2), "little")

    @property
    def device_idx(self) -> int:
        """The used index, which the device writes."""
        return int.from_bytes(self.memory.read(self.used + 2, 2), "little")

    def reap(self) -> list[tuple[int, int]]:
        """Return (head, length) of the used elements since the last call."""
        found = []
        while self.used_idx != self.device_idx:
            raw = self.memory.read(self.used + 4 + 8 * (self.used_idx % self.size), 8)
            found.append(struct.unpack("<II", raw))
            self.used_idx = self.used_idx + 1 & 0xFFFF
        return found


def release(queue: Queue) -> None:
    """Release the references to guest memory of the device's side of a ring."""
    for value in vars(queue).values():
        if isinstance(value, memoryview):
            value.release()


class Device:
    """A device process and the other ends of its connections.  A context manager that ends the process."""

    def __init__(
        self,
        kind: str,
        resources: Sequence[int] = (),
        *,
        notes: Sequence[int] = (),
        flags: int = 0,
        queues: int = 1,
        net: bytes = b"",
        host_name: str = "",
    ) -> None:
        """`net` is devmsg.NET, only for a network interface."""
        self.kind = kind
        self.net = net
        self.host_name = host_name
        self.notes = list(notes) or [0] * len(resources)
        self.memory = GuestMemory.create(LAYOUT)
        self.kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(queues)]
        self.calls = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(queues)]
        self.resample = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.page = os.memfd_create("interrupts", os.MFD_CLOEXEC)
        os.ftruncate(self.page, mmap.PAGESIZE)
        self.counters = memoryview(mmap.mmap(self.page, mmap.PAGESIZE)).cast("I")
        self.figures_fd = sealed_file("figures", devmsg.FIGURES_BYTES)
        self.sync, their_sync = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.informs, their_informs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.log, log_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for channel in (self.sync, self.informs):
            channel.settimeout(DEADLINE_S)
        self.resources = [os.dup(fd) for fd in resources]
        self.flags = flags | (devmsg.START_NET if net else 0)
        self.features = 0
        self.activations = 0
        self.config = b""
        fds = {
            devmsg.FD_ASYNC: their_informs.fileno(),
            devmsg.FD_INTERRUPTS: self.page,
            devmsg.FD_RESAMPLE: self.resample,
            **dict(enumerate((*self.kicks, *self.calls), devmsg.FD_FIRST_QUEUE)),
        }
        # The same choice as in a VM: a disk with a single raw image has a program of its own, and so has a network
        # interface with vhost.
        is_raw = kind == "vioblk" and len(self.notes) == 1 and not self.notes[0] & devmsg.RESOURCE_QCOW2
        vhost = len(net) == devmsg.NET.size and devmsg.NET.unpack(net)[2] & devmsg.NET_VHOST
        entry = f"vmd.devices.{kind}.{RAW if is_raw else KERNEL if vhost else MAIN}:main"
        self.spawned_s = time.monotonic()
        self.child: Child = spawn(f"vm/test/{kind}0", channel=their_sync, fds=fds, entry=entry, log_fd=log_end)
        self.fds = fds
        for channel in (their_sync, their_informs):
            channel.close()
        os.close(log_end)

    # --- life ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(f"--- log of {self.kind}\n{self.read_log()}---")
        if self.child.pidfd >= 0:
            self.child.kill()
            self.child.reap(DEADLINE_S)
        self.sync.close()
        self.informs.close()
        for fd in (*self.kicks, *self.calls, *self.resources, self.resample, self.page, self.figures_fd, self.log):
            os.close(fd)
        self.memory.close()

    def start_packet(
        self, *, kind: int = devmsg.START, queues: int | None = None, regions: int | None = None,
        rows: bytes | None = None, form: int = 0, resources: int | None = None, notes: Sequence[int] = (),
        slot: int = FIGURES_SLOT,
    ) -> bytes:  # fmt: skip
        """Return START; arguments replace its correct fields."""
        if rows is None:
            rows = b"".join(
                devmsg.REGION.pack(r.gpa, r.size, r.offset, devmsg.REGION_READ_ONLY if r.read_only else 0)
                for r in self.memory.regions
            )
        head = devmsg.START_HEAD.pack(
            kind, 0, form, 0,
            len(self.kicks) if queues is None else queues,
            len(self.resources) if resources is None else resources,
            self.flags,
            len(self.memory.regions) if regions is None else regions,
            slot,
        )  # fmt: skip
        words = ["vm/test", *(f"backing file {n} of disk 0" if n else "disk 0" for n in range(len(self.resources)))]
        rows += b"".join(devmsg.RESOURCE.pack(note) for note in notes or self.notes) + self.net
        if self.net:
            words = ["vm/test", *("tap0" for _ in self.resources), self.host_name]
        return head + rows + "\0".join(words).encode()

    def send_start(self, packet: bytes) -> None:
        """Send a packet, usually START, with the descriptors of memory, figures and resources."""
        socket.send_fds(self.sync, [packet], [self.memory.fd, self.figures_fd, *self.resources])

    def start(self) -> Self:
        """Send START and wait until the process is ready."""
        self.send_start(self.start_packet())
        for channel in (self.sync, self.informs):
            packet = channel.recv(devmsg.PACKET_MAX)
            kind, self.features, length = devmsg.READY_HEAD.unpack_from(packet)
            self.config = packet[devmsg.READY_HEAD.size :]
            assert (kind, length) == (devmsg.READY, len(self.config))
        self.ready_ms = (time.monotonic() - self.spawned_s) * 1000
        return self

    def figures(self) -> dict[str, int]:
        """Return the counters of the process."""
        found = slots(self.figures_fd)
        assert set(found) == {(self.kind, 0)}  # it has written no other slot
        return found[self.kind, 0]

    def ask(self, packet: bytes) -> bytes:
        """Send a packet on the sync channel; return the answer."""
        self.sync.send(packet)
        return self.sync.recv(devmsg.PACKET_MAX)

    def inform(self, packet: bytes) -> None:
        """Send a packet on the async channel, and wait until it is handled.  `NetDriver.settle` explains how."""
        self.informs.send(packet)
        for _ in range(2):
            self.command(devmsg.RESUME)

    def command(self, kind: int) -> None:
        """Send RESET, PAUSE or RESUME, and wait for the answer."""
        assert self.ask(devmsg.TYPE.pack(kind)) == devmsg.STATUS.pack(kind, 0)

    def activate_rows(self, features: int, *rows: bytes) -> int:
        """Send ACTIVATE with these rows; return the status of the answer."""
        self.activations += 1
        answer = self.ask(devmsg.ACTIVATE_HEAD.pack(devmsg.ACTIVATE, features, len(rows)) + b"".join(rows))
        kind, status = devmsg.STATUS.unpack(answer)
        assert kind == devmsg.ACTIVATE
        return int(status)

    def activate(self, size: int, features: int = MODERN, base: int = RING_BASE) -> Ring:
        """Reset the device and give it a new ring."""
        (ring,) = self.activate_all((size,), features, base)
        return ring

    def activate_all(self, sizes: Sequence[int], features: int = MODERN, base: int = RING_BASE) -> list[Ring]:
        """Reset the device and give it new rings at consecutive places."""
        self.command(devmsg.RESET)
        for fd in (*self.kicks, *self.calls):
            self.take_event(fd)
        rings = []
        for size in sizes:
            rings.append(Ring(self.memory, size, base))
            base = rings[-1].used + 6 + 8 * size + 15 & ~15
        assert self.activate_rows(features, *(ring.row() for ring in rings)) == 0
        return rings

    def export(self) -> list[tuple[int, int]]:
        """Return (next avail, next used) of each queue."""
        answer = self.ask(devmsg.TYPE.pack(devmsg.EXPORT))
        _, count = devmsg.EXPORT_HEAD.unpack_from(answer)
        rows = [devmsg.QUEUE.unpack_from(answer, devmsg.EXPORT_HEAD.size + i * devmsg.QUEUE.size) for i in range(count)]
        return [(row[6], row[7]) for row in rows]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Stop the device process meanwhile: when it goes on, it finds at once all that was sent."""
        signal.pidfd_send_signal(self.child.pidfd, signal.SIGSTOP)
        os.waitid(os.P_PIDFD, self.child.pidfd, os.WSTOPPED)
        try:
            yield
        finally:
            signal.pidfd_send_signal(self.child.pidfd, signal.SIGCONT)

    # --- events ----------------------------------------------------------------------------------------------

    @property
    def end_fd(self) -> int:
        """A descriptor that is readable when the process has ended."""
        return self.child.pidfd

    def kick(self, queue: int = 0) -> None:
        """Notify a queue."""
        os.eventfd_write(self.kicks[queue], 1)

    @staticmethod
    def take_event(fd: int) -> int:
        """Take what an eventfd has."""
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    @staticmethod
    def readable(fd: int) -> bool:
        """Return whether a descriptor is readable."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))

    def wait_for(self, *fds: int) -> list[int]:
        """Wait until one of some descriptors is readable; return the readable ones.  Fails if the process ends."""
        poll = select.poll()
        for fd in (*fds, self.end_fd):
            poll.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(DEADLINE_S * 1000)]
        assert ready, "nothing happened"
        assert self.end_fd not in ready, f"the process has ended: {self.read_log()}"
        return ready

    def wait_interrupt(self, queue: int = 0) -> None:
        """Wait for an interrupt and take it."""
        self.wait_for(self.calls[queue])
        self.take_event(self.calls[queue])

    def collect(self, ring: Ring, count: int, queue: int = 0) -> list[tuple[int, int]]:
        """Kick, and return (head, length) of `count` used elements."""
        found = ring.reap()
        self.kick(queue)
        while len(found) < count:
            ring.set_used_event(ring.used_idx + count - len(found) - 1)
            found += ring.reap()  # elements used before the device could see that an interrupt is wanted
            if len(found) < count:
                self.wait_interrupt(queue)
                found += ring.reap()
        return found

    def needs_reset(self) -> str:
        """Wait for NEEDS_RESET of the present activation; return its sentence."""
        while True:
            self.wait_for(self.informs.fileno())
            packet = self.informs.recv(devmsg.PACKET_MAX)
            kind, life = devmsg.NEEDS_RESET_HEAD.unpack_from(packet)
            assert kind == devmsg.NEEDS_RESET
            if life == self.activations:
                return packet[devmsg.NEEDS_RESET_HEAD.size :].decode()

    def troubles(self) -> list[str]:
        """Wait for TROUBLES; return the sentences."""
        self.wait_for(self.informs.fileno())
        packet = self.informs.recv(devmsg.PACKET_MAX)
        assert packet[: devmsg.TYPE.size] == devmsg.TYPE.pack(devmsg.TROUBLES)
        return packet[devmsg.TYPE.size :].decode().split("\0")

    def error(self, channel: socket.socket) -> tuple[int, str]:
        """Return errno and sentence of an ERROR."""
        packet = channel.recv(devmsg.PACKET_MAX)
        kind, number = devmsg.ERROR_HEAD.unpack_from(packet)
        assert kind == devmsg.ERROR
        return number, packet[devmsg.ERROR_HEAD.size :].decode()

    def status(self) -> int | None:
        """Wait for the end of the process; return its exit status."""
        return self.child.reap(DEADLINE_S)

    # --- looking at it -----------------------------------------------------------------------------------------

    def read_log(self) -> str:
        """Return the log since the last call."""
        try:
            return os.read(self.log, 1 << 20).decode()
        except BlockingIOError:
            return ""

    def own_kib(self) -> int:
        """Return the process's private memory.  It does not depend on other processes, so a test can see it grow."""
        with open(f"/proc/{self.child.pid}/smaps_rollup") as rollup:
            return next(int(line.split()[1]) for line in rollup if line.startswith("Anonymous:"))

    def pss_kib(self) -> int:
        """Return the process's proportional share of memory, without guest memory."""
        total, skip = 0, False
        with open(f"/proc/{self.child.pid}/smaps") as smaps:
            for line in smaps:
                name = line.split()
                if "-" in name[0] and ":" not in name[0]:
                    skip = "memfd" in line
                elif name[0] == "Pss:" and not skip:
                    total += int(name[1])
        return total
