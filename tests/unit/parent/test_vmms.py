"""The vmm processes of the parent: how they are started and adopted, and what ends with one."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.inprocess import End
from vmd.config.model import Config, VmConfig
from vmd.errors import HostError, PeerError
from vmd.ipc.channel import Channel, socketpair
from vmd.ipc.loop import Loop
from vmd.ipc.messages.children import Ping, Pong
from vmd.ipc.messages.clients import Failed
from vmd.ipc.messages.vm import StartVm
from vmd.ipc.messages.vmm import KvmFd, VmSlot, VmSlotOver
from vmd.ipc.routes import Proc
from vmd.parent import service
from vmd.parent.askvmm import SILENT
from vmd.parent.clients import For, Wait
from vmd.parent.core import Core
from vmd.parent.generations import Generation, Generations
from vmd.parent.store import STORE_MAX, Store
from vmd.parent.truth import GenerationKnown
from vmd.parent.vm import State, Vm
from vmd.parent.vmms import Vmms
from vmd.record import Record
from vmd.version import VERSION

CLIENT = 7


class Child:
    """A vmm process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.killed = False

    def kill(self) -> None:
        """Note that it was killed."""
        self.killed = True


class FakeGroups:
    """The control groups of a vmm.  Each VM has ended because of its memory limit."""

    def __init__(self, top: str) -> None:
        self.top = top
        self.limited = True
        self.ended: list[int] = []

    def make(self) -> tuple[int, int]:
        """Return the number and a descriptor of a new group."""
        return 4, os.open(os.devnull, os.O_RDONLY)

    def end(self, number: int) -> str:
        """Record that a group has ended."""
        self.ended.append(number)
        return "its limit of memory"

    def remove(self) -> bool:
        """Return False: groups are left."""
        return False


