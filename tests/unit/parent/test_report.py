"""What clients are told of a VM: as much as fits a message, and its files only if they may control it."""

import os

from vmd.config.model import (
    CMDLINE_MAX,
    IFNAME_MAX,
    MAX_DISKS,
    MAX_NICS,
    NAME_MAX,
    DiskConfig,
    Owner,
    SeedConfig,
    VmConfig,
)
from vmd.ipc.imsg import MAX_MESSAGE, Form, encode
from vmd.ipc.messages.clients import Caller, NicInfo
from vmd.ipc.messages.shared import brief
from vmd.parent.report import describe
from vmd.parent.vm import State, Vm

LONG = "/" + "\N{SNOWMAN}" * 3000
TO_COME = 2000  # bytes for fields that later versions add
NIC = NicInfo(
    index=1 << 31,
    tap="t" * IFNAME_MAX,
    switch="s" * NAME_MAX,
    lladdr=bytes(6),
    up=True,
    locked=True,
    local=True,
    mtu=65535,
    guest4=bytes(4),
    host4=bytes(4),
    prefix6=bytes(16),
)
ROOT, OTHER = Caller(uid=0, gid=0, pid=1), Caller(uid=77777, gid=77777, pid=1)


def vm_with_everything() -> Vm:
    """Return a VM of which everything is as long as it can be, that ended and ends once more."""
    config = VmConfig(
        name="n" * NAME_MAX,
        kernel=LONG,
        initrd=LONG,
        cmdline="x" * CMDLINE_MAX,
        disks=(DiskConfig(path=LONG, format="qcow2", serial="s" * 20),) * MAX_DISKS,
        cdrom=LONG,
        owner=Owner(uid=88888, gid=88888),
    )
    vm = Vm(1, config, from_config=True)
    vm.ended(brief(LONG))
    vm._state, vm.text, vm.pid = State.PAUSED, brief(LONG), os.getpid()
    return vm


def test_a_vm_with_everything_fits_a_message() -> None:
    """Else the list would end with it, for everybody."""
    info = describe(vm_with_everything(), (NIC,) * MAX_NICS, ROOT)

    assert len(encode(info, form=Form.NAMED)[0]) < MAX_MESSAGE - TO_COME
    assert info.files is not None
    assert info.files.cdrom.endswith(" ...")


def test_files_are_for_those_who_may_control_the_vm() -> None:
    """Others may see that it is there, and who has it."""
    vm = vm_with_everything()

    assert describe(vm, (), OTHER).files is None
    assert describe(vm, (), OTHER.replace(uid=88888)).files == describe(vm, (), ROOT).files is not None


def test_of_a_seed_its_user_is_told_to_those_who_may_control_the_vm() -> None:
    """That is whom they log in as; and that there is one."""
    vm = vm_with_everything()
    vm.config = vm.config.replace(seed=SeedConfig(user="ann", password="$6$x$hash"))

    info = describe(vm, (), ROOT)
    assert (info.login, info.files is not None and info.files.seed) == ("ann", True)
    assert "hash" not in repr(info)
    assert describe(vm, (), OTHER).login == ""
    assert describe(vm_with_everything(), (), ROOT).login == ""
