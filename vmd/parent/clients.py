"""What the clients of vmctl wait for, and the way answers go to them.

Every client that waits for something is in one table, so that nobody is forgotten: when a VM ends, when a client
leaves, and when a question has been answered.
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
    """What a client waits for: something of one VM, but for RESET and UPGRADE."""

    START = "its start"
    END = "its end"
    PAUSE = "its standing still, or going on"  # answered in the order of the requests
    TRANSFER = "its being sent or received"
    IMAGES = "the snapshots of its disks"
    CARRYING = "nothing: the client carries it to another host, or from there"
    CHANGE = "its disk being larger, or its disc another one"
    DEVICES = "what its devices have done"
    SNAPSHOT = "what its console has shown"  # answered in the order of the requests
    OUTPUT = "more than that"
    CONSOLE = "nothing: the client has its console"
    EVENTS = "anything to happen"
    RESET = "the end of all VMs that are to be forgotten"
    UPGRADE = "whether another version of the daemon could go on"


IN_ORDER = (For.PAUSE, For.SNAPSHOT)


class Wait:
    """A client that waits."""

    def __init__(self, client: int, what: For, vmid: int, since: int) -> None:
        self.client = client  # NO_CLIENT after it has left, where its place is kept
        self.what = what
        self.vmid = vmid
        self.since = since  # OUTPUT: how much it has seen; EVENTS: the last one that it has


class Clients:
    """Clients by what they wait for."""

    def __init__(self, peers: "Peers") -> None:
        self._peers = peers
        self._waits: dict[tuple[For, int], list[Wait]] = {}
        self.cut_off: set[int] = set()  # served no more: their requests failed in ways that nobody expected

    # --- answers -----------------------------------------------------------------------------------------

    def answer(self, client: int, message: "Record") -> None:
        """Answer a client through control, if it is still of this world."""
        if client != NO_CLIENT:
            self._peers.send(Proc.CONTROL, message, peerid=client)

    def fail(self, client: int, code: int, text: str) -> None:
        """Tell a client what went wrong."""
        self.answer(client, Failed(code=code, text=brief(text)))

    def answer_all(self, what: For, vmid: int, message: "Record") -> None:
        """Answer all who wait for this; they wait no longer."""
        for client in self.take(what, vmid):
            self.answer(client, message)

    def fail_all(self, what: For, vmid: int, code: int, text: str) -> None:
        """Tell all who wait for this what went wrong; they wait no longer."""
        self.answer_all(what, vmid, Failed(code=code, text=brief(text)))

    def fail_waiting(
        self, kinds: "Iterable[For]", code: int, text: str, vms: "Collection[int] | None" = None
    ) -> list[Wait]:
        """Tell all who wait for something of these kinds what went wrong; they wait no longer, and are returned.

        With `vms`, only what concerns these VMs.
        """
        lost = [wait for kind in kinds for wait in self.waiting_anywhere(kind) if vms is None or wait.vmid in vms]
        for wait in lost:
            self.fail(wait.client, code, text)
            self._leave(wait)
        return lost

    def courier(self, client: int) -> int:
        """Return where the files of a client's last request can be asked for, a socket of the caller's.

        Raises HostError.
        """
        ours, theirs = courier.pair()
        self._peers.send(Proc.CONTROL, PassFiles(), peerid=client, fds={"courier": [theirs.detach()]})
        return ours.detach()

    # --- who waits ---------------------------------------------------------------------------------------

    def wait(self, client: int, what: For, vmid: int = 0, *, since: int = 0) -> Wait:
        """Let a client wait."""
        wait = Wait(client, what, vmid, since)
        self._waits.setdefault((what, vmid), []).append(wait)
        return wait

    def waiting(self, what: For, vmid: int = 0) -> list[Wait]:
        """Return who waits for this, in the order in which they came."""
        return list(self._waits.get((what, vmid), ()))

    def waits(self, client: int, what: For, vmid: int) -> bool:
        """Return whether a client waits for this."""
        return any(wait.client == client for wait in self._waits.get((what, vmid), ()))

    def waiting_anywhere(self, what: For) -> list[Wait]:
        """Return who waits for this, of whatever VM."""
        return [wait for (kind, _), waits in self._waits.items() if kind is what for wait in waits]

    def take(self, what: For, vmid: int = 0) -> list[int]:
        """Return the clients that wait for this; they wait no longer."""
        return [wait.client for wait in self._waits.pop((what, vmid), ())]

    def take_first(self, what: For, vmid: int) -> int:
        """Return the client that has waited longest, and does so no longer; NO_CLIENT if there is none."""
        waits = self.waiting(what, vmid)
        if waits:
            self.done(waits[0])
        return waits[0].client if waits else NO_CLIENT

    def done(self, wait: Wait) -> bool:
        """Let a client wait no longer; False if it did not."""
        key = wait.what, wait.vmid
        waits = self._waits.get(key, [])
        if wait not in waits:
            return False
        waits.remove(wait)
        if not waits:
            del self._waits[key]
        return True

    def gone(self, client: int) -> list[Wait]:
        """A client has left: return all that it waited for."""
        self.cut_off.discard(client)
        lost = [wait for waits in self._waits.values() for wait in waits if wait.client == client]
        for wait in lost:
            self._leave(wait)
        return lost

    def _leave(self, wait: Wait) -> None:
        """Let a client wait no longer.

        Where answers come in the order of the questions its place is kept, else the next one would get its answer.
        """
        if wait.what in IN_ORDER:
            wait.client = NO_CLIENT
        else:
            self.done(wait)
