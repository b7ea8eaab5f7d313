"""The resource agent for Pacemaker, started as Pacemaker starts it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.ocf_vm import CONFIGURED, GENERIC, INSTALLED, NOT_RUNNING, SUCCESS, UNIMPLEMENTED
from tests.support.bystander import vm_block
from tests.support.daemon import ROOT, Daemon
from vmd.parent.lifelock import LifeLock

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(300)]

AGENT = ROOT / "fleet/ocf_vm.py"
TESTER = shutil.which("ocf-tester")


class Agent:
    """The agent, for one VM of a daemon."""

    def __init__(self, vmd: Daemon, **parameters: str | Path) -> None:
        program = vmd.directory / "vmctl"
        if not program.exists():
            program.write_text(f'#!/bin/sh\nexec env PYTHONPATH={ROOT} {sys.executable} -m vmctl "$@"\n')
            program.chmod(0o755)
        self.parameters: dict[str, str | Path] = {"socket": vmd.socket, "vmctl": program, **parameters}
        given = {f"OCF_RESKEY_{name}": str(value) for name, value in self.parameters.items()}
        self.environment = {
            **os.environ,
            "OCF_ROOT": "/usr/lib/ocf",
            "OCF_RESOURCE_INSTANCE": "web",
            "OCF_RESKEY_CRM_meta_timeout": "90000",
            "OCF_RESKEY_CRM_meta_interval": "10000",
            **given,
        }

    def __call__(self, action: str, **more: str) -> tuple[int, str]:
        """Run an action; return its exit status and the reason that it gave."""
        done = subprocess.run(
            [sys.executable, AGENT, action], env=self.environment | more, capture_output=True, text=True, check=False
        )
        reasons = [line.removeprefix("ocf-exit-reason:") for line in done.stderr.splitlines()]
        return done.returncode, "\n".join(reasons)


def test_life_of_a_resource(tmp_path: Path) -> None:
    """Each action returns the right status, also if it is repeated.  A failure has a reason."""
    conf = vm_block("web", "owner root") + vm_block("own").replace("disable", "")
    with Daemon(tmp_path, conf) as vmd:
        web = Agent(vmd)
        assert web("validate-all") == (SUCCESS, "")
        assert web("monitor", OCF_RESKEY_CRM_meta_interval="0") == (NOT_RUNNING, ""), "a probe gives no reason"
        assert web("stop") == (SUCCESS, "")
        for _ in range(2):
            assert web("start") == (SUCCESS, "")
            assert web("monitor") == (SUCCESS, "")
        vmd.must("pause", "web")
        assert web("monitor") == (SUCCESS, ""), "a paused vm counts as running"
        vmd.must("unpause", "web")
        vmd.must("stop", "-fw", "web")  # like a crash of the guest
        assert web("monitor") == (NOT_RUNNING, "vm web does not run: stopped by force")
        assert web("start") == (SUCCESS, "")
        status, why = web("migrate_to", OCF_RESKEY_CRM_meta_migrate_target="n2", OCF_RESKEY_shell="false")
        assert (status, web("monitor")) == (GENERIC, (SUCCESS, "")), "the vm still runs here"
        assert why.startswith("migrate vm command failed: ")
        for _ in range(2):
            assert web("stop") == (SUCCESS, "")
            assert web("monitor", OCF_RESKEY_CRM_meta_interval="0") == (NOT_RUNNING, "")
        assert web("migrate_from")[0] == GENERIC

        assert Agent(vmd, name="own")("start") == (
            INSTALLED, "vm own is started by vmd itself: vm.conf must have it `disable`"
        )  # fmt: skip
        assert Agent(vmd, name="other")("start") == (INSTALLED, "vm other is not in vm.conf")
        assert Agent(vmd, name="17")("validate-all") == (CONFIGURED, "invalid name of a vm: 17")
        assert Agent(vmd, shell="'")("validate-all")[0] == CONFIGURED
        assert Agent(vmd, vmctl="/none/vmctl")("monitor") == (
            INSTALLED, "/none/vmctl: No such file or directory"
        )  # fmt: skip
        assert web("promote")[0] == UNIMPLEMENTED
    assert web("monitor", OCF_RESKEY_CRM_meta_interval="0") == (NOT_RUNNING, ""), "no daemon, no guests"
    assert web("stop") == (SUCCESS, "")
    assert web("start") == (INSTALLED, "vmd does not run here")
    life = LifeLock(str(vmd.socket))
    guests = life.share()  # as guests do that outlive their daemon
    for action in ("monitor", "stop"):
        assert web(action, OCF_RESKEY_CRM_meta_timeout="2500") == (
            GENERIC, "guests run, but there is no vmd that knows them"
        )  # fmt: skip
    os.close(guests)
    assert web("stop") == (SUCCESS, "")
    life.remove()


@pytest.mark.deep
@pytest.mark.skipif(TESTER is None, reason="resource-agents is not installed")
def test_ocf_tester_accepts_the_agent(tmp_path: Path) -> None:
    """ocf-tester, of the package resource-agents, finds no error in the agent or its metadata."""
    assert TESTER is not None
    installed = tmp_path / "vm"
    tmp_path.chmod(0o755)
    shutil.copy(AGENT, installed)
    installed.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)  # user nobody must be able to read the agent
    with Daemon(tmp_path, vm_block("web")) as vmd:
        options = [word for pair in Agent(vmd).parameters.items() for word in ("-o", "=".join(map(str, pair)))]
        done = subprocess.run(
            [TESTER, "-v", "-n", "web", *options, installed],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "passed all tests" in done.stdout
