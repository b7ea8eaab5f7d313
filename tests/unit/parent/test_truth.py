"""The state of a parent is read as it was written, by this version and by later ones."""

import errno
import json
import lzma
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from vmd.config.model import Config, DiskConfig, NicConfig, Owner, SwitchConfig, VmConfig
from vmd.errors import VmdError
from vmd.ipc.imsg import pack, unpack
from vmd.ipc.loop import Loop
from vmd.ipc.messages.figures import LifeEnd
from vmd.ipc.messages.priv import AdoptNics
from vmd.ipc.messages.shared import DiskImages, ImageLink
from vmd.ipc.messages.vm import NicLink
from vmd.parent import truth as module
from vmd.parent.addresses import Plan
from vmd.parent.core import Core
from vmd.parent.plans import Taps
from vmd.parent.statemem import StateMemory
from vmd.parent.truth import (
    Change,
    GenerationKnown,
    Truth,
    VmChange,
    VmKnown,
    Writer,
    config_of,
    folded,
    read,
    taps_known,
    taps_of,
    vm_known,
    vm_of,
    vms_of,
)
from vmd.parent.vm import Receiving, Sending, State, Vm
from vmd.record import Record

GOLDEN = Path(__file__).parents[2] / "golden" / "state-1.xz"
CONFIG = Config(switches=(SwitchConfig(name="uplink", interface="br0"),))
NOT_KEPT = {  # known by vmm, about clients of this parent, or not needed
    "pid", "pty", "backlog", "memory", "figures", "kept", "restarts", "ended_s", "sent", "sending", "receiving",
    "disk_work", "revive", "on_change", "on_event", "changes", "_state", "vmid", "key", "config", "files",
    "memory_lack", "claims",
}  # fmt: skip


@pytest.fixture
def memory() -> Iterator[StateMemory]:
    """Yield an empty memory."""
    made = StateMemory.create()
    yield made
    made.close()


@pytest.fixture
def core() -> Iterator[Core]:
    """Yield the state of a parent."""
    loop = Loop()
    yield Core(loop, CONFIG, verbosity=2)
    loop.close()


def taps() -> Taps:
    """Return the interface of a VM."""
    nic = NicConfig(lladdr=bytes(6), local=True)
    link = NicLink(name="tap3", lladdr=bytes(6), host_mac=bytes(6), locked=False, local=True, mtu=1500)
    plan = Plan(number=7, prefix4=CONFIG.settings.local_prefix)
    return Taps((nic,), plan, {0: "is odd"}, (link,), [], AdoptNics(vmid=1, nics=(), made=()))


def full(core: Core) -> Vm:
    """Return a VM whose fields all differ from their defaults."""
    vm = core.vms.add(VmConfig(name="a", disks=(DiskConfig(path="/a"),), owner=Owner(uid=4, gid=5)), from_config=True)
    vm.begin_start(7)
    vm.begin_run(4711)
    vm.guest_resets, vm.shown_before, vm.code = 3, 99, 12
    vm.last_end = LifeEnd(at_s=5, how="failed", text="so")
    vm.notes, vm.text = ("odd",), "why"
    vm.next_config = vm.config.replace(vcpus=2)
    vm.successor = vm.config.replace(vcpus=3)
    vm.running_config = vm.config.replace(vcpus=4)
    vm.going_back = True
    vm.resetting, vm.once_because, vm.console_user = True, "once", "root"
    vm.files = {"disk /a": (8, 15)}
    vm.disks = (DiskImages(images=(ImageLink(path="/a", format="raw"),)),)
    return vm


def test_a_vm_comes_back_as_it_was(core: Core) -> None:
    """Every field comes back, except those in NOT_KEPT.  A new field is in one of the two sets."""
    vm = full(core)
    back = vm_of(unpack(VmKnown, pack(vm_known(vm, 2, taps()))))
    assert back.state is State.RUNNING
    for field in ("vmid", "key", "config", "files", *(set(vars(vm)) - NOT_KEPT)):
        assert getattr(back, field) == getattr(vm, field), field
    fresh = Vm(1, vm.config, from_config=False)
    kept = [field for field in set(vars(vm)) - NOT_KEPT if getattr(vm, field) != getattr(fresh, field)]
    assert len(kept) >= len(set(vars(vm)) - NOT_KEPT) - 1  # all others have a value here that is not the default


