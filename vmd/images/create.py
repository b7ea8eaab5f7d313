"""Creates image files: empty, on top of a backing file, or as a copy of another image (*cat. 3.6, 8.3*).

A new file never replaces an existing one, is readable by its owner only, and gets its name when it is complete.
"""

import contextlib
import ctypes
import errno
import os
import struct

from vmd import signals as signal
from vmd.errors import HostError, ImageError
from vmd.images.header import (
    BACKING_FORMAT,
    EXTENSION,
    HEADER_V2,
    HEADER_V3,
    MAX_BACKING_NAME,
    MAX_TABLE_BYTES,
    V3_BYTES,
)
from vmd.images.hostfile import write_bytes
from vmd.images.qcow2 import Qcow2Image
from vmd.images.raw import RawImage
from vmd.images.signatures import QCOW_MAGIC
from vmd.scaled import fmt_scaled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmd.images.image import Image

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
REFCOUNT_ORDER = 4
COPY_BYTES = 1 << 20
ZERO_BYTES = 1 << 16  # a copy leaves out aligned blocks of this size that are all zero
NOTHING = bytes(ZERO_BYTES)
STEM_BYTES = 100  # of the final name, in the temporary name of a file
RENAME_NOREPLACE = 1
UNNAMED = os.O_TMPFILE
# Errors of file systems without O_TMPFILE.  Old kernels see only O_DIRECTORY in that flag.
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
WRITING = "failed to write to destination"
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
MAX_SIZE = MAX_TABLE_BYTES // 8 * CLUSTER * (CLUSTER // 8)

libc = ctypes.CDLL(None, use_errno=True)
libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


