"""The start-up that all device processes share: confinement, handshake, memory, loop.

Runs as  its VM's id, inside its VM's cell; standard library only; filtered before the first byte from outside is read
Peers    its VM process, on two channels (`ipc/devmsg.py` has messages and descriptor numbers)
Holds    guest memory, its queues' eventfds, and the descriptors of its one host resource
"""

import _socket
import errno
import gc
import mmap
import posix as os
import select
import sys
import time

from vmd.errors import GuestError, HostError, PeerError, VmdError, sentence
from vmd.eventfd import eventfd
from vmd.guestmem import GuestMemory, Region
from vmd.ipc import devmsg
from vmd.ipc.devfigures import take_slot
from vmd.log import FORMS, RateLimit, log
from vmd.privsep.confine import Confinement, confine, limit_memory
from vmd.privsep.title import set_title
from vmd.virtio.queue import FEATURES, Queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from struct import Struct
    from typing import Any, Protocol

    class AnyDevice(Protocol):
        """One kind of device.  Order of calls: open; then activate and quiesce, any number of times; then close.

        The process's main thread makes all calls.
        """

        @property
        def features(self) -> int:
            """The features of this kind of device.  The features of rings are added by `Process`."""

        @property
        def config(self) -> bytes:
            """The configuration space as it is now."""

        def activate(self, features: int, queues: list[Queue | None]) -> None:
            """Take the rings.  An entry is None for a queue that the driver does not use."""

        def quiesce(self, *, forget: bool) -> None:
            """Finish what is in flight; touch no ring until notified again.

            With `forget` the device is reset: it may drop requests that it has not begun, and it forgets the rings
            and the driver's writes to `config`.

            Raises:
                HostError: a request does not end in time; the process has to end.
            """

        def write_config(self, offset: int, data: bytes) -> None:
            """Take a write of the driver to `config`.  It may come before `activate`."""

        def close(self) -> None:
            """Bring all that was done to stable storage, and close the resource.  Called once, at the end."""

    class Device(AnyDevice, Protocol):
        """A device that is served on the main thread, between `activate` and `quiesce`."""

        def on_notify(self, number: int) -> bool:
            """Serve a queue, up to a budget; return whether there is more to do.

            Raises:
                GuestError: the driver broke the ring; the caller sends NEEDS_RESET.
            """

    class ThreadedDevice(AnyDevice, Protocol):
        """A device whose own threads wait for notifications and serve its queues.

        `quiesce` returns when none of them touches a ring any more.
        """

        def resume(self) -> None:
            """Let the threads go on, and look at every queue.  Called after `activate` and after a pause."""

PEER = "vm process"  # the peer that errors about the channels name
MEMORY_BESIDES_BYTES = 512 << 20  # limit besides the mapped guest memory; stacks of 16 threads are 128 MiB of it
# Less than devmsg.ANSWER_TIMEOUT_S, after which the VM ends this process without a reason: our sentence comes first.
QUIESCE_TIMEOUT_S = 9.0


def unpack(layout: "Struct", packet: bytes, at: int = 0) -> "tuple[Any, ...]":
    """Return the fields of the structure at `at`.  Raises PeerError if the packet is too short."""
    if len(packet) < at + layout.size:
        raise PeerError(PEER, f"message of {len(packet)} bytes is too short", packet)
    return layout.unpack_from(packet, at)


def exact(layout: "Struct", packet: bytes) -> "tuple[Any, ...]":
    """Return the fields of a packet that is one structure and nothing else.  Raises PeerError."""
    if len(packet) != layout.size:
        raise PeerError(PEER, f"message of {len(packet)} bytes instead of {layout.size}", packet)
    return layout.unpack(packet)


