"""The parts of a machine, which is built with the real /dev/kvm and not started (hostile-input 50)."""

import os
from collections.abc import Iterator

import pytest

from vmd.backlog import Backlog, BacklogWriter
from vmd.config.model import VmConfig
from vmd.guestmem import GuestMemory
from vmd.ipc.devmsg import FIGURES_BYTES
from vmd.ipc.loop import Loop
from vmd.kvmapi import abi
from vmd.memfile import sealed_file
from vmd.vm import layout
from vmd.vm import machine as machine_module
from vmd.vm.console import Console
from vmd.vm.devproc import DeviceProcesses
from vmd.vm.machine import EmptyVm, Machine, Outside, memory_regions

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.path.exists("/dev/kvm"), reason="there is no /dev/kvm on this host"),
]

PORTS = {
    0x60: 5,  # keyboard controller: resets, and reports that it is idle
    0x70: 2,  # clock and CMOS
    0x92: 1,  # reset, A20
    0x3F8: 8,  # serial console
    0x510: 12,  # fw_cfg
    0x600: 12,  # ACPI events, control, timer
    0xCF8: 8,  # PCI configuration; CF9h resets
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Give a machine without devices, whose guest does not run yet."""
    master, slave = os.openpty()
    loop = Loop()
    monkeypatch.setattr(machine_module, "KVM_FD", os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    outside = Outside(
        devices=DeviceProcesses(),
        figures_fd=sealed_file("figures", FIGURES_BYTES),
        console=Console(master, slave, BacklogWriter(Backlog.create().fd), loop),
        loop=loop,
        end=lambda _outcome, text: pytest.fail(text),
        ask_resolvers=lambda: None,
        lock_lost=pytest.fail,
        report=lambda _what, _device, _text: None,
    )
    config = VmConfig(name="bare", memory_bytes=64 << 20)
    memory = GuestMemory.create(memory_regions(config.memory_bytes, 0))
    machine = Machine(EmptyVm(), config, memory, 0, [], outside)
    yield machine
    for thread in machine.vcpus:
        thread.vcpu.close()
    machine.kvm.close()
    machine.memory.close()
    loop.close()
    for fd in (master, slave):
        os.close(fd)


def test_bus_has_only_the_listed_ports_50(machine: Machine) -> None:
    """Hostile input 50: there is no floppy drive, IDE, VGA, parallel port, sound or DMA.

    KVM itself emulates the 8259s, the 8254 with port 61h, and the APICs.
    """
    answering = {port for port in range(0x10000) if port in machine.bus._ports}
    assert answering == {port for first, count in PORTS.items() for port in range(first, first + count)}
    assert machine.bus._mmio_ranges == ()
    assert [function.slot for function in machine.pci.functions()] == [0, 1]  # host bridge, vmmci


def test_lines_of_pci_are_level_triggered_without_a_firmware(machine: Machine) -> None:
    """Without SeaBIOS a kernel finds the 8259s as SeaBIOS leaves them: PCI lines and the SCI are level-triggered.

    On an edge-triggered line the interrupt of one device is lost while another device asserts the line.
    """
    first, second = (
        machine.kvm.get_irqchip(chip).chip.pic.elcr for chip in (abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE)
    )

    lines = {layout.pci_irq(slot, pin) for slot in range(32) for pin in range(1, 5)} | {layout.IRQ_SCI}
    assert first | second << 8 == sum(1 << line for line in lines) == 0x0E00
