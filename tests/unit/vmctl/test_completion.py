"""Completion of command lines by `vmctl --complete`, and by the shells that call it."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.unit.vmctl.fake import DEADLINE_S, ROOT, Answers, FakeDaemon, vm_info
from vmctl.__main__ import main
from vmctl.seed import FILES, PASSWORD_HASH, SSH_KEY
from vmctl.table import COMMANDS
from vmd.ipc.messages.clients import End, ListRequest, SwitchesRequest, SwitchInfo
from vmd.record import Record

NAMES = [command.name for command in COMMANDS]
SWITCHES = (SwitchInfo(name="lan", interface="br0"), SwitchInfo(name="dmz", interface="br1"))


@pytest.fixture
def busy(daemon: FakeDaemon) -> FakeDaemon:
    """A daemon with two VMs on two switches."""

    def script(request: Record) -> Answers:
        if isinstance(request, ListRequest):
            return (vm_info("web", vmid=1), vm_info("mail", vmid=2, running=False), End())
        assert isinstance(request, SwitchesRequest)
        return (*SWITCHES, End())

    daemon.script = script
    return daemon


def complete(daemon: FakeDaemon, capfd: pytest.CaptureFixture[str], *words: str) -> tuple[str, list[str]]:
    """Return the kind of candidates, which says whether files are candidates, and the candidates without their help."""
    assert main(["--complete", "-s", str(daemon.path), *words]) == 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)  # no alarm is left
    output, errors = capfd.readouterr()
    assert errors == ""
    kind, *lines = output.splitlines()
    return kind, [line.partition("\t")[0] for line in lines]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([""], NAMES),
        (["st"], ["start", "status", "stop"]),
        (["help", "st"], ["start", "status", "stop"]),
        (["start", "-B", ""], ["cdrom", "disk", "net"]),
        (["start", "-cB", "c"], ["cdrom"]),
        (["start", "-C", "user"], ["user-data=", "user="]),
        (["log", ""], ["brief", "verbose"]),
        (["reset", "s"], ["switches"]),
        (["stop", ""], ["web", "mail"]),
        (["stop", "w"], ["web"]),
        (["stop", "--", ""], ["web", "mail"]),
        (["ssh", "-n", ""], ["web", "mail"]),
        (["ssh", "--", ""], []),
        (["start", "-c", "-m", "1G", "m"], ["mail"]),
        (["start", "-t", ""], ["web", "mail"]),
        (["start", "-n", ""], ["lan", "dmz"]),
        (["start", "-n", "lan", "-n", "d"], ["dmz"]),
        # No candidates: the command line is complete, or any text may follow.
        (["stop", "web", ""], []),
        (["stop", "-a", ""], []),
        (["reload", ""], []),
        (["start", "-m", ""], []),
        # Options.
        (["stop", "-"], ["-f", "-w", "-a", "--json", "-h", "--help"]),
        (["stop", "-fw", "-"], ["-a", "--json", "-h", "--help"]),
        (["stop", "-a", "--"], ["--json", "--help"]),
        (["stop", "web", "-"], ["-f", "-w", "--json", "-h", "--help"]),
        (["create", "-b", "x", "-"], ["-b", "-c", "-s", "--json", "-h", "--help"]),
        (["stat", "--j"], ["--json"]),
        (["stop", "--", "-"], []),
    ],
)
def test_words(busy: FakeDaemon, capfd: pytest.CaptureFixture[str], words: list[str], found: list[str]) -> None:
    """Commands, options and names that the table allows at this place, without those that are on the line already."""
    assert complete(busy, capfd, *words) == ("words", found)


@pytest.mark.parametrize(
    "words",
    [
        ["-s", ""], ["load", ""], ["create", ""], ["create", "-i", "/"], ["create", "-i", "a", "-s", "1G", ""],
        ["start", "-b", ""], ["start", "-cLd", "raw:/"], ["start", "-r", ""],
        *(["start", "-C", f"{key}=/"] for key in (*FILES, SSH_KEY, PASSWORD_HASH)),
    ],
)  # fmt: skip
def test_files(busy: FakeDaemon, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    """Shells complete file names themselves."""
    assert complete(busy, capfd, *words) == ("files", [])


@pytest.mark.parametrize("words", [["frobnicate", ""], ["st", ""], ["stop", "-x", ""], ["-x", ""]])
def test_nothing_can_follow(busy: FakeDaemon, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    """After a mistake the shell shows no candidates, and vmctl prints nothing."""
    assert main(["--complete", *words]) == 1
    assert capfd.readouterr() == ("", "")


def test_no_daemon(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a daemon there are no names."""
    assert main(["--complete", "-s", str(tmp_path / "none"), "stop", ""]) == 1
    assert capfd.readouterr() == ("", "")


