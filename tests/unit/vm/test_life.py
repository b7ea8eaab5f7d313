"""What a VM process can be doing, and what may follow what."""

import itertools

import pytest

from vmd.vm.life import NEXT, Life, State


def in_state(state: State) -> Life:
    """Return the life of a process that is in a state, come there by the shortest way."""
    ways = ((), (State.ARRIVING,), (State.LIVE,), (State.LIVE, State.LEAVING), (State.LIVE, State.STOPPING),
            (State.ENDED,))  # fmt: skip
    (way,) = (way for way in ways if (way[-1] if way else State.SPARE) is state)
    life = Life()
    for step in way:
        life.become(step)
    return life


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)), ids=lambda state: state.name)
def test_only_what_leads_somewhere_is_taken(old: State, new: State) -> None:
    """Everything may end, once; nothing that has a machine becomes a spare, or receives another one."""
    life = in_state(old)

    if new in NEXT[old] or (new is State.ENDED and old is not State.ENDED):
        life.become(new)
        assert life.is_in(new)
    else:
        with pytest.raises(RuntimeError, match=f"a process that {old.value} cannot become a process that {new.value}"):
            life.become(new)
        assert life.is_in(old)
