"""The bill of materials of a VM: memory, interrupt controllers, chips, slots, vCPUs, and how they are wired.

Building goes from the bottom up and can fail at each step; whatever was made by then is released by the end
of the process, which is what a failure leads to.
"""

import os
import time

from vmd.config import rules
from vmd.config.model import BootDevice
from vmd.errors import sentence
from vmd.guestmem import PAGE as PAGE_BYTES
from vmd.guestmem import GuestMemory, RegionSpec
from vmd.ipc.messages import Outcome, Trouble
from vmd.kvmapi import abi
from vmd.kvmapi.system import System
from vmd.log import log
from vmd.vm import acpi, layout, state
from vmd.vm.boot import fwcfg, loader
from vmd.vm.boot.image import FIRMWARE_MAX
from vmd.vm.bus import Bus
from vmd.vm.chips.acpipm import AcpiPm
from vmd.vm.chips.i8042 import I8042
from vmd.vm.chips.mc146818 import Mc146818
from vmd.vm.chips.ns8250 import Uart
from vmd.vm.chips.resetport import ResetPort, SystemControlA
from vmd.vm.clocks import MachineClock
from vmd.vm.console import Console
from vmd.vm.cpuid import for_vcpu
from vmd.vm.devproc import DeviceProcess, DeviceProcesses
from vmd.vm.kinds import INTERFACE
from vmd.vm.pause import HeldTimers
from vmd.vm.pci import HostBridge, PciBus
from vmd.vm.routing import Routing
from vmd.vm.slots import SLOT_HOST_BRIDGE, boot_paths, vmmci_slot
from vmd.vm.vcpu import VcpuThread, apply_start, set_boot_msrs
from vmd.vm.virtio import VirtioFunction
from vmd.vm.vmmci import Vmmci

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from vmd.config.model import VmConfig
    from vmd.ipc.loop import Loop
    from vmd.vm.clocks import Clocks
    from vmd.vm.slots import Slot
    from vmd.vm.state import MachineState

    class Chip(Protocol):
        """What can be saved."""

        def state(self) -> dict[str, Any]:
            """Return numbers and bytes by name."""

        def restore(self, state: dict[str, Any]) -> None:
            """Take them back; raises KeyError, TypeError or ValueError."""


LAST_MOMENTS_S = 3.0


class BootImages:
    """What a VM boots from: open files, and the names to call them in messages."""

    def __init__(self, boot_fd: int, boot_name: str, initrd_fd: int | None, initrd_name: str) -> None:
        self.boot_fd = boot_fd
        self.boot_name = boot_name
        self.initrd_fd = initrd_fd
        self.initrd_name = initrd_name

    def close(self) -> None:
        """Let go of the files; guest memory has what was in them."""
        os.close(self.boot_fd)
        if self.initrd_fd is not None:
            os.close(self.initrd_fd)


