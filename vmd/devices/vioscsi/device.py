"""A virtio SCSI controller (virtio 1.2, 5.6) with one CD-ROM drive: target 0, LUN 0.

Unlike vmd (*cat. 6.6*), this device accepts requests in descriptors of any layout, answers each request, and reports
the right number of written bytes and the right residual.
"""

import errno
import posix as os
import time
from io import SEEK_END
from struct import Struct

from vmd.devices.vioscsi.scsi import BAD_OPCODE, READ_ERROR, Drive, Reply, check_condition, sense_data
from vmd.errors import GuestError
from vmd.ipc import devmsg
from vmd.log import RateLimit
from vmd.units import IOV_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.virtio.queue import Chain, Queue

    class Services(Protocol):
        """The part of `process.Process` that is used here."""

        figures: memoryview

        def interrupt(self, queue: int) -> None:
            """Interrupt the guest."""


CONTROL, EVENT, REQUEST = 0, 1, 2  # queues (5.6.2)

# virtio_scsi_config (5.6.4): num_queues, seg_max, max_sectors, cmd_per_lun, event_info_size, sense_size, cdb_size,
# max_channel, max_target, max_lun.  The driver may write the two sizes.
CONFIG = Struct("<IIIIIIIHHI")
SIZES = Struct("<II")
SIZES_AT = 20
SENSE_SIZE, CDB_SIZE = 96, 32
SENSE_SIZE_MAX, CDB_SIZE_MAX = 1024, 255

REQUEST_HEAD = Struct("<8sQBBB")  # virtio_scsi_req_cmd: lun, id, task_attr, prio, crn; then the command block
RESPONSE = Struct("<IIHBB")  # sense_len, residual, status_qualifier, status, response; then the sense data
TYPE = Struct("<I")
TASK = Struct("<II8sQ")  # virtio_scsi_ctrl_tmf: type, subtype, lun, id
TASK_ANSWER = Struct("<B")
EVENTS = Struct("<I8sI")  # virtio_scsi_ctrl_an: type, lun, events
EVENTS_ANSWER = Struct("<IB")

T_TASK, T_QUERY_EVENTS, T_SUBSCRIBE_EVENTS = 0, 1, 2
CLEAR_ACA, I_T_NEXUS_RESET, LOGICAL_UNIT_RESET, TASK_LAST = 2, 4, 5, 7

S_OK = S_FUNCTION_COMPLETE = 0
S_OVERRUN = 1
S_BAD_TARGET = 3
S_FAILURE = 9
S_FUNCTION_REJECTED = 11
S_INCORRECT_LUN = 12

# Budget of one wake-up, in bytes.  Each descriptor counts as bytes too, since a request of many costs time by itself.
BUDGET = 8 << 20
DESCRIPTOR_COST = 2048
PIECE = 1 << 20  # bytes of one preadv
COMMANDS, READS, READ_BYTES, ERRORS, BUSY_NS, SIZE = range(len(devmsg.FIGURES["vioscsi"]))


