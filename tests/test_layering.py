"""Imports are privileges: a process that has loaded a parser can be made to run it.

What each process holds is taken from a fresh interpreter that imports the process's own modules and nothing
else, so it is what `sys.modules` really has, however it got there.  Modules are found by listing the tree.
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

# -I and -S as in our own children: what site and .pth files load is not the process's doing.
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

THIRD_PARTY = {  # whoever is not named here has none
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
# Who may hold what several processes share and not all may; "device" is every device process.
SHARED = {
    "vmd.config.lexer": {"parent"},
    "vmd.config.grammar": {"parent"},
    "vmd.config.yacc": {"parent"},
    "vmd.diskfs": {"imgboot"},  # it reads what guests have written, by the page
    "vmd.images": {"device", "imgboot", "imgprobe", "imgwriter", "vmctl"},
    "vmd.files": {"opener", "parent"},  # of the parent's only `examine` opens files, for `vmd -n`
    "vmd.kvmapi": {"vm"},
    # What reads and makes the texts of a seed; its parts and the rules of single words are for all who pass them on.
    "vmd.seed.documents": {"seeder"},
    "vmd.seed.iso": {"seeder"},
    "vmd.seed.keys": {"seeder"},
    "vmd.guestmem": {"vm", "device"},
    "vmd.virtio": {"vm", "device"},
    "vmd.ipc.imsg": {*THIRD_PARTY},
}
# ... and the parts of it that harm nobody, for they read nothing.
HARMLESS = {name: {"vmd.images", "vmd.images.locks", "vmd.images.names"} for name in ("opener", "parent", "lockholder")}
VMCTL_MAY_HOLD = (
    "vmctl", "vmd.client", "vmd.ipc", "vmd.config.model", "vmd.config.rules", "vmd.images", "vmd.errors", "vmd.fileid",
    "vmd.enums", "vmd.memfile", "vmd.seed", "vmd.signals",
    "vmd.record", "vmd.exposition", "vmd.log", "vmd.native", "vmd.scaled", "vmd.nearest", "vmd.stdio", "vmd.units",
    "vmd.version",
)  # fmt: skip
OF_SEVERAL_BORDERS = {"vmd.ipc.messages.children", "vmd.ipc.messages.shared"}
# Each costs every VM milliseconds of start-up or megabytes of memory.
TOO_HEAVY = {
    "argparse", "asyncio", "ast", "contextlib", "ctypes", "dataclasses", "inspect", "logging", "re", "selectors",
    "socket", "subprocess", "typing",
}  # fmt: skip
# ... and these cost each process of it a millisecond or some hundred KiB that a smaller module does without: `_heapq`,
# `_collections`, `vmd.enums`, `vmd.signals`, `vmd.threads`, `vmd.ipc.sockets`, `vmd.ipc.rights`.
TOO_HEAVY_FOR_VMS = {"array", "collections", "enum", "functools", "heapq", "signal", "socket", "threading", "types"}
# What `posix` has is enough of `os` for devices, and takes 0.24 MiB less; so it is with `_stat`.
TOO_HEAVY_FOR_DEVICES = TOO_HEAVY_FOR_VMS | {"os", "stat"}

# What makes enumerations takes 4 ms of every start; `vmd.enums`, `vmd.signals` and `vmd.ipc.sockets` do without.
# The exceptions start once with the daemon, or load it with what they need (`re`).
SLOW_TO_START = {"enum", "signal", "socket"}
MAY_BE_SLOW = {"parent", "priv", "metrics", "agentx", "seeder"}
QUICK_COMMANDS = ("start", "stop", "console", "status", "wait", "pause", "unpause")


class Process(NamedTuple):
    """One kind of process, and the modules that are its own."""

    title: str
    kind: str
    modules: tuple[str, ...]

    def owns(self, module: str) -> bool:
        """Return whether a module is this process's own."""
        return module in self.modules


