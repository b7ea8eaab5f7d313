"""vmctl cdrom: put a disc into the drive of a VM, or take it out."""

import os

from vmctl.errors import CommandError, refused
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.client import Refused
from vmd.errors import sentence


def run(session: Session, given: Given) -> int:
    """Change the disc, and print the new content of the drive.  Raises CommandError."""
    ref = parse_vmref(given.operand)
    path = disc_path(given)
    try:
        answer = session.client.insert_disc(ref, path, force=given.has("-f"))
    except Refused as error:
        raise refused("cdrom vm command failed", error) from None
    for note in answer.notes:
        warn(f"warning: {note}")
    disc = f"disc {answer.path}" if answer.path else "no disc"
    told = "" if answer.running else "; it does not run"
    warn(f"the drive of vm {answer.vmid} has {disc} now{told}")
    if session.json:
        put_json(
            {
                "id": answer.vmid,
                "name": clean(answer.name),
                "cdrom": clean(answer.path) or None,
                "running": answer.running,
                "notes": [clean(note) for note in answer.notes],
            }
        )
    return 0


def disc_path(given: Given) -> str:
    """Return the absolute path of the disc, for the daemon; "" with -e.  Raises CommandError."""
    if given.has("-e"):
        return ""
    try:
        return os.path.abspath(given.operands[1])
    except OSError as error:
        raise CommandError(f"{given.operands[1]}: {sentence(error)}", error.errno) from None
