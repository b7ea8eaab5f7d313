"""vmctl create from published images: compressed, with a checksum, and with a partition table for a smaller disk."""

import hashlib
import importlib
import itertools
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.images import KIB, MIB, opened, qemu, same
from tests.support.loopdevice import LoopDevice
from tests.unit.vmctl.conftest import Vmctl
from vmctl import zstd
from vmctl.bar import Bar
from vmd.images.create import convert, create
from vmd.images.gpt import gpt_end

SIZE = 8 * MIB
CUT = 5 * MIB
PACKERS = ("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", "zstandard")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a partitioned disk, raw and with both compressions.  Much of it is a hole."""
    folder = tmp_path_factory.mktemp("shipped")
    disk = folder / "disk.raw"
    content = b"".join(b"%d bottles " % number for number in range(80_000))
    with disk.open("wb") as file:
        file.truncate(SIZE)
        file.seek(2 * MIB)
        file.write(content + os.urandom(300 * KIB))
    subprocess.run(["sfdisk", "-q", disk], input="label: gpt\nstart=2048, size=12288\n", text=True, check=True)
    for kind in ("zlib", "zstd"):
        qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", disk, folder / kind)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the command runs."""
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    return tmp_path / "folder"


def checksum(kind: str, path: Path) -> str:
    """Return a checksum in the form that `-c` takes."""
    return f"{kind}:{hashlib.new(kind, path.read_bytes()).hexdigest()}"


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_image_becomes_a_larger_disk(shipped: Path, folder: Path, vmctl: Vmctl, kind: str) -> None:
    """One command verifies and enlarges it.  The message says what the guest has to do."""
    status, _, said = vmctl("create", "-i", str(shipped / kind), "-c", checksum("sha512", shipped / kind), "-s", "64M",
                            "web.qcow2")  # fmt: skip

    assert status == 0, said
    assert said == (
        "vmctl: the partition table is still for a disk of 8.0M: the guest corrects it when it enlarges a"
        " partition (cloud-init and growpart do)\n"
        "vmctl: qcow2 imagefile created\n"
    )
    same(folder / "web.qcow2", (shipped / "disk.raw").read_bytes().ljust(64 * MIB, b"\0"), folder)


@pytest.mark.parametrize("module", PACKERS)
def test_each_module_decompresses_zstd(module: str) -> None:
    """Clusters with several frames, or with data after the frame, work.  The output has a limit."""
    packer = pytest.importorskip(module)
    compress: Callable[[bytes], bytes] = packer.compress
    unpack = (zstd.by_zstandard if module == "zstandard" else zstd.by_python)(importlib.import_module(module))
    plain = os.urandom(40 * KIB) + bytes(24 * KIB)

    assert unpack(compress(plain), len(plain)) == plain
    assert unpack(compress(plain[:1000]) + compress(b"") + compress(plain[1000:]), len(plain)) == plain
    assert unpack(compress(plain) + b"what was there before", len(plain)) == plain
    assert unpack(compress(bytes(64 * MIB)), 64 * KIB) == bytes(64 * KIB)
    assert len(unpack(compress(plain)[:20000], len(plain))) < len(plain)
    with pytest.raises(ValueError, match=r"."):
        unpack(b"no frame at all, but this text", len(plain))


