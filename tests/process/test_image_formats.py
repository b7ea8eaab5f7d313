"""Images in unsupported formats, made by their own programs: refused with the format's name and the conversion."""

import contextlib
import errno
import os
import random
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.foreign import NAMES, SAMPLES, Make, archive, compressed, luks, odd, whole_sectors
from tests.support.images import MIB, opened, qemu, read, write
from vmctl.commands.create import run
from vmctl.options import find_command, parse
from vmctl.session import Session
from vmd.config.model import DiskConfig
from vmd.errors import ImageError, OperatorError, VmdError
from vmd.files.images import OpenDisk, Use, open_cdrom, open_disk
from vmd.images.create import create
from vmd.images.files import OpenedChain
from vmd.images.identify import probe
from vmd.ipc.foreign import FOREIGN, command
from vmd.ipc.probemsg import Probe

CREATE = find_command("create")

every_sample = pytest.mark.parametrize(
    ("name", "make"), [pytest.param(name, make, id=label) for name, label, make in SAMPLES]
)
contents = pytest.mark.parametrize(
    ("name", "make"), [pytest.param(name, make, id=label) for name, label, make in SAMPLES if FOREIGN[name].content]
)


class InProcess:
    """imgprobe inside the test process."""

    def probe(self, fd: int, name: str, format_hint: str, *, boots: bool = False) -> Probe:
        """Look at the image."""
        try:
            return probe(fd, name, format_hint)
        except ImageError as error:
            raise OperatorError(errno.EINVAL, str(error)) from None


def disk(path: Path, image_format: str = "", *, in_conf: bool = True) -> OpenDisk:
    """Open a disk as the parent does."""
    return open_disk(DiskConfig(path=str(path), format=image_format), InProcess(), Use(in_conf=in_conf))


def refusal(path: Path, image_format: str = "", *, in_conf: bool = True) -> str:
    """Return the message with which a disk is refused."""
    with pytest.raises(OperatorError) as refused:
        disk(path, image_format, in_conf=in_conf)
    return str(refused.value)


@every_sample
def test_disk_without_a_format_is_refused_by_name(tmp_path: Path, name: str, make: Make) -> None:
    """The message has the conversion.  Only `format raw` makes it a raw disk, without a check."""
    path = tmp_path / "it's a disk"
    make(path)
    if FOREIGN[name].content:
        odd(path)

    in_conf, typed = refusal(path), refusal(path, in_conf=False)

    assert in_conf.startswith(f"disk {path}: is {FOREIGN[name].what}; convert it: {command(name, str(path))}")
    assert in_conf.endswith("(or, if the guest is to see the file unchanged, use `format raw`)")
    assert typed.endswith(f"use raw:'{tmp_path}/it'\"'\"'s a disk')")
    given = disk(path, "raw")
    assert [(link.format, link.guessed) for link in given.links] == [("raw", False)]
    given.close()


@pytest.mark.deep
def test_luks_container_of_qemu_is_refused_by_name(tmp_path: Path) -> None:
    """The command in the message opens it with a passphrase from a file.  QEMU needs seconds to make the key."""
    path, secret = tmp_path / "a,b.luks", tmp_path / "PASSPHRASE-FILE"
    luks(path)
    secret.write_text("secret")
    said = command("LUKS", str(path))

    assert f"is an encrypted LUKS container; convert it: {said}" in refusal(path)
    subprocess.run(said, shell=True, check=True, capture_output=True, cwd=tmp_path)

    disk(Path(f"{path}.qcow2")).close()


@every_sample
def test_disk_that_should_be_qcow2_is_refused_by_name(tmp_path: Path, name: str, make: Make) -> None:
    """The configuration or the file's name states qcow2."""
    make(tmp_path / "disk")
    shutil.copy(tmp_path / "disk", tmp_path / "disk.qcow2")
    words = "unsupported qcow2 version 1" if name == "QCOW" else f"is {FOREIGN[name].what}"

    assert words in refusal(tmp_path / "disk", "qcow2")
    assert words in refusal(tmp_path / "disk.qcow2")


@every_sample
def test_disc_is_refused_by_name(tmp_path: Path, name: str, make: Make) -> None:
    """No guest has written to a disc, so its format is certain."""
    make(tmp_path / "disc")

    with pytest.raises(OperatorError) as refused:
        open_cdrom(str(tmp_path / "disc"), InProcess())

    done = command(name, f"{tmp_path}/disc", disc=True)
    assert str(refused.value) == f"cdrom {tmp_path}/disc: is {FOREIGN[name].what}; convert it: {done}"
    assert "-O qcow2" not in str(refused.value)
    assert "format raw" not in str(refused.value)


