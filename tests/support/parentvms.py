"""The VMs of a parent that a test plays."""

from vmd.parent.vmtable import VmTable


def close_vms(vms: VmTable) -> None:
    """Close the files that are open for VMs, as their ends would."""
    for vm in vms:
        vm.take_memory(None)
        vm.take_figures(None)
        vm.drop_files()
        vm.drop_pty()
