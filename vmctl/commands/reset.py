"""vmctl reset: have the daemon forget VMs, switches or both."""

from vmctl.commands.reload import show_notes
from vmctl.options import Given
from vmctl.session import Session
from vmd.ipc.messages.clients import Ok, ResetRequest

WHAT = {
    "all": ResetRequest(vms=True, switches=True),
    "switches": ResetRequest(vms=False, switches=True),
    "vms": ResetRequest(vms=True, switches=False),
}


def run(session: Session, given: Given) -> int:
    """Send what is to be forgotten: all, unless told otherwise."""
    show_notes(session, session.client.ask(WHAT[given.operand or "all"], Ok))
    return 0
