"""Clients, and the controls that serve them, cannot harm other users.  Each user has a `control`; root's goes on.

The controls and priv here run a changed copy of this program, in which they act as if an attacker controlled them, with
their real confinement and channels.
"""

import contextlib
import errno
import os
import pwd
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bystander import NAME, Bystander, vm_block
from tests.support.clients import connect_as, receive
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.fusefile import FLUSH, HELD, FuseFile
from tests.support.guests import guest
from tests.support.program import changed_program
from tests.support.users import public_folder
from tests.support.waiting import pause
from vmd.config.model import DiskConfig, VmConfig, VmFlag
from vmd.ipc.imsg import encode
from vmd.ipc.messages.clients import (
    Caller,
    End,
    Failed,
    ListRequest,
    NicsRequest,
    StartRequest,
    StopRequest,
    VmInfo,
    WaitRequest,
)
from vmd.ipc.rights import SO_PASSRIGHTS
from vmd.parent.connections import MAX_CLIENTS_PER_USER, MAX_REFUSED, STUCK_MAX
from vmd.record import Record

pytestmark = [pytest.mark.root, pytest.mark.kvm]

EVE, BOB = 65534, 40001  # user nobody, and a uid without a name
ROOT = Caller(uid=0, gid=0, pid=1)  # the caller that a compromised control claims
VISITS = 6000
# Actions of a compromised control.  A request with such a VM name is the attacker's order.
TAKEN_OVER_CONTROL = """
_on_request = Control.on_request
def _intruder(control, message, envelope, channel):
    what, _, rest = getattr(message, "name", "").partition(":")
    number = control.client_of(channel).number
    if what == "as-root":  # what the client has sent, as if root had asked
        files = control.client_of(channel).files = {name: envelope.take_fds(name) for name in tuple(envelope.fds)}
        if isinstance(message, StartRequest):
            message = message.replace(files=tuple(name for name, fds in files.items() if fds))
        control.parent.send(message.replace(name=rest), peerid=number)
    elif what == "as-others":  # the same under the numbers of other clients
        for other in range(1, number):
            control.parent.send(message.replace(name=rest), peerid=other)
    elif what == "die":
        os.kill(os.getpid(), 9)
    elif what == "send-up":
        try:
            control.parent._sendmsg(b"any", [0])
        except OSError as error:
            os.write(2, f"control sends a descriptor up: {error}\\n".encode())
        os.kill(os.getpid(), 9)
    elif what == "peak":  # how many messages have waited for the parent at a time
        control.client_of(channel).channel.send(Failed(code=1, text=str(_peak)))
    else:
        _on_request(control, message, envelope, channel)
_peak = 0
_append = Channel.send
def _counted(self, message, **more):
    global _peak
    _append(self, message, **more)
    if self.peer is Proc.PARENT:
        _peak = max(_peak, len(self._queue))
Channel.send = _counted
import os
from vmd.ipc.messages.clients import StartRequest, StopRequest
for _request in (StartRequest, StopRequest):
    Control.HANDLERS[(Proc.CLIENT, _request)] = _intruder
"""
TAKEN_OVER_PRIV = """
import os, socket
from vmd.ipc.imsg import MAX_MESSAGE, decode, encode
from vmd.ipc.messages.clients import ListRequest
from vmd.ipc.messages.priv import ConfigureNetwork
_on_configure = Priv.HANDLERS[(Proc.PARENT, ConfigureNetwork)]
_times = []
def _intruder(priv, message, envelope, channel):
    _times.append(message)
    if len(_times) == 1:  # nobody is served before that
        _on_configure(priv, message, envelope, channel)
        return
    os.write(2, b"priv tries to be a client\\n")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect({path!r})
            client.send(encode(ListRequest())[0])
            answer = decode(client.recv(MAX_MESSAGE), [], "vmd").message
        os.write(2, f"priv is answered {{answer!r}}\\n".encode())
    except OSError as error:
        os.write(2, f"priv is refused: {{error}}\\n".encode())
    _on_configure(priv, message, envelope, channel)
"""
AND_SO = "Priv.HANDLERS[(Proc.PARENT, ConfigureNetwork)] = _intruder\n"


