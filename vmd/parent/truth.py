"""The parent's state in a form that outlives the parent, for the next parent, of this version or another.

The state is in a memory file (`statemem`), which the service manager keeps.  After each message that changes something
it is written, before the next message is handled: seldom the whole state, usually only the changes since.  What vmm
knows better comes from vmm (`vmd.ipc.messages.vmm.VmHeld`): which VMs run or are paused, and all descriptors.
"""

from vmd.config.model import Config, NicConfig, VmConfig
from vmd.errors import VmdError
from vmd.ipc.imsg import pack, unpack
from vmd.ipc.messages.figures import LifeEnd
from vmd.ipc.messages.priv import AdoptNics
from vmd.ipc.messages.shared import DiskImages
from vmd.ipc.messages.vm import NicLink
from vmd.log import log
from vmd.parent import identity
from vmd.parent.addresses import Plan
from vmd.parent.plans import Taps
from vmd.parent.statemem import StateMemory
from vmd.parent.vm import State, Vm
from vmd.record import Part, Record
from vmd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vmd.parent.core import Core


class FileKnown(Record):
    """Which file an image or a disc of a VM is."""

    what: str  # a key of `Files`
    device: int
    inode: int


class Lack(Record):
    """A problem of an interface."""

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
    """The part of a VM's `Sending` or `Receiving` that the next parent needs."""

    carried: bool = False  # of both
    paused: bool = False  # of Receiving
    locks_travel: bool = False  # of Sending


class VmKnown(Part):
    """A VM (`Vm`)."""

    vmid: int
    name: str  # `name` and `owner` are the key of its identity; `config` may have others by now
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
    """The whole state.  Long parts are packed separately, so that they are not packed again for each write."""

    program: str
    config: bytes
    verbosity: int = 0
    identities: bytes = b""
    vms: tuple[bytes, ...] = ()
    left: tuple[AdoptNics, ...] = ()
    generations: tuple[GenerationKnown, ...] = ()
    planned: bool = False  # the parent was told to hand over; False: it has crashed
    vmids: tuple[int, ...] = ()  # of `vms`


class VmChange(Record):
    """The new state of one VM, which replaces the one before."""

    vmid: int
    vm: bytes = b""  # a packed VmKnown; "": the VM is forgotten
    left: AdoptNics | None = None


class Change(Part):
    """The changes since the previous Truth or Change.  Short fields are always present."""

    vms: tuple[VmChange, ...] = ()
    config: bytes = b""  # "": unchanged
    identities: bytes = b""  # "": unchanged; otherwise of `Identities.encode_touched`
    verbosity: int = 0
    generations: tuple[GenerationKnown, ...] = ()


SAME = (
    "from_config", "since_s", "started_s", "starts", "guest_resets", "last_end", "uid", "shown_before", "notes", "text",
    "code", "next_config", "resetting", "successor", "disks", "running_config", "console_user", "once_because",
    "going_back",
)  # fmt: skip - attributes of a Vm that VmKnown has under the same name


def vm_known(vm: Vm, generation: int, taps: Taps | None) -> VmKnown:
    """Return the record of a VM."""
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
    """Return the record of a VM that is sent or received; None for another VM."""
    if vm.sending is not None:
        return Transfer(carried=vm.sending.carried, locks_travel=vm.sending.locks_travel)
    if vm.receiving is not None:
        return Transfer(carried=vm.receiving.carried, paused=vm.receiving.paused)
    return None


def vm_of(known: VmKnown) -> Vm:
    """Return a VM from its record.  Raises ValueError."""
    vm = Vm(known.vmid, known.config, from_config=known.from_config)
    vm.key = known.name, known.owner
    for field in SAME:
        setattr(vm, field, getattr(known, field))
    vm.files = {each.what: (each.device, each.inode) for each in known.files}
    vm.restore_state(State(known.state))
    return vm


def taps_known(taps: Taps) -> TapsKnown:
    """Return the record of a VM's interfaces."""
    lacking = tuple(Lack(index=index, text=text) for index, text in taps.lacking.items())
    return TapsKnown(nics=taps.nics, plan=taps.plan, lacking=lacking, links=taps.links, known=taps.known)


def taps_of(known: TapsKnown, fds: list[int]) -> Taps:
    """Return a VM's interfaces from their record and descriptors.  The result owns the descriptors."""
    lacking = {lack.index: lack.text for lack in known.lacking}
    return Taps(known.nics, known.plan, lacking, known.links, fds, known.known)


def read(memory: StateMemory) -> Truth:
    """Return the state of an earlier parent.  Raises VmdError."""
    try:
        found = memory.read()
        if not found:
            raise VmdError("the state of the vmd before this one is empty, or damaged")
        return folded(unpack(Truth, found[0]), [unpack(Change, each) for each in found[1:]])
    except (OSError, ValueError) as error:
        raise VmdError(f"the state of the vmd before this one cannot be used: {error}") from error


