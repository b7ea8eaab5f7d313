"""The start-up that all device processes share: handshake, memory, confinement, loop.

Runs as  _vmd, inside its VM's cell; standard library only; filtered before the first guest byte is read
Peers    its VM process, on two channels (`ipc/devmsg.py` has messages and descriptor numbers)
Holds    guest memory, its queues' eventfds, and the descriptors of its one host resource
"""

import errno
import gc
import mmap
import os
import select
import sys

import _socket

from vmd.errors import GuestError, VmdError
from vmd.guestmem import GuestMemory, Region
from vmd.ipc import devmsg
from vmd.log import FORMS, RateLimit, log
from vmd.privsep.confine import Confinement, confine
from vmd.virtio.queue import Queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Device(Protocol):
        """One kind of device.  Order of calls: open; then activate, on_notify*, reset, again and again."""

        features: int
        config: bytes

        def activate(self, features: int, queues: list[Queue | None]) -> None:
            """Take the rings; None for a queue the driver does not use."""

        def on_notify(self, queue: int) -> bool:
            """Serve a queue, up to a budget; return whether there is more to do.  GuestError ends in NEEDS_RESET."""

        def quiesce(self) -> None:
            """Finish what is in flight; touch no ring until resumed or activated."""

        def write_config(self, offset: int, data: bytes) -> None:
            """Take a write of the driver to `config`."""

        def close(self) -> None:
            """Flush and let go, at the end."""


class Host:
    """What the VM process told us, and the descriptors that came with it."""

    def __init__(self, sync: _socket.socket) -> None:
        packet = sync.recv(devmsg.PACKET_MAX)
        head = devmsg.START_HEAD.size
        kind, verbosity, form, self.index, queues, resources, self.flags, regions = devmsg.START_HEAD.unpack_from(
            packet
        )
        if kind != devmsg.START or queues > devmsg.QUEUES_MAX or regions > devmsg.REGIONS_MAX:
            raise ValueError(f"not a START message: {packet[:head].hex()}")
        log.verbosity = verbosity
        log.form = FORMS[form]
        self.regions = []
        for number in range(regions):
            gpa, size, offset, flags = devmsg.REGION.unpack_from(packet, head + number * devmsg.REGION.size)
            read_only = bool(flags & devmsg.REGION_READ_ONLY)
            self.regions.append(Region(gpa=gpa, size=size, name="ram", offset=offset, read_only=read_only))
        log.title = packet[head + regions * devmsg.REGION.size :].decode()
        first = devmsg.FD_FIRST_QUEUE
        self.kicks = list(range(first, first + queues))
        self.calls = list(range(first + queues, first + 2 * queues))
        self.resources = list(range(first + 2 * queues, first + 2 * queues + resources))


