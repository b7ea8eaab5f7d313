"""A client of the control socket: how many requests it may have, and the files of its requests."""

from vmd.closing import close_all
from vmd.ipc.channel import Channel
from vmd.ipc.messages.clients import End, Failed
from vmd.ipc.routes import BY_CLASS
from vmd.record import Record

MAX_UNANSWERED = 16  # requests of one client that wait for an answer; further ones are not read
MAX_QUEUE = 4096  # messages queued for a client that reads slowly; `status` of a full host is one burst


class Client:
    """One connection to the control socket."""

    def __init__(self, number: int, uid: int) -> None:
        self.number = number
        self.uid = uid
        self.unanswered = 0
        self.listing = False  # it is being sent a list, which may be long
        self.channel: Channel | None = None
        self.files: dict[str, list[int]] = {}  # came with a request, and wait for a process that asks for them

    def asks(self, request: Record) -> None:
        """Count a request."""
        self.unanswered += 1
        self.listing |= End in BY_CLASS[type(request)].answers

    def is_answered(self, answer: Record) -> None:
        """Count an answer.  One may come without a request: that a console was taken over."""
        if not BY_CLASS[type(answer)].partial:
            self.unanswered = max(0, self.unanswered - 1)
            self.listing &= not isinstance(answer, End | Failed)
            if not self.unanswered:
                self.drop_files()

    def take_files(self) -> dict[str, list[int]]:
        """Return the files of the last request that had some.  The caller owns them."""
        files, self.files = self.files, {}
        return files

    def drop_files(self) -> None:
        """Close files that no process has asked for."""
        close_all(fd for fds in self.take_files().values() for fd in fds)

    @property
    def may_ask(self) -> bool:
        """Whether further requests of it are read."""
        return self.unanswered < MAX_UNANSWERED and not self.listing
