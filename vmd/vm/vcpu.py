"""One vCPU and its thread: it calls KVM_RUN, and hands each exit to the bus.

The thread answers port I/O inside `Vcpu.run_pio`.  All other exits are rare, and come back as an exit object.
A thread that finds a reason to end the VM calls `end`.  The event thread then stops all vCPUs.
"""

import time

from vmd import threads
from vmd.errors import GuestError
from vmd.ipc.messages.vm import Outcome
from vmd.kvmapi import abi
from vmd.kvmapi.exits import (
    FailEntry,
    Hlt,
    InternalError,
    Interrupted,
    MmioRead,
    MmioWrite,
    PioIn,
    PioOut,
    Retry,
    Shutdown,
    SystemEvent,
)
from vmd.log import log
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread
from vmd.vm.boot.start import Mode, Start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.guestmem import GuestMemory
    from vmd.kvmapi.exits import Exit
    from vmd.kvmapi.vcpu import Vcpu
    from vmd.vm.bus import Bus

RETRY_WAIT_S = 0.001  # KVM returns EAGAIN for a vCPU that is being started by another one: do not spin meanwhile
STOP_TIMEOUT_S = 10.0

MSR_MTRR_DEF_TYPE = 0x2FF
MTRR_ENABLED_WRITE_BACK = 0x806  # fixed ranges stay disabled, because their reset value is uncached
MSR_MISC_ENABLE = 0x1A0
MISC_ENABLE_FAST_STRINGS = 1

INSTRUCTION_BYTES = 16


def apply_start(vcpu: "Vcpu", start: Start) -> None:
    """Put vCPU 0 into the state that its boot image expects.

    For firmware there is nothing to do: KVM resets a vCPU to the state of a real processor after reset.
    """
    if start.mode is Mode.REAL_RESET:
        return
    sregs = vcpu.get_sregs()
    for name, segment in start.segments.items():
        target = getattr(sregs, name)
        for field in type(segment).fields:
            setattr(target, field, getattr(segment, field))
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = start.cr0, start.cr3, start.cr4, start.efer
    sregs.gdt.base, sregs.gdt.limit = start.gdt_base, start.gdt_limit
    sregs.idt.base, sregs.idt.limit = start.idt_base, start.idt_limit
    vcpu.set_sregs(sregs)
    regs = abi.kvm_regs()
    for name, value in start.registers.items():
        setattr(regs, name, value)
    vcpu.set_regs(regs)


def set_boot_msrs(vcpus: "list[Vcpu]", *, direct_boot: bool) -> None:
    """Set MSRs whose reset values would make the guest slow.  An MSR that the host lacks is left out."""
    wanted = {MSR_MISC_ENABLE: MISC_ENABLE_FAST_STRINGS}
    if direct_boot:  # firmware sets the MTRRs itself
        wanted[MSR_MTRR_DEF_TYPE] = MTRR_ENABLED_WRITE_BACK
    for vcpu in vcpus:
        refused = vcpu.set_msrs(wanted)
        if refused:
            log.debug(f"this host has no msr {', '.join(f'{msr:#x}' for msr in refused)}")


