"""vmctl receive -w: the other end of `vmctl migrate`."""

import contextlib
import select

from vmctl import carry
from vmctl.errors import CommandError
from vmctl.output import clean
from vmctl.session import Session
from vmd.client import ClientError, Refused
from vmd.errors import VMD_IN_DOUBT, PeerError, sentence
from vmd.ipc.messages.clients import MigrationAt, MigrationStep, Step, VmReceived
from vmd.stdio import STDIN, STDOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from vmd.client import Client

    A = TypeVar("A", MigrationAt, VmReceived)


def receive_in_steps(session: Session, name: str, *, force: bool) -> int:
    """Receive for `vmctl migrate` at another host, and report each step to it on standard output.

    Returns the exit status.  Failures are reported to the other host, too.
    """
    client = session.client
    told = False  # whether the daemon may have been told to let the guest run
    try:
        judged = client.migrate_in(name, STDIN, force=force)
        carry.say(STDOUT, carry.TARGET, carry.ASKED, locks_travel=judged.locks_travel)
        take_step(client, judged, Step.GO_ON, MigrationAt)
        carry.say(STDOUT, carry.TARGET, carry.COMPLETE)
        words = carry.Ear(STDIN, carry.SOURCE).hear(carry.COMMIT)
        if words is None:
            raise CommandError("the sender has closed the connection")
        if is_hung_up(client.fileno()):  # the request could not arrive, so the guest cannot run here
            raise CommandError("vmd has ended")
        told = True
        received = take_step(client, judged, Step.COMMIT, VmReceived, paused=words.get("paused") is True)
    except (ClientError, PeerError) as error:
        text = str(error)
        in_doubt = told and (not isinstance(error, Refused) or error.number == VMD_IN_DOUBT)
        with contextlib.suppress(OSError):
            carry.say(STDOUT, carry.TARGET, carry.FAILED, text=text, in_doubt=in_doubt)
        return CommandError.exit_status
    except OSError as error:
        raise CommandError(f"standard output: {sentence(error)}", error.errno) from None
    with contextlib.suppress(OSError):  # the guest runs here even if the sender is gone
        carry.say(STDOUT, carry.TARGET, carry.RUNNING, id=received.vmid, tty=clean(received.tty))
    return 0


def is_hung_up(fd: int) -> bool:
    """Return whether the other side has closed the connection."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def take_step(client: "Client", judged: MigrationAt, step: Step, expected: "type[A]", *, paused: bool = False) -> "A":
    """Take a step.  Raises ClientError, PeerError."""
    return client.carry_out(MigrationStep(vmid=judged.vmid, name=judged.name, step=step, paused=paused), expected)
