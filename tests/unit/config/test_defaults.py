"""Defaults in the manuals and in the example are those of the code."""

import re
from pathlib import Path

import pytest

from tests.support.manual import plain
from vmctl.commands.ssh import PORT, WAIT_S
from vmctl.table import COMMANDS
from vmd.config import rules, values
from vmd.config.model import (
    DEFAULT_FIRST_ID,
    DEFAULT_WEIGHT,
    IDS,
    PAIR,
    AgentxConfig,
    ConsoleLog,
    Globals,
    NicConfig,
    SwitchConfig,
    VmConfig,
)
from vmd.ipc.messages.shared import Live
from vmd.scaled import fmt_scaled
from vmd.units import MIB

ROOT = Path(__file__).resolve().parents[3]
CONF, VMD, VMCTL = "man/vm.conf.5", "man/vmd.8", "man/vmctl.8"
MACROS = {"Ic", "Pa", "Pq", "No", "Xo"}  # macros in heads of items, which tests.support.manual does not remove
NUMBERS = ("none", "one", "two")

GLOBALS, VM, NIC, LIVE, LOG = Globals(), VmConfig(name="a"), NicConfig(), Live(), ConsoleLog(path="")
SWITCH = SwitchConfig(name="a", interface="a")
PREFIX = f"{'.'.join(map(str, GLOBALS.local_prefix.address))}/{GLOBALS.local_prefix.length}"

# For an item of a manual, named by the beginning of its head: words in its sentences about the default.
DEFAULTS = (
    (CONF, "agentx", AgentxConfig().path),
    (CONF, "ids", str(GLOBALS.first_id)),
    (CONF, "limit vms", str(GLOBALS.limit_vms)),
    (CONF, "limit vms", f"{GLOBALS.limit_vcpus} processors"),
    (CONF, "local inet6", str(values.LOCAL_PREFIX6_BITS)),
    (CONF, "local nat", "enable" if GLOBALS.local_nat else "disable"),
    (CONF, "local prefix", PREFIX),
    (CONF, "local prefix", str(rules.LOCAL_PREFIX_BITS)),
    (CONF, "socket owner", str(GLOBALS.socket_owner.gid)),
    (CONF, "staggered start", f"{GLOBALS.start_delay_s} seconds"),
    (CONF, "console log", fmt_scaled(LOG.size_bytes).replace(".0", "")),
    (CONF, "console log", str(LOG.keep)),
    (CONF, "address", str(PAIR)),
    (CONF, "weight", str(DEFAULT_WEIGHT)),
    (CONF, "memory", f"{VM.memory_bytes // MIB} MiB"),
    (CONF, "vcpus", NUMBERS[VM.vcpus]),
    (CONF, "virtio", VM.virtio.name.lower()),
    (CONF, "owner", "root" if VM.owner.uid == 0 and VM.owner.gid is None else "nobody"),
    (VMD, "priv", str(DEFAULT_FIRST_ID + IDS)),
    (VMD, "vmm", str(DEFAULT_FIRST_ID)),
    (VMCTL, "-d ms", str(LIVE.still_ms)),
    (VMCTL, "-r rounds", str(LIVE.rounds)),
    (VMCTL, "-p port", str(PORT)),
    (VMCTL, "-w seconds", str(WAIT_S)),
    (VMCTL, "-m size", f"{VM.memory_bytes // MIB} MB"),
    (VMCTL, "-p vcpus", NUMBERS[VM.vcpus]),
)

# Items of vm.conf(5) whose default is a rule instead of a value, or the state that the keyword turns on.
RULES = (
    "local dns", "boot device", "disk", "enable", "local interface", "forward", "hostname", "locked lladdr", "up",
    "instance-id", "network-config", "user", "/etc/vm.conf",
)  # fmt: skip


def items(page: str) -> list[tuple[str, str]]:
    """Return the head of each item of a manual page, with its sentences that contain the word default."""
    found = []
    for part in re.split(r"^(?=\.(?:It|Sh|Ss|El)\b)", (ROOT / page).read_text(), flags=re.MULTILINE):
        head, _, rest = part.partition("\n")
        if head.startswith(".It "):
            text = " ".join(re.sub(r"^\.\w\w (?:\w\w (?=\S))?", "", rest, flags=re.MULTILINE).split())
            sentences = [each for each in re.split(r"(?<=[.:;])\s", text) if re.search(r"\bdefault\b", each)]
            words = re.sub(r"[][]", "", plain(head.removeprefix(".It"))).split()
            found.append((" ".join(word for word in words if word not in MACROS), " ".join(sentences)))
    return found


@pytest.mark.parametrize(("page", "head", "words"), DEFAULTS)
def test_a_default_of_the_code_is_that_of_the_manual(page: str, head: str, words: str) -> None:
    """A change of one needs the same change of the other."""
    said = [sentences for name, sentences in items(page) if name.startswith(head) and sentences]

    assert any(re.search(rf"(?<![\w/]){re.escape(words)}(?!\w)", each) for each in said), (
        f"the default of the code is {words!r}, but {page} has at {head!r}: {said}"
    )


@pytest.mark.parametrize(("head", "on"), [("enable", VM.enabled and SWITCH.enabled), ("up", NIC.up and SWITCH.up)])
def test_a_keyword_that_turns_on_the_default(head: str, on: bool) -> None:
    """The manual calls it the default both in a VM or interface and in a switch."""
    said = [sentences for name, sentences in items(CONF) if name == head]

    assert [bool(each) for each in said] == [on] * 2, f"code and {CONF} differ on whether {head!r} is the default"


def test_every_default_of_vm_conf_is_compared() -> None:
    """A new default needs a row in DEFAULTS, or an entry in RULES."""
    known = (*RULES, *(head for page, head, _ in DEFAULTS if page == CONF))
    left = {name: said for name, said in items(CONF) if said and name and not name.startswith(known)}

    assert left == {}, f"{CONF} has defaults that test_defaults.py does not compare"


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("ids", str(GLOBALS.first_id)),
        ("limit vms", str(GLOBALS.limit_vms)),
        ("limit vcpus", str(GLOBALS.limit_vcpus)),
    ],
)
def test_a_default_of_the_example(statement: str, value: str) -> None:
    """It is in the comment behind the statement."""
    found = re.findall(rf"^{statement} \S+ +# default: (.*)$", (ROOT / "vm.conf.example").read_text(), re.MULTILINE)

    assert found == [value], f"vm.conf.example does not say that {value} is the default of {statement!r}"


def test_help_says_the_defaults_of_a_live_send() -> None:
    """The help of send and the help of migrate have them."""
    helps = [option.help for command in COMMANDS for option in command.options if option.value in ("ms", "rounds")]

    assert len(helps) == 4
    assert all(text.endswith((f"({LIVE.still_ms})", f"({LIVE.rounds})")) for text in helps), helps
