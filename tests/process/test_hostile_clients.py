"""Hostile clients of the control socket (hostile 48, 56, 58) affect only themselves."""

import array
import contextlib
import errno
import os
import random
import select
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import receive
from tests.support.daemon import DEADLINE_S
from tests.support.guests import guest
from tests.support.messages import MESSAGES
from tests.support.network import Network
from tests.support.users import Users, UsersDaemon
from tests.support.waiting import pause
from vmd.control.clients import MAX_UNANSWERED
from vmd.ipc.imsg import HEADER, MAX_MESSAGE, Form, encode
from vmd.ipc.messages.clients import (
    PROTOCOL,
    Caller,
    ConsoleAttached,
    ConsoleOutput,
    ConsoleRequest,
    ConsoleWatch,
    ConsoleWatched,
    End,
    Failed,
    Hello,
    ListRequest,
    NicsRequest,
    PauseRequest,
    StartRequest,
    StopRequest,
    VmInfo,
    VmTerminated,
    WaitRequest,
)
from vmd.ipc.routes import Proc
from vmd.parent.connections import MAX_CLIENTS_PER_USER
from vmd.record import Record
from vmd.version import VERSION

pytestmark = [pytest.mark.root, pytest.mark.kvm]

EVE, MAY_CONNECT = "eve", "vmusers"
PROMPT = "vmd-demo> "
GREETING = encode(Hello(version=PROTOCOL), form=Form.NAMED)[0]
CONF = """
socket owner :{group}
vm "hers" {{
    disable
    memory 32M
    boot "{kernel}"
    owner {eve}
}}
vm "other" {{
    disable
    memory 32M
    boot "{kernel}"
}}
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[UsersDaemon]:
    """Yield a daemon with a running VM of a user and a stopped one of root."""
    with tempfile.TemporaryDirectory(prefix="vmd-hostile-") as name, Users(Path(name)) as users, Network() as network:
        Path(name).chmod(0o755)
        users.add_group(MAY_CONNECT)
        users.add_user(EVE, MAY_CONNECT)
        conf = CONF.format(group=MAY_CONNECT, kernel=guest("demo"), eve=EVE)
        with UsersDaemon(Path(name), users, network, conf) as daemon:
            daemon.must_as(EVE, "start", "hers")
            with daemon.connect_as(EVE):  # so that the control of this user stays
                deadline = time.monotonic() + DEADLINE_S
                while "vmd: control/reserve" not in daemon.processes():
                    assert time.monotonic() < deadline, daemon.log
                    pause()
                yield daemon


@pytest.fixture
def vmd(daemon: UsersDaemon) -> Iterator[UsersDaemon]:
    """Yield the daemon; check afterwards that the same processes serve others, and no descriptor is left open."""
    processes = {title: pid for title, pid in daemon.processes().items() if title.count("/") < 2}
    daemon.wait_state("other", "stopped")
    pid = daemon.status("hers")["pid"]
    before = (0, 0)
    while before != (before := open_descriptors(daemon)):
        pause()  # a connection that has just ended may still be open
    yield daemon
    assert daemon.status("hers")["pid"] == pid
    daemon.must_as(EVE, "pause", "hers")
    daemon.must_as(EVE, "unpause", "hers")
    now = daemon.processes()
    for title in ("vmd: control", "vmd: vmm", "vmd: priv"):
        assert now[title] == processes[title]
    deadline = time.monotonic() + DEADLINE_S
    while open_descriptors(daemon) != before:
        assert time.monotonic() < deadline, (open_descriptors(daemon), before)
        daemon.must("status")  # the console of a VM that has ended may be kept for a moment
        pause()


def open_descriptors(vmd: UsersDaemon) -> tuple[int, int]:
    """Return how many descriptors parent and control have."""
    control = vmd.processes()["vmd: control"]
    parent, theirs = (len(os.listdir(f"/proc/{pid}/fd")) for pid in (vmd.pid, control))
    return parent, theirs


def resident_kib(pid: int) -> int:
    """Return the memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def send(client: socket.socket, request: Record) -> None:
    """Send a message."""
    client.send(encode(request)[0])


def cut_off(client: socket.socket) -> bool:
    """Return whether the connection ends; answers may come before that."""
    while receive(client) is not None:
        pass
    return True


# --- too much --------------------------------------------------------------------------------------------


