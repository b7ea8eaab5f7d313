"""cpio can unpack the archive, and it has the files for the guest's init."""

import gzip
import lzma
import os
import subprocess
from pathlib import Path

import pytest

from tools import debian_kernel, initramfs
from tools.debian_kernel import Kernel


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """A kernel with two modules.  One needs the other, and one is compressed."""
    folder = tmp_path / "lib/modules/1.2.3"
    (folder / "kernel").mkdir(parents=True)
    (folder / "kernel/low-er.ko.xz").write_bytes(lzma.compress(b"the lower module"))
    (folder / "kernel/upper.ko").write_bytes(b"the upper module")
    # depmod finds no symbols and thus no dependency in such modules, so modules.softdep has it.
    subprocess.run(["/sbin/depmod", "-b", str(tmp_path), "1.2.3"], check=True, capture_output=True)
    (folder / "modules.softdep").write_text("softdep upper pre: low-er\n")
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"")
    return Kernel("1.2.3", image, tmp_path)


def unpack(archive: bytes, folder: Path) -> Path:
    """Unpack an archive with busybox's cpio, and return the folder."""
    folder.mkdir()
    plain = gzip.decompress(archive)
    subprocess.run(["busybox", "cpio", "-idm"], input=plain, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.root
def test_archive_unpacks(kernel: Kernel, tmp_path: Path) -> None:
    """Modules are uncompressed and in loading order, init is executable, and the console is the kernel's."""
    init = tmp_path / "init"
    init.write_text("#!/bin/busybox sh\n")

    tree = unpack(initramfs.build(init, kernel, ["upper", "unheard-of"], [kernel.image]), tmp_path / "tree")

    assert (tree / "modules/order").read_text() == "low-er.ko\nupper.ko\n"
    assert (tree / "modules/low-er.ko").read_bytes() == b"the lower module"
    assert (tree / "modules/upper.ko").read_bytes() == b"the upper module"
    assert (tree / "init").read_text() == "#!/bin/busybox sh\n"
    assert os.access(tree / "init", os.X_OK)
    assert (tree / "vmlinuz").exists()
    assert (tree / "dev/console").stat().st_rdev == os.makedev(5, 1)


def test_cached_archive_is_made_again_when_its_init_changes(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it is not made again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    init = tmp_path / "init"
    init.write_text("old")
    made = initramfs.cached("x", init, ["upper"], kernel)
    first = made.read_bytes()
    os.utime(made, (made.stat().st_mtime + 10,) * 2)
    stamp = made.stat().st_mtime

    again = initramfs.cached("x", init, ["upper"], kernel).stat().st_mtime
    init.write_text("new")
    os.utime(init, (stamp + 10,) * 2)
    remade = initramfs.cached("x", init, ["upper"], kernel).read_bytes()

    assert again == stamp
    assert remade != first


def test_kernel_in_the_cache_needs_no_network(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that was fetched once is used without a download."""
    kernel.root.joinpath("lib").rename(tmp_path / "moved")
    home = tmp_path / "linux-cloud-amd64"
    home.mkdir()
    (tmp_path / "moved").rename(home / "lib")
    monkeypatch.setenv("PATH", "/nowhere")

    found = debian_kernel.fetch("cloud-amd64", tmp_path)

    assert found == Kernel("1.2.3", home / "boot/vmlinuz-1.2.3", home)
