"""User ids for processes: which one is next, and which ones are left out."""

import errno
import os

import pytest

from vmd.errors import HostError
from vmd.privsep import ids
from vmd.privsep.ids import Ids, ids_in_use

FIRST = 1000


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The ids that have processes."""
    found: set[int] = set()
    monkeypatch.setattr(ids, "ids_in_use", lambda: set(found))
    return found


def taken(of: Ids, count: int) -> list[int]:
    """Take so many ids."""
    return [of.take() for _ in range(count)]


def test_each_id_is_used_once_in_a_round(busy: set[int]) -> None:
    """After the last id the first ones are used again.  The last ones taken may not have a process yet."""
    of = Ids(FIRST, 6)

    assert taken(of, 6) == [1000, 1001, 1002, 1003, 1004, 1005]
    assert taken(of, 3) == [1000, 1001, 1002]
    assert not busy


def test_an_id_that_has_a_process_is_left_out(busy: set[int]) -> None:
    """Two processes with one id could signal each other."""
    busy |= {1000, 1003, 999, 1006}

    assert taken(Ids(FIRST, 6), 4) == [1001, 1002, 1004, 1005]


def test_at_most_so_many_ids_are_kept_back(busy: set[int]) -> None:
    """Ids that were taken long before are used again as soon as they have no process."""
    of = Ids(FIRST, 2 * ids.RECENT_MAX + 2)
    taken(of, 2 * ids.RECENT_MAX + 2)

    again = taken(of, ids.RECENT_MAX + 2)

    assert again == list(range(FIRST, FIRST + ids.RECENT_MAX + 2))
    assert not busy


def test_there_may_be_no_free_id(busy: set[int]) -> None:
    """The error can be temporary."""
    busy |= set(range(FIRST, FIRST + 6))

    with pytest.raises(HostError, match="find a free user id") as error:
        Ids(FIRST, 6).take()

    assert error.value.number == errno.EAGAIN


def test_the_ids_of_this_process_are_in_use() -> None:
    """All four of each process are: the real, effective, saved and file system's."""
    assert set(os.getresuid()) <= ids_in_use()
