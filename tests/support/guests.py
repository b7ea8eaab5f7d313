"""Guests of our own (`guests/`), built when needed.

A build is kept in a directory named after the sources it was made from, so that a test run after the first one
only hashes some files, and a checkout whose sources change never runs yesterday's guests.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
SOURCES = CHECKOUT / "guests"
CACHE = CHECKOUT / "build" / "guest-cache"
JOBS = 2


class GuestBuildError(Exception):
    """The build failed.  The message is the compiler's output."""


def build(out: Path) -> str:
    """Build all guests into `out`; return the output of make and the compiler.

    Raises:
        GuestBuildError: a guest does not compile, warnings included.
    """
    # MAKEFLAGS and similar variables would pass on the options and job server of a make that runs the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-C", SOURCES, f"-j{JOBS}", "--no-print-directory", "-s", f"OUT={out}"],
        env=environment | {"LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise GuestBuildError(done.stdout)
    return done.stdout


@cache
def guests() -> Path:
    """Return the directory with all guests as `<name>.elf`, built once for each state of the sources.

    Raises:
        GuestBuildError: a guest does not compile.
    """
    built = CACHE / _digest()
    if built.exists():
        return built
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        fresh = Path(name) / "guests"
        build(fresh)
        shutil.rmtree(fresh / "obj")
        try:
            fresh.rename(built)
        except OSError:
            # Another test run was faster.  Its build is the same.
            if not built.exists():
                raise
    return built


def guest(name: str) -> Path:
    """Return one guest's ELF file, by the name of its directory, or openbsd-amd64 or openbsd-i386."""
    path = guests() / f"{name}.elf"
    assert path.exists(), f"there is no guest called {name}"
    return path


def _digest() -> str:
    """Return a digest of the sources and the compiler."""
    digest = hashlib.sha256()
    digest.update(subprocess.run(["gcc", "--version"], stdout=subprocess.PIPE, check=True).stdout)
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(SOURCES)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
