"""vmctl pause: have a VM stand still until `unpause`."""

from vmctl.errors import CommandError, Refused
from vmctl.options import operand, parse_options
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.ipc.messages import PauseRequest, VmPaused


def run(session: Session, arguments: list[str]) -> int:
    """Pause."""
    return change(session, arguments, paused=True)


def change(session: Session, arguments: list[str], *, paused: bool) -> int:
    """Pause or unpause, and say so in upstream's words.  Raises CommandError."""
    given, operands = parse_options(arguments, "", ("json",))
    session.json = bool(given)
    ref = parse_vmref(operand(operands))
    word = "pause" if paused else "unpause"
    try:
        answer = session.client.ask(PauseRequest(vmid=ref.vmid, name=ref.name, paused=paused), VmPaused)
    except Refused as error:
        raise CommandError(f"{word} vm command failed: {error.text}", error.code) from None
    warn(f"{word}d vm {answer.vmid} successfully")
    if session.json:
        put_json({"id": answer.vmid, "name": clean(answer.name), "paused": answer.paused})
    return 0
