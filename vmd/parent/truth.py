"""What the parent knows, in a form that outlives it: for a parent that takes its place, of this version or another.

It is in a memory file (`statemem`), which the service manager keeps, and is written whenever something has changed,
before the next message is looked at.  What vmm knows better is not in here, or does not count: which VMs run and which
are paused, and all descriptors (`vmd.ipc.messages.vmm.VmHeld`).
"""

from vmd.config.model import Config, NicConfig, VmConfig
from vmd.errors import VmdError
from vmd.ipc.imsg import pack, unpack
from vmd.ipc.messages.figures import LifeEnd
from vmd.ipc.messages.priv import AdoptNics
from vmd.ipc.messages.shared import DiskImages
from vmd.ipc.messages.vm import NicLink
from vmd.log import log
from vmd.parent.addresses import Plan
from vmd.parent.plans import Taps
from vmd.parent.statemem import StateMemory
from vmd.parent.vmtable import State, Vm
from vmd.record import Part, Record
from vmd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmd.parent.core import Core


class FileKnown(Record):
    """An image or a disc of a VM; which one it is."""

    what: str
    device: int
    inode: int


class Lack(Record):
    """What is wrong with an interface."""

    index: int
    text: str


class TapsKnown(Record):
    """The interfaces of a VM (`Taps`)."""

    nics: tuple[NicConfig, ...]
    plan: Plan
    lacking: tuple[Lack, ...]
    links: tuple[NicLink, ...]
    known: AdoptNics


class Transfer(Record):
    """That a VM is sent or received."""

    carried: bool = False  # it migrates
    paused: bool = False  # received: it is to be
    locks_travel: bool = False  # sent


class VmKnown(Part):
    """A VM (`Vm`)."""

    vmid: int
    name: str  # with `owner` whose id it is, whatever its configuration says by now
    owner: int
    config: VmConfig
    from_config: bool
    state: str
    since_s: float = 0.0
    started_s: float = 0.0
    starts: int = 0
    guest_resets: int = 0
    last_end: LifeEnd | None = None
    uid: int = 0
    shown_before: int = 0
    notes: tuple[str, ...] = ()
    text: str = ""
    code: int = 0
    next_config: VmConfig | None = None
    resetting: bool = False
    successor: VmConfig | None = None
    files: tuple[FileKnown, ...] = ()
    disks: tuple[DiskImages, ...] = ()
    running_config: VmConfig | None = None
    transfer: Transfer | None = None
    console_user: str = ""
    once_because: str = ""
    going_back: bool = False
    kept: tuple[str, ...] = ()
    generation: int = 0  # 0: it has no process
    taps: TapsKnown | None = None


class GenerationKnown(Record):
    """A vmm."""

    number: int
    version: str
    groups: str = ""  # the directory of its control groups
    limited: bool = False


class Truth(Part):
    """All of it.  What is long is packed by itself, and once for many writes."""

    program: str
    config: bytes
    verbosity: int = 0
    identities: bytes = b""
    vms: tuple[bytes, ...] = ()
    left: tuple[AdoptNics, ...] = ()
    generations: tuple[GenerationKnown, ...] = ()
    planned: bool = False  # the parent was told to end for another one


SAME = (
    "from_config", "since_s", "started_s", "starts", "guest_resets", "last_end", "uid", "shown_before", "notes", "text",
    "code", "next_config", "resetting", "successor", "disks", "running_config", "console_user", "once_because",
    "going_back",
)  # fmt: skip - of a Vm, as they are


def vm_known(vm: Vm, generation: int, taps: Taps | None) -> VmKnown:
    """Return a VM as it is now."""
    return VmKnown(
        vmid=vm.vmid,
        name=vm.key[0],
        owner=vm.key[1],
        config=vm.config,
        state=vm.state.value,
        files=tuple(FileKnown(what=what, device=key[0], inode=key[1]) for what, key in vm.files.items()),
        transfer=transfer_of(vm),
        kept=tuple(vm.kept),
        generation=generation,
        taps=taps_known(taps) if taps is not None else None,
        **{field: getattr(vm, field) for field in SAME},
    )


