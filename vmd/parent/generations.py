"""The vmms: the newest one, which gets new VMs, and those of earlier daemons, which keep the VMs that they have.

A daemon starts a vmm, and a restarted daemon adopts it (`adoption`).  A daemon of another version starts a vmm of its
own beside the older ones.  An older vmm runs its VMs with the code that it was started from, and ends with its last VM.
A VM whose guest resets itself is started again by the newest vmm.

Other rooms use this like a channel to vmm (`Peers`): a message is sent to the vmm of the VM that it is about.
"""

import errno

from vmd.closing import close_all
from vmd.config.model import without_secrets
from vmd.errors import OperatorError
from vmd.ipc.imsg import NO_FDS
from vmd.ipc.messages.children import Quit
from vmd.ipc.messages.vm import ReceiveVm, ResumeReceived, StartVm
from vmd.ipc.messages.vmm import EndTaken, KvmFd, Retire, VmSlot
from vmd.parent.store import VMM
from vmd.parent.truth import GenerationKnown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import TypeVar

    from vmd.config.model import VmConfig
    from vmd.ipc.channel import Channel
    from vmd.parent.askvmm import LineToVmm
    from vmd.parent.groups import Groups
    from vmd.privsep.spawn import Child
    from vmd.record import Record

    M = TypeVar("M", StartVm, ResumeReceived)

WITHOUT_SEEDS = WITHOUT_VHOST = "0.1."  # versions whose vmm does not know seeds and vhost


class Generation:
    """One vmm, with its VMs and control groups."""

    def __init__(
        self, number: int, version: str, line: "LineToVmm", child: "Child | None", groups: "Groups | None"
    ) -> None:
        """`child` is None until an adopted vmm has told its pid."""
        self.number = number
        self.version = version
        self.line = line
        self.child = child
        self.groups = groups
        self.awaited: set[int] | None = None  # VMs that it has still to describe; None: it has not listed them
        self.asked = False  # it was asked for its VMs
        self.told = False  # it has described all its VMs

    @property
    def channel(self) -> "Channel":
        """Return the channel to this vmm."""
        return self.line.channel

    @property
    def name(self) -> str:
        """Return the name of its channel in the store."""
        return f"{VMM}{self.number}"

    def known(self) -> GenerationKnown:
        """Return what the next parent has to know of this vmm."""
        groups = self.groups
        return GenerationKnown(
            number=self.number,
            version=self.version,
            groups=groups.top if groups is not None else "",
            limited=groups is not None and groups.limited,
        )


