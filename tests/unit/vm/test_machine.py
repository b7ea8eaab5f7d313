"""The parts of a machine and how they are wired, without KVM: what a guest finds at its ports, and what ends the VM."""

import os
import struct
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support import saved
from vmd.config.model import VmConfig
from vmd.eventfd import eventfd
from vmd.guestmem import GuestMemory
from vmd.ipc.devmsg import FIGURES_BYTES
from vmd.ipc.loop import Loop
from vmd.ipc.messages.shared import Trouble
from vmd.ipc.messages.vm import Outcome
from vmd.kvmapi import abi
from vmd.memfile import sealed_file
from vmd.units import GIB, KIB, MIB
from vmd.vm import machine as module
from vmd.vm.devproc import DeviceProcess
from vmd.vm.kinds import CDROM, DISK, INTERFACE, SEED, Given, Kind
from vmd.vm.machine import LAST_MOMENTS_S, EmptyVm, Machine, Outside, memory_regions
from vmd.vm.slots import Slot, plan

CONFIG = VmConfig(name="a", memory_bytes=64 * MIB, vcpus=2)
REBOOT, OFF = (Outcome.REBOOT, "reset by the guest"), (Outcome.POWER_OFF, "powered off by the guest")


class Kvm:
    """A VM of KVM.  It notes what it is asked; `lines` has the levels of interrupt lines."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.lines: dict[int, int] = {}
        self.regions: list[tuple[int, ...]] = []
        self.chips = {number: abi.kvm_irqchip(chip_id=number) for number in range(3)}
        self.tables: list[list[abi.kvm_cpuid_entry2]] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Note any other request."""
        return lambda *_, **__: self.asked.append(name)

    def irq_line(self, gsi: int, level: int) -> None:
        """Set a line."""
        self.lines[gsi] = int(level)

    def set_memory_region(self, *region: int) -> None:
        """Take memory."""
        self.regions.append(region)

    def get_irqchip(self, number: int) -> abi.kvm_irqchip:
        """Return a chip."""
        return abi.kvm_irqchip.from_buffer_copy(bytes(self.chips[number]))

    def set_irqchip(self, chip: abi.kvm_irqchip) -> None:
        """Take a chip."""
        self.chips[chip.chip_id] = chip

    def create_vcpu(self, number: int) -> Any:  # noqa: ANN401
        """Return a vCPU."""
        self.asked.append("create_vcpu")
        return SimpleNamespace(set_cpuid2=self.tables.append, get_tsc_khz=lambda: 1000 + number)


class System:
    """/dev/kvm."""

    def __init__(self, _fd: int) -> None:
        self.kvm = Kvm()
        self.closed = False

    def create_vm(self) -> Kvm:
        """Return the VM."""
        return self.kvm

    def supported_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """Return a table."""
        return saved.entries(saved.CPUID)

    def msr_indices(self) -> list[int]:
        """Return some numbers."""
        return [0x10]

    def check_extension(self, cap: int) -> int:
        """Have the deadline timer."""
        return int(cap == abi.KVM_CAP_TSC_DEADLINE_TIMER)

    def close(self) -> None:
        """Note it."""
        self.closed = True


