"""Consoles of real VMs: one user types, others watch, and the last output stays after the VM has ended."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.console import Console
from tests.support.daemon import DEADLINE_S, Attached, Daemon
from tests.support.guests import guest

pytestmark = [pytest.mark.root, pytest.mark.kvm]

PROMPT = "vmd-demo> "
LINE = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz\r\n"  # a line of `fill`; 16 of them are a KiB


@pytest.fixture(scope="module")
def vmd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Give a daemon with one VM, `demo`.  Each test leaves it stopped."""
    conf = f'vm "demo" {{\n    disable\n    memory 32M\n    boot "{guest("demo")}"\n}}\n'
    with Daemon(tmp_path_factory.mktemp("console"), conf) as daemon:
        yield daemon


class Viewer(Attached):
    """A vmctl whose keyboard and screen are pipes."""

    def __init__(self, vmd: Daemon, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmctl", "-s", vmd.socket, *arguments],
            cwd=vmd.code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        super().__init__(self.process.stdout.fileno(), self.process.stdin.fileno())

    def outcome(self) -> tuple[int, str]:
        """Wait until it ends; return its exit status and its messages to the user."""
        self.drain(DEADLINE_S)
        assert self.process.stderr is not None
        said = self.process.stderr.read().decode()
        return self.process.wait(DEADLINE_S), said


@contextlib.contextmanager
def viewer(vmd: Daemon, *arguments: str) -> Iterator[Viewer]:
    """Run a vmctl, and kill it at the end of the context."""
    viewer = Viewer(vmd, *arguments)
    with viewer.process as process:
        try:
            yield viewer
        finally:
            process.kill()


def test_a_stopped_viewer_gets_the_last_output(vmd: Daemon) -> None:
    """The guest prints more than a pty holds and powers off, while the viewer's process is stopped.

    Until the next start, `vmctl console` shows this output again.
    """
    with viewer(vmd, "start", "-c", "demo") as stopped:
        stopped.expect(PROMPT, DEADLINE_S)
        stopped.process.send_signal(signal.SIGSTOP)
        with vmd.console("demo") as typing:
            os.write(typing.keyboard, b"fill 24\roff\r")
            vmd.wait_state("demo", "stopped")
        stopped.process.send_signal(signal.SIGCONT)
        status, said = stopped.outcome()

    assert status == 0
    assert said.endswith("vm demo has ended\n")
    assert stopped.said.count(LINE) == 24 * 16
    assert b"switching off" in stopped.said[-100:]
    again = vmd.vmctl("console", "demo")
    assert (again.returncode, again.stderr) == (
        0, "vmctl: vm demo is not running; this is what its console showed last\n",
    )  # fmt: skip
    assert again.stdout.count(LINE.decode().replace("\r\n", "\n")) == 24 * 16
    watched = vmd.vmctl("console", "-r", "demo")
    assert watched.stdout == again.stdout

    vmd.must("start", "demo")
    with vmd.attached("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
        assert b"0123456789" not in console.said
    vmd.must("stop", "-fw", "demo")


def test_the_console_of_a_killed_ad_hoc_vm_is_kept(vmd: Daemon) -> None:
    """`vmctl console` shows the last output of a VM that was killed and that no configuration describes."""
    vmd.must("start", "-m", "32M", "-b", guest("demo"), "adhoc")
    with vmd.console("adhoc") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.answer("echo last words", PROMPT)
    os.kill(vmd.status("adhoc")["pid"], signal.SIGKILL)
    vmd.vmctl("wait", "adhoc")  # fails if the VM has ended already

    shown = vmd.vmctl("console", "adhoc")

    assert shown.returncode == 0
    assert "echo last words\nlast words\n" in shown.stdout
    assert vmd.vmctl("console", "never").returncode == 4


def test_taking_over_and_watching(vmd: Daemon) -> None:
    """One user types and others watch, also across a reset.  After a takeover only the new user can type."""
    vmd.must("start", "demo")
    tty = vmd.status("demo")["tty"]
    with viewer(vmd, "console", "demo") as first, viewer(vmd, "console", "-r", "demo") as watching:
        first.expect(PROMPT, DEADLINE_S)
        watching.expect(PROMPT, DEADLINE_S)
        other = os.open(tty, os.O_RDWR | os.O_NOCTTY)  # as cu does, without asking the daemon
        busy = vmd.vmctl("console", "demo")
        assert (busy.returncode, "in use by root" in busy.stderr) == (1, True)

        with viewer(vmd, "console", "-f", "demo") as second:
            second.expect(PROMPT, DEADLINE_S)
            status, said = first.outcome()
            assert status == 1
            assert said.splitlines()[-1] == (
                f"vmctl: the console of vm demo was taken over by root (pid {second.process.pid})"
            )
            Console(other).drain(DEADLINE_S)  # the pty has hung up
            os.close(other)
            assert vmd.status("demo")["tty"] != tty
            second.answer("echo one", "one\r\n" + PROMPT)
            second.answer("reset", PROMPT)
            second.answer("echo two", "two\r\n" + PROMPT)
            shown = watching.expect("echo two\r\ntwo\r\n" + PROMPT, DEADLINE_S)
            assert "one\r\n" + PROMPT + "reset\r\nresetting\r\n" in shown
            second.type("off\r")
            assert second.outcome()[0] == 0
        assert watching.outcome() == (0, "Watching the console of vm demo\n\n[EOT]\nvmctl: vm demo has ended\n")
    assert watching.said.count(b"echo one\r\none\r\n") == 1  # the output before the takeover is not repeated


def test_a_paste_arrives(vmd: Daemon) -> None:
    """The guest reads more slowly than the user pastes.  The rest waits in the UART, the pty and vmctl."""
    lines = [f"echo {number:04d} is one line of a paste" for number in range(60)]
    with viewer(vmd, "start", "-c", "demo") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.type("".join(f"{line}\r" for line in lines) + "off\r")
        assert console.outcome()[0] == 0

    said = console.text().replace(PROMPT, "").split("\r\n")
    assert [line for line in said if line.endswith("paste")] == [
        text for line in lines for text in (line, line.removeprefix("echo "))
    ]
