"""The clock chip, used as by BIOSes and operating systems, with a fake host clock and fake timers."""

import calendar
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmd.vm.chips.mc146818 import (
    CENTURY,
    CENTURY_PS2,
    DAY,
    HOURS,
    HOURS_ALARM,
    MINUTES,
    MINUTES_ALARM,
    MONTH,
    REG_A,
    REG_B,
    REG_C,
    REG_D,
    SECONDS,
    SECONDS_ALARM,
    WEEKDAY,
    YEAR,
    Mc146818,
)
from vmd.vm.chips.wakeup import EARLIEST_S

GIB = 1 << 30
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10


def utc(text: str) -> float:
    """Return seconds since 1970."""
    return calendar.timegm(time.strptime(text, "%Y-%m-%d %H:%M:%S"))


class Call:
    """A scheduled call."""

    def __init__(self, due_s: float, callback: object) -> None:
        self.due_s = due_s
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        """Do not make this call."""
        self.cancelled = True


class Board:
    """A clock chip on a fake host, whose time passes only in `advance`."""

    def __init__(self, now: str = "2024-02-28 23:59:50", memory_bytes: int = 512 << 20, vcpus: int = 1) -> None:
        self.now_s = utc(now)
        self.monotonic_s = 1000.0
        self.calls: list[Call] = []
        self.fired = 0
        self.levels: list[bool] = []
        self.rtc = Mc146818(
            self.levels.append,
            lambda: self.now_s,
            self.schedule,
            memory_bytes,
            vcpus,
            lambda: self.monotonic_s,
        )

    def schedule(self, seconds: float, callback: object) -> Call:
        """Record a call."""
        assert seconds >= EARLIEST_S
        call = Call(self.monotonic_s + seconds, callback)
        self.calls.append(call)
        return call

    def advance(self, seconds: float) -> None:
        """Let time pass, and make each due call at its time."""
        end_s = self.monotonic_s + seconds
        while True:
            self.calls = [call for call in self.calls if not call.cancelled]
            due = [call for call in self.calls if call.due_s <= end_s + 1e-9]
            if not due:
                break
            call = min(due, key=lambda call: call.due_s)
            self.calls.remove(call)
            self.now_s += max(0.0, call.due_s - self.monotonic_s)
            self.monotonic_s = max(self.monotonic_s, call.due_s)
            self.fired += 1
            assert callable(call.callback)
            call.callback()
        self.now_s += end_s - self.monotonic_s
        self.monotonic_s = end_s

    def line(self) -> bool:
        """Return the level of IRQ 8."""
        return bool(self.levels and self.levels[-1])

    def __getitem__(self, index: int) -> int:
        self.rtc.pio_write(0, 1, index | 0x80)
        return self.rtc.pio_read(1, 1)

    def __setitem__(self, index: int, value: int) -> None:
        self.rtc.pio_write(0, 1, index | 0x80)
        self.rtc.pio_write(1, 1, value)

    def date(self) -> tuple[int, ...]:
        """Return the time registers in BCD, from the century to the seconds."""
        return tuple(self[index] for index in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS))


@pytest.fixture
def board() -> Board:
    """Return a clock that shows ten seconds before a leap day."""
    return Board()


def test_time_is_read_in_bcd_and_24_hours_by_default(board: Board) -> None:
    """The time is the host's UTC, with leap days."""
    assert board.date() == (0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x50)
    assert board[WEEKDAY] == 4  # a Wednesday
    assert board[CENTURY_PS2] == 0x20
    board.advance(10)
    assert board.date() == (0x20, 0x24, 0x02, 0x29, 0x00, 0x00, 0x00)
    assert board[WEEKDAY] == 5


def test_registers_after_power_on(board: Board) -> None:
    """The oscillator runs, with 1024 Hz, and nothing interrupts.  Every alarm register is 0."""
    assert [board[register] for register in (REG_A, REG_B, REG_C, REG_D)] == [0x26, H24, 0, 0x80]
    assert [board[register] for register in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM)] == [0, 0, 0]
    assert (board[0x14], board[0x7F]) == (0x02, 0)
    assert (board.calls, board.levels) == ([], [])


@pytest.mark.parametrize(("hour", "shown"), [(0, 12), (1, 1), (11, 11), (12, 0x8C), (13, 0x81), (23, 0x8B)])
def test_binary_and_12_hour_mode(hour: int, shown: int) -> None:
    """Noon and midnight are shown as 12."""
    board = Board(f"2024-02-28 {hour:02}:59:50")
    board[REG_B] = BINARY
    assert board[HOURS] == shown
    assert board[SECONDS] == 50


