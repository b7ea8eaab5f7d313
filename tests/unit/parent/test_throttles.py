"""The event `throttled`: waiting for a limit is reported once, until there was no waiting for some time."""

import itertools
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.parent.test_figures import Parent
from vmd.config.model import DiskConfig, NicConfig, VmConfig, VmLimits
from vmd.ipc import devmsg
from vmd.ipc.figures import GroupFigures
from vmd.memfile import sealed_file
from vmd.parent import throttles
from vmd.parent.throttles import LEAST_NS, QUIET_LOOKS, Throttles
from vmd.parent.vm import Vm

KINDS = {"vioblk": ("disk", "throttled_ns"), "vionet": ("interface", "tx_throttled_ns")}


class Clock:
    """A clock that advances ten seconds between two looks."""

    def __init__(self) -> None:
        self.times = itertools.count(1000.0, 10.0)

    def monotonic(self) -> float:
        """Return the time of the next look."""
        return next(self.times)


class Watched(Parent):
    """A parent with a running VM `a` that has limits, and the counters of its devices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.cpu_ns = 0
        monkeypatch.setattr(throttles, "time", Clock())
        monkeypatch.setattr(throttles, "group_of", lambda _mounts, _pid: GroupFigures(throttled_ns=self.cpu_ns))
        self.page = sealed_file("figures", devmsg.FIGURES_BYTES)
        self.vm = self.core.vms.get(0, "a")
        self.vm.config = self.vm.config.replace(
            disks=(DiskConfig(path="/a"), DiskConfig(path="/b", iops_limit=40, rate_limit=32 << 20)),
            nics=(NicConfig(rate_limit=5 << 20), NicConfig()),
            limit=VmLimits(cpu_percent=150),
        )
        self.vm.begin_start(0)
        self.vm.begin_run(os.getpid())
        self.vm.figures = self.page
        self.room_of_limits = Throttles(self.core)

    def wait(self, slot: int, kind: str, index: int, waited_ns: int) -> None:
        """Set how long a device has waited in its life."""
        names = devmsg.FIGURES[kind]
        values = [waited_ns if name == KINDS[kind][1] else 0 for name in names]
        number = devmsg.FIGURES_KINDS.index(kind) + 1
        raw = struct.pack(f"<{3 + len(values)}Q", number, index, len(values), *values)
        os.pwrite(self.page, raw, slot * devmsg.FIGURES_SLOT_BYTES)

    def look(self) -> list[tuple[str, str]]:
        """Look again.  Return the new events."""
        before = list(self.core.events._past)
        self.later.pop(0)()
        return [(event.device, event.text) for event in list(self.core.events._past)[len(before) :]]


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Yield a parent that has looked once."""
    made = Watched(monkeypatch)
    made.room_of_limits.begin()
    yield made
    os.close(made.page)


def test_each_waiting_device_is_one_event(parent: Watched) -> None:
    """The event has device and limit.  A device without a limit, or with little waiting, causes none."""
    parent.wait(0, "vioblk", 1, 3_200_000_000)
    parent.wait(1, "vioblk", 0, 3_200_000_000)
    parent.wait(2, "vionet", 0, LEAST_NS - 1)
    parent.wait(3, "vionet", 1, 9_000_000_000)
    assert parent.look() == [("disk1", "limit iops 40 rate 32.0M: has waited for 3.2 s of the last 10")]

    parent.cpu_ns = 500_000_000
    parent.wait(0, "vioblk", 1, 9_000_000_000)
    parent.wait(2, "vionet", 0, 2 * LEAST_NS)
    assert parent.look() == [
        ("", "limit cpu 150%: has waited for 0.5 s of the last 10"),
        ("interface0", "limit rate 5.0M: has waited for 0.1 s of the last 10"),
    ]
    parent.cpu_ns *= 2
    parent.wait(0, "vioblk", 1, 10_000_000_000)
    assert parent.look() == []


def test_there_is_a_new_event_after_some_looks_without_waiting(parent: Watched) -> None:
    """One look without waiting is not enough.  The counters begin at 0 when the guest starts again."""
    waited_ns = 0
    heard = []
    for waits in (True, *[False] * (QUIET_LOOKS - 1), True, *[False] * QUIET_LOOKS, True):
        waited_ns += LEAST_NS * waits
        parent.wait(0, "vioblk", 1, waited_ns)
        heard.append(len(parent.look()))
    assert heard == [1] + [0] * QUIET_LOOKS + [0] * QUIET_LOOKS + [1]

    parent.wait(0, "vioblk", 1, 0)
    assert parent.look() == []
    parent.wait(0, "vioblk", 1, LEAST_NS)
    assert len(parent.look()) == 1


def test_there_are_no_looks_without_limits(parent: Watched) -> None:
    """They end with the last VM that has limits.  The next such VM starts them again, once."""
    parent.room_of_limits.begin()
    assert len(parent.later) == 1
    config = parent.vm.config
    parent.vm.config = config.replace(disks=(), nics=(), limit=VmLimits(memory_bytes=1 << 30, weight=5))
    assert parent.look() == []
    assert not parent.later
    parent.room_of_limits.begin()
    assert not parent.later
    parent.vm.config = config
    parent.room_of_limits.begin()
    parent.room_of_limits.begin()
    assert len(parent.later) == 1


@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        ({}, []),
        ({"limit": VmLimits(memory_bytes=1, weight=3)}, []),
        ({"limit": VmLimits(cpu_percent=50)}, [("", "cpu 50%", 7)]),
        ({"disks": (DiskConfig(path="/a"), DiskConfig(path="/b", iops_limit=4))}, [("disk1", "iops 4", 0)]),
        ({"disks": (DiskConfig(path="/a", rate_limit=1 << 20),)}, [("disk0", "rate 1.0M", 0)]),
        ({"nics": (NicConfig(), NicConfig(rate_limit=1 << 20))}, [("interface1", "rate 1.0M", 0)]),
    ],
)
def test_limits_that_make_something_wait(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], limits: list[tuple[str, str, int]]
) -> None:
    """Those of devices and of processors.  A VM of an earlier version counts nothing."""
    monkeypatch.setattr(throttles, "group_of", lambda _mounts, _pid: GroupFigures(throttled_ns=7))
    config = VmConfig(name="a", **fields)
    vm = Vm(1, config, from_config=True)
    vm.pid = 5
    assert throttles.limited(config) == bool(limits)
    assert list(throttles.waits(vm, config, "")) == limits
    for group in (None, GroupFigures()):
        monkeypatch.setattr(throttles, "group_of", lambda _mounts, _pid, group=group: group)
        assert list(throttles.waits(vm, config, "")) == [each for each in limits if each[0]]


def test_the_limits_that_a_vm_runs_with_count(parent: Watched) -> None:
    """Only of VMs with a process."""
    waiting = parent.core.vms.get(0, "b")
    waiting.config = waiting.config.replace(limit=VmLimits(cpu_percent=1))
    bare = parent.vm.config.replace(disks=(), nics=(), limit=VmLimits())
    parent.vm.running_config = bare
    assert parent.look() == []
    assert not parent.later
    for only in (None, parent.vm, waiting):
        parent.room_of_limits.begin(only)
        assert not parent.later
    parent.vm.config, parent.vm.running_config = bare, parent.vm.config
    parent.room_of_limits.begin(waiting)
    assert not parent.later
    parent.room_of_limits.begin(parent.vm)
    assert len(parent.later) == 1
    parent.wait(0, "vioblk", 1, LEAST_NS)
    assert [device for device, _ in parent.look()] == ["disk1"]
