"""The consoles of all VMs: who has one, who looks at one, and what is left of one when its VM has ended.

A console belongs to one client, who reads and types on its pty.  What it showed last is in its backlog (vmd.backlog)
and is sent to that client first.  Others may look: they are sent the backlog, and then ask again and again for what
has come since.  When a VM has ended, its viewer is handed what the pty had no room for, and the backlog is kept until
the VM's next start.
"""

import errno
import time

from vmd.errors import VMD_CONSOLE_TAKEN, OperatorError
from vmd.ipc.messages.clients import (
    ConsoleAttached,
    ConsoleBreak,
    ConsoleOutput,
    ConsoleReady,
    ConsoleRequest,
    ConsoleWatch,
    ConsoleWatched,
    Ok,
)
from vmd.ipc.messages.control import NO_CLIENT
from vmd.ipc.messages.vm import ConsoleSnapshot, ConsoleSnapshotEnd, SendBreak
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent.access import may_control, owner_text
from vmd.parent.clients import For
from vmd.parent.resources import Pty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.backlog import Output
    from vmd.ipc.imsg import Envelope
    from vmd.ipc.loop import Timer
    from vmd.ipc.messages.clients import Caller
    from vmd.parent.core import Core
    from vmd.parent.vmtable import Vm

PIECE_BYTES = 8192  # of output in one message
ROUND_S = 0.02  # between two looks at a pty whose VM has ended
QUIET_ROUNDS = 3  # what is on its way within the kernel's pty is not counted for a moment
PATIENCE_S = 1.0  # without a byte read; for a viewer that nobody knows of
VIEWER_PATIENCE_S = 60.0  # ... and for one that is connected
WATCH_ROUND_S = 0.05  # between two looks for those who watch
PENDING_MAX = 16  # requests for one console that its VM process has not answered
FORGOTTEN_MAX = 16  # VMs that are not known any more, and whose last output is


class Kept:
    """What the console of a VM showed last that does not run now, and who may see it."""

    def __init__(self, vm: "Vm", output: "Output") -> None:
        self.vmid = vm.vmid
        self.name = vm.name
        self.uid = vm.uid
        self.gid = vm.config.owner.gid
        self.output = output


class Leaving:
    """A pty without a VM: closed when its viewer has read all there is, or does not read."""

    def __init__(self, consoles: "Consoles", vmid: int, pty: Pty, rest: bytes, client: int) -> None:
        self.client = client
        self._source = Proc.VM, vmid
        self._consoles = consoles
        self._pty = pty
        self._rest = rest  # what has found no room in the pty yet
        self._unread = -1
        self._quiet = 0
        self._progress_s = time.monotonic()
        self._look()

    def _look(self) -> None:
        written = self._pty.write(self._rest) if self._rest else 0
        self._rest = self._rest[written:]
        unread = self._pty.unread_bytes()
        if written or unread != self._unread:
            self._unread, self._progress_s = unread, time.monotonic()
        self._quiet = 0 if self._rest or unread else self._quiet + 1
        patience_s = PATIENCE_S if self.client == NO_CLIENT or self._consoles.ending else VIEWER_PATIENCE_S
        if self._quiet == QUIET_ROUNDS or time.monotonic() > self._progress_s + patience_s:
            self._pty.close()
            self._consoles.has_left(self)
        else:
            self._consoles.call_later(ROUND_S, self._look, self._source)


