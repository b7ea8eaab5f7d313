"""vmctl pause: have a VM stand still until `unpause`."""

from vmctl.errors import Refused, refused
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.ipc.messages.clients import PauseRequest, VmPaused


def run(session: Session, given: Given) -> int:
    """Pause."""
    return change(session, given, paused=True)


def change(session: Session, given: Given, *, paused: bool, force: bool = False) -> int:
    """Pause or unpause, and say so in upstream's words.  Raises CommandError."""
    ref = parse_vmref(given.operand)
    word = "pause" if paused else "unpause"
    try:
        request = PauseRequest(vmid=ref.vmid, name=ref.name, paused=paused, force=force)
        answer = session.client.ask(request, VmPaused)
    except Refused as error:
        raise refused(f"{word} vm command failed", error) from None
    warn(f"{word}d vm {answer.vmid} successfully")
    if session.json:
        put_json({"id": answer.vmid, "name": clean(answer.name), "paused": answer.paused})
    return 0
