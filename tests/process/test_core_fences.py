"""Unexpected errors affect only the client or VM that causes them: terminals, files whose close fails, our bugs."""

import ast
import errno
import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.bystander import NAME, Bystander, vm_block
from tests.support.clients import connect, receive
from tests.support.daemon import ROOT, Daemon
from tests.support.fusefile import FLUSH, FuseFile
from tests.support.guests import guest
from tests.support.program import changed_program
from vmd.ipc.fence import OUR_FAULT, STRIKES
from vmd.ipc.imsg import encode
from vmd.ipc.messages.clients import (
    ConsoleAttached,
    ConsoleOutput,
    ConsoleRequest,
    ConsoleWatch,
    Failed,
    ListRequest,
    ReceiveRequest,
    SendRequest,
    StartRequest,
    SwitchesRequest,
    VmInfo,
    VmStarted,
)
from vmd.record import Record

pytestmark = [pytest.mark.root, pytest.mark.kvm]

NOBODY = 65534
# A line discipline without ioctl requests: from now on FIONREAD and TCFLSH fail on this terminal.
NO_LINE_DISCIPLINE = """
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_NOCTTY)
fcntl.ioctl(fd, 0x5423, struct.pack("i", 27))  # TIOCSETD, N_NULL
"""


@pytest.fixture(scope="module")
def bystander(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bystander]:
    """Yield a VM that must not be affected, in a daemon with a user's VM and one of root's."""
    conf = vm_block(NAME) + vm_block("hers", "owner nobody:nogroup") + vm_block("roots")
    with Daemon(tmp_path_factory.mktemp("fences"), conf) as daemon, Bystander(daemon) as made:
        yield made


@pytest.fixture
def vmd(bystander: Bystander) -> Iterator[Daemon]:
    """Yield that daemon; check afterwards that the VM is unaffected."""
    yield bystander.vmd
    bystander.check()


# --- terminals -------------------------------------------------------------------------------------------


def test_a_terminal_that_knows_no_request(vmd: Daemon) -> None:
    """A user of a console may set another line discipline of its pty.  The VM still ends as usual."""
    name = "hers"
    vmd.must("start", name)

    subprocess.run(
        ["/usr/bin/python3", "-I", "-c", NO_LINE_DISCIPLINE, vmd.status(name)["tty"]],
        user=NOBODY, group=NOBODY, extra_groups=[], check=True,
    )  # fmt: skip
    with connect(vmd.socket) as client:  # is shown the earlier output instead of the terminal's queue
        client.send(encode(ConsoleRequest(name=name))[0])
        while isinstance(answer := receive(client), ConsoleOutput):
            pass
        assert isinstance(answer, ConsoleAttached)
    vmd.must("stop", "-fw", name)

    vmd.wait_state(name, "stopped")
    vmd.must("start", name)
    assert vmd.status(name)["tty"]
    assert "unexpected" not in vmd.log


# --- files whose close fails -----------------------------------------------------------------------------


def test_files_whose_close_fails(vmd: Daemon) -> None:
    """Storage answers EIO to each close(2), with requests that take files and with those that do not."""
    requests: tuple[tuple[Record, set[str]], ...] = (
        (ListRequest(), set()),
        (StartRequest(name="nowhere"), {"kernel"}),
        (StartRequest(name=NAME), {"kernel", "initrd"}),
        (StartRequest(name="roots"), {"kernel"}),
        (SendRequest(name="nowhere"), {"stream"}),
        (ReceiveRequest(name=NAME), {"stream"}),
        (ReceiveRequest(name="received"), {"stream"}),
    )
    with FuseFile(guest("demo").read_bytes(), flushes=True, for_all=True) as file:
        file.rule(FLUSH, errno.EIO)
        for request, names in requests:
            with connect(vmd.socket) as client:
                fd = file.open()
                packet, order = encode(request, fds={name: [fd] for name in names})
                socket.send_fds(client, [packet], order or [fd])
                with pytest.raises(OSError, match="Input/output error"):
                    os.close(fd)
                answer = receive(client)
            expected = VmStarted if request == requests[3][0] else (Failed, type(None))
            assert isinstance(answer, expected), (request, answer)
            with connect(vmd.socket) as client:
                client.send(encode(ListRequest())[0])
                assert isinstance(receive(client), VmInfo)
        flushed = file.count(FLUSH)
    assert flushed > 2 * len(requests)  # not only by this test
    assert "unexpected" not in vmd.log


