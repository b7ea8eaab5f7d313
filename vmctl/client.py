"""The connection to vmd: one packet is one message; blocking, since vmctl has nothing else to do."""

# `socket` itself makes enumerations of all its constants: a tenth of the time of a command.
import _socket as socket
import errno
import os
import select
import struct
import types

from vmctl.errors import CommandError, NoDaemon, Refused
from vmctl.output import warn
from vmd.config.model import SOCKET_PATH_MAX
from vmd.errors import PeerError, sentence
from vmd.ipc import first
from vmd.ipc.imsg import MAX_MESSAGE, Form, UnknownMessage, decode, encode
from vmd.ipc.messages.clients import (
    PROTOCOL,
    Failed,
    FiguresRequest,
    GenerationInfo,
    GenerationsRequest,
    Hello,
    ListRequest,
    NicInfo,
    NicsRequest,
    SwitchesRequest,
    SwitchInfo,
    TroubleInfo,
    VmInfo,
)
from vmd.ipc.messages.figures import VmFigures
from vmd.ipc.routes import BY_CLASS, Proc
from vmd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeVar

    from vmd.record import Record

    R = TypeVar("R", bound=Record)

NOBODY = (errno.ENOENT, errno.ECONNREFUSED)  # what a connection fails with that nobody waits for
PEER = "vmd"  # whose fault it is when the protocol breaks
ROUTE = (Proc.CONTROL, Proc.CLIENT)
LOOK_UP_MS = 500  # how often a wait is left for a signal that came just before it, and could not end it
NO_FDS: "Mapping[str, Sequence[int]]" = types.MappingProxyType({})


