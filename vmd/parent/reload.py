"""Effects of a new configuration on the known VMs (*cat. 2.8*).

A running VM continues.  Most changes of its configuration take effect at its next start.  Limits, forwards and the
fields in `AT_ONCE`, which do not concern the guest, take effect at once.  A running VM that the file no longer names is
forgotten when it stops.
"""

from vmd.config.model import VmConfig, with_limits
from vmd.parent.vm import Vm
from vmd.parent.vmtable import VmTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


WORDS = {"nics": "interfaces"}  # names for users of fields that have another one in vm.conf
AT_ONCE = ("console_log",)  # fields that take effect at once for a running VM


def register(table: VmTable, vms: "Sequence[VmConfig]") -> list[str]:
    """Add VMs.  A VM whose name is already known is skipped (*cat. 2.5*); returns a note for each of those."""
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
    """Add a VM of the configuration.  It is started if it is enabled."""
    vm = table.add(config, from_config=True)
    if config.enabled:
        vm.enqueue()


def replace_all(
    table: VmTable, vms: "Sequence[VmConfig]", at_once: "Callable[[Vm, VmConfig], list[str]]"
) -> list[str]:
    """Replace the VMs in the table by those of the new configuration.  Returns notes for the operator.

    `at_once` makes the changes of a running VM that take effect at once, and returns notes about them.
    """
    notes: list[str] = []
    # Reversed, so that of two VMs with one name the first counts.
    wanted = {config.name: table.with_all_lladdrs(config) for config in reversed(vms)}
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
    """Keep a running VM; its new configuration takes effect at its next start.  Returns notes for the operator."""
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
    """Return whether a running VM is the one of the configuration: a user may have made an instance of that name."""
    return vm.config.owner == config.owner


def differences(old: VmConfig, new: VmConfig) -> list[str]:
    """Return the names of the changed fields that take effect at the next start.

    Limits are ignored, because they take effect at once.  So is an automatic address of an interface.
    """
    old = with_limits(old, new)
    unnamed = tuple(
        theirs.replace(lladdr=b"") if not ours.lladdr else theirs
        for theirs, ours in zip(old.nics, new.nics, strict=False)
    )
    if len(unnamed) == len(new.nics) == len(old.nics):
        old = old.replace(nics=unnamed)
    # `drive` and `rights` change together with fields that are listed, such as `cdrom`.
    ignored = ("origin", "given", "drive", "rights")
    return [
        WORDS.get(field, field.removesuffix("_bytes"))
        for field in VmConfig.fields
        if field not in ignored and getattr(old, field) != getattr(new, field)
    ]
