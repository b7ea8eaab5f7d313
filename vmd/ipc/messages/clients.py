"""Between vmctl and the parent; control relays the messages.

Requests go client -> control -> parent as the same message.  The client fills in `caller`, so it is not trusted: the
parent has accepted the connection, and knows its user.  The header's `peerid` is the parent's number for the
connection; answers carry the same number.
"""


from vmd.config.model import BootDevice, Forward, VmConfig
from vmd.enums import IntEnum
from vmd.ipc.messages.figures import LifeEnd
from vmd.ipc.messages.shared import Live, SnapshotAction
from vmd.ipc.routes import ANSWER, Proc, Who, message, relays, request
from vmd.record import Record

PROTOCOL = 2  # the version in Hello; version 1 had no Hello


@message(0x01, (Proc.CLIENT, Proc.CONTROL), (Proc.CONTROL, Proc.CLIENT), answered_by=("Hello",))
class Hello(Record):
    """The first packet each way on the control socket; all records on that connection travel by name.

    The receiver ignores a field that it does not know.  A missing field takes its default.  So a new field needs a
    default with the meaning of the behaviour before.  A client without Hello is served as in protocol 1
    (`vmd.ipc.first`).
    """

    version: int  # PROTOCOL
    program: str = ""  # the release, for people to read


class Caller(Record):
    """The process that asks, as the kernel reports it (SO_PEERCRED)."""

    uid: int
    gid: int
    pid: int


class Request(Record):
    """Base of all requests of clients."""

    caller: Caller | None = None


class VmRequest(Request):
    """A request about one VM, by id or, with id 0, by name."""

    vmid: int = 0
    name: str = ""


@request(0x10, Who.OWNER, "ConsoleReady", "VmStarted", fds=("kernel?", "initrd?", "seed?"))
class StartRequest(VmRequest):
    """Start a VM: a known one (`config` None), or the one that `config` describes.

    fds: the client has opened `kernel` and `initrd`, so users may boot files that only they can read.  `seed` has the
    parts from which the seed of a new VM is made (`vmd.seed`).  Control keeps the descriptors until `PassFiles`, and
    lists them in `files`; it replaces the client's own list.
    For a known VM the descriptors, `boot_device` and the fields `kernel` and `initrd` hold for one boot only.  These
    two fields are DiskFiles in words: files on the VM's own disks.
    With `console` the client gets the console, as by a ConsoleRequest, before the guest's first output.  Then
    ConsoleReady is the first answer, if no other client has the console.
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
    """Ask the guest to shut down; with `force` kill the VM.

    With `wait` the answer is VmTerminated, when the VM has ended.
    """

    force: bool = False
    wait: bool = False


@request(0x12, Who.OWNER, "VmTerminated")
class WaitRequest(VmRequest):
    """Wait until the VM has ended."""


@request(0x13, Who.EVERYBODY, "VmInfo", "End")
class ListRequest(Request):
    """List all VMs."""


@request(0x14, Who.ROOT, "Ok")
class LoadRequest(Request):
    """Read another configuration file, in addition.  `path` is absolute."""

    path: str


@request(0x15, Who.ROOT, "Ok")
class ReloadRequest(Request):
    """Read the main configuration file again (*cat. 2.8*)."""


@request(0x16, Who.ROOT, "Ok")
class ResetRequest(Request):
    """Terminate and forget all VMs, or forget all switches, or both (*cat. 2.8*)."""

    vms: bool
    switches: bool


@request(0x17, Who.ROOT, "Ok")
class LogRequest(Request):
    """Set the verbosity of all processes, 0 or 2."""

    verbosity: int


@request(0x18, Who.OWNER, "ConsoleOutput", "ConsoleAttached")
class ConsoleRequest(VmRequest):
    """Attach to a console; with `force` take it from the client that has it.

    The backlog comes first, in pieces.  If the VM does not run, its last backlog comes, then Failed with ESRCH.  Failed
    with VMD_CONSOLE_TAKEN comes later, without a request, when another client takes the console.
    """

    force: bool = False


@request(0x19, Who.OWNER, "Ok")
class ConsoleBreak(VmRequest):
    """Send a BREAK to the guest's serial line.  Only the client that has the console may ask."""


