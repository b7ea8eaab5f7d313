"""Every message between any two processes, and who may send which (*cat. 1.8*).

A message is a frozen record, and all that concerns its way is declared here, once: who sends it, who passes it on and
who it is for, what it is answered by, and of whom it is served.  What processes relay, wait for and refuse follows from
that, and a test compares it with what they serve (their HANDLERS).

The code number is explicit and never reused.  Fields travel in order of declaration, or by name where the two may be of
different versions (`Hello`, `BY_NAME`).  The descriptors that ride along are named in the decorator: `"tty"` must be
there, `"kernel?"` may be, `"disks*"` is any number.

Requests of vmctl go client -> control -> parent as the same message.  `caller` is whatever the client
wrote, and nobody believes it: the parent has accepted the connection and knows whose it is.  The header's `peerid` is
the parent's number for the connection, and answers come back under it.
"""

import itertools
from enum import Enum, IntEnum

from vmd.config.model import BootDevice, DiskConfig, VmConfig
from vmd.fileid import FileId
from vmd.ipc.figures import (
    CdromFigures,
    DiskFigures,
    EntropyFigures,
    GroupFigures,
    NicFigures,
    VcpuFigures,
)
from vmd.record import Record, RecordType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeVar

    M = TypeVar("M", bound=RecordType)
    Path = tuple["Proc", ...]


class Proc(IntEnum):
    """The kinds of process; the first argument of a process on its command line is its lower-case name."""

    PARENT = 0
    CONTROL = 1
    VMM = 3
    PRIV = 4
    VM = 5
    CLIENT = 6  # vmctl
    LOG = 7
    OPENER = 8
    IMGWRITER = 9


# Codes of Failed beyond errno (*cat. 1.10*)
VMD_BIOS_MISSING = 1001
VMD_DISK_MISSING = 1002
VMD_VM_STOP_INVALID = 1004
VMD_CDROM_MISSING = 1005
VMD_CDROM_INVALID = 1006
VMD_PARENT_INVALID = 1007
VMD_CONSOLE_TAKEN = 1008
VMD_IN_DOUBT = 1009  # a VM that was to go on here may have done so

TEXT_BYTES_MAX = 4000  # of a sentence; with all else a message has it fits a packet


def brief(text: str, bytes_max: int = TEXT_BYTES_MAX) -> str:
    """Return a sentence cut to what a message has room for: names and reasons may come from anybody."""
    raw = text.encode("utf-8", "surrogateescape")
    return text if len(raw) <= bytes_max else raw[:bytes_max].decode("utf-8", "ignore") + " ..."


def fitting(lines: "Sequence[str]", lines_max: int, bytes_max: int) -> list[str]:
    """Return the first lines, each cut and at least one, and how many there are besides."""
    shown: list[str] = []
    for line in map(brief, lines[:lines_max]):
        bytes_max -= len(line.encode("utf-8", "surrogateescape")) + 1
        if bytes_max < 0 and shown:
            break
        shown.append(line)
    left = len(lines) - len(shown)
    return [*shown, f"and {left} more; see the log"] if left else shown


NO_CLIENT = 0xFFFFFFFF  # peerid of what the parent started by itself


class Who(Enum):
    """Of whom a request is served."""

    EVERYBODY = 0  # who may open the socket
    OWNER = 1  # of the VM that it names, or root
    ROOT = 2


class MessageInfo:
    """What was declared of one message class."""

    def __init__(
        self,
        code: int,
        cls: RecordType,
        paths: "tuple[Path, ...]",
        fds: tuple[str, ...],
        answered_by: tuple[str, ...],
        who: Who | None,
        *,
        partial: bool,
    ) -> None:
        self.code = code
        self.cls = cls
        self.paths = paths
        self.routes = tuple(hop for path in paths for hop in itertools.pairwise(path))  # (sender, receiver)
        self.fds = fds
        self.answered_by = answered_by
        self.answers: tuple[type[Any], ...] = ()  # those of `answered_by`
        self.is_answer = False
        self.partial = partial  # an answer after which more of the same request follow
        self.who = who  # None: it is no request


BY_CODE: dict[int, MessageInfo] = {}
BY_CLASS: "dict[type[Any], MessageInfo]" = {}


def message(
    code: int,
    *paths: "Path",
    fds: tuple[str, ...] = (),
    answered_by: tuple[str, ...] = (),
    who: Who | None = None,
    partial: bool = False,
) -> "Callable[[M], M]":
    """Declare a record as a message that travels on `paths`: who sends it, who passes it on, who it is for.

    It is answered by one of the messages of these names, after any number of `partial` ones; by none, if there are
    none.  All that processes do with messages besides serving them follows from this.
    """

    def register(cls: "M") -> "M":
        if code in BY_CODE:
            raise AssertionError(f"message code {code:#x} is taken by {BY_CODE[code].cls.__name__}")
        BY_CODE[code] = BY_CLASS[cls] = MessageInfo(code, cls, paths, fds, answered_by, who, partial=partial)
        return cls

    return register


def request(code: int, who: Who, *answered_by: str, fds: tuple[str, ...] = ()) -> "Callable[[M], M]":
    """Declare what a client may ask; each request may be answered by Failed, too."""
    return message(code, ASK, fds=fds, answered_by=(*answered_by, "Failed"), who=who)


def relays(proc: Proc, sender: Proc) -> "tuple[type[Any], ...]":
    """Return the messages of a sender that a process passes on."""
    return tuple(
        cls
        for cls, info in BY_CLASS.items()
        if any((sender, proc) in itertools.pairwise(path[:-1]) for path in info.paths)
    )


def accepted(proc: Proc) -> "set[tuple[Proc, type[Any]]]":
    """Return all that a process is sent, whether for itself or to pass on."""
    return {(sender, cls) for cls, info in BY_CLASS.items() for sender, receiver in info.routes if receiver is proc}


def _resolve() -> None:
    """Find the answers by their names, once all are declared."""
    by_name = {cls.__name__: cls for cls in BY_CLASS}
    for info in BY_CLASS.values():
        info.answers = tuple(by_name[name] for name in info.answered_by)
        for answer in info.answers:
            BY_CLASS[answer].is_answer = True


# Between whom fields travel by name: a vmm and its VMs may be of another version than parent.  What vmm relays keeps
# its form, and with it its length.
BY_NAME = (frozenset((Proc.PARENT, Proc.VMM)), frozenset((Proc.VMM, Proc.VM)))

