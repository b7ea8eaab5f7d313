"""Between the parent and an opener."""

from vmd.config.model import DiskConfig, DiskFile, SeedConfig
from vmd.fileid import FileId
from vmd.ipc.messages.shared import DiskImages
from vmd.ipc.routes import Proc, message
from vmd.record import Record


class OpenedFile(Record):
    """A file that is used: what it is, in words, and which."""

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
    """Become this user for good, and open what a VM uses.

    fds: the files leave by the `courier`, as soon as its other end asks for them; `probe` leads to an imgprobe.
    `client` is a courier from the client's control, for what it has `given`.  That is copied to `kernel_copy` and
    `initrd_copy`, memory files, where there are such, instead of leaving by the courier.
    `resizer` leads to an imgresize, for the one disk that is to have `resize_bytes`.
    `reader` leads to an imgboot, which copies `kernel_at` and `initrd_at` to memory files as large as those may be:
    `kernel_memory` and `initrd_memory`.
    `seeder` leads to a seeder, for `seed`; `seed_parts` and `seed_made` are empty memory files, for what that is given
    and what it makes.
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
    kernel_at: DiskFile | None = None  # on one of `disks`
    initrd_at: DiskFile | None = None
    needs_code: bool = False  # a BIOS has to find something to start on `disks`
    looks: bool = False  # ... and does not: the `reader` says what there is
    given: tuple[str, ...] = ()  # kernel, initrd, seed: what a client's seed is made from
    check_given: bool = False  # whether the user may read it, by its mode
    copy_max: int = 0  # bytes; the opener makes no file larger
    in_conf: bool = True  # whether advice is for who writes a vm.conf
    mends: bool = False  # snapshots are changed: disks that no VM could be started with may do
    patience_s: float = 0.0  # for locks that somebody is about to let go
    others_have: bool = False  # disks are in use, and are to be looked at all the same: they say so in `in_use`
    only_writable: bool = False  # each disk's own image, and nothing but whether this user may write to it
    resize_bytes: int = 0
    seed: SeedConfig | None = None  # it is to be made
    lladdrs: tuple[bytes, ...] = ()  # of the interfaces, for that


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
    boot_options: str = ""  # of boot(8), where /etc/boot.conf on a disk gives some
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
    no_code: bool = False  # there was nothing to start, as `needs_code` has it
