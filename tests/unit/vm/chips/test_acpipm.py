"""ACPI fixed hardware: the power button, S5 and the timer, as ACPICA and SeaBIOS use them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.vm.chips.acpipm import PM1_CNT, PM1_EN, PM1_STS, PM_TMR, TIMER_HALF, TIMER_HZ, AcpiPm

PWRBTN, TMR, SCI_EN, SLP_EN = 0x100, 0x001, 0x0001, 0x2000


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
    """A PM block with a fake clock, fake timers and recorded outputs."""

    def __init__(self) -> None:
        self.now_s = 5000.0
        self.levels: list[bool] = []
        self.off = 0
        self.acknowledged = 0
        self.calls: list[Call] = []
        self.pm = AcpiPm(self.levels.append, self.power_off, self.on_acknowledged, lambda: self.now_s, self.schedule)

    def power_off(self) -> None:
        """Count a power-off."""
        self.off += 1

    def on_acknowledged(self) -> None:
        """Count an acknowledgement."""
        self.acknowledged += 1

    def schedule(self, seconds: float, callback: object) -> Call:
        """Record a call."""
        call = Call(self.now_s + seconds, callback)
        self.calls.append(call)
        return call

    def sci(self) -> bool:
        """Return the level of the SCI line."""
        return bool(self.levels and self.levels[-1])


@pytest.fixture
def board() -> Board:
    """Return a PM block after reset."""
    return Board()


def test_acpi_mode_is_always_on(board: Board) -> None:
    """SCI_EN cannot be cleared, because the FADT has no SMI_CMD to set it again."""
    assert board.pm.pio_read(PM1_CNT, 2) == SCI_EN
    board.pm.pio_write(PM1_CNT, 2, 0x0002)
    assert board.pm.pio_read(PM1_CNT, 2) == SCI_EN | 0x0002


def test_registers_after_power_on(board: Board) -> None:
    """Nothing is enabled or pending."""
    assert [board.pm.pio_read(register, 2) for register in (PM1_STS, PM1_EN, PM1_CNT, 6)] == [0, 0, SCI_EN, 0]
    assert (board.pm.power_button_enabled, board.levels) == (False, [])


@pytest.mark.parametrize(("register", "kept", "always"), [(PM1_EN, 0x0721, 0), (PM1_CNT, 0x1C02, SCI_EN)])
def test_writable_bits(board: Board, register: int, kept: int, always: int) -> None:
    """They are set and cleared, by the whole register and by each of its bytes.  Other bits keep their values."""
    for bit in range(16):
        board.pm.pio_write(register, 2, 1 << bit & ~SLP_EN)
        assert board.pm.pio_read(register, 2) == 1 << bit & kept | always
    board.pm.pio_write(register, 2, 0xFFFF & ~SLP_EN)
    assert board.pm.pio_read(register, 2) == kept | always
    board.pm.pio_write(register + 1, 1, 0)
    assert board.pm.pio_read(register, 2) == kept & 0xFF | always
    board.pm.pio_write(register, 2, 0xFFFF & ~SLP_EN)
    board.pm.pio_write(register, 1, 0)
    assert board.pm.pio_read(register, 2) == kept & 0xFF00 | always
    board.pm.pio_write(PM1_STS, 4, 0)
    assert board.off == 0


def test_power_button_as_acpica_handles_it(board: Board) -> None:
    """The guest enables the button, gets the SCI, reads the status and clears it.  The owner is told."""
    board.pm.pio_write(PM1_EN, 2, PWRBTN)
    assert board.pm.power_button_enabled
    board.pm.power_button()
    assert board.sci()
    assert board.pm.pio_read(PM1_STS, 2) == PWRBTN
    board.pm.pio_write(PM1_STS, 2, PWRBTN)
    assert board.levels == [True, False]
    assert board.acknowledged == 1


def test_button_without_a_listener(board: Board) -> None:
    """The status is set without an interrupt.  A guest that clears it while it boots has acknowledged nothing."""
    board.pm.power_button()
    assert not board.pm.power_button_enabled
    assert board.levels == []
    board.pm.pio_write(PM1_STS, 2, 0xFFFF)
    assert board.pm.pio_read(PM1_STS, 2) == 0
    assert board.acknowledged == 0


def test_enabling_with_the_status_set_interrupts(board: Board) -> None:
    """The SCI is level-triggered."""
    board.pm.power_button()
    board.pm.pio_write(PM1_EN + 1, 1, PWRBTN >> 8)
    assert board.sci()
    board.pm.pio_write(PM1_EN, 2, 0)
    assert not board.sci()


def test_writing_zeros_to_status_clears_nothing(board: Board) -> None:
    """Only ones clear status bits."""
    board.pm.power_button()
    board.pm.pio_write(PM1_STS, 2, 0x00FF)
    assert board.pm.pio_read(PM1_STS, 2) & PWRBTN


@pytest.mark.parametrize("value", [SLP_EN | 5 << 10, SLP_EN, SLP_EN | 5 << 10 | 1])
def test_soft_off(board: Board, value: int) -> None:
    """The sleep type is that of \\_S5, or SeaBIOS's 0.  SLP_EN reads as 0."""
    board.pm.pio_write(PM1_CNT, 2, value)
    assert board.off == 1
    assert not board.pm.pio_read(PM1_CNT, 2) & SLP_EN


def test_soft_off_in_two_writes_as_acpica_does(board: Board) -> None:
    """The first write has the sleep type, and the second one has SLP_EN too."""
    board.pm.pio_write(PM1_CNT, 2, 5 << 10 | 1)
    assert board.off == 0
    board.pm.pio_write(PM1_CNT, 2, 5 << 10 | 1 | SLP_EN)
    assert board.off == 1


