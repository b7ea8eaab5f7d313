"""The real-time clock and its battery-backed memory: a Motorola MC146818A as a PC wires it, 128 bytes.

Time is not counted.  It is computed from the host's clock at each access, and a guest that sets the clock changes an
offset.  Timers run only while an interrupt is enabled.  The periodic timer stops until the guest has acknowledged the
last tick, so the work of the host is bounded by the work of the guest.

The date goes on while the machine is paused or on its way to another host, as a clock with a battery does.  After a
pause of 3 s it is 3 s further, and its difference to the host's clock is the same.  While the guest holds the clock,
by SET or by the divider, its registers do not change, also during a pause.  But only the time for which the guest ran
counts as held.  For example, a guest begins to set the clock, is paused for 3 s, and ends setting it: the clock is then
3 s ahead of what the guest has written, so no part of the pause is lost.  A change of the host's clock counts in the
same way.  Alarms and the end of an update that were due during a pause come when the machine goes on.  The periodic
interrupt counts the time of the machine, and goes on within its period.

Section names are those of the MC146818A data sheet.

Unlike vmd, this clock has binary and 12-hour mode, alarm and update-ended interrupts, and a guest can set it.
"""

import time

from vmd import threads
from vmd.units import DAY_S, KIB, MIB
from vmd.vm import layout
from vmd.vm.chips.wakeup import Wakeup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.vm.chips.wakeup import Schedule

CMOS_BYTES = 128

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
WEEKDAY, DAY, MONTH, YEAR = range(6, 10)
REG_A, REG_B, REG_C, REG_D = range(10, 14)
CENTURY = 0x32  # named by the FADT's field CENTURY
CENTURY_PS2 = 0x37
TIME_REGISTERS = frozenset((SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY, CENTURY_PS2))

A_UIP = 0x80
A_DIVIDER = 0x70
A_DIVIDER_RESET = 0x60  # 110 and 111 hold the divider chain
A_RATE = 0x0F
B_SET = 0x80
B_PIE = 0x40
B_AIE = 0x20
B_UIE = 0x10
B_BINARY = 0x04
B_24H = 0x02
C_IRQF = 0x80
C_PF = 0x40
C_AF = 0x20
C_UF = 0x10
C_FLAGS = C_PF | C_AF | C_UF
D_VALID = 0x80  # the battery is good

PM = 0x80  # bit in the hours of 12-hour mode
ANY = 0xC0  # from this value on, an alarm register matches everything

OSCILLATOR_HZ = 32768
# "Update cycle": UIP rises 244 us before it and it takes 1984 us.  The new second shows as UIP falls.
UPDATE_S = (244 + 1984) / 1e6
DIVIDER_RELEASE_S = 0.5  # the fraction of the second at which the clock starts when the divider is released

CATCH_UP_S = 0.05  # missed periodic ticks are made up for no longer than this
ROUNDING_S = 1e-6
WAIT_MAX_S = 60.0  # longest wait before the next look at the clock: the host's may have been set, or the host slept

YEAR_MAX = 9999
SPAN_MAX_S = (YEAR_MAX + 1) * 366 * DAY_S  # bound of the difference between any two times of the clock

# CMOS bytes in which SeaBIOS and boot loaders look for memory sizes and other facts about the machine
CMOS_EQUIPMENT = 0x14
CMOS_BASE_KIB = 0x15
CMOS_EXTENDED_KIB = 0x17
CMOS_EXTENDED_KIB_FOUND = 0x30
CMOS_ABOVE_16M = 0x34  # in 64 KiB
CMOS_BOOT_THIRD = 0x38  # high nibble
CMOS_BOOT_ORDER = 0x3D  # first device low nibble, second high
CMOS_ABOVE_4G = 0x5B  # three bytes, in 64 KiB
CMOS_EXTRA_CPUS = 0x5F

EQUIPMENT_FPU = 0x02
BOOT_DISK, BOOT_CDROM, BOOT_NET = 2, 3, 4  # numbers of SeaBIOS, which uses them if there is no `bootorder` file