@request(0x1A, Who.OWNER, "VmPaused")
class PauseRequest(VmRequest):
    """Pause a VM between two instructions, or let it go on.  No effect if it is in that state already.

    With `force` a VM that is in doubt goes on here: the user vouches that it does not run at another host.
    """

    paused: bool
    force: bool = False


@request(0x1C, Who.ROOT, "TransferProgress", "VmSent", fds=("stream?",))
class SendRequest(VmRequest):
    """Write a VM to `stream`.  Then the VM ends here; with `keep` it goes on.  After a failure it goes on as before.

    With `live` the VM runs while most of its memory is written, and stands still only for the rest.

    fds: the client has opened `stream`; control keeps it until `PassFiles`.
    """

    keep: bool = False
    live: Live | None = None


@request(0x1D, Who.ROOT, "TransferProgress", "VmReceived", fds=("stream?",))
class ReceiveRequest(Request):
    """Read a VM from `stream`, and let it go on under `name`; with `paused` it stays paused.

    fds: as for SendRequest.
    """

    name: str
    paused: bool = False


@request(0x1F, Who.EVERYBODY, "NicInfo", "TroubleInfo", "End")
class NicsRequest(VmRequest):
    """Ask for the network interfaces of a VM, and for the problems of its devices."""


@request(0xF0, Who.EVERYBODY, "VmFigures", "End")
class FiguresRequest(VmRequest):
    """Ask for the figures of all VMs, or of one by id or name."""


@request(0x7A, Who.EVERYBODY, "Event", "EventsSeen")
class EventsRequest(VmRequest):
    """Ask for events of all VMs and the daemon, or of one VM.

    `since` is the number of the last event that the client has seen.  The answer is the events after it; if there are
    none, the request waits for the next events.  With 0 the answer is all remembered events, with None only the number
    of the last event.  With `wait` False the answer comes at once, even without events.
    """

    since: int | None = None
    wait: bool = True


@request(0x20, Who.EVERYBODY, "SwitchInfo", "End")
class SwitchesRequest(Request):
    """Ask for all switches of the configuration."""


@request(0x22, Who.OWNER, "ConsoleOutput", "ConsoleWatched")
class ConsoleWatch(VmRequest):
    """Watch a console without attaching to it.

    The output comes in pieces.  Without `since` the backlog is the answer, at once.  Otherwise the client has seen the
    first `since` bytes, and the answer comes when there are more, or when the VM has ended.
    """

    since: int | None = None


@request(0x23, Who.OWNER, "ConsoleLogAt")
class ConsoleLogRequest(VmRequest):
    """Ask where the console log of a VM is.  The client reads it with its own rights."""


@request(0xA8, Who.OWNER, "TransferProgress", "SnapshotInfo", "SnapshotsDone")
class SnapshotRequest(VmRequest):
    """List or change the snapshots of a VM's disks.  `tag` is the name of the snapshot, "" to list all."""

    action: SnapshotAction = SnapshotAction.LIST
    tag: str = ""


@request(0xE0, Who.ROOT, "TransferProgress", "MigrationAt", fds=("stream?",))
class MigrateRequest(VmRequest):
    """Migrate a VM away: write it to `stream`.  It goes on at the other host only after this client's COMMIT.

    Answered when the stream's header is written.  The same client asks for the next steps with `MigrationStep`.  If it
    disconnects before COMMIT, the VM goes on here as before.  The VM runs while its memory is written, and stands still
    for the rest, as `live` says.  fds: as for SendRequest.
    """

    live: Live = Live()


@request(0xE1, Who.ROOT, "TransferProgress", "MigrationAt", fds=("stream?",))
class MigrateInRequest(Request):
    """Migrate a VM here: read it from `stream`.  It goes on under `name` only after this client's COMMIT.

    Answered when the header was checked: this VM can go on here.  The VM's disks must be in use by the sender; disks
    that are not in use cannot be the sender's.  With `force` this is not checked.  The same client asks for the next
    steps with `MigrationStep`.  If it disconnects before COMMIT, the VM is dropped here.  fds: as for SendRequest.
    """

    name: str
    force: bool = False


class Step(IntEnum):
    """The next step of a migration."""

    GO_ON = 1  # the source writes all memory; the target reads all memory
    COMMIT = 2  # the source lets the disks go; the target takes them, and runs the VM
    DONE = 3  # the VM runs at the target: the source ends it
    BACK = 4  # the VM does not run at the target: the source lets it go on


