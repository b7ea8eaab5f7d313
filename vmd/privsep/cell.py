"""The places that root prepares for its children: the cell for unprivileged processes, and the place for priv.

The cell is a root file system that has the interpreter, its shared libraries and our own code, all read-only, and
nothing else of the host.  It is built once, in a mount namespace of its own.  Each child enters that namespace, and
gets new IPC, network and host name namespaces.

    /usr/bin/python3.11, /usr/lib/python3.11 (or wherever they are)  bind mounts, without site-packages
    /lib/x86_64-linux-gnu/libc.so.6, /lib64/ld-linux-x86-64.so.2, …  one bind mount each
    /etc/ld.so.cache  /dev/null                                      bind mounts
    /vmd                                                             a copy of vmd and msgpack

priv sees the host's file system, because it runs nft.  But /run is hidden from it, except for a directory of its own,
where it records host settings that have to be restored.  So it reaches no named socket in /run: not the daemon's own,
and not that of another service.

Our code is copied into the cell, not mounted, for two reasons.  It may come from an archive, or from a checkout of mode
0700 with files of mode 0600, which `_vmd` could not read.  And if an upgrade replaces the files of a running daemon,
all its later processes still start from the daemon's own version.
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
from vmd.privsep.confine import PRIV_DIRECTORY
from vmd.privsep.ids import Ids, limit_tasks
from vmd.privsep.spawn import FD_TARGETS, INTERPRETER
from vmd.tasks import fork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from typing import NoReturn

CODE = "/vmd"  # where our packages are, in the cell
PACKAGES = ("vmd", "msgpack")
# Extension modules that children import.  They are loaded here to find out which shared libraries they need.
NATIVE = ("_ctypes", "_hashlib", "_socket", "array", "fcntl", "mmap", "resource", "select", "termios", "zlib")
SCAFFOLD = "/run"  # the root is built on this directory, which every Linux system has
BUILT = "built"  # the builder's report of success; otherwise it reports an errno and what was tried
OLD_ROOT = "/.old"
EMPTY = "/.empty"
NO_PACKAGES = ("site-packages", "dist-packages")  # directories beneath the standard library that do not belong to it
RTLD_DI_LINKMAP = 2
PYC_UNCHECKED_HASH = 1  # PEP 552: byte code that is used without a check against its source


class link_map(ctypes.Structure):
    """One loaded shared object (<link.h>)."""

    _fields_ = [
        ("l_addr", ctypes.c_void_p),
        ("l_name", ctypes.c_char_p),
        ("l_ld", ctypes.c_void_p),
        ("l_next", ctypes.c_void_p),
    ]


class Cell:
    """A built cell, and the user of the processes in it.  Call `close` when no more children will be started."""

    import_path: tuple[str, ...] = (CODE,)
    own_pids = False
    vital = False

    def __init__(self, uid: int, gid: int, namespace_fd: int, root_fd: int, ids: Ids | None = None) -> None:
        """Each process gets its own id from `ids`.  Without `ids` all processes have `uid` and `gid`."""
        self.ids = ids
        self.uid = uid
        self.gid = gid
        self.namespace_fd = namespace_fd
        self.root_fd = root_fd

    @classmethod
    def build(cls, uid: int, gid: int, packages: tuple[str, ...] = PACKAGES) -> "Cell":
        """Read our code, find the libraries and build the root.  Raises HostError or VmdError."""
        code = [file for package in packages for file in package_files(package)]
        libraries = loaded_libraries([package_directory(package) for package in packages])
        mounts = {**interpreter_mounts(libraries), "/etc/ld.so.cache": "/etc/ld.so.cache", "/dev/null": "/dev/null"}
        namespace, root = (above_targets(fd) for fd in build_in_namespace(mounts, code))
        return cls(uid, gid, namespace, root)

    def prepare(self) -> None:
        """Choose the id of the next process."""
        if self.ids is not None:
            self.uid = self.gid = self.ids.take()

    def enter(self) -> None:
        """Enter the cell and become the user, irrevocably."""
        self.leave_host()
        linux.limit_bounding_set(0)
        linux.become_user(self.uid, self.gid, 0)

    def leave_host(self) -> None:
        """Enter the cell and new namespaces."""
        if self.ids is not None:
            limit_tasks()
        linux.setns(self.namespace_fd, linux.CLONE_NEWNS)
        # If vmd itself runs in a chroot, the root after setns is not the one that pivot_root has put in place.
        os.fchdir(self.root_fd)
        os.chroot(".")
        linux.unshare(linux.CLONE_NEWIPC | linux.CLONE_NEWNET | linux.CLONE_NEWUTS)
        os.chdir("/")

    def close(self) -> None:
        """Close the descriptors of the cell.  Processes inside keep it alive."""
        os.close(self.namespace_fd)
        os.close(self.root_fd)


class VmmCell(Cell):
    """The cell as vmm enters it: also with a pid namespace, in which no VM process or device survives vmm.

    vmm outlives the parent.  When its channel ends, it asks its guests to shut down.

    If there are ids, vmm also enters a user namespace that has only these ids.  There it may give each VM's process an
    id, and may send it signals.
    """

    CAPABILITIES = 1 << linux.CAP_SETUID | 1 << linux.CAP_SETGID | 1 << linux.CAP_KILL  # in the user namespace
    vital = True

    def __init__(self, cell: Cell, users_fd: int | None, *, own_pids: bool) -> None:
        """The caller still has to close `cell`.  This object owns `users_fd` from now on."""
        super().__init__(cell.uid, cell.gid, cell.namespace_fd, cell.root_fd, cell.ids)
        self.own_pids = own_pids
        self.users_fd = None if users_fd is None else above_targets(users_fd)

    def enter(self) -> None:
        """Enter the cell, and become a user with capabilities over the ids of VMs only."""
        if self.users_fd is None:
            super().enter()
            return
        self.leave_host()
        linux.setns(self.users_fd, linux.CLONE_NEWUSER)
        # Inheritable capabilities stay available when the bounding set is empty.
        linux.set_capabilities(linux.permitted_capabilities(), inheritable=self.CAPABILITIES)
        linux.limit_bounding_set(0)
        linux.become_user(self.uid, self.gid, self.CAPABILITIES)


class LockholderCell(Cell):
    """The cell as lockholder enters it: with a capability for which the kernel shows it other users' locks."""

    CAPABILITIES = 1 << linux.CAP_SYS_PTRACE

    def __init__(self, cell: Cell) -> None:
        """The caller still has to close `cell`."""
        super().__init__(cell.uid, cell.gid, cell.namespace_fd, cell.root_fd, cell.ids)

    def enter(self) -> None:
        """Enter the cell, and become a user with this capability only."""
        self.leave_host()
        linux.limit_bounding_set(self.CAPABILITIES)
        linux.become_user(self.uid, self.gid, self.CAPABILITIES)