class Client:
    """One connection.  Raises CommandError when there is, or is left, no daemon to talk to.

    `daemon` is what the daemon said of itself.  It is None for a daemon that was started before there was a Hello:
    such a one hangs up on it, and is spoken to as its own vmctl did.
    """

    def __init__(self, path: str, *, verbose: bool = False) -> None:
        """Connect.  Raises CommandError; Refused, if this client is turned away."""
        self.path = path
        self.verbose = verbose
        self._begin()

    def _begin(self) -> None:
        self.daemon: Hello | None = None
        self._form = Form.NAMED
        self._sock = self._connect()
        try:
            self.send(Hello(version=PROTOCOL, program=VERSION))
            self.daemon = self.answer(Hello)
        except HungUp:
            self._sock.close()
            self._form = Form.FIRST
            self._sock = self._connect()
            self._note("this vmd is older than vmctl")
        except BaseException:
            self._sock.close()
            raise

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(self.path)
        except OSError as error:
            sock.close()
            sentence = f"connect: {self.path}: {connect_trouble(self.path, error)}"
            if error.errno in NOBODY:
                raise NoDaemon(sentence, error.errno) from None
            raise CommandError(sentence, error.errno) from None
        self._note(f"connected to {self.path}")
        return sock

    def connect_again(self) -> None:
        """Connect to the daemon that takes the place of one that has hung up.  Raises CommandError if none does."""
        self._sock.close()
        self._begin()

    def close(self) -> None:
        """Hang up; whatever the daemon kept for us, such as a console, it takes back."""
        self._sock.close()

    def fileno(self) -> int:
        """Return the descriptor to poll for messages that come unasked."""
        return self._sock.fileno()

    def send(self, message: "Record", fds: "Mapping[str, Sequence[int]]" = NO_FDS) -> None:
        """Send a message; descriptors stay the caller's.  Raises CommandError, also for what is new to this daemon."""
        unknown = first.unknown_in(message) if self._form is Form.FIRST else ""
        if unknown:
            raise CommandError(f"{self.path}: this vmd is older than vmctl, and knows no {unknown}", errno.ENOSYS)
        try:
            packet, order = encode(message, pid=os.getpid(), fds=fds, form=self._form)
        except ValueError:
            raise CommandError(f"{type(message).__name__} is too long for one message") from None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(order)}i", *order))] if order else []
        self._note(f"sent {type(message).__name__}")
        try:
            self._sock.sendmsg([packet], rights)
        except (BrokenPipeError, ConnectionResetError):
            return  # turned away: the reason can still be received
        except OSError as error:
            raise CommandError(f"{self.path}: {sentence(error)}", error.errno) from None

    def receive(self) -> "Record":
        """Return the next message.  Raises PeerError if it is none that a daemon sends."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        try:
            while not poll.poll(LOOK_UP_MS):
                pass
            try:
                packet = self._sock.recv(MAX_MESSAGE)
            except ConnectionResetError:
                # The daemon closed without reading our last request; its last words come after this error.
                packet = self._sock.recv(MAX_MESSAGE)
        except OSError as error:
            raise self._hung_up(error.errno) from None
        if not packet:
            raise self._hung_up(errno.EPIPE)
        try:
            message = decode(packet, [], PEER).message
        except UnknownMessage as error:
            theirs = f" {self.daemon.program}" if self.daemon else ""
            raise PeerError(f"{PEER}{theirs}", f"{error.what}, which vmctl {VERSION} does not know") from None
        name = type(message).__name__
        if ROUTE not in BY_CLASS[type(message)].routes:
            raise PeerError(PEER, f"sent {name}, which is not for clients")
        self._note(f"received {name}")
        return message

    def _hung_up(self, number: int | None) -> "HungUp":
        older = ": this vmd is older than vmctl, and may not know the request" if self._form is Form.FIRST else ""
        return HungUp(f"pipe closed{older}", number)

    def answer(self, *expected: "type[R]") -> "R":
        """Return the next message if it is one of those expected.  Raises Refused, PeerError."""
        message = self.receive()
        if isinstance(message, Failed):
            raise Refused(message.code, failed_text(message))
        if isinstance(message, expected):
            return message
        names = " or ".join(each.__name__ for each in expected)
        raise PeerError(PEER, f"sent {type(message).__name__} where {names} was due")

    def ask(
        self,
        request: "Record",
        *expected: "type[R]",
        fds: "Mapping[str, Sequence[int]]" = NO_FDS,
        meanwhile: "Callable[[], object] | None" = None,
    ) -> "R":
        """Send a request and return its answer, or the first of them.  Raises Refused, PeerError.

        All answers that are declared are to be `expected`, but for Failed; those that are not are not taken.
        `meanwhile` is called while the daemon is at work.
        """
        answers = BY_CLASS[type(request)].answers
        assert {Failed, *expected} >= set(answers), f"{type(request).__name__} is answered by {answers}, too"
        self.send(request, fds)
        if meanwhile is not None:
            meanwhile()
        return self.answer(*(each for each in expected if each in answers))

    def _rows(self, request: "Record") -> "list[Record]":
        """Send a request and return all that it is answered by but the last.  Raises Refused, PeerError."""
        self.send(request)
        answers: tuple[type[Record], ...] = BY_CLASS[type(request)].answers
        rows: list[Record] = []
        while True:
            row = self.answer(*answers)
            if not BY_CLASS[type(row)].partial:
                return rows
            rows.append(row)

    def list_vms(self) -> list[VmInfo]:
        """Return every VM the daemon knows.  Raises Refused, PeerError."""
        return [row for row in self._rows(ListRequest()) if isinstance(row, VmInfo)]

    def figures(self, vmid: int = 0, name: str = "") -> list[VmFigures]:
        """Return what a VM has done and what it uses; without one what every VM has.  Raises Refused, PeerError."""
        return [row for row in self._rows(FiguresRequest(vmid=vmid, name=name)) if isinstance(row, VmFigures)]

    def list_switches(self) -> list[SwitchInfo]:
        """Return every switch of the configuration.  Raises Refused, PeerError."""
        return [row for row in self._rows(SwitchesRequest()) if isinstance(row, SwitchInfo)]

    def list_generations(self) -> list[GenerationInfo]:
        """Return every generation of VMs, the newest last.  Raises Refused, PeerError."""
        return [row for row in self._rows(GenerationsRequest()) if isinstance(row, GenerationInfo)]

    def list_devices(self, vmid: int) -> tuple[list[NicInfo], list[TroubleInfo]]:
        """Return the network interfaces of a VM, and what is wrong with its devices.  Raises Refused, PeerError."""
        rows = self._rows(NicsRequest(vmid=vmid))
        return [row for row in rows if isinstance(row, NicInfo)], [row for row in rows if isinstance(row, TroubleInfo)]

    def _note(self, text: str) -> None:
        if self.verbose:
            warn(text)


class HungUp(NoDaemon):
    """The daemon has closed the connection."""


def failed_text(message: Failed) -> str:
    """Return the sentence of a failure; an errno without one speaks for itself."""
    return message.text or os.strerror(message.code)


def connect_trouble(path: str, error: OSError) -> str:
    """Return why there is no connection, and what to look at."""
    if error.errno is None:
        # Python's own: the path does not fit a socket address.
        return f"it has {len(os.fsencode(path))} bytes, and at most {SOCKET_PATH_MAX} are possible"
    reason = os.strerror(error.errno)
    if error.errno in NOBODY:
        return f"{reason}: is vmd running?"
    if error.errno == errno.EACCES:
        return reason + socket_owner(path)
    return reason


def socket_owner(path: str) -> str:
    """Return whom a socket we may not use belongs to, as the end of a sentence."""
    import grp
    import pwd

    try:
        status = os.stat(path)
    except OSError:
        return ""  # it is the directory that keeps us out
    try:
        user = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        user = str(status.st_uid)
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    return f": the socket is for user {user} and group {group}; 'socket owner' in vm.conf changes that"
