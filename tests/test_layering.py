"""Imports are privileges: a process that has loaded a parser can be made to run it.

For each kind of process, a fresh interpreter imports only the process's own modules.  `sys.modules` then shows all
modules that the process has loaded, including indirect imports.  Modules are found by listing the tree.
"""

import ast
import functools
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.messages import MESSAGES
from vmd.ipc.routes import Proc
from vmd.privsep.confine import CODECS

ROOT = Path(__file__).resolve().parent.parent
SITE = sysconfig.get_path("purelib")

# -I and -S as in our own children: the site module and .pth files would load further modules.
PROBE = """
import sys
root, site, *modules = sys.argv[1:]
sys.path += [root, site]
for module in modules:
    __import__(module)
where = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
import json  # only now: it brings others along
print(json.dumps({
    "all": sorted(where),
    "third": sorted({name.partition(".")[0] for name, path in where.items() if path.startswith(site)}),
}))
"""

THIRD_PARTY = {  # processes that are not listed have none
    "parent": {"msgpack"},
    "control": {"msgpack"},
    "priv": {"msgpack", "pyroute2"},
    "log": {"msgpack"},
    "consolelog": {"msgpack"},
    "opener": {"msgpack"},
    "imgwriter": {"msgpack"},
    "seeder": {"msgpack"},
    "agentx": {"msgpack"},
    "metrics": {"msgpack"},
    "vmm": {"msgpack"},
    "vm": {"msgpack"},
    "vmctl": {"msgpack"},
}
HOMES = {"msgpack": "vmd/ipc/packing.py", "pyroute2": "vmd/priv/netlink.py"}
# The processes that may load modules which several, but not all, processes share.  "device" is every device process.
SHARED = {
    "vmd.config.lexer": {"parent"},
    "vmd.config.grammar": {"parent"},
    "vmd.config.yacc": {"parent"},
    "vmd.diskfs": {"imgboot"},  # reads data that guests have written, page by page
    "vmd.images": {"device", "imgboot", "imgprobe", "imgwriter", "vmctl"},
    "vmd.files": {"opener", "parent"},  # in the parent only `examine` opens files, for `vmd -n`
    "vmd.kvmapi": {"vm"},
    # These read and make the texts of a seed.  The parts of a seed and the rules of single words are for all processes.
    "vmd.seed.documents": {"seeder"},
    "vmd.seed.iso": {"seeder"},
    "vmd.seed.keys": {"seeder"},
    "vmd.guestmem": {"vm", "device"},
    "vmd.virtio": {"vm", "device"},
    "vmd.ipc.imsg": {*THIRD_PARTY},
}
# Exceptions inside those packages: these modules parse nothing.
HARMLESS = {name: {"vmd.images", "vmd.images.locks", "vmd.images.names"} for name in ("opener", "parent", "lockholder")}
VMCTL_MAY_HOLD = (
    "vmctl", "vmd.client", "vmd.ipc", "vmd.config.model", "vmd.config.rules", "vmd.images", "vmd.errors", "vmd.fileid",
    "vmd.enums", "vmd.memfile", "vmd.seed", "vmd.signals",
    "vmd.record", "vmd.exposition", "vmd.log", "vmd.native", "vmd.scaled", "vmd.nearest", "vmd.stdio", "vmd.units",
    "vmd.version",
)  # fmt: skip
OF_SEVERAL_BORDERS = {"vmd.ipc.messages.children", "vmd.ipc.messages.shared"}
# Each of these costs every VM milliseconds at start-up or megabytes of memory.
TOO_HEAVY = {
    "argparse", "asyncio", "ast", "contextlib", "ctypes", "dataclasses", "inspect", "logging", "re", "selectors",
    "socket", "subprocess", "typing",
}  # fmt: skip
# Each of these costs a process of a VM a millisecond or some hundred KiB.  Smaller modules replace them: `_heapq`,
# `_collections`, `vmd.enums`, `vmd.signals`, `vmd.threads`, `vmd.ipc.sockets`, `vmd.ipc.rights`.
TOO_HEAVY_FOR_VMS = {"array", "collections", "enum", "functools", "heapq", "signal", "socket", "threading", "types"}
# Devices need only the part of `os` that `posix` has, which takes 0.24 MiB less.  The same holds for `_stat`.
TOO_HEAVY_FOR_DEVICES = TOO_HEAVY_FOR_VMS | {"os", "stat"}

