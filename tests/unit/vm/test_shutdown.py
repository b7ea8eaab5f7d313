"""A guest is asked to shut down, and has limited time for that."""

from collections.abc import Iterator

import pytest

from tests.support.vminside import VMID, Machine, VmRig
from vmd.config.model import VmConfig
from vmd.ipc.messages.vm import Outcome, StopMode, StopVm
from vmd.vm import vmmci
from vmd.vm.shutdown import ACK_TIMEOUT_S, SHUTDOWN_TIMEOUT_S

STOP = StopVm(vmid=VMID, mode=StopMode.GRACEFUL)
JUST_BEFORE_S = 0.5


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[VmRig]:
    """Yield a VM process."""
    made = VmRig(monkeypatch)
    yield made
    made.close()


@pytest.fixture(params=["vmmci", "the power button"])
def asked(request: pytest.FixtureRequest, rig: VmRig) -> Machine:
    """Return a machine whose guest was asked to shut down, in one of the two ways."""
    machine = rig.start(VmConfig(name="a"))
    machine.vmmci.driver_is_up = request.param == "vmmci"
    machine.pm.power_button_enabled = True
    rig.tell(STOP)
    assert machine.asked == ([vmmci.REBOOT] if request.param == "vmmci" else ["button"])
    return machine


def acknowledge(machine: Machine) -> None:
    """Acknowledge the request several times, as the guest."""
    for _ in range(3):
        if machine.vmmci.driver_is_up:
            machine.on_acknowledged(vmmci.REBOOT)
        else:
            machine.pm.on_button_acknowledged()


def test_a_guest_that_cannot_be_asked_ends_at_once(rig: VmRig) -> None:
    """It has no driver for either way."""
    machine = rig.start(VmConfig(name="a"))
    rig.tell(STOP)
    assert machine.asked == []
    assert rig.process.exit_status == Outcome.ENDED


def test_a_guest_that_does_not_notice_ends(rig: VmRig, asked: Machine) -> None:
    """It has the shorter time."""
    wanted = "vmmci" if asked.vmmci.driver_is_up else "the power button"
    rig.pass_time(ACK_TIMEOUT_S - JUST_BEFORE_S)
    assert rig.ended is None
    rig.vmm.take()
    rig.ahead_s += JUST_BEFORE_S
    assert rig.ended == (Outcome.ENDED, f"did not notice {wanted} in 3 s")


def test_a_guest_that_has_noticed_has_more_time(rig: VmRig, asked: Machine) -> None:
    """The time begins once, even if the guest acknowledges several times."""
    acknowledge(asked)
    rig.pass_time(SHUTDOWN_TIMEOUT_S - JUST_BEFORE_S)
    assert rig.ended is None
    acknowledge(asked)
    rig.turn()
    rig.ahead_s += JUST_BEFORE_S
    assert rig.ended == (Outcome.ENDED, "did not shut down in 120 s")


def test_an_earlier_command_that_is_acknowledged_does_not_count(rig: VmRig) -> None:
    """The guest may have been slow to set its clock."""
    machine = rig.start(VmConfig(name="a"))
    machine.vmmci.driver_is_up = True
    rig.tell(STOP)
    machine.on_acknowledged(vmmci.SYNCRTC)
    rig.turn()
    rig.ahead_s += ACK_TIMEOUT_S
    assert rig.ended == (Outcome.ENDED, "did not notice vmmci in 3 s")


def test_a_driver_that_never_acknowledges_has_the_longer_time(rig: VmRig) -> None:
    """The time at which it notices the request is unknown."""
    machine = rig.start(VmConfig(name="a"))
    machine.vmmci.driver_is_up, machine.vmmci.acknowledges = True, False
    rig.tell(STOP)
    rig.pass_time(ACK_TIMEOUT_S)
    assert rig.ended is None
    rig.ahead_s += SHUTDOWN_TIMEOUT_S
    assert rig.ended == (Outcome.ENDED, "did not shut down in 120 s")


def test_vmmci_without_acknowledgements_does_not_count_for_the_button(rig: VmRig) -> None:
    """The guest was asked by the power button, so it has the shorter time until it acknowledges that."""
    machine = rig.start(VmConfig(name="a"))
    machine.pm.power_button_enabled, machine.vmmci.acknowledges = True, False
    rig.tell(STOP)
    rig.turn()
    rig.ahead_s += ACK_TIMEOUT_S
    assert rig.ended == (Outcome.ENDED, "did not notice the power button in 3 s")
