"""The end of VMs, for `stop` and `wait`: one line per VM says how it ended (*cat. 3.5*)."""

import errno
import time

from vmctl.errors import CommandError, NoSuchVm
from vmctl.output import clean, notice, put_json, warn
from vmctl.session import Session
from vmctl.vmref import VmRef
from vmd.client import Client, ClientError, HungUp, Refused
from vmd.errors import VMD_VM_STOP_INVALID, VmdError
from vmd.ipc.messages.clients import StopAccepted, StopRequest, VmTerminated, WaitRequest
from vmd.record import Record

REFUSALS = {
    VMD_VM_STOP_INVALID: "cannot stop vm that is not running",
    errno.ENOENT: "vm not found",
    errno.EINTR: "interrupted call",
}
SOON_S, SOON_MAX = 1.0, 3  # a daemon may hang up SOON_MAX times in a row within SOON_S of a request
REQUESTED, TERMINATED, FAILED = "requested", "terminated", "failed"


class Result(Record):
    """The result for one VM; also for --json."""

    vmid: int
    name: str
    result: str
    text: str
    code: int | None = None
    how: str = ""

    @property
    def interrupted(self) -> bool:
        """Whether the operator has interrupted the wait."""
        return self.code == errno.EINTR

    def as_json(self) -> dict[str, object]:
        """Return it under keys that stay."""
        return {
            "id": self.vmid or None,
            "name": clean(self.name) or None,
            "result": self.result,
            "how": clean(self.how) or None,
            "text": clean(self.text),
            "code": self.code,
        }


def announce(doing: str, ref: VmRef) -> None:
    """Begin the line of a VM."""
    notice(f"{doing} vm{' ' + clean(ref.sure_name) if ref.sure_name else ''}: ")


def ask_end(client: Client, ref: VmRef, request: StopRequest | WaitRequest, doing: str = "") -> Result:
    """Send the request and return the result.  With `doing`, first begin the line of the VM.

    Raises:
        ClientError: the daemon has ended; the line was completed.
        PeerError: the daemon's answer cannot be understood; the line was completed.
    """
    if doing:
        announce(doing, ref)
    try:
        answer = ask_until_answered(client, request)
    except Refused as error:
        return Result(vmid=ref.vmid, name=ref.sure_name, result=FAILED, text=error.text, code=error.number)
    except KeyboardInterrupt:
        return Result(vmid=ref.vmid, name=ref.sure_name, result=FAILED, text="interrupted call", code=errno.EINTR)
    except VmdError:
        if doing:
            notice("\n")
        raise
    if isinstance(answer, VmTerminated):
        return Result(vmid=answer.vmid, name=answer.name, result=TERMINATED, text=answer.text, how=answer.how)
    assert isinstance(answer, StopAccepted)
    return Result(vmid=answer.vmid, name=answer.name, result=REQUESTED, text="")


def ask_until_answered(client: Client, request: StopRequest | WaitRequest) -> Record:
    """Return the answer, StopAccepted or VmTerminated.  If another daemon replaces this one, ask it.

    Raises:
        HungUp: no other daemon replaces this one.
        Refused, PeerError
    """
    again, in_a_row = False, 0
    while True:
        asked_s = time.monotonic()
        try:
            return client.ask(request, StopAccepted, VmTerminated)
        except HungUp as lost:
            in_a_row = in_a_row + 1 if time.monotonic() - asked_s < SOON_S else 0
            if in_a_row > SOON_MAX:
                raise  # this request makes the daemon hang up
            try:
                client.connect_again()
            except ClientError:
                raise lost from None
            again = True
        except Refused as error:
            if not again:
                raise
            if error.number == errno.EALREADY and isinstance(request, StopRequest) and request.wait:
                request = WaitRequest(vmid=request.vmid, name=request.name)  # the daemon before this one has stopped it
                continue
            ended = how_it_ended(client, request)
            if ended is None:
                raise
            return ended


def how_it_ended(client: Client, request: StopRequest | WaitRequest) -> VmTerminated | None:
    """Return how a VM has ended while we were not connected.  None if it still runs, or if this is not known."""
    for vm in client.list_vms():
        if (vm.vmid == request.vmid or vm.name == request.name) and vm.ended is not None and not vm.pid:
            return VmTerminated(vmid=vm.vmid, name=vm.name, text=vm.ended.text, how=vm.ended.how)
    return None


def conclude(session: Session, result: Result, *, forced: bool = False) -> None:
    """Complete the line of a VM with upstream's words.  `forced` is for `stop -f` without -w."""
    if result.result == FAILED:
        assert result.code is not None
        words = REFUSALS.get(result.code, f"failed: {result.text}")
        if result.code == errno.ENOENT:
            words += session.meant(result.name)
    elif forced:
        words = f"forced to terminate vm {result.vmid}"
    elif result.result == REQUESTED:
        words = f"requested to shutdown vm {result.vmid}"
    else:
        words = f"terminated vm {result.vmid}"
    notice(f"{clean(words)}\n")
    if session.verbose and result.text and result.result == TERMINATED:
        warn(f"vm {result.name}: {result.text}")


def finish(session: Session, results: list[Result]) -> int:
    """Print the document of --json; return the exit status."""
    if session.json:
        put_json({"vms": [result.as_json() for result in results]})
    failed = [result for result in results if result.result == FAILED]
    if failed and all(result.code == errno.ENOENT for result in failed):
        return NoSuchVm.exit_status
    return CommandError.exit_status if failed else 0
