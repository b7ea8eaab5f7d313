"""The vmm processes: how one is started, adopted and lost.

All VMs of a vmm end with it.  So a newer vmm never replaces an older one, but runs beside it (`generations`).
"""

import errno
import os
import socket

from vmd.errors import VmdError, sentence
from vmd.ipc.messages.vmm import KvmFd
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent.askvmm import SILENT, LineToVmm
from vmd.parent.clients import For
from vmd.parent.generations import Generation
from vmd.parent.store import VMM
from vmd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.errors import PeerError
    from vmd.ipc.channel import Channel
    from vmd.ipc.messages.children import Pong
    from vmd.ipc.messages.vmm import VmSlotOver
    from vmd.parent.adoption import Adoption
    from vmd.parent.children import Children
    from vmd.parent.clients import Wait
    from vmd.parent.connections import Attach
    from vmd.parent.core import Core
    from vmd.parent.generations import Generations
    from vmd.parent.life import Life
    from vmd.parent.logs import Logs
    from vmd.parent.network import Network
    from vmd.parent.store import Store
    from vmd.parent.truth import GenerationKnown, Truth


WAIT_FOR_VMM = (  # waits for vmm that have no deadline of their own
    For.START, For.END, For.PAUSE, For.TRANSFER, For.IMAGES, For.CHANGE, For.SNAPSHOT, For.RESET,
)  # fmt: skip