def test_nothing_but_vmd_closing_closes_a_descriptor() -> None:
    """The processes that all guests depend on, and VM processes, have no os.close that a file can make fail."""
    wants_to_know = {ROOT / "vmd/vm/stream.py"}  # only close reports whether a stream to a file is complete
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("parent", "control", "priv", "vmm", "vm", "ipc")
        for path in sorted((ROOT / "vmd" / package).rglob("*.py"))
        if path not in wants_to_know
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "close" and ast.unparse(node.value) == "os"
    ]
    assert found == [], "use vmd.closing.close"


# --- bugs of ours ----------------------------------------------------------------------------------------

# Code for modules of the program: a handler in each process that fails, and a timer that fails.
BUGS = {
    "control/main.py": """
def _bug(*_):
    raise ZeroDivisionError("a bug of control")
from vmd.ipc.messages.clients import SwitchesRequest
Control.HANDLERS[(Proc.CLIENT, SwitchesRequest)] = _bug
""",
    "parent/consoles.py": """
def _bug(*_):
    raise ZeroDivisionError("a bug of parent")
Consoles.serve_watch = _bug
Consoles.has_left = _bug
""",
    "parent/main.py": """
def _bug(*_):
    raise ZeroDivisionError("a bug of parent")
Parent.HANDLERS[(Proc.VMM, PauseDone)] = _bug
""",
    "vmm/main.py": """
_begin = Vmm.begin
def _bug(vmm, message, name, envelope):
    if name == "hers":
        raise ZeroDivisionError("a bug of vmm")
    _begin(vmm, message, name, envelope)
Vmm.begin = _bug
""",
    "priv/main.py": """
def _bug(*_):
    raise ZeroDivisionError("a bug of priv")
Priv.HANDLERS[(Proc.PARENT, MakeNics)] = _bug
""",
}


@pytest.fixture(scope="module")
def among_bugs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bystander]:
    """Yield a VM in a daemon with these bugs."""
    directory = tmp_path_factory.mktemp("bugs")
    code = changed_program(directory / "code", {f"vmd/{path}": bug for path, bug in BUGS.items()})
    conf = vm_block(NAME) + vm_block("hers") + vm_block("roots") + vm_block("networked", "interface tap")
    with Daemon(directory, conf, code=code) as daemon, Bystander(daemon) as made:
        yield made


@pytest.fixture
def buggy(among_bugs: Bystander) -> Iterator[Daemon]:
    """Yield that daemon; check afterwards that the VM is unaffected."""
    yield among_bugs.vmd
    among_bugs.check()


@pytest.mark.deep
def test_a_bug_costs_its_client_or_its_vm(buggy: Daemon) -> None:
    """Each request is answered, each traceback is logged, and each process goes on."""
    buggy.must("start", "roots")

    with connect(buggy.socket) as client:
        client.send(encode(SwitchesRequest())[0])
        assert receive(client) == Failed(code=errno.EIO, text=OUR_FAULT)
        assert receive(client) is None
    for command in (("pause", "roots"), ("start", "hers"), ("start", "networked")):
        done = buggy.vmctl(*command)
        assert done.returncode == 1
        assert OUR_FAULT in done.stderr
    assert buggy.status("hers")["state"] == "stopped"
    assert buggy.status("networked")["state"] == "stopped"
    buggy.must("stop", "-fw", "roots")  # its terminal is closed in a timer, and that fails

    for process in ("control", "parent", "vmm", "priv"):
        buggy.wait_log(f"ZeroDivisionError: a bug of {process}")
    buggy.wait_log("consoles.py:")


@pytest.mark.deep
def test_a_client_that_leads_to_bugs_is_cut_off(buggy: Daemon) -> None:
    """After a number of bugs the client is no longer served; others still are."""
    with connect(buggy.socket) as client:
        for _ in range(STRIKES):
            client.send(encode(ConsoleWatch(name=NAME))[0])
            assert receive(client) == Failed(code=errno.EIO, text=OUR_FAULT)
        client.send(encode(ListRequest())[0])
        assert receive(client) == Failed(code=errno.EIO, text=OUR_FAULT)
    with connect(buggy.socket) as client:
        client.send(encode(ListRequest())[0])
        assert isinstance(receive(client), VmInfo)
    buggy.wait_log("is cut off after")