# Who has started a process, and is trusted by it more than the other way round.
TRUSTED = {
    Proc.CONTROL: Proc.PARENT, Proc.VMM: Proc.PARENT, Proc.PRIV: Proc.PARENT, Proc.VM: Proc.VMM,
    Proc.CLIENT: Proc.CONTROL, Proc.LOG: Proc.PARENT, Proc.OPENER: Proc.PARENT,
    Proc.IMGWRITER: Proc.PARENT,
}  # fmt: skip

ASK = (Proc.CLIENT, Proc.CONTROL, Proc.PARENT)
ANSWER = (Proc.PARENT, Proc.CONTROL, Proc.CLIENT)
TO_VM = (Proc.PARENT, Proc.VMM, Proc.VM)
FROM_VM = (Proc.VM, Proc.VMM, Proc.PARENT)


# --- how a connection to the control socket begins -------------------------------------------------------

PROTOCOL = 2  # what Hello says; 1 is what was spoken before there was a Hello


@message(0x01, (Proc.CLIENT, Proc.CONTROL), (Proc.CONTROL, Proc.CLIENT), answered_by=("Hello",))
class Hello(Record):
    """The first packet each way on the control socket; all records on that connection travel by name.

    A field that one side does not know is ignored, and one that it misses takes its default.  So a field that is added
    has a default that says what was so before.  A client without Hello is served as in protocol 1 (`vmd.ipc.first`).
    """

    version: int  # PROTOCOL
    program: str = ""  # the release, for people


# --- what vmctl asks -------------------------------------------------------------------------------------


class Caller(Record):
    """Who asks, by the kernel's word (SO_PEERCRED)."""

    uid: int
    gid: int
    pid: int


class Request(Record):
    """Base of everything a client may ask."""

    caller: Caller | None = None


class VmRequest(Request):
    """A request about one VM, by id or, with id 0, by name."""

    vmid: int = 0
    name: str = ""


@request(0x10, Who.OWNER, "VmStarted", fds=("kernel?", "initrd?"))
class StartRequest(VmRequest):
    """Start a VM: a known one (`config` None), or the one described.

    fds: `kernel` and `initrd` were opened by the client, so that a user may boot what only he can read.
    For a known VM they are a one-shot boot, as is `boot_device`.  Control keeps them until `PassFiles`, and says in
    `files` which there are; what a client says there counts for nothing.
    """

    config: VmConfig | None = None
    template: str = ""
    boot_device: BootDevice = BootDevice.AUTO
    cmdline: str | None = None
    files: tuple[str, ...] = ()


@request(0x11, Who.OWNER, "StopAccepted", "VmTerminated")
class StopRequest(VmRequest):
    """Ask the guest to shut down or, with `force`, kill the VM; with `wait` answer when it is gone, by VmTerminated."""

    force: bool = False
    wait: bool = False


@request(0x12, Who.OWNER, "VmTerminated")
class WaitRequest(VmRequest):
    """Answer when the VM is gone."""


@request(0x13, Who.EVERYBODY, "VmInfo", "End")
class ListRequest(Request):
    """Describe every VM."""


@request(0x14, Who.ROOT, "Ok")
class LoadRequest(Request):
    """Read a further configuration file; `path` is absolute."""

    path: str


@request(0x15, Who.ROOT, "Ok")
class ReloadRequest(Request):
    """Read the main configuration file anew (*cat. 2.8*)."""


@request(0x16, Who.ROOT, "Ok")
class ResetRequest(Request):
    """Forget VMs (after terminating them), switches, or both (*cat. 2.8*)."""

    vms: bool
    switches: bool


@request(0x17, Who.ROOT, "Ok")
class LogRequest(Request):
    """Set the verbosity of every process, 0 or 2."""

    verbosity: int


@request(0x18, Who.OWNER, "ConsoleOutput", "ConsoleAttached")
class ConsoleRequest(VmRequest):
    """Attach to a console, with `force` instead of whoever has it.

    The backlog comes first, in pieces.  Where the VM does not run, Failed with ESRCH comes after what its console
    showed last.  Failed with VMD_CONSOLE_TAKEN comes later, unasked.
    """

    force: bool = False


@request(0x19, Who.OWNER, "Ok")
class ConsoleBreak(VmRequest):
    """Send a BREAK down the line; from the holder of the console only."""


@request(0x1A, Who.OWNER, "VmPaused")
class PauseRequest(VmRequest):
    """Stop a VM between two instructions, or let it go on; what is so already stays so.

    With `force` one that is in doubt goes on here, by the word of who asks that it does not run elsewhere.
    """

    paused: bool
    force: bool = False


class Live(Record):
    """When a VM that is sent while it runs comes to stand still."""

    still_ms: int = 300  # when what is left takes no longer, at the pace at which it was written until then
    rounds: int = 30  # after so many in any case


@request(0x1C, Who.ROOT, "TransferProgress", "VmSent", fds=("stream?",))
class SendRequest(VmRequest):
    """Write a VM to `stream`; it is gone then, or with `keep` goes on.  Where that fails it goes on as before.

    With `live` it runs meanwhile, and stands still only for the rest.

    fds: `stream` is the client's; control keeps it until `PassFiles`.
    """

    keep: bool = False
    live: Live | None = None


@request(0x1D, Who.ROOT, "TransferProgress", "VmReceived", fds=("stream?",))
class ReceiveRequest(Request):
    """Read a VM from `stream`, to go on under a name; with `paused` it waits to be unpaused.

    fds: as for SendRequest.
    """

    name: str
    paused: bool = False


@request(0x1F, Who.EVERYBODY, "NicInfo", "TroubleInfo", "End")
class NicsRequest(VmRequest):
    """Describe the network interfaces of a VM, and what is wrong with its devices."""


@request(0xF0, Who.EVERYBODY, "VmFigures", "End")
class FiguresRequest(VmRequest):
    """Say what every VM has done and what it uses; or one, by id or name."""


@request(0x20, Who.EVERYBODY, "SwitchInfo", "End")
class SwitchesRequest(Request):
    """Describe every switch of the configuration."""


@request(0x22, Who.OWNER, "ConsoleOutput", "ConsoleWatched")
class ConsoleWatch(VmRequest):
    """Look at a console without having it.

    Its output comes in pieces: at once for a new viewer, and for one who has seen the first `since` bytes when there
    are more, or the VM has ended.
    """

    since: int | None = None


