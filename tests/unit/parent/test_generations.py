"""Several vmms: which one gets a message, and who is told of a change.  `test_adoption` has what ends with a VM."""

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmd.config.model import VmConfig
from vmd.ipc.messages.children import Quit
from vmd.ipc.messages.vm import StartVm, StopMode, StopVm
from vmd.ipc.messages.vmm import KvmFd, VmSlot
from vmd.parent.generations import Generation, Generations
from vmd.parent.truth import GenerationKnown
from vmd.record import Record


class Line:
    """The line to a vmm."""

    def __init__(self) -> None:
        self.channel = object()
        self.sent: list[tuple[Record, int]] = []
        self.flushed: list[float] = []

    def send(self, message: Record, *, peerid: int = 0, fds: object = None) -> None:
        """Take a message."""
        assert not fds
        self.sent.append((message, peerid))

    def flush_blocking(self, timeout_s: float) -> None:
        """Send all."""
        self.flushed.append(timeout_s)


class Rig:
    """Three vmms, the second of which has VM 7.  The third is the newest."""

    def __init__(self) -> None:
        self.all = Generations()
        self.changes: list[int] = []
        self.all.on_change = self.changes.append
        self.lines = [Line() for _ in range(3)]
        self.vmms = [
            Generation(number, f"0.{number}", cast("Any", line), None, None)
            for number, line in enumerate(self.lines, 1)
        ]
        for number in (2, 0, 1):
            self.all.add(self.vmms[number])
        self.all.of[7] = self.vmms[1]

    def take(self) -> list[list[tuple[Record, int]]]:
        """Return the messages to each vmm since the last call."""
        found = [line.sent for line in self.lines]
        for line in self.lines:
            line.sent = []
        return found


@pytest.fixture
def rig() -> Rig:
    """Three vmms."""
    return Rig()


def start(vmid: int) -> StartVm:
    """Return a start."""
    return StartVm(vmid=vmid, config=VmConfig(name="a"), boot_name="", verbosity=0)


def test_the_vmm_with_the_highest_number_is_the_newest(rig: Rig) -> None:
    """In whatever order they are added.  When it has ended there is none until another one is added."""
    assert rig.all.newest is rig.vmms[2]
    assert [vmm.number for vmm in rig.all] == [1, 2, 3]
    assert [vmm.name for vmm in rig.all] == ["vmm-1", "vmm-2", "vmm-3"]
    rig.all.remove(rig.vmms[0])
    assert rig.all.newest is rig.vmms[2]
    rig.all.remove(rig.vmms[2])
    assert vars(rig.all)["newest"] is None
    assert rig.all.find(rig.vmms[1].channel) is rig.vmms[1]
    assert rig.all.find(rig.vmms[2].channel) is None


@pytest.mark.parametrize(
    ("groups", "known"),
    [
        (None, GenerationKnown(number=4, version="9")),
        (SimpleNamespace(top="/g", limited=True), GenerationKnown(number=4, version="9", groups="/g", limited=True)),
        (SimpleNamespace(top="/g", limited=False), GenerationKnown(number=4, version="9", groups="/g")),
    ],
)
def test_what_the_next_parent_knows_of_a_vmm(groups: object, known: GenerationKnown) -> None:
    """Its number, version and control groups."""
    assert Generation(4, "9", cast("Any", Line()), None, cast("Any", groups)).known() == known


def test_a_message_goes_to_the_vmm_that_it_is_for(rig: Rig) -> None:
    """That of a VM, the newest, or all of them."""
    stop, kvm, slot = StopVm(vmid=7, mode=StopMode.GRACEFUL), KvmFd(), VmSlot(uid=1)
    rig.all.send(stop)
    assert rig.take() == [[], [(stop, 0)], []]
    rig.all.send(stop, peerid=5)
    assert rig.take() == [[], [(stop, 5)], []]
    for message in (kvm, slot):
        rig.all.send(message)
        assert rig.take() == [[], [], [(message, 0)]]
    rig.all.send(Quit())
    assert rig.take() == [[(Quit(), 0)]] * 3
    rig.all.send(stop.replace(vmid=8))
    assert rig.take() == [[]] * 3
    rig.all.remove(rig.vmms[2])
    rig.all.send(kvm)
    rig.all.send(start(9))
    assert rig.take() == [[]] * 3


def test_descriptors_for_a_vm_that_no_vmm_has_are_closed(rig: Rig) -> None:
    """Nobody else would close them."""
    reading, writing = os.pipe()
    rig.all.send(StopVm(vmid=8, mode=StopMode.KILL), fds={"tty": [reading], "taps": [writing]})
    assert rig.take() == [[], [], []]
    for fd in (reading, writing):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_changes_are_noted_for_the_next_parent(rig: Rig) -> None:
    """With the VM that has another vmm, or 0 for a change of the vmms themselves."""
    assert rig.changes == [0, 0, 0]
    rig.changes.clear()
    rig.all.send(start(9))
    assert (rig.changes, rig.all.number(9), rig.all.vms(rig.vmms[2])) == ([9], 3, [9])
    rig.all.settle(9)
    rig.all.settle(9)
    assert (rig.changes, rig.all.number(9)) == ([9, 9], 0)
    rig.changes.clear()
    rig.all.of[8] = rig.vmms[1]
    assert rig.all.remove(rig.vmms[1]) == [7, 8]
    assert (rig.changes, rig.all.of) == ([7, 8, 0], {})


def test_all_is_sent_before_the_daemon_ends(rig: Rig) -> None:
    """To each vmm."""
    rig.all.flush_blocking(2.0)
    assert [line.flushed for line in rig.lines] == [[2.0]] * 3