class Vioscsi:
    """The controller.  `fd` is the disc, or None.  The controller owns it."""

    features = 0

    def __init__(self, services: "Services", fd: int | None) -> None:
        self.services = services
        self.fd = fd
        # Not fstat, because a disc may be a block device, for which st_size is 0.
        self.size = 0 if fd is None else os.lseek(fd, 0, SEEK_END)
        self.drive = Drive(None if fd is None else self.size)
        self.figures = services.figures
        self.figures[SIZE] = self.size
        self.queues: list[Queue | None] = []
        self.sense_size, self.cdb_size = SENSE_SIZE, CDB_SIZE
        self.complaints = RateLimit()

    # --- life ------------------------------------------------------------------------------------------------

    @property
    def config(self) -> bytes:
        """The configuration space as it is now."""
        return CONFIG.pack(1, 17, 2048, 1, 0, self.sense_size, self.cdb_size, 0, 1, 1)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take new sizes.  A size out of range and a write to any other field are ignored."""
        config = bytearray(self.config)
        if offset < 0 or offset + len(data) > len(config):
            return
        config[offset : offset + len(data)] = data
        sense_size, cdb_size = SIZES.unpack_from(config, SIZES_AT)
        if sense_size <= SENSE_SIZE_MAX:
            self.sense_size = sense_size
        if 0 < cdb_size <= CDB_SIZE_MAX:
            self.cdb_size = cdb_size

    def activate(self, _features: int, queues: "list[Queue | None]") -> None:
        """Take the rings."""
        self.queues = queues

    def quiesce(self, *, forget: bool) -> None:
        """Do nothing for a pause, since no request is ever in flight.

        With `forget` the device is reset: unlock the drive, and undo the driver's writes to the configuration space.
        """
        if forget:
            self.queues = []
            self.sense_size, self.cdb_size = SENSE_SIZE, CDB_SIZE
            self.drive.locked = False

    def change(self, fd: int | None, *, force: bool) -> None:
        """Replace the disc; without `fd` remove it.  The controller owns `fd` from here on, even if this raises.

        A guest locks the drive while a disc is mounted.  A locked drive keeps its disc unless `force` is given.

        Raises:
            OSError: the disc was not changed.
        """
        try:
            if self.drive.locked and not force:
                self.drive.ask_to_eject()
                raise OSError(errno.EBUSY, "the guest has locked the drive, as it does while it uses a disc")
            size = None if fd is None else os.lseek(fd, 0, SEEK_END)
        except OSError:
            if fd is not None:
                os.close(fd)
            raise
        self.close()
        self.fd, self.size = fd, size or 0
        self.figures[SIZE] = self.size
        self.drive.change(size)

    def close(self) -> None:
        """Close the disc, if there is one."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    # --- queues ----------------------------------------------------------------------------------------------

    def queue(self, number: int) -> "Queue | None":
        """Return a queue, if the driver uses it."""
        return self.queues[number] if number < len(self.queues) else None

    def on_notify(self, number: int) -> bool:
        """Serve a queue, up to the budget."""
        queue = self.queue(number)
        if queue is None:
            return False
        if number == REQUEST:
            return self.drain(REQUEST, queue, self.on_request)
        if number == CONTROL:
            # After the answer to an abort the driver frees the memory of the aborted commands.  So all commands that
            # are in the request queue are carried out first.
            requests = self.queue(REQUEST)
            if requests is not None and self.drain(REQUEST, requests, self.on_request):
                return True
            return self.drain(CONTROL, queue, self.on_control)
        # Event buffers stay in the ring, because this device never has an event.
        queue.available()
        return False

    def drain(self, number: int, queue: "Queue", serve: "Callable[[Queue, Chain], int]") -> bool:
        """Serve available requests of a queue, up to the budget; return whether to come back.  Raises GuestError."""
        spent, begun_ns = 0, time.monotonic_ns()
        try:
            while spent < BUDGET:
                chain = queue.take()
                if chain is None:
                    return queue.rearm()
                written = serve(queue, chain)
                queue.put(chain.head, written)
                spent += written + DESCRIPTOR_COST * (len(chain.readable) + len(chain.writable))
            return True
        finally:
            self.figures[BUSY_NS] += time.monotonic_ns() - begun_ns
            queue.publish()
            if queue.wants_interrupt():
                self.services.interrupt(number)

    # --- requests --------------------------------------------------------------------------------------------

    def on_request(self, queue: "Queue", chain: "Chain") -> int:
        """Carry out a SCSI command (5.6.6.1); return how many bytes were written.  Raises GuestError."""
        head_bytes = REQUEST_HEAD.size + self.cdb_size
        response_bytes = RESPONSE.size + self.sense_size
        request = gather(queue, chain, head_bytes)
        out_bytes = total(chain.readable) - head_bytes
        in_bytes = total(chain.writable) - response_bytes
        if in_bytes < 0:
            raise GuestError(f"scsi response of {in_bytes + response_bytes} bytes instead of {response_bytes}")
        lun = REQUEST_HEAD.unpack_from(request)[0]
        reply, moved = Reply(), 0
        if not is_our_target(lun) or not is_our_lun(lun):
            response = S_BAD_TARGET
        elif out_bytes and in_bytes:
            response = S_FAILURE  # data in both directions needs VIRTIO_SCSI_F_INOUT, which is not offered
        else:
            reply = self.drive.execute(request[REQUEST_HEAD.size :])
            if reply.sense == UNSUPPORTED:
                self.complaints.warn(f"unsupported opcode {request[REQUEST_HEAD.size]:#04x}")
            if max(len(reply.data), reply.length) > in_bytes:
                response, reply = S_OVERRUN, Reply()
            else:
                response = S_OK
                reply, moved = self.transfer(queue, chain, response_bytes, reply)
        self.figures[COMMANDS] += 1
        if reply.status or response != S_OK:
            self.figures[ERRORS] += 1
        elif reply.length:
            self.figures[READS] += 1
            self.figures[READ_BYTES] += moved
        sense = reply.sense[: self.sense_size]
        residual = min(out_bytes + in_bytes - moved, 0xFFFFFFFF)
        answer = RESPONSE.pack(len(sense), residual, 0, reply.status, response) + sense
        scatter(queue, chain, 0, answer.ljust(response_bytes, b"\0"))
        return response_bytes + moved

    def transfer(self, queue: "Queue", chain: "Chain", start: int, reply: Reply) -> tuple[Reply, int]:
        """Copy a reply's data to the guest; return the reply and the number of bytes copied.

        If the disc cannot be read, the returned reply is an error.
        """
        if reply.data:
            scatter(queue, chain, start, reply.data)
            return reply, len(reply.data)
        if reply.length:
            try:
                self.read(slices(queue, chain, start, reply.length), reply.offset)
            except OSError as error:
                self.complaints.warn(f"cannot read the disc at {reply.offset}: {error.strerror}")
                return check_condition(READ_ERROR), 0
        return reply, reply.length

    def read(self, views: "list[memoryview]", offset: int) -> None:
        """Fill views from the disc.  Raises OSError, also if the disc's file has become shorter."""
        assert self.fd is not None
        index, start = 0, 0
        while index < len(views):
            piece, room, at = [], PIECE, start
            for view in views[index : index + IOV_MAX]:
                piece.append(view[at : at + room])
                room -= len(piece[-1])
                at = 0
                if not room:
                    break
            got = os.preadv(self.fd, piece, offset)
            if not got:
                if offset < self.size:
                    raise OSError(errno.EIO, "the file has become shorter")
                got = fill(piece)  # the part of the last block behind the end of the file
            offset += got
            start += got
            while index < len(views) and start >= len(views[index]):
                start -= len(views[index])
                index += 1

    # --- control ---------------------------------------------------------------------------------------------

    def on_control(self, queue: "Queue", chain: "Chain") -> int:
        """Answer a control request (5.6.6.2); return how many bytes were written.  Raises GuestError."""
        kind = TYPE.unpack(gather(queue, chain, TYPE.size))[0]
        if kind == T_TASK:
            _, subtype, lun, _ = TASK.unpack(gather(queue, chain, TASK.size))
            answer = TASK_ANSWER.pack(self.manage_tasks(subtype, lun))
        elif kind in (T_QUERY_EVENTS, T_SUBSCRIBE_EVENTS):
            _, lun, _ = EVENTS.unpack(gather(queue, chain, EVENTS.size))
            answer = EVENTS_ANSWER.pack(0, S_OK if is_our_target(lun) and is_our_lun(lun) else S_BAD_TARGET)
        else:
            self.complaints.warn(f"control request of unknown type {kind}")
            return 0  # the form of its answer is not known
        if total(chain.writable) < len(answer):
            raise GuestError(f"scsi control response of {total(chain.writable)} bytes instead of {len(answer)}")
        scatter(queue, chain, 0, answer)
        return len(answer)

    def manage_tasks(self, subtype: int, lun: bytes) -> int:
        """Answer a task management function.  All commands have ended, so no command is left to abort."""
        if not is_our_target(lun):
            return S_BAD_TARGET
        if subtype == CLEAR_ACA or subtype > TASK_LAST:
            return S_FUNCTION_REJECTED
        if subtype != I_T_NEXUS_RESET and not is_our_lun(lun):
            return S_INCORRECT_LUN
        if subtype in (I_T_NEXUS_RESET, LOGICAL_UNIT_RESET):
            self.drive.locked = False
        return S_FUNCTION_COMPLETE


