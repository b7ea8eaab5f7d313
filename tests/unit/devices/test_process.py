"""What all device processes share: START, the questions and messages of the VM, notifications, timer and end."""

import _socket
import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.support.fakedriver import FIGURES_SLOT, LAYOUT, MIB, MODERN, RING_BASE, Ring, release
from vmd.devices import process as module
from vmd.devices.process import Host, Process, ThreadedProcess
from vmd.errors import GuestError, HostError, PeerError
from vmd.guestmem import GuestMemory
from vmd.ipc import devmsg
from vmd.log import FORMS, log
from vmd.memfile import sealed_file
from vmd.privsep.confine import VIOSCSI
from vmd.units import PAGE
from vmd.virtio.queue import FEATURES, Queue

QUEUES, SIZE = 3, 8
OUR_FEATURES = 1 << 9


# --- START -------------------------------------------------------------------------------------------------------


def start_packet(
    *, kind: int = devmsg.START, form: int = 0, index: int = 0, queues: int = 2, resources: int = 0, flags: int = 0,
    regions: int = 1, region: tuple[int, int, int, int] = (0, MIB, 0, 0), net: bytes = b"", serial: bytes = b"",
    names: tuple[str, ...] | None = None, slot: int = FIGURES_SLOT,
) -> bytes:  # fmt: skip
    """Return START; arguments replace the fields of a good one."""
    head = devmsg.START_HEAD.pack(kind, 2, form, index, queues, resources, flags, regions, slot)
    rows = devmsg.REGION.pack(*region) * regions + b"".join(devmsg.RESOURCE.pack(7 + i) for i in range(resources))
    words = ("vm/a", *(f"disk {i}" for i in range(resources))) if names is None else names
    return head + rows + net + serial + "\0".join(words).encode()


def host_of(packet: bytes, resources: int = 0) -> Host:
    """Return what the packet describes, with a descriptor for memory, figures and each resource."""
    return Host(packet, list(range(100, 102 + resources)))


def test_start_is_taken() -> None:
    """Each field and each descriptor has its place, and so have the descriptors of queues."""
    net = bytes(number % 251 for number in range(devmsg.NET.size))
    host = host_of(
        start_packet(
            form=1, index=4, queues=3, resources=2, flags=devmsg.START_NET | devmsg.START_SERIAL,
            region=(MIB, 2 * MIB, 4096, devmsg.REGION_READ_ONLY), net=net, serial=b"serial".ljust(20, b"\0"),
            names=("vm/a/net0", "tap", "other", "web"),
        ),
        2,
    )  # fmt: skip
    assert (host.verbosity, host.form, host.index, host.figures_slot) == (2, FORMS[1], 4, FIGURES_SLOT)
    (region,) = host.regions
    assert (region.gpa, region.size, region.offset, region.read_only) == (MIB, 2 * MIB, 4096, True)
    assert (host.notes, host.names, host.title, host.host_name) == ([7, 8], ["tap", "other"], "vm/a/net0", "web")
    assert (host.net, host.serial) == (devmsg.NET.unpack(net), b"serial".ljust(20, b"\0"))
    assert (host.memory_fd, host.figures_fd, host.resources) == (100, 101, [102, 103])
    assert (host.kicks, host.calls) == ([7, 8, 9], [10, 11, 12])

    plain = host_of(start_packet())
    assert (plain.net, plain.serial, plain.host_name, plain.names, plain.resources) == (None, b"", "", [], [])
    assert not plain.regions[0].read_only


MOST = {"queues": devmsg.QUEUES_MAX, "resources": devmsg.RESOURCES_MAX, "regions": devmsg.REGIONS_MAX}


@pytest.mark.parametrize("name", MOST)
def test_bounds_of_start(name: str) -> None:
    """The most that is allowed is taken, and one more is refused."""
    taken = host_of(start_packet(**{name: MOST[name]}), MOST[name] if name == "resources" else 0)  # type: ignore[arg-type]
    counts = {"queues": len(taken.kicks), "resources": len(taken.resources), "regions": len(taken.regions)}
    assert counts[name] == MOST[name]
    with pytest.raises(PeerError, match=f"{MOST[name] + 1} {name}"):
        host_of(start_packet(**{name: MOST[name] + 1}), MOST[name] + 1 if name == "resources" else 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (start_packet(kind=devmsg.READY), "not a START message"),
        (start_packet(form=len(FORMS)), "not a START message"),
        (start_packet(region=(1, MIB, 0, 0)), "memory region ram"),
        (start_packet(names=("vm/a", "one")), "START names 1 of 0 resources"),
        (start_packet(resources=1, names=("vm/a",)), "START names 0 of 1 resources"),
        (start_packet(resources=1), "START with 2 descriptors for memory, figures and 1 resources"),
    ],
)
def test_start_that_is_refused(packet: bytes, words: str) -> None:
    """The sentence tells the reason."""
    with pytest.raises(PeerError, match=words):
        host_of(packet)