# Making enumerations takes 4 ms at every start.  `vmd.enums`, `vmd.signals` and `vmd.ipc.sockets` avoid it.
# The exceptions start only once, with the daemon, or need a module that loads it (`re`).
SLOW_TO_START = {"enum", "signal", "socket"}
MAY_BE_SLOW = {"parent", "priv", "metrics", "agentx", "seeder"}
QUICK_COMMANDS = ("start", "stop", "console", "status", "wait", "pause", "unpause")


class Process(NamedTuple):
    """One kind of process, and its own modules."""

    title: str
    kind: str
    modules: tuple[str, ...]

    def owns(self, module: str) -> bool:
        """Return whether a module is this process's own."""
        return module in self.modules


class Held(NamedTuple):
    """The modules that an interpreter has loaded."""

    modules: tuple[str, ...]
    third_party: frozenset[str]

    def below(self, *prefixes: str) -> set[str]:
        """Return the loaded modules that are one of these packages, or inside one."""
        return {name for name in self.modules if any(within(name, prefix) for prefix in prefixes)}


def within(name: str, package: str) -> bool:
    """Return whether a module is a package or inside it."""
    return name == package or name.startswith(package + ".")


def modules_in(folder: str) -> tuple[str, ...]:
    """Return the names of all modules below a folder, without the empty `__init__.py` files."""
    paths = sorted(Path(ROOT, folder).rglob("*.py"))
    return tuple(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.name != "__init__.py")


def processes() -> list[Process]:
    """Return every kind of process."""
    found = [
        Process(name, name, modules_in(f"vmd/{name}"))
        for name in (
            "agentx", "parent", "control", "opener", "imgboot", "imgwriter", "lockholder", "logfile", "consolelog",
            "metrics", "priv", "vmm", "vm",
        )
    ]
    found.append(Process("log", "log", modules_in("vmd/logger")))
    found += [
        Process(f"device {main.parent.name}", "device", modules_in(f"vmd/devices/{main.parent.name}"))
        for main in sorted(Path(ROOT, "vmd/devices").glob("*/main.py"))
    ]
    found.append(Process("imgprobe", "imgprobe", tuple(m for m in modules_in("vmd/images") if m.endswith(".probe"))))
    found.append(Process("seeder", "seeder", ("vmd.seed.seeder",)))
    found.append(Process("vmctl", "vmctl", modules_in("vmctl")))
    return [process for process in found if process.modules]


PROCESSES = processes()
of_each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.title)
of_each_vm = pytest.mark.parametrize(
    "process", [p for p in PROCESSES if p.kind in ("vm", "device")], ids=lambda process: process.title
)