def test_options_and_values_in_one_word(busy: FakeDaemon, capfd: pytest.CaptureFixture[str]) -> None:
    """As getopt(3) reads them."""
    for words in ((f"-s{busy.path}", "stop", ""), (f"-vs{busy.path}", "start", "-ct", "")):
        assert main(["--complete", *words]) == 0
        assert capfd.readouterr().out.splitlines()[1:] == ["web\trunning", "mail\tstopped"]
    assert complete(busy, capfd, "start", "-cBdisk", "-t", "w") == ("words", ["web"])


@pytest.mark.deep
def test_daemon_that_does_not_answer(daemon: FakeDaemon) -> None:
    """A typing user does not have to wait for it, and nothing is shown."""
    done = subprocess.run(
        [sys.executable, "-m", "vmctl", "--complete", "-s", str(daemon.path), "stop", ""],
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip

    assert (done.returncode < 0, done.stdout, done.stderr) == (True, "", "")


# --- shells ----------------------------------------------------------------------------------------------

WRAPPER = """#!/bin/sh
test "$1" = --complete && exec {python} -m vmctl "$@"
printf '<%s>' "$@"
echo
"""
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source {folder}/vmctl.bash; PS1='ready> '"),
    "zsh": (["zsh", "-f", "-i"], "fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -D; PS1='ready> '"),
    "fish": (
        ["fish", "--no-config", "--private", "-i"],
        "source {folder}/vmctl.fish; function fish_prompt; echo -n 'ready> '; end",
    ),
}


@pytest.mark.deep
@pytest.mark.parametrize("shell", SHELLS)
def test_shell(busy: FakeDaemon, tmp_path: Path, shell: str) -> None:
    """A line typed with tabs becomes the intended command line."""
    wrapper = tmp_path / "vmctl"
    wrapper.write_text(WRAPPER.format(python=sys.executable))
    wrapper.chmod(0o755)
    (tmp_path / "some disk.img").touch()
    (tmp_path / "disc.iso").touch()
    typed = {
        "sto\t-f\tw\t": "<stop><-f><web>",
        "unp\tma\t": "<unpause><mail>",
        "start -B cd\t -n d\tweb": "<start><-B><cdrom><-n><dmz><web>",
        "start -C hostn\tx web": "<start><-C><hostname=x><web>",
        "start -C user-d\tdisc\tweb": "<start><-C><user-data=disc.iso><web>",
        "start -r disc\tweb": "<start><-r><disc.iso><web>",
        "start -d raw:disc\tweb": "<start><-d><raw:disc.iso><web>",
        "load some\t": "<load><some disk.img>",
        "status --j\tm\t": "<status><--json><mail>",
    }
    program, setup = SHELLS[shell]
    environment = {
        **os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "TERM": "dumb", "LC_ALL": "C.UTF-8",
    }  # fmt: skip
    master, slave = pty.openpty()
    terminal = Console(master)
    with subprocess.Popen(
        ["setsid", "--ctty", *program], cwd=tmp_path, env=environment, stdin=slave, stdout=slave, stderr=slave
    ) as process:
        os.write(master, f"{setup.format(folder=ROOT / 'completions')}\n".encode())
        terminal.expect("ready> ", DEADLINE_S)
        for line, meant in typed.items():
            os.write(master, f"vmctl -s {busy.path} {line}\n".encode())
            terminal.expect(f"<-s><{busy.path}>{meant}", DEADLINE_S)
        process.kill()
    os.close(master)
    os.close(slave)
