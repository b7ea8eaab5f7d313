"""vmctl version: which version this is."""

from vmctl.options import Given
from vmctl.output import put_lines
from vmctl.session import Session
from vmd.version import VERSION


def run(session: Session, given: Given) -> int:
    """Show it."""
    show()
    return 0


def show() -> None:
    """Show the version of vmctl itself.  Raises CommandError."""
    put_lines([f"vmctl {VERSION}"])