@functools.cache
def loaded_by(modules: tuple[str, ...]) -> Held:
    """Return the modules that a fresh interpreter has loaded after importing some modules."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROBE, str(ROOT), SITE, *modules],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return Held(tuple(answer["all"]), frozenset(answer["third"]))


@of_each_process
def test_process_holds_no_other_process(process: Process) -> None:
    """Process packages never import one another."""
    held = loaded_by(process.modules)

    others = {module for other in PROCESSES if other != process for module in other.modules}

    assert others & set(held.modules) == set()


@of_each_process
def test_process_holds_only_its_third_party_packages(process: Process) -> None:
    """Only the parent has the parser generator, only priv has netlink, and devices have only the standard library."""
    held = loaded_by(process.modules)

    assert held.third_party <= THIRD_PARTY.get(process.kind, set())


@of_each_process
def test_process_holds_only_modules_that_are_shared_with_it(process: Process) -> None:
    """Modules of SHARED are only in the processes that are listed there."""
    held = loaded_by(process.modules)

    not_for_it = [package for package, holders in SHARED.items() if process.kind not in holders]

    assert held.below(*not_for_it) - HARMLESS.get(process.kind, set()) == set()


@of_each_process
def test_a_process_knows_the_messages_of_its_own_borders(process: Process) -> None:
    """It has all messages that it sends, forwards or receives, and imports the messages of no other border."""
    proc = Proc.__members__.get({"vmctl": "client"}.get(process.title, process.title).upper())
    held = loaded_by(process.modules)

    speaks = {each.cls for each in MESSAGES if any(proc in path for path in each.paths)}
    knows = {each.cls for each in MESSAGES if each.cls.__module__ in held.modules}
    borders = {cls.__module__ for cls in knows} - {cls.__module__ for cls in speaks}

    assert speaks - knows == set()
    assert borders - OF_SEVERAL_BORDERS == set()


@of_each_vm
def test_vm_and_device_processes_import_little(process: Process) -> None:
    """A host runs hundreds of them, and a VM waits for all its processes.  The code that starts them counts, too."""
    held = loaded_by(("vmd.privsep.start", *process.modules))

    assert (TOO_HEAVY | TOO_HEAVY_FOR_VMS) & set(held.modules) == set()


@pytest.mark.parametrize("process", [p for p in PROCESSES if p.kind == "device"], ids=lambda process: process.title)
def test_device_processes_import_less(process: Process) -> None:
    """A VM has several device processes."""
    held = loaded_by(("vmd.privsep.start", *process.modules))

    assert TOO_HEAVY_FOR_DEVICES & set(held.modules) == set()


@pytest.mark.parametrize(
    "process", [p for p in PROCESSES if p.kind not in {*MAY_BE_SLOW, "vmctl"}], ids=lambda process: process.title
)
def test_processes_that_start_often_make_no_enumerations(process: Process) -> None:
    """A user waits for each start of one of these processes."""
    held = loaded_by(process.modules)

    assert SLOW_TO_START & set(held.modules) == set()


@pytest.mark.parametrize("command", QUICK_COMMANDS)
def test_daily_commands_make_no_enumerations(command: str) -> None:
    """A command spends most of its time until it can send its request."""
    held = loaded_by(("vmctl.__main__", f"vmctl.commands.{command}"))

    assert SLOW_TO_START & set(held.modules) == set()


def test_priv_holds_a_part_of_pyroute2() -> None:
    """All of pyroute2 has a database of interfaces and more, which would double the start-up time of the daemon."""
    held = loaded_by(("vmd.priv.main",))

    assert "pyroute2.iproute.linux" in held.modules
    assert held.below("pyroute2.ndb", "pyroute2.ipdb", "pyroute2.conntrack", "pyroute2.nftables") == set()


def test_a_raw_disk_holds_no_other_format() -> None:
    """The process of a raw disk cannot be made to parse other formats, and raw disks are the most frequent."""
    held = loaded_by(("vmd.devices.vioblk.raw",))

    assert held.below("vmd.images.qcow2", "vmd.images.header", "vmd.images.refcounts", "vmd.images.chain") == set()


def test_streamprobe_holds_little_of_a_vm() -> None:
    """A stream is untrusted.  A client that receives a VM waits for streamprobe."""
    held = loaded_by(("vmd.vm.streamprobe",))

    assert held.below("vmd.kvmapi", "vmd.guestmem", "vmd.vm.chips", "vmd.vm.machine", "vmd.vm.state") == set()


def test_kvmapi_imports_only_itself() -> None:
    """Other programs could use it: it imports only the standard library and itself, with its part of ctypes."""
    held = loaded_by(modules_in("vmd/kvmapi"))

    assert held.below("vmd") - held.below("vmd.kvmapi") == {"vmd", "vmd.native", "vmd.signals"}
    assert held.third_party == frozenset()


def test_readers_of_file_systems_import_only_themselves() -> None:
    """They read data that guests have written.  An attacker who takes them over finds no other code there."""
    held = loaded_by(modules_in("vmd/diskfs"))

    assert held.below("vmd") - held.below("vmd.diskfs") == {"vmd", "vmd.errors", "vmd.record", "vmd.units"}
    assert held.third_party == frozenset()
    assert TOO_HEAVY & set(held.modules) == set()


def test_vmctl_holds_little_of_the_daemon() -> None:
    """Of the daemon it loads only the modules of VMCTL_MAY_HOLD."""
    modules = modules_in("vmctl")
    held = loaded_by(modules)

    packages = {"vmd", "vmd.config"}  # their package files are empty

    assert held.below("vmd") - held.below(*VMCTL_MAY_HOLD) - packages == set()


def test_the_client_library_needs_nothing_of_vmctl_or_the_daemon() -> None:
    """Other programs import only this library."""
    held = loaded_by(("vmd.client",))

    talks = {"vmd.client", "vmd.config.model", "vmd.enums", "vmd.errors", "vmd.record", "vmd.units", "vmd.version"}
    assert held.below("vmd", "vmctl") - held.below("vmd.ipc") - {"vmd", "vmd.config"} == talks
    assert held.third_party == {"msgpack"}
    assert TOO_HEAVY & set(held.modules) == set()


def sources() -> list[Path]:
    """Return every module of the two programs."""
    return sorted([*Path(ROOT, "vmd").rglob("*.py"), *Path(ROOT, "vmctl").rglob("*.py")])


def imports(tree: ast.AST) -> set[str]:
    """Return the modules that the import statements of some code name."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize(("package", "home"), HOMES.items())
