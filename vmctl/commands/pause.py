"""vmctl pause: pause a VM until `unpause`."""

from vmctl.errors import refused
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.client import Refused


def run(session: Session, given: Given) -> int:
    """Pause."""
    return change(session, given, paused=True)


def change(session: Session, given: Given, *, paused: bool, force: bool = False) -> int:
    """Pause or unpause, and report it in upstream's words.  Raises CommandError."""
    ref = parse_vmref(given.operand)
    word = "pause" if paused else "unpause"
    try:
        answer = session.client.pause(ref) if paused else session.client.unpause(ref, force=force)
    except Refused as error:
        raise refused(f"{word} vm command failed", error) from None
    for note in answer.notes:
        warn(note)
    warn(f"{word}d vm {answer.vmid} successfully")
    if session.json:
        notes = [clean(note) for note in answer.notes]
        put_json({"id": answer.vmid, "name": clean(answer.name), "paused": answer.paused, "notes": notes})
    return 0
