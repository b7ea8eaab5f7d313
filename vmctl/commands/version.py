"""vmctl version: which versions of vmctl and of the daemon meet here."""

from vmctl.options import Given
from vmctl.output import clean, put_json, put_lines
from vmctl.session import Session
from vmd.version import VERSION

OLDER = "older than 0.2.0"  # said no Hello


def run(session: Session, given: Given) -> int:
    """Show both; that of vmctl also where there is no daemon."""
    if session.json:
        daemon = session.client.daemon
        put_json({"vmctl": VERSION, "vmd": clean(daemon.program) if daemon else None})
        return 0
    show()
    daemon = session.client.daemon
    put_lines([f"vmd {daemon.program if daemon else OLDER}"])
    return 0


def show() -> int:
    """Show the version of vmctl itself; return the exit status.  Raises CommandError."""
    put_lines([f"vmctl {VERSION}"])
    return 0