def above_targets(fd: int) -> int:
    """Move a descriptor to a number that no descriptor of a child gets.

    A child enters the cell after its own descriptors were placed, so they must not overwrite this one.
    """
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FD_TARGETS)
    except OSError as error:
        raise HostError("build the cell: keep its descriptors", error) from error
    finally:
        os.close(fd)




class PrivPlace:
    """The place of priv: an ordinary user of the host, with the capabilities for network interfaces."""

    own_pids = False
    vital = True
    # priv gives up the last two when it confines itself.  Before that it must read a checkout that root does not own,
    # and reduce its bounding set.
    CAPABILITIES = (
        1 << linux.CAP_NET_ADMIN | 1 << linux.CAP_NET_RAW | 1 << linux.CAP_DAC_READ_SEARCH | 1 << linux.CAP_SETPCAP
    )

    def __init__(self, uid: int = DEFAULT_FIRST_ID + IDS) -> None:
        """`uid` is priv's user.  It is not `_vmd`: VM processes may run as `_vmd`, and could then signal priv."""
        self.import_path = import_path(("vmd", "msgpack", "pyroute2"))
        self.uid = uid

    def prepare(self) -> None:
        """Do nothing."""

    def enter(self) -> None:
        """Hide /run, become the user, and give up all other capabilities."""
        os.chdir("/")
        hide_run(self.uid)
        linux.limit_bounding_set(self.CAPABILITIES)
        linux.become_user(self.uid, self.uid, linux.permitted_capabilities() & self.CAPABILITIES)


