"""Guests of a few bytes of real-mode code, for questions to /dev/kvm.

Every guest starts at 0:1000h with 64 KiB of memory at address 0; addresses above have no memory.
"""

import os
import threading
import time
from collections.abc import Callable

from vmd.guestmem import GuestMemory, RegionSpec
from vmd.kvmapi import abi
from vmd.kvmapi.exits import Exit
from vmd.kvmapi.system import System
from vmd.kvmapi.vcpu import Vcpu
from vmd.kvmapi.vm import Vm

ENTRY = 0x1000
HANDLER = 0x1800
DEADLINE_S = 60.0

HLT = b"\xf4"
# Both 8259s' command words for vectors 20h and up, all lines but IRQ 5 masked, interrupts on.
PIC_SETUP = (
    b"".join(
        bytes((0xB0, value, 0xE6, port))  # mov al, value; out port, al
        for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x21, 0xDF))
    )
    + b"\xfb"
)  # sti
HALT_FOR_EVER = b"\xf4\xeb\xfd"
# Writes 55h to port 500h, ends the interrupt at the 8259, returns.
PIC_HANDLER = b"\x50\x52\xba\x00\x05\xb0\x55\xee\xb0\x20\xe6\x20\x5a\x58\xcf"


def out(port: int, value: int, size: int = 1) -> bytes:
    """Return mov dx, port; mov al/ax/eax, value; out dx, al/ax/eax."""
    load = {1: b"\xb0", 2: b"\xb8", 4: b"\x66\xb8"}[size] + value.to_bytes(size, "little")
    return b"\xba" + port.to_bytes(2, "little") + load + {1: b"\xee", 2: b"\xef", 4: b"\x66\xef"}[size]


class Guest:
    """A VM with memory and one vCPU in real mode."""

    def __init__(self, system: System, *, irqchip: bool) -> None:
        self.vm: Vm = system.create_vm()
        self.vm.set_identity_map_addr(0xFEFFC000)
        self.vm.set_tss_addr(0xFEFFD000)
        if irqchip:
            self.vm.create_irqchip()
            self.vm.create_pit2()
        self.memory = GuestMemory.create([RegionSpec(gpa=0, size=0x10000, name="ram")])
        for slot in self.memory.kvm_slots():
            self.vm.set_memory_region(*slot)
        self.vcpu = self.add_vcpu(system, 0)

    def add_vcpu(self, system: System, index: int) -> Vcpu:
        """Make another vCPU, with the host's CPUID."""
        vcpu = self.vm.create_vcpu(index)
        vcpu.set_cpuid2(system.supported_cpuid())
        return vcpu

    def load(self, code: bytes, **registers: int) -> None:
        """Put code at 0:1000h and point the vCPU there."""
        self.memory.write(ENTRY, code)
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        regs = abi.kvm_regs(rip=ENTRY, rsp=0x8000, rflags=2, **registers)
        self.vcpu.set_regs(regs)

    def handle_irq5(self, code: bytes = PIC_HANDLER) -> None:
        """Point vector 25h at HANDLER and put code there."""
        self.memory.write(HANDLER, code)
        self.memory.write(0x25 * 4, HANDLER.to_bytes(4, "little"))

    def close(self) -> None:
        """Close everything."""
        self.vcpu.close()
        self.vm.close()
        self.memory.close()


class Runner:
    """Runs a vCPU on its own thread until `proceed` returns False for an exit."""

    def __init__(self, vcpu: Vcpu, proceed: Callable[[Exit], bool] = lambda _: False) -> None:
        self.vcpu = vcpu
        self.exits: list[Exit] = []
        self._proceed = proceed
        # A daemon thread, so that a hanging guest fails only its own test and does not block the end of the test run.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.vcpu.bind_thread()
        try:
            while True:
                self.exits.append(self.vcpu.run())
                if not self._proceed(self.exits[-1]):
                    return
        finally:
            self.vcpu.unbind_thread()

    def join(self) -> list[Exit]:
        """Wait for the thread, and return its exits."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), f"the guest runs on after {self.exits}"
        return self.exits


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds.  Raises AssertionError at the deadline."""
    limit = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < limit
        os.sched_yield()