class Rig:
    """The room, with real channels.  The test plays the vmms."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.core = Core(self.loop, Config())
        self.generations = Generations()
        self.core.peers.channels = cast("Any", {Proc.VMM: self.generations, Proc.CONTROL: self})
        self.store = Store()
        self.answers: list[tuple[int, Record]] = []
        self.ended: list[str] = []  # VMs and interfaces that have ended, in order
        self.lost: list[Generation] = []  # generations reported to the room of adoption
        self.cannot_start: Exception | None = None
        self.failures = 0
        self.expected: list[Generation] = []
        self.vmms: list[End] = []
        self.started: list[Child] = []
        adoption = SimpleNamespace(known={}, expect=self.expect, lost=self.lost.append)
        network = SimpleNamespace(left={}, release=lambda vmid: self.ended.append(f"interfaces of {vmid}"))
        life = SimpleNamespace(vm_ended=lambda vm, text: self.ended.append(f"{vm.name}: {text}"))
        logs = SimpleNamespace(open=None)
        self.room = Vmms(
            self.core, self.generations, self.store, cast("Any", adoption), cast("Any", life), cast("Any", network),
            cast("Any", logs), self.attach,
        )  # fmt: skip
        self.room.on_failure = self.on_failure
        self.silent: list[Wait] = []
        self.room.on_silent = self.silent.extend

    # Methods that stand in for other rooms.

    def send(self, message: Record, *, peerid: int = 0, fds: dict[str, list[int]] | None = None) -> None:
        """Record an answer, as the channel to control."""
        assert not fds
        self.answers.append((peerid, message))

    def on_failure(self) -> None:
        """Count the failures."""
        self.failures += 1

    def attach(
        self, sock: socket.socket, peer: Proc, label: str, *,
        on_lost: Callable[[Channel, PeerError | None], None], in_step: bool = False, batch: int = 1,
    ) -> Channel:  # fmt: skip
        """Return a channel, as `Process.attach`."""
        return Channel(
            sock, me=Proc.PARENT, peer=peer, label=label, loop=self.loop, in_step=in_step, batch=batch,
            on_message=lambda _channel, _envelope: None, on_lost=on_lost,
        )  # fmt: skip

    def start(self, _proc: Proc, _logs: object) -> tuple[Child, socket.socket]:
        """Start a vmm, as `Children.start`."""
        if self.cannot_start is not None:
            raise self.cannot_start
        self.started.append(Child())
        return self.started[-1], self.vmm()

    def make_groups(self, _pid: int) -> FakeGroups:
        """Return new groups, as `Children.make_groups`."""
        return FakeGroups("new")

    def adopt_groups(self, top: str, *, limited: bool) -> FakeGroups:
        """Return existing groups, as `Children.adopt_groups`."""
        assert limited
        return FakeGroups(top)

    def expect(self, _known: list[object], there: list[Generation]) -> None:
        """Record the generations, as `Adoption.expect`."""
        self.expected = there

    # Methods for the tests.

    def vmm(self) -> socket.socket:
        """Return the parent's end of a channel to another vmm."""
        ours, theirs = socketpair()
        self.vmms.append(End(self.loop, theirs, Proc.VMM, Proc.PARENT))
        return ours

    def stored(self, number: int) -> GenerationKnown:
        """Put a vmm of an earlier daemon into the store.  Return its record."""
        with self.vmm() as ours:
            self.store.put(f"vmm-{number}", ours.fileno())
        return GenerationKnown(number=number, version="0.1.0", groups=f"group{number}", limited=True)

    def begin(self, *known: GenerationKnown, kvm: bool = True) -> None:
        """Start the room after a daemon with these vmms."""
        truth = SimpleNamespace(generations=known, left=()) if known else None
        kvm_fd = os.open(os.devnull, os.O_RDONLY) if kvm else -1
        self.room.start(cast("Any", self), kvm_fd, cast("Any", truth))
        if kvm:
            os.close(kvm_fd)
        self.turn()

    def turn(self) -> None:
        """Serve everything that is ready."""
        for _ in range(4):
            self.loop.call_later(0, self.stop_soon)
            self.loop.run()

    def stop_soon(self) -> None:
        """Stop the loop after the next round."""
        self.loop.call_later(0, self.loop.stop)

    def run(self, name: str, generation: Generation | None) -> Vm:
        """Return a running VM of a vmm."""
        vm = self.core.vms.add(VmConfig(name=name), from_config=True)
        vm._state, vm.pid = State.RUNNING, 4711
        assert generation is not None
        self.generations.of[vm.vmid] = generation
        return vm

    def close(self) -> None:
        """Release all resources."""
        for end in self.vmms:
            end.close()
        for generation in self.generations:
            generation.channel.close()
        for name in self.store.names:
            self.store.remove(name)
        self.loop.close()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Yield the room, with a service manager that stores descriptors."""
    monkeypatch.setattr(service, "notify", lambda *_: True)
    rig = Rig()
    yield rig
    rig.close()


# --- start and adoption ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kvm", [True, False])
def test_the_first_daemon_starts_a_vmm(rig: Rig, kvm: bool) -> None:
    """It gets a slot, and /dev/kvm if the host has it.  Its channel is stored."""
    rig.begin(kvm=kvm)

    told = [type(message) for message in rig.vmms[0].take() if not isinstance(message, Ping)]
    assert told == [VmSlot, *([KvmFd] if kvm else [])]
    newest = rig.generations.newest
    assert newest is not None
    assert (newest.number, newest.version, newest.told, rig.store.names) == (1, VERSION, True, ("vmm-1",))
    assert rig.core.slots.groups is newest.groups


def test_a_vmm_of_this_version_is_adopted_and_no_other_one_is_started(rig: Rig) -> None:
    """New VMs start in it, and the room of adoption asks it for its VMs."""
    rig.begin(rig.stored(3).replace(version=VERSION))

    assert (rig.started, [*rig.generations.all]) == ([], [3])
    newest = rig.generations.newest
    assert newest is not None
    assert Proc.VMM in rig.core.ready
    assert rig.expected == [newest]
    assert rig.core.slots.groups is newest.groups is not None
    assert rig.core.slots.all_groups == [newest.groups]


def test_a_vmm_of_another_version_gets_no_new_vms(rig: Rig) -> None:
    """A vmm of this version is started beside it, with the next number.  The old one keeps its groups."""
    rig.begin(rig.stored(3))

    assert [(each.number, each.version) for each in rig.generations] == [(3, "0.1.0"), (4, VERSION)]
    assert len(rig.started) == 1
    assert rig.expected == [rig.generations.all[3]]
    assert [groups.top for groups in rig.core.slots.all_groups] == ["new", "group3"]
    assert rig.core.slots.groups is rig.generations.all[4].groups
    assert VmSlot in [type(message) for message in rig.vmms[1].take()]
    assert VmSlot not in [type(message) for message in rig.vmms[0].take()]


def test_a_store_that_is_full_has_no_room_for_another_vmm(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """New VMs start in the old vmm, because those of a vmm that is not stored would be lost with the daemon."""
    known = rig.stored(3)
    while rig.store.room:
        rig.store.put(f"x{rig.store.room}", 0)
    assert len(rig.store.names) == STORE_MAX
    rig.begin(known)

    assert (rig.started, [*rig.generations.all]) == ([], [3])
    assert "no room to store another vmm: VMs start with that of vmd 0.1.0" in capfd.readouterr().err


def test_a_store_that_has_room_for_one_more_vmm(rig: Rig) -> None:
    """That is enough."""
    known = rig.stored(3)
    while rig.store.room > 1:
        rig.store.put(f"x{rig.store.room}", 0)
    rig.begin(known)

    assert (len(rig.started), [*rig.generations.all], rig.store.room) == (1, [3, 4], 0)


def test_a_vmm_that_has_ended_meanwhile(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """The service manager has removed its channel.  The others are adopted."""
    rig.begin(GenerationKnown(number=2, version=VERSION, limited=True), rig.stored(3))

    assert "vmm-2 has ended, and its VMs with it" in capfd.readouterr().err
    assert [*rig.generations.all] == [3, 4]
    assert rig.expected == [rig.generations.all[3]]


def test_a_vmm_that_cannot_be_adopted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No descriptor is free.  The others are adopted."""
    duplicate = rig.store.duplicate

    def refuse(name: str) -> int:
        if name == "vmm-2":
            raise OSError(errno.EMFILE, "Too many open files")
        return duplicate(name)

    known = rig.stored(2), rig.stored(3)
    monkeypatch.setattr(rig.store, "duplicate", refuse)
    rig.begin(*known)

    assert "vmm-2 cannot be adopted: Too many open files" in capfd.readouterr().err
    assert [*rig.generations.all] == [3, 4]


