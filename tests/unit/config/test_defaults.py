"""What the manuals and the example say of defaults is what the code does."""

import re
from pathlib import Path

import pytest

from vmctl.commands.ssh import WAIT_S
from vmctl.table import COMMANDS
from vmd.config import rules, values
from vmd.config.grammar import AGENTX_CONTEXT_MAX
from vmd.config.model import (
    DEFAULT_FIRST_ID,
    DEFAULT_WEIGHT,
    FIRST_IDS,
    FIXED_LENGTHS,
    IDS,
    MAX_INET6_PREFIX,
    MAX_LOG_BYTES,
    MAX_LOGS_KEPT,
    MAX_MEMORY_BYTES,
    MAX_VCPUS,
    MIN_LOG_BYTES,
    MIN_MEMORY_BYTES,
    PAIR,
    SOCKET_PATH_MAX,
    WEIGHTS,
    AgentxConfig,
    BootDevice,
    ConsoleLog,
    Globals,
    NicConfig,
    Owner,
    SwitchConfig,
    VirtioMode,
    VmConfig,
)
from vmd.ipc.messages.shared import Live
from vmd.scaled import fmt_scaled
from vmd.units import MIB

ROOT = Path(__file__).resolve().parents[3]
MANUAL, VMD, VMCTL, EXAMPLE = "man/vm.conf.5", "man/vmd.8", "man/vmctl.8", "vm.conf.example"
WORDS = ("none", "one", "two")

GLOBALS, VM, NIC, LIVE, LOG = Globals(), VmConfig(name="a"), NicConfig(), Live(), ConsoleLog(path="")
SWITCH = SwitchConfig(name="a", interface="a")

RANGE = f"{'.'.join(map(str, GLOBALS.local_prefix.address))}/{GLOBALS.local_prefix.length}"


def short(size: int) -> str:
    """Return a size as vm.conf has it."""
    return fmt_scaled(size).replace(".0", "")


def is_default(*values: bool) -> str:
    """Return what stands below a keyword that turns something on, if that is on without the keyword."""
    return "This is the default." if all(values) else "This is not the default."


# Of each document: what it says of a default, as the code has it.  Macros of mdoc(7) are left out.
SAID = (
    (MANUAL, f"of at most {SOCKET_PATH_MAX} bytes, by default {AgentxConfig().path} ,"),
    (MANUAL, f"of at most {AGENTX_CONTEXT_MAX} bytes, by default {AgentxConfig().context or 'the agent'}'s own."),
    (MANUAL, f"It is {FIRST_IDS[0]} to {FIRST_IDS[-1]}, by default {GLOBALS.first_id}."),
    (MANUAL, f"included, {GLOBALS.limit_vcpus} processors and {GLOBALS.limit_vms} virtual machines."),
    (MANUAL, f"is 0 to {MAX_INET6_PREFIX}, by default {values.LOCAL_PREFIX6_BITS}."),
    (MANUAL, f"The default is {'enable' if GLOBALS.local_nat else 'disable'} ."),
    (MANUAL, f"from this range, by default {RANGE}."),
    (MANUAL, f"is 1 to {rules.LOCAL_PREFIX_BITS}, by default {rules.LOCAL_PREFIX_BITS}."),
    (MANUAL, f"The default group is that with number {GLOBALS.socket_owner.gid}."),
    (MANUAL, f"The default is the number of processors that are online, and {GLOBALS.start_delay_s} seconds."),
    (MANUAL, f"(by default {short(LOG.size_bytes)}; from {short(MIN_LOG_BYTES)} to {short(MAX_LOG_BYTES)})"),
    (MANUAL, f"(by default {LOG.keep}; at most {MAX_LOGS_KEPT}), and with 0 none."),
    (MANUAL, f"from {FIXED_LENGTHS[0]} to {FIXED_LENGTHS[-1]}, by default {PAIR}."),
    (MANUAL, f"at least {MIN_MEMORY_BYTES // MIB} MiB and at most {MAX_MEMORY_BYTES >> 40} TiB, and by default"
             f" {VM.memory_bytes // MIB} MiB."),
    (MANUAL, f"from 1 to {MAX_VCPUS}, by default {WORDS[VM.vcpus]}."),
    (MANUAL, f"from {WEIGHTS[0]} to {WEIGHTS[-1]}; others have {DEFAULT_WEIGHT}"),
    (MANUAL, f"Start the virtual machine with the daemon. {is_default(VM.enabled)}"),
    (MANUAL, f"Use the block. {is_default(SWITCH.enabled)}"),
    (MANUAL, f"Bring the interface up. {is_default(NIC.up)}"),
    (MANUAL, f"Bring the bridge up. {is_default(SWITCH.up)}"),
    (VMD, f"by default number {DEFAULT_FIRST_ID + IDS},"),
    (VMD, f"says, by default from {DEFAULT_FIRST_ID} on."),
    (VMCTL, f"how many milliseconds the VM may stand still, by default {LIVE.still_ms}."),
    (VMCTL, f"however much is left, by default {LIVE.rounds}:"),
    (VMCTL, f"The default is {WAIT_S}; 0 tries once."),
    (VMCTL, f"The default is {VM.memory_bytes // MIB} MB."),
    (VMCTL, f"Have this many virtual CPUs, {MAX_VCPUS} at most. The default is {WORDS[VM.vcpus]}."),
    (EXAMPLE, f"ids 1879048192 # default: {GLOBALS.first_id}"),
    (EXAMPLE, f"limit vms 100 # default: {GLOBALS.limit_vms}"),
    (EXAMPLE, f"limit vcpus 200 # default: {GLOBALS.limit_vcpus}"),
    (EXAMPLE, f"local nat {'enable # the default' if GLOBALS.local_nat else 'disable # the default'}"),
)  # fmt: skip