class SnapshotAction(IntEnum):
    """What can be done with snapshots."""

    LIST = 0
    CREATE = 1
    DELETE = 2
    GO_BACK = 3


@request(0xA8, Who.OWNER, "TransferProgress", "SnapshotInfo", "SnapshotsDone")
class SnapshotRequest(VmRequest):
    """Do something with the snapshots of a VM's disks; `tag` is the name of one, "" to list them."""

    action: SnapshotAction = SnapshotAction.LIST
    tag: str = ""


@request(0xE0, Who.ROOT, "MigrationAt", fds=("stream?",))
class MigrateRequest(VmRequest):
    """Write a VM to `stream` that goes on elsewhere only when this client says so.

    Answered when the stream's header is written.  What follows is asked with `MigrationStep`, by the same client; if it
    leaves before COMMIT, the VM goes on as before.  It runs meanwhile, and stands still for the rest, as `live` says.
    fds: as for SendRequest.
    """

    live: Live = Live()


@request(0xE1, Who.ROOT, "MigrationAt", fds=("stream?",))
class MigrateInRequest(Request):
    """Read a VM from `stream` that goes on under a name when this client says so, and not before.

    Answered when the header has been judged: such a VM can go on here.  The sender has to have its disks in use, for
    else they are others than those here; with `force` that is taken on trust.  What follows is asked with
    `MigrationStep`, by the same client; if it leaves before COMMIT, there is no VM.  fds: as for SendRequest.
    """

    name: str
    force: bool = False


class Step(IntEnum):
    """What comes next of a VM that goes from one host to another."""

    GO_ON = 1  # memory: write it, until all is written; or read it, until all was read
    COMMIT = 2  # here: let the disks go; there: take them, and run
    DONE = 3  # it runs there: end it here
    BACK = 4  # it does not run there: let it go on here


@request(0xE2, Who.ROOT, "TransferProgress", "MigrationAt", "VmSent", "VmReceived")
class MigrationStep(VmRequest):
    """Go on with a migration; answered when that is done.

    Failed: there is no migration any more.  After COMMIT at the target, with VMD_IN_DOUBT, the VM may run or have run
    there; with all else it never did.  BACK is always answered by Failed, with what has become of the VM.
    """

    step: Step
    locks_travel: bool = False  # GO_ON here: the target has said so (`MigrationAt`)
    paused: bool = False  # COMMIT there: it stays paused
    in_doubt: bool = False  # BACK: nobody knows whether it runs there
    text: str = ""  # BACK: why


@request(0xD0, Who.OWNER, "Resized")
class ResizeRequest(VmRequest):
    """Make a disk of a VM larger, whether it runs or not; a user needs to be allowed to write to its image, too."""

    disk: str  # disk0, or 0, or the path of its image
    size_bytes: int


@request(0xD1, Who.OWNER, "DiscInserted")
class DiscRequest(VmRequest):
    """Put another disc into the CD-ROM drive of a VM, or with no `path` take it out; the next start has it, too.

    The file is opened with the client's rights.  A drive that its guest has locked keeps its disc unless `force` is
    given.
    """

    path: str = ""
    force: bool = False


@request(0x2E, Who.ROOT, "Ok")
class UpgradeRequest(Request):
    """Have the program that is installed now take the daemon's place: it adopts all VMs, which go on meanwhile.

    First it rehearses, and with `rehearse_only` does no more; otherwise the connection ends instead of an answer.
    """

    rehearse_only: bool = False


@request(0x2F, Who.EVERYBODY, "GenerationInfo", "End")
class GenerationsRequest(Request):
    """Describe every vmm: those of earlier daemons have the VMs that were started there."""


# --- what vmctl is answered ------------------------------------------------------------------------------


@message(0x30, ANSWER)
class Ok(Record):
    """Done.  `notes` are sentences worth showing, such as what waits for a restart."""

    notes: tuple[str, ...] = ()


@message(0x31, ANSWER)
class Failed(Record):
    """Not done: an errno or VMD_* code, and the sentence that says why."""

    code: int
    text: str


@message(0x32, ANSWER)
class VmStarted(Record):
    """The VM runs; its console is `tty`.  `notes` are sentences worth showing, such as of a disk's odd length."""

    vmid: int
    name: str
    pid: int
    tty: str
    notes: tuple[str, ...] = ()


@message(0x33, ANSWER)
class StopAccepted(Record):
    """The guest was asked to shut down, or the VM is being killed."""

    vmid: int
    name: str


@message(0x34, ANSWER)
class VmTerminated(Record):
    """The VM is gone; `text` says how it ended, and `how` does in one word (`LifeEnd`)."""

    vmid: int
    name: str
    text: str = ""
    how: str = ""


@message(0x36, ANSWER)
class End(Record):
    """The end of a list."""


@message(0x37, ANSWER, partial=True)
class ConsoleOutput(Record):
    """A piece of what a console showed last."""

    data: bytes


@message(0x38, ANSWER)
class ConsoleAttached(Record):
    """The console is the client's until it disconnects; it opens `tty` with its own rights."""

    vmid: int
    name: str
    tty: str


@message(0x39, ANSWER)
class VmPaused(Record):
    """The VM stands still, or goes on."""

    vmid: int
    name: str
    paused: bool


@message(0x3A, ANSWER, FROM_VM, partial=True)
class TransferProgress(Record):
    """How much of a VM has been sent or received; `total_bytes` is an estimate, 0 if there is none yet.

    `round`, of a VM that runs while it is sent: its memory is being sent for the first time (1), or what has changed
    since the round before.
    """

    done_bytes: int
    total_bytes: int
    round: int = 0


@message(0x3B, ANSWER)
class VmSent(Record):
    """The stream is complete; of a VM that ran meanwhile, after so many rounds and so long a stand-still."""

    vmid: int
    name: str
    sent_bytes: int
    downtime_ms: int = 0  # of a migration: from when it stood still here until it was known to run there
    rounds: int = 0
    still_ms: int = 0


@message(0x3C, ANSWER)
class VmReceived(Record):
    """The VM goes on here, or waits to be unpaused."""

    vmid: int
    name: str
    pid: int
    tty: str
    paused: bool


@message(0x3F, ANSWER, partial=True)
class NicInfo(Record):
    """A network interface of a VM, for `vmctl status -v`.  Addresses are packed; an empty one is not there."""

    index: int
    tap: str  # "": the VM does not run
    switch: str
    lladdr: bytes
    up: bool
    locked: bool
    local: bool
    mtu: int = 0
    guest4: bytes = b""
    host4: bytes = b""
    prefix6: bytes = b""
    counters: tuple[int, ...] = ()  # devmsg.COUNTER_NAMES; none: its process has not answered


