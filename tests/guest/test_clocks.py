"""All clocks of a guest stop and continue together: pause, unpause, send and receive in any order.

The guest compares its clocks with one another, and the test with the host's (`tests.support.clocks`).
"""

import random
from pathlib import Path

import pytest

from tests.support.clocks import Session, daemon

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

STEPS_DEEP = 10
SEEDS_DEEP = 4
DWELLS_S = (0.0, 0.1, 0.4, 1.2)


def test_every_clock_stops_at_one_moment(tmp_path: Path) -> None:
    """One pause is longer than the battery-backed clock's resolution of 1 s.  Twice the guest holds that clock."""
    with daemon(tmp_path, "vcpus 2") as vmd:
        Session(vmd).stop_in_every_way()


@pytest.mark.deep
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(SEEDS_DEEP))
def test_random_sequences(tmp_path: Path, seed: int) -> None:
    """Random steps, alternately with one and with two processors."""
    generator = random.Random(seed)
    with daemon(tmp_path, f"vcpus {1 + seed % 2}") as vmd:
        session = Session(vmd)
        for _ in range(STEPS_DEEP):
            step = generator.choice(session.steps())
            session.do(step, generator.choice(DWELLS_S), hold=generator.random() < 0.3)
