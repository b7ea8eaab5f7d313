"""vmctl console: use a VM's serial line until the operator leaves or the VM ends, or read its console log.

Unlike vmd, which runs cu(1): vmctl relays itself.  So earlier output can be shown, a BREAK reaches the guest although a
Linux pty does not carry it, and two operators cannot each get a half of the output.
"""

import errno
import os
import select

from vmctl.errors import ArgumentError, CommandError, NoSuchVm, UsageError, refused
from vmctl.keptlog import KeptLog
from vmctl.line import Ending, Relay, open_line
from vmctl.options import Given
from vmctl.output import clean, notice, put_json, warn
from vmctl.screen import Screen
from vmctl.session import Session
from vmctl.terminal import RawTerminal
from vmctl.vmref import VmRef, parse_vmref
from vmctl.watch import Watch
from vmd.client import LOOK_UP_MS, Client, NoDaemon, Refused
from vmd.errors import VMD_CONSOLE_TAKEN
from vmd.ipc.messages.clients import (
    ConsoleAttached,
    ConsoleOutput,
    ConsoleReady,
    ConsoleRequest,
    VmStarted,
)
from vmd.stdio import STDIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.record import Record

    Notice = Callable[[str], None]

SPEED = 115200


def run(session: Session, given: Given) -> int:
    """Connect to the console of a VM, watch it, show its log, or only print where it is."""
    ref = parse_vmref(given.operand)
    if given.has("-l"):
        if given.has("-r"):
            raise UsageError("conflicting -r and -l arguments")
        return show_log(session, ref, follow=given.has("-F"))
    if given.has("-F"):
        raise UsageError("-F needs -l")
    if session.json:
        if given.has("-f") or given.has("-r"):
            raise ArgumentError("--json only tells where the console is, and cannot be used with -f or -r")
        return tell(session, ref)
    if given.has("-r"):
        return watch(session.client, ref)
    return attach(session.client, ref, force=given.has("-f"))


def tell(session: Session, ref: VmRef) -> int:
    """Print where the console of a VM is, without connecting.  Raises CommandError."""
    vm = ref.find(session.client.list_vms())
    if vm is None:
        raise NoSuchVm(f"console not found: vm {ref} not found")
    if not vm.tty:
        raise CommandError(f"console not found: vm {vm.name} is not running", errno.ESRCH)
    put_json({"id": vm.vmid, "name": clean(vm.name), "tty": clean(vm.tty)})
    return 0


def show_log(session: Session, ref: VmRef, *, follow: bool) -> int:
    """Show the console log of a VM, which need not run, or only print where it is.  Raises CommandError."""
    try:
        log = session.client.find_console_log(ref)
    except Refused as error:
        if error.number == errno.ENOENT:
            raise refused("console log not found", error) from None
        raise
    if session.json:
        if follow:
            raise ArgumentError("--json only tells where the console log is, and cannot be used with -F")
        put_json({"id": log.vmid, "name": clean(log.name), "log": clean(log.path), "keep": log.keep})
        return 0
    screen = Screen()
    kept = KeptLog(log.path, log.keep, screen.replay)
    try:
        kept.show_all(wait=follow)
        if follow:
            kept.follow()
    except KeyboardInterrupt:
        return 0  # the only way to end this
    finally:
        kept.close()
        screen.put_back()
    return 0


def attach(client: Client, ref: VmRef, *, force: bool = False) -> int:
    """Connect and relay.  We have the console as long as the connection lasts.  Raises CommandError."""
    attached, backlog = request_console(client, ref, force=force)
    if attached is None:
        return 0
    line = open_line(attached.tty)
    try:
        return relay(client, attached, line, backlog)
    finally:
        os.close(line)