def test_linux_reads_the_time_when_no_update_is_in_progress(board: Board) -> None:
    """UIP is set at the end of each second.  The new second is shown when it is cleared."""
    board.advance(0.9)
    assert not board[REG_A] & 0x80
    board.advance(0.099)
    assert board[REG_A] & 0x80
    assert board[SECONDS] == 0x50
    board.advance(0.001)
    assert not board[REG_A] & 0x80
    assert board[SECONDS] == 0x51


@pytest.mark.parametrize("mode", [H24, 0, H24 | BINARY, BINARY])
def test_clock_is_set_the_way_linux_does(board: Board, mode: int) -> None:
    """Linux sets SET, holds the divider, writes the registers, and undoes both.  The clock starts 0.5 s later."""
    board[REG_B] = mode
    board[REG_B] = mode | SET
    board[REG_A] = 0x76
    bcd = {YEAR: 0x99, CENTURY: 0x19, MONTH: 0x12, DAY: 0x31, HOURS: 0x23, MINUTES: 0x59, SECONDS: 0x58}
    for index, value in bcd.items():
        if index == HOURS and not mode & H24:
            value = 0x91 if not mode & BINARY else 0x80 | 11
        elif mode & BINARY:
            value = (value >> 4) * 10 + (value & 15)
        board[index] = value
    frozen = board.date()
    board.advance(5)
    assert board.date() == frozen
    board[REG_B] = mode
    board.advance(5)
    assert board.date() == frozen
    board[REG_A] = 0x26
    board.advance(0.49)
    assert board.date() == frozen
    board[REG_B] = H24
    board.advance(0.02)
    assert board.date() == (0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)
    board.advance(1.0)
    assert board.date() == (0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00)


def test_clock_can_be_set_while_it_runs(board: Board) -> None:
    """SeaBIOS's INT 1Ah does that.  The result is correct even if the date is impossible in between."""
    for index, value in ((YEAR, 0x23), (DAY, 0x31), (MONTH, 0x03), (CENTURY_PS2, 0x21), (HOURS, 0x07)):
        board[index] = value
    assert board.date() == (0x21, 0x23, 0x03, 0x31, 0x07, 0x59, 0x50)
    board[WEEKDAY] = 1
    assert board[WEEKDAY] == 1
    board.advance(86400)
    assert board.date() == (0x21, 0x23, 0x04, 0x01, 0x07, 0x59, 0x50)
    assert board[WEEKDAY] == 2


def test_impossible_date_becomes_a_later_one(board: Board) -> None:
    """31 February 2024 becomes 2 March."""
    board[REG_B] = H24 | SET
    board[DAY] = 0x31
    board[REG_B] = H24
    assert board.date() == (0x20, 0x24, 0x03, 0x02, 0x23, 0x59, 0x50)


def test_update_interrupt_comes_every_second(board: Board) -> None:
    """The interrupt stays until register C is read."""
    board[REG_A] = 0x20  # no periodic flag
    board[REG_B] = H24 | UIE
    board.advance(0.9)
    assert not board.line()
    board.advance(0.2)
    assert board.line()
    assert board[REG_C] == IRQF | UF
    assert not board.line()
    assert board[REG_C] == 0
    board.advance(1)
    assert board.line()
    board.advance(60)
    assert board.levels == [True, False, True]


def test_set_bit_disables_the_update_interrupt(board: Board) -> None:
    """The data sheet says that SET clears UIE."""
    board[REG_B] = H24 | UIE
    board[REG_B] = H24 | UIE | SET
    assert board[REG_B] == H24 | SET
    board.advance(10)
    assert board.levels == []


def test_alarm_interrupts_at_its_time(board: Board) -> None:
    """The alarm is hours away."""
    board[REG_A] = 0x20
    for index, value in ((HOURS_ALARM, 0x06), (MINUTES_ALARM, 0x30), (SECONDS_ALARM, 0x05)):
        board[index] = value
    board[REG_C]
    board[REG_B] = H24 | AIE
    board.advance(10 + 6 * 3600 + 30 * 60 + 4.9)
    assert not board.line()
    assert board.fired <= 400  # one check a minute, because the host's clock may be set
    board.advance(0.2)
    assert board.line()
    assert board[REG_C] == IRQF | AF | UF
    board.advance(86399)
    assert not board.line()
    board.advance(2)
    assert board.line()


