"""The figures of VMs: counters and usage, for `vmctl metrics`, `status -v`, SNMP and Prometheus.

The parent reads counters of devices from shared memory, and the rest from the kernel.  So no process of a VM is asked
or woken.  A VM takes less than half a millisecond.
"""

import contextlib
import os
from struct import Struct

from vmd.config.rules import is_host_name
from vmd.ipc.devmsg import (
    FIGURES,
    FIGURES_BYTES,
    FIGURES_KINDS,
    FIGURES_SLOT_BYTES,
    FIGURES_SLOTS,
    HOST_NAME_BYTES,
)
from vmd.ipc.figures import (
    CdromFigures,
    DiskFigures,
    EntropyFigures,
    GroupFigures,
    LimitFigures,
    NicFigures,
    VcpuFigures,
)
from vmd.ipc.messages.clients import Caller, End, FiguresRequest
from vmd.ipc.messages.figures import VmFigures
from vmd.ipc.messages.shared import brief
from vmd.parent.access import may_control
from vmd.parent.groups import GROUP, located
from vmd.parent.report import PATH_BYTES_MAX, REASON_BYTES_MAX
from vmd.parent.usage import children, cpu_ns, guest_bytes, private_bytes, thread_ns, threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmd.ipc.imsg import Envelope
    from vmd.parent.core import Core
    from vmd.parent.network import Network
    from vmd.parent.vm import Vm

USEC_NS = 1000
BATCH = 16  # VMs in one turn of the loop
SLOT = Struct(f"<{FIGURES_SLOT_BYTES // 8}Q")


class Figures:
    """The room of figures."""

    def __init__(self, core: "Core", network: "Network") -> None:
        self.core = core
        self.network = network
        self._vcpus: dict[int, tuple[int, dict[int, int]]] = {}  # by vmid: pid, and the thread of each vCPU

    def serve(self, message: FiguresRequest, caller: Caller, envelope: "Envelope") -> None:
        """Answer with the figures of one VM or of all.  All who may see the list of VMs may see figures."""
        one = bool(message.vmid or message.name)
        vms = [self.core.vms.get(message.vmid, message.name)] if one else list(self.core.vms)
        self._answer(vms, caller, envelope.peerid)

    def _answer(self, vms: "list[Vm]", caller: Caller, client: int) -> None:
        """Answer with VMs in batches, so that other messages are served in between."""
        there = [vm for vm in vms[:BATCH] if self.core.vms.find(vm.vmid, "") is vm]
        for figures in self.of(there, caller):
            self.core.clients.answer(client, figures)
        left = vms[BATCH:]
        if left:
            self.core.loop.call_later(0, lambda: self._answer(left, caller, client))
        else:
            self.core.clients.answer(client, End())

    def of(self, vms: "list[Vm]", caller: Caller) -> list[VmFigures]:
        """Return the figures of these VMs, without those that the caller may not see."""
        mounts = read("/proc/self/mountinfo")
        if len(self._vcpus) > 2 * len(self.core.vms):
            self._vcpus.clear()
        return [self._of(vm, mounts, caller) for vm in vms]

    def _of(self, vm: "Vm", mounts: str, caller: Caller) -> VmFigures:
        config, end = vm.running_config or vm.config, vm.last_end
        known = may_control(caller, vm.uid, vm.config.owner.gid)
        processes = (vm.pid, *children(vm.pid)) if vm.pid else ()
        counted = slots(vm.figures) if vm.figures is not None else {}

        def of(kind: str, index: int = 0) -> "dict[str, Any]":
            found = counted.get((kind, index))
            return {"index": index} if found is None else {"index": index, "counted": True, **found}

        return VmFigures(
            vmid=vm.vmid,
            name=vm.name,
            uid=vm.uid,
            state=vm.state.value,
            since_s=int(vm.since_s),
            started_s=int(vm.started_s) if vm.alive else 0,
            starts=vm.starts,
            restarts=vm.guest_resets,
            ended=end.replace(text=brief(end.text, REASON_BYTES_MAX)) if end is not None else None,
            pid=vm.pid,
            memory_bytes=config.memory_bytes,
            guest_bytes=guest_bytes(vm.memory) if vm.pid else 0,
            process_bytes=sum(map(private_bytes, processes)),
            cpu_ns=sum(map(cpu_ns, processes)),
            vcpus=self._vcpus_of(vm, config.vcpus),
            disks=tuple(
                DiskFigures(
                    path=brief(disk.path, PATH_BYTES_MAX) if known else "",
                    iops_limit=disk.iops_limit,
                    rate_limit=disk.rate_limit,
                    **of("vioblk", index),
                )
                for index, disk in enumerate(config.disks)
            ),
            cdrom=CdromFigures(**of("vioscsi")) if config.cdrom or config.drive else None,
            entropy=EntropyFigures(**of("viornd")),
            nics=self._nics_of(vm, lambda index: of("vionet", index)),
            group=group_of(mounts, vm.pid) if vm.pid else None,
            limit=LimitFigures(**config.limit.as_dict()),
        )

    def _vcpus_of(self, vm: "Vm", count: int) -> tuple[VcpuFigures, ...]:
        """Return the processor time of each vCPU.  Its thread is found by the name that the VM's process gave it."""
        pid = vm.pid
        if not pid:
            self._vcpus.pop(vm.vmid, None)
            return tuple(VcpuFigures(index=index) for index in range(count))
        known, tasks = self._vcpus.get(vm.vmid, (0, {}))
        if known != pid or len(tasks) < count:
            names = threads(pid)
            tasks = {index: names[f"vcpu{index}"] for index in range(count) if f"vcpu{index}" in names}
            self._vcpus[vm.vmid] = pid, tasks
        return tuple(
            VcpuFigures(index=index, cpu_ns=thread_ns(pid, tasks[index]) if index in tasks else 0)
            for index in range(count)
        )

    def _nics_of(self, vm: "Vm", of: "Callable[[int], dict[str, Any]]") -> tuple[NicFigures, ...]:
        taps = self.network.taps.get(vm.vmid)
        links = taps.links if taps is not None else ()
        config = vm.running_config or vm.config
        nics = taps.nics if taps is not None else config.nics
        rates = {index: nic.rate_limit for index, nic in enumerate(config.nics)}
        return tuple(
            NicFigures(
                tap=links[index].name if index < len(links) else "",
                switch=nic.switch,
                lladdr=nic.lladdr,
                rate_limit=rates.get(index, 0),
                **self.network.counted(vm.vmid, index, of(index)),
            )
            for index, nic in enumerate(nics)
        )