class DiskFile(Record):
    """A disk of a VM, for `vmctl status --json`."""

    path: str
    format: str  # "": found out from its first bytes, or its name


class VmFiles(Record):
    """The files that a VM uses; "" is none."""

    boot_image: str = ""  # "": the default firmware
    initrd: str = ""
    disks: tuple[DiskFile, ...] = ()
    cdrom: str = ""


class LifeEnd(Record):
    """How a VM ended last; `how` is one of the words of `vmd.parent.endings`."""

    at_s: int  # seconds since 1970
    how: str
    text: str = ""


@message(0x35, ANSWER, partial=True)
class VmInfo(Record):
    """One row of `vmctl status` (*cat. 3.3*).  Times are seconds since 1970."""

    vmid: int
    name: str
    pid: int  # 0: not running
    vcpus: int
    memory_bytes: int
    resident_bytes: int
    tty: str
    uid: int
    gid: int | None
    owner: str  # "user" or "user:group", numeric where there is no name
    state: str
    text: str = ""  # why it is not running, if that is known
    since_s: int = 0  # when it came into this state; 0: not known
    started_s: int = 0  # when this life began; 0: it does not run
    restarts: int = 0  # how often its guest has reset itself in this life
    autostart: bool = False  # it starts with the daemon
    files: VmFiles | None = None  # None: for others than those who may control the VM
    nics: tuple[NicInfo, ...] = ()  # without counters
    ended: LifeEnd | None = None  # None: not as long as this daemon knows it


@message(0x40, ANSWER, partial=True)
class TroubleInfo(Record):
    """Something that is wrong with a device of a VM now, for `vmctl status -v`."""

    device: str  # such as disk0
    text: str
    since_s: int  # seconds since 1970


@message(0xF1, ANSWER, partial=True)
class VmFigures(Record):
    """What a VM has done, and what it uses.  Times of day are seconds since 1970; see `vmd.ipc.figures`."""

    vmid: int
    name: str
    uid: int
    state: str
    since_s: int = 0  # when it came into this state
    started_s: int = 0  # when this life began; 0: it does not run
    starts: int = 0  # how often it was started since the daemon knows it; resets of its guest are not among them
    restarts: int = 0  # how often its guest has reset itself in this life
    ended: LifeEnd | None = None  # its last life; None: not as long as the daemon knows it
    pid: int = 0  # 0: it does not run, and all that follows is what it is to have
    memory_bytes: int = 0  # of the guest
    guest_bytes: int = 0  # ... that it has touched
    process_bytes: int = 0  # memory of its processes beside that, which they share with nobody
    cpu_ns: int = 0  # of its processes, in steps of 10 ms
    vcpus: tuple[VcpuFigures, ...] = ()
    disks: tuple[DiskFigures, ...] = ()
    cdrom: CdromFigures | None = None
    entropy: EntropyFigures | None = None
    nics: tuple[NicFigures, ...] = ()
    group: GroupFigures | None = None  # None: it has no control group of its own


@message(0x4E, ANSWER, partial=True)
class GenerationInfo(Record):
    """A vmm, and with it the program that serves its VMs.  The last one is the newest."""

    number: int
    version: str
    vms: int = 0  # how many have a process there


@message(0x41, ANSWER, partial=True)
class SwitchInfo(Record):
    """A switch of the configuration."""

    name: str
    interface: str


@message(0x42, ANSWER)
class ConsoleWatched(Record):
    """All output up to byte `end` of it; `lost` bytes in between were not kept so long."""

    vmid: int
    name: str
    end: int
    lost: int
    running: bool


@message(0xA9, ANSWER, (Proc.IMGWRITER, Proc.PARENT), partial=True)
class SnapshotInfo(Record):
    """A snapshot of a VM's disks: `disks` of `of_disks` have it."""

    tag: str
    date_s: int  # seconds since 1970
    clock_ns: int  # for how long the machine had run
    state_bytes: int  # of the machine; 0: it did not run
    disks: int
    of_disks: int


@message(0xAA, ANSWER)
class SnapshotsDone(Record):
    """Done; `tag` is the name of the snapshot."""

    vmid: int
    name: str
    tag: str = ""


@message(0xE3, ANSWER)
class MigrationAt(Record):
    """A step of a migration is done.

    `locks_travel`, of the first one there: all disks are in use, so who has them here cannot have them there.
    `paused`, of COMMIT here: the VM was paused, and is to stay so.
    """

    vmid: int
    name: str
    locks_travel: bool = False
    paused: bool = False


@message(0xD2, ANSWER)
class Resized(Record):
    """The disk is so large now."""

    vmid: int
    name: str
    disk: str  # such as disk0
    path: str
    size_bytes: int
    running: bool = False  # and its guest has been told


@message(0xD3, ANSWER)
class DiscInserted(Record):
    """The drive has this disc now, or with no `path` none."""

    vmid: int
    name: str
    path: str
    running: bool = False
    notes: tuple[str, ...] = ()  # sentences worth showing, such as of an odd length


# --- between the daemon's own processes ------------------------------------------------------------------

EVERYWHERE = tuple((Proc.PARENT, child) for child in (Proc.CONTROL, Proc.VMM, Proc.PRIV))


@message(0x50, *EVERYWHERE, (Proc.VMM, Proc.VM))
class SetVerbosity(Record):
    """Log more or less from now on."""

    verbosity: int


@message(0x51, *EVERYWHERE, (Proc.VMM, Proc.VM), (Proc.PARENT, Proc.LOG))
class Quit(Record):
    """End cleanly.  A process that loses its parent ends as well, without being told."""


@message(0x52, (Proc.CONTROL, Proc.PARENT))
class ClientGone(Record):
    """The client of this peerid has disconnected."""


@message(0x53, (Proc.CONTROL, Proc.PARENT), (Proc.VMM, Proc.PARENT), (Proc.PRIV, Proc.PARENT))
class Ready(Record):
    """This process is confined and handles messages; `warnings` name missing kernel features."""

    warnings: tuple[str, ...] = ()


class ImageLink(Record):
    """One image file of a disk; `guessed`: nobody but its first bytes said that the format is this one."""

    path: str  # for messages
    format: str
    guessed: bool = False
    discard_granularity: int = 0  # bytes, of a block device that says it


