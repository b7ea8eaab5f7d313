"""An attacker's code runs where a VM process parses input: kernels, and headers, states and memory of streams.

The daemon here is a changed copy of this program.  Its parsers first do what the guest's command line says.
"""

import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bystander import Bystander, vm_block
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.guests import guest
from tests.support.program import changed_program
from tests.support.transfers import ended, from_file, to_file, vmctl
from tests.support.waiting import pause

pytestmark = [pytest.mark.root, pytest.mark.kvm]

INTRUDER = '''
"""What somebody who has taken over a parser of vm b does: `WHERE:WHAT[:PID]` in a guest's command line."""
import os, signal, sys
from vmd import native
from vmd.log import log
def fork(_pid):
    if os.fork() == 0:
        signal.pause()
def execute(_pid):
    done = "import os; os.write(2, b'vm/b has done execute ')"
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", done])
def spawn(_pid):
    os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", "-c", "import select; select.poll().poll()"], {})
def signal_pidfd(pid):
    signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL)
def make_vm(_pid):
    import fcntl
    fcntl.ioctl(4, 0xAE01, 0)
def signal_thread(pid):
    native.CDLL(None).syscall(234, pid, pid, 9)
def act(where, cmdline):
    if log.title == "vm/b":
        wanted, what, pid, *_ = (*cmdline.split(":"), "0", "0", "0")
        if wanted == where:
            os.write(2, f"{log.title} tries {what}\\n".encode())
            try:
                globals()[what](int(pid))
            except OSError as error:
                os.write(2, f"{log.title} is refused {what}: {error}\\n".encode())
            else:
                os.write(2, f"{log.title} has done {what}\\n".encode())
'''
HOOKS = {
    "vm/boot/loader.py": '''
from vmd.vm import intruder
_load, _firmware_bytes = load, firmware_bytes
def firmware_bytes(fd, name):
    intruder.act("kind", name.rpartition("/")[2])
    return _firmware_bytes(fd, name)
def load(*arguments, cmdline=b"", **named):
    intruder.act("load", cmdline.decode())
    return _load(*arguments, cmdline=cmdline, **named)
''',
    "vm/header.py": '''
from vmd.vm import intruder
_read_header = read_header
HEADERS = []
def read_header(version, raw):
    header = _read_header(version, raw)
    HEADERS.append(header)
    intruder.act("header", header.config.cmdline)
    return header
''',
    "vm/state.py": '''
from vmd.vm import header as headers, intruder
_read_machine = read_machine
def read_machine(version, raw):
    intruder.act("state", headers.HEADERS[-1].config.cmdline)
    return _read_machine(version, raw)
''',
}
ATTACKS = ("fork", "execute", "spawn", "signal_pidfd", "signal_thread")


@pytest.fixture(scope="module")
def bystander(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bystander]:
    """Yield a running VM of another user, in a daemon with such code."""
    directory = tmp_path_factory.mktemp("parsers")
    hooks = {f"vmd/{path}": hook for path, hook in HOOKS.items()}
    code = changed_program(directory / "code", {"vmd/vm/intruder.py": INTRUDER, **hooks})
    with Daemon(directory, vm_block("other"), code=code) as made, Bystander(made, "other") as found:
        yield found


@pytest.fixture
def vmd(bystander: Bystander) -> Iterator[Daemon]:
    """Yield that daemon; check afterwards that the other VM is unaffected."""
    yield bystander.vmd
    bystander.check()


