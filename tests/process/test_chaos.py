"""Many attacks at the same time: processes killed and stopped, hostile clients, storage, log, rules and taps.

8 VMs of 3 users run meanwhile.  No guest is lost that was not attacked itself.  `tests/support/chaos.py` has the
attacks.  `--seed` chooses them, but not the order in which the attacks take effect.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.chaos import Chaos, StallingLog, configuration
from tests.support.fusefile import FuseFile
from tests.support.hostnet import NetDaemon, ours
from tests.support.network import Network
from tests.support.transfers import Footprint
from tests.support.users import public_folder

Say = Callable[[str, object], None]

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(600)]


def run(directory: Path, seed: int, duration_s: float) -> str:
    """Run a round with a new daemon, which must leave nothing behind; return a summary of the attacks."""
    print(f"seed {seed}")
    folder = directory / "storage"
    folder.mkdir()
    with Network() as network, FuseFile(bytes(1 << 20), for_all=True) as storage:
        vmd = NetDaemon(directory, network, configuration(directory, storage.attach(folder)))
        try:
            with StallingLog(vmd) as log, vmd:
                chaos = Chaos(vmd, log, storage, seed, duration_s)
                before = footprint(vmd) if chaos.is_long else None
                said = chaos.run()
                if before is not None:
                    vmd.must("stop", "-afw")
                    before.check(vmd)
                assert vmd.stop() == 0
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
        assert ours(network) == [], vmd.log
        assert "Traceback" not in vmd.log, vmd.log
        assert "unexpected" not in vmd.log, vmd.log
    return said


def footprint(vmd: NetDaemon) -> Footprint:
    """Return the footprint after a first start of a VM with interfaces, from which priv keeps two files."""
    vmd.must("start", "a1")
    vmd.must("stop", "-fw", "a1")
    return Footprint(vmd)


@pytest.mark.parametrize(
    "duration_s", [10, pytest.param(480, marks=[pytest.mark.deep, pytest.mark.timeout(1800)])]
)
def test_nobody_else_loses_a_guest(duration_s: float, request: pytest.FixtureRequest, record_property: Say) -> None:
    """Run one round.  The number of lost guests, 0, is printed."""
    with public_folder() as directory:
        record_property("done", run(directory, request.config.getoption("--seed"), duration_s))


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_nobody_else_loses_a_guest_for_ever(request: pytest.FixtureRequest, record_property: Say) -> None:
    """Run many rounds."""
    first, count = request.config.getoption("--seed"), request.config.getoption("--sequences")
    for seed in range(first, first + count):
        with public_folder() as directory:
            record_property("done", run(directory, seed, 20))
