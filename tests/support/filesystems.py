"""Disks with file systems in them, made by mke2fs and makefs from folders, and partition tables made by hand."""

import functools
import random
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

from vmd.diskfs.disk import Disk

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
MIB = 1 << 20
SECTOR = 512


class Content(NamedTuple):
    """A sparse file.  `stretches` are offset and length of its data, whose bytes derive from `seed`."""

    size: int
    stretches: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    def pieces(self) -> list[tuple[int, bytes]]:
        """Return offset and bytes of each stretch of data."""
        source = random.Random(self.seed)
        return [(offset, source.randbytes(length)) for offset, length in self.stretches]


class Link(NamedTuple):
    """A symbolic link."""

    target: str


Tree = Mapping[str, Content | Link]  # by path, without the first slash


def plant(folder: Path, tree: Tree) -> None:
    """Make a tree below a folder."""
    folder.mkdir(exist_ok=True)
    for name, what in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, Link):
            path.symlink_to(what.target)
            continue
        with path.open("wb") as file:
            file.truncate(what.size)
            for offset, piece in what.pieces():
                file.seek(offset)
                file.write(piece)


def run(*command: str | Path, stdin: str = "") -> str:
    """Run a program; return its output."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, env={"LC_ALL": "C", "PATH": PATH}
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def ext_image(image: Path, folder: Path, *options: str, size: int = 8 * MIB) -> Path:
    """Make a file system of the ext family from a folder."""
    image.unlink(missing_ok=True)
    run("mke2fs", "-q", "-F", "-E", "lazy_itable_init=1", *options, "-d", folder, image, f"{size >> 10}k")
    return image


def ffs_image(image: Path, folder: Path, options: str = "version=2") -> Path:
    """Make an FFS from a folder.  makefs stores holes as zeroes."""
    image.unlink(missing_ok=True)
    run("makefs", "-t", "ffs", "-o", options, "-M", "2m", "-b", "20%", "-f", "20%", image, folder)
    return image


def opened(image: bytes | bytearray) -> Disk:
    """Return a disk with these bytes."""
    return Disk(lambda offset, length: bytes(image[offset : offset + length]), len(image))


def opened_file(image: Path) -> Disk:
    """Return the disk in a file.  The file must not change while the disk is in use."""

    def read(offset: int, length: int) -> bytes:
        with image.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    return Disk(read, image.stat().st_size)


def check_tree(disk: Disk, tree: Tree) -> None:
    """Compare every file and link of a tree with the disk."""
    for path, what in tree.items():
        if isinstance(what, Content):
            check_content(disk, path, what)


def check_content(disk: Disk, path: str, what: Content) -> None:
    """Compare every byte of a file, without allocating memory of the file's size."""
    file = disk.find("/" + path)
    assert file.size == what.size, path
    found = [(offset, piece) for offset, piece in file.pieces() if piece.strip(b"\0")]
    assert laid_out(found) == laid_out([(at, piece) for at, piece in what.pieces() if piece]), path


def laid_out(pieces: Sequence[tuple[int, bytes]]) -> dict[int, bytes]:
    """Return the 4 KiB blocks of some pieces by number, without blocks that are all zeroes."""
    blocks: dict[int, bytearray] = {}
    for offset, piece in pieces:
        done = 0
        while done < len(piece):
            number, within = divmod(offset + done, 4096)
            part = piece[done : done + 4096 - within]
            blocks.setdefault(number, bytearray(4096))[within : within + len(part)] = part
            done += len(part)
    return {number: bytes(block) for number, block in blocks.items() if any(block)}


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40
).filter(lambda name: name not in (".", "..") and len(name.encode()) <= 120)


@st.composite
def trees(draw: st.DrawFn, *, sparse: bool = True) -> Tree:
    """Draw a tree of some files in directories, sparse files among them, with a link to each."""
    tree: dict[str, Content | Link] = {}
    for number in range(draw(st.integers(1, 5))):
        # With the number, no file has the name of another file's directory.
        folder = "/".join(f"d{name}" for name in draw(st.lists(NAMES, max_size=6)))
        name = f"{number}{draw(NAMES)}"
        path = f"{folder}/{name}" if folder else name
        size = draw(st.sampled_from((0, 1, 59, 60, 61, 159, 160, 511, 1024, 4095, 4096, 4097, 65536, 200_000)))
        stretches = [(0, size)]
        if sparse and draw(st.booleans()):
            size = draw(st.integers(size, 90 << 20))
            stretches = [(at, 3000) for at in sorted(draw(st.sets(st.integers(0, 20_000), max_size=4)))]
            stretches = [(at * 4500, length) for at, length in stretches if at * 4500 + length <= size]
        tree[path] = Content(size, tuple(stretches), seed=number)
        up = "../" * folder.count("/") + "../" * bool(folder)
        tree[f"l{number}"] = Link(draw(st.sampled_from((path, "/" + path, f"{'./' * 40}{path}"))))
        if folder:
            tree[f"{folder}/l{number}"] = Link(f"{up}l{number}")
    return tree