class Rig:
    """A machine, and what is outside of it."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.ends: list[tuple[Outcome, str]] = []
        self.shown = b""
        self.receive: Any = None
        self.resumed = 0  # how often the console was told that there is room for input
        self.reports: list[tuple[str, str, str]] = []
        self.running: list[Any] = []
        console = SimpleNamespace(send=self.show, resume_input=self.resume_input, connect=self.connect)
        outside = Outside(
            devices=cast("Any", SimpleNamespace(begin=lambda *_: None, running=self.running)),
            figures_fd=sealed_file("figures", FIGURES_BYTES),
            console=cast("Any", console),
            loop=self.loop,
            end=lambda *end: self.ends.append(end),
            ask_resolvers=lambda: None,
            lock_lost=lambda _why: None,
            report=lambda *report: self.reports.append(report),
        )
        self.empty = EmptyVm()
        self.kvm = cast("Kvm", self.empty.kvm)
        self.memory = GuestMemory.create(memory_regions(CONFIG.memory_bytes, 0))
        slots = plan(Given(config=CONFIG))
        self.machine = Machine(self.empty, CONFIG, self.memory, 0, slots, outside)
        self.read, self.write = self.machine.bus.pio_read, self.machine.bus.pio_write

    def show(self, data: bytes) -> None:
        """Take output."""
        self.shown += data

    def resume_input(self) -> None:
        """Count the call."""
        self.resumed += 1

    def connect(self, receive: Any) -> None:  # noqa: ANN401
        """Take the function for input."""
        self.receive = receive


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A machine."""
    monkeypatch.setattr(module, "System", System)
    made = Rig()
    yield made
    made.loop.close()
    made.memory.close()
    for function in made.machine.virtio:
        os.close(function.config_call)
        os.close(function.config_resample)
    for device in made.machine.devices:
        for fd in (*device.kicks, *device.calls):
            os.close(fd)


def test_what_kvm_is_asked_before_there_is_a_vcpu(rig: Rig) -> None:
    """Real mode needs two addresses.  Lines of PCI and of ACPI are level-triggered, as firmware would set them."""
    assert rig.kvm.asked[:5] == [
        "set_tss_addr", "set_identity_map_addr", "create_irqchip", "create_pit2", "set_gsi_routing",
    ]  # fmt: skip
    assert rig.kvm.chips[abi.KVM_IRQCHIP_PIC_MASTER].chip.pic.elcr == 0
    assert rig.kvm.chips[abi.KVM_IRQCHIP_PIC_SLAVE].chip.pic.elcr == 1 << 1 | 1 << 2 | 1 << 3  # 9, 10, 11
    assert rig.kvm.regions == [tuple(region) for region in rig.memory.kvm_slots()]
    system = cast("Any", rig.empty)._system
    rig.empty.close()
    assert system.closed


@pytest.mark.parametrize(("port", "value"), [(0xCF9, 0x06), (0x92, 0x01), (0x64, 0xFE)])
def test_ways_to_reset(rig: Rig, port: int, value: int) -> None:
    """By the reset register, by port 92h, and by the keyboard controller."""
    rig.write(port, 1, value)
    assert rig.ends == [REBOOT]


@pytest.mark.parametrize("port", [0x5F, 0x65, 0x6F, 0x72, 0x91, 0x93, 0x3F7, 0x400, 0x50F, 0x51C, 0x5FF, 0x60C, 0xCF7])
def test_ports_beside_the_chips(rig: Rig, port: int) -> None:
    """No chip answers there."""
    assert rig.read(port, 1) == 0xFF


def test_power_off_by_acpi(rig: Rig) -> None:
    """Sleep state S5, as the ACPI tables describe it."""
    rig.write(0x604, 2, 5 << 10 | 1 << 13)
    assert rig.ends == [OFF]


def test_the_serial_port_is_the_console(rig: Rig) -> None:
    """Output is shown.  Input raises line 4, if the guest wants that, and waits while the machine is paused."""
    rig.write(0x3F8, 1, 0x41)
    assert rig.shown == b"A"
    rig.write(0x3F9, 1, 1)
    rig.machine.listening = False
    assert rig.receive(b"x") == 0
    assert rig.resumed == 0
    rig.machine.listen()
    assert rig.resumed == 1  # for input that waits
    assert rig.receive(b"x") == 1
    assert rig.kvm.lines[4] == 1
    assert rig.read(0x3F8, 1) == 0x78
    assert rig.kvm.lines[4] == 0
    rig.write(0x3FF, 1, 0x5A)  # the last register is for the guest's own use
    assert rig.read(0x3FF, 1) == 0x5A


def test_the_power_button_raises_the_line_of_acpi(rig: Rig) -> None:
    """If the guest has enabled it."""
    rig.write(0x604, 2, 1)
    rig.write(0x602, 2, 1 << 8)
    rig.machine.pm.power_button()
    assert rig.kvm.lines[9] == 1


