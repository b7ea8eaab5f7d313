"""What clients learn about a VM: it fits into a message, and has paths only for those who control the VM."""

import os

import pytest

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
from vmd.parent.resources import Pty
from vmd.parent.vm import State, Vm

LONG = "/" + "\N{SNOWMAN}" * 3000
TO_COME = 2000  # bytes reserved for fields of later versions
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
    """Return a VM whose fields have their largest lengths.  It has ended once and runs again."""
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
    """Otherwise the list would end with it, for all users."""
    info = describe(vm_with_everything(), (NIC,) * MAX_NICS, ROOT)

    assert len(encode(info, form=Form.NAMED)[0]) < MAX_MESSAGE - TO_COME
    assert info.files is not None
    assert info.files.cdrom.endswith(" ...")


def test_files_are_for_users_who_may_control_the_vm() -> None:
    """Other users can see that the VM exists, and its owner."""
    vm = vm_with_everything()

    assert describe(vm, (), OTHER).files is None
    assert describe(vm, (), OTHER.replace(uid=88888)).files == describe(vm, (), ROOT).files is not None


def test_users_who_may_control_the_vm_see_the_user_of_its_seed() -> None:
    """That is the user that they log in as.  They also see that there is a seed."""
    vm = vm_with_everything()
    vm.config = vm.config.replace(seed=SeedConfig(user="ann", password="$6$x$hash"))

    info = describe(vm, (), ROOT)
    assert (info.login, info.files is not None and info.files.seed) == ("ann", True)
    assert "hash" not in repr(info)
    assert describe(vm, (), OTHER).login == ""
    assert describe(vm_with_everything(), (), ROOT).login == ""


def test_a_vm_that_does_not_run() -> None:
    """It uses no memory, has no terminal, and has not been started."""
    vm = Vm(1, VmConfig(name="a", vcpus=2, memory_bytes=1 << 30), from_config=True)
    vm.started_s = 5.5
    info = describe(vm, (NIC,), ROOT)

    assert (info.pid, info.resident_bytes, info.tty, info.started_s, info.restarts) == (0, 0, "", 0, 0)
    assert (info.vcpus, info.memory_bytes, info.gid, info.ended, info.nics) == (2, 1 << 30, None, None, (NIC,))


def test_a_vm_that_runs() -> None:
    """With the processors and memory that it was started with, whatever vm.conf says by now."""
    vm = Vm(1, VmConfig(name="a", vcpus=2), from_config=True)
    vm.pty = Pty()
    vm._state, vm.pid, vm.started_s, vm.guest_resets = State.RUNNING, os.getpid(), 5.5, 3
    vm.running_config = VmConfig(name="a", vcpus=4, memory_bytes=1 << 30, disks=(DiskConfig(path="/old"),))
    info = describe(vm, (), ROOT)

    assert (info.vcpus, info.memory_bytes, info.started_s, info.restarts) == (4, 1 << 30, 5, 3)
    assert info.resident_bytes > 0
    assert info.tty == vm.pty.path
    assert [disk.path for disk in info.files.disks] == ["/old"] if info.files else False
    vm.pty.close()


@pytest.mark.parametrize(("from_config", "enabled"), [(False, False), (False, True), (True, False), (True, True)])
def test_only_an_enabled_vm_of_vm_conf_starts_by_itself(from_config: bool, enabled: bool) -> None:
    """One that a client has described does not."""
    vm = Vm(1, VmConfig(name="a", enabled=enabled), from_config=from_config)
    assert describe(vm, (), ROOT).autostart == (from_config and enabled)