class Consoles:
    """The room of consoles."""

    def __init__(self, core: "Core") -> None:
        self.core = core
        self.call_later = core.loop.call_later
        self.kept: dict[str, Kept] = {}  # by name, oldest first
        self.leaving: set[Leaving] = set()
        self._taken: dict[int, Pty] = {}  # vmid -> the pty that its console had before
        self._watch_timer: Timer | None = None
        self._on_left: Callable[[], None] = lambda: None
        self.on_change: Callable[[Vm], None] = lambda _vm: None  # there is another console, or none any more

    @property
    def ending(self) -> bool:
        """Whether the daemon is, and waits for viewers no longer than it has to."""
        return self.core.ending

    # --- requests ----------------------------------------------------------------------------------------

    def serve(self, message: ConsoleRequest, caller: "Caller", envelope: "Envelope") -> None:
        """Hand the console to a client; what a VM showed that does not run is only shown.  Raises OperatorError."""
        client, clients = envelope.peerid, self.core.clients
        vm = self._running_or_kept(message, caller, "attach to")
        if isinstance(vm, Kept):
            self._send(client, vm.output.data)
            raise OperatorError(errno.ESRCH, f"vm {vm.name} is not running")
        user = user_text(caller)
        if clients.waiting(For.CONSOLE, vm.vmid) and not message.force:
            raise OperatorError(errno.EBUSY, f"the console of vm {vm.name} is in use by {vm.console_user}")
        if len(clients.waiting(For.SNAPSHOT, vm.vmid)) >= PENDING_MAX:
            raise OperatorError(errno.EAGAIN, f"vm {vm.name} does not answer its {PENDING_MAX} viewers")
        fds = self._take_over(vm, user) if message.force else {}
        vm.console_user = user
        for what in (For.CONSOLE, For.SNAPSHOT):
            clients.wait(client, what, vm.vmid)
        self.core.peers.send(Proc.VMM, ConsoleSnapshot(vmid=vm.vmid), peerid=vm.vmid, fds=fds)

    def give(self, vm: "Vm", caller: "Caller", client: int) -> None:
        """Hand the console of a VM that is being started to who has started it, who sees it from the first byte on."""
        if vm.pty is None or self.core.clients.waiting(For.CONSOLE, vm.vmid):
            return
        vm.console_user = user_text(caller)
        self.core.clients.wait(client, For.CONSOLE, vm.vmid)
        self.core.clients.answer(client, ConsoleReady(vmid=vm.vmid, name=vm.name, tty=vm.pty.path))

    def _take_over(self, vm: "Vm", user: str) -> dict[str, list[int]]:
        """Take a console from whoever has it, by moving it to another pty; return that for the VM process.

        So it is also taken from who has opened the pty without asking us.  Raises HostError.
        """
        assert vm.pty is not None
        fds: dict[str, list[int]] = {}
        old = None
        if vm.pid:  # else its process may still be on its way, with the old pty
            pty = Pty()
            try:
                pty.give_to(vm.uid, vm.config.owner.gid)
                fds = pty.fds()
            except BaseException:
                pty.close()
                raise
            old, vm.pty = vm.pty, pty
        text = f"the console of vm {vm.name} was taken over by {user}"
        self.core.clients.fail_all(For.CONSOLE, vm.vmid, VMD_CONSOLE_TAKEN, text)
        if old is not None:
            log.info(f"{vm.name}: console taken over by {user}, now tty {vm.pty.path}")
            self._close_later(vm.vmid, old)
        return fds

    def _close_later(self, vmid: int, pty: Pty) -> None:
        """Close a pty that was taken from its viewer, who is to read first why; one of a VM at a time."""
        before = self._taken.pop(vmid, None)
        if before is not None:
            before.close()
        self._taken[vmid] = pty

        def close() -> None:
            if self._taken.get(vmid) is pty:
                del self._taken[vmid]
                pty.close()

        self.call_later(PATIENCE_S, close, (Proc.VM, vmid))

    def serve_watch(self, message: ConsoleWatch, caller: "Caller", envelope: "Envelope") -> None:
        """Show a console to somebody who does not have it.  Raises OperatorError."""
        client = envelope.peerid
        vm = self._running_or_kept(message, caller, "watch")
        if isinstance(vm, Kept):
            self._answer_watch(client, vm.vmid, vm.name, vm.output, message.since, running=False)
            return
        assert vm.backlog is not None
        if message.since is None or vm.backlog.shown() > message.since:
            self._answer_watch(client, vm.vmid, vm.name, vm.backlog.read(), message.since, running=True)
            return
        self.core.clients.wait(client, For.OUTPUT, vm.vmid, since=message.since)
        self._look_later()

    def serve_break(self, message: ConsoleBreak, _caller: "Caller", envelope: "Envelope") -> None:
        """Send a BREAK, if the client holds the console.  Raises OperatorError."""
        client = envelope.peerid
        vm = self.core.vms.get(message.vmid, message.name)
        if not self.core.clients.waits(client, For.CONSOLE, vm.vmid):
            raise OperatorError(errno.EPERM, f"the console of vm {vm.name} is not attached here")
        self.core.peers.send(Proc.VMM, SendBreak(vmid=vm.vmid))
        self.core.clients.answer(client, Ok())

    def _running_or_kept(self, message: ConsoleRequest | ConsoleWatch, caller: "Caller", what: str) -> "Vm | Kept":
        """Return the VM, or what is left of the console of one that does not run.

        Raises OperatorError if there is neither, or the caller may not do this.
        """
        vm = self.core.vms.find(message.vmid, message.name)
        if vm is None or not vm.alive:
            name, kept = vm.name if vm else message.name, self.kept
            last = kept.get(name) or next((k for k in kept.values() if k.vmid == message.vmid and not name), None)
            if last is not None and may_control(caller, last.uid, last.gid):
                return last
        vm = self.core.vms.get(message.vmid, message.name)
        if not vm.alive or vm.pty is None:
            raise OperatorError(errno.ESRCH, f"vm {vm.name} is not running")
        vm.require_control(caller, what)
        return vm

    # --- what VM processes say ---------------------------------------------------------------------------

    def repeat_snapshots(self, vm: "Vm") -> None:
        """Ask again for what viewers want to see: they came before the VM had a process, or its last one has ended."""
        for _ in self.core.clients.waiting(For.SNAPSHOT, vm.vmid):
            self.core.peers.send(Proc.VMM, ConsoleSnapshot(vmid=vm.vmid), peerid=vm.vmid)

    def on_snapshot_end(self, message: ConsoleSnapshotEnd, envelope: "Envelope") -> None:
        """All further output comes down the pty: the client is sent what was before, and may open it."""
        vm = self.core.vms.find(envelope.peerid, "")
        if vm is not None and vm.pty is not None and vm.backlog is not None:
            client = self.core.clients.take_first(For.SNAPSHOT, vm.vmid)
            if client == NO_CLIENT:
                return
            self._send(client, vm.backlog.read(message.end).data)
            self.core.clients.answer(client, ConsoleAttached(vmid=vm.vmid, name=vm.name, tty=vm.pty.path))

    def on_ended(self, vm: "Vm") -> None:
        """A VM has ended: its viewers get the rest, and everybody may see the last of it later."""
        clients = self.core.clients
        holder = clients.take_first(For.CONSOLE, vm.vmid)
        ran = bool(vm.pid)
        console = vm.take_console()
        if console is None:
            return
        self.on_change(vm)
        pty, output = console
        self.leaving.add(Leaving(self, vm.vmid, pty, output.since(output.passed), holder))
        if ran or output.data:
            self.kept.pop(vm.name, None)
            self.kept[vm.name] = Kept(vm, output)
            self._forget()
        for client in clients.take(For.SNAPSHOT, vm.vmid):
            self._send(client, output.data)
            clients.fail(client, errno.ESRCH, f"vm {vm.name} is not running")
        for watcher in clients.waiting(For.OUTPUT, vm.vmid):
            clients.done(watcher)
            self._answer_watch(watcher.client, vm.vmid, vm.name, output, watcher.since, running=False)

    def _forget(self) -> None:
        """Keep what was shown by few of the VMs that are not known any more."""
        forgotten = [name for name in self.kept if self.core.vms.find(0, name) is None]
        for name in forgotten[:-FORGOTTEN_MAX]:
            del self.kept[name]

    # --- clients -----------------------------------------------------------------------------------------

    def on_client_gone(self, client: int) -> None:
        """A client has disconnected: nothing has to wait for it."""
        for leaving in self.leaving:
            if leaving.client == client:
                leaving.client = NO_CLIENT

    def has_left(self, leaving: Leaving) -> None:
        """A pty without a VM is closed."""
        self.leaving.discard(leaving)
        if not self.leaving:
            self._on_left()

    def when_left(self, callback: "Callable[[], None]", timeout_s: float) -> None:
        """Call when viewers have seen how their VMs ended, or do not look."""
        if not self.leaving:
            callback()
            return
        self._on_left = callback
        self.call_later(timeout_s, callback)

    def close(self) -> None:
        """End: what is not read by now is lost."""
        for vm in self.core.vms:
            vm.drop_pty()

    def _look_later(self) -> None:
        waited_for = self._watch_timer is not None and self._watch_timer.callback is not None
        if not waited_for and self.core.clients.waiting_anywhere(For.OUTPUT):
            self._watch_timer = self.call_later(WATCH_ROUND_S, self._look)

    def _look(self) -> None:
        """Answer those for whom there is more to see."""
        for watcher in self.core.clients.waiting_anywhere(For.OUTPUT):
            vm = self.core.vms.find(watcher.vmid, "")
            if vm is not None and vm.backlog is not None and vm.backlog.shown() > watcher.since:
                self.core.clients.done(watcher)
                output = vm.backlog.read()
                self._answer_watch(watcher.client, vm.vmid, vm.name, output, watcher.since, running=True)
        self._look_later()

    def _answer_watch(
        self, client: int, vmid: int, name: str, output: "Output", since: int | None, *, running: bool
    ) -> None:
        data = output.data if since is None else output.since(since)
        lost = 0 if since is None else max(0, output.end - len(data) - max(0, since))
        self._send(client, data)
        watched = ConsoleWatched(vmid=vmid, name=name, end=output.end, lost=lost, running=running)
        self.core.clients.answer(client, watched)

    def _send(self, client: int, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            self.core.clients.answer(client, ConsoleOutput(data=data[start : start + PIECE_BYTES]))


def user_text(caller: "Caller") -> str:
    """Return what others are told of who has a console."""
    return f"{owner_text(caller.uid, None)} (pid {caller.pid})"
