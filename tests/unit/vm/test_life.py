"""The states of a VM process, and the allowed transitions."""

import itertools

import pytest

from vmd.vm.life import NEXT, Life, State


def in_state(state: State) -> Life:
    """Return a life that has reached a state by the shortest way."""
    ways = ((), (State.ARRIVING,), (State.LIVE,), (State.LIVE, State.LEAVING), (State.LIVE, State.STOPPING),
            (State.ENDED,))  # fmt: skip
    (way,) = (way for way in ways if (way[-1] if way else State.SPARE) is state)
    life = Life()
    for step in way:
        life.become(step)
    return life


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)), ids=lambda state: state.name)
def test_only_allowed_transitions_are_accepted(old: State, new: State) -> None:
    """Every state may end, once.  A process with a machine becomes no spare and receives no other machine."""
    life = in_state(old)

    if new in NEXT[old] or (new is State.ENDED and old is not State.ENDED):
        life.become(new)
        assert life.is_in(new)
    else:
        with pytest.raises(RuntimeError, match=f"a process that {old.value} cannot become a process that {new.value}"):
            life.become(new)
        assert life.is_in(old)
