"""Which clients get which events, and what happens to clients that read slowly."""

import errno
import json
import re
from collections.abc import Callable
from typing import Any, cast

import pytest

from tests.support.daemon import ROOT
from vmd.config.model import VmConfig
from vmd.errors import OperatorError
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import Caller, Event, EventsRequest, EventsSeen
from vmd.ipc.messages.vm import DeviceEvent
from vmd.ipc.routes import Proc
from vmd.parent import endings
from vmd.parent.clients import Clients
from vmd.parent.events import AT_ONCE, PAST_MAX, WORDS, Events
from vmd.parent.peers import Peers
from vmd.parent.vm import Receiving, Vm
from vmd.parent.vmtable import VmTable
from vmd.record import Record

CALLER = Caller(uid=1000, gid=1000, pid=1)
UNUSED = cast("Any", None)
SENT = cast("Any", object())


class Parent:
    """The part of the parent that events need."""

    def __init__(self) -> None:
        self.told: list[tuple[int, Record]] = []
        self.later: list[Callable[[], None]] = []
        self.vms = VmTable()
        peers = Peers()
        peers.channels[Proc.CONTROL] = cast("Any", self)
        self.clients = Clients(peers)
        self.events = Events(cast("Any", self), self.clients, self.vms, lambda: 12.5)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> object:
        """Stand in for the loop."""
        assert delay_s == 0
        self.later.append(callback)
        return self

    def send(self, message: Record, *, peerid: int, fds: object) -> None:
        """Stand in for the channel to control."""
        self.told.append((peerid, message))

    def run_round(self) -> None:
        """Run one round of the loop."""
        later, self.later = self.later, []
        for call in later:
            call()

    def ask(self, client: int, since: int | None = 0, **more: Any) -> None:  # noqa: ANN401 - fields
        """Send a client's request for events."""
        envelope = Envelope(message=UNUSED, peerid=client, pid=0, fds={})
        self.events.serve(EventsRequest(since=since, **more), CALLER, envelope)

    def take(self, client: int) -> list[Any]:
        """Return the messages to a client since the last call."""
        heard = [message for peerid, message in self.told if peerid == client]
        self.told = [each for each in self.told if each[0] != client]
        return heard

    def vm(self, name: str) -> Vm:
        """Return a new VM."""
        return self.vms.add(VmConfig(name=name), from_config=True)


@pytest.fixture
def parent() -> Parent:
    """Return a parent without events."""
    return Parent()


def numbers(heard: list[Any]) -> list[int]:
    """Return the numbers of the events."""
    return [message.number for message in heard if isinstance(message, Event)]


def event_words(heard: list[Any]) -> list[str]:
    """Return the words of the events."""
    return [message.what for message in heard if isinstance(message, Event)]


def test_a_waiting_client_gets_all_events_of_a_round_together(parent: Parent) -> None:
    """Later events come only in the answer to the next request."""
    parent.ask(1, None)
    assert parent.take(1) == [EventsSeen(vmid=0, number=0, newest=0)]
    parent.ask(1)
    parent.events.add("daemon", text="startup", value="1.0")
    parent.events.add("reload")
    assert parent.take(1) == []

    parent.run_round()

    assert parent.take(1) == [
        Event(number=1, at_ms=12500, what="daemon", text="startup", value="1.0"),
        Event(number=2, at_ms=12500, what="reload"),
        EventsSeen(vmid=0, number=2, newest=2),
    ]
    parent.events.add("reload")
    parent.run_round()
    assert parent.take(1) == []
    parent.ask(1, 2)
    assert numbers(parent.take(1)) == [3]


def test_the_events_of_one_vm(parent: Parent) -> None:
    """A client that asks for one VM gets no events of others or of the daemon, and is not told that those are lost."""
    web, mail = parent.vm("web"), parent.vm("mail")
    parent.ask(1, name="web")
    for _ in range(PAST_MAX + 5):
        parent.events.add("reload")
        mail.enqueue()
        mail.leave_queue()
        parent.run_round()
    web.enqueue()
    parent.run_round()

    heard = parent.take(1)

    assert event_words(heard) == ["waiting"]
    assert (heard[0].name, heard[0].vmid, heard[0].state) == ("web", web.vmid, "waiting")
    assert heard[1] == EventsSeen(vmid=web.vmid, number=heard[0].number, newest=heard[0].number)