def test_zstd_without_a_module(shipped: Path, folder: Path, vmctl: Vmctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names packages that can decompress it."""
    monkeypatch.setattr(zstd, "find", lambda: None)

    status, _, said = vmctl("create", "-i", str(shipped / "zstd"), "a.qcow2")

    assert (status, said) == (1, (
        f"vmctl: failed to open source image file: {shipped}/zstd: uses zstd compression: install python3-zstandard, or"
        f" backports.zstd by pip, or convert it: qemu-img convert -f qcow2 -O qcow2 {shipped}/zstd a.qcow2\n"
    ))  # fmt: skip
    assert os.listdir(folder) == []


def test_zstd_image_is_refused_as_a_base(shipped: Path, folder: Path, vmctl: Vmctl) -> None:
    """A VM could not read it."""
    status, _, said = vmctl("create", "-b", f"qcow2:{shipped}/zstd", str(folder / "a.qcow2"))

    assert status == 1
    assert "uses zstd compression, which a VM cannot read; vmctl create -i converts it" in said


@pytest.mark.parametrize("word", ["zlib", "raw:disk.raw"])
@pytest.mark.parametrize("kind", ["sha256", "sha512"])
def test_wrong_checksum_leaves_nothing(
    shipped: Path, folder: Path, vmctl: Vmctl, word: str, kind: str
) -> None:
    """It covers the whole file with its holes, and is checked before the copy gets its name."""
    prefix, _, name = word.rpartition(":")
    source = f"{prefix}:{shipped}/{name}" if prefix else str(shipped / name)
    right = checksum(kind, shipped / name)
    wrong = right[:-1] + ("0" if right[-1] != "0" else "1")

    status, _, said = vmctl("create", "-i", source, "-c", wrong, "copy.qcow2")

    values = [value.partition(":")[2] for value in (right, wrong)]
    assert (status, said) == (1, (
        f"vmctl: {shipped}/{name} is damaged, or is another file: its {kind} is {values[0]}, not {values[1]}\n"
    ))  # fmt: skip
    assert os.listdir(folder) == []
    right = f"{kind}:{values[0].upper()}"
    assert vmctl("create", "-i", source, "-c", right, "copy.qcow2") == (0, "", "vmctl: qcow2 imagefile created\n")


def test_file_that_changes_meanwhile_has_no_checksum(
    folder: Path, vmctl: Vmctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copied bytes may differ from the verified ones."""
    source = folder / "disk"
    source.write_bytes(os.urandom(2 * MIB))
    right = checksum("sha256", source)
    times = source.stat()

    def change(bar: Bar, done: int, whole: int) -> None:
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a program does to hide the change

    monkeypatch.setattr(Bar, "show", change)
    status, _, said = vmctl("create", "-i", "disk", "-c", right, "copy")

    assert (status, said) == (1, "vmctl: disk was changed while it was read\n")
    assert os.listdir(folder) == ["disk"]


def test_checksum_of_an_image_with_a_base(folder: Path, vmctl: Vmctl) -> None:
    """A warning says that it covers only one of the files."""
    create("base.qcow2", "qcow2", 2 * MIB)
    create("top.qcow2", "qcow2", 2 * MIB, "base.qcow2", "qcow2")

    status, _, said = vmctl("create", "-i", "top.qcow2", "-c", checksum("sha256", folder / "top.qcow2"), "a.raw")

    assert status == 0
    assert "warning: the checksum is of top.qcow2 only, and not of its backing file" in said


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("md5:00", "md5:00 begins with neither sha256: nor sha512:\n"),
        ("", " begins with neither sha256: nor sha512:\n"),
        ("a" * 64, f"{'a' * 64} begins with neither sha256: nor sha512:; if it is a sha256, write sha256: in front\n"),
        ("sha256:" + "a" * 63, f"a sha256 has 64 digits, and {'a' * 63} has 63\n"),
        ("sha512:" + "a" * 64, f"a sha512 has 128 digits, and {'a' * 64} has 64\n"),
        ("sha256:" + "g" * 64, f"{'g' * 64} is not a hexadecimal number\n"),
    ],
)
def test_malformed_checksums(folder: Path, vmctl: Vmctl, word: str, words: str) -> None:
    """They are refused before any file is read."""
    status, _, said = vmctl("create", "-i", "gone", "-c", word, "a")

    assert (status, said) == (2, f"vmctl: invalid checksum: {words}")
    assert "-c needs -i" in vmctl("create", "-s", "1M", "-c", "sha256:" + "a" * 64, "a")[2]


@pytest.mark.parametrize("size", [(), ("-s", "1G")])
def test_truncated_images(shipped: Path, folder: Path, vmctl: Vmctl, size: tuple[str, ...]) -> None:
    """The partition table has the length of the disk.  A truncated qcow2 image is refused."""
    (folder / "disk").write_bytes((shipped / "disk.raw").read_bytes()[:CUT])
    status, _, said = vmctl("create", "-i", "disk", *size, "a")
    assert status == 0
    assert said.startswith(
        f"vmctl: warning: disk may be truncated: its partition table is for a disk of 8.0M ({SIZE} bytes),"
        f" and it has {CUT} bytes\n"
    )

    packed = (shipped / "zlib").read_bytes()
    (folder / "packed").write_bytes(packed[: len(packed) - 128 * KIB])
    status, _, said = vmctl("create", "-i", "qcow2:packed", *size, "b")
    assert status == 1
    lost = f"packed: file ends at {len(packed) - 128 * KIB}, before a cluster that is in use"
    assert said.endswith(f"vmctl: failed to read from source: {lost}\n")
    assert sorted(os.listdir(folder)) == ["a", "disk", "packed"]


