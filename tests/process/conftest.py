"""What tests of whole processes begin with."""

from collections.abc import Iterator

import pytest

from tests.support.bystander import Bystander
from tests.support.hostnet import ours, state_file
from tests.support.network import Network


@pytest.fixture
def network() -> Iterator[Network]:
    """Give an empty network; afterwards nothing of ours is left in it, nor beside it."""
    with Network() as made:
        yield made
        assert ours(made) == []
        assert not state_file(made).exists()


@pytest.fixture(scope="session", autouse=True)
def _root_is_answered_in_time(pytestconfig: pytest.Config) -> None:
    """The long rounds hold the daemon to what it promises; the others find out whether anybody waits at all."""
    if pytestconfig.getoption("--deep"):
        Bystander.status_s = 1.0