class Machine:
    """A VM.  It is built, then made to `boot` or to `become` what another one was, then started.

    `end(outcome, text)` is called from any thread when the guest's life is over.  Memory and CPUID table of a machine
    that was received are given; `firmware_bytes` is 0 for a kernel that is booted directly.

    Raises:
        HostError, OSError: the host refuses something.
    """

    def __init__(
        self,
        config: "VmConfig",
        kvm_fd: int,
        firmware_bytes: int,
        slots: "Sequence[Slot]",
        devices: DeviceProcesses,
        console: Console,
        loop: "Loop",
        end: "Callable[[Outcome, str], None]",
        on_ask_resolvers: "Callable[[], None]",
        *,
        memory: GuestMemory | None = None,
        cpuid: "list[abi.kvm_cpuid_entry2] | None" = None,
    ) -> None:
        self.config = config
        self.firmware_bytes = firmware_bytes
        self.slots = tuple(slots)
        self.devices = devices
        self.loop = loop
        self.end = end
        self.console = console
        self.on_ask_resolvers = on_ask_resolvers
        self.listening = True

        with System(kvm_fd) as system:
            self.kvm = system.create_vm()
            self.cpuid = cpuid or system.supported_cpuid()
            self.msr_indices = system.msr_indices()
            self.tsc_deadline = bool(system.check_extension(abi.KVM_CAP_TSC_DEADLINE_TIMER))
        # All of it before the first vCPU (api.rst 4.30, 4.54, 4.24).
        self.kvm.set_tss_addr(layout.KVM_TSS)
        self.kvm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        self.kvm.create_irqchip()
        self.kvm.create_pit2()
        self.routing = Routing(self.kvm)
        self._set_level_triggered((*layout.PCI_IRQS, layout.IRQ_SCI))

        self.memory = memory or GuestMemory.create(memory_regions(config.memory_bytes, firmware_bytes))
        for region in self.memory.kvm_slots():
            self.kvm.set_memory_region(*region)
        devices.start(log.title, slots, self.memory)  # while the rest is built

        self.bus = bus = Bus()
        self.uart = Uart(self._line(layout.IRQ_COM1), console.send, console.resume_input)
        console.connect(self._receive)
        self.timers = HeldTimers(loop)
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
        self.fwcfg = fwcfg.FwCfg(self.memory)
        to_boot, others = boot_paths(slots, config.boot_device)
        fwcfg.for_seabios(
            self.fwcfg,
            memory_bytes=config.memory_bytes,
            vcpus=config.vcpus,
            firmware_bytes=firmware_bytes or layout.FIRMWARE_BYTES,
            boot_paths=to_boot,
            other_paths=others,
            files=acpi.firmware_files(config.memory_bytes, config.vcpus),
        )
        bus.add_pio(layout.PORT_COM1, 8, self.uart)
        bus.add_pio(layout.PORT_RTC_INDEX, 2, self.rtc)
        bus.add_pio(layout.PORT_ACPI_PM, AcpiPm.PORTS, self.pm)
        bus.add_pio(layout.PORT_PCI_ADDRESS, 8, self.pci)
        bus.add_pio(layout.PORT_FWCFG_SELECT, fwcfg.FwCfg.PORTS, self.fwcfg)
        bus.add_pio(layout.PORT_KBD_DATA, I8042.PORTS, self.keyboard)
        bus.add_pio(layout.PORT_SYSTEM_CONTROL_A, 1, self.port_a)

        self.virtio: list[VirtioFunction] = []
        self.vcpus: list[VcpuThread] = []

    def boot(self, images: BootImages) -> None:
        """Load what the guest boots from, and let vCPU 0 start there.

        Raises:
            ImageError: it cannot be used.
            HostError, PeerError, OSError: a device, or KVM, refuses.
        """
        config = self.config
        rsdp_gpa = layout.ACPI_TABLES
        if self.firmware_bytes:
            rsdp_gpa = 0  # SeaBIOS places tables, addresses and interrupt lines itself
        else:
            self.memory.write(rsdp_gpa, acpi.build_tables(config.memory_bytes, config.vcpus))
        bootmac = b""
        if config.boot_device is BootDevice.NET and config.nics:
            bootmac = config.nics[0].lladdr
        start = loader.load(
            self.memory,
            images.boot_fd,
            images.boot_name,
            memory_bytes=config.memory_bytes,
            initrd_fd=images.initrd_fd,
            initrd_name=images.initrd_name,
            cmdline=os.fsencode(config.cmdline),
            rsdp_gpa=rsdp_gpa,
            bootmac=bootmac,
        )
        log.debug(start.text)
        self._plug_devices()
        if not self.firmware_bytes:
            self.pci.assign_resources()
        self._create_vcpus()
        set_boot_msrs([thread.vcpu for thread in self.vcpus], direct_boot=not self.firmware_bytes)
        apply_start(self.vcpus[0].vcpu, start)

    def become(self, saved: "MachineState", devices: "tuple[state.DeviceHead, ...]") -> "Clocks":
        """Be what another machine with these devices was, standing still; to go on, it needs the clocks returned.

        Raises:
            ValueError: that was no such machine.
            HostError, OSError: the host refuses something.
            PeerError: a device refuses.
        """
        self.clock.stop()  # until it goes on with the clocks
        self._plug_devices()
        self._create_vcpus()
        try:
            clocks = state.restore(self, saved, devices)
        except OSError as error:
            raise ValueError(f"KVM does not take it: {sentence(error)}") from error
        for function, each in zip(self.virtio, saved.virtio, strict=True):
            function.restore_rings(each)
        return clocks

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

    def nic_counters(self) -> list[tuple[int, ...]]:
        """Return what each network interface has done, in the order of `devmsg.COUNTER_NAMES`.  Raises PeerError."""
        return [device.counters() for device in self._interfaces()]

    def announce(self) -> None:
        """Have the network learn that the guest goes on here, and was somewhere else before."""
        for device in self._interfaces():
            device.announce()

    def tell_resolvers(self, servers: "tuple[tuple[bytes, ...], tuple[bytes, ...]] | None") -> None:
        """Tell the network interfaces which name servers there are; None: nobody knows of others."""
        for device in self._interfaces():
            device.tell_resolvers(servers)

    def _interfaces(self) -> list[DeviceProcess]:
        return [device for device in self.devices.running if device.kind is INTERFACE]

    def troubles(self) -> list[Trouble]:
        """Return what the devices say is wrong with them now."""
        return [
            Trouble(device=device.label, text=text, since_s=since_s)
            for device in self.devices.running
            for text, since_s in device.troubles.items()
        ]

    def _plug_devices(self) -> None:
        """Wait for the device processes, and put each into its slot."""
        for slot, device in zip(self.slots, self.devices.running, strict=True):
            device.wait_ready()
            function = VirtioFunction(
                device,
                self.kvm,
                self.routing,
                self.config.virtio,
                self._fail,
                slot.layout,
            )
            device.serve(
                self.loop,
                on_failed=self._fail,
                on_needs_reset=function.on_needs_reset,
                on_config=function.on_config,
                on_ask_resolvers=self.on_ask_resolvers,
            )
            self.loop.add(function.config_resample, function.on_config_resample)
            self.virtio.append(function)
            self.pci.add(slot.number, function)

    def listen(self) -> None:
        """Take input of the console again."""
        self.listening = True
        self.console.resume_input()

    def _receive(self, data: bytes) -> int:
        return self.uart.receive(data) if self.listening else 0

    def _create_vcpus(self) -> None:
        count = self.config.vcpus
        for number in range(count):
            vcpu = self.kvm.create_vcpu(number)
            vcpu.set_cpuid2(for_vcpu(self.cpuid, number, count, tsc_deadline=self.tsc_deadline))
            self.vcpus.append(VcpuThread(number, vcpu, self.bus, self.memory, self.end))

    def _line(self, gsi: int) -> "Callable[[bool], None]":
        irq_line = self.kvm.irq_line
        return lambda level: irq_line(gsi, level)

    def _set_level_triggered(self, irqs: tuple[int, ...]) -> None:
        """Set the ELCR bits of these lines, as firmware would; they say how the 8259s see them."""
        for chip_id, first in ((abi.KVM_IRQCHIP_PIC_MASTER, 0), (abi.KVM_IRQCHIP_PIC_SLAVE, 8)):
            chip = self.kvm.get_irqchip(chip_id)
            chip.chip.pic.elcr |= sum(1 << irq - first for irq in irqs if first <= irq < first + 8)
            self.kvm.set_irqchip(chip)

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
            self.loop.schedule(LAST_MOMENTS_S, self._on_power_off)

    def _on_reset(self) -> None:
        self.end(Outcome.REBOOT, "reset by the guest")


