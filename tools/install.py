"""Installs and removes the program (`make install`, `make uninstall`).

    python3 tools/install.py install|uninstall DESTDIR PLACE=PATH ...

The program is one file, `vmd.zip`, and two short scripts that run it.  It holds the byte code of the interpreter that
runs this module, and the sources, so that it also runs, with a slower start, from another version of Python.

Every file is first written and synced to storage next to the file that it replaces.  When all files are there, they are
renamed, the program by a single rename.  So a full disk, a kill or a power failure leaves the old version intact.  A
running daemon is not touched, and continues with the code that it has loaded.
"""

import contextlib
import importlib.util
import io
import itertools
import marshal
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("vmd", "vmctl")  # each is also the name of its package
PLACES = ("library", "sbin", "bin", "man", "doc", "units", "sysusers", "bash", "zsh", "fish", "ocf", "ansible")
OWN = ("library", "doc", "ocf", "ansible")  # directories that contain only our files
COMPLETIONS = (  # place, the name that the shell looks for, and our file
    ("bash", "vmctl", ROOT / "completions/vmctl.bash"),
    ("zsh", "_vmctl", ROOT / "completions/_vmctl"),
    ("fish", "vmctl.fish", ROOT / "completions/vmctl.fish"),
)
ARCHIVE = "vmd.zip"
STAGED = ".vmd-new"  # appended to the name of a file until it is renamed
PYC_UNCHECKED_HASH = 1  # PEP 552: the interpreter does not check the source
EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed time, so that equal content gives an equal archive

# -S: the interpreter does not read .pth files, which may run any code.
SCRIPT = """\
#!{interpreter} -IS
import gc
import sys
from site import getsitepackages

gc.disable()  # until all is imported: nothing of that is garbage
sys.path += ["{archive}", *getsitepackages()]
from {program}.__main__ import main

sys.exit(main())
"""


class InstallError(Exception):
    """A step failed.  The text says which one, and in which state the installation is."""


class File(NamedTuple):
    """A file to install.  `content` returns its bytes when they are needed."""

    path: str
    content: Callable[[], bytes]
    mode: int = 0o644


def plan(places: dict[str, str]) -> list[File]:
    """Return all files to install.  The program comes first, because the scripts need it."""
    archive = f"{places['library']}/{ARCHIVE}"

    def script(program: str) -> bytes:
        return SCRIPT.format(interpreter=sys.executable, archive=archive, program=program).encode()

    def unit() -> bytes:
        text = Path(ROOT, "etc/vmd.service").read_text()
        return text.replace("@SBINDIR@", places["sbin"]).replace("@BINDIR@", places["bin"]).encode()

    def agent() -> bytes:
        text = Path(ROOT, "fleet/ocf_vm.py").read_text().replace("#!/usr/bin/python3", f"#!{sys.executable}", 1)
        return text.replace('VMCTL = "vmctl"', f'VMCTL = "{places["bin"]}/vmctl"', 1).encode()

    return [
        File(archive, lambda: program_archive(archive)),
        File(f"{places['bin']}/vmctl", lambda: script("vmctl"), 0o755),
        File(f"{places['sbin']}/vmd", lambda: script("vmd"), 0o755),
        *(File(f"{places['man']}/man{page.suffix[1:]}/{page.name}", page.read_bytes) for page in manual_pages()),
        File(f"{places['doc']}/vm.conf.example", Path(ROOT, "vm.conf.example").read_bytes),
        File(f"{places['doc']}/vmctl.schema.json", Path(ROOT, "docs/vmctl.schema.json").read_bytes),
        File(f"{places['doc']}/fleet.md", Path(ROOT, "docs/fleet.md").read_bytes),
        File(f"{places['doc']}/client.md", Path(ROOT, "docs/client.md").read_bytes),
        File(f"{places['units']}/vmd.service", unit),
        File(f"{places['ocf']}/vm", agent, 0o755),
        *(File(f"{places['ansible']}/{name}", source.read_bytes) for name, source in collection()),
        *(File(f"{places[shell]}/{name}", source.read_bytes) for shell, name, source in COMPLETIONS),
        File(f"{places['sysusers']}/vmd.conf", Path(ROOT, "etc/vmd.sysusers").read_bytes),
    ]


