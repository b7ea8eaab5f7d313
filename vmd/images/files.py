"""Opens images by path with the rights of the caller.  Only vmctl uses this, never the daemon.

A backing file is opened only if the format of the image that names it is not just guessed from the first bytes of that
image, because a guest may have written them.  A file name that ends in .qcow2 is enough.
"""

import contextlib
import os

from vmd.errors import ImageError
from vmd.images.chain import MAX_CHAIN, Link, open_chain
from vmd.images.identify import probe
from vmd.images.locks import lock
from vmd.images.qcow2 import UNPACK
from vmd.ipc.foreign import given_as, named_format
from vmd.ipc.probemsg import NOT_QCOW2, Probe, how_to_record, recording, refusal, warnings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmd.images.image import Image
    from vmd.images.qcow2 import Unpack


class OpenedChain:
    """The files of a chain, top first: opened for reading, locked against writers, and probed."""

    def __init__(
        self, path: str, format_hint: str = "", *, raw_will_do: bool = True, unpack: "Mapping[str, Unpack]" = UNPACK
    ) -> None:
        """Open `path` and its backing files.

        `raw_will_do`: the error for an unknown format may advise the user to give the image as raw.  `unpack` has the
        compressions of qcow2 that can be decompressed.

        Raises:
            ImageError: a file is missing, unreadable or unusable, or the chain is too long.
            OperatorError: a process is writing to one of the files.
        """
        self.unpack = unpack
        self.links: list[Link] = []
        self.probes: list[Probe] = []
        self.notes: list[str] = []  # sentences that the user should read
        given, raw = format_hint, given_as("raw", path, in_conf=False) if raw_will_do else ""
        format_hint = format_hint or named_format(path)
        seen: set[tuple[int, int]] = set()
        top = path
        try:
            while True:
                fd = self._open(path)
                identity = os.fstat(fd)
                with contextlib.ExitStack() as undo:
                    undo.callback(os.close, fd)
                    if (identity.st_dev, identity.st_ino) in seen:
                        raise ImageError(top, f"backing chain comes back to {path}")
                    if len(self.links) == MAX_CHAIN:
                        raise ImageError(top, f"backing chain is longer than {MAX_CHAIN} images")
                    seen.add((identity.st_dev, identity.st_ino))
                    lock(fd, path, writable=False)
                    found = self._probe(fd, path, format_hint, given, raw)
                    if found.backing and found.guessed:
                        raise ImageError(path, f"has backing file {found.backing}, but {self._remedy(path)}")
                    undo.pop_all()
                self.probes.append(found)
                self.links.append(Link(fd=fd, path=path, format=found.format, guessed=found.guessed))
                self.notes += [f"{path}: {note}" for note in warnings(found, raw)]
                if not found.backing:
                    return
                raw = f"`{recording(path, found.backing, 'raw')}`"
                path, format_hint = os.path.join(os.path.dirname(path), found.backing), found.backing_format
        except BaseException:
            self.close()
            raise

    def _probe(self, fd: int, path: str, format_hint: str, given: str, raw: str) -> Probe:
        """Probe an image; `given` is the format that the user gave.  Raises ImageError."""
        try:
            found = probe(fd, path, format_hint, self.unpack)
            wrong = refusal(found, format_hint, path, raw)
        except ImageError as error:
            if error.what != NOT_QCOW2:
                raise
            wrong = NOT_QCOW2
        if wrong == NOT_QCOW2 and raw and not given and not self.links:
            wrong += f", as its name says; if it is raw, give it as {raw}"
        if wrong:
            raise ImageError(path, wrong)
        return found

    def _open(self, path: str) -> int:
        """Open one file.  O_NONBLOCK, because opening a FIFO would block.  Raises ImageError."""
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            name = f"backing file {path}" if self.links else path
            raise ImageError(name, f"cannot be opened: {reason}") from None

    def _remedy(self, path: str) -> str:
        """Return a sentence: why a backing file is not opened, and what the user can do."""
        if not self.links:
            given = given_as("qcow2", path, in_conf=False)
            return f"only its first bytes say that it is qcow2; if you trust it, give it as {given}"
        return how_to_record(self.links[-1].path, self.probes[-1].backing, "qcow2")

    def image(self) -> "Image":
        """Return the chain as one read-only image, which owns the files.  Raises ImageError."""
        links, self.links = self.links, []
        return open_chain(links, writable=False, unpack=self.unpack)

    def close(self) -> None:
        """Close the files, unless an image owns them."""
        for link in self.links:
            os.close(link.fd)
        self.links = []
