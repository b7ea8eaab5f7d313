"""The clocks of a guest: saves them for the moment at which its machine stops, and lets them go on from there.

There are two kinds of clock.  The clocks that KVM runs (TSC, kvmclock, local APIC timers, PIT) cannot be stopped.
`Clocks` has their values at the moment when the machine stopped, and `Clocks.restore` sets them to these values.  The
clocks that this process runs (ACPI timer, RTC) read `MachineClock`, which stops with the machine.

**One moment.**  Requests to KVM come one after the other, and the host may run other programs in between.  So each
clock is read together with CLOCK_MONOTONIC.  Its value is then converted, by its own rate, to one moment that is the
same for all clocks.  `restore` does the same in the other direction.  The remaining error is the time of one reading,
some microseconds, even on a busy host.

**Which clock of the host.**  KVM's timers use CLOCK_MONOTONIC: it has no steps, and it stops while the host sleeps.
Only the date of the RTC follows the wall clock of the host (CLOCK_REALTIME), as a clock with a battery would.

**Limits.**  KVM does not tell how far the PIT's first counter is in its period, so a pause begins a new period.  When a
one-shot timer of the local APIC has expired, KVM does not tell whether its interrupt was delivered, so the guest may
get it twice.  A KVM without hardware support (kvm_pvm) lets guests read the host's TSC directly, which does not stop.
"""

import time

from vmd import native
from vmd.kvmapi import abi
from vmd.units import NS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmd.kvmapi.vcpu import Vcpu
    from vmd.kvmapi.vm import Vm
    from vmd.vm.vcpu import VcpuThread

MSR_TSC = 0x10
MSR_TSC_DEADLINE = 0x6E0

SAMPLES = 9  # most readings of a clock; the quickest one counts
QUICK_NS = 1_500  # a reading that takes no longer is accurate enough
PROMPT_NS = 100_000  # setting a timer that takes no longer is accurate enough
STALE_NS = 5_000_000  # how late a thread may notice that its vCPU has left the guest
LATE_TRIES, LATE_S = 20, 0.001  # looks whether KVM has noticed that a timer was due, and the time between two
MASK_64 = (1 << 64) - 1

# Registers of the local APIC (Intel SDM 3A, table 11-1)
LAPIC_SPURIOUS = 0xF0
LAPIC_IRR = 0x200
LAPIC_TIMER = 0x320
LAPIC_INITIAL = 0x380
LAPIC_CURRENT = 0x390
LAPIC_DIVIDE = 0x3E0
LAPIC_ON = 1 << 8
TIMER_MASKED = 1 << 16
TIMER_MODE, TIMER_PERIODIC, TIMER_DEADLINE = 3 << 17, 1 << 17, 2 << 17
LAPIC_BUS_NS = 1  # KVM's APIC bus runs at 1 GHz

PIT_HZ = 1193182
PIT_STOPPED = 0xFF  # not a mode of the PIT: KVM starts no timer for it
PIT_ONE_SHOT = (0, 1, 4, 5)


class MachineClock:
    """CLOCK_MONOTONIC without the time for which the machine was paused.  It starts at 0 with the machine."""

    def __init__(self, monotonic_ns: "Callable[[], int]" = time.monotonic_ns) -> None:
        self._monotonic_ns = monotonic_ns
        self._behind_ns = monotonic_ns()
        self._stopped_ns: int | None = None

    def now_s(self) -> float:
        """Return the machine's time in seconds."""
        stopped = self._stopped_ns
        return (self._monotonic_ns() - self._behind_ns if stopped is None else stopped) / NS

    def stop(self, at_ns: int | None = None) -> None:
        """Stop at a moment of CLOCK_MONOTONIC, or now.  A stopped clock stays as it is."""
        if self._stopped_ns is None:
            self._stopped_ns = (self._monotonic_ns() if at_ns is None else at_ns) - self._behind_ns

    def go_on(self, at_ns: int) -> None:
        """Go on from the stopped value at a moment of CLOCK_MONOTONIC."""
        if self._stopped_ns is not None:
            self._behind_ns, self._stopped_ns = at_ns - self._stopped_ns, None