class Generations:
    """All vmms, by number."""

    def __init__(self) -> None:
        # Called when a vmm without VMs was told to end.
        self.on_over: Callable[[Generation], None] = lambda generation: None
        # Called with a VM that has another vmm or none, and with 0 when a vmm was added or removed.
        self.on_change: Callable[[int], None] = lambda _vmid: None
        self.all: dict[int, Generation] = {}
        self.newest: Generation | None = None  # gets new VMs
        self.of: dict[int, Generation] = {}  # by vmid: of each VM that has a process, or whose end is not settled

    def __iter__(self) -> "Iterator[Generation]":
        """Return all vmms, the oldest first."""
        return iter(sorted(self.all.values(), key=lambda generation: generation.number))

    def add(self, generation: Generation) -> None:
        """Add a vmm.  The vmm with the highest number is the newest."""
        self.all[generation.number] = generation
        self.newest = self.all[max(self.all)]
        self.on_change(0)

    def remove(self, generation: Generation) -> list[int]:
        """Remove a vmm that has ended; return the VMs that it had."""
        del self.all[generation.number]
        if self.newest is generation:
            self.newest = None
        lost = [vmid for vmid, each in self.of.items() if each is generation]
        for vmid in lost:
            del self.of[vmid]
            self.on_change(vmid)
        self.on_change(0)
        return lost

    def find(self, channel: "Channel") -> Generation | None:
        """Return the vmm of a channel, if it is one's."""
        return next((generation for generation in self if generation.channel is channel), None)

    def number(self, vmid: int) -> int:
        """Return the number of the vmm of a VM; 0 if it has no process."""
        generation = self.of.get(vmid)
        return generation.number if generation is not None else 0

    def vms(self, generation: Generation) -> list[int]:
        """Return the ids of the VMs of a vmm."""
        return [vmid for vmid, each in self.of.items() if each is generation]

    # --- messages ----------------------------------------------------------------------------------------

    def send(
        self, message: "Record", *, peerid: int = 0, fds: "Mapping[str, Sequence[int]]" = NO_FDS
    ) -> None:
        """Send a message to the vmm that it is for, and take over its descriptors.

        The secrets of a seed are removed from the VM's configuration first.
        """
        vmid = getattr(message, "vmid", 0)
        config: VmConfig | None = getattr(message, "config", None)
        if config is not None and config.seed is not None:
            message = message.replace(config=without_secrets(config))
        if isinstance(message, StartVm | ReceiveVm):
            self._give(message, fds)
            return
        if isinstance(message, KvmFd | VmSlot):
            found = [self.newest] if self.newest is not None else []
        elif vmid:
            found = [self.of[vmid]] if vmid in self.of else []
        else:
            found = list(self)
        if found and isinstance(message, ResumeReceived):
            message, fds = as_known(message, fds, found[0].version)
        for generation in found:
            generation.line.send(message, peerid=peerid, fds=fds)
        if not found:
            for each in fds.values():
                close_all(each)

    def _give(self, message: "StartVm | ReceiveVm", fds: "Mapping[str, Sequence[int]]") -> None:
        """Give a VM to the newest vmm.  Another vmm that had it before the guest reset itself loses it."""
        newest = self.newest
        if newest is None:
            for each in fds.values():
                close_all(each)
            return
        if newest.version.startswith(WITHOUT_SEEDS) and fds.get("seed"):
            if isinstance(message, StartVm):
                for each in fds.values():
                    close_all(each)
                what = f"its seed needs a later vmm than that of vmd {newest.version}, which has to be stopped first"
                raise OperatorError(errno.ENOTSUP, what)
            fds = dict(fds)
            close_all(fds.pop("seed"))
        if isinstance(message, StartVm):
            message, fds = as_known(message, fds, newest.version)
        before = self.of.get(message.vmid)
        newest.line.send(message, fds=fds)
        self.of[message.vmid] = newest
        self.on_change(message.vmid)
        if before is not None and before is not newest:
            before.line.send(EndTaken(vmid=message.vmid))
            self.retire(before)

    def flush_blocking(self, timeout_s: float) -> None:
        """Send what is queued before the daemon ends."""
        for generation in self:
            generation.line.flush_blocking(timeout_s)

    # --- ends --------------------------------------------------------------------------------------------

    def settle(self, vmid: int) -> None:
        """A VM has ended and will not start again by itself: its vmm may forget it."""
        generation = self.of.pop(vmid, None)
        if generation is not None:
            generation.line.send(EndTaken(vmid=vmid))
            self.on_change(vmid)
            self.retire(generation)

    def retire(self, generation: Generation) -> None:
        """Let an older vmm end if it has no VM any more.  Else tell it to keep no process in reserve."""
        if generation is self.newest or not generation.told:
            return
        if self.vms(generation):
            generation.line.send(Retire())
        else:
            generation.line.send(Quit())
            self.on_over(generation)


def as_known(
    message: "M", fds: "Mapping[str, Sequence[int]]", version: str
) -> "tuple[M, Mapping[str, Sequence[int]]]":
    """Return a message without the parts that a vmm of `version` does not know, and close their descriptors."""
    if not version.startswith(WITHOUT_VHOST) or not fds.get("vhosts"):
        return message, fds
    fds = dict(fds)
    close_all(fds.pop("vhosts"))
    return message.replace(nics=tuple(nic.replace(vhost=False) for nic in message.nics)), fds
