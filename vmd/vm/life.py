"""What a VM process is doing: one state, which only `Life.become` changes."""

from vmd.enums import Enum


class State(Enum):
    """All there are; any may be followed by ENDED."""

    SPARE = "has no virtual machine yet"
    ARRIVING = "receives one"
    LIVE = "has one, which runs or is paused"
    LEAVING = "sends it, or has given its disks away"
    STOPPING = "has asked it to shut down"
    ENDED = "is at its end"


NEXT = {
    State.SPARE: {State.ARRIVING, State.LIVE},
    State.ARRIVING: {State.LIVE},
    State.LIVE: {State.LEAVING, State.STOPPING},
    State.LEAVING: {State.LIVE},  # it was not sent, or is kept
    State.STOPPING: set(),
    State.ENDED: set(),
}


class Life:
    """The state of a VM process."""

    def __init__(self) -> None:
        self.state = State.SPARE

    def become(self, state: State) -> None:
        """Go over to another state.  Raises RuntimeError where nothing leads from the present one to that."""
        if state not in NEXT[self.state] and (state is not State.ENDED or self.state is State.ENDED):
            raise RuntimeError(f"a process that {self.state.value} cannot become one that {state.value}")
        self.state = state

    def is_in(self, *states: State) -> bool:
        """Return whether it is one of these."""
        return self.state in states