class Vmms:
    """The room of vmms."""

    def __init__(
        self,
        core: "Core",
        generations: "Generations",
        store: "Store",
        adoption: "Adoption",
        life: "Life",
        network: "Network",
        logs: "Logs",
        attach: "Attach",
    ) -> None:
        self.core = core
        self.generations = generations
        self.store = store
        self.adoption = adoption
        self.life = life
        self.network = network
        self.logs = logs
        self._attach = attach
        self.on_failure: Callable[[], None] = lambda: None  # the daemon has failed, even if it continues
        self.on_silent: Callable[[list[Wait]], None] = lambda waits: None  # called with waits that were ended
        generations.on_over = self.on_over

    def start(self, children: "Children", kvm_fd: int, truth: "Truth | None") -> None:
        """Adopt all vmms.  Start one unless the newest has this version.  Raises HostError or VmdError.

        `truth` is the state of the parent before.  `kvm_fd` is -1 if there is no KVM.
        """
        self.children = children
        self.kvm_fd = kvm_fd
        adopted = [self.adopt(known) for known in truth.generations] if truth is not None else []
        there = [generation for generation in adopted if generation is not None]
        for generation in there:
            self.generations.add(generation)
        newest = self.generations.newest
        other = newest is None or newest.version != VERSION
        if newest is not None and other and self.store.room < 1:
            log.warn(f"no room to store another vmm: VMs start with that of vmd {newest.version}")
            other = False
        if newest is None or other:
            self.start_one()
        else:
            self.core.ready.add(Proc.VMM)
            self.core.slots.use(newest.groups, newest=True)
        for generation in there:
            if generation is not newest or other:
                self.core.slots.use(generation.groups, newest=False)
        if truth is not None:
            self.network.left |= {known.vmid: known for known in truth.left}
            self.adoption.expect(list(self.adoption.known.values()), there)

    def adopt(self, known: "GenerationKnown") -> Generation | None:
        """Return a vmm of an earlier daemon; None if it has ended, or its descriptor cannot be duplicated."""
        name = f"{VMM}{known.number}"
        try:
            ours = socket.socket(fileno=self.store.duplicate(name))
        except KeyError:
            log.error(f"{name} has ended, and its VMs with it")
            return None
        except OSError as error:
            log.error(f"{name} cannot be adopted: {sentence(error)}")
            return None
        groups = self.children.adopt_groups(known.groups, limited=known.limited)
        return Generation(known.number, known.version, self.line_to(ours), None, groups)

    def start_one(self) -> None:
        """Start a vmm, which gets new VMs from now on.  Raises HostError or VmdError."""
        self.core.ready.discard(Proc.VMM)
        child, ours = self.children.start(Proc.VMM, self.logs.open)
        number = max(self.generations.all, default=0) + 1
        groups = self.children.make_groups(child.pid)
        generation = Generation(number, VERSION, self.line_to(ours), child, groups)
        generation.told = True  # it has no VMs
        self.generations.add(generation)
        self.core.slots.use(groups, newest=True)
        self.store.put(generation.name, ours.fileno())
        self.core.slots.give()
        if self.kvm_fd >= 0:
            self.core.peers.send(Proc.VMM, KvmFd(), fds={"kvm": [os.dup(self.kvm_fd)]})

    def line_to(self, ours: socket.socket) -> LineToVmm:
        """Serve the channel of a vmm."""
        channel = self._attach(ours, Proc.VMM, "vmm", on_lost=self.on_lost)
        return LineToVmm(self.core.loop, channel, lambda: self.on_no_answer(channel))

    # --- messages and ends of vmms -----------------------------------------------------------------------

    def on_pong(self, _message: "Pong", channel: "Channel") -> None:
        """A vmm has answered a ping."""
        generation = self.generations.find(channel)
        if generation is not None:
            generation.line.on_pong()

    def on_slot_over(self, message: "VmSlotOver", channel: "Channel") -> None:
        """A VM process has ended and was reaped: its slot is free."""
        generation = self.generations.find(channel)
        if generation is None:
            return
        lack = self.core.slots.over(generation.groups, message.group)
        vm = self.core.vms.find(message.vmid, "")
        if lack and vm is not None:
            vm.memory_lack = lack  # for the message about its end, which comes next

    def on_lost(self, channel: "Channel", error: "PeerError | None") -> None:
        """A vmm has died or broke the protocol, and all its VMs die with it.

        If it was the only vmm, the daemon ends.  Else the VMs of the other vmms run on.  If it was the newest, another
        one is started for new VMs.
        """
        generation = self.generations.find(channel)
        if generation is None:
            return  # it was told to end
        if generation.child is not None:
            generation.child.kill()  # it may still live
        self.store.remove(generation.name)
        newest = generation is self.generations.newest
        lost = self.generations.remove(generation)
        if self.core.ending and not self.generations.all:
            self.core.loop.stop()
            return
        log.crit(str(error) if error else f"lost child: {channel.label}")
        self.on_failure()
        if not self.generations.all:
            self.core.loop.stop()  # no VM is left
            return
        self.adoption.lost(generation)
        for vmid in lost:
            vm = self.core.vms.find(vmid, "")
            if vm is not None and vm.alive:
                self.network.release(vmid)
                self.life.vm_ended(vm, "ended with its vmm")
        if newest and not self.core.ending:
            try:
                self.start_one()
            except (VmdError, OSError) as failed:
                log.crit(f"no VM can be started any more: {sentence(failed)}")

    def on_over(self, generation: Generation) -> None:
        """A vmm was told to end: it has no VM any more and gets no new ones."""
        log.info(f"{generation.name}, of version {generation.version}, has no VM any more and ends")
        self.store.remove(generation.name)
        self.generations.remove(generation)
        generation.channel.finish()

    def on_no_answer(self, channel: "Channel") -> None:
        """A vmm does not answer: tell the clients that wait for it.  If the daemon is ending, end it without vmm."""
        generation = self.generations.find(channel)
        if generation is None:
            return
        if self.core.ending:
            self.on_failure()
            for each in self.generations:
                if each.child is not None:
                    each.child.kill()
            self.core.loop.stop()
        else:
            vms = None if len(self.generations.all) == 1 else self.generations.vms(generation)
            self.on_silent(self.core.clients.fail_waiting(WAIT_FOR_VMM, errno.ETIMEDOUT, SILENT, vms))