def test_interfaces_come_back_as_they_were() -> None:
    """The descriptors come from vmm."""
    known = taps()
    back = taps_of(taps_known(known), [7])
    assert back.fds == [7]
    for field in ("nics", "plan", "lacking", "links", "known"):
        assert getattr(back, field) == getattr(known, field)


@pytest.mark.parametrize("state", State)
def test_every_state_comes_back(core: Core, state: State) -> None:
    """It is stored as the word that `vmctl status` prints."""
    vm = full(core)
    vm.restore_state(state)
    assert vm_of(vm_known(vm, 0, None)).state is state


def test_the_data_of_a_transfer_comes_back(core: Core) -> None:
    """Only the part that vmm does not know is stored."""
    vm = full(core)
    vm.sending = Sending(keep=False, state=State.RUNNING, carried=True)
    vm.sending.locks_travel = True
    known = vm_known(vm, 0, None).transfer
    assert known is not None
    assert (known.carried, known.locks_travel) == (True, True)
    vm.sending, vm.receiving = None, Receiving(paused=True, carried=True)
    known = vm_known(vm, 0, None).transfer
    assert known is not None
    assert (known.carried, known.paused) == (True, True)


def write(writer: Writer, interfaces: dict[int, Taps] | None = None) -> None:
    """Write the state."""
    writer.write(interfaces or {}, {}, [GenerationKnown(number=1, version="1")], lambda vmid: int(vmid == 1))


def test_all_is_written_and_read(core: Core, memory: StateMemory) -> None:
    """This includes configuration, VMs, generations, log level and identities."""
    full(core)
    core.vms.add(VmConfig(name="b"), from_config=False)
    write(Writer(memory, core), {1: taps()})
    truth = read(memory)
    assert config_of(truth) == CONFIG
    assert truth.verbosity == 2
    assert truth.identities == core.vms.identities.encode()
    assert [known.number for known in truth.generations] == [1]
    first, second = vms_of(truth)
    assert (first.config.name, first.generation, second.config.name, second.generation) == ("a", 1, "b", 0)
    assert first.taps is not None
    assert first.taps.links[0].name == "tap3"


def test_changes_are_written(core: Core, memory: StateMemory) -> None:
    """Changes of a VM's field, its interfaces and the configuration are written.  Other data is not packed again."""
    vm = full(core)
    writer = Writer(memory, core)
    write(writer)
    packed = read(memory).vms
    write(writer)
    assert read(memory).vms == packed
    vm.text = "something else"
    write(writer)
    assert vms_of(read(memory))[0].text == "something else"
    core.changed(vm.vmid)
    write(writer, {1: taps()})
    assert vms_of(read(memory))[0].taps is not None
    core.config = CONFIG.replace(switches=())
    write(writer)
    assert config_of(read(memory)).switches == ()
    core.vms.remove(vm)
    write(writer)
    assert vms_of(read(memory)) == []


def test_every_change_is_reported(core: Core) -> None:
    """Changes are reported of fields of a VM, of the configuration, and when a VM is added or removed."""
    heard = 0

    def hear() -> None:
        nonlocal heard
        heard += 1

    core.on_change = hear
    vm = full(core)
    changes: tuple[Callable[[], object], ...] = (
        lambda: setattr(vm, "text", "x"),
        lambda: vm.begin_stop(force=True),
        vm.changed,
        lambda: setattr(core, "config", CONFIG),
        lambda: core.vms.remove(vm),
    )
    for change in changes:
        before = heard
        change()
        assert heard > before