def test_firmware_finds_memory_and_processors_in_cmos(rig: Rig) -> None:
    """The memory above 16 MiB in units of 64 KiB, and the number of processors without the first."""

    def cmos(index: int) -> int:
        rig.write(0x70, 1, index)
        return rig.read(0x71, 1)

    assert cmos(0x34) | cmos(0x35) << 8 == 48 * MIB // (64 * KIB)
    assert cmos(0x5F) == 1


def test_firmware_finds_its_configuration(rig: Rig) -> None:
    """The size of memory, the number of processors, and the memory map.  Its last range is for firmware."""

    def item(key: int, size: int) -> bytes:
        rig.write(0x510, 2, key)
        return bytes(rig.read(0x511, 1) for _ in range(size))

    assert int.from_bytes(item(3, 8), "little") == 64 * MIB
    assert int.from_bytes(item(5, 2), "little") == 2
    directory = item(0x19, 4 + 64 * 20)[4:]
    files = {directory[at + 8 : at + 64].rstrip(b"\0"): directory[at : at + 8] for at in range(0, len(directory), 64)}
    size, key = (int.from_bytes(raw, "big") for raw in (files[b"etc/e820"][:4], files[b"etc/e820"][4:6]))
    address, length, kind = struct.unpack("<QQI", item(key, size)[-20:])
    assert (address, length, kind) == (4 * GIB - 256 * KIB, 256 * KIB, 2)


def test_a_guest_finds_its_devices(rig: Rig) -> None:
    """The host bridge, and vmmci behind the devices."""

    def device(slot: int) -> int:
        rig.write(0xCF8, 4, 1 << 31 | slot << 11)
        return rig.read(0xCFC, 4)

    assert device(0) == 0x12378086
    assert device(2) == 0x07770B5D
    assert device(3) == 0xFFFFFFFF