def test_damaged_partition_tables_are_ignored(shipped: Path, folder: Path, vmctl: Vmctl) -> None:
    """The table's checksum covers each of these bytes."""
    head = (shipped / "disk.raw").read_bytes()[: 2 * MIB]
    for at in (512, 512 + 16, 512 + 24, 512 + 32, 512 + 91):
        changed = bytearray(head)
        changed[at] ^= 1
        (folder / "disk").write_bytes(changed)
        with_table = opened(folder / "disk", formats=("raw",))
        assert gpt_end(with_table) == 0, at
        with_table.close()
    table = bytearray((shipped / "disk.raw").read_bytes()[: 2 * MIB])
    table[512 + 32 : 512 + 40] = b"\xff" * 8  # the position of its copy
    table[512 + 16 : 512 + 20] = bytes(4)
    table[512 + 16 : 512 + 20] = zlib.crc32(table[512 : 512 + 92]).to_bytes(4, "little")
    (folder / "disk").write_bytes(table)
    assert vmctl("create", "-i", "disk", "absurd") == (0, "", "vmctl: raw imagefile created\n")
    for size in (0, 512, 1024):
        (folder / "disk").write_bytes(bytes(size))
        assert vmctl("create", "-i", "disk", f"copy{size}") == (0, "", "vmctl: raw imagefile created\n")


@pytest.mark.parametrize("name", ["disk.raw", "zlib"])
def test_progress_counts_data_only(shipped: Path, folder: Path, name: str) -> None:
    """With holes, the rate and the remaining time would be meaningless."""
    source = opened(shipped / name, formats=("raw",) if name == "disk.raw" else ("qcow2",))
    seen: list[tuple[int, int]] = []

    convert(source, str(folder / "copy"), "raw", SIZE, lambda done, whole: seen.append((done, whole)))
    source.close()

    wholes = {whole for _, whole in seen}
    assert len(wholes) == 1
    assert seen[-1] == (wholes.pop(),) * 2
    assert MIB < seen[-1][0] < 3 * MIB
    assert all(before[0] < after[0] for before, after in itertools.pairwise(seen))
    assert (folder / "copy").read_bytes() == (shipped / "disk.raw").read_bytes()


def test_data_of_compressed_images_is_in_long_runs(shipped: Path) -> None:
    """Short runs would look up each cluster a thousand times."""
    packed = opened(shipped / "zlib")
    spans = []
    position = 0
    while position < packed.size:
        spans.append(packed.span(position))
        position += spans[-1][1]
    packed.close()

    assert position == SIZE
    assert max(length for has_data, length in spans if has_data) > MIB // 2


@pytest.mark.root
@pytest.mark.deep
def test_guest_that_grows_its_partition_moves_the_end(shipped: Path, folder: Path, vmctl: Vmctl) -> None:
    """The kernel finds the partition before that, and growpart works as the message says."""
    assert vmctl("create", "-i", str(shipped / "zlib"), "-s", "64M", "disk.raw")[0] == 0
    with LoopDevice(folder / "disk.raw", 0) as loop:
        subprocess.run(["partx", "-a", loop.path], check=True)
        try:
            before = int(Path(f"/sys/class/block/{loop.path.name}p1/size").read_text())
            subprocess.run(["growpart", loop.path, "1"], check=True)
            after = int(Path(f"/sys/class/block/{loop.path.name}p1/size").read_text())
        finally:
            subprocess.run(["partx", "-d", loop.path], check=True)

    grown = opened(folder / "disk.raw", formats=("raw",))
    assert gpt_end(grown) == 64 * MIB
    grown.close()
    assert before == 12288
    assert after > 100_000