def check_host(header: "state.Header", kvm_fd: int) -> None:
    """Raise ValueError unless a machine that was sent can go on here; OSError if KVM does not say."""
    config, firmware = header.config, header.firmware_bytes
    if rules.memory_bytes(config.memory_bytes) % PAGE_BYTES:
        raise ValueError(f"it has {config.memory_bytes} bytes of memory")
    rules.vcpus(config.vcpus)
    if not 0 <= firmware <= FIRMWARE_MAX or firmware % PAGE_BYTES:
        raise ValueError(f"it has firmware of {firmware} bytes")
    state.check_devices(header)
    system = System(kvm_fd)
    state.check_processor(header, system.supported_cpuid())
    with system.create_vm() as kvm:
        kvm.create_irqchip()
        with kvm.create_vcpu(config.vcpus - 1) as vcpu:  # the last one of as many
            state.check_tsc(header.tsc_khz, vcpu.get_tsc_khz())
            if header.xsave_bytes != vcpu.xsave_bytes:
                raise ValueError(f"its extended state has {header.xsave_bytes} bytes, not {vcpu.xsave_bytes}")
            try:
                vcpu.set_cpuid2(for_vcpu(state.cpuid_of(header), config.vcpus - 1, config.vcpus, tsc_deadline=True))
            except OSError as error:
                raise ValueError(f"KVM does not take its processor: {sentence(error)}") from error


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
