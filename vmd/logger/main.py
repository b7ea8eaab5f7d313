"""log: writes the log lines of all other processes, so that none of them waits for a slow reader of the log.

Runs as  an id of its own, in the cell, without files
Peers    parent; every process that writes lines, on one socket for each VM and each process of the daemon
Holds    those sockets; standard error, or a socket of the journal or of syslog

It ends a moment later than the daemon, so that it can write the last lines of the other processes.
"""

import os
import time

from vmd.ipc import sockets as socket
from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.logpair import JOURNAL_FD
from vmd.ipc.messages.children import Ping, Pong, Quit
from vmd.ipc.messages.log import LogSource
from vmd.ipc.process import Process, handles
from vmd.ipc.routes import Proc
from vmd.log import WARNING, RateLimit, log
from vmd.logger.sink import Sink
from vmd.logger.source import Line, Source
from vmd.privsep.confine import LOG, confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.process import Handlers

BATCH = 32  # lines taken from one source before the others get their turn
# Token buckets for the lines of one VM, and for those of all VMs of one owner: a burst, then one line per interval.
VM_BURST, VM_INTERVAL_S = 500, 0.02
OWNER_BURST, OWNER_INTERVAL_S = 2000, 0.005
PAUSE_S = 1.0  # a source that writes too much is not read for so long; its socket may drop lines meanwhile
SAY_AGAIN_S = 60.0
LAST_WORDS_S = 1.5  # for the last lines of the other processes


class Logger(Process):
    """Reads the sources in turn."""

    sink: Sink  # made once this process is confined, because it has a thread

    def __init__(self) -> None:
        super().__init__(Proc.LOG)
        self.sources: set[Source] = set()
        self.owners: dict[int, RateLimit] = {}  # by uid
        self.told_to_quit = False
        self.parent = self.attach_parent(Proc.PARENT)

    def on_source(self, message: LogSource, envelope: Envelope, _channel: Channel) -> None:
        """Add a source."""
        fd = envelope.take_fd("source")
        assert fd is not None
        limits: tuple[RateLimit, ...] = ()
        if message.vmid:
            owner = self.owners.setdefault(message.owner_uid, RateLimit(OWNER_BURST, OWNER_INTERVAL_S))
            limits = (RateLimit(VM_BURST, VM_INTERVAL_S), owner)
        source = Source(socket.socket(fileno=fd), message.name, message.vmid, limits)
        self.sources.add(source)
        self.listen(source)

    def listen(self, source: Source) -> None:
        """Wait for lines of a source."""
        self.loop.add(source.fileno(), lambda _events: self.on_readable(source))

    def on_readable(self, source: Source) -> None:
        """Take up to BATCH lines, as far as there is room for them and the source keeps within its limits."""
        for _ in range(BATCH):
            if not self.sink.has_room(source, lambda: self.listen(source)):
                self.loop.remove(source.fileno())
                return
            if not source.allows():
                self.loop.remove(source.fileno())
                self.loop.call_later(PAUSE_S, lambda: self.listen(source))
                self.say_too_much(source)
                return
            if not self.take(source):
                break
        if source.ended:
            self.loop.remove(source.fileno())
            self.forget(source)

    def take(self, source: Source) -> bool:
        """Pass on the next lines of a source.  Return whether there may be more."""
        lines = source.receive()
        for line in lines or ():
            self.sink.put(line)
        return lines is not None and not source.ended

    def forget(self, source: Source) -> None:
        """A source has ended: all its processes have ended, or one of them has shut the socket down."""
        self.sources.discard(source)
        source.sock.close()

    def say_too_much(self, source: Source) -> None:
        """Log, at most every SAY_AGAIN_S seconds, that a VM writes too many lines."""
        now_s = time.monotonic()
        if not source.said_s or now_s >= source.said_s + SAY_AGAIN_S:
            source.said_s = now_s
            what = source.name.replace("/", " ", 1)
            text = f"{log.title}: {what} writes too many lines: not all of them will be here"
            self.sink.put(Line(source, WARNING, text, os.getpid()))

    def on_ping(self, _message: Ping, _envelope: Envelope, channel: Channel) -> None:
        """Answer the parent's watchdog."""
        channel.send(Pong())

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """Write the lines that have arrived, and end."""
        self.told_to_quit = True
        self.loop.stop()

    HANDLERS: "Handlers" = {
        **handles(Proc.PARENT, LogSource, on_source),
        **handles(Proc.PARENT, Ping, on_ping),
        **handles(Proc.PARENT, Quit, on_quit),
    }

    def finish(self) -> None:
        """Write the last lines of all sources, for at most LAST_WORDS_S seconds.

        The parent sends Quit after all other processes have ended.  Without Quit the parent itself has died, and the
        other processes are still ending.
        """
        deadline_s = time.monotonic() + LAST_WORDS_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            took = False
            for source in [source for source in self.sources if source.waiting < BATCH]:
                while source.waiting < BATCH and self.take(source):
                    took = True
                if source.ended:
                    self.forget(source)
            written = self.sink.wait_idle(min(0.02, left_s))
            if written and not took and (self.told_to_quit or not self.sources):
                return


def main() -> int:
    """Run process log."""
    journal = socket.socket(fileno=JOURNAL_FD) if has_journal() else None  # before another descriptor gets that number
    process = Logger()
    process.ignore_terminal_signals()
    confine(LOG)  # the parent has logged what this kernel lacks
    process.sink = Sink(log.form, journal, process.loop.call_from_thread)
    process.loop.run()
    process.finish()
    os._exit(process.exit_status)  # the thread may be waiting to write


def has_journal() -> bool:
    """Return whether the parent has passed a socket of the journal."""
    try:
        os.fstat(JOURNAL_FD)
    except OSError:
        return False
    return True
