"""What a configuration that is read anew means for the VMs there are (*cat. 2.8*).

A VM that runs is not touched.  If the file says something else of it now, that waits for its next start, but for what
is not the guest's (`AT_ONCE`), its limits and its forwards.  If the file no longer names it, it is forgotten when it
stops.
"""

from vmd.config.model import VmConfig, with_limits
from vmd.parent.vmtable import Vm, VmTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


WORDS = {"nics": "interfaces"}  # of fields that vm.conf calls otherwise
AT_ONCE = ("console_log",)  # fields that count for a VM that runs, too


def register(table: VmTable, vms: "Sequence[VmConfig]") -> list[str]:
    """Add VMs; names already known are left alone (*cat. 2.5*).  Returns a note for each of those."""
    notes = []
    for config in vms:
        known = table.find(0, config.name)
        if known is not None and known.resetting and known.successor is None:
            known.successor = config
        elif known is not None:
            notes.append(f"{config.origin}: vm {config.name} skipped (already exists)")
        else:
            add(table, config)
    return notes


def add(table: VmTable, config: VmConfig) -> None:
    """Add a VM of the configuration, to be started if it is enabled."""
    vm = table.add(config, from_config=True)
    if config.enabled:
        vm.enqueue()


def replace_all(
    table: VmTable, vms: "Sequence[VmConfig]", at_once: "Callable[[Vm, VmConfig], list[str]]"
) -> list[str]:
    """Let the table hold what the configuration says now.  Returns what is worth telling the operator.

    `at_once` lets a VM that runs have what of a configuration does not wait, and returns what is worth telling of that.
    """
    notes: list[str] = []
    wanted = {config.name: table.named(config) for config in reversed(vms)}  # of two with one name the first counts
    for vm in list(table):
        config = wanted.get(vm.name)
        if vm.resetting:
            vm.successor = wanted.pop(vm.name, None)
        elif vm.alive:
            wanted.pop(vm.name, None)
            if vm.from_config or config is not None:
                notes += at_once(vm, config) if config is not None and is_its_own(vm, config) else []
                notes += keep(vm, config)
        elif vm.from_config or config is not None:
            table.remove(vm)
    for config in vms:
        if wanted.pop(config.name, None) is not None:
            add(table, config)
    return notes


def keep(vm: Vm, config: VmConfig | None) -> list[str]:
    """Let a VM that runs go on; what has changed comes later."""
    if config is None:
        vm.from_config, vm.next_config = False, None
        return [f"vm {vm.name} is no longer configured; it is forgotten when it stops"]
    vm.from_config = True
    if is_its_own(vm, config):
        vm.config = vm.config.replace(**{field: getattr(config, field) for field in AT_ONCE})
    changed = differences(vm.config, config)
    vm.next_config = config if changed else None
    if not changed:
        return []
    return [f"vm {vm.name}: {', '.join(changed)} changed; that waits for its next start"]


def is_its_own(vm: Vm, config: VmConfig) -> bool:
    """Return whether a VM that runs is that of whom the configuration names: a user may have taken the name before."""
    return vm.config.owner == config.owner


def differences(old: VmConfig, new: VmConfig) -> list[str]:
    """Return the names of what is not the same and waits for the next start.

    Limits do not wait, and an address that was found for an interface is none.
    """
    old = with_limits(old, new)
    unnamed = tuple(
        theirs.replace(lladdr=b"") if not ours.lladdr else theirs
        for theirs, ours in zip(old.nics, new.nics, strict=False)
    )
    if len(unnamed) == len(new.nics) == len(old.nics):
        old = old.replace(nics=unnamed)
    ignored = ("origin", "given", "drive", "rights")  # these two follow from the disc, or are told with it
    return [
        WORDS.get(field, field.removesuffix("_bytes"))
        for field in VmConfig.fields
        if field not in ignored and getattr(old, field) != getattr(new, field)
    ]