class Host:
    """The contents of START, and the descriptors that came with it."""

    def __init__(self, packet: bytes, fds: list[int]) -> None:
        """Raises PeerError if the packet is not a START."""
        head = unpack(devmsg.START_HEAD, packet)
        kind, verbosity, form, self.index, queues, resources, self.flags, regions, self.figures_slot = head
        if kind != devmsg.START or form >= len(FORMS):
            raise PeerError(PEER, "not a START message", packet)
        if queues > devmsg.QUEUES_MAX or resources > devmsg.RESOURCES_MAX or regions > devmsg.REGIONS_MAX:
            raise PeerError(PEER, f"START with {queues} queues, {resources} resources, {regions} regions", packet)
        self.verbosity = verbosity
        self.form = FORMS[form]
        self.regions = []
        self.net: tuple[Any, ...] | None = None  # the fields of devmsg.NET
        at = devmsg.START_HEAD.size
        for _ in range(regions):
            gpa, size, offset, flags = unpack(devmsg.REGION, packet, at)
            read_only = bool(flags & devmsg.REGION_READ_ONLY)
            try:
                self.regions.append(Region(gpa=gpa, size=size, name="ram", offset=offset, read_only=read_only))
            except ValueError as error:
                raise PeerError(PEER, str(error), packet) from None
            at += devmsg.REGION.size
        self.notes: list[int] = []  # one for each resource: bits of devmsg.RESOURCE_*
        for _ in range(resources):
            self.notes += unpack(devmsg.RESOURCE, packet, at)
            at += devmsg.RESOURCE.size
        self.host_name = ""
        if self.flags & devmsg.START_NET:
            self.net = unpack(devmsg.NET, packet, at)
            at += devmsg.NET.size
        self.serial = b""
        if self.flags & devmsg.START_SERIAL:
            (self.serial,) = unpack(devmsg.SERIAL, packet, at)
            at += devmsg.SERIAL.size
        self.title, *self.names = packet[at:].decode(errors="replace").split("\0")
        if self.net is not None and self.names:
            self.host_name = self.names.pop()
        if len(self.names) != resources:
            raise PeerError(PEER, f"START names {len(self.names)} of {resources} resources", packet)
        if len(fds) != 2 + resources:
            what = f"memory, figures and {resources} resources"
            raise PeerError(PEER, f"START with {len(fds)} descriptors for {what}", packet)
        self.memory_fd, self.figures_fd, *self.resources = fds
        first = devmsg.FD_FIRST_QUEUE
        self.kicks = list(range(first, first + queues))
        self.calls = list(range(first + queues, first + 2 * queues))