def order(vmd: Daemon, where: str, what: str) -> str:
    """Return a command line with an order.  A process to signal is given by the pid in its namespace."""
    status = Path(f"/proc/{vmd.processes()['vmd: vm/other']}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("NSpid:"))
    return f"{where}:{what}:{line.split()[-1]}"


def check_nothing_came_of_it(vmd: Daemon, what: str, errors: str, processes: dict[str, int]) -> None:
    """Check that the process was killed for the attempt, and that nothing is left of the attack."""
    log = vmd.log
    assert f"vm/b tries {what}\n" in log
    assert f"vm/b has done {what}" not in log
    assert "SIGSYS" in errors
    found = with_reserve(vmd)
    assert found.keys() == processes.keys()
    assert found["vmd: vm/other"] == processes["vmd: vm/other"]


def with_reserve(vmd: Daemon) -> dict[str, int]:
    """Wait for the processes in reserve; return all processes."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not {"vmd: vm", "vmd: opener"} <= (found := vmd.processes()).keys():
        assert time.monotonic() < deadline_s
        select.select([], [], [], 0.02)
    return {title: pid for title, pid in found.items() if not title.startswith("vmd: opener/")}


@pytest.fixture
def reserve(vmd: Daemon) -> dict[str, int]:
    """The processes before an attack."""
    return with_reserve(vmd)


@pytest.mark.parametrize("what", ATTACKS)
def test_code_in_the_loader_of_a_kernel(vmd: Daemon, reserve: dict[str, int], what: str) -> None:
    """Such code cannot start a process, execute a program, or end another VM."""
    cmdline = order(vmd, "load", what)
    status, errors = ended(vmctl(vmd, "start", "-m", "32M", "-b", str(guest("demo")), "-k", cmdline, "b"))

    assert status == 1
    check_nothing_came_of_it(vmd, what, errors, reserve)


@pytest.mark.parametrize(("where", "what"), [("header", "spawn"), ("header", "signal_pidfd"), ("state", "fork")])
def test_code_in_the_reader_of_a_stream(
    vmd: Daemon, reserve: dict[str, int], tmp_path: Path, where: str, what: str
) -> None:
    """The same for code in the process that reads streams."""
    vmd.must("start", "-m", "32M", "-b", guest("demo"), "-k", order(vmd, where, what), "a")
    to_file(vmd, "a", tmp_path / "stream")

    status, errors = from_file(vmd, "b", tmp_path / "stream")

    assert status == 1
    check_nothing_came_of_it(vmd, what, errors, reserve)


@pytest.mark.deep
def test_a_streamprobe_that_does_not_answer(tmp_path: Path) -> None:
    """The VM process gives up with a message and ends.  Waiting for the stream alone does not count as no answer.

    In this copy of the program the limit is seconds instead of a minute.
    """
    code = changed_program(tmp_path / "code", {"vmd/vm/arrival.py": "\nPROBE_LOOK_S = 3.0\n"})
    with Daemon(tmp_path, vm_block("other"), code=code) as vmd, Bystander(vmd, "other"):
        vmd.must("start", "-m", "32M", "-b", guest("demo"), "a")
        to_file(vmd, "a", tmp_path / "stream")
        reading, writing = os.pipe()
        receiver = vmctl(vmd, "receive", "b", stdin=reading)
        os.close(reading)
        deadline_s = time.monotonic() + DEADLINE_S
        while "vmd: vm/b/streamprobe" not in (found := vmd.processes()):
            assert time.monotonic() < deadline_s
            pause()
        probe = os.pidfd_open(found["vmd: vm/b/streamprobe"])
        with pytest.raises(subprocess.TimeoutExpired):
            receiver.wait(10.0)
        signal.pidfd_send_signal(probe, signal.SIGSTOP)
        os.write(writing, (tmp_path / "stream").read_bytes()[:4096])
        status, errors = ended(receiver)
        os.close(writing)

        assert status == 1
        assert "vm/b/streamprobe does not read the stream: Connection timed out" in errors
        ends = select.poll()
        ends.register(probe, select.POLLIN)
        assert ends.poll(DEADLINE_S * 1000)
        os.close(probe)
        assert from_file(vmd, "b", tmp_path / "stream")[0] == 0


def test_code_that_looks_at_a_boot_image_makes_no_vm(vmd: Daemon, tmp_path: Path) -> None:
    """The descriptor of /dev/kvm is closed before the first byte is read."""
    kernel = tmp_path / "kind:make_vm"
    shutil.copy(guest("demo"), kernel)
    vmd.must("start", "-m", "32M", "-b", kernel, "b")
    vmd.must("stop", "-fw", "b")

    assert "vm/b is refused make_vm" in vmd.log
    assert "vm/b has done make_vm" not in vmd.log


def test_a_stopped_device_does_not_outlive_its_vm(vmd: Daemon) -> None:
    """The signal at its parent's death kills it, although both are confined."""
    vmd.must("start", "-m", "32M", "-b", guest("demo"), "-r", guest("demo"), "a")
    device = vmd.processes()["vmd: vm/a/vioscsi0"]
    gone = os.pidfd_open(device)
    os.kill(device, signal.SIGSTOP)

    os.kill(vmd.processes()["vmd: vm/a"], signal.SIGKILL)

    ends = select.poll()
    ends.register(gone, select.POLLIN)
    assert ends.poll(DEADLINE_S * 1000)
    os.close(gone)
