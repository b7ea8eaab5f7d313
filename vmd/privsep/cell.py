"""The places that root prepares for its children: the cell of the unprivileged ones, and priv's.

The cell is a root file system that holds the interpreter, its shared libraries and our own code, all read-only,
and nothing of the host.  It is built once, in a mount namespace of its own; each child enters that and gets IPC,
network and host name namespaces besides.

    /usr/bin/python3.11, /usr/lib/python3.11 (or wherever they are)  bind mounts, without site-packages
    /lib/x86_64-linux-gnu/libc.so.6, /lib64/ld-linux-x86-64.so.2, …  one bind mount each
    /etc/ld.so.cache  /dev/null                                      bind mounts
    /vmd                                                             a copy of vmd and msgpack

priv sees the host, since it runs nft, but for /run: of that it has only a directory of its own, for what has to be put
back.  So it reaches no named socket there, neither the daemon's own nor that of another service.

Our code is copied, not mounted: so it can come from an archive, or from a checkout of mode 0700 with files of mode
0600, which `_vmd` could not read; and a daemon whose files are replaced under it by an upgrade starts all its later
processes from the same code as itself.
"""

import contextlib
import ctypes
import fcntl
import importlib
import importlib.machinery
import importlib.util
import marshal
import os
import socket
import stat
import struct
import sys
import zipfile
import zipimport

from vmd.config.model import DEFAULT_FIRST_ID, IDS
from vmd.errors import HostError, VmdError
from vmd.privsep import linux
from vmd.privsep.ids import Ids, limit_tasks
from vmd.privsep.spawn import FD_TARGETS, INTERPRETER
from vmd.tasks import fork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from typing import NoReturn

CODE = "/vmd"  # where our packages are, in the cell
PACKAGES = ("vmd", "msgpack")
# Extension modules that children import: their shared libraries are found by having them loaded here.
NATIVE = ("_ctypes", "_hashlib", "_socket", "array", "fcntl", "mmap", "resource", "select", "termios", "zlib")
SCAFFOLD = "/run"  # the root is put together over this directory, which every Linux system has
BUILT = "built"  # what the builder reports; otherwise an errno and what was tried
OLD_ROOT = "/.old"
EMPTY = "/.empty"
NO_PACKAGES = ("site-packages", "dist-packages")  # not part of the standard library, though beneath it
RTLD_DI_LINKMAP = 2
PYC_UNCHECKED_HASH = 1  # PEP 552: the source is not looked at


class link_map(ctypes.Structure):
    """One loaded shared object (<link.h>)."""

    _fields_ = [
        ("l_addr", ctypes.c_void_p),
        ("l_name", ctypes.c_char_p),
        ("l_ld", ctypes.c_void_p),
        ("l_next", ctypes.c_void_p),
    ]


class Cell:
    """A built cell, and the user that lives in it; `close` it when no more children will be started."""

    import_path: tuple[str, ...] = (CODE,)
    own_pids = False
    vital = False

    def __init__(self, uid: int, gid: int, namespace_fd: int, root_fd: int, ids: Ids | None = None) -> None:
        """Each process has an id of `ids`; without them all are that user."""
        self.ids = ids
        self.uid = uid
        self.gid = gid
        self.namespace_fd = namespace_fd
        self.root_fd = root_fd

    @classmethod
    def build(cls, uid: int, gid: int, packages: tuple[str, ...] = PACKAGES) -> "Cell":
        """Read our code, look up the libraries and build the root.  Raises HostError or VmdError."""
        code = [file for package in packages for file in package_files(package)]
        libraries = loaded_libraries([package_directory(package) for package in packages])
        mounts = {**interpreter_mounts(libraries), "/etc/ld.so.cache": "/etc/ld.so.cache", "/dev/null": "/dev/null"}
        namespace, root = (out_of_the_way(fd) for fd in build_in_namespace(mounts, code))
        return cls(uid, gid, namespace, root)

    def prepare(self) -> None:
        """Choose the id of the next process."""
        if self.ids is not None:
            self.uid = self.gid = self.ids.take()

    def enter(self) -> None:
        """Go in and become the user; there is no way back."""
        self.leave_host()
        linux.limit_bounding_set(0)
        linux.become_user(self.uid, self.gid, 0)

    def leave_host(self) -> None:
        """Go in."""
        if self.ids is not None:
            limit_tasks()
        linux.setns(self.namespace_fd, linux.CLONE_NEWNS)
        # Where vmd itself runs in a chroot, the namespace's own root is not the one that pivot_root replaced.
        os.fchdir(self.root_fd)
        os.chroot(".")
        linux.unshare(linux.CLONE_NEWIPC | linux.CLONE_NEWNET | linux.CLONE_NEWUTS)
        os.chdir("/")

    def close(self) -> None:
        """Let go of the root; processes inside keep it alive."""
        os.close(self.namespace_fd)
        os.close(self.root_fd)


