"""metrics: serves the activity and resource usage of VMs by HTTP.

Runs as  an id of its own, in the cell, without files
Peers    parent (sends sockets and figures, gets requests for figures); every client that can connect, none trusted
Holds    the listening sockets, which the parent has made, and the connections of clients
"""

import socket
import time
from functools import partial

from vmd.closing import close_all
from vmd.exposition import expose
from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.loop import READ, WRITE
from vmd.ipc.messages.children import Quit
from vmd.ipc.messages.figures import VmFigures
from vmd.ipc.messages.metrics import AllFigures, AskFigures, MetricsAt
from vmd.ipc.process import Process, handles
from vmd.ipc.routes import Proc
from vmd.metrics.http import REQUEST_BYTES_MAX, Asked, BadRequest, page, parse, refusal
from vmd.privsep.confine import METRICS, confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.loop import Timer
    from vmd.ipc.process import Handlers

CLIENTS_MAX = 32
BATCH = 16  # connections accepted before other events are served
REQUEST_S = 10.0  # for a client to send its request
FIGURES_S = 10.0  # for the parent to answer
TAKE_S = 30.0  # for a client to receive the answer
HANG_UP_S = 2.0  # for a client to close the connection after that
FRESH_S = 1.0  # so long one answer of the parent serves all clients


