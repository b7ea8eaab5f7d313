"""vmctl load: have the daemon read a further configuration file."""

import os

from vmctl.commands.reload import show_notes
from vmctl.errors import CommandError
from vmctl.options import Given
from vmctl.session import Session
from vmd.errors import sentence
from vmd.ipc.messages import LoadRequest, Ok


def run(session: Session, given: Given) -> int:
    """Send the path; the daemon opens it, and its working directory is not ours."""
    try:
        path = os.path.abspath(given.operand)
    except OSError as error:  # our directory has been removed
        raise CommandError(f"{given.operand}: {sentence(error)}", error.errno) from None
    show_notes(session, session.client.ask(LoadRequest(path=path), Ok))
    return 0
