"""The process "metrics", and the sockets at which it serves figures by HTTP (`metrics listen`)."""

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
    from vmd.parent.vmtable import Vm

BACKLOG = 64
BATCH = 16  # VMs of which the process is told at a time
NOBODY = Caller(uid=(1 << 32) - 2, gid=(1 << 32) - 2, pid=0)  # sees what everybody may see
REST_S = 0.5  # between two answers: a process that was taken over cannot keep us busy
AGAIN_S = (0.1, 0.2, 0.4, 1.0, 15.0)  # until a socket is opened again; then always after the last of them
QUIET = 3  # tries at an address that is in use: a daemon whose place we take may still have it


class Metrics:
    """Opens what vm.conf says and, while there is any, has a process serve it.  `attach` is the parent's."""

    def __init__(self, core: "Core", figures: "Figures", attach: "Callable[..., Channel]") -> None:
        self.core = core
        self.figures = figures
        self._attach = attach
        self._wanted: tuple[Listen, ...] = ()
        self._owner: Owner | None = None
        self._sockets: dict[Listen, socket.socket] = {}
        self._tries: dict[Listen, int] = {}  # that have failed
        self._opening: Timer | None = None
        self._channel: Channel | None = None
        self._delay = Delay()
        self._starting: Timer | None = None

    def start(self, children: "Children", open_log: "Callable[[str], socket.socket]") -> None:
        """Know how the process is started; `open_log` makes what it writes its lines to."""
        self.children, self.open_log = children, open_log

    def configure(self, settings: "Globals") -> None:
        """Serve what these settings say, and nothing else."""
        self._wanted, self._owner = settings.metrics, settings.socket_owner
        for place in [place for place in self._sockets if place not in self._wanted]:
            self._close(place)
        self._tries.clear()
        for place in self._sockets:
            if place.path:
                service.own_socket(place.path, settings.socket_owner)
        self._open()

    def close(self) -> None:
        """The daemon ends."""
        self._wanted = ()
        for place in list(self._sockets):
            self._close(place)
        self._tell()

    # --- sockets -----------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Open what is not open yet, and try again later where that fails."""
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
        """Have the process serve what is open; there is none when nothing is."""
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
            copies += [os.dup(each.fileno()) for each in self._sockets.values()]
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
        """It has ended, which it only should when it is told to, or cannot be trusted."""
        if channel is self._channel:
            self._channel = None
            self.children.kill(Proc.METRICS)
            log.error(f"{error or 'lost child: metrics'}: it is started again")
            self._start_soon()

    def on_asked(self, _message: AskFigures, channel: "Channel") -> None:
        """Tell the process what everybody may know of all VMs."""
        channel.hold(held=True)
        self._answer(channel, list(self.core.vms))

    def _answer(self, channel: "Channel", vms: "list[Vm]") -> None:
        """Tell of some VMs, and then of the others: clients are served in between."""
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
    """Return a socket that listens there.  Raises OSError, OperatorError or HostError."""
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
