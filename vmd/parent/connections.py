"""The clients of the control socket: accepted, numbered and counted here, and served by one `control` for each user.

Whose a connection is says the kernel (SO_PEERCRED), once.  A control is told the number of a connection and the user;
what comes from it under that number is asked by that user, whatever else it says.  So a control that was taken over
asks for its own user only.  Nothing is read from a client here.

Root's control is always there.  One of another user comes with that user's first connection, and goes some time after
the last.  One more is in reserve, so that nobody waits for an interpreter.  A control that dies costs the connections
of its user: root's is started again at once, those of others with their next connection.

A file that a client passes can keep a control for ever: close(2) of it asks its storage.  SIGKILL does not end that,
nor does anything then say that the process is lost.  So a control that has clients is asked whether it is there, and
given up when it does not answer; a user with several that were given up and have not ended gets no more of them.

What a user asks is not queued here.  A few requests of a control are looked at before it is the turn of others, and
none while that control has not read what was answered; then it stops reading its clients.

One descriptor is kept for the time when there are no others: it is given up for each connection that is accepted then,
and passed on.  So root is heard, and who cannot be served is told so.
"""

import contextlib
import errno
import os
import socket
import time

from vmd.closing import close, close_all
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


ROOT = 0
RESERVE = "control/reserve"  # the title of one that has no user yet
NONE = -1
DOORMAN = -1  # the user of the control that turns away those who get none of their own

MAX_CLIENTS = 256  # root is not counted here: users must not be able to lock the operator out
MAX_CLIENTS_PER_USER = 64
MAX_CLIENTS_OF_ROOT = 1024
MAX_USERS = 32  # with a control each, besides root
MAX_REFUSED = 32  # connections that are being told why they are refused; more are just closed
MAX_UNANSWERED = 64  # requests of one connection; its control passes on fewer
TURN = 4  # requests of a control, before it is the turn of others
ACCEPT_PAUSE_S = 1.0  # after the host has run out of something (*cat. 1.9*)
IDLE_S = 30.0  # how long a control stays without a connection
END_S = 10.0  # how long it may take to end then
RESERVE_DELAY_S = 0.2  # whoever has just come needs the processor more than the next one does
QUICK_S = 5.0  # a control that dies so soon after its start ...
AGAIN_S = 2.0  # ... is started again only after this
LOOK_S = 4.0  # between two questions to a control whether it is there
SILENT_MAX, SILENT_AT_START_MAX = 4, 20  # so many without an answer, and it is given up
STUCK_MAX = 4  # controls of a user that were given up and have not ended
OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)


class Connection:
    """A connection, whose it is, and who serves it."""

    def __init__(self, number: int, caller: Caller, control: "Control", *, refused: bool) -> None:
        self.number = number
        self.caller = caller
        self.control = control
        self.refused = refused
        self.unanswered = 0  # requests


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
        self.ending = False  # it was told to
        self.silent = 0  # how often it was asked, since it has said something
        self.look: Timer | None = None  # runs while it has connections