class DiskImages(Record):
    """A disk: its image first, then what that is based on."""

    images: tuple[ImageLink, ...]
    read_only: bool = False


class NicLink(Record):
    """A network interface, from its VM's point of view.  Addresses are packed; an empty one is not there."""

    name: str  # of the tap
    lladdr: bytes  # the guest's
    host_mac: bytes  # the tap's
    locked: bool
    local: bool  # the rest is of `local` ones only, but for `mtu`
    mtu: int
    guest4: bytes = b""
    host4: bytes = b""
    host_ll: bytes = b""  # the tap's link-local address
    prefix6: bytes = b""  # the /64 that is announced, as an address
    dns4: tuple[bytes, ...] = ()  # none: the host itself
    dns6: tuple[bytes, ...] = ()
    pxe: bool = False  # `boot device net`: DHCP tells the VM's name, and a boot file


@message(
    0x60,
    TO_VM,
    fds=("couriers*", "boot?", "initrd?", "memory", "tty", "tty_slave", "shown", "taps*"),
    answered_by=("VmRunning", "VmFailed"),
)
class StartVm(Record):
    """Start the VM; VmExited follows in either case.

    fds: what the VM uses comes over the `couriers` (vmd.ipc.courier): `boot`, the kernel or firmware, read-only;
    `initrd`; `disks`, the images of all disks, one disk after the other, each in the order of `disks`; `cdrom`.
    `boot` and `initrd` come with this instead where the parent has copies of what a client has opened.
    `memory` is an empty memory file: the guest's.
    `tty` and `tty_slave` are the two sides of the console; `shown` is what it has shown (vmd.backlog); `taps` are one
    for each of `nics`.
    """

    vmid: int
    config: VmConfig
    boot_name: str  # of the kernel or firmware, for messages
    verbosity: int
    disks: tuple[DiskImages, ...] = ()
    nics: tuple[NicLink, ...] = ()


@message(0x61, FROM_VM, fds=("process?",))
class VmRunning(Record):
    """The guest executes.

    fds: `process` is a pidfd of the VM process, added by vmm: pids of vmm's namespace mean nothing to the parent.
    """

    vmid: int
    paused: bool = False  # received, and to wait


@message(0x62, FROM_VM)
class VmFailed(Record):
    """The VM could not be built."""

    vmid: int
    code: int
    text: str


class StopMode(IntEnum):
    """How a VM is ended."""

    GRACEFUL = 0  # power button, with the timeouts of *cat. 4.4*
    KILL = 1


@message(0x63, TO_VM)
class StopVm(Record):
    """End the VM; VmExited follows."""

    vmid: int
    mode: StopMode


class Outcome(IntEnum):
    """How the life of a VM process ended; also its exit status."""

    POWER_OFF = 0  # by the guest, or on request
    REBOOT = 11  # the guest reset itself: start it again (upstream's EAGAIN)
    ENDED = 3  # without its guest: by force, or because that did not shut down
    FAILED = 1  # the VM could not go on; VmEnding has said why
    KILLED = 2  # by a signal, or without a word


@message(0x64, (Proc.VM, Proc.VMM))
class VmEnding(Record):
    """Last words of a VM process: why it ends."""

    text: str


@message(0x65, (Proc.VMM, Proc.PARENT))
class VmExited(Record):
    """The VM process is gone and reaped."""

    vmid: int
    pid: int
    outcome: Outcome
    text: str


@message(0x66, TO_VM, fds=("tty?", "tty_slave?"), answered_by=("ConsoleSnapshotEnd",))
class ConsoleSnapshot(Record):
    """Drop what waits in the pty: the backlog has it, too.  With `tty` and `tty_slave`, go on on that pty."""

    vmid: int


@message(0x67, FROM_VM)
class ConsoleSnapshotEnd(Record):
    """The pty has nothing of the first `end` bytes of output, and all that comes after them."""

    end: int


@message(0x68, TO_VM)
class SendBreak(Record):
    """Let the guest's UART see a BREAK."""

    vmid: int


@message(0x6B, TO_VM, answered_by=("PauseDone",))
class PauseVm(Record):
    """Stand still, or go on."""

    vmid: int
    paused: bool


@message(0x6C, FROM_VM)
class PauseDone(Record):
    """The machine stands still, or goes on; a `text` says why it does not do what was asked."""

    vmid: int
    paused: bool
    text: str = ""


@message(0x6D, TO_VM, fds=("courier",), answered_by=("TransferProgress", "SendDone"))
class SendVm(Record):
    """Stand still and write yourself to the `stream` that comes over `courier`.  VmExited follows, unless `keep`.

    `one_shot`, which goes along: when the guest resets itself, that is its end (*cat. 4.4*).
    `two_way`: HeaderSent follows, and memory only after SendOn; when all is written, stand still until EndSend.
    `live`: as of SendRequest.
    """

    vmid: int
    keep: bool
    one_shot: bool
    two_way: bool = False
    live: Live | None = None


@message(0x6E, FROM_VM)
class SendDone(Record):
    """The stream is complete; or a `text` says why not, and the machine is as before.  For the rest see VmSent."""

    vmid: int
    sent_bytes: int
    text: str = ""
    stopped_ns: int = 0  # when it came to stand still for that, by CLOCK_MONOTONIC
    rounds: int = 0
    still_ms: int = 0


@message(0xE4, FROM_VM)
class HeaderSent(Record):
    """The receiver can judge what VM it would be."""

    vmid: int


@message(0xE5, TO_VM)
class SendOn(Record):
    """The receiver takes it: write the rest.  SendDone follows."""

    vmid: int


@message(0xE6, TO_VM, answered_by=("DisksLetGo",))
class LetDisksGo(Record):
    """All is written: let the receiver have the disks."""

    vmid: int


@message(0xE7, FROM_VM)
class DisksLetGo(Record):
    """They are let go; or a `text` says why not, and none is."""

    vmid: int
    text: str = ""


@message(0xE8, TO_VM, answered_by=("SendUndone",))
class EndSend(Record):
    """`sent`: the machine runs elsewhere, end.  Else take back the disks and be as before; that is answered."""

    vmid: int
    sent: bool


class TakenBack(IntEnum):
    """What has become of an attempt to take back the disks of a VM that was to go on elsewhere."""

    DONE = 0  # or they had not been let go
    IN_USE = 1
    CHANGED = 2  # since they were let go: the guest has run elsewhere
    FAILED = 3


