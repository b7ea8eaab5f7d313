"""The clients of the control socket: what they may ask, how much."""

from vmd.ipc.channel import Channel
from vmd.ipc.messages import BY_CLASS, End, Failed
from vmd.record import Record

MAX_UNANSWERED = 16  # requests of one client that wait for an answer; no more are read
MAX_QUEUE = 4096  # messages waiting for a client that reads slowly; `status` of a full host is one burst


class Client:
    """One connection to the control socket."""

    def __init__(self, number: int, uid: int) -> None:
        self.number = number
        self.uid = uid
        self.unanswered = 0
        self.listing = False  # a list is under way to it, which may be long
        self.channel: Channel | None = None

    def asks(self, request: Record) -> None:
        """Count a request."""
        self.unanswered += 1
        self.listing |= End in BY_CLASS[type(request)].answers

    def is_answered(self, answer: Record) -> None:
        """Count an answer.  It may come unasked: a lost console is told of so."""
        if not BY_CLASS[type(answer)].partial:
            self.unanswered = max(0, self.unanswered - 1)
            self.listing &= not isinstance(answer, End | Failed)

    @property
    def may_ask(self) -> bool:
        """Whether a request of it is read."""
        return self.unanswered < MAX_UNANSWERED and not self.listing
