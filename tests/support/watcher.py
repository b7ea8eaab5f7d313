"""Asks a daemon for its status as root, and a guest for a prompt, repeatedly, and reports the longest times.

It is a separate program, so that the test's work and open files do not disturb it:
`python -m tests.support.watcher SOCKET TTY PID`.  A line on its standard input asks for a `Longest` as JSON, which is
written after one more round of both questions; the end of its input ends it.
"""

import contextlib
import json
import os
import select
import socket
import sys
from pathlib import Path
from typing import NamedTuple

from vmd.ipc.imsg import MAX_MESSAGE, decode, encode
from vmd.ipc.messages.clients import End, Failed, ListRequest

PROMPT = b"vmd-demo> "
TICK_S = 0.01
PAUSE_S = 0.1  # the pause between two rounds


class Longest(NamedTuple):
    """The longest waits, in seconds, and the number of rounds."""

    status_s: float
    guest_s: float
    rounds: int


class Stopwatch:
    """Measures the part of a wait that the daemon causes, without delays by a busy machine.

    It counts the ticks that this otherwise idle process has slept, so a machine that stops for a while adds only one
    tick.  The time that the daemon was ready to run but had no processor is subtracted.
    """

    def __init__(self, parent: int) -> None:
        """`parent` is the daemon's pid."""
        self.parent = parent
        self.ticks = 0
        self.starved_s = self._starved_s()

    def wait(self, fd: int) -> None:
        """Wait until a descriptor is readable."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not poll.poll(TICK_S * 1000):
            self.ticks += 1

    def tick(self) -> None:
        """Sleep for one tick, where there is no descriptor to wait for."""
        select.select([], [], [], TICK_S)
        self.ticks += 1

    def passed_s(self) -> float:
        """Return the measured time."""
        return max(0.0, self.ticks * TICK_S - max(0.0, self._starved_s() - self.starved_s))

    def _starved_s(self) -> float:
        """Return the total time that the processes that answer root have waited for a processor."""
        starved_ns = 0
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.parent}/task/{self.parent}/children").read_text().split()
            for pid in (self.parent, *children):
                with contextlib.suppress(OSError):  # the process has ended
                    title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0")
                    if pid == self.parent or title == b"vmd: control":
                        starved_ns += int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
        return starved_ns / 1e9


def ask(path: str, watch: Stopwatch) -> None:
    """Ask the daemon for its status, with new connections until one gets an answer."""
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.setblocking(False)
            try:
                client.connect(path)
                client.send(encode(ListRequest())[0])
                if is_answered(client, watch):
                    return
            except (BlockingIOError, ConnectionError, FileNotFoundError):
                watch.tick()  # vmd does not accept yet, or control is being replaced


def is_answered(client: socket.socket, watch: Stopwatch) -> bool:
    """Receive the answer; return whether all of it came."""
    while True:
        watch.wait(client.fileno())
        packet = client.recv(MAX_MESSAGE)
        if not packet:
            return False
        answer = decode(packet, [], "vmd").message
        assert not isinstance(answer, Failed), answer
        if isinstance(answer, End):
            return True


class Guest:
    """A guest that answers an empty line with its prompt."""

    def __init__(self, tty: str, watch: Stopwatch) -> None:
        self.fd = os.open(tty, os.O_RDWR | os.O_NOCTTY)
        self.said = b""
        self.expect_prompt(watch)

    def expect_prompt(self, watch: Stopwatch) -> None:
        """Read up to the next prompt."""
        while PROMPT not in self.said:
            watch.wait(self.fd)
            self.said += os.read(self.fd, 65536)
        self.said = self.said.partition(PROMPT)[2]

    def ask(self, watch: Stopwatch) -> None:
        """Type an empty line."""
        os.write(self.fd, b"\r")
        self.expect_prompt(watch)


def main(path: str, tty: str, parent: int) -> None:
    """Ask until standard input ends."""
    guest = Guest(tty, Stopwatch(parent))
    longest = Longest(0.0, 0.0, 0)
    while True:
        wanted = select.select([0], [], [], PAUSE_S)[0]
        if wanted and not os.read(0, 100):
            return
        watch = Stopwatch(parent)
        ask(path, watch)
        status_s = max(longest.status_s, watch.passed_s())
        watch = Stopwatch(parent)
        guest.ask(watch)
        longest = Longest(status_s, max(longest.guest_s, watch.passed_s()), longest.rounds + 1)
        if wanted:
            print(json.dumps(longest), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
