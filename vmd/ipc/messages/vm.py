"""Between the parent and a VM's process; vmm relays the messages.  Some are only between vmm and the VM's process."""


from vmd.config.model import VmConfig
from vmd.enums import IntEnum
from vmd.ipc.messages.shared import DiskImages, Live, Trouble
from vmd.ipc.routes import FROM_VM, TO_VM, Proc, message
from vmd.record import Record

KVM_FD = 4  # where the process of a VM finds /dev/kvm


class NicLink(Record):
    """A network interface, as its VM's process needs it.  Addresses are bytes; an empty one is not given."""

    name: str  # of the tap
    lladdr: bytes  # the guest's
    host_mac: bytes  # the tap's
    locked: bool
    local: bool  # the addresses below are for `local` interfaces only
    mtu: int
    guest4: bytes = b""
    host4: bytes = b""
    host_ll: bytes = b""  # the tap's link-local address
    prefix6: bytes = b""  # the /64 that is announced, as an address
    dns4: tuple[bytes, ...] = ()  # empty: the host itself
    dns6: tuple[bytes, ...] = ()
    pxe: bool = False  # `boot device net`: DHCP names a boot file
    length4: int = 31  # prefix length of the network of `guest4` and `host4`
    asks: bool = True  # no name servers are configured: the parent is asked for the host's at each request of the guest
    vhost: bool = False  # the kernel may move the frames; two of `vhosts` are for this interface


@message(
    0x60,
    TO_VM,
    fds=(
        "couriers*", "boot?", "initrd?", "memory", "tty", "tty_slave", "shown", "taps*", "figures?", "seed?",
        "vhosts*",
    ),
    answered_by=("VmRunning", "VmFailed"),
)  # fmt: skip
class StartVm(Record):
    """Start the VM.  VmExited follows in either case.

    fds: the files of the VM come over the `couriers` (vmd.ipc.courier): `boot`, the kernel or firmware, read-only;
    `initrd`; `disks`, the images of all disks, one disk after the other, each in the order of the field `disks`;
    `cdrom`.  If the parent has copies of the client's `boot` and `initrd`, they come with this message instead.
    `memory` is an empty memory file for the guest's memory.
    `tty` and `tty_slave` are the two sides of the console; `shown` is its backlog (vmd.backlog).
    `taps` has one for each of `nics`.
    `figures`, which vmm adds, is the file of figures (vmd.ipc.devmsg).
    `seed` is a constant memory file with the disk for the guest's cloud-init, if there is a `config.seed`.
    `vhosts` has two for each of `nics` with `vhost`: /dev/vhost-net, and a packet socket (vmd.ipc.devmsg).
    """

    vmid: int
    config: VmConfig
    boot_name: str  # of the kernel or firmware, for messages
    verbosity: int
    disks: tuple[DiskImages, ...] = ()
    nics: tuple[NicLink, ...] = ()
    boot_options: str = ""  # of boot(8), for an OpenBSD kernel


@message(0x61, FROM_VM, fds=("process?", "figures?"))
class VmRunning(Record):
    """The guest runs.

    fds: vmm adds both.  `process` is a pidfd of the VM's process, because pids of vmm's namespace mean nothing to the
    parent.  `figures` is the same as in StartVm.
    """

    vmid: int
    paused: bool = False  # the VM was received, and stays paused


@message(0x7D, FROM_VM)
class DeviceEvent(Record):
    """An event of a device; `what` is one of OF_DEVICES of `vmd.parent.events`."""

    vmid: int
    what: str
    device: str  # for example disk0
    text: str = ""


@message(0x62, FROM_VM)
class VmFailed(Record):
    """The VM could not be built."""

    vmid: int
    code: int
    text: str


class StopMode(IntEnum):
    """How to end a VM."""

    GRACEFUL = 0  # power button, with the timeouts of *cat. 4.4*
    KILL = 1


@message(0x63, TO_VM)
class StopVm(Record):
    """End the VM; VmExited follows."""

    vmid: int
    mode: StopMode


class Outcome(IntEnum):
    """How the life of a VM process ended; also its exit status."""

    POWER_OFF = 0  # the guest has shut down, by itself or on request
    REBOOT = 11  # the guest reset itself: start it again (upstream's EAGAIN)
    ENDED = 3  # ended by force, or because the guest did not shut down in time
    FAILED = 1  # the VM could not go on; VmEnding has the reason
    KILLED = 2  # killed by a signal, or ended without VmEnding