@pytest.mark.parametrize("sleep_type", [1, 2, 3, 4, 6, 7])
def test_other_sleep_states_do_nothing(board: Board, sleep_type: int) -> None:
    """The guest stays awake."""
    board.pm.pio_write(PM1_CNT, 2, SLP_EN | sleep_type << 10)
    assert board.off == 0


def test_timer_counts_3579545_a_second(board: Board) -> None:
    """The timer has 32 bits, starts at 0, and wraps."""
    assert board.pm.pio_read(PM_TMR, 4) == 0
    board.now_s += 1
    assert board.pm.pio_read(PM_TMR, 4) == TIMER_HZ
    board.now_s += 2 * TIMER_HALF / TIMER_HZ
    assert abs(board.pm.pio_read(PM_TMR, 4) - TIMER_HZ) <= 1
    assert board.pm.pio_read(PM_TMR + 2, 2) == board.pm.pio_read(PM_TMR, 4) >> 16
    assert board.pm.pio_read(PM_TMR, 2) == board.pm.pio_read(PM_TMR, 4) & 0xFFFF


def test_timer_cannot_be_written(board: Board) -> None:
    """The bytes between the registers cannot be written either."""
    board.now_s += 1
    board.pm.pio_write(PM_TMR, 4, 0)
    board.pm.pio_write(6, 2, 0xFFFF)
    assert board.pm.pio_read(PM_TMR, 4) == TIMER_HZ
    assert board.pm.pio_read(6, 2) == 0


def test_timer_status_follows_the_top_bit(board: Board) -> None:
    """It is set at each change of the top bit, once."""
    board.now_s += TIMER_HALF / TIMER_HZ - 1
    assert board.pm.pio_read(PM1_STS, 2) == 0
    board.now_s += 2
    assert board.pm.pio_read(PM1_STS, 2) == TMR
    board.pm.pio_write(PM1_STS, 2, TMR)
    assert board.pm.pio_read(PM1_STS, 2) == 0
    assert board.calls == []


def test_timer_status_is_cleared_before_it_was_read(board: Board) -> None:
    """The bit is set when the top bit changes, not when the guest looks: a write of 1 clears it."""
    board.now_s += TIMER_HALF / TIMER_HZ + 1
    board.pm.pio_write(PM1_STS, 2, TMR)
    assert board.pm.pio_read(PM1_STS, 2) == 0
    board.now_s += TIMER_HALF / TIMER_HZ
    assert board.pm.state()["status"] == TMR


def test_timer_interrupts_when_enabled(board: Board) -> None:
    """The interrupt comes when the top bit changes, ten minutes after the start, and not before."""
    board.pm.pio_write(PM1_EN, 2, TMR)
    while not board.sci():
        (call,) = board.calls
        board.calls.clear()
        board.now_s = call.due_s
        assert callable(call.callback)
        call.callback()
    assert TIMER_HALF / TIMER_HZ <= board.now_s - 5000.0 < TIMER_HALF / TIMER_HZ + 0.01
    assert board.calls == []  # no other call before this interrupt is acknowledged
    board.pm.pio_write(PM1_STS, 2, TMR)
    assert not board.sci()
    assert len(board.calls) == 1


def test_saved_state_continues(board: Board) -> None:
    """Registers, timer and line are restored."""
    board.pm.pio_write(PM1_EN, 2, PWRBTN)
    board.pm.pio_write(PM1_CNT, 2, 0x1402)
    board.pm.power_button()
    board.now_s += 3
    other = Board()
    other.pm.restore(board.pm.state())
    assert other.sci()
    assert other.pm.pio_read(PM1_STS, 4) == PWRBTN | PWRBTN << 16
    assert other.pm.pio_read(PM1_CNT, 2) == 0x1403
    assert abs(other.pm.pio_read(PM_TMR, 4) - 3 * TIMER_HZ) <= 1


def test_each_register_of_a_state_is_restored(board: Board) -> None:
    """Each bit is restored, except those that the registers do not have."""
    state = board.pm.state()
    for name, kept, always in (("status", 0x8101, 0), ("enable", 0x0721, 0), ("control", 0x1C02, SCI_EN)):
        for bit in range(17):
            board.pm.restore(state | {name: 1 << bit})
            assert board.pm.state() == state | {name: 1 << bit & kept | always}
    for ticks in (1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32 | 5):
        board.pm.restore(state | {"ticks": ticks})
        assert board.pm.state() == state | {"ticks": ticks & 0xFFFFFFFF}


@given(
    st.lists(
        st.tuples(st.integers(0, 11), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF), st.booleans()),
        max_size=40,
    )
)
def test_no_sequence_breaks_an_invariant(steps: list[tuple[int, int, int, bool]]) -> None:
    """After random accesses of all sizes, the SCI agrees with the registers, values fit, and timers are few."""
    board = Board()
    for offset, size, value, press in steps:
        if press:
            board.pm.power_button()
        board.pm.pio_write(offset, size, value & (1 << 8 * size) - 1)
        board.now_s += value / 1e7
        for read_size in (1, 2, 4):
            assert 0 <= board.pm.pio_read(offset, read_size) < 1 << 8 * read_size
        # PM1_STS is read first: this test makes no calls when the timer's top bit changes.
        assert bool(board.pm.pio_read(PM1_STS, 2) & board.pm.pio_read(PM1_EN, 2)) == board.sci()
        assert len(board.calls) <= 1
        assert board.pm.pio_read(PM1_CNT, 2) & SCI_EN
