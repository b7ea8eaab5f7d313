"""Foreign formats: formats of images and files that vmd recognises and does not read, and how to convert them.

`images/signatures.py` recognises them by their bytes.  This module reads no image.  It imports little of the standard
library.
"""

from vmd.record import Record
from vmd.units import SECTOR

PATH_SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789@%+=:,./-_")


class Foreign(Record):
    """A format.  In a command {image} is the image's path, {made} is that path with `extension` appended.

    `content`: a guest may legitimately begin its disk with such bytes; see `refused`.
    """

    what: str
    remedy: str  # a command; "" if there is none
    extension: str = ".qcow2"
    names: tuple[str, ...] = ()  # the usual extensions of such files
    named_remedy: str = ""  # the command for a file with such an extension; it asks before it overwrites another file
    content: bool = False


def _image(what: str, driver: str, *names: str) -> Foreign:
    """Return a format that QEMU reads."""
    return Foreign(what=what, remedy=f"qemu-img convert -f {driver} -O qcow2 {{image}} {{made}}", names=names)


def _compressed(what: str, program: str, *names: str, named: str = "-dk {image}") -> Foreign:
    """Return a format of compressed files; `named` are the arguments for a file with such an extension."""
    return Foreign(
        what=what,
        remedy=f"{program} -dc <{{image}} >{{made}}",
        extension=".img",
        names=names,
        named_remedy=f"{program} {named}",
        content=True,
    )


LUKS_COMMAND = "qemu-img convert --object secret,id=key,file=PASSPHRASE-FILE --image-opts {luks} -O qcow2 {made}"

FOREIGN = {
    "QCOW": _image("a QCOW image of version 1", "qcow", ".qcow"),
    "QED": _image("a QED image", "qed", ".qed"),
    "VMDK": _image("a VMDK image", "vmdk", ".vmdk"),
    "VDI": _image("a VDI image", "vdi", ".vdi"),
    "VHD": _image("a VHD image", "vpc", ".vhd", ".vpc"),
    "VHDX": _image("a VHDX image", "vhdx", ".vhdx", ".avhdx"),
    "Parallels": _image("a Parallels image", "parallels", ".hdd", ".hds"),
    "Bochs": _image("a Bochs image", "bochs"),
    "cloop": _image("a cloop image", "cloop", ".cloop"),
    "DMG": _image("a DMG image", "dmg", ".dmg"),
    "LUKS": Foreign(what="an encrypted LUKS container", remedy=LUKS_COMMAND, names=(".luks",)),
    "OVA": Foreign(
        what="an OVA archive",
        remedy="tar -xf {image} && qemu-img convert -O qcow2 DISK-FROM-IT.vmdk {made}",
        names=(".ova",),
    ),
    "OVF": Foreign(
        what="an OVF description",
        remedy="qemu-img convert -O qcow2 DISK-THAT-IT-NAMES.vmdk {made}",
        names=(".ovf",),
    ),
    "VMA": Foreign(what="a VMA archive", remedy="vma extract {image} {made}", extension=".d", names=(".vma",)),
    "Android sparse": Foreign(what="an Android sparse image", remedy="simg2img {image} {made}", extension=".img"),
    "gzip": _compressed("gzip-compressed", "gzip", ".gz", ".tgz"),
    "xz": _compressed("xz-compressed", "xz", ".xz", ".txz"),
    "zstd": _compressed("zstd-compressed", "zstd", ".zst", ".tzst", named="-d {image}"),
    "bzip2": _compressed("bzip2-compressed", "bzip2", ".bz2", ".tbz", ".tbz2"),
    "lz4": _compressed("lz4-compressed", "lz4", ".lz4", named="-d {image} {made}"),
    "lzip": _compressed("lzip-compressed", "lzip", ".lz"),
    "lzop": _compressed("lzop-compressed", "lzop", ".lzo", named="-d {image}"),
    "zip": Foreign(what="a zip archive", remedy="unzip {image}", names=(".zip",), content=True),
    "7-Zip": Foreign(what="a 7-Zip archive", remedy="7z x {image}", names=(".7z",), content=True),
    "tar": Foreign(what="a tar archive", remedy="tar -xf {image}", names=(".tar",), content=True),
    "kernel": Foreign(what="a kernel, which belongs to `boot`", remedy="", content=True),
    # Only discs are checked for these: a guest cannot have written them.
    "qcow2": _image("a qcow2 image", "qcow2"),
    "CD sectors": Foreign(
        what="a dump of CD sectors of 2352 bytes", remedy="bchunk {image} CUE-FILE {made}", extension=".iso"
    ),
    "CHD": Foreign(what="a CHD image", remedy="chdman extractcd -i {image} -o {made}", extension=".cue"),
    "CISO": Foreign(what="a CISO image", remedy="ciso 0 {image} {made}", extension=".iso"),
}
DISC_CONTENT = frozenset(("tar", "kernel"))  # formats that people write to a disc without a file system


