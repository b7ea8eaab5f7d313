"""The Debian package of this checkout, and a small Debian system to install it in."""

import hashlib
import shutil
import subprocess
import zipfile
from functools import cache
from pathlib import Path

from tools.debian_image import MIRROR, SUITE, made_once
from tools.debian_kernel import cache_dir

CHECKOUT = Path(__file__).parents[2]
NEWER, BROKEN = "99.0", "98.0"
INSTALLED = ("iproute2", "procps", "systemd", "systemd-sysv")
DOWNLOADED = ("nftables", "python3", "python3-msgpack", "python3-pyroute2", "seabios")
OF_A_MACHINE = ("kmod", "udev")
CANNOT_READ = b"""

def read(memory: StateMemory) -> Truth:
    raise VmdError("this version cannot read it")
"""
LIMIT_S = 1800  # a watchdog: downloads may take minutes
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


class DebianError(Exception):
    """A program that makes a package or a system has failed.  The text is its output."""


def run(*command: str | Path, cwd: Path = CHECKOUT) -> str:
    """Run a program to its end; return its output.  Raises DebianError."""
    done = subprocess.run(
        ["timeout", "--kill-after=5", str(LIMIT_S), *command], cwd=cwd, env=ENVIRONMENT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        raise DebianError(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}")
    return done.stdout


@cache
def built_deb() -> Path:
    """Return the package of this checkout, built once for each state of it.  Raises DebianError."""
    found = CHECKOUT / "build" / "deb-cache" / _digest()
    with made_once(found) as fresh:
        if fresh:
            run("unshare", "--net", "make", "-s", "deb", f"DEB={fresh}")
    (deb,) = found.glob("*.deb")
    return deb


def _digest() -> str:
    """Return a digest of everything that goes into the package."""
    makefile = Path(CHECKOUT, "Makefile").read_text()
    sources = next(line for line in makefile.splitlines() if line.startswith("SOURCES = ")).split()[2:]
    names = [Path(CHECKOUT, name) for name in sources]
    paths = [path for name in names for path in ([name] if name.is_file() else sorted(name.rglob("*")))]
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(CHECKOUT)}\0{path.stat().st_mode}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def newer_deb(folder: Path, *, depends: str = "", broken: bool = False) -> Path:
    """Make our package as version NEWER in a folder, with `depends` as one more dependency; return its path.

    With `broken` the version is BROKEN, and its vmd cannot take over the VMs of ours.
    """
    version = BROKEN if broken else NEWER
    tree = folder / "newer"
    run("dpkg-deb", "-R", built_deb(), tree)
    control = tree / "DEBIAN/control"
    lines = control.read_text().splitlines()
    lines = [f"Version: {version}" if line.startswith("Version:") else line for line in lines]
    if depends:
        lines = [f"{line}, {depends}" if line.startswith("Depends:") else line for line in lines]
    control.write_text("\n".join(lines) + "\n")
    archive = tree / "usr/lib/vmd/vmd.zip"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(folder / "vmd.zip", "w") as new:
        for info in old.infolist():
            if info.filename == "vmd/version.py":
                new.writestr(info, f'VERSION = "{version}"\n')
            elif broken and info.filename == "vmd/parent/truth.py":
                new.writestr(info, old.read(info) + CANNOT_READ)
            elif broken and info.filename == "vmd/parent/truth.pyc":
                continue
            elif info.filename != "vmd/version.pyc":
                new.writestr(info, old.read(info))
    shutil.copyfile(folder / "vmd.zip", archive)
    deb = folder / f"vmd_{version}.deb"
    run("dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, deb)
    shutil.rmtree(tree)
    return deb


@cache
def debian_root() -> Path:
    """Return the root of a small Debian system for containers.  Use it only below overlays: it must not be changed.

    It is made once (debootstrap, from the network) and kept with the other downloads of tests.  The dependencies of our
    package are in its package cache, but not installed.  Raises DebianError.
    """
    name = hashlib.sha256(repr((SUITE, INSTALLED, DOWNLOADED)).encode()).hexdigest()[:12]
    root = cache_dir() / f"debian-{SUITE}-{name}"
    with made_once(root) as fresh:
        if fresh:
            run("debootstrap", "--variant=minbase", f"--include={','.join(INSTALLED)}", SUITE, fresh, MIRROR)
            run("chroot", fresh, "apt-get", "-q", "-y", "--download-only", "install", *DOWNLOADED)
    return root


@cache
def debian_host() -> Path:
    """Return a Debian system with all dependencies of our package installed.  It must not be changed either.

    It also has udev and can load modules, so a virtual machine can boot it.  Raises DebianError.
    """
    name = hashlib.sha256(repr((SUITE, INSTALLED, DOWNLOADED, OF_A_MACHINE)).encode()).hexdigest()[:12]
    root = cache_dir() / f"debian-host-{SUITE}-{name}"
    with made_once(root) as fresh:
        if fresh:
            run("cp", "-a", f"{debian_root()}/.", fresh)
            install = ("apt-get", "-q", "-y", "--no-install-recommends", "install")
            run("chroot", fresh, *install, *DOWNLOADED, *OF_A_MACHINE)
            run("chroot", fresh, "apt-get", "clean")
    return root