class VmmCell(Cell):
    """The cell as vmm enters it: with VM processes and devices in a pid namespace, where nothing survives vmm.

    It outlives us: with the end of its channel it has its guests shut down.

    Where there are ids, also in a user namespace that has only those: vmm may give each VM process one, and signal it.
    """

    CAPABILITIES = 1 << linux.CAP_SETUID | 1 << linux.CAP_SETGID | 1 << linux.CAP_KILL  # in the user namespace
    vital = True

    def __init__(self, cell: Cell, users_fd: int | None, *, own_pids: bool) -> None:
        """`cell` stays the caller's to close; `users_fd` is ours from now on."""
        super().__init__(cell.uid, cell.gid, cell.namespace_fd, cell.root_fd, cell.ids)
        self.own_pids = own_pids
        self.users_fd = None if users_fd is None else out_of_the_way(users_fd)

    def enter(self) -> None:
        """Go in, and become a user who has capabilities only over those ids."""
        if self.users_fd is None:
            super().enter()
            return
        self.leave_host()
        linux.setns(self.users_fd, linux.CLONE_NEWUSER)
        # What is inheritable stays when no exec can bring it any more.
        linux.set_capabilities(linux.permitted_capabilities(), inheritable=self.CAPABILITIES)
        linux.limit_bounding_set(0)
        linux.become_user(self.uid, self.gid, self.CAPABILITIES)


class LockholderCell(Cell):
    """The cell as lockholder enters it: a stranger there, too, but one whom the kernel shows other users' locks."""

    CAPABILITIES = 1 << linux.CAP_SYS_PTRACE

    def __init__(self, cell: Cell) -> None:
        """`cell` stays the caller's to close."""
        super().__init__(cell.uid, cell.gid, cell.namespace_fd, cell.root_fd, cell.ids)

    def enter(self) -> None:
        """Go in, and become a user who has nothing but that capability."""
        self.leave_host()
        linux.limit_bounding_set(self.CAPABILITIES)
        linux.become_user(self.uid, self.gid, self.CAPABILITIES)


def out_of_the_way(fd: int) -> int:
    """Return a descriptor under a number that a child's own descriptors never get: it enters when it has those."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FD_TARGETS)
    except OSError as error:
        raise HostError("build the cell: keep its descriptors", error) from error
    finally:
        os.close(fd)


PRIV_DIRECTORY = "/run/vmd/priv"  # on the host, and as priv sees it


class Network:
    """Where priv runs: an ordinary user of the host, with the capabilities for network interfaces and little else."""

    own_pids = False
    vital = True
    # The last two go when priv confines itself.  Until then it must read a checkout that root does not own, and
    # be able to shrink its bounding set.
    CAPABILITIES = (
        1 << linux.CAP_NET_ADMIN | 1 << linux.CAP_NET_RAW | 1 << linux.CAP_DAC_READ_SEARCH | 1 << linux.CAP_SETPCAP
    )

    def __init__(self, uid: int = DEFAULT_FIRST_ID + IDS) -> None:
        """`uid` is priv's user.  Not `_vmd`, which VM processes may be: one that was taken over could signal priv."""
        self.import_path = import_path(("vmd", "msgpack", "pyroute2"))
        self.uid = uid

    def prepare(self) -> None:
        """Nothing."""

    def enter(self) -> None:
        """Hide /run, become the user, and give up all other capabilities."""
        os.chdir("/")
        hide_run(self.uid)
        linux.limit_bounding_set(self.CAPABILITIES)
        linux.become_user(self.uid, self.uid, linux.permitted_capabilities() & self.CAPABILITIES)


