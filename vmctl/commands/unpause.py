"""vmctl unpause: let a paused VM go on."""

from vmctl.commands.pause import change
from vmctl.session import Session


def run(session: Session, arguments: list[str]) -> int:
    """Unpause."""
    return change(session, arguments, paused=False)
