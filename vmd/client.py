"""The client library, with which `vmctl` and other programs talk to vmd (docs/client.md).

    from vmd.client import Client, Refused

    with Client() as vmd:
        vmd.start("web")
        for vm in vmd.list_vms():
            show(vm.name, vm.state)

For each request of the control socket there is a method.  It returns the daemon's answer, which is a record; its fields
are described where it is declared (`vmd.ipc.messages.clients`).  A VM is named by its id, by its name, or by an object
that has both as `vmid` and `name`, such as VmInfo.  The methods raise:

    ClientError     base; `what` is the sentence for people, `number` an errno or a VMD_* code (0: none)
      NoDaemon      no daemon serves the socket
        HungUp      the daemon has closed the connection
      Refused       the daemon has refused the request, and says why
      TimedOut      the daemon has not answered within `timeout_s`; the connection is closed
    PeerError       a message that no vmd sends (`vmd.errors`)

The names in `__all__` are stable.  Records travel by name: later versions may add fields, with defaults, and a daemon
of another version omits the fields that it does not know.  A daemon that does not know a request refuses it with
ENOSYS.

A Client is one connection, for one thread.  One packet is one message, and a request blocks until it is answered.
"""

# Not `socket`, whose enumerations of all its constants take a tenth of the time of a command.
import _socket as socket
import errno
import os
import select
import struct
import time
import types

from vmd.config.model import DEFAULT_SOCKET, SOCKET_PATH_MAX, BootDevice, VmConfig
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
        """An object with the id and the name of a VM."""

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

NOBODY = (errno.ENOENT, errno.ECONNREFUSED)  # errors of connect(2) if no daemon serves the socket
PEER = "vmd"  # the peer that a PeerError names
ROUTE = (Proc.CONTROL, Proc.CLIENT)
LOOK_UP_MS = 500  # longest single poll; between polls Python handles a signal that came just before one
NO_FDS: "Mapping[str, Sequence[int]]" = types.MappingProxyType({})


class ClientError(VmdError):
    """A request has failed.  `what` is the reason, `number` an errno or a VMD_* code (0: none)."""

    def __init__(self, what: str, number: int | None = None) -> None:
        super().__init__(what, number)
        self.what = what
        self.number = number or 0

    def __str__(self) -> str:
        return self.what


class NoDaemon(ClientError):
    """No daemon serves the socket, or the daemon has ended."""


class HungUp(NoDaemon):
    """The daemon has closed the connection."""