@message(0x64, (Proc.VM, Proc.VMM))
class VmEnding(Record):
    """The last message of a VM's process: why it ends."""

    text: str


@message(0x66, TO_VM, fds=("tty?", "tty_slave?"), answered_by=("ConsoleSnapshotEnd",))
class ConsoleSnapshot(Record):
    """Drop the output that waits in the pty, because the backlog has it too.

    With `tty` and `tty_slave` use that pty from now on.
    """

    vmid: int


@message(0x67, FROM_VM)
class ConsoleSnapshotEnd(Record):
    """The pty has none of the first `end` bytes of output, and all bytes after them."""

    end: int


@message(0x68, TO_VM)
class SendBreak(Record):
    """Signal a BREAK to the guest's UART."""

    vmid: int


@message(0x6B, TO_VM, answered_by=("PauseDone",))
class PauseVm(Record):
    """Pause the machine, or let it go on.  With `force` it goes on even if somebody else has written to its disks."""

    vmid: int
    paused: bool
    force: bool = False


@message(0x6C, FROM_VM)
class PauseDone(Record):
    """The machine stands still, or goes on.  If the request was for the other state, `text` says why.

    `notes` are sentences for the user who has asked.
    """

    vmid: int
    paused: bool
    text: str = ""
    notes: tuple[str, ...] = ()


@message(0xFA, FROM_VM)
class VmHalted(Record):
    """The machine has stopped by itself, without a PauseVm; `text` says why."""

    vmid: int
    text: str = ""


@message(0x6D, TO_VM, fds=("courier",), answered_by=("TransferProgress", "SendDone"))
class SendVm(Record):
    """Pause the machine, and write it to the `stream` that comes over `courier`.  VmExited follows, unless `keep`.

    `one_shot` is written to the stream: the VM ends when the guest resets itself (*cat. 4.4*).
    `two_way`: HeaderSent follows, and memory is written only after SendOn.  When all is written, the machine stands
    still until EndSend.
    `live`: as in SendRequest.
    """

    vmid: int
    keep: bool
    one_shot: bool
    two_way: bool = False
    live: Live | None = None


@message(0x6E, FROM_VM)
class SendDone(Record):
    """The stream is complete; or `text` says why not, and the machine is as before.  Other fields are as in VmSent."""

    vmid: int
    sent_bytes: int
    text: str = ""
    stopped_ns: int = 0  # when the machine was stopped for the rest, by CLOCK_MONOTONIC
    rounds: int = 0
    still_ms: int = 0


@message(0xE4, FROM_VM)
class HeaderSent(Record):
    """The header is written, so the receiver can check whether it takes the VM."""

    vmid: int


@message(0xE5, TO_VM)
class SendOn(Record):
    """The receiver takes the VM: write the rest.  SendDone follows."""

    vmid: int


@message(0xE6, TO_VM, answered_by=("DisksLetGo",))
class LetDisksGo(Record):
    """All is written: let go of the disks, for the receiver."""

    vmid: int


@message(0xE7, FROM_VM)
class DisksLetGo(Record):
    """The disks are let go; or `text` says why not, and none is let go."""

    vmid: int
    text: str = ""


@message(0xE8, TO_VM, answered_by=("SendUndone",))
class EndSend(Record):
    """With `sent` the machine runs at the target: end.  Otherwise take back the disks, go on, and send SendUndone."""

    vmid: int
    sent: bool


class TakenBack(IntEnum):
    """The result of taking back the disks of a VM that was to go on at another host."""

    DONE = 0  # also if they had not been let go
    IN_USE = 1
    CHANGED = 2  # written to since they were let go: the guest has run at the other host
    FAILED = 3


@message(0xE9, FROM_VM)
class SendUndone(Record):
    """The machine is as before; or it stands still without its disks, and `text` names one of them."""

    vmid: int
    outcome: TakenBack
    text: str = ""


