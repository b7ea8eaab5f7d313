"""How disks are opened: which files, with whose rights, and which are refused (hostile-input 31, 52, 53)."""

import errno
import os
import pwd
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.images import MIB
from tests.support.users import acting_as, public_folder
from vmd.config.model import DiskConfig, Owner
from vmd.errors import VMD_CDROM_INVALID, VMD_CDROM_MISSING, VMD_DISK_MISSING, ImageError, OperatorError
from vmd.files.images import OpenDisk, open_cdrom, open_disk
from vmd.images.create import create
from vmd.images.identify import probe
from vmd.images.locks import lock
from vmd.ipc.probemsg import Probe

NOBODY = pwd.getpwnam("nobody")
USER = Owner(uid=NOBODY.pw_uid, gid=NOBODY.pw_gid)
ROOT = Owner(uid=0, gid=0)


class InProcess:
    """imgprobe without a process."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def probe(self, fd: int, name: str, format_hint: str, *, boots: bool = False) -> Probe:
        """Examine the image, and record the request."""
        self.asked.append((name, format_hint))
        try:
            return probe(fd, name, format_hint)
        except ImageError as error:
            raise OperatorError(errno.EINVAL, str(error)) from None


class Says:
    """An imgprobe that was taken over and always gives the same answer."""

    def __init__(self, answer: Probe) -> None:
        self.answer = answer

    def probe(self, fd: int, name: str, format_hint: str, *, boots: bool = False) -> Probe:
        """Return that answer."""
        return self.answer


Open = Callable[..., OpenDisk]


@pytest.fixture
def opens() -> Iterator[Open]:
    """Yield a function that opens a disk and closes it after the test."""
    opened: list[OpenDisk] = []

    def open_it(path: Path | str, image_format: str = "", user: Owner | None = None) -> OpenDisk:
        with acting_as(user):
            opened.append(open_disk(DiskConfig(path=str(path), format=image_format), InProcess()))
        return opened[-1]

    yield open_it
    for disk in opened:
        disk.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder that every user may enter."""
    with public_folder() as folder:
        yield folder


def refusal(path: Path | str, image_format: str = "", user: Owner | None = None) -> OperatorError:
    """Return the error of a disk that is refused, after a check that no descriptor was left open."""
    before = open_descriptors()
    with pytest.raises(OperatorError) as refused, acting_as(user):
        open_disk(DiskConfig(path=str(path), format=image_format), InProcess())
    assert open_descriptors() == before
    return refused.value


def shown(disk: OpenDisk) -> list[tuple[str, str, bool]]:
    """Return the name and format of each image, and whether the format was guessed."""
    return [(Path(link.path).name, link.format, link.guessed) for link in disk.links]


# --- formats ------------------------------------------------------------------------------------------------------


def test_raw_disk_without_a_format_is_guessed(tmp_path: Path, opens: Open) -> None:
    """Hostile input 31: the device process learns that it was guessed, and lets no image header be written."""
    (tmp_path / "disk").write_bytes(bytes(MIB))

    assert shown(opens(tmp_path / "disk")) == [("disk", "raw", True)]


def test_disk_configured_as_raw_is_not_examined(tmp_path: Path) -> None:
    """This holds even if its first bytes are a qcow2 header."""
    create(str(tmp_path / "disk"), "qcow2", MIB, "/etc/shadow", "raw")
    prober = InProcess()

    disk = open_disk(DiskConfig(path=str(tmp_path / "disk"), format="raw"), prober)

    assert shown(disk) == [("disk", "raw", False)]
    assert prober.asked == []
    disk.close()


def test_qcow2_disk_may_be_guessed(tmp_path: Path, opens: Open) -> None:
    """A guess is accepted if the image names no other file."""
    create(str(tmp_path / "disk"), "qcow2", MIB)

    assert shown(opens(tmp_path / "disk")) == [("disk", "qcow2", True)]


def test_guessed_disk_gets_no_backing_file(tmp_path: Path) -> None:
    """Hostile input 31: a guest may have written that header.  The message says how to configure the disk."""
    create(str(tmp_path / "disk"), "qcow2", MIB, "/etc/shadow", "raw")

    refused = refusal(tmp_path / "disk")

    assert refused.number == errno.EINVAL
    assert str(refused) == (
        f"disk {tmp_path}/disk: has backing file /etc/shadow, but only its first bytes say that it is qcow2;"
        " configure it with `format qcow2`"
    )


