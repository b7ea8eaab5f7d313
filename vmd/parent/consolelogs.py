"""The console logs of VMs, which the process `consolelog` writes (`vmd/consolelog`).

One process `consolelog` writes all console logs.  For each VM it gets the backlog and an open file.  A process
`logfile` opens the file with the rights of the VM's owner: when the log begins, when the file is full, and when it was
removed.  The descriptor goes over a courier, so the parent never waits for the file's storage.

A VM starts even if its console log cannot be written.  The reason is logged once and shown by `vmctl status -v`, and
opening is tried again.
"""

import errno
import os
import pwd
import time

from vmd.closing import close, close_all
from vmd.errors import OperatorError, VmdError, sentence
from vmd.ipc import courier
from vmd.ipc.logfile import FD_ANSWER, FD_COURIER, LogFile, pack
from vmd.ipc.messages.children import Ping, Pong, Quit
from vmd.ipc.messages.clients import ConsoleLogAt, ConsoleLogRequest
from vmd.ipc.messages.consolelog import SILENT, ConsoleFile, ConsoleKept, DropConsole, KeepConsole
from vmd.ipc.messages.shared import Trouble
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent.access import NOGROUP, groups_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from vmd.backlog import Backlog
    from vmd.config.model import ConsoleLog, Owner
    from vmd.errors import PeerError
    from vmd.ipc.channel import Channel
    from vmd.ipc.imsg import Envelope
    from vmd.ipc.loop import Timer
    from vmd.ipc.messages.clients import Caller
    from vmd.parent.children import Children
    from vmd.parent.connections import Attach
    from vmd.parent.core import Core
    from vmd.parent.vm import Vm
    from vmd.privsep.spawn import Child

ANSWER_S = 30.0  # a logfile must answer within this time
AGAIN_S = 10.0  # from a failed opening to the next try
AT_A_TIME = 4  # files are opened at the same time
SAY_AGAIN_S = 60.0  # the same trouble of one log is logged again only after this time
PING_S, PINGS_MAX = 5.0, 3  # between two pings; so many without an answer, and the process is replaced
RESTART_S = 2.0  # between two starts of the process
ANSWER_MAX = 1 << 12
DEVICE = "console log"  # as `status -v` calls it


class VmConsoleLog:
    """The console log of one life of a VM."""

    def __init__(self, number: int, vm: "Vm", backlog: "Backlog", wanted: "ConsoleLog") -> None:
        self.number = number
        self.vmid = vm.vmid
        self.name = vm.name
        self.owner = vm.config.owner
        self.start = backlog.start
        self.backlog = backlog  # the VM's
        self.shown = os.dup(backlog.fd)  # remains readable when the VM has ended
        self.wanted = wanted
        self.opening = False  # a file was asked for, and consolelog has not got it yet
        self.files = 0  # how many files consolelog has had for it
        self.opener: Child | None = None  # a logfile
        self.stuck: Child | None = None  # a logfile that was killed and may not have ended
        self.reader = -1  # the pipe with the answer of the logfile; -1: none is running
        self.deadline: Timer | None = None
        self.again: Timer | None = None
        self.unopened = ""  # why the file, or the next one, cannot be opened
        self.unwritten = ""  # why consolelog cannot write
        self.since_s = 0.0  # when the trouble began
        self.said, self.said_s = "", 0.0  # the trouble that was logged last, and when
        self.says_end = False  # the trouble was logged, so its end will be
        self.lost = self.lost_before = 0  # bytes lost by this consolelog, and by the ones before it
        self.over = False  # its VM has ended

    @property
    def path(self) -> str:
        """The path of the file."""
        return self.wanted.path_of(self.name)

    @property
    def text(self) -> str:
        """Why the log is not written; empty if it is."""
        return self.unopened or self.unwritten


