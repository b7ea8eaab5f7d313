"""Between the parent and vmm, besides the messages that vmm relays (`vmd.ipc.messages.vm`)."""

from vmd.ipc.messages.vm import Outcome
from vmd.ipc.routes import Proc, message
from vmd.record import Record


@message(0x65, (Proc.VMM, Proc.PARENT))
class VmExited(Record):
    """The VM's process has ended and was reaped."""

    vmid: int
    pid: int
    outcome: Outcome
    text: str


@message(0x69, (Proc.PARENT, Proc.VMM), fds=("kvm",))
class KvmFd(Record):
    """/dev/kvm.  The parent opens it, because no other process can."""


@message(0xC0, (Proc.PARENT, Proc.VMM), fds=("group?",))
class VmSlot(Record):
    """The user id and control group for a VM's process.

    One comes with each start of a VM: it is for the process that vmm then starts for the reserve.

    fds: the process joins its control group by writing 0 to `group`.
    """

    uid: int = 0  # 0: the uid of vmm
    group: int = 0  # the parent's number of the group; 0: none


@message(0xC1, (Proc.VMM, Proc.PARENT))
class VmSlotOver(Record):
    """The slot is free: its process was reaped, or none will be started."""

    group: int
    vmid: int = 0  # the VM that ended with the process, and for which VmExited comes next; 0: none


@message(0xC2, (Proc.PARENT, Proc.VMM), fds=("log",), answered_by=("VmHeld", "VmsHeld"))
class AskVms(Record):
    """Ask for all VMs.  Sent by a parent that takes the place of one that has ended.

    From now on vmm drops the VMs' answers to requests of the old parent.  fds: vmm writes its log lines to `log` from
    now on.
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
    """One VM, as vmm knows it.  It has a process; or it has ended, and the old parent has not acknowledged that.

    fds: `process` is a pidfd of its process; its log lines are read from `log`; the others are those of StartVm or
    ReceiveVm, and later ones.  A VM that an earlier version has started has no `figures`.
    """

    vmid: int
    group: int = 0
    running: bool = False  # VmRunning has come
    paused: bool = False
    stopping: bool = False  # StopVm was sent
    arriving: bool = False  # it is being received, and does not run yet
    complete: bool = False  # arriving: all of its stream was read
    resumed: bool = False  # arriving: ResumeReceived was sent
    sending: bool = False
    keep: bool = False  # sending: the VM goes on afterwards
    two_way: bool = False  # sending: the VM migrates
    written: bool = False  # sending: all was written
    letting_go: bool = False  # sending: LetDisksGo was sent
    let_go: bool = False  # sending: the disks are let go
    undoing: bool = False  # sending: EndSend was sent, to take them back
    lending: bool = False  # LendDisks was sent, for a snapshot
    lent: bool = False  # lending: DisksLent has come, perhaps with an error
    returning: bool = False  # lending: TakeDisksBack was sent
    outcome: Outcome | None = None  # None: the VM has not ended
    text: str = ""


@message(0xC4, (Proc.VMM, Proc.PARENT), fds=("process",))
class VmsHeld(Record):
    """The end of the VmHeld messages.  VmHeld may still come later for a few VMs of `vms`.

    fds: `process` is a pidfd of vmm itself, which may not be a child of the new parent.
    """

    version: str  # of the program
    spare: int = 0  # number of slots without a VM
    groups: tuple[int, ...] = ()  # control groups that belong to a VM or to a slot
    vms: tuple[int, ...] = ()  # all VMs; for some of them VmHeld may come later


@message(0xC5, (Proc.PARENT, Proc.VMM))
class EndTaken(Record):
    """The parent has noticed that this VM has ended, and does not need its descriptors any more."""

    vmid: int


@message(0xC6, (Proc.PARENT, Proc.VMM))
class Retire(Record):
    """No more VMs are started here: keep no process in reserve."""


@message(0x93, (Proc.VMM, Proc.PARENT), fds=("log",))
class VmLog(Record):
    """The log lines of a VM's process are read from `log`.  Sent as soon as the process has become this VM.

    `vmid` 0: the process ended before it became a VM.
    """

    vmid: int