@every_sample
def test_base_without_a_recorded_format_is_refused_by_name(tmp_path: Path, name: str, make: Make) -> None:
    """The message advises to record the format."""
    make(tmp_path / "base")
    if FOREIGN[name].content:
        odd(tmp_path / "base")
    create(str(tmp_path / "top"), "qcow2", MIB, "base", "")

    said = refusal(tmp_path / "top", "qcow2")
    with pytest.raises(ImageError) as refused:
        OpenedChain(str(tmp_path / "top"), "qcow2")

    assert said.startswith(f"disk {tmp_path}/top: backing file {tmp_path}/base: is {FOREIGN[name].what}; convert it: ")
    assert said.endswith(f"use `qemu-img rebase -u -f qcow2 -F raw -b base {tmp_path}/top`)")
    assert str(refused.value).startswith(f"{tmp_path}/base: is {FOREIGN[name].what}; convert it: ")


@every_sample
def test_copy_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Make
) -> None:
    """`vmctl create -i` would copy the container instead of the disk in it.  The prefix `raw:` permits that."""
    monkeypatch.chdir(tmp_path)
    make(Path("a"))
    if FOREIGN[name].content:
        odd(Path("a"))
    content = Path("a").read_bytes()

    with pytest.raises(VmdError) as refused:
        run(Session(), parse(CREATE, ["-i", "a", "b"]))
    assert not Path("b").exists()
    assert run(Session(), parse(CREATE, ["-i", "raw:a", "b"])) == 0

    words = f"failed to open source image file: a: is {FOREIGN[name].what}; convert it: {command(name, 'a')}"
    assert str(refused.value).startswith(words)
    assert Path("b").read_bytes()[: len(content)] == content


IMAGES = [
    "vmdk-monolithicSparse", "vmdk-streamOptimized", "vdi", "vhd-dynamic", "vhd-fixed", "vhdx", "qed", "qcow",
    "parallels",
]  # fmt: skip
COMPRESSED = ["gzip", "xz", "zstd", "bzip2", "lz4"]


@pytest.mark.parametrize(
    ("label", "named"), [(label, False) for label in IMAGES + COMPRESSED] + [(label, True) for label in COMPRESSED]
)
def test_the_command_in_the_message_works(tmp_path: Path, label: str, named: bool) -> None:
    """The command from the message makes a usable image."""
    name, make = next((name, make) for name, found, make in SAMPLES if found == label)
    path = tmp_path / f"a, 'quoted' \"name\".{NAMES.get(label, label) if named else 'disk'}"
    make(path)
    before = set(tmp_path.iterdir())

    subprocess.run(command(name, str(path)), shell=True, check=True, capture_output=True, cwd="/")

    (made,) = set(tmp_path.iterdir()) - before
    assert path.exists()
    if FOREIGN[name].content:
        assert made.read_bytes()[510:512] == b"\x55\xaa"
    else:
        driver = FOREIGN[name].remedy.split()[3]
        disk(made).close()
        assert qemu("qemu-img", "compare", "-f", "qcow2", "-F", driver, made, path).startswith("Images are identical")


@pytest.mark.parametrize("path", ["-rf", "a:b", "a b", "$(x)", "a'b", "ok.img", "/x/y;z", "*", "~", "~/x"])
def test_paths_are_words_of_a_shell(path: str) -> None:
    """A path becomes one shell word, which is neither an option nor a protocol."""
    for name in FOREIGN:
        words = shlex.split(command(name, path).replace("<", " ").replace(">", " ").replace("&&", " "))
        if words and name != "LUKS" and "{image}" in FOREIGN[name].remedy:
            found = [word for word in words if word.removeprefix("./") == path]
            assert len(found) == 1
            assert not found[0].startswith("-")


# --- writes of a guest ---------------------------------------------------------------------------------------------


@contents
def test_disk_that_begins_like_an_archive_is_used_with_a_warning(tmp_path: Path, name: str, make: Make) -> None:
    """A guest may write an archive to its disk, and must still start.  It cannot change the length of the disk."""
    path = tmp_path / "disk"
    make(path)
    whole_sectors(path)

    found = disk(path)

    what = FOREIGN[name].what
    assert [(link.format, link.guessed) for link in found.links] == [("raw", True)]
    assert found.notes == [
        f"disk {path}: seems to be {what}, and is used as raw; use `format raw` to confirm this"
    ]
    found.close()


@contents
def test_an_archive_with_the_name_of_one_is_refused(tmp_path: Path, name: str, make: Make) -> None:
    """It is refused with any length, because the guest does not choose the name."""
    if not FOREIGN[name].names:
        return
    path = tmp_path / f"disk{FOREIGN[name].names[0].upper()}"
    make(path)
    whole_sectors(path)

    assert f"is {FOREIGN[name].what}" in refusal(path)


