"""Nothing acknowledged is lost: random requests to the real disk process, against a model (arch. 5).

`tests/support/diskrounds.py` describes a sequence, and how to repeat one that fails.
"""

from collections.abc import Callable

import pytest

from tests.support import diskrounds
from tests.support.blkdriver import DISCARD, FLUSH, WRITE_DATA, BlockDriver, Request
from tests.support.diskmodel import SECTOR, START, ZERO, DiskModel, written
from tests.support.diskrounds import CELLS, PAIRWISE, Difference, Plan, pairs, run_seed, run_seeds, shrink

DEEP = 1000
Say = Callable[[str, object], None]


@pytest.mark.root
def test_nothing_acknowledged_is_lost(record_property: Say) -> None:
    """Sequences cover all pairs of image, cluster size, storage and end."""
    record_property("done", run_seeds(range(PAIRWISE)))


@pytest.mark.root
@pytest.mark.deep
@pytest.mark.timeout(3600)
def test_nothing_acknowledged_is_lost_in_many_sequences(record_property: Say) -> None:
    """Sequences cover every cell several times."""
    record_property("done", run_seeds(range(PAIRWISE, PAIRWISE + DEEP)))


@pytest.mark.root
@pytest.mark.soak
@pytest.mark.timeout(0)
def test_nothing_acknowledged_is_lost_for_ever(record_property: Say, request: pytest.FixtureRequest) -> None:
    """Run many sequences."""
    first, count = request.config.getoption("--seed"), request.config.getoption("--sequences")
    record_property("done", run_seeds(range(first, first + count)))


# --- the test itself --------------------------------------------------------------------------------------------------


def test_first_seeds_have_every_two_factors_together() -> None:
    """The fast tier runs few sequences, but they cover all pairs."""
    assert set().union(*map(pairs, CELLS[:PAIRWISE])) == set().union(*map(pairs, CELLS))
    assert len(CELLS) > 4 * PAIRWISE
    assert [Plan(seed).cell for seed in range(PAIRWISE)] == list(CELLS[:PAIRWISE])


def test_seed_makes_the_same_sequence_again() -> None:
    """The same seed gives the same sequence, so that a failure can be repeated."""
    for seed in range(50):
        assert Plan(seed).steps == Plan(seed).steps
    assert Plan(1).steps != Plan(1 + len(CELLS)).steps


class Liar(BlockDriver):
    """A driver whose disk lies."""

    lie = ""
    writes = 0

    def write(self, sector: int, data: bytes, note: object = None) -> Request:
        """See BlockDriver."""
        self.writes += 1
        if self.writes == 3 and self.lie == "lost":
            return self.nothing(WRITE_DATA, note)
        if self.writes == 3 and self.lie == "zeroes":
            return super().write(sector, bytes(len(data)), note)
        if self.writes == 3 and self.lie == "elsewhere":
            return super().write(sector + 1 if sector + len(data) // SECTOR < self.sectors else sector - 1, data, note)
        return super().write(sector, data, note)

    def flush(self, note: object = None) -> Request:
        """See BlockDriver."""
        return self.nothing(FLUSH, note) if self.lie == "no flush" else super().flush(note)

    def nothing(self, kind: int, note: object) -> Request:
        """Have something acknowledged without doing it."""
        request = self.change_ranges(DISCARD, [(0, 0, 0)], note)
        request.kind = kind
        return request


@pytest.mark.root
@pytest.mark.parametrize("lie", ["lost", "zeroes", "elsewhere", "no flush"])
def test_disk_that_lies_is_found(monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    """A third write that is lost, wrong or misplaced is found, and so are flushes that are not done."""
    seeds = [seed for seed in range(2 * PAIRWISE) if CELLS[seed].storage == "file"]
    monkeypatch.setattr(diskrounds, "BlockDriver", Liar)
    monkeypatch.setattr(Liar, "lie", lie)

    with pytest.raises(Difference, match=r"seed \d+, (?s:.*)model allows(?s:.*)last steps(?s:.*)diskrounds \d+"):
        set(map(run_seed, seeds))


def test_fewest_steps_of_a_failure_are_found() -> None:
    """A failure that needs two steps is reduced to these two."""
    steps = [step.number for step in Plan(7).steps]
    needed = {steps[2], steps[-3]}

    assert shrink(7, lambda _seed, only: "fails" if needed <= only else "") == needed


# --- the model --------------------------------------------------------------------------------------------------------


def test_write_that_is_not_flushed_may_be_lost_by_a_kill_only() -> None:
    """The model allows what virtio 1.2, 5.2.6.2 allows."""
    model = DiskModel(bytes(4 * SECTOR))
    model.succeed(model.begin(1, [(0, 2)]))
    assert model.allowed(0) == {1}
    assert model.allowed(0, killed=True) == {START, 1}
    asked_at = model.tick()
    model.succeed(model.begin(2, [(1, 1)]))
    model.flush_succeeded(asked_at)

    assert model.allowed(0, killed=True) == {1}
    assert model.allowed(1) == {2}
    assert model.allowed(1, killed=True) == {1, 2}
    assert model.allowed(2) == {START}


def test_write_that_failed_or_was_discarded_is_undecided_until_it_is_read() -> None:
    """Old or new content is allowed; after a read only the content that was read."""
    model = DiskModel(bytes(2 * SECTOR))
    model.succeed(model.begin(1, [(0, 2)]))
    model.begin(2, [(0, 1)])
    model.begin(ZERO, [(1, 1)])
    assert model.allowed(0) == {1, 2}
    assert model.allowed(1) == {ZERO, 1}
    half = written(2, 0)[:255] + written(1, 0)[255:]
    assert model.read(0, half + bytes(SECTOR)) is None
    assert model.read(0, bytes(SECTOR)) == 0
    assert model.read(0, written(2, 0)) is None

    assert model.allowed(0) == {2}
    assert model.allowed(1) == {ZERO}
    assert list(model.compare(half + written(1, 1))) == [0, 1]
    assert list(model.compare(half + written(1, 1), killed=True)) == []


def test_overwriting_what_is_there_needs_no_room() -> None:
    """Overwriting allocated data must succeed on full storage."""
    model = DiskModel(bytes(4 * SECTOR))
    model.succeed(model.begin(1, [(0, 2)]))
    assert model.holds_data([(0, 2)])
    assert not model.holds_data([(0, 3)])
    model = model.settled(written(1, 0) + written(1, 1) + bytes(2 * SECTOR))
    assert model.holds_data([(0, 2)])
    model.begin(ZERO, [(1, 1)])
    assert not DiskModel(bytes(SECTOR)).holds_data([(0, 1)])
    lost = DiskModel(bytes(SECTOR))
    lost.succeed(lost.begin(1, [(0, 1)]))
    assert not lost.settled(bytes(SECTOR), killed=True).holds_data([(0, 1)])

    assert model.holds_data([(0, 1)])
    assert not model.holds_data([(1, 1)])
