"""The console between UART and pty never blocks, is bounded, and loses nothing that a viewer reads (hostile 45)."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from vmd.backlog import BACKLOG_BYTES, Backlog, BacklogWriter
from vmd.ipc.loop import Loop
from vmd.parent.resources import Pty
from vmd.vm.console import BATCH_S, Console

DEADLINE_S = 20.0


class Rig:
    """A console on its own pty, and a UART that takes up to `room` bytes."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.pty = Pty()
        self.backlog = Backlog.create()
        self.console = self.attach()
        self.received = b""
        self.room = 1 << 30
        self.console.connect(self.receive)

    def attach(self) -> Console:
        """Return the console of a VM process that starts."""
        fds = self.pty.fds()
        writer = BacklogWriter(os.dup(self.backlog.fd))
        return Console(fds["tty"][0], fds["tty_slave"][0], writer, self.loop)

    def receive(self, data: bytes) -> int:
        """Take bytes like a UART."""
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

    def run_once(self) -> None:
        """Handle what is ready and due."""
        self.loop.call_later(0, lambda: self.loop.call_from_thread(self.loop.stop))
        self.loop.run()

    def close(self) -> None:
        """Release everything."""
        self.loop.close()
        self.pty.close()
        self.backlog.close()
        os.close(self.console._master)
        os.close(self.console._slave)


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Yield a console."""
    rig = Rig()
    yield rig
    rig.close()


def test_output_reaches_a_viewer_in_order(rig: Rig) -> None:
    """Consecutive bytes are written together.  No byte is lost or out of order."""
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
    assert rig.console.snapshot() == len(text)
    assert rig.backlog.read().data == text


def test_a_flood_without_a_viewer_is_bounded(rig: Rig) -> None:
    """Case 45: of megabytes that nobody reads, only the newest 64 KiB are kept."""
    line = bytes(range(64))
    for number in range(40_000):
        rig.console.send(b"%05d" % number + line)
    rig.run_for(0.05)

    rig.console.snapshot()
    backlog = rig.backlog.read().data

    assert len(backlog) == BACKLOG_BYTES
    assert backlog.endswith(b"39999" + line)
    assert rig.pty.unread_bytes() == 0  # a viewer that attaches now sees nothing twice


def test_a_viewer_that_reads_slowly_gets_everything(rig: Rig) -> None:
    """A piece of output that is larger than the pty waits for room, also if the guest shows nothing more."""
    text = b"".join(b"line %05d\r\n" % number for number in range(4000))
    viewer = os.open(rig.pty.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    seen = bytearray()

    def view(_events: int) -> None:
        seen.extend(os.read(viewer, 4096))
        if len(seen) >= len(text):
            rig.loop.stop()

    rig.console.send(text)
    rig.loop.add(viewer, view)
    rig.run()
    os.close(viewer)
    assert bytes(seen) == text


def test_output_is_written_in_batches(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first byte after a pause is written at once, and others that come soon after it together, a little later."""
    now_s = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    os.set_blocking(rig.pty.slave, False)

    def shown() -> bytes:
        try:
            return os.read(rig.pty.slave, 100)
        except BlockingIOError:
            return b""

    rig.console.send(b"a")
    assert shown() == b"a"
    now_s += BATCH_S / 2
    for byte in (b"b", b"c"):
        rig.console.send(byte)
    assert shown() == b""
    rig.run_once()
    now_s += BATCH_S
    rig.run_once()
    assert shown() == b"bc"
    now_s += BATCH_S
    rig.console.send(b"d")
    assert shown() == b"d"


def test_input_waits_for_the_guest(rig: Rig) -> None:
    """Input for which the UART has no room waits, in order, until it has room."""
    rig.room = 3
    os.write(rig.pty.slave, b"abcdefgh")
    rig.run()
    assert rig.received == b"abc"

    rig.room = 100
    rig.console.resume_input()
    rig.run()
    assert rig.received == b"abcdefgh"


def test_pty_is_raw(rig: Rig) -> None:
    """The pty has no echo, no line editing and no newline translation."""
    os.write(rig.pty.slave, b"a\r\n\x03\x04\x7f")
    rig.run()
    assert rig.received == b"a\r\n\x03\x04\x7f"
    assert rig.pty.unread_bytes() == 0  # no echo


def test_output_without_room_is_written_in_the_next_life(rig: Rig) -> None:
    """The guest resets itself before its viewer has read all output.  No output is lost or repeated."""
    text = b"".join(b"line %05d\r\n" % number for number in range(4000))  # more than the buffer of a pty
    rig.console.send(text)
    rig.loop.close()
    rig.loop = Loop()
    os.close(rig.console._master)
    os.close(rig.console._slave)

    rig.console = rig.attach()
    rig.console.send(b"again\r\n")
    text += b"again\r\n"
    seen = bytearray()
    viewer = os.open(rig.pty.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)

    def view(_events: int) -> None:
        seen.extend(os.read(viewer, 4096))
        if len(seen) >= len(text):
            rig.loop.stop()

    rig.loop.add(viewer, view)
    rig.run()
    os.close(viewer)
    assert bytes(seen) == text


def test_moving_to_another_pty(rig: Rig) -> None:
    """The old pty hangs up, also for viewers that have it open.  The new pty gets later output, and gives input."""
    old = os.open(rig.pty.path, os.O_RDWR | os.O_NOCTTY)
    rig.console.send(b"before")
    rig.pty.close()
    rig.pty = Pty()
    fds = rig.pty.fds()
    before = rig.console._master

    rig.console.move(fds["tty"][0], fds["tty_slave"][0])
    assert before not in rig.loop._callbacks
    assert rig.console.snapshot() == len(b"before")
    rig.console.send(b"after")
    os.write(rig.pty.slave, b"typed")
    rig.run()
    assert rig.received == b"typed"
    rig.loop.add(rig.pty.slave, lambda _events: rig.loop.stop())
    rig.run()

    assert os.read(rig.pty.slave, 100) == b"after"
    with pytest.raises(OSError, match="Input/output error"):
        os.write(old, b"x")
    os.close(old)
