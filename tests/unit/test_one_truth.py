"""A fact stands in one place, and there are no unused constants, functions, classes, methods and fields."""

import ast
import functools
import importlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from vmd.devices.vionet import ethernet
from vmd.parent.vm import State
from vmd.priv import nics

ROOT = Path(__file__).resolve().parents[2]

# Constants with the same name and value in two modules that are independent facts.
INDEPENDENT = {
    "TYPE_CHECKING": "type checkers know it by its name, and `typing` is slow to import",
    "VERSION": "each format and protocol has its own",
    "NONE": "one is for descriptors, the other one for users",
    "MAGIC": "state files and streams begin alike, and are never read in place of each other",
    **dict.fromkeys(("FAILED", "HOST", "RUNNING", "STOPPED", "SWITCH"), "the same word in several lists"),
    **dict.fromkeys(("RESUMING", "SUSPENDING"), "RFC 7666 numbers states and notifications independently"),
    "DIRECT": "each file system has its own",
    "FD_ANSWER": "each single-purpose program has its own descriptors",
    "OF_IMAGE": "each request has its own form",
    **dict.fromkeys(("NOTES_MAX", "PINGS_MAX", "STUCK_MAX"), "how much one process tolerates from another one"),
    **dict.fromkeys(("AT_A_TIME", "BATCH"), "how much work a process does in one turn"),
    **dict.fromkeys(("ANSWER_MAX", "PIECE", "PIECE_BYTES", "READ_MAX"), "how much is read at a time"),
    **dict.fromkeys(
        (
            "AGAIN_S", "ANSWER_S", "END_S", "FRESH_S", "LAST_WORDS_S", "LOOK_S", "PING_S", "RESERVE_DELAY_S",
            "RETRY_S", "SAY_AGAIN_S", "SAY_S", "WAIT_MAX_S",
        ),
        "how long a process waits for another one, or between two actions",
    ),
}  # fmt: skip

BOOT_SECTOR = ("SIGNATURE_AT", "SIGNATURE")

# Facts that stand in two places, because no process may import both modules.
COPIES = (
    ("vmd.parent.service:KVM_API_VERSION", "vmd.kvmapi.abi:KVM_API_VERSION"),
    ("vmd.parent.service:KVM_GET_API_VERSION", "vmd.kvmapi.abi:KVM_GET_API_VERSION"),
    ("vmd.guestmem:KVM_MEM_READONLY", "vmd.kvmapi.abi:KVM_MEM_READONLY"),
    ("vmd.config.model:MAX_CHAIN", "vmd.images.chain:MAX_CHAIN"),
    ("vmd.config.model:MAX_NAME_SERVERS", "vmd.ipc.devmsg:DNS_MAX"),
    ("vmd.config.rules:DISK_FORMATS", "vmd.ipc.probemsg:FORMATS"),
    ("vmd.parent.identity:GROUP", "vmd.devices.vionet.ethernet:GROUP"),
    ("vmd.ipc.probemsg:BACKING_MAX", "vmd.images.header:MAX_BACKING_NAME"),
    ("vmd.images.gpt:SIGNATURE", "vmd.diskfs.partitions:GPT_MAGIC"),
    *((f"vmd.images.bootsector:{name}", f"vmd.diskfs.partitions:{name}") for name in BOOT_SECTOR),
    ("vmd.config.rules:HOST_NAME_MAX", "vmd.devices.vionet.dhcp:HOST_NAME_MAX"),
    ("vmd.config.rules:LABEL_MAX", "vmd.devices.vionet.dhcp:LABEL_MAX"),
    ("vmd.priv.host:MTU_MAX", "vmd.devices.vionet.interface:MTU_MAX"),
    ("vmd.parent.vhost:ROUTER_SOLICITATION", "vmd.devices.vionet.ra:ROUTER_SOLICITATION"),
)

# Pairs of times, of which the first must be shorter: otherwise the wrong process is ended, or with a wrong message.
SOONER = (
    ("vmd.devices.process:QUIESCE_TIMEOUT_S", "vmd.ipc.devmsg:ANSWER_TIMEOUT_S"),
    ("vmd.priv.rules:NFT_TIMEOUT_S", "vmd.parent.askpriv:ANSWER_S"),
    ("vmd.priv.main:REST_MAX_S", "vmd.parent.status:COUNT_TIMEOUT_S"),
    ("vmd.files.asking:LONGEST_S", "vmd.parent.opening:LONGEST_S"),
    ("vmd.files.seeder:LONGEST_S", "vmd.parent.opening:LONGEST_S"),
    ("vmd.vm.shutdown:SHUTDOWN_TIMEOUT_S", "vmd.vmm.main:ORPHANS_S"),
)

