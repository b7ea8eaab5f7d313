"""The bill of materials of a VM: memory, interrupt controllers, chips, slots, vCPUs, and how they are wired.

Building goes from the bottom up and can fail at each step; whatever was made by then is released by the end
of the process, which is what a failure leads to.
"""

import time

from vmd.closing import close
from vmd.guestmem import RegionSpec
from vmd.ipc.loop import Timer
from vmd.ipc.messages.shared import Trouble
from vmd.ipc.messages.vm import Outcome
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
        """What can be saved."""

        def state(self) -> dict[str, Any]:
            """Return numbers and bytes by name."""

        def restore(self, state: dict[str, Any]) -> None:
            """Take them back; raises KeyError, TypeError or ValueError."""


KVM_FD = 4  # where vmm leaves /dev/kvm
LAST_MOMENTS_S = 3.0


class Outside(Record):
    """What a machine is connected to."""

    devices: "DeviceProcesses"
    figures_fd: int  # the file for what devices count, the machine's to close
    console: "Console"
    loop: "Loop"
    end: "Callable[[Outcome, str], None]"  # told from any thread when the guest's life is over
    ask_resolvers: "Callable[[], None]"  # a guest wants to know its name servers
    lock_lost: "Callable[[str], None]"  # somebody else may have one of its disks
    report: "Callable[[str, str, str], None]"  # something has happened to a device (`DeviceEvent`)


class Host:
    """What every machine has of KVM: an empty VM with its interrupt controllers, their lines, and PIT.

    A process in reserve has it: while a VM of KVM's is young, the kernel takes up to 10 ms for its first memory.
    /dev/kvm stays open until `close`.  Raises OSError.
    """

    def __init__(self) -> None:
        self._system = system = System(KVM_FD)
        self.kvm = system.create_vm()
        self.cpuid = system.supported_cpuid()
        self.msr_indices = system.msr_indices()
        self.tsc_deadline = bool(system.check_extension(abi.KVM_CAP_TSC_DEADLINE_TIMER))
        # All of it before the first vCPU (api.rst 4.30, 4.54, 4.24).
        self.kvm.set_tss_addr(layout.KVM_TSS)
        self.kvm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        self.kvm.create_irqchip()
        self.kvm.create_pit2()
        self.routing = Routing(self.kvm)
        self._set_level_triggered((*layout.PCI_IRQS, layout.IRQ_SCI))

    def close(self) -> None:
        """Close /dev/kvm: the VM lives on."""
        self._system.close()

    def _set_level_triggered(self, irqs: tuple[int, ...]) -> None:
        """Set the ELCR bits of these lines, as firmware would; they say how the 8259s see them."""
        for chip_id, first in ((abi.KVM_IRQCHIP_PIC_MASTER, 0), (abi.KVM_IRQCHIP_PIC_SLAVE, 8)):
            chip = self.kvm.get_irqchip(chip_id)
            chip.chip.pic.elcr |= sum(1 << irq - first for irq in irqs if first <= irq < first + 8)
            self.kvm.set_irqchip(chip)


