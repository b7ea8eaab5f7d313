"""What has begun to wait for its limits, as an event: somebody may wonder why a guest is slow.

Only VMs with limits are looked at, and nobody is asked or woken for it: devices and the kernel count for how long
something has waited.  A device that waits again and again is one event, until it has not waited for a while.
"""

import time

from vmd.parent.figures import group_of, read, slots
from vmd.record import Record
from vmd.scaled import fmt_scaled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmd.config.model import VmConfig
    from vmd.parent.core import Core
    from vmd.parent.vmtable import Vm

LOOK_S = 10.0
LEAST_NS = 100_000_000  # of waiting between two looks; less says nothing
QUIET_LOOKS = 6  # without waiting; what waits after that is news


class Known(Record):
    """What was seen of a device that has a limit, or of the processors: how long it has waited in its life."""

    waited_ns: int
    quiet: int = QUIET_LOOKS  # looks without waiting, as far as they count


class Throttles:
    """The room of those who wait for limits."""

    def __init__(self, core: "Core") -> None:
        self.core = core
        self._known: dict[tuple[int, str], Known] = {}  # by VM and device; "": its processors
        self._looked_s = 0.0
        self._looking = False  # there is a next look

    def begin(self, only: "Vm | None" = None) -> None:
        """Some VM may have limits, or this one: look every now and then, as long as one has."""
        vms = (only,) if only is not None else self.core.vms
        if not self._looking and any(vm.pid and limited(vm.running_config or vm.config) for vm in vms):
            self._look()

    def _look(self) -> None:
        """Look at all, and come back."""
        now_s, mounts = time.monotonic(), read("/proc/self/mountinfo")
        spent_s, self._looked_s = now_s - self._looked_s, now_s
        before, self._known = self._known, {}
        for vm in self.core.vms:
            config = vm.running_config or vm.config
            if not vm.pid or not limited(config):
                continue
            for device, limit, waited_ns in waits(vm, config, mounts):
                known = before.get((vm.vmid, device))
                if known is None or waited_ns < known.waited_ns:  # another life of its guest
                    now = Known(waited_ns=waited_ns)
                elif waited_ns - known.waited_ns < LEAST_NS:
                    now = Known(waited_ns=waited_ns, quiet=min(known.quiet + 1, QUIET_LOOKS))
                else:
                    now = Known(waited_ns=waited_ns, quiet=0)
                    if known.quiet == QUIET_LOOKS:
                        seconds = (waited_ns - known.waited_ns) / 1e9
                        text = f"limit {limit}: has waited for {seconds:.1f} s of the last {spent_s:.0f}"
                        self.core.events.add("throttled", vm, text=text, device=device)
                self._known[vm.vmid, device] = now
        self._looking = bool(self._known)
        if self._looking:
            self.core.loop.call_later(LOOK_S, self._look)


def limited(config: "VmConfig") -> bool:
    """Return whether anything of a VM may have to wait."""
    devices = any(disk.iops_limit or disk.rate_limit for disk in config.disks)
    return devices or any(nic.rate_limit for nic in config.nics) or bool(config.limit.cpu_percent)


def waits(vm: "Vm", config: "VmConfig", mounts: str) -> "Iterator[tuple[str, str, int]]":
    """Yield what of a VM has a limit: device, limit in words of vm.conf, and how long it has waited in its life.

    Devices are processes of the VM, which can claim anything.
    """
    if config.limit.cpu_percent:
        group = group_of(mounts, vm.pid)
        if group is not None and group.throttled_ns is not None:
            yield "", f"cpu {config.limit.cpu_percent}%", group.throttled_ns
    counted = slots(vm.figures) if vm.figures is not None else {}
    for index, disk in enumerate(config.disks):
        limits = [f"iops {disk.iops_limit}"] if disk.iops_limit else []
        limits += [f"rate {fmt_scaled(disk.rate_limit)}"] if disk.rate_limit else []
        figures = counted.get(("vioblk", index), {})
        if limits:
            yield f"disk{index}", " ".join(limits), figures.get("throttled_ns", 0)
    for index, nic in enumerate(config.nics):
        figures = counted.get(("vionet", index), {})
        if nic.rate_limit:
            waited_ns = figures.get("rx_throttled_ns", 0) + figures.get("tx_throttled_ns", 0)
            yield f"interface{index}", f"rate {fmt_scaled(nic.rate_limit)}", waited_ns
