"""Reads and unpacks a boot image.  Every error is reported.

An opener has opened the file with the rights of its user.  The file may change while it is read, so the number of bytes
that a read returns is checked, and the size of `fstat` is not relied on.
"""

import os
import zlib
from stat import S_ISREG

from vmd.closing import close
from vmd.errors import HostError, ImageError
from vmd.log import log
from vmd.units import KIB, MIB

UNPACKED_MAX = 1024 * MIB  # largest unpacked kernel; the guest's memory is a further bound
CHUNK_IN = 256 * KIB
CHUNK_OUT = 1 * MIB
MEMBERS_MAX = 1 << 16  # members of a gzip file: programs that write several members give each at least 64 KiB

GZIP_MAGIC = b"\x1f\x8b\x08"  # with the only compression method that exists (RFC 1952, 2.3.1)


class Image:
    """A regular file.  The caller still owns `fd`, and `name` is for messages only.

    Raises:
        ImageError: the file is not a regular file, or is empty.
        HostError: the file cannot be examined.
    """

    def __init__(self, fd: int, name: str) -> None:
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise HostError(f"examine {name}", error) from error
        if not S_ISREG(status.st_mode):
            raise ImageError(name, "is not a regular file")
        if status.st_size == 0:
            raise ImageError(name, "is empty")
        self.fd = fd
        self.name = name
        self.size = status.st_size

    def error(self, what: str) -> ImageError:
        """Return an ImageError that names this file."""
        return ImageError(self.name, what)

    def check_range(self, offset: int, size: int, what: str) -> None:
        """Raise ImageError unless the file has `size` bytes at `offset`."""
        if offset + size > self.size:
            raise self.error(f"is truncated: {what} ends at byte {offset + size}, the file at {self.size}")

    def read(self, offset: int, size: int, what: str) -> bytes:
        """Return exactly `size` bytes.  The caller must bound `size`."""
        self.check_range(offset, size, what)
        data = bytearray(size)
        self.read_into(memoryview(data), offset, what)
        return bytes(data)

    def read_into(self, view: memoryview, offset: int, what: str) -> None:
        """Fill `view` with the bytes at `offset`.  There is no copy in between."""
        self.check_range(offset, len(view), what)
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise HostError(f"read {self.name}", error) from error
            if got == 0:
                raise self.error(f"became shorter while it was read: {what} ends at byte {offset + done}")
            done += got


def unpack(image: Image, limit_bytes: int) -> int:
    """Unpack a gzip file into a new memfd and return it.  The caller closes it.

    Raises:
        ImageError: the data is damaged, incomplete, or larger than `limit_bytes`.
        HostError: the host has no memory for it.
    """
    try:
        fd = os.memfd_create("kernel", os.MFD_CLOEXEC)
    except OSError as error:
        raise HostError(f"unpack {image.name}", error) from error
    try:
        Gunzip(image, fd, limit_bytes).run()
    except OSError as error:
        close(fd)
        raise HostError(f"unpack {image.name}", error) from error
    except BaseException:
        close(fd)
        raise
    return fd


class Gunzip:
    """Unpacks all members of a gzip file into `fd`, in pieces, as gzip(1) does (RFC 1952, 2.2).

    Bytes after the last member are ignored.  A warning is logged unless they are all zeros.
    """

    def __init__(self, image: Image, fd: int, limit_bytes: int) -> None:
        self.image = image
        self.fd = fd
        self.limit_bytes = limit_bytes
        self.offset = 0  # of the first byte that was not read yet
        self.packed = b""  # bytes that were read, but are not unpacked yet
        self.written = 0

    def run(self) -> None:
        """Unpack all members."""
        for _ in range(MEMBERS_MAX):
            self._member()
            if len(self.packed) < len(GZIP_MAGIC):
                self._read()
            if not self.packed.startswith(GZIP_MAGIC):
                break
        else:
            raise self.image.error(f"has more than {MEMBERS_MAX} members of gzip data")
        self._check_rest()

    def _member(self) -> None:
        """Unpack one member."""
        image = self.image
        stream = zlib.decompressobj(zlib.MAX_WBITS | 16)  # 16: gzip's header and checksum
        while not stream.eof:
            if not self.packed:
                # Deflate can consume input without producing output, so the input has the same bound as the output.
                if self.offset > self.limit_bytes:
                    raise image.error(f"is {image.size} bytes of gzip data, at most {self.limit_bytes} are unpacked")
                if not self._read():
                    raise image.error(f"is truncated: the gzip data does not end within {image.size} bytes")
            try:
                plain = stream.decompress(self.packed, CHUNK_OUT)
            except zlib.error as error:
                raise image.error(f"has damaged gzip data before byte {self.offset}: {error}") from error
            self.packed = stream.unconsumed_tail
            self.written += len(plain)
            if self.written > self.limit_bytes:
                raise image.error(f"unpacks to more than {self.limit_bytes} bytes")
            rest = memoryview(plain)
            while rest:
                rest = rest[os.write(self.fd, rest) :]
        self.packed = stream.unused_data

    def _read(self) -> bool:
        """Add a piece of the file to `packed`.  Return False at the end of the file."""
        piece = self.image.read(self.offset, min(CHUNK_IN, self.image.size - self.offset), "the gzip data")
        self.offset += len(piece)
        self.packed += piece
        return bool(piece)

    def _check_rest(self) -> None:
        """Log a warning if other bytes than zeros follow the last member.  Only the first `limit_bytes` are read."""
        left = self.image.size - self.offset + len(self.packed)
        while not self.packed.strip(b"\0"):
            self.packed = b""
            if self.offset > self.limit_bytes or not self._read():
                return
        log.warn(f"{self.image.name}: {left} bytes after the end of the gzip data are ignored")
