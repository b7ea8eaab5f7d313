"""A virtio block device (virtio 1.2, 5.2; *cat. 6.4*): the ring on one thread, slow requests on others.

The main thread owns the queue: it takes requests, and gives them back.  It carries out itself the requests that the
page cache can answer, because handing a request to a thread costs more than a read of 4 KiB.  Requests that may wait
for storage go to workers: flushes, discards, large transfers, and all transfers for a while after one was slow.
"""

import _thread
import errno
import posix as os
import select
import time
from _queue import SimpleQueue
from struct import Struct

from vmd.devices.bucket import Bucket, Throttled
from vmd.devices.process import QUIESCE_TIMEOUT_S
from vmd.devices.vioblk import request as requests
from vmd.devices.vioblk.handover import HandOver
from vmd.devices.vioblk.request import HEADER, REQUEST_MAX_BYTES, Limits, Request, carry_out, parse
from vmd.errors import GuestError, HostError
from vmd.eventfd import eventfd
from vmd.images.hostfile import DataLost, FlushFailed
from vmd.images.raw import RawImage
from vmd.ipc import devmsg
from vmd.log import RateLimit, log
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread
from vmd.units import IOV_MAX, SECTOR
from vmd.virtio import spec
from vmd.virtio.queue import DESC, U16

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.images.image import Image
    from vmd.virtio.queue import Queue

    # Request, status, bytes written to the guest, failure, and whether it has flushed.
    Done = tuple[Request, int, int, OSError | None, bool]

    class Services(Protocol):
        """The part of `process.Process` that is used here."""

        figures: memoryview

        def interrupt(self, queue: int) -> None:
            """Interrupt the guest."""

        def watch(self, fd: int, handler: Callable[[], None]) -> None:
            """Call `handler` when `fd` is readable."""

        def serve(self, number: int) -> None:
            """Serve a queue as if notified."""

        def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
            """Set the timer."""

        def report(self, *troubles: str) -> None:
            """Tell the VM the present problems."""

        def tell_config(self) -> None:
            """Tell the VM the new configuration space."""

        def changed(self, error: OSError | None = None) -> None:
            """Tell the VM that the size has changed, or the error."""

        def lock_lost(self, why: str) -> None:
            """Tell the VM to pause: somebody else may have the image.  On any thread."""


QUEUE_SIZE = 256
SEG_MAX = QUEUE_SIZE - 2
# Requests are served in rounds.  At the end of a round the guest is interrupted; it takes the answers while the next
# round is served.
ROUND = 8  # requests; with 4 the interrupts cost more than they gain, with 16 the guest waits
ROUND_BYTES = 1 << 20  # a round ends early after this number of bytes
ROUNDS = 8  # at most, for each wake-up
INLINE_MAX = 1 << 20  # bytes of the largest transfer that the main thread carries out itself
LONG = 8  # from more descriptors on, an indirect table is read with an iterator
OURS = -1  # the head of a request that this process makes itself
CHECK_LOCK_S = 10.0  # time between two checks of the lock
LOST_LOCK_S = 1.0  # the same after the lock was lost, until the image's mark is known
WORKERS_MAX = 16  # threads, and so the most requests that can wait for storage at a time
IN_FLIGHT_MAX_BYTES = 32 << 20  # with the workers; further requests stay in the ring, so that a pause ends in time

# A transfer on the main thread that took longer than SLOW_S had to wait for storage.  For PENALTY times as long,
# workers get all transfers: so the main thread loses less than 1/PENALTY of its time to waiting.
SLOW_S = 0.002
PENALTY = 20

CONFIG_BYTES = 60
CAPACITY, SEG_MAX_AT, BLK_SIZE, WRITEBACK, DISCARD_AT = 0, 12, 20, 32, 36
CAPACITY_FIELD, FIELD = Struct("<Q"), Struct("<I")

NEXT, WRITE, INDIRECT = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT
WORKS, FAILS, LOST = range(3)  # state of flushes: they work; they fail; one failed, and data was lost
OK, IOERR, UNSUPP = spec.VIRTIO_BLK_S_OK, spec.VIRTIO_BLK_S_IOERR, spec.VIRTIO_BLK_S_UNSUPP

