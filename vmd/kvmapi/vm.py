"""One virtual machine: memory slots, interrupt controllers, event descriptors, clock, dirty logs."""

import os

from vmd import native
from vmd.kvmapi import abi
from vmd.kvmapi.abi import ioctl, read_struct, write_struct
from vmd.kvmapi.vcpu import Vcpu


def chip_route(gsi: int, chip: int, pin: int) -> abi.kvm_irq_routing_entry:
    """Return the entry that routes a GSI to a pin of KVM_IRQCHIP_*."""
    entry = abi.kvm_irq_routing_entry(gsi=gsi, type=abi.KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip = chip
    entry.u.irqchip.pin = pin
    return entry


def msi_route(gsi: int, address: int, data: int) -> abi.kvm_irq_routing_entry:
    """Return the entry that routes a GSI to an MSI message."""
    entry = abi.kvm_irq_routing_entry(gsi=gsi, type=abi.KVM_IRQ_ROUTING_MSI)
    entry.u.msi.address_lo = address & 0xFFFFFFFF
    entry.u.msi.address_hi = address >> 32
    entry.u.msi.data = data
    return entry


class Vm:
    """A KVM virtual machine.  Every method may be called from any thread of the process that created it.

    Raises:
        OSError: from every method, if the kernel refuses.  The message names the request.
    """

    def __init__(self, fd: int, vcpu_mmap_bytes: int) -> None:
        self.fd = fd
        self.vcpu_mmap_bytes = vcpu_mmap_bytes

    def __enter__(self) -> "Vm":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor.  The VM ends when its vCPUs are closed, too.  A second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def check_extension(self, cap: int) -> int:
        """Return the value of a capability for this VM, as System.check_extension does for the host."""
        return ioctl(self.fd, abi.KVM_CHECK_EXTENSION, cap)

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """Create a vCPU.  Its id is its APIC id.  KVM's interrupt controllers must exist already."""
        # The size of KVM_GET_XSAVE2, which does not change any more once there is a vCPU; 0 on old kernels.
        xsave_bytes = self.check_extension(abi.KVM_CAP_XSAVE2)
        fd = ioctl(self.fd, abi.KVM_CREATE_VCPU, vcpu_id)
        try:
            return Vcpu(fd, self.vcpu_mmap_bytes, xsave_bytes)
        except BaseException:
            os.close(fd)
            raise

    # ---- memory

    def set_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Put memory of this process into a slot, change the KVM_MEM_* flags of a slot, or with size 0 remove it."""
        region = abi.kvm_userspace_memory_region(slot, flags, gpa, size, hva)
        ioctl(self.fd, abi.KVM_SET_USER_MEMORY_REGION, region)

    def get_dirty_log(self, slot: int, size: int) -> bytes:
        """Return and clear the bitmap of pages written in a slot of `size` bytes, page 0 in bit 0."""
        pages = -(-size // 4096)
        bitmap = (abi.u64 * (-(-pages // 64)))()
        log = abi.kvm_dirty_log(slot=slot, dirty_bitmap=native.addressof(bitmap))
        ioctl(self.fd, abi.KVM_GET_DIRTY_LOG, log)
        return bytes(bitmap)

    def set_tss_addr(self, gpa: int) -> None:
        """Give KVM three pages below 4 GiB, outside of all slots, for real mode on older Intel processors."""
        abi.ioctl_ulong(self.fd, abi.KVM_SET_TSS_ADDR, gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """Give KVM one page for the same purpose.  This comes before the first vCPU."""
        ioctl(self.fd, abi.KVM_SET_IDENTITY_MAP_ADDR, abi.u64(gpa))

    # ---- interrupts

    def create_irqchip(self) -> None:
        """Create both 8259s and the I/O APIC.  Each vCPU that is created later has a local APIC."""
        ioctl(self.fd, abi.KVM_CREATE_IRQCHIP)

    def create_pit2(self, flags: int = abi.KVM_PIT_SPEAKER_DUMMY) -> None:
        """Create the 8254, by default with port 61h.  This comes after create_irqchip."""
        ioctl(self.fd, abi.KVM_CREATE_PIT2, abi.kvm_pit_config(flags=flags))

    def irq_line(self, gsi: int, level: int) -> None:
        """Set the level of a line.  An edge-triggered interrupt needs 1 and then 0."""
        ioctl(self.fd, abi.KVM_IRQ_LINE, abi.kvm_irq_level(gsi, level))

    def set_gsi_routing(self, routes: list[abi.kvm_irq_routing_entry]) -> None:
        """Replace the whole table.  All routes that are not in it are removed, also KVM's defaults."""
        ioctl(self.fd, abi.KVM_SET_GSI_ROUTING, abi.counted(abi.kvm_irq_routing, routes))

    def assign_irqfd(self, fd: int, gsi: int, resample_fd: int | None = None) -> None:
        """Let an eventfd raise a GSI.  If the eventfd is not zero, an interrupt is injected at once.

        With `resample_fd` the GSI is level triggered.  When the guest ends the interrupt, the GSI is lowered, and
        `resample_fd` is signalled, so that a device can raise it again.
        """
        irqfd = abi.kvm_irqfd(fd=fd, gsi=gsi)
        if resample_fd is not None:
            irqfd.flags = abi.KVM_IRQFD_FLAG_RESAMPLE
            irqfd.resamplefd = resample_fd
        ioctl(self.fd, abi.KVM_IRQFD, irqfd)

    def deassign_irqfd(self, fd: int, gsi: int) -> None:
        """Undo assign_irqfd.  When this returns, no injection is under way.  Does nothing if it was not assigned."""
        ioctl(self.fd, abi.KVM_IRQFD, abi.kvm_irqfd(fd=fd, gsi=gsi, flags=abi.KVM_IRQFD_FLAG_DEASSIGN))

    def assign_ioeventfd(
        self, fd: int, address: int, size: int, datamatch: int | None = None, *, pio: bool = False
    ) -> None:
        """Let a guest's write of `size` bytes (0: any size, without datamatch) signal an eventfd.

        The address is guest-physical or, with `pio`, a port.  A write of another size or value is an exit.

        Raises:
            OSError: EEXIST if there is a registration with this address, size and value.
        """
        self._ioeventfd(fd, address, size, datamatch, pio, 0)

    def deassign_ioeventfd(
        self, fd: int, address: int, size: int, datamatch: int | None = None, *, pio: bool = False
    ) -> None:
        """Undo assign_ioeventfd.  All arguments must be the same.

        Raises:
            OSError: ENOENT if there is no such registration.
        """
        self._ioeventfd(fd, address, size, datamatch, pio, abi.KVM_IOEVENTFD_FLAG_DEASSIGN)

    def _ioeventfd(
        self, fd: int, address: int, size: int, datamatch: int | None, pio: bool, flags: int
    ) -> None:
        event = abi.kvm_ioeventfd(addr=address, len=size, fd=fd, flags=flags)
        if pio:
            event.flags |= abi.KVM_IOEVENTFD_FLAG_PIO
        if datamatch is not None:
            event.flags |= abi.KVM_IOEVENTFD_FLAG_DATAMATCH
            event.datamatch = datamatch
        ioctl(self.fd, abi.KVM_IOEVENTFD, event)

    # ---- state

    def get_irqchip(self, chip_id: int) -> abi.kvm_irqchip:
        """Return the registers of one KVM_IRQCHIP_*."""
        chip = abi.kvm_irqchip(chip_id=chip_id)
        ioctl(self.fd, abi.KVM_GET_IRQCHIP, chip)
        return chip

    def set_irqchip(self, chip: abi.kvm_irqchip | bytes) -> None:
        """Load the registers of the interrupt controller with the structure's chip_id."""
        write_struct(self.fd, abi.KVM_SET_IRQCHIP, abi.kvm_irqchip, chip)

    def get_pit2(self) -> abi.kvm_pit_state2:
        """Return the PIT's counters."""
        return read_struct(self.fd, abi.KVM_GET_PIT2, abi.kvm_pit_state2)

    def set_pit2(self, state: abi.kvm_pit_state2 | bytes) -> None:
        """Load the PIT's counters."""
        write_struct(self.fd, abi.KVM_SET_PIT2, abi.kvm_pit_state2, state)

    def get_clock(self) -> abi.kvm_clock_data:
        """Return kvmclock's time.  KVM_CLOCK_* in `flags` tell which other fields are valid."""
        return read_struct(self.fd, abi.KVM_GET_CLOCK, abi.kvm_clock_data)

    def set_clock(self, clock_ns: int) -> None:
        """Set kvmclock to this value.  KVM does not add the time that passes until then."""
        ioctl(self.fd, abi.KVM_SET_CLOCK, abi.kvm_clock_data(clock=clock_ns))

