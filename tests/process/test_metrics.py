"""`metrics listen`: figures by HTTP, from a process that no other depends on and that clients cannot block."""

import contextlib
import http.client
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S
from tests.support.hostnet import NetDaemon
from tests.support.network import Network
from tests.support.waiting import pause
from tests.unit.test_exposition import samples
from vmd.exposition import OPENMETRICS_TYPE, TEXT_TYPE
from vmd.metrics.main import CLIENTS_MAX

pytestmark = [pytest.mark.root, pytest.mark.kvm]

VMS = 'vm "a" {\n disable\n memory 32M\n}\n'
PORT, OTHER_PORT, SIX = 9177, 9178, "::1"


@pytest.fixture(scope="module")
def vmd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetDaemon]:
    """Give a daemon that serves figures at two addresses and a path.  It removes the path at its end."""
    tmp_path = tmp_path_factory.mktemp("metrics")
    with Network() as network:
        daemon = NetDaemon(tmp_path, network)
        daemon.conf.write_text(conf(f"127.0.0.1:{PORT}", f"[{SIX}]:{PORT}", str(path_of(daemon))))
        with daemon:
            daemon.wait_log(f"metrics are served at {path_of(daemon)}")
            yield daemon
        assert not path_of(daemon).exists()


def conf(*places: str) -> str:
    """Return a configuration that serves metrics at these places."""
    return "".join(f'metrics listen "{place}"\n' for place in places) + VMS


def path_of(vmd: NetDaemon) -> Path:
    """Return the path of the Unix socket."""
    return vmd.directory / "metrics.sock"


def connect(vmd: NetDaemon, place: "tuple[str, int] | Path" = ("127.0.0.1", PORT)) -> socket.socket:
    """Return a connection to one of the places."""
    with vmd.network.inside():
        if isinstance(place, Path):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(DEADLINE_S)
            sock.connect(str(place))
            return sock
        return socket.create_connection(place, DEADLINE_S)


class Answer:
    """Status, content type and text of an answer."""

    def __init__(self, raw: http.client.HTTPResponse) -> None:
        self.status = raw.status
        self.kind = raw.headers["Content-Type"]
        self.text = raw.read().decode()


def get(vmd: NetDaemon, place: "tuple[str, int] | Path" = ("127.0.0.1", PORT), accept: str = "*/*") -> Answer:
    """Read the figures."""
    connection = http.client.HTTPConnection("vmd")
    with connect(vmd, place) as connection.sock:
        connection.request("GET", "/metrics", headers={"Accept": accept})
        return Answer(connection.getresponse())


def patiently(vmd: NetDaemon, place: "tuple[str, int] | Path" = ("127.0.0.1", PORT)) -> Answer:
    """Read the figures, and retry until they are served."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            return get(vmd, place)
        except OSError:
            assert time.monotonic() < deadline_s, vmd.log
            time.sleep(0.05)


def server(vmd: NetDaemon) -> int:
    """Wait for the process that serves metrics.  Return its pid."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not (pid := vmd.processes().get("vmd: metrics", 0)):
        assert time.monotonic() < deadline_s, vmd.log
        pause()
    return pid


def test_the_same_figures_everywhere(vmd: NetDaemon) -> None:
    """Each place serves them, in the requested format.  They are the same as those of vmctl."""
    text = get(vmd)
    assert (text.status, text.kind) == (200, TEXT_TYPE)
    shown = samples(text.text)
    assert [labels["vm"] for name, labels, _ in shown if name == "vmd_vm_info"] == ["a"]
    assert samples(vmd.must("metrics")) == shown
    other = get(vmd, (SIX, PORT), "application/openmetrics-text;version=1.0.0")
    assert (other.kind, other.text.endswith("# EOF\n")) == (OPENMETRICS_TYPE, True)
    assert samples(get(vmd, path_of(vmd)).text) == shown


