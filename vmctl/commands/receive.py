"""vmctl receive: read a VM from standard input, and let it continue (*cat. 4.7*)."""

import os

from vmctl.commands.send import access_mode, transfer
from vmctl.errors import ArgumentError, CommandError
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmctl.vmref import parse_vmref
from vmd.client import Refused
from vmd.ipc.messages.clients import ReceiveRequest, VmReceived
from vmd.stdio import STDIN


def run(session: Session, given: Given) -> int:
    """Receive the VM.  With -p it stays paused."""
    ref = parse_vmref(given.operand)
    if ref.vmid:
        raise ArgumentError("invalid vm name")
    if os.isatty(STDIN):
        raise CommandError("standard input is a terminal: redirect it from a file, or from a pipe")
    if access_mode(STDIN) == os.O_WRONLY:
        raise CommandError("standard input is not open for reading: redirect it from a file, or from a pipe")
    if given.has("-w"):
        from vmctl.carried import receive_in_steps  # it imports `json`

        return receive_in_steps(session, ref.name, force=given.has("-f"))
    request = ReceiveRequest(name=ref.name, paused=given.has("-p"))
    try:
        received = transfer(session, request, VmReceived, STDIN, ref.name)
    except Refused as error:
        raise CommandError(f"receive vm command failed: {error.text}", error.number) from None
    state = ", paused" if received.paused else ""
    warn(f"received vm {received.vmid} successfully, tty {received.tty}{state}")
    if session.json:
        put_json({
            "id": received.vmid,
            "name": clean(received.name),
            "pid": received.pid,
            "tty": clean(received.tty),
            "paused": received.paused,
        })  # fmt: skip
    return 0
