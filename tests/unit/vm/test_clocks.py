"""All clocks are saved for one moment and restored from it, even if the host is slow to read or set them (arch. 8)."""

import random
import time
from typing import Any, cast

import pytest

from vmd.kvmapi import abi
from vmd.vm import clocks
from vmd.vm.clocks import (
    LAPIC_CURRENT,
    LAPIC_DIVIDE,
    LAPIC_INITIAL,
    LAPIC_IRR,
    LAPIC_ON,
    LAPIC_SPURIOUS,
    LAPIC_TIMER,
    MASK_64,
    MSR_TSC,
    MSR_TSC_DEADLINE,
    PIT_STOPPED,
    TIMER_MASKED,
    TIMER_PERIODIC,
    ApicTimer,
    Clocks,
    MachineClock,
    VcpuClocks,
)

KHZ = 2_400_000
NS = 10**9
VECTOR = 0x45
BY_1, BY_16 = 0x0B, 0x03
SLOW_NS = 5_000_000  # a step takes so long when the host runs something else in between
LATE_NS = 7_000_000
CLOSE_NS = 30_000  # the largest error of several quick readings together


class Host:
    """A host whose time passes with every operation, by a random amount."""

    def __init__(self, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.now_ns = 10**15
        self.busy = 0.05  # the probability that it runs something else in between

    def monotonic_ns(self) -> int:
        """Return the time."""
        return self.now_ns

    def spend(self) -> None:
        """Let the time of one operation pass."""
        self.now_ns += SLOW_NS if self.random.random() < self.busy else self.random.randrange(200, 2000)

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now_ns += round(seconds * NS)

    def tsc(self) -> int:
        """Return the host's TSC."""
        return 12345 + self.now_ns * KHZ // 10**6


class Vcpu:
    """A vCPU whose clocks follow the host's."""

    def __init__(self, host: Host, offset: int, *, has_tsc_offset: bool = True, stale: bool = False) -> None:
        self.host = host
        self.offset = offset
        self.has_tsc_offset = has_tsc_offset
        self.page = bytearray(1024)
        self.target_ns = 0  # when the timer is due
        self.deadline = 0
        self.left_at: int | None = host.now_ns if stale else None  # its TSC stopped at this time; None: it runs

    def get_tsc_khz(self) -> int:
        """Return the rate of the TSC in kHz."""
        return KHZ

    def tsc(self) -> int:
        """Return the guest's TSC."""
        at_ns = self.host.now_ns if self.left_at is None else self.left_at
        return 12345 + at_ns * KHZ // 10**6 + self.offset & MASK_64

    def get_msrs(self, indices: tuple[int, ...]) -> dict[int, int]:
        """Return MSRs.  They are read in the middle of the time that this takes."""
        self.host.spend()
        values = {MSR_TSC: self.tsc(), MSR_TSC_DEADLINE: self.deadline}
        self.host.spend()
        return {index: values[index] for index in indices}

    def set_msrs(self, values: dict[int, int]) -> list[int]:
        """Write MSRs, and return those that were refused."""
        self.host.spend()
        if MSR_TSC in values:
            self.offset += values[MSR_TSC] - self.tsc()
        self.deadline = values.get(MSR_TSC_DEADLINE, self.deadline)
        return []

    def get_tsc_offset(self) -> int:
        """Return the offset of the TSC."""
        self.host.spend()
        return self.offset & MASK_64

    def set_tsc_offset(self, offset: int) -> None:
        """Set the offset of the TSC."""
        self.host.spend()
        self.offset = offset
        self.left_at = None

    def get_lapic(self) -> bytes:
        """Return the registers.  Like KVM, compute the present count of the timer."""
        self.host.spend()
        timer = ApicTimer(bytes(self.page))
        initial = timer[LAPIC_INITIAL]
        left = (self.target_ns - self.host.now_ns) // timer.tick_ns
        timer[LAPIC_CURRENT] = 0 if not initial else (left - 1) % initial + 1 if timer.periodic else max(left, 0)
        self.host.spend()
        return bytes(timer.page)

    def set_lapic(self, page: bytes) -> None:
        """Set the registers.  Like KVM, start the timer with the present count."""
        self.host.spend()
        self.page[:] = page
        timer = ApicTimer(page)
        self.target_ns = self.host.now_ns + timer[LAPIC_CURRENT] * timer.tick_ns
        self.host.spend()

    def set_timer(self, mode: int, initial: int, divide: int = BY_1) -> None:
        """Start the timer, as the guest does."""
        timer = ApicTimer(bytes(self.page))
        timer[LAPIC_SPURIOUS], timer[LAPIC_DIVIDE], timer[LAPIC_TIMER] = LAPIC_ON | 0xFF, divide, mode | VECTOR
        timer[LAPIC_INITIAL] = timer[LAPIC_CURRENT] = initial
        self.page[:] = timer.page
        self.target_ns = self.host.now_ns + initial * timer.tick_ns


class Thread:
    """The thread of a vCPU that has parked."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.left_ns = vcpu.host.now_ns


class Kvm:
    """kvmclock and the PIT."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.ahead_ns = -(10**15) + 777
        self.pits: list[abi.kvm_pit_state2] = []

    def get_clock(self) -> abi.kvm_clock_data:
        """Return kvmclock."""
        self.host.spend()
        data = abi.kvm_clock_data(clock=self.host.now_ns + self.ahead_ns)
        self.host.spend()
        return data

    def set_clock(self, clock_ns: int) -> None:
        """Set kvmclock."""
        self.host.spend()
        self.ahead_ns = clock_ns - self.host.now_ns
        self.host.spend()

    def get_pit2(self) -> abi.kvm_pit_state2:
        """Return the state of the PIT."""
        return abi.kvm_pit_state2()

    def set_pit2(self, pit: abi.kvm_pit_state2 | bytes) -> None:
        """Record the state of the PIT."""
        self.pits.append(abi.kvm_pit_state2.from_buffer_copy(bytes(pit)))


class Machine:
    """A machine with all clocks, and their values."""

    def __init__(self, host: Host, vcpus: list[Vcpu]) -> None:
        self.host, self.vcpus, self.kvm = host, vcpus, Kvm(host)
        self.clock = MachineClock(host.monotonic_ns)

    def stop(self) -> Clocks:
        """Stop the clocks, and return their saved values."""
        asked_ns = self.host.now_ns
        threads = cast("Any", [Thread(vcpu) for vcpu in self.vcpus])
        taken = Clocks.take(cast("Any", self.kvm), threads, self.clock, asked_ns)
        taken.hold(cast("Any", self.kvm), cast("Any", self.vcpus))
        return taken

    def go_on(self, taken: Clocks) -> None:
        """Let the clocks go on from their saved values."""
        taken.restore(cast("Any", self.kvm), cast("Any", self.vcpus), self.clock)

    def readings(self) -> list[int]:
        """Return the present value of every clock, in ns.  Each clock has its own start."""
        now_ns = self.host.now_ns
        tscs = [vcpu.tsc() * 10**6 // KHZ for vcpu in self.vcpus]
        timers = [-(vcpu.target_ns - now_ns) for vcpu in self.vcpus]
        return [now_ns + self.kvm.ahead_ns, round(self.clock.now_s() * NS), *tscs, *timers]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """Return a host that replaces the time functions of this process."""
    made = Host()
    monkeypatch.setattr(time, "monotonic_ns", made.monotonic_ns)
    monkeypatch.setattr(time, "sleep", made.sleep)
    return made


@pytest.mark.parametrize("has_tsc_offset", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_all_clocks_stop_and_go_on_together(host: Host, seed: int, has_tsc_offset: bool) -> None:
    """In an hour with ten pauses the clocks stay in step, even if the host runs other things in between."""
    host.random = random.Random(seed)
    machine = Machine(host, [Vcpu(host, 10**12, has_tsc_offset=has_tsc_offset) for _ in range(2)])
    for vcpu in machine.vcpus:
        vcpu.set_timer(0, 0xFFFFFFFF, BY_16)
    before = machine.readings()
    for _ in range(10):
        host.now_ns += 10**8
        taken = machine.stop()
        host.now_ns += 360 * NS
        machine.go_on(taken)

    spans = [after - then for after, then in zip(machine.readings(), before, strict=True)]

    assert NS <= spans[1] < 4 * NS  # ten times 0.1 s, plus the time that the host took
    for span in spans if has_tsc_offset else spans[:2]:
        assert abs(span - spans[1]) < 10 * (CLOSE_NS if span in spans[:4] else SLOW_NS)


class LateVcpu(Vcpu):
    """A vCPU whose host notices late that the timer was due.  Until then it returns a present count of 0."""

    notices_ns = 0

    def get_lapic(self) -> bytes:
        """Return the registers, with a present count of 0 until the host has noticed."""
        timer = ApicTimer(super().get_lapic())
        if self.target_ns <= self.host.now_ns < self.notices_ns:
            timer[LAPIC_CURRENT] = 0
        return bytes(timer.page)


@pytest.mark.parametrize(("late_ns", "lost"), [(LATE_NS, False), (1 << 62, True)])
def test_a_timer_whose_host_is_late(host: Host, late_ns: int, lost: bool) -> None:
    """We wait until the host notices.  If it never does, because only the vCPU would notice, a new period begins."""
    host.busy = 0.0
    vcpu = LateVcpu(host, 0)
    vcpu.set_timer(TIMER_PERIODIC, 10_000_000)
    machine = Machine(host, [vcpu])
    host.now_ns = vcpu.target_ns + 2_000_000
    vcpu.notices_ns = host.now_ns + late_ns
    before = host.now_ns - vcpu.target_ns

    taken = machine.stop()
    stopped_ns = host.now_ns
    machine.go_on(taken)

    spent_ns = host.now_ns - stopped_ns
    phase_ns = (host.now_ns - vcpu.target_ns - before) % 10_000_000
    assert (min(phase_ns, 10_000_000 - phase_ns) > 1_000_000 + spent_ns) is lost


class SlowVcpu(Vcpu):
    """A vCPU whose host runs something else before it sets the timer, `slow` times."""

    slow = 0

    def set_lapic(self, page: bytes) -> None:
        """Set the registers, perhaps late."""
        if self.slow:
            self.slow -= 1
            self.host.now_ns += SLOW_NS
        super().set_lapic(page)


@pytest.mark.parametrize("slow", [0, 1, 3])
def test_a_timer_that_is_set_late_is_set_again(host: Host, slow: int) -> None:
    """It goes on with the other clocks."""
    host.busy = 0
    vcpu = SlowVcpu(host, 0)
    vcpu.set_timer(0, NS)
    machine = Machine(host, [vcpu])
    _, clock_ns, _, timer_ns = machine.readings()
    taken = machine.stop()
    host.now_ns += 360 * NS
    vcpu.slow = slow
    machine.go_on(taken)
    _, now_ns, _, left_ns = machine.readings()
    assert vcpu.slow == 0
    assert abs((left_ns - timer_ns) - (now_ns - clock_ns)) < CLOSE_NS


class SlowKvm(Kvm):
    """A KVM whose host runs something else before it sets kvmclock."""

    def set_clock(self, clock_ns: int) -> None:
        """Set kvmclock, late."""
        self.host.now_ns += SLOW_NS
        super().set_clock(clock_ns)


def test_kvmclock_is_set_again_if_it_is_wrong(host: Host) -> None:
    """The time that the host takes for that is added."""
    host.busy = 0
    machine = Machine(host, [Vcpu(host, 0)])
    machine.kvm = SlowKvm(host)
    kvmclock_ns, clock_ns, *_ = machine.readings()
    machine.go_on(machine.stop())
    later_ns, now_ns, *_ = machine.readings()
    assert abs((later_ns - kvmclock_ns) - (now_ns - clock_ns)) < CLOSE_NS


def test_processors_stay_in_step(host: Host) -> None:
    """Equal TSCs stay equal, to the tick.  Different TSCs keep their difference."""
    machine = Machine(host, [Vcpu(host, 500), Vcpu(host, 500), Vcpu(host, 500 + KHZ * 1000)])
    for _ in range(50):
        machine.go_on(machine.stop())
    first, second, third = (vcpu.offset for vcpu in machine.vcpus)
    assert first == second
    assert abs(third - first - KHZ * 1000) < 50 * CLOSE_NS * KHZ // 10**6


def test_a_stopped_tsc_has_the_value_of_the_last_exit(host: Host) -> None:
    """KVM stops the TSC of a vCPU at its last exit if the host's TSC is unstable."""
    machine = Machine(host, [Vcpu(host, 0, stale=True)])
    left_ns = host.now_ns
    taken = machine.stop()
    moment_ns = left_ns + round(machine.clock.now_s() * NS)
    expected = 12345 + moment_ns * KHZ // 10**6
    assert abs(taken.vcpus[0].tsc - expected) < KHZ * CLOSE_NS // 10**6


def test_no_timer_interrupts_a_paused_machine(host: Host) -> None:
    """The timers of KVM are stopped during the pause.  Afterwards they run with the same registers."""
    machine = Machine(host, [Vcpu(host, 0)])
    vcpu = machine.vcpus[0]
    vcpu.set_timer(TIMER_PERIODIC, 10**7)
    vcpu.deadline = 10**10

    taken = machine.stop()

    assert ApicTimer(vcpu.page)[LAPIC_INITIAL] == 0
    assert vcpu.deadline == 0
    assert [pit.channels[0].mode for pit in machine.kvm.pits] == [PIT_STOPPED] * 2
    machine.go_on(taken)
    assert ApicTimer(vcpu.page)[LAPIC_INITIAL] == 10**7
    assert ApicTimer(vcpu.page)[LAPIC_TIMER] == TIMER_PERIODIC | VECTOR
    assert vcpu.deadline == 10**10
    assert [pit.channels[0].mode for pit in machine.kvm.pits] == [PIT_STOPPED, PIT_STOPPED, 0]


def test_an_interrupt_that_became_pending_in_a_pause_stays_pending(host: Host) -> None:
    """An example is the interrupt of vmmci, if the host's clock was set during a pause."""
    machine = Machine(host, [Vcpu(host, 0)])
    machine.vcpus[0].set_timer(TIMER_PERIODIC, 10**9)
    taken = machine.stop()
    machine.vcpus[0].page[LAPIC_IRR] |= 4
    machine.go_on(taken)
    assert machine.vcpus[0].page[LAPIC_IRR] == 4


def pending(page: bytes | bytearray) -> bool:
    """Return whether the timer's interrupt is pending."""
    return bool(page[LAPIC_IRR + (VECTOR >> 5) * 16 + (VECTOR & 31) // 8] & 1 << (VECTOR & 7))


@pytest.mark.parametrize(("waited_ns", "due"), [(0, False), (4 * 10**6, False), (2 * 10**7, True)])
def test_a_tick_after_the_vcpu_has_left_is_not_lost(host: Host, waited_ns: int, due: bool) -> None:
    """KVM forgets such a tick when the registers are loaded.  It may come while the devices finish."""
    host.busy = 0
    machine = Machine(host, [Vcpu(host, 0)])
    vcpu = machine.vcpus[0]
    vcpu.set_timer(TIMER_PERIODIC, 10**7)
    host.now_ns += 1000
    asked_ns = host.now_ns
    threads = cast("Any", [Thread(vcpu)])
    host.now_ns += waited_ns
    taken = Clocks.take(cast("Any", machine.kvm), threads, machine.clock, asked_ns)
    taken.hold(cast("Any", machine.kvm), cast("Any", machine.vcpus))
    assert pending(taken.vcpus[0].put_into(bytes(vcpu.page))) == due
    machine.go_on(taken)
    assert pending(vcpu.page) == due


def page(mode: int, initial: int, current: int, *, divide: int = BY_1, spurious: int = LAPIC_ON) -> ApicTimer:
    """Return local APIC registers with this timer."""
    timer = ApicTimer(bytes(1024))
    timer[LAPIC_TIMER], timer[LAPIC_INITIAL], timer[LAPIC_CURRENT] = mode | VECTOR, initial, current
    timer[LAPIC_DIVIDE], timer[LAPIC_SPURIOUS] = divide, spurious
    return timer


def test_a_timer_that_does_not_run_is_not_overdue() -> None:
    """Its initial count is zero.  A one-shot timer is never overdue: KVM itself delivers its interrupt."""
    assert page(TIMER_PERIODIC, 1000, 0).overdue
    assert not page(TIMER_PERIODIC, 0, 0).overdue
    assert not page(0, 1000, 0).overdue
    assert not page(TIMER_PERIODIC, 1000, 1).overdue


@pytest.mark.parametrize(("mode", "current", "span_ns", "left", "due"), [
    (TIMER_PERIODIC, 600, 100, 500, False), (TIMER_PERIODIC, 600, 600, 1000, True),
    (TIMER_PERIODIC, 600, 601, 999, True), (TIMER_PERIODIC, 600, 2600, 1000, True), (0, 600, 100, 500, False),
    (0, 600, 600, 0, False), (0, 600, 5000, 0, False), (0, 0, 10, 0, False),
])  # fmt: skip
def test_time_passes_for_a_timer(mode: int, current: int, span_ns: int, left: int, due: bool) -> None:
    """KVM itself delivers the interrupt of a one-shot timer that has expired."""
    timer = page(mode, 1000, current)
    timer.advance(span_ns)
    assert (timer[LAPIC_CURRENT], pending(timer.page)) == (left, due)


@pytest.mark.parametrize(("mode", "current", "span_ns", "since_ns", "left", "due"), [
    (TIMER_PERIODIC, 600, 100, 0, 700, False), (TIMER_PERIODIC, 600, 100, 301, 700, True),
    (TIMER_PERIODIC, 600, 100, 300, 700, False), (TIMER_PERIODIC, 600, 500, 50, 100, False),
    (TIMER_PERIODIC, 0, 10, 0, 1000, True), (0, 600, 100, 10**6, 700, False), (0, 600, 500, 10**6, 1000, False),
    (0, 0, 10, 10**6, 0, False),
])  # fmt: skip
def test_a_timer_is_set_back(
    mode: int, current: int, span_ns: int, since_ns: int, left: int, due: bool
) -> None:
    """The result tells whether a periodic timer was due since then."""
    timer = page(mode, 1000, current)
    assert (timer.rewind(span_ns, since_ns), timer[LAPIC_CURRENT]) == (due and mode == TIMER_PERIODIC, left)


@pytest.mark.parametrize("code", range(16))
def test_divisors(code: int) -> None:
    """Bit 2 of the register has no meaning."""
    divisors = {0: 2, 1: 4, 2: 8, 3: 16, 8: 32, 9: 64, 10: 128, 11: 1}
    assert page(0, 1, 1, divide=code).tick_ns == divisors[code & 11]


@pytest.mark.parametrize("timer", [
    page(TIMER_PERIODIC | TIMER_MASKED, 10, 5), page(TIMER_PERIODIC, 10, 5, spurious=0xFF),
])  # fmt: skip
def test_a_timer_that_is_switched_off_does_not_interrupt(timer: ApicTimer) -> None:
    """The timer is masked, or its APIC is off."""
    timer.advance(100)
    assert not any(timer.page[LAPIC_IRR : LAPIC_IRR + 0x80])


def test_a_page_of_a_stream() -> None:
    """The timer goes on from the values in the page, and a page of random bytes does no harm."""
    for seed in range(200):
        raw = random.Random(seed).randbytes(1024)
        each = VcpuClocks.in_page(1, None, raw)
        now = each.put_into(raw, 12345)
        timer = ApicTimer(raw)
        assert (each.initial, each.current) == (timer[LAPIC_INITIAL], timer[LAPIC_CURRENT])
        assert len(now) == len(raw)


def test_counters_of_the_8254_that_count_once() -> None:
    """KVM counts from the time of setting, so the counters are set to the rest of their count, and to at least 1.

    The first counter stays as it is: KVM does not tell when it was loaded.
    """
    state = abi.kvm_pit_state2()
    for channel, count, mode, load_ns in ((0, 500, 0, 10**9), (1, 1000, 0, 10**9), (2, 0, 0, 10**9)):
        state.channels[channel].count, state.channels[channel].mode = count, mode
        state.channels[channel].count_load_time = load_ns

    def at(passed_ns: int) -> list[int]:
        raw = clocks._pit_at(abi.kvm_pit_state2.from_buffer_copy(bytes(state)), 10**9 + passed_ns)
        return [channel.count for channel in abi.kvm_pit_state2.from_buffer_copy(raw).channels]

    assert at(0) == [500, 1000, 0]
    assert at(100_000) == [500, 1000 - 119, 65536 - 119]
    assert at(10**9) == [500, 1, 1]
    state.channels[1].mode = 2
    assert at(100_000)[1] == 1000


def test_the_machines_own_clock(host: Host) -> None:
    """The clock starts at 0 and goes on from the value at which it stopped.  A second stop changes nothing."""
    clock = MachineClock(host.monotonic_ns)
    host.now_ns += 5 * NS
    assert clock.now_s() == 5.0
    clock.go_on(0)
    assert clock.now_s() == 5.0
    host.now_ns += 3 * NS
    clock.stop(host.now_ns - 2 * NS)
    assert clock.now_s() == 6.0
    host.now_ns += 100 * NS
    clock.stop()
    assert clock.now_s() == 6.0
    clock.go_on(host.now_ns)
    host.now_ns += NS
    assert clock.now_s() == 7.0
