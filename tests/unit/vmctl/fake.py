"""A daemon at vmd's end of the control socket, with the answers that a test gives it."""

import array
import contextlib
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from vmd.closing import close_all
from vmd.ipc.channel import FD_SPACE
from vmd.ipc.imsg import MAX_MESSAGE, Envelope, Form, decode, encode
from vmd.ipc.messages.clients import PROTOCOL, Hello, VmInfo
from vmd.record import Record

DEADLINE_S = 120.0
ROOT = Path(__file__).resolve().parents[3]

Answers = Sequence[Record] | None  # None closes the connection
Script = Callable[[Record], Answers]


def nothing(_request: Record) -> Answers:
    """Give no answer."""
    return ()


class FakeDaemon:
    """Serves one client after another.  `script` answers each request, in the order of arrival.

    An `older` daemon does not know Hello.
    """

    def __init__(self, path: Path, *, older: bool = False) -> None:
        self.path = path
        self.older = older
        self.form = Form.FIRST if older else Form.NAMED
        self.reads_files = True  # otherwise they are closed: a pipe that is still open could block
        self.script: Script = nothing
        self.requests: list[Record] = []
        self.files: list[dict[str, bytes]] = []  # for each request, the contents of its descriptors
        self._arrived: queue.SimpleQueue[Record] = queue.SimpleQueue()
        self._left: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def answers(self, *messages: Record) -> None:
        """Answer every request with these messages."""
        self.script = lambda _request: messages

    def requested(self) -> Record:
        """Wait for the next request and return it."""
        return self._arrived.get(timeout=DEADLINE_S)

    def wait_left(self) -> None:
        """Wait until a client has disconnected."""
        self._left.get(timeout=DEADLINE_S)

    def send(self, message: Record) -> None:
        """Send a message that is no answer to a request."""
        assert self._client is not None
        self._client.send(encode(message, form=self.form)[0])

    def send_raw(self, packet: bytes) -> None:
        """Send bytes that no real daemon would send."""
        assert self._client is not None
        self._client.send(packet)

    def hang_up(self) -> None:
        """Close the client's connection, as a daemon that dies."""
        assert self._client is not None
        self._client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop serving, and close all sockets."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._client is not None:
            with contextlib.suppress(OSError):
                self._client.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE_S)
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                self._client = client
                self._serve_client(client)
            self._client = None
            self._left.put(None)

    def _serve_client(self, client: socket.socket) -> None:
        while True:
            try:
                packet, rights, _flags, _ = client.recvmsg(MAX_MESSAGE, FD_SPACE)
            except OSError:
                return
            if not packet:
                return
            fds = array.array("i")
            for _level, _kind, data in rights:
                fds.frombytes(data)
            envelope = decode(packet, list(fds), "vmctl")
            if isinstance(envelope.message, Hello):
                if self.older:
                    return
                self.send(Hello(version=PROTOCOL, program="9.9"))
                continue
            self.files.append(read_files(envelope) if self.reads_files else {})
            close_all(fd for name in tuple(envelope.fds) for fd in envelope.take_fds(name))
            self.requests.append(envelope.message)
            answers = self.script(envelope.message)
            for message in answers or ():
                self.send(message)
            self._arrived.put(envelope.message)
            if answers is None:
                return


def read_files(envelope: Envelope) -> dict[str, bytes]:
    """Return what can be read from the descriptors of a request, and close them."""
    contents = {}
    for name in tuple(envelope.fds):
        for fd in envelope.take_fds(name):
            with open(fd, "rb") as file:
                contents[name] = file.read()
    return contents


def vm_info(name: str = "web", *, vmid: int = 1, running: bool = True, state: str = "", **more: object) -> VmInfo:
    """Return a VmInfo, a row of the list."""
    info = VmInfo(
        vmid=vmid,
        name=name,
        pid=40211 if running else 0,
        vcpus=1,
        memory_bytes=512 << 20,
        resident_bytes=300 << 20 if running else 0,
        tty="/dev/pts/3" if running else "",
        uid=0,
        gid=None,
        owner="root",
        state=state or ("running" if running else "stopped"),
    )
    return info.replace(**more)


def spawn(daemon: FakeDaemon, *arguments: str, stdin: int = subprocess.DEVNULL) -> "subprocess.Popen[str]":
    """Run vmctl in its own process."""
    return subprocess.Popen(
        [sys.executable, "-m", "vmctl", "-s", str(daemon.path), *arguments],
        cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