class Process:
    """A device process: its channels, its queues, and the loop.

    Devices use `host`, `memory`, `figures`, `interrupt`, `watch`, `call_after`, `serve` and `report`.  They use them on
    the main thread only, with two exceptions: the thread that owns a queue calls `interrupt` for it, and each figure is
    stored by one thread.
    """

    def __init__(self, sync: _socket.socket, informs: _socket.socket, host: Host, kind: str) -> None:
        """`kind` is one of devmsg.FIGURES.

        Raises PeerError, HostError or OSError if descriptors and memory are not as START describes them.
        """
        self.sync = sync
        self.informs = informs
        self.host = host
        self.device: Device
        try:
            self.memory = GuestMemory.attach(host.memory_fd, host.regions)
            self.slot = take_slot(host.figures_fd, host.figures_slot, kind, host.index)
        except ValueError as error:
            raise PeerError(PEER, str(error)) from None
        self.figures = self.slot[: len(devmsg.FIGURES[kind])]
        os.close(host.figures_fd)
        limit_memory(self.memory.mapped_bytes + len(self.memory.marks) + MEMORY_BESIDES_BYTES)
        words = memoryview(mmap.mmap(devmsg.FD_INTERRUPTS, mmap.PAGESIZE)).cast("I")
        self.raised = words[: devmsg.QUEUES_MAX]
        self.seen = words[devmsg.QUEUES_MAX : 2 * devmsg.QUEUES_MAX]
        self.queues: list[Queue | None] = []
        self.activations = 0
        self.passing: list[int] = []  # descriptors to send with the next answer; they stay open here
        self.asked = False  # the VM waits for an answer
        self.running = False  # the device has rings, is not paused, and the driver has not broken a ring
        self.paused = False
        self.broken = False
        self.complaints = RateLimit()
        self.troubles: tuple[str, ...] = ()
        self.announced = False  # READY has been sent
        self.timer: tuple[float, Callable[[], None]] | None = None
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self.watch(sync.fileno(), self.on_sync)
        self.watch(informs.fileno(), self.on_inform)
        self.watch(devmsg.FD_RESAMPLE, self.on_resample)
        self.watch_kicks()
        for fd in host.calls:
            os.fstat(fd)

    def watch(self, fd: int, handler: "Callable[[], None]", events: int = select.EPOLLIN) -> None:
        """Call `handler` whenever `fd` is readable, or has other events."""
        self.epoll.register(fd, events)
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`.  Its handler is still called for an event that epoll has already returned."""
        self.epoll.unregister(fd)

    def watch_kicks(self) -> None:
        """Watch the kick eventfds, which the guest's notifications make readable."""
        for number, fd in enumerate(self.host.kicks):
            self.watch(fd, lambda number=number, fd=fd: self.on_kick(number, fd))  # type: ignore[misc]

    def call_after(self, delay_s: float, handler: "Callable[[], None]") -> None:
        """Call `handler` once, after `delay_s`.  A process has one timer: a second call replaces the first."""
        self.timer = (time.monotonic() + delay_s, handler)

    def run(self) -> None:
        """Serve until the VM sends SHUTDOWN or closes a channel.  Never returns: `end` exits the process."""
        poll, handlers = self.epoll.poll, self.handlers
        while True:
            for fd, _events in poll(-1 if self.timer is None else max(0.0, self.timer[0] - time.monotonic())):
                handlers[fd]()
            if self.timer is not None and time.monotonic() >= self.timer[0]:
                _, handler = self.timer
                self.timer = None
                handler()

    # --- queues ----------------------------------------------------------------------------------------------

    def interrupt(self, queue: int) -> None:
        """Interrupt the guest for a queue.  Called by the thread that owns the queue only."""
        self.raised[queue] = self.raised[queue] + 1 & 0xFFFFFFFF  # before the event, upon which the guest reads ISR
        os.eventfd_write(self.host.calls[queue], 1)

    def on_kick(self, number: int, fd: int) -> None:
        """The guest notified the queue, or `serve` left work for the next round."""
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return
        self.serve(number)

    def serve(self, number: int) -> None:
        """Let the device serve a queue.  If work is left beyond its budget, kick the queue to come back."""
        if not self.running or number >= len(self.queues) or self.queues[number] is None:
            return
        try:
            if self.device.on_notify(number):
                os.eventfd_write(self.host.kicks[number], 1)
        except GuestError as error:
            self.needs_reset(str(error))

    def needs_reset(self, text: str) -> None:
        """Stop serving: the driver broke a ring.  Send NEEDS_RESET with the reason."""
        self.running = False
        self.broken = True
        self.tell(devmsg.NEEDS_RESET_HEAD.pack(devmsg.NEEDS_RESET, self.activations) + text.encode()[:500])

    def on_resample(self) -> None:
        """The guest ended an INTx interrupt: raise it again if a queue's interrupt is not acknowledged yet."""
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
        """Send a packet on the async channel.  If the VM does not read it, the VM soon ends this process."""
        try:
            self.informs.send(packet, _socket.MSG_DONTWAIT)
        except OSError:
            return

    def changed(self, error: OSError | None = None) -> None:
        """Answer RESIZE or DISC: done, or the error."""
        number = 0 if error is None else error.errno or errno.EIO
        text = "" if error is None else sentence(error)
        self.tell(devmsg.CHANGED_HEAD.pack(devmsg.CHANGED, number) + text.encode()[:1000])

    def tell_config(self) -> None:
        """Send CONFIG_CHANGED: the device has changed its configuration space."""
        self.tell(devmsg.TYPE.pack(devmsg.CONFIG_CHANGED) + self.ready()[devmsg.TYPE.size :])

    def report(self, *troubles: str) -> None:
        """Send TROUBLES: everything that is wrong with the device now.  No arguments: nothing is wrong."""
        self.troubles = troubles
        if self.announced:
            texts = [text.encode()[: devmsg.TROUBLE_MAX] for text in troubles[: devmsg.TROUBLES_MAX]]
            self.tell(devmsg.TYPE.pack(devmsg.TROUBLES) + b"\0".join(texts))

    def announce(self) -> None:
        """Send READY on the async channel, then the troubles that were reported before it."""
        self.tell(self.ready())
        self.announced = True
        if self.troubles:
            self.report(*self.troubles)

    def fail(self, error: Exception) -> None:
        """Send ERROR before this process ends: on async, and on sync too if the VM waits for an answer."""
        self.tell(error_packet(error))
        if self.asked:
            refuse(self.sync, error)

    def ready(self) -> bytes:
        """Return READY with the device's features and its configuration space as it is now."""
        device = self.device
        features = device.features | FEATURES
        return devmsg.READY_HEAD.pack(devmsg.READY, features, len(device.config)) + device.config

    def on_inform(self) -> None:
        """Take a message of the async channel."""
        self.take_inform(self.informs.recv(devmsg.PACKET_MAX))

    def take_inform(self, packet: bytes) -> None:
        """Act on a message of the async channel.  An empty packet, the end of the channel, counts as SHUTDOWN."""
        (kind,) = unpack(devmsg.TYPE, packet) if packet else (devmsg.SHUTDOWN,)
        handler = self.INFORMS.get(kind)
        if handler is None:
            raise PeerError(PEER, f"unknown message {kind}", packet)
        handler(self, packet)

    def on_shutdown(self, _packet: bytes) -> None:
        """The VM ends."""
        self.end()

    def on_verbosity(self, packet: bytes) -> None:
        """Set how much is logged."""
        log.verbosity = exact(devmsg.VERBOSITY_BODY, packet)[1]

    def on_sync(self) -> None:
        """Answer a question."""
        packet = self.sync.recv(devmsg.PACKET_MAX)
        if not packet:
            self.end()
        (kind,) = unpack(devmsg.TYPE, packet)
        answer = self.QUESTIONS.get(kind)
        if answer is None:
            raise PeerError(PEER, f"unknown question {kind}", packet)
        self.asked = True
        text = answer(self, packet)
        fds, self.passing = self.passing, []
        if fds:
            rights = b"".join(fd.to_bytes(4, "little") for fd in fds)
            self.sync.sendmsg([text], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        else:
            self.sync.send(text)
        self.asked = False

    def on_activate(self, packet: bytes) -> bytes:
        """Take the driver's rings.  The answer has status 1 if one of them cannot be used."""
        _, features, count = unpack(devmsg.ACTIVATE_HEAD, packet)
        if count > len(self.host.kicks) or len(packet) != devmsg.ACTIVATE_HEAD.size + count * devmsg.QUEUE.size:
            raise PeerError(PEER, f"rings for {count} queues", packet)
        self.activations = self.activations + 1 & 0xFFFFFFFF
        if self.queues:  # without queues there was a reset; `forget` would undo the driver's writes to `config` since
            self.forget()
        queues: list[Queue | None] = []
        try:
            for number in range(count):
                at = devmsg.ACTIVATE_HEAD.size + number * devmsg.QUEUE.size
                size, enabled, _, desc, avail, used, next_avail, next_used = unpack(devmsg.QUEUE, packet, at)
                if enabled:
                    queues.append(Queue(self.memory, features, size, desc, avail, used, next_avail, next_used))
                else:
                    queues.append(None)
        except GuestError as error:
            self.complaints.warn(str(error))
            return devmsg.STATUS.pack(devmsg.ACTIVATE, 1)
        self.queues = queues
        self.device.activate(features, queues)
        self.running = not self.paused  # a received machine is paused while its rings are activated
        self.look_at_all()
        return devmsg.STATUS.pack(devmsg.ACTIVATE, 0)

    def quiesce(self, *, forget: bool) -> None:
        """Stop the device: it touches no ring until it goes on."""
        self.running = False
        self.device.quiesce(forget=forget)
        if self.memory.marking:
            for queue in self.queues:
                if queue is not None:
                    queue.mark_used()

    def forget(self) -> None:
        """Return to the state before ACTIVATE."""
        self.quiesce(forget=True)
        self.queues = []
        self.broken = False

    def on_reset(self, packet: bytes) -> bytes:
        """The driver resets the device."""
        exact(devmsg.TYPE, packet)
        self.forget()
        self.paused = False
        return devmsg.STATUS.pack(devmsg.RESET, 0)

    def on_pause(self, packet: bytes) -> bytes:
        """Pause the device."""
        exact(devmsg.TYPE, packet)
        self.paused = True
        self.quiesce(forget=False)
        self.note_pause(paused=True)
        return devmsg.STATUS.pack(devmsg.PAUSE, 0)

    def on_resume(self, packet: bytes) -> bytes:
        """Let the device go on after a pause."""
        exact(devmsg.TYPE, packet)
        self.note_pause(paused=False)
        self.paused = False
        self.running = bool(self.queues) and not self.broken
        self.look_at_all()
        return devmsg.STATUS.pack(devmsg.RESUME, 0)

    def note_pause(self, *, paused: bool) -> None:
        """Called with True when the machine is paused and no request is in flight; with False when it goes on.

        For kinds of device that need to know; here it does nothing.
        """

    def on_config_write(self, packet: bytes) -> bytes:
        """The driver writes configuration space."""
        _, offset, length = unpack(devmsg.CONFIG_WRITE_HEAD, packet)
        data = packet[devmsg.CONFIG_WRITE_HEAD.size :]
        if len(data) != length:
            raise PeerError(PEER, f"write of {length} bytes brings {len(data)}", packet)
        self.device.write_config(offset, data)
        return self.ready()

    def on_export(self, packet: bytes) -> bytes:
        """Answer EXPORT: the indices of all queues, for a stream."""
        exact(devmsg.TYPE, packet)
        rows = [
            devmsg.QUEUE.pack(queue.size, 1, 0, 0, 0, 0, queue.next_avail, queue.next_used)
            if queue is not None
            else bytes(devmsg.QUEUE.size)
            for queue in self.queues
        ]
        return devmsg.EXPORT_HEAD.pack(devmsg.EXPORT, len(rows)) + b"".join(rows)

    def on_mark(self, packet: bytes) -> bytes:
        """Begin or stop to mark the pages that the device changes."""
        (kind,) = exact(devmsg.TYPE, packet)
        self.memory.marking = kind == devmsg.MARK
        return devmsg.STATUS.pack(kind, 0)

    INFORMS: "dict[int, Callable[[Any, bytes], None]]" = {
        devmsg.SHUTDOWN: on_shutdown,
        devmsg.VERBOSITY: on_verbosity,
    }
    QUESTIONS: "dict[int, Callable[[Any, bytes], bytes]]" = {
        devmsg.ACTIVATE: on_activate,
        devmsg.RESET: on_reset,
        devmsg.PAUSE: on_pause,
        devmsg.RESUME: on_resume,
        devmsg.CONFIG_WRITE: on_config_write,
        devmsg.EXPORT: on_export,
        devmsg.MARK: on_mark,
        devmsg.UNMARK: on_mark,
    }

    def look_at_all(self) -> None:
        """Kick every queue: the guest may have notified it while nobody served it."""
        for kick in self.host.kicks:
            os.eventfd_write(kick, 1)

    def end(self) -> None:
        """Finish what is in flight, close the device, and exit with 0."""
        self.running = False
        self.device.quiesce(forget=True)
        self.device.close()
        sys.exit(0)


class ThreadedProcess(Process):
    """A device process whose device has threads of its own for its queues.

    The device's threads call `interrupt`, `post` and `broke`.  Everything else is called on the main thread.
    """

    device: "ThreadedDevice"  # type: ignore[assignment] # nothing here calls on_notify: no kick is watched

    def __init__(self, sync: _socket.socket, informs: _socket.socket, host: Host, kind: str) -> None:
        super().__init__(sync, informs, host, kind)
        self.posts: list[Callable[[], None]] = []  # threads append; the main thread takes the first
        self.posted = eventfd()
        self.watch(self.posted, self.on_posted)

    def watch_kicks(self) -> None:
        """Watch no kick: the device's threads wait for them."""

    def look_at_all(self) -> None:
        """Let the threads go on, if the device has rings and is not paused."""
        if self.running:
            self.device.resume()

    def post(self, job: "Callable[[], None]") -> None:
        """Call `job` on the main thread, soon.  An exception of it ends the process."""
        self.posts.append(job)
        os.eventfd_write(self.posted, 1)

    def on_posted(self) -> None:
        """Call the jobs that threads have posted."""
        try:
            os.eventfd_read(self.posted)
        except BlockingIOError:
            return
        while self.posts:
            self.posts.pop(0)()

    def broke(self, text: str) -> None:
        """Called by a thread: the driver broke its ring, and the thread has stopped serving."""
        life = self.activations  # it does not change while a thread serves
        self.post(lambda: self.needs_reset(text) if life == self.activations and self.running else None)

    def needs_reset(self, text: str) -> None:
        """Stop all threads, then send NEEDS_RESET."""
        self.device.quiesce(forget=False)
        super().needs_reset(text)


def main(
    kind: str, confinement: Confinement, make: "Callable[[Any], Any]", process_class: type[Process] = Process
) -> int:
    """Run a device process.  `make(process)` opens the resource and returns the device; it may start threads.

    If the start fails, START is answered with ERROR: an errno and a sentence.
    """
    confine(confinement)
    sync = _socket.socket(fileno=devmsg.FD_SYNC)
    informs = _socket.socket(fileno=devmsg.FD_ASYNC)
    try:
        packet, fds = receive_start(sync)
        if not packet:
            return 1  # the VM closed the channel: it has no use for this process
        host = Host(packet, fds)
        set_title(host.title)
        log.setup(host.title, host.form, host.verbosity)
        process = process_class(sync, informs, host, kind)
        process.device = make(process)
    except (VmdError, OSError) as error:
        return refuse(sync, error)
    gc.collect()
    gc.freeze()
    try:
        sync.send(process.ready())
    except ConnectionError:
        return 1  # the VM has ended meanwhile
    process.announce()
    try:
        process.run()
    except (VmdError, OSError) as error:
        log.error(sentence(error))
        process.fail(error)
    return 1


def receive_start(sync: _socket.socket) -> tuple[bytes, list[int]]:
    """Return the first packet and the descriptors that came with it."""
    return receive_files(sync, 2 + devmsg.RESOURCES_MAX)


def receive_files(sock: _socket.socket, most: int) -> tuple[bytes, list[int]]:
    """Return a packet and the descriptors that came with it."""
    packet, rights, _, _ = sock.recvmsg(devmsg.PACKET_MAX, _socket.CMSG_SPACE(4 * most), _socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, data in rights:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            fds += memoryview(data[: len(data) & ~3]).cast("i")
    return packet, fds


def error_packet(error: Exception) -> bytes:
    """Return ERROR with the error's errno and sentence."""
    number = error.number if isinstance(error, HostError) else getattr(error, "errno", None) or 0
    return devmsg.ERROR_HEAD.pack(devmsg.ERROR, number) + sentence(error).encode()[:1000]


def refuse(sync: _socket.socket, error: Exception) -> int:
    """Answer with ERROR: the start or the VM's question has failed.  Returns the exit status."""
    try:
        sync.send(error_packet(error), _socket.MSG_DONTWAIT)
    except OSError:
        log.error(sentence(error))
    return 1
