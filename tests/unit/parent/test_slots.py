"""The slots that the parent gives to vmm, and the groups that it removes when their processes have ended."""

import errno
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.unit.parent.timers import Timers
from vmd.errors import HostError
from vmd.ipc.messages.vmm import VmSlot
from vmd.ipc.routes import Proc
from vmd.parent.slots import REMOVE_S, Slots


class Groups:
    """The control groups of a vmm.  Some of them are not empty when the first attempts are made to remove them."""

    def __init__(self, busy: int = 0) -> None:
        self.busy = busy
        self.ended: list[int] = []
        self.attempts = 0
        self.fd = -1

    def make(self) -> tuple[int, int]:
        """Make a group."""
        self.fd = os.open(os.devnull, os.O_RDONLY)
        return 4, self.fd

    def end(self, number: int) -> str:
        """Note that a group has ended."""
        self.ended.append(number)
        return "its limit of memory"

    def remove(self) -> bool:
        """Try to remove the groups; return whether some are left."""
        self.attempts += 1
        return self.attempts <= self.busy


class Rig:
    """The room.  The test plays vmm."""

    def __init__(self) -> None:
        self.timers = Timers()
        self.given: list[tuple[Proc, VmSlot, dict[str, list[int]]]] = []
        self.room = Slots(cast("Any", self.timers), cast("Any", self))

    def send(self, proc: Proc, message: VmSlot, *, fds: dict[str, list[int]]) -> None:
        """Take a message to vmm."""
        self.given.append((proc, message, fds))


@pytest.fixture
def rig() -> Rig:
    """The room of slots."""
    return Rig()


def test_a_slot_has_a_user_id_and_a_group(rig: Rig) -> None:
    """The group is one of the newest vmm, which starts the next VM."""
    groups, old = Groups(), Groups()
    rig.room.use(groups, newest=True)  # type: ignore[arg-type]
    rig.room.use(old, newest=False)  # type: ignore[arg-type]
    rig.room.ids = cast("Any", SimpleNamespace(take=lambda: 4711))
    rig.room.give()

    assert rig.given == [(Proc.VMM, VmSlot(uid=4711, group=4), {"group": [groups.fd]})]
    os.close(groups.fd)


def test_a_host_without_ids_and_groups(rig: Rig) -> None:
    """The VM process has the user id of vmm and is in its group.  When it ends, no group is removed."""
    rig.room.use(None, newest=True)
    rig.room.give()

    assert rig.given == [(Proc.VMM, VmSlot(uid=0, group=0), {})]
    assert rig.room.over(None, 3) == ""


def test_a_group_that_cannot_be_made(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next VM runs without a group of its own, and the log says that."""

    def refuse() -> tuple[int, int]:
        raise HostError("make /x/vm-4", errno.ENOSPC)

    groups = Groups()
    monkeypatch.setattr(groups, "make", refuse)
    rig.room.use(groups, newest=True)  # type: ignore[arg-type]
    rig.room.give()

    assert rig.given == [(Proc.VMM, VmSlot(uid=0, group=0), {})]
    said = "make /x/vm-4: No space left on device: the next VM has no control group of its own"
    assert said in capfd.readouterr().err


def test_a_group_is_removed_when_it_is_empty(rig: Rig) -> None:
    """One timer runs for all vmms, as long as one of their groups has processes."""
    first, second = Groups(), Groups(busy=3)
    for groups in (first, second):
        rig.room.use(groups, newest=True)  # type: ignore[arg-type]
    assert rig.room.over(second, 7) == "its limit of memory"  # type: ignore[arg-type]
    assert rig.room.over(first, 8) == "its limit of memory"  # type: ignore[arg-type]
    assert (first.ended, second.ended) == ([8], [7])
    assert (first.attempts, second.attempts) == (1, 1)
    for attempts in (2, 3, 4):
        assert len(rig.timers.timers) == 1
        rig.timers.fire(REMOVE_S)
        assert (first.attempts, second.attempts) == (attempts, attempts)
    assert rig.timers.timers == []


def test_a_process_without_a_group_leaves_none(rig: Rig) -> None:
    """Its slot has the number 0."""
    groups = Groups()
    rig.room.use(groups, newest=True)  # type: ignore[arg-type]

    assert rig.room.over(groups, 0) == ""  # type: ignore[arg-type]
    assert (groups.ended, groups.attempts) == ([], 0)
