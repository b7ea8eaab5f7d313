"""Fetches files for a VM process over a courier: the files that it starts with, a stream, a disc."""

from vmd.closing import close_all
from vmd.errors import PeerError
from vmd.ipc import courier
from vmd.ipc import sockets as socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.imsg import Envelope
    from vmd.ipc.loop import Loop


def fetch_files(envelope: "Envelope") -> None:
    """Fetch the files that come over the couriers of a message, and add them to its envelope.

    Raises PeerError if they do not come.
    """
    for fd in envelope.take_fds("couriers"):
        with socket.socket(fileno=fd) as sock:
            try:
                files = courier.fetch(sock)
            except OSError:
                raise PeerError("opener", "its files did not come") from None
            except ValueError as error:
                raise PeerError("opener", str(error)) from None
            for name, fds in files.items():
                envelope.fds.setdefault(name, []).extend(fds)


def fetch_one(loop: "Loop", fd: int, name: str, then: "Callable[[int | None], None]") -> None:
    """Ask for one file, and call `then` with its descriptor, or with None if it does not come.

    The courier `fd` is closed here.  This does not block, because the giver may be slow: it handles a client's file.
    """
    sock = socket.socket(fileno=fd)

    def over(file: int | None) -> None:
        late.cancel()
        loop.remove(fd)
        sock.close()
        then(file)

    def on_ready(_events: int) -> None:
        try:
            files = courier.take(sock)
        except (OSError, ValueError):
            files = {}
        fds = files.pop(name, [])
        file = fds.pop(0) if fds else None
        close_all((*fds, *(each for others in files.values() for each in others)))
        over(file)

    late = loop.call_later(courier.PATIENCE_S, lambda: over(None))
    loop.add(fd, on_ready)
    try:
        courier.ask(sock)
    except OSError:
        return  # the other end is closed: `on_ready` is called and finds that out


def fetch_stream(loop: "Loop", fd: int, then: "Callable[[int | None], None]") -> None:
    """Ask for a stream, as `fetch_one` does."""
    fetch_one(loop, fd, "stream", then)
