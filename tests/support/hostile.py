"""A program that means harm to a daemon: it connects as some user and does one thing again and again.

    python -m tests.support.hostile SOCKET UID GROUP KIND SEED

It ends with its standard input.  The files of poison are served by a process that has none of them open, and the
client's process ends with it: else the last close of each, at the client's end, would wait for its own server.
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
OTHERS = ("a1", "b1", "b2", "nowhere")  # VMs of users that no hostile client is
CROWD = 70  # more than a user may have
WAIT_S = 2.0


class Client:
    """The user."""

    def __init__(self, path: Path, seed: int, file: FuseFile) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.file = file
        self.kept: list[int] = []  # what is passed: we do not close it ourselves, for that may wait

    def flood(self) -> None:
        """Ask without reading any answer, up to the end of the connection."""
        packet = encode(ListRequest())[0]
        with connect(self.path) as client:
            while True:
                client.send(packet)

    def come_and_go(self) -> None:
        """Ask, and leave before there is an answer."""
        with connect(self.path) as client:
            for _ in range(16):
                client.send(encode(ListRequest())[0])

    def crowd(self) -> None:
        """Have more connections than there are, each with something that waits."""
        with contextlib.ExitStack() as stack:
            for number in range(CROWD):
                client = stack.enter_context(connect(self.path))
                with contextlib.suppress(OSError):
                    client.send(encode((WaitRequest, NicsRequest)[number % 2](name="c1"))[0])
            select.select([], [], [], WAIT_S)

    def garbage(self) -> None:
        """Send what is no message, or none of a client's."""
        chance = self.random
        stop = StopRequest(vmid=1 << 20, name="nobody", force=True)  # no change of one byte makes a VM of this user's
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
        """Ask for what is somebody else's."""
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
        """Pass files whose close fails or waits, and others that nobody expects, as boot images or as nothing."""
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
                with lingering:  # the last close is to be theirs
                    self.give(client, lingering.fileno())
                client.recv(MAX_MESSAGE)

    def give(self, client: socket.socket, fd: int) -> None:
        """Pass a file."""
        as_kernel = self.random.random() < 0.5
        request = StartRequest(name=self.random.choice(("c1", *OTHERS))) if as_kernel else ListRequest()
        packet, order = encode(request, fds={"kernel": [fd]} if as_kernel else {})
        socket.send_fds(client, [packet], order or [fd])


def lingering_pair() -> tuple[socket.socket, socket.socket]:
    """Return a TCP connection: the first one's close waits for what the second one does not read."""
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
    """Return two sockets, of which each is on its way to itself."""
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
    """Become the user, and do it."""
    os.setgroups([group])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # which changing the user has cleared
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
    """Have such a client for some time, on a host with this network; members of `group` may use the socket."""
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
        # A client that waits for one of our files ends when we do.
        select.select([0, os.pidfd_open(pid)], [], [])
        os._exit(1)


if __name__ == "__main__":
    main()