def links_of(tree: Tree) -> dict[str, Content]:
    """Return the target file of each link of a tree from `trees`."""
    files = {path.rpartition("/")[2][0]: what for path, what in tree.items() if isinstance(what, Content)}
    return {path: files[path[-1]] for path, what in tree.items() if isinstance(what, Link) and path[-1] in files}


class Part(NamedTuple):
    """A partition: its first sector, its content, and its type in the table."""

    first: int
    content: bytes
    kind: int = 0x83

    @property
    def sectors(self) -> int:
        """The number of its sectors."""
        return -(-len(self.content) // SECTOR)


def disk_of(*parts: Part, size: int = 0) -> bytearray:
    """Return a disk with the contents of partitions, without a partition table."""
    end = max((part.first + part.sectors for part in parts), default=0) * SECTOR
    disk = bytearray(max(size, end + 34 * SECTOR))
    for part in parts:
        disk[part.first * SECTOR : part.first * SECTOR + len(part.content)] = part.content
    return disk


def boot_record(*entries: tuple[int, int, int]) -> bytes:
    """Return a boot record with entries of (type, first sector, number of sectors)."""
    packed = b"".join(struct.pack("<B3xB3xII", 0, *entry) for entry in entries)
    return bytes(446) + packed.ljust(64, b"\0") + b"\x55\xaa"


def put(disk: bytearray, sector: int, data: bytes) -> None:
    """Overwrite sectors of a disk."""
    disk[sector * SECTOR : sector * SECTOR + len(data)] = data


def mbr_disk(*parts: Part, size: int = 0) -> bytearray:
    """Return a disk with an MBR.  Partitions after the third are logical, each with its own boot record before it."""
    disk = disk_of(*parts, size=size)
    primary, logical = (parts[:3], parts[3:]) if len(parts) > 4 else (parts, ())
    entries = [(part.kind, part.first, part.sectors) for part in primary]
    if logical:
        base = logical[0].first - 1
        entries.append((0x05, base, len(disk) // SECTOR - base))
        for number, part in enumerate(logical):
            own = [(part.kind, 1, part.sectors)]
            if number + 1 < len(logical):
                own.append((0x05, logical[number + 1].first - 1 - base, logical[number + 1].sectors + 1))
            put(disk, part.first - 1, boot_record(*own))
    put(disk, 0, boot_record(*entries))
    return disk


LINUX = bytes.fromhex("af3dc60f838472478e793d69d8477de4")
OPENBSD = bytes.fromhex("a0c74c82a836e311890a952519ad3f61")


def gpt_disk(*parts: Part, guid: bytes = LINUX, entry_bytes: int = 128, size: int = 0) -> bytearray:
    """Return a disk with a GPT and its backup."""
    disk = disk_of(*parts, size=size)
    last = len(disk) // SECTOR - 1
    entries = b"".join(
        struct.pack("<16s16sQQQ72x", guid, bytes(16), part.first, part.first + part.sectors - 1, 0).ljust(entry_bytes)
        for part in parts
    ).ljust(4096, b"\0")
    put(disk, 0, boot_record((0xEE, 1, last)))
    put(disk, 2, entries)
    put(disk, last - 8, entries)
    for here, there, table in ((1, last, 2), (last, 1, last - 8)):
        fields = (here, there, 34, last - 34, bytes(16), table, len(entries) // entry_bytes, entry_bytes)
        raw = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *fields, zlib.crc32(entries))
        put(disk, here, raw[:16] + zlib.crc32(raw).to_bytes(4, "little") + raw[20:])
    return disk


def label(*parts: tuple[str, int, int, int], sector_bytes: int = SECTOR) -> bytes:
    """Return an OpenBSD disklabel with partitions of (letter, type, first sector, number of sectors)."""
    count = max(16, *(ord(letter) - ord("a") + 1 for letter, *_ in parts))
    raw = bytearray(148 + 16 * count)
    struct.pack_into("<I36xI", raw, 0, 0x82564557, sector_bytes)
    struct.pack_into("<IHH", raw, 132, 0x82564557, 0, count)
    for letter, kind, first, sectors in parts:
        at = 148 + 16 * (ord(letter) - ord("a"))
        struct.pack_into("<IIHHB", raw, at, sectors & 0xFFFFFFFF, first & 0xFFFFFFFF, first >> 32, sectors >> 32, kind)
    check = 0
    for (word,) in struct.iter_unpack("<H", raw):
        check ^= word
    struct.pack_into("<H", raw, 136, check)
    return bytes(raw)


def openbsd_disk(content: bytes, *, mbr: bool = True, first: int = 64) -> bytearray:
    """Return a disk as OpenBSD's installer makes it: `a` is the file system, `b` swap, `c` the whole disk."""
    disk = disk_of(Part(first, content))
    total, own = len(disk) // SECTOR, -(-len(content) // SECTOR)
    if mbr:
        put(disk, 0, bytes(446) + bytes(48) + struct.pack("<B3xB3xII", 0x80, 0xA6, first, total - first) + b"\x55\xaa")
    swap = first + own
    at = first + 1 if mbr else 1
    put(disk, at, label(("a", 7, first, own), ("b", 1, swap, total - swap), ("c", 0, 0, total)))
    return disk


def journal(block: str, content: bytes, block_bytes: int = 1024) -> bytes:
    """Return a journal that writes a block twice, the first time escaped, and revokes it in between."""
    head = struct.Struct(">III")
    superblock = head.pack(0xC03B3998, 4, 0) + struct.pack(">IIIIIIIII", block_bytes, 12, 1, 7, 1, 0, 0, 1, 0)
    tag = struct.pack(">IHH16x", int(block), 0, 8)
    escaped = struct.pack(">IHH16x", int(block), 0, 9)
    blocks = [
        superblock,
        head.pack(0xC03B3998, 1, 7) + escaped,
        b"kern" + content[4:],  # escaped: the journal lacks the block's first four bytes
        head.pack(0xC03B3998, 2, 7),
        head.pack(0xC03B3998, 5, 8) + struct.pack(">II", 20, int(block)),
        head.pack(0xC03B3998, 2, 8),
        head.pack(0xC03B3998, 1, 9) + tag,
        content,
        head.pack(0xC03B3998, 2, 9),
    ]
    # The padding at the end is not zero, because mke2fs turns zeroes into holes.
    return b"".join(each.ljust(block_bytes, b"\0") for each in blocks).ljust(12 * block_bytes, b"\xff")


@functools.cache
def small_disks() -> dict[str, bytes]:
    """Return disks of 64 KiB at most, in each of which `/kernel` is a link to a file that begins with `kernel`."""
    with tempfile.TemporaryDirectory() as folder:
        return _small_disks(Path(folder))


def _small_disks(folder: Path) -> dict[str, bytes]:
    tree = folder / "tree"
    (tree / "boot").mkdir(parents=True)
    (tree / "boot/kernel").write_bytes(b"kernel".ljust(5000, b"k"))
    (tree / "kernel").symlink_to("boot/kernel")
    (tree / f"{'l' * 100}").symlink_to(f"/boot/{'./' * 60}kernel")
    image = folder / "image"
    found = {}
    for name, options in {
        "ext2": ("-t", "ext2"),
        "ext4": ("-t", "ext4", "-O", "^resize_inode,^has_journal"),
        "inline": ("-t", "ext4", "-O", "^resize_inode,^has_journal,inline_data", "-I", "256"),
        "meta_bg": ("-t", "ext4", "-O", "^resize_inode,^has_journal,meta_bg", "-g", "256"),
    }.items():
        image.write_bytes(bytes(64 << 10))
        run("mke2fs", "-q", "-F", "-b", "1024", *options, "-N", "16", "-d", tree, image)
        found[name] = image.read_bytes()
    for version in (1, 2):
        image.unlink()
        sizes = f"version={version},bsize=4096,fsize=512,minfree=0"
        run("makefs", "-t", "ffs", "-o", sizes, "-s", "60k", image, tree)
        found[f"FFS{version}"] = image.read_bytes()
    # Twice, because the journal contains the block number of the file, which the first file system tells.
    (tree / "journal").write_bytes(bytes(12 << 10))
    for _ in range(2):
        image.write_bytes(bytes(64 << 10))
        run("mke2fs", "-q", "-F", "-b", "1024", "-t", "ext2", "-N", "16", "-d", tree, image)
        blocks = run("debugfs", "-R", "blocks /boot/kernel", image).split()
        (tree / "journal").write_bytes(journal(blocks[0], b"kernel of the journal"))
    inode = run("debugfs", "-R", "ls -l /", image)
    number = next(line.split()[0] for line in inode.splitlines() if line.endswith(" journal"))
    run("debugfs", "-w", "-R", f"set_super_value journal_inum {number}", image)
    run("debugfs", "-w", "-R", "feature has_journal needs_recovery", image)
    found["ext3"] = image.read_bytes()
    small = found["ext2"].rstrip(b"\0")
    found["MBR"] = bytes(mbr_disk(*[Part(first, b"\1" * SECTOR) for first in (2, 4, 6, 9, 11)], Part(16, small)))
    found["GPT"] = bytes(gpt_disk(Part(10, bytes(SECTOR)), Part(11, small)))
    found["disklabel"] = bytes(openbsd_disk(small, first=4))
    found["bare disklabel"] = bytes(openbsd_disk(small, mbr=False, first=3))
    return found