def test_start_that_ends_early() -> None:
    """It is refused wherever it ends before its names."""
    net, serial = bytes(devmsg.NET.size), bytes(devmsg.SERIAL.size)
    flags = devmsg.START_NET | devmsg.START_SERIAL
    packet = start_packet(resources=1, flags=flags, net=net, serial=serial, names=("t", "n", "h"))
    assert host_of(packet, 1).names == ["n"]
    for length in range(len(packet) - len("t\0n\0h")):
        with pytest.raises(PeerError, match="is too short"):
            host_of(packet[:length], 1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_start_has_its_descriptors(count: int) -> None:
    """Memory and figures here, no more and no fewer."""
    with pytest.raises(PeerError, match=f"START with {count} descriptors"):
        Host(start_packet(), list(range(100, 100 + count)))


# --- the process -------------------------------------------------------------------------------------------------


class FakeDevice:
    """A device that keeps its calls."""

    def __init__(self) -> None:
        self.features = OUR_FEATURES
        self.config = b"configuration"
        self.calls: list[tuple[object, ...]] = []
        self.error: Exception | None = None
        self.more = False

    def activate(self, features: int, queues: list[Queue | None]) -> None:
        """Keep which queues are used."""
        self.calls.append(("activate", features, [queue is not None for queue in queues]))

    def quiesce(self, *, forget: bool) -> None:
        """Keep it."""
        self.calls.append(("quiesce", forget))
        if isinstance(self.error, HostError):
            raise self.error

    def on_notify(self, number: int) -> bool:
        """Keep it."""
        self.calls.append(("serve", number))
        if isinstance(self.error, GuestError):
            raise self.error
        return self.more

    def resume(self) -> None:
        """Keep it."""
        self.calls.append(("resume",))

    def write_config(self, offset: int, data: bytes) -> None:
        """Keep it, and show it."""
        self.calls.append(("config", offset, data))
        self.config = data

    def close(self) -> None:
        """Keep it."""
        self.calls.append(("close",))

    def taken(self) -> list[tuple[object, ...]]:
        """Return the calls since the last time."""
        found, self.calls = self.calls, []
        return found


class Noting(Process):
    """A process that keeps the pauses."""

    def note_pause(self, *, paused: bool) -> None:
        """Keep it among the calls of the device."""
        super().note_pause(paused=paused)
        self.device.calls.append(("paused", paused))  # type: ignore[attr-defined]


class Bench:
    """A device process in this one, and the ends of its VM."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: type[Process] = Noting) -> None:
        def event() -> int:
            return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

        self.memory = GuestMemory.create(LAYOUT)
        self.page = os.memfd_create("interrupts", os.MFD_CLOEXEC)
        os.truncate(self.page, mmap.PAGESIZE)
        self.counters = memoryview(mmap.mmap(self.page, mmap.PAGESIZE)).cast("I")
        self.resample = event()
        patch.setattr(devmsg, "FD_INTERRUPTS", self.page)
        patch.setattr(devmsg, "FD_RESAMPLE", self.resample)
        self.limits: list[int] = []
        patch.setattr(module, "limit_memory", self.limits.append)
        self.figures = sealed_file("figures", devmsg.FIGURES_BYTES)
        regions = b"".join(devmsg.REGION.pack(r.gpa, r.size, r.offset, r.read_only) for r in self.memory.regions)
        head = devmsg.START_HEAD.pack(devmsg.START, 0, 0, 3, QUEUES, 0, 0, len(self.memory.regions), FIGURES_SLOT)
        self.passed = [os.dup(self.memory.fd), os.dup(self.figures)]
        host = Host(head + regions + b"vm/a", list(self.passed))
        self.kicks, self.calls = [event() for _ in range(QUEUES)], [event() for _ in range(QUEUES)]
        host.kicks, host.calls = self.kicks, self.calls
        self.sync, self.their_sync = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.informs, self.their_informs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for channel in (self.sync, self.informs):
            channel.setblocking(False)
        self.process = kind(self.their_sync, self.their_informs, host, "vioscsi")
        self.device = FakeDevice()
        self.process.device = self.device
        self.rings = [Ring(self.memory, SIZE, RING_BASE + number * PAGE) for number in range(QUEUES)]

    def loop(self) -> None:
        """Handle all events that are there now, in one round."""
        for fd, _ in self.process.epoll.poll(0):
            self.process.handlers[fd]()

    def ask(self, packet: bytes) -> bytes:
        """Return the answer to a question."""
        self.sync.send(packet)
        self.process.on_sync()
        return self.sync.recv(devmsg.PACKET_MAX)

    def command(self, kind: int) -> None:
        """Ask a question whose answer is 0."""
        assert self.ask(devmsg.TYPE.pack(kind)) == devmsg.STATUS.pack(kind, 0)

    def activate(self, *rows: bytes) -> int:
        """Activate rings, all by default; return the status."""
        rows = rows or tuple(ring.row() for ring in self.rings)
        answer = self.ask(devmsg.ACTIVATE_HEAD.pack(devmsg.ACTIVATE, MODERN, len(rows)) + b"".join(rows))
        kind, status = devmsg.STATUS.unpack(answer)
        assert kind == devmsg.ACTIVATE
        return int(status)

    def told(self) -> list[bytes]:
        """Return the messages of the async channel since the last time."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.informs.recv(devmsg.PACKET_MAX))
        return found

    def served(self) -> list[int]:
        """Handle all events; return which queues were served."""
        self.device.taken()
        self.loop()
        return sorted(number for what, *rest in self.device.taken() if what == "serve" for number in rest)  # type: ignore[misc]

    def close(self) -> None:
        """Release everything."""
        for queue in self.process.queues:
            if queue is not None:
                release(queue)
        for channel in (self.sync, self.their_sync, self.informs, self.their_informs):
            channel.close()
        self.process.epoll.close()
        views = self.counters, self.process.raised, self.process.seen, self.process.figures, self.process.slot
        mappings = {id(view.obj): view.obj for view in views}
        for view in views:
            view.release()
        for mapping in mappings.values():  # each has a descriptor of its own
            assert isinstance(mapping, mmap.mmap)
            mapping.close()
        for fd in (*self.kicks, *self.calls, self.resample, self.page, self.figures):
            os.close(fd)
        self.process.memory.close()
        self.memory.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Yield a process whose rings are not activated yet."""
    made = Bench(monkeypatch)
    yield made
    made.close()


def events(fds: list[int]) -> list[int]:
    """Return the counts of eventfds, and set them to 0."""
    found = []
    for fd in fds:
        try:
            found.append(os.eventfd_read(fd))
        except BlockingIOError:
            found.append(0)
    return found


def test_process_begins_with_memory_and_figures(bench: Bench) -> None:
    """Its slot has its kind, its index and its figures.  Its memory is limited.  It looks at no queue yet."""
    count = len(devmsg.FIGURES["vioscsi"])
    slot = os.pread(bench.figures, devmsg.FIGURES_BYTES, 0)[FIGURES_SLOT * devmsg.FIGURES_SLOT_BYTES :][:24]
    assert struct.unpack("<3Q", slot) == (1 + devmsg.FIGURES_KINDS.index("vioscsi"), 3, count)
    assert len(bench.process.figures) == count
    names = zip(bench.passed, ("guest-memory", "figures"), strict=True)
    kept = [os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{name}") for fd, name in names]
    assert kept == [True, False]  # figures need their descriptor only at the start
    mapped = bench.memory.mapped_bytes + len(bench.memory.marks)
    assert bench.limits == [mapped + module.MEMORY_BESIDES_BYTES]
    for kick in bench.kicks:
        os.eventfd_write(kick, 1)
    assert bench.served() == []


def test_rings_are_activated(bench: Bench) -> None:
    """The device gets those that the driver uses, and looks at each: the guest may have notified it before."""
    assert bench.activate(bench.rings[0].row(), bytes(devmsg.QUEUE.size), bench.rings[2].row(True, 5, 4)) == 0
    assert bench.device.taken() == [("activate", MODERN, [True, False, True])]
    assert bench.served() == [0, 2]
    rows = [devmsg.QUEUE.pack(SIZE, 1, 0, 0, 0, 0, *indices) for indices in ((0, 0), (5, 4))]
    question = devmsg.TYPE.pack(devmsg.EXPORT)
    assert bench.ask(question) == devmsg.EXPORT_HEAD.pack(devmsg.EXPORT, 3) + bytes(devmsg.QUEUE.size).join(rows)


def test_rings_that_cannot_be_used(bench: Bench) -> None:
    """The device does not get them, and those before them are gone."""
    assert bench.activate() == 0
    bench.device.taken()
    good = bench.rings[0].row()
    assert bench.activate(good, devmsg.QUEUE.pack(100, 1, 0, RING_BASE, RING_BASE, RING_BASE, 0, 0)) == 1
    assert bench.device.taken() == [("quiesce", True)]
    os.eventfd_write(bench.kicks[0], 1)
    assert bench.served() == []


def test_activation_with_a_wrong_number_of_rings(bench: Bench) -> None:
    """There may be fewer than the device has, but not more; and as many as the head counts."""
    assert bench.activate(bench.rings[0].row()) == 0
    head = devmsg.ACTIVATE_HEAD
    row = bench.rings[0].row()
    for count, rows in ((QUEUES + 1, row * (QUEUES + 1)), (1, b""), (1, row * 2), (2, row + row[:-1])):
        bench.sync.send(head.pack(devmsg.ACTIVATE, MODERN, count) + rows)
        with pytest.raises(PeerError, match=f"rings for {count} queues"):
            bench.process.on_sync()


def test_a_queue_without_a_ring_is_not_served(bench: Bench) -> None:
    """Neither one that the driver left out, nor one behind those that it activated."""
    assert bench.activate(bytes(devmsg.QUEUE.size), bench.rings[1].row()) == 0
    assert bench.served() == [1]
    for number in range(QUEUES):
        bench.process.serve(number)
    assert bench.device.taken() == [("serve", 1)]


def test_work_beyond_the_budget_is_done_in_the_next_round(bench: Bench) -> None:
    """Other events come first, so the queue is notified again; without more work it is not."""
    assert bench.activate() == 0
    bench.loop()
    os.eventfd_write(bench.kicks[1], 3)
    bench.device.more = True
    assert bench.served() == [1]
    bench.device.more = False
    assert bench.served() == [1]
    assert bench.served() == []
    bench.process.on_kick(1, bench.kicks[1])  # an event that somebody else has taken meanwhile
    assert bench.device.taken() == []


def test_a_paused_device_serves_nothing_until_it_goes_on(bench: Bench) -> None:
    """A notification during the pause is not lost."""
    assert bench.activate() == 0
    bench.loop()
    bench.device.taken()
    bench.command(devmsg.PAUSE)
    assert bench.device.taken() == [("quiesce", False), ("paused", True)]
    os.eventfd_write(bench.kicks[1], 1)
    assert bench.served() == []
    bench.command(devmsg.RESUME)
    assert bench.device.taken() == [("paused", False)]
    assert bench.served() == [0, 1, 2]


def test_a_received_device_is_activated_in_a_pause(bench: Bench) -> None:
    """It serves nothing before the machine goes on.  A reset ends the pause, too."""
    bench.command(devmsg.PAUSE)
    assert bench.activate() == 0
    assert bench.served() == []
    bench.command(devmsg.RESUME)
    assert bench.served() == [0, 1, 2]
    bench.command(devmsg.PAUSE)
    bench.command(devmsg.RESET)
    assert bench.activate() == 0
    assert bench.served() == [0, 1, 2]


def test_a_reset_forgets_the_rings(bench: Bench) -> None:
    """After it nothing is served, not even when the machine goes on.  The next rings are the only ones."""
    assert bench.activate() == 0
    bench.loop()
    bench.device.taken()
    bench.command(devmsg.RESET)
    assert bench.device.taken() == [("quiesce", True)]
    bench.command(devmsg.RESUME)
    assert bench.served() == []
    assert bench.ask(devmsg.TYPE.pack(devmsg.EXPORT)) == devmsg.EXPORT_HEAD.pack(devmsg.EXPORT, 0)
    bench.device.taken()
    assert bench.activate() == 0
    assert bench.device.taken() == [("activate", MODERN, [True] * QUEUES)]  # no second reset, which undoes `config`
    assert bench.activate() == 0
    assert bench.device.taken() == [("quiesce", True), ("activate", MODERN, [True] * QUEUES)]


def test_a_broken_ring_is_told_with_the_number_of_its_activation(bench: Bench) -> None:
    """Nothing is served until the driver resets the device, not even after a pause."""
    assert bench.activate() == bench.activate() == 0
    bench.device.error = GuestError("x" * 600)
    os.eventfd_write(bench.kicks[0], 1)
    assert bench.served()[:1] == [0]
    assert bench.told() == [devmsg.NEEDS_RESET_HEAD.pack(devmsg.NEEDS_RESET, 2) + b"x" * 500]
    bench.device.error = None
    bench.command(devmsg.PAUSE)
    bench.command(devmsg.RESUME)
    assert bench.served() == []
    bench.command(devmsg.RESET)
    assert bench.activate() == 0
    assert bench.served() == [0, 1, 2]


def test_pages_of_rings_are_marked_when_the_device_stands_still(bench: Bench) -> None:
    """Their pages have changed, and a machine that is being sent sends them again."""
    assert bench.activate(bench.rings[0].row(), bytes(devmsg.QUEUE.size), bench.rings[2].row()) == 0
    pages = [(RING_BASE + number * PAGE) // PAGE for number in range(QUEUES)]
    bench.command(devmsg.PAUSE)
    assert [bench.memory.marks[page] for page in pages] == [0, 0, 0]
    bench.command(devmsg.MARK)
    bench.command(devmsg.PAUSE)
    assert [bench.memory.marks[page] for page in pages] == [1, 0, 1]
    for page in pages:
        bench.memory.marks[page] = 0
    bench.command(devmsg.UNMARK)
    bench.command(devmsg.PAUSE)
    assert not any(bench.memory.marks[page] for page in pages)


def test_the_driver_configures_the_device(bench: Bench) -> None:
    """The answer has the configuration space as it is then.  The length must be that of the data."""
    write = devmsg.CONFIG_WRITE_HEAD
    answer = bench.ask(write.pack(devmsg.CONFIG_WRITE, 4, 3) + b"new")
    assert bench.device.taken() == [("config", 4, b"new")]
    assert answer == devmsg.READY_HEAD.pack(devmsg.READY, OUR_FEATURES | FEATURES, 3) + b"new"
    for length, data in ((3, b"ne"), (3, b"news"), (0, b"n")):
        bench.sync.send(write.pack(devmsg.CONFIG_WRITE, 4, length) + data)
        with pytest.raises(PeerError, match=f"write of {length} bytes brings {len(data)}"):
            bench.process.on_sync()
    assert bench.device.taken() == []


def test_a_new_configuration_is_told(bench: Bench) -> None:
    """The message has the fields of READY."""
    bench.process.tell_config()
    ready = devmsg.READY_HEAD.pack(devmsg.CONFIG_CHANGED, OUR_FEATURES | FEATURES, 13)
    assert bench.told() == [ready + b"configuration"]


def test_interrupts_are_counted_before_they_are_raised(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest reads the count upon the event.  The count wraps around."""
    bench.counters[1] = 0xFFFFFFFE
    seen = []
    write = os.eventfd_write

    def raised(fd: int, value: int) -> None:
        seen.append((fd, list(bench.counters[:QUEUES])))
        write(fd, value)

    monkeypatch.setattr("vmd.devices.process.os.eventfd_write", raised)
    for _ in range(3):
        bench.process.interrupt(1)
    assert seen == [(bench.calls[1], [0, count, 0]) for count in (0xFFFFFFFF, 0, 1)]
    assert events(bench.calls) == [0, 3, 0]


@pytest.mark.parametrize(
    ("unseen", "again"), [((), [0, 0, 0]), ((0,), [1, 0, 0]), ((1,), [0, 1, 0]), ((1, 2), [0, 1, 0])]
)
def test_a_line_interrupt_is_raised_until_it_is_seen(bench: Bench, unseen: tuple[int, ...], again: list[int]) -> None:
    """One event is enough for all queues, because they share the line."""
    for number in range(QUEUES):
        bench.counters[number] = 5
        bench.counters[devmsg.QUEUES_MAX + number] = 4 if number in unseen else 5
    bench.process.on_resample()
    assert events(bench.calls) == [0, 0, 0]  # no interrupt has ended
    os.eventfd_write(bench.resample, 1)
    bench.loop()
    assert events(bench.calls) == again


def test_descriptors_are_sent_with_one_answer(bench: Bench) -> None:
    """The next answer has none, and they stay open here."""
    bench.process.passing = [bench.page, bench.figures]
    question = devmsg.TYPE.pack(devmsg.PAUSE)
    for count in (2, 0):
        bench.sync.send(question)
        bench.process.on_sync()
        packet, fds, _, _ = socket.recv_fds(bench.sync, devmsg.PACKET_MAX, 4)
        assert (packet, len(fds)) == (devmsg.STATUS.pack(devmsg.PAUSE, 0), count)
        for fd, ours in zip(fds, (bench.page, bench.figures), strict=False):
            assert os.path.sameopenfile(fd, ours)
            os.close(fd)
    assert fcntl.fcntl(bench.page, fcntl.F_GETFD) >= 0


def test_an_error_answers_the_open_question_too(bench: Bench) -> None:
    """So the VM does not wait for an answer.  Without an open question it hears of the error on one channel."""
    error = HostError("disk: requests did not end", errno.EIO)
    bench.command(devmsg.PAUSE)
    bench.process.fail(error)
    assert bench.told()[0].startswith(devmsg.ERROR_HEAD.pack(devmsg.ERROR, errno.EIO))
    with pytest.raises(BlockingIOError):
        bench.sync.recv(1)
    bench.device.error = error
    bench.sync.send(devmsg.TYPE.pack(devmsg.PAUSE))
    with pytest.raises(HostError) as raised:
        bench.process.on_sync()
    bench.process.fail(raised.value)
    assert bench.told() == [bench.sync.recv(devmsg.PACKET_MAX)]


@pytest.mark.parametrize("channel", ["sync", "informs"])
@pytest.mark.parametrize("packet", [b"\1", b"\1\0\0", devmsg.TYPE.pack(999)])
def test_unknown_message(bench: Bench, channel: str, packet: bytes) -> None:
    """The process ends with an error."""
    getattr(bench, channel).send(packet)
    with pytest.raises(PeerError):
        bench.loop()


@pytest.mark.parametrize("how", ["sync", "informs", "shutdown"])
def test_end_of_a_process(bench: Bench, how: str) -> None:
    """When the VM says so or closes a channel, the device drops requests, closes its resource, and succeeds."""
    if how == "shutdown":
        bench.informs.send(devmsg.TYPE.pack(devmsg.SHUTDOWN))
    else:
        getattr(bench, how).close()
    with pytest.raises(SystemExit) as ended:
        bench.loop()
    assert ended.value.code == 0
    assert bench.device.taken() == [("quiesce", True), ("close",)]
    assert not bench.process.running


def test_verbosity(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes while the process runs."""
    monkeypatch.setattr(log, "verbosity", 0)
    bench.informs.send(devmsg.VERBOSITY_BODY.pack(devmsg.VERBOSITY, 2))
    bench.loop()
    assert log.verbosity == 2


def test_a_vm_that_does_not_read(bench: Bench) -> None:
    """The process does not wait for it, and does not fail."""
    for _ in range(2000):
        bench.process.tell(bytes(4000))
    bench.informs.close()
    bench.process.tell(b"more")


# --- timer -------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The test ends the loop."""


def test_the_timer_waits_for_its_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events before it are handled.  The second call replaces the first.  It comes once."""
    now = itertools.count(1000)  # a second passes with each look at the clock
    seen: list[str] = []
    always = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def event() -> None:
        seen.append("event")
        if len(seen) > 50:
            raise Stopped

    def fire() -> None:
        seen.append("timer")
        assert bench.process.timer is None

    bench.process.watch(always, event)
    with monkeypatch.context() as patch:
        patch.setattr("vmd.devices.process.time.monotonic", lambda: float(next(now)))
        bench.process.call_after(1.0, lambda: seen.append("replaced"))
        bench.process.call_after(6.0, fire)
        with pytest.raises(Stopped):
            bench.process.run()
    assert seen.count("timer") == 1
    assert "replaced" not in seen
    assert 2 <= seen.index("timer") <= 6
    os.close(always)


def test_the_timer_comes_without_an_event(bench: Bench) -> None:
    """The loop wakes up for it."""

    def stop() -> None:
        raise Stopped

    for delay_s in (0.0, 0.001, -5.0):
        bench.process.call_after(delay_s, stop)
        with pytest.raises(Stopped):
            bench.process.run()


def test_a_descriptor_that_is_not_watched_any_more(bench: Bench) -> None:
    """Its handler is not called."""
    ready = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    seen: list[int] = []
    bench.process.watch(ready, lambda: seen.append(1))
    bench.loop()
    bench.process.unwatch(ready)
    bench.loop()
    assert seen == [1]
    os.close(ready)


# --- devices with threads ----------------------------------------------------------------------------------------


@pytest.fixture
def threaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Yield a process whose device has threads of its own."""
    made = Bench(monkeypatch, ThreadedProcess)
    yield made
    os.close(made.process.posted)  # type: ignore[attr-defined]
    made.close()


def test_threads_serve_the_queues_themselves(threaded: Bench) -> None:
    """The process leaves notifications to them, and lets them go on when the device has rings and is not paused."""
    for kick in threaded.kicks:
        os.eventfd_write(kick, 1)
    threaded.command(devmsg.RESUME)
    assert threaded.device.taken() == []
    assert threaded.activate() == 0
    threaded.loop()
    assert threaded.device.taken() == [("activate", MODERN, [True] * QUEUES), ("resume",)]
    threaded.command(devmsg.PAUSE)
    threaded.command(devmsg.RESUME)
    assert threaded.device.taken() == [("quiesce", False), ("resume",)]
    assert events(threaded.kicks) == [1, 1, 1]


def test_jobs_of_threads(threaded: Bench) -> None:
    """The main thread calls them in their order, all at one event."""
    process = threaded.process
    assert isinstance(process, ThreadedProcess)
    done: list[int] = []
    for number in range(3):
        process.post(lambda number=number: done.append(number))  # type: ignore[misc]
    threaded.loop()
    assert done == [0, 1, 2]
    process.posts.append(lambda: done.append(3))
    process.on_posted()  # without an event
    assert done == [0, 1, 2]


def test_a_broken_ring_of_a_thread(threaded: Bench) -> None:
    """All threads stop before the VM hears of it.  A ring that is gone by then is not broken."""
    process = threaded.process
    assert isinstance(process, ThreadedProcess)

    def told(between: Callable[[], object]) -> list[bytes]:
        assert threaded.activate() == 0
        threaded.device.taken()
        process.broke("broken")
        between()
        threaded.loop()
        return threaded.told()

    assert told(lambda: None) == [devmsg.NEEDS_RESET_HEAD.pack(devmsg.NEEDS_RESET, 1) + b"broken"]
    assert threaded.device.taken() == [("quiesce", False)]
    assert told(threaded.activate) == []
    assert told(lambda: threaded.command(devmsg.RESET)) == []


# --- main --------------------------------------------------------------------------------------------------------


class Sockets:
    """The module of sockets.  It keeps those that it makes, so that the test can close them."""

    def __init__(self) -> None:
        self.made: list[_socket.socket] = []

    def __getattr__(self, name: str) -> object:
        return getattr(_socket, name)

    def socket(self, *, fileno: int) -> _socket.socket:
        """Return a socket of a descriptor."""
        self.made.append(_socket.socket(fileno=fileno))
        return self.made[-1]


class Program:
    """`main` in this process, and the ends of its VM."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[object] = []
        self.sync, their_sync = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.informs, their_informs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.informs.setblocking(False)
        patch.setattr(devmsg, "FD_SYNC", their_sync.detach())
        patch.setattr(devmsg, "FD_ASYNC", their_informs.detach())
        patch.setattr(module, "confine", lambda confinement: self.steps.append(confinement))
        patch.setattr(module, "set_title", self.steps.append)
        patch.setattr(log, "setup", lambda *words: self.steps.append(words))
        patch.setattr(log, "error", self.steps.append)
        patch.setattr("vmd.devices.process.gc.collect", lambda: None)
        patch.setattr("vmd.devices.process.gc.freeze", lambda: None)
        self.sockets = Sockets()
        patch.setattr(module, "_socket", self.sockets)
        self.error: Exception | None = None
        self.packet = start_packet()

    def main(self, make: Callable[["Bare"], FakeDevice] | None = None) -> int:
        """Send START, run the program, and return its exit status."""
        null = os.open(os.devnull, os.O_RDWR)
        with contextlib.suppress(OSError):
            socket.send_fds(self.sync, [self.packet], [null, null])
        os.close(null)
        Bare.program = self
        return module.main("vioscsi", VIOSCSI, make or (lambda process: process.made), Bare)

    def close(self) -> None:
        """Close both ends of both channels."""
        for channel in (self.sync, self.informs, *self.sockets.made):
            channel.close()


class Bare(Process):
    """A process without memory and loop."""

    program: Program

    def __init__(self, sync: socket.socket, informs: socket.socket, host: Host, kind: str) -> None:
        assert kind == "vioscsi"
        self.sync, self.informs, self.host = sync, informs, host
        self.made = FakeDevice()
        self.troubles: tuple[str, ...] = ("not well",)
        self.announced = self.asked = False
        for fd in (host.memory_fd, host.figures_fd):
            os.close(fd)

    def run(self) -> None:
        """End at once."""
        self.program.steps.append("run")
        if self.program.error is not None:
            raise self.program.error


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Yield a program whose VM is there."""
    made = Program(monkeypatch)
    yield made
    made.close()


READY = devmsg.READY_HEAD.pack(devmsg.READY, OUR_FEATURES | FEATURES, 13) + b"configuration"


def test_a_process_is_confined_first_and_then_ready(program: Program) -> None:
    """It tells that it is ready on both channels, then its troubles."""
    program.error = HostError("storage: gone", errno.EIO)
    assert program.main() == 1
    assert program.steps == [VIOSCSI, "vm/a", ("vm/a", FORMS[0], 2), "run", str(program.error)]
    assert program.sync.recv(devmsg.PACKET_MAX) == READY
    informed = [program.informs.recv(devmsg.PACKET_MAX) for _ in range(3)]
    assert informed[:2] == [READY, devmsg.TYPE.pack(devmsg.TROUBLES) + b"not well"]
    assert devmsg.ERROR_HEAD.unpack_from(informed[2]) == (devmsg.ERROR, errno.EIO)


@pytest.mark.parametrize(
    ("error", "number", "words"),
    [
        (PeerError("vm process", "a disk without an image"), 0, b"a disk without an image"),
        (OSError(errno.EACCES, "not allowed"), errno.EACCES, b"not allowed"),
        (HostError("x" * 5000, errno.ENOMEM), errno.ENOMEM, b"x" * 900),
        (OSError("without a number"), 0, b"without a number"),
    ],
)  # fmt: skip
def test_a_device_that_cannot_be_made(program: Program, error: Exception, number: int, words: bytes) -> None:
    """START is answered with the reason."""

    def make(_process: Bare) -> FakeDevice:
        raise error

    assert program.main(make) == 1
    packet = program.sync.recv(devmsg.PACKET_MAX)
    assert devmsg.ERROR_HEAD.unpack_from(packet) == (devmsg.ERROR, number)
    assert words in packet
    assert "run" not in program.steps
    with pytest.raises(BlockingIOError):
        program.informs.recv(devmsg.PACKET_MAX)


def test_a_vm_that_has_ended(program: Program) -> None:
    """The process ends before START, or while it makes its device, and logs an error only if it has one."""

    def make(process: Bare) -> FakeDevice:
        program.sync.close()
        return process.made

    assert program.main(make) == 1
    assert program.steps == [VIOSCSI, "vm/a", ("vm/a", FORMS[0], 2)]


def test_a_vm_that_sends_nothing(program: Program) -> None:
    """It has no use for this process."""
    program.packet = b""
    program.sync.shutdown(socket.SHUT_WR)
    assert program.main() == 1
    assert program.steps == [VIOSCSI]
    with pytest.raises(BlockingIOError):
        program.informs.recv(devmsg.PACKET_MAX)


def test_a_reason_that_nobody_hears_is_logged(program: Program) -> None:
    """The VM has ended."""

    def make(_process: Bare) -> FakeDevice:
        program.sync.close()
        raise OSError(errno.EACCES, "not allowed")

    assert program.main(make) == 1
    assert "not allowed" in str(program.steps[-1])
