"""What a new configuration changes for a running VM."""

import pytest

from vmd.config.model import ConsoleLog, Owner, VmConfig
from vmd.parent.reload import AT_ONCE, replace_all
from vmd.parent.vm import Vm
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
