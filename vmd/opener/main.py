"""opener: opens the files of one VM, as the user who named them, and hands them to the VM process.

Runs as  root, with the capabilities to open files and to become another user, until its one job arrives.  From then on
         it is the user of that job, for good.  It sees the host's files, creates no sockets, and starts no processes
Peers    parent (one job, one answer); an imgprobe, which examines images; the VM process at the other end of a courier
Holds    the files that it has opened, until the VM process has them or nobody wants them any more

Storage that does not answer may block it for ever.  The parent then goes on without it.
"""

import errno
import os
import resource
import time

from vmd.closing import close
from vmd.errors import HostError, InUse, OperatorError, number, sentence
from vmd.fileid import file_id
from vmd.files.boot import BootFiles, copy_to_memory, open_boot_files, require_readable, require_regular
from vmd.files.diskboot import FromDisks, NothingToStart, look
from vmd.files.images import open_image
from vmd.files.media import Media, shortened
from vmd.files.prober import ProbeSocket
from vmd.files.resizer import resize
from vmd.files.seeder import make_seed
from vmd.files.seeding import given_parts, parts_of
from vmd.ipc import courier
from vmd.ipc import sockets as socket
from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.opener import FilesOpened, NotOpened, OpenedFile, OpenerAt, OpenFiles
from vmd.ipc.messages.shared import brief, fitting
from vmd.ipc.process import Process, handles
from vmd.ipc.routes import Proc
from vmd.privsep.confine import OPENER, confine
from vmd.privsep.title import set_title
from vmd.seed.parts import Interface

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.files.prober import Prober
    from vmd.ipc.probemsg import Probe
    from vmd.ipc.process import Handlers

LAST_WORDS_S = 5.0
SAY_S = 5.0  # between two messages to the parent while a large file is copied
NAME_BYTES_MAX = 1000  # of a file name in the messages that tell the parent what is opened
NOTES_MAX, NOTES_BYTES_MAX = 30, 5000  # so that they and the names of seventeen files fit into one message


class NoProbe:
    """Stands in for an imgprobe in a job that came without one."""

    def probe(self, _fd: int, name: str, _format_hint: str, *, boots: bool = False) -> "Probe":
        """Raise OperatorError."""
        raise OperatorError(errno.EIO, f"{name}: cannot be examined: nobody was asked to")


