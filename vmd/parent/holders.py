"""Which process has locked a file that a VM needs: asked of lockholder, which may read the locks of all processes."""

import os

from vmd.closing import close
from vmd.errors import VmdError
from vmd.ipc.holdermsg import FD_ANSWER, FD_PROC, HOLDER, Holder, unpack
from vmd.log import log
from vmd.parent.access import owner_text
from vmd.privsep.spawn import Child, spawn
from vmd.readable import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmd.fileid import FileId
    from vmd.ipc.loop import Loop
    from vmd.privsep.spawn import Place

    Done = Callable[[Holder | None], None]

ANSWER_S = 10.0  # a lockholder needs a second for thousands of processes; after this time the answer is "unknown"
GONE_S = 2.0  # a killed lockholder is reaped after this time
AT_A_TIME = 8  # lockholders
TITLE = "lockholder"
LOCKHOLDER_ENTRY = "vmd.lockholder.main:main"


def in_words(holder: Holder, caller: int) -> str:
    """Return the program and user of a lock's holder.  Only root is told its pid."""
    pid = f"pid {holder.pid}, " if caller == 0 else ""
    return f'"{holder.program}" ({pid}user {owner_text(holder.uid, None)})'


class Holders:
    """Starts a lockholder for each question.  It must answer within ANSWER_S."""

    def __init__(
        self,
        loop: "Loop",
        place: "Place | None",
        open_log: "Callable[[str], socket.socket]",
        *,
        entry: str = LOCKHOLDER_ENTRY,
    ) -> None:
        """`place` is a `LockholderCell`.  It is None where there is no cell; lockholder then only confines itself.

        `open_log` makes the socket that a process of that name logs to.
        """
        self.loop = loop
        self.place = place
        self.open_log = open_log
        self.entry = entry
        self.at_work: list[Child] = []
        self.ending: list[Child] = []  # killed, and perhaps not ended

    def ask(self, file: "FileId", marks: tuple[int, ...], done: "Done") -> None:
        """Find out who has a lock on a file.  `done` is called once with the holder, or with None if it is unknown.

        `done` is never called before `ask` returns.  `marks` are the numbers of the locked bytes; none stands for all
        bytes that disks are locked with.
        """
        self.bury()
        try:
            if len(self.at_work) >= AT_A_TIME:
                raise VmdError(f"{AT_A_TIME} processes {TITLE} are running already")
            reader, child = self._start(file, marks)
        except (VmdError, OSError) as error:
            log.warn(f"cannot find out who uses a file: {error}")
            self.loop.call_later(0, lambda: done(None))
            return
        self.at_work.append(child)

        def finish() -> None:
            """Take the answer, if there is one, and end the lockholder."""
            timer.cancel()
            self.loop.remove(reader)
            self.at_work.remove(child)
            answer = os.read(reader, HOLDER.size + 1) if readable(reader) else b""
            close(reader)
            child.kill()
            self.ending.append(child)
            self.loop.call_later(GONE_S, self.bury)
            done(unpack(answer))

        timer = self.loop.call_later(ANSWER_S, finish)
        self.loop.add(reader, lambda _events: finish())

    def bury(self) -> None:
        """Reap the lockholders that have ended."""
        self.ending = [child for child in self.ending if child.reap() is None]

    def _start(self, file: "FileId", marks: tuple[int, ...]) -> tuple[int, Child]:
        """Start a lockholder.  Return the pipe with its answer, and the process.  Raises OSError, VmdError."""
        arguments = [str(number) for number in (file.device, file.inode, *marks)]
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fds = {FD_ANSWER: writer, FD_PROC: proc}
                with self.open_log(TITLE) as lines:
                    return reader, spawn(
                        TITLE, arguments, fds=fds, log_fd=lines.fileno(), place=self.place, entry=self.entry
                    )
            finally:
                close(proc)
        except BaseException:
            close(reader)
            raise
        finally:
            close(writer)