class ConsoleLogs:
    """The room of console logs."""

    def __init__(self, core: "Core", attach: "Attach") -> None:
        self.core = core
        self.loop = core.loop
        self.attach = attach
        self.kept: dict[int, VmConsoleLog] = {}  # by number; the log of an ended VM stays until the rest is written
        self.number = 0
        self.channel: Channel | None = None
        self.child: Child | None = None
        self.pings = 0  # not answered
        self.waiting: list[VmConsoleLog] = []  # for their turn to have a file opened
        self.restarts = False  # a timer will start the process again
        self.children: Children | None = None
        self.open_log: Callable[[str], socket.socket]

    def start(self, children: "Children", open_log: "Callable[[str], socket.socket]") -> None:
        """Processes can be started from now on.  `open_log` makes the socket that a process logs to."""
        self.children, self.open_log = children, open_log

    def close(self) -> None:
        """The daemon ends: tell consolelog to write what is left and to end."""
        self.children = None
        if self.channel is not None:
            self.channel.send(Quit())
            self.channel.flush_blocking(1.0)

    # --- requests ----------------------------------------------------------------------------------------

    def serve(self, message: ConsoleLogRequest, caller: "Caller", envelope: "Envelope") -> None:
        """Answer with the path of a VM's console log.  The client opens the file with its own rights."""
        vm = self.core.vms.get(message.vmid, message.name)
        vm.require_control(caller, "read the console log of")
        wanted = vm.config.console_log
        if wanted is None:
            raise OperatorError(errno.ENODATA, f"vm {vm.name} has no console log: see `console log` in vm.conf(5)")
        path = wanted.path_of(vm.name)
        self.core.clients.answer(
            envelope.peerid, ConsoleLogAt(vmid=vm.vmid, name=vm.name, path=path, keep=wanted.keep)
        )

    def troubles(self, vmid: int) -> "Iterator[Trouble]":
        """Yield the problems of the console log of a VM."""
        for kept in self.kept.values():
            if kept.vmid == vmid and kept.text and not kept.over:
                lost = f"; {kept.lost_before + kept.lost} bytes are lost" if kept.lost_before + kept.lost else ""
                yield Trouble(device=DEVICE, text=f"{kept.path}: {kept.text}{lost}", since_s=int(kept.since_s))

    # --- logs of VMs -------------------------------------------------------------------------------------

    def look(self, vm: "Vm") -> None:
        """Begin, change or end the log of a VM, as its state and its configuration ask for."""
        present = next((kept for kept in self.kept.values() if kept.vmid == vm.vmid and not kept.over), None)
        wanted = vm.config.console_log if vm.alive else None
        if present is not None and (wanted is None or present.backlog is not vm.backlog):
            self._end(present)
            present = None
        if wanted is None or vm.backlog is None or self.children is None:
            return
        if present is None:
            self._begin(vm, vm.backlog, wanted)
        elif present.wanted != wanted:
            moved = present.wanted.path_of(vm.name) != wanted.path_of(vm.name)
            present.wanted = wanted
            if moved:
                self._open(present)
            else:
                self._send(ConsoleFile(number=present.number, size_bytes=wanted.size_bytes))

    def _begin(self, vm: "Vm", backlog: "Backlog", wanted: "ConsoleLog") -> None:
        self.number += 1
        try:
            kept = self.kept[self.number] = VmConsoleLog(self.number, vm, backlog, wanted)
        except OSError as error:
            log.error(f"vm {vm.name}: console log: {sentence(error)}")
            return
        if self.channel is not None:
            self._hand_over(kept)
        elif not self.restarts:
            self._start()

    def _end(self, kept: VmConsoleLog) -> None:
        """The VM has ended: have the rest written, if possible."""
        kept.over = True
        if kept not in self.waiting:  # else `_open_next` sends it
            self._send(DropConsole(number=kept.number))
        if self.channel is None:
            self._forget(kept)

    def _forget(self, kept: VmConsoleLog) -> None:
        if self.kept.pop(kept.number, None) is None:
            return
        close(kept.shown)
        self._end_opening(kept)
        if kept.again is not None:
            kept.again.cancel()
        if kept in self.waiting:
            self.waiting.remove(kept)
        lost = kept.lost_before + kept.lost
        if lost:
            log.warn(f"vm {kept.name}: console log {kept.path}: {lost} bytes of what it printed are lost")
        self._open_next()

    # --- the process -------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the process and give it all logs.  If the start fails, try again later."""
        self.restarts = False
        if self.children is None or not self.kept or self.channel is not None:
            return
        try:
            self.child, ours = self.children.start(Proc.CONSOLELOG, self.open_log)
        except (VmdError, OSError) as error:
            log.error(f"console logs are not written: {sentence(error)}")
            self._start_soon()
            return
        self.channel = self.attach(ours, Proc.CONSOLELOG, "consolelog", on_lost=self._on_lost)
        self.pings = 0
        self.loop.call_later(PING_S, lambda channel=self.channel: self._ping(channel))  # type: ignore[misc]
        for kept in list(self.kept.values()):
            self._hand_over(kept)

    def _start_soon(self) -> None:
        if not self.restarts:
            self.restarts = True
            self.loop.call_later(RESTART_S, self._start)

    def _hand_over(self, kept: VmConsoleLog) -> None:
        """Give a log to the process, and have a file opened for it."""
        try:
            copy = os.dup(kept.shown)
        except OSError as error:
            log.error(f"vm {kept.name}: console log: {sentence(error)}")
            return
        self._send(KeepConsole(number=kept.number, name=kept.name, start=kept.start), {"shown": [copy]})
        self._open(kept)

    def _send(
        self, message: "KeepConsole | ConsoleFile | DropConsole", fds: "dict[str, list[int]] | None" = None
    ) -> None:
        if self.channel is not None:
            self.channel.send(message, fds=fds or {})
        elif fds:
            close_all(fd for each in fds.values() for fd in each)

    def _on_lost(self, channel: "Channel", error: "PeerError | None") -> None:
        """The process has ended too early, or broke the protocol.  The next one continues where this one stopped."""
        if channel is not self.channel:
            return
        log.error(f"{error or 'process consolelog has ended'}; starting another one")
        self._lose()

    def _lose(self) -> None:
        """Kill the process, and start another one soon."""
        assert self.channel is not None
        self.channel.close()
        self.channel = None
        if self.child is not None:
            self.child.kill()
        for kept in self.kept.values():
            self._end_opening(kept)
            kept.opening, kept.files = False, 0
            kept.lost_before, kept.lost, kept.unwritten = kept.lost_before + kept.lost, 0, ""
        self.waiting.clear()
        self._start_soon()

    def _ping(self, channel: "Channel") -> None:
        """Ping the process.  A process that is stopped or stuck does not answer, and is replaced."""
        if channel is not self.channel:
            return
        self.loop.call_later(PING_S, lambda: self._ping(channel))
        if self.pings >= PINGS_MAX:
            log.error(f"process consolelog has not answered for {PINGS_MAX * PING_S:.0f} s; starting another one")
            self._lose()
            return
        self.pings += 1
        channel.send(Ping())

    def on_pong(self, _message: Pong, _envelope: "Envelope") -> None:
        """The process has answered a ping."""
        self.pings = 0

    def on_kept(self, message: ConsoleKept, _envelope: "Envelope") -> None:
        """The process reports on a log: whether it can be written, needs a file, or has ended."""
        kept = self.kept.get(message.number)
        if kept is None:
            return
        kept.lost = message.lost
        self._note_trouble(kept, kept.unopened, message.text)
        if message.files != kept.files:
            kept.files, kept.opening = message.files, False
        if message.ended:
            self._forget(kept)
        elif message.wants_file and not kept.opening:
            self._open(kept)

    def _note_trouble(self, kept: VmConsoleLog, unopened: str, unwritten: str) -> None:
        """Note why a log cannot be written, or that it can again, and log it once.

        Trouble that comes and goes is logged at most every SAY_AGAIN_S.
        """
        before = kept.text
        kept.unopened, kept.unwritten = unopened, unwritten
        if kept.text == before:
            return
        what, now_s = f"vm {kept.name}: console log {kept.path}", time.monotonic()
        if kept.text:
            kept.since_s = time.time()
            if kept.text != kept.said or now_s >= kept.said_s + SAY_AGAIN_S:
                kept.said, kept.said_s, kept.says_end = kept.text, now_s, True
                log.warn(f"{what}: {kept.text}: what it prints is not kept")
        elif kept.says_end:
            kept.says_end = False
            lost = kept.lost_before + kept.lost
            log.info(f"{what} is written again" + (f"; {lost} bytes are lost" if lost else ""))

    # --- files -------------------------------------------------------------------------------------------

    def _open(self, kept: VmConsoleLog) -> None:
        """Have a file opened for a log when it is its turn."""
        self._end_opening(kept)
        kept.opening = True
        if kept not in self.waiting:
            self.waiting.append(kept)
        self._open_next()

    def _open_next(self) -> None:
        at_work = sum(1 for kept in self.kept.values() if kept.reader >= 0)
        while self.children is not None and self.waiting and at_work < AT_A_TIME:
            at_work += 1
            kept = self.waiting.pop(0)
            try:
                self._begin_opening(kept)
            except (VmdError, OSError, ValueError) as error:
                self._not_opened(kept, sentence(error))
            if kept.over:
                self._send(DropConsole(number=kept.number))

    def _begin_opening(self, kept: VmConsoleLog) -> None:
        """Start a logfile.  Raises VmdError, OSError or ValueError."""
        assert self.children is not None
        stuck, kept.stuck = kept.stuck, None
        if stuck is not None and stuck.pidfd >= 0 and stuck.reap() is None:
            kept.stuck = stuck
            raise OperatorError(errno.ETIMEDOUT, SILENT)
        asks, gives = courier.pair()
        with asks, gives:
            reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                arguments = pack(file_of(kept.path, kept.wanted, kept.owner))
                fds = {FD_ANSWER: writer, FD_COURIER: gives.fileno()}
                kept.opener = self.children.start_log_file(self.open_log, kept.name, arguments, fds)
            except BaseException:
                close(reader)
                raise
            finally:
                close(writer)
            message = ConsoleFile(number=kept.number, size_bytes=kept.wanted.size_bytes)
            self._send(message, {"courier": [asks.detach()]})
        kept.reader = reader
        self.loop.add(reader, lambda _events: self._on_answer(kept))
        kept.deadline = self.loop.call_later(ANSWER_S, lambda: self._give_up(kept))

    def _on_answer(self, kept: VmConsoleLog) -> None:
        """A logfile has opened the file, or says why not."""
        try:
            answer = os.read(kept.reader, ANSWER_MAX).decode("utf-8", "replace")
        except BlockingIOError:
            return
        self._end_opening(kept, kills=False)
        if not answer:
            self._not_opened(kept, "the process that should open it has ended")
        elif answer.strip():
            self._not_opened(kept, answer.strip())
        else:
            self._note_trouble(kept, "", kept.unwritten)
        self._open_next()

    def _give_up(self, kept: VmConsoleLog) -> None:
        """A logfile has not answered in time: kill it."""
        self._end_opening(kept)
        kept.stuck = kept.opener
        self._not_opened(kept, SILENT)
        self._open_next()

    def _end_opening(self, kept: VmConsoleLog, *, kills: bool = True) -> None:
        if kept.reader < 0:
            return
        self.loop.remove(kept.reader)
        close(kept.reader)
        kept.reader = -1
        if kept.deadline is not None:
            kept.deadline.cancel()
        if kills and kept.opener is not None:
            kept.opener.kill()

    def _not_opened(self, kept: VmConsoleLog, why: str) -> None:
        """Note why there is no file, and try again later, unless the VM has ended: then the rest is lost."""
        self._note_trouble(kept, why, kept.unwritten)

        def again() -> None:
            if self.kept.get(kept.number) is kept and kept.reader < 0 and self.channel is not None:
                self._open(kept)

        if not kept.over:
            kept.again = self.loop.call_later(AGAIN_S, again)


def file_of(path: str, wanted: "ConsoleLog", owner: "Owner") -> LogFile:
    """Return how the owner of a VM opens its console log.  The group of `owner` in vm.conf may read the file."""
    gid = owner.gid if owner.gid is not None else primary_group(owner.uid)
    groups = tuple(groups_of(owner.uid, gid)) if owner.uid else ()
    return LogFile(
        path=path,
        size_bytes=wanted.size_bytes,
        keep=wanted.keep,
        uid=owner.uid,
        gid=gid,
        groups=groups,
        shared=owner.gid is not None,
    )


def primary_group(uid: int) -> int:
    """Return the primary group of a user; NOGROUP if this host does not know the user."""
    if not uid:
        return 0
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return NOGROUP
