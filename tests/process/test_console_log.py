"""Console logs of real VMs: their owner, their content, and a log that cannot be written."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.guests import guest
from tests.support.keeper import KeptDaemon
from tests.support.users import public_folder

pytestmark = [pytest.mark.root, pytest.mark.kvm]

PROMPT = "vmd-demo> "
OWNER, GROUP = 4711, 4712
SIZE = 65536
VM = """vm "{name}" {{
    disable
    memory 32M
    boot "{boot}"
    owner {owner}
    console log "{log}" size 64K keep 2
}}
"""


def block(name: str, log: Path, owner: str = f"{OWNER}:{GROUP}") -> str:
    """Return a VM's block for vm.conf."""
    return VM.format(name=name, boot=guest("demo"), owner=owner, log=log)


@pytest.fixture
def logs() -> Iterator[Path]:
    """Give a directory that belongs to the owner of the VMs."""
    with public_folder() as folder:
        (folder / "logs").mkdir()
        os.chown(folder / "logs", OWNER, GROUP)
        yield folder / "logs"


def wait_until(condition: Callable[[], bool], vmd: Daemon) -> None:
    """Wait until a condition is true."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, vmd.log
        time.sleep(0.05)


def echo(vmd: Daemon, name: str, word: str) -> None:
    """Have a guest print a word."""
    with vmd.console(name) as console:
        console.answer(f"echo {word}", PROMPT)


@contextlib.contextmanager
def follow(vmd: Daemon, name: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a vmctl that follows a log."""
    arguments = [*vmd.client, "-s", vmd.socket, "console", "-lF", name]
    with subprocess.Popen(arguments, cwd=vmd.code, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_output_of_a_guest_is_in_its_log(tmp_path: Path, logs: Path) -> None:
    """All output is logged once and in order, across a rotation, a kill of the writing process, and a reload.

    `console -lF` follows it.  `console -l` also shows it after the VM has ended.
    """
    path, other = logs / "demo.log", logs / "other.log"
    before = b"x" * (SIZE - 50)
    path.write_bytes(before)
    os.chown(path, OWNER, GROUP)
    with Daemon(tmp_path, block("demo", logs / "%n.log")) as vmd, follow(vmd, "demo") as following:
        assert following.stdout is not None
        seen = Console(following.stdout.fileno())
        vmd.must("start", "demo")
        first = path.with_suffix(".log.1")
        wait_until(first.exists, vmd)
        echo(vmd, "demo", "next")
        wait_until(lambda: b"\nnext" in path.read_bytes(), vmd)
        assert first.read_bytes().startswith(before)
        status = path.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (OWNER, GROUP, 0o640)

        os.kill(vmd.processes()["vmd: consolelog"], signal.SIGKILL)
        echo(vmd, "demo", "killed")
        vmd.wait_log("process consolelog has ended; starting another one")
        wait_until(lambda: b"\nkilled" in path.read_bytes(), vmd)

        vmd.conf.write_text(block("demo", other))
        assert "waits for its next start" not in vmd.must("reload")
        wait_until(other.exists, vmd)
        echo(vmd, "demo", "moved")
        wait_until(lambda: other.read_bytes().count(PROMPT.encode()) == 1, vmd)

        printed = vmd.vmctl("console", "demo").stdout.replace("\n", "\r\n").encode()
        kept = first.read_bytes() + path.read_bytes() + other.read_bytes()
        assert kept.replace(b"\r\n", b"\n") == before + printed.replace(b"\r\n", b"\n")
        seen.expect("killed", DEADLINE_S)
        following.send_signal(signal.SIGINT)
        assert following.wait(DEADLINE_S) == 0
        assert "console log" not in vmd.must("status", "-v", "demo")

        vmd.must("stop", "-fw", "demo")
        assert vmd.must("console", "-l", "demo").endswith(PROMPT)
        assert vmd.status("demo")["console_log"] == str(other)
    assert "bytes of what it printed are lost" not in vmd.log


@pytest.mark.deep
def test_a_log_that_its_owner_cannot_create(tmp_path: Path, logs: Path) -> None:
    """The VM runs without its log, and one message says so.  The log begins as soon as the owner can create it."""
    os.chown(logs, 0, 0)
    path = logs / "demo.log"
    trouble = rf"demo console log: {path}: Permission denied"
    with Daemon(tmp_path, block("demo", path)) as vmd:
        vmd.must("start", "demo")
        vmd.wait_log(f"vm demo: console log {path}: Permission denied: what it prints is not kept")
        assert re.search(trouble, vmd.must("status", "-v", "demo"))
        with vmd.console("demo") as console:
            console.expect(PROMPT, DEADLINE_S)

        os.chown(logs, OWNER, GROUP)
        vmd.wait_log(f"vm demo: console log {path} is written again")
        wait_until(lambda: PROMPT.encode() in path.read_bytes(), vmd)

        assert not re.search(trouble, vmd.must("status", "-v", "demo"))
        vmd.must("stop", "-fw", "demo")
    assert vmd.log.count("Permission denied: what it prints is not kept") == 1


@pytest.mark.deep
def test_the_next_daemon_continues_a_log(tmp_path: Path, logs: Path) -> None:
    """It also writes the output of the time without a daemon.  No output is written twice."""
    path = logs / "demo.log"
    with KeptDaemon(tmp_path, block("demo", path)) as vmd:
        vmd.must("start", "demo")
        with vmd.console("demo") as console:
            console.expect(PROMPT, DEADLINE_S)
            wait_until(lambda: path.exists() and PROMPT.encode() in path.read_bytes(), vmd)
            vmd.kill()
            console.answer("echo meanwhile", PROMPT)
            vmd.start()
            console.answer("echo after", PROMPT)
        wait_until(lambda: path.read_bytes().count(PROMPT.encode()) == 3, vmd)

        printed = vmd.vmctl("console", "demo").stdout.encode()
        assert path.read_bytes().replace(b"\r\n", b"\n") == printed.replace(b"\r\n", b"\n")
        vmd.must("stop", "-fw", "demo")
