"""The guest that reports all of its clocks (`guests/clocks`)."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support.daemon import DEADLINE_S, Attached, Daemon
from tests.support.guests import guest
from tests.support.transfers import from_file, move, to_file
from vmd.kvmapi.system import System
from vmd.vm.clocks import MSR_TSC, Sample

FIELD = re.compile(r"([a-z_]+)=(\d+)")
PM_HERTZ = 3579545
BEAT_NS = 10_000_000
PIT_NS = 11932 * 10**9 // 1193182
PERIODIC_NS = 500_000_000
ALIKE = 500e-6  # the largest difference of the rates of a host's clocks: the limit of adjtimex(2)
STOP_CALLS = 20  # the error of stopping and setting all clocks in turn, in KVM requests
RTC_EPOCH_S = 946684800  # 2000-01-01


class Clocks(NamedTuple):
    """One report of the guest."""

    tsc: int
    kvmclock: int  # ns
    pm: int  # 24 bits, 3 579 545 Hz
    beats: int  # 100 Hz
    rtc: int  # seconds
    up: int  # tsc when the guest came up
    # Recorded guests do not report these:
    lost: int = 0  # model-specific registers that have lost the value that the guest wrote when it came up
    tsc_to: int = 0
    timer: int = 0  # pm with 32 bits, read between two readings of kvmclock
    timer_from: int = 0
    timer_to: int = 0
    left: int = 0  # ns to the next beat, read between two readings of kvmclock
    left_from: int = 0
    left_to: int = 0
    pit: int = 0  # interrupts
    periodic: int = 0  # interrupts of the rtc
    began: int = 0  # kvmclock when beats, pit and periodic began to count
    held: int = 0  # ns for which the guest last held the rtc
    skew: int = 0  # how often another processor's tsc was not between two readings of this one's
    asked_s: float = 0.0  # the host's clock before and after the question
    said_s: float = 0.0

    @classmethod
    def ask(cls, console: Attached, line: str = "") -> "Clocks":
        """Have the guest report once; the line `s` makes it hold its battery-backed clock first, `c` release it."""
        asked_s = time.time()
        console.type(f"{line}\r")
        console.expect("tsc=", DEADLINE_S)
        at = console.seen - len("tsc=")
        console.expect("\r\n", DEADLINE_S)
        said = console.said[at : console.seen].decode()
        fields = {name: int(number) for name, number in FIELD.findall(said)}
        return cls(**fields)._replace(asked_s=asked_s, said_s=time.time())

    @classmethod
    def ask_until(cls, console: Attached, enough: "Callable[[Clocks], bool]") -> "Clocks":
        """Have the guest report until `enough` is true of a report; return that report."""
        deadline = time.monotonic() + DEADLINE_S
        while not enough(now := cls.ask(console)):
            assert time.monotonic() < deadline, f"not enough after {DEADLINE_S} s: {now}"
        return now

    @classmethod
    def ask_at_rest(cls, console: Attached) -> "Clocks":
        """Have the guest report until the report gives an exact position in the local APIC timer's period.

        The timer does not count while the host delivers its interrupt late.  A guest that its host interrupted during
        the reading does not know the time of the reading.
        """
        return cls.ask_until(console, lambda now: now.left > 0 and now.left_to - now.left_from < BEAT_NS // 4)


class Host(NamedTuple):
    """The capabilities of a host's KVM."""

    sets_tsc: bool  # KVM can give a guest its own TSC, which it cannot without hardware support
    tsc_khz: int
    call_ns: int  # time of one KVM request

    @classmethod
    def here(cls) -> "Host":
        """Return the capabilities of this host."""
        with System(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)) as system, system.create_vm() as vm:
            vm.create_irqchip()
            with vm.create_vcpu(0) as vcpu:
                before = vcpu.get_msrs((MSR_TSC,))[MSR_TSC]
                vcpu.set_tsc_offset(1 << 60)
                sets_tsc = vcpu.get_msrs((MSR_TSC,))[MSR_TSC] - before > 1 << 59
                call_ns = min(Sample(lambda: vcpu.get_msrs((MSR_TSC,))[MSR_TSC]).width_ns for _ in range(10))
                return cls(sets_tsc, vcpu.get_tsc_khz(), call_ns)


