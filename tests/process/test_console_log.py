"""Console logs of real VMs: whose they are, what they have, and what becomes of one that cannot be written."""

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
    """Return a VM for vm.conf."""
    return VM.format(name=name, boot=guest("demo"), owner=owner, log=log)


@pytest.fixture
def logs() -> Iterator[Path]:
    """Give a directory of the owner's."""
    with public_folder() as folder:
        (folder / "logs").mkdir()
        os.chown(folder / "logs", OWNER, GROUP)
        yield folder / "logs"


def until(condition: Callable[[], bool], vmd: Daemon) -> None:
    """Wait for something that the daemon does."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, vmd.log
        time.sleep(0.05)


def say(vmd: Daemon, name: str, word: str) -> None:
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


def test_what_a_guest_prints_is_in_its_log(tmp_path: Path, logs: Path) -> None:
    """All of it, once and in order: over the end of a file, the end of the process that writes it, and a reload.

    Who follows the log sees it, too; and it is there when the VM is not.
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
        until(first.exists, vmd)
        say(vmd, "demo", "next")
        until(lambda: b"\nnext" in path.read_bytes(), vmd)
        assert first.read_bytes().startswith(before)
        status = path.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (OWNER, GROUP, 0o640)

        os.kill(vmd.processes()["vmd: consolelog"], signal.SIGKILL)
        say(vmd, "demo", "killed")
        vmd.wait_log("process consolelog has ended; starting another one")
        until(lambda: b"\nkilled" in path.read_bytes(), vmd)

        vmd.conf.write_text(block("demo", other))
        assert "waits for its next start" not in vmd.must("reload")
        until(other.exists, vmd)
        say(vmd, "demo", "moved")
        until(lambda: other.read_bytes().count(PROMPT.encode()) == 1, vmd)

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
def test_the_owner_s_rights_count(tmp_path: Path, logs: Path) -> None:
    """A log that its owner cannot make costs the VM nothing else, is said once, and begins when they can."""
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
        until(lambda: PROMPT.encode() in path.read_bytes(), vmd)

        assert not re.search(trouble, vmd.must("status", "-v", "demo"))
        vmd.must("stop", "-fw", "demo")
    assert vmd.log.count("Permission denied: what it prints is not kept") == 1


@pytest.mark.deep
def test_a_log_goes_on_with_the_next_daemon(tmp_path: Path, logs: Path) -> None:
    """What is printed while there is none, and while the next one begins, waits for it; nothing is there twice."""
    path = logs / "demo.log"
    with KeptDaemon(tmp_path, block("demo", path)) as vmd:
        vmd.must("start", "demo")
        with vmd.console("demo") as console:
            console.expect(PROMPT, DEADLINE_S)
            until(lambda: path.exists() and PROMPT.encode() in path.read_bytes(), vmd)
            vmd.kill()
            console.answer("echo meanwhile", PROMPT)
            vmd.start()
            console.answer("echo after", PROMPT)
        until(lambda: path.read_bytes().count(PROMPT.encode()) == 3, vmd)

        printed = vmd.vmctl("console", "demo").stdout.encode()
        assert path.read_bytes().replace(b"\r\n", b"\n") == printed.replace(b"\r\n", b"\n")
        vmd.must("stop", "-fw", "demo")
