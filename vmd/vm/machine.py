"""The parts of a VM: memory, interrupt controllers, chips, slots, vCPUs, and how they are wired.

Building can fail at each step.  Then the process ends, which releases all that was made before.
"""

import time

from vmd.closing import close
from vmd.guestmem import RegionSpec
from vmd.ipc.loop import Timer
from vmd.ipc.messages.shared import Trouble
from vmd.ipc.messages.vm import KVM_FD, Outcome
from vmd.kvmapi import abi
from vmd.kvmapi.system import System
from vmd.log import log
from vmd.record import Record
from vmd.vm import acpi, layout
from vmd.vm.boot import fwcfg
from vmd.vm.bus import Bus
from vmd.vm.chips.acpipm import AcpiPm
from vmd.vm.chips.i8042 import I8042
from vmd.vm.chips.mc146818 import Mc146818
from vmd.vm.chips.ns8250 import Uart
from vmd.vm.chips.resetport import ResetPort, SystemControlA
from vmd.vm.clocks import MachineClock
from vmd.vm.cpuid import for_vcpu
from vmd.vm.devproc import DeviceProcess
from vmd.vm.entropy import Entropy
from vmd.vm.kinds import INTERFACE
from vmd.vm.pci import HostBridge, PciBus
from vmd.vm.routing import Routing
from vmd.vm.slots import SLOT_HOST_BRIDGE, boot_paths, vmmci_slot
from vmd.vm.timers import HeldTimers
from vmd.vm.vcpu import VcpuThread
from vmd.vm.virtio import VirtioFunction
from vmd.vm.vmmci import Vmmci

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from vmd.config.model import VmConfig
    from vmd.guestmem import GuestMemory
    from vmd.ipc.loop import Loop
    from vmd.vm.console import Console
    from vmd.vm.devproc import DeviceProcesses
    from vmd.vm.slots import Slot

    class Chip(Protocol):
        """A chip whose state can be saved."""

        def state(self) -> dict[str, Any]:
            """Return the state: numbers and bytes by name."""

        def restore(self, state: dict[str, Any]) -> None:
            """Restore the state.  Raises KeyError, TypeError or ValueError."""


LAST_MOMENTS_S = 3.0


class Outside(Record):
    """Everything outside of a machine that it uses."""

    devices: "DeviceProcesses"
    figures_fd: int  # the file for the devices' counters; the machine closes it
    console: "Console"
    loop: "Loop"
    end: "Callable[[Outcome, str], None]"  # called from any thread when the VM has to end
    ask_resolvers: "Callable[[], None]"  # called when a guest asks for name servers
    lock_lost: "Callable[[str], None]"  # called when somebody else may have one of the disks
    report: "Callable[[str, str, str], None]"  # called for an event of a device (`DeviceEvent`)


class EmptyVm:
    """An empty KVM VM with its interrupt controllers, their routes, and PIT.

    A process in reserve makes it early: in a new VM, the kernel takes up to 10 ms for the first memory region.
    /dev/kvm stays open until `close`.  Raises OSError.
    """

    def __init__(self) -> None:
        self._system = system = System(KVM_FD)
        self.kvm = system.create_vm()
        self.cpuid = system.supported_cpuid()
        self.msr_indices = system.msr_indices()
        self.tsc_deadline = bool(system.check_extension(abi.KVM_CAP_TSC_DEADLINE_TIMER))
        # All this has to come before the first vCPU (api.rst 4.30, 4.54, 4.24).
        self.kvm.set_tss_addr(layout.KVM_TSS)
        self.kvm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        self.kvm.create_irqchip()
        self.kvm.create_pit2()
        self.routing = Routing(self.kvm)
        self._set_level_triggered((*layout.PCI_IRQS, layout.IRQ_SCI))

    def close(self) -> None:
        """Close /dev/kvm.  The VM stays."""
        self._system.close()

    def _set_level_triggered(self, irqs: tuple[int, ...]) -> None:
        """Set the ELCR bits of these lines, as firmware does: the 8259s then treat them as level-triggered."""
        for chip_id, first in ((abi.KVM_IRQCHIP_PIC_MASTER, 0), (abi.KVM_IRQCHIP_PIC_SLAVE, 8)):
            chip = self.kvm.get_irqchip(chip_id)
            chip.chip.pic.elcr |= sum(1 << irq - first for irq in irqs if first <= irq < first + 8)
            self.kvm.set_irqchip(chip)