class Sample:
    """A value of a clock, and the time at which it was read."""

    def __init__(self, read: "Callable[[], int]") -> None:
        """Read several times, and keep the quickest reading: its time is known best."""
        self.width_ns = 1 << 62
        for _ in range(SAMPLES):
            before_ns = time.monotonic_ns()
            value = read()
            after_ns = time.monotonic_ns()
            if after_ns - before_ns < self.width_ns:
                self.value, self.at_ns, self.width_ns = value, (before_ns + after_ns) // 2, after_ns - before_ns
            if self.width_ns < QUICK_NS:
                break


class ApicTimer:
    """The timer in a page of local APIC registers, which are its items."""

    def __init__(self, page: bytes | bytearray) -> None:
        self.page = bytearray(page)

    def __getitem__(self, register: int) -> int:
        return int.from_bytes(self.page[register : register + 4], "little")

    def __setitem__(self, register: int, value: int) -> None:
        self.page[register : register + 4] = value.to_bytes(4, "little")

    @property
    def periodic(self) -> bool:
        """Whether the timer is periodic."""
        return self[LAPIC_TIMER] & TIMER_MODE == TIMER_PERIODIC

    @property
    def overdue(self) -> bool:
        """Whether a period has ended and KVM has not begun the next one yet.

        Then the host is late, and it is not known how late it is.
        """
        return self.periodic and self[LAPIC_INITIAL] > 0 and not self[LAPIC_CURRENT]

    @property
    def tick_ns(self) -> int:
        """The time in which the timer counts down by one."""
        code = self[LAPIC_DIVIDE]
        return LAPIC_BUS_NS << ((code & 3 | code >> 1 & 4) + 1 & 7)

    def advance(self, span_ns: int) -> None:
        """Let time pass.  If a periodic timer is due in it, its interrupt becomes pending."""
        initial, left = self[LAPIC_INITIAL], self[LAPIC_CURRENT] - span_ns // self.tick_ns
        if self.periodic and initial:
            if left <= 0:
                self.interrupt()
            left = (left - 1) % initial + 1
        self[LAPIC_CURRENT] = max(left, 0)

    def rewind(self, span_ns: int, since_ns: int) -> bool:
        """Set the timer back by `span_ns`.  Return whether it was due within `since_ns` before that moment.

        A one-shot timer that has expired stays as it is: it is not known when it expired.
        """
        initial, left = self[LAPIC_INITIAL], self[LAPIC_CURRENT]
        if not initial or (not left and not self.periodic):
            return False
        if self.overdue:  # the next period begins when the vCPU runs again
            self[LAPIC_CURRENT] = initial
            return True
        left += span_ns // self.tick_ns
        if self.periodic:
            left = (left - 1) % initial + 1
        self[LAPIC_CURRENT] = left = min(left, initial)
        return self.periodic and (initial - left) * self.tick_ns < since_ns

    def interrupt(self) -> None:
        """Make the timer's interrupt pending, as KVM does when the timer is due."""
        entry = self[LAPIC_TIMER]
        if not entry & TIMER_MASKED and self[LAPIC_SPURIOUS] & LAPIC_ON:
            vector = entry & 0xFF
            self[LAPIC_IRR + (vector >> 5 << 4)] |= 1 << (vector & 31)

    def stop(self) -> None:
        """Stop the timer: with an initial count of 0 it does not count."""
        self[LAPIC_INITIAL] = self[LAPIC_CURRENT] = 0


class VcpuClocks:
    """The clocks of one vCPU."""

    def __init__(self, tsc: int, deadline: int | None, initial: int, current: int, *, due: bool = False) -> None:
        self.tsc = tsc
        self.deadline = deadline  # a value of the TSC, 0 for none; None if the processor has no deadline timer
        self.initial, self.current = initial, current  # counts of the local APIC timer
        self.due = due  # the local APIC timer was due after the vCPU had left the guest

    @classmethod
    def in_page(cls, tsc: int, deadline: int | None, page: bytes) -> "VcpuClocks":
        """Return the clocks of a vCPU whose local APIC has these registers."""
        timer = ApicTimer(page)
        return cls(tsc, deadline, timer[LAPIC_INITIAL], timer[LAPIC_CURRENT])

    def put_into(self, page: bytes, elapsed_ns: int = 0) -> bytes:
        """Return a page of local APIC registers with this timer, advanced by `elapsed_ns`, in it."""
        timer = ApicTimer(page)
        timer[LAPIC_INITIAL], timer[LAPIC_CURRENT] = self.initial, self.current
        if self.due:
            timer.interrupt()
        timer.advance(elapsed_ns)
        return bytes(timer.page)


