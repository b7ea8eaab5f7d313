"""A fact stands in one place: constants that two modules define, and names that no module uses."""

import ast
import functools
import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Constants that have one name and one value in two modules, and yet are not one fact.
OWN_CHOICES = {
    "TYPE_CHECKING": "type checkers know it by its name, and `typing` is slow to import",
    "VERSION": "each format and protocol has its own",
    "NONE": "of a descriptor, or of a user",
    "MAGIC": "the state and a stream begin alike, and neither is ever where the other one is looked for",
    **dict.fromkeys(("FAILED", "HOST", "RUNNING", "STOPPED", "SWITCH"), "a word of several lists of words"),
    **dict.fromkeys(("RESUMING", "SUSPENDING"), "RFC 7666 counts states and notifications in two ways"),
    "DIRECT": "each file system has its own",
    "FD_ANSWER": "each program of one question has its own descriptors",
    "OF_IMAGE": "each question has its own words",
    **dict.fromkeys(("NOTES_MAX", "PINGS_MAX", "STUCK_MAX"), "how much one process bears from another one"),
    **dict.fromkeys(("AT_A_TIME", "BATCH"), "how much a process does before others have their turn"),
    **dict.fromkeys(("ANSWER_MAX", "PIECE", "PIECE_BYTES", "READ_MAX"), "how much is read at a time"),
    **dict.fromkeys(
        (
            "AGAIN_S", "ANSWER_S", "END_S", "FRESH_S", "LAST_WORDS_S", "LOOK_S", "PING_S", "RESERVE_DELAY_S",
            "RETRY_S", "SAY_AGAIN_S", "SAY_S", "WAIT_MAX_S",
        ),
        "how long one process waits for another one, or for itself",
    ),
}  # fmt: skip

BOOT_SECTOR = ("SIGNATURE_AT", "SIGNATURE", "CODE_BYTES")

# Facts that stand in two places because no process may hold both modules.
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


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return every module of the two programs."""
    paths = sorted([*Path(ROOT, "vmd").rglob("*.py"), *Path(ROOT, "vmctl").rglob("*.py")])
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}


def constants(tree: ast.Module) -> Iterator[tuple[str, object]]:
    """Yield the module's constants whose values are written out: numbers, texts, bytes, and tuples of them."""
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
    """Return what `module:NAME` is."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def test_a_constant_has_one_home() -> None:
    """Who changes one of two would have to know of the other."""
    homes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, tree in modules().items():
        for name, value in constants(tree):
            homes[name, repr(value)].append(f"{module}:{name}")
    copies = {place for pair in COPIES for place in pair}
    several = [
        f"{name} = {value} stands in {', '.join(places)}: let one module define it and the others import it"
        for (name, value), places in homes.items()
        if len(places) > 1 and name not in OWN_CHOICES and not set(places) <= copies
    ]

    assert several == []


@pytest.mark.parametrize(("one", "other"), COPIES)
def test_copies_of_a_constant_agree(one: str, other: str) -> None:
    """As long as they have to be two."""
    assert value_of(one) == value_of(other), f"{one} is {value_of(one)!r}, and {other} {value_of(other)!r}"