def test_requests_without_reading_answers(vmd: UsersDaemon) -> None:
    """A flood from a client that never reads is not read either, and costs next to no memory.

    When it reads at last, each of its requests is answered.
    """
    with vmd.connect_as(EVE) as client:
        title = f"vmd: control/{vmd.users.run('id', '-u', EVE).strip()}"
        pids = vmd.pid, vmd.processes()[title]
        before = [resident_kib(pid) for pid in pids]
        client.setblocking(False)
        packet = encode(ListRequest())[0]
        sent, last = 0, -1
        while sent != last:  # until it can send no more while others are served
            last = sent
            assert sent < 20_000, "a client may fill the daemon with requests for ever"
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.send(packet)
                    sent += 1
            vmd.must("status")
        for pid, kib in zip(pids, before, strict=True):
            assert resident_kib(pid) < kib + 4096
        client.settimeout(DEADLINE_S)
        for _ in range(sent):
            while isinstance(answer := receive(client), VmInfo):
                pass
            assert isinstance(answer, End)


def test_requests_that_wait(vmd: UsersDaemon) -> None:
    """The number at a time is limited; later requests are read when these are answered."""
    with vmd.connect_as(EVE) as client:
        client.send(GREETING)
        assert isinstance(receive(client), Hello)
        end = watched(client, since=None).end
        for request in [ConsoleWatch(name="hers", since=end)] * MAX_UNANSWERED + [ListRequest()]:
            client.send(encode(request, form=Form.NAMED)[0])
        vmd.must("status")
        with vmd.console("hers") as console:
            console.answer("", PROMPT)
        for _ in range(MAX_UNANSWERED):
            while isinstance(answer := receive(client), ConsoleOutput):
                pass
            assert isinstance(answer, ConsoleWatched)
        assert isinstance(receive(client), VmInfo)


def test_waiting_twice(vmd: UsersDaemon) -> None:
    """A client that waits several times is told once of the end of a VM."""
    with vmd.connect_as(EVE) as client:
        for _ in range(3):
            send(client, WaitRequest(name="hers"))
        for _ in range(2):
            answer = receive(client)
            assert isinstance(answer, Failed)
            assert answer.code == errno.EALREADY


def test_a_user_who_opens_all_their_connections(vmd: UsersDaemon) -> None:
    """A user has a share of the connections.  One more is refused with a message, and others are served meanwhile."""
    clients = [vmd.connect_as(EVE) for _ in range(MAX_CLIENTS_PER_USER - 1)]  # the user has one more (`daemon`)
    try:
        for client in clients:
            send(client, NicsRequest(name="hers"))
            assert isinstance(receive(client), End)
        with vmd.connect_as(EVE) as one_more:
            answer = receive(one_more)
            assert isinstance(answer, Failed)
            assert answer.text == f"too many connections of uid {vmd.users.run('id', '-u', EVE).strip()} (64)"
            assert receive(one_more) is None
        vmd.must("status")
        vmd.must("pause", "hers")
        vmd.must("unpause", "hers")
    finally:
        for client in clients:
            client.close()


@pytest.mark.deep
def test_connections_that_come_and_go(vmd: UsersDaemon) -> None:
    """Hundreds of connections come and go, some in the middle of a request."""
    for number in range(150):
        with vmd.connect_as("root" if number % 2 else EVE) as client:
            for request in (ListRequest(), WaitRequest(name="hers"), ConsoleRequest(name="hers"))[: number % 4]:
                send(client, request)
    vmd.must_as(EVE, "status")


# --- descriptors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 64, 253])
def test_descriptors_with_requests_that_have_none(vmd: UsersDaemon, count: int) -> None:
    """The descriptors and their connection are closed."""
    reader, writer = os.pipe()
    packet = bytearray(encode(ListRequest())[0])
    with vmd.connect_as(EVE) as client:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer] * count))]
        client.sendmsg([packet], rights)
        assert cut_off(client)
    with vmd.connect_as(EVE) as client:
        packet[:] = HEADER.pack(*HEADER.unpack_from(packet)[:2], count, 0, 0) + packet[HEADER.size :]
        client.sendmsg([packet], rights)
        assert cut_off(client)
    os.close(writer)
    poll = select.poll()
    poll.register(reader)
    assert poll.poll(DEADLINE_S * 1000)[0][1] & select.POLLHUP  # no process has it open any more
    os.close(reader)


def test_descriptors_that_are_announced_only(vmd: UsersDaemon) -> None:
    """A header that only announces descriptors is refused."""
    packet = bytearray(encode(StartRequest(name="hers"))[0])
    packet[:] = HEADER.pack(*HEADER.unpack_from(packet)[:2], 2, 0, 0) + packet[HEADER.size :]
    with vmd.connect_as(EVE) as client:
        client.send(packet)
        assert cut_off(client)


