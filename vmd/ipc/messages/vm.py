"""Between the parent and the process of a VM; vmm passes it on, and has a word of its own at most."""


from vmd.config.model import VmConfig
from vmd.enums import IntEnum
from vmd.ipc.messages.shared import DiskImages, Live, Trouble
from vmd.ipc.routes import FROM_VM, TO_VM, Proc, message
from vmd.record import Record


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
    pxe: bool = False  # `boot device net`: DHCP tells a boot file
    length4: int = 31  # of the network of `guest4` and `host4`
    asks: bool = True  # it has no name servers of its own: those of all are asked for whenever its guest asks
    vhost: bool = False  # the kernel may move its frames: there are two `vhosts` for it


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
    """Start the VM; VmExited follows in either case.

    fds: what the VM uses comes over the `couriers` (vmd.ipc.courier): `boot`, the kernel or firmware, read-only;
    `initrd`; `disks`, the images of all disks, one disk after the other, each in the order of `disks`; `cdrom`.
    `boot` and `initrd` come with this instead where the parent has copies of what a client has opened.
    `memory` is an empty memory file: the guest's.
    `tty` and `tty_slave` are the two sides of the console; `shown` is what it has shown (vmd.backlog); `taps` are one
    for each of `nics`.  `figures`, added by vmm, is where devices leave what they count (vmd.ipc.devmsg).
    `seed` is a constant memory file: what the guest's cloud-init reads, if there is a `config.seed`.
    `vhosts` are two for each of `nics` that has `vhost`: /dev/vhost-net, and a packet socket (vmd.ipc.devmsg).
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
    """The guest executes.

    fds: `process` is a pidfd of the VM process, added by vmm: pids of vmm's namespace mean nothing to the parent.
    `figures`, as well, is as of StartVm.
    """

    vmid: int
    paused: bool = False  # received, and to wait


@message(0x7D, FROM_VM)
class DeviceEvent(Record):
    """Something has happened to a device; `what` is one of OF_DEVICES of `vmd.parent.events`."""

    vmid: int
    what: str
    device: str  # such as disk0
    text: str = ""


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
    """Stand still, or go on; by `force` also where somebody else has written to its disks."""

    vmid: int
    paused: bool
    force: bool = False


@message(0x6C, FROM_VM)
class PauseDone(Record):
    """The machine stands still, or goes on; a `text` says why it does not do what was asked.

    `notes`: what whoever has asked should know.
    """

    vmid: int
    paused: bool
    text: str = ""
    notes: tuple[str, ...] = ()


@message(0xFA, FROM_VM)
class VmHalted(Record):
    """The machine stands still though nobody has asked for it; `text` says why."""

    vmid: int
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
    fds=("courier", "memory", "tty", "tty_slave", "shown", "figures?", "seed?"),
    answered_by=("TransferProgress", "ReceivedHeader", "VmFailed"),
)
class ReceiveVm(Record):
    """Become the VM that the `stream` has that comes over `courier`; other descriptors as for StartVm.

    `seed` is empty: the VM process fills it with the seed that comes with the stream, if one does.

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


@message(0x73, TO_VM, fds=("couriers*", "taps*", "vhosts*"), answered_by=("VmRunning", "VmFailed"))
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


class NicCounters(Record):
    """What one network interface has done, under the names of devmsg.COUNTER_NAMES; of VMs without `figures`."""

    values: tuple[int, ...]


@message(0x75, TO_VM, answered_by=("DevicesReported",))
class AskDevices(Record):
    """Say what is wrong with any device."""

    vmid: int


@message(0x76, FROM_VM)
class DevicesReported(Record):
    """What is wrong now; of a VM without `figures` also one entry for each interface, in their order."""

    vmid: int
    nics: tuple[NicCounters, ...] = ()
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


@message(0xD8, TO_VM)
class LimitVm(Record):
    """Have the devices of a VM keep the limits of `config`, of which nothing else counts."""

    vmid: int
    config: VmConfig