@message(0xE9, FROM_VM)
class SendUndone(Record):
    """The machine is as before; or it stands still without its disks, and a `text` names one of them."""

    vmid: int
    outcome: TakenBack
    text: str = ""


@message(
    0x6F,
    TO_VM,
    fds=("courier", "memory", "tty", "tty_slave", "shown"),
    answered_by=("TransferProgress", "ReceivedHeader", "VmFailed"),
)
class ReceiveVm(Record):
    """Become the VM that the `stream` has that comes over `courier`; other descriptors as for StartVm.

    In four steps, for what the stream says has to be judged and its disks opened: ReceivedHeader, ReceiveMemory,
    ReceivedMachine, ResumeReceived; then VmRunning.  VmFailed at any time.
    """

    vmid: int
    name: str
    verbosity: int


@message(0x70, FROM_VM)
class ReceivedHeader(Record):
    """What kind of VM it is going to be; nobody has checked the configuration yet."""

    vmid: int
    config: VmConfig
    one_shot: bool


@message(0x71, TO_VM, answered_by=("TransferProgress", "ReceivedMachine", "VmFailed"))
class ReceiveMemory(Record):
    """Read on."""

    vmid: int


@message(0x72, FROM_VM)
class ReceivedMachine(Record):
    """The stream was complete and whole; the sender has let go of the disks, or will soon."""

    vmid: int


@message(0x73, TO_VM, fds=("couriers*", "taps*"), answered_by=("VmRunning", "VmFailed"))
class ResumeReceived(Record):
    """Go on, or with `paused` stand still; descriptors as for StartVm."""

    vmid: int
    config: VmConfig
    paused: bool
    disks: tuple[DiskImages, ...] = ()
    nics: tuple[NicLink, ...] = ()


@message(0xB9, TO_VM, fds=("courier", "stream?"), answered_by=("TransferProgress", "DisksLent"))
class LendDisks(Record):
    """Stand still, give your disks to who asks for them over `courier`, and write yourself to `stream`.

    The machine stands still from the answer until TakeDisksBack; not so if the disks are only to be looked at.
    `one_shot` is as for SendVm.
    """

    vmid: int
    one_shot: bool = False
    look: bool = False


@message(0xBA, FROM_VM)
class DisksLent(Record):
    """All was given; or a `text` says why not."""

    vmid: int
    sent_bytes: int = 0
    text: str = ""


@message(0xBB, TO_VM, answered_by=("DisksBack",))
class TakeDisksBack(Record):
    """Nobody else has your disks any more: look at them anew, and go on as before."""

    vmid: int


@message(0xBC, FROM_VM)
class DisksBack(Record):
    """The machine goes on, or stands still as before; a `text` says what is wrong."""

    vmid: int
    text: str = ""


@message(0x74, TO_VM)
class CancelTransfer(Record):
    """Nobody wants the stream any more."""

    vmid: int


class Trouble(Record):
    """Something that is wrong with a device of a VM, for as long as it is."""

    device: str  # such as disk0
    text: str
    since_s: int  # seconds since 1970


class NicCounters(Record):
    """What one network interface has done, under the names of devmsg.COUNTER_NAMES."""

    values: tuple[int, ...]


@message(0x75, TO_VM, answered_by=("DevicesReported",))
class AskDevices(Record):
    """Say what the network interfaces have done, and what is wrong with any device."""

    vmid: int


@message(0x76, FROM_VM)
class DevicesReported(Record):
    """One entry for each interface, in their order, fewer if some cannot tell; and what is wrong now."""

    vmid: int
    nics: tuple[NicCounters, ...]
    troubles: tuple[Trouble, ...] = ()


@message(0x7E, FROM_VM, answered_by=("Resolvers",))
class AskResolvers(Record):
    """Which name servers are there now?  Asked too often, it is not answered."""

    vmid: int


@message(0x7F, TO_VM)
class Resolvers(Record):
    """The name servers for guests; none: the host itself."""

    vmid: int
    dns4: tuple[bytes, ...] = ()
    dns6: tuple[bytes, ...] = ()


@message(0xD4, TO_VM, answered_by=("DiskResized",))
class ResizeDisk(Record):
    """Make a disk larger."""

    vmid: int
    index: int
    size_bytes: int


@message(0xD5, FROM_VM)
class DiskResized(Record):
    """The disk is so large now, and the guest has been told; or a `text` says why not, and `code` is an errno."""

    vmid: int
    code: int = 0
    text: str = ""


@message(0xD6, TO_VM, fds=("courier?",), answered_by=("DiscChanged",))
class ChangeDisc(Record):
    """Have the disc in the drive that comes over `courier`, or with no `path` none."""

    vmid: int
    path: str = ""
    force: bool = False


@message(0xD7, FROM_VM)
class DiscChanged(Record):
    """The drive has the disc; or a `text` says why not, and it has the one before."""

    vmid: int
    code: int = 0
    text: str = ""


@message(0x69, (Proc.PARENT, Proc.VMM), fds=("kvm",))
class KvmFd(Record):
    """/dev/kvm, opened by the parent: no other process can."""


@message(0xC0, (Proc.PARENT, Proc.VMM), fds=("group?",))
class VmSlot(Record):
    """What a VM process is going to have; with each VM comes one for the process that is then kept in reserve.

    fds: what it writes 0 to in order to be in its control group.
    """

    uid: int = 0  # 0: that of vmm
    group: int = 0  # the parent's number of the group; 0: none


@message(0xC1, (Proc.VMM, Proc.PARENT))
class VmSlotOver(Record):
    """The process is reaped, or there will be none."""

    group: int


@message(0xC2, (Proc.PARENT, Proc.VMM), fds=("log",), answered_by=("VmHeld", "VmsHeld"))
class AskVms(Record):
    """Which VMs are there?  Asked by a parent that takes the place of one that has ended.

    What VMs answer to questions of that one is not passed on.  fds: `log` is where vmm writes its lines from now on.
    """