def test_alarm_with_wild_cards(board: Board) -> None:
    """With every hour and every minute, the alarm comes once a minute."""
    board[HOURS_ALARM] = board[MINUTES_ALARM] = 0xFF
    board[SECONDS_ALARM] = 0x30
    board[REG_B] = H24 | AIE
    alarms = 0
    for _ in range(180):
        board.advance(1)
        alarms += board.line()
        board[REG_C]
    assert alarms == 3


def test_alarm_that_never_matches_sets_no_timer(board: Board) -> None:
    """The alarm's hour is 25."""
    board[HOURS_ALARM] = 0x25
    board[REG_B] = H24 | AIE
    assert board.calls == []
    board.advance(200000)
    assert board.levels == []


@pytest.mark.parametrize(("register", "latest"), [(HOURS_ALARM, 23), (MINUTES_ALARM, 59), (SECONDS_ALARM, 59)])
@pytest.mark.parametrize("mode", [H24, H24 | BINARY])
def test_the_latest_alarm(board: Board, register: int, latest: int, mode: int) -> None:
    """The largest hour, minute or second of a day still matches.  From the next one on none matches."""
    board[REG_A] = 0x20
    board[REG_B] = mode | AIE
    for value, alarms in ((latest, 1), (latest + 1, 0)):
        board[HOURS_ALARM] = board[MINUTES_ALARM] = board[SECONDS_ALARM] = 0
        board[register] = value if mode & BINARY else value // 10 << 4 | value % 10
        board[REG_C]
        board.advance(86400)
        assert bool(board[REG_C] & AF) == bool(alarms)


def test_new_alarm_in_the_past_is_for_the_next_day(board: Board) -> None:
    """An alarm at 23:59:55 that is set at 23:59:58 comes the next day."""
    board.advance(8)
    board[REG_B] = H24 | AIE
    board[HOURS_ALARM], board[MINUTES_ALARM] = 0x23, 0x59
    board[REG_C]
    board[SECONDS_ALARM] = 0x55
    board.advance(1)
    assert not board.line()
    board.advance(86396)
    assert board.line()


@pytest.mark.parametrize("rate", range(16))
def test_every_rate_nibble(board: Board, rate: int) -> None:
    """Rate 0 is off.  The fastest rates give an interrupt every EARLIEST_S."""
    board[REG_A] = 0x20 | rate
    board[REG_B] = H24 | PIE
    ticks = 0
    for _ in range(10000):
        board.advance(1e-4)
        ticks += board.line()
        board[REG_C]
    hertz = 0 if rate == 0 else 32768 >> (rate + 6 if rate < 3 else rate - 1)
    assert abs(ticks - min(hertz, 1 / EARLIEST_S)) <= max(2, hertz * 0.2)


def test_seabios_counts_1024_hz(board: Board) -> None:
    """The guest acknowledges each tick, and no tick is lost when it is a little late."""
    board[REG_A] = 0x26
    board[REG_B] = H24 | PIE
    ticks = 0
    start_s = board.monotonic_s
    for late_s in [0.0005, 0.003, 0.0003, 0.0004, 0.0004, 0.0003] * 200:
        board.advance(late_s)
        ticks += board[REG_C] & PF > 0
    assert ticks == pytest.approx((board.monotonic_s - start_s) * 1024, abs=3)


def test_unacknowledged_tick_costs_the_host_nothing(board: Board) -> None:
    """No timer runs until register C is read.  Only a part of the missed ticks comes later."""
    board[REG_A] = 0x23
    board[REG_B] = H24 | PIE
    board.advance(100)
    assert board.fired == 1
    assert board.line()
    board[REG_C]
    board.fired = 0
    made_up = 0
    for _ in range(10000):  # a guest that acknowledges as fast as it can
        board.advance(EARLIEST_S)
        made_up += board.line()
        board[REG_C]
    assert board.fired <= 10000
    assert made_up <= 10000


def test_polled_periodic_flag(board: Board) -> None:
    """PF is set even without PIE, once for any number of periods."""
    board[REG_C]
    assert not board[REG_C] & PF
    board.advance(0.5)
    assert board[REG_C] == PF
    assert board[REG_C] == 0
    board.advance(0.0005)
    assert board[REG_C] == 0
    assert board.calls == []


def test_polling_sees_every_period(board: Board) -> None:
    """PF is set once for each period of 1/1024 s in which the guest looks."""
    seen = 0
    for _ in range(1024):
        board.advance(1 / 1024)
        seen += board[REG_C] & PF > 0
    assert seen >= 1023


