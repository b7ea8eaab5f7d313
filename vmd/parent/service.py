"""The daemon as a service of its host: control socket, /dev/kvm, daemonising, systemd's notifications."""

import contextlib
import errno
import faulthandler
import fcntl
import os
import pwd
import socket
import stat
import time
from collections.abc import Callable

from vmd.closing import close
from vmd.config.model import SOCKET_PATH_MAX, Owner
from vmd.errors import HostError, OperatorError, sentence
from vmd.log import JOURNAL, STDERR, SYSLOG, log
from vmd.tasks import fork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.loop import Loop

USER = "_vmd"
SOCKET_MODE = 0o660
CONTROL_SOCKET = "control socket"
SOCKET_BACKLOG = 64  # with upstream's 5, clients of a busy host are refused
RUN_DIRECTORY = "/run/vmd"
SYSLOG_SOCKET = "/dev/log"
JOURNAL_SOCKET = "/run/systemd/journal/socket"
KVM_GET_API_VERSION = 0xAE00  # <linux/kvm.h>; the parent needs no other request
KVM_API_VERSION = 12
KVM = "/dev/kvm"
KVM_WAIT_S = 30.0  # at boot, udev may not have loaded the module yet
KVM_POLL_S = 0.1
WATCHDOG_PINGS = 3  # pings within the time in which systemd expects one
NOTIFY_S = 2.0  # how long to wait until systemd takes a message: a busy systemd must not block the daemon


class NoKvm(OperatorError):
    """KVM cannot be used on this host."""


def lookup_user() -> tuple[int, int]:
    """Return uid and gid of the user that unprivileged processes run as.  Raises OperatorError."""
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        raise OperatorError(
            errno.ENOENT, f"unknown user {USER}: create it with: useradd --system --shell /usr/sbin/nologin {USER}"
        ) from None
    return user.pw_uid, user.pw_gid


def wait_for_kvm(timeout_s: float) -> int:
    """Open /dev/kvm; wait for it if it does not exist yet.  Raises NoKvm."""
    deadline_s = time.monotonic() + timeout_s
    said = False
    while True:
        try:
            return open_kvm()
        except NoKvm as error:
            if error.number not in (errno.ENOENT, errno.ENODEV, errno.ENXIO) or time.monotonic() >= deadline_s:
                raise
        if not said:
            log.info(f"waiting up to {timeout_s:.0f} s for {KVM}: no driver has made it yet")
            said = True
        time.sleep(KVM_POLL_S)


def open_kvm() -> int:
    """Open /dev/kvm.  Raises NoKvm, which says what to do."""
    try:
        fd = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
    except OSError as error:
        advice = {
            errno.ENOENT: "load the module kvm_intel or kvm_amd, and enable virtualisation in the firmware",
            errno.ENODEV: "the processor or its firmware settings offer no virtualisation",
            errno.ENOTTY: "this is not a KVM device",
        }.get(error.errno or 0, "check the permissions of the device")
        raise NoKvm(error.errno or 0, f"{KVM}: {sentence(error)}: {advice}") from None
    if version != KVM_API_VERSION:
        raise NoKvm(errno.ENOTSUP, f"{KVM}: its API has version {version}, not {KVM_API_VERSION}")
    return fd


def make_run_directory() -> None:
    """Make the directory for files that must outlive a killed daemon.  Children have no right to make it."""
    try:
        os.mkdir(RUN_DIRECTORY, 0o755)
    except FileExistsError:
        return
    except OSError as error:
        raise HostError(f"make {RUN_DIRECTORY}", error) from error


def is_free(path: str, what: str = CONTROL_SOCKET, kind: int = socket.SOCK_SEQPACKET) -> bool:
    """Return True if there is no socket at `path`, and False if there is one that no process serves.

    Raises OperatorError if a process serves it, such as another daemon, or HostError.
    """
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return True
        except ConnectionRefusedError:
            return False
        except OSError as error:
            raise HostError(f"{what} {path}", error) from error
    advice = "; stop it or use -s" if what == CONTROL_SOCKET else ""
    raise OperatorError(errno.EADDRINUSE, f"another vmd is already serving {path}{advice}")


