"""Between the parent and an opener."""

from vmd.config.model import DiskConfig, DiskFile, SeedConfig
from vmd.fileid import FileId
from vmd.ipc.messages.shared import DiskImages
from vmd.ipc.routes import Proc, message
from vmd.record import Record


class OpenedFile(Record):
    """A file that the VM uses: its purpose and path in words, and its identity."""

    what: str
    file: FileId


@message(
    0xA0,
    (Proc.PARENT, Proc.OPENER),
    fds=(
        "courier", "probe?", "client?", "kernel_copy?", "initrd_copy?", "resizer?", "reader?", "kernel_memory?",
        "initrd_memory?", "seeder?", "seed_parts?", "seed_made?",
    ),
    answered_by=("OpenerAt", "FilesOpened", "NotOpened"),
)
class OpenFiles(Record):
    """Become this user permanently, and open the files that a VM uses.

    fds: the opened files are sent over `courier`, when its other end asks for them.  `probe` is connected to an
    imgprobe.
    `client` is a courier from the client's control, for the files that the client has `given`.  `kernel_copy` and
    `initrd_copy` are memory files.  If they are there, the client's kernel and initrd are copied to them, and are not
    sent over `courier`.
    `resizer` is connected to an imgresize, for the only disk, which is to have `resize_bytes`.
    `reader` is connected to an imgboot, which copies `kernel_at` and `initrd_at` to the memory files `kernel_memory`
    and `initrd_memory`.  These have the largest size that such files may have.
    `seeder` is connected to a seeder, for `seed`.  `seed_parts` and `seed_made` are empty memory files, for its input
    and its output.
    """

    name: str  # of the VM
    uid: int
    gid: int
    groups: tuple[int, ...]
    disks: tuple[DiskConfig, ...] = ()
    cdrom: str = ""
    boots: bool = False  # open `kernel` (without one the firmware of this host) and `initrd`
    kernel: str = ""  # path; also the name in messages for a kernel that the client has given
    initrd: str = ""
    kernel_at: DiskFile | None = None  # a kernel on one of `disks`
    initrd_at: DiskFile | None = None
    needs_code: bool = False  # fail if a BIOS finds no boot code on `disks`
    looks: bool = False  # in that failure describe what is on the disks, by the `reader`
    given: tuple[str, ...] = ()  # of kernel, initrd, seed: the files that the client has given
    check_given: bool = False  # check by its mode whether the user may read a given file
    copy_max: int = 0  # bytes; the opener copies no larger file
    in_conf: bool = True  # word advice for vm.conf; otherwise for a command line
    mends: bool = False  # for a change of snapshots: accept disks that no VM could be started with
    patience_s: float = 0.0  # how long to wait for locks that another process is about to let go
    others_have: bool = False  # check disks that are in use too, without opening them, and list them in `in_use`
    only_writable: bool = False  # only check of each disk's own image whether this user may write to it
    resize_bytes: int = 0
    seed: SeedConfig | None = None  # make this seed
    lladdrs: tuple[bytes, ...] = ()  # of the interfaces, for the seed


@message(0xA1, (Proc.OPENER, Proc.PARENT), partial=True)
class OpenerAt(Record):
    """The opener is about to open this file: a sign of life."""

    what: str


@message(0xA2, (Proc.OPENER, Proc.PARENT))
class FilesOpened(Record):
    """All files are open and locked.  They stay so until they are sent over the courier, or the courier is closed."""

    disks: tuple[DiskImages, ...] = ()
    files: tuple[OpenedFile, ...] = ()
    notes: tuple[str, ...] = ()  # sentences that the operator should read
    boot_name: str = ""  # of the kernel or firmware, for messages
    boot_options: str = ""  # of boot(8), from /etc/boot.conf on a disk
    in_use: tuple[OpenedFile, ...] = ()  # with `others_have`: disks that another process has locked; they are not open
    unused: tuple[str, ...] = ()  # with `others_have`: disks that are not locked, though their storage has locks


@message(0xA3, (Proc.OPENER, Proc.PARENT))
class NotOpened(Record):
    """The files could not be opened, and none is open.

    If another process has a lock, `file` is the file, `what` its name, and `by`, `doing` and `marks` are as in InUse.
    """

    code: int
    text: str
    file: FileId | None = None
    what: str = ""
    by: str = ""
    doing: str = ""
    marks: tuple[int, ...] = ()
    no_code: bool = False  # there is no boot code on the disks (`needs_code`)