class Clocks:
    """The values of the clocks that KVM runs, at the moment when the machine stopped."""

    def __init__(self, vcpus: "Iterable[VcpuClocks]", kvmclock_ns: int, pit: bytes) -> None:
        self.vcpus = list(vcpus)
        self.kvmclock_ns = kvmclock_ns
        self.pit = pit

    @classmethod
    def take(cls, kvm: "Vm", threads: "list[VcpuThread]", clock: MachineClock, asked_ns: int) -> "Clocks":
        """Read the clocks of a machine whose vCPUs have parked, and stop its `MachineClock`.

        `asked_ns` is when the vCPUs were asked to park.
        """
        pit = kvm.get_pit2()
        kvm.set_pit2(_held(bytes(pit)))  # first: an interrupt after the moment would come again when the PIT goes on
        try:
            sample = Sample(lambda: int(kvm.get_clock().clock))
            moment_ns = sample.at_ns
            vcpus = _in_step(
                [_vcpu_clocks(thread, moment_ns, asked_ns) for thread in threads], threads[0].vcpu.get_tsc_khz()
            )
        except OSError:
            kvm.set_pit2(pit)
            raise
        clock.stop(moment_ns)
        return cls(vcpus, sample.value, _pit_at(pit, moment_ns))

    def hold(self, kvm: "Vm", vcpus: "list[Vcpu]") -> None:
        """Stop all timers of KVM, so that none interrupts the paused machine."""
        kvm.set_pit2(_held(self.pit))
        for vcpu in vcpus:
            timer = ApicTimer(vcpu.get_lapic())
            if timer[LAPIC_INITIAL]:
                timer.stop()
                vcpu.set_lapic(bytes(timer.page))
            vcpu.set_msrs({MSR_TSC_DEADLINE: 0})

    def restore(self, kvm: "Vm", vcpus: "list[Vcpu]", clock: MachineClock) -> None:
        """Let all clocks go on from the saved values, from now on."""
        now_ns = time.monotonic_ns()
        self._restore_tsc(vcpus, now_ns)
        self._restore_kvmclock(kvm, now_ns)
        for vcpu, each in zip(vcpus, self.vcpus, strict=True):
            _restore_timer(vcpu, each, now_ns)
            if each.deadline:
                vcpu.set_msrs({MSR_TSC_DEADLINE: each.deadline})
        kvm.set_pit2(self.pit)
        clock.go_on(now_ns)

    def _restore_tsc(self, vcpus: "list[Vcpu]", now_ns: int) -> None:
        first = vcpus[0]
        khz = first.get_tsc_khz()
        if first.has_tsc_offset:
            # By offset: KVM changes a value that is written to the MSR, to synchronise the TSCs of the vCPUs.
            host = Sample(lambda: (first.get_msrs((MSR_TSC,))[MSR_TSC] - first.get_tsc_offset()) & MASK_64)
            for vcpu, each in zip(vcpus, self.vcpus, strict=True):
                vcpu.set_tsc_offset(each.tsc + _cycles(host.at_ns - now_ns, khz) - host.value & MASK_64)
            return
        for vcpu, each in zip(vcpus, self.vcpus, strict=True):
            vcpu.set_msrs({MSR_TSC: each.tsc + _cycles(time.monotonic_ns() - now_ns, khz) & MASK_64})

    def _restore_kvmclock(self, kvm: "Vm", now_ns: int) -> None:
        late_ns = 0  # the time that KVM takes to set the clock
        for _ in range(SAMPLES):
            kvm.set_clock(self.kvmclock_ns + time.monotonic_ns() - now_ns + late_ns & MASK_64)
            sample = Sample(lambda: int(kvm.get_clock().clock))
            wrong_ns = _signed(self.kvmclock_ns + sample.at_ns - now_ns - sample.value)
            if abs(wrong_ns) <= QUICK_NS:
                break
            late_ns += wrong_ns


