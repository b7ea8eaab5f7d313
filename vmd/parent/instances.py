"""Instances: VMs that are made from a template VM, within the limits that vm.conf sets for it (*cat. 2.6*)."""

import errno
from itertools import zip_longest

from vmd.config.model import AllowInstance, NicConfig, Owner, Rights, VmConfig, VmFlag, VmLimits
from vmd.errors import VMD_PARENT_INVALID, OperatorError
from vmd.ipc.messages.clients import Caller
from vmd.nearest import meant
from vmd.parent.access import may_control, rights_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vmd.config.model import SeedConfig
    from vmd.parent.vm import Vm
    from vmd.record import Record

# The aspects that a user may set for an instance, with the word for refusals.  Each needs its flag in `allow instance`.
ASPECTS = (
    (VmFlag.CPU, "cpus"),
    (VmFlag.MEMORY, "memory"),
    (VmFlag.DISK, "disks"),
    (VmFlag.NETWORK, "interfaces"),
    (VmFlag.KERNEL, "boot image"),
    (VmFlag.CDROM, "cdrom"),
    (VmFlag.SEED, "seed"),
)
NOBODY = AllowInstance()


def derive(template: VmConfig, wanted: VmConfig, caller: Caller | None) -> VmConfig:
    """Return an instance's configuration: the caller's values where given, the template's elsewhere.

    `caller` is None for an instance in vm.conf, which may set everything.  Unlike vmd, an inherited interface gets an
    address and a tap of its own, because otherwise instance and template could not run at the same time.

    An inherited file is opened with the rights of the user who has named it.  So a template's disc need not be readable
    for the user of an instance.  And a file that a user has given to an instance is opened with their rights also in an
    instance of that instance.

    Raises:
        OperatorError: EPERM with what the caller may not set; EBUSY for a disk, tap or address of the template.
    """
    if caller is not None and caller.uid != 0:
        require_permission(template, wanted, caller)
    require_own(template, wanted)
    given, rights = wanted.given, rights_of(caller)
    inherited = {} if VmFlag.CPU in given else {"vcpus": template.vcpus}
    if VmFlag.MEMORY not in given:
        inherited["memory_bytes"] = template.memory_bytes
    bounded = limited(template, wanted, own=caller is None or caller.uid == 0)
    boot: dict[str, object] = {}
    if VmFlag.KERNEL not in given:
        boot = {name: getattr(template, name) for name in ("kernel", "initrd", "cmdline")}
    return wanted.replace(
        **inherited,
        **boot,
        parent=template.name,
        boot_device=wanted.boot_device or template.boot_device,
        disks=bounded.disks,
        nics=(*bounded.nics, *map(fresh, template.nics[len(wanted.nics) :])),
        cdrom=wanted.cdrom if VmFlag.CDROM in given else template.cdrom,
        owner=owner_of(template, wanted, caller),
        allow=allowance(template, wanted),
        virtio=wanted.virtio or template.virtio,
        sev=wanted.sev or template.sev,
        sev_es=wanted.sev_es or template.sev_es,
        fault=wanted.fault or template.fault,
        console_log=wanted.console_log or template.console_log,
        limit=bounded.limit,
        seed=wanted.seed if VmFlag.SEED in given else of_its_own(template.seed),
        rights=Rights(
            boot=rights if VmFlag.KERNEL in given else template.rights.boot,
            disks=rights,
            cdrom=rights if VmFlag.CDROM in given else template.rights.cdrom,
            seed=rights if VmFlag.SEED in given else template.rights.seed,
        ),
    )


def of_its_own(seed: "SeedConfig | None") -> "SeedConfig | None":
    """Return the seed that an instance inherits, without host name and instance id: the instance has its own."""
    return seed and seed.replace(hostname="", instance_id="")


def limited(template: VmConfig, wanted: VmConfig, *, own: bool) -> VmConfig:
    """Return an instance with the limits of the template; each device gets those of the template's device.

    With `own` a limit that was given for the instance itself has precedence.
    """

    def first(ours: "Record", theirs: "Record | None", *names: str) -> dict[str, int]:
        return {
            name: (own and getattr(ours, name)) or (getattr(theirs, name) if theirs is not None else 0)
            for name in names
        }

    disks = zip_longest(wanted.disks, template.disks[: len(wanted.disks)])
    nics = zip_longest(wanted.nics, template.nics[: len(wanted.nics)])
    return wanted.replace(
        limit=VmLimits(**first(wanted.limit, template.limit, *VmLimits.fields)),
        disks=tuple(disk.replace(**first(disk, other, "iops_limit", "rate_limit")) for disk, other in disks),
        nics=tuple(nic.replace(**first(nic, other, "rate_limit")) for nic, other in nics),
    )