class Client:
    """One connection, from its request to its end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data = bytearray()  # of the request, until it is complete
        self.asked: Asked | None = None  # the request, while it waits for figures
        self.answer: list[memoryview] | None = None  # what is left to send
        self.timer: Timer | None = None

    @property
    def idle(self) -> bool:
        """Whether its request is not complete yet, or its answer is sent."""
        return self.asked is None and not self.answer


class Metrics(Process):
    """Serves clients.  Asks the parent for figures once for all waiting clients, at most once a second."""

    def __init__(self) -> None:
        super().__init__(Proc.METRICS)
        self.listeners: list[socket.socket] = []
        self.accepts = False
        self.clients: dict[Client, None] = {}  # oldest first
        self.asking = False  # the parent has not answered yet
        self.rows: list[VmFigures] = []  # the part of its answer that has arrived
        self.texts: dict[bool, bytes] = {}  # pages from the last answer, by whether they are OpenMetrics
        self.vms: list[VmFigures] = []
        self.at_s = -FRESH_S  # when the last answer came
        self.parent = self.attach_parent(Proc.PARENT)

    # --- the parent --------------------------------------------------------------------------------------

    def on_at(self, _message: MetricsAt, envelope: Envelope, _channel: Channel) -> None:
        """Listen on these sockets instead of the present ones."""
        fds = envelope.take_fds("sockets")
        self.accept(accepts=False)
        for listener in self.listeners:
            listener.close()
        self.listeners = []
        try:
            while fds:
                self.listeners.append(socket.socket(fileno=fds[0]))
                fds.pop(0)
        finally:
            close_all(fds)
        for listener in self.listeners:
            listener.setblocking(False)
        self.accept(accepts=True)

    def ask(self) -> None:
        """Serve the waiting clients, at once if the figures are fresh, else when the parent has answered."""
        if time.monotonic() < self.at_s + FRESH_S:
            self.serve()
        elif not self.asking:
            self.asking = True
            self.rows = []
            self.parent.send(AskFigures())

    def on_figures(self, message: VmFigures, _envelope: Envelope, _channel: Channel) -> None:
        """The figures of one VM have arrived."""
        self.rows.append(message)

    def on_end(self, _message: AllFigures, _envelope: Envelope, _channel: Channel) -> None:
        """The answer of the parent is complete."""
        self.asking = False
        self.vms, self.rows = self.rows, []
        self.texts.clear()
        self.at_s = time.monotonic()
        self.serve()

    def text(self, *, openmetrics: bool) -> bytes:
        """Return the page with the last figures in a format.  It is made once for all clients."""
        if openmetrics not in self.texts:
            self.texts[openmetrics] = expose(self.vms, openmetrics=openmetrics).encode("utf-8", "replace")
        return self.texts[openmetrics]

    def serve(self) -> None:
        """Answer all waiting clients."""
        for client in [client for client in self.clients if client.asked is not None]:
            asked = client.asked
            assert asked is not None
            self.answer(client, page(asked, self.text(openmetrics=asked.openmetrics)))

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """The daemon ends, or metrics were switched off."""
        self.loop.stop()

    HANDLERS: "Handlers" = {
        **handles(Proc.PARENT, MetricsAt, on_at),
        **handles(Proc.PARENT, VmFigures, on_figures),
        **handles(Proc.PARENT, AllFigures, on_end),
        **handles(Proc.PARENT, Quit, on_quit),
    }

    # --- clients -----------------------------------------------------------------------------------------

    def accept(self, *, accepts: bool) -> None:
        """Start or stop accepting connections."""
        if accepts == self.accepts:
            return
        self.accepts = accepts
        for listener in self.listeners:
            if accepts:
                self.loop.add(listener.fileno(), partial(self.on_connect, listener))
            else:
                self.loop.remove(listener.fileno())

    def on_connect(self, listener: socket.socket, _events: int) -> None:
        """Accept new clients.  If there are too many, they replace the idle clients that have waited longest."""
        for _ in range(BATCH):
            idle = None
            if len(self.clients) == CLIENTS_MAX:
                idle = next((client for client in self.clients if client.idle), None)
                if idle is None:
                    self.accept(accepts=False)  # until a client that is served has gone
                    return
            try:
                sock, _ = listener.accept()
            except OSError:  # no client, or it has closed the connection already
                return
            if idle is not None:
                self.end(idle)
            sock.setblocking(False)
            client = Client(sock)
            self.clients[client] = None
            self.give_time(client, REQUEST_S)
            self.loop.add(sock.fileno(), partial(self.on_ready, client))

    def give_time(self, client: Client, time_s: float) -> None:
        """Set the time that a client has for its next step."""
        if client.timer is not None:
            client.timer.cancel()
        client.timer = self.loop.call_later(time_s, lambda: self.on_late(client))

    def on_late(self, client: Client) -> None:
        """A client has taken too long: close its connection."""
        if client.asked is not None:
            self.answer(client, refusal(503))
        else:
            self.end(client)

    def on_ready(self, client: Client, events: int) -> None:
        """Read the request of a client, or send its answer."""
        if client.answer and events & WRITE:
            self.send(client)
        elif client.asked is not None or events & ~(READ | WRITE):
            self.end(client)  # it has closed the connection
        else:
            self.receive(client)

    def receive(self, client: Client) -> None:
        """Read from a client.  A client that has its answer should only close the connection."""
        try:
            data = client.sock.recv(REQUEST_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.end(client)
        elif client.answer is None:
            client.data += data
            try:
                client.asked = parse(bytes(client.data))
            except BadRequest as error:
                self.answer(client, refusal(error.status))
                return
            if client.asked is not None:
                self.loop.modify(client.sock.fileno(), 0)
                self.give_time(client, FIGURES_S)
                self.ask()

    def answer(self, client: Client, pieces: list[bytes]) -> None:
        """Begin to send an answer to a client."""
        client.asked = None
        client.answer = [memoryview(piece) for piece in pieces]
        self.loop.modify(client.sock.fileno(), WRITE)
        self.give_time(client, TAKE_S)
        self.send(client)

    def send(self, client: Client) -> None:
        """Send as much as the client takes.  Then wait for it to close, because a close by us could lose bytes."""
        assert client.answer is not None
        try:
            while client.answer:
                client.answer[0] = client.answer[0][client.sock.send(client.answer[0]) :]
                if not client.answer[0]:
                    del client.answer[0]
            client.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError:
            self.end(client)
            return
        self.loop.modify(client.sock.fileno(), READ)
        self.give_time(client, HANG_UP_S)

    def end(self, client: Client) -> None:
        """Close the connection of a client."""
        if client not in self.clients:
            return
        del self.clients[client]
        if client.timer is not None:
            client.timer.cancel()
        self.loop.remove(client.sock.fileno())
        client.sock.close()
        self.accept(accepts=True)


def main() -> int:
    """Run process metrics."""
    process = Metrics()
    process.ignore_terminal_signals()
    confine(METRICS)  # the parent has logged what this kernel lacks
    process.loop.run()
    return process.exit_status
