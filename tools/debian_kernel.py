"""Fetches Debian's stock kernels, and unpacks them into a cache outside of the checkout.  Nothing is installed.

Guests of the tests and of `make run`, and the emulated machine of `tests/l1`, boot these kernels.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class KernelError(Exception):
    """No kernel was found or fetched.  The text says what was tried."""


class Kernel(NamedTuple):
    """A kernel and its modules."""

    version: str
    image: Path
    root: Path  # contains lib/modules/<version>, with the indices of depmod(8)


def cache_dir() -> Path:
    """Return the folder for files that are fetched or built once per host."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = base / "vmd-tests"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def fetch(flavour: str, cache: Path) -> Kernel:
    """Return the newest kernel of a flavour, `amd64` or `cloud-amd64`, from the cache or by apt-get.

    A kernel in the cache is not updated, so only the first run needs the network.
    Raises KernelError.
    """
    home = cache / f"linux-{flavour}"
    if not home.exists():
        fetch_package(_package_of(flavour), home, _index_modules)
    version = next(Path(home, "lib/modules").iterdir()).name
    return Kernel(version, home / "boot" / f"vmlinuz-{version}", home)


def fetch_package(package: str, home: Path, finish: Callable[[Path], None] = lambda tree: None) -> None:
    """Unpack a package into `home` in the cache.  `finish` completes the tree, at its temporary place.

    Raises KernelError.
    """
    with tempfile.TemporaryDirectory(dir=home.parent, prefix="unpack-") as scratch:
        print(f"fetching {package}", file=sys.stderr, flush=True)
        # As root, apt-get switches to a user without access to a cache below /root.
        _run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package], cwd=scratch)
        archive = next(Path(scratch).glob("*.deb"))
        tree = Path(scratch, "tree")
        _run(["dpkg", "-x", str(archive), str(tree)])
        finish(tree)
        try:
            # The rename comes last, so that an interrupted fetch leaves no incomplete package.
            tree.rename(home)
        except OSError:
            # Another run was faster, and has fetched the same package.
            if not home.exists():
                raise


def _index_modules(tree: Path) -> None:
    """Make the indices of depmod(8)."""
    version = next(Path(tree, "lib/modules").iterdir()).name
    _run(["/sbin/depmod", "-b", str(tree), version])


def installed() -> Kernel | None:
    """Return the newest kernel in /boot that is readable and whose modules are installed."""
    candidates = [
        Kernel(image.name.removeprefix("vmlinuz-"), image, Path("/"))
        for image in Path("/boot").glob("vmlinuz-*")
        if os.access(image, os.R_OK)
    ]
    usable = [kernel for kernel in candidates if Path("/lib/modules", kernel.version, "modules.dep").exists()]
    return max(usable, key=lambda kernel: kernel.image.stat().st_mtime, default=None)


def _package_of(flavour: str) -> str:
    """Return the kernel package that the metapackage of the flavour depends on."""
    metapackage = f"linux-image-{flavour}"
    for line in _run(["apt-cache", "depends", metapackage]).splitlines():
        kind, _, package = line.strip().partition(": ")
        if kind == "Depends" and package.startswith("linux-image-"):
            return package
    raise KernelError(f"apt knows no package {metapackage}; has apt-get update been run?")


def _run(command: list[str], cwd: str | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except OSError as error:
        raise KernelError(f"{command[0]}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise KernelError(f"{' '.join(command)}: {error.stderr.strip()}") from error
    return done.stdout
