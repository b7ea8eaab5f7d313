"""logfile: opens the file of a console log as the VM's owner, rotates a full one, hands it to "consolelog".

Runs as  the owner of the VM, before it touches the path.  If the owner is root, it keeps the right to use others'
         files.  It sees the host's files; Landlock permits only the log's directory
Peers    parent (starts it, reads one line, kills it if that takes too long); consolelog, at the other end of a courier
Holds    the directory, the file, and a pipe's writing end

A full log is renamed to PATH.1, an older one to PATH.2, and so on.  A log has one writer, which locks it.
"""

import contextlib
import errno
import fcntl
import os
import stat
import sys
import time

from vmd.config.model import MAX_LOGS_KEPT
from vmd.errors import OperatorError, VmdError, sentence
from vmd.ipc import courier
from vmd.ipc import sockets as socket
from vmd.ipc.logfile import FD_ANSWER, FD_COURIER, LogFile, unpack
from vmd.privsep import landlock
from vmd.privsep.confine import LOGFILE, confine

LOCK_S = 10.0  # for the previous writer to unlock it: of the VM's last life, or the previous consolelog
LOCK_ROUND_S = 0.05
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of some network file systems
FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
RIGHTS = landlock.WRITE_FILE | landlock.MAKE_REG | landlock.REMOVE_FILE


def main() -> int:
    """Open the file, hand it over, and end."""
    wanted = unpack(sys.argv[1:])
    try:
        become(wanted)
        directory = os.open(os.path.dirname(wanted.path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        os.umask(0)
        stay_in(directory)
        fd = open_log(directory, wanted)
    except (VmdError, OSError) as error:
        answer(sentence(error))
        return 0
    answer("")
    with socket.socket(fileno=FD_COURIER) as sock, contextlib.suppress(OSError):  # consolelog no longer waits
        courier.give(sock, {"log": [fd]})
    return 0


def answer(text: str) -> None:
    """Tell the parent why there is no file.  An empty text says that there is one."""
    with contextlib.suppress(BrokenPipeError):  # the parent no longer waits
        os.write(FD_ANSWER, f"{text}\n".encode("utf-8", "surrogateescape")[: 1 << 12])


def become(wanted: LogFile) -> None:
    """Become the owner, for good.  Raises OSError."""
    os.setgroups(wanted.groups)
    os.setresgid(wanted.gid, wanted.gid, wanted.gid)
    os.setresuid(wanted.uid, wanted.uid, wanted.uid)


def stay_in(directory: int) -> None:
    """Give up the right to all files outside one directory.  Raises HostError."""
    # No warnings here: the parent has logged what this kernel lacks.
    confine(LOGFILE.replace(files=((f"/proc/self/fd/{directory}", RIGHTS),)))


def open_log(directory: int, wanted: LogFile) -> int:
    """Return the file, open for appending, with room in it and locked.  Raises OSError, OperatorError."""
    name = os.path.basename(wanted.path)
    mode = 0o640 if wanted.shared else 0o600
    deadline_s = time.monotonic() + LOCK_S
    while True:
        try:
            fd = os.open(name, FLAGS, mode, dir_fd=directory)
        except OSError as error:
            raise OperatorError(error.errno or errno.EIO, strange(error)) from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OperatorError(errno.EINVAL, "is not a regular file")
            if status.st_nlink > 1:
                raise OperatorError(errno.EMLINK, "has other names (hard links)")
            if status.st_size >= wanted.size_bytes:
                put_aside(directory, name, wanted.keep)
            elif lock(fd):
                if is_there(directory, name, status):
                    return fd
            elif time.monotonic() >= deadline_s:
                raise OperatorError(errno.EBUSY, "is in use by another VM or program")
            else:
                time.sleep(LOCK_ROUND_S)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def strange(error: OSError) -> str:
    """Return why a path cannot be opened as a log."""
    if error.errno == errno.ELOOP:
        return "is a symbolic link"
    if error.errno in (errno.ENXIO, errno.EISDIR):
        return "is not a regular file"
    return sentence(error)


def lock(fd: int) -> bool:
    """Lock a file.  Return False if another process has locked it.  Raises OSError, but not for lack of locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def is_there(directory: int, name: str, status: os.stat_result) -> bool:
    """Return whether a file still has its name: the previous writer may have rotated it before we had the lock."""
    try:
        now = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (now.st_dev, now.st_ino) == (status.st_dev, status.st_ino)


def put_aside(directory: int, name: str, keep: int) -> None:
    """Rotate a full log: rename it and the older ones, and remove those beyond `keep`.  Raises OSError."""
    names = [name, *(f"{name}.{number}" for number in range(1, MAX_LOGS_KEPT + 1))]
    for old in names[max(keep, 1) :]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(old, dir_fd=directory)
    if not keep:
        os.unlink(name, dir_fd=directory)
        return
    for place in range(keep - 1, -1, -1):
        with contextlib.suppress(FileNotFoundError):
            os.rename(names[place], names[place + 1], src_dir_fd=directory, dst_dir_fd=directory)
