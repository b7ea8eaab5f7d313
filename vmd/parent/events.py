"""Events for clients (`vmctl events`).

The states of a VM become events by its own transitions (`vm`).  Rooms add other events by `add`.  The last
PAST_MAX events are kept and numbered.  A client names the last event that it has seen.  It is answered with the later
ones, or waits until there are some.  So the daemon never waits for a client that reads slowly.  Events that the client
has not read in time are dropped, and it is told how many.
"""

import errno
import itertools
from collections import deque

from vmd.errors import OperatorError
from vmd.ipc.messages.clients import Caller, Event, EventsRequest, EventsSeen
from vmd.ipc.messages.shared import brief
from vmd.ipc.messages.vm import DeviceEvent
from vmd.parent.clients import For

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.imsg import Envelope
    from vmd.ipc.loop import Loop, Timer
    from vmd.parent.clients import Clients
    from vmd.parent.vm import Vm
    from vmd.parent.vmtable import VmTable

PAST_MAX = 1000
AT_ONCE = 64  # most events in one answer
TEXT_BYTES_MAX = 500
DEVICE_MAX = 32

# The names of all events.  vmctl(8) and docs/vmctl.schema.json say what each means.
OF_THE_DAEMON = ("daemon", "reload")
OF_A_LIFE = (
    "waiting", "start", "ready", "reboot", "pause", "unpause", "send", "migrate", "sent", "receive", "received",
    "saving", "resume", "in doubt", "stopping", "stop", "crash", "failed",
)  # fmt: skip
OF_DISKS = ("snapshot", "resize", "cdrom")
OF_DEVICES = ("lease", "trouble", "mended", "fault")  # reported by the process of a VM
OF_LIMITS = ("throttled",)
LOST = "lost"
WORDS = (*OF_THE_DAEMON, *OF_A_LIFE, *OF_DISKS, *OF_DEVICES, *OF_LIMITS, LOST)


class Events:
    """The room of events."""

    def __init__(self, loop: "Loop", clients: "Clients", vms: "VmTable", now_s: "Callable[[], float]") -> None:
        self._loop = loop
        self._clients = clients
        self._vms = vms
        self._now_s = now_s
        self._past: deque[Event] = deque(maxlen=PAST_MAX)
        self._newest = 0
        self._timer: Timer | None = None
        self.address: Callable[[int, str], str] = lambda _vmid, _device: ""  # the guest's address at an interface
        vms.on_event = self.on_vm

    # --- events ------------------------------------------------------------------------------------------

    def add(
        self, what: str, vm: "Vm | None" = None, *, text: str = "", how: str = "", device: str = "", value: str = ""
    ) -> None:
        """Keep an event.  Clients that wait are told of it before the next message is served."""
        assert what in WORDS, what
        self._newest += 1
        event = Event(
            number=self._newest,
            at_ms=int(self._now_s() * 1000),
            what=what,
            vmid=vm.vmid if vm is not None else 0,
            name=vm.name if vm is not None else "",
            state=vm.state.value if vm is not None else "",
            text=brief(text, TEXT_BYTES_MAX),
            how=how,
            device=device,
            value=brief(value, TEXT_BYTES_MAX),
        )
        self._past.append(event)
        if self._timer is None and self._clients.waiting_anywhere(For.EVENTS):
            self._timer = self._loop.call_later(0, self._tell_all)

    def on_vm(self, vm: "Vm", what: str, text: str, how: str) -> None:
        """A VM has changed its state."""
        self.add(what, vm, text=text, how=how)

    def on_device(self, message: DeviceEvent, _envelope: "Envelope") -> None:
        """The process of a VM reports on one of its devices.

        The process is not trusted: only events of devices, and only of its own VM, are taken.
        """
        vm = self._vms.find(message.vmid, "")
        if vm is None or not vm.alive or message.what not in OF_DEVICES:
            return
        device = message.device[:DEVICE_MAX]
        value = self.address(vm.vmid, device) if message.what == "lease" else ""
        self.add(message.what, vm, text=message.text, device=device, value=value)

    # --- clients -----------------------------------------------------------------------------------------

    def serve(self, message: EventsRequest, _caller: Caller, envelope: "Envelope") -> None:
        """Answer with the events that a client has not seen.  All who may see the list of VMs may see events."""
        client, vmid = envelope.peerid, self._vmid(message)
        if message.since is None:
            self._seen(client, vmid, self._newest)
            return
        # A number that does not exist yet was given by an earlier daemon: begin with the first event.
        since = message.since if 0 <= message.since <= self._newest else 0
        if self._tell(client, vmid, since):
            return
        if message.wait:
            self._clients.wait(client, For.EVENTS, vmid, since=self._newest)
        else:
            self._seen(client, vmid, self._newest)

    def _vmid(self, message: EventsRequest) -> int:
        """Return the id of the VM whose events a client wants, 0 for all VMs.  Raises OperatorError for no known VM."""
        if not (message.vmid or message.name):
            return 0
        vm = self._vms.find(message.vmid, message.name)
        if vm is not None:
            return vm.vmid
        for event in reversed(self._past):  # a VM that is gone may still have events
            if event.vmid and (event.vmid == message.vmid or event.name == message.name):
                return event.vmid
        if message.vmid and message.since is not None:
            return message.vmid  # the client knows the VM from earlier events
        raise OperatorError(errno.ENOENT, f"vm {message.vmid or message.name} not found")

    def _tell_all(self) -> None:
        """Answer the clients that wait and for which there are events."""
        self._timer = None
        for wait in self._clients.waiting_anywhere(For.EVENTS):
            if self._tell(wait.client, wait.vmid, wait.since):
                self._clients.done(wait)
            else:
                wait.since = self._newest

    def _tell(self, client: int, vmid: int, since: int) -> bool:
        """Answer a client with the events after `since`; return False if there are none."""
        before = self._newest - len(self._past)  # the number of the newest event that was dropped
        lost = max(0, before - since)
        later = itertools.islice(self._past, max(0, since - before), None)
        rows = list(itertools.islice((event for event in later if vmid in (0, event.vmid)), AT_ONCE))
        if not rows and not lost:
            return False
        if lost:
            text = f"{lost} events were not read in time and are lost"
            at_ms = int(self._now_s() * 1000)
            self._clients.answer(client, Event(number=before, at_ms=at_ms, what=LOST, text=text, lost=lost))
        for event in rows:
            self._clients.answer(client, event)
        self._seen(client, vmid, rows[-1].number if len(rows) == AT_ONCE else self._newest)
        return True

    def _seen(self, client: int, vmid: int, number: int) -> None:
        self._clients.answer(client, EventsSeen(vmid=vmid, number=number, newest=self._newest))