def test_enabling_an_interrupt_whose_flag_is_set_raises_it(board: Board) -> None:
    """Flags are set even while their enable bits are clear."""
    board.advance(1.5)
    board[REG_B] = H24 | UIE
    assert board.line()
    assert board[REG_C] & (IRQF | UF) == IRQF | UF


def test_clock_follows_a_host_clock_that_jumps_back(board: Board) -> None:
    """The host's clock jumps back by an hour.  The guest's clock follows, and interrupts continue."""
    board[REG_B] = H24 | UIE
    board.advance(2)
    board[REG_C]
    board.now_s -= 3600
    board.advance(1)
    assert board[HOURS] == 0x22
    board[REG_C]
    board.advance(1)
    assert board.line()


def test_call_for_an_interrupt_that_was_disabled_does_nothing(board: Board) -> None:
    """The call is not cancelled, and does nothing when it comes."""
    board[REG_B] = H24 | PIE | UIE
    board[REG_B] = H24
    board.advance(5)
    assert board.fired == 2
    assert board.calls == []
    assert board.levels == []


def test_guest_cannot_fill_memory_with_timers(board: Board) -> None:
    """Otherwise each change of the registers would leave a cancelled timer in the event loop."""
    for round_ in range(3000):
        board[HOURS_ALARM] = round_ % 24
        board[REG_B] = H24 | AIE
        board[REG_A] = 0x20 | round_ % 16
        board[REG_B] = H24 | PIE | UIE
        board[REG_C]
        board[REG_B] = H24
    assert len(board.calls) <= 16


def test_fixed_registers(board: Board) -> None:
    """Register D shows a good battery.  C, D and UIP are not writable, and port 70h is not readable."""
    assert board[REG_D] == 0x80
    board[REG_D] = board[REG_C] = 0
    assert board[REG_D] == 0x80
    board[REG_A] = 0xA6
    assert board[REG_A] == 0x26
    assert board.rtc.pio_read(0, 1) == 0xFF