def _restore_timer(vcpu: "Vcpu", clocks: VcpuClocks, now_ns: int) -> None:
    """Let the timer of a local APIC go on.  If the host was slow to set it, set it again."""
    if not clocks.initial:
        return
    for _ in range(SAMPLES):
        begin_ns = time.monotonic_ns()
        # In the present page: interrupts that have become pending meanwhile stay pending.  The guest does not run yet.
        vcpu.set_lapic(clocks.put_into(vcpu.get_lapic(), begin_ns - now_ns))
        if time.monotonic_ns() - begin_ns < PROMPT_NS:
            break


def _cycles(span_ns: int, khz: int) -> int:
    return span_ns * khz // 10**6


def _signed(value: int) -> int:
    """Return the difference of two 64-bit numbers as a signed number."""
    return (value + (1 << 63) & MASK_64) - (1 << 63)


def _vcpu_clocks(thread: "VcpuThread", moment_ns: int, asked_ns: int) -> tuple[VcpuClocks, int]:
    """Return the clocks of a vCPU at a moment, and the largest error of its TSC in ns."""
    vcpu = thread.vcpu

    def read_tsc() -> int:
        return vcpu.get_msrs((MSR_TSC,))[MSR_TSC]

    pages: list[bytes] = []

    def read_page() -> int:
        pages.append(vcpu.get_lapic())
        return len(pages) - 1

    tsc = Sample(read_tsc)
    page = Sample(read_page)
    for _ in range(LATE_TRIES):  # polling, because KVM has no event for this
        if not ApicTimer(pages[page.value]).overdue:
            break
        time.sleep(LATE_S)
        page = Sample(read_page)
    deadline = vcpu.get_msrs((MSR_TSC_DEADLINE,)).get(MSR_TSC_DEADLINE)
    later = Sample(read_tsc)
    khz = vcpu.get_tsc_khz()
    at_ns, width_ns = tsc.at_ns, tsc.width_ns
    if _signed(later.value - tsc.value) < _cycles(later.at_ns - tsc.at_ns, khz) // 2:
        # If the host's TSC is unstable, KVM stops the TSC of a vCPU at its last exit.
        at_ns, width_ns = thread.left_ns, STALE_NS
    timer = ApicTimer(pages[page.value])
    due = timer.rewind(page.at_ns - moment_ns, moment_ns - asked_ns)
    return (
        VcpuClocks(
            tsc.value - _cycles(at_ns - moment_ns, khz) & MASK_64,
            deadline,
            timer[LAPIC_INITIAL],
            timer[LAPIC_CURRENT],
            due=due,
        ),
        width_ns,
    )


def _in_step(vcpus: "list[tuple[VcpuClocks, int]]", khz: int) -> list[VcpuClocks]:
    """Return the clocks of all vCPUs.  TSCs that differ by no more than the error are made equal.

    A guest expects that its TSCs stay in step.
    """
    first, width_ns = vcpus[0]
    for each, other_ns in vcpus[1:]:
        if abs(_signed(each.tsc - first.tsc)) <= _cycles(width_ns + other_ns, khz):
            each.tsc = first.tsc
    return [each for each, _ in vcpus]


def _held(pit: bytes) -> abi.kvm_pit_state2:
    """Return the state of a PIT with its first counter stopped.  Raises ValueError if `pit` has a wrong size."""
    size = native.sizeof(abi.kvm_pit_state2)
    if len(pit) != size:
        raise ValueError(f"kvm_pit_state2 of {len(pit)} bytes, not {size}")
    held = abi.kvm_pit_state2.from_buffer_copy(pit)
    held.channels[0].mode = PIT_STOPPED
    return held


def _pit_at(pit: abi.kvm_pit_state2, moment_ns: int) -> bytes:
    """Return the state of a PIT whose counters have the rest at a moment: KVM counts from the time of setting."""
    for channel in pit.channels[1:]:  # KVM does not tell when the first counter was loaded
        passed = (moment_ns - channel.count_load_time) * PIT_HZ // NS
        if channel.mode in PIT_ONE_SHOT and channel.count_load_time and passed > 0:
            channel.count = max((channel.count or 1 << 16) - passed, 1)
    return bytes(pit)
