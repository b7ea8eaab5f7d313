"""Fixtures of vmctl's tests: a daemon to talk to, and a function that runs a command in this process."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.vmctl.fake import FakeDaemon
from vmctl.__main__ import main

Vmctl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    """A daemon that gives no answers until it has a script."""
    fake = FakeDaemon(tmp_path / "vmd.sock")
    yield fake
    fake.close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def vmctl(daemon: FakeDaemon, capfd: pytest.CaptureFixture[str]) -> Vmctl:
    """A function that runs vmctl and returns its exit status, output and errors."""

    def run(*arguments: str, socket: str = "") -> tuple[int, str, str]:
        status = main(["-s", socket or str(daemon.path), *arguments])
        output, errors = capfd.readouterr()
        return status, output, errors

    return run
