"""vmctl reload: have the daemon read its main configuration file again."""

from vmctl.errors import CommandError
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmd.client import Refused
from vmd.ipc.messages.clients import Ok


def show_notes(session: Session, done: Ok) -> None:
    """Say what the daemon thinks worth saying about a success."""
    for note in done.notes:
        warn(note)
    if session.json:
        put_json({"notes": [clean(note) for note in done.notes]})


def read_configuration(session: Session, path: str = "") -> None:
    """Have the daemon read a file, or its main one, and say what it has to say about that.  Raises ClientError."""
    try:
        done = session.client.load(path) if path else session.client.reload()
    except Refused as error:
        if "\n" not in error.text:
            raise
        raise CommandError(error.text, error.number) from None  # a line for each mistake in the file
    show_notes(session, done)


def run(session: Session, given: Given) -> int:
    """Ask, and show what the daemon has to say about it."""
    read_configuration(session)
    return 0