class Disk(DeviceProcess):
    """The process of a disk.  It becomes ready when it is asked whether it is."""

    def __init__(self) -> None:
        self.kind, self.name = DISK, "vioblk0"
        self.features, self.config = 0, b""
        self.kicks, self.calls, self.resample = [eventfd()], [eventfd()], eventfd()
        self.told: dict[str, Any] = {}

    def wait_ready(self) -> None:
        """Become ready."""
        self.features, self.config = 1 << 9, bytes(60)

    def serve(self, _loop: Loop, **told: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Keep the functions for what it tells."""
        self.told = told


def test_devices_are_plugged_in_when_they_are_ready(rig: Rig) -> None:
    """Each in its slot.  What they tell reaches the machine and vmm.  An event has the name of its device."""
    disk = Disk()
    rig.machine.slots = (*rig.machine.slots, Slot(kind=DISK, index=0, number=3))
    rig.machine.devices.append(disk)
    rig.machine.plug_devices()

    for slot, found in ((1, 0x10051AF4), (3, 0x10011AF4)):
        rig.write(0xCF8, 4, 1 << 31 | slot << 11)
        assert rig.read(0xCFC, 4) == found
    entropy, function = rig.machine.virtio
    assert function.transport.offered & 1 << 9
    disk.told["on_event"]("trouble", "is full")
    assert rig.reports == [("trouble", "disk0", "is full")]
    disk.told["on_failed"]("vioblk0: was killed")
    assert rig.ends == [(Outcome.FAILED, "vioblk0: was killed")]
    assert disk.told["on_config"] == function.on_config
    assert disk.told["on_needs_reset"] == function.on_needs_reset
    listened = {entropy.config_resample, function.config_resample, rig.machine.devices[0].kicks[0]}
    assert listened <= rig.loop._callbacks.keys()


def test_a_command_that_the_guest_has_acknowledged(rig: Rig) -> None:
    """Whoever has asked last is told."""
    told: list[int] = []
    rig.machine.vmmci.on_acknowledged(1)
    rig.machine.on_acknowledged = told.append
    rig.machine.vmmci.on_acknowledged(2)
    assert told == [2]


def test_a_guest_that_announces_its_end_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon, and once, however often it says so: some guests cannot switch off the machine."""
    rig.machine._on_announced()
    rig.machine._on_announced()
    rig.loop.call_from_thread(rig.loop.stop)
    rig.loop.run()
    assert rig.ends == []
    now_s = time.monotonic() + LAST_MOMENTS_S
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    rig.loop.call_later(0, rig.loop.stop)
    rig.loop.run()
    assert rig.ends == [OFF]


def device(kind: Kind, label: str, log: list[Any]) -> Any:  # noqa: ANN401
    """Return the process of a device that notes what it is told."""
    return SimpleNamespace(
        kind=kind, label=label, troubles={f"{label} is full": 5} if label == "disk0" else {},
        sign=lambda: log.append(("sign", label)), announce=lambda: log.append(("announce", label)),
        tell_resolvers=lambda servers: log.append(("resolvers", label, servers)),
    )  # fmt: skip


def test_who_is_told_what(rig: Rig) -> None:
    """Disks have data to settle, but neither a seed nor a disc.  Networks are for interfaces."""
    log: list[Any] = []
    kinds = {"interface0": INTERFACE, "interface1": INTERFACE, "disk0": DISK, "cdrom": CDROM, "seed": SEED}
    rig.running += [device(kind, label, log) for label, kind in kinds.items()]
    assert [each.label for each in rig.machine.disks()] == ["disk0"]
    rig.machine.sign_disks()
    rig.machine.announce()
    rig.machine.tell_resolvers(None)
    assert log == [
        ("sign", "disk0"), ("announce", "interface0"), ("announce", "interface1"), ("resolvers", "interface0", None),
        ("resolvers", "interface1", None),
    ]  # fmt: skip
    assert rig.machine.troubles() == [Trouble(device="disk0", text="disk0 is full", since_s=5)]


def test_each_vcpu_has_its_own_place(rig: Rig) -> None:
    """Its number is its APIC id.  The frequency of the TSC is asked before a vCPU runs."""
    rig.machine.create_vcpus()
    assert [thread.number for thread in rig.machine.vcpus] == [0, 1]
    ids = [[leaf.ebx >> 24 for leaf in table if leaf.function == 1] for table in rig.kvm.tables]
    assert ids == [[0], [1]]
    assert all(leaf.ecx >> 24 & 1 for table in rig.kvm.tables for leaf in table if leaf.function == 1)
    assert rig.machine.tsc_khz == 1000


@pytest.mark.parametrize("joins", [[True, True], [False, True], [True, False]])
def test_all_vcpus_are_stopped(rig: Rig, joins: list[bool]) -> None:
    """Each is asked before one is waited for, and each is waited for."""
    log: list[str] = []

    def thread(number: int) -> Any:  # noqa: ANN401
        return SimpleNamespace(
            ask_to_stop=lambda: log.append(f"ask {number}"),
            join=lambda: (log.append(f"join {number}"), joins[number])[1],  # type: ignore[func-returns-value]
            ask_to_park=lambda _parked: log.append(f"park {number}"),
            start=lambda: log.append(f"start {number}"),
        )

    rig.machine.vcpus = [thread(0), thread(1)]
    assert rig.machine.stop() == all(joins)
    assert log == ["ask 0", "ask 1", "join 0", "join 1"]
    log.clear()
    rig.machine.start()
    rig.machine.start(parked=True)
    assert log == ["start 0", "start 1", "park 0", "start 0", "park 1", "start 1"]


def test_the_file_of_figures_is_closed(rig: Rig) -> None:
    """The devices have mapped it."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(rig.machine.outside.figures_fd)


def test_memory_is_below_and_above_4_gib() -> None:
    """Firmware is last, and read-only."""
    found = [(each.gpa, each.size, each.read_only) for each in memory_regions(5 * GIB, 256 * KIB)]
    assert found == [
        (0, 0xE0000000, False), (4 * GIB, 5 * GIB - 0xE0000000, False), (4 * GIB - 256 * KIB, 256 * KIB, True),
    ]  # fmt: skip
    assert [each.gpa for each in memory_regions(0xE0000000, 0)] == [0]
