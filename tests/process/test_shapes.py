"""VMs of configurations that `vmd -n` accepts can be started, or `vmd -n` has warned of them by file and line."""

from pathlib import Path

import pytest

from tests.support.hostnet import NetDaemon, load_modules
from tests.support.network import Network
from tests.support.shapes import ACCEPTED, Shape, fill, shapes, write
from vmd.config.check import load
from vmd.config.model import VmConfig
from vmd.parent.examine import check_vms

pytestmark = [pytest.mark.root, pytest.mark.kvm]


def checked(path: Path) -> tuple[list[VmConfig], list[str]]:
    """Return the VMs of a file that start with the daemon, and the warnings of `vmd -n`."""
    warnings: list[str] = []
    config = load(str(path), warn=warnings.append)
    check_vms(config, warnings.append)
    once = {vm.name: vm for vm in reversed(config.vms)}
    return [vm for vm in once.values() if vm.enabled], warnings


def try_all(vmd: NetDaemon, chosen: list[Shape], folder: Path) -> dict[str, list[str]]:
    """Have a daemon load each file.  For each, return the errors of VMs that did not start, and had no warning."""
    silent: dict[str, list[str]] = {}
    for shape in chosen:
        path = write(shape, folder)
        with vmd.network.inside():
            vms, warnings = checked(path)
        vmd.must("reset", "all")
        vmd.must("reload")
        for vm in vms:
            started = vmd.vmctl("start", vm.name)
            fine = started.returncode == 0 or "is already running" in started.stderr or "is starting" in started.stderr
            if not fine and not any(warning.startswith(f'{vm.origin}: vm "{vm.name}": ') for warning in warnings):
                silent.setdefault(shape.name, []).append(started.stderr)
    return silent


def accepted(*names: str) -> list[Shape]:
    """Return the accepted files with these names, or all accepted files."""
    return [shape for shape in shapes() if shape.here == ACCEPTED and (not names or shape.name in names)]


@pytest.mark.parametrize("names", [
    pytest.param(("unknown-switch", "nothing-to-boot", "encrypted", "same-disk-twice"), id="some"),
    pytest.param((), id="all", marks=[pytest.mark.deep, pytest.mark.timeout(600)]),
])  # fmt: skip
def test_vms_of_accepted_configurations_start(tmp_path: Path, names: tuple[str, ...]) -> None:
    """All VMs of a file run at the same time."""
    load_modules()
    fill(tmp_path)
    with Network() as network, NetDaemon(tmp_path, network) as vmd:
        assert try_all(vmd, accepted(*names), tmp_path) == {}