def test_the_path_is_for_those_who_may_use_the_control_socket(vmd: NetDaemon) -> None:
    """Users who may not use the control socket cannot read the metrics."""
    ours, control = path_of(vmd).stat(), vmd.socket.stat()
    assert (ours.st_mode, ours.st_uid, ours.st_gid) == (
        control.st_mode & ~0o170000 | 0o140000, control.st_uid, control.st_gid
    )  # fmt: skip


def test_silent_clients_do_not_block_others(vmd: NetDaemon) -> None:
    """The client that has been silent longest is disconnected for the next one."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(vmd)) for _ in range(2 * CLIENTS_MAX)]
        silent[-1].sendall(b"GET /metr")
        assert get(vmd).status == 200
        assert silent[0].recv(1) == b""
        silent[-1].sendall(b"ics HTTP/1.0\r\n\r\n")
        assert silent[-1].recv(12) == b"HTTP/1.1 200"


def test_clients_that_do_not_read_do_not_block_others(vmd: NetDaemon) -> None:
    """Clients that do not read, send too much, or disconnect early do not block others."""
    with connect(vmd) as rude, connect(vmd) as gone, connect(vmd) as endless:
        rude.sendall(b"GET /metrics HTTP/1.0\r\n\r\n" * 20)
        gone.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        gone.close()
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                endless.sendall(b"x" * 1000)
        assert get(vmd).status == 200


def test_the_process_is_started_again(vmd: NetDaemon) -> None:
    """Its death ends no other process, and clients that connect meanwhile wait."""
    pid = server(vmd)
    os.kill(pid, signal.SIGKILL)
    vmd.wait_log("lost child: metrics: it is started again")
    assert get(vmd).status == 200
    assert server(vmd) != pid


@pytest.mark.deep
def test_a_daemon_that_does_not_answer(vmd: NetDaemon) -> None:
    """A waiting client gets an error after ten seconds, or disconnects.  Later requests are served again."""
    server(vmd)
    os.kill(vmd.pid, signal.SIGSTOP)
    try:
        deadline_s = time.monotonic() + DEADLINE_S
        while get(vmd).status == 200:  # the last answer is good for a second
            assert time.monotonic() < deadline_s
            pause()
        with connect(vmd) as gone:
            gone.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert get(vmd).status == 503
    finally:
        os.kill(vmd.pid, signal.SIGCONT)
    assert get(vmd).status == 200


def test_the_process_holds_only_sockets(vmd: NetDaemon) -> None:
    """It has only sockets, and a uid of its own."""
    pid = server(vmd)
    held = {os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")[0] for fd in os.listdir(f"/proc/{pid}/fd")}
    assert held == {"/dev/null", "socket", "anon_inode"}
    others = {os.stat(f"/proc/{other}").st_uid for name, other in vmd.processes().items() if name != "vmd: metrics"}
    assert os.stat(f"/proc/{pid}").st_uid not in others


def test_a_reload_changes_the_addresses(vmd: NetDaemon) -> None:
    """While another program has an address, vmd logs that and retries.  Without any address there is no process."""
    before = vmd.conf.read_text()
    path = path_of(vmd)
    with vmd.network.inside():
        taken = socket.create_server(("127.0.0.1", OTHER_PORT))
    vmd.conf.write_text(conf(f"127.0.0.1:{OTHER_PORT}", str(path)))
    vmd.must("reload")
    vmd.wait_log(f"metrics listen 127.0.0.1:{OTHER_PORT}: Address already in use: trying again")
    with pytest.raises(ConnectionRefusedError):
        connect(vmd)
    assert get(vmd, path).status == 200
    taken.close()
    vmd.wait_log(f"metrics are served at 127.0.0.1:{OTHER_PORT}")
    assert patiently(vmd, ("127.0.0.1", OTHER_PORT)).status == 200

    vmd.conf.write_text(VMS)
    vmd.must("reload")
    deadline_s = time.monotonic() + DEADLINE_S
    while "vmd: metrics" in vmd.processes():
        assert time.monotonic() < deadline_s
        pause()
    assert not path.exists()

    vmd.conf.write_text(before)
    vmd.must("reload")
    assert patiently(vmd).status == 200