@message(
    0x6F,
    TO_VM,
    fds=("courier", "memory", "tty", "tty_slave", "shown", "figures?", "seed?"),
    answered_by=("TransferProgress", "ReceivedHeader", "VmFailed"),
)
class ReceiveVm(Record):
    """Become the VM in the `stream` that comes over `courier`.  Other descriptors are as in StartVm.

    `seed` is empty.  If a seed comes with the stream, the VM's process fills it in.

    There are four more steps, because the parent has to check the header, and has to have the disks opened:
    ReceivedHeader, ReceiveMemory, ReceivedMachine, ResumeReceived.  VmRunning is the end.  VmFailed may come at any
    time.
    """

    vmid: int
    name: str
    verbosity: int


@message(0x70, FROM_VM)
class ReceivedHeader(Record):
    """The configuration in the stream's header.  Nobody has checked it yet."""

    vmid: int
    config: VmConfig
    one_shot: bool


@message(0x71, TO_VM, answered_by=("TransferProgress", "ReceivedMachine", "VmFailed"))
class ReceiveMemory(Record):
    """Read the rest of the stream."""

    vmid: int


@message(0x72, FROM_VM)
class ReceivedMachine(Record):
    """The stream was complete and undamaged.  The sender has let go of the disks, or will soon."""

    vmid: int


@message(0x73, TO_VM, fds=("couriers*", "taps*", "vhosts*"), answered_by=("VmRunning", "VmFailed"))
class ResumeReceived(Record):
    """Run the received VM; with `paused` it stays paused.  Descriptors are as in StartVm."""

    vmid: int
    config: VmConfig
    paused: bool
    disks: tuple[DiskImages, ...] = ()
    nics: tuple[NicLink, ...] = ()


@message(0xB9, TO_VM, fds=("courier", "stream?"), answered_by=("TransferProgress", "DisksLent"))
class LendDisks(Record):
    """Pause the machine, send its disks over `courier`, and write the machine to `stream`.

    The machine stands still from then until TakeDisksBack.  With `look` the disks are only read, and the machine is not
    paused.  `one_shot` is as in SendVm.
    """

    vmid: int
    one_shot: bool = False
    look: bool = False


@message(0xBA, FROM_VM)
class DisksLent(Record):
    """The disks were sent and the machine was written; or `text` says why not."""

    vmid: int
    sent_bytes: int = 0
    text: str = ""


@message(0xBB, TO_VM, answered_by=("DisksBack",))
class TakeDisksBack(Record):
    """The disks were given back: read their metadata again, and go on as before."""

    vmid: int


@message(0xBC, FROM_VM)
class DisksBack(Record):
    """The machine goes on, or stays paused as before; `text` says what is wrong, if anything."""

    vmid: int
    text: str = ""


@message(0x74, TO_VM)
class CancelTransfer(Record):
    """Stop sending or receiving: the stream is not needed any more."""

    vmid: int


class NicCounters(Record):
    """The counters of a network interface, in the order of devmsg.COUNTER_NAMES.  Only for VMs without `figures`."""

    values: tuple[int, ...]


@message(0x75, TO_VM, answered_by=("DevicesReported",))
class AskDevices(Record):
    """Ask for the problems of the devices."""

    vmid: int


@message(0x76, FROM_VM)
class DevicesReported(Record):
    """Problems of the devices.  For a VM without `figures` also the counters of its interfaces, in order."""

    vmid: int
    nics: tuple[NicCounters, ...] = ()
    troubles: tuple[Trouble, ...] = ()


@message(0x7E, FROM_VM, answered_by=("Resolvers",))
class AskResolvers(Record):
    """Ask for the host's name servers.  Not answered if it is asked too often."""

    vmid: int


@message(0x7F, TO_VM)
class Resolvers(Record):
    """The name servers for guests; empty: the host itself."""

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
    """The disk has the new size, and the guest has been told; or `text` says why not, and `code` is an errno."""

    vmid: int
    code: int = 0
    text: str = ""


@message(0xD6, TO_VM, fds=("courier?",), answered_by=("DiscChanged",))
class ChangeDisc(Record):
    """Put the disc that comes over `courier` into the drive; without `path` remove the disc."""

    vmid: int
    path: str = ""
    force: bool = False


@message(0xD7, FROM_VM)
class DiscChanged(Record):
    """The disc was changed; or `text` says why not, and the drive has the disc that it had before."""

    vmid: int
    code: int = 0
    text: str = ""


@message(0xD8, TO_VM)
class LimitVm(Record):
    """Apply the limits in `config` to the VM's devices.  All other parts of `config` are ignored."""

    vmid: int
    config: VmConfig