# Names that no other code of the two programs uses.
FOR_TESTS = "tests build run pages and states with it"
UNUSED = {
    "vmd.privsep.start:begin": "the code of each new process calls it (privsep/spawn.py)",
    "vmd.privsep.start:run": "the code of each new process calls it (privsep/spawn.py)",
    "vmd.virtio.spec:ACKNOWLEDGE": "the first bit of the device status: drivers set it, and tests are drivers",
    "vmd.kvmapi.abi:KVM_EXIT_IO_IN": FOR_TESTS,
    "vmd.kvmapi.abi:KVM_INTERNAL_ERROR_DELIVERY_EV": FOR_TESTS,
    "vmd.kvmapi.abi:KVM_SYSTEM_EVENT_RESET": FOR_TESTS,
    "vmd.kvmapi.abi:KVM_MEM_READONLY": "the original of the copy in vmd.guestmem",
    "vmd.kvmapi.abi:KVM_MP_STATE_RUNNABLE": FOR_TESTS,
    "vmd.kvmapi.abi:KVM_MP_STATE_UNINITIALIZED": FOR_TESTS,
    "vmd.kvmapi.abi:KVM_CAP_IRQCHIP": FOR_TESTS,
    "vmd.kvmapi.abi:KVM_CAP_IMMEDIATE_EXIT": FOR_TESTS,
    **{
        f"vmd.vm.layout:{name}": "the map has all ports, but a chip is attached at its first one"
        for name in ("PORT_KBD_STATUS", "PORT_RTC_DATA", "PORT_FWCFG_DATA", "PORT_FWCFG_DMA", "PORT_PCI_DATA")
    },
}
# Modules whose methods are called from elsewhere: by vmd.config.yacc, which finds them by name, and by users' programs.
CALLED_FROM_OUTSIDE = {"vmd.config.grammar", "vmd.client"}
WORD = re.compile(r"[A-Za-z_]\w*")
ENTRY = re.compile(r"(vmd[\w.]*):(\w+)")


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return every module of the two programs."""
    paths = sorted([*Path(ROOT, "vmd").rglob("*.py"), *Path(ROOT, "vmctl").rglob("*.py")])
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}


def constants(tree: ast.Module) -> Iterator[tuple[str, object]]:
    """Yield the module's constants with literal values: numbers, strings, bytes, and tuples of them."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pairs = [(name, value)]
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pairs = [(name, value)]
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)) if len(names) == len(values):
                named = zip(names, values, strict=True)
                pairs = [(name.id, value) for name, value in named if isinstance(name, ast.Name)]
            case _:
                continue
        for name, value in pairs:
            parts = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Tuple, ast.expr_context)
            if all(isinstance(part, parts) for part in ast.walk(value)):
                yield name, eval(compile(ast.Expression(value), name, "eval"))


def value_of(place: str) -> object:
    """Return the value of `module:NAME`."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def test_a_constant_has_one_home() -> None:
    """A change of one copy would need the same change of the other."""
    homes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, tree in modules().items():
        for name, value in constants(tree):
            homes[name, repr(value)].append(f"{module}:{name}")
    copies = {place for pair in COPIES for place in pair}
    several = [
        f"{name} = {value} stands in {', '.join(places)}: let one module define it and the others import it"
        for (name, value), places in homes.items()
        if len(places) > 1 and name not in INDEPENDENT and not set(places) <= copies
    ]

    assert several == []


@pytest.mark.parametrize(("one", "other"), COPIES)
def test_copies_of_a_constant_agree(one: str, other: str) -> None:
    """These copies are necessary."""
    assert value_of(one) == value_of(other), f"{one} is {value_of(one)!r}, and {other} {value_of(other)!r}"


@pytest.mark.parametrize(("sooner", "later"), SOONER)
def test_one_time_is_shorter_than_the_other(sooner: str, later: str) -> None:
    """They are constants of processes that do not import each other's modules."""
    first, second = value_of(sooner), value_of(later)

    assert isinstance(first, float)
    assert isinstance(second, float)
    assert first < second, f"{sooner} is {first:g} s, and must be less than {later}, which is {second:g} s"


def test_a_guest_always_has_the_same_time_to_shut_down() -> None:
    """`vmctl stop` and the end of the daemon give the same time."""
    assert value_of("vmd.parent.life:STOP_GRACE_S") == value_of("vmd.vm.shutdown:SHUTDOWN_TIMEOUT_S")


@pytest.mark.parametrize(
    "place",
    [
        "vmctl.rates:RUNNING", "vmctl.commands.migrate:MOVABLE", "vmctl.commands.ssh:COMING",
        "vmctl.commands.ssh:THERE", "vmctl.commands.stop:STOPPED", "vmctl.commands.stop:STOPPING",
    ],
)  # fmt: skip
def test_vmctl_s_states_exist(place: str) -> None:
    """The parent sends states as words."""
    value = value_of(place)
    words = {value} if isinstance(value, str) else set(cast("tuple[str, ...]", value))

    assert words - {state.value for state in State} == set(), f"{place} has words that are not states of a VM"


