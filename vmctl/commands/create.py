"""vmctl create: make a disk image: empty, on a base, or as a copy of another one (*cat. 3.6*).

vmctl makes the image itself, with the rights of its user.
"""

import os
from types import FrameType

from vmctl.bar import Bar
from vmctl.errors import ArgumentError, CommandError, UsageError
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmd import signals as signal
from vmd.errors import ImageError, VmdError
from vmd.images.chain import MAX_CHAIN
from vmd.images.create import convert, create
from vmd.images.files import OpenedChain
from vmd.images.gpt import gpt_end
from vmd.images.header import ZSTD_UNREAD
from vmd.images.qcow2 import UNPACK
from vmd.ipc.foreign import FOREIGN, given_as, named, quoted
from vmd.ipc.probemsg import FORMATS, NOT_QCOW2
from vmd.scaled import fmt_scaled, scan_scaled
from vmd.units import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmctl.checksum import Checksum
    from vmd.images.image import Image


class Target:
    """The image to be made: path and format.  `suggests` is the format that its name suggests, or ""."""

    def __init__(self, word: str) -> None:
        """Find the format: from a prefix, or else from the extension, or else raw.

        Raises UsageError; CommandError if the name suggests a format that we cannot make.
        """
        self.format, self.path = split_format(word)
        if not self.path:
            raise UsageError("disk without a name")
        suggested = os.path.splitext(self.path)[1].removeprefix(".").lower()
        self.suggests = suggested if suggested in FORMATS else named(self.path)
        self.notes: list[str] = []  # for --json
        if not self.format:
            if self.suggests and self.suggests not in FORMATS:
                raise CommandError(
                    f"{self.path} would not be {FOREIGN[self.suggests].what}: only raw and qcow2 images can be made;"
                    f" give {given_as('raw', self.path, in_conf=False)} or"
                    f" {given_as('qcow2', self.path, in_conf=False)} to make one with this name"
                )
            self.format = self.suggests or "raw"

    def note(self, text: str, before: str = "") -> None:
        """Show a note to the user, and keep it for --json."""
        warn(f"{before}{text}")
        self.notes.append(clean(text))

    def done(self) -> None:
        """Report the new image, with a warning if its name suggests another format."""
        if self.suggests not in ("", self.format):
            self.note(f"{self.path} is {self.format}, but its name says otherwise: {self.advice()}", "warning: ")
        warn(f"{self.format} imagefile created")

    def advice(self) -> str:
        """Return how to name such an image for a VM."""
        on_line = given_as(self.format, self.path, in_conf=False)
        return f"give it as {on_line}, or with {given_as(self.format, self.path, in_conf=True)} in vm.conf"


def split_format(word: str) -> tuple[str, str]:
    """Return (format, path) of `[raw:|qcow2:]path`; the format is empty if there is none."""
    prefix, colon, path = word.partition(":")
    return (prefix, path) if colon and prefix in FORMATS else ("", word)


def disk_size(text: str) -> int:
    """Return the bytes of -s.  Raises CommandError."""
    try:
        size = scan_scaled(text)
    except ValueError:
        raise ArgumentError(f"invalid disk size: {text}") from None
    if size < MIB:
        raise ArgumentError("disk size must be at least 1MB")
    return size


def create_empty(target: Target, size: int) -> int:
    """Make an empty disk of whole megabytes; return its size.  Raises VmdError."""
    rounded = size - size % MIB
    if rounded != size:
        target.note(f"disk size rounded to {fmt_scaled(rounded)}")
    create(target.path, target.format, rounded)
    return rounded


def create_overlay(target: Target, word: str, size: int | None) -> int:
    """Make a disk that stores only its differences from a base; return its size.

    Images that no VM could use are refused: the base must exist at the recorded path, and there must not be too many
    bases.  Raises VmdError.
    """
    if target.format != "qcow2":
        raise CommandError(f"base images require qcow2 disk format; give the disk as qcow2:{target.path}")
    base_format, base = split_format(word)
    found = base_path(target, base)
    not_qcow2 = f"base image is not a qcow2 file: {found}; vmctl create -i converts it"
    if base_format == "raw":
        raise CommandError(not_qcow2)
    try:
        chain = OpenedChain(found, "qcow2", raw_will_do=False)
    except ImageError as error:
        if error.path == found and error.what == NOT_QCOW2:
            raise CommandError(not_qcow2) from None
        raise CommandError(f"failed to open base image file: {error}") from None
    base_size = chain.probes[0].size
    try:
        if len(chain.links) == MAX_CHAIN:
            raise CommandError(f"{target.path}: backing chain would be longer than {MAX_CHAIN} images")
        chain.image().close()
    finally:
        chain.close()
    if size is not None and size != base_size:
        raise CommandError(
            f"base size does not match requested size: the base has {base_size} bytes, not {size}; -s may be left out"
        )
    create(target.path, "qcow2", base_size, base, "qcow2")
    return base_size