def test_third_party_package_has_one_home(package: str, home: str) -> None:
    """Only one module, its wrapper, imports a third-party package."""
    users = [
        str(path.relative_to(ROOT))
        for path in sources()
        if any(within(name, package) for name in imports(ast.parse(path.read_text())))
    ]

    assert [user for user in users if not user.startswith(home)] == []


def test_processes_import_nothing_later() -> None:
    """A confined process cannot open the file of a module."""
    # The first one chooses a process.  The second one imports before the process is confined.
    # The last one is in no process of the daemon.
    exempt = {ROOT / "vmd/__main__.py", ROOT / "vmd/privsep/confine.py", ROOT / "vmd/client.py"}
    late = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        if path.is_relative_to(ROOT / "vmd") and path not in exempt
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]

    assert late == []


def test_no_codec_is_looked_for_too_late() -> None:
    """A confined process cannot open the module of a codec, so it must have imported the codecs that it needs."""
    late = []
    for path in (ROOT / "vmd").rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Call(func=ast.Attribute(attr="encode" | "decode"), args=[ast.Constant(value=str(codec)), *_]):
                    if codec not in CODECS and f"import encodings.{codec.replace('-', '_')}" not in text:
                        late.append(f"{path.relative_to(ROOT)}:{node.lineno} {codec}")

    assert late == []


def imports_of(path: Path) -> set[str]:
    """Return the modules of the same folder that a module imports, including imports for type checkers."""
    folder = ".".join(path.relative_to(ROOT).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == folder:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(folder + "."):
            found.add(node.module.removeprefix(folder + "."))
    return found


@pytest.mark.parametrize("folder", ["vmd/parent", "vmd/vm", "vmd/vm/boot", "vmd/vm/chips"])
def test_no_module_needs_itself(folder: str) -> None:
    """Imports have no cycles.  A module in a cycle can only be understood together with the others."""
    left = {path.stem: imports_of(path) for path in (ROOT / folder).glob("*.py")}
    left = {module: needs & set(left) for module, needs in left.items()}

    while free := {module for module, needs in left.items() if not needs & set(left)}:
        left = {module: needs for module, needs in left.items() if module not in free}

    assert sorted(left) == []
