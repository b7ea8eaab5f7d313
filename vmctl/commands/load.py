"""vmctl load: let the daemon read an additional configuration file."""

import os

from vmctl.commands.reload import read_configuration
from vmctl.errors import CommandError
from vmctl.options import Given
from vmctl.session import Session
from vmd.errors import sentence


def run(session: Session, given: Given) -> int:
    """Send the absolute path: the daemon opens the file, and has another working directory."""
    try:
        path = os.path.abspath(given.operand)
    except OSError as error:  # our directory has been removed
        raise CommandError(f"{given.operand}: {sentence(error)}", error.errno) from None
    read_configuration(session, path)
    return 0