def attach_to_start(client: Client, ready: ConsoleReady, say_started: "Callable[[VmStarted, Notice], None]") -> int:
    """Relay for a VM that is being started, from its first byte on.  We already have the console.

    `say_started` is called when the daemon reports that the VM runs.  The terminal is not changed before this report or
    the first output of the guest.  Raises Refused if the VM is not started, and CommandError.
    """
    try:
        line = open_line(ready.tty)
    except CommandError:
        say_started(client.answer(VmStarted), notice)  # raises Refused if the start has failed: that closes the line
        raise
    try:
        attached = ConsoleAttached(vmid=ready.vmid, name=ready.name, tty=ready.tty)
        first = select.poll()
        for fd in (client.fileno(), line):
            first.register(fd, select.POLLIN)
        while not (events := dict(first.poll(LOOK_UP_MS))):
            continue
        if client.fileno() in events or events[line] & select.POLLHUP:
            say_started(client.answer(VmStarted), notice)
            return relay(client, attached, line)
        return relay(client, attached, line, say_started=say_started)
    finally:
        os.close(line)


def relay(
    client: Client,
    attached: ConsoleAttached,
    line: int,
    backlog: bytes = b"",
    say_started: "Callable[[VmStarted, Notice], None] | None" = None,
) -> int:
    """Relay until the connection ends; return the exit status.  Raises CommandError."""
    with RawTerminal(STDIN) as terminal:
        relay = Relay(client, attached, line, terminal)
        terminal.say(f"Connected to {clean(attached.tty)} (speed {SPEED})\n")
        if terminal.is_tty:
            terminal.say("Type ~. at the start of a line to leave, ~? for help.\n")
        terminal.screen.replay(backlog)

        def hear(message: "Record") -> None:
            if isinstance(message, VmStarted) and say_started is not None:
                say_started(message, terminal.say)

        relay.on_message = hear
        ending = relay.run()
        terminal.screen.put_back()
        terminal.say("\n[EOT]\n")
    if ending is Ending.TAKEN:
        raise CommandError(relay.last_words, VMD_CONSOLE_TAKEN)
    return tell_end(ending, attached.name)


def request_console(client: Client, ref: VmRef, *, force: bool) -> tuple[ConsoleAttached | None, bytes]:
    """Return the console and its backlog.

    If the VM does not run, its backlog is shown here, and there is no console to return.
    Raises CommandError, Refused.
    """
    backlog = bytearray()
    try:
        request = ConsoleRequest(vmid=ref.vmid, name=ref.name, force=force)
        answer = client.ask(request, ConsoleOutput, ConsoleAttached)
        while isinstance(answer, ConsoleOutput):
            backlog += answer.data
            answer = client.answer(ConsoleOutput, ConsoleAttached)
    except Refused as error:
        if error.number == errno.ESRCH and backlog:
            show(bytes(backlog))
            warn(f"{error.text}; this is what its console showed last")
            return None, b""
        if error.number in (errno.ENOENT, errno.ESRCH):
            raise refused("console not found", error) from None
        raise
    assert isinstance(answer, ConsoleAttached)
    return answer, bytes(backlog)


def show(backlog: bytes) -> None:
    """Show the backlog of a console.  Raises CommandError."""
    screen = Screen()
    try:
        screen.replay(backlog)
    finally:
        screen.put_back()


def watch(client: Client, ref: VmRef) -> int:
    """Show the backlog and the output of the guest.  Raises CommandError."""
    watcher = Watch(client, ref)
    watcher.begin()
    with RawTerminal(STDIN) as terminal:
        terminal.say(f"Watching the console of vm {clean(watcher.name)}\n")
        if terminal.is_tty:
            terminal.say("Type ^C, or ~. at the start of a line, to leave.\n")
        ending = watcher.run(terminal)
        terminal.screen.put_back()
        terminal.say("\n[EOT]\n")
    return tell_end(ending, watcher.name)


def tell_end(ending: Ending, name: str) -> int:
    """Say why the connection has ended; return the exit status.  Raises NoDaemon."""
    if ending is Ending.DAEMON_LOST:
        raise NoDaemon("pipe closed: vmd has ended or is started again; the guest may still run", errno.EPIPE)
    if ending is Ending.VM_ENDED:
        warn(f"vm {name} has ended")
    return 0
