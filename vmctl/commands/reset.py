"""vmctl reset: have the daemon forget VMs, switches or both."""

from vmctl.commands.reload import show_notes
from vmctl.errors import UsageError
from vmctl.options import parse_options
from vmctl.session import Session
from vmd.ipc.messages import Ok, ResetRequest

WHAT = {
    "all": ResetRequest(vms=True, switches=True),
    "switches": ResetRequest(vms=False, switches=True),
    "vms": ResetRequest(vms=True, switches=False),
}


def run(session: Session, arguments: list[str]) -> int:
    """Send what is to be forgotten: all, unless told otherwise."""
    _, operands = parse_options(arguments)
    request = WHAT.get(operands[0] if operands else "all")
    if request is None or len(operands) > 1:
        raise UsageError
    show_notes(session.client.ask(request, Ok))
    return 0
