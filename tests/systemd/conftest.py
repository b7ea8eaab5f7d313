"""What the tests under a real systemd share."""

import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a tree with what `make install` puts on a host."""
    tree = tmp_path_factory.mktemp("installed")
    done = subprocess.run(
        ["make", "-s", "install", f"DESTDIR={tree}"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tree
