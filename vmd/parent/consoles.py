"""The consoles of all VMs: the client that holds one, the clients that watch one, and the output of ended VMs.

One client holds a console: it reads and writes the pty.  The backlog (vmd.backlog) has the latest output, and is sent
to that client first.  Other clients may watch.  They are sent the backlog, and then ask repeatedly for newer output.
When a VM has ended, the rest of its output that did not fit into the pty is written there for the holder.  The backlog
is kept until the VM's next start.
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
    from vmd.parent.vm import Vm

PIECE_BYTES = 8192  # of output in one message
ROUND_S = 0.02  # between two looks at a pty whose VM has ended
QUIET_ROUNDS = 3  # the kernel's count of unread bytes leaves out, for a moment, those on their way inside the pty
PATIENCE_S = 1.0  # a pty is closed when nobody has read a byte for so long, if it has no viewer that is connected
VIEWER_PATIENCE_S = 60.0  # ... if it has one
WATCH_ROUND_S = 0.05  # between two looks for new output for clients that watch
PENDING_MAX = 16  # requests for one console that its VM process has not answered
FORGOTTEN_MAX = 16  # VMs that are not known any more and whose last output is kept


class LastOutput:
    """The last output of a VM that has ended, and who may see it."""

    def __init__(self, vm: "Vm", output: "Output") -> None:
        self.vmid = vm.vmid
        self.name = vm.name
        self.uid = vm.uid
        self.gid = vm.config.owner.gid
        self.output = output


class Leaving:
    """The pty of an ended VM.  It is closed when its viewer has read everything, or has stopped reading."""

    def __init__(self, consoles: "Consoles", vmid: int, pty: Pty, rest: bytes, client: int) -> None:
        self.client = client
        self._source = Proc.VM, vmid
        self._consoles = consoles
        self._pty = pty
        self._rest = rest  # output that did not fit into the pty yet
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
        self.kept: dict[str, LastOutput] = {}  # by name, oldest first
        self.leaving: set[Leaving] = set()
        self._taken: dict[int, Pty] = {}  # vmid -> the pty that its console had before it was taken over
        self._watch_timer: Timer | None = None
        self._on_left: Callable[[], None] = lambda: None
        self.on_change: Callable[[Vm], None] = lambda _vm: None  # the VM has another console, or none

    @property
    def ending(self) -> bool:
        """Whether the daemon is ending.  It then waits for viewers only briefly."""
        return self.core.ending

    # --- requests ----------------------------------------------------------------------------------------

    def serve(self, message: ConsoleRequest, caller: "Caller", envelope: "Envelope") -> None:
        """Give the console to a client.  For a VM that has ended, send its last output.  Raises OperatorError."""
        client, clients = envelope.peerid, self.core.clients
        vm = self._running_or_ended(message, caller, "attach to")
        if isinstance(vm, LastOutput):
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
        """Give the console of a VM that is starting to the client that started it, which sees all output."""
        if vm.pty is None or self.core.clients.waiting(For.CONSOLE, vm.vmid):
            return
        vm.console_user = user_text(caller)
        self.core.clients.wait(client, For.CONSOLE, vm.vmid)
        self.core.clients.answer(client, ConsoleReady(vmid=vm.vmid, name=vm.name, tty=vm.pty.path))

    def _take_over(self, vm: "Vm", user: str) -> dict[str, list[int]]:
        """Take a console from its holder by moving it to a new pty.  Return the descriptors for the VM process.

        A program that has opened the old pty without asking the daemon loses the console too.  Raises HostError.
        """
        assert vm.pty is not None
        fds: dict[str, list[int]] = {}
        old = None
        if vm.pid:  # else the VM process is still starting, and has been given the old pty
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
        """Close a pty that was taken from its holder, who is told why first.  At most one a VM waits."""
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
        """Send the output of a console to a client that does not hold it.  Raises OperatorError."""
        client = envelope.peerid
        vm = self._running_or_ended(message, caller, "watch")
        if isinstance(vm, LastOutput):
            self._answer_watch(client, vm.vmid, vm.name, vm.output, message.since, running=False)
            return
        assert vm.backlog is not None
        if message.since is None or vm.backlog.shown() > message.since:
            self._answer_watch(client, vm.vmid, vm.name, vm.backlog.read(), message.since, running=True)
            return
        self.core.clients.wait(client, For.OUTPUT, vm.vmid, since=message.since)
        self._look_later()

    def serve_break(self, message: ConsoleBreak, _caller: "Caller", envelope: "Envelope") -> None:
        """Send a BREAK to the guest.  Raises OperatorError if the client does not hold the console."""
        client = envelope.peerid
        vm = self.core.vms.get(message.vmid, message.name)
        if not self.core.clients.waits(client, For.CONSOLE, vm.vmid):
            raise OperatorError(errno.EPERM, f"the console of vm {vm.name} is not attached here")
        self.core.peers.send(Proc.VMM, SendBreak(vmid=vm.vmid))
        self.core.clients.answer(client, Ok())

    def _running_or_ended(
        self, message: ConsoleRequest | ConsoleWatch, caller: "Caller", what: str
    ) -> "Vm | LastOutput":
        """Return the VM, or the last output of a VM that has ended.

        Raises OperatorError if there is neither, or if the caller may not see it.
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
        """Ask the VM process for the snapshots that clients wait for.

        They asked before the VM had a process, or the process that they asked has ended.
        """
        for _ in self.core.clients.waiting(For.SNAPSHOT, vm.vmid):
            self.core.peers.send(Proc.VMM, ConsoleSnapshot(vmid=vm.vmid), peerid=vm.vmid)

    def on_snapshot_end(self, message: ConsoleSnapshotEnd, envelope: "Envelope") -> None:
        """All further output goes to the pty: send the client what came before, and let it open the pty."""
        vm = self.core.vms.find(envelope.peerid, "")
        if vm is not None and vm.pty is not None and vm.backlog is not None:
            client = self.core.clients.take_first(For.SNAPSHOT, vm.vmid)
            if client == NO_CLIENT:
                return
            self._send(client, vm.backlog.read(message.end).data)
            self.core.clients.answer(client, ConsoleAttached(vmid=vm.vmid, name=vm.name, tty=vm.pty.path))

    def on_ended(self, vm: "Vm") -> None:
        """A VM has ended: send its viewers the rest of the output, and keep the last of it for later."""
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
            self.kept[vm.name] = LastOutput(vm, output)
            self._forget()
        for client in clients.take(For.SNAPSHOT, vm.vmid):
            self._send(client, output.data)
            clients.fail(client, errno.ESRCH, f"vm {vm.name} is not running")
        for watcher in clients.waiting(For.OUTPUT, vm.vmid):
            clients.done(watcher)
            self._answer_watch(watcher.client, vm.vmid, vm.name, output, watcher.since, running=False)

    def _forget(self) -> None:
        """Keep the last output of only FORGOTTEN_MAX VMs that are not known any more."""
        forgotten = [name for name in self.kept if self.core.vms.find(0, name) is None]
        for name in forgotten[:-FORGOTTEN_MAX]:
            del self.kept[name]

    # --- clients -----------------------------------------------------------------------------------------

    def on_client_gone(self, client: int) -> None:
        """A client has disconnected: no pty stays open for it."""
        for leaving in self.leaving:
            if leaving.client == client:
                leaving.client = NO_CLIENT

    def has_left(self, leaving: Leaving) -> None:
        """The pty of an ended VM is closed."""
        self.leaving.discard(leaving)
        if not self.leaving:
            self._on_left()

    def when_left(self, callback: "Callable[[], None]", timeout_s: float) -> None:
        """Call `callback` when no pty of an ended VM is open, and also after `timeout_s`."""
        if not self.leaving:
            callback()
            return
        self._on_left = callback
        self.call_later(timeout_s, callback)

    def close(self) -> None:
        """Close all ptys.  Output that was not read is lost."""
        for vm in self.core.vms:
            vm.drop_pty()

    def _look_later(self) -> None:
        waited_for = self._watch_timer is not None and self._watch_timer.callback is not None
        if not waited_for and self.core.clients.waiting_anywhere(For.OUTPUT):
            self._watch_timer = self.call_later(WATCH_ROUND_S, self._look)

    def _look(self) -> None:
        """Answer the clients that wait for output and for which there is some."""
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
    """Return the holder of a console as it is shown to others."""
    return f"{owner_text(caller.uid, None)} (pid {caller.pid})"
