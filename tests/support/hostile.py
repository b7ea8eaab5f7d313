"""A program that attacks a daemon: it connects as a user and repeats one kind of attack.

    python -m tests.support.hostile SOCKET UID GROUP KIND SEED

It ends at the end of its standard input.  The FUSE files of the attack `poison` are served by the parent process, which
has none of them open, and the client's process dies with it.  Otherwise the last close of each file, when the client
ends, would wait for its own server.
"""

import contextlib
import ctypes
import errno
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.support.clients import connect
from tests.support.daemon import ROOT
from tests.support.fusefile import FLUSH, HELD, FuseFile
from tests.support.messages import CODES
from tests.support.network import Network
from vmd.ipc.imsg import HEADER, MAX_MESSAGE, Form, encode
from vmd.ipc.messages.clients import (
    ConsoleRequest,
    ListRequest,
    NicsRequest,
    PauseRequest,
    StartRequest,
    StopRequest,
    WaitRequest,
)

PR_SET_PDEATHSIG = 1
OTHERS = ("a1", "b1", "b2", "nowhere")  # VMs of other users, or that do not exist
CROWD = 70  # more connections than a user may have
WAIT_S = 2.0


class Client:
    """The attacking user."""

    def __init__(self, path: Path, seed: int, file: FuseFile) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.file = file
        self.kept: list[int] = []  # descriptors to pass; not closed here, because a close may block

    def flood(self) -> None:
        """Send requests without reading answers, until the connection ends."""
        packet = encode(ListRequest())[0]
        with connect(self.path) as client:
            while True:
                client.send(packet)

    def come_and_go(self) -> None:
        """Send requests, and disconnect before an answer comes."""
        with connect(self.path) as client:
            for _ in range(16):
                client.send(encode(ListRequest())[0])

    def crowd(self) -> None:
        """Open more connections than allowed, each with a request that waits."""
        with contextlib.ExitStack() as stack:
            for number in range(CROWD):
                client = stack.enter_context(connect(self.path))
                with contextlib.suppress(OSError):
                    client.send(encode((WaitRequest, NicsRequest)[number % 2](name="c1"))[0])
            select.select([], [], [], WAIT_S)

    def garbage(self) -> None:
        """Send invalid messages, and messages that no client sends."""
        chance = self.random
        stop = StopRequest(vmid=1 << 20, name="nobody", force=True)  # no change of one byte makes it this user's VM
        with connect(self.path) as client:
            client.settimeout(WAIT_S)
            while True:
                code = chance.choice((*CODES, chance.randrange(1 << 32)))
                request = chance.choice((ListRequest(), stop, StartRequest(name="x")))
                packet = bytearray(encode(request, form=chance.choice((Form.FIRST, Form.NAMED)))[0])
                packet[chance.randrange(len(packet))] = chance.randrange(256)
                raw = chance.randbytes(chance.randrange(MAX_MESSAGE - HEADER.size))
                client.send(
                    chance.choice((
                        bytes(packet), bytes(packet[: chance.randrange(len(packet))]), raw, raw[:16], b"",
                        HEADER.pack(code, HEADER.size + len(raw), 0, 0, 0) + raw, bytes(1 << 17),
                    ))
                )  # fmt: skip
                if chance.random() < 0.2:
                    client.recv(MAX_MESSAGE)

    def others(self) -> None:
        """Send requests for VMs of other users."""
        for name in OTHERS:
            for request in (
                StopRequest(name=name, force=True), StartRequest(name=name), PauseRequest(name=name, paused=True),
                ConsoleRequest(name=name, force=True),
            ):  # fmt: skip
                with connect(self.path) as client:
                    client.settimeout(WAIT_S)
                    client.send(encode(request)[0])
                    client.recv(MAX_MESSAGE)

    def poison(self) -> None:
        """Pass files whose close fails or blocks, and unusual files, as boot images or as unexpected descriptors."""
        if not self.kept:
            self.kept = [
                self.file.open(), os.memfd_create("m"), os.open("/", os.O_RDONLY), os.pidfd_open(os.getpid()),
                *in_a_circle(),
            ]  # fmt: skip
        with connect(self.path) as client:
            client.settimeout(WAIT_S)
            for fd in (*self.random.sample(self.kept, len(self.kept)), client.fileno()):
                self.give(client, fd)
                client.recv(MAX_MESSAGE)
        with connect(self.path) as client:
            client.settimeout(WAIT_S)
            lingering, peer = lingering_pair()
            with peer:
                with lingering:  # so that vmd has the last descriptor and closes the socket
                    self.give(client, lingering.fileno())
                client.recv(MAX_MESSAGE)

    def give(self, client: socket.socket, fd: int) -> None:
        """Send a request with a descriptor."""
        as_kernel = self.random.random() < 0.5
        request = StartRequest(name=self.random.choice(("c1", *OTHERS))) if as_kernel else ListRequest()
        packet, order = encode(request, fds={"kernel": [fd]} if as_kernel else {})
        socket.send_fds(client, [packet], order or [fd])


def lingering_pair() -> tuple[socket.socket, socket.socket]:
    """Return a TCP connection.  Closing the first socket blocks until the second one reads, which it does not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        second, _ = listener.accept()
    first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    first.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            first.send(bytes(1 << 16))
    return first, second


def in_a_circle() -> list[int]:
    """Return two sockets whose queues hold descriptors of the sockets themselves, in a cycle."""
    first, second = socket.socketpair()
    for sock in (first, second):
        socket.send_fds(sock, [b"x"], [first.fileno(), second.fileno()])
    return [first.detach(), second.detach()]


KINDS: Mapping[str, Callable[[Client], None]] = {
    "flood": Client.flood,
    "come and go": Client.come_and_go,
    "crowd": Client.crowd,
    "garbage": Client.garbage,
    "others": Client.others,
    "poison that fails": Client.poison,
    "poison that waits": Client.poison,
}
USUAL = (
    BrokenPipeError, ConnectionResetError, ConnectionRefusedError, ConnectionAbortedError, TimeoutError, BlockingIOError
)  # fmt: skip


def attack(client: Client, uid: int, group: int, kind: str) -> None:
    """Become the user, and repeat the attack."""
    os.setgroups([group])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # changing the user has cleared it
    while True:
        try:
            KINDS[kind](client)
        except USUAL:
            continue
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.EIO, errno.ETOOMANYREFS, errno.ENOTCONN):
                raise


@contextlib.contextmanager
def hostile(
    path: Path, uid: int, group: int, kind: str, seed: int, network: Network
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a hostile client while the context lasts, in this network.  Members of `group` may use the socket."""
    command = [sys.executable, "-m", "tests.support.hostile", str(path), str(uid), str(group), kind, str(seed)]
    with network.inside():
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
    with process:
        try:
            yield process
        finally:
            process.kill()


def main() -> None:
    """Start the client's process, and serve its files."""
    path, uid, group, kind, seed = sys.argv[1:]
    with FuseFile(bytes(4096), for_all=True, flushes=True) as file:
        file.rule(FLUSH, HELD if kind == "poison that waits" else errno.EIO)
        pid = os.fork()
        if pid == 0:
            try:
                os.close(file._device)
                attack(Client(Path(path), int(seed), file), int(uid), int(group), kind)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            os._exit(1)
        # A client that waits for one of our files ends when this process ends.
        select.select([0, os.pidfd_open(pid)], [], [])
        os._exit(1)


if __name__ == "__main__":
    main()