@pytest.mark.parametrize(
    ("memory_bytes", "extended", "above_16m", "above_4g"),
    [
        (8 << 20, 7 * 1024, 0, 0),
        (512 << 20, 0xFFFF, 496 * 16, 0),
        (GIB * 7 // 2, 0xFFFF, (3584 - 16) * 16, 0),
        (8 * GIB, 0xFFFF, (3584 - 16) * 16, (8192 - 3584) * 16),
    ],
)
def test_cmos_has_the_memory_size_for_a_bios(memory_bytes: int, extended: int, above_16m: int, above_4g: int) -> None:
    """SeaBIOS reads the RAM below 4 GiB from 34h and 35h, and the number of CPUs from 5Fh."""
    board = Board(memory_bytes=memory_bytes, vcpus=3)
    assert board[0x15] | board[0x16] << 8 == 640
    assert board[0x17] | board[0x18] << 8 == extended
    assert board[0x30] | board[0x31] << 8 == extended
    assert board[0x34] | board[0x35] << 8 == above_16m
    assert board[0x5B] | board[0x5C] << 8 | board[0x5D] << 16 == above_4g
    assert board[0x5F] == 2


def test_boot_order_in_cmos(board: Board) -> None:
    """Without a bootorder file the order is disk, CD, network."""
    order = board[0x3D] | (board[0x38] & 0xF0) << 4
    assert [order & 15, order >> 4 & 15, order >> 8] == [2, 3, 4]


def test_memory_is_kept_and_the_index_wraps(board: Board) -> None:
    """The memory has 128 bytes.  Bit 7 of the index is the NMI mask and no part of the address."""
    board[0x7F] = 0x5A
    board.rtc.pio_write(0, 1, 0x7F)
    assert board.rtc.pio_read(1, 1) == 0x5A


def test_saved_state_continues(board: Board) -> None:
    """The time that the guest has set and a pending interrupt are restored, and time goes on."""
    board[HOURS] = 0x05
    board[REG_B] = H24 | UIE
    board.advance(1.5)
    board[0x50] = 0x77
    other = Board("2024-02-28 23:59:55")
    other.rtc.restore(board.rtc.state())
    assert other.line()
    assert other[REG_C] == board[REG_C] == IRQF | UF | PF
    assert other[0x50] == 0x77
    assert (other[HOURS], other[SECONDS]) == (0x05, 0x55)
    other.advance(1)
    assert other.line()


def test_impossible_state_is_refused(board: Board) -> None:
    """The error names the value, and nothing changes."""
    state = board.rtc.state()
    with pytest.raises(ValueError, match="memory of 3 bytes"):
        board.rtc.restore(state | {"ram": b"abc"})
    with pytest.raises(ValueError, match="offset of"):
        board.rtc.restore(state | {"offset_us": 1 << 80})
    assert board.rtc.state() == state


ACCESS = st.tuples(
    st.sampled_from(["index", "read", "write", "advance", "clock"]),
    st.one_of(st.integers(0, 255), st.sampled_from([REG_A, REG_B, REG_C, 0x32])),
)


@given(st.lists(ACCESS, max_size=60))
def test_no_sequence_breaks_an_invariant(steps: list[tuple[str, int]]) -> None:
    """After random accesses, reads give bytes, the line agrees with the registers, and timers are few."""
    board = Board()
    for kind, value in steps:
        if kind == "index":
            board.rtc.pio_write(0, 1, value)
        elif kind == "read":
            assert 0 <= board.rtc.pio_read(1, 1) <= 0xFF
        elif kind == "write":
            board.rtc.pio_write(1, 1, value)
        elif kind == "advance":
            before = board.fired
            board.advance(value / 50)
            # At most one unacknowledged tick, and one check of the clock a second.
            assert board.fired - before <= value / 50 + 3
        else:
            board.now_s += (value - 128) * 100000
        flags = board.rtc.state()["flags"]
        assert isinstance(flags, int)
        assert board.line() == bool(flags & board[REG_B] & 0x70)
        assert sum(not call.cancelled for call in board.calls) <= 2
        date = {index: board[index] for index in (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)}
        assert all(0 <= shown <= 0xFF for shown in date.values())
    twin = Board()
    twin.now_s = board.now_s
    twin.rtc.restore(board.rtc.state())
    assert twin.line() == board.line()


@given(st.integers(-62167219200, 253402300799))
@example(calendar.timegm((2000, 2, 29, 23, 59, 59)))  # the last day of 400 years that begin in March
def test_any_second_of_ten_thousand_years_is_shown_and_set(second: int) -> None:
    """The shown date agrees with the C library, and a date that is set is shown again."""
    board = Board()
    board.now_s = second
    board[REG_B] = H24 | BINARY
    broken_down = time.gmtime(second)
    shown = (board[CENTURY] * 100 + board[YEAR], board[MONTH], board[DAY], board[HOURS], board[MINUTES])
    assert (*shown, board[SECONDS]) == tuple(broken_down)[:6]
    assert board[WEEKDAY] == (broken_down.tm_wday + 1) % 7 + 1
    before = board.date()
    board[REG_B] = H24 | BINARY | SET
    board.now_s += 12345
    board.monotonic_s += 12345
    board[REG_B] = H24 | BINARY
    assert board.date() == before


# ---- pauses: the machine's time stops, the host's goes on


def pause_machine(board: Board, seconds: float) -> None:
    """Pause the machine.  Timers follow the host's time, and those that are due in the pause come at its end."""
    board.now_s += seconds
    for call in board.calls:
        call.due_s = max(call.due_s - seconds, board.monotonic_s)
    board.advance(0)


def received(board: Board, seconds: float) -> Board:
    """Return the machine after a transfer that took some time, to a host with another monotonic clock."""
    other = Board()
    other.now_s, other.monotonic_s = board.now_s + seconds, 5.0
    other.rtc.restore(board.rtc.state())
    other.advance(0)
    return other


def pause(board: Board, seconds: float) -> Board:
    """Return the same machine after a pause."""
    pause_machine(board, seconds)
    return board


EACH_WAY = pytest.mark.parametrize("stop", [pause, received])
DIVIDER_HELD, DIVIDER_RUNS = 0x66, 0x26


@EACH_WAY
def test_the_date_goes_on_during_a_pause(board: Board, stop: Callable[[Board, float], Board]) -> None:
    """A pause of three seconds adds three seconds.  The hour that the guest has set stays."""
    board[HOURS] = 0x05
    board = stop(board, 3)
    assert (board[HOURS], board[MINUTES], board[SECONDS]) == (0x05, 0x59, 0x53)


@EACH_WAY
@pytest.mark.parametrize(("register", "held", "runs", "late_s"), [
    (REG_B, H24 | SET, H24, 0.0), (REG_A, DIVIDER_HELD, DIVIDER_RUNS, 0.5),
])  # fmt: skip
def test_a_stopped_clock_adds_the_pause_when_it_runs(
    board: Board, stop: Callable[[Board, float], Board], register: int, held: int, runs: int, late_s: float
) -> None:
    """While the guest keeps the clock stopped, it shows the written values.  When it runs, the pause is added."""
    board[register] = held
    board[SECONDS] = 0x20
    board = stop(board, 3)
    assert board[SECONDS] == 0x20
    board[MINUTES] = 0x30
    board[register] = runs
    assert (board[MINUTES], board[SECONDS]) == (0x30, 0x23)
    board.advance(0.999 - late_s)
    assert board[SECONDS] == 0x23
    board.advance(0.001)
    assert board[SECONDS] == 0x24


@EACH_WAY
def test_only_time_in_which_the_guest_ran_is_lost(board: Board, stop: Callable[[Board, float], Board]) -> None:
    """A clock that is stopped for 2 s of the guest's time, with pauses of 3 s and 4 s, is 2 s late from then on."""
    board[REG_B] = H24 | SET
    board.advance(1)
    board = stop(board, 3)
    board.advance(1)
    board = stop(board, 4)
    board[REG_B] = H24
    late_s = 50 + 9 - 2
    assert board[SECONDS] == int(str(late_s), 16)
    board = stop(board, 30)
    board.advance(30)
    assert board[SECONDS] == int(str(late_s), 16)


def test_a_stopped_clock_follows_a_host_clock_that_is_set(board: Board) -> None:
    """The host's clock is set back by an hour.  The guest's clock follows, as a running one does."""
    board[REG_B] = H24 | SET
    board.now_s -= 3600
    board[REG_B] = H24
    assert (board[HOURS], board[MINUTES]) == (0x22, 0x59)


def test_a_stream_without_the_time_of_the_stop(board: Board) -> None:
    """Version 2 had neither that time nor the time of the last check for alarms.  Both count from now on."""
    board[REG_B] = H24 | SET
    state = {name: value for name, value in board.rtc.state().items() if name not in ("seen_s", "tick_us", "held_us")}
    other = Board("2024-02-29 00:00:00")
    other.rtc.restore(state)
    other[REG_B] = H24
    assert other[SECONDS] == 0x50
    other.advance(1)
    assert other[SECONDS] == 0x51


@EACH_WAY
def test_an_alarm_that_was_due_in_a_pause_comes_at_its_end(
    board: Board, stop: Callable[[Board, float], Board]
) -> None:
    """It comes once."""
    board[SECONDS_ALARM], board[MINUTES_ALARM], board[HOURS_ALARM] = 0x55, 0x59, 0x23
    board[REG_B] = H24 | AIE
    board.advance(0.5)
    assert not board.line()
    board = stop(board, 3600)
    board.advance(EARLIEST_S)
    assert board.line()
    assert board[REG_C] == IRQF | AF | UF | PF
    board.advance(3600)
    assert not board.line()


@EACH_WAY
def test_the_periodic_interrupt_goes_on_within_its_period(
    board: Board, stop: Callable[[Board, float], Board]
) -> None:
    """0.4 s of a period of 0.5 s have passed before the pause."""
    board[REG_A] = 0x2F
    board[REG_B] = H24 | PIE
    assert board[REG_C] == 0
    board.advance(0.4)
    board = stop(board, 7.7)
    board.advance(0.099)
    assert not board.line()
    board.advance(0.001)
    assert board.line()


@pytest.mark.parametrize("registers", [{"seen_s": 1 << 60}, {"tick_us": -(1 << 70)}, {"held_us": 1 << 70}])
def test_impossible_times_are_refused(board: Board, registers: dict[str, int]) -> None:
    """Such a time is beyond the range of the clock."""
    with pytest.raises(ValueError, match=f"clock: {next(iter(registers))} of"):
        board.rtc.restore({**board.rtc.state(), **registers})


@pytest.mark.parametrize("registers", [
    {"seen_s": 0}, {"seen_s": 1 << 38}, {"tick_us": 1 << 58}, {"tick_us": -5}, {"held_us": 0}, {"held_us": -(1 << 58)},
])  # fmt: skip
def test_any_other_time_does_no_harm(registers: dict[str, int]) -> None:
    """After any other time in a stream, the chip works and does not keep the host busy."""
    for control in (H24, H24 | SET, H24 | PIE | AIE | UIE):
        board = Board()
        board[REG_B] = control
        board.rtc.restore({**board.rtc.state(), **registers})
        board.advance(2)
        board[REG_B] = H24
        assert len(board.date()) == 7
        assert board.fired < 2200
