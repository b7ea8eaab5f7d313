"""The files that a cell has: the interpreter, its shared libraries, and copies of our code.

Our code is copied into the cell, not mounted, for two reasons.  It may come from an archive, or from a checkout of mode
0700 with files of mode 0600, which `_vmd` could not read.  And if an upgrade replaces the files of a running daemon,
all its later processes still start from the daemon's own version.  Processes outside the cell load the copy, too.
"""

import contextlib
import ctypes
import importlib
import importlib.machinery
import importlib.util
import marshal
import os
import struct
import sys
import zipfile
import zipimport

from vmd.errors import HostError, VmdError
from vmd.privsep import linux
from vmd.privsep.spawn import INTERPRETER
from vmd.privsep.start import CODE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

PACKAGES = ("vmd", "msgpack")
# Extension modules that children import.  They are loaded here to find out which shared libraries they need.
NATIVE = ("_ctypes", "_hashlib", "_socket", "array", "fcntl", "mmap", "resource", "select", "termios", "zlib")
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
