"""The process `metrics`, and the sockets at which it serves figures by HTTP (`metrics listen`)."""

import errno
import os
import socket

from vmd.closing import close_all
from vmd.errors import PeerError, VmdError, number, sentence
from vmd.ipc.messages.children import Quit
from vmd.ipc.messages.clients import Caller
from vmd.ipc.messages.metrics import AllFigures, AskFigures, MetricsAt
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent import service
from vmd.parent.children import Delay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.config.model import Globals, Listen, Owner
    from vmd.ipc.channel import Channel
    from vmd.ipc.loop import Timer
    from vmd.parent.children import Children
    from vmd.parent.core import Core
    from vmd.parent.figures import Figures
    from vmd.parent.vm import Vm

BACKLOG = 64
BATCH = 16  # VMs that are sent to the process in one turn of the loop
NOBODY = Caller(uid=(1 << 32) - 2, gid=(1 << 32) - 2, pid=0)  # may see only figures that all users may see
REST_S = 0.5  # between two answers, so that a process that was taken over cannot keep the parent busy
AGAIN_S = (0.1, 0.2, 0.4, 1.0, 15.0)  # delays between tries to open a socket; the last one is repeated
QUIET = 3  # failed tries that are not logged if the address is in use: an earlier daemon may still have it


class Metrics:
    """Opens the sockets that vm.conf names.  While there are some, a process serves them.

    `attach` is the parent's `Process.attach`.
    """

    def __init__(self, core: "Core", figures: "Figures", attach: "Callable[..., Channel]") -> None:
        self.core = core
        self.figures = figures
        self._attach = attach
        self._wanted: tuple[Listen, ...] = ()
        self._owner: Owner | None = None
        self._sockets: dict[Listen, socket.socket] = {}
        self._tries: dict[Listen, int] = {}  # failed tries to open a socket
        self._opening: Timer | None = None
        self._channel: Channel | None = None
        self._delay = Delay()
        self._starting: Timer | None = None

    def start(self, children: "Children", open_log: "Callable[[str], socket.socket]") -> None:
        """The process can be started from now on.  `open_log` makes the socket that it logs to."""
        self.children, self.open_log = children, open_log

    def configure(self, settings: "Globals") -> None:
        """Serve the sockets that these settings name, and close others."""
        self._wanted, self._owner = settings.metrics, settings.socket_owner
        for place in [place for place in self._sockets if place not in self._wanted]:
            self._close(place)
        self._tries.clear()
        for place in self._sockets:
            if place.path:
                service.own_socket(place.path, settings.socket_owner)
        self._open()

    def close(self) -> None:
        """The daemon ends: close all sockets, and end the process."""
        self._wanted = ()
        for place in list(self._sockets):
            self._close(place)
        self._tell()

    # --- sockets -----------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Open the sockets that are not open yet.  Try again later for those that fail."""
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        for place in self._wanted:
            if place not in self._sockets:
                self._try(place)
        self._tell()
        missing = [self._tries[place] for place in self._wanted if place not in self._sockets]
        if missing:
            delay_s = AGAIN_S[min(*missing, len(AGAIN_S)) - 1]
            self._opening = self.core.loop.call_later(delay_s, self._open)

    def _try(self, place: "Listen") -> None:
        tried = self._tries.get(place, 0)
        try:
            self._sockets[place] = listen(place, self._owner)
        except (VmdError, OSError) as error:
            self._tries[place] = tried + 1
            if tried == (QUIET if number(error) == errno.EADDRINUSE else 0):
                log.warn(f"metrics listen {place}: {sentence(error)}: trying again")
        else:
            log.info(f"metrics are served at {place}")

    def _close(self, place: "Listen") -> None:
        self._sockets.pop(place).close()
        if place.path:
            service.remove_socket(place.path)

    # --- the process -------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Give the process the open sockets.  Start it if there are some, and end it if there are none."""
        if not self._sockets:
            if self._channel is not None:
                self._channel.send(Quit())
                self._channel.finish()
                self._channel = None
            return
        if self._channel is None:
            self._start_soon()
            return
        copies: list[int] = []
        try:
            copies += (os.dup(each.fileno()) for each in self._sockets.values())
        except OSError as error:
            close_all(copies)
            log.error(f"metrics: cannot pass on its sockets: {sentence(error)}")
            return
        self._channel.send(MetricsAt(), fds={"sockets": copies})

    def _start_soon(self) -> None:
        if self._starting is None:
            self._starting = self.core.loop.call_later(self._delay.next_s(), self._start)

    def _start(self) -> None:
        self._starting = None
        if not self._sockets or self._channel is not None:
            return
        try:
            _, ours = self.children.start(Proc.METRICS, self.open_log)
        except (VmdError, OSError) as error:
            log.error(f"metrics cannot be started: {sentence(error)}")
            self._start_soon()
            return
        self._channel = self._attach(ours, Proc.METRICS, "metrics", on_lost=self._on_lost, in_step=True, batch=1)
        self._tell()

    def _on_lost(self, channel: "Channel", error: PeerError | None) -> None:
        """The process has ended too early, or broke the protocol: start another one."""
        if channel is self._channel:
            self._channel = None
            self.children.kill(Proc.METRICS)
            log.error(f"{error or 'lost child: metrics'}: it is started again")
            self._start_soon()

    def on_asked(self, _message: AskFigures, channel: "Channel") -> None:
        """Send the process the figures of all VMs that all users may see."""
        channel.hold(held=True)
        self._answer(channel, list(self.core.vms))

    def _answer(self, channel: "Channel", vms: "list[Vm]") -> None:
        """Send VMs in batches, so that other messages are served in between."""
        there = [vm for vm in vms[:BATCH] if self.core.vms.find(0, vm.name) is vm]
        for figures in self.figures.of(there, NOBODY):
            channel.send(figures)
        left = vms[BATCH:]
        if left:
            self.core.loop.call_later(0, lambda: self._answer(channel, left))
            return
        channel.send(AllFigures())
        self.core.loop.call_later(REST_S, lambda: channel.hold(held=False))


def listen(place: "Listen", owner: "Owner | None") -> socket.socket:
    """Return a listening socket, which the caller owns.  Raises OSError, OperatorError or HostError."""
    if place.path:
        assert owner is not None
        return service.listen(place.path, owner, what="socket", kind=socket.SOCK_STREAM)
    family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((place.address, place.port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