class Held(NamedTuple):
    """What an interpreter has loaded."""

    modules: tuple[str, ...]
    third_party: frozenset[str]

    def below(self, *prefixes: str) -> set[str]:
        """Return the loaded modules that are, or are inside, one of some packages."""
        return {name for name in self.modules if any(within(name, prefix) for prefix in prefixes)}


def within(name: str, package: str) -> bool:
    """Return whether a module is a package or inside it."""
    return name == package or name.startswith(package + ".")


def modules_in(folder: str) -> tuple[str, ...]:
    """Return the names of all modules below a folder, without the empty package files."""
    paths = sorted(Path(ROOT, folder).rglob("*.py"))
    return tuple(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.name != "__init__.py")


def processes() -> list[Process]:
    """Return every process whose code is there."""
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
    """Return what a fresh interpreter holds after importing some modules."""
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
    """The parser is the parent's, netlink is priv's, and devices have the standard library."""
    held = loaded_by(process.modules)

    assert held.third_party <= THIRD_PARTY.get(process.kind, set())


@of_each_process
def test_process_holds_only_what_is_shared_with_it(process: Process) -> None:
    """Code that several processes share is not for all of them."""
    held = loaded_by(process.modules)

    not_for_it = [package for package, holders in SHARED.items() if process.kind not in holders]

    assert held.below(*not_for_it) - HARMLESS.get(process.kind, set()) == set()


@of_each_process
def test_a_process_knows_the_messages_of_its_own_borders(process: Process) -> None:
    """All that it sends, passes on or is sent; and it imports no border at which it has nothing to say."""
    proc = Proc.__members__.get({"vmctl": "client"}.get(process.title, process.title).upper())
    held = loaded_by(process.modules)

    speaks = {each.cls for each in MESSAGES if any(proc in path for path in each.paths)}
    knows = {each.cls for each in MESSAGES if each.cls.__module__ in held.modules}
    borders = {cls.__module__ for cls in knows} - {cls.__module__ for cls in speaks}

    assert speaks - knows == set()
    assert borders - OF_SEVERAL_BORDERS == set()


@of_each_vm
def test_vm_and_device_processes_import_little(process: Process) -> None:
    """A host runs hundreds of them, and a VM waits for all of its own; what starts them is counted, too."""
    held = loaded_by(("vmd.privsep.start", *process.modules))

    assert (TOO_HEAVY | TOO_HEAVY_FOR_VMS) & set(held.modules) == set()


@pytest.mark.parametrize("process", [p for p in PROCESSES if p.kind == "device"], ids=lambda process: process.title)
def test_device_processes_import_less(process: Process) -> None:
    """A VM has several of them."""
    held = loaded_by(("vmd.privsep.start", *process.modules))

    assert TOO_HEAVY_FOR_DEVICES & set(held.modules) == set()


@pytest.mark.parametrize(
    "process", [p for p in PROCESSES if p.kind not in {*MAY_BE_SLOW, "vmctl"}], ids=lambda process: process.title
)
def test_what_starts_again_and_again_makes_no_enumerations(process: Process) -> None:
    """Somebody waits for each of these starts."""
    held = loaded_by(process.modules)

    assert SLOW_TO_START & set(held.modules) == set()


@pytest.mark.parametrize("command", QUICK_COMMANDS)
def test_commands_of_every_day_make_no_enumerations(command: str) -> None:
    """Most of the time of a command is the time until it can ask."""
    held = loaded_by(("vmctl.__main__", f"vmctl.commands.{command}"))

    assert SLOW_TO_START & set(held.modules) == set()


def test_priv_holds_a_part_of_pyroute2() -> None:
    """The whole has a database of interfaces and more, which would double the time until a daemon is there."""
    held = loaded_by(("vmd.priv.main",))

    assert "pyroute2.iproute.linux" in held.modules
    assert held.below("pyroute2.ndb", "pyroute2.ipdb", "pyroute2.conntrack", "pyroute2.nftables") == set()


