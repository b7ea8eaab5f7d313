"""The limits of a running VM: what is limited, which process is told, and what the operator is told."""

import errno
from typing import Any, cast

import pytest

from vmd.config.model import DiskConfig, VmConfig, VmLimits
from vmd.errors import HostError
from vmd.ipc.messages.vm import LimitVm
from vmd.ipc.routes import Proc
from vmd.parent import groups
from vmd.parent.bounds import Bounds
from vmd.parent.peers import Peers
from vmd.parent.vm import Vm
from vmd.record import Record

LIMITS = VmLimits(memory_bytes=1 << 30, cpu_percent=150)
GROUP = "/sys/fs/cgroup/vmd-guests-0.scope/vm-4"


class Rig:
    """The room, a VM that runs, and a kernel with control groups."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Record] = []
        peers = Peers()
        peers.channels = cast("Any", {Proc.VMM: self})
        self.bounds = Bounds(peers)
        self.asked: list[Vm] = []  # for which VMs `on_limits` was called
        self.bounds.on_limits = self.asked.append
        self.group = GROUP
        self.limited: list[tuple[str, VmLimits]] = []
        self.missing: dict[str, list[str]] = {}
        self.trouble: HostError | None = None
        monkeypatch.setattr("vmd.parent.groups.directory_of", self.directory_of)
        monkeypatch.setattr("vmd.parent.groups.limit", self.limit)
        self.vm = Vm(1, VmConfig(name="a", limit=LIMITS, disks=(DiskConfig(path="/d"),)), from_config=True)
        self.vm.pid = 4711

    def send(self, message: Record, *, peerid: int, fds: dict[str, list[int]]) -> None:
        """Replaces vmm's channel."""
        assert not peerid
        assert not fds
        self.sent.append(message)

    def directory_of(self, pid: int) -> str:
        """Replaces `groups.directory_of`."""
        assert pid == 4711
        return self.group

    def limit(self, group: str, limits: VmLimits) -> dict[str, list[str]]:
        """Replaces `groups.limit`."""
        if self.trouble is not None:
            raise self.trouble
        self.limited.append((group, limits))
        return self.missing


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    """Give the room."""
    return Rig(monkeypatch)


def test_a_vm_that_begins_to_run_is_limited(rig: Rig) -> None:
    """The limits of the running machine count, and its devices have theirs already."""
    assert rig.bounds.begin(rig.vm) == []
    rig.vm.running_config = rig.vm.config.replace(limit=VmLimits(weight=7))
    assert rig.bounds.begin(rig.vm) == []

    assert rig.limited == [(GROUP, LIMITS), (GROUP, VmLimits(weight=7))]
    assert (rig.sent, rig.asked) == ([], [rig.vm, rig.vm])


@pytest.mark.parametrize("why", ["no limits", "no process"])
def test_a_vm_without_limits_keeps_what_it_has(rig: Rig, why: str) -> None:
    """Its group is not touched: nobody enables a controller for it."""
    if why == "no limits":
        rig.vm.config = rig.vm.config.replace(limit=VmLimits())
    else:
        rig.vm.pid = 0
    assert rig.bounds.begin(rig.vm) == []
    assert rig.limited == []


@pytest.mark.parametrize("running", [False, True])
def test_changed_limits_of_a_running_vm(rig: Rig, running: bool) -> None:
    """They count at once: for its processes, its devices, and its status.  Other changes wait."""
    if running:
        rig.vm.running_config = rig.vm.config
    disks = (DiskConfig(path="/d", iops_limit=300),)
    wanted = VmConfig(name="a", limit=VmLimits(weight=3), disks=disks, memory_bytes=1 << 33)
    memory_bytes = rig.vm.config.memory_bytes

    assert rig.bounds.change(rig.vm, wanted) == ["vm a: its new limits count from now on"]
    (told,) = rig.sent
    assert isinstance(told, LimitVm)
    for config in (told.config, rig.vm.config, *([rig.vm.running_config] if running else [])):
        assert config is not None
        assert (config.limit, config.disks, config.memory_bytes) == (VmLimits(weight=3), disks, memory_bytes)
    assert (told.vmid, rig.limited, rig.asked) == (1, [(GROUP, VmLimits(weight=3))], [rig.vm])
    assert rig.bounds.change(rig.vm, wanted) == []
    assert len(rig.sent) == 1


def test_a_changed_limit_of_a_disk_alone(rig: Rig) -> None:
    """The control group is left alone."""
    wanted = rig.vm.config.replace(disks=(DiskConfig(path="/d", rate_limit=1 << 20),))
    assert rig.bounds.change(rig.vm, wanted) == ["vm a: its new limits count from now on"]
    assert (len(rig.sent), rig.limited) == (1, [])


def test_limits_that_are_taken_away(rig: Rig) -> None:
    """The group is told."""
    rig.bounds.change(rig.vm, rig.vm.config.replace(limit=VmLimits()))
    assert rig.limited == [(GROUP, VmLimits())]


@pytest.mark.parametrize(
    ("group", "missing", "note"),
    [
        ("/user.slice", {},
         "limit cpu and memory: without effect on this host: VMs have no control groups of their own"),
        (GROUP, {"cpu": ["cpu", "weight"]},
         "limit cpu and weight: without effect on this host: control groups of VMs have no controller cpu"),
    ],
)  # fmt: skip
def test_a_limit_without_effect(
    rig: Rig, capfd: pytest.CaptureFixture[str], group: str, missing: dict[str, list[str]], note: str
) -> None:
    """Each start and each change says so.  The log says it once.  No group of other programs is limited."""
    rig.group, rig.missing = group, missing
    assert rig.bounds.begin(rig.vm) == rig.bounds.begin(rig.vm) == [note]
    assert capfd.readouterr().err.count(note) == 1
    rig.vm.config = rig.vm.config.replace(limit=VmLimits(weight=3))
    assert rig.bounds.change(rig.vm, rig.vm.config.replace(limit=LIMITS))[1:] == [f"vm a: {note}"]
    assert {each for each, _ in rig.limited} <= {GROUP}


def test_a_group_that_cannot_be_limited(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """The VM runs without its limit.  Client and log are told why."""
    rig.trouble = HostError("write 7 to /sys/fs/cgroup/vm-4/cpu.weight", errno.EACCES)
    assert rig.bounds.begin(rig.vm) == [f"not limited: {rig.trouble}"]
    assert f"vm a: {rig.trouble}" in capfd.readouterr().err
    assert groups.GROUP == "vm-"
