"""The device processes of a VM, seen from the VM's process: starts them, asks them, checks answers, ends them."""

import errno
import mmap
import time

from vmd import threads
from vmd.errors import HostError, OperatorError, PeerError, VmdError, sentence
from vmd.eventfd import eventfd
from vmd.ipc import devmsg
from vmd.ipc.channel import socketpair
from vmd.ipc.rights import receive, rights_of
from vmd.log import FORMS, log
from vmd.memfile import sealed_file
from vmd.privsep.spawn import spawn
from vmd.signals import name_of
from vmd.units import PAGE
from vmd.vm.kinds import INTERFACE, KERNEL, MAIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vmd.guestmem import GuestMemory
    from vmd.ipc.loop import Loop
    from vmd.vm.kinds import Kind
    from vmd.vm.slots import Slot

START_TIMEOUT_S = 30.0  # long, because a host that starts fifty VMs at once is slow
END_TIMEOUT_S = 60.0  # long, because a disk writes back what the host has cached of it
EXIT_TIMEOUT_S = 1.0  # between the end of a channel and the end of its process


def are_addresses(raw: bytes) -> bool:
    """Return whether these bytes are possible addresses of a guest, each a devmsg.ANNOUNCED."""
    kinds = (devmsg.ANNOUNCED_4, devmsg.ANNOUNCED_6, devmsg.ANNOUNCED_ROUTER)
    size = devmsg.ANNOUNCED.size
    fits = not len(raw) % size and len(raw) <= devmsg.ANNOUNCED_MAX * size
    return fits and all(kind in kinds for kind in raw[::size])


class Interrupts:
    """Counters that tell which queues have an interrupt that the guest has not read from ISR yet (`devmsg`)."""

    def __init__(self, words: memoryview) -> None:
        """`words` are u32.  For a device process they are the page that it shares with this process."""
        self._words = words

    def add(self, queue: int) -> None:
        """Count an interrupt of a queue.  Only the thread that serves the queue calls this."""
        self._words[queue] = self._words[queue] + 1 & 0xFFFFFFFF

    def pending(self, queue: int) -> bool:
        """Return whether this queue has an interrupt that the guest has not read from ISR."""
        return self._words[queue] != self._words[devmsg.QUEUES_MAX + queue]

    def restore_pending(self, queue: int) -> None:
        """Give a queue an unread interrupt.  The device must not have raised any interrupt yet."""
        self._words[devmsg.QUEUES_MAX + queue] = self._words[queue] - 1 & 0xFFFFFFFF

    def take(self, queues: int) -> bool:
        """Return whether any queue has an unread interrupt, and mark all interrupts as read."""
        taken = False
        for queue in range(queues):
            raised = self._words[queue]
            taken |= raised != self._words[devmsg.QUEUES_MAX + queue]
            # If the device counts an interrupt after `raised` was read, the two words still differ: it stays pending.
            self._words[devmsg.QUEUES_MAX + queue] = raised
        return taken


