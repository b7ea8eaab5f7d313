"""vmctl reset: let the daemon forget VMs, switches or both."""

from vmctl.commands.reload import show_notes
from vmctl.options import Given
from vmctl.session import Session


def run(session: Session, given: Given) -> int:
    """Ask the daemon to forget the VMs, the switches, or both."""
    what = given.operand or "all"
    show_notes(session, session.client.reset(vms=what != "switches", switches=what != "vms"))
    return 0