def refused(found: str, size: int, path: str) -> bool:
    """Return whether a disk of no stated format is refused because its bytes look like `found`.

    The rule has two aims.  An image in a foreign format must not be used as raw.  And a guest must not be able to write
    bytes to its own disk that make the next start refuse it, or read it as something else.  So:

    * Image formats, archives of images and LUKS are refused.  A guest cannot write their signatures to a disk whose
      format was guessed to be raw (`images/guard.py`), because other programs would follow the file names in such a
      header.  LUKS is among them, as in QEMU: a guest that encrypts the whole disk gets an error at once, and the log
      advises `format raw`.  Otherwise the disk would be refused at the next start.
    * Compressed data, archives and kernels (`content`) may be written to a whole disk by a guest, with `dd` or `tar`.
      They name no other file.  They are refused if the file cannot have been a guest's disk: its length is not a
      multiple of a sector, or it has the format's extension.  Otherwise the disk is used as raw, with a warning.  A
      guest can change neither length nor name.  Where these make the file refused, the guest cannot write the
      signatures either.

    A disk whose format was stated as raw is not checked, and its guest may write any bytes.
    """
    if not found:
        return False
    foreign = FOREIGN[found]
    return not foreign.content or size % SECTOR != 0 or is_named(foreign, path)


def is_named(foreign: Foreign, path: str) -> bool:
    """Return whether a file has an extension of the format."""
    return path.lower().endswith(foreign.names) if foreign.names else False


def named(path: str) -> str:
    """Return the name of the format that the file's extension belongs to, or ""."""
    return next((name for name, foreign in FOREIGN.items() if is_named(foreign, path)), "")


def quoted(path: str) -> str:
    """Return a path as one shell word that no program mistakes for an option or a protocol."""
    if path.startswith("-") or ":" in path.partition("/")[0]:
        path = f"./{path}"
    if path and PATH_SAFE.issuperset(path):
        return path
    return "'" + path.replace("'", "'\"'\"'") + "'"


def command(found: str, path: str, *, disc: bool = False) -> str:
    """Return the shell command that makes an image that vmd reads, for a disk or a disc; "" if there is none."""
    foreign = FOREIGN[found]
    remedy = foreign.named_remedy if is_named(foreign, path) and foreign.named_remedy else foreign.remedy
    extension = foreign.extension
    if disc and "qcow2" in extension:
        remedy, extension = remedy.replace("-O qcow2", "-O raw"), ".iso"
    if path.startswith("-"):
        path = f"./{path}"
    options = f"driver=luks,key-secret=key,file.filename={path.replace(',', ',,')}"
    return remedy.format(image=quoted(path), made=quoted(path + extension), luks=quoted(options))


def given_as(image_format: str, path: str, *, in_conf: bool) -> str:
    """Return how to state the format of a disk: in vm.conf, or on a command line."""
    return f"`format {image_format}`" if in_conf else f"{image_format}:{quoted(path)}"


def refusal(found: str, path: str, raw: str, *, disc: bool = False) -> str:
    """Return why an image is refused.  `raw` is how to state that it is raw, or "" if it cannot be used as raw."""
    words = f"is {FOREIGN[found].what}"
    remedy = command(found, path, disc=disc)
    if remedy:
        words += f"; convert it: {remedy}"
    return f"{words} (or, if the guest is to see the file unchanged, use {raw})" if raw else words


def warning(found: str, raw: str) -> str:
    """Return the warning for a disk that looks like `found` and is used as raw.  `raw` is how to state that format."""
    what = FOREIGN[found].what
    if not raw:
        return f"seems to be {what}, and is used unchanged"
    return f"seems to be {what}, and is used as raw; use {raw} to confirm this"


def odd_length(size: int, unit: int = SECTOR, called: str = "sector") -> str:
    """Return the note for a disk or disc whose length is not a multiple of `unit`; "" if it is one."""
    if size % unit == 0:
        return ""
    return f"its {size} bytes are no multiple of {unit}; its last {called} is padded with zeroes"


def left_dirty(path: str) -> str:
    """Return the note for a qcow2 image whose last writer kept refcounts in memory and did not write them."""
    return (
        "was not closed by its last writer (dirty), and clusters in use now are never freed;"
        f" qemu-img check -r all {quoted(path)} repairs it"
    )


def named_format(path: str) -> str:
    """Return "qcow2" for a file named *.qcow2, otherwise "".  A guest cannot change its disk's name.

    Other names do not tell a format reliably.
    """
    return "qcow2" if path.rpartition("/")[2].lstrip(".").lower().endswith(".qcow2") else ""


def typed_format(typed: str, path: str) -> str:
    """Return the format that the name of a link states, if the file's own name states none.

    `typed` is the name as typed, `path` is the file it leads to.
    """
    return "" if named_format(path) else named_format(typed)
