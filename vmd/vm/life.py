"""The state of a VM process.  Only `Life.become` changes it."""

from vmd.enums import Enum


class State(Enum):
    """The states.  Each may be followed by ENDED."""

    SPARE = "has no virtual machine yet"
    ARRIVING = "receives a virtual machine"
    LIVE = "has a virtual machine, which runs or is paused"
    LEAVING = "sends its virtual machine, or lends its disks"
    STOPPING = "has asked its guest to shut down"
    ENDED = "has ended"


NEXT = {
    State.SPARE: {State.ARRIVING, State.LIVE},
    State.ARRIVING: {State.LIVE},
    State.LIVE: {State.LEAVING, State.STOPPING},
    State.LEAVING: {State.LIVE},  # sending has failed, or a copy was sent, or the disks are back
    State.STOPPING: set(),
    State.ENDED: set(),
}


class Life:
    """The state of a VM process."""

    def __init__(self) -> None:
        self.state = State.SPARE

    def become(self, state: State) -> None:
        """Change to another state.  Raises RuntimeError if that state may not follow the present one."""
        if state not in NEXT[self.state] and (state is not State.ENDED or self.state is State.ENDED):
            raise RuntimeError(f"a process that {self.state.value} cannot become a process that {state.value}")
        self.state = state

    def is_in(self, *states: State) -> bool:
        """Return whether the state is one of these."""
        return self.state in states
