"""The process `log`, and the sockets that it reads: one for each VM and one for each process of the daemon.

The parent keeps the reading end of each socket and does not read it.  So the process `log` can be started again: the
next one continues to read where the last one stopped.
"""

import contextlib
import fcntl
import select
import socket
import time

from vmd.closing import close
from vmd.errors import HostError, PeerError, VmdError
from vmd.ipc.channel import Channel, socketpair
from vmd.ipc.imsg import Envelope
from vmd.ipc.logpair import JOURNAL_FD, logpair
from vmd.ipc.messages.children import Ping, Pong, Quit
from vmd.ipc.messages.log import LogSource
from vmd.ipc.messages.vmm import VmLog
from vmd.ipc.routes import Proc
from vmd.log import JOURNAL, LEAF, log
from vmd.parent import service
from vmd.privsep.spawn import Child, spawn
from vmd.signals import name_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.parent.core import Core
    from vmd.parent.vm import Vm
    from vmd.privsep.spawn import Place

PING_S = 5.0
PINGS_MAX = 3  # pings without an answer, after which the process is replaced
AGAIN_S = 5.0  # least time between two starts
END_S = 3.0  # how long the process may take to end
SHUT_S = 5.0  # a VM ends normally within this time after its log has been closed
QUEUE_MAX = 4096  # messages
OUR_ROOM_BYTES = 1 << 18  # send buffer for lines of the parent, which writes the most
SO_SNDBUFFORCE = 32  # <asm-generic/socket.h>


class Source:
    """The reading end of the log of a process, or of a VM's processes."""

    def __init__(self, sock: socket.socket, name: str, vmid: int, owner_uid: int) -> None:
        self.sock = sock
        self.name = name
        self.vmid = vmid
        self.owner_uid = owner_uid


