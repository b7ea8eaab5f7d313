"""The clients of the control socket: accepted, numbered and counted here, and served by one `control` for each user.

The kernel names the user of a connection when it is accepted (SO_PEERCRED).  A control is told the number of the
connection and the user.  A request that comes from the control under that number counts as asked by that user,
regardless of its contents.  So a control that was taken over can ask for its own user only.  The parent reads nothing
from a client.

Root's control always runs.  The control of another user is started for that user's first connection, and ends some
time after the last one.  One more control is in reserve, so that no client waits for an interpreter to start.  When a
control dies, the connections of its user are lost.  Root's control is then started again at once, that of another user
with their next connection.

A file that a client passes can block a control for ever, because close(2) of the file waits for its storage.  SIGKILL
does not end that wait, and the kernel does not report the process as ended.  So a control that has clients is pinged,
and given up when it does not answer.  A user with several controls that were given up and have not ended gets no
further one.

Requests are not queued here.  A few requests of one control are served, then it is the turn of the others.  A control
that has not read its answers is not served; it then stops reading from its clients.

One spare descriptor is kept for the case that no other is free.  It is closed to accept a connection, which is then
passed on, and opened again.  So root can always connect, and a client that cannot be served is told why.
"""

import contextlib
import errno
import os
import socket
import time

from vmd.closing import close, close_all
from vmd.config.model import ROOT
from vmd.errors import HostError, PeerError, VmdError, sentence
from vmd.ipc.imsg import NO_FDS, Form, encode
from vmd.ipc.messages.children import Ping, Quit
from vmd.ipc.messages.clients import Caller, Failed
from vmd.ipc.messages.control import NO_CLIENT, NewClient, ServeUser
from vmd.ipc.routes import BY_CLASS, Proc
from vmd.log import RateLimit, log
from vmd.privsep import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Protocol

    from vmd.ipc.channel import Channel
    from vmd.ipc.loop import Loop, Timer
    from vmd.parent.children import Children
    from vmd.privsep.spawn import Child
    from vmd.record import Record

    class Attach(Protocol):
        """`Process.attach`."""

        def __call__(
            self,
            sock: socket.socket,
            peer: Proc,
            label: str,
            *,
            on_lost: "Callable[[Channel, PeerError | None], None]",
            in_step: bool = ...,
            batch: int = ...,
        ) -> Channel:
            """Serve a peer."""


RESERVE = "control/reserve"  # the title of a control that has no user yet
NONE = -1
REFUSED = -1  # stands for a user: its control tells refused clients why, where their user has no control

MAX_CLIENTS = 256  # without root's: users must not be able to lock the operator out
MAX_CLIENTS_PER_USER = 64
MAX_CLIENTS_OF_ROOT = 1024
MAX_USERS = 32  # that have a control each, besides root
MAX_REFUSED = 32  # connections that are being told why they are refused; further ones are closed without a word
MAX_UNANSWERED = 64  # requests of one connection; an honest control passes on fewer
TURN = 4  # requests of one control that are served before it is the turn of the others
ACCEPT_PAUSE_S = 1.0  # after the host has run out of something (*cat. 1.9*)
IDLE_S = 30.0  # a control without a connection is told to end after this time
END_S = 10.0  # a control that was told to end is given up after this time
RESERVE_DELAY_S = 0.2  # the client that has just connected needs the processor first
QUICK_S = 5.0  # root's control, if it dies so soon after its start ...
AGAIN_S = 2.0  # ... is started again only after this time
LOOK_S = 4.0  # between two pings to a control
SILENT_MAX, SILENT_AT_START_MAX = 4, 20  # pings without an answer, after which a control is given up
STUCK_MAX = 4  # controls of one user that were given up and have not ended
OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)


class Connection:
    """A connection, its user, and the control that serves it."""

    def __init__(self, number: int, caller: Caller, control: "Control", *, refused: bool) -> None:
        self.number = number
        self.caller = caller
        self.control = control
        self.refused = refused
        self.unanswered = 0  # requests that wait for their answer


class Control:
    """A control process.  `user` is None while it is in reserve."""

    def __init__(self, child: "Child") -> None:
        self.child = child
        self.channel: Channel
        self.user: int | None = None
        self.numbers: set[int] = set()  # of its connections
        self.started_s = time.monotonic()
        self.ready = False
        self.idle: Timer | None = None  # runs while it has no connections
        self.ending = False  # it was told to end
        self.silent = 0  # pings since its last message
        self.look: Timer | None = None  # runs while it has connections


