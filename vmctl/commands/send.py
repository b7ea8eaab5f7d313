"""vmctl send: write a VM to standard output, to go on elsewhere (*cat. 4.7*)."""

import os
import sys

from vmctl.bar import Bar
from vmctl.client import Client
from vmctl.errors import CommandError, Refused, refused
from vmctl.options import Given
from vmctl.output import warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.ipc.messages import SendRequest, TransferProgress, VmReceived, VmSent
from vmd.scaled import fmt_scaled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from vmd.ipc.messages import ReceiveRequest

    A = TypeVar("A", VmSent, VmReceived)


def run(session: Session, given: Given) -> int:
    """Send; with -k the VM goes on here, and the stream is a snapshot of it."""
    ref = parse_vmref(given.operand)
    fd = sys.stdout.fileno()
    if os.isatty(fd):
        raise CommandError("standard output is a terminal: redirect it to a file, or into a pipe")
    request = SendRequest(vmid=ref.vmid, name=ref.name, keep=given.has("-k"))
    try:
        sent = transfer(session.client, request, VmSent, fd, str(ref))
    except Refused as error:
        raise refused("send vm command failed", error) from None
    warn(f"sent vm {sent.vmid} successfully ({fmt_scaled(sent.sent_bytes)})")
    return 0


def transfer(
    client: Client, request: "SendRequest | ReceiveRequest", expected: "type[A]", fd: int, name: str
) -> "A":
    """Have the daemon use our descriptor, and show how far it is.  Raises Refused, PeerError."""
    client.send(request, {"stream": [fd]})
    bar = Bar(name, rate=True)
    try:
        while True:
            answer = client.answer(TransferProgress, expected)
            if isinstance(answer, expected):
                return answer
            assert isinstance(answer, TransferProgress)
            bar.show(answer.done_bytes, answer.total_bytes)
    finally:
        bar.end()