class Machine:
    """A VM.  `vm/build.py` makes it; `cpuid` is the processor of one that was received.

    Raises:
        HostError, OSError, PeerError: the host or a device refuses something.
    """

    def __init__(
        self,
        host: Host,
        config: "VmConfig",
        memory: "GuestMemory",
        firmware_bytes: int,
        slots: "Sequence[Slot]",
        outside: Outside,
        *,
        cpuid: "list[abi.kvm_cpuid_entry2] | None" = None,
    ) -> None:
        """Own `memory`; `firmware_bytes` is 0 for a kernel that is booted directly.  Devices are told what they are."""
        self.config = config
        self.memory = memory
        self.firmware_bytes = firmware_bytes
        self.slots = tuple(slots)
        self.outside = outside
        self.end = outside.end
        self.listening = True
        self.seed = b""  # what is on that disk, if it has one

        self.kvm = host.kvm
        self.cpuid = cpuid or host.cpuid
        self.msr_indices = host.msr_indices
        self.tsc_deadline = host.tsc_deadline
        self.routing = host.routing

        for region in memory.kvm_slots():
            self.kvm.set_memory_region(*region)
        outside.devices.begin(log.title, slots, memory, outside.figures_fd)  # while the rest is built
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
        self.announced = False  # by the guest, that it goes
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
        """Return the chips that a stream has the state of, by name."""
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
        """Return chips like those of `chips` that are wired to nothing, to try a state on."""

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
        """Let the guest execute; application processors wait in the kernel until it wakes them.

        With `parked` every vCPU stands still before its first instruction.
        """
        for thread in self.vcpus:
            if parked:
                thread.ask_to_park(lambda: None)
            thread.start()

    def stop(self) -> bool:
        """Take every vCPU out of the guest for good; False if one does not come back in time."""
        for thread in self.vcpus:
            thread.ask_to_stop()
        left = [thread.join() for thread in self.vcpus]
        return all(left)

    def disks(self) -> "list[DeviceProcess]":
        """Return the devices that are brought to stable storage before the VM goes on elsewhere."""
        return [device for device in self.outside.devices.running if device.kind.settles]

    def sign_disks(self) -> None:
        """Have the place that the guest has come from know that it has run here.  Raises PeerError.

        Where a disk cannot be written to, its guest will not leave anything on it either.
        """
        for disk in self.disks():
            disk.sign()

    def announce(self) -> None:
        """Have the network learn that the guest goes on here, and was somewhere else before."""
        for device in self._interfaces():
            device.announce()

    def tell_resolvers(self, servers: "tuple[tuple[bytes, ...], tuple[bytes, ...]] | None") -> None:
        """Tell the network interfaces which name servers there are; None: nobody knows of others."""
        for device in self._interfaces():
            device.tell_resolvers(servers)

    def _interfaces(self) -> "list[DeviceProcess]":
        return [device for device in self.outside.devices.running if device.kind is INTERFACE]

    def troubles(self) -> list[Trouble]:
        """Return what the devices say is wrong with them now."""
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
        """Have a device heard on the event thread."""

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
        """Take input of the console again."""
        self.listening = True
        self.outside.console.resume_input()

    def _receive(self, data: bytes) -> int:
        return self.uart.receive(data) if self.listening else 0

    def create_vcpus(self) -> None:
        """Make them; their threads are started last."""
        count = self.config.vcpus
        for number in range(count):
            vcpu = self.kvm.create_vcpu(number)
            vcpu.set_cpuid2(for_vcpu(self.cpuid, number, count, tsc_deadline=self.tsc_deadline))
            self.vcpus.append(VcpuThread(number, vcpu, self.bus, self.memory, self.end))
        self.tsc_khz = self.vcpus[0].vcpu.get_tsc_khz()  # now: who asks a vCPU that runs waits until it stops

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
        """The guest says that it goes; if it cannot switch itself off, this does (*cat. 4.4*)."""
        if not self.announced:
            self.announced = True
            self.outside.loop.schedule(LAST_MOMENTS_S, self._on_power_off)

    def _on_reset(self) -> None:
        self.end(Outcome.REBOOT, "reset by the guest")


def _nothing(*_: object) -> None:
    pass


def memory_regions(memory_bytes: int, firmware_bytes: int) -> list[RegionSpec]:
    """Return what has memory behind it (`layout`): RAM below 4 GiB with the BIOS area in it, firmware, the rest.

    The firmware is read-only to the guest, and last in the file: a device process need not map it.
    """
    low = layout.low_ram_bytes(memory_bytes)
    regions = [RegionSpec(gpa=0, size=low, name="ram")]
    if memory_bytes > low:
        regions.append(RegionSpec(gpa=layout.FOUR_GIB, size=memory_bytes - low, name="high ram"))
    if firmware_bytes:
        gpa = layout.FOUR_GIB - firmware_bytes
        regions.append(RegionSpec(gpa=gpa, size=firmware_bytes, name="firmware", read_only=True))
    return regions
