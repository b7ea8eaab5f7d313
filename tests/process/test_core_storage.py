"""Storage that does not answer, locks of other users, and files whose close blocks affect only their own user."""

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fusefile
from tests.support.bystander import NAME, PROMPT, Bystander, vm_block
from tests.support.clients import connect_as, receive
from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.fusefile import FLUSH, HELD, FuseFile
from tests.support.guests import guest
from tests.support.network import Network
from tests.support.transfers import from_file, to_file
from tests.support.users import public_folder
from vmd.config.model import MAX_CHAIN, MAX_DISKS, DiskConfig, VmConfig, VmFlag
from vmd.images.create import create
from vmd.images.locks import DENIES, USES, WRITE
from vmd.images.locks import flock as lock_struct
from vmd.ipc.imsg import encode
from vmd.ipc.messages.clients import Failed, ListRequest, ReceiveRequest, StartRequest
from vmd.parent.opening import STUCK_MAX
from vmd.record import Record

pytestmark = [pytest.mark.root, pytest.mark.kvm]

EVE = 65534  # nobody
MIB = 1 << 20
# The operation that storage does not answer, and the statement of the vm block with the file.
HANGS = {
    "look-up": (fusefile.LOOKUP, "disk"),
    "attributes": (fusefile.GETATTR, "disk"),
    "open": (fusefile.OPEN, "disk"),
    "lock": (fusefile.SETLK, "disk"),
    "read": (fusefile.READ, "disk"),
    "disc": (fusefile.OPEN, "cdrom"),
    "kernel": (fusefile.OPEN, "boot"),
}


@contextlib.contextmanager
def mounted(path: Path, content: bytes = bytes(MIB)) -> Iterator[FuseFile]:
    """Mount a file of a FUSE file system at a path; at the end held operations are answered."""
    with FuseFile(content, for_all=True, locks=True) as file:
        assert file.attach(path.parent) == path
        try:
            yield file
        finally:
            file.release()
            subprocess.run(["umount", "--lazy", path.parent], check=True)


@contextlib.contextmanager
def starting(vmd: Daemon, name: str) -> Iterator["subprocess.Popen[str]"]:
    """Yield a client that starts a VM."""
    with subprocess.Popen(
        [sys.executable, "-m", "vmctl", "-s", vmd.socket, "start", name],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as client:  # fmt: skip
        try:
            yield client
        finally:
            client.kill()


def refused(client: "subprocess.Popen[str]") -> str:
    """Wait until a client's start fails; return its message."""
    said, _ = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 1, said
    return said


def ask(client: socket.socket, request: Record, **fds: int) -> Record | None:
    """Send a request and return its first answer."""
    packet, order = encode(request, fds={name: [fd] for name, fd in fds.items()})
    socket.send_fds(client, [packet], order)
    return receive(client)


# --- storage that does not answer ------------------------------------------------------------------------


@pytest.mark.deep
def test_a_disk_that_does_not_answer(tmp_path: Path) -> None:
    """Its VM cannot start or come back from a reset.  Both can be stopped, and the daemon can end."""
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


@pytest.mark.deep
@pytest.mark.timeout(300)
def test_storage_that_does_not_answer(tmp_path: Path) -> None:
    """For every operation and statement a message reports it in the end, and VMs can start again."""
    paths = {name: tmp_path / name / "disk" for name in HANGS}
    conf = vm_block(NAME)
    for name, path in paths.items():
        path.parent.mkdir()
        block = vm_block(name, f'{HANGS[name][1]} "{path}"')
        conf += block.replace(f'boot "{guest("demo")}"\n  boot', "boot")
    with Daemon(tmp_path, conf) as vmd, contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(mounted(path, guest("demo").read_bytes() if name == "kernel" else bytes(MIB)))
            for name, path in paths.items()
        }
        with Bystander(vmd):
            for name, file in files.items():
                file.rule(HANGS[name][0], HELD)
            clients = {name: stack.enter_context(starting(vmd, name)) for name in HANGS}
            for file in files.values():
                file.wait_held(1)
            for name, client in clients.items():
                said = refused(client)
                assert f"{HANGS[name][1].replace('boot', 'kernel')} {paths[name]}: " in said
                assert "not answer" in said or "examined within" in said, said
            for name, file in files.items():
                vmd.wait_state(name, "stopped")
                file.release()
                vmd.must("start", name)


