"""Fixtures of the tests of whole processes."""

from collections.abc import Iterator

import pytest

from tests.support.bystander import Bystander
from tests.support.hostnet import ours, state_file
from tests.support.network import Network


@pytest.fixture
def network() -> Iterator[Network]:
    """Yield an empty network; check afterwards that vmd has left nothing in it or in the host's network."""
    with Network() as made:
        yield made
        assert ours(made) == []
        assert not state_file(made).exists()


@pytest.fixture(scope="session", autouse=True)
def _root_is_answered_in_time(pytestconfig: pytest.Config) -> None:
    """Set the longest status time: the promised one in the long rounds, one that only detects hanging elsewhere."""
    if pytestconfig.getoption("--deep"):
        Bystander.status_s = 1.0