def manual_pages() -> list[Path]:
    """Return the manual pages of the checkout."""
    return sorted(Path(ROOT, "man").glob("*.[1-9]"))


def collection() -> list[tuple[str, Path]]:
    """Return the files of the Ansible collection, with their names inside it."""
    top = Path(ROOT, "fleet/ansible")
    return [
        (str(path.relative_to(top)), path)
        for path in sorted(top.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
    ]


def program_archive(path: str) -> bytes:
    """Return the archive of all modules.  It will be installed as `path`."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # uncompressed, so that an import is only a read
        for program in PROGRAMS:
            for module in sorted(Path(ROOT, program).rglob("*.py")):
                name = str(module.relative_to(ROOT))
                source = module.read_bytes()
                archive.writestr(zipfile.ZipInfo(name, EPOCH), source)
                archive.writestr(zipfile.ZipInfo(name + "c", EPOCH), byte_code(source, f"{path}/{name}"))
    return packed.getvalue()


def byte_code(source: bytes, path: str) -> bytes:
    """Return the content of this interpreter's .pyc file for a module that is imported from `path`."""
    code = compile(source, path, "exec", dont_inherit=True, optimize=0)
    header = importlib.util.MAGIC_NUMBER + PYC_UNCHECKED_HASH.to_bytes(4, "little")
    return header + importlib.util.source_hash(source) + marshal.dumps(code)


def install(files: Sequence[File], destdir: str) -> bool:
    """Install all files, or change none.  Return whether any file was new.  Raises InstallError."""
    made: list[str] = []  # directories
    staged: list[str] = []  # targets
    try:
        for file in files:
            target, content = destdir + file.path, file.content()
            if not holds(target, content, file.mode):
                make_directories(os.path.dirname(target), made)
                staged.append(target)
                write(target + STAGED, content, file.mode)
    except BaseException as error:
        take_back(staged, made)
        if isinstance(error, OSError):
            raise InstallError(f"{error.filename}: {error.strerror}; nothing was changed") from error
        raise
    done: list[str] = []
    try:
        for target in staged:
            os.replace(target + STAGED, target)
            done.append(target)
        for directory in sorted({os.path.dirname(target) for target in staged}):
            synchronise(directory)
        if staged:
            remove_others(os.path.dirname(destdir + files[0].path))
    except OSError as error:
        take_back([target for target in staged if target not in done], [] if done else made)
        state = f"replaced already: {' '.join(done)}" if done else "nothing was changed"
        raise InstallError(f"{error.filename}: {error.strerror}; {state}") from error
    return bool(staged)


def holds(path: str, content: bytes, mode: int) -> bool:
    """Return whether a file exists with this content and mode."""
    try:
        with open(path, "rb") as file:
            return file.read() == content and os.fstat(file.fileno()).st_mode & 0o7777 == mode
    except OSError:
        return False


def make_directories(path: str, made: list[str]) -> None:
    """Make a directory and its missing parents, independent of the umask.  Add the new ones to `made`."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        os.mkdir(directory)
        made.append(directory)
        os.chmod(directory, 0o755)


def write(path: str, content: bytes, mode: int) -> None:
    """Write a file and sync it to storage.  Overwrite a file that an earlier attempt has left."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb", buffering=0) as file:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            os.fchmod(fd, mode)
            os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def synchronise(directory: str) -> None:
    """Sync the names in a directory to storage."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def take_back(staged: Sequence[str], made: Sequence[str]) -> None:
    """Remove staged files that were not renamed, and the directories that were made for them."""
    for target in staged:
        with contextlib.suppress(OSError):
            os.unlink(target + STAGED)
    for directory in sorted(made, key=len, reverse=True):
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def remove_others(library: str) -> None:
    """Remove everything in the library but the archive.  Version 0.1.0 had a directory tree there."""
    with os.scandir(library) as entries:
        others = [entry for entry in entries if entry.name != ARCHIVE]
    for entry in others:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def uninstall(files: Sequence[File], places: dict[str, str], destdir: str) -> bool:
    """Remove all files, and directories with only our files.  Return whether any existed.  Raises InstallError."""
    found = any(os.path.lexists(destdir + file.path) for file in files)
    try:
        for path in (destdir + file.path for file in files):
            for name in (path, path + STAGED):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    os.unlink(name)
        for place in OWN:
            if os.path.lexists(destdir + places[place]):
                shutil.rmtree(destdir + places[place])
    except OSError as error:
        raise InstallError(f"{error.filename}: {error.strerror}") from error
    return found


def read_places(words: Sequence[str]) -> dict[str, str]:
    """Parse PLACE=PATH words.  Return a dictionary from place to path.  Raises InstallError."""
    places = dict(word.split("=", 1) for word in words if "=" in word)
    wrong = set(places) ^ set(PLACES)
    if wrong or len(places) != len(words):
        raise InstallError(f"each of {' '.join(PLACES)} is given once, as PLACE=PATH; got: {' '.join(words)}")
    for place, path in places.items():
        if not path.startswith("/") or set(path) & set("\"\\\n"):
            raise InstallError(f"{place}: not a plain absolute path: {path}")
    for place in OWN:
        if os.path.basename(places[place]) != "vmd":
            raise InstallError(f"{place}: its directory is removed, so its name must be vmd: {places[place]}")
    return places


def result(places: dict[str, str], changed: bool) -> Iterator[str]:
    """Yield sentences about the result, and about the next steps of the operator."""
    programs = f"{places['sbin']}/vmd and {places['bin']}/vmctl"
    if not changed:
        yield f"{programs} are up to date"
        return
    yield f"{programs} are installed; a vmd that runs goes on with its version until: vmctl upgrade"
    yield f"{places['doc']}/vm.conf.example shows all of /etc/vm.conf; vmd starts by: systemctl enable --now vmd"


def farewell(places: dict[str, str], removed: bool) -> Iterator[str]:
    """Yield sentences about the result, and about the files that are left."""
    programs = f"{places['sbin']}/vmd and {places['bin']}/vmctl"
    if not removed:
        yield f"{programs} are not installed"
        return
    yield f"{programs} are removed; a vmd that runs goes on until it is stopped"
    yield "/etc/vm.conf, /var/lib/vmd and the user _vmd are left"


def advice() -> Iterator[str]:
    """Yield what the daemon needs and this host lacks."""
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if not shutil.which("nft", path=search):
        yield "nft is not here (package nftables): VMs with interfaces need it"
    if not any(os.path.exists(f"/usr/share/{name}") for name in ("seabios", "qemu/bios-256k.bin", "qemu/bios.bin")):
        yield "SeaBIOS is not here (package seabios): VMs that boot from a disk or a disc need it"


def main(arguments: Sequence[str]) -> int:
    """Run an action for a rule of the Makefile.  Return the exit status."""
    try:
        if len(arguments) < 2 or arguments[0] not in ("install", "uninstall"):
            raise InstallError("usage: install.py install|uninstall DESTDIR PLACE=PATH ...")
        rule, destdir, *words = arguments
        places = read_places(words)
        files = plan(places)
        if rule == "uninstall":
            lines = farewell(places, uninstall(files, places, destdir))
        else:
            lines = itertools.chain(advice(), result(places, install(files, destdir)))
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    if not destdir:
        for line in lines:
            print(f"install: {line}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
