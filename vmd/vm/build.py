"""Builds a machine from a source: boot images (below), or the stream of another machine (`vm/arrival.py`).

A boot image is not read before `build` asks its source.
"""

import os

from vmd.closing import close
from vmd.config.model import BootDevice
from vmd.guestmem import GuestMemory
from vmd.log import log
from vmd.vm import acpi, layout
from vmd.vm.boot import loader
from vmd.vm.kinds import SEED
from vmd.vm.machine import EmptyVm, Machine, Outside, memory_regions
from vmd.vm.pause import Pause
from vmd.vm.vcpu import apply_start, set_boot_msrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from vmd.config.model import VmConfig
    from vmd.vm.boot.start import Start
    from vmd.vm.slots import Slot

    class Source(Protocol):
        """The source of a machine: boot images or a stream.  All methods raise as `build` does."""

        def machine(self, empty_vm: EmptyVm, config: VmConfig, slots: Sequence[Slot], outside: Outside) -> Machine:
            """Return a machine that has memory and starting devices, and no vCPUs."""

        def fill(self, machine: Machine) -> None:
            """Fill the guest's memory."""

        def finish(self, machine: Machine) -> Pause:
            """Set the state of devices and vCPUs.  Return the machine's `Pause`."""


def build(
    empty_vm: EmptyVm, source: "Source", config: "VmConfig", slots: "Sequence[Slot]", outside: Outside
) -> Pause:
    """Build a machine, which is then ready to start, and return its `Pause`.

    `empty_vm` and the descriptors in `slots` belong to the machine; the latter are closed here.

    Raises:
        OperatorError: the stream has no machine that fits.
        ImageError: a boot image cannot be used.
        HostError, PeerError, OSError: the host, KVM or a device refuses.
    """
    empty_vm.close()  # first: code that reads a boot image must not be able to make other VMs
    machine = source.machine(empty_vm, config, slots, outside)
    machine.seed = seed_of(slots)
    # The devices have these descriptors now.  Code that reads a boot image must not have files, taps or packet sockets.
    for slot in slots:
        for fd in slot.fds:
            close(fd)
    source.fill(machine)
    machine.plug_devices()
    machine.create_vcpus()
    return source.finish(machine)


def seed_of(slots: "Sequence[Slot]") -> bytes:
    """Return the content of a machine's seed, which is sent with the machine; b"" without one.  Raises OSError."""
    for slot in slots:
        if slot.kind is SEED:
            fd = slot.fds[0]
            return os.pread(fd, os.fstat(fd).st_size, 0)
    return b""


class FromImages:
    """A source: open boot images, and their names for messages."""

    def __init__(
        self, boot_fd: int, boot_name: str, initrd_fd: int | None, initrd_name: str, memory_fd: int, options: str = ""
    ) -> None:
        """`memory_fd` is an empty file for the guest's memory.  `options` are those of boot(8)."""
        self.boot_fd = boot_fd
        self.boot_name = boot_name
        self.initrd_fd = initrd_fd
        self.initrd_name = initrd_name
        self.memory_fd = memory_fd
        self.options = options
        self.start: Start | None = None

    def machine(self, empty_vm: EmptyVm, config: "VmConfig", slots: "Sequence[Slot]", outside: Outside) -> Machine:
        """Make the guest's memory, and the machine.  If the image is firmware, there is memory for it."""
        firmware_bytes = loader.firmware_bytes(self.boot_fd, self.boot_name)
        memory = GuestMemory.create(memory_regions(config.memory_bytes, firmware_bytes), fd=self.memory_fd)
        return Machine(empty_vm, config, memory, firmware_bytes, slots, outside)

    def fill(self, machine: Machine) -> None:
        """Load the images and close them."""
        config = machine.config
        rsdp_gpa = layout.ACPI_TABLES
        if machine.firmware_bytes:
            rsdp_gpa = 0  # SeaBIOS itself places the tables, and assigns addresses and interrupt lines
        else:
            machine.memory.write(rsdp_gpa, acpi.build_tables(config.memory_bytes, config.vcpus))
        from_network = config.boot_device is BootDevice.NET and config.nics
        self.start = loader.load(
            machine.memory,
            self.boot_fd,
            self.boot_name,
            memory_bytes=config.memory_bytes,
            initrd_fd=self.initrd_fd,
            initrd_name=self.initrd_name,
            cmdline=os.fsencode(config.cmdline),
            rsdp_gpa=rsdp_gpa,
            bootmac=config.nics[0].lladdr if from_network else b"",
            options=self.options,
        )
        log.debug(self.start.text)
        close(self.boot_fd)
        if self.initrd_fd is not None:
            close(self.initrd_fd)

    def finish(self, machine: Machine) -> Pause:
        """Set vCPU 0 to the state in which the image expects to start."""
        assert self.start is not None
        if not machine.firmware_bytes:
            machine.pci.assign_resources()
        set_boot_msrs([thread.vcpu for thread in machine.vcpus], direct_boot=not machine.firmware_bytes)
        apply_start(machine.vcpus[0].vcpu, self.start)
        return Pause(machine, machine.outside.loop)