def test_documents_have_every_state() -> None:
    """They are the schema of `vmctl status --json`, and vmctl(8)."""
    states = {state.value for state in State}
    schema = json.loads(Path(ROOT, "docs/vmctl.schema.json").read_text())
    manual = Path(ROOT, "man/vmctl.8").read_text()

    assert set(schema["$defs"]["vm"]["properties"]["state"]["enum"]) == states
    assert states - set(re.findall(r"^\.Sq ([a-z ]+?)(?: [.,;:])?$", manual, re.MULTILINE)) == set(), "not in vmctl(8)"


def test_both_sides_of_a_tap_make_the_same_link_local_address() -> None:
    """The interface's process answers in the name of the host's side, whose address priv sets."""
    lladdr = bytes.fromhex("fee1bbd10203")

    assert ethernet.link_local(lladdr) == nics.link_local(lladdr)


# --- unused code ---------------------------------------------------------------------------------------------------


def is_expression(text: str) -> bool:
    """Return whether a text may be code.  A sentence is not."""
    try:
        ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return False
    return True


class Used:
    """Names used in the code of the two programs: module-level names by module, and attributes of any object."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = defaultdict(set)
        self.attributes: set[str] = set()
        for module, tree in modules().items():
            self.module = module
            self.modules = {"": module}  # modules by their names in this module
            nodes = list(ast.walk(tree))
            for node in nodes:
                self._take_import(node)
            for node in nodes:
                self._take(node)

    def _take_import(self, node: ast.AST) -> None:
        match node:
            case ast.Import(names=names):
                self.modules |= {each.asname or each.name: each.name for each in names}
            case ast.ImportFrom(module=str(source), names=names):
                for each in names:
                    if f"{source}.{each.name}" in modules():
                        self.modules[each.asname or each.name] = f"{source}.{each.name}"
                    else:
                        self.names[source].add(each.name)

    def _take(self, node: ast.AST) -> None:
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                self.names[self.module].add(name)
            case ast.Attribute(attr=name, value=value, ctx=ast.Load()):
                self.attributes.add(name)
                self.names[self.modules.get(ast.unparse(value), "")].add(name)
            case ast.Constant(value=str(text)) if entry := ENTRY.fullmatch(text):
                self.names[entry[1]].add(entry[2])
            case ast.Constant(value=str(text)) if is_expression(text):  # a quoted type, or a name to look up
                self.names[self.module].update(WORD.findall(text))
                self.attributes.update(WORD.findall(text))


@functools.cache
def used() -> Used:
    """Return the names used in all code.  They are collected once."""
    return Used()


def defined(tree: ast.Module) -> Iterator[str]:
    """Yield the module-level names that have their own definition, without names that share one assignment."""
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def test_every_name_is_used() -> None:
    """A name without a user must be removed."""
    commands = {f"vmctl.commands.{path.stem}:run" for path in Path(ROOT, "vmctl/commands").glob("*.py")}
    devices = {f"{module}:main" for module in modules() if module.startswith("vmd.devices.")}  # `kinds` makes the names
    unused = {
        f"{module}:{name}"
        for module, tree in modules().items()
        for name in defined(tree)
        if name not in used().names[module] and not name.startswith("__")
    }

    left = unused - set(UNUSED) - commands - devices

    assert left == set(), f"nothing uses {sorted(left)}"
    assert set(UNUSED) - unused == set(), f"{sorted(set(UNUSED) - unused)} are used, so UNUSED must not have them"


def test_every_method_is_called() -> None:
    """Methods are compared by name only, because the object's class is unknown."""
    known = used().attributes.union(*used().names.values())
    uncalled = {
        f"{module}:{each.name}.{method.name}"
        for module, tree in modules().items()
        for each in tree.body
        if module not in CALLED_FROM_OUTSIDE and isinstance(each, ast.ClassDef)
        for method in each.body
        if isinstance(method, ast.FunctionDef) and method.name not in known and not method.name.startswith("__")
    }

    assert uncalled == set(), f"nothing calls {sorted(uncalled)}"


# Fields of records that are copied or printed as a whole.
READ_AS_A_WHOLE = {
    "vmd.vm.boot.elf:Segment.align", "vmd.vm.boot.elf:Section.addralign", "vmd.vm.boot.elf:Section.entsize",
    "vmd.kvmapi.exits:Unknown.hardware",
}  # fmt: skip


def fields(tree: ast.ClassDef) -> Iterator[str]:
    """Yield the fields that a class declares, and those that its methods set."""
    for node in ast.walk(tree):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)) if node in tree.body:
                yield name
            case ast.Attribute(attr=name, value=ast.Name(id="self"), ctx=ast.Store()):
                yield name


def test_every_field_is_read() -> None:
    """Fields are compared by name only, as methods are."""
    known = used().attributes.union(*used().names.values())
    unread = {
        f"{module}:{each.name}.{name}"
        for module, tree in modules().items()
        for each in tree.body
        if module != "vmd.kvmapi.abi" and isinstance(each, ast.ClassDef)
        for name in fields(each)
        if name not in known and not name.startswith("__")
    }

    assert unread - READ_AS_A_WHOLE == set(), f"nothing reads {sorted(unread - READ_AS_A_WHOLE)}"