class Logs:
    """Starts the process `log`, replaces it when it ends, and gives it the sockets that it reads.

    `attach` is the parent's `Process.attach`.
    """

    def __init__(self, core: "Core", attach: "Callable[..., Channel]") -> None:
        self.core = core
        self.loop = core.loop
        self._attach = attach
        self._place: Place | None = None
        self._form = log.form  # the form in which the process writes lines
        self._channel: Channel | None = None
        self._child: Child | None = None
        self._sources: set[Source] = set()
        self._of_vm: dict[int, Source] = {}  # by vmid: the latest of each VM
        self._ended: list[Source] = []  # their writers are gone, and no process has got them yet
        self._unanswered = 0  # pings
        self._started_s = 0.0
        self._starts = False  # a timer will start the process again

    # --- the process -----------------------------------------------------------------------------------------

    def start(self, place: "Place") -> None:
        """Start the process, and write the parent's own lines to it.  Raises HostError or VmdError."""
        self._place = place
        self._form = log.form
        self._start()
        writer = self.open("vmd")
        with contextlib.suppress(OSError):
            writer.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, OUR_ROOM_BYTES)
        log.setup(log.title, LEAF, log.verbosity, fd=writer.detach())
        self.loop.call_later(PING_S, self._ping)

    def _start(self) -> None:
        assert self._place is not None
        ours, theirs = socketpair()
        journal = service.journal_socket() if self._form == JOURNAL else None
        fds = {JOURNAL_FD: journal.fileno()} if journal is not None else {}
        try:
            arguments = ["log", self._form, str(self.core.verbosity)]
            child = spawn("log", arguments, channel=theirs, fds=fds, place=self._place, outlives=True)
        except VmdError:
            ours.close()
            raise
        finally:
            theirs.close()
            if journal is not None:
                journal.close()
        self._child = child
        self._started_s = time.monotonic()
        self._unanswered = 0
        self.loop.add(child.pidfd, lambda _events: self._on_end(child))
        self._channel = self._attach(ours, Proc.LOG, "log", on_lost=self._on_lost, queue_limit=QUEUE_MAX)
        for source in (*self._ended, *self._sources):
            self._hand_over(source)
        for source in self._ended:
            source.sock.close()
        self._ended.clear()

    def _restart(self) -> None:
        """Replace a process that is gone.  If the start fails, go on without one and try again."""
        self._starts = False
        try:
            self._start()
        except (VmdError, OSError) as error:
            log.error(f"{error}; trying again in {AGAIN_S:.0f} s")  # the next process will read this line
            self._restart_in(AGAIN_S)

    def _restart_in(self, delay_s: float) -> None:
        if not self._starts:
            self._starts = True
            self.loop.call_later(delay_s, self._restart)

    def _on_end(self, child: Child) -> None:
        """The process has ended, too early."""
        self.loop.remove(child.pidfd)
        status = child.reap()
        if child is self._child:
            killed = status is not None and status < 0
            how = f"was killed by {name_of(-(status or 0))}" if killed else f"ended with status {status}"
            self._lose(f"process log {how}")

    def _lose(self, why: str) -> None:
        """Go on without the process until another one is started."""
        log.error(f"{why}; starting another one")
        if self._channel is not None:
            self._channel.close()
        self._channel = self._child = None
        self._restart_in(max(0.0, self._started_s + AGAIN_S - time.monotonic()))

    def _on_lost(self, _channel: Channel, error: PeerError | None) -> None:
        """The channel is closed: the process ends, or has broken the protocol."""
        self._channel = None
        if error is not None and self._child is not None:
            log.error(str(error))
            self._child.kill()

    def _ping(self) -> None:
        """Ping the process.  A process that is stopped or stuck does not answer, and is replaced."""
        self.loop.call_later(PING_S, self._ping)
        log.say_lost()
        if self._child is None:
            return
        if self._unanswered >= PINGS_MAX:
            stuck = self._child
            stuck.kill()
            self._lose(f"process log has not answered for {PINGS_MAX * PING_S:.0f} s")
            return
        self._unanswered += 1
        if self._channel is not None:
            self._channel.send(Ping())

    def on_pong(self, _message: Pong, _envelope: Envelope) -> None:
        """The process has answered a ping."""
        self._unanswered = 0

    def end(self) -> None:
        """Tell the process to write what is left and to end.  The parent then writes its own lines there itself."""
        if self._channel is not None and self._child is not None:
            self._channel.send(Quit())
            self._channel.flush_blocking(END_S)
            if self._child.reap(END_S) is None:
                self._child.kill()
        if log.form == LEAF:
            close(log.fd)
            log.setup(log.title, self._form, log.verbosity)

    # --- sources ---------------------------------------------------------------------------------------------

    def open(self, name: str) -> socket.socket:
        """Return the socket that a new process of the daemon logs to.  Raises HostError."""
        try:
            reader, writer = logpair()
        except OSError as error:
            raise HostError(f"make a log for {name}", error) from error
        self.read_from(reader, name)
        return writer

    def read_from(self, reader: socket.socket, name: str) -> None:
        """Let the process read `reader` as the log of a process of the daemon."""
        self._add(Source(reader, name, 0, 0))

    def on_vm_log(self, message: VmLog, envelope: Envelope) -> None:
        """vmm has sent the reading end of the log of a VM's processes."""
        fd = envelope.take_fd("log")
        assert fd is not None
        vm = self.core.vms.find(message.vmid, "") if message.vmid else None
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            close(fd)
            raise PeerError("vmm", f"the log of vm {message.vmid} is no socket") from None
        if vm is None:
            self._add(Source(sock, "vm", 0, 0))
            return
        self.read_vm(sock, vm)

    def read_vm(self, sock: socket.socket, vm: "Vm") -> None:
        """Let the process read `sock` as the log of a VM's processes."""
        source = Source(sock, f"vm/{vm.name}", vm.vmid, vm.config.owner.uid)
        self._of_vm[vm.vmid] = source
        self._add(source)

    def _add(self, source: Source) -> None:
        self._sources.add(source)
        self.loop.add(source.sock.fileno(), lambda _events: self._on_hung_up(source), select.EPOLLRDHUP)
        self._hand_over(source)

    def _hand_over(self, source: Source) -> None:
        """Give a source to the process, if there is one.  A new process gets all sources."""
        if self._channel is not None:
            try:
                copy = fcntl.fcntl(source.sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)
            except OSError as error:
                log.error(f"log of {source.name}: cannot be passed on: {error.strerror}")
                return
            message = LogSource(name=source.name, vmid=source.vmid, owner_uid=source.owner_uid)
            self._channel.send(message, fds={"source": [copy]})

    def _on_hung_up(self, source: Source) -> None:
        """No process can write to a source any more: they have ended, or one of them has shut it down."""
        self.loop.remove(source.sock.fileno())
        self._sources.discard(source)
        if self._channel is not None:
            source.sock.close()
        else:
            self._ended.append(source)
        if source.vmid:
            self.loop.call_later(SHUT_S, lambda: self._look_after(source))

    def _look_after(self, source: Source) -> None:
        """Warn if a VM still runs whose log was shut down.

        A VM that is started again has no process yet, or has a new source.
        """
        if self._of_vm.get(source.vmid) is not source:
            return
        del self._of_vm[source.vmid]
        vm = self.core.vms.find(source.vmid, "")
        if vm is not None and vm.pid:
            log.warn(f"vm {vm.name}: one of its processes has shut down its log: nothing is logged till its next start")
