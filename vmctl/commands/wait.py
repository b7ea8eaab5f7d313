"""vmctl wait: return when a VM has ended."""

from vmctl.ending import ask_end, conclude, finish
from vmctl.options import Given
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.ipc.messages.clients import WaitRequest


def run(session: Session, given: Given) -> int:
    """Wait, without a time limit."""
    ref = parse_vmref(given.operand)
    result = ask_end(session.client, ref, WaitRequest(vmid=ref.vmid, name=ref.name), "waiting for")
    conclude(session, result)
    return finish(session, [result])
