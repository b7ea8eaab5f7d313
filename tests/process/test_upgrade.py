"""Another version replaces the daemon in the same process, and guests are not affected."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.test_daemon import PROMPT, demo, gone, wait_gone
from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.waiting import pause
from vmd.parent.program import Program
from vmd.version import VERSION

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(300)]

LATER = "99.0"
CANNOT = "vmctl: the version that is installed now cannot take over:\n"
OUTLIVES = ("vmd: vmm", "vmd: vm")  # prefixes of process titles


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A separate installation, which a test may change."""
    copy = tmp_path / "code"
    for package in ("vmd", "vmctl"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture
def vmd(tmp_path: Path, code: Path) -> Iterator[Daemon]:
    """A daemon of that installation, with a guest."""
    with Daemon(tmp_path, demo(), code=code) as daemon:
        daemon.must("start", "demo")
        yield daemon


def install(code: Path, version: str = LATER) -> None:
    """Install another version."""
    (code / "vmd/version.py").write_text(f'"""Later."""\n\nVERSION = "{version}"\n')


def open_files(daemon: Daemon) -> int:
    """Return the number of the parent's descriptors while no client is connected."""
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def wait_reaped(daemon: Daemon) -> None:
    """Wait until the daemon has no child that has ended."""
    deadline = time.monotonic() + DEADLINE_S
    command = ["ps", "--ppid", str(daemon.pid), "-o", "stat="]
    while "Z" in subprocess.run(command, capture_output=True, text=True, check=False).stdout:
        assert time.monotonic() < deadline, "children that have ended are not reaped"
        daemon.must("status")  # this starts a control, and the parent reaps ended children
        pause()


def test_guest_runs_on_under_another_version(vmd: Daemon, code: Path) -> None:
    """The daemon remains the same process.  A guest that resets itself continues in the new version."""
    before, pid = vmd.status("demo"), vmd.pid
    processes = vmd.processes()
    install(code)
    vmd.must("upgrade", "-n")
    assert vmd.must("version") == f"vmctl {LATER}\nvmd {VERSION}\n"  # -n only checks

    said = vmd.must("upgrade")

    generations = [f"generation 1: vmd {VERSION}, 1 VM", f"generation 2: vmd {LATER}, 0 VMs"]
    assert said.splitlines() == [f"vmctl {LATER}", f"vmd {LATER}", *generations]
    assert vmd.pid == pid
    after = vmd.status("demo")
    assert {key: after[key] for key in after if "bytes" not in key} == {
        key: before[key] for key in before if "bytes" not in key
    }
    wait_gone([process for title, process in processes.items() if not title.startswith(OUTLIVES)])
    wait_reaped(vmd)

    with vmd.console("demo") as console:
        console.answer("", PROMPT)
        console.answer("reset", PROMPT)
    said = vmd.must("version")
    assert said.splitlines() == [f"vmctl {LATER}", f"vmd {LATER}"]
    assert vmd.status("demo")["tty"] == before["tty"]
    wait_gone([processes["vmd: vmm"], processes["vmd: vm/demo"]])
    wait_reaped(vmd)

    files = open_files(vmd)
    vmd.must("upgrade")
    vmd.must("upgrade")
    wait_reaped(vmd)
    assert open_files(vmd) <= files
    assert vmd.stop() == 0


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda code, _conf: (code / "vmd/vmm/main.py").write_text("def\n"), "SyntaxError: invalid syntax"),
        pytest.param(
            lambda code, _conf: (code / "vmd/parent/startup.py").unlink(), "No module named 'vmd.parent.startup'",
            marks=pytest.mark.deep,
        ),
        pytest.param(
            lambda _code, conf: conf.write_text("vm lots {\n"), "vm.conf:2: syntax error at end of file",
            marks=pytest.mark.deep,
        ),
    ],
)
def test_version_that_cannot_take_over(
    vmd: Daemon, code: Path, break_it: Callable[[Path, Path], object], reason: str
) -> None:
    """The daemon continues, and gives the reason."""
    before = vmd.status("demo")
    break_it(code, vmd.conf)

    for options in ((), ("-n",)):
        refused = vmd.vmctl("upgrade", *options)

        assert refused.returncode == 1
        assert refused.stderr.startswith(CANNOT)
        assert reason in refused.stderr
    assert reason in vmd.log
    assert vmd.status("demo")["pid"] == before["pid"]
    assert "of an earlier vmd are adopted" not in vmd.log


@pytest.mark.deep
def test_store_without_room(vmd: Daemon, code: Path) -> None:
    """No other generation starts: VMs still start with the existing vmm, and the log says so."""
    before = vmd.status("demo")
    install(code)
    store = code / "vmd/parent/store.py"
    store.write_text(store.read_text().replace("STORE_MAX = 512", f"STORE_MAX = {len(('state', 'listener', 'vmm-1'))}"))

    assert vmd.must("upgrade") == f"vmctl {LATER}\nvmd {LATER}\n"

    vmd.wait_log(f"no room to store another vmm: VMs start with that of vmd {VERSION}")
    assert vmd.status("demo")["pid"] == before["pid"]
    vmd.must("stop", "-fw", "demo")
    vmd.must("start", "demo")
    assert json.loads(vmd.must("version", "--json"))["generations"] == [{"number": 1, "version": VERSION, "vms": 1}]


@pytest.mark.deep
def test_daemon_in_the_background(tmp_path: Path, code: Path) -> None:
    """Without a service manager, the same process continues in the background with another version."""
    daemon = Daemon(tmp_path, demo(), code=code)
    environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    relative = os.path.relpath(daemon.conf, code)
    started = subprocess.run(
        [sys.executable, "-m", "vmd", "-s", daemon.socket, "-f", relative], cwd=code, stdin=subprocess.DEVNULL,
        env={**environment, "STATE_DIRECTORY": str(daemon.state)}, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert started.returncode == 0
    (pid,) = daemons(daemon.socket)
    try:
        daemon.must("start", "demo")
        before = daemon.status("demo")
        install(code)

        daemon.must("upgrade")

        assert daemons(daemon.socket) == [pid]
        assert daemon.status("demo")["pid"] == before["pid"]
        assert daemon.must("version").splitlines()[1] == f"vmd {LATER}"
    finally:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + DEADLINE_S
        while not gone(pid):
            assert time.monotonic() < deadline, "the daemon does not end"
            pause()
    assert not daemon.socket.exists()


def daemons(socket: Path) -> list[int]:
    """Return the daemons that serve a socket."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"vmd" in words and os.fsencode(socket) in words:
                found.append(int(path.parent.name))
    return found


def test_command_of_an_installed_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script is run by its path, so that the first line of the new one counts, from any working directory."""
    script = tmp_path / "vmd"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["./vmd", "-s", "here"])

    program = Program(["-s", "here"])
    monkeypatch.chdir("/")

    assert program.command("--check-adopt") == [str(script), "--check-adopt", "-s", "here"]
    assert program.directory == str(tmp_path)
