"""The event `throttled`: a disk, an interface or the vCPUs of a VM have begun to wait because of a limit.

It shows why a guest is slow.  Only VMs with limits are examined.  Devices and the kernel count how long something has
waited, so no process is asked or woken.  A device that waits repeatedly is one event, until it has not waited for some
time.
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
    from vmd.parent.vm import Vm

LOOK_S = 10.0  # between two looks
LEAST_NS = 100_000_000  # less waiting than this between two looks does not count
QUIET_LOOKS = 6  # looks without waiting, after which waiting is an event again


class LastLook(Record):
    """The result of the last look at a device with a limit, or at the vCPUs."""

    waited_ns: int  # in its whole life
    quiet: int = QUIET_LOOKS  # looks without waiting since it has waited, at most QUIET_LOOKS


class Throttles:
    """The room of the event `throttled`."""

    def __init__(self, core: "Core") -> None:
        self.core = core
        self._known: dict[tuple[int, str], LastLook] = {}  # by VM and device; device "" stands for the vCPUs
        self._looked_s = 0.0
        self._looking = False  # a timer will look again

    def begin(self, only: "Vm | None" = None) -> None:
        """A VM may have got limits, perhaps `only` this one.  Look periodically while a VM with limits runs."""
        vms = (only,) if only is not None else self.core.vms
        if not self._looking and any(vm.pid and limited(vm.running_config or vm.config) for vm in vms):
            self._look()

    def _look(self) -> None:
        """Examine all VMs, and plan the next look."""
        now_s, mounts = time.monotonic(), read("/proc/self/mountinfo")
        spent_s, self._looked_s = now_s - self._looked_s, now_s
        before, self._known = self._known, {}
        for vm in self.core.vms:
            config = vm.running_config or vm.config
            if not vm.pid or not limited(config):
                continue
            for device, limit, waited_ns in waits(vm, config, mounts):
                known = before.get((vm.vmid, device))
                if known is None or waited_ns < known.waited_ns:  # the VM was started again
                    now = LastLook(waited_ns=waited_ns)
                elif waited_ns - known.waited_ns < LEAST_NS:
                    now = LastLook(waited_ns=waited_ns, quiet=min(known.quiet + 1, QUIET_LOOKS))
                else:
                    now = LastLook(waited_ns=waited_ns, quiet=0)
                    if known.quiet == QUIET_LOOKS:
                        seconds = (waited_ns - known.waited_ns) / 1e9
                        text = f"limit {limit}: has waited for {seconds:.1f} s of the last {spent_s:.0f}"
                        self.core.events.add("throttled", vm, text=text, device=device)
                self._known[vm.vmid, device] = now
        self._looking = bool(self._known)
        if self._looking:
            self.core.loop.call_later(LOOK_S, self._look)


def limited(config: "VmConfig") -> bool:
    """Return whether a configuration has a limit that makes something wait."""
    devices = any(disk.iops_limit or disk.rate_limit for disk in config.disks)
    return devices or any(nic.rate_limit for nic in config.nics) or bool(config.limit.cpu_percent)


def waits(vm: "Vm", config: "VmConfig", mounts: str) -> "Iterator[tuple[str, str, int]]":
    """Yield for each limit of a VM: device, limit in words of vm.conf, and how long the device has waited in its life.

    The numbers come from processes of the VM and are not to be trusted.
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
