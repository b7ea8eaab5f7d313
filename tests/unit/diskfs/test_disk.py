"""A file is found in the partition that has it, and an error says where it was searched."""

import re
from pathlib import Path

import pytest

from tests.support.filesystems import (
    MIB,
    SECTOR,
    Content,
    Link,
    Part,
    boot_record,
    ext_image,
    ffs_image,
    gpt_disk,
    label,
    mbr_disk,
    openbsd_disk,
    opened,
    opened_file,
    plant,
    put,
)  # fmt: skip
from vmd.diskfs import source
from vmd.diskfs.disk import Disk
from vmd.diskfs.source import READ_MAX, DiskFsError, NoSuchFile

FAT = (bytes(54) + b"FAT16   ").ljust(64 * SECTOR, b"\0")
SWAP = (bytes(4086) + b"SWAPSPACE2").ljust(8192, b"\0")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A file system of each family, and one without kernels."""
    folder = tmp_path_factory.mktemp("images")
    plant(folder / "linux", {"boot/vmlinuz-6": Content(9000, ((0, 9000),)), "vmlinuz": Link("boot/vmlinuz-6")})
    plant(folder / "openbsd", {"bsd": Content(9000, ((0, 9000),), 1), "etc/boot.conf": Content(30, ((0, 30),))})
    plant(folder / "data", {"data": Content(5)})
    return {
        "ext4": ext_image(folder / "image", folder / "linux", "-t", "ext4", size=2 * MIB).read_bytes(),
        "ext2": ext_image(folder / "image", folder / "data", "-t", "ext2", size=MIB).read_bytes(),
        "FFS2": ffs_image(folder / "image", folder / "openbsd").read_bytes(),
    }


def refusal(disk: Disk, path: str, partition: str = "") -> str:
    """Return why a file is not found."""
    with pytest.raises(DiskFsError) as refused:
        disk.find(path, partition)
    return str(refused.value)


def test_the_first_partition_with_the_file_is_used(images: dict[str, bytes]) -> None:
    """Other partitions may have any type, or be damaged."""
    parts = [Part(64, FAT), Part(256, images["ext2"]), Part(4096, images["ext4"]), Part(16384, images["ext4"])]
    for made in (mbr_disk, gpt_disk):
        disk = opened(made(*parts))
        found = disk.find("/vmlinuz")
        assert (found.partition, found.filesystem.name, found.size) == ("partition p3", "ext4", 9000)
        assert disk.find("/vmlinuz", "p4").partition == "partition p4"


def test_openbsd_s_disk(images: dict[str, bytes]) -> None:
    """The disk has an MBR or none."""
    for mbr in (True, False):
        disk = opened(openbsd_disk(images["FFS2"], mbr=mbr))
        assert disk.find("/bsd").partition == "partition a"
        assert len(disk.find("/etc/boot.conf", "a").content(100)) == 30


def test_a_disk_without_a_table(images: dict[str, bytes]) -> None:
    """Its file system covers the whole disk."""
    assert opened(images["ext4"]).find("/vmlinuz").partition == "the whole disk"
    assert opened(images["FFS2"]).find("/bsd").partition == "the whole disk"
    assert refusal(opened(images["FFS2"]), "/bsd", "a") == "there is no partition a: it has no partition table"


def test_all_searched_partitions_are_named(images: dict[str, bytes]) -> None:
    """The error has the type of each one."""
    disk = opened(mbr_disk(Part(64, FAT), Part(256, images["ext2"]), Part(4096, SWAP), Part(5000, bytes(9000))))

    assert refusal(disk, "/bsd") == (
        "no partition has /bsd: partition p1 (FAT): is not supported;"
        " partition p2 (ext2): /bsd: there is no /bsd; partition p3 (swap): is not supported;"
        " partition p4: has no known file system"
    )
    assert refusal(disk, "/bsd", "p2") == "partition p2 (ext2): /bsd: there is no /bsd"
    assert refusal(disk, "/bsd", "p7") == "there is no partition p7: its MBR has p1, p2, p3, p4"
    assert disk.describe() == (
        "MBR; partition p1: FAT; partition p2: ext2; partition p3: swap; partition p4: has no known file system"
    )


def test_the_number_of_named_partitions_is_limited() -> None:
    """The error message must not become too long."""
    disk = opened(gpt_disk(*[Part(64 + 64 * number, bytes(SECTOR * 64)) for number in range(30)]))

    assert refusal(disk, "/bsd").endswith("partition p8: has no known file system; and 22 more")
    assert disk.describe().endswith("and 22 more")


def test_eight_partitions_are_all_named() -> None:
    """Nothing is left out."""
    disk = opened(gpt_disk(*[Part(64 + 64 * number, bytes(SECTOR * 64)) for number in range(8)]))

    assert refusal(disk, "/bsd").endswith("partition p8: has no known file system")
    assert disk.describe().endswith("partition p8: has no known file system")


def test_a_damaged_table_comes_first(images: dict[str, bytes]) -> None:
    """The partitions that are still known are searched, and named after it.  A missing file may be in a lost one."""
    raw = openbsd_disk(images["FFS2"])
    raw[65 * SECTOR + 200] ^= 1
    disk = opened(raw)

    assert disk.table.problem == "its disklabel has a wrong checksum"
    said = refusal(disk, "/nothing")
    assert said.startswith("no partition has /nothing: its disklabel has a wrong checksum; partition p4")
    assert refusal(disk, "/bsd", "a") == "its disklabel has a wrong checksum"
    assert disk.describe().startswith("MBR; its disklabel has a wrong checksum; partition p4: ")


def test_partitions_outside_of_the_disk_are_named_each(images: dict[str, bytes]) -> None:
    """The one that begins at 0 is another one."""
    raw = mbr_disk(Part(64, images["ext2"]), size=8192)
    put(raw, 0, boot_record((0x83, 9000, 4), (0x83, 0, 64), (0x83, 9000, 4), (0x83, 64, 2048)))
    disk = opened(raw)

    after = f"begins at {9000 * SECTOR}, after the end of the disk at {len(raw)}"
    assert disk.describe() == (
        f"MBR; partition p1: {after}; partition p2: has no known file system; partition p3: {after}; partition p4: ext2"
    )
    assert refusal(disk, "/data", "p3") == f"partition p3: {after}"
    assert disk.find("/data").partition == "partition p4"


def test_a_partition_with_a_disklabel_is_not_searched(images: dict[str, bytes]) -> None:
    """The file system of `a` begins where OpenBSD's partition begins."""
    assert refusal(opened(openbsd_disk(images["FFS2"])), "/bsd", "p4") == (
        "partition p4: holds the partitions of a disklabel: a, b"
    )


