"""When the state that outlives the parent is written, and what is taken over from an earlier parent."""

import errno
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from tests.unit.parent.timers import Timers
from vmd.config.model import Config, VmConfig
from vmd.errors import HostError
from vmd.ipc.imsg import pack
from vmd.parent import service, statemem
from vmd.parent.core import Core
from vmd.parent.identity import Identities
from vmd.parent.lasting import SAVE_REST, Lasting
from vmd.parent.statemem import StateMemory
from vmd.parent.store import Store
from vmd.parent.truth import Truth, read, vm_known, vms_of
from vmd.parent.vm import Vm

SAVING_S = 2.0  # how long the file of identities takes to be written
UNTIL_REST_S = SAVE_REST * SAVING_S  # from the end of one writing to the next


class Vmms(list[Any]):
    """The vmms: none."""

    def __init__(self) -> None:
        self.on_change: Any = None

    def number(self, _vmid: int) -> int:
        """No VM has a process."""
        return 0


class File:
    """The file of identities."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.now_s = 1000.0

    def load(self, identities: Identities) -> None:
        """Load one identity."""
        self.done.append("load")
        identities.of(("loaded", 0)).number = 77

    def save(self, _identities: Identities) -> None:
        """Write the file, which takes some time."""
        self.done.append("save")
        self.now_s += SAVING_S

    def close(self) -> None:
        """Close the file."""
        self.done.append("close")


class Rig:
    """The room, on a loop that does not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service, "notify", lambda *_: True)
        self.timers = Timers()
        self.core = Core(cast("Any", self.timers), Config())
        self.file = File()
        monkeypatch.setattr(time, "monotonic", lambda: self.file.now_s)
        self.store = Store()
        self.room = Lasting(self.core, self.store, cast("Any", self.file))
        self.vmms = Vmms()

    def keep(self) -> None:
        """Begin to keep the state."""
        self.room.keep(cast("Any", self.vmms), cast("Any", SimpleNamespace(taps={}, left={})))

    def due(self) -> list[float]:
        """Return the delays of the timers that run, without those that were cancelled."""
        return [delay_s for delay_s, timer in self.timers.timers if timer.callback is not None]

    def kept(self) -> list[str]:
        """Return the VMs that the next parent finds in the state."""
        memory = StateMemory(self.store.duplicate("state"))
        found = [known.name for known in vms_of(read(memory))] if memory.read() else ["no state"]
        memory.close()
        return found

    def add(self, name: str) -> Vm:
        """Add a VM."""
        return self.core.vms.add(VmConfig(name=name), from_config=True)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Yield the room."""
    rig = Rig(monkeypatch)
    yield rig
    if rig.room._writer is not None:
        rig.room._writer.memory.close()
    rig.room.forget()


def truth_of(*names: str, identities: bytes = b"") -> Truth:
    """Return the state of an earlier parent with these VMs."""
    table = Core(cast("Any", None), Config()).vms
    vms = [table.add(VmConfig(name=name), from_config=True) for name in names]
    packed = tuple(pack(vm_known(vm, 0, None)) for vm in vms)
    return Truth(program="1", config=b"", vms=packed, identities=identities)


# --- what is taken over -----------------------------------------------------------------------------------------


def test_the_vms_of_an_earlier_parent_are_taken_over(rig: Rig) -> None:
    """Each is taken over once.  A VM of vm.conf that is there already stays."""
    there = rig.add("b")
    found = rig.room.take(truth_of("a", "b", "c"))

    assert [known.name for known in found] == ["a", "c"]
    assert [vm.name for vm in rig.core.vms if vm is not there] == ["a", "c"]
    assert rig.core.vms.find(0, "b") is there


def test_identities_of_an_earlier_parent_are_saved_soon(rig: Rig) -> None:
    """They are newer than those of the file."""
    earlier = Identities()
    earlier.of(("old", 0)).number = 77
    rig.room.take(truth_of(identities=earlier.encode()))

    assert rig.core.vms.identities.of(("old", 0)).number == 77
    assert rig.file.done == ["load"]
    rig.timers.fire(0)
    assert rig.file.done == ["load", "save"]


def test_identities_of_an_earlier_parent_may_be_unreadable(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """Its VMs are taken over all the same."""
    assert len(rig.room.take(truth_of("a", identities=b"garbage"))) == 1
    assert "ids and addresses of the vmd before this one cannot be used: " in capfd.readouterr().err


# --- the state --------------------------------------------------------------------------------------------------


def test_the_state_is_written_once_for_several_changes(rig: Rig) -> None:
    """The first time when it begins to be kept, and then after each message that has changed something."""
    rig.add("a")
    rig.room.write()
    rig.room.plan(planned=False)
    assert rig.due() == [0]  # the identities, which are kept in a file; there is no state yet
    rig.keep()
    assert rig.kept() == ["no state"]
    rig.timers.fire(0)
    assert rig.kept() == ["a"]
    assert rig.due() == []
    for change in (rig.core.changed, rig.vmms.on_change):
        change(1)
        rig.core.changed()
        assert rig.due() == [0]
        rig.timers.fire(0)


def test_a_state_that_was_written_at_once_is_not_written_again(rig: Rig) -> None:
    """A room writes at once before it does what cannot be undone."""
    rig.keep()
    rig.add("a")
    assert rig.due() == [0, 0]
    rig.core.write()

    assert rig.kept() == ["a"]
    assert rig.due() == [0]  # the identities
    rig.timers.fire(0)
    assert rig.due() == []


def test_the_state_of_an_earlier_parent_is_continued(rig: Rig) -> None:
    """In the memory file that is stored already, whose descriptor in the store stays open."""
    memory = StateMemory.create()
    rig.store.put("state", memory.fd, poll=False)
    rig.add("a")
    rig.keep()
    rig.room.write()

    assert [known.name for known in vms_of(read(memory))] == ["a"]
    memory.close()
    assert rig.kept() == ["a"]


def test_a_host_without_memory_for_the_state(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what failed."""

    def refuse(_name: str) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(statemem, "memory_file", refuse)
    with pytest.raises(HostError, match="have a memory file for the state: Too many open files"):
        rig.keep()


