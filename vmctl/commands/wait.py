"""vmctl wait: return when a VM is gone."""

from vmctl.ending import ask_end, conclude, finish
from vmctl.options import operand, parse_options
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.ipc.messages import WaitRequest


def run(session: Session, arguments: list[str]) -> int:
    """Wait, as long as it takes."""
    given, operands = parse_options(arguments, "", ("json",))
    session.json = bool(given)
    ref = parse_vmref(operand(operands))
    result = ask_end(session.client, ref, WaitRequest(vmid=ref.vmid, name=ref.name), "waiting for")
    conclude(session, result)
    return finish(session, [result])