@pytest.fixture(scope="module")
def bystander() -> Iterator[Bystander]:
    """Yield a VM that must not be affected, in a daemon whose socket every user may open."""
    with public_folder() as directory:
        taken_over_priv = TAKEN_OVER_PRIV.format(path=str(directory / "vmd.sock")) + AND_SO
        more = {"vmd/control/main.py": TAKEN_OVER_CONTROL, "vmd/priv/main.py": taken_over_priv}
        code = changed_program(directory / "code", more)
        conf = vm_block(NAME) + vm_block("hers", "owner nobody:nogroup") + vm_block("roots")
        with Daemon(directory, conf, code=code) as daemon, Bystander(daemon) as made:
            yield made


@pytest.fixture
def vmd(bystander: Bystander) -> Iterator[Daemon]:
    """Yield that daemon; check afterwards that its guest is unaffected and the same processes serve root."""
    yield bystander.vmd
    bystander.check()


def connect(vmd: Daemon, uid: int = 0) -> socket.socket:
    """Return a connection to the control socket with a user's peer credentials."""
    vmd.socket.chmod(0o666)  # a reload restores its mode
    return connect_as(vmd.socket, uid, uid)


def ask(client: socket.socket, request: Record, **fds: int) -> Record | None:
    """Send a request and return its first answer."""
    packet, order = encode(request, fds={name: [fd] for name, fd in fds.items()})
    with contextlib.suppress(BrokenPipeError):
        socket.send_fds(client, [packet], order)
    return receive(client)


def serves(client: socket.socket) -> bool:
    """Return whether a client gets an answer."""
    return isinstance(ask(client, NicsRequest(name="hers")), End)


def control_of(vmd: Daemon, uid: int) -> int:
    """Return the pid of a user's control."""
    return vmd.processes()["vmd: control" if uid == 0 else f"vmd: control/{uid}"]


# --- a compromised control -----------------------------------------------------------------------


def test_a_control_speaks_for_its_user_only(vmd: Daemon, tmp_path: Path) -> None:
    """The control claims that root asks.  The parent knows the real user, and opens no file of the host for it."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(1 << 20))
    secret.chmod(0o600)
    config = VmConfig(
        name="stolen", kernel=str(guest("demo")), disks=(DiskConfig(path=str(secret)),),
        given=VmFlag.KERNEL | VmFlag.DISK,
    )  # fmt: skip
    with connect(vmd, EVE) as client, guest("demo").open("rb") as kernel:
        for request, fds in (
            (StartRequest(name="as-root:stolen", config=config, caller=ROOT), {"kernel": kernel.fileno()}),
            (StartRequest(name="as-root:roots", caller=ROOT), {}),
            (StopRequest(name=f"as-root:{NAME}", force=True, caller=ROOT), {}),
        ):
            answer = ask(client, request, **fds)
            assert isinstance(answer, Failed)
            assert answer.code == errno.EPERM, answer
        assert serves(client)
    assert [row["name"] for row in vmd.rows()] == [NAME, "hers", "roots"]
    assert vmd.status("roots")["state"] == "stopped"


def test_a_control_speaks_for_its_own_clients_only(vmd: Daemon) -> None:
    """A control that uses another user's connection number is ended.  Nothing is done, and that user is unaffected."""
    with connect(vmd) as root, connect(vmd, BOB) as bob, connect(vmd, EVE) as eve:
        assert serves(root)
        assert serves(bob)
        assert ask(eve, StopRequest(name=f"as-others:{NAME}", force=True, caller=ROOT)) is None
        assert serves(root)
        assert serves(bob)
    vmd.wait_log(f"control/{EVE}: speaks for client ")
    with connect(vmd, EVE) as eve:  # the control was started again
        assert serves(eve)


def test_the_daemon_s_own_processes_are_no_clients(vmd: Daemon) -> None:
    """Processes of the daemon cannot act as clients: neither a compromised priv nor a connection of uid _vmd."""
    before = vmd.log.count("priv is ")
    vmd.must("reload")
    vmd.wait_log("priv is ", times=before + 1)
    assert "priv is answered Failed" in vmd.log or "priv is refused" in vmd.log
    assert "priv is answered VmInfo" not in vmd.log

    with connect(vmd, pwd.getpwnam("_vmd").pw_uid) as client:
        answer = receive(client)
        assert isinstance(answer, Failed)
        assert (answer.code, "one of vmd's own" in answer.text) == (errno.EPERM, True)
        assert receive(client) is None