def test_disk_of_another_format_is_refused(tmp_path: Path) -> None:
    """A disk that is configured as qcow2 must be qcow2."""
    (tmp_path / "disk").write_bytes(bytes(MIB))

    assert str(refusal(tmp_path / "disk", "qcow2")) == f"disk {tmp_path}/disk: not a qcow2 image"


# --- chains -------------------------------------------------------------------------------------------------------


def test_chain_is_followed_from_each_image_s_directory(tmp_path: Path, opens: Open) -> None:
    """Relative paths start at the image's directory.  Formats are those that the images record."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/0.raw").write_bytes(bytes(MIB))
    create(str(tmp_path / "base/1"), "qcow2", MIB, "0.raw", "raw")
    create(str(tmp_path / "2"), "qcow2", MIB, "base/1", "qcow2")
    create(str(tmp_path / "3"), "qcow2", MIB, str(tmp_path / "2"), "qcow2")

    disk = opens(tmp_path / "3", "qcow2")

    assert shown(disk) == [("3", "qcow2", False), ("2", "qcow2", False), ("1", "qcow2", False), ("0.raw", "raw", False)]
    assert disk.links[-1].path == f"{tmp_path}/base/0.raw"


def test_only_the_top_image_is_writable(tmp_path: Path, opens: Open) -> None:
    """The descriptor of a base is read-only, and no descriptor is inherited."""
    create(str(tmp_path / "base"), "qcow2", MIB)
    create(str(tmp_path / "top"), "qcow2", MIB, "base", "qcow2")

    top, base = opens(tmp_path / "top", "qcow2").links

    os.pwrite(top.fd, b"Q", 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(base.fd, b"Q", 0)
    for link in (top, base):
        assert not os.get_inheritable(link.fd)


def test_image_without_a_recorded_format_ends_the_chain(tmp_path: Path, opens: Open) -> None:
    """Hostile input 31: a base whose format was guessed is served, but its own backing file is not."""
    create(str(tmp_path / "0"), "qcow2", MIB)
    create(str(tmp_path / "1"), "qcow2", MIB, "0", "")
    create(str(tmp_path / "2"), "qcow2", MIB, "1", "")

    disk = opens(tmp_path / "1", "qcow2")
    assert shown(disk) == [("1", "qcow2", False), ("0", "qcow2", True)]
    disk.close()
    refused = str(refusal(tmp_path / "2", "qcow2"))

    assert refused.startswith(f"disk {tmp_path}/2: backing file {tmp_path}/1: has backing file 0, but {tmp_path}/2")
    assert f"qemu-img rebase -u -f qcow2 -F qcow2 -b 1 {tmp_path}/2" in refused


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("self", "disk {0}/self: backing chain comes back to {0}/self"),
        ("other-name", "disk {0}/other-name: backing chain comes back to {0}/self"),
        ("a", "disk {0}/a: backing chain comes back to {0}/a"),
        ("5", "disk {0}/5: backing chain is longer than 4 images"),
        ("lost", "disk {0}/lost: backing file {0}/gone: No such file or directory"),
        ("folder", "disk {0}/folder: backing file {0}/.: neither a regular file nor a block device"),
        ("memory", "disk {0}/memory: backing file /proc/self/mem: a file of proc is not an image"),
        ("kernel", "disk {0}/kernel: backing file /sys/power/state: a file of sysfs is not an image"),
        ("open", "disk {0}/open: backing file /proc/self/fd/0: Too many levels of symbolic links"),
        ("watchdog", "disk {0}/watchdog: backing file /dev/null: neither a regular file nor a block device"),
        ("url", "disk {0}/url: backing file nbd:localhost is not a plain path"),
        ("json", "disk {0}/json: backing file json:"),
    ],
)
def test_chain_that_leads_astray_52(tmp_path: Path, name: str, words: str) -> None:
    """Hostile input 52: loops, chains that are too long, and files that are no images."""
    backing = {
        "self": "self", "a": "b", "b": "a", "lost": "gone", "folder": ".", "memory": "/proc/self/mem",
        "kernel": "/sys/power/state", "open": "/proc/self/fd/0", "watchdog": "/dev/null", "url": "nbd:localhost",
        "json": 'json:{"driver":"file","filename":"/etc/shadow"}', "1": "",
    }  # fmt: skip
    for level in range(2, 6):
        backing[str(level)] = str(level - 1)
    for image, base in backing.items():
        create(str(tmp_path / image), "qcow2", MIB, base, "qcow2" if base else "")
    (tmp_path / "other-name").symlink_to("self")

    assert str(refusal(tmp_path / name, "qcow2")).startswith(words.format(tmp_path))


def test_descriptor_paths_lead_nowhere(tmp_path: Path) -> None:
    """Hostile input 52: an image cannot name files that root has open."""
    with (tmp_path / "secret").open("w+") as secret:
        create(str(tmp_path / "disk"), "qcow2", MIB, f"/dev/fd/{secret.fileno()}", "raw")

        assert "Too many levels of symbolic links" in str(refusal(tmp_path / "disk", "qcow2"))


def test_imgprobe_is_not_trusted(tmp_path: Path) -> None:
    """Its answer cannot open a backing file for a raw image, or for one whose format was not given."""
    (tmp_path / "disk").write_bytes(bytes(MIB))
    config = DiskConfig(path=str(tmp_path / "disk"))

    disk = open_disk(config, Says(Probe(format="raw", size=0, backing="/etc/shadow")))
    assert shown(disk) == [("disk", "raw", True)]
    disk.close()
    with pytest.raises(OperatorError, match="only its first bytes say"):
        open_disk(config, Says(Probe(format="qcow2", size=0, backing="/etc/shadow", backing_format="raw")))


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("gone", VMD_DISK_MISSING, "No such file or directory"),
        ("loop", VMD_DISK_MISSING, "Too many levels of symbolic links"),
        ("file/x", VMD_DISK_MISSING, "Not a directory"),
        ("a\0b", VMD_DISK_MISSING, "not a path"),
        ("n" * 300, VMD_DISK_MISSING, "File name too long"),
        (".", errno.EINVAL, "neither a regular file nor a block device"),
        ("fifo", errno.EINVAL, "neither a regular file nor a block device"),
        ("socket", errno.EINVAL, "neither a regular file nor a block device"),
    ],
)
@pytest.mark.parametrize("image_format", ["", "raw", "qcow2"])
def test_file_that_is_no_disk(tmp_path: Path, name: str, code: int, words: str, image_format: str) -> None:
    """Each error message has the file's name."""
    (tmp_path / "file").write_bytes(bytes(MIB))
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)

    refused = refusal(f"{tmp_path}/{name}", image_format)

    assert (refused.number, str(refused)) == (code, f"disk {tmp_path}/{name}: {words}")