def test_tar_archive(tmp_path: Path) -> None:
    """A tar archive is accepted as a disk and as a disc: some guests read it directly.  Only the warning differs."""
    archive("a", b"x", tmp_path / "a.img")

    found = disk(tmp_path / "a.img")
    found.close()
    fd, notes = open_cdrom(str(tmp_path / "a.img"), InProcess())
    os.close(fd)

    assert "seems to be a tar archive" in found.notes[0]
    assert notes == [f"cdrom {tmp_path}/a.img: seems to be a tar archive, and is used unchanged"]


def writes(path: Path, offset: int, data: bytes) -> int:
    """Write as the guest of a guessed raw disk; return the errno."""
    image = opened(path, writable=True, formats=("raw",), guessed=True)
    try:
        write(image, offset, data)
    except OSError as error:
        return error.errno or 0
    finally:
        image.close()
    return 0


@every_sample
@pytest.mark.parametrize(
    ("size", "called"), [(64 * MIB, "disk.img"), (64 * MIB + 5, "disk.img"), (64 * MIB, "disk")], ids=str
)
def test_guest_cannot_make_its_disk_unstartable(
    tmp_path: Path, name: str, make: Make, size: int, called: str
) -> None:
    """A write to the ends of the disk fails, or the disk is raw at the next start."""
    make(tmp_path / "sample")
    sample = (tmp_path / "sample").read_bytes()
    path = tmp_path / (called if called != "disk" else f"disk{(FOREIGN[name].names or ('.img',))[0]}")
    path.touch()
    os.truncate(path, size)

    head = writes(path, 0, sample[:4096].ljust(4096, b"\0"))
    tail = writes(path, size - 4096, sample[-4096:].rjust(4096, b"\0"))

    assert {head, tail} <= {0, errno.EPERM}
    found = disk(path)
    assert [(link.format, link.guessed) for link in found.links] == [("raw", True)]
    found.close()
    if not FOREIGN[name].content:
        assert errno.EPERM in (head, tail)


def test_guest_that_writes_at_random_keeps_its_disk(tmp_path: Path) -> None:
    """Pieces of signatures are written to disks of several sizes.  Each disk is raw afterwards."""
    choice = random.Random(5)
    for number, (_, _, make) in enumerate(SAMPLES):
        make(tmp_path / f"sample{number}")
    samples = [(tmp_path / f"sample{number}").read_bytes() for number in range(len(SAMPLES))]
    path = tmp_path / "disk"
    for _ in range(300):
        size = choice.choice((513, 1000, 1024, 1536, 2048, 4096, 4099))
        path.write_bytes(bytes(size))
        image = opened(path, writable=True, formats=("raw",), guessed=True)
        sample = choice.choice(samples)
        source = choice.choice((sample[:size].ljust(size, b"\0"), sample[-size:].rjust(size, b"\0")))
        places = [(at, min(size, at + choice.randrange(1, 600))) for at in choice.sample(range(size), min(size, 40))]
        for start, end in [*places, (0, 512), (512, size), (max(0, size - 512), size)]:
            with contextlib.suppress(PermissionError):
                write(image, start, source[start:end])
        content = read(image, 0, size)
        image.close()
        assert path.read_bytes() == content
        disk(path).close()


def test_kernel_given_as_disk(tmp_path: Path) -> None:
    """An ELF file and a bzImage are refused as disks."""
    (tmp_path / "vmlinux").write_bytes(b"\x7fELF" + bytes(5000))
    linux = bytearray(9000 + 3)
    linux[510:512], linux[0x202:0x206] = b"\x55\xaa", b"HdrS"
    (tmp_path / "vmlinuz").write_bytes(linux)

    for name in ("vmlinux", "vmlinuz"):
        assert "is a kernel, which belongs to `boot`" in refusal(tmp_path / name)


# --- discs --------------------------------------------------------------------------------------------------------


def test_qcow2_is_no_disc(tmp_path: Path) -> None:
    """A qcow2 image is refused as a disc, because the guest would see its header."""
    create(str(tmp_path / "a.iso"), "qcow2", MIB)

    with pytest.raises(OperatorError) as refused:
        open_cdrom(str(tmp_path / "a.iso"), InProcess())

    made = f"qemu-img convert -f qcow2 -O raw {tmp_path}/a.iso {tmp_path}/a.iso.iso"
    assert str(refused.value) == f"cdrom {tmp_path}/a.iso: is a qcow2 image; convert it: {made}"