# --- ends -----------------------------------------------------------------------------------------------------


def test_with_the_only_vmm_the_daemon_ends(rig: Rig) -> None:
    """No VM is left.  The next daemon finds no channel of that vmm."""
    rig.begin()
    rig.vmms[0].channel.close()
    rig.loop.run()

    assert (rig.failures, rig.store.names, rig.started[0].killed) == (1, (), True)


def test_only_the_vms_of_an_old_vmm_end_with_it(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """The failure counts for the daemon's exit status, and the daemon continues.  Stopped VMs do not end again."""
    rig.begin(rig.stored(3))
    old, new = rig.generations
    rig.run("a", old)
    stopped = rig.run("b", old)
    stopped._state = State.STOPPED
    rig.run("c", new)
    rig.vmms[0].channel.close()
    rig.turn()

    assert rig.ended == ["interfaces of 1", "a: ended with its vmm"]
    assert (rig.failures, rig.lost, [*rig.generations.all]) == (1, [old], [4])
    assert rig.store.names == ("vmm-4",)
    assert "lost child: vmm" in capfd.readouterr().err
    assert len(rig.started) == 1


def test_the_newest_vmm_is_replaced(rig: Rig) -> None:
    """New VMs start in the new vmm."""
    rig.begin(rig.stored(3))
    rig.vmms[1].channel.close()
    rig.turn()

    assert [*rig.generations.all] == [3, 4]
    assert len(rig.started) == 2
    assert rig.generations.newest is rig.generations.all[4]
    assert rig.generations.newest.channel.closed is False


def test_a_vmm_that_cannot_be_replaced(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """The VMs of the older vmm run on, and the log tells the operator."""
    rig.begin(rig.stored(3))
    rig.cannot_start = HostError("start vmm", 12)
    rig.vmms[1].channel.close()
    rig.turn()

    assert [*rig.generations.all] == [3]
    assert "no VM can be started any more: start vmm: Cannot allocate memory" in capfd.readouterr().err
    assert Proc.VMM not in rig.core.ready
    before = len(os.listdir("/proc/self/fd"))
    fds = {"memory": [os.open(os.devnull, os.O_RDONLY)]}
    rig.core.peers.send(Proc.VMM, StartVm(vmid=9, config=VmConfig(name="x"), boot_name="", verbosity=0), fds=fds)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_daemon_that_ends_starts_no_vmm_again(rig: Rig) -> None:
    """It ends with the last vmm, which is no failure."""
    rig.begin(rig.stored(3))
    rig.core.ending = True
    rig.vmms[1].channel.close()
    rig.turn()
    assert len(rig.started) == 1
    failures = rig.failures
    rig.vmms[0].channel.close()
    rig.loop.run()

    assert rig.failures == failures


def test_the_end_of_a_retired_vmm_is_no_failure(rig: Rig) -> None:
    """It was told to end, so the end of its channel is expected."""
    rig.begin(rig.stored(3))
    old = rig.generations.all[3]
    rig.room.on_over(old)
    rig.turn()
    assert rig.vmms[0].lost
    rig.room.on_lost(old.channel, None)

    assert (rig.failures, rig.lost, rig.store.names) == (0, [], ("vmm-4",))


def test_a_vmm_that_breaks_the_protocol(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """The log has the reason."""
    rig.begin(rig.stored(3))
    channel = rig.generations.all[3].channel
    rig.room.on_lost(channel, PeerError("vmm", "speaks of nothing"))
    channel.close()
    assert "vmm: speaks of nothing" in capfd.readouterr().err
    assert [*rig.generations.all] == [4]


# --- messages -------------------------------------------------------------------------------------------------


def test_a_slot_is_over_in_the_groups_of_its_own_vmm(rig: Rig) -> None:
    """Each vmm has its own group numbers.

    The VM keeps the memory limit that it exceeded for the message of its end.
    """
    rig.begin(rig.stored(3))
    old, new = rig.generations
    vm = rig.run("a", old)
    rig.room.on_slot_over(VmSlotOver(group=5, vmid=vm.vmid), old.channel)
    rig.room.on_slot_over(VmSlotOver(group=6), new.channel)
    rig.room.on_slot_over(VmSlotOver(group=7), cast("Channel", object()))  # of a vmm that has ended

    assert vm.memory_lack == "its limit of memory"
    assert [cast("FakeGroups", each.groups).ended for each in (old, new)] == [[5], [6]]


def test_each_vmm_answers_its_own_pings(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pong of a vmm that has been told to end is late."""
    rig.begin(rig.stored(3))
    answered: list[int] = []
    for vmm in rig.generations:
        monkeypatch.setattr(vmm.line, "on_pong", lambda number=vmm.number: answered.append(number))
        rig.room.on_pong(Pong(), vmm.channel)
    rig.room.on_pong(Pong(), cast("Channel", object()))
    assert answered == [3, 4]


def test_clients_that_wait_for_a_silent_vmm_get_an_error(rig: Rig) -> None:
    """With several vmms only clients of its VMs get one."""
    rig.begin(rig.stored(3))
    old, new = rig.generations
    a, c = rig.run("a", old), rig.run("c", new)
    for vm in (a, c):
        rig.core.clients.wait(CLIENT + vm.vmid, For.PAUSE, vm.vmid)
    rig.room.on_no_answer(old.channel)

    ((client, failed),) = rig.answers
    assert (client, isinstance(failed, Failed)) == (CLIENT + a.vmid, True)
    assert SILENT in cast("Failed", failed).text
    assert [wait.vmid for wait in rig.silent] == [a.vmid]
    assert rig.failures == 0


def test_all_waiting_clients_get_an_error_if_the_only_vmm_is_silent(rig: Rig) -> None:
    """This includes clients that wait for a VM that no vmm has yet, or for all VMs."""
    rig.begin()
    for client, what, vmid in ((1, For.START, 5), (2, For.RESET, 0), (3, For.CONSOLE, 5)):
        rig.core.clients.wait(client, what, vmid)
    rig.room.on_no_answer(rig.generations.all[1].channel)

    assert sorted(client for client, _ in rig.answers) == [1, 2]


def test_a_daemon_that_ends_does_not_wait_for_a_silent_vmm(rig: Rig) -> None:
    """It kills all vmms that are its children, and ends with a failure."""
    rig.begin(rig.stored(3))
    rig.core.ending = True
    rig.loop.call_later(0, lambda: rig.room.on_no_answer(rig.generations.all[3].channel))
    rig.loop.run()

    assert (rig.failures, rig.started[0].killed) == (1, True)


def test_each_descriptor_can_be_that_of_kvm(rig: Rig) -> None:
    """Also number 0, which is a descriptor like any other."""
    rig.room.start(cast("Any", rig), 0, None)
    rig.turn()

    assert KvmFd in [type(message) for message in rig.vmms[0].take()]