def folded(truth: Truth, changes: "list[Change]") -> Truth:
    """Return the state after these changes.  Raises ValueError."""
    if not changes:
        return truth
    vms = dict(zip(truth.vmids, truth.vms, strict=True))
    left = {known.vmid: known for known in truth.left}
    for change in changes:
        for each in change.vms:
            vms[each.vmid] = each.vm
            left.pop(each.vmid, None)
            if each.left is not None:
                left[each.vmid] = each.left
    there = {vmid: vms[vmid] for vmid in sorted(vms) if vms[vmid]}
    identities = [change.identities for change in changes if change.identities]
    return truth.replace(
        config=next((change.config for change in reversed(changes) if change.config), truth.config),
        verbosity=changes[-1].verbosity,
        identities=identity.folded(truth.identities, identities) if identities else truth.identities,
        vms=tuple(there.values()),
        vmids=tuple(there),
        left=tuple(left.values()),
        generations=changes[-1].generations,
    )


def config_of(truth: Truth) -> Config:
    """Return the configuration in a state.  Raises VmdError."""
    try:
        return unpack(Config, truth.config)
    except ValueError as error:
        raise VmdError(f"the configuration of the vmd before this one cannot be used: {error}") from error


def vms_of(truth: Truth) -> list[VmKnown]:
    """Return the VMs in a state.  A VM that cannot be read is logged and left out."""
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
    """Writes the state: usually only the changes, and the whole when the memory file wants that."""

    def __init__(
        self, memory: StateMemory, core: "Core", untold: "Callable[[], Mapping[int, VmKnown]]" = dict
    ) -> None:
        """`untold` returns the earlier parent's records of VMs that no vmm has reported to this parent yet, by id."""
        self.memory = memory
        self.core = core
        self.untold = untold
        self.failed = False
        self.planned = False
        self._config: tuple[Config, bytes] | None = None  # the last one written, and its packed form
        self._vms: dict[Vm, tuple[int, int, Taps | None, bytes]] = {}  # packed records, and what they were made from

    def write(
        self,
        taps: "Mapping[int, Taps]",
        left: "Mapping[int, AdoptNics]",
        generations: "Iterable[GenerationKnown]",
        generation_of: "Callable[[int], int]",
        *,
        plain: bool = False,
    ) -> None:
        """Write the state; `generation_of` returns the generation of a VM, 0 if it has no process.

        `plain`: in the form that every version reads, which is the whole state without changes behind it.
        """
        core, identities = self.core, self.core.vms.identities
        config = self._config
        if config is None or config[0] is not core.config:
            config = core.config, pack(core.config)

        untold = self.untold()

        def packed(vm: Vm) -> bytes:
            generation, known = generation_of(vm.vmid), untold.get(vm.vmid)
            if known is None:
                return self._vm(vm, generation, taps.get(vm.vmid))
            # vmm has not handed these over yet.  The next parent needs the earlier parent's records of them.
            now = vm_known(vm, generation, None)
            return pack(now.replace(taps=known.taps, kept=known.kept, transfer=known.transfer))

        try:
            if plain or self.planned or not self.memory.takes_changes:
                vms = {vm: packed(vm) for vm in core.vms}
                self._vms = {vm: self._vms[vm] for vm in vms if vm in self._vms}
                truth = Truth(
                    program=VERSION,
                    config=config[1],
                    verbosity=core.verbosity,
                    identities=identities.encode(),
                    vms=tuple(vms.values()),
                    left=tuple(left.values()),
                    generations=tuple(generations),
                    planned=self.planned,
                    vmids=tuple(vm.vmid for vm in vms),
                )
                self.memory.write(pack(truth), followed=not (plain or self.planned))
            else:
                change = Change(
                    vms=tuple(self._change(vmid, packed, left.get(vmid)) for vmid in sorted(core.touched)),
                    config=b"" if config is self._config else config[1],
                    verbosity=core.verbosity,
                    identities=identities.encode_touched() if identities.touched else b"",
                    generations=tuple(generations),
                )
                self.memory.add(pack(change))
        except OSError as error:
            if not self.failed:
                log.error(f"the state for the next vmd cannot be written: {error.strerror}: the next vmd lacks changes")
            self.failed = True
            return
        self._config = config
        core.touched.clear()
        identities.touched.clear()
        self.failed = False

    def _change(self, vmid: int, packed: "Callable[[Vm], bytes]", left: AdoptNics | None) -> VmChange:
        vm = self.core.vms.find(vmid, "")
        return VmChange(vmid=vmid, vm=b"" if vm is None else packed(vm), left=left)

    def _vm(self, vm: Vm, generation: int, taps: Taps | None) -> bytes:
        """Return the packed record of a VM.  It is packed again only after a change."""
        state = vm.changes, generation, taps
        before = self._vms.get(vm)
        if before is None or before[:2] != state[:2] or before[2] is not taps:
            self._vms[vm] = before = (*state, pack(vm_known(vm, generation, taps)))
        return before[3]
