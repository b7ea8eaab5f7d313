"""Looks at ext4 file systems in raw images from outside, with e2fsprogs: no loop device, no mount."""

import subprocess
from pathlib import Path


def recovered(image: Path, offset: int = 0) -> str:
    """Replay the journal, as a mount after a crash does.  Return the output.

    Raises AssertionError if there was no journal to replay: then nothing crashed.
    """
    done = _run("e2fsck", "-E", "journal_only", "-y", _place(image, offset))
    assert "recovering journal" in done.stdout, done.stdout + done.stderr
    return done.stdout


def problems(image: Path, offset: int = 0) -> str:
    """Return what a full check that changes nothing complains of; empty for a clean file system."""
    done = _run("e2fsck", "-fn", _place(image, offset))
    return "" if done.returncode == 0 else f"e2fsck: status {done.returncode}\n{done.stdout}{done.stderr}"


def read(image: Path, name: str, offset: int = 0) -> bytes:
    """Return the content of a file; raises AssertionError if there is none."""
    copy = image.with_name("read-from-ext4")
    copy.unlink(missing_ok=True)
    done = _run("debugfs", "-R", f"dump {name} {copy}", _place(image, offset))
    assert copy.exists(), done.stderr
    content = copy.read_bytes()
    copy.unlink()
    return content


def _place(image: Path, offset: int) -> str:
    return f"{image}?offset={offset}"


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C", "PATH": PATH},
    )


PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