def test_the_events_of_a_removed_vm_stay(parent: Parent) -> None:
    """Above all its end can be read.  A name that was never used is refused."""
    vm = parent.vm("scratch")
    vm.begin_start(0)
    vm.ended("stopped as asked", endings.STOPPED)
    parent.vms.remove(vm)

    parent.ask(1, name="scratch")
    parent.ask(2, vmid=vm.vmid, wait=False)

    assert event_words(parent.take(1)) == event_words(parent.take(2)) == ["start", "stop"]
    with pytest.raises(OperatorError, match="vm nobody not found") as refused:
        parent.ask(3, name="nobody")
    assert refused.value.number == errno.ENOENT


def test_a_slow_client_is_told_how_many_events_are_lost(parent: Parent) -> None:
    """No other process waits for it.  It continues with the oldest event that is kept, a limited number at a time."""
    for _ in range(PAST_MAX + 7):
        parent.events.add("reload")

    parent.ask(1, 2)

    lost, *rest = parent.take(1)
    assert (lost.what, lost.number, lost.lost, lost.at_ms) == ("lost", 7, 5, 12500)
    assert "5 events" in lost.text
    assert numbers(rest) == list(range(8, 8 + AT_ONCE))
    assert rest[-1] == EventsSeen(vmid=0, number=7 + AT_ONCE, newest=PAST_MAX + 7)
    seen, total = rest[-1], AT_ONCE
    while seen.number < seen.newest:
        parent.ask(1, seen.number)
        *rows, seen = parent.take(1)
        assert "lost" not in event_words(rows)
        total += len(rows)
    assert total == PAST_MAX


@pytest.mark.parametrize("since", [9, -1, 1 << 70])
def test_a_client_of_an_earlier_daemon_begins_with_the_first_event(parent: Parent, since: int) -> None:
    """Its number belongs to the events of that daemon."""
    parent.events.add("daemon")

    parent.ask(1, since)

    assert numbers(parent.take(1)) == [1]


def test_a_client_that_does_not_wait_is_answered_at_once(parent: Parent) -> None:
    """Without events the answer is empty."""
    parent.ask(1, 0, wait=False)

    assert parent.take(1) == [EventsSeen(vmid=0, number=0, newest=0)]


def test_a_vm_that_neither_the_daemon_nor_its_events_know(parent: Parent) -> None:
    """A client that has seen earlier events may wait for it.  Its id may be that of no event."""
    parent.events.add("daemon")
    vm = parent.vm("web")
    for since in (None, 0):
        parent.ask(1, since, vmid=vm.vmid, wait=False)
        assert parent.take(1) == [EventsSeen(vmid=vm.vmid, number=1, newest=1)]
    parent.ask(1, 1, vmid=99, wait=False)
    assert parent.take(1) == [EventsSeen(vmid=99, number=1, newest=1)]
    with pytest.raises(OperatorError, match="vm 99 not found"):
        parent.ask(1, None, vmid=99)
    with pytest.raises(OperatorError, match="vm nobody not found"):
        parent.ask(1, 1, name="nobody")


def test_a_client_that_waits_hears_only_of_what_comes_later(parent: Parent) -> None:
    """Events that are of no interest to it do not count as lost later."""
    web = parent.vm("web")
    parent.ask(1, name="web")
    for _ in range(2):
        for _ in range(PAST_MAX):
            parent.events.add("reload")
        parent.run_round()
    assert parent.take(1) == []
    web.enqueue()
    parent.run_round()
    assert event_words(parent.take(1)) == ["waiting"]
    parent.events.add("reload")
    assert parent.later == []  # nobody waits


def test_a_client_that_has_left_gets_nothing(parent: Parent) -> None:
    """It is forgotten."""
    parent.ask(1)
    parent.clients.gone(1)
    parent.events.add("reload")
    parent.run_round()

    assert parent.told == []


