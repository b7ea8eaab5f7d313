"""vmctl upgrade: have the daemon go on as the version that is installed now, while VMs run."""

from vmctl.commands import version
from vmctl.errors import CommandError
from vmctl.options import Given
from vmctl.output import warn
from vmctl.session import Session
from vmd.client import Refused


def run(session: Session, given: Given) -> int:
    """Ask, and show what serves afterwards; with -n only ask whether it could be done."""
    try:
        if not given.has("-n"):
            session.client.upgrade()
            return version.run(session, given)
        session.client.rehearse_upgrade()
    except Refused as error:
        raise CommandError(error.text, error.number) from None
    warn("the version that is installed now can take over")
    return version.run(session, given) if session.json else 0