def test_empty_path_is_no_disk() -> None:
    """The grammar of vm.conf does not allow it, but a client may send it."""
    assert refusal("").number == VMD_DISK_MISSING


def test_disk_in_use_is_refused_53(tmp_path: Path, opens: Open) -> None:
    """Hostile input 53: the message names the disk.  The other user may be another VM or the same one."""
    (tmp_path / "disk").write_bytes(bytes(MIB))
    (tmp_path / "again").symlink_to("disk")
    opens(tmp_path / "disk")

    refused = refusal(tmp_path / "again")

    words = f"disk {tmp_path}/again: is in use by another process, which writes to it"
    assert (refused.number, str(refused)) == (errno.EBUSY, words)


def test_base_is_shared_and_not_written_53(tmp_path: Path, opens: Open) -> None:
    """Hostile input 53: many disks may share a base.  No process may write it until all of them are closed."""
    create(str(tmp_path / "base"), "qcow2", MIB)
    for name in ("a", "b"):
        create(str(tmp_path / name), "qcow2", MIB, "base", "qcow2")
    disks = [opens(tmp_path / name, "qcow2") for name in ("a", "b")]

    refused = refusal(tmp_path / "base", "qcow2")
    assert str(refused) == f"disk {tmp_path}/base: is in use by another process"
    for disk in disks:
        disk.close()

    opens(tmp_path / "base", "qcow2")
    refused = refusal(tmp_path / "a", "qcow2")
    assert "backing file" in str(refused)
    assert "is in use by another process, which writes to it" in str(refused)