@message(
    0xC3,
    (Proc.VMM, Proc.PARENT),
    fds=("process?", "tty?", "tty_slave?", "shown?", "memory?", "log?", "boot?", "initrd?", "taps*"),
    partial=True,
)
class VmHeld(Record):
    """One VM, as vmm knows it: it has a process, or has ended and the parent has not taken notice of that.

    fds: `process` is a pidfd of its process; `log` is what its lines come out of; the others are what it was given with
    StartVm or ReceiveVm, and since.
    """

    vmid: int
    group: int = 0
    running: bool = False  # it has said so
    paused: bool = False
    stopping: bool = False  # it was told to
    arriving: bool = False  # it is received, and does not run yet
    complete: bool = False  # ... and has read all of its stream
    resumed: bool = False  # ... and was told to go on
    sending: bool = False
    keep: bool = False  # ... and goes on then
    two_way: bool = False  # ... or it migrates
    written: bool = False  # ... all of it is
    letting_go: bool = False  # ... its disks, as it was told to
    let_go: bool = False  # ... they are
    undoing: bool = False  # ... and it was told to take them back
    lending: bool = False  # its disks, for a snapshot
    lent: bool = False  # ... they are, or could not be
    returning: bool = False  # ... and it was told to take them back
    outcome: Outcome | None = None  # it has ended
    text: str = ""


@message(0xC4, (Proc.VMM, Proc.PARENT), fds=("process",))
class VmsHeld(Record):
    """Those were all, or nearly all.

    fds: `process` is a pidfd of vmm itself, whose parent may be another process by now.
    """

    version: str  # of the program
    spare: int = 0  # slots without a VM
    groups: tuple[int, ...] = ()  # that belong to a VM, or to a slot
    vms: tuple[int, ...] = ()  # of some of them VmHeld may come later


@message(0xC5, (Proc.PARENT, Proc.VMM))
class EndTaken(Record):
    """The parent knows that this VM has ended, and has no more use for what it was given."""

    vmid: int


@message(0xC6, (Proc.PARENT, Proc.VMM))
class Retire(Record):
    """No other VM starts here: keep no process in reserve."""


@message(0xB0, (Proc.PARENT, Proc.CONTROL))
class ServeUser(Record):
    """The connections that follow are of one user.  `title` is the process's name from now on."""

    title: str


@message(
    0xB2, (Proc.PARENT, Proc.CONTROL), (Proc.PARENT, Proc.VMM), (Proc.PARENT, Proc.LOG), answered_by=("Pong",)
)
class Ping(Record):
    """Are you there?"""


@message(0xB3, (Proc.CONTROL, Proc.PARENT), (Proc.VMM, Proc.PARENT), (Proc.LOG, Proc.PARENT))
class Pong(Record):
    """Yes."""


@message(0xB1, (Proc.PARENT, Proc.CONTROL), fds=("client",))
class NewClient(Record):
    """A connection to the control socket: its number is the peerid, its user `uid`.

    With a `text` it is to be turned away, as with Failed.  fds: `client` is the connection.
    """

    uid: int
    code: int = 0
    text: str = ""


@message(0xB4, (Proc.PARENT, Proc.CONTROL), fds=("courier",))
class PassFiles(Record):
    """Give the files of the last request of this client to who asks at the other end of `courier` (vmd.ipc.courier)."""


# --- between parent and priv -----------------------------------------------------------------------------


class SwitchRequest(Record):
    """A bridge that must be there; one that is there already is left alone."""

    interface: str
    alias: str  # switch<id>-<name>, which marks it as ours
    rdomain: int | None = None
    up: bool = True


class NicRequest(Record):
    """A tap that must be made."""

    name: str  # "": the next free one
    existing: bool = False  # a tap of that name that is there is used; else that is an error
    alias: str  # vm<id>-if<n>-<name>, which marks it as ours
    bridge: str = ""  # of a switch that was configured before
    groups: tuple[str, ...] = ()  # the first is the one that Linux knows; the rest are sets of nftables
    rdomain: int | None = None
    up: bool = True
    host4: bytes = b""  # an address in a /31
    prefix6: bytes = b""  # a /64; the host is its ::1
    lladdr: bytes = b""  # the guest's


class AddressGiven(Record):
    """An address that an interface was given."""

    address: bytes
    length: int  # of its network's prefix


class TapBefore(Record):
    """What was changed of a tap that somebody else has made, for giving it back."""

    master: int  # index of the bridge or VRF that it was in; 0: none
    mtu: int
    group: int
    up: bool
    added: tuple[AddressGiven, ...] = ()


class NicMade(Record):
    """A tap that was made."""

    name: str
    lladdr: bytes
    link_local: bytes  # empty without `prefix6`
    mtu: int
    index: int = 0  # the kernel's number for it
    before: TapBefore | None = None  # it was there


@message(0x80, (Proc.PARENT, Proc.PRIV), answered_by=("NetworkConfigured",))
class ConfigureNetwork(Record):
    """What the configuration says; bridges of ours that it no longer names go with their last tap."""

    nat: bool
    switches: tuple[SwitchRequest, ...] = ()
    more: bool = False  # further switches follow in another message, and the answer after that
    again: bool = False  # to a priv that was started again: what is there stays, for guests run on it


@message(0x81, (Proc.PRIV, Proc.PARENT))
class NetworkConfigured(Record):
    """Done, but for what these sentences say."""

    problems: tuple[str, ...] = ()


@message(0x82, (Proc.PARENT, Proc.PRIV), fds=("tuns*", "tables4?", "tables6?"), answered_by=("NicsMade", "NicsFailed"))
class MakeNics(Record):
    """Make all interfaces of a VM, or none; the answer has the same ticket.

    fds: `tuns` are what taps are made from (/dev/net/tun, opened anew for each); `tables4` and `tables6` say which
    tables of the old iptables are loaded, where this kernel has them.
    """

    vmid: int
    ticket: int
    nics: tuple[NicRequest, ...]
    reserved: tuple[str, ...] = ()  # names that are for others


@message(0x83, (Proc.PRIV, Proc.PARENT), fds=("taps*",))
class NicsMade(Record):
    """The interfaces are there, in the order in which they were asked for; as are `taps`."""

    vmid: int
    ticket: int
    nics: tuple[NicMade, ...]


@message(0x8A, (Proc.PARENT, Proc.PRIV))
class AdoptNics(Record):
    """Interfaces of a VM that runs, which a priv before this one has made; sent before all else."""

    vmid: int
    nics: tuple[NicRequest, ...]
    made: tuple[NicMade, ...]


@message(0x84, (Proc.PRIV, Proc.PARENT))
class NicsFailed(Record):
    """Nothing was made: an errno, and the sentence that says why."""

    vmid: int
    ticket: int
    code: int
    text: str


@message(0x85, (Proc.PARENT, Proc.PRIV), answered_by=("NicsRemoved",))
class RemoveNics(Record):
    """The VM is gone, or will not be: remove its interfaces, whatever there is of them."""

    vmid: int