@request(0xE2, Who.ROOT, "TransferProgress", "MigrationAt", "VmSent", "VmReceived")
class MigrationStep(VmRequest):
    """Make the next step of a migration.  Answered when it is done.

    Failed means that the migration has ended.  After COMMIT at the target, the code VMD_IN_DOUBT means that the VM may
    run or may have run at the target; with any other code it never ran there.  BACK is always answered by Failed, which
    says in which state the VM is.
    """

    step: Step
    locks_travel: bool = False  # GO_ON at the source: as the target's `MigrationAt` says
    paused: bool = False  # COMMIT at the target: the VM stays paused
    in_doubt: bool = False  # BACK: it is not known whether the VM runs at the target
    text: str = ""  # BACK: the reason


@request(0xD0, Who.OWNER, "Resized")
class ResizeRequest(VmRequest):
    """Make a disk of a VM larger, whether the VM runs or not.  The user must also be allowed to write to the image."""

    disk: str  # disk0, or 0, or the path of its image
    size_bytes: int


@request(0xD1, Who.OWNER, "DiscInserted")
class DiscRequest(VmRequest):
    """Put another disc into the CD-ROM drive of a VM; without `path` remove the disc.  The next start uses it too.

    The file is opened with the client's rights.  A drive that the guest has locked keeps its disc unless `force` is
    given.
    """

    path: str = ""
    force: bool = False


@request(0x2E, Who.ROOT, "Ok")
class UpgradeRequest(Request):
    """Replace the daemon by the program that is installed now.  It adopts all VMs, which go on meanwhile.

    The new program first rehearses.  With `rehearse_only` that is all; otherwise the connection ends without an answer.
    """

    rehearse_only: bool = False


@request(0x2F, Who.EVERYBODY, "GenerationInfo", "End")
class GenerationsRequest(Request):
    """Ask for all generations: each is a vmm with the VMs that it has started, and may be of an earlier daemon."""


@message(0x30, ANSWER)
class Ok(Record):
    """Done.  `notes` are sentences to show, for example which changes wait for a restart."""

    notes: tuple[str, ...] = ()


@message(0x31, ANSWER)
class Failed(Record):
    """Not done: an errno or VMD_* code, and a sentence with the reason."""

    code: int
    text: str


@message(0x32, ANSWER)
class VmStarted(Record):
    """The VM runs; its console is `tty`.  `notes` are sentences to show, for example about a disk's odd length."""

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
    """The VM has ended.  `text` says how; `how` is one word for it (`LifeEnd`)."""

    vmid: int
    name: str
    text: str = ""
    how: str = ""


@message(0x36, ANSWER)
class End(Record):
    """The end of a list."""


@message(0x37, ANSWER, partial=True)
class ConsoleOutput(Record):
    """A piece of a console's recent output."""

    data: bytes


@message(0x44, ANSWER, partial=True)
class ConsoleReady(Record):
    """The client has the console of a VM that is being started, and may open `tty`.  There is no output yet."""

    vmid: int
    name: str
    tty: str


@message(0x38, ANSWER)
class ConsoleAttached(Record):
    """The client has the console until it disconnects.  It opens `tty` with its own rights."""

    vmid: int
    name: str
    tty: str


@message(0x39, ANSWER)
class VmPaused(Record):
    """The VM is paused, or goes on.  `notes` are sentences to show."""

    vmid: int
    name: str
    paused: bool
    notes: tuple[str, ...] = ()


@message(0x3B, ANSWER)
class VmSent(Record):
    """The stream is complete."""

    vmid: int
    name: str
    sent_bytes: int
    downtime_ms: int = 0  # of a migration: from the stop here until the VM is known to run at the target
    rounds: int = 0  # of a live send: rounds over the memory
    still_ms: int = 0  # of a live send: how long the VM stood still


@message(0x3C, ANSWER)
class VmReceived(Record):
    """The VM goes on here, or stays paused."""

    vmid: int
    name: str
    pid: int
    tty: str
    paused: bool