def test_descriptors_of_a_refused_start_are_closed(vmd: UsersDaemon) -> None:
    """Descriptors are closed if the VM does not exist, runs already, or belongs to another user."""
    reader, writer = os.pipe()
    for name in ("hers", "other", "nowhere"):
        answer = vmd.ask_as(EVE, StartRequest(name=name), {"kernel": [writer], "initrd": [writer]})
        assert isinstance(answer, Failed)
    os.close(writer)
    poll = select.poll()
    poll.register(reader)
    assert poll.poll(DEADLINE_S * 1000)[0][1] & select.POLLHUP
    os.close(reader)


# --- nonsense --------------------------------------------------------------------------------------------


def test_messages_that_clients_must_not_send(vmd: UsersDaemon) -> None:
    """A message between the daemon's own processes ends the connection, also for root."""
    reserved = [each.code for each in MESSAGES if (Proc.CLIENT, Proc.CONTROL) not in each.routes]
    assert len(reserved) > 20
    for code in reserved:
        for user in (EVE, "root"):
            with vmd.connect_as(user) as client:
                client.send(HEADER.pack(code, HEADER.size + 1, 0, 0, 0) + b"\x90")
                assert cut_off(client)


def test_a_request_that_no_vmd_knows_yet(vmd: UsersDaemon) -> None:
    """A later vmctl is told the version of this vmd."""
    packet = bytearray(encode(ListRequest(), form=Form.NAMED)[0])
    packet[:4] = (0x4242).to_bytes(4, "little")
    with vmd.connect_as(EVE) as client:
        client.send(encode(Hello(version=99, program="later"), form=Form.NAMED)[0])
        assert isinstance(receive(client), Hello)
        client.send(packet)
        answer = receive(client)
        assert answer == Failed(code=errno.ENOSYS, text=f"vmd {VERSION} knows no request 0x4242; a later one may")
        assert cut_off(client)


def test_answers_have_the_form_of_the_client(vmd: UsersDaemon) -> None:
    """Answers are by name after a Hello, and in the form of the first release without one."""
    for greeting, named in ((b"", False), (encode(Hello(version=2), form=Form.NAMED)[0], True)):
        with vmd.connect_as(EVE) as client:
            if greeting:
                client.send(greeting)
                assert receive(client) == Hello(version=PROTOCOL, program=VERSION)
            send(client, ListRequest())
            assert (b"memory_bytes" in client.recv(MAX_MESSAGE)) is named


def test_random_changes_of_real_requests(vmd: UsersDaemon) -> None:
    """Each changed request (with a fixed seed) is served, refused or cut off; no process is affected."""
    chance = random.Random(56)
    requests = [ListRequest(), StopRequest(name="other", wait=True), StartRequest(name="x")]
    client = vmd.connect_as(EVE)
    for _ in range(200):
        packet = bytearray(encode(chance.choice(requests), form=chance.choice((Form.FIRST, Form.NAMED)))[0])
        for _ in range(chance.randrange(1, 4)):
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        packet = packet[: chance.choice((len(packet), chance.randrange(len(packet))))]
        try:
            client.send(packet)
            # The changed request may be one that waits.  A ListRequest after it is answered nevertheless.
            send(client, ListRequest())
            while not isinstance(answer := receive(client), End | None):
                pass
        except (BrokenPipeError, ConnectionResetError):
            answer = None
        if answer is None or chance.random() < 0.1:
            client.close()
            client = vmd.connect_as(EVE)
    client.close()


def test_false_credentials_are_ignored(vmd: UsersDaemon) -> None:
    """False credentials are ignored, in the message and in its header."""
    for request in (
        StopRequest(name="other", force=True, caller=Caller(uid=0, gid=0, pid=1)),
        StartRequest(name="other", caller=Caller(uid=0, gid=0, pid=1)),
    ):
        with vmd.connect_as(EVE) as client:
            client.send(encode(request, peerid=1, pid=1)[0])
            answer = receive(client)
            assert isinstance(answer, Failed)
            assert answer.code == errno.EPERM


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a\x1b]0;title\x07", "x\ny", "\u202egnp", "n" * 63, "", "0", "-1", "%n%s"]
)
def test_unknown_names(vmd: UsersDaemon, name: str) -> None:
    """A name with any content is only returned to the client that sent it."""
    for request in (
        StartRequest(name=name), StopRequest(name=name), WaitRequest(name=name), ConsoleRequest(name=name),
        ConsoleWatch(name=name),
        PauseRequest(name=name, paused=True), NicsRequest(name=name),
    ):  # fmt: skip
        answer = vmd.ask_as(EVE, request)
        assert isinstance(answer, Failed)
        assert answer.code == errno.ENOENT
    assert "\x1b" not in vmd.log
    done = vmd.vmctl_as(EVE, "stop", "--", name)
    assert done.returncode in (2, 4)  # 2: no VM can have this name
    assert not any(ord(c) < 32 and c != "\n" for c in done.stderr.expandtabs()), done.stderr


