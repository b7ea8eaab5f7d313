"""imgwriter: creates, deletes, lists and restores snapshots of one VM's disks.

Runs as  an id of its own, in the cell, confined to its descriptors before it reads the first byte; for one request
Peers    parent (starts it, and ends it when that takes too long); at the other end of a courier the process that has
         the files: an opener, or the disk processes of a running VM, which wait until the change is done
Holds    the disks, and the reading end of a pipe with a machine's state

All disks are prepared before the first one is changed, and one write changes each of them.  The first disk has the
state of the machine.  It gets a new snapshot last and loses an old one first, so a snapshot on it is always complete.
"""

import contextlib
import errno
import os
import time

from vmd.closing import close, close_all
from vmd.errors import ImageError, OperatorError, VmdError, number, sentence
from vmd.images.chain import Link, open_chain
from vmd.images.header import GOING_BACK
from vmd.images.locks import unlock
from vmd.images.qcow2 import Qcow2Image
from vmd.images.rewrite import Rewrite
from vmd.images.snapshots import Snapshot, find, read_snapshots, state_offset
from vmd.ipc import courier
from vmd.ipc import sockets as socket
from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.imgwriter import (
    ChangeSnapshots,
    FinishSnapshots,
    SnapshotsChanged,
    SnapshotsFailed,
    SnapshotsReady,
    SnapshotWord,
)
from vmd.ipc.messages.shared import SnapshotAction, SnapshotInfo, brief
from vmd.ipc.process import Process, handles
from vmd.ipc.routes import Proc
from vmd.ipc.streams import MAGIC
from vmd.log import log
from vmd.privsep.confine import IMGWRITER, confine, limit_memory
from vmd.privsep.title import set_title

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmd.ipc.messages.shared import DiskImages
    from vmd.ipc.process import Handlers

LAST_WORDS_S = 5.0
SAY_S = 5.0
MEMORY_BYTES = 4 << 30  # the refcounts of the largest images take half of it
FILES_S = 60.0  # for a disk process to flush what its guest has written
PIECE_BYTES = 1 << 20
STATE_BYTES = 4 << 20  # a multiple of every cluster size


@contextlib.contextmanager
def named(path: str) -> "Iterator[None]":
    """Turn an OSError into an OperatorError that names the disk."""
    try:
        yield
    except OSError as error:
        text = sentence(error)
        raise OperatorError(number(error), text if path in text else f"{path}: {text}") from None


