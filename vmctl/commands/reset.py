"""vmctl reset: have the daemon forget VMs, switches or both."""

from vmctl.commands.reload import show_notes
from vmctl.options import Given
from vmctl.session import Session


def run(session: Session, given: Given) -> int:
    """Send what is to be forgotten: all, unless told otherwise."""
    what = given.operand or "all"
    show_notes(session, session.client.reset(vms=what != "switches", switches=what != "vms"))
    return 0