class Mc146818:
    """The clock of one VM, at ports 70h (index) and 71h (data).

    `irq(level)` is called for every change of the line, in order.  `now()` is the host's UTC in seconds since 1970.
    `monotonic()` is the machine's time, which stops while it is paused, and by which the periodic interrupt runs.
    For `schedule` see `wakeup`.
    """

    pio_width = 1

    def __init__(
        self,
        irq: "Callable[[bool], None]",
        now: "Callable[[], float]",
        schedule: "Schedule",
        memory_bytes: int,
        vcpus: int,
        monotonic: "Callable[[], float]" = time.monotonic,
    ) -> None:
        self._irq = irq
        self._now = now
        self._monotonic = monotonic
        self._lock = threads.Lock()
        self._index = 0
        self._offset_s = 0.0  # guest time minus host time
        self._held_s = 0.0  # host time minus machine time, at the moment at which the guest stopped the clock
        self._written_day: int | None = None  # the guest day on which date registers of the running clock were written
        self._weekday_shift = 0  # the weekday is a counter of its own: a guest may set it to any day
        self._flags = 0  # register C without IRQF
        self._level = False
        self._seen_s = 0  # the guest second up to which update and alarm flags have been set
        self._tick_s = 0.0  # when the periodic flag was last due, by the monotonic clock
        self._clock_wakeup = Wakeup(schedule, monotonic, self._lock, self._on_clock)
        self._tick_wakeup = Wakeup(schedule, monotonic, self._lock, self._on_tick)
        # While the clock is stopped, this also has the time registers.  While it runs, they are computed.
        self._ram = bytearray(CMOS_BYTES)
        self._ram[REG_A] = 0x26  # 32.768 kHz, 1024 Hz: what a BIOS leaves
        self._ram[REG_B] = B_24H
        self._describe_machine(memory_bytes, vcpus)
        self._seen_s = self._second()
        self._tick_s = monotonic()

    def _describe_machine(self, memory_bytes: int, vcpus: int) -> None:
        low = layout.low_ram_bytes(memory_bytes)
        extended_kib = min(max(low - MIB, 0) // KIB, 0xFFFF)
        ram = self._ram
        ram[CMOS_EQUIPMENT] = EQUIPMENT_FPU
        for at, size, value in (
            (CMOS_BASE_KIB, 2, layout.LOW_RAM_END // KIB),
            (CMOS_EXTENDED_KIB, 2, extended_kib),
            (CMOS_EXTENDED_KIB_FOUND, 2, extended_kib),
            (CMOS_ABOVE_16M, 2, max(low - 16 * MIB, 0) >> 16),
            (CMOS_ABOVE_4G, 3, min(memory_bytes - low >> 16, 0xFFFFFF)),
            (CMOS_EXTRA_CPUS, 1, vcpus - 1),
        ):
            ram[at : at + size] = value.to_bytes(size, "little")
        ram[CMOS_BOOT_ORDER] = BOOT_CDROM << 4 | BOOT_DISK
        ram[CMOS_BOOT_THIRD] = BOOT_NET << 4

    # ---- ports

    def pio_read(self, offset: int, size: int) -> int:
        """Read the register that port 70h selects.  Port 70h itself is write-only."""
        if offset == 0:
            return 0xFF
        with self._lock:
            index = self._index
            if index in TIME_REGISTERS and not self._stopped():
                return self._encode()[index]
            if index == REG_A:
                return self._ram[REG_A] | (A_UIP if self._updating() else 0)
            if index == REG_C:
                return self._read_c()
            if index == REG_D:
                return D_VALID
            return self._ram[index]

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Select a register, or write the selected one.  Bit 7 of the index, the NMI mask, is ignored."""
        if offset == 0:
            self._index = value & 0x7F
            return
        with self._lock:
            index = self._index
            if index in TIME_REGISTERS:
                self._write_time(index, value)
            elif index == REG_A:
                self._write_a(value)
            elif index == REG_B:
                self._write_b(value)
            elif index in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
                self._look_at_clock()  # the old alarm counts until now
                self._ram[index] = value
                self._arm_clock()
                self._update_irq()
            elif index not in (REG_C, REG_D):
                self._ram[index] = value

    # ---- send and receive

    def state(self) -> dict[str, int | bytes]:
        """Return the state, for `restore`.  It includes the offset, so a clock that was set stays set."""
        with self._lock:
            return {
                "index": self._index,
                "ram": bytes(self._ram),
                "flags": self._flags,
                "offset_us": round(self._offset_s * 1e6),
                "weekday_shift": self._weekday_shift,
                "seen_s": self._seen_s,
                "tick_us": round((self._monotonic() - self._tick_s) * 1e6),  # time since the last tick
                "held_us": round(self._host_s() * 1e6),
            }

    def restore(self, state: "dict[str, int | bytes]") -> None:
        """Continue from a saved state.  The clock shows the present time.

        `seen_s`, `tick_us` and `held_us` came with version 3 of the stream, and may be missing.

        Raises:
            KeyError, TypeError, ValueError: this is not the state of a clock.
        """
        ram = bytes(state["ram"])
        number = {name: int(value) for name, value in state.items() if name != "ram"}
        if len(ram) != CMOS_BYTES:
            raise ValueError(f"clock: memory of {len(ram)} bytes")
        if abs(number["offset_us"]) > SPAN_MAX_S * 10**6:
            raise ValueError(f"clock: offset of {number['offset_us']} microseconds")
        for name, most in (("seen_s", SPAN_MAX_S), ("tick_us", SPAN_MAX_S * 10**6), ("held_us", SPAN_MAX_S * 10**6)):
            if abs(number.get(name, 0)) > most:
                raise ValueError(f"clock: {name} of {number[name]}")
        with self._lock:
            self._index = number["index"] & 0x7F
            self._ram[:] = ram
            self._ram[REG_A] &= ~A_UIP
            self._flags = number["flags"] & C_FLAGS
            self._offset_s = number["offset_us"] / 1e6
            self._weekday_shift = number["weekday_shift"] % 7
            self._held_s = number.get("held_us", round(self._now() * 1e6)) / 1e6 - self._monotonic()
            self._seen_s = number.get("seen_s", self._second())
            self._tick_s = self._monotonic() - max(number.get("tick_us", 0), 0) / 1e6
            self._arm_clock()
            self._arm_tick()
            self._update_irq()

    # ---- time

    def _stopped(self) -> bool:
        return bool(self._ram[REG_B] & B_SET) or self._ram[REG_A] & A_DIVIDER >= A_DIVIDER_RESET

    def _host_s(self) -> float:
        """Return the host's time.  While the guest holds the clock, pauses since then do not count."""
        return self._monotonic() + self._held_s if self._stopped() else self._now()

    def _guest_s(self) -> float:
        return self._host_s() + self._offset_s

    def _second(self) -> int:
        return int(self._guest_s() // 1)

    def _updating(self) -> bool:
        return not self._stopped() and self._guest_s() % 1.0 >= 1.0 - UPDATE_S

    def _encode(self) -> dict[int, int]:
        """Return the present values of the time registers."""
        second = self._second()
        days, of_day = divmod(second, DAY_S)
        year, month, day = _date(days)
        year %= YEAR_MAX + 1
        century = self._from_number(year // 100)
        return {
            SECONDS: self._from_number(of_day % 60),
            MINUTES: self._from_number(of_day // 60 % 60),
            HOURS: self._from_hour(of_day // 3600),
            WEEKDAY: self._from_number((days + 4 + self._weekday_shift) % 7 + 1),  # day 0 was a Thursday
            DAY: self._from_number(day),
            MONTH: self._from_number(month),
            YEAR: self._from_number(year % 100),
            CENTURY: century,
            CENTURY_PS2: century,
        }

    def _decode(self) -> int:
        """Return the guest second that the time registers in `_ram` mean.

        An impossible date counts on: 31 February is the third day of March, or the second in a leap year.
        """
        ram = self._ram
        year = self._to_number(ram[CENTURY]) * 100 + self._to_number(ram[YEAR])
        days = _days(min(year, YEAR_MAX), self._to_number(ram[MONTH]), self._to_number(ram[DAY]))
        self._weekday_shift = (self._to_number(ram[WEEKDAY]) - 1 - (days + 4)) % 7
        of_day = self._to_hour(ram[HOURS]) * 3600 + self._to_number(ram[MINUTES]) * 60
        return days * DAY_S + of_day + self._to_number(ram[SECONDS])

    def _freeze(self) -> None:
        """Store the present time in the registers, because the clock stops or one of them is about to be written.

        A guest may write a date into the running clock register by register.  The date may be impossible in between,
        such as 31 February on the way to 31 March.  So, until the day ends, the date registers stay as written.
        """
        registers = self._encode()
        if self._written_day == self._second() // DAY_S:
            registers = {index: registers[index] for index in (SECONDS, MINUTES, HOURS)}
        for index, value in registers.items():
            self._ram[index] = value

    def _thaw(self, fraction_s: float, host_s: float) -> None:
        """Let the clock run on from its registers: at `host_s`, it is `fraction_s` after the second that they show."""
        shown_s = self._decode()
        self._offset_s = shown_s + fraction_s - host_s
        self._seen_s = shown_s

    def _write_time(self, index: int, value: int) -> None:
        running = not self._stopped()
        if running:
            host_s = self._now()
            fraction_s = (host_s + self._offset_s) % 1.0
            self._freeze()
        self._ram[index] = value
        if index == CENTURY:
            self._ram[CENTURY_PS2] = value
        elif index == CENTURY_PS2:
            self._ram[CENTURY] = value
        if running:
            self._thaw(fraction_s, host_s)
            self._written_day = self._seen_s // DAY_S
            self._arm_clock()

    def _write_a(self, value: int) -> None:
        if (value ^ self._ram[REG_A]) & A_RATE:
            self._tick_s = self._monotonic()
        self._change_run_state(REG_A, value & ~A_UIP, DIVIDER_RELEASE_S)

    def _write_b(self, value: int) -> None:
        if value & B_SET:
            value &= ~B_UIE  # "Register B": SET clears UIE
        if value & ~self._ram[REG_B] & B_PIE:
            self._tick_s = self._monotonic()
        # SET does not stop the divider, so the clock keeps its fraction of the second.
        self._change_run_state(REG_B, value, self._guest_s() % 1.0)

    def _change_run_state(self, register: int, value: int, resume_at_s: float) -> None:
        stopped, host_s = self._stopped(), self._host_s()
        if not stopped:
            self._look_at_clock()
            self._written_day = None
            old, self._ram[register] = self._ram[register], value
            if self._stopped():
                self._ram[register] = old  # the time is stored in the format that was set before this write
                self._freeze()
                self._held_s = host_s - self._monotonic()
        self._ram[register] = value
        if stopped and not self._stopped():
            self._thaw(resume_at_s, host_s)
        self._arm_clock()
        self._arm_tick()
        self._update_irq()

    # ---- the number format that the guest has set

    def _from_number(self, number: int) -> int:
        if self._ram[REG_B] & B_BINARY:
            return number
        return number // 10 << 4 | number % 10

    def _to_number(self, value: int) -> int:
        if self._ram[REG_B] & B_BINARY:
            return value
        return (value >> 4) * 10 + (value & 0x0F)

    def _from_hour(self, hour: int) -> int:
        if self._ram[REG_B] & B_24H:
            return self._from_number(hour)
        return self._from_number(hour % 12 or 12) | (PM if hour >= 12 else 0)

    def _to_hour(self, value: int) -> int:
        if self._ram[REG_B] & B_24H:
            return self._to_number(value)
        return self._to_number(value & ~PM) % 12 + (12 if value & PM else 0)

    # ---- interrupts

    def _read_c(self) -> int:
        self._look_at_clock()
        period_s = self._period_s()
        if period_s and not self._ram[REG_B] & B_PIE:  # no timer runs: the guest may poll the flag
            periods = int((self._monotonic() - self._tick_s) // period_s)
            if periods > 0:
                self._flags |= C_PF
                self._tick_s += periods * period_s
        flags = self._flags
        value = flags | (C_IRQF if flags & self._ram[REG_B] & C_FLAGS else 0)
        self._flags = 0
        self._update_irq()
        self._arm_tick()
        return value

    def _look_at_clock(self) -> None:
        """Set the update and alarm flags for the time since the last look."""
        if self._stopped():
            return
        second = self._second()
        if second == self._seen_s:
            return
        self._flags |= C_UF
        alarm = self._next_alarm(self._seen_s)
        if alarm is not None and alarm <= second:
            self._flags |= C_AF
        self._seen_s = second

    def _next_alarm(self, after: int) -> int | None:
        """Return the first second after `after` that matches the alarm registers, or None if no second does."""
        ram = self._ram
        hours = range(24) if ram[HOURS_ALARM] >= ANY else (self._to_hour(ram[HOURS_ALARM]),)
        minutes = range(60) if ram[MINUTES_ALARM] >= ANY else (self._to_number(ram[MINUTES_ALARM]),)
        seconds = range(60) if ram[SECONDS_ALARM] >= ANY else (self._to_number(ram[SECONDS_ALARM]),)
        if hours[0] > 23 or minutes[0] > 59 or seconds[0] > 59:
            return None
        midnight = after - after % DAY_S
        # An hour or minute that is over is skipped as a whole.
        for day in (midnight, midnight + DAY_S):
            for hour in hours:
                at_hour = day + hour * 3600
                if at_hour + 3599 <= after:
                    continue
                for minute in minutes:
                    at_minute = at_hour + minute * 60
                    if at_minute + 59 <= after:
                        continue
                    for second in seconds:
                        if at_minute + second > after:
                            return at_minute + second
        return None

    def _period_s(self) -> float:
        """Return the period of the periodic flag, or 0.0 for none (table "Periodic interrupt rate")."""
        rate = self._ram[REG_A] & A_RATE
        if rate == 0 or self._ram[REG_A] & A_DIVIDER >= A_DIVIDER_RESET:
            return 0.0
        if rate < 3:  # with a 32.768 kHz oscillator the two fastest rates wrap round
            rate += 7
        return (1 << rate - 1) / OSCILLATOR_HZ

    def _tick(self) -> None:
        """Set the periodic flag, and note when it was due, so that the next tick is not late, too."""
        now_s = self._monotonic()
        period_s = self._period_s()
        self._flags |= C_PF
        self._tick_s += period_s
        if self._tick_s < now_s - max(CATCH_UP_S, period_s):
            self._tick_s = now_s

    def _update_irq(self) -> None:
        level = bool(self._flags & self._ram[REG_B] & C_FLAGS)
        if level != self._level:
            self._level = level
            self._irq(level)

    # ---- timers

    def _arm_clock(self) -> None:
        """Arrange a look at the clock for the next update or alarm that interrupts."""
        enabled = self._ram[REG_B] & (B_UIE | B_AIE)
        if not enabled or self._stopped():
            return
        due: int | None = self._seen_s + 1
        if not enabled & B_UIE:
            due = self._next_alarm(self._seen_s)
        if due is not None:
            self._clock_wakeup.within(min(due - self._guest_s(), WAIT_MAX_S))

    def _on_clock(self) -> None:
        self._look_at_clock()
        self._update_irq()
        self._arm_clock()

    def _arm_tick(self) -> None:
        """Arrange the next periodic interrupt, unless the guest has not acknowledged the last one yet."""
        period_s = self._period_s()
        if period_s and self._ram[REG_B] & B_PIE and not self._flags & C_PF:
            self._tick_wakeup.within(self._tick_s + period_s - self._monotonic())

    def _on_tick(self) -> None:
        period_s = self._period_s()
        if not period_s or not self._ram[REG_B] & B_PIE:
            return
        if self._monotonic() < self._tick_s + period_s - ROUNDING_S:
            self._arm_tick()  # too early: the guest has changed the rate since this call was arranged
            return
        self._tick()
        self._update_irq()


def _days(year: int, month: int, day: int) -> int:
    """Return the days from 1970 to a date of the Gregorian calendar.  Months and days out of range count on."""
    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    # Years begin in March here, so that the leap day comes last.
    year -= month < 3
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return year * 365 + year // 4 - year // 100 + year // 400 + of_year - 719468


def _date(days: int) -> tuple[int, int, int]:
    """Return (year, month, day) for a number of days since 1970: the inverse of `_days`."""
    eras, of_era = divmod(days + 719468, 146097)
    year = (of_era - of_era // 1460 + of_era // 36524 - of_era // 146096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    march_month = (5 * of_year + 2) // 153
    day = of_year - (153 * march_month + 2) // 5 + 1
    month = (march_month + 2) % 12 + 1
    return eras * 400 + year + (month < 3), month, day
