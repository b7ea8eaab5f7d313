"""A file whose storage fails, is full, is slow, or never answers, as a test wants (fuse(4), fuse.h 7.31).

The file system is attached nowhere: the file is opened through the descriptor of a detached mount, and the mount ends
with that descriptor.  Nothing is cached, so the test serves every read and write of the file.
"""

import ctypes
import errno
import fcntl
import os
import select
import stat
import struct
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

DEVICE = "/dev/fuse"
DEADLINE_S = 60.0

LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, RELEASE, FSYNC = 1, 2, 3, 4, 14, 15, 16, 18, 20
FLUSH, INIT, GETLK, SETLK, INTERRUPT, FALLOCATE, BATCH_FORGET = 25, 26, 31, 32, 36, 43, 42
OF_A_NODE = (LOOKUP, GETATTR, SETLK)
FUSE_POSIX_LOCKS = 1 << 1
IN_HEADER = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER = struct.Struct("<IiQ")  # len, error, unique
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
ENTRY_OUT = struct.Struct("<QQQQII")
ATTR_OUT = struct.Struct("<QII")
LK_OUT = struct.Struct("<QQII")  # start, end, type, pid
OPEN_OUT = struct.Struct("<QII")
READ_IN = struct.Struct("<QQIIQII")
WRITE_IN = struct.Struct("<QQIIQII")
WRITE_OUT = struct.Struct("<II")
FALLOCATE_IN = struct.Struct("<QQQII")
SETATTR_IN = struct.Struct("<IIQQ")
FATTR_SIZE = 1 << 3
FOPEN_DIRECT_IO = 1
ROOT, FILE = 1, 2
MAX_WRITE = 1 << 20
BUFFER_BYTES = MAX_WRITE + (1 << 16)

SYS_MOVE_MOUNT, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 429, 430, 431, 432
AT_FDCWD, MOVE_MOUNT_F_EMPTY_PATH = -100, 4
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
HELD = -1  # an outcome of a rule: no answer until `release`

libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: object) -> int:
    """Make a system call.  Raises OSError."""
    wide = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def mount(device: int, user: int, *, for_all: bool) -> int:
    """Return the descriptor of a detached mount of a user.  With `for_all` other users may use it too."""
    context = call(SYS_FSOPEN, b"fuse", 1)
    try:
        for key, value in (("fd", device), ("rootmode", "40000"), ("user_id", user), ("group_id", user)):
            call(SYS_FSCONFIG, context, FSCONFIG_SET_STRING, key.encode(), str(value).encode(), 0)
        if for_all:
            call(SYS_FSCONFIG, context, FSCONFIG_SET_FLAG, b"allow_other", None, 0)
        call(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        return call(SYS_FSMOUNT, context, 1, 0)
    finally:
        os.close(context)


class Operation(NamedTuple):
    """A request of the kernel.  Without offset and length both are 0; for OF_A_NODE `offset` is the node."""

    opcode: int
    offset: int
    length: int


class Rule(NamedTuple):
    """The result of an operation that touches [start, end): an errno, HELD, or at most `most` bytes."""

    opcode: int
    start: int
    end: int
    outcome: int
    most: int


class FuseFile:
    """A file system with one file.  `content` is the file's storage and `fd` an open descriptor of it."""

    def __init__(
        self, content: bytes, *, user: int = 0, for_all: bool = False, flushes: bool = False, locks: bool = False
    ) -> None:
        """`user` mounts it; the kernel refuses other users unless `for_all`.  With `locks` we answer lock requests.

        With `flushes` each close sends us FLUSH, and `fd` is not opened here; the test uses `open`.  While a test has
        such a file open, it must start no process.
        """
        self.flushes = flushes
        self.locks = locks
        self.content = bytearray(content)
        self.room = 1 << 40  # the largest size of the file, in bytes
        self.log: list[Operation] = []
        self.held: list[tuple[int, Operation, bytes]] = []
        self.rules: list[Rule] = []
        self._changed = threading.Condition()
        self._device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._mount = mount(self._device, user, for_all=for_all)
        self._thread.start()
        # We answer the first FLUSH with ENOSYS, so that the kernel sends no more.  Otherwise a child that closes the
        # inherited descriptor while its parent waits for it would wait for our thread for ever.
        self.fd = -1
        if user == 0 and not flushes:
            os.close(self.open())
            self.fd = self.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Answer held operations with an error, and end the file system."""
        if self._device >= 0:
            for fd in (self.fd, self._mount, self._stopped):
                if fd >= 0:
                    os.close(fd)
            self._thread.join(DEADLINE_S)
            os.close(self._device)
            os.close(self._stop)
            self._device = -1

    def attach(self, folder: Path) -> Path:
        """Attach it to a folder, until the folder is unmounted; return the file's path."""
        target = os.fsencode(folder)
        call(SYS_MOVE_MOUNT, self._mount, b"", ctypes.c_long(AT_FDCWD), target, MOVE_MOUNT_F_EMPTY_PATH)
        return folder / "disk"

    def open(self) -> int:
        """Open the file.  The caller closes the descriptor."""
        return os.open("disk", os.O_RDWR | os.O_CLOEXEC, dir_fd=self._mount)

    # --- what a test says

    def rule(self, opcode: int, outcome: int = 0, start: int = 0, end: int = 1 << 63, most: int = 1 << 30) -> Rule:
        """Set the outcome of later operations.  The newest rule that matches wins."""
        made = Rule(opcode, start, end, outcome, most)
        with self._changed:
            self.rules.insert(0, made)
        return made

    def release(self) -> None:
        """Remove all rules, and answer held operations."""
        with self._changed:
            self.rules.clear()
            held, self.held = self.held, []
        for unique, operation, body in held:
            if operation.opcode in OF_A_NODE:
                self._handle(unique, operation.opcode, operation.offset, body)
            else:
                self._answer(unique, operation, body)

    def wait_held(self, count: int) -> list[Operation]:
        """Wait until `count` operations are held; return them."""
        limit_s = time.monotonic() + DEADLINE_S
        with self._changed:
            while len(self.held) < count:
                assert self._changed.wait(limit_s - time.monotonic()), f"only {self.held} are held"
            return [operation for _, operation, _ in self.held]

    def count(self, opcode: int) -> int:
        """Return how many operations of this kind came."""
        with self._changed:
            return sum(1 for operation in self.log if operation.opcode == opcode)

    # --- the file system

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            if any(fd == self._stop for fd, _ in poll.poll()):
                return
            try:
                request = os.read(self._device, BUFFER_BYTES)
            except (BlockingIOError, FileNotFoundError):  # the operation was interrupted before we read it
                continue
            except OSError:
                return
            _, opcode, unique, nodeid, *_ = IN_HEADER.unpack_from(request)
            self._handle(unique, opcode, nodeid, request[IN_HEADER.size :])

    def _handle(self, unique: int, opcode: int, nodeid: int, body: bytes) -> None:
        match opcode:
            case _ if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
                return
            case _ if opcode in OF_A_NODE and any(rule.opcode == opcode for rule in self.rules):
                self._decide(unique, Operation(opcode, nodeid, 0), body)
            case _ if opcode == INIT:
                flags = FUSE_POSIX_LOCKS if self.locks else 0
                self._reply(unique, INIT_OUT.pack(7, 31, 0, flags, 16, 12, MAX_WRITE, 1, 0, 0, 0))
            case _ if opcode == LOOKUP:
                self._reply(unique, ENTRY_OUT.pack(FILE, 0, 0, 0, 0, 0) + self._attributes(FILE))
            case _ if opcode == GETATTR:
                self._reply(unique, ATTR_OUT.pack(0, 0, 0) + self._attributes(nodeid))
            case _ if opcode == GETLK and self.locks:
                self._reply(unique, LK_OUT.pack(0, 0, fcntl.F_UNLCK, 0))  # every lock is granted
            case _ if opcode == SETLK and self.locks:
                self._reply(unique)
            case _ if opcode == RELEASE:
                self._reply(unique)
            case _ if opcode in (OPEN, READ, WRITE, FSYNC, FALLOCATE, SETATTR) or (opcode == FLUSH and self.flushes):
                self._decide(unique, self._operation(opcode, body), body)
            case _:
                self._reply(unique, error=errno.ENOSYS)

    @staticmethod
    def _operation(opcode: int, body: bytes) -> Operation:
        if opcode in (READ, WRITE):
            return Operation(opcode, *READ_IN.unpack_from(body)[1:3])
        if opcode == FALLOCATE:
            return Operation(opcode, *FALLOCATE_IN.unpack_from(body)[1:3])
        return Operation(opcode, 0, 0)

    def _decide(self, unique: int, operation: Operation, body: bytes) -> None:
        with self._changed:
            self.log.append(operation)
            last = operation.offset + max(operation.length, 1)
            rule = next(
                (r for r in self.rules if r.opcode == operation.opcode and r.start < last and operation.offset < r.end),
                None,
            )
            if rule is not None and rule.outcome == HELD:
                self.held.append((unique, operation, body))
                self._changed.notify_all()
                return
        if rule is not None and rule.outcome:
            self._reply(unique, error=rule.outcome)
        else:
            self._answer(unique, operation, body, most=rule.most if rule is not None else 1 << 30)

    def _answer(self, unique: int, operation: Operation, body: bytes, most: int = 1 << 30) -> None:
        opcode, offset, length = operation
        if opcode == OPEN:
            self._reply(unique, OPEN_OUT.pack(0, FOPEN_DIRECT_IO, 0))
        elif opcode == READ:
            self._reply(unique, bytes(self.content[offset : offset + min(length, most)]))
        elif opcode == WRITE:
            length = min(length, most, self.room - offset)
            if length <= 0:
                self._reply(unique, error=errno.ENOSPC)
                return
            self._grow(offset + length)
            self.content[offset : offset + length] = body[WRITE_IN.size : WRITE_IN.size + length]
            self._reply(unique, WRITE_OUT.pack(length, 0))
        elif opcode == FALLOCATE:
            self._reply(unique, error=errno.EOPNOTSUPP)
        elif opcode == SETATTR:
            valid, _, _, size = SETATTR_IN.unpack_from(body)
            if valid & FATTR_SIZE:
                if size > self.room:
                    self._reply(unique, error=errno.ENOSPC)
                    return
                del self.content[size:]
                self._grow(size)
            self._reply(unique, ATTR_OUT.pack(0, 0, 0) + self._attributes(FILE))
        else:
            self._reply(unique)

    def _grow(self, size: int) -> None:
        self.content.extend(bytes(max(0, size - len(self.content))))

    def _attributes(self, nodeid: int) -> bytes:
        mode = stat.S_IFREG | 0o600 if nodeid == FILE else stat.S_IFDIR | 0o755
        size = len(self.content)
        return ATTR.pack(nodeid, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _reply(self, unique: int, body: bytes = b"", error: int = 0) -> None:
        try:
            os.write(self._device, OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique) + body)
        except FileNotFoundError:
            return  # the process that asked has ended
