"""A rehearsal: the installed version is tried before it takes over."""

import os
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from vmd.errors import HostError
from vmd.ipc.loop import Loop
from vmd.parent import upgrade
from vmd.parent.program import Program
from vmd.parent.upgrade import Rehearsal, in_words


class Script(Program):
    """A program that is a shell script."""

    def __init__(self, directory: Path, script: str) -> None:
        self.directory = str(directory)
        self.script = script

    def command(self, *options: str) -> list[str]:
        """Return the command that runs the script with these options."""
        return ["/bin/sh", "-c", self.script, "vmd", *options]


def rehearse(directory: Path, script: str) -> str:
    """Return the result of a rehearsal, once its process has ended."""
    loop = Loop()
    ends: list[str] = []
    state = os.memfd_create("state")
    os.write(state, b"what is known")
    before = os.listdir("/proc/self/fd")

    def look() -> None:
        if ends and len(os.listdir("/proc/self/fd")) == len(before):
            loop.stop()
        loop.call_later(0.01, look)

    made = Rehearsal(loop, Script(directory, script), state, ends.append)
    look()
    loop.run()
    assert made._late or made._timer.callback is None
    os.close(state)
    loop.close()
    (end,) = ends
    return end


def test_program_has_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in the daemon's directory, and cannot notify the service manager."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    script = (
        f'test "$1" = --check-adopt && test "$(pwd)" = {tmp_path} && test -z "$NOTIFY_SOCKET"'
        ' && grep -q "what is known" /proc/self/fd/${VMD_STORED#state=}'
    )

    assert rehearse(tmp_path, script) == ""


def test_program_without_output(tmp_path: Path) -> None:
    """The result is its exit status."""
    assert rehearse(tmp_path, "exit 3") == "it ended with status 3"


def test_program_with_much_output(tmp_path: Path) -> None:
    """The end of the output counts.  A child that keeps the output open is not waited for."""
    said = rehearse(tmp_path, "yes | head -c 1000000; echo the end; sleep 3 & exit 1")

    assert said.endswith("\nthe end")
    assert len(said) <= upgrade.SAID_MAX


def test_program_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed after REHEARSAL_S."""
    monkeypatch.setattr(upgrade, "REHEARSAL_S", 0.2)

    assert "did not end within" in rehearse(tmp_path, "exec sleep 1000")


def test_program_that_cannot_be_started(tmp_path: Path) -> None:
    """No descriptor is left open, and the error names the program."""
    before = open_descriptors()
    loop = Loop()
    with pytest.raises(HostError, match="start /bin/sh: No such file or directory"):
        Rehearsal(loop, Script(tmp_path / "gone", ""), 0, lambda _end: None)
    loop.close()
    assert open_descriptors() == before


def test_traceback_of_the_program_is_shortened_to_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    """The log has the whole traceback.  Messages of vmd are not shortened."""
    trace = "Traceback (most recent call last):\n  File ...\nSyntaxError: invalid syntax\n"
    assert in_words(trace, 1) == "SyntaxError: invalid syntax"
    assert "Traceback (most recent call last):" in capfd.readouterr().err
    assert in_words(f"no {trace}", 1) == f"no {trace}".strip()
    assert capfd.readouterr().err == ""
    assert (in_words("", 3), in_words(" \n", -9)) == ("it ended with status 3", "it ended with status -9")
    assert in_words("vmd: /etc/vm.conf:1: no\nvmd: /etc/vm.conf:2: no\n", 1) == "/etc/vm.conf:1: no\n/etc/vm.conf:2: no"
