"""Hints of `vmd -n` about a VM that are not about errors in vm.conf."""

import os
from pathlib import Path
from typing import Any

import pytest

from vmd.config.model import Config, DiskConfig, Globals, NicConfig, SeedConfig, SwitchConfig, VmConfig
from vmd.parent import examine, vhost
from vmd.parent.examine import Examination


def test_a_host_without_vhost_is_named_for_each_interface_and_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is examined each time, because it may have changed since."""
    reasons = ["there is no /dev/vhost-net", "there is no /dev/vhost-net", ""]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(vhost, "lacking", lambda: reasons.pop(0))
    vm = VmConfig(name="a", nics=(NicConfig(vhost=True), NicConfig(), NicConfig(vhost=True)))

    said = [list(examine.of_vhost(vm)) for _ in range(3)]

    assert [len(each) for each in said] == [2, 2, 0]
    assert [line.split(":")[0] for line in said[0]] == ["interface 0", "interface 2"]
    assert all("there is no /dev/vhost-net" in line for line in said[1])


# --- all VMs of a configuration ---------------------------------------------------------------------------------


def run(*vms: VmConfig, deadline_s: float = float("inf"), probers: Any = None, **settings: Any) -> list[str]:  # noqa: ANN401
    """Return the warnings about VMs, without the file and line."""
    config = Config(vms=vms, settings=Globals(**settings))
    said: list[str] = []
    Examination([*vms], config, probers, deadline_s).run(said.append)
    return [line.removeprefix("vm.conf:1: ") for line in said]


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No file is opened.  Return the paths of the images that are examined."""
    paths: list[str] = []

    def look(_self: Examination, disk: DiskConfig, _prober: object, _boots: bool) -> list[str]:
        paths.append(disk.path)
        return [f"disk {disk.path}: odd length"]

    monkeypatch.setattr(Examination, "of_disk", look)
    monkeypatch.setattr(Examination, "of_boot_files", lambda *_: [])
    return paths


def vm(name: str, *paths: str, **fields: Any) -> VmConfig:  # noqa: ANN401 - of a VmConfig
    """Return a VM of the file."""
    disks = tuple(DiskConfig(path=path) for path in paths)
    return VmConfig(name=name, origin="vm.conf:1", disks=disks).replace(**fields)


BOTH = (object(), object())


def test_an_image_of_many_vms_is_examined_once(examined: list[str]) -> None:
    """Each of them gets the warning.  Only one can run, so the others are not started with the daemon."""
    base, other = vm("a", "/base"), vm("b", "/base", enabled=False)
    assert run(base, other, probers=BOTH) == [
        'vm "a": disk /base: odd length', 'vm "b": disk /base: odd length',
    ]  # fmt: skip
    assert examined == ["/base"]
    assert run(base, vm("b", "/base"), probers=BOTH)[-1] == (
        'vm "b": disk /base is also used by vm a: only one of them can run'
    )


def test_images_that_take_too_long_are_counted(examined: list[str]) -> None:
    """Storage may hang.  The other checks of these VMs are made."""
    said = run(vm("a", "/a", "/b"), deadline_s=-1.0, probers=BOTH)
    assert (said, examined) == (
        [f"warning: 2 images are not examined: the others took more than {examine.TIME_S:g} seconds"], [],
    )  # fmt: skip


def test_without_a_prober_no_image_is_examined(examined: list[str]) -> None:
    """The caller has said why."""
    assert run(vm("a", "/a")) == []
    assert examined == []


def test_vms_that_do_not_fit_beside_those_before_them(examined: list[str]) -> None:
    """A VM that is not started with the daemon takes no room.  One that does not fit takes none from the next."""
    large = vm("c", "/c", vcpus=3)
    said = run(vm("a", "/a"), vm("off", "/o", enabled=False), large, vm("d", "/d"), limit_vcpus=3)
    (line,) = said
    assert line.startswith('vm "c": not started with those before it: ')
    assert "vm c" not in line
    assert "limit" in line
    assert len(run(vm("a", "/a"), vm("b", "/b"), vm("c", "/c"), limit_vms=2)) == 1


@pytest.mark.parametrize("vrfs", [False, True])
def test_a_host_without_routing_domains(examined: list[str], monkeypatch: pytest.MonkeyPatch, vrfs: bool) -> None:
    """The interface is named that is in one, by itself or by its switch."""
    monkeypatch.setattr(examine, "has_vrfs", lambda: vrfs)
    switches = (SwitchConfig(name="s", interface="br0", rdomain=3), SwitchConfig(name="t", interface="br1"))
    nics = (NicConfig(), NicConfig(rdomain=7), NicConfig(switch="s"), NicConfig(switch="t"))
    one = vm("a", nics=nics)
    said: list[str] = []
    Examination([one], Config(vms=(one,), switches=switches), None, 0).run(said.append)
    lacks = [f'vm.conf:1: vm "a": interface {index}: rdomain {number}: this kernel has no VRFs: load the module vrf'
             for index, number in ((1, 7), (2, 3))]  # fmt: skip
    assert [line for line in said if "rdomain" in line] == ([] if vrfs else lacks)


def test_an_interface_of_the_host_that_is_no_bridge() -> None:
    """One that does not exist will be made."""
    assert examine.of_bridge("lo") == "interface lo is not a bridge: switches need one"
    assert examine.of_bridge("nosuch0") == ""


def test_the_files_of_a_seed(tmp_path: Path) -> None:
    """Each one that is missing is named, with its keyword.  A hash in the file itself is none."""
    (tmp_path / "there").touch()
    there, gone = str(tmp_path / "there"), str(tmp_path / "gone")
    assert examine.of_seed(SeedConfig(ssh_keys=(there,), user_data=there, password="$6$x$y")) == []
    said = examine.of_seed(
        SeedConfig(ssh_keys=(gone, there), user_data=gone, vendor_data=gone, network_config=gone, password=gone)
    )
    assert len(said) == 5
    words = ("ssh-key", "user-data", "vendor-data", "network-config", "password-hash")
    assert all(word in line and gone in line for word, line in zip(words, said, strict=True))


def test_a_configuration_whose_instances_cannot_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left out, and the others are checked.  A switch that cannot be used is named, unless it is disabled."""
    said: list[str] = []
    switches = (
        SwitchConfig(name="s", interface="lo", origin="vm.conf:7"),
        SwitchConfig(name="off", interface="lo", origin="vm.conf:8", enabled=False),
    )
    monkeypatch.setattr(Examination, "of_boot_files", lambda *_: ["odd"])
    one = VmConfig(name="a", origin="vm.conf:1")
    lost = VmConfig(name="b", parent="none", origin="vm.conf:2")
    examine.check_vms(Config(vms=(lost, one), switches=switches), said.append)
    assert said[:2] == [
        "vm.conf:2: vm b: template none not found",
        'vm.conf:7: switch "s": interface lo is not a bridge: switches need one',
    ]
    assert 'vm.conf:1: vm "a": odd' in said[2:]
    assert not any('vm "b"' in line for line in said)
