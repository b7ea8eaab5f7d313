"""What a configuration that is read anew means for a VM that runs."""

import pytest

from vmd.config.model import ConsoleLog, Owner, VmConfig
from vmd.parent.reload import AT_ONCE, replace_all
from vmd.parent.vm import Vm
from vmd.parent.vmtable import VmTable

USER = Owner(uid=1000)
LOG = ConsoleLog(path="/var/log/web")
# What a VM that runs has from its next start on: the guest's, and who it belongs to.  Of `disks`, `nics` and `limit`
# the limits, and of `nics` the forwards, count at once as well (`with_limits`, `with_forwards`).
WAITS = {
    "allow", "boot_device", "cdrom", "cmdline", "disks", "drive", "enabled", "fault", "given", "initrd", "kernel",
    "limit", "memory_bytes", "name", "nics", "origin", "owner", "parent", "plan_id", "plan_prefix4", "plan_prefix6",
    "rights", "seed", "sev", "sev_es", "vcpus", "virtio",
}  # fmt: skip


def test_of_each_field_it_is_known_when_it_counts() -> None:
    """A new field of a VM is in AT_ONCE, or named here."""
    assert set(VmConfig.fields) - set(AT_ONCE) == WAITS, "a field is neither in AT_ONCE of reload.py nor in WAITS"


@pytest.mark.parametrize(("owner", "is_its_own"), [(Owner(), True), (USER, False)])
def test_what_counts_at_once_is_for_the_vm_of_whom_the_file_names(
    monkeypatch: pytest.MonkeyPatch, owner: Owner, is_its_own: bool
) -> None:
    """A user's VM that runs under a name which vm.conf gives to root's has neither its log, ports nor limits."""
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
