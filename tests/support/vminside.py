"""A VM process inside the test.  The test plays vmm; machine and devices are stand-ins, and there is no KVM."""

import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support import saved
from tests.support.descriptors import NewDescriptors
from tests.support.inprocess import End
from vmd.backlog import Backlog, BacklogWriter
from vmd.config.model import VmConfig
from vmd.guestmem import GuestMemory, RegionSpec
from vmd.ipc import courier, devmsg
from vmd.ipc import process as processes
from vmd.ipc.channel import socketpair
from vmd.ipc.imsg import NO_FDS
from vmd.ipc.messages.vm import Outcome, StartVm, VmEnding, VmRunning
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent.resources import Pty
from vmd.record import Record
from vmd.units import PAGE
from vmd.vm import departure, state
from vmd.vm import main as module
from vmd.vm import pause as pauses
from vmd.vm.kinds import DISK, Kind
from vmd.vm.main import VmProcess
from vmd.vm.pause import Pause
from vmd.vm.timers import HeldTimers

DEADLINE_S = 60.0
PROGRESS_S = 1000.0  # between two reports of a transfer: so long that none comes by itself on a busy host
VMID = 7


class Device:
    """The process of a device.  It notes in `log` what it is asked, and has `answers` for it."""

    def __init__(self, kind: Kind = DISK, label: str = "disk0") -> None:
        self.kind, self.label = kind, label
        self.server = self  # it is also its function on PCI
        self.log: list[Any] = []
        self.answers: dict[str, Any] = {"settle": devmsg.SETTLED, "let go": True, "take back": devmsg.TAKEN}
        self.troubles: dict[str, int] = {}
        self.lock_lost = ""
        self.lends: list[int] = []

    def _asked(self, what: str, default: object = True) -> Any:  # noqa: ANN401
        self.log.append(what)
        answer = self.answers.get(what, default)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def command(self, kind: int) -> None:
        """Take a command."""
        self._asked({devmsg.PAUSE: "pause", devmsg.RESUME: "resume"}.get(kind, "log"))

    def attach_interrupts(self) -> None:
        """Do nothing."""

    detach_interrupts = attach_interrupts

    def settle(self) -> int:
        """Say whether all data is on stable storage."""
        return cast("int", self._asked("settle"))

    def let_go(self) -> bool:
        """Release the lock."""
        return cast("bool", self._asked("let go"))

    def take_back(self) -> int:
        """Take the lock."""
        return cast("int", self._asked("take back"))

    def lend(self) -> list[int]:
        """Return copies of the open files."""
        self._asked("lend")
        return [os.dup(fd) for fd in self.lends]

    def reload(self) -> bool:
        """Read the header again."""
        return cast("bool", self._asked("reload"))

    def limit(self, iops: int, rate: int) -> None:
        """Take limits."""
        self.log.append(("limit", iops, rate))

    def resize(self, size_bytes: int, answer: Callable[[int, str], None]) -> None:
        """Become larger."""
        self.log.append(("resize", size_bytes))
        answer(*self.answers.get("resize", (0, "")))

    def change_disc(self, disc: int | None, path: str, answer: Callable[[int, str], None], *, force: bool) -> None:
        """Take another disc.  The descriptor is the caller's."""
        self.log.append(("disc", None if disc is None else os.fstat(disc).st_ino, path, force))
        answer(*self.answers.get("disc", (0, "")))


class Devices:
    """Replaces `DeviceProcesses`."""

    def __init__(self) -> None:
        self.running: list[Device] = []
        self.reserve: list[Device] = []
        self.log: list[Any] = []
        self.slow = 0  # calls of `drop_reserve` after which the reserve has ended

    def fill_reserve(self, devices: Sequence[tuple[Kind, str]]) -> None:
        """Start processes in reserve."""
        self.reserve += [Device(kind, name) for kind, name in devices]

    def drop_reserve(self) -> None:
        """End the reserve."""
        self.log.append("drop")
        self.slow -= 1
        if self.slow < 0:
            self.reserve = []

    def spawn(self, devices: Sequence[tuple[Kind, str]]) -> None:
        """Start processes."""
        self.log.append([(kind.name, name) for kind, name in devices])

    def set_verbosity(self, verbosity: int) -> None:
        """Take the verbosity."""
        self.log.append(("verbosity", verbosity))

    def end(self) -> None:
        """End all."""
        self.log.append("end")


class Vcpu:
    """The thread of a vCPU."""

    def __init__(self, machine: "Machine") -> None:
        self.machine, self.vcpu = machine, self
        self.asked: Callable[[], None] | None = None

    def ask_to_park(self, on_parked: Callable[[], None]) -> None:
        """Park, at once or when the test says so."""
        self.asked = on_parked
        if self.machine.parks:
            self.machine.park()

    def unpark(self) -> None:
        """Go on."""
        self.machine.running = True


class Clocks:
    """Replaces `Clocks`."""

    take = classmethod(lambda cls, *_: cls())
    hold = restore = lambda *_: None