class DeviceProcess:
    """One device process.  The constructor starts it, and `begin` tells it later which device it is.

    `ask`, and the methods that use it, are called on vCPU threads, the event thread and the sender's thread, one call
    at a time.  All other methods run on the event thread.

    Raises:
        HostError: the process cannot be started.
    """

    def __init__(self, kind: "Kind", module: str = MAIN) -> None:
        """`module` is the name of its main module in the package of its kind."""
        self.kind = kind
        self.module = module
        self.begun = False
        self.title = self.name = self.label = kind.process
        self.troubles: dict[str, int] = {}  # troubles that the device reports, each with its start (seconds since 1970)
        queues = len(kind.queues)
        self.kicks = [eventfd() for _ in range(queues)]
        self.calls = [eventfd() for _ in range(queues)]
        self.resample = eventfd()
        self.page = sealed_file("interrupts", PAGE)
        self.interrupts = Interrupts(memoryview(mmap.mmap(self.page, PAGE)).cast("I"))
        self.features = 0
        self.arrived_with = b""  # addresses that the guest of an interface had announced at the sender
        self.activations = 0
        self.may_be_direct = False  # it is an interface whose frames the kernel may move
        self.direct = False  # the last value of `tell_direct`
        self.limits = 0, 0  # the limits that it was told: requests and bytes a second; 0: unlimited
        self.config = b""
        self.status: int | None = None  # the exit status, once the process has ended
        self._late = 0  # answers that came too late: `ask` drops so many before its next question
        self._lock = threads.Lock()
        self._reaping = threads.Lock()
        self._on_failed: Callable[[str], None] = log.error
        self._on_needs_reset: Callable[[str, int], None] = lambda text, _life: log.warn(text)
        self._on_config: Callable[[bytes], object] = len
        self._on_ask_resolvers: Callable[[], None] = lambda: None
        self._on_lock_lost: Callable[[str], None] = log.error
        self.lock_lost = ""  # for a disk: why its lock is lost; "" while it is held
        self._on_event: Callable[[str, str], None] = lambda _what, _text: None
        self._on_changed: Callable[[int, str], None] | None = None  # set until RESIZE or DISC is answered
        self._sync, their_sync = socketpair()
        self._async, their_async = socketpair()
        fds = {devmsg.FD_ASYNC: their_async.fileno(), devmsg.FD_INTERRUPTS: self.page}
        fds[devmsg.FD_RESAMPLE] = self.resample
        fds |= dict(enumerate((*self.kicks, *self.calls), devmsg.FD_FIRST_QUEUE))
        try:
            entry = f"vmd.devices.{kind.process}.{module}:main"
            self.child = spawn(self.title, channel=their_sync, fds=fds, entry=entry)
        finally:
            their_sync.close()
            their_async.close()

    def begin(self, vm_title: str, slot: "Slot", memory: "GuestMemory", figures_fd: int, figures_slot: int) -> None:
        """Tell the process which device it is, and pass it its descriptors.  The caller keeps its own copies of them.

        Raises PeerError if the process has ended, HostError if descriptors cannot be passed.
        """
        self.name, self.label = slot.name, slot.label
        self.title = f"{vm_title}/{slot.name}"
        try:
            packet = start_packet(self.title, slot, memory, figures_slot)
            self._sync.sendmsg([packet], rights_of((memory.fd, figures_fd, *slot.fds)))
        except ConnectionError:
            raise PeerError(self.title, f"{self._how_it_ended()} before it was needed") from None
        except OSError as error:
            raise HostError(f"pass {self.title} its descriptors", error) from error
        self.begun = True
        self.may_be_direct = slot.module == KERNEL

    def wait_ready(self) -> None:
        """Wait for READY on both channels.  Raises OperatorError or PeerError with the sentence of the device."""
        for channel in (self._sync, self._async):
            channel.settimeout(START_TIMEOUT_S)
            try:
                packet = channel.recv(devmsg.PACKET_MAX)
            except TimeoutError:
                raise PeerError(self.title, f"not ready after {START_TIMEOUT_S:.0f} s") from None
            except ConnectionError:  # the process has ended before it read START
                packet = b""
            if not packet:
                raise PeerError(self.title, f"{self._how_it_ended()} while it was starting")
            kind = self._kind(packet)
            if kind == devmsg.ERROR:
                number, text = self._error(packet)
                raise OperatorError(number, f"{self.title}: {text}") if number else PeerError(self.title, text)
            if kind != devmsg.READY:
                raise PeerError(self.title, f"message {kind} instead of READY")
            self.features, self.config = self._ready(packet)
        self._async.setblocking(False)
        self._sync.settimeout(devmsg.ANSWER_TIMEOUT_S)

    def serve(
        self,
        loop: "Loop",
        *,
        on_failed: "Callable[[str], None]",
        on_needs_reset: "Callable[[str, int], None]",
        on_config: "Callable[[bytes], object]",
        on_ask_resolvers: "Callable[[], None]",
        on_lock_lost: "Callable[[str], None]",
        on_event: "Callable[[str, str], None]",
    ) -> None:
        """Listen on the async channel.

        `on_failed` is called if the device has ended or is broken: then the VM must end.  `on_event` is called with a
        word and a sentence (`DeviceEvent`).
        """
        self._on_failed, self._on_needs_reset, self._on_config = on_failed, on_needs_reset, on_config
        self._on_ask_resolvers, self._on_lock_lost = on_ask_resolvers, on_lock_lost
        self._on_event = on_event
        loop.add(self._async.fileno(), lambda _events: self._on_async(loop))

    # --- questions -------------------------------------------------------------------------------------------

    def activate(self, features: int, queues: "Sequence[tuple[int, bool, int, int, int, int, int]]") -> bool:
        """Hand over the rings.  Return False if the device cannot use them.

        Each row of `queues` is (size, enabled, desc, avail, used, next avail, next used).
        """
        body = b"".join(
            devmsg.QUEUE.pack(size, enabled, 0, desc, avail, used, next_avail, next_used)
            for size, enabled, desc, avail, used, next_avail, next_used in queues
        )
        self.activations = self.activations + 1 & 0xFFFFFFFF
        answer = self.ask(devmsg.ACTIVATE_HEAD.pack(devmsg.ACTIVATE, features, len(queues)) + body)
        return self._status(answer)

    def command(self, kind: int) -> bool:
        """Have the device execute RESET, PAUSE, RESUME, MARK, UNMARK or SETTLE_AHEAD, and wait until it has."""
        return self._status(self.ask(devmsg.TYPE.pack(kind)))

    def tell_direct(self, direct: bool) -> None:
        """Tell an interface whose frames the kernel may move whether each of its queues has an MSI-X vector.

        If so, the kernel can interrupt the guest by itself.
        """
        if self.may_be_direct and direct != self.direct:
            self.direct = direct
            self._status(self.ask(devmsg.DIRECT_BODY.pack(devmsg.DIRECT, direct)))

    def write_config(self, offset: int, data: bytes) -> bytes:
        """Pass on a write to configuration space.  Return the content of that space after the write."""
        answer = self.ask(devmsg.CONFIG_WRITE_HEAD.pack(devmsg.CONFIG_WRITE, offset, len(data)) + data)
        return self._ready(answer)[1]

    def export(self) -> tuple[list[tuple[int, int]], bytes]:
        """Return (next avail, next used) of each queue of a paused device, and its own state besides the rings."""
        answer = self.ask(devmsg.TYPE.pack(devmsg.EXPORT))
        if len(answer) < devmsg.EXPORT_HEAD.size:
            raise PeerError(self.title, "EXPORT is too short", answer)
        count = devmsg.EXPORT_HEAD.unpack_from(answer)[1]
        length = count * devmsg.QUEUE.size
        rows, own = answer[devmsg.EXPORT_HEAD.size :][:length], answer[devmsg.EXPORT_HEAD.size + length :]
        if count > len(self.kicks) or len(rows) != length or len(own) > devmsg.OWN_MAX:
            raise PeerError(self.title, f"EXPORT of {count} queues in {len(answer)} bytes", answer)
        return [row[6:8] for row in devmsg.QUEUE.iter_unpack(rows)], own

    def restore(self, own: bytes) -> bool:
        """Give a device its own state, which `export` has returned elsewhere."""
        return self._status(self.ask(devmsg.TYPE.pack(devmsg.RESTORE) + own))

    def settle(self) -> int:
        """For a disk: bring its data to stable storage.  Return how far that is, as devmsg.SETTLED_*."""
        return self._disk_status(devmsg.SETTLE)

    def let_go(self) -> bool:
        """For a paused disk that has settled: release its lock.  Return whether it did."""
        return self._disk_status(devmsg.LET_GO) == 0

    def take_back(self) -> int:
        """For a disk whose lock was released or lost: take the lock.  Return the outcome, as devmsg.TAKEN_*."""
        status = self._disk_status(devmsg.TAKE_BACK)
        if status in devmsg.HAVE:
            self.lock_lost = ""
        return status

    def sign(self) -> None:
        """For a disk of a received VM that is about to run: write to its image, without changing it, if possible.

        The sender notices that, if it takes the image back.
        """
        self._disk_status(devmsg.SIGN)

    def _disk_status(self, kind: int) -> int:
        answer = self.ask(devmsg.TYPE.pack(kind))
        if len(answer) != devmsg.STATUS.size:
            raise PeerError(self.title, f"answer to message {kind} of a wrong length", answer)
        status: int = devmsg.STATUS.unpack(answer)[1]
        return status

    def addresses(self) -> bytes:
        """For an interface: return the addresses that its guest has announced, each a devmsg.ANNOUNCED."""
        answer = self.ask(devmsg.TYPE.pack(devmsg.ADDRESSES))[devmsg.TYPE.size :]
        if not are_addresses(answer):
            raise PeerError(self.title, "ADDRESSES of a wrong length", answer)
        return answer

    def lend(self) -> list[int]:
        """For a disk: return duplicates of its open files, which the caller closes.

        Raises PeerError, or VmdError if the disk cannot write out its cached tables.
        """
        fds: list[int] = []
        if not self._status(self.ask(devmsg.TYPE.pack(devmsg.LEND), fds)):
            raise VmdError(f"{self.label}: cached data of the disk cannot be written; the log says why")
        return fds

    def reload(self) -> bool:
        """For a disk that another process has written to: read its headers again.  Return whether it is usable."""
        return self._status(self.ask(devmsg.TYPE.pack(devmsg.RELOAD)))

    def ask(self, packet: bytes, fds: "list[int] | None" = None) -> bytes:
        """Send a question and return the answer.  Raises PeerError if no answer, or a wrong one, comes within 10 s.

        A caller that can go on without the answer may ask again later: a late answer is dropped then.  Descriptors that
        come with the answer are added to `fds`.  If that is None, none are accepted.
        """
        wanted = self._kind(packet)
        with self._lock:
            asked = False
            try:
                while self._late:
                    self._sync.recv(devmsg.PACKET_MAX)
                    self._late -= 1
                self._sync.send(packet)
                asked = True
                if fds is None:
                    answer = self._sync.recv(devmsg.PACKET_MAX)
                else:
                    answer, files, _ = receive(self._sync, devmsg.PACKET_MAX, devmsg.RESOURCES_MAX)
                    fds += files
            except ConnectionError:  # the process has ended before it read the question
                answer = b""
            except TimeoutError as error:
                self._late += asked
                raise PeerError(self.title, f"message {wanted}: no answer in 10 s") from error
            except OSError as error:
                raise PeerError(self.title, f"message {wanted}: {sentence(error)}") from error
        if not answer:
            raise PeerError(self.title, self._how_it_ended())
        kind = self._kind(answer)
        if kind == devmsg.ERROR:
            raise PeerError(self.title, self._error(answer)[1])
        if kind not in (wanted, devmsg.READY):
            raise PeerError(self.title, f"answered message {wanted} by another", answer)
        return answer

    # --- informing ---------------------------------------------------------------------------------------------

    def set_verbosity(self, verbosity: int) -> None:
        """Set the verbosity of the process."""
        self._tell(devmsg.VERBOSITY_BODY.pack(devmsg.VERBOSITY, verbosity))

    def limit(self, requests: int, rate: int) -> None:
        """Limit a disk or network interface to so many requests and bytes (`rate`) a second; 0: unlimited."""
        if (requests, rate) != self.limits:
            self.limits = requests, rate
            self._tell(devmsg.LIMIT_BODY.pack(devmsg.LIMIT, requests, rate))

    def announce(self) -> None:
        """Have an interface announce to the network that its guest is here now, with the addresses it had before."""
        self._tell(devmsg.TYPE.pack(devmsg.ANNOUNCE) + self.arrived_with)

    def tell_resolvers(self, servers: "tuple[tuple[bytes, ...], tuple[bytes, ...]] | None") -> None:
        """Tell an interface the host's IPv4 and IPv6 name servers; None: those that it knows still hold."""
        if servers is None:
            self._tell(devmsg.TYPE.pack(devmsg.SAME_RESOLVERS))
            return
        dns4, dns6 = (b"".join(each[: devmsg.DNS_MAX]) for each in servers)
        self._tell(devmsg.RESOLVERS_BODY.pack(devmsg.RESOLVERS, dns4, dns6))

    def resize(self, size: int, then: "Callable[[int, str], None]") -> None:
        """Make a disk larger.  `then` is called once: with (0, ""), or with an errno and a sentence."""
        self._change(devmsg.RESIZE_BODY.pack(devmsg.RESIZE, size), (), then)

    def change_disc(self, fd: int | None, name: str, then: "Callable[[int, str], None]", *, force: bool) -> None:
        """Give a drive another disc, or none.  The caller still owns `fd`.  `then` is called as for `resize`."""
        head = devmsg.DISC_HEAD.pack(devmsg.DISC, devmsg.DISC_FORCE if force else 0)
        self._change(head + name.encode("utf-8", "surrogateescape"), () if fd is None else (fd,), then)

    def _change(self, packet: bytes, fds: "Sequence[int]", then: "Callable[[int, str], None]") -> None:
        if self._on_changed is not None:
            then(errno.EBUSY, "another change is under way")
            return
        try:
            self._async.sendmsg([packet], rights_of(fds))
        except OSError as error:
            then(error.errno or errno.EIO, sentence(error))
        else:
            self._on_changed = then

    def shut_down(self) -> None:
        """Ask the process to end.  `reap` waits until it has."""
        self._tell(devmsg.TYPE.pack(devmsg.SHUTDOWN))
        if not self.begun:  # before START, the process listens on the sync channel only
            self._sync.close()

    def reap(self, timeout_s: float) -> None:
        """Wait until the process has ended.

        A process that does not end in time is left: the kernel kills it when this process ends.  This process has no
        right to kill it.
        """
        if self._reap(timeout_s) is None:
            log.warn(f"{self.title} does not end; the kernel kills it with its vm")

    def has_ended(self) -> bool:
        """Return whether the process has ended."""
        return self._reap(0) is not None

    def _how_it_ended(self) -> str:
        """Return how a process has ended whose channel is closed: the end of a sentence."""
        status = self._reap(EXIT_TIMEOUT_S)
        if status is None:
            return "has closed its channel"
        if status < 0:
            return f"was killed by {name_of(-status)}"
        return f"ended with status {status}"

    def _reap(self, timeout_s: float) -> int | None:
        """Wait for the process, and return its exit status; None if it has not ended."""
        with self._reaping:
            if self.status is None:
                self.status = self.child.reap(timeout_s)
            return self.status

    def _tell(self, packet: bytes) -> None:
        try:
            self._async.send(packet)
        except OSError:
            return  # the process has ended, which the sync channel or `_on_async` finds out

    def _on_async(self, loop: "Loop") -> None:
        try:
            packet = self._async.recv(devmsg.PACKET_MAX)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        try:
            if not packet:
                raise PeerError(self.title, self._how_it_ended())
            self._handle_async(packet)
        except PeerError as error:
            loop.remove(self._async.fileno())
            self._on_failed(str(error))

    def _handle_async(self, packet: bytes) -> None:
        match self._kind(packet):
            case devmsg.NEEDS_RESET:
                if len(packet) < devmsg.NEEDS_RESET_HEAD.size:
                    raise PeerError(self.title, "NEEDS_RESET is too short", packet)
                life = devmsg.NEEDS_RESET_HEAD.unpack_from(packet)[1]
                text = packet[devmsg.NEEDS_RESET_HEAD.size :].decode(errors="replace")[:200]
                self._on_needs_reset(text, life)
                self._on_event("fault", text)
            case devmsg.CONFIG_CHANGED:
                self._on_config(self._ready(packet)[1])
            case devmsg.CHANGED if self._on_changed is not None:
                then, self._on_changed = self._on_changed, None
                then(*self._error(packet))
            case devmsg.TROUBLES:
                self._take_troubles(packet[devmsg.TYPE.size :])
            case devmsg.LOCK_LOST if self.kind.settles:
                before = self.lock_lost
                self.lock_lost = packet[devmsg.TYPE.size :][: devmsg.TROUBLE_MAX].decode(errors="replace")
                self._on_lock_lost(f"{self.label}: {self.lock_lost}")
                if self.lock_lost not in (before, *self.troubles):  # the device repeats this message
                    self._on_event("trouble", self.lock_lost)
            case devmsg.ASK_RESOLVERS if self.kind is INTERFACE:
                self._on_ask_resolvers()
            case devmsg.LEASE if self.kind is INTERFACE:
                self._on_event("lease", "")
            case devmsg.ERROR:
                raise PeerError(self.title, self._error(packet)[1])
            case kind:
                raise PeerError(self.title, f"unexpected message {kind}", packet)

    def _take_troubles(self, raw: bytes) -> None:
        """Take the list of present troubles of the device.  A trouble that was known before keeps its time."""
        now_s = int(time.time())
        texts = [part[: devmsg.TROUBLE_MAX].decode(errors="ignore") for part in raw.split(b"\0")[: devmsg.TROUBLES_MAX]]
        before, self.troubles = self.troubles, {text: self.troubles.get(text, now_s) for text in texts if text}
        for text in self.troubles.keys() - {*before, self.lock_lost}:
            self._on_event("trouble", text)
        if before and not self.troubles:
            self._on_event("mended", "")

    # --- decoding: the process may have been taken over, so every value is checked -------------------------------

    def _kind(self, packet: bytes) -> int:
        if len(packet) < devmsg.TYPE.size:
            raise PeerError(self.title, "message without a type", packet)
        kind: int = devmsg.TYPE.unpack_from(packet)[0]
        return kind

    def _status(self, packet: bytes) -> bool:
        if len(packet) != devmsg.STATUS.size:
            raise PeerError(self.title, "status of a wrong length", packet)
        return bool(devmsg.STATUS.unpack(packet)[1] == 0)

    def _ready(self, packet: bytes) -> tuple[int, bytes]:
        if len(packet) < devmsg.READY_HEAD.size:
            raise PeerError(self.title, "READY is too short", packet)
        _, features, length = devmsg.READY_HEAD.unpack_from(packet)
        config = packet[devmsg.READY_HEAD.size :]
        if length != len(config) or length > devmsg.CONFIG_MAX:
            raise PeerError(self.title, f"READY announces {length} bytes of configuration, has {len(config)}", packet)
        return features, config

    def _error(self, packet: bytes) -> tuple[int, str]:
        """Return errno and sentence of ERROR or CHANGED, which have the same layout."""
        if len(packet) < devmsg.ERROR_HEAD.size:
            raise PeerError(self.title, "ERROR is too short", packet)
        number: int = devmsg.ERROR_HEAD.unpack_from(packet)[1]
        return number, packet[devmsg.ERROR_HEAD.size :].decode(errors="replace")[:500]