@message(0x8B, (Proc.PRIV, Proc.PARENT))
class NicsRemoved(Record):
    """They are gone; the log says what could not be removed."""

    vmid: int


@message(0x88, (Proc.PARENT, Proc.PRIV), fds=("tables4?", "tables6?"), answered_by=("DropsReported",))
class AskDrops(Record):
    """Say what other firewalls drop of this VM's packets.

    fds: as for `MakeNics`.
    """

    vmid: int


@message(0x89, (Proc.PRIV, Proc.PARENT))
class DropsReported(Record):
    """What is dropped now, as something that is wrong with an interface."""

    vmid: int
    troubles: tuple[Trouble, ...] = ()


# --- between parent and an opener ------------------------------------------------------------------------


class OpenedFile(Record):
    """A file that is used: what it is, in words, and which."""

    what: str
    file: FileId


@message(
    0xA0,
    (Proc.PARENT, Proc.OPENER),
    fds=("courier", "probe?", "client?", "kernel_copy?", "initrd_copy?", "resizer?"),
    answered_by=("OpenerAt", "FilesOpened", "NotOpened"),
)
class OpenFiles(Record):
    """Become this user for good, and open what a VM uses.

    fds: the files leave by the `courier`, as soon as its other end asks for them; `probe` leads to an imgprobe.
    `client` is a courier from the client's control, for what it has `given`.  That is copied to `kernel_copy` and
    `initrd_copy`, memory files, where there are such, instead of leaving by the courier.
    `resizer` leads to an imgresize, for the one disk that is to have `resize_bytes`.
    """

    name: str  # of the VM
    uid: int
    gid: int
    groups: tuple[int, ...]
    disks: tuple[DiskConfig, ...] = ()
    cdrom: str = ""
    boots: bool = False  # `kernel`, or else the firmware of this host, and `initrd`
    kernel: str = ""  # these are also what to call what is given
    initrd: str = ""
    given: tuple[str, ...] = ()  # kernel, initrd
    check_given: bool = False  # whether the user may read it, by its mode
    copy_max: int = 0  # bytes; the opener makes no file larger
    in_conf: bool = True  # whether advice is for who writes a vm.conf
    mends: bool = False  # snapshots are changed: disks that no VM could be started with may do
    patience_s: float = 0.0  # for locks that somebody is about to let go
    others_have: bool = False  # disks are in use, and are to be looked at all the same: they say so in `in_use`
    only_writable: bool = False  # each disk's own image, and nothing but whether this user may write to it
    resize_bytes: int = 0


@message(0xA1, (Proc.OPENER, Proc.PARENT), partial=True)
class OpenerAt(Record):
    """This is opened next."""

    what: str


@message(0xA2, (Proc.OPENER, Proc.PARENT))
class FilesOpened(Record):
    """All is open, and locked; it stays so until the courier has it, or is closed."""

    disks: tuple[DiskImages, ...] = ()
    files: tuple[OpenedFile, ...] = ()
    notes: tuple[str, ...] = ()  # sentences that the operator should read
    boot_name: str = ""  # of the kernel or firmware, for messages
    in_use: tuple[OpenedFile, ...] = ()  # disks that somebody else has; they are not open
    unused: tuple[str, ...] = ()  # disks that nobody has, though storage could tell


@message(0xA3, (Proc.OPENER, Proc.PARENT))
class NotOpened(Record):
    """Nothing is open.

    Where somebody else has a lock, `file` is the file, `what` its name, and `by`, `doing` and `marks` are InUse's.
    """

    code: int
    text: str
    file: FileId | None = None
    what: str = ""
    by: str = ""
    doing: str = ""
    marks: tuple[int, ...] = ()


# --- between parent and an imgwriter ---------------------------------------------------------------------


@message(
    0xAB,
    (Proc.PARENT, Proc.IMGWRITER),
    fds=("couriers*", "stream?", "state?"),
    answered_by=("SnapshotWord", "SnapshotInfo", "SnapshotsReady", "SnapshotsChanged", "SnapshotsFailed"),
)
class ChangeSnapshots(Record):
    """List snapshots, which is answered by SnapshotsChanged, or prepare a change, by SnapshotsReady.

    fds: the disks come over `couriers`, one disk after the other; of `stream` is read what the machine is.  To go back
    with the machine, its state leaves as a stream by the courier `state`, after SnapshotsChanged: by then the disks are
    locked no more.
    """

    name: str  # of the VM
    action: SnapshotAction
    tag: str
    disks: tuple[DiskImages, ...]
    date_ns: int = 0  # since 1970
    clock_ns: int = 0  # for how long the machine has run


@message(0xAC, (Proc.IMGWRITER, Proc.PARENT), partial=True)
class SnapshotWord(Record):
    """This goes on."""


@message(0xAD, (Proc.IMGWRITER, Proc.PARENT))
class SnapshotsReady(Record):
    """All disks are prepared, and as they were."""


@message(0xAE, (Proc.PARENT, Proc.IMGWRITER), answered_by=("SnapshotsChanged", "SnapshotsFailed"))
class FinishSnapshots(Record):
    """Make the change, or leave everything as it was; `first_last`: the first disk is changed last."""

    commit: bool
    first_last: bool = False


@message(0xAF, (Proc.IMGWRITER, Proc.PARENT))
class SnapshotsChanged(Record):
    """Done."""


@message(0xB8, (Proc.IMGWRITER, Proc.PARENT))
class SnapshotsFailed(Record):
    """Not done: an errno, and the sentence that says why."""

    code: int
    text: str


# --- the log ---------------------------------------------------------------------------------------------


@message(0x90, (Proc.PARENT, Proc.LOG), fds=("source",))
class LogSource(Record):
    """Take the lines that come from `source`, a socket of `vmd.ipc.logpair`.

    `name` is the title of the process, or of the process of the VM, which its devices write to, too.
    """

    name: str
    vmid: int = 0  # 0: of no VM
    owner_uid: int = 0


@message(0x93, (Proc.VMM, Proc.PARENT), fds=("log",))
class VmLog(Record):
    """What the process of a VM writes to the log comes out of `log`; sent as soon as it is this VM.

    `vmid` 0: it has ended before it became one.
    """

    vmid: int


_resolve()
REQUESTS = relays(Proc.CONTROL, Proc.CLIENT)  # what control passes on to the parent
ANSWERS = relays(Proc.CONTROL, Proc.PARENT)  # ... and to the client that asked