class Refused(ClientError):
    """The daemon has refused the request: its sentence and its number."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text, number)
        self.text = text


class TimedOut(ClientError):
    """The daemon has not answered in time.  It may or may not carry out the request."""


class Client:
    """One connection to the daemon.

    `daemon` is the daemon's Hello.  It is None for a daemon from before Hello existed.  Such a daemon hangs up at a
    Hello; then the client connects again and uses protocol 1, as the vmctl of that version did.
    `timeout_s` is how long to wait for an answer; None: for ever.  It may be changed.
    `note` is called with a sentence for each message that is sent or received.
    """

    def __init__(
        self,
        path: str = DEFAULT_SOCKET,
        *,
        timeout_s: float | None = None,
        note: "Callable[[str], object] | None" = None,
    ) -> None:
        """Connect.  Raises ClientError, or Refused if the daemon turns this client away."""
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
        """Connect again after the daemon has hung up, to its successor.  Raises ClientError if there is none."""
        self._sock.close()
        self._begin()

    def close(self) -> None:
        """Close the connection.  The daemon then gives up everything that it held for it, for example a console."""
        self._sock.close()

    def fileno(self) -> int:
        """Return the descriptor, to poll for messages that come without a request."""
        return self._sock.fileno()

    # --- messages ----------------------------------------------------------------------------------------

    def send(self, message: "Record", fds: "Mapping[str, Sequence[int]]" = NO_FDS) -> None:
        """Send a message.  The caller still owns the descriptors.

        Raises:
            ClientError: the message was not sent, or this daemon is too old for it.
        """
        unknown = first.unknown_in(message) if self._form is Form.FIRST else ""
        if unknown:
            raise ClientError(f"{self.path}: this vmd is older than vmctl, and does not know {unknown}", errno.ENOSYS)
        try:
            packet, order = encode(message, pid=os.getpid(), fds=fds, form=self._form)
        except ValueError:
            raise ClientError(f"{type(message).__name__} is too long for one message") from None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(order)}i", *order))] if order else []
        self._note(f"sent {type(message).__name__}")
        try:
            self._sock.sendmsg([packet], rights)
        except (BrokenPipeError, ConnectionResetError):
            return  # the daemon has turned us away; its reason can still be received
        except OSError as error:
            raise ClientError(f"{self.path}: {sentence(error)}", error.errno) from None

    def receive(self) -> "Record":
        """Return the next message.  Raises HungUp, TimedOut, and PeerError for a message that no daemon sends."""
        try:
            self._wait()
            try:
                packet = self._sock.recv(MAX_MESSAGE)
            except ConnectionResetError:
                # The daemon closed without reading our last request.  Its last message comes after this error.
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
                self.close()  # a late answer would be mistaken for the answer to another request
                raise TimedOut(f"vmd has not answered within {self.timeout_s:g} s", errno.ETIMEDOUT)

    def _hung_up(self, number: int | None) -> HungUp:
        older = ": this vmd is older than vmctl, and may not know the request" if self._form is Form.FIRST else ""
        return HungUp(f"pipe closed{older}", number)

    def answer(self, *expected: "type[R]") -> "R":
        """Return the next message, which must be an expected one.  Raises Refused, PeerError, and as `receive`."""
        message = self.receive()
        if isinstance(message, Failed):
            raise Refused(message.code, failed_text(message))
        if isinstance(message, expected):
            return message
        names = " or ".join(each.__name__ for each in expected)
        raise PeerError(PEER, f"sent {type(message).__name__} instead of {names}")

    def ask(
        self,
        request: "Record",
        *expected: "type[R]",
        fds: "Mapping[str, Sequence[int]]" = NO_FDS,
        meanwhile: "Callable[[], object] | None" = None,
    ) -> "R":
        """Send a request and return its first answer.  Raises Refused, PeerError, and as `receive`.

        `expected` must name all declared answers except Failed.  Classes that are not declared answers are ignored.
        `meanwhile` is called after the request was sent, before the answer is awaited.
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
        """Send a request and return its answer of class `last`.  `on_part` is called with each answer before that.

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
        """Send a request and return all its answers except the last one.  Raises Refused, PeerError."""
        self.send(request)
        answers: tuple[type[Record], ...] = BY_CLASS[type(request)].answers
        rows: list[Record] = []
        while True:
            row = self.answer(*answers)
            if not BY_CLASS[type(row)].partial:
                return rows
            rows.append(row)

    # --- lists -------------------------------------------------------------------------------------------

    def list_vms(self) -> list[VmInfo]:
        """Return all VMs that the daemon knows."""
        return [row for row in self._rows(ListRequest()) if isinstance(row, VmInfo)]

    def figures(self, vm: "AnyVm | None" = None) -> list[VmFigures]:
        """Return the counters and the resource use of all VMs, or of one."""
        rows = self._rows(FiguresRequest(**({} if vm is None else names(vm))))
        return [row for row in rows if isinstance(row, VmFigures)]

    def list_switches(self) -> list[SwitchInfo]:
        """Return all switches of the configuration."""
        return [row for row in self._rows(SwitchesRequest()) if isinstance(row, SwitchInfo)]

    def list_generations(self) -> list[GenerationInfo]:
        """Return all generations of VMs, the newest last."""
        return [row for row in self._rows(GenerationsRequest()) if isinstance(row, GenerationInfo)]

    def list_devices(self, vm: "AnyVm") -> tuple[list[NicInfo], list[TroubleInfo]]:
        """Return the network interfaces of a VM, and the problems of its devices."""
        rows = self._rows(NicsRequest(**names(vm)))
        return [row for row in rows if isinstance(row, NicInfo)], [row for row in rows if isinstance(row, TroubleInfo)]

    def past_events(self, vm: "AnyVm | None" = None) -> list[Event]:
        """Return the events of all VMs and the daemon, or of one VM, that the daemon remembers."""
        found: list[Event] = []
        seen = EventsSeen(vmid=0, number=0, newest=1)
        while seen.number < seen.newest:
            request = EventsRequest(**({} if vm is None else names(vm)), since=seen.number, wait=False)
            seen = self.carry_out(request, EventsSeen, found.append)
        return found

    def events(self, vm: "AnyVm | None" = None, *, past: bool = False) -> "Iterator[Event]":
        """Return an endless iterator over the events from now on, of all VMs and the daemon, or of one VM.

        With `past` it begins with the events that the daemon remembers.  It raises TimedOut if there is no event for
        `timeout_s`.  No other request can be made on this connection.  It ends with HungUp; the next daemon begins to
        count events again.
        Events that were not read in time are lost; an event named `lost` has their number.
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
        """Start a VM.  Returns when the guest runs.

        A known VM is started as it is configured.  `boot_device`, `cmdline`, and the open files `kernel` and `initrd`
        override that for one boot.
        A new VM is described by `config`; values that it leaves out are those of the VM `template`.  Its paths are
        absolute.  `config.kernel` and `config.initrd` are the names of the open files `kernel` and `initrd`.
        A file on a disk of the VM itself is named in words, for example `disk0:/vmlinuz`: for one boot as `kernel` or
        `initrd`, for a new VM in its `config`.
        With `config.seed`, `seed` is an open file with the parts of the seed (`vmd.seed.parts.SeedParts`, packed).
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
        """Ask the guest to shut down; with `force` kill the VM.

        Returns VmTerminated if the VM was still waiting for its start, and so has ended already.
        """
        answer = self.ask(StopRequest(**names(vm), force=force), StopAccepted, VmTerminated)
        assert isinstance(answer, StopAccepted | VmTerminated)
        return answer

    def stop_and_wait(self, vm: "AnyVm", *, force: bool = False) -> VmTerminated:
        """Ask the guest to shut down; with `force` kill the VM.  Returns how it ended, when it has ended."""
        return self.carry_out(StopRequest(**names(vm), force=force, wait=True), VmTerminated)

    def wait(self, vm: "AnyVm") -> VmTerminated:
        """Wait until a running VM has ended; return how it ended."""
        return self.ask(WaitRequest(**names(vm)), VmTerminated)

    def pause(self, vm: "AnyVm") -> VmPaused:
        """Pause a VM."""
        return self.ask(PauseRequest(**names(vm), paused=True), VmPaused)

    def unpause(self, vm: "AnyVm", *, force: bool = False) -> VmPaused:
        """Let a paused VM go on.

        `force` is for a VM in doubt, if the caller knows that it does not run at another host, and for a VM whose disks
        others have changed.
        """
        return self.ask(PauseRequest(**names(vm), paused=False, force=force), VmPaused)

    # --- the daemon --------------------------------------------------------------------------------------

    def reload(self) -> Ok:
        """Make the daemon read its main configuration file again."""
        return self.ask(ReloadRequest(), Ok)

    def load(self, path: str) -> Ok:
        """Make the daemon read another configuration file in addition.  `path` is absolute."""
        return self.ask(LoadRequest(path=path), Ok)

    def reset(self, *, vms: bool, switches: bool) -> Ok:
        """Make the daemon terminate and forget all VMs, or forget all switches, or both."""
        return self.ask(ResetRequest(vms=vms, switches=switches), Ok)

    def set_verbosity(self, verbosity: int) -> Ok:
        """Make all processes of the daemon log little (0) or much (2)."""
        return self.ask(LogRequest(verbosity=verbosity), Ok)

    def rehearse_upgrade(self) -> Ok:
        """Check whether the version that is installed now could take over."""
        return self.ask(UpgradeRequest(rehearse_only=True), Ok)

    def upgrade(self) -> None:
        """Let the version that is installed now take over, and connect to it.  VMs go on."""
        try:
            self.ask(UpgradeRequest(), Ok)
        except HungUp:
            self.connect_again()

    # --- consoles ----------------------------------------------------------------------------------------

    def attach_console(self, vm: "AnyVm", *, force: bool = False) -> tuple[bytes, ConsoleAttached]:
        """Attach to the console of a VM until this connection ends.  With `force` take it from another client.

        Returns the backlog, and where the console is.  The caller opens the terminal `tty` with its own rights.
        When another client takes the console, Failed comes without a request.
        """
        shown: list[bytes] = []
        request = ConsoleRequest(**names(vm), force=force)
        attached = self.carry_out(request, ConsoleAttached, lambda output: shown.append(output.data))
        return b"".join(shown), attached

    def send_break(self, vm: "AnyVm") -> Ok:
        """Send a BREAK to the guest's serial line.  This connection must have the console."""
        return self.ask(ConsoleBreak(**names(vm)), Ok)

    def watch_console(self, vm: "AnyVm", since: int | None = None) -> tuple[bytes, ConsoleWatched]:
        """Return output of a console without attaching to it: the backlog, or the output after `since`.

        `since` is the `end` of an earlier answer.  With it the call returns when there is more output, or when the VM
        has ended.
        """
        shown: list[bytes] = []
        request = ConsoleWatch(**names(vm), since=since)
        watched = self.carry_out(request, ConsoleWatched, lambda output: shown.append(output.data))
        return b"".join(shown), watched

    def find_console_log(self, vm: "AnyVm") -> ConsoleLogAt:
        """Return where the files of a VM's console log are.  The caller reads them with its own rights."""
        return self.ask(ConsoleLogRequest(**names(vm)), ConsoleLogAt)

    # --- disks -------------------------------------------------------------------------------------------

    def resize(self, vm: "AnyVm", disk: str, size_bytes: int) -> Resized:
        """Make a disk larger.  `disk` is for example `disk0`, or the path of its image."""
        return self.ask(ResizeRequest(**names(vm), disk=disk, size_bytes=size_bytes), Resized)

    def insert_disc(self, vm: "AnyVm", path: str, *, force: bool = False) -> DiscInserted:
        """Put a disc into the CD-ROM drive; with the path "" remove the disc.  Otherwise the path is absolute.

        `force` changes the disc even if the guest has locked the drive.
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
        """Go back to a snapshot.  All later writes to the disks are lost."""
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
        """Write a running VM to an open file.  Then the VM ends here; with `keep` it goes on.

        With `live` it runs while most of its memory is written.
        """
        request = SendRequest(**names(vm), keep=keep, live=live)
        return self.carry_out(request, VmSent, progress or (lambda _part: None), {"stream": [stream]})

    def receive_vm(
        self, name: str, stream: int, *, paused: bool = False, progress: "Progress | None" = None
    ) -> VmReceived:
        """Read a VM from an open file.  It goes on under `name`; with `paused` it stays paused."""
        request = ReceiveRequest(name=name, paused=paused)
        return self.carry_out(request, VmReceived, progress or (lambda _part: None), {"stream": [stream]})

    def migrate(self, vm: "AnyVm", stream: int, *, live: Live | None = None) -> MigrationAt:
        """Begin to migrate a VM to another host, by writing it to an open file.  Returns when the header is written.

        Go on with `migration_step`, on this connection.
        """
        request = MigrateRequest(**names(vm), live=live or Live())
        return self.carry_out(request, MigrationAt, fds={"stream": [stream]})

    def migrate_in(self, name: str, stream: int, *, force: bool = False) -> MigrationAt:
        """Begin to migrate a VM to this host, by reading it from an open file.  Returns when its header was checked.

        With `force` it is not checked that the disks here are the sender's.
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
        """Make the next step of a migration.  `MigrationStep` describes the steps."""
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
    """Return the fields with which a request names a VM."""
    if isinstance(vm, int):
        return {"vmid": vm}
    return {"name": vm} if isinstance(vm, str) else {"vmid": vm.vmid, "name": vm.name}


def failed_text(message: Failed) -> str:
    """Return the sentence of a failure; without one, the text of its errno."""
    return message.text or os.strerror(message.code)


def connect_trouble(path: str, error: OSError) -> str:
    """Return why the connection failed, and what the user can check."""
    if error.errno is None:
        # An error of Python itself: the path does not fit a socket address.
        return f"it has {len(os.fsencode(path))} bytes, and at most {SOCKET_PATH_MAX} are possible"
    reason = os.strerror(error.errno)
    if error.errno in NOBODY:
        return f"{reason}: is vmd running?"
    if error.errno == errno.EACCES:
        return reason + socket_owner(path)
    return reason


def socket_owner(path: str) -> str:
    """Return the owner of a socket that the user may not open, as the end of a sentence."""
    import grp
    import pwd

    try:
        status = os.stat(path)
    except OSError:
        return ""  # the user has no access to the directory
    try:
        user = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        user = str(status.st_uid)
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    return f": the socket is for user {user} and group {group}; 'socket owner' in vm.conf changes that"
