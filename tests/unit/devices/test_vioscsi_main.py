"""The messages that only the process of a CD-ROM drive gets."""

import errno
import os
import socket
from pathlib import Path

import pytest

from tests.support.figures import unseen
from vmd.devices.vioscsi.main import VioscsiProcess, make
from vmd.errors import PeerError
from vmd.ipc import devmsg


class Drive:
    """The device behind the process, and its drive."""

    def __init__(self) -> None:
        self.drive = self
        self.calls: list[tuple[object, ...]] = []
        self.error: OSError | None = None

    def change(self, fd: int | None, *, force: bool) -> None:
        """Keep the call; the file counts, not its number."""
        self.calls.append((None if fd is None else os.readlink(f"/proc/self/fd/{fd}"), force))
        if fd is not None:
            os.close(fd)
        if self.error is not None:
            raise self.error

    def state(self) -> bytes:
        """Return a state."""
        return b"its state"

    def restore(self, state: bytes) -> None:
        """Keep the state."""
        self.calls.append((state,))


class Bare(VioscsiProcess):
    """The process without memory and loop; `told` are its answers."""

    def __init__(self) -> None:
        self.vm, self.informs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fake = Drive()
        self.device = self.fake  # type: ignore[assignment]
        self.told: list[bytes] = []

    def tell(self, packet: bytes) -> None:
        """Keep it."""
        self.told.append(packet)

    def send(self, packet: bytes, *fds: int) -> None:
        """Send a message of the VM, and have it taken."""
        socket.send_fds(self.vm, [packet], list(fds))
        self.on_inform()


def disc_message(flags: int = 0, name: bytes = b"") -> bytes:
    """Return a message that changes the disc."""
    return devmsg.DISC_HEAD.pack(devmsg.DISC, flags) + name


def changed(number: int, text: str = "") -> bytes:
    """Return the answer."""
    return devmsg.CHANGED_HEAD.pack(devmsg.CHANGED, number) + text.encode()


def test_disc_comes_with_its_message(tmp_path: Path) -> None:
    """Without a name the drive becomes empty; a name without a file has lost it, and the disc stays."""
    process = Bare()
    path = tmp_path / "disc"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    process.send(disc_message(0, b"disc"), fd)
    process.send(disc_message(devmsg.DISC_FORCE, b"disc"), fd)
    process.send(disc_message(devmsg.DISC_FORCE))
    process.send(disc_message())
    os.close(fd)
    assert process.fake.calls == [(str(path), False), (str(path), True), (None, True), (None, False)]
    assert process.told == [changed(0)] * 4

    process.send(disc_message(0, b"disc"))
    assert len(process.fake.calls) == 4
    assert process.told[4:] == [changed(errno.EMFILE, os.strerror(errno.EMFILE))]
    process.fake.error = OSError(errno.EBUSY, "locked")
    process.send(disc_message())
    assert process.told[5:] == [changed(errno.EBUSY, "locked")]
    process.vm.close()
    process.informs.close()


def test_state_of_a_drive_is_taken() -> None:
    """All bytes behind the kind of the message."""
    process = Bare()
    question = devmsg.TYPE.pack(devmsg.RESTORE)
    answer = process.QUESTIONS[devmsg.RESTORE](process, question + b"state")
    assert (answer, process.fake.calls) == (devmsg.STATUS.pack(devmsg.RESTORE, 0), [(b"state",)])
    process.vm.close()
    process.informs.close()


def test_state_of_a_drive_follows_its_queues() -> None:
    """In the answer to EXPORT."""
    process = Bare()
    process.queues = []
    question = devmsg.TYPE.pack(devmsg.EXPORT)
    answer = process.QUESTIONS[devmsg.EXPORT](process, question)
    assert answer == devmsg.EXPORT_HEAD.pack(devmsg.EXPORT, 0) + b"its state"
    process.vm.close()
    process.informs.close()


class Files:
    """The part of `Host` that is used here."""

    def __init__(self, *resources: int) -> None:
        self.resources = resources


def test_drive_has_one_disc_at_most(tmp_path: Path) -> None:
    """More are refused."""
    process = Bare()
    process.figures = unseen("vioscsi")
    process.host = Files(900, 901)  # type: ignore[assignment]
    with pytest.raises(PeerError, match="2 discs for one drive"):
        make(process)
    (tmp_path / "disc").write_bytes(bytes(4096))
    for fd in ([os.open(tmp_path / "disc", os.O_RDONLY)], []):
        process.host = Files(*fd)  # type: ignore[assignment]
        made = make(process)
        assert (made.fd, made.size) == (fd[0] if fd else None, 4096 * len(fd))
        made.close()
    process.vm.close()
    process.informs.close()