def listen(
    path: str, owner: Owner, *, what: str = CONTROL_SOCKET, kind: int = socket.SOCK_SEQPACKET
) -> socket.socket:
    """Bind a socket and listen.  A stale socket is replaced; one that a process serves is not.

    Raises OperatorError or HostError, which name the path.
    """
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_MAX:
        raise OperatorError(
            errno.ENAMETOOLONG, f"{what} {path}: has {length} bytes, and at most {SOCKET_PATH_MAX} are possible"
        )
    if not is_free(path, what, kind):
        _unlink_socket(path, what)
    listener = socket.socket(socket.AF_UNIX, kind)
    old_mask = os.umask(0o777 & ~SOCKET_MODE)
    try:
        listener.bind(path)
        own_socket(path, owner, what)
        listener.listen(SOCKET_BACKLOG)
    except OSError as error:
        listener.close()
        raise HostError(f"{what} {path}", error) from error
    finally:
        os.umask(old_mask)
    return listener


def own_socket(path: str, owner: Owner, what: str = CONTROL_SOCKET) -> None:
    """Give a socket to the configured owner of the control socket."""
    try:
        os.chown(path, owner.uid, owner.gid if owner.gid is not None else 0)
        os.chmod(path, SOCKET_MODE)
    except OSError as error:
        log.error(f"{what} {path}: {sentence(error)}")


def remove_socket(path: str) -> None:
    """Remove a socket."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _unlink_socket(path: str, what: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OperatorError(errno.EEXIST, f"{what} {path}: exists and is not a socket")
    os.unlink(path)


def choose_log(debug: bool) -> str:
    """Return the form of log lines.  For SYSLOG, make fd 2 the socket of syslog."""
    if debug:
        return STDERR
    if on_journal():
        return JOURNAL
    sink = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sink.connect(SYSLOG_SOCKET)
    except OSError:
        sink.close()
        return STDERR  # a host without syslog
    sink.setblocking(False)
    os.dup2(sink.detach(), 2)
    return SYSLOG


def on_journal() -> bool:
    """Return whether fd 2 is the journal's stream for this service, and not one inherited from another service."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def journal_socket() -> socket.socket | None:
    """Return a socket for journal entries with fields; None if there is no journal."""
    sink = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sink.connect(JOURNAL_SOCKET)
    except OSError:
        sink.close()
        return None
    return sink


def notify(state: str, fds: tuple[int, ...] = ()) -> bool:
    """Send a message to systemd (sd_notify(3)).  Return False if that fails; True without systemd, too.

    A message that systemd does not take within NOTIFY_S is dropped.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return True
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(NOTIFY_S)
            sender.connect(address)
            socket.send_fds(sender, [state.encode()], list(fds))
    except OSError:
        return False
    return True


def notify_ready() -> None:
    """Tell systemd that the daemon serves."""
    notify("READY=1")


def watchdog_s() -> float:
    """Return the period of systemd's watchdog in seconds; 0 if there is none (sd_watchdog_enabled(3))."""
    pid, period_us = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    ours = pid in ("", str(os.getpid()))
    return int(period_us) / 1e6 if ours and period_us.isascii() and period_us.isdigit() else 0.0


def keep_alive(loop: "Loop") -> None:
    """Ping systemd's watchdog periodically while the loop runs, if systemd asks for it."""
    period_s = watchdog_s()

    def tell() -> None:
        loop.call_later(period_s / WATCHDOG_PINGS, tell)
        notify("WATCHDOG=1")

    if period_s:
        faulthandler.enable()  # prints a traceback when systemd aborts a daemon that is stuck
        tell()


def daemonize() -> Callable[[], None]:
    """Go to the background.  The process that started the daemon waits until the returned function is called.

    If the daemon ends before that, that process fails.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    if fork("go to the background"):
        close(writer)
        if os.read(reader, 1):
            os._exit(0)
        os.write(2, b"vmd: not started; the log says why\n")
        os._exit(1)
    close(reader)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    close(null)

    def ready() -> None:
        os.write(writer, b"1")
        close(writer)

    return ready