class Process:
    """A device process: its channels, its queues, and the loop."""

    def __init__(self, sync: _socket.socket, host: Host, device: "Device", memory: GuestMemory) -> None:
        self.sync = sync
        self.informs = _socket.socket(fileno=devmsg.FD_ASYNC)
        self.host = host
        self.device = device
        self.memory = memory
        words = memoryview(mmap.mmap(devmsg.FD_INTERRUPTS, mmap.PAGESIZE)).cast("I")
        self.raised = words[: devmsg.QUEUES_MAX]
        self.seen = words[devmsg.QUEUES_MAX : 2 * devmsg.QUEUES_MAX]
        self.queues: list[Queue | None] = []
        self.running = False  # has rings, is not paused, and its driver has not broken them
        self.complaints = RateLimit()
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self.watch(sync.fileno(), self.on_sync)
        self.watch(self.informs.fileno(), self.on_inform)
        self.watch(devmsg.FD_RESAMPLE, self.on_resample)
        for number, fd in enumerate(host.kicks):
            self.watch(fd, lambda number=number, fd=fd: self.on_kick(number, fd))  # type: ignore[misc]

    def watch(self, fd: int, handler: "Callable[[], None]") -> None:
        """Call `handler` whenever `fd` is readable."""
        self.epoll.register(fd, select.EPOLLIN)
        self.handlers[fd] = handler

    def run(self) -> None:
        """Serve until the VM says that it is over, or is gone."""
        poll, handlers = self.epoll.poll, self.handlers
        while True:
            for fd, _events in poll():
                handlers[fd]()

    # --- queues ----------------------------------------------------------------------------------------------

    def interrupt(self, queue: int) -> None:
        """Tell the guest that a queue has news.  From the queue's own thread only."""
        self.raised[queue] = self.raised[queue] + 1 & 0xFFFFFFFF  # before the event: the guest looks at it then
        os.eventfd_write(self.host.calls[queue], 1)

    def on_kick(self, number: int, fd: int) -> None:
        """The guest notified, or there was more to do than one round's budget."""
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return
        self.serve(number)

    def serve(self, number: int) -> None:
        """Let the device work on a queue; come back later for what exceeds its budget."""
        if not self.running or number >= len(self.queues) or self.queues[number] is None:
            return
        try:
            if self.device.on_notify(number):
                os.eventfd_write(self.host.kicks[number], 1)
        except GuestError as error:
            self.needs_reset(str(error))

    def needs_reset(self, text: str) -> None:
        """Stop serving a driver that broke its rings, and say so."""
        self.running = False
        self.tell(devmsg.TYPE.pack(devmsg.NEEDS_RESET) + text.encode()[:500])

    def on_resample(self) -> None:
        """The guest ended an INTx interrupt: raise it again for what it has not seen."""
        try:
            os.eventfd_read(devmsg.FD_RESAMPLE)
        except BlockingIOError:
            return
        for number, call in enumerate(self.host.calls):
            if self.raised[number] != self.seen[number]:
                os.eventfd_write(call, 1)
                return

    # --- the VM ------------------------------------------------------------------------------------------------

    def tell(self, packet: bytes) -> None:
        """Inform the VM; if it does not listen, it will end us soon."""
        try:
            self.informs.send(packet)
        except OSError:
            return

    def ready(self) -> bytes:
        """Return READY with what the device is now."""
        return devmsg.READY_HEAD.pack(devmsg.READY, self.device.features, len(self.device.config)) + self.device.config

    def on_inform(self) -> None:
        """Take a message of the async channel."""
        packet = self.informs.recv(devmsg.PACKET_MAX)
        kind = devmsg.TYPE.unpack_from(packet)[0] if packet else devmsg.SHUTDOWN
        if kind == devmsg.SHUTDOWN:
            self.end()
        elif kind == devmsg.VERBOSITY:
            log.verbosity = devmsg.VERBOSITY_BODY.unpack(packet)[1]

    def on_sync(self) -> None:
        """Answer a question."""
        packet = self.sync.recv(devmsg.PACKET_MAX)
        if not packet:
            self.end()
        kind = devmsg.TYPE.unpack_from(packet)[0]
        status = 0
        if kind == devmsg.ACTIVATE:
            status = self.activate(packet)
        elif kind in (devmsg.RESET, devmsg.PAUSE):
            self.running = False
            self.device.quiesce()
            if kind == devmsg.RESET:
                self.queues = []
        elif kind == devmsg.RESUME:
            self.running = bool(self.queues)
            self.look_at_all()
        elif kind == devmsg.CONFIG_WRITE:
            _, offset, length = devmsg.CONFIG_WRITE_HEAD.unpack_from(packet)
            self.device.write_config(offset, packet[devmsg.CONFIG_WRITE_HEAD.size :][:length])
            self.sync.send(self.ready())
            return
        elif kind == devmsg.EXPORT:
            rows = [self.export(queue) for queue in self.queues]
            self.sync.send(devmsg.EXPORT_HEAD.pack(kind, len(rows)) + b"".join(rows))
            return
        else:
            raise ValueError(f"unknown question {kind}")
        self.sync.send(devmsg.STATUS.pack(kind, status))

    def activate(self, packet: bytes) -> int:
        """Take the rings of a driver; 1 if one of them cannot be used."""
        _, features, count = devmsg.ACTIVATE_HEAD.unpack_from(packet)
        queues: list[Queue | None] = []
        try:
            for number in range(count):
                start = devmsg.ACTIVATE_HEAD.size + number * devmsg.QUEUE.size
                size, enabled, _, desc, avail, used, next_avail, next_used = devmsg.QUEUE.unpack_from(packet, start)
                queue = Queue(self.memory, features, size, desc, avail, used, next_avail, next_used)
                queues.append(queue) if enabled else queues.append(None)
        except GuestError as error:
            self.complaints.warn(str(error))
            return 1
        self.queues = queues
        self.device.activate(features, queues)
        self.running = True
        self.look_at_all()
        return 0

    @staticmethod
    def export(queue: Queue | None) -> bytes:
        """Return a queue's indices for a stream."""
        if queue is None:
            return bytes(devmsg.QUEUE.size)
        return devmsg.QUEUE.pack(queue.size, 1, 0, 0, 0, 0, queue.next_avail, queue.next_used)

    def look_at_all(self) -> None:
        """Serve every queue as if it had been notified: it may have been before we could hear it."""
        for kick in self.host.kicks:
            os.eventfd_write(kick, 1)

    def end(self) -> None:
        """Flush and exit."""
        self.device.close()
        sys.exit(0)


def main(confinement: Confinement, make: "Callable[[Host, Callable[[int], None]], Device]") -> None:
    """Run a device process.  `make(host, interrupt)` opens the resource and returns the device.

    A failure of `make` is told to the VM with its errno and sentence.
    """
    sync = _socket.socket(fileno=devmsg.FD_SYNC)
    host = Host(sync)
    process: Process | None = None

    def interrupt(queue: int) -> None:
        assert process is not None
        process.interrupt(queue)

    confine(confinement)
    try:
        device = make(host, interrupt)
        memory = GuestMemory.attach(devmsg.FD_MEMORY, host.regions)
    except (VmdError, OSError) as error:
        number = getattr(error, "errno", None) or errno.EIO
        report = devmsg.ERROR_HEAD.pack(devmsg.ERROR, number) + str(error).encode()[:1000]
        sync.send(report)
        sys.exit(1)
    process = Process(sync, host, device, memory)
    gc.collect()
    gc.freeze()
    sync.send(process.ready())
    process.tell(process.ready())
    process.run()
