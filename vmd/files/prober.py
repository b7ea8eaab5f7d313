"""Asks a probe about a file: imgprobe about images, bootprobe about kernels and firmware.

A probe parses untrusted bytes.  It has no rights that could be abused: it runs in the cell, under an id of its own.
"""

import errno
import os

from vmd.closing import close_all
from vmd.errors import HostError, OperatorError, VmdError
from vmd.ipc import sockets as socket
from vmd.ipc.probemsg import BOOTS, Probe, unpack
from vmd.ipc.probing import ask
from vmd.privsep.spawn import Child, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from vmd.privsep.spawn import Place

    class Prober(Protocol):
        """Reads the headers of images."""

        def probe(self, fd: int, name: str, format_hint: str, *, boots: bool = False) -> Probe:
            """Return the format, size and so on of an image.  Without a hint, the format is guessed from its bytes.

            `boots`: also return notes about the first sector.  Raises OperatorError.
            """


PROBE_TIMEOUT_S = 8.0  # storage that does not answer must not delay a start for ever
END_TIMEOUT_S = 1.0
IMGPROBE_ENTRY = "vmd.images.probe:main"


class ProbeSocket:
    """A probe that another process has started, at the other end of a socket."""

    def __init__(self, sock: socket.socket, title: str = "imgprobe", timeout_s: float = PROBE_TIMEOUT_S) -> None:
        self.sock = sock
        self.title = title
        self.timeout_s = timeout_s

    def probe(self, fd: int, name: str, format_hint: str, *, boots: bool = False) -> Probe:
        """Probe the image behind `fd`; see Prober."""
        return self.ask([fd], name, [format_hint, *([BOOTS] if boots else [])])

    def ask(self, files: "Sequence[int]", name: str, arguments: "Sequence[str]") -> Probe:
        """Return the answer of the probe about these files.  Raises OperatorError: the name and a sentence."""
        copies: list[int] = []
        try:
            for fd in files:
                # Opened again: for reading only, without our locks and, for a block device, without O_EXCL.
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                copies.append(os.open(f"/proc/self/fd/{fd}", flags))
            line = ask(self.sock, arguments, copies, self.timeout_s)
        except OSError as error:
            raise OperatorError(error.errno or errno.EIO, f"{name}: cannot be examined: {error.strerror}") from None
        finally:
            close_all(copies)
        if line is None:
            raise OperatorError(errno.ETIMEDOUT, f"{name}: cannot be examined within {self.timeout_s:g} seconds")
        if not line:
            raise OperatorError(errno.EIO, f"{name}: cannot be examined: {self.title} has ended")
        try:
            answer = unpack(line)
        except ValueError as error:
            why = f"{self.title} answered nonsense: {error}"
            raise OperatorError(errno.EIO, f"{name}: cannot be examined: {why}") from None
        if isinstance(answer, str):
            raise OperatorError(errno.EINVAL, f"{name}: {answer}")
        return answer


def start_probe(
    place: "Place | None", log_fd: int = 2, *, entry: str = IMGPROBE_ENTRY, title: str = "imgprobe"
) -> tuple[Child, socket.socket]:
    """Start a probe.  Return it and our end of its socket.  Raises HostError, VmdError.

    `place` is the cell.  None: there is no cell, and the probe only has the confinement that it sets up itself.
    """
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise HostError(f"make a channel to {title}", error) from error
    try:
        with theirs:
            return spawn(title, channel=theirs, log_fd=log_fd, place=place, entry=entry), ours
    except BaseException:
        ours.close()
        raise


class ImageProber:
    """Starts a probe for each question and waits for the answer."""

    def __init__(
        self,
        place: "Place | None",
        timeout_s: float = PROBE_TIMEOUT_S,
        entry: str = IMGPROBE_ENTRY,
        title: str = "imgprobe",
    ) -> None:
        self.place = place
        self.timeout_s = timeout_s
        self.entry = entry
        self.title = title
        self.ending: list[Child] = []  # killed, but not ended yet: they wait for storage

    def probe(self, fd: int, name: str, format_hint: str, *, boots: bool = False) -> Probe:
        """Probe the image behind `fd`; see Prober."""
        return self.ask([fd], name, [format_hint, *([BOOTS] if boots else [])])

    def ask(self, files: "Sequence[int]", name: str, arguments: "Sequence[str]") -> Probe:
        """Return the answer of a new probe about these files.  Raises OperatorError: the name and a sentence."""
        self.ending = [child for child in self.ending if child.reap() is None]
        try:
            child, sock = start_probe(self.place, entry=self.entry, title=self.title)
        except VmdError as error:
            code = error.number if isinstance(error, HostError) else errno.EIO
            raise OperatorError(code, f"{name}: cannot be examined: {error}") from None
        try:
            with sock:
                return ProbeSocket(sock, self.title, self.timeout_s).ask(files, name, arguments)
        finally:
            child.kill()
            if child.reap(END_TIMEOUT_S) is None:
                self.ending.append(child)
