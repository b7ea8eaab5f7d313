"""vmctl receive: read a VM from standard input, and let it go on (*cat. 4.7*)."""

import os
import sys

from vmctl.commands.send import transfer
from vmctl.errors import ArgumentError, CommandError, Refused
from vmctl.options import Given
from vmctl.output import warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.ipc.messages import ReceiveRequest, VmReceived


def run(session: Session, given: Given) -> int:
    """Receive; with -p the VM waits to be unpaused."""
    ref = parse_vmref(given.operand)
    if not ref.name:
        raise ArgumentError("invalid vm name")
    fd = sys.stdin.fileno()
    if os.isatty(fd):
        raise CommandError("standard input is a terminal: redirect it from a file, or from a pipe")
    request = ReceiveRequest(name=ref.name, paused=given.has("-p"))
    try:
        received = transfer(session.client, request, VmReceived, fd, ref.name)
    except Refused as error:
        raise CommandError(f"receive vm command failed: {error.text}", error.code) from None
    state = ", paused" if received.paused else ""
    warn(f"received vm {received.vmid} successfully, tty {received.tty}{state}")
    return 0