def test_iso_image_is_a_disc_and_a_disk(tmp_path: Path) -> None:
    """It is accepted with any content in its first 32 KiB, which are for boot loaders."""
    (tmp_path / "content").mkdir()
    (tmp_path / "content/file").write_bytes(b"x")
    iso = tmp_path / "a.iso"
    subprocess.run(
        ["xorriso", "-as", "mkisofs", "-quiet", "-o", iso, tmp_path / "content"], check=True, capture_output=True
    )

    for first in (b"", b"\x1f\x8b\x08", b"QFI\xfb", b"\x33\xc0"):
        with iso.open("r+b") as file:
            file.write(first)
        fd, notes = open_cdrom(str(iso), InProcess())
        os.close(fd)
        assert notes == []
    found = disk(iso)
    assert ([link.format for link in found.links], found.notes) == (["raw"], [])
    found.close()


def test_dump_of_cd_sectors_is_no_disc(tmp_path: Path) -> None:
    """The BIN file of a CUE sheet is refused, because its sectors have headers."""
    (tmp_path / "a.bin").write_bytes((b"\0" + b"\xff" * 10 + b"\0" + bytes(2340)) * 20)

    with pytest.raises(OperatorError, match="is a dump of CD sectors of 2352 bytes; convert it: bchunk"):
        open_cdrom(str(tmp_path / "a.bin"), InProcess())


# --- *.qcow2 ------------------------------------------------------------------------------------------------------


def test_a_derived_image_may_be_named_qcow2(tmp_path: Path) -> None:
    """The name states the format, as `format qcow2` does."""
    create(str(tmp_path / "base.qcow2"), "qcow2", MIB)
    create(str(tmp_path / "top.qcow2"), "qcow2", MIB, "base.qcow2", "qcow2")
    create(str(tmp_path / "top.img"), "qcow2", MIB, "base.qcow2", "qcow2")

    found = disk(tmp_path / "top.qcow2")
    assert [(Path(link.path).name, link.guessed) for link in found.links] == [
        ("top.qcow2", False), ("base.qcow2", False),
    ]  # fmt: skip
    found.close()
    assert refusal(tmp_path / "top.img").endswith("configure it with `format qcow2`")
    assert refusal(tmp_path / "top.img", in_conf=False).endswith(f"give it as qcow2:{tmp_path}/top.img")


def test_a_raw_image_named_qcow2_is_refused(tmp_path: Path) -> None:
    """It is raw only with `format raw`, because its guest could write a qcow2 header."""
    path = tmp_path / "disk.QCOW2"
    path.write_bytes(bytes(MIB))

    words = f"disk {path}: not a qcow2 image, as its name says; if it is raw, say "
    assert refusal(path) == words + "`format raw`"
    assert refusal(path, in_conf=False) == words + f"raw:{path}"
    assert refusal(path, "qcow2") == f"disk {path}: not a qcow2 image"
    found = disk(path, "raw")
    assert [(link.format, link.guessed) for link in found.links] == [("raw", False)]
    found.close()


def test_vmctl_copies_its_own_derived_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A derived image with the name of a qcow2 image needs no prefix."""
    monkeypatch.chdir(tmp_path)
    for arguments in (["-s", "2M", "base.qcow2"], ["-b", "base.qcow2", "top.qcow2"], ["-i", "top.qcow2", "copy.raw"]):
        assert run(Session(), parse(CREATE, arguments)) == 0

    assert Path("copy.raw").read_bytes() == bytes(2 * MIB)


# --- untrusted bytes ----------------------------------------------------------------------------------------------


@every_sample
def test_every_prefix_of_a_sample_is_recognized_or_refused(tmp_path: Path, name: str, make: Make) -> None:
    """Hostile input 52: each prefix of a sample is recognized, or refused with a sentence."""
    path = tmp_path / "cut"
    make(path)
    size = path.stat().st_size
    for length in (*range(size, max(0, size - 520), -13), *range(min(size, 1100), -1, -7)):
        os.truncate(path, length)
        for hint in ("", "qcow2", "disc"):
            answered(path, hint)


def test_random_bytes_are_recognized_or_refused(tmp_path: Path) -> None:
    """Hostile input 52: the same for random bytes, and for samples with random changes."""
    choice = random.Random(52)
    make = compressed("gzip")
    make(tmp_path / "sample")
    sample = (tmp_path / "sample").read_bytes()
    path = tmp_path / "noise"
    for _ in range(500):
        content = bytearray(choice.choice((sample, choice.randbytes(choice.randrange(3000)), bytes(2048))))
        for _ in range(choice.randrange(8)):
            if content:
                content[choice.randrange(len(content))] = choice.randrange(256)
        path.write_bytes(content)
        for hint in ("", "qcow2", "disc"):
            answered(path, hint)


def answered(path: Path, hint: str) -> None:
    """Examine a file.  Any other exception than ImageError fails the test."""
    with path.open("rb") as file:
        try:
            found = probe(file.fileno(), "image", hint)
        except ImageError:
            return
    assert found.format in ("", "raw", "qcow2")
    assert found.looks in ("", *FOREIGN)
