"""Formats that we know by name and do not read: their names, and what to do about an image of one.

`images/signatures.py` tells them from bytes; nothing here reads any.  Standard library only, and little of it.
"""


from vmd.record import Record

SECTOR = 512
PATH_SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789@%+=:,./-_")


class Foreign(Record):
    """A format.  In a command {image} is the image's path, {made} that with `extension` behind it.

    `content`: a guest may have reason to begin its disk so; see `refused`.
    """

    what: str
    remedy: str  # a command, or words if it has none
    extension: str = ".qcow2"
    names: tuple[str, ...] = ()  # how files of the format are called
    named_remedy: str = ""  # the command for a file that is called so; it asks before it overwrites another file
    content: bool = False


def _image(what: str, driver: str, *names: str) -> Foreign:
    """Return a format that QEMU reads."""
    return Foreign(what=what, remedy=f"qemu-img convert -f {driver} -O qcow2 {{image}} {{made}}", names=names)


def _compressed(what: str, program: str, *names: str, named: str = "-dk {image}") -> Foreign:
    """Return a format of compressed files; `named` are the arguments for a file that is called so."""
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
    # Only discs are looked at for these: no VM could have written them.
    "qcow2": _image("a qcow2 image", "qcow2"),
    "CD sectors": Foreign(
        what="a dump of CD sectors of 2352 bytes", remedy="bchunk {image} CUE-FILE {made}", extension=".iso"
    ),
    "CHD": Foreign(what="a CHD image", remedy="chdman extractcd -i {image} -o {made}", extension=".cue"),
    "CISO": Foreign(what="a CISO image", remedy="ciso 0 {image} {made}", extension=".iso"),
}
DISC_CONTENT = frozenset(("tar", "kernel"))  # what people put on a disc without a file system


def refused(found: str, size: int, path: str) -> bool:
    """Return whether a disk whose format nobody stated is refused for what its bytes look like.

    The rule has two sides.  What people bring must not be taken for raw.  And a guest must not be able to make its
    own disk one that is refused, or read as something else, at its next start.  So:

    * Formats of images, archives of them and LUKS are refused.  A guest that could write their signature to a
      disk that was guessed to be raw is kept from it (`images/guard.py`): other programs would follow the names of
      files in such a header.  LUKS belongs to them, as it does for QEMU: a guest that encrypts a whole disk gets an
      error at once, and the log says `format raw`, rather than a disk that is refused at its next start.
    * Compressed data, archives and kernels (`content`) a guest may well write to a whole disk: `dd`, `tar`.  They
      name no other file.  They are refused where it cannot have been a disk of a guest: the length is not one of
      whole sectors, or the operator has named the file so.  Else the disk is used as raw, with a warning.  A guest
      can change neither length nor name; where these refuse, it is kept from such signatures as well.

    A disk that was stated to be raw is never looked at, and its guest writes what it likes.
    """
    if not found:
        return False
    foreign = FOREIGN[found]
    return not foreign.content or size % SECTOR != 0 or is_named(foreign, path)


def is_named(foreign: Foreign, path: str) -> bool:
    """Return whether a file is called as those of a format are."""
    return path.lower().endswith(foreign.names) if foreign.names else False


def named(path: str) -> str:
    """Return the name of the format that a file is called as, or ""."""
    return next((name for name, foreign in FOREIGN.items() if is_named(foreign, path)), "")


def quoted(path: str) -> str:
    """Return a path as one word of a shell, which no program takes for an option or a protocol."""
    if path.startswith("-") or ":" in path.partition("/")[0]:
        path = f"./{path}"
    if path and PATH_SAFE.issuperset(path):
        return path
    return "'" + path.replace("'", "'\"'\"'") + "'"


def command(found: str, path: str, *, disc: bool = False) -> str:
    """Return what to type to get an image that we read, as a disk or as a disc, or "" if nothing does."""
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
    """Return why an image is refused; `raw` is how to have it as raw all the same, or ""."""
    words = f"is {FOREIGN[found].what}"
    remedy = command(found, path, disc=disc)
    if remedy:
        words += f"; convert it: {remedy}"
    return f"{words} (or, for a guest that is to see it as it is, say {raw})" if raw else words


def warning(found: str, raw: str) -> str:
    """Return what is said of a disk that looks like something, and is used as raw."""
    what = FOREIGN[found].what
    if not raw:
        return f"begins as if it were {what}, and is used as it is"
    return f"begins as if it were {what}, and is used as raw; {raw} says that this is meant"


def odd_length(size: int, unit: int = SECTOR, called: str = "sector") -> str:
    """Return what is said of a disk or disc whose length is not one of whole units; "" of others."""
    if size % unit == 0:
        return ""
    return f"its {size} bytes are no multiple of {unit}; its last {called} is padded with zeroes"


def left_dirty(path: str) -> str:
    """Return what is said of a qcow2 image whose last writer kept refcounts in memory and did not write them."""
    return (
        "was not closed by its last writer (dirty), and clusters in use now are never freed;"
        f" qemu-img check -r all {quoted(path)} repairs it"
    )


def named_format(path: str) -> str:
    """Return "qcow2" for a file that is called *.qcow2.  Its operator gave it that name; a guest cannot.

    Other names say nothing for sure.
    """
    return "qcow2" if path.rpartition("/")[2].lstrip(".").lower().endswith(".qcow2") else ""


def typed_format(typed: str, path: str) -> str:
    """Return the format that only a link's name states: `typed` leads to `path`, whose own name is looked at later."""
    return "" if named_format(path) else named_format(typed)
