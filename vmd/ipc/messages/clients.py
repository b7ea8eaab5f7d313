"""Between vmctl and the parent; control passes it on.

Requests go client -> control -> parent as the same message.  `caller` is whatever the client wrote, and nobody believes
it: the parent has accepted the connection and knows whose it is.  The header's `peerid` is the parent's number for the
connection, and answers come back under it.
"""


from vmd.config.model import BootDevice, Forward, VmConfig
from vmd.enums import IntEnum
from vmd.ipc.messages.figures import LifeEnd
from vmd.ipc.messages.shared import Live, SnapshotAction
from vmd.ipc.routes import ANSWER, Proc, Who, message, relays, request
from vmd.record import Record

PROTOCOL = 2  # what Hello says; 1 is what was spoken before there was a Hello


@message(0x01, (Proc.CLIENT, Proc.CONTROL), (Proc.CONTROL, Proc.CLIENT), answered_by=("Hello",))
class Hello(Record):
    """The first packet each way on the control socket; all records on that connection travel by name.

    A field that one side does not know is ignored, and one that it misses takes its default.  So a field that is added
    has a default that says what was so before.  A client without Hello is served as in protocol 1 (`vmd.ipc.first`).
    """

    version: int  # PROTOCOL
    program: str = ""  # the release, for people


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


@request(0x10, Who.OWNER, "ConsoleReady", "VmStarted", fds=("kernel?", "initrd?", "seed?"))
class StartRequest(VmRequest):
    """Start a VM: a known one (`config` None), or the one described.

    fds: `kernel` and `initrd` were opened by the client, so that a user may boot what only he can read.
    For a known VM they are a one-shot boot, as is `boot_device`.  `seed` has what the seed of a new one is made from
    (`vmd.seed`).  Control keeps them until `PassFiles`, and says in
    `files` which there are; what a client says there counts for nothing.
    `kernel` and `initrd`, too, are for one boot of a known VM: DiskFiles in words, which are on its own disks.
    With `console` the client has the console, as after a ConsoleRequest, from before the guest's first byte:
    ConsoleReady comes first then, if nobody else has it.
    """

    config: VmConfig | None = None
    template: str = ""
    boot_device: BootDevice = BootDevice.AUTO
    cmdline: str | None = None
    files: tuple[str, ...] = ()
    kernel: str = ""
    initrd: str = ""
    console: bool = False


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


@request(0x7A, Who.EVERYBODY, "Event", "EventsSeen")
class EventsRequest(VmRequest):
    """Tell what happens to all VMs and the daemon, or to one VM.

    `since` is the number of the last event that the client has seen; those after it are the answer, or the first that
    come.  With 0 these are all that are remembered.  With None the answer is only which one was the last.  With
    `wait` False there is an answer at once, whether anything has happened or not.
    """

    since: int | None = None
    wait: bool = True


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


@request(0x23, Who.OWNER, "ConsoleLogAt")
class ConsoleLogRequest(VmRequest):
    """Say where the console log of a VM is; the client reads it with its own rights."""


@request(0xA8, Who.OWNER, "TransferProgress", "SnapshotInfo", "SnapshotsDone")
class SnapshotRequest(VmRequest):
    """Do something with the snapshots of a VM's disks; `tag` is the name of one, "" to list them."""

    action: SnapshotAction = SnapshotAction.LIST
    tag: str = ""


@request(0xE0, Who.ROOT, "TransferProgress", "MigrationAt", fds=("stream?",))
class MigrateRequest(VmRequest):
    """Write a VM to `stream` that goes on elsewhere only when this client says so.

    Answered when the stream's header is written.  What follows is asked with `MigrationStep`, by the same client; if it
    leaves before COMMIT, the VM goes on as before.  It runs meanwhile, and stands still for the rest, as `live` says.
    fds: as for SendRequest.
    """

    live: Live = Live()


@request(0xE1, Who.ROOT, "TransferProgress", "MigrationAt", fds=("stream?",))
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


@message(0x44, ANSWER, partial=True)
class ConsoleReady(Record):
    """The console of a VM that is being started is the client's, and `tty` may be opened: nothing was shown yet."""

    vmid: int
    name: str
    tty: str


@message(0x38, ANSWER)
class ConsoleAttached(Record):
    """The console is the client's until it disconnects; it opens `tty` with its own rights."""

    vmid: int
    name: str
    tty: str


@message(0x39, ANSWER)
class VmPaused(Record):
    """The VM stands still, or goes on; `notes` are worth reading."""

    vmid: int
    name: str
    paused: bool
    notes: tuple[str, ...] = ()


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
    length4: int = 31  # of the network that `guest4` and `host4` are in
    forwards: tuple[Forward, ...] = ()
    lease_name: str = ""  # the host name with which the guest has asked for its address
    vhost: bool = False  # vm.conf says so; the counter `vhost` says whether the kernel moves the frames now


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
    console_log: str = ""
    seed: bool = False  # whether it has one


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
    login: str = ""  # the user that its seed makes; "": none, or for others than those who may control the VM


@message(0x40, ANSWER, partial=True)
class TroubleInfo(Record):
    """Something that is wrong with a device of a VM now, for `vmctl status -v`."""

    device: str  # such as disk0
    text: str
    since_s: int  # seconds since 1970


@message(0x7B, ANSWER, partial=True)
class Event(Record):
    """Something that has happened."""

    number: int  # among all events of this daemon, from 1 on
    at_ms: int  # milliseconds since 1970
    what: str  # one of the words of `vmd.parent.events`
    vmid: int = 0  # 0: it is the daemon's
    name: str = ""
    state: str = ""  # of the VM, from then on
    text: str = ""  # why, for people
    how: str = ""  # of an end: as in LifeEnd
    device: str = ""  # such as disk0
    value: str = ""  # an address that was leased, the tag of a snapshot, the bytes that a disk has now
    lost: int = 0  # events that were not read in time


@message(0x7C, ANSWER)
class EventsSeen(Record):
    """Those were all up to this number; the `newest` may be a later one.  `vmid`: as it was asked for."""

    vmid: int
    number: int
    newest: int


@message(0x4E, ANSWER, partial=True)
class GenerationInfo(Record):
    """A vmm, and with it the program that serves its VMs.  The last one is the newest."""

    number: int
    version: str
    vms: int = 0  # how many have a process there


@message(0x43, ANSWER)
class ConsoleLogAt(Record):
    """The console log of a VM is `path`; what was before that is in `path`.1 and so on, up to `path`.`keep`."""

    vmid: int
    name: str
    path: str
    keep: int = 0


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


REQUESTS = relays(Proc.CONTROL, Proc.CLIENT)  # what control passes on to the parent
ANSWERS = relays(Proc.CONTROL, Proc.PARENT)  # ... and to the client that asked
