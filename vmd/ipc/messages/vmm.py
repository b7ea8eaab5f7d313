"""Between the parent and vmm, besides what it passes on for VMs (`vmd.ipc.messages.vm`)."""

from vmd.ipc.messages.vm import Outcome
from vmd.ipc.routes import Proc, message
from vmd.record import Record


@message(0x65, (Proc.VMM, Proc.PARENT))
class VmExited(Record):
    """The VM process is gone and reaped."""

    vmid: int
    pid: int
    outcome: Outcome
    text: str


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
    vmid: int = 0  # of the VM that has ended with it, which is told next; 0: none


@message(0xC2, (Proc.PARENT, Proc.VMM), fds=("log",), answered_by=("VmHeld", "VmsHeld"))
class AskVms(Record):
    """Which VMs are there?  Asked by a parent that takes the place of one that has ended.

    What VMs answer to questions of that one is not passed on.  fds: `log` is where vmm writes its lines from now on.
    """


@message(
    0xC3,
    (Proc.VMM, Proc.PARENT),
    fds=(
        "process?", "tty?", "tty_slave?", "shown?", "memory?", "log?", "boot?", "initrd?", "taps*", "figures?", "seed?",
    ),
    partial=True,
)  # fmt: skip
class VmHeld(Record):
    """One VM, as vmm knows it: it has a process, or has ended and the parent has not taken notice of that.

    fds: `process` is a pidfd of its process; `log` is what its lines come out of; the others are what it was given with
    StartVm or ReceiveVm, and since.  One that an earlier version has started has no `figures`.
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


@message(0x93, (Proc.VMM, Proc.PARENT), fds=("log",))
class VmLog(Record):
    """What the process of a VM writes to the log comes out of `log`; sent as soon as it is this VM.

    `vmid` 0: it has ended before it became one.
    """

    vmid: int