def hide_run(uid: int) -> None:
    """Cover /run by a directory that has only `PRIV_DIRECTORY`, in a new mount namespace."""
    with contextlib.suppress(OSError):  # priv will report that it cannot write there
        make_priv_directory(uid)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)  # the host's unmounts take effect here too
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
    """Make priv's directory if it is missing; give it and its files to `uid`, which is priv's user now.

    Files that an earlier version has left in the directory above are moved into it.  Raises OSError.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(PRIV_DIRECTORY, 0o700)
    above = os.path.dirname(PRIV_DIRECTORY)
    for name in os.listdir(above):
        if name.startswith("network-"):
            os.rename(f"{above}/{name}", f"{PRIV_DIRECTORY}/{name}")
    # Only root and priv can put a file there.  A link that a taken-over priv has made is not followed.
    os.chown(PRIV_DIRECTORY, uid, uid)
    for name in os.listdir(PRIV_DIRECTORY):
        give_file(f"{PRIV_DIRECTORY}/{name}", uid)


def give_file(path: str, uid: int) -> None:
    """Give a file to a user, if it is a regular file without other hard links.  Raises OSError."""
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
    """Return a package's import specification, without importing the package, and its directory.  Raises VmdError."""
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
    archive = getattr(spec.loader, "archive", None)  # loaders of zipimport have this attribute
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
    """Return the files of a package in an archive.  The archive may have byte code of this or another interpreter.

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
    """Return the byte code of a source file of `length` bytes, marshalled.  Raises OSError.

    It is copied from the host's __pycache__ if time and length there match the file (PEP 552).  Otherwise the
    interpreter loads the module, which takes four times as long.
    """
    written_s = int(os.stat(path).st_mtime)
    header = importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, written_s & 0xFFFFFFFF, length & 0xFFFFFFFF)
    with contextlib.suppress(FileNotFoundError):
        cached = read(importlib.util.cache_from_source(path))
        if cached.startswith(header):
            return cached[len(header) :]
    return marshal.dumps(importlib.machinery.SourceFileLoader("", path).get_code(""))


def module_files(target: str, source: bytes, code: bytes) -> list[tuple[str, bytes]]:
    """Return a module's source file and its byte code file.  With the latter no process has to compile it again."""
    header = importlib.util.MAGIC_NUMBER + PYC_UNCHECKED_HASH.to_bytes(4, "little")
    pyc = header + importlib.util.source_hash(source) + code
    return [(target, source), (importlib.util.cache_from_source(target), pyc)]


def read(path: str) -> bytes:
    """Return a file's content."""
    with open(path, "rb") as file:
        return file.read()


def interpreter_mounts(libraries: list[str]) -> dict[str, str]:
    """Return the mounts of interpreter, standard library and shared libraries: path in the cell -> path on the host."""
    standard_library = os.path.dirname(os.path.abspath(os.__file__))
    mounts = {INTERPRETER: INTERPRETER}
    directories = [standard_library]
    directories += [entry for entry in sys.path if os.path.basename(entry) == "lib-dynload" and os.path.isdir(entry)]
    for directory in directories:
        # The interpreter in the cell looks for it from its own real path.  Our path may have symbolic links.
        for name in (directory, os.path.realpath(directory)):
            if not beneath(name, mounts):
                mounts[name] = os.path.realpath(directory)
    for library in libraries:
        if not beneath(library, mounts):
            mounts[library] = library
    return mounts


def beneath(path: str, mounts: dict[str, str]) -> bool:
    """Return whether the path is one of the mounts, or beneath one."""
    return any(path == mount or path.startswith(mount + "/") for mount in mounts)


def loaded_libraries(packages: list[str]) -> list[str]:
    """Return the shared libraries that extension modules of our packages and of the standard library need.

    The modules are loaded here, and the dynamic loader is asked for the paths of all loaded libraries.  It will look
    for the same paths in the cell.  /proc/self/maps has other paths, with symbolic links resolved.
    """
    for module in NATIVE:
        with contextlib.suppress(ImportError):  # some interpreters are built without some of them
            importlib.import_module(module)
    with contextlib.suppress(OSError):
        linux.load_library("libgcc_s.so.1")  # see `confine.prime`
    extensions = {getattr(module, "__file__", None) for module in sys.modules.values()}
    for package in packages:
        for directory, _, names in os.walk(package):
            for name in names:
                if is_extension(name):
                    path = os.path.join(directory, name)
                    with contextlib.suppress(OSError):  # a module that cannot be loaded here is not needed in the cell
                        linux.load_library(path)
                    extensions.add(path)
    return [path for path in link_map_names() if path not in extensions]


def is_extension(name: str) -> bool:
    """Return whether a file is an extension module for this version of the interpreter."""
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
        if name.startswith("/"):  # excludes the program itself and the vDSO
            names.append(name)
        following = entry.l_next
    return names


def build_in_namespace(mounts: dict[str, str], code: list[tuple[str, bytes]]) -> tuple[int, int]:
    """Build the root in a child with a mount namespace of its own.  Returns descriptors of namespace and root."""
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
        ours.close()  # the child waits for this, then exits
        os.waitpid(pid, 0)


def run_builder(
    mounts: dict[str, str], code: list[tuple[str, bytes]], ours: socket.socket, theirs: socket.socket
) -> "NoReturn":
    """Build the root and report the result, then wait until the parent has descriptors of the namespace."""
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
    """Replace the root of a new mount namespace by one that has only these mounts and files."""
    os.umask(0o022)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)  # the host must not see the mounts below
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
    """Bind-mount a file or directory at another place, read-only.  Devices do not work there, except /dev/null."""
    if os.path.isdir(source):
        os.makedirs(target, 0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    linux.mount(source, target, None, linux.MS_BIND)
    flags = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID
    linux.mount(None, target, None, flags | (linux.MS_NOEXEC if source == "/dev/null" else linux.MS_NODEV))
