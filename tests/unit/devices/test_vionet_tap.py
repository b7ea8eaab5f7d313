"""The requests that a tap gets, and what its errors mean."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator

import pytest

from vmd.devices.vionet import tap as module
from vmd.devices.vionet.tap import DOWN, GONE, Tap
from vmd.errors import HostError
from vmd.privsep.confine import TUNSETOFFLOAD, TUNSETVNETHDRSZ

HEADER = 12


class Kernel:
    """The kernel's side of a tap: which offloads it has, and what it was asked for."""

    def __init__(self, supported: int) -> None:
        self.supported = supported
        self.asked: list[tuple[str, int]] = []
        self.error: OSError | None = None

    def ioctl(self, _fd: int, request: int, argument: int | bytes) -> None:
        """Answer a request."""
        if self.error is not None:
            raise self.error
        if request == TUNSETOFFLOAD:
            assert isinstance(argument, int)
            self.asked.append(("offload", argument))
            if argument & ~self.supported:
                raise OSError(errno.EINVAL, "not supported")
        else:
            assert isinstance(argument, bytes)
            assert (request, len(argument)) == (TUNSETVNETHDRSZ, 4)
            self.asked.append(("header", int.from_bytes(argument, "little")))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """The kernel, with all offloads."""
    made = Kernel(15)
    monkeypatch.setattr(fcntl, "ioctl", made.ioctl)
    return made


@pytest.fixture
def ends(kernel: Kernel) -> Iterator[tuple[Tap, socket.socket]]:
    """A tap and the network at its other end."""
    assert kernel.supported
    network, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    network.setblocking(False)
    tap = Tap(ours.detach(), "tap7")
    yield tap, network
    network.close()
    os.close(tap.fd)


@pytest.mark.parametrize(
    ("supported", "offloads", "tried"), [(15, 15, [15]), (7, 7, [15, 7]), (1, 1, [15, 7, 1]), (0, 0, [15, 7, 1])]
)
def test_offloads_of_a_tap(kernel: Kernel, supported: int, offloads: int, tried: list[int]) -> None:
    """The most that the kernel has; until a driver is there the tap has none, and the short header."""
    kernel.supported = supported
    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    tap = Tap(ours.fileno(), "tap7")
    assert (tap.offloads, tap.header, os.get_blocking(tap.fd)) == (offloads, 10, False)
    assert kernel.asked == [*(("offload", each) for each in tried), ("header", 10), ("offload", 0)]
    ours.close()
    other.close()


def test_file_that_is_no_tap(kernel: Kernel) -> None:
    """Only a refusal of the offloads is none of the tap."""
    kernel.error = OSError(errno.ENOTTY, "not a tap")
    fd = os.memfd_create("file")
    with pytest.raises(HostError, match=r"tap7.*not a tap"):
        Tap(fd, "tap7")
    os.close(fd)


def test_tap_is_configured(kernel: Kernel, ends: tuple[Tap, socket.socket]) -> None:
    """The header first.  If the interface is gone, the header stays as it was."""
    tap, network = ends
    kernel.asked.clear()
    tap.configure(HEADER, 7)
    assert kernel.asked == [("header", HEADER), ("offload", 7)]
    assert tap.send(b"frame")
    assert network.recv(100) == bytes(HEADER) + b"frame"
    kernel.error = OSError(errno.EBADFD, "gone")
    with pytest.raises(HostError, match=r"tap7.*gone"):
        tap.configure(10, 0)
    assert tap.header == HEADER
    network.close()
    assert not tap.send(b"frame")


def test_waiting_frames_are_forgotten(ends: tuple[Tap, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, of any length; but a flood does not keep the main thread."""
    tap, network = ends
    for length in (1, 100, 9000):
        network.send(bytes(length))
    tap.forget_frames()
    with pytest.raises(BlockingIOError):
        os.read(tap.fd, 100)
    monkeypatch.setattr(module, "STALE_FRAMES_MAX", 2)
    for number in range(3):
        network.send(bytes((number,)))
    tap.forget_frames()
    assert os.read(tap.fd, 100) == b"\2"


def test_state_of_a_tap(ends: tuple[Tap, socket.socket]) -> None:
    """It is up if frames can be sent, and gone if its end is."""
    tap, network = ends
    assert tap.is_up()
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(tap.fd, bytes(10_000))
    assert not tap.is_up()
    network.close()
    with pytest.raises(HostError, match="tap7") as gone:
        tap.is_up()
    assert gone.value.number == errno.ENODEV


def test_meaning_of_errors() -> None:
    """A tap that is down comes up again; one that is gone does not."""
    assert {errno.EBADFD, errno.ENODEV} <= GONE
    assert errno.EIO in DOWN
    assert not GONE & DOWN
