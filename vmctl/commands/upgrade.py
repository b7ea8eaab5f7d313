"""vmctl upgrade: let the installed version take over from the daemon, while VMs run."""

from vmctl.commands import version
from vmctl.errors import CommandError
from vmctl.options import Given
from vmctl.output import warn
from vmctl.session import Session
from vmd.client import Refused


def run(session: Session, given: Given) -> int:
    """Upgrade, and show the versions afterwards; with -n only ask whether an upgrade is possible."""
    try:
        if not given.has("-n"):
            session.client.upgrade()
            return version.run(session, given)
        session.client.rehearse_upgrade()
    except Refused as error:
        raise CommandError(error.text, error.number) from None
    warn("the installed version can take over")
    return version.run(session, given) if session.json else 0
