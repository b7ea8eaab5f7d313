"""The client library: what `vmctl` talks to vmd with, and any other program may (docs/client.md).

    from vmd.client import Client, Refused

    with Client() as vmd:
        vmd.start("web")
        for vm in vmd.list_vms():
            show(vm.name, vm.state)

Each request of the control socket is a method, which returns the daemon's answer: a record, whose fields are described
where it is declared (`vmd.ipc.messages.clients`).  A VM is given by its id, by its name, or by anything that has both
as `vmid` and `name`, such as VmInfo.  What can go wrong is a ClientError:

    ClientError     `what` is the sentence for people, `number` an errno or a VMD_* code (0: none)
      NoDaemon      nobody serves the socket
        HungUp      ... any longer: the daemon has closed the connection
      Refused       the daemon has not done it, and says why
      TimedOut      the daemon has not answered within `timeout_s`; the connection is closed
    PeerError       what came is none that a vmd sends (`vmd.errors`)

What is listed in `__all__` stays.  Records travel by name: fields are added, with defaults, and a daemon of another
version leaves out those that it does not know.  A daemon that does not know a request refuses it with ENOSYS.

A Client is one connection, for one thread.  One packet is one message, and a request blocks until it is answered.
"""

# `socket` itself makes enumerations of all its constants: a tenth of the time of a command.
import _socket as socket
import errno
import os
import select
import struct
import time
import types

from vmd.config.model import SOCKET_PATH_MAX, BootDevice, VmConfig
from vmd.errors import PeerError, VmdError, sentence
from vmd.ipc import first
from vmd.ipc.imsg import MAX_MESSAGE, Form, UnknownMessage, decode, encode
from vmd.ipc.messages.clients import (
    PROTOCOL,
    ConsoleAttached,
    ConsoleBreak,
    ConsoleLogAt,
    ConsoleLogRequest,
    ConsoleReady,
    ConsoleRequest,
    ConsoleWatch,
    ConsoleWatched,
    DiscInserted,
    DiscRequest,
    Event,
    EventsRequest,
    EventsSeen,
    Failed,
    FiguresRequest,
    GenerationInfo,
    GenerationsRequest,
    Hello,
    ListRequest,
    LoadRequest,
    LogRequest,
    MigrateInRequest,
    MigrateRequest,
    MigrationAt,
    MigrationStep,
    NicInfo,
    NicsRequest,
    Ok,
    PauseRequest,
    ReceiveRequest,
    ReloadRequest,
    ResetRequest,
    Resized,
    ResizeRequest,
    SendRequest,
    SnapshotRequest,
    SnapshotsDone,
    StartRequest,
    Step,
    StopAccepted,
    StopRequest,
    SwitchesRequest,
    SwitchInfo,
    TroubleInfo,
    UpgradeRequest,
    VmInfo,
    VmPaused,
    VmReceived,
    VmSent,
    VmStarted,
    VmTerminated,
    WaitRequest,
)
from vmd.ipc.messages.figures import VmFigures
from vmd.ipc.messages.shared import Live, SnapshotAction, SnapshotInfo, TransferProgress
from vmd.ipc.routes import BY_CLASS, Proc
from vmd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Any, Protocol, Self, TypeVar

    from vmd.record import Record

    R = TypeVar("R", bound=Record)
    Progress = Callable[[TransferProgress], object]

    class Named(Protocol):
        """What has the id and the name of a VM."""

        @property
        def vmid(self) -> int:
            """The id, or 0."""

        @property
        def name(self) -> str:
            """The name."""

    AnyVm = int | str | Named

__all__ = [
    "DEFAULT_SOCKET", "BootDevice", "Client", "ClientError", "ConsoleAttached", "ConsoleLogAt", "ConsoleWatched",
    "DiscInserted", "Event", "GenerationInfo", "Hello", "HungUp", "Live", "MigrationAt", "NicInfo", "NoDaemon", "Ok",
    "PeerError", "Refused", "Resized", "SnapshotInfo", "SnapshotsDone", "Step", "StopAccepted", "SwitchInfo",
    "TimedOut", "TransferProgress", "TroubleInfo", "VmConfig", "VmFigures", "VmInfo", "VmPaused", "VmReceived",
    "VmSent", "VmStarted", "VmTerminated",
]  # fmt: skip