def hide_run(uid: int) -> None:
    """Cover /run with an empty directory that has `PRIV_DIRECTORY` in it, in a mount namespace of our own."""
    with contextlib.suppress(OSError):  # priv will say that it cannot write there
        make_priv_directory(uid)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)  # what the host unmounts is not kept busy here
    try:
        own = os.open(PRIV_DIRECTORY, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        own = -1
    flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("vmd", "/run", "tmpfs", flags, "mode=0755,size=64k")
    if own >= 0:
        os.umask(0o022)
        os.makedirs(PRIV_DIRECTORY)
        os.umask(0o077)
        linux.mount(f"/proc/self/fd/{own}", PRIV_DIRECTORY, None, linux.MS_BIND)
        os.close(own)
    linux.mount(None, "/run", None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | flags)


def make_priv_directory(uid: int) -> None:
    """Make the directory of priv, which is that user now, with all that it has left there.

    What an earlier version has left beside it is moved there.  Raises OSError.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(PRIV_DIRECTORY, 0o700)
    above = os.path.dirname(PRIV_DIRECTORY)
    for name in os.listdir(above):
        if name.startswith("network-"):
            os.rename(f"{above}/{name}", f"{PRIV_DIRECTORY}/{name}")
    # Nobody else can put a file there.  A link that a taken-over priv has made is not followed.
    os.chown(PRIV_DIRECTORY, uid, uid)
    for name in os.listdir(PRIV_DIRECTORY):
        give_file(f"{PRIV_DIRECTORY}/{name}", uid)


def give_file(path: str, uid: int) -> None:
    """Give a file to a user, if it is reached by this name alone.  Raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            os.chown(f"/proc/self/fd/{fd}", uid, uid)
    finally:
        os.close(fd)


def import_path(packages: tuple[str, ...]) -> tuple[str, ...]:
    """Return the directories or archives that these packages are imported from, each once."""
    return tuple(dict.fromkeys(os.path.dirname(package_directory(package)) for package in packages))


def package_spec(package: str) -> "tuple[ModuleSpec, str]":
    """Return what is known of a package without importing it, and its directory.  Raises VmdError."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise VmdError(f"python package {package} is not installed")
    return spec, os.path.abspath(spec.submodule_search_locations[0])


def package_directory(package: str) -> str:
    """Return the directory of a package, which may be inside an archive.  Raises VmdError."""
    return package_spec(package)[1]


def package_files(package: str) -> list[tuple[str, bytes]]:
    """Return (path in the cell, content) of a package's modules, byte code included.  Raises HostError."""
    spec, top = package_spec(package)
    archive = getattr(spec.loader, "archive", None)  # zipimport's loaders have it
    try:
        return directory_files(package, top) if archive is None else archived_files(package, archive)
    except OSError as error:
        raise HostError(f"read {error.filename or top}", error) from error
    except (zipimport.ZipImportError, zipfile.BadZipFile) as error:
        raise VmdError(f"read {top}: {error}") from error


def directory_files(package: str, top: str) -> list[tuple[str, bytes]]:
    """Return the files of a package that is a directory.  Raises OSError."""
    files = []
    for directory, subdirectories, names in os.walk(top):
        subdirectories[:] = sorted(name for name in subdirectories if name != "__pycache__")
        inside = os.path.join(CODE, package, os.path.relpath(directory, top))
        for name in sorted(names):
            path = os.path.join(directory, name)
            target = os.path.normpath(os.path.join(inside, name))
            if name.endswith(".py"):
                source = read(path)
                files += module_files(target, source, byte_code(path, len(source)))
            elif is_extension(name):
                files.append((target, read(path)))
    return files


def archived_files(package: str, path: str) -> list[tuple[str, bytes]]:
    """Return the files of a package in an archive, which may hold byte code of this interpreter, or of another.

    Raises OSError, zipimport.ZipImportError or zipfile.BadZipFile.
    """
    files = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(f"{package}/") and name.endswith(".py"):
                directory, _, module = name.rpartition("/")
                code = zipimport.zipimporter(f"{path}/{directory}").get_code(module.removesuffix(".py"))
                files += module_files(f"{CODE}/{name}", archive.read(name), marshal.dumps(code))
    return files


def byte_code(path: str, length: int) -> bytes:
    """Return the byte code of a source file of this length, marshalled.  Raises OSError.

    It is taken from the host's __pycache__ as it is, where that is of this file by time and length (PEP 552): to have
    the interpreter load each module, as it would do with other contents of __pycache__, takes four times as long.
    """
    written_s = int(os.stat(path).st_mtime)
    header = importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, written_s & 0xFFFFFFFF, length & 0xFFFFFFFF)
    with contextlib.suppress(FileNotFoundError):
        cached = read(importlib.util.cache_from_source(path))
        if cached.startswith(header):
            return cached[len(header) :]
    return marshal.dumps(importlib.machinery.SourceFileLoader("", path).get_code(""))


