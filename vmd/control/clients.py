"""The clients of the control socket: what they may ask, how much."""

from vmd.ipc.channel import Channel

MAX_UNANSWERED = 16  # requests of one client that wait for an answer
MAX_QUEUE = 4096  # messages waiting for a client that reads slowly; `status` of a full host is one burst


class Client:
    """One connection to the control socket."""

    def __init__(self, number: int, uid: int) -> None:
        self.number = number
        self.uid = uid
        self.unanswered = 0
        self.channel: Channel | None = None