def test_changes_lead_to_the_same_state_as_complete_writes(core: Core, memory: StateMemory) -> None:
    """In every order of changes the next parent reads the same as if the whole state had been written each time."""
    chance, writer, complete = random.Random(3), Writer(memory, core), StateMemory.create()
    interfaces: dict[int, Taps] = {}
    left: dict[int, AdoptNics] = {}
    followed = 0
    generations = [GenerationKnown(number=1, version="1")]

    def touch(vm: Vm) -> None:
        chance.choice((vm.changed, lambda: setattr(vm, "text", str(chance.random())), vm.drop_seed))()

    def give_taps(vm: Vm) -> None:
        interfaces[vm.vmid] = taps()
        core.changed(vm.vmid)

    def leave(vm: Vm) -> None:
        interfaces.pop(vm.vmid, None)
        left[vm.vmid] = AdoptNics(vmid=vm.vmid, nics=(), made=())
        core.changed(vm.vmid)

    def forget(vm: Vm) -> None:
        left.pop(vm.vmid, None)
        core.changed(vm.vmid)

    def number(vm: Vm) -> None:
        core.vms.identities.of(vm.key).number = chance.randrange(99)
        core.vms.identities.changed(vm.key)

    def configure(vm: Vm) -> None:
        core.config = CONFIG.replace(vms=(vm.config,) * chance.randrange(3))

    def add(_vm: Vm) -> None:
        name = f"vm{chance.randrange(200)}"
        if core.vms.find(0, name) is None:
            core.vms.add(VmConfig(name=name, nics=(NicConfig(),)), from_config=chance.random() < 0.5)

    def forget_ids(_vm: Vm) -> None:
        core.verbosity = chance.randrange(3)
        generations[0] = GenerationKnown(number=1, version=str(core.verbosity))

    core.vms.add(VmConfig(name="first"), from_config=True)
    for _ in range(250):
        vm = chance.choice(list(core.vms))
        removes = [core.vms.remove] if len(core.vms) > 1 else []
        chance.choice([touch, give_taps, leave, forget, number, configure, add, add, forget_ids, *removes])(vm)
        writer.write(interfaces, left, generations, lambda vmid: vmid % 2)
        Writer(complete, core).write(interfaces, left, generations, lambda vmid: vmid % 2, plain=True)
        followed += len(memory.read()) > 1
        found, expected = read(memory), read(complete)
        assert json.loads(expected.identities)["vms"] != []
        for truth in (found, expected):
            rows = {row["name"]: row for row in json.loads(truth.identities)["vms"]}
            object.__setattr__(truth, "identities", rows)
            object.__setattr__(truth, "left", {each.vmid: each for each in truth.left})
        assert found == expected
    assert followed > 100
    complete.close()


def test_the_identity_that_was_used_last_is_the_last(core: Core, memory: StateMemory) -> None:
    """The order survives changes, so every parent forgets the identity first that was not used for the longest time."""
    writer = Writer(memory, core)
    core.vms.add(VmConfig(name="stays", owner=Owner(uid=7)), from_config=True)
    names = [f"vm{number}" for number in range(20)]
    for name in names:
        core.vms.remove(core.vms.add(VmConfig(name=name), from_config=False))
    write(writer)
    used = random.Random(4).sample(names, 10)
    for name in used:
        core.vms.remove(core.vms.add(VmConfig(name=name), from_config=False))
    write(writer)
    assert len(memory.read()) > 1
    assert json.loads(read(memory).identities) == json.loads(core.vms.identities.encode())
    assert [row["name"] for row in json.loads(read(memory).identities)["vms"]][-10:] == used


