"""The daemon as a service: what it waits for at boot, and whether it logs to the journal."""

import contextlib
import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmd.config.model import Owner
from vmd.errors import HostError, OperatorError
from vmd.log import JOURNAL, STDERR, SYSLOG
from vmd.parent import service


def test_kvm_that_never_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The wait is logged once.  Then the error says what to do."""
    monkeypatch.setattr(service, "KVM", str(tmp_path / "kvm"))
    monkeypatch.setattr(service, "KVM_POLL_S", 0.01)

    with pytest.raises(service.NoKvm, match="No such file or directory: load the module"):
        service.wait_for_kvm(0.1)

    assert capfd.readouterr().err.count("waiting up to") == 1


def test_kvm_is_not_waited_for_in_the_foreground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timeout of 0 there is one check."""
    monkeypatch.setattr(service, "KVM", str(tmp_path / "kvm"))
    monkeypatch.delattr(time, "sleep")

    with pytest.raises(service.NoKvm):
        service.wait_for_kvm(0)


def test_a_file_that_is_not_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for, because it never becomes KVM."""
    monkeypatch.setattr(service, "KVM", "/dev/null")
    monkeypatch.delattr(time, "sleep")

    with pytest.raises(service.NoKvm) as raised:
        service.wait_for_kvm(60)

    assert raised.value.number == errno.ENOTTY


def test_an_inherited_variable_does_not_mean_a_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell of a service passes the variable on, but to programs with another standard error."""
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert service.on_journal()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    assert not service.on_journal()
    monkeypatch.delenv("JOURNAL_STREAM")
    assert not service.on_journal()


# --- the control socket -----------------------------------------------------------------------------------------

OURS = Owner(uid=os.getuid(), gid=os.getgid())


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """A daemon was killed.  Owner and mode are those of vm.conf before a client can connect."""
    path = tmp_path / "vmd.sock"
    assert service.is_free(str(path))
    service.listen(str(path), OURS).close()
    assert not service.is_free(str(path))
    with service.listen(str(path), OURS) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        assert stat.S_IMODE(path.stat().st_mode) == service.SOCKET_MODE
        assert (path.stat().st_uid, path.stat().st_gid) == (OURS.uid, OURS.gid)
        client.connect(str(path))
        with pytest.raises(OperatorError, match=f"another vmd is already serving {path}; stop it or use -s") as refused:
            service.listen(str(path), OURS)
        assert refused.value.number == errno.EADDRINUSE
        listener.accept()[0].close()
    service.remove_socket(str(path))
    service.remove_socket(str(path))
    assert not path.exists()


def test_a_file_is_never_replaced_by_a_socket(tmp_path: Path) -> None:
    """It may be anything of the host."""
    path = tmp_path / "passwd"
    path.write_text("root")
    with pytest.raises(OperatorError, match=f"control socket {path}: exists and is not a socket"):
        service.listen(str(path), OURS)
    with pytest.raises(HostError, match=f"control socket {tmp_path}/none/vmd.sock: No such file or directory"):
        service.listen(str(tmp_path / "none" / "vmd.sock"), OURS)
    assert path.read_text() == "root"


def test_an_owner_that_cannot_be_set(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The log says so, and the daemon goes on."""
    service.own_socket(str(tmp_path / "none"), OURS)
    assert f"control socket {tmp_path}/none: No such file or directory" in capfd.readouterr().err


def test_the_mode_of_other_files_is_as_before(tmp_path: Path) -> None:
    """The mask of the process is only changed for the socket."""
    mask = os.umask(0o027)
    try:
        service.listen(str(tmp_path / "vmd.sock"), OURS).close()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)


def test_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may exist."""
    path = tmp_path / "vmd"
    monkeypatch.setattr(service, "RUN_DIRECTORY", str(path))
    for _ in range(2):
        service.make_run_directory()
    assert path.is_dir()
    assert not path.stat().st_mode & 0o022
    monkeypatch.setattr(service, "RUN_DIRECTORY", str(tmp_path / "none" / "vmd"))
    with pytest.raises(HostError, match=f"make {tmp_path}/none/vmd: No such file"):
        service.make_run_directory()


def test_nobody_else_can_connect_before_the_owner_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket never has a wider mode than the configured one, not even for a moment."""
    modes: list[int] = []
    monkeypatch.setattr(
        service, "own_socket", lambda path, *_: modes.append(stat.S_IMODE(os.stat(path).st_mode))
    )
    for mask in (0, 0o077):
        before = os.umask(mask)
        try:
            path = str(tmp_path / f"{mask}.sock")
            service.listen(path, OURS).close()
        finally:
            os.umask(before)
    assert modes == [0o660, 0o660]


@pytest.mark.parametrize(("owner", "ids"), [(Owner(uid=5, gid=6), (5, 6)), (Owner(uid=5), (5, 0))])
def test_whose_the_socket_is(monkeypatch: pytest.MonkeyPatch, owner: Owner, ids: tuple[int, int]) -> None:
    """Without a group in vm.conf it is root's."""
    done: list[object] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: done.append((path, uid, gid)))
    monkeypatch.setattr(os, "chmod", lambda path, mode: done.append((path, mode)))
    service.own_socket("/s", owner)
    assert done == [("/s", *ids), ("/s", 0o660)]


def test_the_longest_path_of_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has as many bytes as the kernel takes."""
    monkeypatch.chdir(tmp_path)
    service.listen("x" * 107, OURS).close()
    with pytest.raises(OperatorError, match="has 108 bytes, and at most 107 are possible"):
        service.listen("x" * 108, OURS)


def test_everybody_may_enter_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children open the files in it with rights of their own."""
    monkeypatch.setattr(service, "RUN_DIRECTORY", str(tmp_path / "vmd"))
    mask = os.umask(0)
    try:
        service.make_run_directory()
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "vmd").stat().st_mode) == 0o755