def test_a_raw_disk_holds_no_other_format() -> None:
    """Its process cannot be made to parse what it has not, and there are more raw disks than others."""
    held = loaded_by(("vmd.devices.vioblk.raw",))

    assert held.below("vmd.images.qcow2", "vmd.images.header", "vmd.images.refcounts", "vmd.images.chain") == set()


def test_streamprobe_holds_little_of_a_vm() -> None:
    """A stream may be anybody's, and whoever receives a VM waits until its beginning was read."""
    held = loaded_by(("vmd.vm.streamprobe",))

    assert held.below("vmd.kvmapi", "vmd.guestmem", "vmd.vm.chips", "vmd.vm.machine", "vmd.vm.state") == set()


def test_kvmapi_stands_alone() -> None:
    """It could be lifted out: the standard library and itself, with its share of ctypes."""
    held = loaded_by(modules_in("vmd/kvmapi"))

    assert held.below("vmd") - held.below("vmd.kvmapi") == {"vmd", "vmd.native", "vmd.signals"}
    assert held.third_party == frozenset()


def test_readers_of_file_systems_stand_alone() -> None:
    """They read what guests have written: whoever takes them over finds nothing else there."""
    held = loaded_by(modules_in("vmd/diskfs"))

    assert held.below("vmd") - held.below("vmd.diskfs") == {"vmd", "vmd.errors", "vmd.record", "vmd.units"}
    assert held.third_party == frozenset()
    assert TOO_HEAVY & set(held.modules) == set()


def test_vmctl_holds_what_it_talks_and_nothing_of_the_daemon() -> None:
    """What it parses comes from a less interesting place than what the daemon holds, so it stays small."""
    modules = modules_in("vmctl")
    held = loaded_by(modules)

    packages = {"vmd", "vmd.config"}  # their package files are empty

    assert held.below("vmd") - held.below(*VMCTL_MAY_HOLD) - packages == set()


def test_the_client_library_needs_nothing_of_vmctl_or_the_daemon() -> None:
    """Other programs import it alone."""
    held = loaded_by(("vmd.client",))

    talks = {"vmd.client", "vmd.config.model", "vmd.enums", "vmd.errors", "vmd.record", "vmd.units", "vmd.version"}
    assert held.below("vmd", "vmctl") - held.below("vmd.ipc") - {"vmd", "vmd.config"} == talks
    assert held.third_party == {"msgpack"}
    assert TOO_HEAVY & set(held.modules) == set()


def sources() -> list[Path]:
    """Return every module of the two programs."""
    return sorted([*Path(ROOT, "vmd").rglob("*.py"), *Path(ROOT, "vmctl").rglob("*.py")])


def imports(tree: ast.AST) -> set[str]:
    """Return the modules that a piece of code names in its import statements."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize(("package", "home"), HOMES.items())
def test_third_party_package_has_one_home(package: str, home: str) -> None:
    """Whoever wants another package's services asks the module that wraps it."""
    users = [
        str(path.relative_to(ROOT))
        for path in sources()
        if any(within(name, package) for name in imports(ast.parse(path.read_text())))
    ]

    assert [user for user in users if not user.startswith(home)] == []


def test_processes_import_nothing_later() -> None:
    """Once confined, a process can open no module."""
    # The first chooses a process; the second's imports are what it does before the door is shut.
    # The last is in no process of the daemon.
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
    """A process that is confined can open no module of another codec: who needs one has imported it."""
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
    """Return the modules of the same folder that a module names in an import, for type checkers included."""
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
    """What a module leans on does not lean on it: one that is in a circle is understood only with all the others."""
    left = {path.stem: imports_of(path) for path in (ROOT / folder).glob("*.py")}
    left = {module: needs & set(left) for module, needs in left.items()}

    while free := {module for module, needs in left.items() if not needs & set(left)}:
        left = {module: needs for module, needs in left.items() if module not in free}

    assert sorted(left) == []
