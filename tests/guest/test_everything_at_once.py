"""Several clients send all kinds of requests for the same VMs, while processes die (arch. 8).

A fixed seed determines the requests, but not their order in time.  In every order each request is answered once,
nothing hangs, and nothing is left.
"""

import contextlib
import os
import random
import select
import signal
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.blkdisk import Disk
from tests.support.daemon import DEADLINE_S
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon, ours
from tests.support.network import Network
from tests.support.transfers import Footprint
from vmd.ipc.imsg import MAX_MESSAGE, decode, encode
from vmd.ipc.messages.clients import (
    ANSWERS,
    ConsoleRequest,
    ListRequest,
    NicsRequest,
    PauseRequest,
    ReceiveRequest,
    ReloadRequest,
    SendRequest,
    StartRequest,
    StopRequest,
    WaitRequest,
)
from vmd.ipc.messages.shared import Live
from vmd.ipc.routes import BY_CLASS
from vmd.record import Record

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(600)]

CONFIGURED = ("a", "b", "c")
NAMES = (*CONFIGURED, "x")  # exists only after it was received
PARTIAL = tuple(cls for cls in ANSWERS if BY_CLASS[cls].partial)
CLIENTS = 3
LEAVES = 0.1  # the share of clients that disconnect before their answer


def block(name: str, kernel: str, *lines: str) -> str:
    """Return a vm block."""
    return "\n".join((f'vm "{name}" {{', "disable", "memory 32M", f'boot "{guest(kernel)}"', *lines, "}\n"))


class Request:
    """A request on a connection of its own."""

    def __init__(self, vmd: NetDaemon, request: Record, stream: int | None = None) -> None:
        self.request = request
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(vmd.socket))
        self.socket.settimeout(DEADLINE_S)
        packet, fds = encode(request, fds={"stream": [stream]} if stream is not None else {})
        socket.send_fds(self.socket, [packet], fds)

    def answer(self) -> Record:
        """Wait for the answer, then disconnect."""
        with self.socket:
            while True:
                try:
                    packet = self.socket.recv(MAX_MESSAGE)
                except TimeoutError:
                    pytest.fail(f"no answer to {self.request}")
                assert packet, f"turned away with {self.request}"
                message = decode(packet, [], "vmd").message
                if not isinstance(message, PARTIAL):
                    assert not select.select([self.socket], [], [], 0)[0], f"two answers to {self.request}"
                    return message


class Client:
    """A client that sends one request after another."""

    def __init__(self, vmd: NetDaemon, seed: int) -> None:
        self.vmd = vmd
        self.random = random.Random(seed)
        self.streams = [vmd.directory / f"stream-{seed}-{number}" for number in range(2)]
        self.waiting: list[Request] = []
        for path in self.streams:
            path.touch()

    def run(self, steps: int) -> None:
        """Do a number of steps."""
        things: Sequence[tuple[int, Callable[[str], None]]] = (
            (12, lambda name: self.ask(StartRequest(name=name))),
            (4, lambda name: self.ask(StopRequest(name=name, force=True, wait=self.random.random() < 0.5))),
            (2, lambda name: self.ask(StopRequest(name=name))),
            (16, lambda name: self.ask(PauseRequest(name=name, paused=self.random.random() < 0.5))),
            (8, self.send),
            (6, self.receive),
            (10, self.move),
            (3, lambda _name: self.ask(ReloadRequest())),
            (3, lambda name: self.ask(ConsoleRequest(name=name))),
            (4, lambda name: self.ask(NicsRequest(name=name))),
            (3, lambda _name: self.ask(ListRequest())),
            (3, lambda name: self.waiting.append(Request(self.vmd, WaitRequest(name=name)))),
            (3, lambda _name: self.kill()),
        )
        for _ in range(steps):
            (thing,) = self.random.choices([thing for _, thing in things], [weight for weight, _ in things])
            thing(self.random.choice(NAMES))

    def ask(self, message: Record, stream: int | None = None) -> None:
        """Send a request, and wait for the answer or disconnect."""
        self.end(Request(self.vmd, message, stream))

    def end(self, request: Request) -> None:
        """Wait for an answer, or disconnect."""
        if self.random.random() < LEAVES:
            request.socket.close()
        else:
            request.answer()

    def send_request(self, name: str, keep: float) -> SendRequest:
        """Return a request to send a VM, half of them while it runs; with a chance to keep it."""
        live = Live(still_ms=self.random.choice((1, 300)), rounds=3) if self.random.random() < 0.5 else None
        return SendRequest(name=name, keep=self.random.random() < keep, live=live)

    def send(self, name: str) -> None:
        """Send a VM to a file."""
        with self.random.choice(self.streams).open("wb") as file:
            self.ask(self.send_request(name, keep=0.5), file.fileno())

    def receive(self, name: str) -> None:
        """Receive a VM from a file, which may be empty or cut off."""
        with self.random.choice(self.streams).open("rb") as file:
            self.ask(ReceiveRequest(name=name, paused=self.random.random() < 0.3), file.fileno())

    def move(self, name: str) -> None:
        """Send and receive a VM through a pipe."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        receiver = Request(self.vmd, ReceiveRequest(name=self.random.choice(NAMES)), reading)
        sender = Request(self.vmd, self.send_request(name, keep=0.3), writing)
        os.close(reading)
        os.close(writing)
        for request in self.random.sample((receiver, sender), 2):
            self.end(request)

    def kill(self) -> None:
        """End the process of a VM or of a device."""
        titles = self.vmd.processes()
        victims = sorted(title for title in titles if title.startswith("vmd: vm/"))
        if victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(titles[self.random.choice(victims)], signal.SIGKILL)


@pytest.mark.parametrize(
    ("seed", "steps"), [(1, 60), *(pytest.param(seed, 400, marks=pytest.mark.deep) for seed in range(2, 6))]
)
def test_everything_at_once(tmp_path: Path, seed: int, steps: int) -> None:
    """Afterwards every VM can be ended and started, and the daemon has no more resources than before."""
    conf = (
        block("a", "demo", "vcpus 2", "local interface")
        + block("b", "blk", 'cmdline "churn smp"', "vcpus 2", f'disk "{Disk(tmp_path / "disk").path}" format raw')
        + block("c", "vmmci")
    )
    with Network() as network:
        with NetDaemon(tmp_path, network, conf) as vmd:
            vmd.must("start", "a")  # priv keeps two files from the first start of a VM with interfaces
            vmd.must("stop", "-fw", "a")
            before = Footprint(vmd)
            clients = [Client(vmd, 100 * seed + number) for number in range(CLIENTS)]
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(lambda client: client.run(steps), clients))

            vmd.vmctl("stop", "-afw")
            for client in clients:
                for request in client.waiting:
                    request.answer()
            assert {row["name"]: row["state"] for row in vmd.rows()} == dict.fromkeys(CONFIGURED, "stopped")
            before.check(vmd)
            for name in CONFIGURED:
                vmd.must("start", name)
            vmd.must("stop", "-afw")
            assert "Traceback" not in vmd.log
        assert ours(network) == []