class VcpuThread:
    """Runs one vCPU until it is stopped."""

    def __init__(
        self,
        number: int,
        vcpu: "Vcpu",
        bus: "Bus",
        memory: "GuestMemory",
        end: "Callable[[Outcome, str], None]",
    ) -> None:
        self.number = number
        self.vcpu = vcpu
        self._bus = bus
        self._memory = memory
        self._end = end
        self._stopping = threads.Event()
        self._parking = threads.Condition()
        self._on_parked: Callable[[], None] | None = None  # set while the vCPU is to park, or is parked
        self.left_ns = 0  # when the vCPU left the guest to park, by CLOCK_MONOTONIC
        self._thread = threads.Thread(target=self._run, name=f"vcpu{number}", daemon=True)

    def start(self) -> None:
        """Let the guest execute.  Raises HostError."""
        start_thread(self._thread.name, self._thread.start)

    def ask_to_stop(self) -> None:
        """Tell the thread to end.  `join` waits for that."""
        self._stopping.set()
        self.unpark()
        self.vcpu.kick()

    def ask_to_park(self, on_parked: "Callable[[], None]") -> None:
        """Stop the vCPU between two instructions.  Then `on_parked` is called on its thread."""
        with self._parking:
            self._on_parked = on_parked
            self._parking.notify()
        self.vcpu.kick()

    def unpark(self) -> None:
        """Let a parked vCPU go on, or cancel the request to park."""
        with self._parking:
            self._on_parked = None
            self._parking.notify()

    def join(self) -> bool:
        """Wait for the end of the thread.  Return False if it does not end in time, as when an ioctl hangs."""
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        name_thread(f"vcpu{self.number}")
        self.vcpu.bind_thread()
        try:
            self._loop()
        except OSError as error:
            self._end(Outcome.FAILED, f"vcpu {self.number}: {error}")
        except BaseException as error:
            # A bug of ours.  Without this, the thread would die silently, and the VM would never end.
            self._end(Outcome.FAILED, f"vcpu {self.number}: internal error: {type(error).__name__}: {error}")
            raise
        finally:
            self.vcpu.unbind_thread()
            log.debug(f"vcpu {self.number}: {self.vcpu.exits} exits")

    def _loop(self) -> None:
        vcpu, bus = self.vcpu, self._bus
        while not self._stopping.is_set():
            exit = vcpu.run_pio(bus.pio_read, bus.pio_write)
            match exit:
                case MmioRead(gpa, size):
                    vcpu.answer(bus.mmio_read(gpa, size).to_bytes(size, "little"))
                case MmioWrite(gpa, size, data):
                    bus.mmio_write(gpa, size, int.from_bytes(data, "little"))
                case PioIn(port, size, count):
                    vcpu.answer(bus.pio_read_string(port, size, count))
                case PioOut(port, size, _count, data):
                    bus.pio_write_string(port, size, data)
                case Interrupted():
                    # In this order: a request that comes between the two lines is seen by the second one.
                    vcpu.clear_kick()
                    self._park_if_asked()
                case Retry() | Hlt():
                    self._stopping.wait(RETRY_WAIT_S)
                    self._park_if_asked()
                case Shutdown() | SystemEvent():
                    log.debug(f"vcpu {self.number}: triple fault")
                    self._end(Outcome.REBOOT, "triple fault")
                    return
                case _:
                    self._end(Outcome.FAILED, self._report(exit))
                    return

    def _park_if_asked(self) -> None:
        """Park, if that was asked for.  KVM has completed the I/O of the last exit before it was interrupted.

        If the vCPU is unparked and asked to park again before this thread wakes up, the new `on_parked` is called, too.
        """
        told: Callable[[], None] | None = None
        self.left_ns = time.monotonic_ns()
        with self._parking:
            while self._on_parked is not None:
                if self._on_parked is not told:
                    told = self._on_parked
                    told()
                else:
                    self._parking.wait()

    def _report(self, exit: "Exit") -> str:
        """Log the registers and instruction bytes of a vCPU that KVM cannot run any more.  Return a sentence."""
        match exit:
            case InternalError(suberror, data):
                words = " ".join(f"{word:#x}" for word in data)
                what = f"KVM internal error {suberror} ({words})"
            case FailEntry(reason, cpu):
                what = f"entry to the guest failed, hardware reason {reason:#x} on cpu {cpu}"
            case _:
                what = f"unexpected exit {exit}"
        for line in self.dump():
            log.error(f"vcpu {self.number}: {line}")
        instruction = exit.instruction if isinstance(exit, InternalError) else b""
        if instruction:
            what += f" at instruction {instruction.hex(' ')}"
        return f"vcpu {self.number}: {what}"

    def dump(self) -> list[str]:
        """Return lines with the registers of a stopped vCPU and the bytes at its instruction pointer."""
        try:
            regs, sregs = self.vcpu.get_regs(), self.vcpu.get_sregs()
        except OSError as error:
            return [f"no registers: {error}"]
        names = [field[0] for field in abi.kvm_regs._fields_]
        lines = [
            " ".join(f"{name}={getattr(regs, name):016x}" for name in names[start : start + 4])
            for start in range(0, len(names), 4)
        ]
        segments = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
        for name in segments:
            each = getattr(sregs, name)
            lines.append(f"{name}={each.selector:04x} base={each.base:016x} limit={each.limit:08x} type={each.type:x}")
        lines.append(f"gdt={sregs.gdt.base:016x}/{sregs.gdt.limit:04x} idt={sregs.idt.base:016x}/{sregs.idt.limit:04x}")
        lines.append(" ".join(f"{name}={getattr(sregs, name):x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer")))
        lines.append(f"code at rip: {self._code(sregs.cs.base if not sregs.efer & 0x400 else 0, regs.rip)}")
        return lines

    def _code(self, base: int, rip: int) -> str:
        try:
            gpa = self.vcpu.translate(base + rip & 0xFFFFFFFFFFFFFFFF)
            return self._memory.read(gpa, INSTRUCTION_BYTES).hex(" ") if gpa is not None else "not mapped"
        except (OSError, GuestError):
            return "not readable"
