"""vmctl console -r: show a console that another user may be connected to."""

import os
import select

from vmctl.errors import CommandError, refused
from vmctl.escapes import HELP, Action, Escapes
from vmctl.line import READ_MAX, Ending
from vmctl.terminal import RawTerminal
from vmctl.vmref import VmRef
from vmd.client import LOOK_UP_MS, Client, ClientError, Refused, failed_text
from vmd.ipc.messages.clients import ConsoleOutput, ConsoleWatch, ConsoleWatched, Failed

INTERRUPT = b"\x03"  # ^C, which does not reach the guest here


class Watch:
    """A viewer whose input does not reach the guest.  It repeatedly asks the daemon for new output."""

    def __init__(self, client: Client, ref: VmRef) -> None:
        self.client = client
        self.ref = ref
        self.name = ref.name
        self.backlog = bytearray()
        self.escapes = Escapes()
        self.running = True

    def begin(self) -> None:
        """Get the backlog.  Raises CommandError, Refused."""
        try:
            request = ConsoleWatch(vmid=self.ref.vmid, name=self.ref.name)
            answer = self.client.ask(request, ConsoleOutput, ConsoleWatched)
            while isinstance(answer, ConsoleOutput):
                self.backlog += answer.data
                answer = self.client.answer(ConsoleOutput, ConsoleWatched)
        except Refused as error:
            raise refused("console cannot be watched", error) from None
        assert isinstance(answer, ConsoleWatched)
        self.name = answer.name
        self._seen(answer)

    def run(self, terminal: RawTerminal) -> Ending:
        """Show the output until the operator leaves, the VM has ended or the daemon is gone."""
        terminal.screen.replay(bytes(self.backlog))
        while self.running:
            ready = self._poll(terminal)
            if self.client.fileno() in ready and not self._on_daemon(terminal):
                return Ending.DAEMON_LOST
            if terminal.fd in ready and self._leaves(terminal):
                return Ending.LEFT
        return Ending.VM_ENDED

    def _poll(self, terminal: RawTerminal) -> set[int]:
        poll = select.poll()
        poll.register(self.client.fileno(), select.POLLIN)
        if terminal.is_tty:
            poll.register(terminal.fd, select.POLLIN)
        return {fd for fd, _ in poll.poll(LOOK_UP_MS)}

    def _seen(self, answer: ConsoleWatched) -> None:
        """The answer ends with a position in the output: ask for the output after it."""
        self.running = answer.running
        if answer.running:
            self.client.send(ConsoleWatch(vmid=answer.vmid, name=answer.name, since=answer.end))

    def _on_daemon(self, terminal: RawTerminal) -> bool:
        """Take a message; False if the daemon is gone.  Raises CommandError."""
        try:
            message = self.client.receive()
        except ClientError:
            return False
        if isinstance(message, ConsoleOutput):
            terminal.screen.show(message.data)
        elif isinstance(message, ConsoleWatched):
            if message.lost:
                terminal.say(f"\n[{message.lost} bytes were printed too fast to be seen]\n")
            self._seen(message)
        elif isinstance(message, Failed):
            raise CommandError(failed_text(message), message.code)
        return True

    def _leaves(self, terminal: RawTerminal) -> bool:
        """Read typed input; return whether the operator wants to leave."""
        try:
            typed = os.read(terminal.fd, READ_MAX)
        except OSError:
            typed = b""  # the terminal has hung up
        if not typed or INTERRUPT in typed:
            return True
        for part in self.escapes.feed(typed):
            if part is Action.LEAVE:
                return True
            if part is Action.HELP:
                terminal.say(f"~?\n{HELP}")
            elif part is Action.SUSPEND:
                terminal.say("~^Z\n")
                terminal.suspend()
        return False