# --- the host ---------------------------------------------------------------------------------------------------


def test_a_host_without_our_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence has the command that makes it."""
    monkeypatch.setattr(service, "USER", "root")
    assert service.lookup_user() == (0, 0)
    monkeypatch.setattr(service, "USER", "nosuchuser")
    with pytest.raises(OperatorError, match="unknown user nosuchuser: create it with: useradd --system"):
        service.lookup_user()


def test_a_kvm_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface is not the one that we know."""
    monkeypatch.setattr(service, "KVM", "/dev/null")
    monkeypatch.setattr("fcntl.ioctl", lambda *_: 12)
    os.close(service.open_kvm())
    monkeypatch.setattr("fcntl.ioctl", lambda *_: 13)
    with pytest.raises(service.NoKvm, match="/dev/null: its API has version 13, not 12"):
        service.open_kvm()


# --- the service manager ----------------------------------------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Return the socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield manager


def test_messages_to_the_service_manager(manager: socket.socket) -> None:
    """Descriptors go along."""
    service.notify_ready()
    assert manager.recv(100) == b"READY=1"
    assert service.notify("FDSTORE=1\nFDNAME=x", (0, 1))
    message, fds, _, _ = socket.recv_fds(manager, 100, 9)
    assert (message, len(fds)) == (b"FDSTORE=1\nFDNAME=x", 2)
    for fd in fds:
        os.close(fd)


def test_a_service_manager_that_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon goes on, and so it does without one."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    assert not service.notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert service.notify("READY=1")


def test_a_busy_service_manager(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not block the daemon: the message is dropped."""
    monkeypatch.setattr(service, "NOTIFY_S", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, contextlib.suppress(BlockingIOError):
        other.setblocking(False)
        while True:
            other.sendto(b"x", manager.getsockname())
    assert not service.notify("WATCHDOG=1")
    assert manager.recv(9) == b"x"
    assert service.notify("WATCHDOG=1")


def test_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name begins with a zero byte, which the environment cannot have."""
    name = f"vmd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        assert service.notify("STATUS=")
        assert manager.recv(100) == b"STATUS="


@pytest.mark.parametrize(
    ("pid", "usec", "seconds"),
    [("", "30000000", 30.0), (str(os.getpid()), "500000", 0.5), ("1", "30000000", 0.0), ("", "", 0.0), ("", "-5", 0.0),
     ("", "\u00b2", 0.0)],
)  # fmt: skip
def test_the_watchdog_of_the_service_manager(
    monkeypatch: pytest.MonkeyPatch, manager: socket.socket, pid: str, usec: str, seconds: float
) -> None:
    """It may be meant for another process.  Without it nothing is sent."""
    monkeypatch.setenv("WATCHDOG_PID", pid)
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setattr("faulthandler.enable", lambda: None)
    timers: list[tuple[float, Callable[[], None]]] = []
    loop = SimpleNamespace(call_later=lambda delay_s, call: timers.append((delay_s, call)))
    assert service.watchdog_s() == seconds
    service.keep_alive(cast("Any", loop))
    if not seconds:
        assert timers == []
        return
    for number in range(3):
        assert manager.recv(100) == b"WATCHDOG=1"
        delay_s, call = timers[number]
        assert delay_s <= seconds / 2
        call()


def test_where_log_lines_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the foreground and without a syslog they go to standard error."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    monkeypatch.setattr(service, "SYSLOG_SOCKET", str(tmp_path / "log"))
    monkeypatch.setattr(service, "JOURNAL_SOCKET", str(tmp_path / "journal"))
    assert service.choose_log(debug=True) == service.choose_log(debug=False) == STDERR
    assert service.journal_socket() is None
    copied: list[int] = []
    monkeypatch.setattr("os.dup2", lambda fd, to: copied.extend((fd, to)))
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own,
    ):
        log.bind(str(tmp_path / "log"))
        own.bind(str(tmp_path / "journal"))
        assert service.choose_log(debug=True) == STDERR
        assert copied == []
        assert service.choose_log(debug=False) == SYSLOG
        assert copied[1] == 2
        assert not os.get_blocking(copied[0])
        os.write(copied[0], b"line")
        assert log.recv(9) == b"line"
        os.close(copied[0])
        journal = service.journal_socket()
        assert journal is not None
        journal.close()
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert service.choose_log(debug=False) == JOURNAL


BACKGROUND = """
import json, os, sys
from vmd.parent import service
ready = service.daemonize()
out, how = int(sys.argv[1]), sys.argv[2]
links = [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1)]
os.write(out, json.dumps([os.getsid(0) == os.getpid(), os.getcwd(), *links]).encode())
if how == "serves":
    ready()
    sys.stdin.read()  # the daemon goes on, without what it was started with
os._exit(7)
"""


@pytest.mark.parametrize(("how", "status", "errors"), [
    ("serves", 0, ""), ("ends", 1, "vmd: not started; the log says why\n"),
])  # fmt: skip
def test_a_daemon_in_the_background(how: str, status: int, errors: str) -> None:
    """The process that was started ends when the daemon serves, or has failed.  The daemon keeps nothing of it."""
    reading, writing = os.pipe()
    with open(reading, "rb") as told:
        started = subprocess.Popen(
            [sys.executable, "-c", BACKGROUND, str(writing), how], cwd=Path(__file__).parents[3],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=[writing],
        )  # fmt: skip
        os.close(writing)
        output = started.communicate(timeout=60)
        assert json.loads(told.read()) == [True, "/", os.devnull, os.devnull]
    assert (started.returncode, *output) == (status, "", errors)