def resolve(
    vms: "Iterable[VmConfig]", known: "Callable[[str], VmConfig | None]"
) -> tuple[list[VmConfig], list[str]]:
    """Return the VMs of a configuration, in the order of the file, with the inherited values of instances.

    A template is looked for among these VMs first, then among the `known` ones.  An invalid instance is left out; the
    second list has a sentence for each of those.
    """
    by_name: dict[str, VmConfig] = {}
    for vm in vms:
        by_name.setdefault(vm.name, vm)
    found, problems = [], []
    for vm in vms:
        try:
            found.append(_resolved(vm, by_name, known, ()))
        except OperatorError as error:
            problems.append(f"{vm.origin}: {error}")
    return found, problems


def _resolved(
    vm: VmConfig, by_name: "Mapping[str, VmConfig]", known: "Callable[[str], VmConfig | None]", above: tuple[str, ...]
) -> VmConfig:
    if not vm.parent:
        return vm
    if vm.name in above:
        raise OperatorError(errno.ELOOP, f"vm {vm.name} is an instance of itself")
    template = known(vm.parent)
    if vm.parent in by_name:
        template = _resolved(by_name[vm.parent], by_name, known, (*above, vm.name))
    if template is None:
        what = f"vm {vm.name}: template {vm.parent} not found{meant(vm.parent, by_name)}"
        raise OperatorError(VMD_PARENT_INVALID, what)
    return derive(template, vm, None)


def require_permission(template: VmConfig, wanted: VmConfig, caller: Caller) -> None:
    """Raise OperatorError(EPERM) unless a user may make such an instance."""
    allow = template.allow or NOBODY
    if allow.owner is None or not may_control(caller, allow.owner.uid, allow.owner.gid):
        raise OperatorError(
            errno.EPERM,
            f"uid {caller.uid} has no permission to create instances of vm {template.name}: "
            "`allow instance { owner ... }` in its vm block gives it",
        )
    for flag, what in ASPECTS:
        if flag in wanted.given and flag not in allow.flags:
            raise OperatorError(errno.EPERM, f'vm "{wanted.name}": no permission to set {what}')
    if wanted.allow is not None:
        raise OperatorError(errno.EPERM, f'vm "{wanted.name}": cannot change instance permissions')


def require_own(template: VmConfig, wanted: VmConfig) -> None:
    """Raise OperatorError(EBUSY) if an instance wants a disk, tap or address of its template."""
    paths = {disk.path for disk in template.disks}
    taken = [f"disk {disk.path}" for disk in wanted.disks if disk.path in paths]
    for what in taken + both_have(wanted.nics, template.nics):
        raise OperatorError(errno.EBUSY, f"vm {wanted.name}: {what} of vm {template.name} cannot be reused")


def require_free(vms: "Iterable[Vm]", wanted: VmConfig) -> None:
    """Raise OperatorError(EBUSY) if a user wants a tap or an address of any other VM, even of one that does not run.

    The operator may configure two VMs that cannot run at the same time.  A user must not take a name from another VM.
    """
    for vm in vms:
        for what in both_have(wanted.nics, vm.nics()):
            raise OperatorError(errno.EBUSY, f"vm {wanted.name}: {what} is that of another vm")


def both_have(ours: "Iterable[NicConfig]", theirs: "Iterable[NicConfig]") -> list[str]:
    """Return, in words, the taps and addresses that two lists of interfaces have in common."""
    others = list(theirs)
    taps = {nic.tap for nic in others} - {"", "tap"}
    lladdrs = {nic.lladdr for nic in others} - {b""}
    found = []
    for nic in ours:
        found += [f"interface {nic.tap}"] * (nic.tap in taps)
        found += [f"lladdr {nic.lladdr.hex(':')}"] * (nic.lladdr in lladdrs)
    return found


def fresh(nic: NicConfig) -> NicConfig:
    """Return an inherited interface: its tap and addresses become automatic, and it has no forwards."""
    return nic.replace(tap="", lladdr=b"", address=None, forwards=(), host_name="")


def owner_of(template: VmConfig, wanted: VmConfig, caller: Caller | None) -> Owner:
    """Return the owner of an instance: the caller, or else the owner in its configuration, or else the template's."""
    if caller is not None and caller.uid != 0:
        return Owner(uid=caller.uid, gid=template.owner.gid)
    return wanted.owner if wanted.owner != Owner() else template.owner


def allowance(template: VmConfig, wanted: VmConfig) -> AllowInstance | None:
    """Return who may make instances of the instance.  That is inherited only if the template allows it."""
    if wanted.allow is not None:
        return wanted.allow
    if template.allow is not None and VmFlag.INSTANCE in template.allow.flags:
        return template.allow
    return None
