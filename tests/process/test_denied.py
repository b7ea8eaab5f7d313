"""Files that the kernel or a server refuses to some users: messages name the file and the refused user."""

import errno
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.fusefile import FuseFile
from tests.support.guests import guest
from tests.support.images import MIB
from tests.support.users import acting_as, public_folder
from vmd.config.model import DiskConfig, Owner
from vmd.errors import OperatorError
from vmd.files import denied
from vmd.files.images import open_cdrom, open_disk
from vmd.files.prober import ImageProber
from vmd.privsep import linux
from vmd.privsep.cell import Cell

pytestmark = pytest.mark.root

NOBODY = pwd.getpwnam("nobody")
FUSE_WORDS = "it is on a FUSE file system, which serves only the user who mounted it; mount it with -o allow_other"


@pytest.fixture(scope="module")
def prober() -> Iterator[ImageProber]:
    """Yield the parent's prober."""
    cell = Cell.build(NOBODY.pw_uid, NOBODY.pw_gid)
    yield ImageProber(cell)
    cell.close()


@pytest.fixture(params=[0, NOBODY.pw_uid], ids=["of-root", "of-a-user"])
def mounted(request: pytest.FixtureRequest) -> Iterator[tuple[Path, int]]:
    """Yield a file on a FUSE file system, and the uid that mounted it."""
    with public_folder() as above, FuseFile(bytes(MIB), user=request.param) as file:
        folder = above / "mnt"
        folder.mkdir()
        path = file.attach(folder)
        yield path, request.param
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("image_format", ["", "raw", "qcow2"])
def test_fuse_without_allow_other(mounted: tuple[Path, int], prober: ImageProber, image_format: str) -> None:
    """A mount of root refuses the disk's process but not root; a mount of a user refuses both."""
    path, user = mounted

    with pytest.raises(OperatorError) as refused:
        open_disk(DiskConfig(path=str(path), format=image_format), prober)

    who = "root" if user else "the user of its VM"
    doing = "" if user else "cannot be read: "
    assert str(refused.value).startswith(f"disk {path}: {doing}Permission denied: {who} may not use it: {FUSE_WORDS}")


def test_disc_on_fuse_without_allow_other(mounted: tuple[Path, int], prober: ImageProber) -> None:
    """The same for a disc."""
    path, user = mounted

    with pytest.raises(OperatorError) as refused:
        open_cdrom(str(path), prober)

    assert str(refused.value).startswith(f"cdrom {path}: ")
    assert f"{'root' if user else 'the user of its VM'} may not use it: {FUSE_WORDS}" in str(refused.value)


def test_fuse_by_a_user_who_has_not_mounted_it(mounted: tuple[Path, int], prober: ImageProber) -> None:
    """A process with the user's uid opens an instance's disk, and cannot use mounts of other users."""
    path, _ = mounted
    somebody = Owner(uid=12345, gid=12345)

    with pytest.raises(OperatorError) as refused, acting_as(somebody):
        open_disk(DiskConfig(path=str(path)), prober)

    assert str(refused.value).startswith(f"disk {path}: ")
    assert f"uid 12345 has no permission: uid 12345 may not use it: {FUSE_WORDS}" in str(refused.value)


@pytest.mark.kvm
def test_vmctl_says_so(mounted: tuple[Path, int], tmp_path: Path) -> None:
    """The start reports it, before a device process fails."""
    path, user = mounted
    conf = f'vm "a" {{\n disable\n memory 32M\n boot "{guest("demo")}"\n disk "{path}" format raw\n}}\n'
    with Daemon(tmp_path, conf) as vmd:
        done = vmd.vmctl("start", "a")

    assert done.returncode == 1
    assert f"disk {path}: " in done.stderr
    assert f"{'root' if user else 'the user of its VM'} may not use it: {FUSE_WORDS}" in done.stderr
    assert "vioblk" not in done.stderr


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EACCES, denied.NFS, "Permission denied: root may not use it: it is on NFS, whose server may treat root"),
        (errno.EPERM, denied.NFS, "Operation not permitted: root may not use it: it is on NFS"),
        (errno.EOVERFLOW, denied.FUSE, f"Value too large for defined data type: root may not use it: {FUSE_WORDS}"),
        (errno.EOVERFLOW, 0xEF53, "Value too large for defined data type: its owner is not known in this user namesp"),
        (errno.EACCES, 0xEF53, "Permission denied"),
        (errno.ENOENT, denied.NFS, "No such file or directory"),
    ],
)
def test_what_is_behind_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: int, words: str
) -> None:
    """The cause is the file system of the file, or of the first accessible folder above it."""
    monkeypatch.setattr(linux, "file_system_type", lambda fd: kind)

    assert denied.explained(number, f"{tmp_path}/not/there", "root").startswith(words)


def test_file_system_of_what_cannot_be_known() -> None:
    """Without a path, or with a NUL in it, the folder's file system is used."""
    assert denied.file_system("") == 0
    assert denied.file_system("/a\0b") == denied.file_system("/") != 0
