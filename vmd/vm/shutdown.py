"""Asks a guest to shut down, by vmmci or by the power button, and ends a guest that does not (*cat. 4.4*)."""

from vmd.ipc.messages.vm import Outcome
from vmd.vm import vmmci

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.loop import Loop
    from vmd.vm.machine import Machine

ACK_TIMEOUT_S = 3.0  # until the guest has noticed the request
SHUTDOWN_TIMEOUT_S = 120.0  # from then on until the guest has shut down


def ask_to_shut_down(machine: "Machine", loop: "Loop", end: "Callable[[Outcome, str], None]") -> None:
    """Ask a running guest to shut down, and end its VM if it does not in time.

    A guest that has neither a driver for vmmci nor one for the power button is ended at once.
    """
    ask: Callable[[], object]
    if machine.vmmci.driver_is_up:
        # Not SHUTDOWN: a guest that cannot switch off its machine would then wait for a key to be pressed.
        wanted, ask = "vmmci", lambda: machine.vmmci.ask(vmmci.REBOOT)
    elif machine.pm.power_button_enabled:
        wanted, ask = "the power button", machine.pm.power_button
    else:
        end(Outcome.ENDED, "stopped; the guest has no driver for the power button")
        return
    deadline = loop.call_later(
        ACK_TIMEOUT_S, lambda: end(Outcome.ENDED, f"did not notice {wanted} in {ACK_TIMEOUT_S:.0f} s")
    )

    def acknowledged_on_vcpu(command: int = vmmci.REBOOT) -> None:
        if command == vmmci.REBOOT:  # the guest may also acknowledge an earlier command
            # Only the first time: a guest may acknowledge as often as it likes.
            machine.on_acknowledged, machine.pm.on_button_acknowledged = ignore, ignore
            loop.call_from_thread(acknowledged)

    def acknowledged() -> None:
        deadline.cancel()
        loop.call_later(
            SHUTDOWN_TIMEOUT_S, lambda: end(Outcome.ENDED, f"did not shut down in {SHUTDOWN_TIMEOUT_S:.0f} s")
        )

    machine.on_acknowledged = machine.pm.on_button_acknowledged = acknowledged_on_vcpu
    ask()
    if machine.vmmci.driver_is_up and not machine.vmmci.acknowledges:
        acknowledged()  # this driver never acknowledges, so the longer deadline begins now


def ignore(*_: object) -> None:
    """Do nothing."""
