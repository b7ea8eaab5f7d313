"""All VMs that the daemon knows, by name and by id."""

import contextlib
import errno
from collections.abc import Iterator

from vmd.config.model import Prefix, VmConfig
from vmd.errors import InUse, OperatorError, PeerError
from vmd.parent.addresses import random_lladdr
from vmd.parent.identity import Identities
from vmd.parent.vm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def with_lladdrs(config: VmConfig, before: dict[int, bytes], now: dict[int, bytes]) -> VmConfig:
    """Return a VM with new link-layer addresses for the interfaces that had an automatic one.

    `before` and `now` have the automatic addresses by number of the interface.
    """
    nics = (
        nic.replace(lladdr=now[index]) if index in before and nic.lladdr == before[index] else nic
        for index, nic in enumerate(config.nics)
    )
    return config.replace(nics=tuple(nics))


class VmTable:
    """VMs by name and by id.  Ids and automatic link-layer addresses come from the identities."""

    def __init__(self, identities: Identities | None = None) -> None:
        self.identities = identities or Identities()
        self.on_change: Callable[[int], None] = lambda _vmid: None
        self.on_event: Callable[[Vm, str, str, str], None] = lambda _vm, _what, _text, _how: None
        self._by_name: dict[str, Vm] = {}
        self._by_id: dict[int, Vm] = {}
        self._sorted: tuple[Vm, ...] | None = None  # None: to be sorted anew
        self._lladdrs: set[bytes] | None = None  # addresses in use now or earlier; None: not collected yet

    def __iter__(self) -> Iterator[Vm]:
        """All VMs, by id."""
        if self._sorted is None:
            self._sorted = tuple(sorted(self._by_name.values(), key=lambda vm: vm.vmid))
        return iter(self._sorted)

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, config: VmConfig, *, from_config: bool) -> Vm:
        """Register a VM; OperatorError(EEXIST) if the name is taken."""
        if config.name in self._by_name:
            raise OperatorError(errno.EEXIST, f"vm {config.name} already exists")
        identity = self.identities.of((config.name, config.owner.uid))
        if from_config and not identity.configured:
            identity.configured = True
            self.identities.changed((config.name, config.owner.uid))
        config = self.with_all_lladdrs(config)
        vm = Vm(identity.vmid, config, from_config=from_config)
        self.take(vm)
        return vm

    def take(self, vm: Vm) -> None:
        """Add a complete Vm, such as one that an earlier parent has described."""
        self._by_name[vm.name] = vm
        self._sorted = None
        self._by_id.setdefault(vm.vmid, vm)
        if self._lladdrs is not None:
            self._lladdrs.update(nic.lladdr for nic in vm.config.nics)
        vm.on_change = self.changed
        vm.on_event = self.on_event
        self.changed(vm)

    def changed(self, vm: Vm) -> None:
        """A VM has changed, or has left the table."""
        self.on_change(vm.vmid)

    def with_all_lladdrs(self, config: VmConfig) -> VmConfig:
        """Return a VM whose interfaces all have link-layer addresses.

        An automatic address is unique, and the same each time.
        """
        if all(nic.lladdr for nic in config.nics):
            return config
        key = config.name, config.owner.uid
        ours = self.identities.of(key).lladdrs
        nics = []
        for index, nic in enumerate(config.nics):
            if not nic.lladdr:
                if index not in ours:
                    ours[index] = self._free_lladdr(index)
                    self.identities.changed(key)
                nic = nic.replace(lladdr=ours[index])
            nics.append(nic)
        return config.replace(nics=tuple(nics))

    def _free_lladdr(self, index: int) -> bytes:
        """Return an unused address for the interface of this number.  Raises OperatorError."""
        if self._lladdrs is not None:
            with contextlib.suppress(OperatorError):  # the set may have addresses that are unused by now
                lladdr = random_lladdr(index, self._lladdrs)
                self._lladdrs.add(lladdr)
                return lladdr
        # The set is collected once, not for each interface of a large configuration.
        self._lladdrs = {nic.lladdr for vm in self._by_name.values() for nic in vm.config.nics}
        self._lladdrs.update(self.identities.lladdrs())
        lladdr = random_lladdr(index, self._lladdrs)
        self._lladdrs.add(lladdr)
        return lladdr

    def adopt(self, vm: Vm, config: VmConfig, prefix4: Prefix) -> None:
        """A VM from another host runs here: its identity gets the addresses that its guest knows, if free.

        `config` is the VM's configuration now; `prefix4` is the range of this host's local interfaces.
        """
        identity = self.identities.of(vm.key)
        others = [other for other in self._by_name.values() if other is not vm]
        taken = {nic.lladdr for other in others for nic in other.nics()}
        taken |= {lladdr for other in self.identities.others(vm.key) for lladdr in other.lladdrs.values()}
        before = dict(identity.lladdrs)
        given = {index for index, nic in enumerate(vm.config.nics) if nic.lladdr != before.get(index)}  # by vm.conf
        for index, nic in enumerate(config.nics):
            if index not in given and nic.lladdr not in taken:
                identity.lladdrs[index] = nic.lladdr
        if self._lladdrs is not None:
            self._lladdrs.update(identity.lladdrs.values())
        vm.config = with_lladdrs(vm.config, before, identity.lladdrs)
        vm.next_config = vm.next_config and with_lladdrs(vm.next_config, before, identity.lladdrs)
        numbers = {other.number for other in self.identities.others(vm.key)}
        if config.plan_id and config.plan_prefix4 == prefix4 and config.plan_id not in numbers:
            identity.number = config.plan_id
        self.identities.changed(vm.key)

    def remove(self, vm: Vm) -> None:
        """Remove a VM from the table.  Its identity is kept, with its id and addresses."""
        vm.drop_pty()
        vm.drop_files()
        self._by_name.pop(vm.name, None)
        self._sorted = None
        if self._by_id.get(vm.vmid) is vm:
            del self._by_id[vm.vmid]
        self.changed(vm)
        self.identities.leave(vm.key, self.present)

    def present(self) -> "set[tuple[str, int]]":
        """Return the keys of all identities in use."""
        configs = ((vm.config, vm.next_config, vm.running_config) for vm in self._by_name.values())
        used = {(config.name, config.owner.uid) for each in configs for config in each if config is not None}
        return used | {vm.key for vm in self._by_name.values()}

    def find(self, vmid: int, name: str) -> Vm | None:
        """Return the VM with this id, or with this name if the id is 0.

        vmctl sends a name of digits both as id and as name.  A VM of that name has precedence over one of that id.
        """
        named = self._by_name.get(name)
        if not vmid or (named is not None and name.isdigit()):
            return named
        return self._by_id.get(vmid)

    def get(self, vmid: int, name: str = "") -> Vm:
        """Return the VM as `find` does.  Raises OperatorError(ENOENT)."""
        vm = self.find(vmid, name)
        if vm is None:
            raise OperatorError(errno.ENOENT, f"vm {vmid or name} not found")
        return vm

    def template(self, name: str) -> VmConfig | None:
        """Return the configuration of a known VM, for an instance of it; None if there is no such VM."""
        vm = self.find(0, name)
        return vm.config if vm and not vm.resetting else None

    def holder(self, error: InUse, vm: Vm | None) -> InUse:
        """Return the error with the name of the VM that uses the file, if a VM of this host other than `vm` does."""
        for other in self:
            if other is not vm and other.alive and error.file.key in other.files.values():
                return error.held_by(f"vm {other.name}")
        return error

    def living(self, vmid: int) -> Vm:
        """Return the VM that a message of vmm names.  Raises PeerError if it has no process."""
        vm = self.find(vmid, "")
        if vm is None or not vm.alive:
            raise PeerError("vmm", f"speaks of vm {vmid}, which does not run")
        return vm

    def forget_ids(self) -> None:
        """Number from 1 again, for `reset vms`.  Does nothing unless the table is empty."""
        if not self._by_name:
            self.identities.forget_ids()