def module_files(target: str, source: bytes, code: bytes) -> list[tuple[str, bytes]]:
    """Return a module's source, and its byte code so that no process has to compile it again."""
    header = importlib.util.MAGIC_NUMBER + PYC_UNCHECKED_HASH.to_bytes(4, "little")
    pyc = header + importlib.util.source_hash(source) + code
    return [(target, source), (importlib.util.cache_from_source(target), pyc)]


def read(path: str) -> bytes:
    """Return a file's content."""
    with open(path, "rb") as file:
        return file.read()


def interpreter_mounts(libraries: list[str]) -> dict[str, str]:
    """Return path in the cell -> path on the host of interpreter, standard library and shared libraries."""
    standard_library = os.path.dirname(os.path.abspath(os.__file__))
    mounts = {INTERPRETER: INTERPRETER}
    directories = [standard_library]
    directories += [entry for entry in sys.path if os.path.basename(entry) == "lib-dynload" and os.path.isdir(entry)]
    for directory in directories:
        # The interpreter finds it from its own real path; we may have come through a symbolic link.
        for name in (directory, os.path.realpath(directory)):
            if not beneath(name, mounts):
                mounts[name] = os.path.realpath(directory)
    for library in libraries:
        if not beneath(library, mounts):
            mounts[library] = library
    return mounts


def beneath(path: str, mounts: dict[str, str]) -> bool:
    """Return whether the path is there already, with one of the mounts."""
    return any(path == mount or path.startswith(mount + "/") for mount in mounts)


def loaded_libraries(packages: list[str]) -> list[str]:
    """Return the shared libraries that extension modules of ours and of the standard library need.

    They are loaded here, to be asked for under the names by which the dynamic loader found them.  Those are the
    names that it will look for in the cell, unlike the resolved ones in /proc/self/maps.
    """
    for module in NATIVE:
        with contextlib.suppress(ImportError):  # interpreters differ in what they are built with
            importlib.import_module(module)
    with contextlib.suppress(OSError):
        linux.load_library("libgcc_s.so.1")  # see `confine.prime`
    extensions = {getattr(module, "__file__", None) for module in sys.modules.values()}
    for package in packages:
        for directory, _, names in os.walk(package):
            for name in names:
                if is_extension(name):
                    path = os.path.join(directory, name)
                    with contextlib.suppress(OSError):  # what cannot be loaded here will not be missed there
                        linux.load_library(path)
                    extensions.add(path)
    return [path for path in link_map_names() if path not in extensions]