def test_the_next_write_repairs_a_failed_one(core: Core, memory: StateMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for a content and for a change."""
    vm = full(core)
    writer = Writer(memory, core)
    for number in range(4):
        vm.text, core.verbosity = f"text {number}", number
        core.config = CONFIG.replace(vms=(VmConfig(name=f"n{number}"),))
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room")))
            write(writer)
            found = [writer.failed]
        write(writer)
        assert [*found, writer.failed] == [True, False]
        truth = read(memory)
        assert (vms_of(truth)[0].text, config_of(truth), truth.verbosity) == (vm.text, core.config, number)


def test_a_vm_that_cannot_be_read_is_left_out(core: Core, memory: StateMemory) -> None:
    """The other VMs are adopted."""
    full(core)
    write(Writer(memory, core))
    truth = read(memory)
    for odd in (b"", b"\xc1", pack(LifeEnd(at_s=1, how="x"))):
        assert [known.config.name for known in vms_of(truth.replace(vms=(odd, *truth.vms)))] == ["a"]
    strange = unpack(VmKnown, truth.vms[0]).replace(state="upside down")
    assert vms_of(truth.replace(vms=(pack(strange),))) == []


@pytest.mark.parametrize("content", [None, b"", b"\xc1", b"\x80", pack(LifeEnd(at_s=1, how="x"))])
def test_an_invalid_state(memory: StateMemory, content: bytes | None) -> None:
    """One error message says so."""
    if content is not None:
        memory.write(content)
    with pytest.raises(VmdError, match="the state of the vmd before this one"):
        read(memory)


def test_a_state_of_a_later_version_is_refused(core: Core, memory: StateMemory) -> None:
    """Its version number decides.  Unknown fields are ignored."""
    write(Writer(memory, core))
    truth = read(memory)
    later = cast("Any", object.__new__(Truth))
    for field in Truth.fields:
        object.__setattr__(later, field, getattr(truth, field))
    object.__setattr__(later, "version", Truth.VERSION + 1)
    memory.write(pack(later))
    with pytest.raises(VmdError, match=f"version {Truth.VERSION + 1}"):
        read(memory)


def test_a_state_of_an_earlier_version_is_read(memory: StateMemory) -> None:
    """It was left by a daemon whose VM `a` was paused, and whose VM `b` was stopped by force."""
    memory.write(lzma.decompress(GOLDEN.read_bytes()))
    truth = read(memory)
    a, b = vms_of(truth)
    assert (a.name, a.state, a.generation, a.owner) == ("a", "paused", 1, 65534)
    assert a.taps is not None
    assert [(link.name, link.local) for link in a.taps.links] == [("tap0", False), ("tap1", True)]
    assert a.taps.plan.number > 0
    assert [each.what.split()[0] for each in a.files] == ["disk"]
    assert (b.name, b.state, b.generation, b.taps) == ("b", "stopped", 0, None)
    assert b.last_end is not None
    assert b.last_end.text == "stopped by force"
    assert [vm_of(known).name for known in (a, b)] == ["a", "b"]
    config = config_of(truth)
    assert [switch.name for switch in config.switches] == ["uplink"]
    assert config.settings.local_inet6
    assert [generation.number for generation in truth.generations] == [1]


def test_a_state_is_that_after_its_last_change() -> None:
    """A later change replaces an earlier one.  What a change does not have stays as it was."""
    first, second = GenerationKnown(number=1, version="1"), GenerationKnown(number=2, version="2")
    left = {vmid: AdoptNics(vmid=vmid, nics=(), made=()) for vmid in (1, 2, 3, 5)}
    before = Truth(
        program="1", config=b"c0", verbosity=0, identities=b"i", vms=(b"1", b"2", b"3"), vmids=(1, 2, 3),
        left=(left[1], left[2], left[3]), generations=(first,),
    )  # fmt: skip
    changes = [
        Change(vms=(VmChange(vmid=2, vm=b"two"), VmChange(vmid=7, vm=b"7")), verbosity=1, generations=(first, second)),
        Change(vms=(VmChange(vmid=1), VmChange(vmid=5, vm=b"5", left=left[5])), config=b"c1", verbosity=3),
        Change(vms=(VmChange(vmid=7),), verbosity=2, generations=(second,)),
    ]
    after = folded(before, changes)

    assert dict(zip(after.vmids, after.vms, strict=True)) == {2: b"two", 3: b"3", 5: b"5"}
    assert after.left == (left[3], left[5])
    assert (after.config, after.verbosity, after.generations) == (b"c1", 2, (second,))
    assert (after.identities, after.program) == (b"i", "1")
    assert folded(before, []) is before


@pytest.mark.parametrize(
    "record",
    [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Record) and each.__module__ == module.__name__
    ],
    ids=lambda each: each.__name__,
)
def test_a_field_that_an_earlier_version_has_not_written_is_empty(record: type[Record]) -> None:
    """It is 0, false, None or empty.  A record of a Part says its own version."""
    assert {name: value for name, value in record.defaults.items() if value and name != "version"} == {}
