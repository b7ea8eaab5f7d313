"""Control groups of VMs, on a kernel with the controller and a host without systemd."""

from pathlib import Path

import pytest

from tests.support.bystander import DRIVE, vm_block
from tests.support.daemon import Daemon
from vmd.parent.groups import PREFIX, directory_of
from vmd.privsep.ids import TASKS_MAX

pytestmark = [pytest.mark.l1, pytest.mark.deep, pytest.mark.timeout(400)]


def test_tasks_of_a_vm_are_limited(tmp_path: Path) -> None:
    """A VM and its device processes have their own group.  The daemon moves itself to a subgroup to allow that."""
    with Daemon(tmp_path, vm_block("a", DRIVE)) as vmd:
        vmd.must("start", "a")
        processes = vmd.processes()
        vm, device, vmm = (Path(directory_of(processes[f"vmd: {title}"])) for title in ("vm/a", "vm/a/vioscsi0", "vmm"))

        assert (vm / "pids.max").read_text() == f"{TASKS_MAX}\n"
        assert device == vm
        assert vm.parent == vmm.parent
        assert vm.parent.name.startswith(PREFIX)
        assert Path(directory_of(vmd.pid)) == vm.parent.parent / "core"

    assert not vm.parent.exists()