def test_lock_lasts_as_long_as_a_copy_of_the_descriptor(tmp_path: Path) -> None:
    """The device process has a copy when this process has closed its own."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    disk = open_disk(DiskConfig(path=str(path)), InProcess())
    (fd,) = disk.take_fds()
    copy = os.dup(fd)
    os.close(fd)
    disk.close()

    assert refusal(path).number == errno.EBUSY
    os.close(copy)

    open_disk(DiskConfig(path=str(path)), InProcess()).close()


# --- rights -------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_immutable_file_is_no_disk(tmp_path: Path) -> None:
    """A file that cannot be written is refused, even for root.  It is not opened for reading instead."""
    create(str(tmp_path / "disk"), "raw", MIB)
    if subprocess.run(["chattr", "+i", f"{tmp_path}/disk"], capture_output=True, check=False).returncode:
        pytest.skip("file system without immutable files")
    try:
        refused = refusal(tmp_path / "disk")
    finally:
        subprocess.run(["chattr", "-i", f"{tmp_path}/disk"], check=True)

    assert refused.number == VMD_DISK_MISSING
    assert str(refused) == f"disk {tmp_path}/disk: cannot be opened for writing: Operation not permitted"


@pytest.mark.root
@pytest.mark.parametrize(
    ("uid", "gid", "mode", "allowed"),
    [
        (NOBODY.pw_uid, 0, 0o600, True), (NOBODY.pw_uid, 0, 0o400, False), (NOBODY.pw_uid, 0, 0o066, False),
        (0, NOBODY.pw_gid, 0o660, True), (0, NOBODY.pw_gid, 0o646, False), (0, NOBODY.pw_gid, 0o640, False),
        (0, 0, 0o606, True), (0, 0, 0o664, False), (0, 0, 0o602, False), (0, 0, 0o604, False),
    ],
)  # fmt: skip
def test_disk_of_a_user(folder: Path, opens: Open, uid: int, gid: int, mode: int, allowed: bool) -> None:
    """A user who is not root needs the rights to read and write it.  VMs of root need none."""
    path = folder / "disk"
    path.write_bytes(bytes(MIB))
    os.chown(path, uid, gid)
    path.chmod(mode)

    if allowed:
        opens(path, "", USER).close()
    else:
        refused = refusal(path, "", USER)
        words = f"disk {path}: cannot be opened for writing: uid {USER.uid} has no permission"
        assert (refused.number, str(refused)) == (errno.EACCES, words)
    opens(path, "", ROOT).close()


@pytest.mark.root
def test_base_of_a_user_has_to_be_readable(folder: Path, opens: Open) -> None:
    """A user cannot read a file of root by naming it as the base of their own image."""
    (folder / "base").write_bytes(bytes(MIB))
    create(str(folder / "disk"), "qcow2", MIB, "base", "raw")
    os.chown(folder / "disk", USER.uid, NOBODY.pw_gid)
    (folder / "base").chmod(0o640)

    refused = refusal(folder / "disk", "qcow2", USER)
    words = f"disk {folder}/disk: backing file {folder}/base: uid {USER.uid} has no permission"
    assert (refused.number, str(refused)) == (errno.EACCES, words)

    (folder / "base").chmod(0o644)
    assert len(opens(folder / "disk", "qcow2", USER).links) == 2


@pytest.mark.root
def test_user_cannot_open_files_in_a_closed_directory(folder: Path) -> None:
    """A file that everybody may read is refused if the user may not enter its directory."""
    closed = folder / "closed"
    closed.mkdir()
    (closed / "base").write_bytes(bytes(MIB))
    (closed / "base").chmod(0o666)
    closed.chmod(0o700)
    create(str(folder / "disk"), "qcow2", MIB, "closed/base", "raw")
    os.chown(folder / "disk", USER.uid, NOBODY.pw_gid)

    assert refusal(folder / "disk", "qcow2", USER).number == errno.EACCES
    assert refusal(closed / "base", "raw", USER).number == errno.EACCES
    assert refusal(closed / "missing", "raw", USER).number == errno.EACCES  # the user does not learn whether it exists


@pytest.mark.root
def test_rights_of_a_user_end_with_the_call(folder: Path) -> None:
    """After success and after an error the thread is root again, with root's groups."""
    before = Path("/proc/thread-self/status").read_text()
    (folder / "disk").write_bytes(bytes(MIB))
    refusal(folder / "disk", "", USER)
    refusal(folder, "", USER)

    after = Path("/proc/thread-self/status").read_text()

    def identity(status: str) -> list[str]:
        return [line for line in status.splitlines() if line.startswith(("Uid", "Gid", "Groups", "CapEff"))]

    assert identity(after) == identity(before)