class Connections:
    """The room of connections.  Other rooms use it like a channel to control (`Peers`)."""

    def __init__(
        self,
        loop: "Loop",
        attach: "Attach",
        on_gone: "Callable[[int], None]",
        on_hopeless: "Callable[[Channel, PeerError | None], None]",
    ) -> None:
        """`on_gone` is called with the number of each connection that has ended.

        `on_hopeless` is called when root's first control is lost before clients are accepted.
        """
        self.loop = loop
        self.attach = attach
        self.on_gone = on_gone
        self.on_hopeless = on_hopeless
        self.children: Children
        self.controls: dict[int, Control] = {}  # by user
        self.reserve: Control | None = None
        self.known: dict[int, Connection] = {}  # by number
        self.ending = False
        self.complaints = RateLimit()
        self._all: dict[Channel, Control] = {}
        self._stuck: dict[int, list[Child]] = {}  # by user: processes that were given up and may not have ended
        self._listener: socket.socket | None = None
        self._spare = NONE  # the spare descriptor
        self._next = 1

    # --- processes ---------------------------------------------------------------------------------------

    def start(self, children: "Children", open_log: "Callable[[str], socket.socket]") -> None:
        """Start root's control.  `open_log` makes the socket that a control logs to.  Raises HostError."""
        self.children = children
        self._open_log = open_log
        self._keep_spare()
        self._assign(ROOT)

    def on_ready(self, channel: "Channel") -> bool:
        """A control is confined; return whether it is root's.  Raises PeerError."""
        control = self._all[channel]
        if control.ready:
            raise PeerError(channel.label, "is ready twice")
        control.ready = True
        return control.user == ROOT

    def _new(self) -> Control:
        """Start a control.  Raises HostError."""
        child, ours = self.children.start(Proc.CONTROL, self._open_log, RESERVE)
        control = Control(child)
        control.channel = self.attach(ours, Proc.CONTROL, RESERVE, on_lost=self._on_lost, in_step=True, batch=TURN)
        self._all[control.channel] = control
        return control

    def _assign(self, user: int) -> Control:
        """Give a user a control, that in reserve or a new one, and return it.  Raises HostError."""
        control, self.reserve = self.reserve or self._new(), None
        control.user = user
        control.channel.label = title = title_of(user)
        control.channel.send(ServeUser(title=title))
        self.controls[user] = control
        self.loop.call_later(RESERVE_DELAY_S, self._fill_reserve)
        self._look_idle(control)
        return control

    def _fill_reserve(self) -> None:
        if self.reserve is None and not self.ending:
            try:
                self.reserve = self._new()
            except VmdError as error:  # `_assign` starts a control when it needs one
                self.complaints.warn(f"no control in reserve: {error}")

    def _look_idle(self, control: Control) -> None:
        """Start the idle timer of a control without connections, and stop that of one with some."""
        if control.numbers or control.user == ROOT:
            if control.idle is not None:
                control.idle.cancel()
                control.idle = None
        elif control.idle is None:
            control.idle = self.loop.call_later(IDLE_S, lambda: self._quit(control))

    def _quit(self, control: Control) -> None:
        """Tell a control to end."""
        if control.user is not None and self.controls.get(control.user) is control:
            del self.controls[control.user]
        control.ending = True
        control.channel.send(Quit())
        self.loop.call_later(END_S, lambda: self._end_late(control))

    def _end_late(self, control: Control) -> None:
        """Give up a control that was told to end and has not: a file that a client passed blocks it."""
        if control.channel in self._all:
            control.channel.close()
            self._count_as_stuck(control)
            self._on_lost(control.channel, None)

    def _count_as_stuck(self, control: Control) -> None:
        """Count a control that is given up, until it has ended."""
        assert control.user is not None
        self._stuck.setdefault(control.user, []).append(control.child)

    def _ask_later(self, control: Control) -> None:
        if control.look is None and control.numbers:
            control.look = self.loop.call_later(LOOK_S, lambda: self._ask(control))

    def _ask(self, control: Control) -> None:
        """Ping a control that has connections.  Give it up if it has not answered."""
        control.look = None
        if control.channel.closed or not control.numbers:
            return
        most = SILENT_MAX if control.ready else SILENT_AT_START_MAX
        if control.silent >= most:
            control.channel.close()
            self._count_as_stuck(control)
            silent = PeerError(control.channel.label, f"does not answer for {most * LOOK_S:.0f} s")
            self._on_lost(control.channel, silent)
            return
        control.silent += 1
        control.channel.send(Ping())
        self._ask_later(control)

    def on_pong(self, channel: "Channel") -> None:
        """A control has answered a ping."""
        self._all[channel].silent = 0

    def _count_stuck(self, user: int) -> int:
        """Return how many controls of a user were given up and have not ended."""
        self.children.bury()
        left = [child for child in self._stuck.pop(user, ()) if child.pidfd >= 0]
        if left:
            self._stuck[user] = left
        return len(left)

    def _on_lost(self, channel: "Channel", error: PeerError | None) -> None:
        """A control has ended, or is not trusted any more: the connections of its user are lost."""
        control = self._all.pop(channel)
        control.child.kill()
        self.children.bury()
        if control is self.reserve:
            self.reserve = None
            self.loop.call_later(AGAIN_S, self._fill_reserve)
        if control.user is not None and self.controls.get(control.user) is control:
            del self.controls[control.user]
        if control.idle is not None:
            control.idle.cancel()
        for number in sorted(control.numbers):
            self._forget(number)
        if self.ending or (control.ending and error is None):
            return
        if control.user == ROOT and self._listener is None:  # root's first control: no client was accepted yet
            self.on_hopeless(channel, error)
            return
        log.error(str(error) if error else f"lost {channel.label}; its user may connect again")
        if control.user == ROOT:
            quick = time.monotonic() < control.started_s + QUICK_S
            self.loop.call_later(AGAIN_S if quick else 0, self._start_roots)

    def _start_roots(self) -> None:
        if ROOT not in self.controls and not self.ending:
            try:
                self._assign(ROOT)
            except VmdError as error:  # the next connection of root tries again
                log.error(f"no control for root: {error}")

    # --- connections -------------------------------------------------------------------------------------

    def listen(self, listener: socket.socket) -> None:
        """Accept clients from now on.  Takes the listener over."""
        self._listener = listener
        listener.setblocking(False)
        self.loop.add(listener.fileno(), self._on_connection)

    def _on_connection(self, _events: int) -> None:
        """Accept a client.  Neither accept(2) nor SO_PEERCRED waits for the client."""
        try:
            try:
                self._accept()
            except OSError as error:
                if error.errno not in OUT_OF_FILES or self._spare == NONE:
                    raise
                self.complaints.warn(f"a client takes the last descriptor: {sentence(error)}")
                close(self._spare)
                self._spare = NONE
                self._accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in OUT_OF:
                raise
            self._pause(sentence(error))
        finally:
            self._keep_spare()

    def _keep_spare(self) -> None:
        if self._spare == NONE:
            with contextlib.suppress(OSError):  # no descriptor is free; the next client tries again
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _accept(self) -> None:
        """Accept one client and hand it to a control.  Raises OSError."""
        assert self._listener is not None
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        pid, uid, gid = linux.UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, linux.UCRED.size))
        self._take(sock, Caller(uid=uid, gid=gid, pid=pid))

    def _pause(self, why: str) -> None:
        """Accept nobody for ACCEPT_PAUSE_S."""
        listener = self._listener
        assert listener is not None
        self.loop.remove(listener.fileno())

        def go_on() -> None:
            if self._listener is listener:
                self.loop.add(listener.fileno(), self._on_connection)

        self.loop.call_later(ACCEPT_PAUSE_S, go_on)
        self.complaints.warn(f"no new clients for {ACCEPT_PAUSE_S:.0f} s: {why}")

    def _take(self, sock: socket.socket, caller: Caller) -> None:
        """Hand a client to the control of its user, which serves it or tells it why it is refused."""
        refusal = self._refusal(caller)
        user = caller.uid if refusal is None or caller.uid in self.controls else REFUSED
        if refusal is not None:
            self.complaints.warn(f"refused a client: {refusal[1]}")
            if sum(1 for each in self.known.values() if each.refused) >= MAX_REFUSED:
                sock.close()  # too many clients are being told already
                return
        code, text = refusal or (0, "")
        try:
            control = self.controls.get(user) or self._assign(user)
            if self._spare == NONE and control.channel.waiting:  # the queue would keep the last descriptor open
                raise HostError(f"serve uid {caller.uid}", errno.EMFILE)
        except VmdError as error:
            self._send_away(sock, error)
            return
        number = self._number()
        self.known[number] = Connection(number, caller, control, refused=refusal is not None)
        control.numbers.add(number)
        self._look_idle(control)
        self._ask_later(control)
        new = NewClient(uid=caller.uid, code=code, text=text)
        control.channel.send(new, peerid=number, fds={"client": [sock.detach()]})

    def _send_away(self, sock: socket.socket, error: VmdError) -> None:
        """Tell a client that no control can be started for it, and close its connection."""
        self.complaints.warn(f"refused a client: {error}")
        with sock, contextlib.suppress(OSError):
            sock.send(encode(Failed(code=error.number, text=str(error)), form=Form.FIRST)[0])

    def _refusal(self, caller: Caller) -> tuple[int, str] | None:
        """Return why a connection is refused, as errno and sentence; None if it is served."""
        if self.children.are_ours(caller):
            return errno.EPERM, f"process {caller.pid} is one of vmd's own: it may not use the control socket"
        of_user = sum(1 for each in self.known.values() if each.caller.uid == caller.uid)
        most = MAX_CLIENTS_OF_ROOT if caller.uid == ROOT else MAX_CLIENTS_PER_USER
        if of_user >= most:
            return errno.EUSERS, f"too many connections of uid {caller.uid} ({most})"
        if caller.uid == ROOT:
            return None
        if sum(1 for each in self.known.values() if each.caller.uid != ROOT) >= MAX_CLIENTS:
            return errno.EUSERS, f"too many connections to vmd ({MAX_CLIENTS})"
        if caller.uid not in self.controls and self._count_stuck(caller.uid) >= STUCK_MAX:
            what = f"{STUCK_MAX} processes for uid {caller.uid} hang in files that were passed to vmd"
            return errno.EBUSY, f"{what}: their storage does not answer"
        if caller.uid not in self.controls and len(self.controls.keys() - {ROOT, REFUSED}) >= MAX_USERS:
            return errno.EUSERS, f"too many users are connected to vmd ({MAX_USERS})"
        return None

    def _number(self) -> int:
        """Return the number of a new connection.  A number is used again only after four billion others."""
        while self._next in self.known:
            self._next = self._next % (NO_CLIENT - 1) + 1
        number = self._next
        self._next = self._next % (NO_CLIENT - 1) + 1
        return number

    def caller(self, number: int, channel: "Channel") -> Caller:
        """Return the user of a connection.  Raises PeerError if that control has no connection of this number."""
        known = self.known.get(number)
        if known is None or known.control.channel is not channel:
            raise PeerError(channel.label, f"speaks for client {number}, which it does not have")
        known.control.silent = 0
        return known.caller

    def asker(self, number: int, channel: "Channel") -> Caller:
        """Return who has sent a request, and count the request.  Raises PeerError as `caller`, and for too many."""
        caller = self.caller(number, channel)
        known = self.known[number]
        known.unanswered += 1
        if known.unanswered > MAX_UNANSWERED:
            raise PeerError(channel.label, f"has more than {MAX_UNANSWERED} requests of client {number} to be answered")
        return caller

    def on_client_gone(self, number: int, channel: "Channel") -> None:
        """A client of a control has left or was refused.  Raises PeerError if the client is not of this control."""
        self.caller(number, channel)
        control = self.known[number].control
        control.numbers.discard(number)
        self._forget(number)
        self._look_idle(control)

    def _forget(self, number: int) -> None:
        del self.known[number]
        self.on_gone(number)

    # --- as a channel ------------------------------------------------------------------------------------

    def send(self, message: "Record", *, peerid: int = 0, fds: "Mapping[str, Sequence[int]]" = NO_FDS) -> None:
        """Send a message for the client `peerid`, if it is still connected; with 0 send it to every control."""
        if peerid:
            known = self.known.get(peerid)
            if known is None:
                for each in fds.values():
                    close_all(each)
            else:
                info = BY_CLASS[type(message)]
                if info.is_answer and not info.partial:
                    known.unanswered = max(0, known.unanswered - 1)  # a console taken over is told without a request
                known.control.channel.send(message, peerid=peerid, fds=fds)
            return
        for channel in list(self._channels()):
            channel.send(message)

    def flush_blocking(self, timeout_s: float) -> None:
        """Send what is queued for each control, as `Channel.flush_blocking`."""
        for channel in self._channels():
            channel.flush_blocking(timeout_s)

    def _channels(self) -> "Iterable[Channel]":
        return list(self._all)

    def close(self) -> None:
        """Stop accepting clients.  Controls that end from now on are not replaced."""
        self.ending = True
        listener, self._listener = self._listener, None
        if listener is not None:
            self.loop.remove(listener.fileno())
            listener.close()
        if self._spare != NONE:
            close(self._spare)
            self._spare = NONE


def title_of(user: int) -> str:
    """Return the title of the control of a user."""
    return {ROOT: "control", REFUSED: "control/refused"}.get(user, f"control/{user}")
