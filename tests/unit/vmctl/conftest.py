"""What tests of vmctl share: a daemon to talk to, and a way to run a command in this process."""

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
    """Give a daemon that answers nothing until told what."""
    fake = FakeDaemon(tmp_path / "vmd.sock")
    yield fake
    fake.close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Give a folder that other users may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def vmctl(daemon: FakeDaemon, capfd: pytest.CaptureFixture[str]) -> Vmctl:
    """Give a function that runs vmctl and returns its exit status, output and errors."""

    def run(*arguments: str, socket: str = "") -> tuple[int, str, str]:
        status = main(["-s", socket or str(daemon.path), *arguments])
        output, errors = capfd.readouterr()
        return status, output, errors

    return run