# --- block devices ------------------------------------------------------------------------------------------------


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[Path]:
    """Yield a block device of 2 MiB."""
    (tmp_path / "backing").write_bytes(bytes(2 * MIB))
    command = ["losetup", "--show", "-f", f"{tmp_path}/backing"]
    name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not name:
        pytest.skip("no loop devices")
    yield Path(name)
    subprocess.run(["losetup", "-d", name], check=True)


@pytest.mark.root
def test_block_device_is_a_disk_once(block_device: Path, tmp_path: Path, opens: Open) -> None:
    """A second node of the same device is refused, too.  The claim is on the device, the lock on the node."""
    node = tmp_path / "node"
    os.mknod(node, stat.S_IFBLK | 0o600, block_device.stat().st_rdev)

    disk = opens(block_device)

    assert shown(disk) == [(block_device.name, "raw", True)]
    assert refusal(block_device).number == errno.EBUSY
    assert str(refusal(node)) == f"disk {node}: is in use by another process, or mounted"


@pytest.mark.root
def test_block_device_as_base_and_as_disk(block_device: Path, tmp_path: Path) -> None:
    """The chain is a loop even if the base has another node."""
    node = tmp_path / "node"
    os.mknod(node, stat.S_IFBLK | 0o600, block_device.stat().st_rdev)
    create(str(tmp_path / "image"), "qcow2", MIB, str(node), "qcow2")
    with block_device.open("wb") as device:
        device.write((tmp_path / "image").read_bytes())

    assert str(refusal(block_device, "qcow2")) == f"disk {block_device}: backing chain comes back to {node}"


# --- ISO images ---------------------------------------------------------------------------------------------------


def test_cdrom_is_shared(tmp_path: Path) -> None:
    """Any number of VMs may read it.  No process may write it meanwhile."""
    path = tmp_path / "iso"
    path.write_bytes(bytes(MIB))

    fds = [open_cdrom(str(path), InProcess())[0] for _ in range(2)]

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fds[0], b"x", 0)
    assert refusal(path).number == errno.EBUSY
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("gone", VMD_CDROM_MISSING, "No such file or directory"),
        (".", VMD_CDROM_INVALID, "neither a regular file nor a block device"),
        ("fifo", VMD_CDROM_INVALID, "neither a regular file nor a block device"),
        ("busy", errno.EBUSY, "is in use by another process, which writes to it"),
    ],
)
def test_file_that_is_no_cdrom(tmp_path: Path, name: str, code: int, words: str) -> None:
    """vmctl has a text for each code."""
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "busy").open("w+b") as busy:
        lock(busy.fileno(), "busy", writable=True)

        with pytest.raises(OperatorError) as refused:
            open_cdrom(f"{tmp_path}/{name}", InProcess())

    assert (refused.value.number, str(refused.value)) == (code, f"cdrom {tmp_path}/{name}: {words}")


@pytest.mark.root
def test_cdrom_of_a_user(folder: Path) -> None:
    """The user needs the right to read it."""
    (folder / "iso").write_bytes(bytes(MIB))
    (folder / "iso").chmod(0o600)

    with pytest.raises(OperatorError) as refused, acting_as(USER):
        open_cdrom(str(folder / "iso"), InProcess())
    (folder / "iso").chmod(0o604)
    with acting_as(USER):
        os.close(open_cdrom(str(folder / "iso"), InProcess())[0])

    words = f"cdrom {folder}/iso: uid {USER.uid} has no permission"
    assert (refused.value.number, str(refused.value)) == (errno.EACCES, words)


@pytest.mark.root
def test_drive_is_a_cdrom(block_device: Path) -> None:
    """Any block device is accepted, such as /dev/sr0."""
    os.close(open_cdrom(str(block_device), InProcess())[0])
