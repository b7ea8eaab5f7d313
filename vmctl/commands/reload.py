"""vmctl reload: let the daemon read its main configuration file again."""

from vmctl.errors import CommandError
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmd.client import Refused
from vmd.ipc.messages.clients import Ok


def show_notes(session: Session, done: Ok) -> None:
    """Show the daemon's notes about a success."""
    for note in done.notes:
        warn(note)
    if session.json:
        put_json({"notes": [clean(note) for note in done.notes]})


def read_configuration(session: Session, path: str = "") -> None:
    """Let the daemon read a file, or its main file, and show its notes.  Raises ClientError."""
    try:
        done = session.client.load(path) if path else session.client.reload()
    except Refused as error:
        if "\n" not in error.text:
            raise
        raise CommandError(error.text, error.number) from None  # a line for each mistake in the file
    show_notes(session, done)


def run(session: Session, given: Given) -> int:
    """Reload, and show the daemon's notes."""
    read_configuration(session)
    return 0