@message(0x3F, ANSWER, partial=True)
class NicInfo(Record):
    """A network interface of a VM, for `vmctl status -v`.  Addresses are bytes; an empty one is not given."""

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
    counters: tuple[int, ...] = ()  # in the order of devmsg.COUNTER_NAMES; empty: its process has not answered
    length4: int = 31  # prefix length of the network of `guest4` and `host4`
    forwards: tuple[Forward, ...] = ()
    lease_name: str = ""  # the host name that the guest gave when it asked for its address
    vhost: bool = False  # as in vm.conf; the counter `vhost` tells whether the kernel moves the frames now


class DiskInfo(Record):
    """A disk of a VM, for `vmctl status --json`."""

    path: str
    format: str  # "": it is guessed from the name, or the first bytes


class VmFiles(Record):
    """The files that a VM uses; "": none."""

    boot_image: str = ""  # "": the default firmware
    initrd: str = ""
    disks: tuple[DiskInfo, ...] = ()
    cdrom: str = ""
    console_log: str = ""
    seed: bool = False  # whether the VM has a seed


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
    owner: str  # "user" or "user:group"; a number if there is no name
    state: str
    text: str = ""  # why it is not running, if that is known
    since_s: int = 0  # when the state began; 0: not known
    started_s: int = 0  # when this life began; 0: it does not run
    restarts: int = 0  # how often the guest has reset itself in this life
    autostart: bool = False  # it starts with the daemon
    files: VmFiles | None = None  # None: the caller may not control the VM
    nics: tuple[NicInfo, ...] = ()  # without counters
    ended: LifeEnd | None = None  # None: it has not ended since this daemon knows it
    login: str = ""  # the user that its seed creates; "": there is none, or the caller may not control the VM


@message(0x40, ANSWER, partial=True)
class TroubleInfo(Record):
    """Something that is wrong with a device of a VM now, for `vmctl status -v`."""

    device: str  # such as disk0
    text: str
    since_s: int  # seconds since 1970


@message(0x7B, ANSWER, partial=True)
class Event(Record):
    """An event of a VM or of the daemon."""

    number: int  # among all events of this daemon, counted from 1
    at_ms: int  # milliseconds since 1970
    what: str  # one of the words of `vmd.parent.events`
    vmid: int = 0  # 0: the event is the daemon's
    name: str = ""
    state: str = ""  # of the VM after the event
    text: str = ""  # the reason, for people to read
    how: str = ""  # of an end: as in LifeEnd
    device: str = ""  # for example disk0
    value: str = ""  # a leased address, a snapshot's tag, or a disk's new size in bytes
    lost: int = 0  # number of events that the client did not read in time


@message(0x7C, ANSWER)
class EventsSeen(Record):
    """The end of the events: all up to `number` were sent."""

    vmid: int  # as in the request
    number: int
    newest: int  # number of the daemon's newest event, which may be later


@message(0x4E, ANSWER, partial=True)
class GenerationInfo(Record):
    """A generation: a vmm, with the version of the program that runs its VMs.  The last one sent is the newest."""

    number: int
    version: str
    vms: int = 0  # number of VMs that have a process there


@message(0x43, ANSWER)
class ConsoleLogAt(Record):
    """The console log of a VM is `path`.  Older output is in `path`.1, `path`.2 and so on, up to `path`.`keep`."""

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
    """The end of the output, which was sent up to byte `end`.  `lost` bytes of it had left the backlog."""

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

    `locks_travel`, after the first step at the target: all disks are in use.  So locks are visible at both hosts, and
    the target cannot lock a disk while the source has it.
    `paused`, after COMMIT at the source: the VM was paused, and has to stay paused.
    """

    vmid: int
    name: str
    locks_travel: bool = False
    paused: bool = False


@message(0xD2, ANSWER)
class Resized(Record):
    """The disk has this size now."""

    vmid: int
    name: str
    disk: str  # such as disk0
    path: str
    size_bytes: int
    running: bool = False  # the VM runs, and the guest has been told


@message(0xD3, ANSWER)
class DiscInserted(Record):
    """The drive has this disc now; without `path` it has none."""

    vmid: int
    name: str
    path: str
    running: bool = False
    notes: tuple[str, ...] = ()  # sentences to show, for example about an odd length


REQUESTS = relays(Proc.CONTROL, Proc.CLIENT)  # messages that control relays to the parent
ANSWERS = relays(Proc.CONTROL, Proc.PARENT)  # messages that control relays to the client that asked
