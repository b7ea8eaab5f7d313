"""consolelog: writes the output of guests to the console logs of their VMs.

Runs as  an id of its own, in the cell, confined to its descriptors
Peers    parent; at the other ends of couriers the processes "logfile", which open the files
Holds    the backlogs of VMs that have a console log, and their files, for appending

Each backlog itself notes how much of it is written, so the next consolelog continues at the right byte.  No guest waits
for this process.  It ends a moment later than the daemon, so that it can write the rest.
"""

import os
import time

from vmd.backlog import LoggedBacklog
from vmd.consolelog.keeper import Keeper, State
from vmd.errors import HostError, sentence
from vmd.ipc import sockets as socket
from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.children import Ping, Pong, Quit
from vmd.ipc.messages.consolelog import ConsoleFile, ConsoleKept, DropConsole, KeepConsole
from vmd.ipc.messages.shared import brief
from vmd.ipc.process import Process, handles
from vmd.ipc.routes import Proc
from vmd.privsep.confine import CONSOLELOG, confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.process import Handlers

# Between two looks at the backlogs, and the same while guests print.  A look takes half a microsecond for each log, and
# no system call.  Between two looks an emulated UART prints less than the 64 KiB of a backlog, even with REP OUTSB.  So
# no VM process has to wake this one, and a log costs its guest nothing.
LOOK_S, LOOK_AGAIN_S = 0.05, 0.02
LAST_WORDS_S = 3.0


class ConsoleLogger(Process):
    """Has one keeper for each log."""

    def __init__(self) -> None:
        super().__init__(Proc.CONSOLELOG)
        self.keepers: dict[int, Keeper] = {}
        self.looking = False
        self.parent = self.attach_parent(Proc.PARENT)

    def on_keep(self, message: KeepConsole, envelope: Envelope, _channel: Channel) -> None:
        """Start a keeper for a log.  It writes once it has a file."""
        fd = envelope.take_fd("shown")
        assert fd is not None
        number = message.number

        def report(state: State) -> None:
            self.report(number, state)

        try:
            backlog = LoggedBacklog(fd, message.start)
            try:
                self.keepers[number] = Keeper(message.name, backlog, report, self.loop.call_from_thread)
            except BaseException:
                backlog.close()
                raise
        except (HostError, OSError, ValueError) as error:
            self.report(number, State(sentence(error), ended=True))
            return
        if not self.looking:
            self.looking = True
            self.loop.call_later(LOOK_S, self.look)

    def look(self) -> None:
        """Have the keepers write the new output of their guests."""
        prints = sum([keeper.look() for keeper in self.keepers.values()])
        self.looking = bool(self.keepers)
        if self.looking:
            self.loop.call_later(LOOK_AGAIN_S if prints else LOOK_S, self.look)

    def report(self, number: int, state: State) -> None:
        """Tell the parent the state of a log."""
        if state.ended and number in self.keepers:
            self.keepers.pop(number).backlog.close()
        self.parent.send(
            ConsoleKept(
                number=number,
                text=brief(state.text),
                lost=state.lost,
                files=state.files,
                wants_file=state.wants_file,
                ended=state.ended,
            )
        )

    def on_file(self, message: ConsoleFile, envelope: Envelope, _channel: Channel) -> None:
        """Write to another file, or change the size limit of the present one."""
        keeper = self.keepers.get(message.number)
        if keeper is not None:
            fd = envelope.take_fd("courier")
            keeper.take_file(None if fd is None else socket.socket(fileno=fd), message.size_bytes)

    def on_drop(self, message: DropConsole, _envelope: Envelope, _channel: Channel) -> None:
        """Write the rest of a log, and end its keeper."""
        keeper = self.keepers.get(message.number)
        if keeper is not None:
            keeper.end()

    def on_ping(self, _message: Ping, _envelope: Envelope, channel: Channel) -> None:
        """Answer the parent's watchdog."""
        channel.send(Pong())

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """Write the rest, and end."""
        self.loop.stop()

    HANDLERS: "Handlers" = {
        **handles(Proc.PARENT, KeepConsole, on_keep),
        **handles(Proc.PARENT, ConsoleFile, on_file),
        **handles(Proc.PARENT, DropConsole, on_drop),
        **handles(Proc.PARENT, Ping, on_ping),
        **handles(Proc.PARENT, Quit, on_quit),
    }

    def finish(self) -> None:
        """Write the rest of all logs, for at most LAST_WORDS_S seconds."""
        deadline_s = time.monotonic() + LAST_WORDS_S
        for keeper in self.keepers.values():
            keeper.end()
        while any(not keeper.ended for keeper in self.keepers.values()) and time.monotonic() < deadline_s:
            time.sleep(0.01)


def main() -> int:
    """Run process consolelog."""
    process = ConsoleLogger()
    process.ignore_terminal_signals()
    confine(CONSOLELOG)  # the parent has logged what this kernel lacks
    process.loop.run()
    process.finish()
    os._exit(process.exit_status)  # a thread may be blocked by its storage