def test_every_change_of_state_is_an_event(parent: Parent) -> None:
    """Each transition that changes the state has its word, and is told once."""
    vm = parent.vm("web")
    vm.enqueue()
    vm.begin_start(0)
    vm.begin_run(9)
    vm.pause_changed(paused=True)
    vm.pause_changed(paused=True)
    vm.pause_changed(paused=False)
    vm.begin_send(keep=True)
    vm.stay()
    vm.begin_reboot()
    vm.begin_start(0, again=True)
    vm.begin_run(9)
    vm.begin_send(keep=False, carried=True)
    vm.doubt("nobody knows")
    vm.stay()
    vm.begin_send(keep=False)
    vm.leave(SENT)
    vm.ended("", endings.SENT)
    parent.ask(1)

    heard = parent.take(1)

    assert event_words(heard) == [
        "waiting", "start", "ready", "pause", "unpause", "send", "resume", "reboot", "ready", "migrate", "in doubt",
        "resume", "send", "sent", "stop",
    ]  # fmt: skip
    by_what = {event.what: event for event in heard[:-1]}
    assert by_what["in doubt"].text == "nobody knows"
    assert (by_what["pause"].state, by_what["stop"].state, by_what["stop"].how) == ("paused", "stopped", "sent")


def test_the_events_of_a_vm_that_is_received(parent: Parent) -> None:
    """It may be paused at first, because it waits for its disks."""
    vm = parent.vm("web")
    receiving = Receiving(paused=False)
    vm.begin_receive(receiving)
    vm.wait_for_disks("disk0 is in use")
    vm.try_again(receiving)
    vm.end_receive(9, paused=False)
    vm.begin_stop(force=True)
    parent.ask(1)

    assert event_words(parent.take(1)) == ["receive", "pause", "receive", "received", "stopping"]


@pytest.mark.parametrize(("runs", "how", "what"), [
    (True, endings.POWERED_OFF, "stop"), (True, endings.KILLED, "stop"), (True, endings.FAILED, "crash"),
    (False, endings.FAILED, "failed"), (False, endings.KILLED, "stop"),
])  # fmt: skip
def test_the_event_of_an_end(parent: Parent, runs: bool, how: str, what: str) -> None:
    """It is a crash if the guest ran and failed."""
    vm = parent.vm("web")
    vm.begin_start(0)
    if runs:
        vm.begin_run(9)
    vm.ended("why", how)
    parent.ask(1)

    end = parent.take(1)[-2]

    assert (end.what, end.how, end.text) == (what, how, "why")


def test_events_of_devices(parent: Parent) -> None:
    """Only events of devices count, of a running VM, and texts are shortened.  The address comes from the parent."""
    vm = parent.vm("web")
    parent.events.address = lambda vmid, device: f"{vmid} {device}"
    tells = [("trouble", "disk0", "no space"), ("lease", "interface1", ""), ("stop", "disk0", ""), ("?", "", "")]
    for what, device, text in tells:
        parent.events.on_device(DeviceEvent(vmid=vm.vmid, what=what, device=device, text=text), UNUSED)
    vm.begin_start(0)
    for what, device, text in [*tells, ("mended", "x" * 9999, "y" * 9999)]:
        parent.events.on_device(DeviceEvent(vmid=vm.vmid, what=what, device=device, text=text), UNUSED)
    parent.events.on_device(DeviceEvent(vmid=99, what="trouble", device="disk0"), UNUSED)
    parent.ask(1)

    _, trouble, lease, mended = parent.take(1)[:-1]

    assert (trouble.what, trouble.device, trouble.text, trouble.value) == ("trouble", "disk0", "no space", "")
    assert (lease.what, lease.device, lease.value) == ("lease", "interface1", f"{vm.vmid} interface1")
    assert mended.what == "mended"
    assert len(mended.device) + len(mended.text) < 1000


def test_every_event_is_described() -> None:
    """The schema and vmctl(8) describe it."""
    schema = json.loads((ROOT / "docs/vmctl.schema.json").read_text())["$defs"]["events"]["properties"]["event"]
    page = (ROOT / "man/vmctl.8").read_text()
    page = page[page.index("The events are\n") : page.index(".It Cm help ")]
    words = [line.removeprefix(".It Cm ").split(" , ") for line in page.splitlines() if line.startswith(".It Cm ")]

    assert sorted(schema["enum"]) == sorted(WORDS)
    assert sorted(word for line in words for word in line) == sorted(WORDS)
    for word in WORDS:
        assert re.search(rf"\b{word}\b", schema["description"]), word
