"""Files that come over a courier: which of them a VM gets, and that nothing else stays open."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.descriptors import open_descriptors
from vmd.errors import PeerError
from vmd.ipc import courier
from vmd.ipc.imsg import Envelope
from vmd.ipc.loop import Loop
from vmd.ipc.messages.children import Quit
from vmd.vm.fetch import fetch_files, fetch_one, fetch_stream


@pytest.fixture
def loop() -> Iterator[Loop]:
    """An event loop."""
    made = Loop()
    yield made
    made.close()


class Giver:
    """The other end of a courier, and the file that `fetch_one` has handed over, if it has."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        asks, self.sock = courier.pair()
        self.fd = asks.detach()
        self.files: list[int | None] = []

    def fetch(self, name: str = "cdrom") -> None:
        """Let the VM ask."""
        fetch_one(self.loop, self.fd, name, self.files.append)

    def give(self, **files: int) -> None:
        """Send new files, so many of each name."""
        fds = {name: [os.memfd_create(name) for _ in range(count)] for name, count in files.items()}
        try:
            courier.send(self.sock, fds)
        finally:
            for each in fds.values():
                for fd in each:
                    os.close(fd)

    def turn(self) -> None:
        """Handle what is ready."""
        for _ in range(3):
            self.loop.call_later(0, self._stop_soon)
            self.loop.run()

    def _stop_soon(self) -> None:
        self.loop.call_later(0, self.loop.stop)


def name_of(fd: int) -> str:
    """Return the name of a file that `Giver` has made, and close it."""
    name = os.readlink(f"/proc/self/fd/{fd}").split(":")[1].split()[0]
    os.close(fd)
    return name


@pytest.mark.parametrize("given", [{"cdrom": 1}, {"cdrom": 2}, {"boot": 1, "cdrom": 1, "disks": 2}])
def test_the_file_with_the_name(loop: Loop, given: dict[str, int]) -> None:
    """It is asked for before it is sent.  Other files are closed, and so is the courier."""
    before = open_descriptors()
    giver = Giver(loop)
    giver.fetch()
    assert giver.sock.recv(100) == courier.ASK
    giver.turn()
    assert giver.files == []
    giver.give(**given)
    giver.turn()
    (fd,) = giver.files
    assert fd is not None
    assert name_of(fd) == "cdrom"
    giver.sock.close()
    assert open_descriptors() == before


def test_files_of_other_names_are_none(loop: Loop) -> None:
    """They are closed."""
    before = open_descriptors()
    giver = Giver(loop)
    giver.fetch()
    giver.give(boot=1, disks=2)
    giver.turn()
    giver.sock.close()
    assert giver.files == [None]
    assert open_descriptors() == before


@pytest.mark.parametrize("packet", [b"", b"nonsense"])
def test_a_giver_that_ends_or_sends_something_else(loop: Loop, packet: bytes) -> None:
    """There is no file."""
    before = open_descriptors()
    giver = Giver(loop)
    giver.fetch()
    if packet:
        giver.sock.send(packet)
    giver.sock.close()
    giver.turn()
    assert giver.files == [None]
    assert open_descriptors() == before


def test_a_giver_that_has_ended_before(loop: Loop) -> None:
    """It cannot even be asked."""
    giver = Giver(loop)
    giver.sock.close()
    giver.fetch()
    giver.turn()
    assert giver.files == [None]


def test_a_giver_that_takes_too_long(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no file, once, whatever comes later."""
    before = open_descriptors()
    giver = Giver(loop)
    giver.fetch()
    giver.turn()
    now_s = time.monotonic() + courier.PATIENCE_S
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    giver.turn()
    assert giver.files == [None]
    with pytest.raises(BrokenPipeError):
        giver.give(cdrom=1)
    giver.turn()
    giver.sock.close()
    assert giver.files == [None]
    assert open_descriptors() == before


def test_a_file_that_has_come_is_not_late(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is over with it."""
    giver = Giver(loop)
    giver.fetch()
    giver.give(cdrom=1)
    giver.turn()
    now_s = time.monotonic() + courier.PATIENCE_S
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    giver.turn()
    (fd,) = giver.files
    assert fd is not None
    os.close(fd)
    giver.sock.close()


def test_a_stream(loop: Loop) -> None:
    """It has its own name."""
    giver = Giver(loop)
    fetch_stream(loop, giver.fd, giver.files.append)
    giver.give(stream=1)
    giver.turn()
    (fd,) = giver.files
    assert fd is not None
    assert name_of(fd) == "stream"
    giver.sock.close()


# --- the files that a VM starts with -------------------------------------------------------------------------------


def envelope(*givers: Giver, **fds: list[int]) -> Any:  # noqa: ANN401
    """Return a message with couriers."""
    return Envelope(Quit(), 0, 0, {"couriers": [giver.fd for giver in givers], **fds})


def test_files_of_several_couriers(loop: Loop) -> None:
    """They are added to those of the message, in order."""
    one, other = Giver(loop), Giver(loop)
    one.give(boot=1, disks=1)
    other.give(disks=2)
    message = envelope(one, other, memory=[0])
    fetch_files(message)
    assert {name: len(fds) for name, fds in message.fds.items()} == {"memory": 1, "boot": 1, "disks": 3}
    assert [name_of(fd) for fd in message.fds["disks"]] == ["disks"] * 3
    os.close(message.take_fd("boot"))
    for giver in (one, other):
        giver.sock.close()


def test_files_that_do_not_come(loop: Loop) -> None:
    """The sentence says so, or what is wrong with them.  The courier is closed."""
    before = open_descriptors()
    gone = Giver(loop)
    gone.sock.close()
    with pytest.raises(PeerError, match=r"^opener: its files did not come$"):
        fetch_files(envelope(gone))
    wrong = Giver(loop)
    wrong.sock.send(b"nonsense")
    with pytest.raises(PeerError, match=r"^opener: the packet is not one of files$"):
        fetch_files(envelope(wrong))
    wrong.sock.close()
    assert open_descriptors() == before