# Places of figures (devmsg.FIGURES).  COUNTED has for each type of request the places of their number, of their bytes
# (None: the type has none) and of their time.
FIGURES = {name: place for place, name in enumerate(devmsg.FIGURES["vioblk"])}
READS, READ_BYTES, READ_NS = FIGURES["read_requests"], FIGURES["read_bytes"], FIGURES["read_ns"]
WRITES, WRITE_BYTES, WRITE_NS = FIGURES["write_requests"], FIGURES["write_bytes"], FIGURES["write_ns"]
ERRORS, REFUSED, BUSY_NS = FIGURES["errors"], FIGURES["refused"], FIGURES["busy_ns"]
IN_FLIGHT, SIZE = FIGURES["in_flight"], FIGURES["size_bytes"]
COUNTED = {
    spec.VIRTIO_BLK_T_IN: (READS, READ_BYTES, READ_NS),
    spec.VIRTIO_BLK_T_OUT: (WRITES, WRITE_BYTES, WRITE_NS),
    spec.VIRTIO_BLK_T_FLUSH: (FIGURES["flush_requests"], None, FIGURES["flush_ns"]),
    spec.VIRTIO_BLK_T_DISCARD: (FIGURES["discard_requests"], FIGURES["discard_bytes"], FIGURES["discard_ns"]),
    spec.VIRTIO_BLK_T_WRITE_ZEROES: (FIGURES["zero_requests"], FIGURES["zero_bytes"], FIGURES["zero_ns"]),
}


class Workers:
    """Threads that carry out jobs, and an eventfd that says when one is done.

    A thread is started when there is a job and no idle thread, up to `most`.  Many disks never need a second thread.
    """

    def __init__(self, most: int) -> None:
        """Raises HostError if the first thread cannot be started."""
        self.jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.done = eventfd()
        self.missing = most - 1
        # An entry for each idle thread that no submitted job counts on.  Only atomic methods of the list are used.
        self.idle: list[None] = [None]
        start_thread("io", lambda: _thread.start_new_thread(self._work, ()))

    def submit(self, job: "Callable[[], None]") -> None:
        """Have a worker call `job`, which must not raise.  Called on one thread only."""
        if self.idle:
            self.idle.pop()
        elif self.missing:
            self.missing -= 1
            try:
                start_thread("io", lambda: _thread.start_new_thread(self._work, ()))
            except HostError:  # go on with the threads that exist
                self.missing = 0
        self.jobs.put(job)

    def _work(self) -> None:
        name_thread("io")
        get, done, rest = self.jobs.get, self.done, self.idle.append
        while True:
            get()()
            rest(None)  # before the event, so that the main thread then finds this thread idle
            os.eventfd_write(done, 1)


