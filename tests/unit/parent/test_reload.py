"""What a new configuration changes for a running VM."""

import pytest

from vmd.config.model import ConsoleLog, DiskConfig, NicConfig, Owner, Rights, VmConfig, VmLimits
from vmd.parent.reload import AT_ONCE, differences, register, replace_all
from vmd.parent.vm import State, Vm
from vmd.parent.vmtable import VmTable

USER = Owner(uid=1000)
LOG = ConsoleLog(path="/var/log/web")
# Fields that take effect at the next start of a running VM.  The limits in `disks`, `nics` and `limit`, and the
# forwards in `nics`, also take effect at once (`with_limits`, `with_forwards`).
WAITS = {
    "allow", "boot_device", "cdrom", "cmdline", "disks", "drive", "enabled", "fault", "given", "initrd", "kernel",
    "limit", "memory_bytes", "name", "nics", "origin", "owner", "parent", "plan_id", "plan_prefix4", "plan_prefix6",
    "rights", "seed", "sev", "sev_es", "vcpus", "virtio",
}  # fmt: skip


def test_each_field_takes_effect_at_once_or_at_the_next_start() -> None:
    """A new field of a VM is in AT_ONCE, or in WAITS."""
    assert set(VmConfig.fields) - set(AT_ONCE) == WAITS, "a field is neither in AT_ONCE of reload.py nor in WAITS"


@pytest.mark.parametrize(("owner", "is_its_own"), [(Owner(), True), (USER, False)])
def test_changes_at_once_are_for_the_vm_of_the_owner_in_vm_conf(
    monkeypatch: pytest.MonkeyPatch, owner: Owner, is_its_own: bool
) -> None:
    """A user's VM may have the name of a VM of root in vm.conf.

    It does not get the log, ports and limits of that VM.
    """
    monkeypatch.setattr(Vm, "alive", property(lambda _vm: True))
    table = VmTable()
    vm = table.add(VmConfig(name="web", owner=owner), from_config=False)
    wanted, told = VmConfig(name="web", console_log=LOG, memory_bytes=1 << 30), []

    def at_once(_vm: Vm, config: VmConfig) -> list[str]:
        told.append(config)
        return ["at once"]

    notes = replace_all(table, [wanted], at_once)

    assert bool(told) == is_its_own
    assert vm.config.console_log == (LOG if is_its_own else None)
    assert ("at once" in notes) == is_its_own
    assert any("memory" in note and "next start" in note for note in notes)
    assert vm.next_config == table.with_all_lladdrs(wanted)


def conf(name: str, **fields: object) -> VmConfig:
    """Return a VM of vm.conf."""
    return VmConfig(name=name, origin=f"vm.conf:{name}", enabled=False).replace(**fields)


def names(table: VmTable) -> list[str]:
    """Return the names of the VMs, by id."""
    return [vm.name for vm in table]


def none(_vm: Vm, _config: VmConfig) -> list[str]:
    """Change nothing at once."""
    return []


def test_vms_are_added_once() -> None:
    """A VM whose name is known stays as it is.  An enabled VM waits for its start."""
    table = VmTable()
    assert register(table, [conf("a"), conf("b", enabled=True)]) == []
    assert [(vm.name, vm.state, vm.from_config) for vm in table] == [
        ("a", State.STOPPED, True), ("b", State.WAITING, True)
    ]  # fmt: skip
    notes = register(table, [conf("c"), conf("a", vcpus=4)])
    assert notes == ["vm.conf:a: vm a skipped (already exists)"]
    assert (names(table), table.get(0, "a").config.vcpus) == (["a", "b", "c"], 1)


def test_a_vm_that_is_being_reset_has_one_successor() -> None:
    """It is the first of that name, and is added when the old one has ended."""
    table = VmTable()
    register(table, [conf("a")])
    vm = table.get(0, "a")
    vm.resetting = True
    assert register(table, [conf("a", vcpus=2)]) == []
    assert register(table, [conf("a", vcpus=3)]) == ["vm.conf:a: vm a skipped (already exists)"]
    assert vm.successor is not None
    assert (vm.successor.vcpus, vm.config.vcpus) == (2, 1)

    vm.restore_state(State.RUNNING)
    assert replace_all(table, [conf("a", vcpus=5), conf("b")], none) == []
    assert (vm.successor.vcpus, names(table)) == (5, ["a", "b"])
    replace_all(table, [conf("b")], none)
    left: object = vm.successor
    assert (left, names(table)) == (None, ["a", "b"])


