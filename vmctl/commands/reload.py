"""vmctl reload: have the daemon read its main configuration file again."""

from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmd.ipc.messages import Ok, ReloadRequest


def show_notes(session: Session, done: Ok) -> None:
    """Say what the daemon thinks worth saying about a success."""
    for note in done.notes:
        warn(note)
    if session.json:
        put_json({"notes": [clean(note) for note in done.notes]})


def run(session: Session, given: Given) -> int:
    """Ask, and show what the daemon has to say about it."""
    show_notes(session, session.client.ask(ReloadRequest(), Ok))
    return 0
