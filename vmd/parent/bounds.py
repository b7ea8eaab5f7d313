"""The limits of a VM that runs: those of its control group, which the kernel keeps, and those that its devices keep.

A limit of `vmd.config.model` that becomes another one while its VM runs counts at once.
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
    from vmd.parent.vmtable import Vm

NO_GROUPS = "its VMs have no control groups of their own"


class Bounds:
    """The room of limits."""

    def __init__(self, peers: "Peers") -> None:
        self.peers = peers
        self.on_limits: Callable[[Vm], None] = lambda _vm: None  # called when a VM that runs may have limits
        self._said: set[str] = set()  # sentences that are in the log already

    def begin(self, vm: "Vm") -> list[str]:
        """A VM begins to run: limit its control group.  Its devices know theirs.  Returns what is not limited."""
        limits = (vm.running_config or vm.config).limit
        self.on_limits(vm)
        return self._limit(vm, limits) if vm.pid and limits != VmLimits() else []

    def change(self, vm: "Vm", wanted: "VmConfig") -> list[str]:
        """Let a VM that runs have the limits of a configuration.

        Returns sentences about what has changed, and about what is not limited.
        """
        before = vm.running_config or vm.config
        vm.config = with_limits(vm.config, wanted)
        if vm.running_config is not None:
            vm.running_config = with_limits(vm.running_config, wanted)
        now = vm.running_config or vm.config
        if now == before:
            return []
        # Secrets are taken out of the configuration on its way (`Generations.send`).
        self.peers.send(Proc.VMM, LimitVm(vmid=vm.vmid, config=now))
        self.on_limits(vm)
        notes = self._limit(vm, now.limit) if now.limit != before.limit and vm.pid else []
        return [f"vm {vm.name}: its new limits count from now on", *(f"vm {vm.name}: {note}" for note in notes)]

    def _limit(self, vm: "Vm", limits: VmLimits) -> list[str]:
        """Limit the control group of a VM.  Returns what is not limited, and why."""
        try:
            group = groups.directory_of(vm.pid)
            if not os.path.basename(group).startswith(groups.GROUP):
                return self._without_effect({NO_GROUPS: groups.wanted(limits)})
            missing = groups.limit(group, limits)
        except HostError as error:
            log.warn(f"vm {vm.name}: {error}")
            return [f"not limited: {error}"]
        return self._without_effect(
            {f"it has no controller {controller} for their groups": words for controller, words in missing.items()}
        )

    def _without_effect(self, found: dict[str, list[str]]) -> list[str]:
        """Say what this host cannot limit, by why: in the log once, and to each who is concerned."""
        notes = [f"limit {' and '.join(words)}: this host cannot limit VMs so: {why}" for why, words in found.items()]
        for note in notes:
            if note not in self._said:
                self._said.add(note)
                log.warn(note)
        return notes
