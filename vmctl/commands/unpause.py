"""vmctl unpause: let a paused VM continue."""

from vmctl.commands.pause import change
from vmctl.options import Given
from vmctl.session import Session


def run(session: Session, given: Given) -> int:
    """Unpause."""
    return change(session, given, paused=False, force=given.has("-f"))
