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
SOCKET_BACKLOG = 64  # upstream's 5 turns away clients of a busy host
RUN_DIRECTORY = "/run/vmd"
SYSLOG_SOCKET = "/dev/log"
JOURNAL_SOCKET = "/run/systemd/journal/socket"
KVM_GET_API_VERSION = 0xAE00  # <linux/kvm.h>; what else KVM can do is not the parent's business
KVM_API_VERSION = 12
KVM = "/dev/kvm"
KVM_WAIT_S = 30.0  # at boot: until udev has loaded the module
KVM_POLL_S = 0.1
WATCHDOG_PINGS = 3  # in the time that systemd waits for one
NOTIFY_S = 2.0  # for systemd to take a message: it may be busy, and must not keep us


class NoKvm(OperatorError):
    """This host has no KVM that can be used."""


def lookup_user() -> tuple[int, int]:
    """Return uid and gid of the user our unprivileged processes run as."""
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        raise OperatorError(
            errno.ENOENT, f"unknown user {USER}: create it with: useradd --system --shell /usr/sbin/nologin {USER}"
        ) from None
    return user.pw_uid, user.pw_gid


def wait_for_kvm(timeout_s: float) -> int:
    """Open /dev/kvm as soon as it is there.  Raises NoKvm."""
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
    """Open /dev/kvm; NoKvm says what to do when that fails."""
    try:
        fd = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
    except OSError as error:
        advice = {
            errno.ENOENT: "load the module kvm_intel or kvm_amd, and enable virtualisation in the firmware",
            errno.ENODEV: "the processor or its firmware settings offer no virtualisation",
            errno.ENOTTY: "this is something else",
        }.get(error.errno or 0, "check the permissions of the device")
        raise NoKvm(error.errno or 0, f"{KVM}: {sentence(error)}: {advice}") from None
    if version != KVM_API_VERSION:
        raise NoKvm(errno.ENOTSUP, f"{KVM}: version {version} of its interface, not {KVM_API_VERSION}")
    return fd


def make_run_directory() -> None:
    """Make the directory for what has to outlive a killed daemon; its children could not."""
    try:
        os.mkdir(RUN_DIRECTORY, 0o755)
    except FileExistsError:
        return
    except OSError as error:
        raise HostError(f"make {RUN_DIRECTORY}", error) from error


def is_free(path: str, what: str = CONTROL_SOCKET, kind: int = socket.SOCK_SEQPACKET) -> bool:
    """Return whether there is no socket; False for one that nobody serves.

    Raises OperatorError if somebody serves it, which is another daemon if it is a control socket, or HostError.
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
    """Bind a socket; a stale one is replaced, one that is served is not.

    Raises OperatorError or HostError naming the path.
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
    """Take a socket away."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _unlink_socket(path: str, what: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OperatorError(errno.EEXIST, f"{what} {path}: exists and is not a socket")
    os.unlink(path)


def choose_log(debug: bool) -> str:
    """Return the form of our log lines, with fd 2 made what that form needs."""
    if debug:
        return STDERR
    if on_journal():
        return JOURNAL
    sink = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sink.connect(SYSLOG_SOCKET)
    except OSError:
        sink.close()
        return STDERR  # a host without syslog: what is written there is better than nothing
    sink.setblocking(False)
    os.dup2(sink.detach(), 2)
    return SYSLOG


def on_journal() -> bool:
    """Return whether fd 2 is the stream that systemd made for us, and not inherited from another service's shell."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def journal_socket() -> socket.socket | None:
    """Return a socket for entries with fields of their own, if the journal takes them."""
    sink = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sink.connect(JOURNAL_SOCKET)
    except OSError:
        sink.close()
        return None
    return sink


def notify(state: str, fds: tuple[int, ...] = ()) -> bool:
    """Tell systemd, if it is listening (sd_notify(3)); return whether there is nobody to tell, or it was told.

    What cannot be told within NOTIFY_S is no reason to stop what we are at.
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
    """Return how often systemd wants to hear from this process, in seconds (sd_watchdog_enabled(3)); 0: not at all."""
    pid, period_us = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    ours = pid in ("", str(os.getpid()))
    return int(period_us) / 1e6 if ours and period_us.isascii() and period_us.isdigit() else 0.0


def keep_alive(loop: "Loop") -> None:
    """Tell systemd time and again that the loop runs, if it wants to hear that."""
    period_s = watchdog_s()

    def tell() -> None:
        loop.call_later(period_s / WATCHDOG_PINGS, tell)
        notify("WATCHDOG=1")

    if period_s:
        faulthandler.enable()  # systemd aborts a daemon that is stuck: where it was is said then
        tell()


def daemonize() -> Callable[[], None]:
    """Go to the background.  Our starter waits until the returned function is called, or fails with us."""
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
