"""The block that vmctl clone prints."""

import itertools
from pathlib import Path

import pytest

from tests.unit.vmctl.fake import vm_info
from vmctl.commands.clone import Limits, block, interface
from vmd.config.check import load
from vmd.config.model import Forward, NicConfig
from vmd.ipc.figures import DiskFigures, LimitFigures, NicFigures
from vmd.ipc.messages.clients import NicInfo, VmFiles, VmInfo
from vmd.ipc.messages.figures import VmFigures


@pytest.mark.parametrize(
    ("figures", "lines"),
    [
        ([], ['disk "/a" format raw', "interface", "local interface"]),
        (
            [VmFigures(
                vmid=1, name="old", uid=0, state="stopped", disks=(DiskFigures(index=0, rate_limit=65537),),
                nics=(NicFigures(index=0, rate_limit=5 << 20), NicFigures(index=1)), limit=LimitFigures(cpu_percent=50),
            )],
            ['disk "/a" format raw limit rate 65537', "interface { limit rate 5M }", "local interface",
             "limit { cpu 50% }"],
        ),
    ],
)  # fmt: skip
def test_limits_are_those_of_the_old_vm(figures: list[VmFigures], lines: list[str]) -> None:
    """Each limit stands at its device or VM, in whole units where possible."""
    nics = [
        NicInfo(index=index, tap="", switch="", lladdr=b"", up=True, locked=False, local=local)
        for index, local in enumerate((False, True))
    ]
    old = VmInfo(
        vmid=1, name="old", pid=0, memory_bytes=512 << 20, resident_bytes=0, vcpus=1, tty="", owner="", uid=0,
        gid=0, state="stopped", files=VmFiles(), nics=tuple(nics),
    )  # fmt: skip

    assert block(old, "new", [("/a", "raw")], Limits(figures)) == [
        'vm "new" {', "    memory 512M", *(f"    {line}" for line in lines), "}"
    ]  # fmt: skip


@pytest.mark.parametrize("options", list(itertools.product((False, True), repeat=5)), ids=str)
def test_printed_interfaces_can_be_loaded(tmp_path: Path, options: tuple[bool, ...]) -> None:
    """The printed line is read as the same interface, for all combinations of options."""
    local, on_switch, locked, kernel, limited = options
    nic = NicInfo(
        index=0, tap="", switch="lan" if on_switch else "", lladdr=b"", up=True, locked=locked, local=local,
        vhost=kernel,
    )  # fmt: skip
    conf = tmp_path / "vm.conf"
    line = interface(nic, "limit rate 1M" if limited else "")
    conf.write_text(f'switch "lan" {{ interface br0 }}\nvm "a" {{\ndisable\n{line}\n}}\n')

    (read,) = load(str(conf), warn=print).vms[0].nics

    wanted = NicConfig(local=local, switch=nic.switch, locked=locked, vhost=kernel, rate_limit=limited << 20)
    assert read == wanted


def test_forwards_are_not_forgotten() -> None:
    """Two VMs cannot have the same host ports, so the user must choose others for the clone."""
    local = NicInfo(index=0, tap="", switch="", lladdr=bytes(6), up=True, locked=False, local=True)
    remark = "    # forwards of old are in its block; the new VM needs other ports of the host"
    for forwards, said in (((Forward(port=8022, to=22),), True), ((), False)):
        old = vm_info("old", files=VmFiles(), nics=(local.replace(forwards=forwards),))
        assert (remark in block(old, "new", [], Limits([]))) is said


def test_a_seed_is_not_forgotten() -> None:
    """Its options are unknown to vmctl.  Without a seed the clone's guest would keep the identity of the old one."""
    old = vm_info("old", files=VmFiles(seed=True))

    assert "    # add a seed here, as in the block of old" in "\n".join(block(old, "new", [], Limits([])))