DEFAULT_SOCKET = "/run/vmd.sock"
NOBODY = (errno.ENOENT, errno.ECONNREFUSED)  # what a connection fails with that nobody waits for
PEER = "vmd"  # whose fault it is when the protocol breaks
ROUTE = (Proc.CONTROL, Proc.CLIENT)
LOOK_UP_MS = 500  # how often a wait is left for a signal that came just before it, and could not end it
NO_FDS: "Mapping[str, Sequence[int]]" = types.MappingProxyType({})


class ClientError(VmdError):
    """A request was not answered as it should be: `what` is why, `number` an errno or a VMD_* code (0: none)."""

    def __init__(self, what: str, number: int | None = None) -> None:
        super().__init__(what, number)
        self.what = what
        self.number = number or 0

    def __str__(self) -> str:
        return self.what


class NoDaemon(ClientError):
    """Nobody serves the socket, or serves it any longer."""


class HungUp(NoDaemon):
    """The daemon has closed the connection."""


class Refused(ClientError):
    """The daemon has not done what it was asked for: its sentence, and its number."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text, number)
        self.text = text


class TimedOut(ClientError):
    """The daemon has not answered in time; whether it does what it was asked for is not known."""


class Client:
    """One connection.  Raises ClientError when there is, or is left, no daemon to talk to.

    `daemon` is what the daemon said of itself.  It is None for a daemon that was started before there was a Hello:
    such a one hangs up on it, and is spoken to as its own vmctl did.
    `timeout_s` is for how long an answer is waited for; None: as long as it takes.  It may be changed.
    `note` is called with a sentence for each message that comes or goes.
    """

    def __init__(
        self,
        path: str = DEFAULT_SOCKET,
        *,
        timeout_s: float | None = None,
        note: "Callable[[str], object] | None" = None,
    ) -> None:
        """Connect.  Raises ClientError; Refused, if this client is turned away."""
        self.path = path
        self.timeout_s = timeout_s
        self._note: Callable[[str], object] = note or (lambda _text: None)
        self._begin()

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: "TracebackType | None"
    ) -> None:
        self.close()

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
            raise ClientError(sentence, error.errno) from None
        self._note(f"connected to {self.path}")
        return sock

    def connect_again(self) -> None:
        """Connect to the daemon that takes the place of one that has hung up.  Raises ClientError if none does."""
        self._sock.close()
        self._begin()

    def close(self) -> None:
        """Hang up; whatever the daemon kept for us, such as a console, it takes back."""
        self._sock.close()

    def fileno(self) -> int:
        """Return the descriptor to poll for messages that come unasked."""
        return self._sock.fileno()

    # --- messages ----------------------------------------------------------------------------------------

    def send(self, message: "Record", fds: "Mapping[str, Sequence[int]]" = NO_FDS) -> None:
        """Send a message; descriptors stay the caller's.  Raises ClientError, also for what is new to this daemon."""
        unknown = first.unknown_in(message) if self._form is Form.FIRST else ""
        if unknown:
            raise ClientError(f"{self.path}: this vmd is older than vmctl, and knows no {unknown}", errno.ENOSYS)
        try:
            packet, order = encode(message, pid=os.getpid(), fds=fds, form=self._form)
        except ValueError:
            raise ClientError(f"{type(message).__name__} is too long for one message") from None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(order)}i", *order))] if order else []
        self._note(f"sent {type(message).__name__}")
        try:
            self._sock.sendmsg([packet], rights)
        except (BrokenPipeError, ConnectionResetError):
            return  # turned away: the reason can still be received
        except OSError as error:
            raise ClientError(f"{self.path}: {sentence(error)}", error.errno) from None

    def receive(self) -> "Record":
        """Return the next message.  Raises HungUp, TimedOut, and PeerError if it is none that a daemon sends."""
        try:
            self._wait()
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

    def _wait(self) -> None:
        """Wait for a message.  Raises TimedOut, OSError."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        due_s = None if self.timeout_s is None else time.monotonic() + self.timeout_s
        wait_ms: float = LOOK_UP_MS
        while True:
            if due_s is not None:
                wait_ms = min(LOOK_UP_MS, max(0.0, due_s - time.monotonic()) * 1000)
            if poll.poll(wait_ms):
                return
            if due_s is not None and time.monotonic() >= due_s:
                self.close()  # what comes now would be taken for the answer to something else
                raise TimedOut(f"vmd has not answered within {self.timeout_s:g} s", errno.ETIMEDOUT)

    def _hung_up(self, number: int | None) -> HungUp:
        older = ": this vmd is older than vmctl, and may not know the request" if self._form is Form.FIRST else ""
        return HungUp(f"pipe closed{older}", number)

    def answer(self, *expected: "type[R]") -> "R":
        """Return the next message if it is one of those expected.  Raises Refused, PeerError, and as `receive`."""
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
        """Send a request and return its answer, or the first of them.  Raises Refused, PeerError, and as `receive`.

        All answers that are declared are to be `expected`, but for Failed; those that are not are not taken.
        `meanwhile` is called while the daemon is at work.
        """
        answers = BY_CLASS[type(request)].answers
        assert {Failed, *expected} >= set(answers), f"{type(request).__name__} is answered by {answers}, too"
        self.send(request, fds)
        if meanwhile is not None:
            meanwhile()
        return self.answer(*(each for each in expected if each in answers))

    def carry_out(
        self,
        request: "Record",
        last: "type[R]",
        on_part: "Callable[[Any], object]" = lambda _part: None,
        fds: "Mapping[str, Sequence[int]]" = NO_FDS,
    ) -> "R":
        """Send a request and return the `last` answer to it; `on_part` is called with each that comes before that.

        Raises Refused, PeerError, and as `receive`.
        """
        self.send(request, fds)
        partial: tuple[type[Record], ...] = tuple(
            each for each in BY_CLASS[type(request)].answers if BY_CLASS[each].partial
        )
        while True:
            answer = self.answer(last, *partial)
            if isinstance(answer, last):
                return answer
            on_part(answer)

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

    # --- what there is -----------------------------------------------------------------------------------

    def list_vms(self) -> list[VmInfo]:
        """Return every VM that the daemon knows."""
        return [row for row in self._rows(ListRequest()) if isinstance(row, VmInfo)]

    def figures(self, vm: "AnyVm | None" = None) -> list[VmFigures]:
        """Return what every VM, or one, has done and what it uses."""
        rows = self._rows(FiguresRequest(**({} if vm is None else names(vm))))
        return [row for row in rows if isinstance(row, VmFigures)]

    def list_switches(self) -> list[SwitchInfo]:
        """Return every switch of the configuration."""
        return [row for row in self._rows(SwitchesRequest()) if isinstance(row, SwitchInfo)]

    def list_generations(self) -> list[GenerationInfo]:
        """Return every generation of VMs, the newest last."""
        return [row for row in self._rows(GenerationsRequest()) if isinstance(row, GenerationInfo)]

    def list_devices(self, vm: "AnyVm") -> tuple[list[NicInfo], list[TroubleInfo]]:
        """Return the network interfaces of a VM, and what is wrong with its devices."""
        rows = self._rows(NicsRequest(**names(vm)))
        return [row for row in rows if isinstance(row, NicInfo)], [row for row in rows if isinstance(row, TroubleInfo)]

    def past_events(self, vm: "AnyVm | None" = None) -> list[Event]:
        """Return what has happened to all VMs, or to one, as far as the daemon remembers it."""
        found: list[Event] = []
        seen = EventsSeen(vmid=0, number=0, newest=1)
        while seen.number < seen.newest:
            request = EventsRequest(**({} if vm is None else names(vm)), since=seen.number, wait=False)
            seen = self.carry_out(request, EventsSeen, found.append)
        return found

    def events(self, vm: "AnyVm | None" = None, *, past: bool = False) -> "Iterator[Event]":
        """Return all that happens from now on, to all VMs and the daemon or to one VM, without an end.

        With `past`, what the daemon remembers comes first.  `timeout_s` is for how long nothing may happen.  Nothing
        else can be asked of this connection before HungUp, with which the next daemon's events begin anew.
        Events that were not read in time are forgotten; one that is called `lost` has their number.
        """
        request = EventsRequest(**({} if vm is None else names(vm)), wait=False)
        seen = self.carry_out(request, EventsSeen)
        return self._events(seen.vmid, 0 if past else seen.number)

    def _events(self, vmid: int, since: int) -> "Iterator[Event]":
        while True:
            rows: list[Event] = []
            since = self.carry_out(EventsRequest(vmid=vmid, since=since), EventsSeen, rows.append).number
            yield from rows

    # --- lives -------------------------------------------------------------------------------------------

    def start(
        self,
        vm: "AnyVm",
        *,
        config: VmConfig | None = None,
        template: str = "",
        boot_device: BootDevice = BootDevice.AUTO,
        cmdline: str | None = None,
        kernel: int | str | None = None,
        initrd: int | str | None = None,
        seed: int | None = None,
        meanwhile: "Callable[[], object] | None" = None,
    ) -> VmStarted:
        """Start a VM; returns when its guest executes.

        One that is known is started as it is configured, but for `boot_device`, `cmdline` and the open files `kernel`
        and `initrd`, which count for one boot.  A new one is as `config` says, or as the VM `template` is where that
        says nothing; its paths are absolute, and `config.kernel` and `config.initrd` are the names of the open files.
        What is on a disk of the VM itself is named in words, such as `disk0:/vmlinuz`: for one boot by `kernel` and
        `initrd`, of a new VM in its `config`.
        With `config.seed`, `seed` is an open file with what that is made from (`vmd.seed.parts.SeedParts`, packed).
        """
        request = StartRequest(
            **names(vm),
            config=config,
            template=template,
            boot_device=boot_device,
            cmdline=cmdline,
            kernel=kernel if isinstance(kernel, str) else "",
            initrd=initrd if isinstance(initrd, str) else "",
        )
        boots = (("kernel", kernel), ("initrd", initrd), ("seed", seed))
        files = {name: [fd] for name, fd in boots if isinstance(fd, int)}
        started = self.ask(request, VmStarted, ConsoleReady, fds=files, meanwhile=meanwhile)
        assert isinstance(started, VmStarted)
        return started

    def stop(self, vm: "AnyVm", *, force: bool = False) -> StopAccepted | VmTerminated:
        """Ask the guest to shut down, or with `force` kill the VM; VmTerminated if it only waited for its start."""
        answer = self.ask(StopRequest(**names(vm), force=force), StopAccepted, VmTerminated)
        assert isinstance(answer, StopAccepted | VmTerminated)
        return answer

    def stop_and_wait(self, vm: "AnyVm", *, force: bool = False) -> VmTerminated:
        """Ask the guest to shut down, or with `force` kill the VM; returns when it is gone, with how it ended."""
        return self.carry_out(StopRequest(**names(vm), force=force, wait=True), VmTerminated)

    def wait(self, vm: "AnyVm") -> VmTerminated:
        """Return when a VM that runs is gone, with how it ended."""
        return self.ask(WaitRequest(**names(vm)), VmTerminated)

    def pause(self, vm: "AnyVm") -> VmPaused:
        """Have a VM stand still."""
        return self.ask(PauseRequest(**names(vm), paused=True), VmPaused)

    def unpause(self, vm: "AnyVm", *, force: bool = False) -> VmPaused:
        """Let a paused VM go on.

        With `force` also one that is in doubt, which does not run elsewhere, and one whose disks others have changed.
        """
        return self.ask(PauseRequest(**names(vm), paused=False, force=force), VmPaused)

    # --- the daemon --------------------------------------------------------------------------------------

    def reload(self) -> Ok:
        """Have the daemon read its main configuration file again."""
        return self.ask(ReloadRequest(), Ok)

    def load(self, path: str) -> Ok:
        """Have the daemon read a further configuration file; the path is absolute."""
        return self.ask(LoadRequest(path=path), Ok)

    def reset(self, *, vms: bool, switches: bool) -> Ok:
        """Have the daemon forget VMs, after terminating them, or switches, or both."""
        return self.ask(ResetRequest(vms=vms, switches=switches), Ok)

    def set_verbosity(self, verbosity: int) -> Ok:
        """Have every process of the daemon log little (0) or much (2)."""
        return self.ask(LogRequest(verbosity=verbosity), Ok)

    def rehearse_upgrade(self) -> Ok:
        """Find out whether the version that is installed now could take over."""
        return self.ask(UpgradeRequest(rehearse_only=True), Ok)

    def upgrade(self) -> None:
        """Have the version that is installed now take over, and connect to it; VMs run on."""
        try:
            self.ask(UpgradeRequest(), Ok)
        except HungUp:
            self.connect_again()

    # --- consoles ----------------------------------------------------------------------------------------

    def attach_console(self, vm: "AnyVm", *, force: bool = False) -> tuple[bytes, ConsoleAttached]:
        """Have the console of a VM, with `force` instead of whoever has it, until this connection ends.

        Returns what it showed last, and where it is: the terminal `tty` is opened with the caller's own rights.
        When somebody else takes it, Failed comes unasked.
        """
        shown: list[bytes] = []
        request = ConsoleRequest(**names(vm), force=force)
        attached = self.carry_out(request, ConsoleAttached, lambda output: shown.append(output.data))
        return b"".join(shown), attached

    def send_break(self, vm: "AnyVm") -> Ok:
        """Send a BREAK down the line of the console, which this connection has."""
        return self.ask(ConsoleBreak(**names(vm)), Ok)

    def watch_console(self, vm: "AnyVm", since: int | None = None) -> tuple[bytes, ConsoleWatched]:
        """Return what a console shows, without having it: at once what it showed last, or what comes after `since`.

        `since` is the `end` of an earlier answer; then there is an answer when there is more, or the VM has ended.
        """
        shown: list[bytes] = []
        request = ConsoleWatch(**names(vm), since=since)
        watched = self.carry_out(request, ConsoleWatched, lambda output: shown.append(output.data))
        return b"".join(shown), watched

    def find_console_log(self, vm: "AnyVm") -> ConsoleLogAt:
        """Return where the files are that the console of a VM is kept in, to be read with the caller's own rights."""
        return self.ask(ConsoleLogRequest(**names(vm)), ConsoleLogAt)

    # --- disks -------------------------------------------------------------------------------------------

    def resize(self, vm: "AnyVm", disk: str, size_bytes: int) -> Resized:
        """Make a disk larger: `disk0`, or the path of its image."""
        return self.ask(ResizeRequest(**names(vm), disk=disk, size_bytes=size_bytes), Resized)

    def insert_disc(self, vm: "AnyVm", path: str, *, force: bool = False) -> DiscInserted:
        """Put a disc into the CD-ROM drive, or with the path "" take it out; `force`: though its guest has locked it.

        The path is absolute.
        """
        return self.ask(DiscRequest(**names(vm), path=path, force=force), DiscInserted)

    def list_snapshots(self, vm: "AnyVm") -> list[SnapshotInfo]:
        """Return the snapshots of a VM's disks."""
        found: list[SnapshotInfo] = []
        self._snapshot(vm, SnapshotAction.LIST, "", found.append)
        return found

    def make_snapshot(self, vm: "AnyVm", tag: str, progress: "Progress | None" = None) -> SnapshotsDone:
        """Make a snapshot of a VM's disks, and of its machine if it runs."""
        return self._snapshot(vm, SnapshotAction.CREATE, tag, progress)

    def delete_snapshot(self, vm: "AnyVm", tag: str, progress: "Progress | None" = None) -> SnapshotsDone:
        """Delete a snapshot."""
        return self._snapshot(vm, SnapshotAction.DELETE, tag, progress)

    def go_back(self, vm: "AnyVm", tag: str, progress: "Progress | None" = None) -> SnapshotsDone:
        """Go back to a snapshot: what was written since then is lost."""
        return self._snapshot(vm, SnapshotAction.GO_BACK, tag, progress)

    def _snapshot(
        self, vm: "AnyVm", action: SnapshotAction, tag: str, on_part: "Callable[[Any], object] | None"
    ) -> SnapshotsDone:
        request = SnapshotRequest(**names(vm), action=action, tag=tag)
        return self.carry_out(request, SnapshotsDone, on_part or (lambda _part: None))

    # --- other hosts -------------------------------------------------------------------------------------

    def send_vm(
        self,
        vm: "AnyVm",
        stream: int,
        *,
        keep: bool = False,
        live: Live | None = None,
        progress: "Progress | None" = None,
    ) -> VmSent:
        """Write a running VM to an open file; it is gone then, or with `keep` goes on.  `live`: it runs meanwhile."""
        request = SendRequest(**names(vm), keep=keep, live=live)
        return self.carry_out(request, VmSent, progress or (lambda _part: None), {"stream": [stream]})

    def receive_vm(
        self, name: str, stream: int, *, paused: bool = False, progress: "Progress | None" = None
    ) -> VmReceived:
        """Read a VM from an open file; it goes on under this name, or with `paused` waits for that."""
        request = ReceiveRequest(name=name, paused=paused)
        return self.carry_out(request, VmReceived, progress or (lambda _part: None), {"stream": [stream]})

    def migrate(self, vm: "AnyVm", stream: int, *, live: Live | None = None) -> MigrationAt:
        """Begin to write a VM to an open file that goes on elsewhere; returns when the header is written.

        What follows is `migration_step`, from this connection.
        """
        request = MigrateRequest(**names(vm), live=live or Live())
        return self.carry_out(request, MigrationAt, fds={"stream": [stream]})

    def migrate_in(self, name: str, stream: int, *, force: bool = False) -> MigrationAt:
        """Begin to read a VM from an open file that goes on here; returns when its header has been judged.

        `force`: that the disks here are the sender's is taken on trust.
        """
        return self.carry_out(MigrateInRequest(name=name, force=force), MigrationAt, fds={"stream": [stream]})

    def migration_step(
        self,
        vm: "AnyVm",
        step: Step,
        *,
        locks_travel: bool = False,
        paused: bool = False,
        in_doubt: bool = False,
        text: str = "",
        progress: "Progress | None" = None,
    ) -> MigrationAt | VmSent | VmReceived:
        """Take a step of a migration; `MigrationStep` describes them."""
        self.send(
            MigrationStep(
                **names(vm), step=step, locks_travel=locks_travel, paused=paused, in_doubt=in_doubt, text=text
            )
        )
        while True:
            answer: Record = self.answer(TransferProgress, MigrationAt, VmSent, VmReceived)
            if isinstance(answer, MigrationAt | VmSent | VmReceived):
                return answer
            assert isinstance(answer, TransferProgress)
            if progress is not None:
                progress(answer)


def names(vm: "AnyVm") -> "dict[str, Any]":
    """Return how a request names a VM."""
    if isinstance(vm, int):
        return {"vmid": vm}
    return {"name": vm} if isinstance(vm, str) else {"vmid": vm.vmid, "name": vm.name}


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
