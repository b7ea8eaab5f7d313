"""The console between UART and pty: nothing blocks, nothing grows, nothing that a viewer reads is lost."""

import os
import threading
from collections.abc import Iterator

import pytest

from vmd.ipc.loop import Loop
from vmd.parent.resources import Pty
from vmd.vm.console import BACKLOG_BYTES, Console

DEADLINE_S = 20.0


class Rig:
    """A console on a pty of its own, and a UART that takes what it is told to."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.pty = Pty()
        self.console = Console(self.pty.master, self.pty.slave, self.loop)
        self.received = b""
        self.room = 1 << 30
        self.console.connect(self.receive)

    def receive(self, data: bytes) -> int:
        """Be the UART."""
        accepted = min(len(data), self.room)
        self.received += data[:accepted]
        self.room -= accepted
        self.loop.stop()
        return accepted

    def run(self) -> None:
        """Run the loop until something stops it."""
        timer = self.loop.call_later(DEADLINE_S, lambda: pytest.fail("nothing happened"))
        self.loop.run()
        timer.cancel()

    def run_for(self, seconds: float) -> None:
        """Run the loop for a while."""
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run()

    def close(self) -> None:
        """Release everything."""
        self.loop.close()
        self.pty.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Give a console."""
    rig = Rig()
    yield rig
    rig.close()


def test_output_reaches_a_viewer_in_order(rig: Rig) -> None:
    """Bytes that follow one another are written together, none is lost or moved."""
    text = bytes(range(256)) * 8
    seen = bytearray()

    def write() -> None:
        for value in text:
            rig.console.send(bytes((value,)))

    os.set_blocking(rig.pty.slave, False)
    viewer = os.open(rig.pty.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)

    def view(_events: int) -> None:
        seen.extend(os.read(viewer, 4096))
        if len(seen) == len(text):
            rig.loop.stop()

    rig.loop.add(viewer, view)
    thread = threading.Thread(target=write)
    thread.start()
    rig.run()
    thread.join()
    rig.loop.remove(viewer)
    os.close(viewer)

    assert bytes(seen) == text
    assert rig.console.snapshot() == text


def test_a_flood_without_a_viewer_is_bounded(rig: Rig) -> None:
    """Case 45: megabytes that nobody reads leave the newest 64 KiB and no more memory than that."""
    line = bytes(range(64))
    for number in range(40_000):
        rig.console.send(b"%05d" % number + line)
    rig.run_for(0.05)

    backlog = rig.console.snapshot()

    assert len(backlog) == BACKLOG_BYTES
    assert backlog.endswith(b"39999" + line)
    assert rig.pty.unread_bytes() == 0  # a viewer that attaches now sees nothing twice


def test_input_waits_for_the_guest(rig: Rig) -> None:
    """What the UART has no room for stays, in order, until it has."""
    rig.room = 3
    os.write(rig.pty.slave, b"abcdefgh")
    rig.run()
    assert rig.received == b"abc"

    rig.room = 100
    rig.console.resume_input()
    rig.run()
    assert rig.received == b"abcdefgh"


def test_pty_is_raw(rig: Rig) -> None:
    """Neither echo nor line editing nor newline translation comes between."""
    os.write(rig.pty.slave, b"a\r\n\x03\x04\x7f")
    rig.run()
    assert rig.received == b"a\r\n\x03\x04\x7f"
    assert rig.pty.unread_bytes() == 0  # no echo