# Defaults of the manual that are no constants: a rule, or the first item of an enumeration, which tests of what they do
# know.
TOLD = (
    ("By default they are told those of the host.", not GLOBALS.local_dns),
    ("The default is twice the memory of the host,", GLOBALS.limit_memory_bytes is None),
    ("the default firmware starts", not VM.kernel),
    ("by default it is /bsd", not VM.kernel),
    ("by default it tries the first disk, then the CD-ROM.", VM.boot_device is BootDevice.AUTO),
    ("the firmware goes on as by default.", True),
    ("By default it is made from the name and the owner", True),
    ("for the next one that is free, which is the default, or", not NIC.tap),
    ("tcp is the default.", True),
    ("is told by DHCP, by default that of its", not NIC.host_name),
    ("by default a random one that begins with fe:e1:bb", not NIC.lladdr),
    ("The default is root, without a group.", VM.owner == Owner(uid=0, gid=None)),
    ("or, by default, both.", VM.virtio is VirtioMode.TRANSITIONAL),
    ("by default the name of the virtual machine,", True),
    ("By default it follows from the name of the virtual machine,", True),
    ("By default each interface asks for an address by DHCP", True),
    ("default location", True),
    ("default ,", True),
)


def text_of(name: str) -> str:
    """Return a document as it is read, on one line."""
    text = (ROOT / name).read_text()
    if name != EXAMPLE:
        text = re.sub(r"^\.(?:Dv|Ic|Pa|Sq|Ar|Fl|Cm) ", "", text, flags=re.MULTILINE)
    return " ".join(text.split())


@pytest.mark.parametrize(("document", "said"), SAID)
def test_a_default_is_what_is_said(document: str, said: str) -> None:
    """Whoever changes one changes the other."""
    assert said in text_of(document), f"{document} does not say {said!r}, which is what the code does"


@pytest.mark.parametrize(("said", "so"), TOLD)
def test_a_default_that_is_a_rule(said: str, so: bool) -> None:
    """Nothing is set, so that the rule decides."""
    assert said in text_of(MANUAL), f"{MANUAL} does not say {said!r} any more"
    assert so, f"{MANUAL} says {said!r}, and the code has a value"


def test_every_default_of_the_manual_is_compared() -> None:
    """A new one has a row above."""
    text = text_of(MANUAL)
    for said in (*(said for document, said in SAID if document == MANUAL), *(said for said, _ in TOLD)):
        text = text.replace(said, "")
    left = [text[max(0, hit.start() - 60) : hit.end() + 40] for hit in re.finditer(r"\bdefault\b", text)]

    assert left == [], "test_defaults.py compares none of these with the code"


def test_help_says_the_defaults_of_a_live_send() -> None:
    """That of send and that of migrate."""
    helps = [option.help for command in COMMANDS for option in command.options if option.value in ("ms", "rounds")]

    assert len(helps) == 4
    assert all(text.endswith((f"({LIVE.still_ms})", f"({LIVE.rounds})")) for text in helps), helps