class Kvm:
    """The log of changed pages, for a machine that is sent live."""

    logging = False

    def set_memory_region(self, _slot: int, _gpa: int, _size: int, _hva: int, flags: int) -> None:
        """Begin or end the log."""
        self.logging = bool(flags)

    def get_dirty_log(self, _slot: int, size: int) -> bytes:
        """Return no page."""
        return bytes(size // PAGE // 8)


class Machine:
    """Replaces `Machine`.  `asked` is what it was asked over vmmci or by button."""

    def __init__(self, rig: "VmRig", config: VmConfig) -> None:
        self.rig, self.config = rig, config
        self.memory = GuestMemory.create((RegionSpec(gpa=0, size=16 * PAGE, name="ram"),))
        self.outside = SimpleNamespace(devices=rig.process.devices, loop=rig.loop)
        self.running, self.parks, self.stops = False, True, True
        self.vcpus = [Vcpu(self)]
        self.kvm = Kvm()
        self.virtio = self.outside.devices.running
        self.timers = HeldTimers(rig.loop)
        self.listening = True
        self.clock = None
        self.asked: list[Any] = []
        self.log: list[Any] = []
        self.vmmci = SimpleNamespace(driver_is_up=False, acknowledges=True, ask=self.asked.append)
        self.pm = SimpleNamespace(
            power_button_enabled=False,
            power_button=lambda: self.asked.append("button"),
            on_button_acknowledged=lambda: None,
        )
        self.on_acknowledged: Callable[[int], None] = lambda _command: None
        self.uart = SimpleNamespace(send_break=lambda: self.log.append("break"))
        self.end = rig.process.end_from_thread
        self.cannot_go_on: Exception | None = None

    def is_running(self) -> bool:
        """Return whether the guest runs."""
        return self.running

    def park(self) -> None:
        """Let the vCPU park."""
        asked, self.vcpus[0].asked = self.vcpus[0].asked, None
        if asked is not None:
            self.running = False
            asked()

    def start(self, *, parked: bool) -> None:
        """Begin to run."""
        self.running = not parked
        self.rig.steps.append("start")

    def stop(self) -> bool:
        """Stop for ever."""
        self.running = False
        self.log.append("stop")
        return self.stops

    def listen(self) -> None:
        """Accept input."""
        if self.cannot_go_on is not None:
            raise self.cannot_go_on
        self.listening = True

    def disks(self) -> list[Device]:
        """Return the disks."""
        return [device for device in self.outside.devices.running if device.kind is DISK]

    def sign_disks(self) -> None:
        """Note it."""
        self.log.append("sign")

    def announce(self) -> None:
        """Note it."""
        self.log.append("announce")

    def troubles(self) -> list[Any]:
        """Return none."""
        return []

    def tell_resolvers(self, servers: object) -> None:
        """Note them."""
        self.log.append(("resolvers", servers))


class VmRig:
    """A VM process and vmm's end of its channel.  `steps` are its steps while it builds the VM, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.descriptors = NewDescriptors()
        ours, theirs = socketpair()
        self.real_s = time.monotonic
        self.ahead_s = 0.0
        self.steps: list[Any] = []
        self.couriers: list[Any] = []
        self.machine: Machine = cast("Machine", None)
        self.arriving = False
        self.cannot_build: Exception | None = None
        self.built: tuple[Any, ...] = ()  # the arguments of `build`
        monkeypatch.setattr(processes, "CHANNEL_FD", theirs.detach())
        monkeypatch.setattr(time, "monotonic", lambda: self.real_s() + self.ahead_s)
        for name in ("title", "verbosity"):
            monkeypatch.setattr(log, name, getattr(log, name))
        for name in ("set_title", "name_thread"):
            monkeypatch.setattr(module, name, lambda _title: None)
        for name in ("confine", "narrow_requests", "limit_open_files", "limit_memory"):
            monkeypatch.setattr(module, name, self._step(name))
        monkeypatch.setattr(module, "DeviceProcesses", Devices)
        monkeypatch.setattr(module, "EmptyVm", lambda: "empty VM")
        monkeypatch.setattr(module, "build", self._build)
        monkeypatch.setattr(module, "ClockWatch", lambda _loop, then: setattr(self, "clock_jumps", then))
        monkeypatch.setattr(departure, "PROGRESS_S", PROGRESS_S)
        monkeypatch.setattr(pauses, "Clocks", Clocks)
        monkeypatch.setattr(state, "header", lambda _machine, one_shot: saved.header(one_shot=one_shot))
        monkeypatch.setattr(state, "save", lambda _machine, _clocks: saved.machine_state())
        monkeypatch.setattr(state, "check_sent", lambda _header, _state, _machine: None)
        monkeypatch.setattr(state, "check_sent_header", lambda _header, _machine: None)
        self.clock_jumps: Callable[[], None] = lambda: None
        self.process = VmProcess()
        self.loop = self.process.loop
        self.devices = cast("Devices", self.process.devices)
        self.vmm = End(self.loop, ours, Proc.VMM, Proc.VM)
        self.pty = Pty()
        self.backlog = Backlog.create()

    def _step(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.steps.append((name, *arguments))

    def _build(self, *arguments: Any) -> Pause:  # noqa: ANN401
        self.steps.append("build")
        self.built = arguments
        if self.cannot_build is not None:
            raise self.cannot_build
        self.machine = Machine(self, arguments[2])
        return Pause(cast("Any", self.machine), self.loop, cast("Any", Clocks()) if self.arriving else None)

    # --- what vmm does -----------------------------------------------------------------------------------------

    def turn(self, rounds: int = 8) -> None:
        """Handle everything that is ready."""
        for _ in range(rounds):
            self._turn_once()

    def _turn_once(self) -> None:
        timers = [self.loop.call_later(0, lambda: timers.append(self.loop.call_later(0, self.loop.stop)))]
        self.loop.run()  # the process may have stopped it
        for timer in timers:
            timer.cancel()

    def until(self, condition: Callable[[], object]) -> None:
        """Turn the loop until a condition holds."""
        end_s = self.real_s() + DEADLINE_S
        while not condition():
            assert self.real_s() < end_s, "it takes too long"
            self._turn_once()

    def tell(self, message: Record, *, peerid: int = 0, fds: Mapping[str, Sequence[int]] = NO_FDS) -> list[Record]:
        """Send a message.  Return the answers that come at once."""
        self.vmm.send(message, peerid=peerid, fds=fds)
        return self.said()

    def said(self) -> list[Record]:
        """Handle everything, and return the messages to vmm since the last call."""
        self.turn()
        return self.vmm.take()

    def wait_for(self, kind: type[Record]) -> list[Record]:
        """Return the messages to vmm until, and including, one of this kind.  Threads may be at work."""
        self.until(lambda: any(isinstance(each.message, kind) for each in self.vmm.got))
        return self.vmm.take()

    def pass_time(self, seconds: float) -> list[Record]:
        """Advance the clock; return the messages to vmm that come of it."""
        self.turn()
        self.ahead_s += seconds
        return self.said()

    def courier(self, **files: int) -> int:
        """Return the receiving end of a courier that brings these files."""
        asks, gives = courier.pair()
        self.couriers.append(gives)
        courier.send(gives, {name: [fd] for name, fd in files.items()})
        for fd in files.values():
            os.close(fd)
        return asks.detach()

    def lost_courier(self) -> int:
        """Return the receiving end of a courier whose giver has ended."""
        asks, gives = courier.pair()
        gives.close()
        return asks.detach()

    def waiting_courier(self) -> tuple[int, Any]:
        """Return the receiving end of a courier that brings nothing yet, and the giver's end."""
        asks, gives = courier.pair()
        self.couriers.append(gives)
        return asks.detach(), gives

    def console_fds(self) -> dict[str, list[int]]:
        """Return the descriptors of a console."""
        return {**self.pty.fds(), "shown": [os.dup(self.backlog.fd)]}

    def start_fds(self, **files: int) -> dict[str, list[int]]:
        """Return the descriptors of StartVm; these files come over a courier."""
        return {**self.console_fds(), "memory": [null()], "couriers": [self.courier(**files or {"boot": null()})]}

    def start(self, config: VmConfig | None = None, *devices: Device) -> Machine:
        """Start a VM with devices, and return its machine, which runs."""
        self.devices.running += devices
        config = config or VmConfig(name="a")
        told = self.tell(start_vm(config), fds=self.start_fds())
        assert told == [VmRunning(vmid=VMID)], told
        return self.machine

    @property
    def ended(self) -> tuple[Outcome, str] | None:
        """How the VM process has ended, or None."""
        self.turn()
        last = [each.message.text for each in self.vmm.got if isinstance(each.message, VmEnding)]
        return (Outcome(self.process.exit_status), last[-1]) if last else None

    def close(self) -> None:
        """Close everything."""
        for gives in self.couriers:
            gives.close()
        self.turn()
        self.vmm.close()
        self.process.vmm.close()
        self.loop.close()
        self.pty.close()
        self.backlog.close()
        received = self.process.arrival and self.process.arrival._memory
        for owner in (self.machine, SimpleNamespace(memory=received), *self.built):
            memory = getattr(owner, "memory", None)
            if isinstance(memory, GuestMemory):
                memory.close()
        if self.process.console is not None:
            unmap(self.process.console._backlog)
        self.descriptors.close()  # the end of the process


def null() -> int:
    """Return a descriptor."""
    return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def unmap(writer: BacklogWriter) -> None:
    """Close what a writer has mapped."""
    mapping = cast("mmap.mmap", writer._bytes.obj)
    writer._counters.release()
    writer._bytes.release()
    mapping.close()


def start_vm(config: VmConfig, **changes: object) -> StartVm:
    """Return the message that starts a VM."""
    return StartVm(vmid=VMID, config=config, boot_name="/bsd", verbosity=0).replace(**changes)