# --- a control that dies ---------------------------------------------------------------------------------


def test_a_control_that_dies_costs_its_user_s_connections(vmd: Daemon) -> None:
    """The user's next connection is served, and other users are not affected."""
    with connect(vmd) as root, connect(vmd, BOB) as bob, connect(vmd, EVE) as eve, connect(vmd, EVE) as other:
        for client in (root, bob, other):
            assert serves(client)
        assert ask(eve, StopRequest(name="die:")) is None
        assert receive(other) is None
        assert serves(root)
        assert serves(bob)
        vmd.wait_log(f"lost control/{EVE}")  # until then the ending control may get a new connection
        with connect(vmd, EVE) as again:
            assert serves(again)


def test_root_s_control_is_started_again(tmp_path: Path) -> None:
    """Root's control and the one in reserve are replaced at once.  Guests run on; connections of clients end."""
    with Daemon(tmp_path, vm_block(NAME) + vm_block("hers")) as vmd, Bystander(vmd) as bystander:
        for title in ("vmd: control", "vmd: control/reserve"):
            deadline_s = time.monotonic() + DEADLINE_S
            while title not in (found := vmd.processes()):
                assert time.monotonic() < deadline_s
                pause()
            with connect(vmd) as client:
                client.send(encode(WaitRequest(name=NAME))[0])
                assert serves(client)
                os.kill(found[title], signal.SIGKILL)
                if title == "vmd: control":
                    assert receive(client) is None
                vmd.must("status")
                while vmd.processes().get(title, found[title]) == found[title]:
                    assert time.monotonic() < deadline_s
                    pause()
        bystander.core = bystander.core_now()


# --- a control that hangs ---------------------------------------------------------------------------------


@pytest.mark.deep
def test_files_whose_close_never_returns() -> None:
    """Such files block the control of their user, even after SIGKILL.  It is replaced, and others are unaffected.

    A user who repeats this is not served until their storage answers.  The daemon still can end.
    """
    conf = vm_block(NAME) + vm_block("hers", "owner nobody:nogroup")
    with (
        public_folder() as directory,
        Daemon(directory, conf) as vmd,
        connect(vmd, BOB) as bob,
        FuseFile(bytes(4096), flushes=True, for_all=True) as file,
    ):
        file.rule(FLUSH, HELD)
        senders = []
        with Bystander(vmd):
            for times in range(1, STUCK_MAX + 1):
                senders.append(pass_and_wait(vmd, file))
                file.wait_held(times)
                assert serves(bob)
                vmd.wait_log(f"control/{EVE}: does not answer for ", times=times)
            with connect(vmd, EVE) as eve:
                answer = receive(eve)
                assert isinstance(answer, Failed)
                assert answer.code == errno.EBUSY
            assert serves(bob)
        assert vmd.stop() == 0
        file.release()
        for pid in senders:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_boot_image_whose_close_never_returns(vmd: Daemon) -> None:
    """Only the user's own control and the opener that examines the image ever have it open, and block."""
    with FuseFile(bytes(4096), flushes=True, for_all=True) as file, connect(vmd, BOB) as bob:
        file.rule(FLUSH, HELD)
        sender = pass_and_wait(vmd, file, StartRequest(name="hers"))
        file.wait_held(2)
        assert serves(bob)
        assert vmd.status("hers")["state"] == "stopped"
        vmd.must("start", "roots")
        vmd.must("stop", "-fw", "roots")
        file.release()
        os.kill(sender, signal.SIGKILL)
        os.waitpid(sender, 0)


