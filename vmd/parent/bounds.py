"""The limits of a running VM: the kernel enforces those of its control group, and its devices enforce the others.

A changed limit (`vmd.config.model`) counts for a running VM at once.
"""

import os

from vmd.config.model import VmLimits, with_limits
from vmd.errors import HostError
from vmd.ipc.messages.vm import LimitVm
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent import groups

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.config.model import VmConfig
    from vmd.parent.peers import Peers
    from vmd.parent.vm import Vm

NO_GROUPS = "VMs have no control groups of their own"


class Bounds:
    """The room of limits."""

    def __init__(self, peers: "Peers") -> None:
        self.peers = peers
        # Called when the limits of a running VM may have changed.
        self.on_limits: Callable[[Vm], None] = lambda _vm: None
        self._said: set[str] = set()  # sentences that were logged already

    def begin(self, vm: "Vm") -> list[str]:
        """A VM begins to run: limit its control group.  Returns sentences about limits without effect.

        Its devices have got their limits already.
        """
        limits = (vm.running_config or vm.config).limit
        self.on_limits(vm)
        return self._limit(vm, limits) if vm.pid and limits != VmLimits() else []

    def change(self, vm: "Vm", wanted: "VmConfig") -> list[str]:
        """Give a running VM the limits of a configuration.

        Returns sentences about the change, and about limits without effect.
        """
        before = vm.running_config or vm.config
        vm.config = with_limits(vm.config, wanted)
        if vm.running_config is not None:
            vm.running_config = with_limits(vm.running_config, wanted)
        now = vm.running_config or vm.config
        if now == before:
            return []
        # `Generations.send` removes secrets from the configuration.
        self.peers.send(Proc.VMM, LimitVm(vmid=vm.vmid, config=now))
        self.on_limits(vm)
        notes = self._limit(vm, now.limit) if now.limit != before.limit and vm.pid else []
        return [f"vm {vm.name}: its new limits count from now on", *(f"vm {vm.name}: {note}" for note in notes)]

    def _limit(self, vm: "Vm", limits: VmLimits) -> list[str]:
        """Limit the control group of a VM.  Returns sentences about limits without effect."""
        try:
            group = groups.directory_of(vm.pid)
            if not os.path.basename(group).startswith(groups.GROUP):
                return self._without_effect({NO_GROUPS: groups.wanted(limits)})
            missing = groups.limit(group, limits)
        except HostError as error:
            log.warn(f"vm {vm.name}: {error}")
            return [f"not limited: {error}"]
        return self._without_effect(
            {f"control groups of VMs have no controller {controller}": words for controller, words in missing.items()}
        )

    def _without_effect(self, found: dict[str, list[str]]) -> list[str]:
        """Return sentences about the limits that this host does not have, and log each sentence once.

        `found` has the limits by the reason.
        """
        notes = [f"limit {' and '.join(words)}: without effect on this host: {why}" for why, words in found.items()]
        for note in notes:
            if note not in self._said:
                self._said.add(note)
                log.warn(note)
        return notes