def is_extension(name: str) -> bool:
    """Return whether a file is an extension module for this version of the interpreter, not for another."""
    _, dot, suffix = name.partition(".")
    return dot + suffix in importlib.machinery.EXTENSION_SUFFIXES


def link_map_names() -> list[str]:
    """Return the path of every shared object in this process.  Raises VmdError."""
    address = ctypes.c_void_p()
    program = ctypes.c_void_p(linux.libc._handle)
    if linux.libc.dlinfo(program, RTLD_DI_LINKMAP, ctypes.byref(address)):
        raise VmdError("the dynamic loader does not tell which libraries are loaded")
    names = []
    following = address.value
    while following:
        entry = link_map.from_address(following)
        name = os.fsdecode(entry.l_name or b"")
        if name.startswith("/"):  # not the program itself, nor the vDSO
            names.append(name)
        following = entry.l_next
    return names


def build_in_namespace(mounts: dict[str, str], code: list[tuple[str, bytes]]) -> tuple[int, int]:
    """Build the root in a child with a mount namespace of its own; returns descriptors of namespace and root."""
    ours, theirs = socket.socketpair()
    pid = fork("build the cell")
    if pid == 0:
        run_builder(mounts, code, ours, theirs)
    theirs.close()
    try:
        report = ours.recv(4096).decode() or " its builder has died"
        if report != BUILT:
            number, _, what = report.partition(" ")
            raise HostError(f"build the cell: {what}", int(number)) if number else VmdError(f"build the cell: {what}")
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), root
        except OSError:
            os.close(root)
            raise
    except OSError as error:
        raise HostError("build the cell: keep its mount namespace", error) from error
    finally:
        ours.close()  # which lets the child go
        os.waitpid(pid, 0)


def run_builder(
    mounts: dict[str, str], code: list[tuple[str, bytes]], ours: socket.socket, theirs: socket.socket
) -> "NoReturn":
    """Build, report, and stay until the parent holds the namespace."""
    try:
        ours.close()
        build_root(mounts, code)
        report = BUILT
    except HostError as error:
        report = f"{error.number} {error.tried}"
    except OSError as error:
        report = f"{error.errno} {error.filename}"
    except BaseException as error:
        report = f" {error!r}"
    try:
        theirs.send(report.encode("utf-8", "backslashreplace"))
        theirs.recv(1)
    finally:
        os._exit(0)


def build_root(mounts: dict[str, str], code: list[tuple[str, bytes]]) -> None:
    """Replace the root of a new mount namespace by one that holds only what is given."""
    os.umask(0o022)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)  # the host must not see what follows
    flags = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("vmd", SCAFFOLD, "tmpfs", flags, "mode=0755,size=64m")
    for name in (OLD_ROOT, EMPTY):
        os.mkdir(SCAFFOLD + name, 0o755)
    for target, source in mounts.items():
        if os.path.exists(source):
            bind(source, SCAFFOLD + target)
    for target, source in mounts.items():
        for name in NO_PACKAGES:
            if os.path.isdir(os.path.join(source, name)):
                bind(SCAFFOLD + EMPTY, f"{SCAFFOLD}{target}/{name}")
    for target, content in code:
        os.makedirs(os.path.dirname(SCAFFOLD + target), 0o755, exist_ok=True)
        with open(SCAFFOLD + target, "xb") as file:
            file.write(content)
    linux.pivot_root(SCAFFOLD, SCAFFOLD + OLD_ROOT)
    os.chdir("/")
    linux.umount_lazily(OLD_ROOT)
    os.rmdir(OLD_ROOT)
    linux.mount(None, "/", None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | flags)


def bind(source: str, target: str) -> None:
    """Make a file or directory appear at another place, read-only.  A device keeps working, and nothing else."""
    if os.path.isdir(source):
        os.makedirs(target, 0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    linux.mount(source, target, None, linux.MS_BIND)
    flags = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID
    linux.mount(None, target, None, flags | (linux.MS_NOEXEC if source == "/dev/null" else linux.MS_NODEV))