def test_no_descriptor_goes_up(vmd: Daemon) -> None:
    """The kernel refuses descriptors that a compromised control sends to the parent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as any_socket:
        try:
            any_socket.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError:
            pytest.skip("a kernel before Linux 6.16")
    with connect(vmd, EVE) as eve:
        assert ask(eve, StopRequest(name="send-up:")) is None
    vmd.wait_log("control sends a descriptor up: [Errno 1]")


def pass_and_wait(vmd: Daemon, file: FuseFile, request: Record | None = None) -> int:
    """Pass a file with a request, from another process whose close of the file blocks.  Return its pid.

    The default request takes no file.
    """
    pid = os.fork()
    if pid == 0:
        try:
            eve = connect(vmd, EVE)
            fd = file.open()
            if request is None:
                socket.send_fds(eve, [encode(ListRequest())[0]], [fd])
            else:
                packet, order = encode(request, fds={"kernel": [fd]})
                socket.send_fds(eve, [packet], order)
            while True:
                signal.pause()
        finally:
            os._exit(1)
    return pid


# --- more than can be served ------------------------------------------------------------------------------


def test_what_a_user_asks_is_not_queued(vmd: Daemon) -> None:
    """While the parent does not read, a control does not read from its clients: their requests wait in their sockets.

    All requests are answered later, except those of clients that have disconnected.
    """
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(vmd, EVE)) for _ in range(MAX_CLIENTS_PER_USER - 1)]
        for client in clients:
            assert serves(client)
        pid = control_of(vmd, EVE)
        sent = dict.fromkeys(clients, 0)
        os.kill(vmd.pid, signal.SIGSTOP)
        try:
            for client in clients:
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    for _ in range(16):
                        client.send(encode(StopRequest(name="nobody"))[0])
                        sent[client] += 1
            wait_asleep(pid)  # it has handled everything that it can
            for client in clients[::2]:
                client.close()
        finally:
            os.kill(vmd.pid, signal.SIGCONT)
        for client in clients[1::2]:
            client.settimeout(DEADLINE_S)
            for _ in range(sent[client]):
                assert isinstance(receive(client), Failed)
        answer = ask(clients[1], StopRequest(name="peak:"))
        assert isinstance(answer, Failed)
        assert sum(sent.values()) > 500
        assert int(answer.text) <= MAX_CLIENTS_PER_USER  # the parent still hears of the disconnected clients


@pytest.mark.deep
def test_a_user_who_asks_and_leaves(vmd: Daemon) -> None:
    """A user sends thousands of requests and disconnects.  Root does not wait for these requests."""
    vmd.must("status")
    vmd.socket.chmod(0o666)
    packet = encode(ListRequest())[0]
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(EVE, EVE, EVE)
            os.setresuid(EVE, EVE, EVE)
            for _ in range(VISITS):
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                    client.connect(str(vmd.socket))
                    client.setblocking(False)
                    with contextlib.suppress(BlockingIOError, ConnectionError):
                        for _ in range(16):
                            client.send(packet)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def wait_asleep(pid: int) -> None:
    """Wait until a process sleeps."""
    deadline_s = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "S":
        assert time.monotonic() < deadline_s
        pause()


# --- as many as there are --------------------------------------------------------------------------------


def test_a_user_s_share_of_connections(vmd: Daemon) -> None:
    """A connection above the limit is refused with a message; other users and root are served meanwhile."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(vmd, EVE)) for _ in range(MAX_CLIENTS_PER_USER)]
        for client in clients:
            assert serves(client)
        more = stack.enter_context(connect(vmd, EVE))
        assert receive(more) == Failed(
            code=errno.EUSERS, text=f"too many connections of uid {EVE} ({MAX_CLIENTS_PER_USER})"
        )
        assert receive(more) is None
        assert serves(stack.enter_context(connect(vmd, BOB)))
        vmd.must("status")
    assert control_of(vmd, EVE) != control_of(vmd, BOB)


def test_refusals_that_wait(vmd: Daemon) -> None:
    """A control that does not take connections costs the parent a bounded number of descriptors."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(vmd, EVE)) for _ in range(MAX_CLIENTS_PER_USER)]
        for client in clients:
            assert serves(client)
        before = len(os.listdir(f"/proc/{vmd.pid}/fd"))
        pid = control_of(vmd, EVE)
        os.kill(pid, signal.SIGSTOP)
        try:
            more = [stack.enter_context(connect(vmd, EVE)) for _ in range(3 * MAX_REFUSED)]
            vmd.must("status")
            assert len(os.listdir(f"/proc/{vmd.pid}/fd")) <= before + MAX_REFUSED
        finally:
            os.kill(pid, signal.SIGCONT)
        told = [receive(client) for client in more]
        assert sum(isinstance(answer, Failed) for answer in told) == MAX_REFUSED


def test_a_list_is_the_same_for_everybody(vmd: Daemon) -> None:
    """Each control lists the same VMs."""
    with connect(vmd, BOB) as client:
        rows = [ask(client, ListRequest()), *(receive(client) for _ in range(3))]
    assert [type(row) for row in rows] == [VmInfo, VmInfo, VmInfo, End]