def base_path(target: Target, base: str) -> str:
    """Return the path of the base from our working directory.

    The path is recorded as typed, and a relative one starts at the directory of the disk.  Raises CommandError if the
    base does not exist there.
    """
    folder = os.path.dirname(target.path)
    if folder and not os.path.isdir(folder):
        raise CommandError(f"could not create {target.path}: no directory {folder}")
    found = os.path.join(folder, base)
    if not os.path.exists(found) and os.path.exists(base):
        seen = os.path.relpath(os.path.realpath(base), os.path.realpath(folder))
        raise CommandError(f"base image {base} must be given by its path from {folder}: {seen}")
    if ":" in base.partition("/")[0]:
        # Programs that open the disk would take the part before the colon for a protocol.  We refuse such a path.
        raise CommandError(f"base image {base} must be given as ./{base}")
    return found


def open_source(target: Target, word: str, checksum: "Checksum | None") -> "Image":
    """Return the image to be copied.  The checksum is that of its file.  Raises CommandError."""
    from vmctl import zstd  # nothing else needs it

    source_format, path = split_format(word)
    unpack_zstd = zstd.find()
    unpack = UNPACK if unpack_zstd is None else {**UNPACK, "zstd": unpack_zstd}
    try:
        chain = OpenedChain(path, source_format, unpack=unpack)
        source = chain.image()
    except VmdError as error:
        why = str(error)
        if isinstance(error, ImageError) and error.what == ZSTD_UNREAD:
            convert_it = f"qemu-img convert -f qcow2 -O qcow2 {quoted(error.path)} {quoted(target.path)}"
            why = f"{error.path}: uses zstd compression: install {zstd.PACKAGES}, or convert it: {convert_it}"
        raise CommandError(f"failed to open source image file: {why}") from None
    for note in chain.notes:
        target.note(note, "warning: ")
    if checksum is not None:
        checksum.begin(source.fd)
        if chain.probes[0].backing:
            target.note(f"the checksum is of {source.path} only, and not of its backing file", "warning: ")
    return source


def say_partitions(target: Target, source: "Image", whole: int) -> None:
    """Show a note about a partition table whose second copy is not at the end of the disk.  Raises CommandError.

    The table is copied unchanged, so the guest finds it as it was shipped.  Guests that enlarge their partitions move
    the second copy themselves.
    """
    try:
        end = gpt_end(source)
    except OSError as error:
        raise CommandError(f"failed to read from source: {error.strerror}") from None
    if end > source.size:
        target.note(
            f"{source.path} may be truncated: its partition table is for a disk of {fmt_scaled(end)}"
            f" ({end} bytes), and it has {source.size} bytes",
            "warning: ",
        )
    elif 0 < end < whole:
        target.note(
            f"the partition table is still for a disk of {fmt_scaled(end)}: the guest corrects it when it enlarges a"
            " partition (cloud-init and growpart do)"
        )


def create_copy(target: Target, word: str, size: int | None, checksum: "Checksum | None") -> int:
    """Make a disk with the content of another image; return its size.  Raises VmdError."""
    source = open_source(target, word, checksum)
    try:
        rounded_up = -(-source.size // MIB) * MIB
        wanted = max(rounded_up, MIB) if size is None else size
        if wanted < source.size:
            raise CommandError(
                f"size cannot be smaller than input disk size: {wanted} bytes are less than {source.size}"
            )
        # Unlike vmd: -s is bytes here, as in other commands, and not megabytes.
        whole = max(wanted - wanted % MIB, rounded_up)
        if whole != wanted:
            target.note(f"disk size rounded to {fmt_scaled(whole)}")
        say_partitions(target, source, whole)
        bar = Bar(os.path.basename(target.path), rate=True)
        try:
            if checksum is None:
                convert(source, target.path, target.format, whole, bar.show)
            else:
                convert_verified(source, target, whole, bar, checksum)
        finally:
            bar.end()
    finally:
        source.close()
    return whole


def convert_verified(source: "Image", target: Target, whole: int, bar: Bar, checksum: "Checksum") -> None:
    """Copy an image, and remove the copy if the image's file has another checksum.  Raises VmdError."""

    def follow(done: int, data: int) -> None:
        checksum.follow(done, data)
        bar.show(done, data)

    convert(source, target.path, target.format, whole, follow, lambda: checksum.verify(source.path))


def interrupt(number: int, frame: FrameType | None) -> None:
    """End as ^C does, so that no partial image remains."""
    raise KeyboardInterrupt


def run(session: Session, given: Given) -> int:
    """Create the image; the daemon is not asked."""
    target = Target(given.operand)
    values: dict[str, str] = {}
    for option, value in given.options:
        if option in values:
            raise ArgumentError(f"option {option} specified multiple times")
        values[option] = value
    size = disk_size(values["-s"]) if "-s" in values else None
    checksum = None
    if "-c" in values:
        from vmctl.checksum import Checksum  # loading OpenSSL takes time

        if "-i" not in values:
            raise UsageError("-c needs -i")
        checksum = Checksum(values["-c"])
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) ignores it
            signal.signal(number, interrupt)
    if "-b" in values:
        made = create_overlay(target, values["-b"], size)
    elif "-i" in values:
        made = create_copy(target, values["-i"], size, checksum)
    elif size is None:
        raise UsageError(f"could not create {target.path}: missing size argument")
    else:
        made = create_empty(target, size)
    target.done()
    if session.json:
        put_json({"path": clean(target.path), "format": target.format, "size_bytes": made, "notes": target.notes})
    return 0