class Connections:
    """The room of connections.  To the others it is the channel to control (`Peers`)."""

    def __init__(
        self,
        loop: "Loop",
        attach: "Attach",
        on_gone: "Callable[[int], None]",
        on_hopeless: "Callable[[Channel, PeerError | None], None]",
    ) -> None:
        """`on_gone` is told the number of each connection that has ended, `on_hopeless` that no control can start."""
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
        self._stuck: dict[int, list[Child]] = {}  # by user: given up, and perhaps not ended
        self._listener: socket.socket | None = None
        self._spare = NONE  # a descriptor
        self._next = 1

    # --- processes ---------------------------------------------------------------------------------------

    def start(self, children: "Children", open_log: "Callable[[str], socket.socket]") -> None:
        """Start root's control; `open_log` makes what one writes its lines to.  Raises HostError."""
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
        """Return a control that has become a user's.  Raises HostError."""
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
            except VmdError as error:  # it is started when it is needed
                self.complaints.warn(f"no control in reserve: {error}")

    def _look_idle(self, control: Control) -> None:
        """Let a control go when it has had no connections for some time."""
        if control.numbers or control.user == ROOT:
            if control.idle is not None:
                control.idle.cancel()
                control.idle = None
        elif control.idle is None:
            control.idle = self.loop.call_later(IDLE_S, lambda: self._let_go(control))

    def _let_go(self, control: Control) -> None:
        if control.user is not None and self.controls.get(control.user) is control:
            del self.controls[control.user]
        control.ending = True
        control.channel.send(Quit())
        self.loop.call_later(END_S, lambda: self._end_late(control))

    def _end_late(self, control: Control) -> None:
        """Give up a control that was told to end and has not: what its last client passed keeps it."""
        if control.channel in self._all:
            control.channel.close()
            self._keep_account_of(control)
            self._on_lost(control.channel, None)

    def _keep_account_of(self, control: Control) -> None:
        """Count a control that is given up, until it has ended."""
        assert control.user is not None
        self._stuck.setdefault(control.user, []).append(control.child)

    def _ask_later(self, control: Control) -> None:
        if control.look is None and control.numbers:
            control.look = self.loop.call_later(LOOK_S, lambda: self._ask(control))

    def _ask(self, control: Control) -> None:
        """Ask a control with connections whether it is there; one that does not answer is given up."""
        control.look = None
        if control.channel.closed or not control.numbers:
            return
        most = SILENT_MAX if control.ready else SILENT_AT_START_MAX
        if control.silent >= most:
            control.channel.close()
            self._keep_account_of(control)
            silent = PeerError(control.channel.label, f"does not answer for {most * LOOK_S:.0f} s")
            self._on_lost(control.channel, silent)
            return
        control.silent += 1
        control.channel.send(Ping())
        self._ask_later(control)

    def on_pong(self, channel: "Channel") -> None:
        """A control is there."""
        self._all[channel].silent = 0

    def _count_stuck(self, user: int) -> int:
        """Return how many controls of a user were given up and have not ended."""
        self.children.bury()
        left = [child for child in self._stuck.pop(user, ()) if child.pidfd >= 0]
        if left:
            self._stuck[user] = left
        return len(left)

    def _on_lost(self, channel: "Channel", error: PeerError | None) -> None:
        """A control has ended, or is not to be trusted any more: its user's connections are gone."""
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
        if control.user == ROOT and self._listener is None:  # the first one, before it has served anybody
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
            except VmdError as error:  # it is tried again for the next connection
                log.error(f"no control for root: {error}")

    # --- connections -------------------------------------------------------------------------------------

    def listen(self, listener: socket.socket) -> None:
        """Accept clients from now on."""
        self._listener = listener
        listener.setblocking(False)
        self.loop.add(listener.fileno(), self._on_connection)

    def _on_connection(self, _events: int) -> None:
        """Accept a client.  Neither this nor to ask who it is waits for it."""
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
            with contextlib.suppress(OSError):  # somebody has it; it is tried again with the next client
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _accept(self) -> None:
        """Accept a client.  Raises OSError."""
        assert self._listener is not None
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        pid, uid, gid = linux.UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, linux.UCRED.size))
        self._take(sock, Caller(uid=uid, gid=gid, pid=pid))

    def _pause(self, why: str) -> None:
        listener = self._listener
        assert listener is not None
        self.loop.remove(listener.fileno())

        def go_on() -> None:
            if self._listener is listener:
                self.loop.add(listener.fileno(), self._on_connection)

        self.loop.call_later(ACCEPT_PAUSE_S, go_on)
        self.complaints.warn(f"no new clients for {ACCEPT_PAUSE_S:.0f} s: {why}")

    def _take(self, sock: socket.socket, caller: Caller) -> None:
        """Hand a client to the control of its user, which serves it or, with a sentence, turns it away."""
        refusal = self._refusal(caller)
        user = caller.uid if refusal is None or caller.uid in self.controls else DOORMAN
        if refusal is not None:
            self.complaints.warn(f"refused a client: {refusal[1]}")
            if sum(1 for each in self.known.values() if each.refused) >= MAX_REFUSED:
                sock.close()  # their control does not come to it
                return
        code, text = refusal or (0, "")
        try:
            control = self.controls.get(user) or self._assign(user)
            if self._spare == NONE and control.channel.waiting:  # the last descriptor would be kept
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
        """Tell a client that no control can be had for it."""
        self.complaints.warn(f"refused a client: {error}")
        with sock, contextlib.suppress(OSError):
            sock.send(encode(Failed(code=error.number, text=str(error)), form=Form.FIRST)[0])

    def _refusal(self, caller: Caller) -> tuple[int, str] | None:
        """Return why a connection cannot be had, as errno and sentence."""
        if self.children.are_ours(caller):
            return errno.EPERM, f"process {caller.pid} is one of vmd's own: it has nothing to ask here"
        theirs = sum(1 for each in self.known.values() if each.caller.uid == caller.uid)
        most = MAX_CLIENTS_OF_ROOT if caller.uid == ROOT else MAX_CLIENTS_PER_USER
        if theirs >= most:
            return errno.EUSERS, f"too many connections of uid {caller.uid} ({most})"
        if caller.uid == ROOT:
            return None
        if sum(1 for each in self.known.values() if each.caller.uid != ROOT) >= MAX_CLIENTS:
            return errno.EUSERS, f"too many connections to vmd ({MAX_CLIENTS})"
        if caller.uid not in self.controls and self._count_stuck(caller.uid) >= STUCK_MAX:
            what = f"{STUCK_MAX} processes for uid {caller.uid} hang in files that were passed to vmd"
            return errno.EBUSY, f"{what}: their storage does not answer"
        if caller.uid not in self.controls and len(self.controls.keys() - {ROOT, DOORMAN}) >= MAX_USERS:
            return errno.EUSERS, f"too many users of vmd at a time ({MAX_USERS})"
        return None

    def _number(self) -> int:
        """Return the number of a new connection; a number comes again only after four billion others."""
        while self._next in self.known:
            self._next = self._next % (NO_CLIENT - 1) + 1
        number = self._next
        self._next = self._next % (NO_CLIENT - 1) + 1
        return number

    def caller(self, number: int, channel: "Channel") -> Caller:
        """Return who asks under a number.  Raises PeerError if the number is not of that control's connections."""
        known = self.known.get(number)
        if known is None or known.control.channel is not channel:
            raise PeerError(channel.label, f"speaks for client {number}, which it does not have")
        known.control.silent = 0
        return known.caller

    def asker(self, number: int, channel: "Channel") -> Caller:
        """Return who has sent a request, and count it.  Raises PeerError as `caller`, and if there are too many."""
        caller = self.caller(number, channel)
        known = self.known[number]
        known.unanswered += 1
        if known.unanswered > MAX_UNANSWERED:
            raise PeerError(channel.label, f"has more than {MAX_UNANSWERED} requests of client {number} to be answered")
        return caller

    def on_client_gone(self, number: int, channel: "Channel") -> None:
        """A control has lost a client, or turned it away.  Raises PeerError if that was none of its clients."""
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
        """Send what is for the client of a number, if it is still there, and with number 0 to every control."""
        if peerid:
            known = self.known.get(peerid)
            if known is None:
                for each in fds.values():
                    close_all(each)
            else:
                info = BY_CLASS[type(message)]
                if info.is_answer and not info.partial:
                    known.unanswered = max(0, known.unanswered - 1)  # a lost console is told of unasked
                known.control.channel.send(message, peerid=peerid, fds=fds)
            return
        for channel in list(self._channels()):
            channel.send(message)

    def flush_blocking(self, timeout_s: float) -> None:
        """Send what is queued."""
        for channel in self._channels():
            channel.flush_blocking(timeout_s)

    def _channels(self) -> "Iterable[Channel]":
        return list(self._all)

    def close(self) -> None:
        """Accept nobody any more; controls that end are not missed."""
        self.ending = True
        listener, self._listener = self._listener, None
        if listener is not None:
            self.loop.remove(listener.fileno())
            listener.close()
            if self._spare != NONE:
                close(self._spare)


def title_of(user: int) -> str:
    """Return the title of the control of a user."""
    return {ROOT: "control", DOORMAN: "control/refused"}.get(user, f"control/{user}")
