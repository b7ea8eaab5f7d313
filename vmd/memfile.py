"""Memory files: what several processes share, or keep, and what no storage is behind (memfd_create(2))."""

import fcntl
import posix as os

FIXED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # what may no longer change: its size
CONSTANT = FIXED | fcntl.F_SEAL_WRITE  # ... and all it holds


def memory_file(name: str) -> int:
    """Return an empty memory file, which can be sealed.  Raises OSError."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def seal(fd: int, seals: int) -> None:
    """Let nobody change a memory file in these ways any more.  Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def sealed_file(name: str, size: int, fd: int | None = None) -> int:
    """Return a memory file, all zero, the caller's to close: a new one, or what an empty one has become.

    Raises OSError, and closes the empty one then.

    A process that gets the descriptor can no longer shrink it under the others' feet, which would end them by SIGBUS.
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
    """Return a memory file, all zero, the caller's to close, that can become smaller but not larger.

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
    """Have an empty memory file hold this and nothing else from now on.  Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
    os.lseek(fd, 0, 0)  # for whoever reads on
    seal(fd, CONSTANT)


def is_constant(fd: int) -> bool:
    """Return whether nobody can change a memory file any more.  Raises OSError."""
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & CONSTANT == CONSTANT


def is_fixed(fd: int) -> bool:
    """Return whether this is a memory file whose size nobody can change any more."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & FIXED == FIXED
    except OSError:
        return False  # not a memory file
