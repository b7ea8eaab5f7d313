"""The clients that wait for an answer, and how answers are sent to them.

One table has every client that waits, so that none is overlooked when a VM ends, a client leaves or an answer arrives.
"""


from vmd.enums import Enum
from vmd.ipc import courier
from vmd.ipc.messages.clients import Failed
from vmd.ipc.messages.control import NO_CLIENT, PassFiles
from vmd.ipc.messages.shared import brief
from vmd.ipc.routes import Proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from vmd.parent.peers import Peers
    from vmd.record import Record


class For(Enum):
    """The event for which a client waits.  All except RESET, UPGRADE and some EVENTS concern one VM."""

    START = "the VM to start"
    END = "the VM to end"
    PAUSE = "the VM to be paused or unpaused"  # answered in the order of the requests
    TRANSFER = "the VM to be sent or received"
    IMAGES = "an operation on the snapshots of its disks"
    CARRYING = "nothing: the client carries a migration of the VM"
    CHANGE = "its disk to grow, or its disc to be changed"
    DEVICES = "the report of its devices"
    SNAPSHOT = "the output that its console has shown"  # answered in the order of the requests
    OUTPUT = "further output of its console"
    CONSOLE = "nothing: the client holds its console"
    EVENTS = "the next event"
    RESET = "the end of all VMs that `vmctl reset` has killed"
    UPGRADE = "the rehearsal of another version of the daemon"


IN_ORDER = (For.PAUSE, For.SNAPSHOT)


class Wait:
    """A client that waits."""

    def __init__(self, client: int, what: For, vmid: int, since: int) -> None:
        self.client = client  # NO_CLIENT after it has left, if its place in the order must be kept
        self.what = what
        self.vmid = vmid
        self.since = since  # OUTPUT: how many bytes it has seen; EVENTS: the last event that it has seen


class Clients:
    """Clients by what they wait for."""

    def __init__(self, peers: "Peers") -> None:
        self._peers = peers
        self._waits: dict[tuple[For, int], list[Wait]] = {}
        self.cut_off: set[int] = set()  # not served any more, because their requests raised unexpected exceptions

    # --- answers -----------------------------------------------------------------------------------------

    def answer(self, client: int, message: "Record") -> None:
        """Answer a client through control, if it is still connected."""
        if client != NO_CLIENT:
            self._peers.send(Proc.CONTROL, message, peerid=client)

    def fail(self, client: int, code: int, text: str) -> None:
        """Tell a client what went wrong."""
        self.answer(client, Failed(code=code, text=brief(text)))

    def answer_all(self, what: For, vmid: int, message: "Record") -> None:
        """Answer all clients that wait for this, and end their wait."""
        for client in self.take(what, vmid):
            self.answer(client, message)

    def fail_all(self, what: For, vmid: int, code: int, text: str) -> None:
        """Tell all clients that wait for this what went wrong, and end their wait."""
        self.answer_all(what, vmid, Failed(code=code, text=brief(text)))

    def fail_waiting(
        self, kinds: "Iterable[For]", code: int, text: str, vms: "Collection[int] | None" = None
    ) -> list[Wait]:
        """Tell all clients that wait for one of `kinds` what went wrong.  End their waits and return them.

        With `vms`, only the waits for these VMs.
        """
        lost = [wait for kind in kinds for wait in self.waiting_anywhere(kind) if vms is None or wait.vmid in vms]
        for wait in lost:
            self.fail(wait.client, code, text)
            self._leave(wait)
        return lost

    def courier(self, client: int) -> int:
        """Return the courier of the files of a client's last request.  The caller owns the socket.

        Raises HostError.
        """
        ours, theirs = courier.pair()
        self._peers.send(Proc.CONTROL, PassFiles(), peerid=client, fds={"courier": [theirs.detach()]})
        return ours.detach()

    # --- who waits ---------------------------------------------------------------------------------------

    def wait(self, client: int, what: For, vmid: int = 0, *, since: int = 0) -> Wait:
        """Add a client to those that wait for this."""
        wait = Wait(client, what, vmid, since)
        self._waits.setdefault((what, vmid), []).append(wait)
        return wait

    def waiting(self, what: For, vmid: int = 0) -> list[Wait]:
        """Return the waits for this, in the order in which they came."""
        return list(self._waits.get((what, vmid), ()))

    def waits(self, client: int, what: For, vmid: int) -> bool:
        """Return whether a client waits for this."""
        return any(wait.client == client for wait in self._waits.get((what, vmid), ()))

    def waiting_anywhere(self, what: For) -> list[Wait]:
        """Return the waits for this of all VMs."""
        return [wait for (kind, _), waits in self._waits.items() if kind is what for wait in waits]

    def take(self, what: For, vmid: int = 0) -> list[int]:
        """Return the clients that wait for this, and end their wait."""
        return [wait.client for wait in self._waits.pop((what, vmid), ())]

    def take_first(self, what: For, vmid: int) -> int:
        """Return the client that has waited longest, and end its wait.  NO_CLIENT if there is none."""
        waits = self.waiting(what, vmid)
        if waits:
            self.done(waits[0])
        return waits[0].client if waits else NO_CLIENT

    def done(self, wait: Wait) -> bool:
        """End a wait; return False if it had ended already."""
        key = wait.what, wait.vmid
        waits = self._waits.get(key, [])
        if wait not in waits:
            return False
        waits.remove(wait)
        if not waits:
            del self._waits[key]
        return True

    def gone(self, client: int) -> list[Wait]:
        """A client has left: end its waits and return them."""
        self.cut_off.discard(client)
        lost = [wait for waits in self._waits.values() for wait in waits if wait.client == client]
        for wait in lost:
            self._leave(wait)
        return lost

    def _leave(self, wait: Wait) -> None:
        """End the wait of a client that may be answered later.

        Where answers come in the order of the requests, its place is kept.  Else the next client would get its answer.
        """
        if wait.what in IN_ORDER:
            wait.client = NO_CLIENT
        else:
            self.done(wait)