def start_packet(title: str, slot: "Slot", memory: "GuestMemory", figures_slot: int) -> bytes:
    """Return START, which tells a device process which device it is."""
    head = devmsg.START_HEAD.pack(
        devmsg.START,
        log.verbosity,
        FORMS.index(log.form),
        slot.index,
        len(slot.kind.queues),
        len(slot.fds),
        slot.flags | (devmsg.START_SERIAL if slot.serial else 0),
        len(memory.regions),
        figures_slot,
    )
    regions = [
        devmsg.REGION.pack(r.gpa, r.size, r.offset, devmsg.REGION_READ_ONLY if r.read_only else 0)
        for r in memory.regions
    ]
    notes = [devmsg.RESOURCE.pack(note) for note in slot.notes]
    words = "\0".join((title, *slot.names))
    serial = devmsg.SERIAL.pack(slot.serial) if slot.serial else b""
    return head + b"".join(regions) + b"".join(notes) + slot.net + serial + words.encode("utf-8", "surrogateescape")


class DeviceProcesses:
    """All device processes of a VM.  They start in parallel and end in parallel."""

    def __init__(self) -> None:
        self.reserve: list[DeviceProcess] = []
        self.running: list[DeviceProcess] = []

    def fill_reserve(self, devices: "Iterable[tuple[Kind, str]]") -> None:
        """Start processes for devices that the next VM is likely to have.  They wait for START."""
        try:
            for kind, module in devices:
                self.reserve.append(DeviceProcess(kind, module))
        except (HostError, OSError) as error:
            log.debug(sentence(error))  # `spawn` tries again, and reports the failure

    def drop_reserve(self) -> None:
        """End the reserved processes that the VM does not need.  This is called again until all have ended."""
        self.reserve = [each for each in self.reserve if not each.has_ended()]
        for process in self.reserve:
            process.shut_down()

    def spawn(self, devices: "Iterable[tuple[Kind, str]]") -> None:
        """Provide a process for each device, given by kind and module: a reserved or a new one.  Raises HostError."""
        for kind, module in devices:
            if not kind.inside:
                process = self._take_spare(kind, module) or DeviceProcess(kind, module)
                process.kind = kind
                self.running.append(process)

    def _take_spare(self, kind: "Kind", module: str) -> DeviceProcess | None:
        for spare in self.reserve:
            if (spare.kind.process, spare.module) == (kind.process, module) and not spare.has_ended():
                self.reserve.remove(spare)
                return spare
        return None

    def begin(self, vm_title: str, slots: "Sequence[Slot]", memory: "GuestMemory", figures_fd: int) -> None:
        """Call `begin` of each process; `wait_ready` comes later.  Raises PeerError, HostError or OSError.

        In the file `figures_fd`, a device has the place whose number is its index in `slots`.  The caller still owns
        the descriptor.
        """
        places = [(place, slot) for place, slot in enumerate(slots) if not slot.kind.inside]
        for process, (place, slot) in zip(self.running, places, strict=True):
            process.begin(vm_title, slot, memory, figures_fd, place)

    def set_verbosity(self, verbosity: int) -> None:
        """Set the verbosity of all processes."""
        for process in self.running:
            process.set_verbosity(verbosity)

    def end(self) -> None:
        """Ask all processes to end, and wait until they have: only then are the locks of their files free."""
        processes = [*self.running, *self.reserve]
        for process in processes:
            process.shut_down()
        for process in processes:
            process.reap(END_TIMEOUT_S)
        self.running, self.reserve = [], []
