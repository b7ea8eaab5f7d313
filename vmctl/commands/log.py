"""vmctl log: let every process of the daemon log more, or less."""

from vmctl.commands.reload import show_notes
from vmctl.options import Given
from vmctl.session import Session

LEVELS = {"brief": 0, "verbose": 2}


def run(session: Session, given: Given) -> int:
    """Send the verbosity."""
    show_notes(session, session.client.set_verbosity(LEVELS[given.operand]))
    return 0