def test_a_missing_file_differs_from_damage(images: dict[str, bytes]) -> None:
    """A reader of `/etc/boot.conf` must be able to distinguish them."""
    whole = opened(images["ext4"])
    with pytest.raises(NoSuchFile):
        whole.find("/etc/boot.conf")
    two = opened(gpt_disk(Part(64, images["ext2"]), Part(4096, images["ext4"])))
    with pytest.raises(NoSuchFile):
        two.find("/etc/boot.conf")
    with pytest.raises(DiskFsError) as refused:
        opened(gpt_disk(Part(64, FAT), Part(4096, images["ext4"]))).find("/etc/boot.conf")
    assert not isinstance(refused.value, NoSuchFile)


def test_an_empty_disk() -> None:
    """It is empty, or too small for a file system."""
    for size in (0, 1, 512, 4096, MIB):
        disk = opened(bytes(size))
        assert refusal(disk, "/bsd") == "the whole disk: has no known file system"
        assert disk.describe() == "no partition table; the whole disk: has no known file system"


def test_links(tmp_path: Path) -> None:
    """They stay within the file system and below its root, and their number is limited."""
    plant(
        tmp_path / "tree",
        {
            "a/b/file": Content(3, ((0, 3),)),
            "up": Link("../../../../a/./b//file"),
            "a/absolute": Link("/a/b"),
            "a/b/up": Link("../absolute/../b/file"),
            "loop": Link("loop"),
            "one": Link("two"),
            "two": Link("a/../one"),
            "dangling": Link("boot/vmlinuz\n-6"),
            "long": Link("/".join(["a/.."] * 800) + "/a/b/file"),
            "grows": Link("/".join(["grows"] * 500)),
        },
    )
    ext = opened_file(ext_image(tmp_path / "ext", tmp_path / "tree", "-t", "ext4", "-b", "4096"))
    for disk in (ext, opened_file(ffs_image(tmp_path / "ffs", tmp_path / "tree"))):
        for path in ("/up", "up", "/a/absolute/file", "/a/b/up", "../../up", "/a/absolute/../b/file", "/long"):
            assert disk.find(path).size == 3
        assert "/loop: more than 40 symbolic links on the way, the last at /loop" in refusal(disk, "/loop")
        assert "/one/x: more than 40 symbolic links on the way, the last at /one" in refusal(disk, "/one/x")
        assert refusal(disk, "/dangling").endswith("/dangling: there is no /boot, where a link leads")
        assert "/grows: symbolic links make the path longer than 4096 bytes" in refusal(disk, "/grows")
        assert refusal(disk, "/a/b").endswith("/a/b: is a directory")
        assert refusal(disk, "/a/b/file/c").endswith("/a/b/file is a file, not a directory")
        assert refusal(disk, "/" + "x" * 300).endswith("x...")
        assert refusal(disk, "/up/..").endswith("/up/..: is a directory")
        assert "a path of 5000 bytes (limit is 4096)" in refusal(disk, "/" * 5000)