def transfer_of(vm: Vm) -> Transfer | None:
    """Return what is known of a VM that is sent or received."""
    if vm.sending is not None:
        return Transfer(carried=vm.sending.carried, locks_travel=vm.sending.locks_travel)
    if vm.receiving is not None:
        return Transfer(carried=vm.receiving.carried, paused=vm.receiving.paused)
    return None


def vm_of(known: VmKnown) -> Vm:
    """Return a VM as it was.  Raises ValueError."""
    vm = Vm(known.vmid, known.config, from_config=known.from_config)
    vm.key = known.name, known.owner
    for field in SAME:
        setattr(vm, field, getattr(known, field))
    vm.files = {each.what: (each.device, each.inode) for each in known.files}
    vm.be_in(State(known.state))
    return vm


def taps_known(taps: Taps) -> TapsKnown:
    """Return interfaces as they are now."""
    lacking = tuple(Lack(index=index, text=text) for index, text in taps.lacking.items())
    return TapsKnown(nics=taps.nics, plan=taps.plan, lacking=lacking, links=taps.links, known=taps.known)


def taps_of(known: TapsKnown, fds: list[int]) -> Taps:
    """Return interfaces as they were, with their descriptors, which are theirs from now on."""
    lacking = {lack.index: lack.text for lack in known.lacking}
    return Taps(known.nics, known.plan, lacking, known.links, fds, known.known)


def read(memory: StateMemory) -> Truth:
    """Return what an earlier parent knew.  Raises VmdError."""
    try:
        raw = memory.read()
        if raw is None:
            raise VmdError("the state of the vmd before this one is empty, or damaged")
        return unpack(Truth, raw)
    except (OSError, ValueError) as error:
        raise VmdError(f"the state of the vmd before this one cannot be used: {error}") from error


def config_of(truth: Truth) -> Config:
    """Return the configuration that was in force.  Raises VmdError."""
    try:
        return unpack(Config, truth.config)
    except ValueError as error:
        raise VmdError(f"the configuration of the vmd before this one cannot be used: {error}") from error


def vms_of(truth: Truth) -> list[VmKnown]:
    """Return the VMs; one that cannot be read is logged and left out."""
    found = []
    for raw in truth.vms:
        try:
            known = unpack(VmKnown, raw)
            State(known.state)
        except ValueError as error:
            log.error(f"a vm of the vmd before this one cannot be adopted: {error}")
            continue
        found.append(known)
    return found


class Writer:
    """Writes the truth, packing anew only what has changed."""

    def __init__(self, memory: StateMemory, core: "Core") -> None:
        self.memory = memory
        self.core = core
        self.failed = False
        self.planned = False
        self._config: tuple[Config, bytes] | None = None
        self._vms: dict[Vm, tuple[int, int, Taps | None, bytes]] = {}

    def write(
        self,
        taps: "Mapping[int, Taps]",
        left: "Iterable[AdoptNics]",
        generations: "Iterable[GenerationKnown]",
        generation_of: "Mapping[int, int]",
    ) -> None:
        """Write what is true now; `generation_of` has the number of the vmm of each VM that has a process."""
        core = self.core
        if self._config is None or self._config[0] is not core.config:
            self._config = core.config, pack(core.config)
        vms = {vm: self._vm(vm, generation_of.get(vm.vmid, 0), taps.get(vm.vmid)) for vm in core.vms}
        self._vms = vms
        truth = Truth(
            program=VERSION,
            config=self._config[1],
            verbosity=core.verbosity,
            identities=core.vms.identities.encode(),
            vms=tuple(packed for *_, packed in vms.values()),
            left=tuple(left),
            generations=tuple(generations),
            planned=self.planned,
        )
        try:
            self.memory.write(pack(truth))
        except OSError as error:
            if not self.failed:
                log.error(f"the state for the next vmd cannot be written: {error.strerror}: what changes is lost")
            self.failed = True
            return
        self.failed = False

    def _vm(self, vm: Vm, generation: int, taps: Taps | None) -> tuple[int, int, Taps | None, bytes]:
        before = self._vms.get(vm)
        if before is not None and before[:2] == (vm.changes, generation) and before[2] is taps:
            return before
        return vm.changes, generation, taps, pack(vm_known(vm, generation, taps))