class Vioblk:
    """A disk."""

    def __init__(self, image: "Image", services: "Services", workers: Workers, *, serial: bytes = b"vioblk0") -> None:
        """Take ownership of the image.  `serial` answers GET_ID."""
        self.image = image
        self.hand_over = HandOver(image)
        self.services = services
        self.workers = workers
        self.serial = serial.ljust(spec.VIRTIO_BLK_ID_BYTES, b"\0")
        self.size = image.size // SECTOR * SECTOR
        self.features = 1 << spec.VIRTIO_BLK_F_SEG_MAX | 1 << spec.VIRTIO_BLK_F_BLK_SIZE | 1 << spec.VIRTIO_BLK_F_FLUSH
        if image.writable:
            self.features |= 1 << spec.VIRTIO_BLK_F_CONFIG_WCE | 1 << spec.VIRTIO_BLK_F_DISCARD
            self.features |= 1 << spec.VIRTIO_BLK_F_WRITE_ZEROES
        else:
            self.features |= 1 << spec.VIRTIO_BLK_F_RO
        self.space = bytearray(CONFIG_BYTES)
        self._fill_config()
        self.complaints = RateLimit()
        self.queue: Queue | None = None
        self.limits = Limits(self.size, writable=image.writable)
        self.negotiated = 0
        self.write_through = True
        self.finished: list[Done] = []  # appended to by workers
        self.trouble: BaseException | None = None  # of a thread; the main thread raises it, which ends the process
        self.in_flight = 0
        self.in_flight_bytes = 0
        self.cancelled = False
        self.stalled = False  # requests were left in the ring because enough are in flight
        self.round = ROUND
        self.round_bytes = 0  # bytes of the last round
        self.requests_limit: Bucket | None = None
        self.bytes_limit: Bucket | None = None
        self.throttled = Throttled(services.figures, FIGURES["throttled"])
        self.unflushed: list[tuple[Request, int, int]] = []  # written in write-through mode, and not flushed yet
        self.pauses = 0  # counts `quiesce` and `settle_ahead`: each asks for a new flush by the next `settle`
        self.settling: int | None = None  # while a flush of our own is in flight: `pauses` when it began
        self.settled = (0, False)  # of the last flush of our own: `pauses` when it began, and whether it succeeded
        self.workers_until_s = 0.0  # until then workers get all transfers
        self.grown: list[OSError | None] = []  # results of `_grow`, appended by a worker
        self.lock_trouble = ""  # why the lock is lost, as the thread `lock` has found
        self.lock_reported = ""  # `lock_trouble` as it was last reported
        self.flushing = WORKS
        self.fd = image.fd if isinstance(image, RawImage) else -1
        self.nowait = os.RWF_NOWAIT
        self.flush_trouble = ""
        self.figures = services.figures
        self.figures[SIZE] = self.size
        self.counts = [0] * len(FIGURES)  # a copy of the figures, because adding to a list is cheaper
        self.now_ns = 0  # start of the rounds that are not counted yet
        self.busy_ns = 0  # busy time is counted up to here
        # Transfers of the main thread that are not counted yet:
        self.reads = self.read_bytes = self.writes = self.write_bytes = 0
        services.watch(workers.done, self.on_done)
        if image.remark:
            self._report()

    # --- configuration ---------------------------------------------------------------------------------------

    def _fill_config(self) -> None:
        """Write the configuration space (5.2.4)."""
        self._set(CAPACITY, CAPACITY_FIELD, self.size // SECTOR)
        self._set(SEG_MAX_AT, FIELD, SEG_MAX)
        self._set(BLK_SIZE, FIELD, SECTOR)
        self.space[WRITEBACK] = 1
        if self.image.writable:
            # Maxima that are multiples of the alignment: a driver that cuts a long range by them keeps it aligned.
            alignment = self.image.discard_granularity // SECTOR
            limits = (
                requests.DISCARD_MAX_SECTORS // alignment * alignment,
                requests.DISCARD_MAX_RANGES,
                alignment,
                requests.WRITE_ZEROES_MAX_SECTORS // alignment * alignment or requests.WRITE_ZEROES_MAX_SECTORS,
                requests.WRITE_ZEROES_MAX_RANGES,
                1,  # a range of zeroes may be unmapped
            )
            for place, value in enumerate(limits):
                self._set(DISCARD_AT + FIELD.size * place, FIELD, value)

    def _set(self, at: int, field: Struct, value: int) -> None:
        """Set a field of the configuration space."""
        self.space[at : at + field.size] = field.pack(value)

    @property
    def config(self) -> bytes:
        """The configuration space as it is now."""
        return bytes(self.space)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a write.  Only `writeback` can be written, and only by a driver that accepted CONFIG_WCE (5.2.5).

        A write before negotiation is undone by `activate` if the driver did not accept CONFIG_WCE.
        """
        known = self.features if self.queue is None else self.negotiated
        if known >> spec.VIRTIO_BLK_F_CONFIG_WCE & 1 and offset <= WRITEBACK < offset + len(data):
            self.space[WRITEBACK] = data[WRITEBACK - offset] & 1
            if self.queue is not None:
                self._choose_mode()

    def _choose_mode(self) -> None:
        """Decide when a write is done: when the host has it, or when storage has it (5.2.6.2)."""
        before = self.write_through
        flush = bool(self.negotiated >> spec.VIRTIO_BLK_F_FLUSH & 1)
        self.write_through = not (flush and self.space[WRITEBACK])
        if self.write_through and not before and self.settling is None:
            # Writes that were acknowledged before may not be lost from now on.  If a flush of our own is in flight,
            # none is added: the driver does not wait for them, so nothing would bound their number.
            self._flush_for_ourselves()

    def _flush_for_ourselves(self) -> None:
        self.settling = self.pauses
        if not self.in_flight:
            self.busy_ns = time.monotonic_ns()
        self._hand_over(Request(OURS, spec.VIRTIO_BLK_T_FLUSH, 0))

    def settle(self) -> int:
        """Begin to bring acknowledged writes to stable storage, unless that is done; return one of devmsg.SETTLED*.

        A flush may take longer than an answer is allowed to.  The VM asks again while the answer is SETTLED_NOT_YET.
        """
        if not self.image.writable:
            return devmsg.SETTLED
        pauses, succeeded = self.settled
        if pauses == self.pauses:
            if succeeded:
                return devmsg.SETTLED
            self.settled = (0, False)  # the next call tries again
            return devmsg.SETTLED_FAILED
        if self.settling is None:
            self._flush_for_ourselves()
        return devmsg.SETTLED_NOT_YET

    def settle_ahead(self) -> None:
        """Have the next `settle` flush again, even without a pause since the last flush."""
        self.pauses += 1

    # --- size ------------------------------------------------------------------------------------------------

    def resize(self, size: int) -> None:
        """Make the disk larger, on a worker: the new size must be on stable storage before the guest is told."""
        self.workers.submit(lambda: self._grow(size))

    def _grow(self, size: int) -> None:
        """Make the image larger; on a worker's thread."""
        failure: OSError | None = None
        try:
            self.image.grow(size)
        except OSError as error:
            failure = error
        except BaseException as error:  # `_collect` raises it on the main thread, where it ends the process
            self.trouble = error
        self.grown.append(failure)

    def _note_size(self, failure: OSError | None) -> None:
        """Tell guest and VM the new size; after a failure tell the VM the error."""
        if failure is None:
            self.size = self.limits.size = self.image.size // SECTOR * SECTOR
            self._set(CAPACITY, CAPACITY_FIELD, self.size // SECTOR)
            self.figures[SIZE] = self.size
            self.services.tell_config()
            self._report()
        self.services.changed(failure)

    # --- the lock ----------------------------------------------------------------------------------------------

    def watch_lock(self) -> None:
        """Start the thread that checks whether we still have the lock.  Raises HostError.

        It needs a thread of its own: all others, including the main thread, may wait for storage that hangs.
        """
        if self.image.writable:
            start_thread("lock", lambda: _thread.start_new_thread(self._watch_lock, ()))

    def _watch_lock(self) -> None:
        """Check the lock periodically.  While it is lost, tell the VM at each check.  Runs on the thread `lock`."""
        name_thread("lock")
        wait = select.poll().poll
        try:
            while True:
                wait(round((CHECK_LOCK_S if self.hand_over.settled else LOST_LOCK_S) * 1000))
                why = self.hand_over.check()
                if why and why != self.lock_trouble:
                    log.error(self._named(why))
                if why:
                    self.services.lock_lost(why)
                if why != self.lock_trouble:
                    self.lock_trouble = why
                    os.eventfd_write(self.workers.done, 1)
        except BaseException as error:  # `_collect` raises it on the main thread, where it ends the process
            self.trouble = error
            os.eventfd_write(self.workers.done, 1)

    def _note_lock(self) -> None:
        """Report a change: the lock is lost, or it is ours again."""
        if self.lock_trouble != self.lock_reported:
            self.lock_reported = self.lock_trouble
            self._report()

    def take_back(self) -> int:
        """Take the lock again after it was let go or lost.  Returns one of devmsg.TAKEN_*."""
        taken = self.hand_over.take_back()
        if taken in devmsg.HAVE:
            self.lock_trouble = ""
            self._note_lock()
        return taken

    # --- limits ------------------------------------------------------------------------------------------------

    def limit(self, requests: int, rate: int) -> None:
        """Limit the requests and the bytes (`rate`) that are served each second; 0: no limit."""
        self.requests_limit = Bucket(requests) if requests else None
        self.bytes_limit = Bucket(rate) if rate else None
        if not requests:
            self.round = ROUND
        waited = self.throttled.now
        self.throttled.end()
        if waited:
            self.services.serve(0)

    def _must_wait(self, queue: "Queue") -> bool:
        """Return whether the requests in the ring have to wait for a limit.  If so, the timer serves them later."""
        wait_s = 0.0
        if self.requests_limit is not None:
            wait_s = self.requests_limit.wait_s()
            self.round = max(1, min(ROUND, int(self.requests_limit.level)))
        if self.bytes_limit is not None:
            wait_s = max(wait_s, self.bytes_limit.wait_s())
        if not wait_s or not queue.available():
            self.throttled.end()
            return False
        self.throttled.begin()
        queue.suppress()
        self.services.call_after(wait_s, lambda: self.services.serve(0))
        return True

    def _pay(self, requests: int) -> None:
        """Take the requests and bytes of a round from the limits' buckets."""
        if self.requests_limit is not None:
            self.requests_limit.take(requests)
        if self.bytes_limit is not None:
            self.bytes_limit.take(self.round_bytes)

    # --- life --------------------------------------------------------------------------------------------------

    def activate(self, features: int, queues: "list[Queue | None]") -> None:
        """Take the ring."""
        self.queue = queues[0] if queues else None
        self.negotiated = features
        self.cancelled = self.stalled = False
        if not features >> spec.VIRTIO_BLK_F_CONFIG_WCE & 1:
            self.space[WRITEBACK] = 1
        self.limits.discard = bool(features >> spec.VIRTIO_BLK_F_DISCARD & 1)
        self.limits.write_zeroes = bool(features >> spec.VIRTIO_BLK_F_WRITE_ZEROES & 1)
        self.write_through = True
        self._choose_mode()

    def quiesce(self, *, forget: bool) -> None:
        """Wait until the guest's requests end.  With `forget`, workers skip requests that they have not begun.

        A flush of our own touches no ring, so it is not waited for.

        Raises:
            HostError: a request does not end in time.
        """
        self.cancelled = forget
        deadline_s = time.monotonic() + QUIESCE_TIMEOUT_S
        wait = select.poll()
        wait.register(self.workers.done, select.POLLIN)
        self._collect()
        while self.in_flight > (self.settling is not None):
            if time.monotonic() > deadline_s:
                raise HostError(f"{self.image.path}: requests did not end in {QUIESCE_TIMEOUT_S:.0f} s", errno.EIO)
            if wait.poll(100):
                os.eventfd_read(self.workers.done)
                self._collect()
        self._announce()
        self.throttled.end()
        self.stalled = False  # no request is in flight any more whose end would make `on_done` serve the ring
        self.pauses += 1
        if forget:
            self.queue = None
            self.cancelled = False
            self.space[WRITEBACK] = 1

    def close(self) -> None:
        """Flush and close the image.  If the flush fails, the close of a qcow2 image tries once more."""
        if self.hand_over.lost:
            log.error(self._named("is not flushed, because its lock is lost"))
            return
        said = ""
        for step in (self.image.flush, self.image.close):
            try:
                step()
            except OSError as error:
                text = self._named(error.strerror or str(error))
                if text != said:
                    log.error(f"close: {text}")
                said = text

    def complain(self, what: str, error: OSError) -> None:
        """Log an error of the host, at a limited rate, because a guest can cause it."""
        self.complaints.warn(f"{what}: {self._named(error.strerror or str(error))}")

    def _named(self, text: str) -> str:
        """Return the sentence with the image's path in front, unless it names the path already."""
        return text if self.image.path in text else f"{self.image.path}: {text}"

    def _note_flush(self, failure: FlushFailed | None) -> None:
        """Log each change between flushes that work and flushes that fail.  No rate limit: data is at stake."""
        state = WORKS if failure is None else LOST if isinstance(failure, DataLost) else FAILS
        if state == self.flushing:
            return
        self.flushing = state
        if failure is None:
            self.flush_trouble = ""
            log.warn(self._named("flush works again, and nothing was lost"))
        else:
            text = failure.strerror or str(failure)
            log.error(f"flush fails: {self._named(text)}")
            self.flush_trouble = f"flush fails: {text.removeprefix(f'{self.image.path}: ')}"
        self._report()

    def _report(self) -> None:
        """Report everything that is wrong with the disk now."""
        self.services.report(*(text for text in (self.lock_reported, self.flush_trouble, self.image.remark) if text))

    # --- the ring ------------------------------------------------------------------------------------------------

    def on_notify(self, _number: int) -> bool:
        """Serve up to ROUNDS rounds of requests; return whether requests may be left."""
        queue = self.queue
        if queue is None:
            return False
        self.now_ns = time.monotonic_ns()
        if not self.in_flight:
            self.busy_ns = self.now_ns
        limited = self.requests_limit is not None or self.bytes_limit is not None
        counted = 0
        try:
            for number in range(1, ROUNDS + 1):
                if limited and self._must_wait(queue):
                    return False
                before = queue.next_avail
                more = self._drain(queue)
                if limited:
                    self._pay(queue.next_avail - before & 0xFFFF)
                # Figures are stored once for several rounds, and before the guest is told of the last one.
                if not more or self.stalled or number == ROUNDS or limited:
                    self._count_rounds(number - counted)
                    counted = number
                self._announce()
                if self.stalled:
                    return False  # `on_done` serves the rest
                if not more and not queue.rearm():
                    return False
        finally:  # also when the ring turns out to be broken
            if self.unflushed:
                self._flush_batch()
            if self.reads or self.writes:
                self._count_rounds(1)
            self._announce()
        return True

    def _count_rounds(self, rounds: int) -> None:
        """Count the main thread's transfers of the last `rounds` rounds.  Each counts as long as one round took."""
        figures, counts, now_ns = self.figures, self.counts, time.monotonic_ns()
        took_ns = (now_ns - self.now_ns) // rounds
        if self.reads:
            figures[READS] = counts[READS] = counts[READS] + self.reads
            figures[READ_BYTES] = counts[READ_BYTES] = counts[READ_BYTES] + self.read_bytes
            figures[READ_NS] = counts[READ_NS] = counts[READ_NS] + self.reads * took_ns
            self.reads = self.read_bytes = 0
        if self.writes:
            figures[WRITES] = counts[WRITES] = counts[WRITES] + self.writes
            figures[WRITE_BYTES] = counts[WRITE_BYTES] = counts[WRITE_BYTES] + self.write_bytes
            figures[WRITE_NS] = counts[WRITE_NS] = counts[WRITE_NS] + self.writes * took_ns
            self.writes = self.write_bytes = 0
        figures[BUSY_NS] = counts[BUSY_NS] = counts[BUSY_NS] + now_ns - self.busy_ns
        figures[IN_FLIGHT] = self.in_flight
        self.now_ns = self.busy_ns = now_ns

    def _count(self, request: Request, status: int, now_ns: int) -> None:
        """Count a request that is given back."""
        if status == IOERR:
            self._add(ERRORS, not self.cancelled)
        elif status == UNSUPP:
            self._add(REFUSED, 1)
        elif request.kind in COUNTED:
            requests, length, took_ns = COUNTED[request.kind]
            self._add(requests, 1)
            self._add(took_ns, now_ns - request.begun_ns)
            if length is not None:
                ranges = request.ranges
                self._add(length, sum([each[1] for each in ranges]) if ranges else request.length)

    def _add(self, figure: int, value: int) -> None:
        """Add `value` to a figure."""
        self.counts[figure] += value
        self.figures[figure] = self.counts[figure]

    def _drain(self, queue: "Queue") -> bool:
        """Take requests and serve them or hand them to workers; return whether some are left.

        This is the hot loop.  It handles reads and writes in the form in which drivers send them: a header of
        16 bytes, data, a status byte, each in descriptors of its own, chained or indirect, all in memory and within
        the disk.  Any other chain, valid or not, goes to `Queue.walk` and `parse`, which begin again at its head.
        """
        memory = queue.memory
        raw, ranges = memory.memory, memory.ranges
        table, ring, mask, table_size = queue.desc, queue.avail + 4, queue.mask, queue.size
        indirect, disk_size, writable_disk = queue.indirect, self.size, self.image.writable
        descriptor, word, header = DESC.unpack_from, U16.unpack_from, HEADER.unpack_from
        rows = DESC.iter_unpack
        put = queue.put
        budget_bytes = ROUND_BYTES
        waiting = queue.available()
        left = min(waiting, self.round)
        more = waiting > left
        reads = read_bytes = writes = write_bytes = 0
        done_at_once = not self.write_through
        try:
            while left:
                if self.in_flight_bytes >= IN_FLIGHT_MAX_BYTES:
                    self.stalled = True
                    return True
                if self.in_flight + len(self.unflushed) > table_size:  # not `>=`: a flush of our own may be in flight
                    raise GuestError(f"more than {table_size} requests in a queue of {table_size}")
                left -= 1
                head = word(raw, ring + 2 * (queue.next_avail & mask))[0]
                base, size = table, table_size
                views: list[memoryview] = []
                total = 0
                status = -1
                while head < size:  # runs once; `break` leaves it, with `status` -1 if the form is not the usual one
                    gpa, length, flags, following = descriptor(raw, base + 16 * head)
                    if flags == INDIRECT and indirect and length & 15 == 0 and 48 <= length <= 16 * IOV_MAX:
                        for start, end, offset, _ in ranges:
                            if start <= gpa and gpa + length <= end:
                                base, size = offset + gpa - start, length >> 4
                                break
                        else:
                            break
                        gpa, length, flags, following = descriptor(raw, base)
                    if flags != NEXT or length != 16:
                        break
                    for start, end, offset, writable in ranges:  # noqa: B007 - the data is tried in the same region
                        if start <= gpa and gpa + 16 <= end:
                            kind, _, sector = header(raw, offset + gpa - start)
                            break
                    else:
                        break
                    if kind == 0:
                        data = NEXT | WRITE
                    elif kind == 1 and writable_disk:
                        data = NEXT
                    else:
                        break
                    steps = size - 1
                    if following == 1 and size > LONG and base != table and (writable or kind):
                        # Pages are scattered over memory, but their descriptors are adjacent: this loop takes most.
                        place = 1
                        for gpa, length, flags, following in rows(raw[base + 16 : base + 16 * size]):
                            if flags != data or following != place + 1 or gpa < start or gpa + length > end:
                                break
                            at = offset + gpa - start
                            views.append(raw[at : at + length])
                            total += length
                            place += 1
                        following, steps = place, size - place
                    while following < size and steps:
                        steps -= 1
                        gpa, length, flags, following = descriptor(raw, base + 16 * following)
                        if gpa < start or gpa + length > end:  # not in the region of the previous descriptor
                            for start, end, offset, writable in ranges:  # noqa: B007 - used behind the loop
                                if start <= gpa and gpa + length <= end:
                                    break
                            else:
                                break
                        at = offset + gpa - start
                        if flags == data and (writable or kind):
                            views.append(raw[at : at + length])
                            total += length
                        else:
                            if flags == WRITE and length == 1 and writable:
                                status = at
                            break
                    break
                disk_offset = sector * 512 if status >= 0 else 0
                behind = disk_offset + total
                if status < 0 or not total or total & 511 or total > REQUEST_MAX_BYTES or behind > disk_size:
                    budget_bytes -= self._serve_any(queue, head)
                    continue
                queue.next_avail = queue.next_avail + 1 & 0xFFFF
                budget_bytes -= total
                if total > INLINE_MAX:
                    self._hand_over_transfer(head, kind, status, disk_offset, views, total)
                elif kind == 0:
                    if self._read_now(disk_offset, views, total):
                        raw[status] = 0
                        put(head, total + 1)
                        reads += 1
                        read_bytes += total
                    else:
                        self._hand_over_transfer(head, kind, status, disk_offset, views, total)
                elif self._write_now(head, status, disk_offset, views, total):
                    if done_at_once:
                        writes += 1
                        write_bytes += total
                else:
                    self._hand_over_transfer(head, kind, status, disk_offset, views, total)
                if budget_bytes < 0:
                    return True
            return more
        finally:
            self.reads += reads
            self.read_bytes += read_bytes
            if writes:
                self.writes += writes
                self.write_bytes += write_bytes
            self.round_bytes = ROUND_BYTES - budget_bytes

    def _serve_any(self, queue: "Queue", head: int) -> int:
        """Serve a request of any form, the slow way; return the number of its bytes.  Raises GuestError."""
        chain = queue.walk(head)
        request = parse(chain, queue.memory, self.limits)
        queue.next_avail = queue.next_avail + 1 & 0xFFFF
        request.begun_ns = self.now_ns
        if request.refused or request.kind == spec.VIRTIO_BLK_T_GET_ID:
            status, written = carry_out(request, self.image, self.serial)
            self._count(request, status, self.now_ns)
            self._give_back(request, status, written)
        else:
            self._hand_over(request)
        return request.length

    # --- on the main thread --------------------------------------------------------------------------------------

    def _read_now(self, offset: int, views: list[memoryview], length: int) -> bool:
        """Read if that does not wait for storage; return whether everything was read."""
        if self.fd >= 0 and self.nowait:
            if len(views) > IOV_MAX:
                return False
            try:
                return os.preadv(self.fd, views, offset, self.nowait) == length
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    return False
                self.nowait = 0  # this file system does not know RWF_NOWAIT; measure the time instead
        begun_s = time.monotonic()
        if begun_s < self.workers_until_s:
            return False
        try:
            self.image.preadv(offset, views)
        except OSError:
            return False  # a worker tries again, and reports the error
        self._note_time(begun_s)
        return True

    def _write_now(self, head: int, status: int, offset: int, views: list[memoryview], length: int) -> bool:
        """Write, unless a transfer was slow a moment ago; return whether everything was written."""
        begun_s = time.monotonic()
        if begun_s < self.workers_until_s:
            return False
        try:
            self.image.pwritev(offset, views)
        except OSError:
            return False  # as above; writing twice does no harm
        self._note_time(begun_s)
        if self.write_through:
            request = Request(head, spec.VIRTIO_BLK_T_OUT, status)
            request.length, request.begun_ns = length, self.now_ns
            self.unflushed.append((request, OK, 1))
        else:
            queue = self.queue
            assert queue is not None
            queue.memory.memory[status] = OK
            queue.put(head, 1)
        return True

    def _note_time(self, begun_s: float) -> None:
        """After a slow transfer, leave the next ones to workers for a while."""
        now_s = time.monotonic()
        if now_s - begun_s > SLOW_S:
            self.workers_until_s = now_s + PENALTY * (now_s - begun_s)

    def _give_back(self, request: Request, status: int, written: int) -> None:
        """Put a finished request into the used ring; of a flush of our own, note the result."""
        queue = self.queue
        if request.head == OURS:
            assert self.settling is not None
            self.settled, self.settling = (self.settling, status == OK), None
        elif queue is not None:
            queue.memory.memory[request.status] = status
            queue.put(request.head, written)

    def _announce(self) -> None:
        """Publish the used ring; interrupt the guest if it wants that."""
        queue = self.queue
        if queue is not None:
            queue.publish()
            if queue.wants_interrupt():
                self.services.interrupt(0)

    # --- with the workers ------------------------------------------------------------------------------------------

    def _hand_over_transfer(
        self, head: int, kind: int, status: int, offset: int, views: list[memoryview], length: int
    ) -> None:
        request = Request(head, kind, status)
        request.offset, request.views, request.length = offset, views, length
        request.begun_ns = self.now_ns
        self._hand_over(request)

    def _hand_over(self, request: Request) -> None:
        """Have a worker carry out a request."""
        self.in_flight += 1
        self.in_flight_bytes += request.length
        flush = self.write_through
        self.workers.submit(lambda: self._work(request, flush=flush))

    def _flush_batch(self) -> None:
        """Have a worker flush.  After that the write-through writes of this wake-up are given back."""
        batch, self.unflushed = self.unflushed, []
        self.in_flight += len(batch)
        self.in_flight_bytes += sum(request.length for request, _, _ in batch)
        self.workers.submit(lambda: self._work_batch(batch))

    def _work(self, request: Request, *, flush: bool) -> None:
        """Carry out a request; on a worker's thread."""
        status, written, failure, flushed = IOERR, 1, None, False
        try:
            if not self.cancelled:
                status, written = carry_out(request, self.image, self.serial)
                if flush and request.kind in (spec.VIRTIO_BLK_T_OUT, spec.VIRTIO_BLK_T_WRITE_ZEROES):
                    self.image.flush()
                    flushed = True
                flushed |= request.kind == spec.VIRTIO_BLK_T_FLUSH
        except OSError as error:
            status, written, failure = IOERR, 1, error
        except BaseException as error:  # `_collect` raises it on the main thread, where it ends the process
            self.trouble = error
        self.finished.append((request, status, written, failure, flushed))

    def _work_batch(self, batch: "list[tuple[Request, int, int]]") -> None:
        """Flush once for all writes of a batch; on a worker's thread."""
        failure: OSError | None = None
        try:
            self.image.flush()
        except OSError as error:
            failure = error
        except BaseException as error:  # as above
            self.trouble = error
        for request, status, written in batch:
            self.finished.append((request, IOERR if failure else status, written, failure, failure is None))

    def on_done(self) -> None:
        """A worker or the thread `lock` has signalled: take the results, and serve the ring if it was stalled."""
        try:
            os.eventfd_read(self.workers.done)
        except BlockingIOError:
            return
        self._collect()
        self._announce()
        if self.stalled and self.in_flight_bytes < IN_FLIGHT_MAX_BYTES:
            self.stalled = False
            self.services.serve(0)

    def _collect(self) -> None:
        """Take the results of workers and of the thread `lock`; give finished requests back."""
        if self.trouble is not None:
            raise self.trouble
        while self.grown:
            self._note_size(self.grown.pop(0))
        self._note_lock()
        # Workers may append at any time.  Entries beyond `count` stay in the list for the next call.
        count = len(self.finished)
        batch, self.finished[:count] = self.finished[:count], []
        if not batch:
            return
        now_ns = time.monotonic_ns()
        for request, status, written, failure, flushed in batch:
            self.in_flight -= 1
            self.in_flight_bytes -= request.length
            if isinstance(failure, FlushFailed):
                self._note_flush(failure)
            elif flushed:
                self._note_flush(None)
            elif failure is not None:
                self.complain(f"request {request.kind}", failure)
            if request.head != OURS:
                self._count(request, status, now_ns)
            self._give_back(request, status, written)
        self._add(BUSY_NS, now_ns - self.busy_ns)
        self.figures[IN_FLIGHT] = self.in_flight
        self.busy_ns = now_ns