class Opener(Process):
    """Does one job, and ends."""

    def __init__(self) -> None:
        super().__init__(Proc.OPENER)
        self.parent = self.attach_parent(Proc.PARENT)
        self.said: set[str] = set()
        self.last, self.said_s = "", 0.0

    def on_open(self, message: OpenFiles, envelope: Envelope, _channel: Channel) -> None:
        """Do the job.  From here on storage that does not answer may block this process at any point."""
        fd = envelope.take_fd("courier")
        assert fd is not None
        set_title(f"opener/{message.name}")
        self.loop.stop()
        try:
            limit_copies(message.copy_max)
            become(message)
            files, opened = self.do(message, envelope)
            self.parent.send(opened)
        except InUse as error:
            in_use = NotOpened(code=error.number, text=brief(str(error)), file=error.file, what=brief(error.name))
            self.parent.send(in_use.replace(by=error.by, doing=error.doing, marks=error.marks))
        except NothingToStart as error:
            self.parent.send(NotOpened(code=error.number, text=brief(str(error)), no_code=True))
        except (OperatorError, HostError, OSError, ValueError) as error:  # a path with a NUL is a ValueError
            self.parent.send(NotOpened(code=number(error), text=brief(sentence(error))))
        else:
            with socket.socket(fileno=fd) as ours:
                if files is not None:
                    hand_over(ours, files)
        self.parent.flush_blocking(LAST_WORDS_S)

    def do(self, message: OpenFiles, envelope: Envelope) -> tuple[dict[str, list[int]] | None, FilesOpened]:
        """Do the job.  Return the files for the VM process, if there are any, and the answer.  Raises OperatorError."""
        if message.only_writable:
            return None, FilesOpened(files=self.writable(message))
        if message.resize_bytes:
            return None, FilesOpened(files=self.resize(message, envelope))
        return self.open(message, envelope)

    def writable(self, message: OpenFiles) -> tuple[OpenedFile, ...]:
        """Return the identities of the disks' images.  Raises OperatorError if the user may not write to one."""
        found = []
        for disk in message.disks:
            name = f"disk {disk.path}"
            self.at(name)
            fd = open_image(disk.path, name, writable=True, claim=False)
            found.append(OpenedFile(what=shortened(name), file=file_id(os.fstat(fd))))
            close(fd)
        return tuple(found)

    def resize(self, message: OpenFiles, envelope: Envelope) -> tuple[OpenedFile, ...]:
        """Grow a disk that no VM uses.  Return the identities of its files.  Raises OperatorError."""
        media = self.open_media(message, envelope)
        resizer = envelope.take_fd("resizer")
        assert resizer is not None
        try:
            with socket.socket(fileno=resizer) as sock:
                resize(sock, media.disks[0], message.resize_bytes, self.go_on)
            return media.files()
        finally:
            media.close()  # a client that gets the answer may start the VM at once

    def open(self, message: OpenFiles, envelope: Envelope) -> tuple[dict[str, list[int]], FilesOpened]:
        """Open all files of a VM.  Return them, and the answer about them.  Raises OperatorError."""
        given = self.take_given(message, envelope)
        boot = BootFiles()
        if message.boots:
            self.at(f"kernel {message.kernel}" if message.kernel else "firmware")
            boot = open_boot_files(message.kernel, message.initrd)
        notes = self.seed(message, envelope, given.pop("seed", []))
        media = self.open_media(message, envelope)
        if message.needs_code and not any(disk.boots for disk in media.disks):
            raise NothingToStart(self.what_there_is(message, envelope, media))
        found = self.read_from_disks(message, envelope, media)
        opened = FilesOpened(
            in_use=media.in_use,
            unused=media.unused(),
            disks=media.describe(),
            files=media.files(),
            notes=tuple(fitting([*notes, *media.notes], NOTES_MAX, NOTES_BYTES_MAX)),
            boot_name=boot.boot_name or found.kernel_name,
            boot_options=found.options,
        )
        files = {
            "boot": [*given.get("kernel", ()), *([boot.take_boot()] if message.boots else []), *found.kernel],
            "initrd": [*given.get("initrd", ()), *boot.take_initrd(), *found.initrd],
            "disks": media.take_disks(),
            "cdrom": media.take_cdrom(),
        }
        return files, opened

    def seed(self, message: OpenFiles, envelope: Envelope, given: list[int]) -> list[str]:
        """Have the seeder make the seed, if the VM has one.  Return warnings about it.  Raises OperatorError."""
        seeder, packed, made = (envelope.take_fd(name) for name in ("seeder", "seed_parts", "seed_made"))
        if message.seed is None or seeder is None or packed is None or made is None:
            return []
        with socket.socket(fileno=seeder) as sock:
            if given:
                parts = given_parts(given[0], message.name, message.seed)
            else:
                parts = parts_of(message.name, message.seed, self.at)
            interfaces = tuple(Interface(lladdr=lladdr) for lladdr in message.lladdrs)
            self.at("what its seed is made from")
            return make_seed(sock, parts.replace(interfaces=interfaces), packed, made, self.go_on)

    def open_media(self, message: OpenFiles, envelope: Envelope) -> Media:
        """Open and lock the disks and the disc of the CD drive.  Raises OperatorError."""
        probe = envelope.take_fd("probe")
        prober: Prober = ProbeSocket(socket.socket(fileno=probe)) if probe is not None else NoProbe()
        return Media.open(
            message.disks,
            message.cdrom,
            prober,
            in_conf=message.in_conf,
            mends=message.mends,
            patience_s=message.patience_s,
            at=self.at,
            others_have=message.others_have,
            boots=message.needs_code,
        )

    def what_there_is(self, message: OpenFiles, envelope: Envelope, media: Media) -> list[str]:
        """Describe the contents of disks without a boot sector.  Without `looks`, return only their names."""
        reader = envelope.take_fd("reader")
        if reader is None or not message.looks:
            return [f"disk {disk.links[0].path}" for disk in media.disks]
        found = []
        with socket.socket(fileno=reader) as sock:
            for index, disk in enumerate(media.disks):
                self.at(f"disk {disk.links[0].path}")
                found.append(look(sock, index, disk, self.go_on))
        return found

    def read_from_disks(self, message: OpenFiles, envelope: Envelope, media: Media) -> FromDisks:
        """Have the kernel and initrd copied from the VM's own disks, if they are there.  Raises OperatorError."""
        found = FromDisks()
        reader = envelope.take_fd("reader")
        if reader is None:
            return found
        with socket.socket(fileno=reader) as sock:
            for name, file in (("kernel", message.kernel_at), ("initrd", message.initrd_at)):
                memory = envelope.take_fd(f"{name}_memory")
                if file is not None and memory is not None:
                    self.at(f"{file} on disk {media.disks[file.disk].links[0].path}")
                    found.read(sock, name, file, media.disks[file.disk], memory, self.go_on)
        return found

    def take_given(self, message: OpenFiles, envelope: Envelope) -> dict[str, list[int]]:
        """Return the files that the client has opened, by name, but not those copied.  Raises OperatorError."""
        fd = envelope.take_fd("client")
        if fd is None:
            return {}
        self.at("what the client has opened")
        try:
            with socket.socket(fileno=fd) as client:
                files = courier.fetch(client)
        except (OSError, ValueError):
            files = {}
        if sorted(name for name, fds in files.items() for _ in fds) != sorted(message.given):
            raise OperatorError(errno.EPIPE, f"vm {message.name}: what the client has opened did not come")
        for name, (file,) in list(files.items()):
            path = {"kernel": message.kernel or "boot image", "initrd": message.initrd or "initrd"}.get(name, name)
            self.at(path)
            require_regular(file, path)
            if message.check_given:
                require_readable(file, "boot image", (message.gid, *message.groups))
            copy = envelope.take_fd(f"{name}_copy")
            if copy is not None:
                copy_to_memory(file, copy, path, message.copy_max, self.go_on)
                del files[name]
        return files

    def go_on(self) -> None:
        """Tell the parent, every SAY_S seconds, that the work goes on."""
        if time.monotonic() >= self.said_s + SAY_S:
            self.say(self.last)

    def say(self, what: str) -> None:
        """Tell the parent what is opened now."""
        self.last, self.said_s = what, time.monotonic()
        self.parent.send(OpenerAt(what=brief(what, NAME_BYTES_MAX)))

    def at(self, what: str) -> None:
        """Tell the parent what is opened next, so that it can name the file if that never ends."""
        if what in self.said:  # this is another attempt
            return
        self.said.add(what)
        self.say(what)

    HANDLERS: "Handlers" = {**handles(Proc.PARENT, OpenFiles, on_open)}


def hand_over(ours: socket.socket, files: dict[str, list[int]]) -> None:
    """Give files to the VM process.  If it is gone, the files are closed when this process ends."""
    try:
        courier.give(ours, files)
    except OSError:
        return


def limit_copies(bytes_max: int) -> None:
    """Limit the size of the files that this process writes, even if it is taken over.  Raises HostError."""
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, bytes_max))
    except OSError as error:
        raise HostError("limit the size of files", error) from error


def become(message: OpenFiles) -> None:
    """Become the user of a job, for good.  Raises HostError."""
    try:
        os.setgroups(message.groups)
        os.setresgid(message.gid, message.gid, message.gid)
        os.setresuid(message.uid, message.uid, message.uid)
    except OSError as error:
        raise HostError(f"become user {message.uid}", error) from error


def main() -> int:
    """Run process opener."""
    process = Opener()
    process.ignore_terminal_signals()
    confine(OPENER)  # the parent has logged what this kernel lacks
    process.loop.run()
    return process.exit_status
