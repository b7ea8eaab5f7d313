"""The courier: files are sent only after a request for them, and only files are sent."""

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from vmd.errors import HostError
from vmd.ipc import courier, sockets
from vmd.ipc.rights import SO_PASSRIGHTS


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a courier."""
    theirs, ours = courier.pair()
    with ours, theirs:
        yield ours, theirs


def test_a_host_without_another_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No courier can be made, and the error says why."""

    def socketpair(*_: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(sockets, "socketpair", socketpair)
    with pytest.raises(HostError, match="make a courier: Too many open files"):
        courier.pair()


def test_files_that_were_asked_for(ends: tuple[socket.socket, socket.socket]) -> None:
    """They arrive by name and in order, and stay open in the sender."""
    ours, theirs = ends
    reader, writer = os.pipe()
    courier.ask(theirs)
    assert courier.give(ours, {"boot": [reader], "disks": [writer, reader]})
    files = courier.take(theirs)
    assert {name: [os.fstat(fd).st_ino for fd in fds] for name, fds in files.items()} == {
        "boot": [os.fstat(reader).st_ino], "disks": [os.fstat(writer).st_ino, os.fstat(reader).st_ino],
    }  # fmt: skip
    assert not any(os.get_inheritable(fd) for fd in (*files["boot"], *files["disks"]))
    for fd in (reader, writer, *files["boot"], *files["disks"]):
        os.close(fd)


@pytest.mark.parametrize("said", [b"", b"file", b"other"])
def test_nothing_leaves_unasked(ends: tuple[socket.socket, socket.socket], said: bytes) -> None:
    """The process that closes the last end of a socket also closes the files in it, and may block.

    So nothing is sent before the other end has asked.
    """
    ours, theirs = ends
    if said:
        theirs.send(said)
    else:
        theirs.shutdown(socket.SHUT_WR)
    assert not courier.give(ours, {"boot": [0]})
    ours.close()
    assert socket.recv_fds(theirs, 100, 10)[:2] == (b"", [])


@pytest.mark.parametrize(
    ("packet", "count"),
    [
        (b"files boot", 2), (b"files boot disks", 1), (b"", 1), (b"boot", 1), (b"files passwd", 1), (b"files \xff", 1),
        (b"boot", 0),
    ],
)  # fmt: skip
def test_malformed_packets(ends: tuple[socket.socket, socket.socket], packet: bytes, count: int) -> None:
    """They are refused and their descriptors closed, because an opener may have been taken over."""
    ours, theirs = ends
    reader, writer = os.pipe()
    socket.send_fds(ours, [packet], [writer] * count)
    os.close(writer)
    with pytest.raises(ValueError, match="the packet is not one of files"):
        courier.take(theirs)
    assert os.read(reader, 1) == b""  # every copy of the other end is closed
    os.close(reader)


def test_files_travel_one_way(ends: tuple[socket.socket, socket.socket]) -> None:
    """The giver accepts no files: it may be root's control, and the VM that asks may have been taken over."""
    gives, asks = ends
    try:
        gives.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS)
    except OSError:
        pytest.skip("a kernel before Linux 6.16")
    with pytest.raises(PermissionError):
        socket.send_fds(asks, [courier.ASK], [0])


def test_no_files(ends: tuple[socket.socket, socket.socket]) -> None:
    """An empty set of files can be sent."""
    ours, theirs = ends
    courier.ask(theirs)
    assert courier.give(ours, {"boot": []})
    assert courier.take(theirs) == {}


def test_files_that_do_not_come(ends: tuple[socket.socket, socket.socket]) -> None:
    """Their opener does not answer in time, or has ended."""
    ours, theirs = ends
    with pytest.raises(TimeoutError):
        courier.fetch(theirs, timeout_s=0)
    ours.close()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        courier.fetch(theirs)