UNSUPPORTED = sense_data(*BAD_OPCODE)


def is_our_target(lun: bytes) -> bool:
    """Return whether an address (5.6.6.1) is that of target 0."""
    return lun[0] == 1 and lun[1] == 0


def is_our_lun(lun: bytes) -> bool:
    """Return whether an address is that of LUN 0, in either of its two notations."""
    return lun[2] in (0x00, 0x40) and lun[3] == 0


# --- chains of any layout ----------------------------------------------------------------------------------------


def total(parts: list[tuple[int, int]]) -> int:
    """Return the number of bytes of all parts, which are (gpa, length)."""
    return sum([length for _, length in parts])


def gather(queue: "Queue", chain: "Chain", size: int) -> bytes:
    """Return a copy of the first `size` readable bytes of a chain.  Raises GuestError if there are fewer."""
    found = []
    left = size
    for gpa, length in chain.readable:
        if length:
            found.append(queue.memory.read(gpa, min(length, left)))
            left -= len(found[-1])
        if not left:
            return b"".join(found)
    raise GuestError(f"scsi request of {size - left} bytes instead of {size}")


def fill(views: "list[memoryview]") -> int:
    """Fill views with zeroes; return the number of their bytes."""
    for view in views:
        view[:] = bytes(len(view))
    return sum(map(len, views))


def slices(queue: "Queue", chain: "Chain", start: int, size: int) -> "list[memoryview]":
    """Return views of `size` writable bytes of a chain, from `start` on.  The caller has checked the chain's length.

    Raises:
        GuestError: a part is not in writable memory.
    """
    found: list[memoryview] = []
    for gpa, length in chain.writable:
        if start >= length:
            start -= length
            continue
        part = min(length - start, size)
        found += queue.memory.slices(gpa + start, part, write=True)
        start = 0
        size -= part
        if not size:
            break
    return found


def scatter(queue: "Queue", chain: "Chain", start: int, data: bytes) -> None:
    """Store `data` into a chain's writable bytes, from `start` on.  Raises GuestError."""
    at = 0
    for view in slices(queue, chain, start, len(data)):
        view[:] = data[at : at + len(view)]
        at += len(view)