@contextlib.contextmanager
def new_file(path: str, creating: str = "could not create", writing: str = "could not write") -> "Iterator[int]":
    """Open a new file for reading and writing.  It gets its name when the block ends without an exception.

    `creating` and `writing` are the beginnings of error messages.  Even if this process is killed, an incomplete file
    never has that name, and an existing file of that name is unchanged.

    Raises:
        HostError: the name is taken, or the file cannot be created or written.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        try:
            new = NewFile(path)
        except OSError as error:
            folder = os.path.dirname(path)
            if isinstance(error, FileNotFoundError) and folder and not os.path.isdir(folder):
                raise HostError(f"{creating} {path}: {folder}", error) from None
            raise HostError(f"{creating} {path}", error) from None
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield new.fd
            sync(new.fd)
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            new.publish()
        except BaseException as error:
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            new.remove()
            if isinstance(error, FileExistsError):
                raise HostError(f"{creating} {path}", error) from None
            if isinstance(error, OSError):
                raise HostError(f"{writing} {path}", error) from None
            raise
        finally:
            new.close()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class NewFile:
    """A file without a name; if the file system does not support that, one with a hidden name in the same directory."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        folder, self.name = os.path.split(path)
        if not self.name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        self.hidden = ""  # the temporary name until `publish`; "": it has no name
        self.folder = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self._exists():  # reported now, not after everything has been written
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            self.fd = self._open()
        except BaseException:
            os.close(self.folder)
            raise

    def _exists(self) -> bool:
        try:
            os.lstat(self.name, dir_fd=self.folder)
        except FileNotFoundError:
            return False
        return True

    def _open(self) -> int:
        """Return the open file.  Raises OSError."""
        try:
            fd = os.open(".", UNNAMED | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.folder)
        except OSError as error:
            if error.errno not in NO_TMPFILE:
                raise
        else:
            if os.path.exists(f"/proc/self/fd/{fd}"):
                return fd
            os.close(fd)  # without /proc it cannot be given a name
        stem = os.fsdecode(os.fsencode(self.name)[:STEM_BYTES])
        self.hidden = f".{stem}.{os.urandom(8).hex()}.part"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self.hidden, flags, 0o600, dir_fd=self.folder)

    def publish(self) -> None:
        """Give the file its name, and sync the directory.  Raises OSError; FileExistsError if the name is taken."""
        if self.hidden:
            self._rename()
        else:
            os.link(f"/proc/self/fd/{self.fd}", self.name, dst_dir_fd=self.folder, follow_symlinks=True)
        with contextlib.suppress(PermissionError):  # the directory may be writable but not readable
            folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.folder)
            try:
                sync(folder)
            finally:
                os.close(folder)

    def _rename(self) -> None:
        """Rename the file from its hidden name, without replacing another file if the file system can do that."""
        folder, hidden, name = self.folder, os.fsencode(self.hidden), os.fsencode(self.name)
        if not libc.renameat2(folder, hidden, folder, name, RENAME_NOREPLACE):
            return
        error = ctypes.get_errno()
        if error not in UNSUPPORTED:
            raise OSError(error, os.strerror(error))
        try:
            os.link(self.hidden, self.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except OSError as failure:
            # EEXIST: an NFS server may have done it before, but its answer was lost.
            if failure.errno not in (*UNSUPPORTED, errno.EEXIST) or (
                failure.errno == errno.EEXIST and not self._has_name()
            ):
                raise
        if not self._has_name():
            self._replace_empty()
            return
        os.unlink(self.hidden, dir_fd=folder)

    def _replace_empty(self) -> None:
        """Create an empty file to reserve the name, and replace it by this file.  Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        os.close(os.open(self.name, flags, 0o600, dir_fd=self.folder))
        try:
            os.rename(self.hidden, self.name, src_dir_fd=self.folder, dst_dir_fd=self.folder)
        except OSError:
            os.unlink(self.name, dir_fd=self.folder)
            raise

    def _has_name(self) -> bool:
        """Return whether the name refers to this file."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.lstat(self.name, dir_fd=self.folder))
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Remove the file.  Another file that has its name now is left alone."""
        with contextlib.suppress(OSError):
            if self._has_name():
                os.unlink(self.name, dir_fd=self.folder)
        if self.hidden:
            with contextlib.suppress(OSError):
                os.unlink(self.hidden, dir_fd=self.folder)

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.fd)
        os.close(self.folder)


def sync(fd: int) -> None:
    """fsync(2) a file or directory.  Raises OSError, but not if the file system does not support fsync."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def write_empty(fd: int, path: str, image_format: str, size: int, backing: str = "", backing_format: str = "") -> None:
    """Write an empty image to an open, empty file.  Raises OSError, ImageError."""
    if image_format == "raw":
        os.ftruncate(fd, size)
        return
    if size > MAX_SIZE:
        raise ImageError(path, f"{size} bytes are too large for a qcow2 image (limit is {MAX_SIZE})")
    l1_entries = max(1, -(-size // (CLUSTER * (CLUSTER // 8))))
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    clusters = 3 + l1_clusters  # header, refcount table, one refcount block, L1 table
    os.ftruncate(fd, clusters * CLUSTER)
    write_bytes(fd, struct.pack(f">{clusters}H", *[1] * clusters), 2 * CLUSTER)
    write_bytes(fd, struct.pack(">Q", 2 * CLUSTER), CLUSTER)
    write_bytes(fd, _header(path, size, l1_entries, backing, backing_format), 0)


def _header(path: str, size: int, l1_entries: int, backing: str, backing_format: str) -> bytes:
    """Return the header of a qcow2 image with the layout of `write_empty`.  Raises ImageError."""
    name = os.fsencode(backing)
    if len(name) > MAX_BACKING_NAME:
        raise ImageError(path, f"name of the backing file is {len(name)} bytes long, more than {MAX_BACKING_NAME}")
    extensions = b""
    if name:
        kind = backing_format.encode()
        extensions = EXTENSION.pack(BACKING_FORMAT, len(kind)) + kind + bytes(-len(kind) % 8)
    extensions += EXTENSION.pack(0, 0)
    name_offset = V3_BYTES + len(extensions) if name else 0
    head = HEADER_V2.pack(
        QCOW_MAGIC, 3, name_offset, len(name), CLUSTER_BITS, size, 0, l1_entries, 3 * CLUSTER, CLUSTER, 1, 0, 0
    )
    return head + HEADER_V3.pack(0, 0, 0, REFCOUNT_ORDER, V3_BYTES) + extensions + name


def create(path: str, image_format: str, size: int, backing: str = "", backing_format: str = "") -> None:
    """Create an empty image.  The path of its backing file is recorded as given.

    Raises:
        HostError: the file exists, or cannot be created or written.
        ImageError: it would be too large, or its backing file's name too long.
    """
    with new_file(path) as fd:
        write_empty(fd, path, image_format, size, backing, backing_format)


def convert(
    source: "Image",
    path: str,
    image_format: str,
    size: int,
    progress: "Callable[[int, int], None] | None" = None,
    verify: "Callable[[], None] | None" = None,
) -> None:
    """Create an image of `size` bytes with the content of `source`, which must not be larger.

    `progress` is called with the bytes that are copied and the bytes to copy, without holes.  `verify` is called after
    everything has been read: if it raises, no file is created.  An OSError of either counts as an error of the source.

    Raises:
        HostError: the file exists, or cannot be created or written, or the source cannot be read.
        ImageError: it would be too large.
    """
    assert size >= source.size
    with new_file(path, "failed to create destination image file", WRITING) as fd:
        data_bytes, free_bytes = _data_bytes(source), _free_bytes(fd)
        try:
            write_empty(fd, path, image_format, size)
            own = os.dup(fd)
            try:
                target = _open_target(own, path, image_format)
                _copy(source, target, data_bytes, progress)
                if verify is not None:
                    with reading():
                        verify()
                target.flush()
            except BaseException:
                os.close(own)  # an incomplete image need not be flushed
                raise
            target.close()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            needs = f"{WRITING} {path}, which needs up to {fmt_scaled(data_bytes)}"
            raise HostError(f"{needs} where {fmt_scaled(free_bytes)} were free", error) from None


def _free_bytes(fd: int) -> int:
    """Return the free bytes of the file system of an open file.  Raises OSError."""
    found = os.fstatvfs(fd)
    return found.f_bavail * found.f_frsize


def _data_bytes(source: "Image") -> int:
    """Return how many bytes of an image are not holes.  Raises HostError."""
    position = found = 0
    with reading():
        while position < source.size:
            has_data, length = source.span(position)
            found += length if has_data else 0
            position += length
    return found


@contextlib.contextmanager
def reading() -> "Iterator[None]":
    """Turn an OSError into a HostError that names the source."""
    try:
        yield
    except OSError as error:
        raise HostError("failed to read from source", error) from None


def _open_target(fd: int, path: str, image_format: str) -> "Image":
    """Open a new image for writing.  Raises ImageError."""
    if image_format == "raw":
        return RawImage(fd, path, writable=True)
    return Qcow2Image(fd, path, writable=True)


def _copy(source: "Image", target: "Image", data_bytes: int, progress: "Callable[[int, int], None] | None") -> None:
    """Copy the data that is not zero; `data_bytes` is for `progress`.

    Raises HostError for the source, OSError for the target.
    """
    buffer = memoryview(bytearray(COPY_BYTES))
    position = done = 0
    while position < source.size:
        with reading():
            has_data, length = source.span(position)
            if has_data:
                length = min(length, COPY_BYTES - position % COPY_BYTES)
                source.preadv(position, [buffer[:length]])
        if has_data:
            _write_data(target, position, buffer[:length])
            done += length
            if progress is not None:
                with reading():
                    progress(done, data_bytes)
        position += length


def _write_data(target: "Image", position: int, data: memoryview) -> None:
    """Write the blocks that are not zero; adjacent ones with one call.  Raises OSError."""
    start = end = 0
    while end < len(data):
        step = min(ZERO_BYTES - (position + end) % ZERO_BYTES, len(data) - end)
        if data[end : end + step] == NOTHING[:step]:
            if end > start:
                target.pwritev(position + start, [data[start:end]])
            start = end + step
        end += step
    if end > start:
        target.pwritev(position + start, [data[start:end]])
