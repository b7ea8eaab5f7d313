"""vmctl events: one line per event; with --json one document per line."""

import time

from vmctl.ending import SOON_MAX, SOON_S
from vmctl.errors import refused
from vmctl.options import Given
from vmctl.output import SHOWN_DATE, clean, put_json_line, put_lines
from vmctl.session import Session
from vmctl.vmref import VmRef, parse_vmref
from vmd.client import ClientError, HungUp, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.client import Event



def run(session: Session, given: Given) -> int:
    """Show events."""
    ref = parse_vmref(given.operand) if given.operand else None
    try:
        if given.has("-l"):
            for event in session.client.past_events(ref):
                show(session, event)
        else:
            follow(session, ref, past=given.has("-a"))
    except Refused as error:
        raise refused("events", error) from None
    except KeyboardInterrupt:  # the usual end
        return 0
    return 0


def follow(session: Session, ref: VmRef | None, *, past: bool) -> None:
    """Show new events, also those of the next daemon if it replaces this one.  Raises ClientError."""
    client, in_a_row = session.client, 0
    while True:
        asked_s = time.monotonic()
        try:
            for event in client.events(ref, past=past):
                show(session, event)
        except HungUp as lost:
            in_a_row = in_a_row + 1 if time.monotonic() - asked_s < SOON_S else 0
            if in_a_row > SOON_MAX:
                raise
            try:
                client.connect_again()
            except ClientError:
                raise lost from None
            past = True  # no event of that daemon was shown yet


def show(session: Session, event: "Event") -> None:
    """Print an event.  Raises CommandError."""
    if session.json:
        put_json_line(as_json(event))
    else:
        put_lines([line(event)])


def line(event: "Event") -> str:
    """Return an event in words."""
    when = time.strftime(SHOWN_DATE, time.localtime(event.at_ms // 1000))
    rest = ": ".join(filter(None, (event.device, event.how, event.text, event.value)))
    return f"{when}  {event.name or '-'}  {event.what}{': ' if rest else ''}{rest}"


def as_json(event: "Event") -> dict[str, object]:
    """Return an event for --json; a value that does not apply is null."""
    return {
        "number": event.number,
        "at_ms": event.at_ms,
        "event": clean(event.what),
        "id": event.vmid or None,
        "name": clean(event.name) or None,
        "state": clean(event.state) or None,
        "how": clean(event.how) or None,
        "device": clean(event.device) or None,
        "value": clean(event.value) or None,
        "text": clean(event.text),
        "lost": event.lost,
    }