def test_vms_that_do_not_run_are_replaced() -> None:
    """Those of vm.conf, and a user's one whose name vm.conf has now.  Other VMs of users stay."""
    table = VmTable()
    register(table, [conf("gone"), conf("same")])
    for name in ("mine", "taken"):
        table.add(conf(name, owner=USER, vcpus=2), from_config=False)
    wanted = [conf("same", vcpus=3), conf("same", vcpus=9), conf("taken"), conf("new", enabled=True)]
    assert replace_all(table, wanted, none) == []
    assert {vm.name: (vm.config.vcpus, vm.from_config, vm.state) for vm in table} == {
        "same": (3, True, State.STOPPED), "mine": (2, False, State.STOPPED), "taken": (1, True, State.STOPPED),
        "new": (1, True, State.WAITING),
    }  # fmt: skip


def test_running_vms_stay() -> None:
    """The next start counts.  A VM that is not configured any more is forgotten when it stops."""
    table = VmTable()
    register(table, [conf("changed"), conf("same"), conf("gone")])
    table.add(conf("mine", owner=USER), from_config=False)
    table.add(conf("back"), from_config=False)
    for vm in table:
        vm.restore_state(State.RUNNING)
        vm.next_config = vm.config
    back = table.get(0, "back")
    other = conf("changed", vcpus=2, memory_bytes=1 << 30, disks=(DiskConfig(path="/d"),))
    wanted = [other, conf("same"), conf("back")]
    assert sorted(replace_all(table, wanted, none)) == [
        "vm changed: memory, vcpus, disks changed; that waits for its next start",
        "vm gone is no longer configured; it is forgotten when it stops",
    ]
    state = {vm.name: (vm.config.vcpus, vm.from_config, vm.next_config and vm.next_config.vcpus) for vm in table}
    assert state == {
        "changed": (1, True, 2), "same": (1, True, None), "gone": (1, False, None), "mine": (1, False, 1),
        "back": (1, True, None),
    }  # fmt: skip
    assert table.get(0, "back") is back


NIC, MAC = NicConfig(lladdr=b"\2aaaaa", local=True), b"\2bbbbb"


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ({}, {}, []),
        ({}, {"vcpus": 2}, ["vcpus"]),
        ({}, {"memory_bytes": 1 << 30}, ["memory"]),
        ({}, {"limit": VmLimits(cpu_percent=5)}, []),
        ({}, {"origin": "other", "drive": True, "rights": Rights(disks=USER)}, []),
        ({"nics": (NIC,)}, {"nics": (NIC.replace(lladdr=b""),)}, []),  # an automatic address
        ({"nics": (NIC,)}, {"nics": (NIC.replace(lladdr=MAC),)}, ["interfaces"]),
        ({"nics": (NIC,)}, {"nics": (NIC,)}, []),
        ({"nics": (NIC,)}, {"nics": (NIC.replace(lladdr=b"", local=False),)}, ["interfaces"]),
        ({"nics": (NIC,)}, {"nics": ()}, ["interfaces"]),
        ({"nics": ()}, {"nics": (NIC.replace(lladdr=b""),)}, ["interfaces"]),
        ({"nics": (NIC, NIC)}, {"nics": (NIC.replace(lladdr=b""),)}, ["interfaces"]),
        ({"nics": (NIC, NIC)}, {"nics": (NIC.replace(lladdr=b""), NIC)}, []),
    ],
)
def test_what_waits_for_the_next_start(old: dict[str, object], new: dict[str, object], changed: list[str]) -> None:
    """Only what the operator has changed is named, with the words of vm.conf."""
    assert differences(conf("a").replace(**old), conf("a").replace(**new)) == changed