class Watch:
    """Compares the clocks of a guest with one another and with the host's, from one report to the next.

    The allowed difference is the sum of three times: the time that the guest needed to read the clocks, which it
    reports; the drift that ALIKE allows; and STOP_CALLS requests to KVM for each stop of the machine.
    """

    def __init__(self, first: Clocks) -> None:
        self.last = first
        self.host = Host.here()
        self.holding = False
        self.held_least_s = self.held_most_s = 0  # seconds for which the guest held its rtc
        self.stops = 0

    def check(self, now: Clocks, paused_s: float, stops: int) -> None:
        """Raise AssertionError unless all clocks agree.

        Since the last report the machine was stopped `stops` times, for at least `paused_s` seconds in all.
        """
        last, self.last = self.last, now
        self.stops += stops
        ran_ns = now.kvmclock - last.kvmclock
        host_ns = (now.said_s - last.asked_s - paused_s) * 1e9
        assert 0 < ran_ns <= host_ns * (1 + ALIKE), f"ran {ran_ns} ns, the host {host_ns} ns"
        slack_ns = stops * STOP_CALLS * self.host.call_ns + ALIKE * ran_ns

        timer_ns = (now.timer - last.timer) % (1 << 32) * 10**9 // PM_HERTZ
        self._alike("ACPI timer", timer_ns, last.timer_from, last.timer_to, now.timer_from, now.timer_to, slack_ns)

        # The report gives the position of the local APIC timer in its period.  When the host is too busy, KVM drops
        # beats and begins a new period, so the position can be checked only when no beat was missed.
        least_ns, most_ns = now.left_from - last.left_to - slack_ns, now.left_to - last.left_from + slack_ns
        span_ns = most_ns - least_ns
        assert span_ns < BEAT_NS * 9 // 10, f"too slow to tell: {span_ns} ns"
        phase_ns = (last.left - now.left - least_ns) % BEAT_NS
        missed = (ran_ns - last.left + BEAT_NS // 10) // BEAT_NS + 1 - (now.beats - last.beats)
        assert phase_ns <= span_ns or missed > 0, f"local APIC timer {phase_ns} ns, of {span_ns}"

        tsc_ns = (now.tsc - last.tsc) * 10**6 // self.host.tsc_khz
        width_ns = (now.tsc_to - now.tsc + last.tsc_to - last.tsc) * 10**6 // self.host.tsc_khz
        if self.host.sets_tsc:
            assert abs(tsc_ns - ran_ns) <= width_ns + slack_ns, f"TSC {tsc_ns} ns, kvmclock {ran_ns} ns"
        else:
            host_ns += paused_s * 1e9
            assert ran_ns + paused_s * 1e9 - slack_ns - width_ns <= tsc_ns <= host_ns * (1 + ALIKE) + slack_ns
        assert now.skew == 0
        assert now.lost == 0

        all_ns = now.kvmclock - now.began
        for name, count, period_ns in (
            ("beats", now.beats, BEAT_NS), ("8254", now.pit, PIT_NS), ("rtc", now.periodic, PERIODIC_NS),
        ):  # fmt: skip
            # Interrupts may be missing, as on a busy host, but there must not be too many.  One may have been latched
            # in the 8259 before the count began.
            assert count <= all_ns * (1 + ALIKE) // period_ns + 2, f"{count} interrupts of {name} in {all_ns} ns"
        if not self.holding:
            least_s = int(now.asked_s) - self.held_most_s - RTC_EPOCH_S
            most_s = int(now.said_s) - self.held_least_s - RTC_EPOCH_S
            assert least_s <= now.rtc <= most_s, f"rtc {now.rtc}, not {least_s} to {most_s}"

    @staticmethod
    def _alike(name: str, ns: int, last_from: int, last_to: int, now_from: int, now_to: int, slack_ns: float) -> None:
        """Compare an interval of one clock with the bounds from the reference clock."""
        least_ns, most_ns = now_from - last_to - slack_ns, now_to - last_from + slack_ns
        assert least_ns <= ns <= most_ns, f"{name} {ns} ns, not {least_ns} to {most_ns}"

    def hold(self, console: Attached) -> None:
        """Have the guest hold its rtc."""
        self.holding = True
        Clocks.ask(console, "s")
        self.check(Clocks.ask_at_rest(console), 0, 0)

    def release(self, console: Attached, paused_s: float, stops: int) -> None:
        """Have the guest release its rtc, and check.  `paused_s` and `stops` count since `hold`."""
        held_s = Clocks.ask(console, "c").held // 10**9
        self.holding = False
        self.held_least_s += held_s
        self.held_most_s += held_s + 1
        self.check(Clocks.ask_at_rest(console), paused_s, stops)


class Session:
    """A guest with clocks, and the steps that stop or move it.  Each step adds to `stops` and `paused_s`."""

    def __init__(self, vmd: Daemon) -> None:
        self.vmd = vmd
        self.name, self.other = "a", "elsewhere"
        self.stops = 0
        self.paused_s = 0.0
        vmd.must("start", "a")
        with vmd.console("a") as console:
            console.expect("clocks: ready\r\n", DEADLINE_S)
            self.watch = Watch(Clocks.ask_at_rest(console))

    def dwell(self, seconds: float) -> None:
        """Let a paused machine stay paused for a while."""
        began_s = time.monotonic()
        while time.monotonic() < began_s + seconds:
            self.vmd.must("status")
        self.paused_s += time.monotonic() - began_s

    def pause(self, seconds: float) -> None:
        """Pause and unpause."""
        self.vmd.must("pause", self.name)
        self.dwell(seconds)
        self.vmd.must("unpause", self.name)
        self.stops += 1

    def move(self, _seconds: float) -> None:
        """Send and receive."""
        move(self.vmd, self.name, self.other)
        self.name, self.other = self.other, self.name
        self.stops += 1

    def pause_and_move(self, seconds: float) -> None:
        """Pause, send and receive."""
        self.vmd.must("pause", self.name)
        self.dwell(seconds)
        self.move(seconds)

    def move_and_unpause(self, seconds: float) -> None:
        """Send, receive -p and unpause."""
        move(self.vmd, self.name, self.other, receive=("-p",))
        self.name, self.other = self.other, self.name
        self.dwell(seconds)
        self.vmd.must("unpause", self.name)
        self.stops += 1

    def chain(self, seconds: float) -> None:
        """Pause, send, receive -p, send and receive, pause, unpause.  The guest first runs after the last receive."""
        self.vmd.must("pause", self.name)
        self.dwell(seconds)
        self.move_and_stay(seconds)
        self.move_and_stay(seconds)
        self.move(seconds)
        self.pause(seconds)

    def move_and_stay(self, seconds: float) -> None:
        """Send and receive -p."""
        move(self.vmd, self.name, self.other, receive=("-p",))
        self.name, self.other = self.other, self.name
        self.dwell(seconds)

    def snapshot(self, seconds: float) -> None:
        """Send -k, stop the VM, and receive it some time later.  The guest continues from the moment of the send."""
        path = self.vmd.directory / "stream"
        to_file(self.vmd, self.name, path, "-k")
        self.vmd.must("stop", "-fw", self.name)
        self.dwell(seconds)
        status, said = from_file(self.vmd, self.other, path)
        assert status == 0, said
        self.name, self.other = self.other, self.name
        self.stops += 1

    def do(self, step: Callable[[float], None], seconds: float, *, hold: bool = False) -> None:
        """Do a step, then compare the clocks.  With `hold` the guest holds its battery-backed clock during the step."""
        if hold:
            with self.vmd.console(self.name) as console:
                self.watch.hold(console)
        self.stops, self.paused_s = 0, 0.0
        step(seconds)
        with self.vmd.console(self.name) as console:
            if hold:
                self.watch.release(console, self.paused_s, self.stops)
            else:
                self.watch.check(Clocks.ask_at_rest(console), self.paused_s, self.stops)
        print(f"{step.__name__} {seconds} s, hold {hold}: {self.watch.last}")

    def stop_in_every_way(self) -> None:
        """Do every step at least once, alone or as part of another."""
        self.do(self.pause, 2.2, hold=True)
        self.do(self.pause_and_move, 0.3)
        self.do(self.chain, 0.1, hold=True)
        self.do(self.snapshot, 0.0)

    def steps(self) -> list[Callable[[float], None]]:
        """Return all steps."""
        return [self.pause, self.move, self.pause_and_move, self.move_and_unpause, self.chain, self.snapshot]


def daemon(tmp_path: Path, *lines: str) -> Daemon:
    """Return a daemon with the `clocks` guest."""
    options = ("disable", "memory 64M", f'boot "{guest("clocks")}"', *lines)
    return Daemon(tmp_path, 'vm "a" {\n' + "\n".join(options) + "\n}\n")
