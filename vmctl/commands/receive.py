"""vmctl receive: read a VM from standard input, and let it go on (*cat. 4.7*)."""

import os
import sys

from vmctl.commands.send import transfer
from vmctl.errors import CommandError, Refused
from vmctl.options import operand, parse_options
from vmctl.output import warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.ipc.messages import ReceiveRequest, VmReceived


def run(session: Session, arguments: list[str]) -> int:
    """Receive; with -p the VM waits to be unpaused."""
    given, operands = parse_options(arguments, "p")
    ref = parse_vmref(operand(operands))
    if not ref.name:
        raise CommandError("invalid vm name")
    fd = sys.stdin.fileno()
    if os.isatty(fd):
        raise CommandError("standard input is a terminal: redirect it from a file, or from a pipe")
    request = ReceiveRequest(name=ref.name, paused=bool(given))
    try:
        received = transfer(session.client, request, VmReceived, fd, ref.name)
    except Refused as error:
        raise CommandError(f"receive vm command failed: {error.text}", error.code) from None
    state = ", paused" if received.paused else ""
    warn(f"received vm {received.vmid} successfully, tty {received.tty}{state}")
    return 0