class ImgWriter(Process):
    """Does one job, and ends."""

    def __init__(self) -> None:
        super().__init__(Proc.IMGWRITER)
        self.parent = self.attach_parent(Proc.PARENT)
        self.images: list[Qcow2Image] = []
        self.changes: list[tuple[str, Rewrite]] = []  # by disk
        self.tag, self.action = "", SnapshotAction.LIST
        self.state: int | None = None  # a courier for the state of the machine, if the client wants it
        self.said_s = time.monotonic()

    def on_change(self, message: ChangeSnapshots, envelope: Envelope, _channel: Channel) -> None:
        """List the snapshots, or prepare a change."""
        set_title(f"imgwriter/{message.name}")
        self.parent.send(SnapshotWord())
        try:
            self.open(message, envelope)
            if message.action is SnapshotAction.LIST:
                self.list()
                self.parent.send(SnapshotsChanged())
                self.be_over()
                return
            self.tag, self.action, self.state = message.tag, message.action, envelope.take_fd("state")
            self.prepare(message, envelope.take_fd("stream"))
        except (VmdError, OSError, ValueError) as error:
            self.fail(error)
        else:
            self.parent.send(SnapshotsReady())

    def fail(self, error: Exception) -> None:
        """Abandon the change, report why, and end."""
        for _, change in self.changes:
            change.abandon()
        self.parent.send(SnapshotsFailed(code=number(error), text=brief(sentence(error))))
        self.be_over()

    def be_over(self) -> None:
        """Close the files, and end."""
        for image in self.images:
            with contextlib.suppress(OSError):
                image.close()
        self.images = []
        self.parent.flush_blocking(LAST_WORDS_S)
        self.loop.stop()

    def say(self) -> None:
        """Tell the parent, every SAY_S seconds, that the work goes on."""
        if time.monotonic() >= self.said_s + SAY_S:
            self.said_s = time.monotonic()
            self.parent.send(SnapshotWord())

    # --- files

    def open(self, message: ChangeSnapshots, envelope: Envelope) -> None:
        """Fetch and open all disks.  Raises VmdError, OSError."""
        fds: list[int] = []
        for fd in envelope.take_fds("couriers"):
            with socket.socket(fileno=fd) as sock:
                try:
                    fds += courier.fetch(sock, FILES_S).get("disks", [])
                except (OSError, ValueError):
                    raise VmdError("the disks of the VM did not come") from None
        try:
            for disk in message.disks:
                self.images.append(self.open_disk(disk, fds, writable=message.action is not SnapshotAction.LIST))
        finally:
            close_all(fds)  # of disks that are not opened any more

    def open_disk(self, disk: "DiskImages", fds: list[int], *, writable: bool) -> Qcow2Image:
        """Open a disk, whose files are the first of `fds`.  Raises ImageError."""
        name = f"disk {disk.images[0].path}"
        links = []
        for place, link in enumerate(disk.images):
            if not fds:
                raise ImageError(name, "its files did not come")
            links.append(
                Link(
                    fd=fds.pop(0),
                    path=link.path if place else name,
                    format=link.format,
                    guessed=link.guessed,
                    discard_granularity=link.discard_granularity,
                )
            )
        image = open_chain(links, writable=writable)
        if isinstance(image, Qcow2Image):
            return image
        image.close()
        raise ImageError(name, f"is {disk.images[0].format}: only qcow2 images have snapshots")

    def snapshots(self) -> "Iterator[list[Snapshot]]":
        """Yield the snapshots of each disk.  Raises ImageError, OSError."""
        for image in self.images:
            yield read_snapshots(image.fd, image.header, image.path)

    # --- what can be asked

    def list(self) -> None:
        """Report each snapshot that any disk has, as the first disk that has it describes it."""
        tables = list(self.snapshots())
        told: set[str] = set()
        for table in tables:
            for one in table:
                tag = one.name or one.id
                if tag in told:
                    continue
                told.add(tag)
                having = sum(1 for other in tables if find(other, tag) is not None)
                self.parent.send(
                    SnapshotInfo(
                        tag=brief(tag, 200),
                        date_s=one.date_s,
                        clock_ns=one.clock_ns,
                        state_bytes=one.state_bytes,
                        disks=having,
                        of_disks=len(tables),
                    )
                )

    def prepare(self, message: ChangeSnapshots, stream: int | None) -> None:
        """Prepare the change on all disks that it concerns.  Raises VmdError, OSError."""
        tag, action = message.tag, message.action
        has = [find(table, tag) is not None for table in self.snapshots()]
        if action is SnapshotAction.CREATE:
            for image, there in zip(self.images, has, strict=True):
                if there:
                    raise ImageError(image.path, f"has a snapshot {tag} already")
        elif not any(has):
            raise ImageError(self.images[0].path, f"has no snapshot {tag}")
        elif action is SnapshotAction.GO_BACK and not all(has):
            raise ImageError(self.images[has.index(False)].path, f"has no snapshot {tag}, unlike another disk")
        if self.state is not None:
            saved = self.saved(tag)
            if not saved.state_bytes:
                what = "has the disks only: stop the VM to go back to it"
                raise OperatorError(errno.EINVAL, f"snapshot {tag} {what}")
            begin = bytearray(min(saved.state_bytes, len(MAGIC)))
            with self.at(saved) as (image, start):
                image.preadv(start, [memoryview(begin)])
            if begin != MAGIC:
                what = "has the machine as another program has written it: stop the VM to go back to the disks"
                raise OperatorError(errno.EINVAL, f"snapshot {tag} {what}")
        for image in self.images:
            if image.header.autoclear & GOING_BACK and action is not SnapshotAction.GO_BACK:
                what = "going back to a snapshot with other disks was interrupted: repeat it with -r"
                raise ImageError(image.path, what)
        for image, there in zip(self.images, has, strict=True):
            if action is SnapshotAction.DELETE and not there:
                continue  # an interrupted change has already deleted it here
            with named(image.path):
                self.changes.append((image.path, Rewrite(image)))
            self.say()
        if stream is not None:
            with named(self.changes[0][0]):
                self.take_state(stream, self.changes[0][1])
        for path, change in self.changes:
            with named(path):
                if action is SnapshotAction.CREATE:
                    change.create(tag, date_ns=message.date_ns, clock_ns=message.clock_ns)
                elif action is SnapshotAction.DELETE:
                    change.delete(tag)
                else:
                    change.go_back(tag)
            self.say()

    def saved(self, tag: str) -> Snapshot:
        """Return a snapshot of the first disk, the one with the state of the machine."""
        found = find(next(self.snapshots()), tag)
        assert found is not None
        return found

    @contextlib.contextmanager
    def at(self, one: Snapshot) -> "Iterator[tuple[Qcow2Image, int]]":
        """Yield the first disk as it was at a snapshot, and the offset of the machine's state in it.

        Raises ImageError, OSError.
        """
        first = self.images[0]
        image = Qcow2Image(os.dup(first.fd), first.path, writable=False, backing=first.backing, snapshot=one)
        try:
            yield image, state_offset(one, first.header)
        finally:
            close(image.fd)  # its backing files are those of the disk, which needs them

    def take_state(self, stream: int, change: Rewrite) -> None:
        """Copy the machine's state from a pipe to a disk.  Raises ImageError, OSError."""
        buffer = memoryview(bytearray(STATE_BYTES))
        with open(stream, "rb", buffering=0) as pipe:
            filled = 0
            while True:
                got = pipe.readinto(buffer[filled:])
                filled += got or 0
                if got and filled < len(buffer):
                    continue
                if filled:
                    change.add_state([buffer[:filled]], filled)
                    filled = 0
                self.say()
                if not got:
                    return

    def on_finish(self, message: FinishSnapshots, _envelope: Envelope, _channel: Channel) -> None:
        """Commit the change, or abandon it."""
        if not message.commit:
            for _, change in self.changes:
                change.abandon()
            self.parent.send(SnapshotsChanged())
            self.be_over()
            return
        done = 0
        order = self.changes[::-1] if message.first_last else self.changes
        try:
            if self.action is SnapshotAction.GO_BACK and len(order) > 1:
                for _, change in order:
                    change.announce()
            for path, change in order:
                with named(path):
                    change.commit()
                done += 1
        except (VmdError, OSError) as error:
            if not done:
                with contextlib.suppress(OSError):
                    for _, change in order:
                        change.abandon()
            text = f"{sentence(error)}; {done} of {len(order)} disks are changed"
            self.parent.send(SnapshotsFailed(code=number(error), text=brief(text)))
        else:
            if self.state is not None:
                for image in self.images:
                    unlock(image.fd)  # the machine that is restored locks them itself
            self.parent.send(SnapshotsChanged())
            if self.state is not None:
                self.parent.flush_blocking(LAST_WORDS_S)
                try:
                    self.give_state(self.state)
                except (VmdError, OSError) as error:
                    log.error(f"the state of the machine cannot be read: {sentence(error)}")
        self.be_over()

    def give_state(self, fd: int) -> None:
        """Send the reading end of a pipe over a courier, and write the machine's state.  Raises ImageError, OSError."""
        one = self.saved(self.tag)
        with self.at(one) as (image, at), contextlib.ExitStack() as pipe:
            end = at + one.state_bytes
            reader, writer = os.pipe2(os.O_CLOEXEC)
            pipe.callback(os.close, writer)
            with socket.socket(fileno=fd) as sock, contextlib.ExitStack() as ours:
                ours.callback(os.close, reader)
                sock.settimeout(FILES_S)
                given = courier.give(sock, {"stream": [reader]})
            buffer = memoryview(bytearray(PIECE_BYTES))
            while given and at < end:
                piece = buffer[: min(len(buffer), end - at)]
                image.preadv(at, [piece])
                at += len(piece)
                while piece:
                    piece = piece[os.write(writer, piece) :]
                self.say()

    HANDLERS: "Handlers" = {
        **handles(Proc.PARENT, ChangeSnapshots, on_change),
        **handles(Proc.PARENT, FinishSnapshots, on_finish),
    }


def main() -> int:
    """Run process imgwriter."""
    process = ImgWriter()
    process.ignore_terminal_signals()
    confine(IMGWRITER)  # the parent has logged what this kernel lacks
    limit_memory(MEMORY_BYTES)
    process.loop.run()
    return process.exit_status
