"""vmctl upgrade: have the daemon go on as the version that is installed now, while VMs run."""

from vmctl.client import HungUp
from vmctl.commands import version
from vmctl.errors import CommandError, Refused
from vmctl.options import Given
from vmctl.output import warn
from vmctl.session import Session
from vmd.ipc.messages.clients import Ok, UpgradeRequest


def run(session: Session, given: Given) -> int:
    """Ask, and show what serves afterwards; with -n only ask whether it could be done."""
    rehearse_only = given.has("-n")
    try:
        session.client.ask(UpgradeRequest(rehearse_only=rehearse_only), Ok)
    except Refused as error:
        raise CommandError(error.text, error.number) from None
    except HungUp:  # the other version has taken over
        if rehearse_only:
            raise
        session.reconnect()
        return version.run(session, given)
    warn("the version that is installed now can take over")
    return version.run(session, given) if session.json else 0
