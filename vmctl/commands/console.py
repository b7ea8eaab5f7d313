"""vmctl console: use a VM's serial line until the operator leaves or the VM ends, or read its console log.

Unlike vmd's, which runs cu(1), we relay ourselves: what the console showed before can be seen, a BREAK
reaches the guest although a Linux pty carries none, and two operators do not read half of the output each.
"""

import errno
import os

from vmctl.errors import ArgumentError, CommandError, NoSuchVm, UsageError, refused
from vmctl.keptlog import KeptLog
from vmctl.line import Ending, Relay, open_line
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.screen import Screen
from vmctl.session import Session
from vmctl.terminal import RawTerminal
from vmctl.vmref import VmRef, parse_vmref
from vmctl.watch import Watch
from vmd.client import Client, NoDaemon, Refused
from vmd.errors import VMD_CONSOLE_TAKEN
from vmd.ipc.messages.clients import (
    ConsoleAttached,
    ConsoleOutput,
    ConsoleRequest,
)
from vmd.stdio import STDIN

SPEED = 115200


def run(session: Session, given: Given) -> int:
    """Attach to the console of a VM, or watch it; or only tell a program where it is."""
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
    """Print where the console of a VM is, and leave it to whoever has it.  Raises CommandError."""
    vm = ref.find(session.client.list_vms())
    if vm is None:
        raise NoSuchVm(f"console not found: vm {ref} not found")
    if not vm.tty:
        raise CommandError(f"console not found: vm {vm.name} is not running", errno.ESRCH)
    put_json({"id": vm.vmid, "name": clean(vm.name), "tty": clean(vm.tty)})
    return 0


def show_log(session: Session, ref: VmRef, *, follow: bool) -> int:
    """Show the console log of a VM, which need not run; or only tell a program where it is.  Raises CommandError."""
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
        return 0  # there is no other end to that
    finally:
        kept.close()
        screen.put_back()
    return 0


def attach(client: Client, ref: VmRef, *, force: bool = False) -> int:
    """Relay; the console is ours as long as the connection lasts.  Raises CommandError."""
    attached, backlog = request_console(client, ref, force=force)
    if attached is None:
        return 0
    line = open_line(attached.tty)
    try:
        with RawTerminal(STDIN) as terminal:
            relay = Relay(client, attached, line, terminal)
            terminal.say(f"Connected to {clean(attached.tty)} (speed {SPEED})\n")
            if terminal.is_tty:
                terminal.say("Type ~. at the start of a line to leave, ~? for help.\n")
            terminal.screen.replay(backlog)
            ending = relay.run()
            terminal.screen.put_back()
            terminal.say("\n[EOT]\n")
    finally:
        os.close(line)
    if ending is Ending.TAKEN:
        raise CommandError(relay.last_words, VMD_CONSOLE_TAKEN)
    return tell_end(ending, attached.name)


def request_console(client: Client, ref: VmRef, *, force: bool) -> tuple[ConsoleAttached | None, bytes]:
    """Return the console and what it showed last.

    The console of a VM that does not run is only shown, here: there is none to attach to then.
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
    """Show what a console showed last.  Raises CommandError."""
    screen = Screen()
    try:
        screen.replay(backlog)
    finally:
        screen.put_back()


def watch(client: Client, ref: VmRef) -> int:
    """Show what the guest prints, and what it printed last.  Raises CommandError."""
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
    """Say why a console is no longer shown; return the exit status.  Raises NoDaemon."""
    if ending is Ending.DAEMON_LOST:
        raise NoDaemon("pipe closed: vmd has ended or is started again; the guest may run on", errno.EPIPE)
    if ending is Ending.VM_ENDED:
        warn(f"vm {name} has ended")
    return 0