def test_directories_have_a_bound(tmp_path: Path) -> None:
    """At most 256 nested directories are followed."""
    plant(tmp_path / "tree", {"d/" * 255 + "file": Content(3), "e" + "/d" * 256 + "/file": Content(3)})
    disk = opened_file(ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4"))

    assert disk.find("/d" * 255 + "/file").size == 3
    assert "more than 256 nested directories" in refusal(disk, "/e" + "/d" * 256 + "/file")


def test_names_of_a_guest_are_shown_on_one_line(tmp_path: Path) -> None:
    """Control characters are escaped, and long names are cut."""
    plant(tmp_path / "tree", {"kernel": Link("\x1b[2J\n" + "x" * 150)})

    said = refusal(opened_file(ffs_image(tmp_path / "image", tmp_path / "tree")), "/kernel")

    assert said.isprintable()
    assert r"there is no /\x1b[2J\nxxx" in said
    assert len(said) < 250


def test_paths_may_be_of_any_bytes(tmp_path: Path, images: dict[str, bytes]) -> None:
    """They come from the command line.  In messages they take one line."""
    plant(tmp_path / "tree", {"k\udcff\n": Content(3)})
    disk = opened_file(ffs_image(tmp_path / "image", tmp_path / "tree"))
    assert disk.find("/k\udcff\n").size == 3
    two = opened(gpt_disk(Part(64, images["ext2"]), Part(4096, images["ext4"])))
    for each in (disk, two):
        for path in ("/\udcfe\n", "/\ud800", "/\0", "/\x1b", "/k\udcff\n/a"):
            assert refusal(each, path).isprintable()
        assert refusal(each, "/a", "\n").isprintable()


def test_a_small_file_has_a_bound(images: dict[str, bytes]) -> None:
    """The reader of the file sets the limit."""
    with pytest.raises(DiskFsError, match=r"\(ext4\): /vmlinuz: has 9000 bytes \(limit is 100\)$"):
        opened(images["ext4"]).find("/vmlinuz").content(100)


def test_a_file_has_a_bound(tmp_path: Path) -> None:
    """A hole takes no space on the disk, but its copy would."""
    plant(tmp_path / "tree", {"kernel": Content((1 << 30) + 1)})
    image = ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4")

    assert refusal(opened_file(image), "/kernel").endswith("has 1073741825 bytes (limit is 1073741824)")


def test_read_errors_are_reported(images: dict[str, bytes]) -> None:
    """The message has the kernel's reason and the position."""
    raw = images["ext4"]

    def failing(offset: int, length: int) -> bytes:
        if offset >= 65536:
            raise OSError(5, "Input/output error")
        return raw[offset : offset + length]

    said = refusal(Disk(failing, len(raw)), "/vmlinuz")

    assert re.fullmatch(r"the whole disk \(ext4\): /vmlinuz: cannot be read at \d+: Input/output error", said)


def test_a_disk_that_becomes_shorter(images: dict[str, bytes]) -> None:
    """A file may be truncated while it is read."""
    raw = images["ext4"][:65536]

    assert "ends at" in refusal(Disk(lambda offset, length: raw[offset : offset + length], 2 * MIB), "/vmlinuz")


def test_the_work_for_a_disk_has_a_bound(images: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit holds for all structures."""
    monkeypatch.setattr(source, "WORK_MAX", 40)

    assert refusal(opened(images["ext4"]), "/vmlinuz").endswith("too much would have to be read to find it")


def test_the_cache_of_a_disk_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that was used last is kept longest."""
    monkeypatch.setattr(source, "CACHED", 2)
    asked: list[int] = []

    def read(offset: int, length: int) -> bytes:
        asked.append(offset)
        return bytes(length)

    store = source.Store(read, 5 * 4096 + 512)
    whole = source.Source(store, 0, store.size)
    whole.read(4088, 8)
    assert asked == [0]
    for offset in (4096, 100, 8192, 50, 4096, 5 * 4096):
        whole.read(offset, 8)

    assert asked == [0, 4096, 8192, 4096, 5 * 4096]
    assert len(store.cache) == 2


def test_nothing_outside_is_read() -> None:
    """Reads are limited to the partition and to the disk, and in size."""
    store = source.Store(lambda _offset, length: bytes(length), 1 << 40)
    part = source.Source(store, 0, 1 << 40).part(4096, 1 << 30)

    for offset, length in ((-1, 4), (0, (1 << 30) + 1), ((1 << 30) - 3, 4), (0, READ_MAX + 1)):
        with pytest.raises(DiskFsError):
            part.read(offset, length)
    with pytest.raises(DiskFsError):
        part.content((1 << 30) - 3, 4)
    with pytest.raises(DiskFsError):
        part.part(1, 1 << 30)
    assert part.read((1 << 30) - 4, 4) == bytes(4)


def test_a_partition_in_two_tables_is_searched_once(images: dict[str, bytes]) -> None:
    """OpenBSD's disklabel also lists partitions of the MBR."""
    raw = openbsd_disk(images["FFS2"])
    put(raw, 65, label(("a", 7, 64, 4096), ("i", 17, 64, 4096)))

    assert refusal(opened(raw), "/nothing").count("partition") == 1
