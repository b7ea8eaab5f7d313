"""Memory files, which processes share, and which have no storage behind them (memfd_create(2))."""

import fcntl
import posix as os

FIXED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # seals that fix the size
CONSTANT = FIXED | fcntl.F_SEAL_WRITE  # seals that fix size and contents


def memory_file(name: str) -> int:
    """Return an empty memory file, which can be sealed.  Raises OSError."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def seal(fd: int, seals: int) -> None:
    """Add seals to a memory file.  Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def sealed_file(name: str, size: int, fd: int | None = None) -> int:
    """Return a memory file of fixed size, all zero: a new one, or the empty one `fd`.  The caller has to close it.

    On failure `fd` is closed, too.  Raises OSError.

    The size is fixed because a process that shrinks a shared file would kill the others by SIGBUS.
    """
    fd = memory_file(name) if fd is None else fd
    try:
        os.ftruncate(fd, size)
        seal(fd, FIXED)
    except BaseException:
        os.close(fd)
        raise
    return fd


def bounded_file(name: str, size: int) -> int:
    """Return a memory file, all zero, that can become smaller but not larger.  The caller has to close it.

    Raises OSError.
    """
    fd = memory_file(name)
    try:
        os.ftruncate(fd, size)
        seal(fd, fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(fd)
        raise
    return fd


def fill_file(fd: int, data: bytes) -> None:
    """Write `data` to an empty memory file, and seal it as CONSTANT.  Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
    os.lseek(fd, 0, 0)  # readers share the file position, and begin at the start
    seal(fd, CONSTANT)


def is_constant(fd: int) -> bool:
    """Return whether a memory file is sealed as CONSTANT.  Raises OSError."""
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & CONSTANT == CONSTANT


def is_fixed(fd: int) -> bool:
    """Return whether this is a memory file that is sealed as FIXED."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & FIXED == FIXED
    except OSError:
        return False  # not a memory file