@pytest.mark.deep
@pytest.mark.timeout(300)
def test_a_daemon_that_begins_while_storage_does_not_answer(tmp_path: Path) -> None:
    """The daemon serves and its other VMs run.  A VM that cannot start reports why, and so does a received one."""
    path = tmp_path / "mnt" / "disk"
    path.parent.mkdir()
    hung = vm_block("hung", f'disk "{path}" format raw')
    conf = vm_block(NAME) + hung + vm_block("other").replace("  disable\n", "")
    with Daemon(tmp_path, conf) as vmd, mounted(path) as file:
        vmd.must("start", "hung")
        to_file(vmd, "hung", tmp_path / "stream")
        vmd.stop()
        vmd.conf.write_text(conf.replace(hung, hung.replace("  disable\n", "")))
        file.rule(fusefile.OPEN, HELD)

        vmd.start()

        file.wait_held(1)
        vmd.wait_state("other", "running")
        with Bystander(vmd):
            row = vmd.wait_state("hung", "stopped")
            assert row["text"] == f"disk {path}: does not answer"
            status, said = from_file(vmd, "hung", tmp_path / "stream")
            assert (status, f"disk {path}: does not answer" in said) == (1, True), said


@pytest.mark.deep
def test_a_user_whose_storage_never_answers() -> None:
    """A limited number of the user's processes hang; then starts are refused at once.  Others can start VMs."""
    names = [f"hers{number}" for number in range(STUCK_MAX + 1)]
    with public_folder() as directory:
        path = directory / "mnt" / "disk"
        path.parent.mkdir()
        conf = "".join(vm_block(name, "owner nobody:nogroup", f'disk "{path}" format raw') for name in names)
        with Daemon(directory, vm_block(NAME) + vm_block("roots") + conf) as vmd, mounted(path) as file:
            with Bystander(vmd):
                vmd.socket.chmod(0o666)
                file.rule(fusefile.OPEN, HELD)
                for times, name in enumerate(names[:STUCK_MAX], 1):
                    with connect_as(vmd.socket, EVE, EVE) as eve:
                        eve.send(encode(StartRequest(name=name))[0])
                        file.wait_held(times)
                        vmd.must("stop", "-fw", name)
                        assert isinstance(receive(eve), Failed)
                answer: Record | None = None
                while not (isinstance(answer, Failed) and "do not end" in answer.text):  # killed ones may end late
                    with connect_as(vmd.socket, EVE, EVE) as eve:
                        answer = ask(eve, StartRequest(name=names[-1]))
                vmd.must("start", "roots")
            assert vmd.stop() == 0


# --- locks of others -------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, uid: int, byte: int) -> Iterator[int]:
    """Let a user with read permission lock a byte that locks of disks use; yield the user's pid."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            Path("/proc/self/comm").write_text("thief")
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            fd = os.open(path, os.O_RDONLY)
            lock = lock_struct.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
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


def test_the_holder_of_a_lock_is_named() -> None:
    """Root is told the program, its pid and its user; others are not told the pid."""
    with public_folder() as directory:
        disk = directory / "disk"
        disk.write_bytes(bytes(MIB))
        disk.chmod(0o666)
        conf = vm_block("hers", "owner nobody:nogroup", f'disk "{disk}"')
        with Daemon(directory, conf) as vmd, locked(disk, EVE, DENIES + WRITE) as pid:
            done = vmd.vmctl("start", "hers")
            vmd.socket.chmod(0o666)
            with connect_as(vmd.socket, EVE, EVE) as eve:
                answer = ask(eve, StartRequest(name="hers"))
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        1, [f'vmctl: start vm command failed: disk {disk}: is in use by "thief" (pid {pid}, user nobody)'],
    )  # fmt: skip
    assert isinstance(answer, Failed)
    assert answer.text == f'disk {disk}: is in use by "thief" (user nobody)'


@pytest.mark.deep
def test_a_vm_that_only_reads_a_file_is_not_blamed() -> None:
    """Two VMs share a base image, and another user marks it as written to: the second VM's start names that user."""
    with public_folder() as directory:
        base = directory / "base.qcow2"
        create(str(base), "qcow2", MIB)
        conf = ""
        for name in ("one", "two"):
            create(str(directory / name), "qcow2", MIB, str(base), "qcow2")
            conf += vm_block(name, f'disk "{directory / name}" format qcow2')
        base.chmod(0o644)
        with Daemon(directory, conf) as vmd:
            vmd.must("start", "one")
            with locked(base, EVE, USES + WRITE) as pid:
                done = vmd.vmctl("start", "two")
            assert f'file {base}: is in use by "thief" (pid {pid}, user nobody), which writes to it' in done.stderr
            vmd.must("start", "two")


