"""The start of a connection (docs/formats.md 1): Hello in both directions, and daemons from before Hello existed."""

import errno
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import golden
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import FakeDaemon, vm_info
from vmctl.__main__ import main
from vmd.client import Client, ClientError
from vmd.ipc.imsg import HEADER, MAX_MESSAGE, Form, decode, encode
from vmd.ipc.messages.clients import PROTOCOL, End, Failed, Hello, ListRequest, Ok, Request, StopAccepted, StopRequest
from vmd.record import Record
from vmd.version import VERSION

# Commands that need a real daemon for a pty or a stream.
NEED_MORE = ("console", "send", "receive")


def test_both_sides_say_hello(daemon: FakeDaemon) -> None:
    """vmctl's comes first.  The daemon's has its release."""
    client = Client(str(daemon.path))

    assert client.daemon == Hello(version=PROTOCOL, program="9.9")
    client.close()


def test_the_first_packet_is_hello_by_name(tmp_path: Path) -> None:
    """This packet has field names and a fixed number, so that every later program can read it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=lambda: main(["-s", str(tmp_path / "s"), "status"]))
        thread.start()
        with listener.accept()[0] as theirs:
            packet = theirs.recv(MAX_MESSAGE)
            theirs.send(encode(Failed(code=1, text="enough"))[0])
        thread.join()

    assert HEADER.unpack_from(packet)[0] == 1
    assert b"\xa7version\x02" in packet
    assert b"\xa7program" + bytes([0xA0 + len(VERSION)]) + VERSION.encode() in packet


def test_a_client_that_is_refused_gets_the_reason(vmctl: Vmctl, tmp_path: Path) -> None:
    """The daemon refuses it before it reads Hello, so its answer has the first form of records."""
    path = str(tmp_path / "busy.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()

        def turn_away() -> None:
            theirs, _ = listener.accept()
            theirs.send(encode(Failed(code=errno.EUSERS, text="too many connections"), form=Form.FIRST)[0])
            theirs.close()

        thread = threading.Thread(target=turn_away)
        thread.start()
        assert vmctl("reload", socket=path) == (1, "", "vmctl: command failed: too many connections\n")
        thread.join()


def test_unknown_messages_are_reported_with_the_release(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """A later daemon may send messages that vmctl does not know.  The error names its release."""
    packet = bytearray(encode(Ok(), form=Form.NAMED)[0])
    packet[:2] = (0x777).to_bytes(2, "little")
    daemon.script = lambda _request: daemon.send_raw(bytes(packet))

    status, _, errors = vmctl("reload")

    assert status == 1
    assert errors == f"vmctl: vmd 9.9: unknown message type 0x777, which vmctl {VERSION} does not know\n"


# --- older daemons -----------------------------------------------------------------------------------------------


@pytest.fixture
def older(tmp_path: Path) -> Iterator[FakeDaemon]:
    """A daemon that does not know Hello, and closes the connection when it gets one."""
    fake = FakeDaemon(tmp_path / "older.sock", older=True)
    yield fake
    fake.close()


def test_an_older_daemon_is_listed_and_stopped(vmctl: Vmctl, older: FakeDaemon) -> None:
    """After an upgrade of the programs, the running daemon's VMs can still be listed and stopped."""
    older.script = lambda request: (
        (vm_info("web"), End()) if isinstance(request, ListRequest) else (StopAccepted(vmid=1, name="web"),)
    )

    status, output, _ = vmctl("status", socket=str(older.path))
    assert status == 0
    assert "web" in output
    assert vmctl("stop", "web", socket=str(older.path))[0] == 0


def test_an_older_daemon_that_hangs_up_on_a_request(vmctl: Vmctl, older: FakeDaemon) -> None:
    """The message has the likely reason."""
    older.script = lambda _request: None

    sentence = "vmctl: pipe closed: this vmd is older than vmctl, and may not know the request\n"
    assert vmctl("reload", socket=str(older.path)) == (3, "", sentence)


class Later(Request):
    """A request that the first release did not have."""


class LaterStop(StopRequest):
    """A request that the first release had under the same name with fewer fields."""

    politely: bool = False


LaterStop.__name__ = "StopRequest"


@pytest.mark.parametrize(
    ("request_", "unknown"), [(Later(), "Later"), (LaterStop(name="web", politely=True), "politely")]
)
def test_requests_unknown_to_an_older_daemon_are_not_sent(older: FakeDaemon, request_: Record, unknown: str) -> None:
    """It would refuse them without a message, or do something else."""
    client = Client(str(older.path))

    with pytest.raises(ClientError, match=f"this vmd is older than vmctl, and does not know {unknown}$"):
        client.send(request_)
    client.close()
    assert older.requests == []


class Recorded:
    """A daemon of the first release.

    It plays recorded answers if each request equals the recorded one, byte for byte.
    """

    def __init__(self, path: Path, session: golden.Session) -> None:
        self.session = session
        self.mistakes: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._listener.accept()[0] as client:
            assert isinstance(decode(client.recv(MAX_MESSAGE), [], "vmctl").message, Hello)
        with self._listener.accept()[0] as client:
            for packet in self.session.packets:
                if not packet.asked:
                    client.send(packet.data)
                    continue
                asked, fds, _, _ = socket.recv_fds(client, MAX_MESSAGE, 4)
                for fd in fds:
                    socket.close(fd)
                if (_without_pid(asked), len(fds)) != (_without_pid(packet.data), packet.fds):
                    self.mistakes.append(f"{asked.hex()}, recorded: {packet.data.hex()}")
                    return

    def join(self) -> None:
        """Wait for the end of the session."""
        self._thread.join(60)
        self._listener.close()
        assert not self._thread.is_alive()


def _without_pid(packet: bytes) -> bytes:
    return packet[:12] + packet[16:]


def test_the_first_release_gets_the_requests_of_its_own_vmctl(capfd: pytest.CaptureFixture[str]) -> None:
    """For every recorded command, requests are equal byte for byte, and every answer is understood."""
    with golden.place() as directory:
        for name in ("kernel", "disk", "more.conf"):
            (directory / name).write_bytes(bytes(512))
        sessions = [each for each in golden.transcript(1, directory) if each.command[0] not in NEED_MORE]
        assert len(sessions) > 25
        for number, session in enumerate(sessions):
            path = directory / f"{number}.sock"
            recorded = Recorded(path, session)
            status = main(["-s", str(path), *session.command])
            recorded.join()
            answer = decode(session.packets[-1].data, [], "vmd").message
            errors = capfd.readouterr().err
            assert recorded.mistakes == [], session.command
            assert (status != 0) == isinstance(answer, Failed), (session.command, errors)
            assert "Traceback" not in errors