def test_a_copy_of_the_state_is_that_of_now(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole state in the plain form, and no descriptor stays open, also if there is no memory for it."""
    rig.keep()
    rig.add("a")
    before = open_descriptors()
    copy = StateMemory(rig.room.copy())
    rig.add("b")
    rig.room.write()
    assert [known.name for known in vms_of(read(copy))] == ["a"]
    assert len(copy.read()) == 1
    copy.close()
    assert open_descriptors() == before

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.room, "write", lambda **_: None)
        patch.setattr(StateMemory, "write", refuse)
        with pytest.raises(OSError, match="full"):
            rig.room.copy()
    assert open_descriptors() == before


@pytest.mark.parametrize("planned", [False, True])
def test_the_next_parent_knows_whether_it_was_planned(rig: Rig, planned: bool) -> None:
    """A parent that was not told to hand over has crashed."""
    rig.keep()
    rig.room.plan(planned=not planned)
    rig.room.plan(planned=planned)
    rig.room.write()
    memory = StateMemory(rig.store.duplicate("state"))

    assert read(memory).planned is planned
    memory.close()


def test_a_daemon_that_ends_with_its_guests_leaves_no_state(rig: Rig) -> None:
    """The store is empty, and later changes are written nowhere."""
    rig.keep()
    memory = rig.room._writer.memory if rig.room._writer is not None else None
    assert memory is not None
    rig.store.put("vmm-1", 0)
    rig.timers.fire(0)
    rig.room.forget()

    assert rig.store.names == ()
    rig.core.changed()
    rig.room.write()
    assert rig.due() == []
    memory.close()


# --- the file of identities -------------------------------------------------------------------------------------


def test_identities_are_loaded_and_saved_after_a_change(rig: Rig) -> None:
    """Several changes are saved together.  After that the file rests for a multiple of the time that it took."""
    assert rig.core.vms.identities.of(("loaded", 0)).number == 77
    rig.add("a")
    rig.add("b")
    assert rig.due() == [0]
    rig.timers.fire(0)
    assert rig.file.done == ["load", "save"]

    rig.file.now_s += 5
    rig.add("c")
    rig.add("d")
    assert rig.due() == [UNTIL_REST_S - 5]
    rig.timers.fire(UNTIL_REST_S - 5)
    assert rig.file.done == ["load", "save", "save"]

    rig.file.now_s += UNTIL_REST_S + 1
    rig.add("e")
    assert rig.due() == [0]


def test_a_change_of_an_identity_is_in_the_state_at_once(rig: Rig) -> None:
    """The file may have to wait."""
    rig.keep()
    rig.timers.fire(0)
    rig.core.vms.identities.changed(("loaded", 0))

    assert rig.due() == [0, 0]


@pytest.mark.parametrize("change", [False, True])
def test_a_parent_that_ends_saves_its_identities(rig: Rig, change: bool) -> None:
    """If there is a change that was not saved yet.  The state is written, too, and the file is closed."""
    rig.keep()
    if change:
        rig.add("a")
    rig.room.close()

    assert rig.file.done == ["load", *(["save"] if change else []), "close"]
    assert rig.kept() == (["a"] if change else [])


def test_a_daemon_without_a_file_of_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has new identities, and saves none."""
    timers = Timers()
    core = Core(cast("Any", timers), Config())
    monkeypatch.setattr(service, "notify", lambda *_: True)
    room = Lasting(core, Store(), None)
    core.vms.add(VmConfig(name="a"), from_config=True)
    timers.fire(0)
    room.close()

    assert timers.timers == []