def test_unknown_ids(vmd: UsersDaemon) -> None:
    """No VM has a negative or a very large id."""
    for vmid in (-1, 1 << 31, 1 << 32, (1 << 63) - 1, -(1 << 63), 99):
        answer = vmd.ask_as(EVE, StopRequest(vmid=vmid))
        assert isinstance(answer, Failed)
        assert answer.code == errno.ENOENT


# --- consoles --------------------------------------------------------------------------------------------


def test_a_console_is_free_again_when_its_viewer_has_left(vmd: UsersDaemon) -> None:
    """The console is free again after every kind of end of its viewer, for any next client."""
    for number in range(20):
        with vmd.connect_as(EVE) as client:
            send(client, ConsoleRequest(name="hers"))
            if number % 2:
                while isinstance(answer := receive(client), ConsoleOutput):
                    pass
                assert isinstance(answer, ConsoleAttached), answer


def test_many_viewers_at_a_time(vmd: UsersDaemon) -> None:
    """One viewer has the console, and the others are told which viewer that is."""
    clients = [vmd.connect_as(EVE) for _ in range(10)]
    for client in clients:
        send(client, ConsoleRequest(name="hers"))
    outcomes = []
    for client in clients:
        while isinstance(answer := receive(client), ConsoleOutput):
            pass
        outcomes.append(type(answer))
        client.close()
    assert outcomes.count(ConsoleAttached) == 1
    assert outcomes.count(Failed) == 9


def test_viewers_take_a_console_from_each_other(vmd: UsersDaemon) -> None:
    """Viewers take over repeatedly: the last one has the console, every other is told, and no descriptor is left."""
    before = len(os.listdir(f"/proc/{vmd.pid}/fd"))
    clients = [vmd.connect_as(EVE) for _ in range(10)]
    for client in clients:
        send(client, ConsoleRequest(name="hers", force=True))
    for client in clients:
        while isinstance(answer := receive(client), ConsoleOutput):
            pass
        if client is not clients[-1] and isinstance(answer, ConsoleAttached):
            answer = receive(client)  # the message about the takeover may come before or after it
        assert isinstance(answer, ConsoleAttached if client is clients[-1] else Failed | ConsoleAttached)
    assert len(os.listdir(f"/proc/{vmd.pid}/fd")) <= before + 4  # the pty that was taken last, for a moment
    for client in clients:
        client.close()
    deadline = time.monotonic() + DEADLINE_S
    while len(os.listdir(f"/proc/{vmd.pid}/fd")) > before:
        assert time.monotonic() < deadline
        vmd.must("status")
        pause()


def watched(client: socket.socket, since: int | None) -> ConsoleWatched:
    """Watch the console of `hers` once, on a connection after its Hello."""
    client.send(encode(ConsoleWatch(name="hers", since=since), form=Form.NAMED)[0])
    while isinstance(answer := receive(client), ConsoleOutput):
        pass
    assert isinstance(answer, ConsoleWatched)
    return answer


def test_watchers_with_false_positions(vmd: UsersDaemon) -> None:
    """Watchers give positions outside the output, and send too many requests at a time."""
    for since in (-1, -(1 << 63)):
        with vmd.connect_as(EVE) as client:
            client.send(GREETING)
            assert isinstance(receive(client), Hello)
            assert watched(client, since).running
    with vmd.connect_as(EVE) as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # they are not read
            for _ in range(100):
                send(client, ConsoleWatch(name="hers", since=1 << 62))
        vmd.must("status")


def test_the_pty_is_its_owner_s(vmd: UsersDaemon) -> None:
    """No other user can read a guest's console or type into it (cat. 4.3)."""
    tty = Path(vmd.status("hers")["tty"]).stat()
    uid = int(vmd.users.run("id", "-u", EVE))
    assert (tty.st_uid, tty.st_mode & 0o777) == (uid, 0o600)


def test_a_client_that_leaves_before_its_vm_has_stopped(vmd: UsersDaemon) -> None:
    """The request is carried out, without an answer."""
    vmd.must("start", "other")
    with vmd.connect_as("root") as client:
        send(client, StopRequest(name="other", force=True, wait=True))
    waiter = vmd.ask_as("root", WaitRequest(name="other"))
    assert isinstance(waiter, VmTerminated | Failed)
    vmd.wait_state("other", "stopped")


def test_list_is_complete_for_everybody(vmd: UsersDaemon) -> None:
    """A list has a row for every VM, then an end."""
    with vmd.connect_as(EVE) as client:
        send(client, ListRequest())
        rows = [receive(client) for _ in range(3)]
    assert [type(row) for row in rows] == [VmInfo, VmInfo, End]
