"""vmctl send: write a VM to standard output, so that it can continue elsewhere (*cat. 4.7*)."""

import fcntl
import os

from vmctl.bar import Bar
from vmctl.errors import CommandError, UsageError, refused
from vmctl.numbers import count
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.client import Refused
from vmd.ipc.messages.clients import SendRequest, VmReceived, VmSent
from vmd.ipc.messages.shared import Live
from vmd.scaled import fmt_scaled
from vmd.stdio import STDOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from vmd.ipc.messages.clients import ReceiveRequest

    A = TypeVar("A", VmSent, VmReceived)


NULL_DEVICE = os.makedev(1, 3)  # /dev/null


def run(session: Session, given: Given) -> int:
    """Send the VM.  With -k it continues here, and the stream is a snapshot of it."""
    ref = parse_vmref(given.operand)
    keep = given.has("-k")
    if os.isatty(STDOUT):
        raise CommandError("standard output is a terminal: redirect it to a file, or into a pipe")
    if access_mode(STDOUT) == os.O_RDONLY:
        raise CommandError("standard output is closed, or not open for writing: redirect it to a file, or into a pipe")
    if not keep and os.fstat(STDOUT).st_rdev == NULL_DEVICE:
        raise CommandError(f"standard output is {os.devnull}: the VM would be lost")
    request = SendRequest(vmid=ref.vmid, name=ref.name, keep=keep, live=live_options(given))
    try:
        sent = transfer(session, request, VmSent, STDOUT, str(ref))
    except Refused as error:
        raise refused("send vm command failed", error) from None
    live = {"rounds": sent.rounds, "still_ms": sent.still_ms} if sent.rounds else {}
    if session.json:
        put_json({"id": sent.vmid, "name": clean(sent.name), "sent_bytes": sent.sent_bytes, **live}, session.json_fd)
    else:
        word = "round" if sent.rounds == 1 else "rounds"
        rounds = f", {sent.rounds} {word}, stood still for {sent.still_ms} ms" if live else ""
        warn(f"sent vm {sent.vmid} successfully ({fmt_scaled(sent.sent_bytes)}{rounds})")
    return 0


LIVE = (("-d", "still_ms", "number of milliseconds"), ("-r", "rounds", "number of rounds"))


def live_options(given: Given) -> Live | None:
    """Return the options of -l; None without -l.  Raises UsageError, ArgumentError."""
    for option, _, _ in LIVE:
        if given.has(option) and not given.has("-l"):
            raise UsageError(f"{option} without -l")
    return live_goal(given) if given.has("-l") else None


def live_goal(given: Given) -> Live:
    """Return when a VM that is sent while it runs is paused.  Raises ArgumentError."""
    values = ((field, given.value(option), what) for option, field, what in LIVE)
    return Live(**{field: count(value, what) for field, value, what in values if value is not None})


def access_mode(fd: int) -> int:
    """Return O_RDONLY, O_WRONLY or O_RDWR."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def transfer(
    session: Session, request: "SendRequest | ReceiveRequest", expected: "type[A]", fd: int, name: str
) -> "A":
    """Let the daemon use our descriptor, and show the progress.  Raises Refused, PeerError."""
    rounds = isinstance(request, SendRequest) and request.live is not None
    bar = Bar(name, rate=True, rounds=rounds, shown=not session.quiet)
    try:
        answer = session.client.carry_out(request, expected, bar.follow, {"stream": [fd]})
        bar.complete()
        return answer
    finally:
        bar.end()
