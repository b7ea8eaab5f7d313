"""Storage that does not answer, locks of strangers, and files whose close waits: they cost who has named them."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fusefile
from tests.support.bystander import NAME, PROMPT, Bystander, vm_block
from tests.support.clients import connect_as, receive
from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.fusefile import HELD, FuseFile
from tests.support.users import public_folder
from vmd.images.locks import DENIES, WRITE
from vmd.images.locks import flock as lock_struct
from vmd.ipc.imsg import encode
from vmd.ipc.messages import Failed, StartRequest
from vmd.record import Record

pytestmark = [pytest.mark.root, pytest.mark.kvm]

EVE, BOB = 65534, 40001  # nobody, and a number without a name
MIB = 1 << 20


@contextlib.contextmanager
def mounted(path: Path, content: bytes = bytes(MIB)) -> Iterator[FuseFile]:
    """Have a file of a FUSE file system at a path; in the end whatever waits for it is answered."""
    with FuseFile(content, for_all=True, locks=True) as file:
        assert file.attach(path.parent) == path
        try:
            yield file
        finally:
            file.release()
            subprocess.run(["umount", "--lazy", path.parent], check=True)


@contextlib.contextmanager
def starting(vmd: Daemon, name: str) -> Iterator["subprocess.Popen[str]"]:
    """Give a client that starts a VM."""
    with subprocess.Popen(
        [sys.executable, "-m", "vmctl", "-s", vmd.socket, "start", name],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as client:  # fmt: skip
        try:
            yield client
        finally:
            client.kill()


def refused(client: "subprocess.Popen[str]") -> str:
    """Wait until a client is told that its VM does not start; return what it says."""
    said, _ = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 1, said
    return said


# --- storage that does not answer ------------------------------------------------------------------------


@pytest.mark.deep
def test_a_disk_that_does_not_answer(tmp_path: Path) -> None:
    """It costs its VM the start, and the reset of its guest; both can be stopped, and so can the daemon."""
    path = tmp_path / "mnt" / "disk"
    path.parent.mkdir()
    conf = vm_block(NAME) + vm_block("hung", f'disk "{path}" format raw')
    with Daemon(tmp_path, conf) as vmd, mounted(path) as file:
        with Bystander(vmd):
            file.rule(fusefile.OPEN, HELD)
            with starting(vmd, "hung") as client:
                file.wait_held(1)
                vmd.must("stop", "-fw", "hung")
                assert "stopped" in refused(client)
            file.release()

            vmd.must("start", "hung")
            with vmd.console("hung") as console:
                console.expect(PROMPT, DEADLINE_S)
                file.rule(fusefile.OPEN, HELD)
                console.type("reset\r")
                file.wait_held(1)
            vmd.must("stop", "-fw", "hung")
            vmd.wait_state("hung", "stopped")

        with starting(vmd, "hung"):
            file.wait_held(2)
            assert vmd.stop() == 0


# --- locks of strangers ----------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, uid: int) -> Iterator[int]:
    """Have a user who may read a file take a lock by which nobody else may write to it; give the pid."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            Path("/proc/self/comm").write_text("thief")
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            fd = os.open(path, os.O_RDONLY)
            lock = lock_struct.pack(fcntl.F_RDLCK, os.SEEK_SET, DENIES + WRITE, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
            os.write(done, b"!")
            signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    try:
        assert os.read(ready, 1) == b"!"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def ask(client: socket.socket, request: Record, **fds: int) -> Record | None:
    """Send a request and return its first answer."""
    packet, order = encode(request, fds={name: [fd] for name, fd in fds.items()})
    socket.send_fds(client, [packet], order)
    return receive(client)


def test_who_has_a_lock_is_named() -> None:
    """Root is told the program, its pid and its user; others are not told the pid."""
    with public_folder() as directory:
        disk = directory / "disk"
        disk.write_bytes(bytes(MIB))
        disk.chmod(0o666)
        conf = vm_block("hers", "owner nobody:nogroup", f'disk "{disk}"')
        with Daemon(directory, conf) as vmd, locked(disk, EVE) as pid:
            done = vmd.vmctl("start", "hers")
            vmd.socket.chmod(0o666)
            with connect_as(vmd.socket, EVE, EVE) as eve:
                answer = ask(eve, StartRequest(name="hers"))
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        1, [f'vmctl: start vm command failed: disk {disk}: is in use by "thief" (pid {pid}, user nobody)'],
    )  # fmt: skip
    assert isinstance(answer, Failed)
    assert answer.text == f'disk {disk}: is in use by "thief" (user nobody)'
