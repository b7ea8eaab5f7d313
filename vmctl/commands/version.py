"""vmctl version: the versions of vmctl and of the daemon, and other versions that still serve VMs."""

from vmctl.options import Given
from vmctl.output import clean, put_json, put_lines
from vmctl.session import Session
from vmd.client import Refused
from vmd.ipc.messages.clients import GenerationInfo
from vmd.version import VERSION

OLDER = "older than 0.2.0"  # a daemon that does not send Hello


def run(session: Session, given: Given) -> int:
    """Show the versions; that of vmctl is shown even without a daemon."""
    if not session.json:
        show()
    daemon = session.client.daemon
    rows = generations(session)
    if session.json:
        rows_json = [{"number": row.number, "version": clean(row.version), "vms": row.vms} for row in rows]
        program = clean(daemon.program) if daemon else None
        put_json({"vmctl": VERSION, "vmd": program, "generations": rows_json})
        return 0
    put_lines([f"vmd {daemon.program if daemon else OLDER}", *(in_words(row) for row in rows if len(rows) > 1)])
    return 0


def generations(session: Session) -> list[GenerationInfo]:
    """Return the generations of VMs; none if the daemon is too old to know them.  Raises VmdError."""
    if session.client.daemon is None:
        return []
    try:
        return session.client.list_generations()
    except Refused:
        return []


def in_words(row: GenerationInfo) -> str:
    """Return the line of a generation."""
    return f"generation {row.number}: vmd {row.version}, {row.vms} VM{'' if row.vms == 1 else 's'}"


def show() -> int:
    """Show the version of vmctl itself; return the exit status.  Raises CommandError."""
    put_lines([f"vmctl {VERSION}"])
    return 0
