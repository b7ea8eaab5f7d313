"""The command line of vmd, and what it prints before it serves."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmd.config.model import Owner
from vmd.errors import HostError, OperatorError, sentence
from vmd.parent import service
from vmd.parent.options import Options
from vmd.parent.startup import debug_filters
from vmd.privsep import spawn
from vmd.version import VERSION

ROOT = Path(__file__).resolve().parents[3]


def run(line: str) -> tuple[int, str, str]:
    """Run `vmd` with the words and redirections of a shell's command line."""
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m vmd {line}"],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_version() -> None:
    """Both spellings print it to standard output."""
    assert run("-V") == run("--version") == (0, f"vmd {VERSION}\n", "")


def test_help() -> None:
    """It goes to standard output with status 0, and has every option of the manual and of the usage."""
    status, output, errors = run("--help")

    assert (status, errors) == (0, "")
    assert run("-h") == (0, output, "")
    explained = re.findall(r"^  -(\w)", output, re.M)
    usage = "".join(re.findall(r"\[-(\w+)", output.splitlines()[0]))
    manual = re.findall(r"^\.It Fl (\w)", Path(ROOT, "man/vmd.8").read_text(), re.M)
    assert explained == manual
    assert sorted(usage) == sorted(explained)


@pytest.mark.parametrize(
    ("line", "errors"),
    [
        ("-V >&-", "vmd: standard output: Bad file descriptor\n"),
        ("-h <&- >/dev/full", "vmd: standard output: No space left on device\n"),
    ],
)
def test_output_that_cannot_be_written_is_a_failure(line: str, errors: str) -> None:
    """The exit status is 1."""
    assert run(line) == (1, "", errors)


@pytest.mark.parametrize("redirections", ["2>&-", "<&- 2>/dev/full"])
def test_check_without_a_place_for_errors(tmp_path: Path, redirections: str) -> None:
    """The exit status tells the result.  Errors are not written to standard output instead."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.touch()
    bad.write_text("vm\n")

    assert run(f"-n -f {bad} {redirections}")[:2] == (1, "")
    assert run(f"-n -f {good} {redirections}")[:2] == (0, "")


def test_path_of_the_socket_is_too_long() -> None:
    """The kernel's limit is 107 bytes."""
    path = "/tmp/" + "x" * 103

    with pytest.raises(OperatorError) as refused:
        service.listen(path, Owner())

    assert str(refused.value) == f"control socket {path}: has 108 bytes, and at most 107 are possible"


def test_errors_without_a_number() -> None:
    """They are not printed as "Success"."""
    assert str(HostError("bind", OSError("AF_UNIX path too long"))) == "bind: AF_UNIX path too long"
    assert sentence(OSError("timed out")) == "timed out"
    assert sentence(OSError(errno.ENOENT, "")) == "No such file or directory"


def test_the_debug_switch_for_filters_needs_option_d(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without -d the variable is removed from the environment, so that no process has the weaker filter."""
    monkeypatch.setenv(spawn.DEBUG, "1")
    debug_filters(Options(debug=True))
    passed_on = spawn.environment()
    debug_filters(Options())

    assert passed_on == spawn.ENVIRONMENT | {spawn.DEBUG: "1"}
    assert spawn.environment() == spawn.ENVIRONMENT