# --- starts without end ----------------------------------------------------------------------------------


def chains(directory: Path) -> tuple[Path, ...]:
    """Make the maximum of disks, each with the longest chain of images; the last disk's base is missing."""
    tops = []
    for number in range(MAX_DISKS):
        below: Path | None = None
        for level in range(MAX_CHAIN):
            path = directory / f"{number}.{level}.qcow2"
            if below is None:
                create(str(path), "qcow2", MIB)
            else:
                create(str(path), "qcow2", MIB, str(below), "qcow2")
            path.chmod(0o666)
            below = path
        assert below is not None
        tops.append(below)
    (directory / f"{MAX_DISKS - 1}.0.qcow2").unlink()
    return tuple(tops)


@pytest.mark.deep
@pytest.mark.timeout(600)
def test_a_user_who_starts_one_instance_after_the_other() -> None:
    """128 starts with the most images possible, the last of them missing, do not delay others."""
    template = vm_block("template", "allow instance { disk, owner nobody }")
    with public_folder() as directory, contextlib.ExitStack() as stack:
        vmd = stack.enter_context(Daemon(directory, vm_block(NAME) + vm_block("roots") + template))
        disks = tuple(DiskConfig(path=str(path), format="qcow2") for path in chains(directory))
        with Bystander(vmd):
            vmd.socket.chmod(0o666)
            clients = [stack.enter_context(connect_as(vmd.socket, EVE, EVE)) for _ in range(16)]
            for number in range(128):
                name = f"instance{number}"
                config = VmConfig(name=name, disks=disks, given=VmFlag.DISK)
                client = clients[number % len(clients)]
                client.send(encode(StartRequest(name=name, template="template", config=config))[0])
            vmd.must("start", "roots")
            vmd.must("stop", "-fw", "roots")
            for number in range(128):
                answer = receive(clients[number % len(clients)])
                assert isinstance(answer, Failed), answer
                assert f"disk {disks[-1].path}: backing file" in answer.text


# --- files whose close waits -----------------------------------------------------------------------------

REQUESTS: tuple[tuple[int, Record, tuple[str, ...]], ...] = (
    (EVE, StartRequest(name="hers"), ("kernel", "initrd")),
    (40001, ListRequest(), ()),
    (40002, StartRequest(name="nowhere"), ("kernel",)),
    (40003, ReceiveRequest(name="received"), ("stream",)),
)


def lingering() -> int:
    """Return a connection whose close waits the longest possible time for its peer, which does not read."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        server.accept()[0].detach()  # stays open
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30000))
    sender.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sender.send(bytes(1 << 16))
    return sender.detach()


def pass_on(vmd: Daemon, uid: int, request: Record, names: tuple[str, ...], file: FuseFile | None) -> tuple[int, int]:
    """Pass a file from another process, whose own close may block; return its pid and a descriptor for the answer."""
    answered, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with connect_as(vmd.socket, uid, uid) as client:
                fd = file.open() if file is not None else lingering()  # from here on start no process
                packet, order = encode(request, fds={name: [fd] for name in names})
                socket.send_fds(client, [packet], order or [fd])
                if file is None:
                    os.close(fd)  # the last close blocks
                receive(client)
                os.write(done, b"!")
                signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    return pid, answered


def end(senders: list[tuple[int, int]]) -> None:
    """End processes that have passed files on."""
    for pid, answered in senders:
        os.close(answered)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.deep
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["never answers", "lingers"])
def test_files_whose_close_waits(network: Network, kind: str) -> None:
    """Files come with requests that take files and with others.  Other users do not wait, and the daemon can end."""
    conf = vm_block(NAME) + vm_block("hers", "owner nobody:nogroup")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(public_folder())
        fuse = stack.enter_context(FuseFile(guest("demo").read_bytes(), flushes=True, for_all=True))
        fuse.rule(FLUSH, HELD)
        vmd = stack.enter_context(Daemon(directory, conf))
        senders: list[tuple[int, int]] = []
        stack.callback(end, senders)
        stack.callback(fuse.release)
        with Bystander(vmd):
            vmd.socket.chmod(0o666)
            file = fuse if kind == "never answers" else None
            with network.inside():
                senders += [pass_on(vmd, *request, file) for request in REQUESTS]
            if file is not None:
                file.wait_held(len(REQUESTS) + 1)  # the closes block, even after SIGKILL: four controls, an opener
            for _, answered in senders:
                assert file is not None or select.select([answered], [], [], DEADLINE_S)[0]
        assert vmd.stop() == 0