def slots(fd: int) -> dict[tuple[str, int], dict[str, int]]:
    """Return the counters of devices in a file of figures, by kind and index.

    All processes of a VM can write anything to the file at any time, so the numbers are not to be trusted.
    """
    found: dict[tuple[str, int], dict[str, int]] = {}
    raw = os.pread(fd, FIGURES_BYTES, 0).ljust(FIGURES_BYTES, b"\0")
    for slot in range(FIGURES_SLOTS):
        kind, index, count, *figures = SLOT.unpack_from(raw, slot * FIGURES_SLOT_BYTES)
        if 1 <= kind <= len(FIGURES_KINDS):
            name = FIGURES_KINDS[kind - 1]
            found.setdefault((name, index), dict(zip(FIGURES[name], figures[:count], strict=False)))
    return found


def host_names(fd: int) -> dict[int, str]:
    """Return the host name that the guest has sent by DHCP, by index of the interface.

    Text that is no host name is left out: it was written by an intruder, or is being written.
    """
    found = {}
    raw = os.pread(fd, FIGURES_BYTES, 0).ljust(FIGURES_BYTES, b"\0")
    for start in range(0, FIGURES_BYTES, FIGURES_SLOT_BYTES):
        kind, index, *_ = SLOT.unpack_from(raw, start)
        end = start + FIGURES_SLOT_BYTES
        name = raw[end - HOST_NAME_BYTES : end].rstrip(b"\0").decode("ascii", "replace")
        if 1 <= kind <= len(FIGURES_KINDS) and FIGURES_KINDS[kind - 1] == "vionet" and is_host_name(name):
            found[index] = name
    return found


def group_of(mounts: str, pid: int) -> GroupFigures | None:
    """Return the figures of a VM's control group; None if the VM has no control group of its own."""
    directory = located(mounts, read(f"/proc/{pid}/cgroup"))
    if directory is None or not os.path.basename(directory).startswith(GROUP):
        return None
    cpu, memory = rows(f"{directory}/cpu.stat"), rows(f"{directory}/memory.events")
    used, throttled = cpu.get("usage_usec"), cpu.get("throttled_usec")
    return GroupFigures(
        cpu_ns=None if used is None else used * USEC_NS,
        throttled=cpu.get("nr_throttled"),
        throttled_ns=None if throttled is None else throttled * USEC_NS,
        memory_bytes=number(f"{directory}/memory.current"),
        memory_peak_bytes=number(f"{directory}/memory.peak"),
        oom_kills=memory.get("oom_kill"),
        tasks=number(f"{directory}/pids.current"),
    )


def read(path: str) -> str:
    """Return the text of a file of the kernel; empty if there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def number(path: str) -> int | None:
    """Return the number in a file; None if there is none."""
    with contextlib.suppress(ValueError):
        return int(read(path))
    return None


def rows(path: str) -> dict[str, int]:
    """Return the numbers of a file that has a name and a number in each row."""
    pairs = (line.split() for line in read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