class Machine:
    """A VM.  `vm/build.py` makes it.

    Raises:
        HostError, OSError, PeerError: the host or a device refuses something.
    """

    def __init__(
        self,
        empty_vm: EmptyVm,
        config: "VmConfig",
        memory: "GuestMemory",
        firmware_bytes: int,
        slots: "Sequence[Slot]",
        outside: Outside,
        *,
        cpuid: "list[abi.kvm_cpuid_entry2] | None" = None,
    ) -> None:
        """Make memory and chips, and tell the device processes which devices they are.

        The machine owns `memory`.  `firmware_bytes` is 0 for a kernel that is booted directly.  `cpuid` is the CPUID
        table of a received machine; None for the host's.
        """
        self.config = config
        self.memory = memory
        self.firmware_bytes = firmware_bytes
        self.slots = tuple(slots)
        self.outside = outside
        self.end = outside.end
        self.listening = True
        self.seed = b""  # the content of the seed, if there is one

        self.kvm = empty_vm.kvm
        self.cpuid = cpuid or empty_vm.cpuid
        self.msr_indices = empty_vm.msr_indices
        self.tsc_deadline = empty_vm.tsc_deadline
        self.routing = empty_vm.routing

        for region in memory.kvm_slots():
            self.kvm.set_memory_region(*region)
        outside.devices.begin(log.title, slots, memory, outside.figures_fd)  # they start while the rest is built
        processes = iter(outside.devices.running)
        self.devices = [
            Entropy(slot, memory, outside.figures_fd, place) if slot.kind.inside else next(processes)
            for place, slot in enumerate(slots)
        ]
        close(outside.figures_fd)

        self.bus = bus = Bus()
        self.uart = Uart(self._line(layout.IRQ_COM1), outside.console.send, outside.console.resume_input)
        outside.console.connect(self._receive)
        self.timers = HeldTimers(outside.loop)
        self.clock = MachineClock()
        self.rtc = Mc146818(
            self._line(layout.IRQ_RTC),
            time.time,
            self.timers.schedule,
            config.memory_bytes,
            config.vcpus,
            self.clock.now_s,
        )
        self.pm = AcpiPm(
            self._line(layout.IRQ_SCI),
            self._on_power_off,
            monotonic=self.clock.now_s,
            schedule=self.timers.schedule,
        )
        self.reset_port = ResetPort(self._on_reset)
        self.pci = PciBus(bus, config.memory_bytes, {layout.PORT_RESET: self.reset_port})
        self.pci.add(SLOT_HOST_BRIDGE, HostBridge())
        self.vmmci = Vmmci(self.kvm.irq_line, self._on_acknowledged, self._on_announced)
        self.pci.add(vmmci_slot(slots), self.vmmci)
        self.on_acknowledged: Callable[[int], None] = lambda command: None
        self.announced = False  # the guest has announced that it is about to switch off
        self.keyboard = I8042(self._on_reset)
        self.port_a = SystemControlA(self._on_reset)
        self.fwcfg = fwcfg.FwCfg(self.memory, self._fill_fwcfg)
        bus.add_pio(layout.PORT_COM1, 8, self.uart)
        bus.add_pio(layout.PORT_RTC_INDEX, 2, self.rtc)
        bus.add_pio(layout.PORT_ACPI_PM, AcpiPm.PORTS, self.pm)
        bus.add_pio(layout.PORT_PCI_ADDRESS, 8, self.pci)
        bus.add_pio(layout.PORT_FWCFG_SELECT, fwcfg.FwCfg.PORTS, self.fwcfg)
        bus.add_pio(layout.PORT_KBD_DATA, I8042.PORTS, self.keyboard)
        bus.add_pio(layout.PORT_SYSTEM_CONTROL_A, 1, self.port_a)

        self.virtio: list[VirtioFunction] = []
        self.vcpus: list[VcpuThread] = []
        self.tsc_khz = 0

    def _fill_fwcfg(self, items: fwcfg.FwCfg) -> None:
        config = self.config
        to_boot, others = boot_paths(self.slots, config.boot_device)
        fwcfg.for_seabios(
            items,
            memory_bytes=config.memory_bytes,
            vcpus=config.vcpus,
            firmware_bytes=self.firmware_bytes or layout.FIRMWARE_BYTES,
            boot_paths=to_boot,
            other_paths=others,
            files=acpi.firmware_files(config.memory_bytes, config.vcpus),
        )

    def chips(self) -> "dict[str, Chip]":
        """Return the chips whose state is in a stream, by name."""
        return {
            "uart": self.uart,
            "rtc": self.rtc,
            "pm": self.pm,
            "reset": self.reset_port,
            "keyboard": self.keyboard,
            "port 92": self.port_a,
            "fw_cfg": self.fwcfg,
        }

    def spare_chips(self) -> "dict[str, Chip]":
        """Return unconnected chips of the same types as in `chips`, to check a state with."""

        def schedule(delay_s: float, callback: "Callable[[], None]") -> Timer:
            return Timer(delay_s, callback)

        return {
            "uart": Uart(_nothing, _nothing),
            "rtc": Mc146818(_nothing, time.time, schedule, self.config.memory_bytes, self.config.vcpus),
            "pm": AcpiPm(_nothing, _nothing, schedule=schedule),
            "reset": ResetPort(_nothing),
            "keyboard": I8042(_nothing),
            "port 92": SystemControlA(_nothing),
            "fw_cfg": fwcfg.FwCfg(self.memory),
        }

    def start(self, *, parked: bool = False) -> None:
        """Start all vCPU threads.  In the kernel, all vCPUs except the first wait until the guest starts them.

        With `parked` every vCPU parks before its first instruction.
        """
        for thread in self.vcpus:
            if parked:
                thread.ask_to_park(lambda: None)
            thread.start()

    def stop(self) -> bool:
        """Stop every vCPU for ever.  Return False if one does not return from the kernel in time."""
        for thread in self.vcpus:
            thread.ask_to_stop()
        left = [thread.join() for thread in self.vcpus]
        return all(left)

    def disks(self) -> "list[DeviceProcess]":
        """Return the disks whose data must be on stable storage before the VM goes on elsewhere."""
        return [device for device in self.outside.devices.running if device.kind.settles]

    def sign_disks(self) -> None:
        """Let the sender notice that the guest has run here, by a write to each disk.  Raises PeerError.

        A failed write is ignored: then the guest cannot change that disk either.
        """
        for disk in self.disks():
            disk.sign()

    def announce(self) -> None:
        """Announce to the network that the guest is at this host now."""
        for device in self._interfaces():
            device.announce()

    def tell_resolvers(self, servers: "tuple[tuple[bytes, ...], tuple[bytes, ...]] | None") -> None:
        """Tell the interfaces the host's name servers; None: those that they know still hold."""
        for device in self._interfaces():
            device.tell_resolvers(servers)

    def _interfaces(self) -> "list[DeviceProcess]":
        return [device for device in self.outside.devices.running if device.kind is INTERFACE]

    def troubles(self) -> list[Trouble]:
        """Return the present troubles of all devices."""
        return [
            Trouble(device=device.label, text=text, since_s=since_s)
            for device in self.outside.devices.running
            for text, since_s in device.troubles.items()
        ]

    def plug_devices(self) -> None:
        """Wait for the device processes, and put each device into its slot."""
        for slot, device in zip(self.slots, self.devices, strict=True):
            if isinstance(device, DeviceProcess):
                device.wait_ready()
            function = VirtioFunction(
                device,
                self.kvm,
                self.routing,
                self.config.virtio,
                self._fail,
                slot.layout,
            )
            self._serve(device, function, slot.label)
            self.outside.loop.add(function.config_resample, function.on_config_resample)
            self.virtio.append(function)
            self.pci.add(slot.number, function)

    def _serve(self, device: "DeviceProcess | Entropy", function: VirtioFunction, label: str) -> None:
        """Let the event thread listen to a device."""

        def on_event(what: str, text: str) -> None:
            self.outside.report(what, label, text)

        if isinstance(device, Entropy):
            device.serve(
                self.outside.loop,
                on_interrupt=function.on_interrupt,
                on_needs_reset=function.on_needs_reset,
                on_event=on_event,
            )
        else:
            device.serve(
                self.outside.loop,
                on_failed=self._fail,
                on_needs_reset=function.on_needs_reset,
                on_config=function.on_config,
                on_ask_resolvers=self.outside.ask_resolvers,
                on_lock_lost=self.outside.lock_lost,
                on_event=on_event,
            )

    def listen(self) -> None:
        """Accept input of the console again."""
        self.listening = True
        self.outside.console.resume_input()

    def _receive(self, data: bytes) -> int:
        return self.uart.receive(data) if self.listening else 0

    def create_vcpus(self) -> None:
        """Create the vCPUs and their threads, which `start` starts."""
        count = self.config.vcpus
        for number in range(count):
            vcpu = self.kvm.create_vcpu(number)
            vcpu.set_cpuid2(for_vcpu(self.cpuid, number, count, tsc_deadline=self.tsc_deadline))
            self.vcpus.append(VcpuThread(number, vcpu, self.bus, self.memory, self.end))
        self.tsc_khz = self.vcpus[0].vcpu.get_tsc_khz()  # now: this request would wait while the vCPU runs

    def _line(self, gsi: int) -> "Callable[[bool], None]":
        irq_line = self.kvm.irq_line
        return lambda level: irq_line(gsi, level)

    def _fail(self, text: str) -> None:
        self.end(Outcome.FAILED, text)

    def _on_power_off(self) -> None:
        self.end(Outcome.POWER_OFF, "powered off by the guest")

    def _on_acknowledged(self, command: int) -> None:
        self.on_acknowledged(command)

    def _on_announced(self) -> None:
        """Switch the machine off soon: the guest has announced its end, and may not be able to do it (*cat. 4.4*)."""
        if not self.announced:
            self.announced = True
            self.outside.loop.schedule(LAST_MOMENTS_S, self._on_power_off)

    def _on_reset(self) -> None:
        self.end(Outcome.REBOOT, "reset by the guest")


def _nothing(*_: object) -> None:
    pass


def memory_regions(memory_bytes: int, firmware_bytes: int) -> list[RegionSpec]:
    """Return the memory regions (`layout`): RAM below 4 GiB, which includes the BIOS area, RAM above, and firmware.

    The firmware is read-only for the guest.  It is last in the file, so a device process need not map it.
    """
    low = layout.low_ram_bytes(memory_bytes)
    regions = [RegionSpec(gpa=0, size=low, name="ram")]
    if memory_bytes > low:
        regions.append(RegionSpec(gpa=layout.FOUR_GIB, size=memory_bytes - low, name="high ram"))
    if firmware_bytes:
        gpa = layout.FOUR_GIB - firmware_bytes
        regions.append(RegionSpec(gpa=gpa, size=firmware_bytes, name="firmware", read_only=True))
    return regions
